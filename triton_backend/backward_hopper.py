"""Backward kernels for Hopper, in Gluon: dQ, then dK and dV; one warp copies, two warpgroups multiply.

The same two kernels without atomics as in ``backward_kernels``, with the same arguments, but descriptors of q, k, v
and dout as matrices in place of their pointers (``descriptors.Matrix``).  While one warpgroup makes probabilities and
their gradients, the tensor cores multiply for the other (Shah et al. 2024, FlashAttention-3, arXiv:2407.08608).
"""

from collections.abc import Mapping
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import LOG2E, key_ranges, query_ranges, sequence_bounds, visible_keys
from .hopper import ROWS, barrier, clear_from, fill, init_ring, load, row_layout
from .jit import kernel


def tile_rows_dq(constants: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """(rows, dims) of a copy of q, k, v and dout for dQ."""
    block_n, block_d, block_dv = (constants[name] for name in ("BLOCK_N", "BLOCK_D", "BLOCK_DV"))
    return (ROWS.value, block_d), (block_n, block_d), (block_n, block_dv), (ROWS.value, block_dv)


def tile_rows_dkdv(constants: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """(rows, dims) of a copy of q, k, v and dout for dK and dV."""
    block_m, block_d, block_dv = (constants[name] for name in ("BLOCK_M", "BLOCK_D", "BLOCK_DV"))
    return (block_m, block_d), (ROWS.value, block_d), (ROWS.value, block_dv), (block_m, block_dv)


# --------------------------------------------------------------------------------------------------
# dQ


@gluon.jit
def _load_for_dq(
    q, do, keys, values, q_full, k_full, k_empty, v_full, v_empty, q_desc, k_desc, v_desc, do_desc,
    q_row, q_col, do_row, do_col, k_row, k_col, v_row, v_col, exist, begin, end,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy q and do of this program, then keys and values into their rings."""
    if exist:
        mbarrier.expect(q_full, 2 * ROWS * (q.shape[2] + do.shape[2]) * 2)
        for part in gl.static_range(2):
            load(q_desc, [q_row + part * ROWS, q_col], q_full, q.index(part))
            load(do_desc, [do_row + part * ROWS, do_col], q_full, do.index(part))
        tile = 0
        for start in range(begin, end, BLOCK_N):
            fill(k_desc, k_row + start, k_col, tile, keys, k_full, k_empty, STAGES)
            fill(v_desc, v_row + start, v_col, tile, values, v_full, v_empty, STAGES)
            tile += 1  # noqa: SIM113 - Triton has no enumerate


@gluon.jit
def _start_scores(q, do, keys, values, k_full, v_full, tile, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Start q k^T and do v^T of a tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = tile % STAGES
    phase = (tile // STAGES) & 1
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    mbarrier.wait(k_full.index(stage), phase)
    s = warpgroup_mma(q, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    dp = warpgroup_mma(do, values.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _seen_keys(start, first_col, last_col, BLOCK_N: gl.constexpr):
    """Mask of a tile of scores [ROWS, BLOCK_N]."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    cols = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    return (cols[None, :] >= first_col[:, None]) & (cols[None, :] <= last_col[:, None])


@gluon.jit
def _add_to_dq(
    dq, ds, q, do, keys, values, k_full, k_empty, v_full, v_empty, lse_log2, delta, begin, first_tile, end_tile,
    first_col, last_col, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles [first_tile, end_tile) of the keys from column begin on; ds is that of the tile before, to be used."""
    for tile in range(first_tile, end_tile):
        before = (tile - 1) % STAGES
        s, dp = _start_scores(q, do, keys, values, k_full, v_full, tile, BLOCK_N, STAGES)
        dq = warpgroup_mma(ds, keys.index(before), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        p = gl.exp2(s * scale - lse_log2[:, None])
        dp = warpgroup_mma_wait(1, deps=[dp])
        mbarrier.arrive(v_empty.index(tile % STAGES), count=1)
        ds_next = p * (dp - delta[:, None])
        if MASKED:
            ds_next = gl.where(_seen_keys(begin + tile * BLOCK_N, first_col, last_col, BLOCK_N), ds_next, 0.0)
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(k_empty.index(before), count=1)
        ds = gl.convert_layout(ds_next.to(keys.dtype), ds.type.layout)
    return dq, ds


@gluon.jit
def _make_dq(
    q, do, keys, values, q_full, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse_base,
    dq_ptr,
    first_row, rows_total, cols_total, begin, full_begin, full_end, end, window_left, window_right,
    softmax_scale, scale, nheads, PART: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ and delta of ROWS queries; out_ptr, dq_ptr and lse_base are those of the program's first row."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dq_layout, 2)
    dtype: gl.constexpr = keys.dtype
    if first_row < rows_total:
        mbarrier.wait(q_full, 0)
        out_layout: gl.constexpr = row_layout(BLOCK_DV)
        out_rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
        dims_v = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, out_layout))
        exists = first_row + out_rows < rows_total
        out_ptrs = out_ptr + (out_rows.to(gl.int64) * (nheads * BLOCK_DV))[:, None] + dims_v[None, :]
        out = gl.load(out_ptrs, mask=exists[:, None], other=0.0).to(gl.float32)
        row_delta = gl.sum(out * do.index(PART).load(out_layout).to(gl.float32), 1)
        if HAS_DLSE:
            row_delta -= gl.load(dlse_ptr + lse_base + out_rows, mask=exists, other=0.0)
        gl.store(delta_ptr + lse_base + out_rows, row_delta, mask=exists)
        delta = gl.convert_layout(row_delta, gl.SliceLayout(1, layout))
        rows_in_tile = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        rows = first_row + rows_in_tile
        lse = gl.load(lse_ptr + lse_base + rows_in_tile, mask=rows < rows_total, other=float("inf"))
        lse_log2 = lse * LOG2E
        first_col, last_col = visible_keys(
            rows, cols_total - rows_total, cols_total, window_left, window_right, MASK_LEFT, MASK_RIGHT
        )
        dq = gl.zeros([ROWS, BLOCK_D], gl.float32, dq_layout)
        if begin < end:
            s, dp = _start_scores(q.index(PART), do.index(PART), keys, values, k_full, v_full, 0, BLOCK_N, STAGES)
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * scale - lse_log2[:, None])
            dp = warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(v_empty.index(0), count=1)
            seen = _seen_keys(begin, first_col, last_col, BLOCK_N)
            first_ds = gl.where(seen, p * (dp - delta[:, None]), 0.0)
            ds = gl.convert_layout(first_ds.to(dtype), ds_layout)
            tiles = gl.cdiv(end - begin, BLOCK_N)
            first_full = gl.minimum(gl.maximum((full_begin - begin) // BLOCK_N, 1), tiles)
            end_full = gl.maximum((full_end - begin) // BLOCK_N, first_full)
            if MASK_LEFT:
                dq, ds = _add_to_dq(
                    dq, ds, q.index(PART), do.index(PART), keys, values, k_full, k_empty, v_full, v_empty, lse_log2,
                    delta, begin, 1, first_full, first_col, last_col, scale, True, BLOCK_N, STAGES,
                )  # fmt: skip
            dq, ds = _add_to_dq(
                dq, ds, q.index(PART), do.index(PART), keys, values, k_full, k_empty, v_full, v_empty, lse_log2,
                delta, begin, first_full, end_full, first_col, last_col, scale, False, BLOCK_N, STAGES,
            )  # fmt: skip
            dq, ds = _add_to_dq(
                dq, ds, q.index(PART), do.index(PART), keys, values, k_full, k_empty, v_full, v_empty, lse_log2,
                delta, begin, end_full, tiles, first_col, last_col, scale, True, BLOCK_N, STAGES,
            )  # fmt: skip
            last = (tiles - 1) % STAGES
            rows_left = cols_total - (begin + (tiles - 1) * BLOCK_N)
            if rows_left < BLOCK_N:
                clear_from(keys.index(last), rows_left, BLOCK_N)
            dq = warpgroup_mma(ds, keys.index(last), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq])
        # A row without keys has no gradient, also where 0 met a NaN key that other rows see.
        dead = gl.convert_layout(lse == float("-inf"), gl.SliceLayout(1, dq_layout))
        dq = gl.where(dead[:, None], 0.0, dq * softmax_scale).to(dtype)
        dq_rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, dq_layout))
        dims = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, dq_layout))
        dq_ptrs = dq_ptr + (dq_rows.to(gl.int64) * (nheads * BLOCK_D))[:, None] + dims[None, :]
        gl.store(dq_ptrs, dq, mask=(first_row + dq_rows < rows_total)[:, None])


@kernel(gluon.jit)
def attn_bwd_dq_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_lb: gl.int64, stride_lh: gl.int64,
    stride_qb: gl.int64, stride_qm: gl.int32, stride_qh: gl.int64,
    stride_kb: gl.int64, stride_kn: gl.int32, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vn: gl.int32, stride_vh: gl.int64,
    stride_dob: gl.int64, stride_dom: gl.int32, stride_doh: gl.int64,
    stride_alibi_batch: gl.int32,
    batch_heads: gl.int32, nheads: gl.int32, group_size: gl.int32,
    seqlen_q: gl.int32, seqlen_k: gl.int32, num_blocks: gl.int32,
    softmax_scale: gl.float32, scale: gl.float32, softcap_log2: gl.float32,
    window_left: gl.int32, window_right: gl.int32, dropout_threshold: gl.int32, dropout_rescale: gl.float32,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr,
    VARLEN: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, HAS_DLSE: gl.constexpr,
):  # fmt: skip
    """dQ of 2 * ROWS queries of one head; also writes delta for the dK/dV kernel."""
    dtype: gl.constexpr = k_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_D], tile_layout)
    do = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_DV], tile_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], tile_layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], tile_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    init_ring(k_full, k_empty, STAGES)
    init_ring(v_full, v_empty, STAGES)
    fence_async_shared()
    barrier()

    block = gl.program_id(0) % num_blocks
    batch = gl.program_id(0) // num_blocks // nheads
    head = gl.program_id(0) // num_blocks % nheads
    if MASK_RIGHT:
        block = num_blocks - 1 - block
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    first_row = block * (2 * ROWS)
    last_row = gl.minimum(first_row + 2 * ROWS, rows_total) - 1
    begin, full_begin, full_end, end = key_ranges(
        first_row, last_row, cols_total - rows_total, cols_total, window_left, window_right,
        BLOCK_N, MASK_LEFT, MASK_RIGHT,
    )  # fmt: skip
    head_k = head // group_size
    row64 = (start_q + first_row).to(gl.int64)
    lse_base = batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh + row64
    if not VARLEN:
        row64 += batch.to(gl.int64) * seqlen_q
    out_row = row64 * nheads + head

    gl.warp_specialize(
        [
            (_make_dq, (
                q, do, keys, values, q_full, k_full, k_empty, v_full, v_empty, out_ptr + out_row * BLOCK_DV,
                lse_ptr, dlse_ptr, delta_ptr, lse_base, dq_ptr + out_row * BLOCK_D,
                first_row, rows_total, cols_total, begin, full_begin, full_end, end, window_left, window_right,
                softmax_scale, scale, nheads, 0, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK_LEFT, MASK_RIGHT, HAS_DLSE,
            )),
            (_make_dq, (
                q, do, keys, values, q_full, k_full, k_empty, v_full, v_empty, out_ptr + out_row * BLOCK_DV,
                lse_ptr, dlse_ptr, delta_ptr, lse_base, dq_ptr + out_row * BLOCK_D,
                first_row, rows_total, cols_total, begin, full_begin, full_end, end, window_left, window_right,
                softmax_scale, scale, nheads, 1, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, MASK_LEFT, MASK_RIGHT, HAS_DLSE,
            )),
            (_load_for_dq, (
                q, do, keys, values, q_full, k_full, k_empty, v_full, v_empty, q_desc, k_desc, v_desc, do_desc,
                batch * (stride_qb // stride_qm).to(gl.int32) + start_q + first_row,
                head * stride_qh.to(gl.int32) * VEC,
                batch * (stride_dob // stride_dom).to(gl.int32) + start_q + first_row,
                head * stride_doh.to(gl.int32) * VEC,
                batch * (stride_kb // stride_kn).to(gl.int32) + start_k, head_k * stride_kh.to(gl.int32) * VEC,
                batch * (stride_vb // stride_vn).to(gl.int32) + start_k, head_k * stride_vh.to(gl.int32) * VEC,
                first_row < rows_total, begin, end, BLOCK_N, STAGES,
            )),
        ],
        # Warps of the workers and registers of a thread.
        [4, 1],
        [240, 24],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# dK and dV


@gluon.jit
def _load_for_dkdv(
    k, v, queries, grads, k_full, q_full, q_empty, do_full, do_empty, q_desc, k_desc, v_desc, do_desc,
    k_row, k_col, v_row, v_col, q_row, do_row, stride_qh, stride_doh, first_head, group_size, exist, begin, end,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Copy k and v of this program, then queries of each head of the group and their gradients into rings."""
    if exist:
        mbarrier.expect(k_full, 2 * ROWS * (k.shape[2] + v.shape[2]) * 2)
        for part in gl.static_range(2):
            load(k_desc, [k_row + part * ROWS, k_col], k_full, k.index(part))
            load(v_desc, [v_row + part * ROWS, v_col], k_full, v.index(part))
        tile = 0
        for member in range(0, group_size):
            q_col = (first_head + member) * stride_qh * VEC
            do_col = (first_head + member) * stride_doh * VEC
            for start in range(begin, end, BLOCK_M):
                fill(q_desc, q_row + start, q_col, tile, queries, q_full, q_empty, STAGES)
                fill(do_desc, do_row + start, do_col, tile, grads, do_full, do_empty, STAGES)
                tile += 1


@gluon.jit
def _add_to_dkdv(
    dk, dv, k, v, queries, grads, q_full, q_empty, do_full, do_empty, lse_ptr, delta_ptr, begin, first_tile, end_tile,
    first_row, last_row, rows_total, scale, MASKED: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr,
):  # fmt: skip
    """Tiles [first_tile, end_tile) of the queries from row begin on, which key j's [first_row[j], last_row[j]] see."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(0, layout)
    thread_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = queries.dtype
    for tile in range(first_tile, end_tile):
        stage = tile % STAGES
        phase = (tile // STAGES) & 1
        start = begin + tile * BLOCK_M
        # One number a thread until they are needed: in the layout of the scores they would take half as many
        # registers as these.
        row = start + gl.arange(0, BLOCK_M, layout=thread_layout)
        if MASKED:
            lse = gl.load(lse_ptr + row, mask=row < rows_total, other=float("inf"))
            delta = gl.load(delta_ptr + row, mask=row < rows_total, other=0.0)
        else:
            lse = gl.load(lse_ptr + row)
            delta = gl.load(delta_ptr + row)
        zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout)
        mbarrier.wait(q_full.index(stage), phase)
        if MASKED:
            # What lies behind a sequence can be NaN.
            rows_left = rows_total - start
            if rows_left < BLOCK_M:
                mbarrier.wait(do_full.index(stage), phase)
                clear_from(queries.index(stage), rows_left, BLOCK_M)
                clear_from(grads.index(stage), rows_left, BLOCK_M)
        s = warpgroup_mma(k, queries.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        dp = warpgroup_mma(v, grads.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale - gl.convert_layout(lse * LOG2E, row_layout)[None, :])
        if MASKED and (MASK_LEFT or MASK_RIGHT):
            rows = start + gl.arange(0, BLOCK_M, layout=row_layout)
            seen = rows[None, :] == rows[None, :]
            if MASK_RIGHT:
                seen = seen & (rows[None, :] >= first_row[:, None])
            if MASK_LEFT:
                seen = seen & (rows[None, :] <= last_row[:, None])
            p = gl.where(seen, p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), grads.index(stage), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = p * (dp - gl.convert_layout(delta, row_layout)[None, :])
        if MASKED and (MASK_LEFT or MASK_RIGHT):
            # 0 * NaN of a masked pair must not become a gradient.
            ds = gl.where(seen, ds, 0.0)
        dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), ds_layout), queries.index(stage), dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        mbarrier.arrive(do_empty.index(stage), count=1)
        dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _store_keys(ptr, x, first_col, cols_total, nheads_k, PART: gl.constexpr):
    """Store gradients of ROWS keys [ROWS, dims]; ptr is that of the program's first."""
    layout: gl.constexpr = x.type.layout
    cols = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    ptrs = ptr + (cols.to(gl.int64) * (nheads_k * x.shape[1]))[:, None] + dims[None, :]
    gl.store(ptrs, x.to(ptr.dtype.element_ty), mask=(first_col + cols < cols_total)[:, None])


@gluon.jit
def _make_dkdv(
    k, v, queries, grads, k_full, q_full, q_empty, do_full, do_empty, lse_ptr, delta_ptr, dk_ptr, dv_ptr, stride_lh,
    first_col, rows_total, cols_total, begin, full_begin, full_end, end, window_left, window_right,
    softmax_scale, scale, nheads_k, group_size, PART: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr,
):  # fmt: skip
    """dK and dV of ROWS keys; pointers are those of the program's first key, and of the sequence's first row."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    if first_col < cols_total:
        shift = cols_total - rows_total
        cols = first_col + PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        first_row = cols - shift - window_right
        last_row = cols - shift + window_left
        dk = gl.zeros([ROWS, BLOCK_D], gl.float32, dk_layout)
        dv = gl.zeros([ROWS, BLOCK_DV], gl.float32, dv_layout)
        tiles = gl.cdiv(gl.maximum(end - begin, 0), BLOCK_M)
        first_full = gl.minimum((full_begin - begin) // BLOCK_M, tiles)
        end_full = gl.maximum((full_end - begin) // BLOCK_M, first_full)
        mbarrier.wait(k_full, 0)
        for member in range(0, group_size):
            done = member * tiles
            lse = lse_ptr + gl.cast(member, gl.int64) * stride_lh
            delta = delta_ptr + gl.cast(member, gl.int64) * stride_lh
            if MASK_RIGHT:
                dk, dv = _add_to_dkdv(
                    dk, dv, k.index(PART), v.index(PART), queries, grads, q_full, q_empty, do_full, do_empty, lse,
                    delta, begin - done * BLOCK_M, done, done + first_full,
                    first_row, last_row, rows_total, scale, True, BLOCK_M, STAGES, MASK_LEFT, MASK_RIGHT,
                )  # fmt: skip
            dk, dv = _add_to_dkdv(
                dk, dv, k.index(PART), v.index(PART), queries, grads, q_full, q_empty, do_full, do_empty, lse, delta,
                begin - done * BLOCK_M, done + first_full, done + end_full,
                first_row, last_row, rows_total, scale, False, BLOCK_M, STAGES, MASK_LEFT, MASK_RIGHT,
            )  # fmt: skip
            dk, dv = _add_to_dkdv(
                dk, dv, k.index(PART), v.index(PART), queries, grads, q_full, q_empty, do_full, do_empty, lse, delta,
                begin - done * BLOCK_M, done + end_full, done + tiles,
                first_row, last_row, rows_total, scale, True, BLOCK_M, STAGES, MASK_LEFT, MASK_RIGHT,
            )  # fmt: skip
        _store_keys(dk_ptr, dk * softmax_scale, first_col, cols_total, nheads_k, PART)
        _store_keys(dv_ptr, dv, first_col, cols_total, nheads_k, PART)


@kernel(gluon.jit)
def attn_bwd_dkdv_hopper_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    stride_lb: gl.int64, stride_lh: gl.int64,
    stride_qb: gl.int64, stride_qm: gl.int32, stride_qh: gl.int64,
    stride_kb: gl.int64, stride_kn: gl.int32, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vn: gl.int32, stride_vh: gl.int64,
    stride_dob: gl.int64, stride_dom: gl.int32, stride_doh: gl.int64,
    stride_alibi_batch: gl.int32,
    batch_heads_k: gl.int32, nheads_k: gl.int32, group_size: gl.int32,
    seqlen_q: gl.int32, seqlen_k: gl.int32, num_blocks: gl.int32,
    softmax_scale: gl.float32, scale: gl.float32, softcap_log2: gl.float32,
    window_left: gl.int32, window_right: gl.int32, dropout_threshold: gl.int32, dropout_rescale: gl.float32,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr,
    VARLEN: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr,
):  # fmt: skip
    """dK and dV of 2 * ROWS keys of one key/value head, summed over the query heads of its group."""
    dtype: gl.constexpr = k_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_D], tile_layout)
    v = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_DV], tile_layout)
    queries = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_D], tile_layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_DV], tile_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    init_ring(q_full, q_empty, STAGES)
    init_ring(do_full, do_empty, STAGES)
    fence_async_shared()
    barrier()

    block = gl.program_id(0) % num_blocks
    batch = gl.program_id(0) // num_blocks // nheads_k
    head_k = gl.program_id(0) // num_blocks % nheads_k
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    first_col = block * (2 * ROWS)
    begin, full_begin, full_end, end = query_ranges(
        first_col, cols_total - rows_total, rows_total, cols_total, window_left, window_right,
        BLOCK_M, 2 * ROWS, MASK_LEFT, MASK_RIGHT,
    )  # fmt: skip
    first_head = head_k * group_size
    lse_base = batch.to(gl.int64) * stride_lb + first_head.to(gl.int64) * stride_lh + start_q
    out_row = (start_k + first_col).to(gl.int64)
    if not VARLEN:
        out_row += batch.to(gl.int64) * seqlen_k
    out_row = out_row * nheads_k + head_k

    gl.warp_specialize(
        [
            (_make_dkdv, (
                k, v, queries, grads, k_full, q_full, q_empty, do_full, do_empty, lse_ptr + lse_base,
                delta_ptr + lse_base, dk_ptr + out_row * BLOCK_D, dv_ptr + out_row * BLOCK_DV, stride_lh,
                first_col, rows_total, cols_total, begin, full_begin, full_end, end, window_left, window_right,
                softmax_scale, scale, nheads_k, group_size,
                0, BLOCK_D, BLOCK_DV, BLOCK_M, STAGES, MASK_LEFT, MASK_RIGHT,
            )),
            (_make_dkdv, (
                k, v, queries, grads, k_full, q_full, q_empty, do_full, do_empty, lse_ptr + lse_base,
                delta_ptr + lse_base, dk_ptr + out_row * BLOCK_D, dv_ptr + out_row * BLOCK_DV, stride_lh,
                first_col, rows_total, cols_total, begin, full_begin, full_end, end, window_left, window_right,
                softmax_scale, scale, nheads_k, group_size,
                1, BLOCK_D, BLOCK_DV, BLOCK_M, STAGES, MASK_LEFT, MASK_RIGHT,
            )),
            (_load_for_dkdv, (
                k, v, queries, grads, k_full, q_full, q_empty, do_full, do_empty, q_desc, k_desc, v_desc, do_desc,
                batch * (stride_kb // stride_kn).to(gl.int32) + start_k + first_col,
                head_k * stride_kh.to(gl.int32) * VEC,
                batch * (stride_vb // stride_vn).to(gl.int32) + start_k + first_col,
                head_k * stride_vh.to(gl.int32) * VEC,
                batch * (stride_qb // stride_qm).to(gl.int32) + start_q,
                batch * (stride_dob // stride_dom).to(gl.int32) + start_q,
                stride_qh.to(gl.int32), stride_doh.to(gl.int32), first_head, group_size,
                first_col < cols_total, begin, end, BLOCK_M, STAGES, VEC,
            )),
        ],
        # Warps of the workers and registers of a thread.
        [4, 1],
        [240, 24],
    )  # fmt: skip
