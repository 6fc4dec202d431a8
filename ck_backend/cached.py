"""Attention over a K/V cache: Composable Kernel's split-KV, and the auxiliary kernels that append and combine.

The kernel is compiled for packed queries and for pages.  Dense queries are packed ones of one length.  A cache without
pages is one of pages that start at any row, one for each sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from flash_rocm import auxiliary, cache_validation, runtime, virtual_device
from flash_rocm.arch import Arch
from flash_rocm.ck_instances import CkInstance
from flash_rocm.problem import AttentionProblem, CacheInputs, lse_shape
from flash_rocm.splits import choose_splits

from .auxiliary import launch, launches_on, stream_of
from .instances import MAX_STRIDE, aligned, instance_of, workspace


class _Keys(NamedTuple):
    """Where keys are: position p of sequence b is row p % page_size of page block_table[b, p // page_size]."""

    k: torch.Tensor  # (pages, page_size, nheads_k, headdim), or (rows, nheads_k, headdim) whose pages are rows
    v: torch.Tensor
    lengths: torch.Tensor  # (batch,) int32
    block_table: torch.Tensor  # (batch, pages) int32
    page_size: int


class _Queries(NamedTuple):
    """Packed queries: sequence b has rows [starts[b], starts[b + 1])."""

    q: torch.Tensor  # (total_q, nheads, headdim)
    starts: torch.Tensor  # (batch + 1,) int32


def _lengths(problem: AttentionProblem, inputs: CacheInputs) -> torch.Tensor:
    """Keys of each sequence from the left padding on, with new ones: (batch,) int32."""
    capacity = inputs.capacity
    if inputs.seqused_k is not None:
        lengths = inputs.seqused_k.clamp(0, capacity)
    elif inputs.cu_seqlens_k is not None:
        lengths = inputs.cu_seqlens_k.diff().clamp(0, capacity)
    else:
        lengths = inputs.q.new_full((problem.batch,), min(problem.seqlen_k, capacity), dtype=torch.int32)
    if problem.seqlen_new:
        new = problem.seqlen_new if inputs.cu_seqlens_k_new is None else inputs.cu_seqlens_k_new.diff()
        lengths = (lengths + new).clamp(max=capacity)
    if inputs.leftpad_k is not None:
        lengths = (lengths - inputs.leftpad_k.clamp(0, capacity)).clamp(min=0)
    return lengths


def _entry_rows(x: torch.Tensor) -> int:
    """Rows from one entry of a cache to the next, 0 where they are no whole number."""
    entry, row = x.stride()[:2]
    if x.shape[0] == 1:
        return x.shape[1]
    return entry // row if row and entry % row == 0 else 0


def _multiples(count: int, step: int, device: torch.device) -> torch.Tensor:
    """0, step, 2 * step, ...: (count,) int32."""
    return torch.arange(0, count * step, step, dtype=torch.int32, device=device)


def _keys_of(problem: AttentionProblem, inputs: CacheInputs, keys_of_tile: int) -> _Keys:
    k, v = aligned(inputs.k), aligned(inputs.v)
    lengths = _lengths(problem, inputs)
    if inputs.block_table is not None:
        return _Keys(k, v, lengths, inputs.block_table, problem.page_size)
    if inputs.cu_seqlens_k is not None:
        first_rows = inputs.cu_seqlens_k[:-1]
    else:
        rows = _entry_rows(k)
        if not rows or rows != _entry_rows(v):
            k, v = k.contiguous(), v.contiguous()
            rows = max(inputs.capacity, 1)
        if inputs.cache_batch_idx is not None:
            first_rows = inputs.cache_batch_idx * rows
        else:
            first_rows = _multiples(problem.batch, rows, k.device)
        if inputs.leftpad_k is not None:
            first_rows = first_rows + inputs.leftpad_k.clamp(0, inputs.capacity)
        k, v = k[0], v[0]
    # One page is all of a sequence, in whole tiles: what is behind its length is not read.
    page_size = -(-max(inputs.capacity, 1) // keys_of_tile) * keys_of_tile
    return _Keys(k, v, lengths, first_rows.unsqueeze(1), page_size)


def _queries_of(problem: AttentionProblem, inputs: CacheInputs, q: torch.Tensor) -> _Queries:
    starts = inputs.cu_seqlens_q
    if starts is None:
        starts = _multiples(problem.batch + 1, problem.seqlen_q, q.device)
    return _Queries(aligned(q.flatten(0, 1) if q.dim() == 4 else q), starts)


def _with_unused(queries: _Queries, keys: _Keys, seqused_q: torch.Tensor) -> tuple[_Queries, _Keys]:
    """The same for sequences that use some of their queries: the others are sequences of their own, without keys."""
    used = torch.minimum(seqused_q.clamp(min=0), queries.starts.diff())
    starts = torch.stack((queries.starts[:-1], queries.starts[:-1] + used), 1).flatten()
    lengths = torch.stack((keys.lengths, torch.zeros_like(keys.lengths)), 1).flatten()
    table = keys.block_table.repeat_interleave(2, 0)
    return (
        queries._replace(starts=torch.cat((starts, queries.starts[-1:]))),
        keys._replace(lengths=lengths, block_table=table),
    )


def num_splits_of(problem: AttentionProblem, instance: CkInstance, arch: Arch, rows_q: int) -> int:
    """The caller's number of splits, or the one that occupies the chip, as far as 32 bits address their results.

    Args:
        rows_q: of all sequences.
    """
    rows, keys = instance.tile
    # Without a mask the heads of a group share tiles, and their results are one view.
    is_merged = "masked" not in instance.variant
    splits = problem.num_splits
    if not splits and problem.window_left >= 0:
        splits = 1  # Composable Kernel divides all keys, of which a window leaves most parts none
    elif not splits:
        heads, of_head = (problem.nheads_k, problem.group_size) if is_merged else (problem.nheads, 1)
        workgroups = problem.batch * heads * -(-problem.seqlen_q * of_head // rows)
        splits = choose_splits(workgroups, -(-problem.seqlen_k // keys), arch.num_cus * instance.occupancy)
    addressed = rows_q * problem.headdim_v * (4 * problem.group_size if is_merged else 1)
    return max(1, min(splits, MAX_STRIDE // max(addressed, 1)))


def splits_of(problem: AttentionProblem, device: torch.device) -> int:
    """Into how many parts keys are divided; see :class:`flash_rocm.protocols.Backend`."""
    _, instance, _ = instance_of("splitkv", problem, device)
    return num_splits_of(problem, instance, virtual_device.arch_of(device), problem.batch * problem.seqlen_q)


def attend(problem: AttentionProblem, inputs: CacheInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse over a K/V cache; see :class:`flash_rocm.protocols.Backend`."""
    number, instance, operators = instance_of("splitkv", problem, inputs.q.device)
    q = auxiliary.rotated(launch, problem, inputs) if problem.rotary_dim else inputs.q
    keys = _keys_of(problem, inputs, instance.tile[1])
    if runtime.debug():
        _check_contents(problem, inputs, keys)
    queries = _queries_of(problem, inputs, q)
    slopes = inputs.alibi_slopes.contiguous() if inputs.alibi_slopes is not None else None
    if inputs.seqused_q is not None:
        queries, keys = _with_unused(queries, keys, inputs.seqused_q)
        slopes = slopes.repeat_interleave(2, 0) if slopes is not None and slopes.dim() == 2 else slopes
    rows_q = queries.q.shape[0]
    num_splits = num_splits_of(problem, instance, virtual_device.arch_of(q.device), rows_q)
    out_partial, lse_partial = _new_parts(problem, num_splits, queries.q)
    tensors = (
        queries.q,
        keys.k,
        keys.v,
        out_partial,
        lse_partial,
        queries.starts,
        keys.lengths,
        keys.block_table,
        slopes,
    )
    with launches_on(q, tensors):
        operators.splitkv(
            number, *tensors, keys.page_size, problem.seqlen_q, problem.seqlen_k, problem.softmax_scale,
            problem.softcap, problem.window_left, problem.window_right, stream_of(q),
        )  # fmt: skip
    out = q.new_empty((*q.shape[:-1], problem.headdim_v))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    # As (total_q, nheads, splits) or (batch, seqlen_q, nheads, splits).
    out_partial, lse_partial = out_partial.permute(2, 0, 1, 3), lse_partial.permute(2, 0, 1)
    if not problem.varlen:
        out_partial, lse_partial = (x.unflatten(0, q.shape[:2]) for x in (out_partial, lse_partial))
    auxiliary.combine_parts(launch, out_partial, lse_partial, out, lse)
    return out, lse


def _new_parts(problem: AttentionProblem, num_splits: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of parts to be written, (nheads, num_splits, total_q, headdim_v) and without headdim_v, float32."""
    parts = (problem.nheads, num_splits, q.shape[0])
    hint = "FLASH_ROCM_BACKEND=triton needs less, fewer sequences in a call too"
    if num_splits > 1:
        hint = f"num_splits=1 makes one part in place of {num_splits}; {hint}"
    with workspace("results of parts of the keys", math.prod(parts) * (problem.headdim_v + 1), hint):
        out_partial = q.new_empty((*parts, problem.headdim_v), dtype=torch.float32)
        lse_partial = q.new_empty(parts, dtype=torch.float32)
    if problem.varlen:  # there may be rows that no sequence owns
        lse_partial.fill_(float("-inf"))
    return out_partial, lse_partial


def _check_contents(problem: AttentionProblem, inputs: CacheInputs, keys: _Keys) -> None:
    """Raise what FLASH_ROCM_DEBUG=1 finds in lengths, entries and pages, before anything is launched; waits."""
    capacity, pages = inputs.capacity, inputs.k.shape[0]
    nothing = torch.zeros_like(keys.lengths, dtype=torch.bool)
    bad_page, bad_length, bad_entry = nothing, nothing, nothing
    for x in (inputs.seqused_k, inputs.leftpad_k):
        if x is not None:
            bad_length = bad_length | (x < 0) | (x > capacity)
    if inputs.cu_seqlens_k is not None:
        starts, rows = inputs.cu_seqlens_k[:-1], inputs.cu_seqlens_k.diff()
        if inputs.is_packed:
            used = rows if inputs.seqused_k is None else inputs.seqused_k
            bad_length = bad_length | (starts < 0) | (rows < 0) | (starts > capacity - rows) | (used > rows)
        elif inputs.seqused_k is None:
            bad_length = bad_length | (rows < 0) | (rows > capacity)
    if inputs.cache_batch_idx is not None:
        bad_entry = (inputs.cache_batch_idx < 0) | (inputs.cache_batch_idx >= pages)
    if inputs.block_table is not None:
        table = inputs.block_table
        firsts = torch.arange(0, capacity, problem.page_size, device=table.device)
        bad_page = (((table < 0) | (table >= pages)) & (firsts < keys.lengths.unsqueeze(1))).any(1)
    numbers = torch.arange(1, problem.batch + 1, device=nothing.device)
    reported = [int((bad * numbers).max()) for bad in (bad_page, bad_length, bad_entry)]
    cache_validation.raise_faults((*reported, 0), inputs)


def append(problem: AttentionProblem, inputs: CacheInputs) -> None:
    """Write k_new and v_new into the caches; see :class:`flash_rocm.protocols.Backend`."""
    auxiliary.append(launch, problem, inputs)


def combine(
    problem: AttentionProblem, out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of parts that the caller brings, which are float32: refused.  Those of ``attend`` are combined there."""
    raise NotImplementedError("ck: float32 is not implemented, and selection does not send it here")
