"""Forward kernel for Hopper, in Gluon: one warp copies, two or three warpgroups multiply.

Each of them has 64 rows of queries.  The products of a tile of keys and of the tile before with its values
are under way together, and the softmax of the one runs beside the other; three warpgroups take turns with
their products (Shah et al. 2024, FlashAttention-3, arXiv:2407.08608, sections 3.1 and 3.2).  The arguments
are those of ``forward_kernel.attn_fwd_kernel``, with descriptors of q, k and v as matrices in place of their
pointers (``descriptors.Matrix``).
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

from .common import LN2, key_ranges, sequence_bounds, visible_keys
from .hopper import ROWS, barrier, clear_from, fill, init_ring, load
from .jit import kernel


def tile_rows(constants: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """(rows, dims) of a copy of queries, keys and values."""
    block_n, block_d, block_dv = (constants[name] for name in ("BLOCK_N", "BLOCK_D", "BLOCK_DV"))
    return (ROWS.value, block_d), (block_n, block_d), (block_n, block_dv)


@gluon.jit
def _rows_and_keys(
    step, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, VARLEN: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Of one step of this program: batch, head, first row; start and length of both sequences; its first and last
    column.

    Neighbouring programs have blocks of one head, so that its keys are in L2.  Where later rows see more keys
    (PAIRED) a program takes a block from the end, then one from the beginning: all such pairs are equally long.
    num_blocks counts pairs then.  Steps without rows begin at the end of the sequence, and have no keys.
    """
    SIDES: gl.constexpr = 2 if PAIRED else 1
    index = gl.program_id(0) + step // SIDES * gl.num_programs(0)
    block = index % num_blocks
    batch = index // num_blocks // nheads
    head = index // num_blocks % nheads
    start_q, rows_total = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    start_k, cols_total = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if PAIRED:
        blocks = gl.cdiv(rows_total, BLOCK_M)
        if step % 2 == 0:
            block = gl.where(block < gl.cdiv(blocks, 2), blocks - 1 - block, blocks)
        else:
            block = gl.where(block < blocks // 2, block, blocks)
    first_row = gl.minimum(block * BLOCK_M, rows_total)
    last_row = gl.minimum(first_row + BLOCK_M, rows_total) - 1
    begin, _, _, end = key_ranges(
        first_row, last_row, cols_total - rows_total, cols_total, window_left, window_right,
        BLOCK_N, MASK_LEFT, MASK_RIGHT,
    )  # fmt: skip
    if first_row >= rows_total:
        end = begin
    return batch, head, first_row, start_q, rows_total, start_k, cols_total, begin, end


@gluon.jit
def _load(
    q, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, q_desc, k_desc, v_desc,
    q_batch_rows, k_batch_rows, v_batch_rows, stride_qh, stride_kh, stride_vh, group_size,
    steps, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr, VARLEN: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Copy the queries of each tile of this program, and its keys and values into their rings."""
    q_bytes: gl.constexpr = BLOCK_M * q.shape[2] * 2
    loaded = 0  # tiles of keys
    tiles_q = 0
    for step in range(0, steps):
        batch, head, first_row, start_q, _, start_k, _, begin, end = _rows_and_keys(
            step, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
            BLOCK_M, BLOCK_N, VARLEN, MASK_LEFT, MASK_RIGHT, PAIRED,
        )  # fmt: skip
        if begin < end:
            row = batch * q_batch_rows + start_q + first_row
            mbarrier.wait(q_empty, (tiles_q & 1) ^ 1)
            mbarrier.expect(q_full, q_bytes)
            for part in gl.static_range(BLOCK_M // ROWS):
                load(q_desc, [row + part * ROWS, head * stride_qh * VEC], q_full, q.index(part))
            tiles_q += 1
            k_row = batch * k_batch_rows + start_k
            v_row = batch * v_batch_rows + start_k
            head_k = head // group_size
            for start in range(begin, end, BLOCK_N):
                fill(k_desc, k_row + start, head_k * stride_kh * VEC, loaded, keys, k_full, k_empty, STAGES)
                fill(v_desc, v_row + start, head_k * stride_vh * VEC, loaded, values, v_full, v_empty, STAGES)
                loaded += 1


@gluon.jit
def _scores_of(q, keys, k_full, tile, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Start q k^T of a tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = tile % STAGES
    mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, keys.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _my_turn(turns, tile, PART: gl.constexpr, PARTS: gl.constexpr):
    """Wait until the part before has started its products of this tile, part 0 for the last part's of the one before.

    Three warpgroups in step would want the matrix units together, and leave them idle together.
    """
    if PARTS > 2:
        mbarrier.wait(turns.index(PART), (tile & 1) ^ (PART == 0))


@gluon.jit
def _next_turn(turns, PART: gl.constexpr, PARTS: gl.constexpr):
    """The products of a tile are started."""
    if PARTS > 2:
        mbarrier.arrive(turns.index((PART + 1) % PARTS), count=1)


@gluon.jit
def _rounded(p, dtype: gl.constexpr):
    """p as dtype, two numbers at a time, which the compiler otherwise takes apart and joins again in every tile."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:  # noqa: RET505 - Gluon's compiler wants one return per branch
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16, is_pure=True, pack=2
        )


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
    acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, turns, begin, first_tile, end_tile,
    first_col, last_col, scale,
    MASKED: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Tiles [first_tile, end_tile) of those from column begin on; p is that of the tile before, still to be used."""
    for tile in range(first_tile, end_tile):
        stage = (tile - 1) % STAGES
        _my_turn(turns, tile, PART, PARTS)
        s = _scores_of(q, keys, k_full, tile, BLOCK_N, STAGES)
        mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        _next_turn(turns, PART, PARTS)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(tile % STAGES), count=1)
        p_next, row_max, row_sum, factor = _softmax(
            s, row_max, row_sum, begin + tile * BLOCK_N, first_col, last_col, scale, MASKED, BLOCK_N
        )
        p_next = _rounded(p_next, keys.dtype)
        if values.shape[2] == 128:
            # Has long come: ptxas would move the wait for P V in front of the softmax, but not over a loop.  At
            # other head dims that was slower.
            mbarrier.wait(v_full.index(stage), ((tile - 1) // STAGES) & 1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = gl.convert_layout(p_next, p.type.layout)
    return acc, p, row_max, row_sum


@gluon.jit
def _attend_rows(
    q, keys, values, q_empty, k_full, k_empty, v_full, v_empty, turns, out_ptr, lse_ptr, loaded, begin, end,
    first_row, rows_total, cols_total, window_left, window_right, scale, stride_om,
    PART: gl.constexpr, PARTS: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr,
):  # fmt: skip
    """Attention of ROWS rows; out_ptr and lse_ptr are those of the first.

    begin and end are of the keys of all warpgroups' rows, loaded is the number of tiles before these.
    """
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
        _my_turn(turns, loaded, PART, PARTS)
        s = _scores_of(q, keys, k_full, loaded, BLOCK_N, STAGES)
        _next_turn(turns, PART, PARTS)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(loaded % STAGES), count=1)
        p, row_max, row_sum, _ = _softmax(s, row_max, row_sum, begin, first_col, last_col, scale, True, BLOCK_N)
        p = gl.convert_layout(_rounded(p, dtype), gl.DotOperandLayout(0, out_layout, 2))
        # Of these rows alone; a part behind the sequence computes something that nobody stores.
        _, full_begin, full_end, own_end = key_ranges(
            gl.minimum(first_row, rows_total - 1), gl.minimum(first_row + ROWS, rows_total) - 1,
            cols_total - rows_total, cols_total, window_left, window_right, BLOCK_N, MASK_LEFT, MASK_RIGHT,
        )  # fmt: skip
        all_tiles = gl.cdiv(end - begin, BLOCK_N)
        tiles = gl.maximum(gl.cdiv(own_end - begin, BLOCK_N), 1)
        first_full = gl.minimum(gl.maximum((full_begin - begin) // BLOCK_N, 1), tiles)
        end_full = gl.minimum(gl.maximum((full_end - begin) // BLOCK_N, first_full), tiles)
        begin -= loaded * BLOCK_N
        if MASK_LEFT:
            acc, p, row_max, row_sum = _attend_tiles(
                acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, turns, begin,
                loaded + 1, loaded + first_full,
                first_col, last_col, scale, True, PART, PARTS, BLOCK_N, STAGES,
            )  # fmt: skip
        acc, p, row_max, row_sum = _attend_tiles(
            acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, turns, begin,
            loaded + first_full, loaded + end_full,
            first_col, last_col, scale, False, PART, PARTS, BLOCK_N, STAGES,
        )  # fmt: skip
        acc, p, row_max, row_sum = _attend_tiles(
            acc, p, row_max, row_sum, q, keys, values, k_full, k_empty, v_full, v_empty, turns, begin,
            loaded + end_full, loaded + tiles,
            first_col, last_col, scale, True, PART, PARTS, BLOCK_N, STAGES,
        )  # fmt: skip
        mbarrier.arrive(q_empty, count=1)
        last = loaded + tiles - 1
        stage = last % STAGES
        mbarrier.wait(v_full.index(stage), (last // STAGES) & 1)
        rows_left = cols_total - (begin + last * BLOCK_N)
        if rows_left < BLOCK_N:
            clear_from(values.index(stage), rows_left, BLOCK_N)
        acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        # Tiles that later rows see alone: released after they have come, or it would count for the tile before.
        for tile in range(loaded + tiles, loaded + all_tiles):
            _my_turn(turns, tile, PART, PARTS)
            stage = tile % STAGES
            mbarrier.wait(k_full.index(stage), (tile // STAGES) & 1)
            mbarrier.wait(v_full.index(stage), (tile // STAGES) & 1)
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.arrive(v_empty.index(stage), count=1)
            _next_turn(turns, PART, PARTS)
    # As in the Triton kernel: a row without a key, and one that sees nothing but NaN.
    dead = (row_max == float("-inf")) & (row_sum == 0.0)
    inverse = gl.where(dead, 0.0, 1.0 / gl.where(dead, 1.0, row_sum))
    lse = gl.where(dead, float("-inf"), (row_max + gl.log2(row_sum)) * LN2)
    gl.store(lse_ptr + gl.arange(0, ROWS, layout=row_layout), lse, mask=rows < rows_total)
    no_key = gl.convert_layout(dead, out_row_layout)[:, None]
    out = gl.where(no_key, 0.0, acc * gl.convert_layout(inverse, out_row_layout)[:, None]).to(dtype)
    out_rows = gl.arange(0, ROWS, layout=out_row_layout)
    dims = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, out_layout))
    ptrs = out_ptr + (out_rows.to(gl.int64) * stride_om)[:, None] + dims[None, :]
    gl.store(ptrs, out, mask=(first_row + out_rows < rows_total)[:, None])


@gluon.jit
def _attend(
    q, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, out_ptr, lse_ptr, stride_lb, stride_lh,
    steps, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    scale, PART: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VARLEN: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Attention of a warpgroup's rows of each tile of this program."""
    loaded = 0
    tiles_q = 0
    for step in range(0, steps):
        batch, head, first_row, start_q, rows_total, _, cols_total, begin, end = _rows_and_keys(
            step, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
            BLOCK_M, BLOCK_N, VARLEN, MASK_LEFT, MASK_RIGHT, PAIRED,
        )  # fmt: skip
        if begin < end:
            mbarrier.wait(q_full, tiles_q & 1)
            tiles_q += 1
        if first_row < rows_total:
            first_row += PART * ROWS
            row64 = (start_q + first_row).to(gl.int64)
            lse = lse_ptr + batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh + row64
            if not VARLEN:
                row64 += batch.to(gl.int64) * seqlen_q
            out = out_ptr + (row64 * nheads + head) * BLOCK_DV
            _attend_rows(
                q.index(PART), keys, values, q_empty, k_full, k_empty, v_full, v_empty, turns, out, lse, loaded,
                begin, end, first_row, rows_total, cols_total, window_left, window_right, scale, nheads * BLOCK_DV,
                PART, BLOCK_M // ROWS, BLOCK_DV, BLOCK_N, STAGES, MASK_LEFT, MASK_RIGHT,
            )  # fmt: skip
        loaded += gl.cdiv(gl.maximum(end - begin, 0), BLOCK_N)


@gluon.jit
def _work(
    q, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, q_desc, k_desc, v_desc,
    out_ptr, lse_ptr, stride_lb, stride_lh, q_batch_rows, k_batch_rows, v_batch_rows, stride_qh, stride_kh, stride_vh,
    group_size, steps, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, scale,
    PART: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    VEC: gl.constexpr, VARLEN: gl.constexpr,
    MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """What a warpgroup does, or for the last PART the warp that copies."""
    if PART == BLOCK_M // ROWS:
        _load(
            q, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, q_desc, k_desc, v_desc,
            q_batch_rows, k_batch_rows, v_batch_rows, stride_qh, stride_kh, stride_vh, group_size,
            steps, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right,
            cu_seqlens_q_ptr, cu_seqlens_k_ptr,
            BLOCK_M, BLOCK_N, STAGES, VEC, VARLEN, MASK_LEFT, MASK_RIGHT, PAIRED,
        )  # fmt: skip
    else:
        _attend(
            q, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, out_ptr, lse_ptr,
            stride_lb, stride_lh, steps, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right,
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, scale,
            PART, BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, VARLEN, MASK_LEFT, MASK_RIGHT, PAIRED,
        )  # fmt: skip


@kernel(gluon.jit)
def attn_fwd_hopper_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, alibi_ptr, rng_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, sinks_ptr,
    stride_lb: gl.int64, stride_lh: gl.int64,
    stride_qb: gl.int64, stride_qm: gl.int32, stride_qh: gl.int64,
    stride_kb: gl.int64, stride_kn: gl.int32, stride_kh: gl.int64,
    stride_vb: gl.int64, stride_vn: gl.int32, stride_vh: gl.int64,
    stride_alibi_batch: gl.int32,
    batch_heads: gl.int32, nheads: gl.int32, group_size: gl.int32,
    seqlen_q: gl.int32, seqlen_k: gl.int32, num_blocks: gl.int32,
    scale: gl.float32, softcap_log2: gl.float32, window_left: gl.int32, window_right: gl.int32,
    dropout_threshold: gl.int32, dropout_rescale: gl.float32,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, VEC: gl.constexpr,
    VARLEN: gl.constexpr, MASK_LEFT: gl.constexpr, MASK_RIGHT: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_M queries of one head, one after another."""
    PARTS: gl.constexpr = BLOCK_M // ROWS
    dtype: gl.constexpr = k_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q = gl.allocate_shared_memory(dtype, [PARTS, ROWS, BLOCK_D], tile_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], tile_layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], tile_layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=PARTS)
    init_ring(k_full, k_empty, STAGES, PARTS)
    init_ring(v_full, v_empty, STAGES, PARTS)
    for part in gl.static_range(PARTS):
        mbarrier.init(turns.index(part), count=1)
    fence_async_shared()
    barrier()
    steps = gl.cdiv(num_blocks * batch_heads - gl.program_id(0), gl.num_programs(0))
    if PAIRED:
        steps *= 2

    gl.warp_specialize(
        [
            (_work, (
                q, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns, q_desc, k_desc, v_desc,
                out_ptr, lse_ptr, stride_lb, stride_lh, (stride_qb // stride_qm).to(gl.int32),
                (stride_kb // stride_kn).to(gl.int32), (stride_vb // stride_vn).to(gl.int32), stride_qh.to(gl.int32),
                stride_kh.to(gl.int32), stride_vh.to(gl.int32), group_size,
                steps, num_blocks, nheads, seqlen_q, seqlen_k, window_left, window_right,
                cu_seqlens_q_ptr, cu_seqlens_k_ptr, scale,
                part, BLOCK_DV, BLOCK_M, BLOCK_N, STAGES, VEC, VARLEN, MASK_LEFT, MASK_RIGHT, PAIRED,
            ))
            for part in ((0, 1, 2) if PARTS == 2 else (0, 1, 2, 3))
        ],
        # Warps of the workers and registers of a thread, of which a multiprocessor has 512 for one of each warpgroup.
        [4, 1] if PARTS == 2 else [4, 4, 1],
        [240, 24] if PARTS == 2 else [160, 160, 24],
    )  # fmt: skip
