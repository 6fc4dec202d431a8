"""S_dmask: the probabilities themselves, for callers who ask for them."""

import triton
import triton.language as tl

from .backward_kernels import probabilities
from .common import (
    LOG2E,
    between,
    dot,
    dropout_keep,
    load_slope,
    load_tile,
    round_to,
    sequence_bounds,
    tile_of_program,
    tile_offsets,
    visible_keys,
)
from .jit import kernel


@kernel(triton.jit)
def attn_probs_kernel(
    q_ptr, k_ptr, lse_ptr, probs_ptr, alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_qb: tl.int64, stride_qm: tl.int32, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int32, stride_kh: tl.int64,
    stride_alibi_batch: tl.int32,
    batch_heads: tl.int32, nheads: tl.int32, group_size: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, num_blocks: tl.int32,
    scale: tl.float32, softcap_log2: tl.float32, window_left: tl.int32, window_right: tl.int32,
    dropout_threshold: tl.int32,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr, VARLEN: tl.constexpr,
    MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of probs (batch, nheads, seqlen_q, seqlen_k), zeroed by the caller."""
    block, batch_head = tile_of_program(num_blocks, batch_heads, NUM_XCDS)
    batch = batch_head // nheads
    head = batch_head % nheads
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= rows_total:
        return
    shift = cols_total - rows_total
    batch64 = batch.to(tl.int64)
    head64 = tl.cast(head, tl.int64)
    head_k = (head // group_size).to(tl.int64)
    row64 = (start_q + first_row).to(tl.int64)
    rows_in_tile = tl.arange(0, BLOCK_M)
    cols_in_tile = tl.arange(0, BLOCK_N)
    rows = first_row + rows_in_tile
    dims = tl.arange(0, BLOCK_D)
    q_ptr += (batch64 * stride_qb + head64 * stride_qh + row64 * stride_qm) * VEC
    k_ptr += (batch64 * stride_kb + head_k * stride_kh + start_k.to(tl.int64) * stride_kn) * VEC
    q_ptrs = q_ptr + tile_offsets(rows_in_tile, stride_qm, dims, VEC, WIDE)
    q = load_tile(q_ptrs, rows, rows_total, dims, HEADDIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    lse_ptr += batch64 * stride_lb + head64 * stride_lh + row64
    lse = tl.load(lse_ptr + rows_in_tile, mask=rows < rows_total, other=float("inf"))
    first_col, last_col = visible_keys(
        rows, shift, cols_total, window_left, window_right, MASK_LEFT, MASK_RIGHT
    )  # [BLOCK_M]
    slope_log2 = load_slope(alibi_ptr, stride_alibi_batch, batch, head) if ALIBI else 0.0
    probs_ptr += (batch_head.to(tl.int64) * seqlen_q + first_row) * seqlen_k
    probs_rows = probs_ptr + rows_in_tile.to(tl.int64)[:, None] * seqlen_k
    k_offsets = tile_offsets(cols_in_tile, stride_kn, dims, VEC, WIDE)
    for start in tl.range(0, cols_total, BLOCK_N):
        cols = start + cols_in_tile
        k_tile = k_ptr + tl.cast(start, tl.int64) * stride_kn * VEC
        k = load_tile(k_tile + k_offsets, cols, cols_total, dims, HEADDIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        qk = dot(q, tl.trans(k), None)  # [BLOCK_M, BLOCK_N]
        seen = between(cols[None, :], first_col[:, None], last_col[:, None], MASK_LEFT, True)
        p = probabilities(
            qk, rows[:, None], cols[None, :], (lse * LOG2E)[:, None], seen, shift, scale, softcap_log2, slope_log2,
            True, RAW_SCALE, SOFTCAP, ALIBI, q.dtype == tl.float32,
        )  # fmt: skip
        if DROPOUT:
            keep = dropout_keep(rng_ptr, rows[:, None], cols[None, :], batch_head, dropout_threshold)
            p = tl.where(keep, p, -p)
        # The buffer is as large as the caller's max_seqlens, which the lengths might pass.
        inside = (rows[:, None] < tl.minimum(rows_total, seqlen_q)) & (cols[None, :] < tl.minimum(cols_total, seqlen_k))
        tl.store(probs_rows + cols[None, :], round_to(p, probs_ptr.dtype.element_ty, False), mask=inside)
