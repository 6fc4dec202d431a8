"""Exact attention in plain torch: tiled forward, backward and probabilities.

This back end defines the semantics and runs wherever torch does.  It follows the online softmax of
Milakov and Gimelshein (2018) and the recomputing backward of Dao et al., "FlashAttention" (2022):
no score matrix is ever whole, memory is O(seqlen) beside one tile.

fp16, bf16 and fp32 inputs are computed in fp32 and rounded once; fp64 is fp64 throughout.  Strides
are arbitrary.  Results are deterministic: nothing is accumulated in an order that can change.
Varlen calls read ``cu_seqlens`` on the host, and partly masked tiles one flag each, which
synchronises with a GPU.

NaN and infinity: a key (K or V row) reaches only the query rows that see it, and in backward a query
(its q, dout or dlse) reaches only the keys that it sees, whatever the hidden elements hold.  A row
that does see a NaN is NaN.  A row whose visible scores are all -inf counts as one that sees no key: output
0, LSE -inf, nothing sent to dk and dv.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from flash_rocm import sinks
from flash_rocm.problem import (
    AttentionInputs,
    AttentionProblem,
    accumulate_dtype,
    dropout_threshold,
    lse_shape,
)
from flash_rocm.reference.philox import keep_mask
from flash_rocm.reference.tiles import Tile, TileSize, default_tile, key_tiles, product, visible_in

_INF = float("inf")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """What runs together: a dense call as a whole, or one sequence of a varlen call.

    Shapes below are B batches (1 for a sequence), Hk key heads, G query heads for each of them.
    """

    problem: AttentionProblem
    q: torch.Tensor  # (B, Hk, G, Sq, D) view
    k: torch.Tensor  # (B, Hk, Sk, D) view
    v: torch.Tensor  # (B, Hk, Sk, Dv) view
    rows: slice | None  # of the sequence in a varlen q; None when dense
    columns: slice | None  # of the sequence in a varlen k
    first_batch: int
    slopes: torch.Tensor | None  # (1 or B, Hk, G, 1, 1)
    sinks: torch.Tensor | None  # (1, Hk, G, 1, 1)
    rng_state: torch.Tensor | None
    tile: TileSize

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[3]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(self.q.dtype)

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        for row in range(0, self.seqlen_q, self.tile.q):
            yield row, min(row + self.tile.q, self.seqlen_q)

    def key_tiles(self, row: int, row_end: int) -> Iterator[Tile]:
        return key_tiles(self.problem, row, row_end, self.seqlen_q, self.seqlen_k, self.tile.k)

    def visible(self, tile: Tile) -> torch.Tensor | None:
        return visible_in(self.problem, tile, self.seqlen_k - self.seqlen_q, self.q.device)

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """View (B, Hk, G, Sq, D) of a tensor laid out like q."""
        return _query_view(x, self.rows, self.problem)

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """View (B, Hk, Sk, D) of a tensor laid out like k."""
        return _key_view(x, self.columns)

    def of_lse(self, x: torch.Tensor) -> torch.Tensor:
        """View (B, Hk, G, Sq) of a tensor laid out like softmax_lse."""
        x = x if self.rows is None else x[:, self.rows].unsqueeze(0)
        return x.unflatten(1, (self.problem.nheads_k, self.problem.group_size))


def _query_view(x: torch.Tensor, rows: slice | None, problem: AttentionProblem) -> torch.Tensor:
    x = x if rows is None else x[rows].unsqueeze(0)
    return x.unflatten(2, (problem.nheads_k, problem.group_size)).permute(0, 2, 3, 1, 4)


def _key_view(x: torch.Tensor, columns: slice | None) -> torch.Tensor:
    x = x if columns is None else x[columns].unsqueeze(0)
    return x.transpose(1, 2)


def _slopes(problem: AttentionProblem, inputs: AttentionInputs, batch: slice) -> torch.Tensor | None:
    """ALiBi slopes as (1 or B, Hk, G, 1, 1) in the accumulation dtype."""
    if not problem.alibi or inputs.alibi_slopes is None:
        return None
    slopes = inputs.alibi_slopes.to(accumulate_dtype(problem.dtype))
    slopes = slopes[None] if slopes.dim() == 1 else slopes[batch]
    return slopes.unflatten(1, (problem.nheads_k, problem.group_size))[..., None, None]


def _sinks(problem: AttentionProblem, inputs: AttentionInputs) -> torch.Tensor | None:
    """Sinks as (1, Hk, G, 1, 1) in the accumulation dtype."""
    if not problem.sinks or inputs.sinks is None:
        return None
    return inputs.sinks.to(accumulate_dtype(problem.dtype)).view(1, problem.nheads_k, problem.group_size, 1, 1)


def _parts(problem: AttentionProblem, inputs: AttentionInputs, tile: TileSize | None) -> Iterator[_Part]:
    rng_state = inputs.rng_state if problem.dropout_p > 0.0 else None
    logits = _sinks(problem, inputs)
    if not problem.varlen:
        yield _Part(
            problem,
            _query_view(inputs.q, None, problem),
            _key_view(inputs.k, None),
            _key_view(inputs.v, None),
            rows=None,
            columns=None,
            first_batch=0,
            slopes=_slopes(problem, inputs, slice(None)),
            sinks=logits,
            rng_state=rng_state,
            tile=tile or default_tile(problem.batch, problem.nheads),
        )
        return
    if inputs.cu_seqlens_q is None or inputs.cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k: expected tensors for a varlen problem, got None")
    starts_q, starts_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for b in range(problem.batch):
        rows, columns = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        yield _Part(
            problem,
            _query_view(inputs.q, rows, problem),
            _key_view(inputs.k, columns),
            _key_view(inputs.v, columns),
            rows=rows,
            columns=columns,
            first_batch=b,
            slopes=_slopes(problem, inputs, slice(b, b + 1)),
            sinks=logits,
            rng_state=rng_state,
            tile=tile or default_tile(1, problem.nheads),
        )


def _load(x: torch.Tensor, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a (B, Hk, S, D) or (B, Hk, G, S, D) view as (B, Hk, rows, D), G folded into rows."""
    x = x[..., start:end, :].to(dtype)
    return x if x.dim() == 4 else x.flatten(2, 3)


def _scores(part: _Part, q: torch.Tensor, k: torch.Tensor, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores (B, Hk, G, M, N) before the mask, and tanh(s / softcap) where there is a softcap."""
    problem = part.problem
    scores = (q @ k.transpose(-1, -2)).mul_(problem.softmax_scale)
    scores = scores.unflatten(2, (problem.group_size, tile.row_end - tile.row))
    tanh = None
    if problem.softcap > 0.0:
        tanh = scores.div_(problem.softcap).tanh_()
        scores = tanh * problem.softcap
    if part.slopes is not None:
        row = torch.arange(tile.row, tile.row_end, device=q.device)[:, None]
        column = torch.arange(tile.column, tile.column_end, device=q.device)[None, :]
        distance = (row + part.seqlen_k - part.seqlen_q - column).abs()
        scores = scores - part.slopes * distance
    return scores, tanh


def _kept(part: _Part, tile: Tile) -> torch.Tensor | None:
    """Dropout mask (B, Hk, G, M, N) of a tile, None without dropout."""
    problem = part.problem
    if problem.dropout_p <= 0.0:
        return None
    if part.rng_state is None:
        raise ValueError("rng_state: expected a tensor for a problem with dropout, got None")
    device = part.q.device
    batch = torch.arange(part.first_batch, part.first_batch + part.q.shape[0], device=device)
    head = torch.arange(problem.nheads, device=device).view(problem.nheads_k, problem.group_size, 1, 1)
    row = torch.arange(tile.row, tile.row_end, device=device)[:, None]
    column = torch.arange(tile.column, tile.column_end, device=device)[None, :]
    head = batch.view(-1, 1, 1, 1, 1) * problem.nheads + head
    return keep_mask(part.rng_state, head, row, column, dropout_threshold(problem.dropout_p))


def _rescale(problem: AttentionProblem) -> float:
    """Factor of the kept probabilities; everything is dropped at p = 1."""
    return 1.0 / (1.0 - problem.dropout_p) if problem.dropout_p < 1.0 else 0.0


def _per_row(part: _Part, visible: torch.Tensor | None) -> torch.Tensor | None:
    """(M, N) mask for rows that are (G, M) folded."""
    return None if visible is None else visible.repeat(part.problem.group_size, 1)


def _probabilities(part: _Part, scores: torch.Tensor, lse: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """softmax(scores) from the LSE (B, Hk, G, M); exactly 0 where hidden.  Reuses the memory of scores."""
    lse = lse.to(scores.dtype).masked_fill(lse == -_INF, 0.0)
    p = scores.sub_(lse[..., None]).exp_()
    return p if visible is None else p.masked_fill_(~visible, 0.0)


def _outside_autograd_and_autocast(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """The caller's modes are not for the arithmetic in here; autocast would run it in half precision."""

    @functools.wraps(function)
    def run(problem: AttentionProblem, *args: Any, **kwargs: Any) -> _Result:
        with torch.no_grad(), torch.autocast(problem.device_type, enabled=False):
            return function(problem, *args, **kwargs)

    return run


@_outside_autograd_and_autocast
def forward(
    problem: AttentionProblem, inputs: AttentionInputs, *, tile: TileSize | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the scores.

    Returns ``out``, q's shape with headdim_v, q's dtype, contiguous, and ``softmax_lse`` in fp32 (fp64
    for fp64), (batch, nheads, seqlen_q) or (nheads, total_q), natural logarithm.  A row that sees no
    key is 0 and -inf (with sinks 0 and the sink), a varlen row of no sequence 0 and -inf.  ``tile``
    changes memory and speed only.
    """
    q = inputs.q
    out = q.new_zeros(*q.shape[:-1], problem.headdim_v)
    lse = torch.full(lse_shape(q), -_INF, dtype=accumulate_dtype(q.dtype), device=q.device)
    for part in _parts(problem, inputs, tile):
        out_part, lse_part = part.of_queries(out), part.of_lse(lse)
        for row, row_end in part.row_tiles():
            out_rows, lse_rows = _forward_rows(part, row, row_end)
            out_part[..., row:row_end, :] = out_rows.to(q.dtype)
            lse_part[..., row:row_end] = lse_rows
    return out, lse


def _forward_rows(part: _Part, row: int, row_end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of rows: out (B, Hk, G, M, Dv) and LSE (B, Hk, G, M) in the accumulation dtype."""
    problem = part.problem
    q = _load(part.q, row, row_end, part.dtype)
    largest = q.new_full((*q.shape[:2], problem.group_size, row_end - row, 1), -_INF)
    total = torch.zeros_like(largest)
    acc = q.new_zeros(*largest.shape[:-1], problem.headdim_v)
    for tile in part.key_tiles(row, row_end):
        k = _load(part.k, tile.column, tile.column_end, part.dtype)
        v = _load(part.v, tile.column, tile.column_end, part.dtype)
        visible = part.visible(tile)
        scores, _ = _scores(part, q, k, tile)
        if visible is not None:
            scores.masked_fill_(~visible, -_INF)
        new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN.
        base = new_largest.masked_fill(new_largest == -_INF, 0.0)
        p = scores.sub_(base).exp_()
        decay = (largest - base).exp_()
        total = total * decay + p.sum(-1, keepdim=True)
        keep = _kept(part, tile)
        if keep is not None:
            p.masked_fill_(~keep, 0.0)
        acc = acc * decay + product(p.flatten(2, 3), v, _per_row(part, visible)).view_as(acc)
        largest = new_largest
    dead = total == 0.0
    unseen = largest.new_tensor(-_INF)
    if part.sinks is not None:
        # Joins like a key, but one without a value.
        unseen, new_largest = part.sinks, torch.maximum(largest, part.sinks)
        base = new_largest.masked_fill(new_largest == -_INF, 0.0)
        decay = (largest - base).exp_()
        total = total * decay + (part.sinks - base).exp_()
        acc, largest = acc * decay, new_largest
    lse = torch.where(dead, unseen, largest + total.log()).squeeze(-1)
    acc = acc.mul_(_rescale(problem)).div_(total.masked_fill(dead, 1.0))
    return acc.masked_fill_(dead, 0.0), lse


@_outside_autograd_and_autocast
def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    tile: TileSize | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients ``(dq, dk, dv, dsinks)``: of the shapes and the dtype of q, k and v, contiguous; dsinks
    (nheads,) float32, or None without sinks.

    ``out`` and ``softmax_lse`` are those of :func:`forward`; ``dout`` has the shape of ``out``,
    ``dlse`` that of ``softmax_lse``.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    offsets = torch.zeros_like(softmax_lse)
    for part in _parts(problem, inputs, tile):
        dq_part = part.of_queries(dq)
        dk_acc = part.k.new_zeros(part.k.shape, dtype=part.dtype)
        dv_acc = part.v.new_zeros(part.v.shape, dtype=part.dtype)
        out_part, dout_part, lse_part = part.of_queries(out), part.of_queries(dout), part.of_lse(softmax_lse)
        offset_part = part.of_lse(offsets)
        dlse_part = None if dlse is None else part.of_lse(dlse)
        for row, row_end in part.row_tiles():
            rows = slice(row, row_end)
            dout_rows = dout_part[..., rows, :].to(part.dtype)
            # sum_j P_ij dP_ij of the softmax, and the gradient of the LSE, whose derivative is P.
            offset = (dout_rows * out_part[..., rows, :]).sum(-1)
            if dlse_part is not None:
                offset -= dlse_part[..., rows]
            offset_part[..., rows] = offset
            dq_rows = _backward_rows(part, rows, dout_rows, lse_part[..., rows], offset, dk_acc, dv_acc)
            dq_part[..., rows, :] = dq_rows.to(q.dtype)
        part.of_keys(dk)[...] = dk_acc.to(k.dtype)
        part.of_keys(dv)[...] = dv_acc.to(v.dtype)
    dsinks = None if inputs.sinks is None else sinks.gradient(inputs.sinks, softmax_lse, offsets)
    return dq, dk, dv, dsinks


def _backward_rows(
    part: _Part,
    rows: slice,
    dout: torch.Tensor,
    lse: torch.Tensor,
    offset: torch.Tensor,
    dk_acc: torch.Tensor,
    dv_acc: torch.Tensor,
) -> torch.Tensor:
    """dq (B, Hk, G, M, D) of one block of rows; adds the block's share to dk_acc and dv_acc."""
    problem = part.problem
    q = _load(part.q, rows.start, rows.stop, part.dtype)
    dout_folded = dout.reshape(*q.shape[:3], problem.headdim_v)
    dq = torch.zeros_like(q)
    for tile in part.key_tiles(rows.start, rows.stop):
        columns = slice(tile.column, tile.column_end)
        k = _load(part.k, columns.start, columns.stop, part.dtype)
        v = _load(part.v, columns.start, columns.stop, part.dtype)
        visible = part.visible(tile)
        visible_rows = _per_row(part, visible)
        visible_columns = None if visible_rows is None else visible_rows.T
        scores, tanh = _scores(part, q, k, tile)
        p = _probabilities(part, scores, lse, visible)
        dp = (dout_folded @ v.transpose(-1, -2)).view_as(p)
        p_dropped, keep = p, _kept(part, tile)
        if keep is not None:
            p_dropped = p.masked_fill(~keep, 0.0).mul_(_rescale(problem))
            dp.masked_fill_(~keep, 0.0).mul_(_rescale(problem))
        dv_acc[..., columns, :] += product(p_dropped.flatten(2, 3).transpose(-1, -2), dout_folded, visible_columns)
        ds = (dp - offset[..., None]) * p
        if tanh is not None:
            ds *= 1.0 - tanh * tanh
        if visible is not None:
            ds.masked_fill_(~visible, 0.0)
        ds = ds.mul_(problem.softmax_scale).flatten(2, 3)
        dq += product(ds, k, visible_rows)
        dk_acc[..., columns, :] += product(ds.transpose(-1, -2), q, visible_columns)
    return dq.unflatten(2, (problem.group_size, rows.stop - rows.start))


@_outside_autograd_and_autocast
def probs(
    problem: AttentionProblem, inputs: AttentionInputs, softmax_lse: torch.Tensor, *, tile: TileSize | None = None
) -> torch.Tensor:
    """S_dmask: the softmax probabilities, negative where dropout dropped the element.

    (batch, nheads, longest seqlen_q, longest seqlen_k) in the dtype of q, 0 where masked and beyond
    the end of a sequence.  The one result that is O(seqlen^2); only a caller that asks for it pays.
    """
    q = inputs.q
    result = q.new_zeros(problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k)
    for part in _parts(problem, inputs, tile):
        batch = slice(part.first_batch, part.first_batch + part.q.shape[0])
        result_part = result[batch].unflatten(1, (problem.nheads_k, problem.group_size))
        lse_part = part.of_lse(softmax_lse)
        for row, row_end in part.row_tiles():
            q_rows = _load(part.q, row, row_end, part.dtype)
            for t in part.key_tiles(row, row_end):
                k = _load(part.k, t.column, t.column_end, part.dtype)
                p = _probabilities(part, _scores(part, q_rows, k, t)[0], lse_part[..., row:row_end], part.visible(t))
                keep = _kept(part, t)
                if keep is not None:
                    p = torch.where(keep, p, -p)
                result_part[..., row:row_end, t.column : t.column_end] = p.to(q.dtype)
    return result
