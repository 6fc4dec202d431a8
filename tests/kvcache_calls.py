"""Calls of ``flash_attn_with_kvcache`` for its tests: with every argument, and made from random problems."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from test_adversarial import random

import flash_rocm
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import CacheCase, assert_cached_close

BATCH, ENTRIES, CAPACITY, NEW = 2, 4, 12, 2
HEADS, HEADS_K, DIM, DIM_V = 4, 2, 16, 8
PAGE = 3


def integers(device: str, *values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def full_call(device: str, paged: bool = False) -> dict[str, Any]:
    """Arguments of a call with everything in it: a batch of 2 over 4 entries, or over pages."""
    rotary = random(device, CAPACITY + 4, DIM // 4, seed=7).float() * 3
    shape = (BATCH * CAPACITY // PAGE + 1, PAGE) if paged else (ENTRIES, CAPACITY)
    pages = CAPACITY // PAGE
    places: dict[str, Any] = {"cache_batch_idx": integers(device, 2, 0), "cache_leftpad": integers(device, 1, 3)}
    if paged:
        places = {"block_table": torch.arange(2 * pages, dtype=torch.int32, device=device).flip(0).view(2, pages)}
    return dict(
        q=random(device, BATCH, 3, HEADS, DIM, seed=1),
        k_cache=random(device, *shape, HEADS_K, DIM, seed=2),
        v_cache=random(device, *shape, HEADS_K, DIM_V, seed=3),
        k=random(device, BATCH, NEW, HEADS_K, DIM, seed=4),
        v=random(device, BATCH, NEW, HEADS_K, DIM_V, seed=5),
        rotary_cos=rotary.cos().half(),
        rotary_sin=rotary.sin().half(),
        cache_seqlens=integers(device, 5, 9),
        return_softmax_lse=True,
        **places,
    )


def without_new(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call without tokens to append."""
    return {name: x for name, x in arguments.items() if name not in ("k", "v", "rotary_cos", "rotary_sin")}


class Outcome(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def run(arguments: dict[str, Any]) -> Outcome:
    """Call on copies of the caches, which are returned as they are afterwards; nothing else may change."""
    arguments = {**arguments, **{name: arguments[name].clone() for name in ("k_cache", "v_cache")}}
    fixed = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and not n.endswith("_cache")}
    before = {name: x.clone() for name, x in fixed.items()}
    result = flash_rocm.flash_attn_with_kvcache(**arguments)
    for name, x in fixed.items():
        assert torch.equal(x, before[name]), f"{name} was modified"
    out, lse = result if isinstance(result, tuple) else (result, result.new_zeros(0))
    return Outcome(out, lse, arguments["k_cache"], arguments["v_cache"])


def call_of(problem: AttentionProblem, case: CacheCase, num_splits: int | None = None) -> dict[str, Any]:
    """Arguments of ``flash_attn_with_kvcache`` for a random case that it can express."""
    inputs = case.inputs
    return dict(
        q=inputs.q,
        k_cache=inputs.k,
        v_cache=inputs.v,
        k=inputs.k_new,
        v=inputs.v_new,
        rotary_cos=inputs.rotary_cos,
        rotary_sin=inputs.rotary_sin,
        cache_seqlens=inputs.seqused_k,
        cache_batch_idx=inputs.cache_batch_idx,
        cache_leftpad=inputs.leftpad_k,
        block_table=inputs.block_table,
        softmax_scale=problem.softmax_scale,
        causal=problem.causal,
        window_size=(problem.window_left, problem.window_right),
        softcap=problem.softcap,
        rotary_interleaved=problem.rotary_interleaved,
        alibi_slopes=inputs.alibi_slopes,
        num_splits=problem.num_splits if num_splits is None else num_splits,
        return_softmax_lse=True,
    )


def check(problem: AttentionProblem, case: CacheCase, num_splits: int | None = None) -> Outcome:
    """Run a case through the public function and hold it against the oracle."""
    found = run(call_of(problem, case, num_splits))
    assert_cached_close(problem, case, *found)
    return found
