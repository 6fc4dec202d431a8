"""Absorbed MLA over a K/V cache on Hopper, in Gluon: keys whose larger part is the values.

Four warpgroups share ROWS rows (query heads of one position, mostly) of one key head:

* ``_load_keys`` copies tiles of TILE_N keys into a ring of TILES buffers, row by row, so that pages may
  have any size;
* ``_scores`` multiplies q with two of them, and hands P and what the accumulators are multiplied with to
* two ``_values``, each of which accumulates half of the value dims: 64 x 512 floats are too many for one.

They wait for each other at barriers only, so that the matrix units work on some keys' values during the
softmax of the next.  The arguments are those of ``cache_kernels.attn_cache_kernel``.
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

from .cache_kernels import entry_of, keys_of, part_of_program, queries_of, split_columns, visible_positions
from .common import LN2
from .hopper import barrier, copy_at, row_layout

#: Rows of a program: what one warpgroup multiplies.
ROWS = gl.constexpr(64)
#: Value dims of one of the two accumulators.
HALF_DV = gl.constexpr(256)
#: Dims of the keys that are no values.
ROPE_DIMS = gl.constexpr(64)
#: Threads of the warpgroup that loads keys, each of which arrives when its copies have.
THREADS = gl.constexpr(128)


@gluon.jit
def _copy_rows(
    buffer, ptr, table_ptr, start, first_position, cols_total, stride_page, stride_row,
    DIMS: gl.constexpr, PAGE_SIZE: gl.constexpr, TILE_N: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Start the copy of DIMS dims of keys [start, start + TILE_N); those behind the last one become 0."""
    cols = start + gl.arange(0, TILE_N, layout=gl.SliceLayout(1, row_layout(DIMS)))
    exists = cols < cols_total
    if PAGE_SIZE > 0:
        position = first_position + cols
        page = gl.load(table_ptr + position // PAGE_SIZE, mask=exists, other=0).to(gl.int64)
        rows = (page * stride_page + (position % PAGE_SIZE).to(gl.int64) * stride_row) * VEC
    else:
        rows = cols.to(gl.int64) * stride_row * VEC
    copy_at(buffer, ptr + rows, exists, DIMS)


@gluon.jit
def _load_keys(
    left, right, rope, full, empty, k_ptr, v_ptr, table_ptr, begin, end, first_position, cols_total,
    stride_kb, stride_kn, stride_vb, stride_vn,
    PAGE_SIZE: gl.constexpr, TILE_N: gl.constexpr, TILES: gl.constexpr, VEC: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the tiles of [begin, end), always two of a pair."""
    for tile in range(0, 2 * gl.cdiv(end - begin, 2 * TILE_N)):
        start = begin + tile * TILE_N
        stage = tile % TILES
        mbarrier.wait(empty.index(stage), ((tile // TILES) & 1) ^ 1)
        _copy_rows(
            rope.index(stage), k_ptr, table_ptr, start, first_position, cols_total, stride_kb, stride_kn,
            ROPE_DIMS, PAGE_SIZE, TILE_N, VEC,
        )  # fmt: skip
        _copy_rows(
            left.index(stage), v_ptr, table_ptr, start, first_position, cols_total, stride_vb, stride_vn,
            HALF_DV, PAGE_SIZE, TILE_N, VEC,
        )  # fmt: skip
        _copy_rows(
            right.index(stage), v_ptr + HALF_DV, table_ptr, start, first_position, cols_total, stride_vb, stride_vn,
            HALF_DV, PAGE_SIZE, TILE_N, VEC,
        )  # fmt: skip
        # Arrives when the copies of each thread have.
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _values(
    values, p_buffers, factors, full, empty, p_full, p_empty, out_ptrs_base, begin, end, out_row, stride_om, stride_oh,
    packed_start, group_size, rows_left, FIRST_DIM: gl.constexpr, TILE_N: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Accumulate P V of the tiles over HALF_DV value dims, and store them."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    acc = gl.zeros([ROWS, HALF_DV], gl.float32, layout)
    pair = 0
    for _ in range(begin, end, 2 * TILE_N):
        first = (2 * pair) % TILES
        second = (2 * pair + 1) % TILES
        mbarrier.wait(p_full, pair & 1)
        factor = factors.load(row_layout)
        if gl.min(factor, 0) < 1.0:
            acc = acc * factor[:, None]
        mbarrier.wait(full.index(first), (2 * pair // TILES) & 1)
        mbarrier.wait(full.index(second), (2 * pair // TILES) & 1)
        fence_async_shared()  # keys were written by threads
        acc = warpgroup_mma(p_buffers.index(0), values.index(first), acc, is_async=True)
        acc = warpgroup_mma(p_buffers.index(1), values.index(second), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(first), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(second), count=1)
        mbarrier.arrive(p_empty, count=1)
        pair += 1
    mbarrier.wait(p_full, pair & 1)
    # 0 for a row that sees no key; its accumulator may hold 0 * NaN of keys that other rows see.
    inverse = factors.load(row_layout)[:, None]
    acc = gl.where(inverse == 0.0, 0.0, acc * inverse)
    rows_in_tile = gl.arange(0, ROWS, layout=row_layout)
    packed = packed_start + rows_in_tile
    rows = (out_row + packed // group_size).to(gl.int64)
    heads = packed % group_size
    dims = FIRST_DIM + gl.arange(0, HALF_DV, layout=gl.SliceLayout(0, layout))
    ptrs = out_ptrs_base + (rows * stride_om + heads * stride_oh)[:, None] + dims[None, :]
    gl.store(ptrs, acc.to(out_ptrs_base.dtype.element_ty), mask=(rows_in_tile < rows_left)[:, None])


@gluon.jit
def _scores_of(q_left, q_right, q_rope, left, right, rope, full, tile, TILE_N: gl.constexpr, TILES: gl.constexpr):
    """Start q k^T of a tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    stage = tile % TILES
    mbarrier.wait(full.index(stage), (tile // TILES) & 1)
    fence_async_shared()  # keys were written by threads
    s = gl.zeros([ROWS, TILE_N], gl.float32, layout)
    s = warpgroup_mma(q_rope, rope.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma(q_left, left.index(stage).permute((1, 0)), s, is_async=True)
    return warpgroup_mma(q_right, right.index(stage).permute((1, 0)), s, is_async=True)


@gluon.jit
def _masked(s, start, cols_in_tile, first_col, end_col):
    """Scores s [ROWS, TILE_N] with -inf where a row does not see the key."""
    cols = start + cols_in_tile
    seen = (cols[None, :] >= first_col[:, None]) & (cols[None, :] < end_col[:, None])
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _scores(
    q_left, q_right, q_rope, left, right, rope, p_buffers, factors, full, p_full, p_empty, lse_ptr,
    begin, full_begin, full_end, end, packed_start, group_size, rows_left, shift, cols_total,
    window_left, window_right, chunk, scale, stride_lm, stride_lh, first_lse_row,
    TILE_N: gl.constexpr, TILES: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """P of every tile, the factors of the accumulators and softmax_lse."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    rows_in_tile = gl.arange(0, ROWS, layout=row_layout)
    packed = packed_start + rows_in_tile
    rows = packed // group_size
    first_col, end_col = visible_positions(
        rows, shift, cols_total, window_left, window_right, chunk, MASK_LEFT, MASK_RIGHT, CHUNK
    )
    cols_in_tile = gl.arange(0, TILE_N, layout=gl.SliceLayout(0, layout))
    row_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    row_sums = gl.zeros([ROWS, TILE_N], gl.float32, layout)
    pair = 0
    for start in range(begin, end, 2 * TILE_N):
        s = _scores_of(q_left, q_right, q_rope, left, right, rope, full, 2 * pair, TILE_N, TILES)
        t = _scores_of(q_left, q_right, q_rope, left, right, rope, full, 2 * pair + 1, TILE_N, TILES)
        s = warpgroup_mma_wait(3, deps=[s])
        if start < full_begin or start + TILE_N > full_end:
            s = _masked(s, start, cols_in_tile, first_col, end_col)
        t = warpgroup_mma_wait(0, deps=[t])
        if start + TILE_N < full_begin or start + 2 * TILE_N > full_end:
            t = _masked(t, start + TILE_N, cols_in_tile, first_col, end_col)
        new_max = gl.maximum(row_max, gl.max(gl.maximum(s, t), 1) * scale)
        subtract = gl.where(new_max == float("-inf"), 0.0, new_max)
        s = gl.exp2(s * scale - subtract[:, None])
        t = gl.exp2(t * scale - subtract[:, None])
        factor = gl.exp2(row_max - subtract)
        mbarrier.wait(p_empty, (pair & 1) ^ 1)
        p_buffers.index(0).store(s.to(p_buffers.dtype))
        p_buffers.index(1).store(t.to(p_buffers.dtype))
        factors.store(factor)
        fence_async_shared()
        mbarrier.arrive(p_full, count=1)
        row_sums = row_sums * factor[:, None] + (s + t)
        row_max = new_max
        pair += 1
    row_sum = gl.sum(row_sums, 1)
    # As in the forward kernel: a row without a key, and one that sees nothing but NaN.
    dead = (row_max == float("-inf")) & (row_sum == 0.0)
    mbarrier.wait(p_empty, (pair & 1) ^ 1)
    factors.store(gl.where(dead, 0.0, 1.0 / gl.where(dead, 1.0, row_sum)))
    mbarrier.arrive(p_full, count=1)
    lse = gl.where(dead, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
    ptrs = lse_ptr + (first_lse_row + rows).to(gl.int64) * stride_lm + (packed % group_size).to(gl.int64) * stride_lh
    gl.store(ptrs, lse, mask=rows_in_tile < rows_left)


@gluon.jit
def _load_q(buffer, row_ptr, row_stride_m, row_stride_h, packed_start, group_size, rows_left, DIMS: gl.constexpr):
    """Start the copy of q [ROWS, DIMS]; rows that do not exist become 0."""
    rows_in_tile = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout(DIMS)))
    packed = packed_start + rows_in_tile
    rows = (packed // group_size).to(gl.int64)
    heads = (packed % group_size).to(gl.int64)
    copy_at(buffer, row_ptr + (rows * row_stride_m + heads * row_stride_h), rows_in_tile < rows_left, DIMS)


@gluon.jit(
    do_not_specialize=[
        "stride_lb", "stride_lh", "stride_lm", "stride_ls", "stride_om", "stride_oh", "stride_os",
        "stride_qb", "stride_qm", "stride_qh", "stride_kb", "stride_kn", "stride_kh", "stride_vb", "stride_vn",
        "stride_vh", "stride_q2b", "stride_q2m", "stride_q2h", "stride_table", "stride_alibi_batch", "stride_rotary",
        "max_position", "nheads", "group_size", "seqlen_q", "seqlen_k", "seqlen_new", "capacity", "entries",
        "num_blocks", "num_splits", "scale", "softcap_log2", "window_left", "window_right", "chunk",
    ]
)  # fmt: skip
def attn_mla_kernel(
    q_ptr, k_ptr, v_ptr, q2_ptr, k2_ptr, out_ptr, lse_ptr, alibi_ptr, sinks_ptr, cos_ptr, sin_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_new_ptr, seqused_q_ptr, seqused_k_ptr, rotary_seqlens_ptr,
    batch_idx_ptr, leftpad_ptr, table_ptr, error_ptr,
    stride_lb: gl.int64, stride_lh: gl.int64, stride_lm: gl.int64, stride_ls: gl.int64,
    stride_om: gl.int64, stride_oh: gl.int64, stride_os: gl.int64,
    stride_qb: gl.int64, stride_qm: gl.int32, stride_qh: gl.int64,
    stride_kb: gl.int64, stride_kn: gl.int32, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vn: gl.int32, stride_vh: gl.int64,
    stride_q2b: gl.int64, stride_q2m: gl.int32, stride_q2h: gl.int64,
    stride_table: gl.int64, stride_alibi_batch: gl.int32, stride_rotary: gl.int64, max_position: gl.int32,
    nheads: gl.int32, group_size: gl.int32, seqlen_q: gl.int32, seqlen_k: gl.int32, seqlen_new: gl.int32,
    capacity: gl.int32, entries: gl.int32, num_blocks: gl.int32, num_splits: gl.int32,
    scale: gl.float32, softcap_log2: gl.float32, window_left: gl.int32, window_right: gl.int32, chunk: gl.int32,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAGE_SIZE: gl.constexpr, VEC: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS (position, query head) rows of one key head over one split of its keys."""
    head_k, block, split, batch = part_of_program(nheads // group_size, num_blocks, num_splits)
    start_q, rows_total = queries_of(batch, seqlen_q, cu_seqlens_q_ptr, seqused_q_ptr)
    packed_start = block * ROWS
    rows_left = rows_total * group_size - packed_start
    if rows_left <= 0:
        return
    start_k, _, first_position, cols_total = keys_of(
        batch, seqlen_k, seqlen_new, capacity, cu_seqlens_k_ptr, cu_seqlens_new_ptr, seqused_k_ptr, leftpad_ptr,
        error_ptr, False,
    )  # fmt: skip
    shift = cols_total - rows_total
    begin, full_begin, full_end, end = split_columns(
        packed_start // group_size, (packed_start + gl.minimum(rows_left, ROWS) - 1) // group_size, shift, cols_total,
        window_left, window_right, chunk, split, num_splits, BLOCK_N, MASK_LEFT, MASK_RIGHT, CHUNK,
    )  # fmt: skip

    batch64 = batch.to(gl.int64)
    head64 = head_k.to(gl.int64)
    k_start = head64 * stride_kh
    v_start = head64 * stride_vh
    if PAGE_SIZE > 0:
        table_ptr += batch64 * stride_table
    else:
        entry = entry_of(batch, entries, batch_idx_ptr, error_ptr, False)
        first_key = (start_k + first_position).to(gl.int64)
        k_start += entry * stride_kb + first_key * stride_kn
        v_start += entry * stride_vb + first_key * stride_vn
    k_ptr += k_start * VEC
    v_ptr += v_start * VEC
    first_head = head64 * group_size
    q_ptr += (batch64 * stride_qb + start_q.to(gl.int64) * stride_qm + first_head * stride_qh) * VEC
    q2_ptr += (batch64 * stride_q2b + start_q.to(gl.int64) * stride_q2m + first_head * stride_q2h) * VEC
    lse_ptr += batch64 * stride_lb + first_head * stride_lh + split * stride_ls
    out_ptr += first_head * stride_oh + split * stride_os
    out_row = start_q
    if cu_seqlens_q_ptr is None:
        out_row += batch * seqlen_q

    TILE_N: gl.constexpr = BLOCK_N // 2
    TILES: gl.constexpr = 2 * STAGES
    dtype: gl.constexpr = k_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    p_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_left = gl.allocate_shared_memory(dtype, [ROWS, HALF_DV], tile_layout)
    q_right = gl.allocate_shared_memory(dtype, [ROWS, HALF_DV], tile_layout)
    q_rope = gl.allocate_shared_memory(dtype, [ROWS, ROPE_DIMS], tile_layout)
    left = gl.allocate_shared_memory(dtype, [TILES, TILE_N, HALF_DV], tile_layout)
    right = gl.allocate_shared_memory(dtype, [TILES, TILE_N, HALF_DV], tile_layout)
    rope = gl.allocate_shared_memory(dtype, [TILES, TILE_N, ROPE_DIMS], tile_layout)
    p_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, TILE_N], p_layout)
    factors = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(TILES):
        mbarrier.init(full.index(stage), count=THREADS)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(p_full, count=1)
    mbarrier.init(p_empty, count=2)

    _load_q(q_left, q2_ptr, stride_q2m * VEC, stride_q2h * VEC, packed_start, group_size, rows_left, HALF_DV)
    _load_q(q_right, q2_ptr + HALF_DV, stride_q2m * VEC, stride_q2h * VEC, packed_start, group_size, rows_left, HALF_DV)
    _load_q(q_rope, q_ptr, stride_qm * VEC, stride_qh * VEC, packed_start, group_size, rows_left, ROPE_DIMS)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()

    gl.warp_specialize(
        [
            (_scores, (
                q_left, q_right, q_rope, left, right, rope, p_buffers, factors, full, p_full, p_empty, lse_ptr,
                begin, full_begin, full_end, end, packed_start, group_size, rows_left, shift, cols_total,
                window_left, window_right, chunk, scale, stride_lm, stride_lh, start_q,
                TILE_N, TILES, MASK_LEFT, MASK_RIGHT, CHUNK,
            )),
            (_values, (
                left, p_buffers, factors, full, empty, p_full, p_empty, out_ptr, begin, end, out_row, stride_om,
                stride_oh, packed_start, group_size, rows_left, 0, TILE_N, TILES,
            )),
            (_values, (
                right, p_buffers, factors, full, empty, p_full, p_empty, out_ptr, begin, end, out_row, stride_om,
                stride_oh, packed_start, group_size, rows_left, HALF_DV, TILE_N, TILES,
            )),
            (_load_keys, (
                left, right, rope, full, empty, k_ptr, v_ptr, table_ptr, begin, end, first_position, cols_total,
                stride_kb, stride_kn, stride_vb, stride_vn, PAGE_SIZE, TILE_N, TILES, VEC,
            )),
        ],
        # Warps of the workers and registers of a thread: 128 floats are the accumulator's.
        [4, 4, 4],
        [160, 160, 56],
    )  # fmt: skip
