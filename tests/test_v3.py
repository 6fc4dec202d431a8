"""flash_rocm.v3: every argument of FlashAttention-3's functions acts or raises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from calls import assert_equal, dtype_on, starts

import flash_rocm
from flash_rocm import v3

B, S, H, HK, D = 2, 9, 4, 2, 16
TOTAL = B * S
NAMES = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func")


def arguments(name: str, device: str = "cpu", dtype: torch.dtype | None = None, **changes: Any) -> dict[str, Any]:
    """Of a call of one of the functions."""
    generator = torch.Generator().manual_seed(1)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype or dtype_on(device))

    if name == "flash_attn_qkvpacked_func":
        return {"qkv": values(B, S, 3, H, D)} | changes
    rows = (B, S) if name == "flash_attn_func" else (TOTAL,)
    found: dict[str, Any] = {"q": values(*rows, H, D), "k": values(*rows, HK, D), "v": values(*rows, HK, D)}
    if name == "flash_attn_varlen_func":
        found |= {"cu_seqlens_q": starts(device, 7, 11), "cu_seqlens_k": starts(device, 8, 10)}
        found |= {"max_seqlen_q": 11, "max_seqlen_k": 10}
    return found | changes


def run(name: str, device: str = "cpu", **changes: Any) -> Any:
    return getattr(v3, name)(**arguments(name, device, **changes))


#: The names in FlashAttention-3's order, behind the tensors and lengths.
SCALES = ["softmax_scale", "causal"]
TENSORS = ("q", "k", "v", "qkv")
DESCALES = ["q_descale", "k_descale", "v_descale"]
REST = ["num_splits", "pack_gqa", "deterministic", "sm_margin", "return_attn_probs"]
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *SCALES, "qv", *DESCALES, "window_size", "attention_chunk", "softcap", *REST],
    "flash_attn_varlen_func": [
        *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k"),
        *(*SCALES, "qv", *DESCALES, "window_size", "attention_chunk", "softcap", *REST),
    ],
    "flash_attn_qkvpacked_func": [
        *("qkv", *SCALES, *DESCALES, "window_size", "attention_chunk", "softcap", "deterministic", "num_heads_q"),
        *("sm_margin", "return_attn_probs"),
    ],
}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(v3, name)).parameters
    assert list(parameters) == [*SIGNATURES[name], "learnable_sink"]
    assert parameters["learnable_sink"].kind is inspect.Parameter.KEYWORD_ONLY
    defaults = {key: x.default for key, x in parameters.items() if x.default is not inspect.Parameter.empty}
    expected = {"window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0, "num_splits": 1, "sm_margin": 0}
    flags = dict.fromkeys(("causal", "deterministic", "return_attn_probs"), False)
    for key, value in defaults.items():
        assert value == {**expected, **flags}.get(key), key


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_functions_of_version_2(name: str, device: str) -> None:
    """Bit for bit, and returns out, or out and softmax_lse."""
    options: dict[str, Any] = dict(softmax_scale=0.3, causal=True, window_size=(5, -1), softcap=4.0)
    results = run(name, device, return_attn_probs=True, **options)
    expected = getattr(flash_rocm, name)(**arguments(name, device), return_attn_probs=True, **options)
    assert_equal(results, expected[:2])
    assert_equal(run(name, device, **options), expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_read(name: str, device: str) -> None:
    given = arguments(name, device)
    expected = getattr(v3, name)(**given)
    for tensor in set(TENSORS) & set(given):
        assert not torch.equal(getattr(v3, name)(**given | {tensor: given[tensor].flip(0)}), expected), tensor


#: Another value of what is neither a tensor of values nor a hint.
ACTING: tuple[dict[str, Any], ...] = (
    {"softmax_scale": 0.5},
    {"causal": True},
    {"window_size": (1, 1)},
    {"softcap": 0.5},
    {"learnable_sink": torch.zeros(H)},
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ACTING, ids=lambda change: next(iter(change)))
def test_acts(name: str, change: dict[str, Any], device: str) -> None:
    change = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in change.items()}
    out, lse = run(name, device, return_attn_probs=True, **change)
    plain, plain_lse = run(name, device, return_attn_probs=True)
    assert not torch.equal(out, plain) and not torch.equal(lse, plain_lse)


def test_lengths_act(device: str) -> None:
    out = run("flash_attn_varlen_func", device)
    for change in ({"cu_seqlens_q": starts(device, 6, 11)}, {"cu_seqlens_k": starts(device, 9, 9)}):
        assert not torch.equal(run("flash_attn_varlen_func", device, **change), out)
    for change in ({"max_seqlen_q": -1}, {"max_seqlen_k": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected an int"):
            run("flash_attn_varlen_func", device, **change)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_reaches_the_operator(name: str, received: list[Any]) -> None:
    run(name)
    run(name, deterministic=True)
    assert [entry.problem.deterministic for entry in received] == [False, True]


#: What is no result: the hint, values that are taken, values that are not and what is said.
HINTS: list[tuple[str, tuple[Any, ...], tuple[Any, ...], str]] = [
    ("num_splits", (0, 1, 3, 256), (-1, 257), "num_splits: expected an int in [0, 256], got"),
    ("num_splits", (), (1.5, "2", None), "num_splits: expected an int, got"),
    ("pack_gqa", (None, True, False), (1, "yes"), "pack_gqa: expected True, False or None, got"),
    ("sm_margin", (0, 8), (-1,), "sm_margin: expected an int >= 0, got -1"),
    ("sm_margin", (), (0.5,), "sm_margin: expected an int, got"),
]


@pytest.mark.parametrize(
    ("name", "hint", "accepted", "refused", "message"),
    [(name, *hint) for name in NAMES for hint in HINTS if hint[0] in SIGNATURES[name]],
)
def test_hints(name: str, hint: str, accepted: tuple[Any, ...], refused: tuple[Any, ...], message: str) -> None:
    plain = run(name)
    for value in accepted:
        assert torch.equal(run(name, **{hint: value}), plain)
    for value in refused:
        with pytest.raises(ValueError) as error:
            run(name, **{hint: value})
        assert message in str(error.value)


REFUSED: dict[str, Any] = {
    "q_descale": torch.ones(B, HK),
    "k_descale": torch.ones(B, HK),
    "v_descale": torch.ones(B, HK),
}
#: Of inference: these act, and their calls have no backward.
INFERENCE: dict[str, Any] = {
    "qv": lambda rows: torch.ones(*rows, H, D),
    "attention_chunk": lambda rows: 4,
    "seqused_q": lambda rows: torch.tensor([3, 0], dtype=torch.int32),
    "seqused_k": lambda rows: torch.tensor([5, 2], dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in NAMES for argument in REFUSED if argument in SIGNATURES[name]]
)
def test_what_is_not_implemented_says_so(name: str, argument: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        run(name, **{argument: REFUSED[argument]})
    assert str(error.value).startswith(f"{argument}: expected ") and "FP8" in str(error.value)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in NAMES for argument in INFERENCE if argument in SIGNATURES[name]]
)
def test_arguments_of_inference(name: str, argument: str) -> None:
    value = INFERENCE[argument]((TOTAL,) if "varlen" in name else (B, S))
    expected, lse = run(name, return_attn_probs=True)
    out, changed_lse = run(name, return_attn_probs=True, **{argument: value})
    assert out.shape == expected.shape and lse.shape == changed_lse.shape and not torch.equal(out, expected)
    given = arguments(name, **{argument: value})
    leaf = given["qkv" if "qkv" in given else "q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="over a K/V cache has no backward"):
        getattr(v3, name)(**given).sum().backward()
    assert leaf.grad is None


#: Arguments of a kind, and tests of their own.
OF_THEIR_OWN = {
    "cu_seqlens_q": "test_lengths_act",
    "cu_seqlens_k": "test_lengths_act",
    "max_seqlen_q": "test_lengths_act",
    "max_seqlen_k": "test_lengths_act",
    "deterministic": "test_deterministic_reaches_the_operator",
    "return_attn_probs": "test_agrees_with_the_functions_of_version_2",
    "num_heads_q": "test_packed_heads_of_different_counts",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_has_a_test(name: str) -> None:
    kinds = (TENSORS, [key for change in ACTING for key in change], [hint for hint, *_ in HINTS], REFUSED, INFERENCE)
    tested = [key for kind in (*map(dict.fromkeys, kinds), OF_THEIR_OWN) for key in kind]
    assert len(tested) == len(set(tested)) and set(OF_THEIR_OWN.values()) <= set(globals())
    assert set(inspect.signature(getattr(v3, name)).parameters) <= set(tested)


FP8 = [getattr(torch, name) for name in dir(torch) if name.startswith("float8_")]


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_tensors_in_fp8(dtype: torch.dtype) -> None:
    """As scales of FP8: not implemented, wherever one comes in."""
    hint = "Hint: FP8 is not implemented: pass fp16 or bf16."
    for name in NAMES:
        given = arguments(name)
        for tensor in set(TENSORS) & set(given):
            for module in (v3, flash_rocm):
                with pytest.raises(NotImplementedError) as error:
                    getattr(module, name)(**given | {tensor: given[tensor].to(dtype)})
                assert str(error.value).startswith("q" if tensor == "qkv" else tensor)
                assert str(error.value).endswith(f"got {dtype}. {hint}")
    cache = {name: torch.zeros(B, S, HK, D) for name in ("k_cache", "v_cache", "k", "v")}
    given = {"q": torch.zeros(B, 1, H, D), **cache, "cache_seqlens": 3}
    given |= {name: given[name][:, :1] for name in "kv"}
    for tensor in ("q", *cache):
        for module in (v3, flash_rocm):
            with pytest.raises(NotImplementedError, match=f"^{tensor}: expected .*, got {dtype}. {hint}"):
                module.flash_attn_with_kvcache(**given | {tensor: given[tensor].to(dtype)})
    with pytest.raises(NotImplementedError, match=f"^qkv_dtype: expected .*, got {dtype}. {hint}"):
        v3.get_scheduler_metadata(1, 1, 64, 4, 2, 64, torch.ones(1, dtype=torch.int32), dtype)


def test_packed_heads_of_different_counts(device: str) -> None:
    """num_heads_q splits the heads of q, k and v; gradients arrive in the one tensor."""
    qkv = torch.randn(B, S, H + 2 * HK, D, device=device, dtype=dtype_on(device), requires_grad=True)
    out = v3.flash_attn_qkvpacked_func(qkv, num_heads_q=H, causal=True)
    expected = v3.flash_attn_func(qkv[:, :, :H], qkv[:, :, H : H + HK], qkv[:, :, H + HK :], causal=True)
    assert_equal(out, expected)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    for count, message in (
        (0, "num_heads_q: expected a count"),
        (3, "num_heads_q: expected a count"),
        (8, "num_heads_q: expected a count"),
        (2.0, "num_heads_q: expected an int"),
        (None, "qkv: expected 5 dims"),
    ):
        with pytest.raises(ValueError, match=message):
            v3.flash_attn_qkvpacked_func(qkv, num_heads_q=count)
    with pytest.raises(ValueError, match="qkv: expected 4 dims"):
        v3.flash_attn_qkvpacked_func(torch.randn(B, S, 3, H, D), num_heads_q=H)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, device: str) -> None:
    """Those of version 2, also through softmax_lse."""
    tensors = [key for key in ("qkv", "q", "k", "v") if key in SIGNATURES[name]]

    def gradients(module: Any) -> tuple[torch.Tensor, ...]:
        call = arguments(name, device)
        leaves = [call[key].requires_grad_() for key in tensors]
        out, lse, *_ = getattr(module, name)(**call, causal=True, return_attn_probs=True)
        return torch.autograd.grad(out.float().square().sum() + lse[lse.isfinite()].sum(), leaves)

    assert_equal(gradients(v3), gradients(flash_rocm))


def test_wrong_tensors_are_named() -> None:
    with pytest.raises(ValueError, match="q: expected 4 dims"):
        run("flash_attn_func", q=torch.zeros(S, H, D))
    with pytest.raises(ValueError, match="cu_seqlens_k: expected int32"):
        run("flash_attn_varlen_func", cu_seqlens_k=torch.zeros(3))
