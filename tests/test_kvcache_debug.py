"""FLASH_ROCM_DEBUG=1: what is wrong in the contents of lengths, entries and page tables is reported.

On the virtual GPU caches have exactly their memory, and any access beside it is an error of its own; elsewhere
they lie between values that must stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kvcache_calls import BATCH, CAPACITY, DIM, DIM_V, ENTRIES, HEADS, HEADS_K, NEW, full_call, integers, without_new
from test_adversarial import random, same

import flash_rocm
from flash_rocm import cache_ops, v3
from flash_rocm.dropin import private
from flash_rocm.problem import CacheInputs
from flash_rocm.runtime import ConfigError

TARGETS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("interpret", id="interpret", marks=pytest.mark.interpret),
    pytest.param("virtual:gfx942", id="virtual-gfx942", marks=pytest.mark.virtual),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
NOTHING = " Nothing outside of the cache was read or written."
GUARD = 77.0


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels of a target, on tensors of what :func:`device_of` says."""
    with contextlib.ExitStack() as stack:
        if request.param.startswith("virtual"):
            stack.enter_context(flash_rocm.virtual_gpu(request.param.partition(":")[2]))
        if request.param != "cpu":
            stack.enter_context(flash_rocm.use_backend("triton"))
        yield request.param


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")


def device_of(target: str) -> str:
    return "cuda" if target == "cuda" else "cpu"


def paged(device: str, page_size: int, *lengths: int, new: int = 0, rows: int = 1) -> dict[str, Any]:
    """A call over pages of which each sequence has just enough."""
    pages = -(-(max(lengths) + new) // page_size)
    shape = (pages * len(lengths), page_size)
    arguments = dict(
        q=random(device, len(lengths), rows, HEADS, DIM),
        k_cache=random(device, *shape, HEADS_K, DIM, seed=1),
        v_cache=random(device, *shape, HEADS_K, DIM_V, seed=2),
        cache_seqlens=integers(device, *lengths),
        block_table=torch.arange(shape[0], dtype=torch.int32, device=device).view(len(lengths), pages),
    )
    if new:
        arguments["k"] = random(device, len(lengths), new, HEADS_K, DIM, seed=3)
        arguments["v"] = random(device, len(lengths), new, HEADS_K, DIM_V, seed=4)
    return arguments


def assert_reported(
    arguments: dict[str, Any],
    text: str,
    target: str,
    function: Callable[..., Any] = flash_rocm.flash_attn_with_kvcache,
    caches: tuple[str, str] = ("k_cache", "v_cache"),
) -> None:
    """The error, and the guards around both caches as they were."""
    guarded = {}
    if not target.startswith("virtual"):
        is_one = arguments[caches[0]].data_ptr() == arguments[caches[1]].data_ptr()
        for name in caches[:1] if is_one else caches:
            cache = arguments[name]
            guard = torch.full_like(cache, GUARD)
            guarded[name] = torch.cat([guard, cache, guard])
            arguments[name] = guarded[name][cache.shape[0] : -cache.shape[0]]
        if is_one:
            arguments[caches[1]] = arguments[caches[0]][..., : arguments[caches[1]].shape[-1]]
    with pytest.raises(ValueError) as error:
        function(**arguments)
    assert str(error.value) == text + NOTHING
    for x in guarded.values():
        outside = torch.cat([x[: x.shape[0] // 3], x[-(x.shape[0] // 3) :]])
        assert bool((outside == GUARD).all())


# --------------------------------------------------------------------------------------------------
# Page numbers


@pytest.mark.parametrize("bad", (-1, "entries", 1 << 30), ids=str)
@pytest.mark.parametrize(
    ("page_size", "rows"), [(64, 1), (64, 9), (3, 1), (1, 9)], ids=["whole", "whole-prefill", "small", "single-prefill"]
)
@pytest.mark.usefixtures("debug")
def test_page_that_is_read(page_size: int, rows: int, bad: Any, target: str) -> None:
    """Kernels take one page for a tile of keys, or look up each key."""
    arguments = paged(device_of(target), page_size, 2, 2 * page_size + 1 if page_size < 64 else 100, rows=rows)
    pages = arguments["k_cache"].shape[0]
    arguments["block_table"][1, -1] = pages if bad == "entries" else bad
    arguments["block_table"][0, -(-2 // page_size) :] = -7  # behind the last page: not looked at
    assert_reported(arguments, f"block_table: expected pages in [0, {pages}), got another in sequence 1.", target)


@pytest.mark.parametrize("bad", (-1, "entries", 1 << 30), ids=str)
@pytest.mark.parametrize("page_size", (64, 3))
@pytest.mark.usefixtures("debug")
def test_page_that_is_written(page_size: int, bad: Any, target: str) -> None:
    arguments = paged(device_of(target), page_size, 2, page_size + 1, new=page_size)
    pages = arguments["k_cache"].shape[0]
    arguments["block_table"][0, -1] = pages if bad == "entries" else bad
    arguments["cache_seqlens"] = integers(device_of(target), page_size + 1, 2)
    first = [arguments[name][0].clone() for name in ("k_cache", "v_cache")]
    assert_reported(arguments, f"block_table: expected pages in [0, {pages}), got another in sequence 0.", target)
    assert same([arguments[name][0] for name in ("k_cache", "v_cache")], first)  # nor in the place of another


# --------------------------------------------------------------------------------------------------
# Lengths and entries

USUAL = "cache_seqlens, cache_leftpad"
LENGTHS = f"{USUAL}: expected lengths, with the new tokens, in [0, 12], got another in sequence 1."


@pytest.mark.parametrize("bad", (-1, CAPACITY + 1, 2**31 - 1, -(2**31)))
@pytest.mark.parametrize("append", (False, True), ids=["read", "append"])
@pytest.mark.parametrize("paged", (False, True), ids=["entries", "pages"])
@pytest.mark.usefixtures("debug")
def test_length(paged: bool, append: bool, bad: int, target: str) -> None:
    arguments = full_call(device_of(target), paged)
    for name in ("rotary_cos", "rotary_sin"):
        del arguments[name]
    arguments = arguments if append else without_new(arguments)
    bad = CAPACITY - NEW + 1 if append and bad == CAPACITY + 1 else bad
    arguments["cache_seqlens"] = integers(device_of(target), 5, bad)
    assert_reported(arguments, LENGTHS, target)


@pytest.mark.parametrize("bad", (-1, CAPACITY + 1, 2**31 - 1))
@pytest.mark.usefixtures("debug")
def test_left_padding(bad: int, target: str) -> None:
    arguments = without_new(full_call(device_of(target)))
    arguments["cache_leftpad"] = integers(device_of(target), 5, bad)
    assert_reported(arguments, LENGTHS, target)


@pytest.mark.parametrize("bad", (-1, ENTRIES, 1 << 30))
@pytest.mark.parametrize("append", (False, True), ids=["read", "append"])
@pytest.mark.usefixtures("debug")
def test_entry(append: bool, bad: int, target: str) -> None:
    arguments = full_call(device_of(target)) if append else without_new(full_call(device_of(target)))
    arguments["cache_batch_idx"] = integers(device_of(target), 2, bad)
    others = [arguments[name][[0, 1, 3]].clone() for name in ("k_cache", "v_cache")]
    assert_reported(arguments, "cache_batch_idx: expected entries in [0, 4), got another in sequence 1.", target)
    assert same([arguments[name][[0, 1, 3]] for name in ("k_cache", "v_cache")], others)


# --------------------------------------------------------------------------------------------------
# Packed queries: a decode beside a prefill, over pages and over packed keys


def prefill(device: str, page_size: int, *lengths: int) -> dict[str, Any]:
    """A call of flash_attn_varlen_func: one query of the first sequence, 9 of the second."""
    given = paged(device, page_size, *lengths)
    return dict(
        q=random(device, 10, HEADS, DIM),
        k=given["k_cache"],
        v=given["v_cache"],
        cu_seqlens_q=integers(device, 0, 1, 10),
        cu_seqlens_k=integers(device, 0, lengths[0], sum(lengths)),
        max_seqlen_q=9,
        max_seqlen_k=max(lengths),
        causal=True,
        block_table=given["block_table"],
    )


@pytest.mark.parametrize("bad", (-1, "entries", 1 << 30), ids=str)
@pytest.mark.parametrize("page_size", (64, 3))
@pytest.mark.usefixtures("debug")
def test_page_of_a_prefill(page_size: int, bad: Any, target: str) -> None:
    arguments = prefill(device_of(target), page_size, 2, page_size + 1)
    pages = arguments["k"].shape[0]
    arguments["block_table"][1, -1] = pages if bad == "entries" else bad
    text = f"block_table: expected pages in [0, {pages}), got another in sequence 1."
    assert_reported(arguments, text, target, flash_rocm.flash_attn_varlen_func, ("k", "v"))


@pytest.mark.parametrize("bad", (-1, 129, 2**31 - 3))
@pytest.mark.usefixtures("debug")
def test_length_of_a_prefill(bad: int, target: str) -> None:
    """More than the pages of a sequence hold, which is 128, or a sequence that ends before it starts."""
    arguments = prefill(device_of(target), 64, 2, 128)
    arguments["cu_seqlens_k"] = integers(device_of(target), 0, 2, 2 + bad)
    text = "cu_seqlens_k: expected lengths in [0, 128], got another in sequence 1."
    assert_reported(arguments, text, target, flash_rocm.flash_attn_varlen_func, ("k", "v"))


@pytest.mark.parametrize("fault", ("page", "length"))
@pytest.mark.usefixtures("debug")
def test_names_of_the_called_function(fault: str, target: str) -> None:
    """One that calls lengths and pages as the operator's inputs do, and the operator, which knows no caller."""
    arguments = prefill(device_of(target), 64, 2, 128)
    arguments |= {"seqused_k": integers(device_of(target), 2, 128), "dropout_p": 0.0, "softmax_scale": 0.3}
    if fault == "page":
        arguments["block_table"][1, -1] = 4
        texts = ["block_table: expected pages in [0, 4)"] * 2
    else:
        arguments["seqused_k"] = integers(device_of(target), 2, 129)
        texts = [f"{n}: expected lengths, with the new tokens, in [0, 128]" for n in ("seqused_k, leftpad_k", USUAL)]
    texts = [f"{text}, got another in sequence 1." for text in texts]
    assert_reported(arguments, texts[0], target, private._flash_attn_varlen_forward, ("k", "v"))
    inputs = CacheInputs(**{name: arguments.get(name) for name in CacheInputs._fields})
    with pytest.raises(ValueError) as error:
        cache_ops.attention_cached(inputs, (9, 128, 0, 0.3, -1, 0, 0.0, 0, False, 0, ""))
    assert str(error.value) == texts[1] + NOTHING


@pytest.mark.parametrize("fault", ("page that is read", "page that is written", "length"))
@pytest.mark.usefixtures("debug")
def test_chunk_of_a_prompt(fault: str, target: str) -> None:
    """Queries and new tokens packed: what a server does in one call."""
    device = device_of(target)
    given = paged(device, 3, 4, 11)  # pages for 12 tokens
    arguments = {name: x for name, x in given.items() if name not in ("q", "block_table")} | dict(
        q=random(device, 10, HEADS, DIM),
        k=random(device, 10, HEADS_K, DIM, seed=3),
        v=random(device, 10, HEADS_K, DIM_V, seed=4),
        cache_seqlens=integers(device, 4, 3),
        page_table=given["block_table"],
        cu_seqlens_q=integers(device, 0, 1, 10),
        cu_seqlens_k_new=integers(device, 0, 1, 10),
        max_seqlen_q=9,
        causal=True,
    )
    text = "page_table: expected pages in [0, 8), got another in sequence 1."
    if fault == "length":
        arguments["cache_seqlens"] = integers(device, 4, 4)
        text = LENGTHS
    else:
        arguments["page_table"][1, 0 if fault.endswith("read") else 3] = 8
    assert_reported(arguments, text, target, v3.flash_attn_with_kvcache)


#: Bounds of 10 packed rows, and how many rows of each sequence are used.
PACKED: dict[str, tuple[tuple[int, ...], tuple[int, int] | None]] = {
    "more than the sequence has": ((0, 4, 8), (4, 5)),
    "more than there is": ((0, 4, 10), (3, 7)),
    "less than nothing": ((0, 4, 10), (3, -1)),
    "an end that is too far": ((0, 4, 12), None),
    "an end before the start": ((0, 4, 2), None),
    "a start that is too far": ((0, 2**31 - 2, 2**31 - 1), (0, 1)),
    "a start below 0": ((-4, -3, 10), None),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("debug")
def test_packed_keys(name: str, target: str) -> None:
    """They have no room of their own that a length could be held against, only each other's rows."""
    device, (bounds, used) = device_of(target), PACKED[name]
    arguments = dict(
        q=random(device, 4, HEADS, DIM),
        k=random(device, 10, HEADS_K, DIM, seed=1),
        v=random(device, 10, HEADS_K, DIM_V, seed=2),
        cu_seqlens_q=integers(device, 0, 2, 4),
        cu_seqlens_k=integers(device, *bounds),
        max_seqlen_q=2,
        max_seqlen_k=10,
        seqused_k=None if used is None else integers(device, *used),
        attention_chunk=16,
    )
    text = "cu_seqlens_k, seqused_k: expected bounds in [0, 10] and lengths within them, got another in sequence 1."
    assert_reported(arguments, text, target, v3.flash_attn_varlen_func, ("k", "v"))


@pytest.mark.parametrize("bad", (-1, 11))
@pytest.mark.usefixtures("debug")
def test_where_packed_keys_start(bad: int, target: str) -> None:
    device = device_of(target)
    arguments = dict(
        q=random(device, 4, HEADS, DIM),
        k=random(device, 10, HEADS_K, DIM, seed=1),
        v=random(device, 10, HEADS_K, DIM_V, seed=2),
        cu_seqlens_q=integers(device, 0, 2, 4),
        cu_seqlens_k=integers(device, 0, 4, 10),
        max_seqlen_q=2,
        max_seqlen_k=10,
        dropout_p=0.0,
        softmax_scale=0.3,
        causal=True,
        leftpad_k=integers(device, 1, bad),
    )
    text = (
        "cu_seqlens_k, seqused_k, leftpad_k: expected bounds in [0, 10] and lengths within them, "
        "got another in sequence 1."
    )
    assert_reported(arguments, text, target, private._flash_attn_varlen_forward, ("k", "v"))


# --------------------------------------------------------------------------------------------------
# MLA, absorbed


def mla(device: str, form: str, page_size: int) -> dict[str, Any]:
    """Sequences of 2 and page_size + 1 tokens; "one tensor": the first dims of the keys are the values."""
    given = paged(device, page_size, 2, page_size + 1)
    pages, heads = given["k_cache"].shape[0], 2
    dim, dim_v = (576, 512) if form == "one tensor" else (16, 64)
    k_cache = random(device, pages, page_size, 1, dim, seed=1)
    arguments = dict(
        q=random(device, 2, 1, heads, dim),
        k_cache=k_cache,
        v_cache=k_cache[..., :dim_v] if form == "one tensor" else random(device, pages, page_size, 1, dim_v, seed=2),
        cache_seqlens=given["cache_seqlens"],
        page_table=given["block_table"],
    )
    return arguments | ({} if form == "one tensor" else {"qv": random(device, 2, 1, heads, dim_v, seed=3)})


@pytest.mark.parametrize("fault", ("page", "length"))
@pytest.mark.parametrize("page_size", (64, 3))
@pytest.mark.parametrize("form", ("one tensor", "qv"))
@pytest.mark.usefixtures("debug")
def test_mla(form: str, page_size: int, fault: str, target: str) -> None:
    arguments = mla(device_of(target), form, page_size)
    pages = arguments["k_cache"].shape[0]
    text = f"page_table: expected pages in [0, {pages}), got another in sequence 1."
    if fault == "page":
        arguments["page_table"][1, 1] = pages
    else:
        arguments["cache_seqlens"] = integers(device_of(target), 2, 2 * page_size + 1)
        text = LENGTHS.replace("12", str(2 * page_size))
    assert_reported(arguments, text, target, v3.flash_attn_with_kvcache)


# --------------------------------------------------------------------------------------------------
# Rotary tables

ROTARY = "rotary_cos, rotary_sin: expected positions in [0, {rows}), got another in sequence 1."


@pytest.mark.usefixtures("debug")
def test_queries_beyond_the_rotary_table(target: str) -> None:
    """More queries than new tokens, under a mask: their positions pass the end of the cache."""
    arguments = full_call(device_of(target))
    arguments["q"] = random(device_of(target), BATCH, 8, HEADS, DIM)
    arguments["causal"] = True
    assert_reported(arguments, ROTARY.format(rows=CAPACITY + 4), target)


@pytest.mark.usefixtures("debug")
def test_queries_of_one_position(target: str) -> None:
    """Without a mask all queries are at the position of the first new token, which the table has."""
    arguments = full_call(device_of(target))
    arguments["q"] = random(device_of(target), BATCH, 8, HEADS, DIM)
    assert flash_rocm.flash_attn_with_kvcache(**arguments)[0].isfinite().all()


@pytest.mark.parametrize("bad", (-1, CAPACITY + 3, 2**31 - 1))
@pytest.mark.usefixtures("debug")
def test_new_tokens_beyond_the_rotary_table(bad: int, target: str) -> None:
    """Positions of their own (rotary_seqlens), which only the operator takes."""
    given = full_call(device_of(target))
    inputs = CacheInputs(
        q=given["q"], k=given["k_cache"], v=given["v_cache"], k_new=given["k"], v_new=given["v"],
        rotary_cos=given["rotary_cos"], rotary_sin=given["rotary_sin"], seqused_k=given["cache_seqlens"],
        cache_batch_idx=given["cache_batch_idx"], rotary_seqlens=integers(device_of(target), 1, bad),
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        cache_ops.append_kv(inputs, NEW, True, "")
    assert str(error.value) == ROTARY.format(rows=CAPACITY + 4) + NOTHING


# --------------------------------------------------------------------------------------------------
# Calls without a fault, and the variable


@pytest.mark.parametrize("kind", ("entries", "pages", "whole pages", "window"))
def test_valid_call_is_unchanged(kind: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def arguments() -> dict[str, Any]:
        if kind == "whole pages":
            return paged(device_of(target), 64, 5, 128) | {"return_softmax_lse": True}
        return full_call(device_of(target), kind == "pages") | ({"window_size": (3, 1)} if kind == "window" else {})

    plain, checked = arguments(), arguments()
    expected = flash_rocm.flash_attn_with_kvcache(**plain)
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    found = flash_rocm.flash_attn_with_kvcache(**checked)
    assert same((*found, checked["k_cache"], checked["v_cache"]), (*expected, plain["k_cache"], plain["v_cache"]))


@pytest.mark.usefixtures("debug")
def test_several_faults_at_once(target: str) -> None:
    arguments = without_new(full_call(device_of(target)))
    arguments.update(
        cache_batch_idx=integers(device_of(target), -1, 0), cache_seqlens=integers(device_of(target), 5, 99)
    )
    other = "cache_batch_idx: expected entries in [0, 4), got another in sequence 0."
    assert_reported(arguments, f"{LENGTHS} {other}", target)


def test_another_value_of_the_variable(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = full_call(device_of(target))
    caches = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "2")
    with pytest.raises(ConfigError) as error:
        flash_rocm.flash_attn_with_kvcache(**arguments)
    assert str(error.value) == "FLASH_ROCM_DEBUG: expected 0 or 1, got '2'. Hint: unset it for 0."
    assert same((arguments["k_cache"], arguments["v_cache"]), caches)
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "0")
    flash_rocm.flash_attn_with_kvcache(**arguments)


@pytest.mark.virtual
@pytest.mark.parametrize("page_size", (64, 3))
@pytest.mark.parametrize("new", (0, 2), ids=["read", "append"])
def test_virtual_gpu_finds_what_is_not_checked(new: int, page_size: int) -> None:
    """So the silence of the tests above means something."""
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    from flash_rocm.virtual import VirtualGpuError

    arguments = paged("cpu", page_size, 2, page_size + 1, new=new)
    arguments["block_table"][1, -1] = arguments["k_cache"].shape[0]
    with flash_rocm.virtual_gpu("gfx942"), pytest.raises(VirtualGpuError):
        flash_rocm.flash_attn_with_kvcache(**arguments)
