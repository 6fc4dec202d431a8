"""Backward kernels: dQ, then dK and dV, both without atomics and so deterministic.

Scores are recomputed from softmax_lse (Dao et al. 2022, arXiv:2205.14135, section 3.1 and appendix
B.4).  Two kernels recompute them twice, seven matrix products instead of five, and in return no two
workgroups add to one address.  With P the probabilities and D = rowsum(dO * O) - dLSE:
dV = P^T dO, dP = dO V^T, dS = P * (dP - D), dQ = scale dS K, dK = scale dS^T Q.
"""

import triton
import triton.language as tl

from .common import (
    LOG2E,
    between,
    dot,
    dot_by_chunks,
    dropout_keep,
    key_ranges,
    load_slope,
    load_tile,
    modified_scores,
    query_ranges,
    round_to,
    sequence_bounds,
    store_tile,
    tile_of_program,
    tile_offsets,
    visible_keys,
)
from .jit import kernel


@triton.jit
def probabilities(
    qk, rows, cols, lse_log2, seen, shift, scale, softcap_log2, slope_log2,
    MASKED: tl.constexpr, RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """exp2(score - lse), 0 where masked; all arguments broadcast to the shape of qk."""
    if RAW_SCALE:
        p = tl.exp2(qk * scale - lse_log2)
    else:
        s = modified_scores(qk, rows, cols, shift, scale, softcap_log2, slope_log2, SOFTCAP, ALIBI, PRECISE)
        p = tl.exp2(s - lse_log2)
    if MASKED:
        # Also where lse is -inf: exp2 of that difference is inf, and no such row sees a key.
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def _score_gradient(
    p, dp, qk, delta, seen, scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradient of the scaled scores before softcap, P * (dP - D) [* (1 - tanh^2)]."""
    ds = p * (dp - delta)
    if SOFTCAP:
        # 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2|x|): no cancellation where tanh is near 1.
        e = tl.exp2(tl.abs(qk * scale) * (-2.0 * LOG2E))
        ds *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    if MASKED:
        # 0 * NaN of a masked key must not become a gradient.
        ds = tl.where(seen, ds, 0.0)
    return ds


@triton.jit
def _accumulate_dq(
    dq, q, do, lse_log2, delta, k_ptr, v_ptr, begin, end,
    rows, first_col, last_col, shift, seqlen_q, seqlen_k, stride_qm, stride_dom, stride_kn, stride_vn,
    scale, softcap_log2, slope_log2,
    rng_ptr, head_index, dropout_threshold, dropout_rescale,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, MASK_LEFT: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, TIES_UP: tl.constexpr,
):  # fmt: skip
    """Add the part of columns [begin, end) to dq [BLOCK_M, BLOCK_D], without the final scale.

    q and do are tiles [BLOCK_M, BLOCK_D] and [BLOCK_M, BLOCK_DV], or with BLOCK_K the addresses of their first rows.
    """
    PRECISE: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    cols_in_tile = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    k_offsets = tile_offsets(cols_in_tile, stride_kn, dims, VEC, WIDE)
    v_offsets = tile_offsets(cols_in_tile, stride_vn, dims_v, VEC, WIDE)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=BLOCK_K > 0):
        cols = start + cols_in_tile
        k_tile = k_ptr + tl.cast(start, tl.int64) * stride_kn * VEC
        v_tile = v_ptr + tl.cast(start, tl.int64) * stride_vn * VEC
        k = load_tile(k_tile + k_offsets, cols, seqlen_k, dims, HEADDIM, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        if BLOCK_K == 0:
            # [BLOCK_N, BLOCK_DV]
            v = load_tile(v_tile + v_offsets, cols, seqlen_k, dims_v, HEADDIM_V, BLOCK_DV, MASKED)
            qk = dot(q, tl.trans(k), None)  # [BLOCK_M, BLOCK_N]
            dp = dot(do, tl.trans(v), None)  # [BLOCK_M, BLOCK_N]
        else:
            qk = dot_by_chunks(
                q, rows, seqlen_q, stride_qm, k_tile, cols, seqlen_k, stride_kn,
                BLOCK_M, BLOCK_N, HEADDIM, BLOCK_D, BLOCK_K, MASKED, VEC, WIDE,
            )  # fmt: skip
            dp = dot_by_chunks(
                do, rows, seqlen_q, stride_dom, v_tile, cols, seqlen_k, stride_vn,
                BLOCK_M, BLOCK_N, HEADDIM_V, BLOCK_DV, BLOCK_K, MASKED, VEC, WIDE,
            )  # fmt: skip
        rows_2d = rows[:, None]
        cols_2d = cols[None, :]
        seen = between(
            cols_in_tile[None, :], (first_col - start)[:, None], (last_col - start)[:, None], MASK_LEFT, True
        )
        p = probabilities(
            qk, rows_2d, cols_2d, lse_log2[:, None], seen, shift, scale, softcap_log2, slope_log2,
            MASKED, RAW_SCALE, SOFTCAP, ALIBI, PRECISE,
        )  # fmt: skip
        if DROPOUT:
            keep = dropout_keep(rng_ptr, rows_2d, cols_2d, head_index, dropout_threshold)
            dp = tl.where(keep, dp * dropout_rescale, 0.0)
        ds = _score_gradient(p, dp, qk, delta[:, None], seen, scale, MASKED, SOFTCAP)
        dq = dot(round_to(ds, k.dtype, TIES_UP), k, dq)
    return dq


@kernel(triton.jit)
def attn_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_qb: tl.int64, stride_qm: tl.int32, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int32, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int32, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int32, stride_doh: tl.int64,
    stride_alibi_batch: tl.int32,
    batch_heads: tl.int32, nheads: tl.int32, group_size: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, num_blocks: tl.int32,
    softmax_scale: tl.float32, scale: tl.float32, softcap_log2: tl.float32,
    window_left: tl.int32, window_right: tl.int32, dropout_threshold: tl.int32, dropout_rescale: tl.float32,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr, VARLEN: tl.constexpr,
    MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, TIES_UP: tl.constexpr,
    SINKS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head; also writes delta = D for the dK/dV kernel.

    out and dq are contiguous (rows, nheads, dim); lse, dlse and delta share one layout.
    """
    block, batch_head = tile_of_program(num_blocks, batch_heads, NUM_XCDS)
    if MASK_RIGHT:
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
    head64 = tl.cast(head, tl.int64)
    head_k = (head // group_size).to(tl.int64)
    row64 = (start_q + first_row).to(tl.int64)
    q_ptr += (batch64 * stride_qb + head64 * stride_qh + row64 * stride_qm) * VEC
    do_ptr += (batch64 * stride_dob + head64 * stride_doh + row64 * stride_dom) * VEC
    k_ptr += (batch64 * stride_kb + head_k * stride_kh + start_k.to(tl.int64) * stride_kn) * VEC
    v_ptr += (batch64 * stride_vb + head_k * stride_vh + start_k.to(tl.int64) * stride_vn) * VEC
    lse_base = batch64 * stride_lb + head64 * stride_lh + row64
    out_row = row64
    if not VARLEN:
        out_row += batch64 * seqlen_q

    rows_in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + rows_in_tile
    row_exists = rows < rows_total
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    do_ptrs = do_ptr + tile_offsets(rows_in_tile, stride_dom, dims_v, VEC, WIDE)
    out_ptr += (out_row * nheads + head) * HEADDIM_V
    out_ptrs = out_ptr + tile_offsets(rows_in_tile, nheads * HEADDIM_V, dims_v, 1, WIDE)
    do = load_tile(do_ptrs, rows, rows_total, dims_v, HEADDIM_V, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    out = load_tile(out_ptrs, rows, rows_total, dims_v, HEADDIM_V, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + lse_base + rows_in_tile, mask=row_exists, other=0.0)
    tl.store(delta_ptr + lse_base + rows_in_tile, delta, mask=row_exists)
    lse = tl.load(lse_ptr + lse_base + rows_in_tile, mask=row_exists, other=float("inf"))
    lse_log2 = lse * LOG2E
    q = q_ptr
    if BLOCK_K == 0:
        q_ptrs = q_ptr + tile_offsets(rows_in_tile, stride_qm, dims, VEC, WIDE)
        q = load_tile(q_ptrs, rows, rows_total, dims, HEADDIM, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    else:
        do = do_ptr

    first_col, last_col = visible_keys(
        rows, shift, cols_total, window_left, window_right, MASK_LEFT, MASK_RIGHT
    )  # [BLOCK_M]
    slope_log2 = load_slope(alibi_ptr, stride_alibi_batch, batch, head) if ALIBI else 0.0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MASK_LEFT:
        dq = _accumulate_dq(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, begin, tl.minimum(full_begin, end),
            rows, first_col, last_col, shift, rows_total, cols_total, stride_qm, stride_dom, stride_kn, stride_vn,
            scale, softcap_log2, slope_log2, rng_ptr, batch_head, dropout_threshold, dropout_rescale,
            HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
            True, MASK_LEFT, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
        )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse_log2, delta, k_ptr, v_ptr, full_begin, full_end,
        rows, first_col, last_col, shift, rows_total, cols_total, stride_qm, stride_dom, stride_kn, stride_vn,
        scale, softcap_log2, slope_log2, rng_ptr, batch_head, dropout_threshold, dropout_rescale,
        HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
        False, MASK_LEFT, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse_log2, delta, k_ptr, v_ptr, full_end, end,
        rows, first_col, last_col, shift, rows_total, cols_total, stride_qm, stride_dom, stride_kn, stride_vn,
        scale, softcap_log2, slope_log2, rng_ptr, batch_head, dropout_threshold, dropout_rescale,
        HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
        True, MASK_LEFT, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
    )  # fmt: skip

    # A row without keys has no gradient, also where 0 met a NaN key that other rows see.
    dead = lse == float("-inf")
    if SINKS:  # which leave it a finite lse
        dead = dead | (last_col < tl.maximum(first_col, 0))
    dq = tl.where(dead[:, None], 0.0, dq * softmax_scale)
    dq_ptr += (out_row * nheads + head) * HEADDIM
    dq_ptrs = dq_ptr + tile_offsets(rows_in_tile, nheads * HEADDIM, dims, 1, WIDE)
    store_tile(dq_ptrs, dq, rows, rows_total, dims, HEADDIM, BLOCK_D)


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, begin, end,
    cols, first_row, last_row, shift, seqlen_q, seqlen_k, stride_qm, stride_dom, stride_kn, stride_vn,
    scale, softcap_log2, slope_log2,
    rng_ptr, head_index, dropout_threshold, dropout_rescale,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, TIES_UP: tl.constexpr,
):  # fmt: skip
    """Add the part of rows [begin, end) to dk [BLOCK_N, BLOCK_D] (unscaled) and dv [BLOCK_N, BLOCK_DV].

    Column j is seen by rows [first_row[j], last_row[j]], as far as MASK_RIGHT and MASK_LEFT go.  Rows that do
    not exist have lse inf, and so probability 0; columns that do not exist are never stored.
    Works on transposed scores [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands as they are.
    k and v are tiles [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV], or with BLOCK_K the addresses of their first rows.
    """
    CHECKED: tl.constexpr = MASKED and (MASK_LEFT or MASK_RIGHT)
    PRECISE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    rows_in_tile = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    q_offsets = tile_offsets(rows_in_tile, stride_qm, dims, VEC, WIDE)
    do_offsets = tile_offsets(rows_in_tile, stride_dom, dims_v, VEC, WIDE)
    for start in tl.range(begin, end, BLOCK_M, disable_licm=BLOCK_K > 0):
        rows = start + rows_in_tile
        q_tile = q_ptr + tl.cast(start, tl.int64) * stride_qm * VEC
        do_tile = do_ptr + tl.cast(start, tl.int64) * stride_dom * VEC
        q = load_tile(q_tile + q_offsets, rows, seqlen_q, dims, HEADDIM, BLOCK_D, MASKED)  # [BLOCK_M, BLOCK_D]
        do = load_tile(do_tile + do_offsets, rows, seqlen_q, dims_v, HEADDIM_V, BLOCK_DV, MASKED)  # [BLOCK_M, BLOCK_DV]
        if MASKED:
            lse = tl.load(lse_ptr + rows, mask=rows < seqlen_q, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=rows < seqlen_q, other=0.0)
        else:
            lse = tl.load(lse_ptr + rows)
            delta = tl.load(delta_ptr + rows)
        if BLOCK_K == 0:
            qk = dot(k, tl.trans(q), None)  # [BLOCK_N, BLOCK_M]
        else:
            qk = dot_by_chunks(
                k, cols, seqlen_k, stride_kn, q_tile, rows, seqlen_q, stride_qm,
                BLOCK_N, BLOCK_M, HEADDIM, BLOCK_D, BLOCK_K, MASKED, VEC, WIDE,
            )  # fmt: skip
        rows_2d = rows[None, :]
        cols_2d = cols[:, None]
        seen = between(
            rows_in_tile[None, :], (first_row - start)[:, None], (last_row - start)[:, None], MASK_RIGHT, MASK_LEFT
        )
        p = probabilities(
            qk, rows_2d, cols_2d, lse[None, :] * LOG2E, seen, shift, scale, softcap_log2, slope_log2,
            CHECKED, RAW_SCALE, SOFTCAP, ALIBI, PRECISE,
        )  # fmt: skip
        if BLOCK_K == 0:
            dp = dot(v, tl.trans(do), None)  # [BLOCK_N, BLOCK_M]
        else:
            dp = dot_by_chunks(
                v, cols, seqlen_k, stride_vn, do_tile, rows, seqlen_q, stride_dom,
                BLOCK_N, BLOCK_M, HEADDIM_V, BLOCK_DV, BLOCK_K, MASKED, VEC, WIDE,
            )  # fmt: skip
        dropped = p
        if DROPOUT:
            keep = dropout_keep(rng_ptr, rows_2d, cols_2d, head_index, dropout_threshold)
            dropped = tl.where(keep, p * dropout_rescale, 0.0)
            dp = tl.where(keep, dp * dropout_rescale, 0.0)
        dv = dot(round_to(dropped, do.dtype, TIES_UP), do, dv)
        ds = _score_gradient(p, dp, qk, delta[None, :], seen, scale, CHECKED, SOFTCAP)
        dk = dot(round_to(ds, q.dtype, TIES_UP), q, dk)
    return dk, dv


@kernel(triton.jit)
def attn_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_lb: tl.int64, stride_lh: tl.int64,
    stride_qb: tl.int64, stride_qm: tl.int32, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int32, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int32, stride_vh: tl.int64,
    stride_dob: tl.int64, stride_dom: tl.int32, stride_doh: tl.int64,
    stride_alibi_batch: tl.int32,
    batch_heads_k: tl.int32, nheads_k: tl.int32, group_size: tl.int32,
    seqlen_q: tl.int32, seqlen_k: tl.int32, num_blocks: tl.int32,
    softmax_scale: tl.float32, scale: tl.float32, softcap_log2: tl.float32,
    window_left: tl.int32, window_right: tl.int32, dropout_threshold: tl.int32, dropout_rescale: tl.float32,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    NUM_XCDS: tl.constexpr, VARLEN: tl.constexpr,
    MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
    RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, TIES_UP: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key/value head, summed over the query heads of its group.

    dk and dv are contiguous (rows, nheads_k, dim).
    """
    block, batch_head_k = tile_of_program(num_blocks, batch_heads_k, NUM_XCDS)
    batch = batch_head_k // nheads_k
    head_k = batch_head_k % nheads_k
    nheads = nheads_k * group_size
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    first_col = block * BLOCK_N
    if first_col >= cols_total:
        return
    shift = cols_total - rows_total
    begin, full_begin, full_end, end = query_ranges(
        first_col, shift, rows_total, cols_total, window_left, window_right, BLOCK_M, BLOCK_N, MASK_LEFT, MASK_RIGHT
    )

    batch64 = batch.to(tl.int64)
    head_k64 = head_k.to(tl.int64)
    col64 = (start_k + first_col).to(tl.int64)
    row64 = start_q.to(tl.int64)
    cols_in_tile = tl.arange(0, BLOCK_N)
    cols = first_col + cols_in_tile
    first_row = cols - shift - window_right  # [BLOCK_N]
    last_row = cols - shift + window_left  # [BLOCK_N]
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    k_ptr += (batch64 * stride_kb + head_k64 * stride_kh + col64 * stride_kn) * VEC
    v_ptr += (batch64 * stride_vb + head_k64 * stride_vh + col64 * stride_vn) * VEC
    k, v = k_ptr, v_ptr
    if BLOCK_K == 0:
        k_ptrs = k_ptr + tile_offsets(cols_in_tile, stride_kn, dims, VEC, WIDE)
        v_ptrs = v_ptr + tile_offsets(cols_in_tile, stride_vn, dims_v, VEC, WIDE)
        k = load_tile(k_ptrs, cols, cols_total, dims, HEADDIM, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptrs, cols, cols_total, dims_v, HEADDIM_V, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in tl.range(0, group_size, num_stages=1):
        head = head_k * group_size + member
        head64 = tl.cast(head, tl.int64)
        q_head = q_ptr + (batch64 * stride_qb + head64 * stride_qh + row64 * stride_qm) * VEC
        do_head = do_ptr + (batch64 * stride_dob + head64 * stride_doh + row64 * stride_dom) * VEC
        lse_base = batch64 * stride_lb + head64 * stride_lh + row64
        head_index = batch * nheads + head
        slope_log2 = load_slope(alibi_ptr, stride_alibi_batch, batch, head) if ALIBI else 0.0
        if MASK_RIGHT:
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, q_head, do_head, lse_ptr + lse_base, delta_ptr + lse_base,
                begin, tl.minimum(full_begin, end), cols, first_row, last_row, shift, rows_total, cols_total,
                stride_qm, stride_dom, stride_kn, stride_vn,
                scale, softcap_log2, slope_log2, rng_ptr, head_index, dropout_threshold,
                dropout_rescale, HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
                True, MASK_LEFT, MASK_RIGHT, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
            )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_head, do_head, lse_ptr + lse_base, delta_ptr + lse_base,
            full_begin, full_end, cols, first_row, last_row, shift, rows_total, cols_total,
            stride_qm, stride_dom, stride_kn, stride_vn,
            scale, softcap_log2, slope_log2, rng_ptr, head_index, dropout_threshold,
            dropout_rescale, HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
            False, MASK_LEFT, MASK_RIGHT, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
        )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, q_head, do_head, lse_ptr + lse_base, delta_ptr + lse_base,
            full_end, end, cols, first_row, last_row, shift, rows_total, cols_total,
            stride_qm, stride_dom, stride_kn, stride_vn,
            scale, softcap_log2, slope_log2, rng_ptr, head_index, dropout_threshold,
            dropout_rescale, HEADDIM, HEADDIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BLOCK_K, VEC, WIDE,
            True, MASK_LEFT, MASK_RIGHT, RAW_SCALE, SOFTCAP, ALIBI, DROPOUT, TIES_UP,
        )  # fmt: skip

    out_row = col64
    if not VARLEN:
        out_row += batch64 * seqlen_k
    out_row = out_row * nheads_k + head_k
    dk_ptrs = dk_ptr + out_row * HEADDIM + tile_offsets(cols_in_tile, nheads_k * HEADDIM, dims, 1, WIDE)
    dv_ptrs = dv_ptr + out_row * HEADDIM_V + tile_offsets(cols_in_tile, nheads_k * HEADDIM_V, dims_v, 1, WIDE)
    store_tile(dk_ptrs, dk * softmax_scale, cols, cols_total, dims, HEADDIM, BLOCK_D)
    store_tile(dv_ptrs, dv, cols, cols_total, dims_v, HEADDIM_V, BLOCK_DV)
