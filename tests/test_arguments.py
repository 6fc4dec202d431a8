"""docs/arguments.md is true: each argument is used in a call of its function, and each back end asked for by name.

The call goes all the way through the public function to selection.  Where a back end is not installed, or the device is
none of its own, selection says so beside every reason that is about the call; these are what counts.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from doc_pages import write as pages

import flash_rocm
from flash_rocm import backends
from flash_rocm.arch import CPU

HEADS, DIM, ROWS, PAGE = 4, 16, 8, 4


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def integers(*numbers: Any) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def base(function: str) -> dict[str, Any]:
    """A call with nothing but what the function must have."""
    if "kvcache" in function:
        caches = {name: values(2, ROWS, HEADS, DIM) for name in ("k_cache", "v_cache")}
        return {"q": values(2, 1, HEADS, DIM), **caches, "cache_seqlens": integers(4, 5)}
    varlen = "varlen" in function
    rows = (2 * ROWS,) if varlen else (2, ROWS)
    lengths: dict[str, Any] = {}
    if varlen:
        ends, names = integers(0, ROWS, 2 * ROWS), ("",) if "_qkvpacked" in function else ("_q", "_k")
        lengths = {f"cu_seqlens{name}": ends for name in names} | {f"max_seqlen{name}": ROWS for name in names}
    if "_qkvpacked" in function:
        return {"qkv": values(*rows, 3, HEADS, DIM), **lengths}
    if "_kvpacked" in function:
        return {"q": values(*rows, HEADS, DIM), "kv": values(*rows, 2, HEADS, DIM), **lengths}
    return {name: values(*rows, HEADS, DIM) for name in "qkv"} | lengths


def pages_of(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same keys in pages."""
    names = [name for name in ("k_cache", "v_cache", "k", "v") if name in call]
    return {name: call[name].reshape(-1, PAGE, HEADS, DIM) for name in names[:2]}


def use(function: str, name: str, call: dict[str, Any]) -> dict[str, Any]:
    """What to add to a call so that it uses an argument."""
    table = integers([0, 1], [2, 3])
    new = {each: values(2, 1, HEADS, DIM) for each in "kv"}
    rotary = new | {each: values(ROWS, DIM // 4) for each in ("rotary_cos", "rotary_sin")}
    if name in ("k", "v") and "kvcache" in function:
        return new
    scheduler: dict[str, Any] = {}
    if name == "scheduler_metadata":
        shape = (2, 1, ROWS, HEADS, HEADS, DIM)
        scheduler = {name: flash_rocm.v3.get_scheduler_metadata(*shape, call["cache_seqlens"], num_splits=2)}
    packed_new = {each: values(2, HEADS, DIM) for each in "kv"}
    special: dict[str, dict[str, Any]] = {
        "dropout_p": {"dropout_p": 0.5},
        "softmax_scale": {"softmax_scale": 0.3},
        "window_size": {"window_size": (3, 0)},
        "softcap": {"softcap": 20.0},
        "alibi_slopes": {"alibi_slopes": torch.ones(HEADS)},
        "block_table": {"block_table": table, **pages_of(call)},
        "page_table": {"page_table": table, **pages_of(call)},
        "learnable_sink": {"learnable_sink": torch.zeros(HEADS)},
        "qv": {"qv": call.get("q")},
        "attention_chunk": {"attention_chunk": 4},
        "seqused_q": {"seqused_q": integers(3, 4)},
        "seqused_k": {"seqused_k": integers(3, 4)},
        "sm_margin": {"sm_margin": 1},
        "num_splits": {"num_splits": 2},
        "num_heads_q": {"num_heads_q": HEADS, "qkv": values(2, ROWS, 3 * HEADS, DIM)},
        "scheduler_metadata": scheduler,
        "rotary_cos": rotary,
        "rotary_sin": rotary,
        "rotary_interleaved": rotary | {"rotary_interleaved": False},
        "rotary_seqlens": rotary | {"rotary_seqlens": integers(1, 2)},
        "cache_batch_idx": {"cache_batch_idx": integers(1, 0)},
        "cache_leftpad": {"cache_leftpad": integers(1, 0)},
        "cu_seqlens_k_new": {"cu_seqlens_k_new": integers(0, 1, 2), **packed_new},
    }
    if "kvcache" in function:
        varlen_q = {"q": values(2, HEADS, DIM), "cu_seqlens_q": integers(0, 1, 2), "max_seqlen_q": 1}
        special |= dict.fromkeys(("cu_seqlens_q", "max_seqlen_q"), varlen_q)
    if name in special:
        return special[name]
    if name in ("q_descale", "k_descale", "v_descale"):
        return {name: torch.ones(2, HEADS)}
    return {} if name in call else {name: True}  # a switch


def reasons(function: str, call: dict[str, Any], backend: str, grad: bool = False) -> list[str]:
    """Why a back end does not take a call, apart from where it is."""
    if grad:
        call = {
            name: x.detach().requires_grad_() if name in ("q", "k", "v", "kv", "qkv") else x for name, x in call.items()
        }
    with flash_rocm.use_backend(backend):
        try:
            pages.functions()[function](**call)
        except backends.BackendError as error:
            own = [line.split(": ", 1)[1] for line in str(error).splitlines() if line.startswith(f"  {backend}: ")]
            assert own, error
            return [reason for reason in own if reason not in backends.availability_reasons(backend, CPU)]
    return []


CASES = [
    (function, name) for function, made in pages.functions().items() for name in inspect.signature(made).parameters
]


@pytest.mark.parametrize("backend", backends.CAPABILITIES)
@pytest.mark.parametrize(("function", "name"), CASES, ids=[f"{function}-{name}" for function, name in CASES])
def test_cells(function: str, name: str, backend: str) -> None:
    call = base(function)
    call |= use(function, name, call)
    assert name in call
    cell, argument = pages.cell(function, name, backend), pages.argument(function, name)
    if cell == "raises":
        with pytest.raises(NotImplementedError, match=f"^{name}: ") as error:
            reasons(function, call, backend)
        assert not isinstance(error.value, backends.BackendError)
        return
    assert bool(reasons(function, call, backend)) == (cell == "no")
    if "kvcache" in function or "no gradients" in argument.note:
        assert cell != "forward"
    else:
        assert bool(reasons(function, call, backend, grad=True)) == (cell in ("no", "forward"))


@pytest.mark.parametrize("function", pages.functions())
def test_a_no_comes_from_the_argument_or_from_the_function_as_a_whole(function: str) -> None:
    """Without any argument in use a back end takes the call, or refuses every argument of the function."""
    for backend in backends.CAPABILITIES:
        refused = bool(reasons(function, base(function), backend))
        cells = {pages.cell(function, name, backend) for name in base(function)}
        assert cells == ({"no"} if refused else {"yes"})


def test_every_argument_has_an_entry_and_every_entry_an_argument() -> None:
    names = {name for _, name in CASES}
    assert names == set(pages._ARGUMENTS)
    assert set(pages._EXCEPTIONS) <= set(CASES)
