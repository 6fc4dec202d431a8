"""Forward kernel for Hopper, in Gluon: one warpgroup copies keys and values, two multiply.

Each of the two has 64 rows of queries.  The products of a tile of keys and of the tile before with its values
are under way together, and the softmax of the one runs beside the other (Shah et al. 2024, FlashAttention-3,
arXiv:2407.08608, section 3.2).  The arguments are those of ``forward_kernel.attn_fwd_kernel``.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import LN2, key_ranges, sequence_bounds, tile_of_program, visible_keys
from .hopper import barrier, copy_rows

#: Rows of one multiplying warpgroup, of which there are two.
ROWS = gl.constexpr(64)


@gluon.jit
def _load_keys(
    keys, values, k_full, k_empty, v_full, v_empty, k_ptr, v_ptr, begin, end, cols_total, stride_kn, stride_vn,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Fill the rings of keys and values with the tiles of [begin, end).

    What threads have copied is announced one copy later, after the fence that lets the matrix units see it: the
    multiplying warpgroups would wait at that fence for their own products.
    """
    tiles = gl.cdiv(end - begin, BLOCK_N)
    for tile in range(0, tiles):
        start = begin + tile * BLOCK_N
        stage = tile % STAGES
        phase = ((tile // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), phase)
        first = start.to(gl.int64) * stride_kn * VEC
        copy_rows(keys.index(stage), k_ptr + first, stride_kn * VEC, cols_total - start, BLOCK_N, BLOCK_D)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        mbarrier.arrive(v_full.index((tile + STAGES - 1) % STAGES), count=1, pred=tile > 0)
        mbarrier.wait(v_empty.index(stage), phase)
        first = start.to(gl.int64) * stride_vn * VEC
        copy_rows(values.index(stage), v_ptr + first, stride_vn * VEC, cols_total - start, BLOCK_N, BLOCK_DV)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        mbarrier.arrive(k_full.index(stage), count=1)
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.arrive(v_full.index((tiles + STAGES - 1) % STAGES), count=1, pred=tiles > 0)


@gluon.jit
def _scores_of(q, keys, k_full, tile, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Start q k^T of a tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = tile % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, keys.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, row_max, row_sum, start, first_col, last_col, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr):
    """P of a tile, the new maximum and sum of each row, and what the accumulator is multiplied with."""
    if MASKED:
        cols = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
        seen = (cols[None, :] >= first_col[:, None]) & (cols[None, :] <= last_col[:, None])
        s = gl.where(seen, s, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(s, 1) * scale)
    # A row that has seen nothing yet keeps -inf; subtracting it would give NaN.
    subtract = gl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
    p = gl.exp2(s * scale - subtract[:, None])
    factor = gl.exp2(row_max - subtract)
    return p, new_max, row_sum * factor + gl.sum(p, 1), factor


@gluon.jit
def _attend_tiles(
    acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, begin, first_tile, end_tile,
    first_col, last_col, scale, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles [first_tile, end_tile) of those from column begin on; p is that of the tile before, still to be used."""
    for tile in range(first_tile, end_tile):
        stage = (tile - 1) % STAGES
        s = _scores_of(q, keys, k_full, tile, BLOCK_N, STAGES)
        mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(tile % STAGES), count=1)
        p_next, row_max, row_sum, factor = _softmax(
            s, row_max, row_sum, begin + tile * BLOCK_N, first_col, last_col, scale, MASKED, BLOCK_N
        )
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = gl.convert_layout(p_next.to(keys.dtype), p.type.layout)
    return acc, p, row_max, row_sum


@gluon.jit
def _attend(
    q, keys, values, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr, begin, full_begin, full_end, end,
    first_row, rows_total, cols_total, window_left, window_right, scale, stride_om,
    BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS rows; out_ptr and lse_ptr are those of the first."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    out_row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    dtype: gl.constexpr = keys.dtype
    rows = first_row + gl.arange(0, ROWS, layout=row_layout)
    first_col, last_col = visible_keys(
        rows, cols_total - rows_total, cols_total, window_left, window_right, MASK_LEFT, MASK_RIGHT
    )
    row_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    row_sum = gl.zeros([ROWS], gl.float32, row_layout)
    acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, out_layout)
    if begin < end:
        s = _scores_of(q, keys, k_full, 0, BLOCK_N, STAGES)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(0), count=1)
        p, row_max, row_sum, _ = _softmax(s, row_max, row_sum, begin, first_col, last_col, scale, True, BLOCK_N)
        p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, out_layout, 2))
        tiles = gl.cdiv(end - begin, BLOCK_N)
        first_full = gl.minimum(gl.maximum((full_begin - begin) // BLOCK_N, 1), tiles)
        end_full = gl.maximum((full_end - begin) // BLOCK_N, first_full)
        if MASK_LEFT:
            acc, p, row_max, row_sum = _attend_tiles(
                acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, begin, 1, first_full,
                first_col, last_col, scale, True, BLOCK_N, STAGES,
            )  # fmt: skip
        acc, p, row_max, row_sum = _attend_tiles(
            acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, begin, first_full, end_full,
            first_col, last_col, scale, False, BLOCK_N, STAGES,
        )  # fmt: skip
        acc, p, row_max, row_sum = _attend_tiles(
            acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, begin, end_full, tiles,
            first_col, last_col, scale, True, BLOCK_N, STAGES,
        )  # fmt: skip
        stage = (tiles - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((tiles - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    # As in the Triton kernel: a row without a key, and one that sees nothing but NaN.
    dead = (row_max == float("-inf")) & (row_sum == 0.0)
    inverse = gl.where(dead, 0.0, 1.0 / gl.where(dead, 1.0, row_sum))
    lse = gl.where(dead, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
    gl.store(lse_ptr + gl.arange(0, ROWS, layout=row_layout), lse, mask=rows < rows_total)
    dead = gl.convert_layout(dead, out_row_layout)[:, None]
    out = gl.where(dead, 0.0, acc * gl.convert_layout(inverse, out_row_layout)[:, None])
    out_rows = gl.arange(0, ROWS, layout=out_row_layout)
    dims = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, out_layout))
    ptrs = out_ptr + (out_rows.to(gl.int64) * stride_om)[:, None] + dims[None, :]
    gl.store(ptrs, out.to(dtype), mask=(first_row + out_rows < rows_total)[:, None])


@gluon.jit(
    do_not_specialize=[
        "stride_qb", "stride_qm", "stride_qh", "stride_kb", "stride_kn", "stride_kh", "stride_vb", "stride_vn",
        "stride_vh", "stride_lb", "stride_lh", "stride_alibi_batch", "batch_heads", "nheads", "group_size",
        "seqlen_q", "seqlen_k", "num_blocks", "scale", "softcap_log2", "window_left", "window_right",
        "dropout_threshold", "dropout_rescale",
    ]
)  # fmt: skip
def attn_fwd_hopper_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, sinks_ptr,
    stride_lb: gl.int64, stride_lh: gl.int64,
    stride_qb: gl.int64, stride_qm: gl.int32, stride_qh: gl.int64,
    stride_kb: gl.int64, stride_kn: gl.int32, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vn: gl.int32, stride_vh: gl.int64,
    stride_alibi_batch: gl.int32,
    batch_heads: gl.int32, nheads: gl.int32, group_size: gl.int32,
    seqlen_q: gl.int32, seqlen_k: gl.int32, num_blocks: gl.int32,
    scale: gl.float32, softcap_log2: gl.float32, window_left: gl.int32, window_right: gl.int32,
    dropout_threshold: gl.int32, dropout_rescale: gl.float32,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr,
    NUM_XCDS: gl.constexpr, VARLEN: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr,
):  # fmt: skip
    """One block of 2 * ROWS queries of one head."""
    block, batch_head = tile_of_program(num_blocks, batch_heads, NUM_XCDS)
    if MASK_RIGHT:
        # Later rows see more keys: starting with them evens out the end of the launch.
        block = num_blocks - 1 - block
    batch = batch_head // nheads
    head = batch_head % nheads
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    first_row = block * (2 * ROWS)
    if first_row >= rows_total:
        return
    last_row = gl.minimum(first_row + 2 * ROWS, rows_total) - 1
    begin, full_begin, full_end, end = key_ranges(
        first_row, last_row, cols_total - rows_total, cols_total, window_left, window_right,
        BLOCK_N, MASK_LEFT, MASK_RIGHT,
    )  # fmt: skip

    batch64 = batch.to(gl.int64)
    head64 = head.to(gl.int64)
    head_k = (head // group_size).to(gl.int64)
    row64 = (start_q + first_row).to(gl.int64)
    q_ptr += (batch64 * stride_qb + head64 * stride_qh + row64 * stride_qm) * VEC
    k_ptr += (batch64 * stride_kb + head_k * stride_kh + start_k.to(gl.int64) * stride_kn) * VEC
    v_ptr += (batch64 * stride_vb + head_k * stride_vh + start_k.to(gl.int64) * stride_vn) * VEC
    lse_ptr += batch64 * stride_lb + head64 * stride_lh + row64
    if not VARLEN:
        row64 += batch64 * seqlen_q
    out_ptr += (row64 * nheads + head) * BLOCK_DV
    stride_om = nheads * BLOCK_DV

    dtype: gl.constexpr = k_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_D], tile_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], tile_layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], tile_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    for part in gl.static_range(2):
        rows_left = rows_total - first_row - part * ROWS
        ptr = q_ptr + (stride_qm.to(gl.int64) * (part * ROWS)) * VEC
        copy_rows(q.index(part), ptr, stride_qm * VEC, rows_left, ROWS, BLOCK_D)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()

    gl.warp_specialize(
        [
            (_attend, (
                q.index(0), keys, values, k_full, k_empty, v_full, v_empty, out_ptr, lse_ptr,
                begin, full_begin, full_end, end, first_row, rows_total, cols_total, window_left, window_right,
                scale, stride_om, BLOCK_DV, BLOCK_N, STAGES, MASK_LEFT, MASK_RIGHT,
            )),
            (_attend, (
                q.index(1), keys, values, k_full, k_empty, v_full, v_empty, out_ptr + ROWS * stride_om, lse_ptr + ROWS,
                begin, full_begin, full_end, end, first_row + ROWS, rows_total, cols_total, window_left, window_right,
                scale, stride_om, BLOCK_DV, BLOCK_N, STAGES, MASK_LEFT, MASK_RIGHT,
            )),
            (_load_keys, (
                keys, values, k_full, k_empty, v_full, v_empty, k_ptr, v_ptr, begin, end, cols_total,
                stride_kn, stride_vn, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, VEC,
            )),
        ],
        # Warps of the workers and registers of a thread.
        [4, 4],
        [216, 72],
    )  # fmt: skip
