"""Absorbed MLA over a K/V cache on Hopper, in Gluon: keys whose larger part is the values.

A program has ROWS rows (query heads of one position, mostly) of one key head, and takes two tiles of TILE_N keys at a
time.  Two warpgroups (``_attend``) each compute the scores and the softmax of one tile, and accumulate half of the
value dims over both tiles: 64 x 512 floats are too many for one.  So the softmax of one runs beside products of the
other.  P of the first tile, with the running maximum so far, goes to the second warpgroup, which multiplies it with
its half of the values while its own softmax goes on, and sends back P of its tile and the maximum of both.  P takes
the place of its tile's rotary dims, which only the scores need.

A third group of threads (``_load_keys``) copies keys, each half of a tile as soon as the last product with the one
before has ended: one warp by TMA, where tiles are in one page each or there are no pages, else four row by row, so that
pages may have any size.  The three wait for each other at barriers only.

That two warpgroups share scores and values evenly is the schedule of FlashMLA.  The arguments are those of
``cache_kernels.attn_cache_kernel``.
"""

from collections.abc import Mapping
from typing import Any

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
from .hopper import ROWS, barrier, clear_from, copy_at, load, row_layout
from .jit import kernel

#: Keys of a tile.
TILE_N = gl.constexpr(64)
#: Value dims of one of the two accumulators.
HALF_DV = gl.constexpr(256)
#: Dims of the keys that are no values.
ROPE_DIMS = gl.constexpr(64)
#: Threads of a warpgroup, each of which arrives when its copies of keys or of q have.
THREADS = gl.constexpr(128)
#: Halves of the value dims of two tiles, in the order in which they are loaded; 2 * tile + half.
FIRST_LEFT, FIRST_RIGHT, SECOND_LEFT, SECOND_RIGHT = (gl.constexpr(part) for part in range(4))


def tile_rows(constants: Mapping[str, Any]) -> tuple[tuple[int, int] | None, ...]:
    """(rows, dims) of the copies of q, which threads copy, k and v."""
    return None, (TILE_N.value, ROPE_DIMS.value), (TILE_N.value, HALF_DV.value // pieces(True))


@gluon.constexpr_function
def pieces(tma):
    """In how many pieces half of a tile's values come, each with a barrier: those of threads cost more."""
    return 2 if tma else 1


@gluon.jit
def _place_of(
    table_ptr, start, cols_total, first_position, stride_kb, stride_kn, stride_vb, stride_vn, k_row, v_row,
    PAGE_SIZE: gl.constexpr, VEC: gl.constexpr, TMA: gl.constexpr,
):  # fmt: skip
    """Where a tile of keys is in k and in v: where each key begins, in elements, or with TMA the first one's row."""
    # With TMA all of a tile is in one page.
    cols = start
    if not TMA:
        cols += gl.arange(0, TILE_N, layout=gl.SliceLayout(1, row_layout(64)))
    page, slot = 0, cols
    if PAGE_SIZE > 0:
        page = gl.load(table_ptr + (first_position + cols) // PAGE_SIZE, mask=cols < cols_total, other=0)
        slot = (first_position + cols) % PAGE_SIZE
    if TMA:
        k_row += gl.cast(page * (stride_kb // stride_kn) + slot, gl.int32)
        v_row += gl.cast(page * (stride_vb // stride_vn) + slot, gl.int32)
    else:
        page, slot = gl.cast(page, gl.int64), gl.cast(slot, gl.int64)
        k_row = (page * stride_kb + slot * stride_kn) * VEC
        v_row = (page * stride_vb + slot * stride_vn) * VEC
    return k_row, v_row


@gluon.jit
def _copy_tile(
    left, right, rope, full, empty, tail, phase, k, v, k_place, v_place, k_col, v_col, keys_left,
    TILE: gl.constexpr, TMA: gl.constexpr,
):  # fmt: skip
    """Copy a tile of keys, each part once its place is free; keys behind the last one become 0.

    The rotary dims come with the half that is free last: until then P has their place.
    """
    PIECES: gl.constexpr = pieces(TMA)
    WIDTH: gl.constexpr = HALF_DV // PIECES
    if not TMA:
        exists = gl.arange(0, TILE_N, layout=gl.SliceLayout(1, row_layout(64))) < keys_left
    for half in gl.static_range(2):
        part = 2 * TILE + half
        mbarrier.wait(empty.index(part), phase)
        for piece in gl.static_range(PIECES):
            place = (right if half else left).index(TILE).slice(piece * WIDTH, WIDTH, dim=1)
            dims = half * HALF_DV + piece * WIDTH
            arrived = full.index(PIECES * part + piece)
            if not TMA:
                copy_at(place, v + v_place + dims, exists, WIDTH)
                # Arrives when the copies of each thread have.
                async_copy.mbarrier_arrive(arrived, increment_count=False)
            elif keys_left >= TILE_N:
                mbarrier.expect(arrived, TILE_N * WIDTH * 2)
                load(v, [v_place, v_col + dims], arrived, place)
            else:
                # What is behind the keys can be NaN, and 0 * NaN is.  The last two tiles alone come here: phase 0.
                mbarrier.expect(tail.index(PIECES * part + piece), TILE_N * WIDTH * 2)
                load(v, [v_place, v_col + dims], tail.index(PIECES * part + piece), place)
                mbarrier.wait(tail.index(PIECES * part + piece), 0)
                clear_from(place, gl.maximum(keys_left, 0), TILE_N)
                mbarrier.arrive(arrived, count=1)
        if half != TILE:
            arrived = full.index(4 * PIECES + TILE)
            if TMA:
                mbarrier.expect(arrived, TILE_N * ROPE_DIMS * 2)
                load(k, [k_place, k_col], arrived, rope.index(TILE))
            else:
                copy_at(rope.index(TILE), k + k_place, exists, ROPE_DIMS)
                async_copy.mbarrier_arrive(arrived, increment_count=False)


@gluon.jit
def _load_q(buffer, row_ptr, row_stride_m, row_stride_h, packed_start, group_size, rows_left, DIMS: gl.constexpr):
    """Start the copy of q [ROWS, DIMS]; rows that do not exist become 0."""
    rows_in_tile = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout(64)))
    packed = packed_start + rows_in_tile
    rows = (packed // group_size).to(gl.int64)
    heads = (packed % group_size).to(gl.int64)
    copy_at(buffer, row_ptr + (rows * row_stride_m + heads * row_stride_h), rows_in_tile < rows_left, DIMS)


@gluon.jit
def _load_keys(
    left, right, rope, full, empty, tail, k, v, table_ptr, begin, end, first_position, cols_total,
    stride_kb, stride_kn, stride_vb, stride_vn, k_row, k_col, v_row, v_col,
    PAGE_SIZE: gl.constexpr, VEC: gl.constexpr, TMA: gl.constexpr,
):  # fmt: skip
    """Copy the tiles of keys of [begin, end), always two."""
    for pair in range(0, gl.cdiv(end - begin, 2 * TILE_N)):
        first = begin + pair * (2 * TILE_N)
        second = first + TILE_N
        first_k, first_v = _place_of(
            table_ptr, first, cols_total, first_position, stride_kb, stride_kn, stride_vb, stride_vn, k_row, v_row,
            PAGE_SIZE, VEC, TMA,
        )  # fmt: skip
        second_k, second_v = _place_of(
            table_ptr, second, cols_total, first_position, stride_kb, stride_kn, stride_vb, stride_vn, k_row, v_row,
            PAGE_SIZE, VEC, TMA,
        )  # fmt: skip
        phase = (pair & 1) ^ 1
        _copy_tile(
            left, right, rope, full, empty, tail, phase, k, v, first_k, first_v, k_col, v_col, cols_total - first,
            0, TMA,
        )  # fmt: skip
        _copy_tile(
            left, right, rope, full, empty, tail, phase, k, v, second_k, second_v, k_col, v_col, cols_total - second,
            1, TMA,
        )  # fmt: skip


@gluon.jit
def _unknown_zero(pair):
    """0, which the compiler does not know to be the same for every pair.

    It would keep the addresses of all 72 operands of the scores in registers for the whole loop, and spill them.
    """
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [pair], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores_of(q_left, q_right, q_rope, left, right, rope, full, pair, PART: gl.constexpr, TMA: gl.constexpr):
    """q k^T of a tile, each piece begun when it is loaded."""
    PIECES: gl.constexpr = pieces(TMA)
    WIDTH: gl.constexpr = HALF_DV // PIECES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    phase = pair & 1
    zero = _unknown_zero(pair)
    tile = zero + PART
    s = gl.zeros([ROWS, TILE_N], gl.float32, layout)
    for piece in gl.static_range(2 * PIECES):
        mbarrier.wait(full.index(2 * PIECES * PART + piece), phase)
        if not TMA:
            fence_async_shared()  # keys were written by threads
        q = (q_right if piece >= PIECES else q_left).index(zero).slice(piece % PIECES * WIDTH, WIDTH, dim=1)
        keys = (right if piece >= PIECES else left).index(tile).slice(piece % PIECES * WIDTH, WIDTH, dim=1)
        s = warpgroup_mma(q, keys.permute((1, 0)), s, use_acc=piece > 0, is_async=True)
    mbarrier.wait(full.index(4 * PIECES + PART), phase)
    if not TMA:
        fence_async_shared()
    s = warpgroup_mma(q_rope.index(zero), rope.index(tile).permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _rescaled(acc, factor):
    """acc [ROWS, HALF_DV] times a factor for each row."""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def _finite(row_max):
    """What is subtracted from scores: a row that has seen nothing yet keeps -inf, which would give NaN."""
    return gl.where(row_max == float("-inf"), 0.0, row_max)


@gluon.jit
def _send(s, row_max, own_max, row_sum, scale, place, maxima, sent):
    """Give P of a tile of scores, and the maximum of it and what came before, to the other warpgroup.

    Returns that maximum, the new sum of each row, and the factor for what was summed before.
    """
    new_max = gl.maximum(row_max, own_max)
    subtract = _finite(new_max)
    p = gl.exp2(s * scale - subtract[:, None])
    place.store(p.to(place.dtype))
    maxima.store(new_max)
    fence_async_shared()
    mbarrier.arrive(sent, count=1)
    factor = gl.exp2(row_max - subtract)
    return new_max, row_sum * factor + gl.sum(p, 1), factor


@gluon.jit
def _attend(
    q_left, q_right, q_rope, left, right, rope, maxima, sums, q_full, full, empty, first_full, second_full, summed,
    q_ptr, q2_ptr, stride_qm, stride_qh, stride_q2m, stride_q2h, out_ptr, lse_ptr, begin, full_begin, full_end, end,
    packed_start, group_size, rows_left, shift, cols_total,
    window_left, window_right, chunk, scale, stride_lm, stride_lh, stride_om, stride_oh, first_lse_row, out_row,
    VEC: gl.constexpr, PART: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, CHUNK: gl.constexpr,
    TMA: gl.constexpr,
):  # fmt: skip
    """P of the first (PART 0) or the second tile of each pair, and the PART-th half of the result's dims."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    packed = packed_start + gl.arange(0, ROWS, layout=row_layout)
    first_col, end_col = visible_positions(
        packed // group_size, shift, cols_total, window_left, window_right, chunk, MASK_LEFT, MASK_RIGHT, CHUNK
    )
    cols_in_tile = gl.arange(0, TILE_N, layout=gl.SliceLayout(0, layout))
    row_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    row_sum = gl.zeros([ROWS], gl.float32, row_layout)
    acc = gl.zeros([ROWS, HALF_DV], gl.float32, acc_layout)
    # Each half of q has one of the warpgroups that need it to copy it.
    stride_m, stride_h = stride_q2m * VEC, stride_q2h * VEC
    if PART == 0:
        _load_q(q_left.index(0), q2_ptr, stride_m, stride_h, packed_start, group_size, rows_left, HALF_DV)
    else:
        _load_q(q_right.index(0), q2_ptr + HALF_DV, stride_m, stride_h, packed_start, group_size, rows_left, HALF_DV)
        stride_m, stride_h = stride_qm * VEC, stride_qh * VEC
        _load_q(q_rope.index(0), q_ptr, stride_m, stride_h, packed_start, group_size, rows_left, ROPE_DIMS)
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    mbarrier.wait(q_full, 0)
    fence_async_shared()  # q was written by threads
    pair = 0
    for pair_start in range(begin, end, 2 * TILE_N):
        phase = pair & 1
        start = pair_start + PART * TILE_N
        s = _scores_of(q_left, q_right, q_rope, left, right, rope, full, pair, PART, TMA)
        if start < full_begin or start + TILE_N > full_end:
            cols = start + cols_in_tile
            seen = (cols[None, :] >= first_col[:, None]) & (cols[None, :] < end_col[:, None])
            s = gl.where(seen, s, float("-inf"))
        own_max = gl.max(s, 1) * scale
        if PART == 0:
            first_max, row_sum, factor = _send(s, row_max, own_max, row_sum, scale, rope.index(0), maxima, first_full)
            acc = _rescaled(acc, factor)
            acc = warpgroup_mma(rope.index(0), left.index(0), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(FIRST_LEFT), count=1)
            mbarrier.arrive(empty.index(FIRST_RIGHT), count=1)
            mbarrier.wait(second_full, phase)
            row_max = maxima.load(row_layout)
            factor = gl.exp2(first_max - _finite(row_max))
            row_sum = row_sum * factor
            acc = _rescaled(acc, factor)
            acc = warpgroup_mma(rope.index(1), left.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(SECOND_LEFT), count=1)
        else:
            mbarrier.wait(first_full, phase)
            first_max = maxima.load(row_layout)
            factor = gl.exp2(row_max - _finite(first_max))
            row_sum = row_sum * factor
            acc = _rescaled(acc, factor)
            acc = warpgroup_mma(rope.index(0), right.index(0), acc, is_async=True)
            row_max, row_sum, factor = _send(s, first_max, own_max, row_sum, scale, rope.index(1), maxima, second_full)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(FIRST_RIGHT), count=1)
            acc = _rescaled(acc, factor)
            acc = warpgroup_mma(rope.index(1), right.index(1), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(SECOND_RIGHT), count=1)
            mbarrier.arrive(empty.index(SECOND_LEFT), count=1)
        pair += 1  # noqa: SIM113 -- kernels have no enumerate
    # Each has summed the rows of its own tiles.
    sums.index(PART).store(row_sum)
    mbarrier.arrive(summed, count=1)
    mbarrier.wait(summed, 0)
    row_sum += sums.index(1 - PART).load(row_layout)
    # As in the forward kernel: a row without a key, and one that sees nothing but NaN.
    dead = (row_max == float("-inf")) & (row_sum == 0.0)
    inverse = gl.where(dead, 0.0, 1.0 / gl.where(dead, 1.0, row_sum))
    if PART == 0:
        lse = gl.where(dead, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
        rows = (first_lse_row + packed // group_size).to(gl.int64)
        ptrs = lse_ptr + rows * stride_lm + (packed % group_size).to(gl.int64) * stride_lh
        gl.store(ptrs, lse, mask=packed < packed_start + rows_left)
    # 0 for a row that sees no key; its accumulator may hold 0 * NaN of keys that other rows see.
    inverse = gl.convert_layout(inverse, gl.SliceLayout(1, acc_layout))[:, None]
    acc = gl.where(inverse == 0.0, 0.0, acc * inverse)
    place = left.index(0) if PART == 0 else right.index(0)
    if out_ptr.dtype.element_ty == place.dtype:
        # A thread has two neighbours of 16 bits in a row: by way of the keys' place rows are written in full.
        place.store(acc.to(place.dtype))
        barrier()
        out = place.load(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
    else:
        out = acc
    rows_in_tile = gl.arange(0, ROWS, layout=gl.SliceLayout(1, out.type.layout))
    packed = packed_start + rows_in_tile
    rows = (out_row + packed // group_size).to(gl.int64)
    heads = packed % group_size
    dims = PART * HALF_DV + gl.arange(0, HALF_DV, layout=gl.SliceLayout(0, out.type.layout))
    ptrs = out_ptr + ((rows * stride_om + heads * stride_oh) * (2 * HALF_DV))[:, None] + dims[None, :]
    gl.store(ptrs, out, mask=(rows_in_tile < rows_left)[:, None])


@kernel(gluon.jit)
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
    BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, VEC: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, CHUNK: gl.constexpr, TMA: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS (position, query head) rows of one key head over one split of its keys.

    With TMA k_ptr and v_ptr are descriptors of matrices of all heads, and pages hold a multiple of TILE_N keys.
    """
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
    k_row, k_col, v_row, v_col = 0, 0, 0, 0  # of the first key, for copies by TMA
    if PAGE_SIZE > 0:
        table_ptr += batch64 * stride_table
    else:
        entry = entry_of(batch, entries, batch_idx_ptr, error_ptr, False)
        first_key = (start_k + first_position).to(gl.int64)
        if TMA:
            k_row = (entry * (stride_kb // stride_kn) + first_key).to(gl.int32)
            v_row = (entry * (stride_vb // stride_vn) + first_key).to(gl.int32)
        else:
            k_start += entry * stride_kb + first_key * stride_kn
            v_start += entry * stride_vb + first_key * stride_vn
    if TMA:
        k_col = (k_start * VEC).to(gl.int32)
        v_col = (v_start * VEC).to(gl.int32)
    else:
        k_ptr += k_start * VEC
        v_ptr += v_start * VEC
    first_head = head64 * group_size
    q_ptr += (batch64 * stride_qb + start_q.to(gl.int64) * stride_qm + first_head * stride_qh) * VEC
    q2_ptr += (batch64 * stride_q2b + start_q.to(gl.int64) * stride_q2m + first_head * stride_q2h) * VEC
    lse_ptr += batch64 * stride_lb + first_head * stride_lh + split * stride_ls
    out_ptr += (first_head * stride_oh + split * stride_os) * (2 * HALF_DV)
    out_row = start_q
    if cu_seqlens_q_ptr is None:
        out_row += batch * seqlen_q

    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Of one, so that an index hides the addresses (_unknown_zero).
    q_left = gl.allocate_shared_memory(dtype, [1, ROWS, HALF_DV], tile_layout)
    q_right = gl.allocate_shared_memory(dtype, [1, ROWS, HALF_DV], tile_layout)
    q_rope = gl.allocate_shared_memory(dtype, [1, ROWS, ROPE_DIMS], tile_layout)
    left = gl.allocate_shared_memory(dtype, [2, TILE_N, HALF_DV], tile_layout)
    right = gl.allocate_shared_memory(dtype, [2, TILE_N, HALF_DV], tile_layout)
    # Then a tile's P, for there is no room beside it.
    rope = gl.allocate_shared_memory(dtype, [2, TILE_N, ROPE_DIMS], tile_layout)
    maxima = gl.allocate_shared_memory(gl.float32, [ROWS], flat)
    sums = gl.allocate_shared_memory(gl.float32, [2, ROWS], flat)
    # Of the pieces of both tiles, then of their rotary dims.
    PLACES: gl.constexpr = 4 * pieces(TMA)
    full = gl.allocate_shared_memory(gl.int64, [PLACES + 2, 1], mbarrier.MBarrierLayout())
    tail = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    first_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    second_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for part in gl.static_range(PLACES + 2):
        mbarrier.init(full.index(part), count=1 if TMA else THREADS)
    for part in gl.static_range(PLACES):
        mbarrier.init(tail.index(part), count=1)
    mbarrier.init(q_full, count=2 * THREADS)
    for part in gl.static_range(4):
        # FIRST_RIGHT and SECOND_LEFT come with the rotary dims, whose place P takes, and both warpgroups read P.
        mbarrier.init(empty.index(part), count=1 if part % 3 == 0 else 2)
    mbarrier.init(first_full, count=1)
    mbarrier.init(second_full, count=1)
    mbarrier.init(summed, count=2)
    fence_async_shared()  # the copies arrive at what threads have initialised

    barrier()
    gl.warp_specialize(
        [
            (_attend, (
                q_left, q_right, q_rope, left, right, rope, maxima, sums, q_full, full, empty,
                first_full, second_full, summed, q_ptr, q2_ptr, stride_qm, stride_qh, stride_q2m, stride_q2h,
                out_ptr, lse_ptr, begin, full_begin, full_end, end,
                packed_start, group_size, rows_left, shift, cols_total, window_left, window_right, chunk, scale,
                stride_lm, stride_lh, stride_om, stride_oh, start_q, out_row,
                VEC, 0, MASK_LEFT, MASK_RIGHT, CHUNK, TMA,
            )),
            (_attend, (
                q_left, q_right, q_rope, left, right, rope, maxima, sums, q_full, full, empty,
                first_full, second_full, summed, q_ptr, q2_ptr, stride_qm, stride_qh, stride_q2m, stride_q2h,
                out_ptr, lse_ptr, begin, full_begin, full_end, end,
                packed_start, group_size, rows_left, shift, cols_total, window_left, window_right, chunk, scale,
                stride_lm, stride_lh, stride_om, stride_oh, start_q, out_row,
                VEC, 1, MASK_LEFT, MASK_RIGHT, CHUNK, TMA,
            )),
            (_load_keys, (
                left, right, rope, full, empty, tail, k_ptr, v_ptr, table_ptr, begin, end, first_position, cols_total,
                stride_kb, stride_kn, stride_vb, stride_vn, k_row, k_col, v_row, v_col, PAGE_SIZE, VEC, TMA,
            )),
        ],
        # Warps of the workers, and registers of a thread, of which 128 are the accumulator's of one that multiplies.
        [4, 1 if TMA else 4],
        [216, 72],
    )  # fmt: skip
