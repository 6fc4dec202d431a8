"""``flash_attn_with_kvcache``, and calls over pages: what the matrix of operators does not say about them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from kvcache_calls import (
    BATCH,
    CAPACITY,
    DIM,
    DIM_V,
    HEADS,
    HEADS_K,
    NEW,
    PAGE,
    call_of,
    check,
    full_call,
    integers,
    run,
    without_new,
)
from test_adversarial import device as on_every_target
from test_adversarial import random, same

import flash_rocm
from flash_rocm.testing import CacheCall, assert_cached_close, make_cache_inputs, make_problem
from flash_rocm.testing import cached as cached_testing

device = on_every_target
SIGNATURE = inspect.signature(flash_rocm.flash_attn_with_kvcache).parameters
#: Another value for every argument that is no tensor of values.
OTHER_VALUES: dict[str, Any] = {
    "cache_seqlens": (4, 8),
    "cache_batch_idx": (2, 3),
    "cache_leftpad": (0, 3),
    "block_table": ((1, 0, 2, 3), (4, 5, 6, 7)),
    "softmax_scale": 0.9,
    "causal": True,
    "window_size": (2, 1),
    "softcap": 1.5,
    "rotary_interleaved": False,
    "alibi_slopes": (0.1, 0.9, 0.3, 0.7),
    "return_softmax_lse": False,
}


def other_value(name: str, current: Any, device: str) -> Any:
    if name not in OTHER_VALUES:
        return random(device, *current.shape, seed=11)
    value = OTHER_VALUES[name]
    if name == "alibi_slopes":
        return torch.tensor(value, device=device)
    return integers(device, *value) if name.startswith(("cache_", "block")) else value


def same_with_nan(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    """Equal bits, but for those of NaN: nobody's slots of a cache."""
    return same(*(tuple(x.nan_to_num(nan=9e3) for x in some) for some in (a, b)))


# --------------------------------------------------------------------------------------------------
# Every argument counts


@pytest.mark.parametrize("name", [name for name in SIGNATURE if name != "num_splits"])
def test_argument_changes_the_result(name: str, device: str) -> None:
    arguments = full_call(device, paged=name == "block_table")
    expected = run(arguments)
    assert same(run(arguments), expected)
    assert not same(run({**arguments, name: other_value(name, arguments.get(name), device)}), expected)


@pytest.mark.parametrize("name", ("q", "k", "v", "k_cache", "v_cache", "rotary_cos", "rotary_sin"))
def test_what_is_read_reaches_the_output(name: str, device: str) -> None:
    """Not only the caches, which new tokens change in any case."""
    arguments = full_call(device)
    changed = {**arguments, name: other_value(name, arguments[name], device)}
    assert not torch.equal(run(changed).out, run(arguments).out)


def test_num_splits_is_checked_and_keeps_the_result(device: str) -> None:
    arguments = full_call(device)
    for num_splits in (-1, 257):
        with pytest.raises(ValueError, match="num_splits: expected an int in"):
            run({**arguments, "num_splits": num_splits})
    torch.testing.assert_close(run({**arguments, "num_splits": 3}).out, run(arguments).out)


def test_defaults(device: str) -> None:
    """softmax_scale is 1 / sqrt(headdim); without lengths the whole cache is read; the mask is open."""
    arguments = without_new(full_call(device))
    assert same(run(arguments), run({**arguments, "softmax_scale": DIM**-0.5}))
    whole = {**arguments, "cache_seqlens": integers(device, CAPACITY, CAPACITY)}
    assert same(run({**arguments, "cache_seqlens": None}), run(whole))
    spelled = {name: SIGNATURE[name].default for name in ("causal", "window_size", "softcap", "rotary_interleaved")}
    assert same(run({**arguments, **spelled, "num_splits": 0}), run(arguments))
    assert isinstance(flash_rocm.flash_attn_with_kvcache(**{**arguments, "return_softmax_lse": False}), torch.Tensor)


@pytest.mark.parametrize("append", (False, True), ids=["read", "append"])
@pytest.mark.parametrize("length", (0, 4, CAPACITY - NEW))
def test_one_length_for_all(length: int, append: bool, device: str) -> None:
    arguments = full_call(device) if append else without_new(full_call(device))
    del arguments["cache_leftpad"]
    expected = run({**arguments, "cache_seqlens": integers(device, length, length)})
    assert same(run({**arguments, "cache_seqlens": length}), expected)


def test_causal_is_a_window(device: str) -> None:
    arguments = full_call(device)
    causal = run({**arguments, "causal": True})
    assert same(run({**arguments, "window_size": (-1, 0)}), causal)
    assert same(run({**arguments, "causal": True, "window_size": (-1, 5)}), causal)


# --------------------------------------------------------------------------------------------------
# What changes, and what does not


@pytest.mark.parametrize("paged", (False, True), ids=["entries", "pages"])
def test_only_the_slots_of_new_tokens_change(paged: bool, device: str) -> None:
    """Bit for bit, also beside them; :func:`kvcache_calls.run` watches every other tensor."""
    arguments = full_call(device, paged)
    found = run(arguments)
    written = torch.zeros(arguments["k_cache"].shape[:2], dtype=torch.bool)
    for b, length in enumerate(arguments["cache_seqlens"].tolist()):
        for position in range(length, length + NEW):
            page, slot = divmod(position, PAGE)
            if paged:
                written[int(arguments["block_table"][b, page]), slot] = True
            else:
                written[int(arguments["cache_batch_idx"][b]), position] = True
    for after, before in ((found.k_cache, arguments["k_cache"]), (found.v_cache, arguments["v_cache"])):
        changed = (after != before).flatten(2)
        assert torch.equal(changed.any(-1).cpu(), written)
    values = found.v_cache[written.to(device)].view(-1, HEADS_K, DIM_V)
    assert sorted(values.flatten().tolist()) == sorted(arguments["v"].flatten().tolist())


@pytest.mark.parametrize("lengths", [(11, 5), (12, 5), (11, 0)], ids=str)
@pytest.mark.parametrize("paged", (False, True), ids=["entries", "pages"])
def test_append_that_does_not_fit(paged: bool, lengths: tuple[int, int], device: str) -> None:
    """The reference refuses it; kernels, which nobody waits for, write what fits and nothing around the cache."""
    arguments = full_call(device, paged)
    arguments.pop("cache_leftpad", None)
    arguments.update(cache_seqlens=integers(device, *lengths), cache_batch_idx=None)
    if paged:
        spare = arguments["k_cache"].shape[0] - 1
        arguments["block_table"] = torch.arange(spare, dtype=torch.int32, device=device).view(2, -1)
    entries = spare if paged else BATCH
    guarded = {}
    for name in ("k_cache", "v_cache"):
        guarded[name] = torch.cat([torch.full_like(arguments[name], 77.0), arguments[name][:entries]])
        guarded[name] = torch.cat([guarded[name], torch.full_like(arguments[name], 77.0)])
        start = arguments[name].shape[0]
        arguments[name] = guarded[name][start : start + entries]
    before = {name: x.clone() for name, x in guarded.items()}
    try:
        flash_rocm.flash_attn_with_kvcache(**arguments)
    except ValueError as error:
        assert "cache_seqlens: expected" in str(error)
    flat = guarded["v_cache"].view(-1, HEADS_K, DIM_V)
    changed = (flat != before["v_cache"].view(-1, HEADS_K, DIM_V)).flatten(1).any(1).nonzero()[:, 0]
    start = (flat.shape[0] - entries * (PAGE if paged else CAPACITY)) // 2
    allowed = [start + b * CAPACITY + t for b, n in enumerate(lengths) for t in range(n, min(n + NEW, CAPACITY))]
    assert set(changed.tolist()) <= set(allowed)
    changed = (guarded["k_cache"] != before["k_cache"]).view(-1, HEADS_K * DIM).any(1).nonzero()[:, 0]
    assert set(changed.tolist()) <= set(allowed)


def test_negative_length_overwrites_nothing(device: str) -> None:
    arguments = full_call(device)
    caches = arguments["k_cache"].clone(), arguments["v_cache"].clone()
    entry = int(arguments["cache_batch_idx"][0])
    arguments["cache_seqlens"] = integers(device, -1, 9)
    try:
        flash_rocm.flash_attn_with_kvcache(**arguments)
    except ValueError as error:
        assert "cache_seqlens: expected" in str(error)
    assert torch.equal(arguments["k_cache"][entry], caches[0][entry])
    assert torch.equal(arguments["v_cache"][entry], caches[1][entry])


@pytest.mark.parametrize("watched", (False, True), ids=["direct", "through the dispatcher"])
def test_versions_count_the_append(watched: bool, device: str) -> None:
    """Autograd relies on it to find tensors that were overwritten."""
    from calls import SeenOperators

    arguments = full_call(device)
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    before = {name: x._version for name, x in tensors.items()}
    if watched:
        with SeenOperators():
            flash_rocm.flash_attn_with_kvcache(**arguments)
    else:
        flash_rocm.flash_attn_with_kvcache(**arguments)
    assert {name for name, x in tensors.items() if x._version > before[name]} == {"k_cache", "v_cache"}


# --------------------------------------------------------------------------------------------------
# Splits

SPLIT_CASES: dict[str, dict[str, Any]] = {
    "dense": dict(seqlen_q=1),
    "paged": dict(seqlen_q=1, page_size=3, seqlen_new=1, rotary_dim=8),
    "whole pages": dict(seqlen_q=2, page_size=64, window_right=0),
    "window": dict(seqlen_q=3, window_left=20, window_right=0, leftpad=True),
    "large tile": dict(seqlen_q=19, cache_batch_idx=True, softcap=3.0, alibi=True),
}


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_any_number_of_splits(name: str, device: str) -> None:
    problem = make_problem(
        **dict(dtype=torch.float16, device_type=device, batch=1, seqlen_k=150, nheads=2, nheads_k=1, headdim=16),
        **dict(cached=True, headdim_v=16) | SPLIT_CASES[name],
    )
    case = make_cache_inputs(problem, CacheCall())
    for num_splits in (0, 1, 2, 5, 256):
        found = check(problem, case, num_splits)
        if num_splits == 5:  # bit-equal from run to run
            assert same_with_nan(found, run(call_of(problem, case, num_splits)))


# --------------------------------------------------------------------------------------------------
# Nothing there


@pytest.mark.parametrize("lengths", [(0, 0), (0, 12), (12, 0)], ids=str)
def test_empty_sequences(lengths: tuple[int, int], device: str) -> None:
    arguments = without_new(full_call(device))
    del arguments["cache_leftpad"]
    found = run({**arguments, "cache_seqlens": integers(device, *lengths), "causal": True})
    for b, length in enumerate(lengths):
        if not length:
            assert not found.out[b].any() and bool((found.lse[b] == -math.inf).all())
        else:
            assert bool(found.out[b].any()) and bool(found.lse[b].isfinite().all())


def test_everything_is_left_padding(device: str) -> None:
    arguments = without_new(full_call(device))
    found = run({**arguments, "cache_leftpad": arguments["cache_seqlens"]})
    assert not found.out.any() and bool((found.lse == -math.inf).all())


def test_first_tokens_of_an_empty_cache(device: str) -> None:
    """Attention over what is appended is that of the dense function."""
    arguments = full_call(device)
    for name in ("rotary_cos", "rotary_sin", "cache_leftpad"):
        del arguments[name]
    for name in ("k_cache", "v_cache"):
        arguments[name].fill_(math.nan)
    found = run({**arguments, "cache_seqlens": 0, "causal": True})
    out, lse, _ = flash_rocm.flash_attn_func(
        arguments["q"], arguments["k"], arguments["v"], causal=True, return_attn_probs=True
    )
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.lse, lse)


@pytest.mark.parametrize(
    ("batch", "seqlen_q", "capacity", "new"),
    [(0, 3, 12, 2), (2, 0, 12, 2), (2, 3, 0, 0), (2, 0, 0, 0), (2, 3, 12, 0)],
    ids=str,
)
@pytest.mark.parametrize("paged", (False, True), ids=["entries", "pages"])
def test_empty_shapes(paged: bool, batch: int, seqlen_q: int, capacity: int, new: int, device: str) -> None:
    shape = (batch * capacity, 1) if paged else (batch, capacity)
    table = torch.arange(batch * capacity, dtype=torch.int32, device=device).view(batch, capacity) if paged else None
    arguments = dict(
        q=random(device, batch, seqlen_q, HEADS, DIM),
        k_cache=random(device, *shape, HEADS_K, DIM),
        v_cache=random(device, *shape, HEADS_K, DIM_V),
        k=random(device, batch, new, HEADS_K, DIM, seed=1),
        v=random(device, batch, new, HEADS_K, DIM_V, seed=1),
        cache_seqlens=0,
        block_table=table,
        return_softmax_lse=True,
    )
    found = run(arguments)
    assert found.out.shape == (batch, seqlen_q, HEADS, DIM_V) and found.lse.shape == (batch, HEADS, seqlen_q)
    if not new:
        assert not found.out.any() and bool((found.lse == -math.inf).all())
    elif batch:
        entry = slice(0, new) if paged else (0, slice(0, new))
        written = found.k_cache[entry]
        assert torch.equal(written.flatten(), arguments["k"][0].flatten())  # type: ignore[index]


# --------------------------------------------------------------------------------------------------
# Layouts


def test_strides(device: str) -> None:
    """Heads before positions, or a part of something larger: only the last dim has to be contiguous."""
    arguments = full_call(device)
    expected = run(arguments)
    for name in ("q", "k_cache", "v_cache", "k", "v"):
        turned = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
        larger = torch.cat([arguments[name]] * 2, -1)[..., : arguments[name].shape[-1]]
        for x in (turned, larger):
            changed = {**arguments, name: x}
            if name.endswith("_cache"):
                changed[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
            assert same(run(changed), expected), name
    table = integers(device, *range(8)).view(2, 4)
    paged = full_call(device, paged=True) | {"block_table": table}
    wide = torch.cat([table, table.new_full((2, 3), -5)], 1)[:, :4]
    assert same(run({**paged, "block_table": wide}), run(paged))


def test_inference_mode(device: str) -> None:
    """Where servers run: caches made inside or outside."""
    expected = run(full_call(device))
    with torch.inference_mode():
        assert same(run(full_call(device)), expected)
        assert same(flash_rocm.flash_attn_with_kvcache(**full_call(device)), expected[:2])


# --------------------------------------------------------------------------------------------------
# Gradients

HINT = "attention over a K/V cache has no backward. Hint: flash_attn_func and flash_attn_varlen_func without "
HINT += "block_table have one."


@pytest.mark.parametrize("name", ("q", "k", "v", "rotary_cos", "rotary_sin"))
def test_backward_is_refused(name: str, device: str) -> None:
    """Forward works, and backward is an error, not a missing gradient."""
    arguments = full_call(device)
    expected = run(arguments)
    caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    leaf = arguments[name].clone().requires_grad_()
    out, lse = flash_rocm.flash_attn_with_kvcache(**{**arguments, **caches, name: leaf})
    assert same((out.detach(), lse.detach(), *caches.values()), expected)
    assert not any(x.requires_grad for x in caches.values())
    for result in (out, lse):
        with pytest.raises(NotImplementedError) as error:
            result.sum().backward(retain_graph=True)
        assert str(error.value) == HINT
    with torch.no_grad():
        assert not flash_rocm.flash_attn_with_kvcache(**{**arguments, name: leaf})[0].requires_grad


@pytest.mark.parametrize("name", ("k_cache", "v_cache"))
def test_backward_to_a_cache_that_is_read(name: str, device: str) -> None:
    arguments = without_new(full_call(device))
    arguments[name].requires_grad_()
    out, _ = flash_rocm.flash_attn_with_kvcache(**arguments)
    with pytest.raises(NotImplementedError, match="has no backward"):
        out.sum().backward()


# --------------------------------------------------------------------------------------------------
# Prefill over pages

LENGTHS_Q, LENGTHS_K = (1, 17, 0, 1, 5), (33, 17, 4, 1, 40)  # decode, prefill, idle, first token, a chunk


def paged_batch(device: str, page_size: int, dtype: torch.dtype = torch.float16) -> tuple[Any, Any]:
    """A problem and a case of decode and prefill requests in one batch."""
    problem = make_problem(
        dtype=dtype, device_type=device, batch=len(LENGTHS_Q), seqlen_q=max(LENGTHS_Q), seqlen_k=max(LENGTHS_K),
        nheads=4, nheads_k=2, headdim=16, headdim_v=24, softmax_scale=0.3, varlen=True, window_right=0, cached=True,
        page_size=page_size,
    )  # fmt: skip
    made = make_cache_inputs(problem, CacheCall(seqused_k=False))
    inputs, generator = made.inputs, torch.Generator().manual_seed(5)
    inputs = inputs._replace(
        q=random(device, sum(LENGTHS_Q), 4, 16, dtype=dtype),
        cu_seqlens_q=integers(device, 0, *LENGTHS_Q).cumsum(0).int(),
        cu_seqlens_k=integers(device, 0, *LENGTHS_K).cumsum(0).int(),
    )
    pages = inputs.block_table.shape[1]
    table = torch.randperm(inputs.k.shape[0], generator=generator)[: 5 * pages].view(5, pages).int().to(device)
    k, v = torch.full_like(inputs.k, math.nan), torch.full_like(inputs.v, math.nan)
    inputs = inputs._replace(k=k, v=v, block_table=table)
    for b, length in enumerate(LENGTHS_K):
        for position in range(length):
            place = cached_testing._place(inputs, b, position)
            k[place], v[place] = random(device, 2, 16, seed=position), random(device, 2, 24, seed=position + 99)
        table[b, -(-length // page_size) :] = -7
    return problem, made._replace(
        inputs=inputs, lengths_q=list(LENGTHS_Q), lengths_k=list(LENGTHS_K), lengths_new=[0] * 5, leftpad=[0] * 5
    )


@pytest.mark.parametrize("page_size", (1, 3, 16, 64))
def test_prefill_and_decode_in_one_batch(page_size: int, device: str) -> None:
    problem, case = paged_batch(device, page_size)
    inputs = case.inputs
    before = [x.clone() for x in inputs if x is not None]
    out, lse, probs = flash_rocm.flash_attn_varlen_func(
        *(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, max(LENGTHS_Q), max(LENGTHS_K)),
        softmax_scale=0.3, causal=True, return_attn_probs=True, block_table=inputs.block_table,
    )  # fmt: skip
    assert probs.numel() == 0
    assert_cached_close(problem, case, out, lse, inputs.k, inputs.v)
    assert same_with_nan([x for x in inputs if x is not None], before)


@pytest.mark.parametrize("name", ("softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "max_seqlen_k"))
def test_argument_of_paged_varlen_counts(name: str, device: str) -> None:
    _, case = paged_batch(device, 3)
    inputs = case.inputs
    arguments = dict(q=inputs.q, k=inputs.k, v=inputs.v, max_seqlen_q=17, max_seqlen_k=40, return_attn_probs=True)
    arguments |= dict(
        cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_k=inputs.cu_seqlens_k, block_table=inputs.block_table
    )
    expected = flash_rocm.flash_attn_varlen_func(**arguments)
    if name == "max_seqlen_k":  # lengths are those of cu_seqlens_k: this one only has to be large enough
        assert same(flash_rocm.flash_attn_varlen_func(**arguments | {name: 50}), expected)
    else:
        changed = flash_rocm.flash_attn_varlen_func(**arguments | {name: other_value(name, None, device)})
        assert not same(changed, expected)


def test_paged_varlen_has_no_backward(device: str) -> None:
    _, case = paged_batch(device, 16)
    inputs = case.inputs
    q = inputs.q.clone().requires_grad_()
    out = flash_rocm.flash_attn_varlen_func(
        *(q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, 17, 40), block_table=inputs.block_table
    )
    with pytest.raises(NotImplementedError) as error:
        out.sum().backward()
    assert str(error.value) == HINT


def test_one_tensor_can_be_keys_and_values(device: str) -> None:
    """Nothing of it is counted twice: only MLA's keys have a part that is the values."""
    q, cache = random(device, BATCH, 1, HEADS, DIM, seed=1), random(device, BATCH, CAPACITY, HEADS_K, DIM, seed=2)
    expected = flash_rocm.flash_attn_with_kvcache(q, cache, cache.clone(), return_softmax_lse=True)
    found = flash_rocm.flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True)
    assert same(found, expected)
