"""Attention over a K/V cache in plain torch: every sequence is gathered, then attended to like a varlen one.

Lengths, entries and page tables are read on the host.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from flash_rocm import runtime
from flash_rocm.cache_validation import FAULTS, raise_faults
from flash_rocm.problem import AttentionInputs, AttentionProblem, CacheInputs, accumulate_dtype, lse_shape
from flash_rocm.reference.attention import forward
from flash_rocm.reference.kvcache import append_kv, apply_rotary, check_fits, combine_splits
from flash_rocm.sinks import lse_without_keys


class _Lengths(NamedTuple):
    """Of one sequence."""

    rows: slice  # of a varlen q; of a dense q, from 0
    start_k: int  # where packed keys start; 0 of a cache
    cached: int  # keys before the append, left padding included
    new: slice  # of varlen new tokens; of dense ones, from 0
    leftpad: int

    @property
    def count_new(self) -> int:
        """New tokens."""
        return self.new.stop - self.new.start

    @property
    def keys(self) -> slice:
        """Of the cache entry, after the append."""
        return slice(self.start_k + self.leftpad, self.start_k + self.cached + self.count_new)


def _host(x: torch.Tensor | None) -> list[int] | None:
    return None if x is None else x.tolist()


def _lengths(problem: AttentionProblem, inputs: CacheInputs) -> list[_Lengths]:
    starts_q, starts_k = _host(inputs.cu_seqlens_q), _host(inputs.cu_seqlens_k)
    starts_new, used_q = _host(inputs.cu_seqlens_k_new), _host(inputs.seqused_q)
    used_k, leftpad = _host(inputs.seqused_k), _host(inputs.leftpad_k)
    found = []
    for b in range(problem.batch):
        first, end = (0, problem.seqlen_q) if starts_q is None else (starts_q[b], starts_q[b + 1])
        if used_q is not None:
            end = min(end, first + used_q[b])
        start_k, end_k = (0, problem.seqlen_k) if starts_k is None else (starts_k[b], starts_k[b + 1])
        if not inputs.is_packed:
            start_k, end_k = 0, end_k - start_k
        new = slice(0, problem.seqlen_new) if starts_new is None else slice(starts_new[b], starts_new[b + 1])
        cached = end_k - start_k if used_k is None else used_k[b]
        found.append(_Lengths(slice(first, end), start_k, cached, new, leftpad[b] if leftpad else 0))
    return found


def _rotary_start(inputs: CacheInputs, b: int, lengths: _Lengths) -> int:
    return lengths.cached if inputs.rotary_seqlens is None else int(inputs.rotary_seqlens[b])


def _check_contents(problem: AttentionProblem, inputs: CacheInputs, found: list[_Lengths], *, is_append: bool) -> None:
    """What FLASH_ROCM_DEBUG=1 asks for: raise for lengths, entries, pages and positions that are out of range."""
    entries, capacity, cos = inputs.k.shape[0], inputs.capacity, inputs.rotary_cos
    index, starts_k = _host(inputs.cache_batch_idx), _host(inputs.cu_seqlens_k)
    table = None if inputs.block_table is None else inputs.block_table.tolist()
    reported = [0] * len(FAULTS)
    for b, lengths in enumerate(found):
        total = lengths.cached + lengths.count_new
        is_length = lengths.cached >= 0 and total <= capacity and 0 <= lengths.leftpad <= capacity
        if inputs.is_packed and starts_k is not None:
            start, end = starts_k[b : b + 2]
            is_length = is_length and 0 <= start <= start + lengths.cached <= end <= capacity
        used = []
        if table is not None and is_length:
            size = inputs.k.shape[1]
            used = table[b][(lengths.cached if is_append else lengths.leftpad) // size : -(-total // size)]
        is_turned = True
        if cos is not None:
            rows = lengths.count_new if is_append else lengths.rows.stop - lengths.rows.start
            last = _rotary_start(inputs, b, lengths) + (rows if is_append or _rows_move(problem) else min(rows, 1))
            is_turned = _rotary_start(inputs, b, lengths) >= 0 and last <= cos.shape[0]
        is_right = (
            all(0 <= page < entries for page in used),
            is_length,
            index is None or 0 <= index[b] < entries,
            is_turned,
        )
        reported = [old if right else b + 1 for old, right in zip(reported, is_right, strict=True)]
    raise_faults(reported, inputs)


def _rows_move(problem: AttentionProblem) -> bool:
    """Whether the rotary embedding turns each query at a position of its own, or all at that of the first."""
    return problem.window_left >= 0 or problem.window_right >= 0 or problem.attention_chunk > 0


@torch.no_grad()
def append(problem: AttentionProblem, inputs: CacheInputs) -> None:
    """Write k_new, turned by the rotary embedding, and v_new behind what the cache holds; k and v change in place."""
    if inputs.k_new is None or inputs.v_new is None:
        raise ValueError("k_new, v_new: expected tensors to append, got None")
    found = _lengths(problem, inputs)
    if runtime.debug():
        _check_contents(problem, inputs, found, is_append=True)
    check_fits([x.cached for x in found], [x.count_new for x in found], inputs.capacity)
    for b, lengths in enumerate(found):
        k_new, v_new = (_tokens(x, b, lengths.new, inputs.cu_seqlens_k_new) for x in (inputs.k_new, inputs.v_new))
        if inputs.rotary_cos is not None and inputs.rotary_sin is not None:
            positions = _rotary_start(inputs, b, lengths) + torch.arange(k_new.shape[0], device=k_new.device)
            k_new = apply_rotary(
                k_new,
                inputs.rotary_cos,
                inputs.rotary_sin,
                positions=positions,
                interleaved=problem.rotary_interleaved,
            )
        index = None if inputs.cache_batch_idx is None else inputs.cache_batch_idx[b : b + 1]
        table = None if inputs.block_table is None else inputs.block_table[b : b + 1]
        if index is None and table is None:
            index = torch.tensor([b])
        append_kv(inputs.k, inputs.v, k_new[None], v_new[None], torch.tensor([lengths.cached]), index, table)


def _tokens(x: torch.Tensor, b: int, rows: slice, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """(rows, heads, dim) of one sequence of a varlen tensor, or of a dense one."""
    return x[rows] if cu_seqlens is not None else x[b, rows]


def _keys(x: torch.Tensor, inputs: CacheInputs, b: int, keys: slice) -> torch.Tensor:
    """(rows, nheads_k, dim) of one sequence of k or v."""
    if inputs.is_packed:
        return x[keys]
    if inputs.block_table is None:
        return x[b if inputs.cache_batch_idx is None else int(inputs.cache_batch_idx[b]), keys]
    position = torch.arange(keys.start, max(keys.start, keys.stop), device=x.device)
    return x[inputs.block_table[b, position // x.shape[1]].long(), position % x.shape[1]]


@torch.no_grad()
def attend(problem: AttentionProblem, inputs: CacheInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse over what the caches hold and, of appended tokens, hold by now.

    Shapes and conventions are those of :func:`flash_rocm.reference.forward`; a row of no sequence is 0 and -inf.
    """
    q = inputs.q
    out = q.new_zeros(*q.shape[:-1], problem.headdim_v)
    lse = torch.full(lse_shape(q), float("-inf"), dtype=accumulate_dtype(q.dtype), device=q.device)
    found = _lengths(problem, inputs)
    if runtime.debug():
        _check_contents(problem, inputs, found, is_append=False)
    for b, lengths in enumerate(found):
        k, v = (_keys(x, inputs, b, lengths.keys) for x in (inputs.k, inputs.v))
        rows = _rotated(problem, inputs, b, lengths)
        if inputs.qv is not None:
            # q @ k^T + qv @ v^T is one product of longer heads.
            rows = torch.cat([rows, _tokens(inputs.qv, b, lengths.rows, inputs.cu_seqlens_q)], -1)
            k = torch.cat([k, v], -1)
        slopes = inputs.alibi_slopes
        slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        one = _one_sequence(problem, rows, k)
        one_inputs = AttentionInputs(rows[None], k[None], v[None], alibi_slopes=slopes, sinks=inputs.sinks)
        if rows.numel() and k.numel():
            out_b, lse_b = forward(one, one_inputs)
            out[lengths.rows if problem.varlen else (b, lengths.rows)] = out_b[0]
        else:
            lse_b = lse_without_keys(rows[None], rows.shape[0], None, inputs.sinks)
        lse[(slice(None), lengths.rows) if problem.varlen else (b, slice(None), lengths.rows)] = lse_b[0]
    return out, lse


def _rotated(problem: AttentionProblem, inputs: CacheInputs, b: int, lengths: _Lengths) -> torch.Tensor:
    """Queries of one sequence."""
    q = _tokens(inputs.q, b, lengths.rows, inputs.cu_seqlens_q)
    if inputs.rotary_cos is None or inputs.rotary_sin is None:
        return q
    steps = torch.arange(q.shape[0], device=q.device)
    positions = _rotary_start(inputs, b, lengths) + (steps if _rows_move(problem) else torch.zeros_like(steps))
    return apply_rotary(
        q, inputs.rotary_cos, inputs.rotary_sin, positions=positions, interleaved=problem.rotary_interleaved
    )


def _one_sequence(problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor) -> AttentionProblem:
    """The problem of one gathered sequence as a dense batch of one."""
    return dataclasses.replace(
        problem, batch=1, seqlen_q=q.shape[0], seqlen_k=k.shape[0], headdim=q.shape[-1], varlen=False
    )


@torch.no_grad()
def combine(
    problem: AttentionProblem, out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One result from results over disjoint sets of keys; see :func:`flash_rocm.reference.kvcache.combine_splits`."""
    return combine_splits(out_partial, lse_partial, out_dtype)


def splits_of(problem: AttentionProblem, device: torch.device) -> int:
    """Always 1: keys are not divided."""
    return 1
