"""Wrong arguments: each has its error, and the text names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flash_rocm
from flash_rocm import validation
from flash_rocm.problem import MAX_SEQLEN

B, S, H, D = 2, 6, 4, 8


def dense(**changes: Any) -> dict[str, Any]:
    return {name: torch.randn(B, S, H, D) for name in "qkv"} | changes


def starts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def varlen(**changes: Any) -> dict[str, Any]:
    packed: dict[str, Any] = {name: torch.randn(B * S, H, D) for name in "qkv"}
    packed |= {"cu_seqlens_q": starts(0, 5, 12), "cu_seqlens_k": starts(0, 6, 12)}
    return packed | {"max_seqlen_q": 7, "max_seqlen_k": 6} | changes


def not_contiguous(*shape: int) -> torch.Tensor:
    """The shape asked for, with stride 2 in the last dim."""
    return torch.randn(*shape, 2)[..., 0]


def of_shape(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


DENSE = {
    # ranks
    "q has 3 dims": (dense(q=of_shape(S, H, D)), "q: expected 4 dims (batch, seqlen, nheads, headdim), got 3 dims"),
    "k has 5 dims": (dense(k=of_shape(1, B, S, H, D)), "k: expected 4 dims"),
    "v has 2 dims": (dense(v=of_shape(H, D)), "v: expected 4 dims"),
    # dtypes
    "k is half": (dense(k=of_shape(B, S, H, D).half()), "k: expected the dtype of q, torch.float32, got torch.float16"),
    "v is double": (
        dense(v=of_shape(B, S, H, D).double()),
        "v: expected the dtype of q, torch.float32, got torch.float64",
    ),
    "integers": (
        {name: of_shape(B, S, H, D).int() for name in "qkv"},
        "q: expected float16, bfloat16, float32 or float64, got torch.int32",
    ),
    # devices
    "k elsewhere": (dense(k=of_shape(B, S, H, D, device="meta")), "k: expected the device of q, cpu, got meta"),
    "v elsewhere": (dense(v=of_shape(B, S, H, D, device="meta")), "v: expected the device of q, cpu, got meta"),
    # heads
    "3 kv heads for 4": (
        dense(k=of_shape(B, S, 3, D), v=of_shape(B, S, 3, D)),
        "k: expected a head count that divides q's 4, got 3",
    ),
    "more kv heads": (dense(k=of_shape(B, S, 8, D), v=of_shape(B, S, 8, D)), "k: expected a head count that divides"),
    "no kv heads": (dense(k=of_shape(B, S, 0, D), v=of_shape(B, S, 0, D)), "k: expected a head count that divides"),
    "v has other heads": (dense(v=of_shape(B, S, 2, D)), "v: expected 4 heads, like k, got 2"),
    # head dims
    "k has another head dim": (dense(k=of_shape(B, S, H, 16)), "k: expected head dim 8, like q, got 16"),
    "head dim 0": ({name: of_shape(B, S, H, 0) for name in "qkv"}, "q: expected a head dim of at least 1, got 0"),
    "head dim 0 of v": (dense(v=of_shape(B, S, H, 0)), "v: expected a head dim of at least 1, got 0"),
    # shapes
    "k has another batch": (
        dense(k=of_shape(3, S, H, D), v=of_shape(3, S, H, D)),
        "k: expected batch 2, like q, got 3",
    ),
    "v is shorter than k": (
        dense(v=of_shape(B, S - 1, H, D)),
        "v: expected leading shape (2, 6, 4), like k, got (2, 5, 4)",
    ),
    # strides
    "q strided": (dense(q=not_contiguous(B, S, H, D)), "q: expected stride 1 in the last dim, got 2"),
    "k strided": (dense(k=not_contiguous(B, S, H, D)), "k: expected stride 1 in the last dim, got 2"),
    "v strided": (dense(v=not_contiguous(B, S, H, D)), "v: expected stride 1 in the last dim, got 2"),
    # scalars
    "dropout 1": (dense(dropout_p=1.0), "dropout_p: expected a probability in [0, 1), got 1.0"),
    "dropout below 0": (dense(dropout_p=-0.1), "dropout_p: expected a probability in [0, 1), got -0.1"),
    "dropout NaN": (dense(dropout_p=math.nan), "dropout_p: expected a probability in [0, 1), got nan"),
    "scale inf": (dense(softmax_scale=math.inf), "softmax_scale: expected a finite number, got inf"),
    "scale NaN": (dense(softmax_scale=math.nan), "softmax_scale: expected a finite number, got nan"),
    "softcap below 0": (dense(softcap=-1.0), "softcap: expected a finite number >= 0, got -1.0"),
    "softcap inf": (dense(softcap=math.inf), "softcap: expected a finite number >= 0, got inf"),
    "softcap NaN": (dense(softcap=math.nan), "softcap: expected a finite number >= 0, got nan"),
    "window left -2": (dense(window_size=(-2, 0)), "window_size: expected entries >= -1, got (-2, 0)"),
    "window right -2": (dense(window_size=(0, -2)), "window_size: expected entries >= -1, got (0, -2)"),
    "window of 3": (dense(window_size=(1, 2, 3)), "window_size: expected (left, right), got (1, 2, 3)"),
    # ALiBi
    "slopes half": (dense(alibi_slopes=of_shape(H).half()), "alibi_slopes: expected float32, got torch.float16"),
    "slopes elsewhere": (dense(alibi_slopes=of_shape(H, device="meta")), "alibi_slopes: expected device cpu, like q"),
    "slopes of 3 heads": (dense(alibi_slopes=of_shape(3)), "alibi_slopes: expected shape (4,) or (2, 4), got (3,)"),
    "slopes of 3 batches": (
        dense(alibi_slopes=of_shape(3, H)),
        "alibi_slopes: expected shape (4,) or (2, 4), got (3, 4)",
    ),
    "slopes strided": (dense(alibi_slopes=not_contiguous(H)), "alibi_slopes: expected stride 1 in the last dim, got 2"),
}

VARLEN = {
    "q has 4 dims": (varlen(q=of_shape(B, S, H, D)), "q: expected 3 dims (total, nheads, headdim), got 4 dims"),
    "k has 4 dims": (varlen(k=of_shape(B, S, H, D)), "k: expected 3 dims (total, nheads, headdim), got 4 dims"),
    "cu_seqlens_q list": (
        varlen(cu_seqlens_q=[0, 5, 12]),
        "cu_seqlens_q: expected an int32 tensor (batch + 1,), got list",
    ),
    "cu_seqlens_q int64": (
        varlen(cu_seqlens_q=starts(0, 5, 12).long()),
        "cu_seqlens_q: expected int32, got torch.int64",
    ),
    "cu_seqlens_k int64": (
        varlen(cu_seqlens_k=starts(0, 6, 12).long()),
        "cu_seqlens_k: expected int32, got torch.int64",
    ),
    "cu_seqlens_k float": (
        varlen(cu_seqlens_k=starts(0, 6, 12).float()),
        "cu_seqlens_k: expected int32, got torch.float32",
    ),
    "cu_seqlens_q 2 dims": (varlen(cu_seqlens_q=starts(0, 5, 12)[None]), "cu_seqlens_q: expected shape (batch + 1,)"),
    "cu_seqlens_q empty": (varlen(cu_seqlens_q=starts()), "cu_seqlens_q: expected shape (batch + 1,), got (0,)"),
    "cu_seqlens_k longer": (
        varlen(cu_seqlens_k=starts(0, 6, 8, 12)),
        "cu_seqlens_k: expected shape (3,), like cu_seqlens_q, got (4,)",
    ),
    "cu_seqlens_q elsewhere": (
        varlen(cu_seqlens_q=of_shape(3, dtype=torch.int32, device="meta")),
        "cu_seqlens_q: expected device cpu, like q, got meta",
    ),
    "cu_seqlens_k elsewhere": (
        varlen(cu_seqlens_k=of_shape(3, dtype=torch.int32, device="meta")),
        "cu_seqlens_k: expected device cpu, like q, got meta",
    ),
    "cu_seqlens_k strided": (
        varlen(cu_seqlens_k=starts(0, 0, 6, 0, 12, 0)[::2]),
        "cu_seqlens_k: expected a contiguous tensor",
    ),
    "max_seqlen_q tensor": (varlen(max_seqlen_q=torch.tensor(7)), "max_seqlen_q: expected an int, got a tensor"),
    "max_seqlen_k tensor": (varlen(max_seqlen_k=torch.tensor(7)), "max_seqlen_k: expected an int, got a tensor"),
    "max_seqlen_q below 0": (varlen(max_seqlen_q=-1), "max_seqlen_q: expected an int in [0, "),
    "max_seqlen_k too long": (varlen(max_seqlen_k=MAX_SEQLEN + 1), "max_seqlen_k: expected an int in [0, "),
    "slopes of 3 batches": (
        varlen(alibi_slopes=of_shape(3, H)),
        "alibi_slopes: expected shape (4,) or (2, 4), got (3, 4)",
    ),
    "3 kv heads for 4": (
        varlen(k=of_shape(12, 3, D), v=of_shape(12, 3, D)),
        "k: expected a head count that divides q's 4, got 3",
    ),
    "k strided": (varlen(k=not_contiguous(12, H, D)), "k: expected stride 1 in the last dim, got 2"),
    "dropout 1": (varlen(dropout_p=1.0), "dropout_p: expected a probability in [0, 1), got 1.0"),
    "window -2": (varlen(window_size=(-2, -1)), "window_size: expected entries >= -1, got (-2, -1)"),
}


def paged(**changes: Any) -> dict[str, Any]:
    pages = {"k": of_shape(4, 4, H, D), "v": of_shape(4, 4, H, D), "block_table": of_shape(B, 2, dtype=torch.int32)}
    return varlen(**(pages | changes))


PAGED = {
    "k has 3 dims": (paged(k=of_shape(12, H, D)), "k: expected 4 dims"),
    "table int64": (
        paged(block_table=of_shape(B, 2, dtype=torch.int64)),
        "block_table: expected int32 of shape (2, max_pages)",
    ),
    "table 1 dim": (
        paged(block_table=of_shape(B, dtype=torch.int32)),
        "block_table: expected an int32 tensor (batch, max_pages), got (2,)",
    ),
    "table of 3": (
        paged(block_table=of_shape(3, 2, dtype=torch.int32)),
        "block_table: expected int32 of shape (2, max_pages)",
    ),
    "table elsewhere": (
        paged(block_table=of_shape(B, 2, dtype=torch.int32, device="meta")),
        "block_table: expected device cpu, like q, got meta",
    ),
}

CASES = [
    pytest.param(function, arguments, text, id=f"{prefix}: {name}")
    for prefix, function, table in (
        ("dense", flash_rocm.flash_attn_func, DENSE),
        ("varlen", flash_rocm.flash_attn_varlen_func, VARLEN),
        ("paged", flash_rocm.flash_attn_varlen_func, PAGED),
    )
    for name, (arguments, text) in table.items()
]


@pytest.mark.parametrize(("function", "arguments", "text"), CASES)
def test_refused(function: Callable[..., Any], arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(("arguments", "text"), DENSE.values(), ids=DENSE)
def test_explain_refuses_the_same(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        flash_rocm.explain(**arguments)
    assert str(caught.value).startswith(text)


def test_explain_wants_both_cu_seqlens() -> None:
    arguments = varlen(cu_seqlens_k=None)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected a tensor like cu_seqlens_q"):
        flash_rocm.explain(**arguments)


PACKED = [
    (flash_rocm.flash_attn_qkvpacked_func, (of_shape(B, S, H, D),), "qkv: expected 5 dims (..., 3, nheads, headdim)"),
    (flash_rocm.flash_attn_qkvpacked_func, (of_shape(B, S, 2, H, D),), "qkv: expected size 3 in dim -3, got 2"),
    (
        flash_rocm.flash_attn_kvpacked_func,
        (of_shape(B, S, H, D), of_shape(B, S, H, D)),
        "kv: expected 5 dims (..., 2, nheads, headdim)",
    ),
    (
        flash_rocm.flash_attn_kvpacked_func,
        (of_shape(B, S, H, D), of_shape(B, S, 3, H, D)),
        "kv: expected size 2 in dim -3, got 3",
    ),
    (
        flash_rocm.flash_attn_varlen_qkvpacked_func,
        (of_shape(12, 2, H, D), starts(0, 12), 12),
        "qkv: expected size 3 in dim -3, got 2",
    ),
    (
        flash_rocm.flash_attn_varlen_qkvpacked_func,
        (of_shape(2, 6, 3, H, D), starts(0, 12), 12),
        "qkv: expected 4 dims (..., 3, nheads, headdim)",
    ),
    (
        flash_rocm.flash_attn_varlen_kvpacked_func,
        (of_shape(12, H, D), of_shape(12, 3, H, D), starts(0, 12), starts(0, 12), 12, 12),
        "kv: expected size 2 in dim -3, got 3",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "text"), PACKED)
def test_packed_refused(function: Callable[..., Any], arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert str(caught.value).startswith(text)


def test_lengths_beyond_32_bits() -> None:
    long = of_shape(1, MAX_SEQLEN + 1, 1, 1, device="meta")
    short = of_shape(1, 1, 1, 1, device="meta")
    for name, arguments in (("q", (long, short, short)), ("k", (short, long, long))):
        with pytest.raises(ValueError, match=f"^{name}: expected seqlen <= {MAX_SEQLEN}, got {MAX_SEQLEN + 1}"):
            flash_rocm.explain(*arguments)


def test_slopes_are_not_trained() -> None:
    slopes = of_shape(H, requires_grad=True)
    with pytest.raises(NotImplementedError, match="alibi_slopes: expected a tensor that needs no gradient"):
        flash_rocm.flash_attn_func(**dense(alibi_slopes=slopes))
    with torch.no_grad():
        flash_rocm.flash_attn_func(**dense(alibi_slopes=slopes))


def test_every_check_raises_in_one_form() -> None:
    error = validation.invalid("q", "this", "that", "do so.")
    assert str(error) == "q: expected this, got that. Hint: do so."
    assert str(validation.invalid("q", "this", "that")) == "q: expected this, got that."


def test_the_callers_tensors_stay_as_they_are() -> None:
    arguments = dense(alibi_slopes=torch.rand(H), window_size=(2, 1), dropout_p=0.5, softcap=3.0)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    flash_rocm.flash_attn_func(**arguments)
    for name, copy in before.items():
        assert torch.equal(arguments[name], copy), name


@pytest.mark.parametrize("shape", [(0, S, H, D), (B, 0, H, D)])
def test_empty_input_is_not_an_error(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    out, lse, _ = flash_rocm.flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (shape[0], H, shape[1])
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_no_keys_gives_zero_and_minus_infinity() -> None:
    q, k = torch.randn(B, S, H, D, requires_grad=True), torch.randn(B, 0, H, D)
    out, lse, _ = flash_rocm.flash_attn_func(q, k, k, return_attn_probs=True)
    out.sum().backward()
    assert not out.any() and (lse == -math.inf).all() and not q.grad.any()
