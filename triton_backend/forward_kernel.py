"""Forward kernel: tiled attention with online softmax.

Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691) section 3.1; the online softmax is
Milakov and Gimelshein 2018 (arXiv:1805.02867).
"""

import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    between,
    dot,
    dot_by_chunks,
    dropout_keep,
    join_sink,
    key_ranges,
    load_slope,
    load_tile,
    modified_scores,
    round_to,
    sequence_bounds,
    store_tile,
    tile_of_program,
    tile_offsets,
    visible_keys,
)
from .jit import kernel


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptr, v_ptr, begin, end,
    rows, first_col, last_col, shift, seqlen_q, seqlen_k, stride_qm, stride_kn, stride_vn,
    scale, softcap_log2, slope_log2,
    rng_ptr, head_index, dropout_threshold,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, MASK_LEFT: tl.constexpr, MOVE_BOUNDS: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, TIES_UP: tl.constexpr,
):  # fmt: skip
    """One pass over columns [begin, end).  acc [BLOCK_M, BLOCK_DV]; row_sum, row_max, first_col, last_col [BLOCK_M].

    q is the tile [BLOCK_M, BLOCK_D], or with BLOCK_K the address of its first row.
    """
    cols_in_tile = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    k_offsets = tile_offsets(cols_in_tile, stride_kn, dims, VEC, WIDE)
    v_offsets = tile_offsets(cols_in_tile, stride_vn, dims_v, VEC, WIDE)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=BLOCK_K > 0):
        cols = start + cols_in_tile
        k_tile = k_ptr + tl.cast(start, tl.int64) * stride_kn * VEC
        if BLOCK_K == 0:
            k = load_tile(k_tile + k_offsets, cols, seqlen_k, dims, HEADDIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
            s = dot(q, tl.trans(k), None)  # [BLOCK_M, BLOCK_N]
        else:
            s = dot_by_chunks(
                q, rows, seqlen_q, stride_qm, k_tile, cols, seqlen_k, stride_kn,
                BLOCK_M, BLOCK_N, HEADDIM, BLOCK_D, BLOCK_K, MASKED, VEC, WIDE,
            )  # fmt: skip
        if not RAW_SCALE:
            s = modified_scores(
                s, rows[:, None], cols[None, :], shift, scale, softcap_log2, slope_log2,
                SOFTCAP, ALIBI, k_ptr.dtype.element_ty == tl.float32,
            )  # fmt: skip
        if MASKED:
            if MOVE_BOUNDS:
                seen = between(
                    cols_in_tile[None, :], (first_col - start)[:, None], (last_col - start)[:, None], MASK_LEFT, True
                )
            else:
                seen = between(cols[None, :], first_col[:, None], last_col[:, None], MASK_LEFT, True)
            s = tl.where(seen, s, float("-inf"))
        # The raw path leaves the multiplication by scale to the FMA that subtracts the maximum.
        tile_max = tl.max(s, 1) * scale if RAW_SCALE else tl.max(s, 1)
        new_max = tl.maximum(row_max, tile_max)
        # A row that has seen nothing yet keeps -inf; subtracting it would give NaN.
        subtract = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        if RAW_SCALE:
            p = tl.exp2(s * scale - subtract[:, None])
        else:
            p = tl.exp2(s - subtract[:, None])
        rescale = tl.exp2(row_max - subtract)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            keep = dropout_keep(rng_ptr, rows[:, None], cols[None, :], head_index, dropout_threshold)
            p = tl.where(keep, p, 0.0)
        v_tile = v_ptr + tl.cast(start, tl.int64) * stride_vn * VEC
        v = load_tile(v_tile + v_offsets, cols, seqlen_k, dims_v, HEADDIM_V, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
        acc = acc * rescale[:, None]
        acc = dot(round_to(p, v.dtype, TIES_UP), v, acc)
    return acc, row_sum, row_max


@kernel(triton.jit)
def attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, sinks_ptr,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_qb: tl.int64, stride_qm: tl.int32, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int32, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int32, stride_vh: tl.int64,
    stride_alibi_batch: tl.int32,
    batch_heads: tl.int32, nheads: tl.int32, group_size: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, num_blocks: tl.int32,
    scale: tl.float32, softcap_log2: tl.float32, window_left: tl.int32, window_right: tl.int32,
    dropout_threshold: tl.int32, dropout_rescale: tl.float32,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr, VARLEN: tl.constexpr,
    MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr, MOVE_BOUNDS: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, TIES_UP: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """One block of BLOCK_M queries of one head.

    out is contiguous (rows, nheads, HEADDIM_V); lse is addressed by stride_lb, stride_lh and the row; with SINKS
    sinks is (nheads,) and lse includes them.
    """
    block, batch_head = tile_of_program(num_blocks, batch_heads, NUM_XCDS)
    if MASK_RIGHT:
        # Later rows see more keys: starting with them evens out the end of the launch.
        block = num_blocks - 1 - block
    batch = batch_head // nheads
    head = batch_head % nheads
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    first_row = block * BLOCK_M
    if first_row >= rows_total:
        return
    shift = cols_total - rows_total
    last_row = tl.minimum(first_row + BLOCK_M, rows_total) - 1
    begin, full_begin, full_end, end = key_ranges(
        first_row, last_row, shift, cols_total, window_left, window_right, BLOCK_N, MASK_LEFT, MASK_RIGHT
    )

    batch64 = batch.to(tl.int64)
    head_k = (head // group_size).to(tl.int64)
    q_start = batch64 * stride_qb + head.to(tl.int64) * stride_qh + (start_q + first_row).to(tl.int64) * stride_qm
    k_ptr += (batch64 * stride_kb + head_k * stride_kh + start_k.to(tl.int64) * stride_kn) * VEC
    v_ptr += (batch64 * stride_vb + head_k * stride_vh + start_k.to(tl.int64) * stride_vn) * VEC

    rows_in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + rows_in_tile
    dims = tl.arange(0, BLOCK_D)
    q = q_ptr + q_start * VEC
    if BLOCK_K == 0:
        q_ptrs = q + tile_offsets(rows_in_tile, stride_qm, dims, VEC, WIDE)
        q = load_tile(q_ptrs, rows, rows_total, dims, HEADDIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]

    first_col, last_col = visible_keys(
        rows, shift, cols_total, window_left, window_right, MASK_LEFT, MASK_RIGHT
    )  # [BLOCK_M]
    slope_log2 = load_slope(alibi_ptr, stride_alibi_batch, batch, head) if ALIBI else 0.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if MASK_LEFT:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptr, v_ptr, begin, tl.minimum(full_begin, end),
            rows, first_col, last_col, shift, rows_total, cols_total, stride_qm, stride_kn, stride_vn, scale,
            softcap_log2, slope_log2, rng_ptr, batch_head, dropout_threshold,
            HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
            True, MASK_LEFT, MOVE_BOUNDS, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, full_begin, full_end,
        rows, first_col, last_col, shift, rows_total, cols_total, stride_qm, stride_kn, stride_vn, scale,
        softcap_log2, slope_log2, rng_ptr, batch_head, dropout_threshold,
        HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
        False, MASK_LEFT, MOVE_BOUNDS, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, full_end, end,
        rows, first_col, last_col, shift, rows_total, cols_total, stride_qm, stride_kn, stride_vn, scale,
        softcap_log2, slope_log2, rng_ptr, batch_head, dropout_threshold,
        HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
        True, MASK_LEFT, MOVE_BOUNDS, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
    )  # fmt: skip

    # A row without any visible key: its accumulator may hold 0 * NaN of keys that other rows see.  A row
    # that sees only NaN has no maximum either, but its sum is NaN.
    dead = (row_max == float("-inf")) & (row_sum == 0.0)
    unseen = float("-inf")  # softmax_lse of such a row
    if SINKS:
        unseen = tl.load(sinks_ptr + head)
        acc, row_sum, row_max = join_sink(acc, row_sum, row_max, unseen * LOG2E)
    out = acc * (dropout_rescale / tl.where(dead, 1.0, row_sum))[:, None]
    out = tl.where(dead[:, None], 0.0, out)
    lse = tl.where(dead, unseen, (row_max + tl.log2(row_sum)) * LN2)

    dims_v = tl.arange(0, BLOCK_DV)
    out_row = (start_q + first_row).to(tl.int64)
    lse_ptr += batch64 * stride_lb + head.to(tl.int64) * stride_lh + out_row
    tl.store(lse_ptr + rows_in_tile, lse, mask=rows < rows_total)
    if not VARLEN:
        out_row += batch64 * seqlen_q
    out_ptr += (out_row * nheads + head) * HEADDIM_V
    out_ptrs = out_ptr + tile_offsets(rows_in_tile, nheads * HEADDIM_V, dims_v, 1, WIDE)
    store_tile(out_ptrs, out, rows, rows_total, dims_v, HEADDIM_V, BLOCK_DV)
