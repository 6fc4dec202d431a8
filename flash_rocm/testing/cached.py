"""Random calls over a K/V cache, and their oracle: sequences put together by plain indexing, then naive attention."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from flash_rocm.problem import AttentionInputs, AttentionProblem, CacheInputs, accumulate_dtype, lse_shape
from flash_rocm.testing.budgets import Comparison, assert_close_to_oracle
from flash_rocm.testing.kvcache import oracle_rotary
from flash_rocm.testing.oracle import naive_sequence, roundings

#: Pages, entries and rows that no sequence uses.
SPARE = 2


@dataclasses.dataclass(frozen=True)
class CacheCall:
    """What a problem does not say about a call over a cache."""

    packed: bool = False  # keys are packed sequences (cu_seqlens_k)
    seqused_q: bool = False
    seqused_k: bool = True  # else every sequence fills the cache; with pages, lengths are cu_seqlens_k
    varlen_new: bool = False  # new tokens are packed (cu_seqlens_k_new)
    rotary_seqlens: bool = False
    alibi_per_batch: bool = False


class CacheCase(NamedTuple):
    """The inputs of a call, and where the tokens of each sequence are."""

    inputs: CacheInputs
    lengths_q: list[int]
    lengths_k: list[int]  # in the cache before the append, left padding included
    lengths_new: list[int]
    leftpad: list[int]


def make_cache_inputs(
    problem: AttentionProblem, call: CacheCall, seed: int = 0, device: torch.device | str | None = None
) -> CacheCase:
    """Random inputs of a problem over a cache, on its device; NaN wherever no token is.

    Raises ``ValueError`` where problem and call contradict each other.
    """
    if call.packed and (problem.page_size or problem.seqlen_new or problem.cache_batch_idx or problem.leftpad):
        raise ValueError("packed: expected False with pages, new tokens, cache_batch_idx or leftpad")
    p, generator = problem, torch.Generator().manual_seed(seed)

    def random_lengths(longest: int, vary: bool) -> list[int]:
        lengths = torch.randint(0, longest + 1, (p.batch,), generator=generator).tolist()
        lengths[int(torch.randint(p.batch, (), generator=generator))] = longest
        return lengths if vary else [longest] * p.batch

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(p.dtype)

    def starts(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int()

    lengths_q = random_lengths(p.seqlen_q, p.varlen or call.seqused_q)
    lengths_new = random_lengths(p.seqlen_new, call.varlen_new)
    lengths_k = random_lengths(p.seqlen_k - p.seqlen_new, call.seqused_k or call.packed or p.page_size > 0)
    leftpad = [int(torch.randint(0, n + 1, (), generator=generator)) if p.leftpad else 0 for n in lengths_k]
    rows_q = (sum(lengths_q) + SPARE,) if p.varlen else (p.batch, p.seqlen_q)
    q = values(*rows_q, p.nheads, p.headdim)
    k_new = v_new = table = index = None
    if p.seqlen_new:
        rows_new = (sum(lengths_new),) if call.varlen_new else (p.batch, p.seqlen_new)
        k_new, v_new = values(*rows_new, p.nheads_k, p.headdim), values(*rows_new, p.nheads_k, p.headdim_v)
    if call.packed:
        shape: tuple[int, ...] = (sum(lengths_k) + SPARE,)
    elif p.page_size:
        pages = -(-p.seqlen_k // p.page_size)
        shape = (pages * p.batch + SPARE, p.page_size)
        table = torch.randperm(shape[0], generator=generator)[: pages * p.batch].view(p.batch, pages).int()
    else:
        shape = (p.batch + (SPARE if p.cache_batch_idx else 0), p.seqlen_k)
        index = torch.randperm(shape[0], generator=generator)[: p.batch].int() if p.cache_batch_idx else None
    k = torch.full((*shape, p.nheads_k, p.headdim), float("nan"), dtype=p.dtype)
    v = torch.full((*shape, p.nheads_k, p.headdim_v), float("nan"), dtype=p.dtype)
    by_table = call.seqused_k or p.seqlen_new > 0
    inputs = CacheInputs(
        q=q,
        k=k,
        v=v,
        k_new=k_new,
        v_new=v_new,
        qv=values(*rows_q, p.nheads, p.headdim_v) if p.qv else None,
        cu_seqlens_q=starts(lengths_q) if p.varlen else None,
        cu_seqlens_k=starts(lengths_k) if call.packed or (p.page_size and not by_table) else None,
        cu_seqlens_k_new=starts(lengths_new) if call.varlen_new else None,
        seqused_q=torch.tensor(lengths_q).int() if call.seqused_q else None,
        seqused_k=torch.tensor(lengths_k).int() if by_table else None,
        cache_batch_idx=index,
        leftpad_k=torch.tensor(leftpad).int() if p.leftpad else None,
        block_table=table,
    )
    for b, length in enumerate(lengths_k):
        for position in range(leftpad[b], length):
            place = _place(inputs, b, position)
            k[place], v[place] = values(p.nheads_k, p.headdim), values(p.nheads_k, p.headdim_v)
    if table is not None:
        for b in range(p.batch):  # what is behind the last page of a sequence is no page
            table[b, -(-(lengths_k[b] + lengths_new[b]) // p.page_size) :] = -7
    if p.rotary_dim:
        rows = max(inputs.capacity, p.seqlen_k) + p.seqlen_q
        angle = torch.rand(rows, p.rotary_dim // 2, generator=generator, dtype=torch.float64) * 6.3
        inputs = inputs._replace(rotary_cos=angle.cos().to(p.dtype), rotary_sin=angle.sin().to(p.dtype))
        if call.rotary_seqlens:
            inputs = inputs._replace(rotary_seqlens=torch.tensor([n // 2 for n in lengths_k]).int())
    if p.alibi:
        shape = (p.batch, p.nheads) if call.alibi_per_batch else (p.nheads,)
        inputs = inputs._replace(alibi_slopes=torch.rand(shape, generator=generator))
    if p.sinks:
        inputs = inputs._replace(sinks=torch.randn(p.nheads, generator=generator) * 2 + 2)
    placed = {name: x.to(device or p.device_type) for name, x in inputs._asdict().items() if x is not None}
    return CacheCase(CacheInputs(**placed), lengths_q, lengths_k, lengths_new, leftpad)


def _place(inputs: CacheInputs, b: int, position: int) -> tuple[int, ...]:
    """Index of one token in k and v."""
    if inputs.cu_seqlens_k is not None and inputs.block_table is None:
        return (int(inputs.cu_seqlens_k[b]) + position,)
    if inputs.block_table is not None:
        page, slot = divmod(position, inputs.k.shape[1])
        return int(inputs.block_table[b, page]), slot
    return b if inputs.cache_batch_idx is None else int(inputs.cache_batch_idx[b]), position


def oracle_cached(
    problem: AttentionProblem, case: CacheCase, *, upcast: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, float]]:
    """out, softmax_lse, the caches after the append in float64, and roundings as in :class:`Oracle`.

    ``upcast``: as in :func:`oracle_attention`; without it what rotary turns is rounded before attention.
    """
    p, inputs = problem, case.inputs
    low = torch.float32 if p.dtype == torch.float64 else p.dtype
    dtype = torch.float64 if upcast else low
    k, v = inputs.k.double().clone(), inputs.v.double().clone()
    out = inputs.q.new_zeros((*inputs.q.shape[:-1], p.headdim_v), dtype=dtype)
    lse = inputs.q.new_full(lse_shape(inputs.q), float("-inf"), dtype=dtype)
    bands: dict[str, float] = {}
    for b in range(p.batch):
        rows = _sequence_rows(inputs.cu_seqlens_q, b, case.lengths_q[b])
        before = case.lengths_k[b] if inputs.rotary_seqlens is None else int(inputs.rotary_seqlens[b])
        q_b = inputs.q[rows].double()
        if inputs.rotary_cos is not None and inputs.rotary_sin is not None:
            is_masked = p.window_left >= 0 or p.window_right >= 0 or p.attention_chunk > 0
            steps = torch.arange(q_b.shape[0], device=q_b.device) * int(is_masked)
            q_b = oracle_rotary(q_b, inputs.rotary_cos, inputs.rotary_sin, before + steps, p.rotary_interleaved)
        if inputs.k_new is not None and inputs.v_new is not None:
            rows_new = _sequence_rows(inputs.cu_seqlens_k_new, b, case.lengths_new[b])
            k_new = inputs.k_new[rows_new].double()
            if inputs.rotary_cos is not None and inputs.rotary_sin is not None:
                steps = torch.arange(k_new.shape[0], device=k_new.device)
                k_new = oracle_rotary(k_new, inputs.rotary_cos, inputs.rotary_sin, before + steps, p.rotary_interleaved)
            for t in range(case.lengths_new[b]):
                place = _place(inputs, b, case.lengths_k[b] + t)
                k[place], v[place] = k_new[t], inputs.v_new[rows_new][t].double()
        end = case.lengths_k[b] + case.lengths_new[b]
        places = [_place(inputs, b, position) for position in range(case.leftpad[b], end)]
        heads = p.nheads // p.nheads_k
        k_b = torch.stack([k[place] for place in places]) if places else k.new_zeros(0, p.nheads_k, p.headdim)
        v_b = torch.stack([v[place] for place in places]) if places else v.new_zeros(0, p.nheads_k, p.headdim_v)
        if inputs.qv is not None:
            q_b, k_b = torch.cat([q_b, inputs.qv[rows].double()], -1), torch.cat([k_b, v_b], -1)
        q_b, k_b, v_b = q_b.to(dtype), k_b.to(dtype), v_b.to(dtype)
        k_b, v_b = k_b.repeat_interleave(heads, 1), v_b.repeat_interleave(heads, 1)
        sinks = None if inputs.sinks is None else inputs.sinks.to(dtype)
        slopes = AttentionInputs(q_b, k_b, v_b, alibi_slopes=inputs.alibi_slopes)
        result = naive_sequence(p, slopes, b, q_b, k_b, v_b, sinks)
        out[rows] = result.out
        if inputs.cu_seqlens_q is not None:
            lse[:, rows] = result.lse
        else:
            lse[b, :, : case.lengths_q[b]] = result.lse
        if upcast:
            for name, value in roundings(p, q_b, k_b, v_b, result, None, None).items():
                bands[name] = max(value, bands.get(name, 0.0))
    return out, lse, k, v, bands


def _sequence_rows(cu_seqlens: torch.Tensor | None, b: int, length: int) -> tuple[int, slice] | slice:
    if cu_seqlens is None:
        return b, slice(0, length)
    return slice(int(cu_seqlens[b]), int(cu_seqlens[b]) + length)


def assert_caches_close(
    problem: AttentionProblem,
    k_after: torch.Tensor,
    v_after: torch.Tensor,
    exact_k: torch.Tensor,
    exact_v: torch.Tensor,
) -> Comparison:
    """Compare the caches after an append with those of :func:`oracle_cached`; the error of k and one rounding."""
    if not torch.equal(v_after.double().nan_to_num(nan=9e9), exact_v.nan_to_num(nan=9e9)):
        raise AssertionError("v: expected the new tokens behind each sequence and nothing else changed")
    if not torch.equal(k_after.isnan(), exact_k.isnan()):
        raise AssertionError("k: expected tokens where the oracle has them and NaN elsewhere")
    wide = torch.finfo(accumulate_dtype(problem.dtype)).eps
    eps = torch.finfo(problem.dtype).eps / 2 + (2 * wide if problem.dtype != torch.float64 else 4 * wide)
    largest = float(exact_k.nan_to_num(nan=0.0).abs().max()) if exact_k.numel() else 0.0
    error = float((k_after.double() - exact_k).nan_to_num(nan=0.0).abs().max()) if exact_k.numel() else 0.0
    if error > (eps * 2**0.5 * largest if problem.rotary_dim else 0.0):
        raise AssertionError(f"k: expected one rounding of what the rotary embedding turns, got an error of {error}")
    return Comparison(error, eps * largest)


def assert_cached_close(
    problem: AttentionProblem,
    case: CacheCase,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    k_after: torch.Tensor,
    v_after: torch.Tensor,
) -> dict[str, Comparison]:
    """Compare a call's results, and its caches afterwards, with the oracle; ``case`` holds the caches before."""
    exact_out, exact_lse, exact_k, exact_v, bands = oracle_cached(problem, case)
    plain_out, plain_lse, *_ = oracle_cached(problem, case, upcast=False)
    found = {"k": assert_caches_close(problem, k_after, v_after, exact_k, exact_v)}
    for name, actual, exact, plain in (
        ("out", out, exact_out, plain_out),
        ("lse", softmax_lse, exact_lse, plain_lse),
    ):
        dtype = problem.dtype if name == "out" else accumulate_dtype(problem.dtype)
        kind = "lse" if name == "lse" else "output"
        rounding = bands.get(name, 0.0)
        found[name] = assert_close_to_oracle(actual, exact, plain, kind, name, rounding=rounding, dtype=dtype)
    return found
