"""Kernels over a K/V cache: attention of splits of the keys, their combination, and the append of new tokens.

A program of the attention kernel takes BLOCK_M rows of one key head: a row is one query position of one of
the query heads that share the key head, so that keys are read once for all of them.  Keys may be divided
into splits ("Flash-Decoding", Dao, Haziza, Massa and Sizov 2023), each normalised by itself; the combine
kernel weighs them by their LSE.

Where a sequence's keys are: row ``position`` of a cache entry (stride_kb between entries), or slot
``position % PAGE_SIZE`` of page ``block_table[position // PAGE_SIZE]`` (stride_kb between pages), or row
``cu_seqlens_k[b] + position`` of packed sequences.
"""

import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    between,
    dot,
    join_sink,
    load_slope,
    load_tile,
    modified_scores,
    round_to,
    sequence_bounds,
    store_tile,
    tile_offsets,
)
from .jit import kernel

#: Slots of the error buffer that checked kernels report to, the number of the sequence + 1: FAULTS of
#: ``flash_rocm/cache_validation.py``.
BAD_PAGE = tl.constexpr(0)
BAD_LENGTH = tl.constexpr(1)
BAD_ENTRY = tl.constexpr(2)
BAD_POSITION = tl.constexpr(3)


@triton.jit
def report(error_ptr, slot, is_bad, batch):
    """Leave the highest number of a bad sequence in a slot."""
    tl.atomic_max(error_ptr + slot, tl.where(is_bad, batch + 1, 0).to(tl.int32))


@triton.jit
def cached_length(
    batch, seqlen_k, capacity, cu_seqlens_k_ptr, seqused_k_ptr, error_ptr,
    CHECKED: tl.constexpr, PACKED: tl.constexpr = False,
):  # fmt: skip
    """Row that packed keys start at, and how many keys there are before an append."""
    start, rows = sequence_bounds(cu_seqlens_k_ptr, batch, seqlen_k, cu_seqlens_k_ptr is not None)
    length = rows
    if seqused_k_ptr is not None:
        length = tl.load(seqused_k_ptr + batch)
    if CHECKED:
        is_bad = (length < 0) | (length > capacity)
        if PACKED:
            # k has no room of its own for each sequence: one that is out of range has no keys.
            is_bad = is_bad | (start < 0) | (rows < 0) | (start > capacity - rows) | (length > rows)
            start = tl.where(is_bad, 0, start)
            length = tl.where(is_bad, 0, length)
        report(error_ptr, BAD_LENGTH, is_bad, batch)
    return start, tl.minimum(tl.maximum(length, 0), capacity)


@triton.jit
def part_of_program(nheads_k, num_blocks, num_splits):
    """Key head, block of rows, split and sequence of a program; the key heads of a block are neighbours."""
    pid = tl.program_id(0)
    head_k = pid % nheads_k
    pid = pid // nheads_k
    block = pid % num_blocks
    pid = pid // num_blocks
    return head_k, block, pid % num_splits, pid // num_splits


@triton.jit
def queries_of(batch, seqlen_q, cu_seqlens_q_ptr, seqused_q_ptr):
    """First row of a sequence's queries (relative to the batch entry for dense), and how many there are."""
    start, rows = sequence_bounds(cu_seqlens_q_ptr, batch, seqlen_q, cu_seqlens_q_ptr is not None)
    if seqused_q_ptr is not None:
        rows = tl.minimum(rows, tl.load(seqused_q_ptr + batch))
    return start, rows


@triton.jit
def keys_of(
    batch, seqlen_k, seqlen_new, capacity, cu_seqlens_k_ptr, cu_seqlens_new_ptr, seqused_k_ptr, leftpad_ptr,
    error_ptr, CHECKED: tl.constexpr, PACKED: tl.constexpr = False,
):  # fmt: skip
    """Row that packed keys start at, keys before the append, the left padding, and keys behind that with new ones."""
    start, cached = cached_length(
        batch, seqlen_k, capacity, cu_seqlens_k_ptr, seqused_k_ptr, error_ptr, CHECKED, PACKED
    )  # fmt: skip
    _, new = sequence_bounds(cu_seqlens_new_ptr, batch, seqlen_new, cu_seqlens_new_ptr is not None)
    first_position = tl.cast(0, tl.int32)
    if leftpad_ptr is not None:
        first_position = tl.load(leftpad_ptr + batch)
        if CHECKED:
            report(error_ptr, BAD_LENGTH, (first_position < 0) | (first_position > capacity), batch)
        first_position = tl.minimum(tl.maximum(first_position, 0), capacity)
    return start, cached, first_position, tl.maximum(tl.minimum(cached + new, capacity) - first_position, 0)


@triton.jit
def entry_of(batch, entries, batch_idx_ptr, error_ptr, CHECKED: tl.constexpr):
    """Cache entry of a sequence."""
    entry = batch
    if batch_idx_ptr is not None:
        entry = tl.load(batch_idx_ptr + batch)
        if CHECKED:
            is_bad = (entry < 0) | (entry >= entries)
            report(error_ptr, BAD_ENTRY, is_bad, batch)
            entry = tl.where(is_bad, 0, entry)
    return entry.to(tl.int64)


@triton.jit
def checked_page(page, entries, batch, error_ptr, CHECKED: tl.constexpr):
    """A page number as 64 bits; checked kernels replace one that is out of range."""
    if CHECKED:
        is_bad = (page < 0) | (page >= entries)
        # One scalar, or one of the pages of a tile.
        report(error_ptr, BAD_PAGE, tl.max(is_bad.to(tl.int32), 0) > 0 if len(page.shape) else is_bad, batch)
        page = tl.where(is_bad, 0, page)
    return page.to(tl.int64)


@triton.jit
def load_turned(
    ptrs, row_exists, dims, positions, cos_ptr, sin_ptr, stride_rotary, max_position,
    HEADDIM: tl.constexpr, ROTARY_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Load [rows, dims] and turn the first 2 * ROTARY_HALF dims (Su et al. 2021); ptrs [rows, 1] are row starts.

    Each element comes with its partner of the pair, so that nothing moves between threads.
    """
    exists = row_exists[:, None]
    x = tl.load(ptrs + dims[None, :], mask=exists & (dims[None, :] < HEADDIM), other=0.0)
    if ROTARY_HALF > 0:
        if INTERLEAVED:
            is_first = dims % 2 == 0
            partner = tl.where(is_first, dims + 1, dims - 1)
            index = dims // 2
        else:
            is_first = dims < ROTARY_HALF
            partner = tl.where(is_first, dims + ROTARY_HALF, dims - ROTARY_HALF)
            index = tl.where(is_first, dims, dims - ROTARY_HALF)
        is_turned = exists & (dims[None, :] < 2 * ROTARY_HALF)
        y = tl.load(ptrs + partner[None, :], mask=is_turned, other=0.0).to(tl.float32)
        has_angle = is_turned & (positions[:, None] < max_position) & (positions[:, None] >= 0)
        angles = positions.to(tl.int64)[:, None] * stride_rotary + index[None, :]
        cos = tl.load(cos_ptr + angles, mask=has_angle, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=has_angle, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * cos + tl.where(is_first[None, :], -y, y) * sin
        x = tl.where(is_turned, round_to(turned, x.dtype, False), x)
    return x


@triton.jit
def visible_positions(
    row, shift, seqlen_k, window_left, window_right, chunk,
    MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """First key that a row sees and the one behind the last; of a number or of a tensor of rows.

    Both grow with the row.
    """
    first = row * 0
    end = row * 0 + seqlen_k
    position = row + shift
    if MASK_LEFT:
        first = tl.maximum(first, position - window_left)
    if MASK_RIGHT:
        end = tl.minimum(end, position + window_right + 1)
    if CHUNK:
        # Division rounds towards 0, chunks count down from there.
        start = tl.where(position < 0, position - (chunk - 1), position) // chunk * chunk
        first = tl.maximum(first, start)
        end = tl.minimum(end, start + chunk)
    return first, tl.maximum(end, 0)


@triton.jit
def _scores_by_chunks(
    q_ptrs, row_exists, k_ptrs, cols, seqlen_k, positions, cos_ptr, sin_ptr, stride_rotary, max_position,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, ROTARY_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """q @ k^T [BLOCK_M, BLOCK_N], BLOCK_K dims at a time; q_ptrs and k_ptrs [rows, 1] are row starts.

    What dot_by_chunks is for rows that do not follow each other and may be turned; q is turned anew for every tile.
    """
    CHUNK: tl.constexpr = BLOCK_K if BLOCK_K < BLOCK_D else BLOCK_D
    IS_FLOAT32: tl.constexpr = k_ptrs.dtype.element_ty == tl.float32
    UNROLL: tl.constexpr = 1 if IS_FLOAT32 else BLOCK_D // CHUNK
    PARTIAL_SUMS: tl.constexpr = IS_FLOAT32 and BLOCK_D > 256
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1, loop_unroll_factor=UNROLL):
        dims = first + tl.arange(0, CHUNK)
        q = load_turned(
            q_ptrs, row_exists, dims, positions, cos_ptr, sin_ptr, stride_rotary, max_position,
            HEADDIM, ROTARY_HALF, INTERLEAVED,
        )  # fmt: skip  # [BLOCK_M, CHUNK]
        k = load_tile(k_ptrs + dims[None, :], cols, seqlen_k, dims, HEADDIM, BLOCK_D, MASKED)  # [BLOCK_N, CHUNK]
        if PARTIAL_SUMS:
            result -= dot(q, tl.trans(k), None)
        else:
            result = dot(q, tl.trans(k), result)
    return -result if PARTIAL_SUMS else result


@triton.jit
def split_columns(
    first_row, last_row, shift, cols_total, window_left, window_right, chunk, split, num_splits,
    BLOCK_N: tl.constexpr, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Columns that one split of rows [first_row, last_row] has: masked [a, b), full [b, c), masked [c, d)."""
    first_begin, first_end = visible_positions(
        first_row, shift, cols_total, window_left, window_right, chunk, MASK_LEFT, MASK_RIGHT, CHUNK
    )
    last_begin, end = visible_positions(
        last_row, shift, cols_total, window_left, window_right, chunk, MASK_LEFT, MASK_RIGHT, CHUNK
    )
    # Masked [begin, full_begin), full [full_begin, full_end), masked [full_end, end), all of this split.
    begin = first_begin // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, num_splits)
    begin += split * tiles_per_split * BLOCK_N
    end = tl.maximum(tl.minimum(end, begin + tiles_per_split * BLOCK_N), begin)
    full_begin = begin
    if MASK_LEFT or CHUNK:
        full_begin = tl.minimum(
            tl.maximum(tl.cdiv(last_begin, BLOCK_N) * BLOCK_N, begin), tl.cdiv(end, BLOCK_N) * BLOCK_N
        )
    full_end = tl.maximum(tl.minimum(first_end, end) // BLOCK_N * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _attend(
    acc, row_sum, row_max, q, q2, k_ptr, k2_ptr, v_ptr, begin, end,
    rows, first_col, end_col, shift, seqlen_k, first_position, table_ptr, entries, batch, error_ptr,
    stride_kb, stride_kn, stride_vb, stride_vn, scale, softcap_log2, slope_log2,
    row_exists, rotary_positions, cos_ptr, sin_ptr, stride_rotary, max_position,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, HEADDIM_2: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROTARY_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WHOLE_PAGES: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, MASK_LEFT: tl.constexpr, RAW_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, TIES_UP: tl.constexpr, V_IS_K2: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """One pass over columns [begin, end).  acc [BLOCK_M, BLOCK_DV]; row_sum, row_max, first_col, end_col [BLOCK_M].

    q and q2 are tiles [BLOCK_M, BLOCK_D], or with BLOCK_K the addresses of their rows [BLOCK_M, 1].
    """
    cols_in_tile = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    dims_2 = tl.arange(0, BLOCK_D2)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=BLOCK_K > 0):
        cols = start + cols_in_tile
        if PAGE_SIZE > 0 and not WHOLE_PAGES:
            position = first_position + cols
            page = tl.load(table_ptr + position // PAGE_SIZE, mask=cols < seqlen_k, other=0)  # [BLOCK_N]
            page = checked_page(page, entries, batch, error_ptr, CHECKED)
            slot = (position % PAGE_SIZE).to(tl.int64)
            k_rows = ((page * stride_kb + slot * stride_kn) * VEC)[:, None]
            v_rows = ((page * stride_vb + slot * stride_vn) * VEC)[:, None]
        else:
            if PAGE_SIZE > 0:
                page = checked_page(tl.load(table_ptr + start // PAGE_SIZE), entries, batch, error_ptr, CHECKED)
                slot = tl.cast(start % PAGE_SIZE, tl.int64)
                k_start = (page * stride_kb + slot * stride_kn) * VEC
                v_start = (page * stride_vb + slot * stride_vn) * VEC
            else:
                k_start = tl.cast(start, tl.int64) * stride_kn * VEC
                v_start = tl.cast(start, tl.int64) * stride_vn * VEC
            k_rows = k_start + tile_offsets(cols_in_tile, stride_kn, tl.arange(0, 1), VEC, WIDE)
            v_rows = v_start + tile_offsets(cols_in_tile, stride_vn, tl.arange(0, 1), VEC, WIDE)
        if BLOCK_K > 0:
            s = _scores_by_chunks(
                q, row_exists, k_ptr + k_rows, cols, seqlen_k, rotary_positions, cos_ptr, sin_ptr, stride_rotary,
                max_position, BLOCK_M, BLOCK_N, HEADDIM, BLOCK_D, BLOCK_K, MASKED, ROTARY_HALF, INTERLEAVED,
            )  # fmt: skip  # [BLOCK_M, BLOCK_N]
        else:
            k = load_tile(k_ptr + k_rows + dims[None, :], cols, seqlen_k, dims, HEADDIM, BLOCK_D, MASKED)
            s = dot(q, tl.trans(k), None)  # [BLOCK_M, BLOCK_N]
        v_ptrs = v_ptr + v_rows + dims_v[None, :]
        if HEADDIM_2 > 0 and BLOCK_K > 0:
            s += _scores_by_chunks(
                q2, row_exists, v_ptr + v_rows if V_IS_K2 else k2_ptr + k_rows, cols, seqlen_k,
                rotary_positions, None, None, 0, 0,
                BLOCK_M, BLOCK_N, HEADDIM_2, BLOCK_D2, BLOCK_K, MASKED, 0, False,
            )  # fmt: skip
        elif V_IS_K2:
            v = load_tile(v_ptrs, cols, seqlen_k, dims_v, HEADDIM_V, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
            s = dot(q2, tl.trans(v), s)
        elif HEADDIM_2 > 0:
            k2 = load_tile(k2_ptr + k_rows + dims_2[None, :], cols, seqlen_k, dims_2, HEADDIM_2, BLOCK_D2, MASKED)
            s = dot(q2, tl.trans(k2), s)
        if not RAW_SCALE:
            s = modified_scores(
                s, rows[:, None], cols[None, :], shift, scale, softcap_log2, slope_log2,
                SOFTCAP, ALIBI, k_ptr.dtype.element_ty == tl.float32,
            )  # fmt: skip
        if MASKED:
            seen = between(
                cols_in_tile[None, :], (first_col - start)[:, None], (end_col - 1 - start)[:, None], MASK_LEFT, True
            )
            s = tl.where(seen, s, float("-inf"))
        tile_max = tl.max(s, 1) * scale if RAW_SCALE else tl.max(s, 1)
        new_max = tl.maximum(row_max, tile_max)
        subtract = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        p = tl.exp2(s * scale - subtract[:, None]) if RAW_SCALE else tl.exp2(s - subtract[:, None])
        rescale = tl.exp2(row_max - subtract)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        if BLOCK_K > 0 or not V_IS_K2:
            v = load_tile(v_ptrs, cols, seqlen_k, dims_v, HEADDIM_V, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
        acc = acc * rescale[:, None]
        acc = dot(round_to(p, v.dtype, TIES_UP), v, acc)
    return acc, row_sum, row_max


@kernel(triton.jit)
def attn_cache_kernel(
    q_ptr, k_ptr, v_ptr, q2_ptr, k2_ptr, out_ptr, lse_ptr, alibi_ptr, sinks_ptr, cos_ptr, sin_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, cu_seqlens_new_ptr, seqused_q_ptr, seqused_k_ptr, rotary_seqlens_ptr,
    batch_idx_ptr, leftpad_ptr, table_ptr, error_ptr,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_lm: tl.int64, stride_ls: tl.int64,
    stride_om: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    stride_qb: tl.int64, stride_qm: tl.int32, stride_qh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int32, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int32, stride_vh: tl.int64,
    stride_q2b: tl.int64, stride_q2m: tl.int32, stride_q2h: tl.int64,
    stride_table: tl.int64, stride_alibi_batch: tl.int32, stride_rotary: tl.int64, max_position: tl.int32,
    nheads: tl.int32, group_size: tl.int32, seqlen_q: tl.int32, seqlen_k: tl.int32, seqlen_new: tl.int32,
    capacity: tl.int32, entries: tl.int32, num_blocks: tl.int32, num_splits: tl.int32,
    scale: tl.float32, softcap_log2: tl.float32, window_left: tl.int32, window_right: tl.int32, chunk: tl.int32,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, HEADDIM_2: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_D2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    ROTARY_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr, CHUNK: tl.constexpr, RAW_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, TIES_UP: tl.constexpr, V_IS_K2: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M (position, query head) rows of one key head over one split of its keys.

    Rows of out are (batch * seqlen_q + position) or (cu_seqlens_q[b] + position); its strides count vectors of
    HEADDIM_V, so that stores are as wide as what divides that.  q2 and k2 are further dims of q and k; with V_IS_K2
    the keys' further dims are the values, which are read once.
    """
    head_k, block, split, batch = part_of_program(nheads // group_size, num_blocks, num_splits)
    start_q, rows_total = queries_of(batch, seqlen_q, cu_seqlens_q_ptr, seqused_q_ptr)
    if block * BLOCK_M >= rows_total * group_size:
        return
    start_k, cached, first_position, cols_total = keys_of(
        batch, seqlen_k, seqlen_new, capacity, cu_seqlens_k_ptr, cu_seqlens_new_ptr, seqused_k_ptr, leftpad_ptr,
        error_ptr, CHECKED, PAGE_SIZE == 0 and cu_seqlens_k_ptr is not None,
    )  # fmt: skip
    shift = cols_total - rows_total

    # Rows of the tile: (position, query head of the group).
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = packed < rows_total * group_size
    rows = packed // group_size
    heads = head_k * group_size + packed % group_size
    first_row = block * BLOCK_M // group_size
    last_row = tl.minimum(block * BLOCK_M + BLOCK_M, rows_total * group_size) - 1
    last_row = last_row // group_size

    begin, full_begin, full_end, end = split_columns(
        first_row, last_row, shift, cols_total, window_left, window_right, chunk, split, num_splits,
        BLOCK_N, MASK_LEFT, MASK_RIGHT, CHUNK,
    )  # fmt: skip

    batch64 = batch.to(tl.int64)
    if PAGE_SIZE > 0:
        table_ptr += batch64 * stride_table
        k_start = head_k.to(tl.int64) * stride_kh
        v_start = head_k.to(tl.int64) * stride_vh
    else:
        entry = entry_of(batch, entries, batch_idx_ptr, error_ptr, CHECKED)
        first_key = (start_k + first_position).to(tl.int64)
        k_start = entry * stride_kb + first_key * stride_kn + head_k.to(tl.int64) * stride_kh
        v_start = entry * stride_vb + first_key * stride_vn + head_k.to(tl.int64) * stride_vh
    k_ptr += k_start * VEC
    v_ptr += v_start * VEC
    if HEADDIM_2 > 0 and not V_IS_K2:
        k2_ptr += k_start * VEC

    dims = tl.arange(0, BLOCK_D)
    dims_2 = tl.arange(0, BLOCK_D2)
    q_rows = (start_q + rows).to(tl.int64)
    position_of_rotary = rows
    if ROTARY_HALF > 0:
        before = cached
        if rotary_seqlens_ptr is not None:
            before = tl.load(rotary_seqlens_ptr + batch)
        MOVES: tl.constexpr = MASK_LEFT or MASK_RIGHT or CHUNK
        position_of_rotary = before + (rows if MOVES else rows * 0)
        if CHECKED:
            last = max_position - (rows_total if MOVES else 1)
            report(error_ptr, BAD_POSITION, (before < 0) | (before > last), batch)
    q_ptrs = q_ptr + ((batch64 * stride_qb + q_rows * stride_qm + heads.to(tl.int64) * stride_qh) * VEC)[:, None]
    q = q_ptrs
    if BLOCK_K == 0:
        q = load_turned(
            q_ptrs, row_exists, dims, position_of_rotary, cos_ptr, sin_ptr, stride_rotary, max_position,
            HEADDIM, ROTARY_HALF, INTERLEAVED,
        )  # fmt: skip  # [BLOCK_M, BLOCK_D]
    q2 = q
    if HEADDIM_2 > 0:
        q2_ptrs = (
            q2_ptr + ((batch64 * stride_q2b + q_rows * stride_q2m + heads.to(tl.int64) * stride_q2h) * VEC)[:, None]
        )
        q2 = q2_ptrs
        if BLOCK_K == 0:
            q2_mask = row_exists[:, None] & (dims_2[None, :] < HEADDIM_2)
            q2 = tl.load(q2_ptrs + dims_2[None, :], mask=q2_mask, other=0.0)  # [BLOCK_M, BLOCK_D2]

    first_col, end_col = visible_positions(
        rows, shift, cols_total, window_left, window_right, chunk, MASK_LEFT, MASK_RIGHT, CHUNK
    )  # [BLOCK_M]
    slope_log2 = 0.0
    if ALIBI:
        slope_log2 = load_slope(alibi_ptr, stride_alibi_batch, batch, heads)[:, None]
    WHOLE_PAGES: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0 and leftpad_ptr is None
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if MASK_LEFT or CHUNK:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, q2, k_ptr, k2_ptr, v_ptr, begin, tl.minimum(full_begin, end),
            rows, first_col, end_col, shift, cols_total, first_position, table_ptr, entries, batch, error_ptr,
            stride_kb, stride_kn, stride_vb, stride_vn, scale, softcap_log2, slope_log2,
            row_exists, position_of_rotary, cos_ptr, sin_ptr, stride_rotary, max_position,
            HEADDIM, HEADDIM_V, HEADDIM_2, BLOCK_D, BLOCK_DV, BLOCK_D2, BLOCK_M, BLOCK_N, BLOCK_K,
            ROTARY_HALF, INTERLEAVED, PAGE_SIZE, WHOLE_PAGES, VEC, WIDE,
            True, MASK_LEFT or CHUNK, RAW_SCALE, SOFTCAP, ALIBI, TIES_UP, V_IS_K2, CHECKED,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, q2, k_ptr, k2_ptr, v_ptr, full_begin, full_end,
        rows, first_col, end_col, shift, cols_total, first_position, table_ptr, entries, batch, error_ptr,
        stride_kb, stride_kn, stride_vb, stride_vn, scale, softcap_log2, slope_log2,
        row_exists, position_of_rotary, cos_ptr, sin_ptr, stride_rotary, max_position,
        HEADDIM, HEADDIM_V, HEADDIM_2, BLOCK_D, BLOCK_DV, BLOCK_D2, BLOCK_M, BLOCK_N, BLOCK_K,
        ROTARY_HALF, INTERLEAVED, PAGE_SIZE, WHOLE_PAGES, VEC, WIDE,
        False, MASK_LEFT or CHUNK, RAW_SCALE, SOFTCAP, ALIBI, TIES_UP, V_IS_K2, CHECKED,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, q2, k_ptr, k2_ptr, v_ptr, full_end, end,
        rows, first_col, end_col, shift, cols_total, first_position, table_ptr, entries, batch, error_ptr,
        stride_kb, stride_kn, stride_vb, stride_vn, scale, softcap_log2, slope_log2,
        row_exists, position_of_rotary, cos_ptr, sin_ptr, stride_rotary, max_position,
        HEADDIM, HEADDIM_V, HEADDIM_2, BLOCK_D, BLOCK_DV, BLOCK_D2, BLOCK_M, BLOCK_N, BLOCK_K,
        ROTARY_HALF, INTERLEAVED, PAGE_SIZE, WHOLE_PAGES, VEC, WIDE,
        True, MASK_LEFT or CHUNK, RAW_SCALE, SOFTCAP, ALIBI, TIES_UP, V_IS_K2, CHECKED,
    )  # fmt: skip

    # As in the forward kernel: a row without a key, and one that sees nothing but NaN.
    dead = (row_max == float("-inf")) & (row_sum == 0.0)
    unseen = tl.full([BLOCK_M], float("-inf"), tl.float32)  # softmax_lse of a row without a key
    if sinks_ptr is not None:
        # The first split counts the sink in for all: weighed by its LSE, the combination is right without knowing.
        unseen = tl.where(split == 0, tl.load(sinks_ptr + heads), float("-inf"))
        acc, row_sum, row_max = join_sink(acc, row_sum, row_max, unseen * LOG2E)
    out = tl.where(dead[:, None], 0.0, acc * (1.0 / tl.where(dead, 1.0, row_sum))[:, None])
    lse = tl.where(dead, unseen, (row_max + tl.log2(row_sum)) * LN2)

    out_rows = q_rows
    if cu_seqlens_q_ptr is None:
        out_rows += batch64 * seqlen_q
    lse_ptrs = lse_ptr + batch64 * stride_lb + heads.to(tl.int64) * stride_lh + q_rows * stride_lm + split * stride_ls
    tl.store(lse_ptrs, lse, mask=row_exists)
    dims_v = tl.arange(0, BLOCK_DV)
    out_vectors = (out_rows * stride_om + heads * stride_oh + split * stride_os) * HEADDIM_V
    out_ptrs = out_ptr + out_vectors[:, None] + dims_v[None, :]
    store_tile(out_ptrs, out, packed, rows_total * group_size, dims_v, HEADDIM_V, BLOCK_DV)


@kernel(triton.jit)
def attn_combine_kernel(
    out_partial_ptr, lse_partial_ptr, out_ptr, lse_ptr,
    stride_lb: tl.int64, stride_lh: tl.int64, stride_lm: tl.int64,
    stride_ob: tl.int64, stride_om: tl.int64, stride_oh: tl.int64, stride_os: tl.int64,
    stride_pb: tl.int64, stride_pm: tl.int64, stride_ph: tl.int64, stride_ps: tl.int64,
    seqlen_q: tl.int32, nheads: tl.int32, num_splits: tl.int32,
    HEADDIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One (row, head) of out [HEADDIM_V] and lse from num_splits <= MAX_SPLITS parts.

    Strides: l of lse, o of out_partial, p of lse_partial; out is contiguous.  Parts with LSE -inf are not read.
    """
    pid = tl.program_id(0).to(tl.int64)
    head = pid % nheads
    row = pid // nheads
    batch = row // seqlen_q
    row = row % seqlen_q
    lse_partial_ptr += batch * stride_pb + row * stride_pm + head * stride_ph
    out_partial_ptr += batch * stride_ob + row * stride_om + head * stride_oh
    splits = tl.arange(0, MAX_SPLITS)
    lse_all = tl.load(lse_partial_ptr + splits * stride_ps, mask=splits < num_splits, other=float("-inf"))
    largest = tl.max(lse_all, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(lse_all - base), 0)
    dims = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in tl.range(0, num_splits, BLOCK_S):
        some = first + tl.arange(0, BLOCK_S)
        lse_some = tl.load(lse_partial_ptr + some * stride_ps, mask=some < num_splits, other=float("-inf"))
        weights = tl.exp(lse_some - base)  # [BLOCK_S]
        is_read = (weights > 0.0)[:, None] & (dims[None, :] < HEADDIM_V)
        parts = tl.load(out_partial_ptr + some[:, None] * stride_os + dims[None, :], mask=is_read, other=0.0)
        acc += tl.sum(parts.to(tl.float32) * weights[:, None], 0)
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + batch * stride_lb + head * stride_lh + row * stride_lm, base + tl.log(total))
    out = round_to(out, out_ptr.dtype.element_ty, False)
    tl.store(out_ptr + pid * HEADDIM_V + dims, out, mask=dims < HEADDIM_V)


@kernel(triton.jit)
def kv_append_kernel(
    k_new_ptr, v_new_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr,
    cu_seqlens_new_ptr, seqused_k_ptr, rotary_seqlens_ptr, batch_idx_ptr, table_ptr, error_ptr,
    stride_nb: tl.int64, stride_nm: tl.int64, stride_nh: tl.int64,
    stride_wb: tl.int64, stride_wm: tl.int64, stride_wh: tl.int64,
    stride_kb: tl.int64, stride_kn: tl.int64, stride_kh: tl.int64,
    stride_vb: tl.int64, stride_vn: tl.int64, stride_vh: tl.int64,
    stride_table: tl.int64, stride_rotary: tl.int64, max_position: tl.int32, nheads_k: tl.int32,
    seqlen_k: tl.int32, seqlen_new: tl.int32, capacity: tl.int32, entries: tl.int32, num_blocks: tl.int32,
    HEADDIM: tl.constexpr, HEADDIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr, PAGE_SIZE: tl.constexpr, VEC: tl.constexpr,
    ROTARY_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_T new tokens of one head behind a sequence; what does not fit is not written.

    Strides: n of k_new, w of v_new, k and v of the caches (b between entries or pages).
    """
    pid = tl.program_id(0)
    head = (pid % nheads_k).to(tl.int64)
    pid = pid // nheads_k
    block = pid % num_blocks
    batch = pid // num_blocks
    start_new, tokens_total = sequence_bounds(cu_seqlens_new_ptr, batch, seqlen_new, cu_seqlens_new_ptr is not None)
    if block * BLOCK_T >= tokens_total:
        return
    _, cached = cached_length(batch, seqlen_k, capacity, None, seqused_k_ptr, error_ptr, CHECKED)
    if seqused_k_ptr is not None:
        # A negative length is no place: nothing is written, where clamped it would be over the first tokens.
        cached = tl.where(tl.load(seqused_k_ptr + batch) < 0, capacity, cached)
    if CHECKED:
        report(error_ptr, BAD_LENGTH, cached + tokens_total > capacity, batch)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    position = cached + tokens
    exists = (tokens < tokens_total) & (position < capacity)
    if PAGE_SIZE > 0:
        page = tl.load(table_ptr + batch.to(tl.int64) * stride_table + position // PAGE_SIZE, mask=exists, other=0)
        if CHECKED:
            exists = exists & (page >= 0) & (page < entries)
        entry = checked_page(page, entries, batch, error_ptr, CHECKED)
        slot = (position % PAGE_SIZE).to(tl.int64)
    else:
        entry = entry_of(batch, entries, batch_idx_ptr, error_ptr, CHECKED)
        if CHECKED and batch_idx_ptr is not None:
            index = tl.load(batch_idx_ptr + batch) + tokens * 0  # a block, as the interpreter needs it for a mask
            exists = exists & (index >= 0) & (index < entries)
        slot = position.to(tl.int64)
    before = cached
    if rotary_seqlens_ptr is not None:
        before = tl.load(rotary_seqlens_ptr + batch)
    if CHECKED and ROTARY_HALF > 0:
        report(error_ptr, BAD_POSITION, (before < 0) | (before > max_position - tokens_total), batch)
    new_rows = (start_new + tokens).to(tl.int64)
    batch64 = batch.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    k_new_ptrs = k_new_ptr + ((batch64 * stride_nb + new_rows * stride_nm + head * stride_nh) * VEC)[:, None]
    k = load_turned(
        k_new_ptrs, exists, dims, before + tokens, cos_ptr, sin_ptr, stride_rotary, max_position,
        HEADDIM, ROTARY_HALF, INTERLEAVED,
    )  # fmt: skip  # [BLOCK_T, BLOCK_D]
    k_ptrs = k_ptr + ((entry * stride_kb + slot * stride_kn + head * stride_kh) * VEC)[:, None] + dims[None, :]
    tl.store(k_ptrs, k, mask=exists[:, None] & (dims[None, :] < HEADDIM))
    dims_v = tl.arange(0, BLOCK_DV)
    is_value = exists[:, None] & (dims_v[None, :] < HEADDIM_V)
    v_new_ptrs = v_new_ptr + ((batch64 * stride_wb + new_rows * stride_wm + head * stride_wh) * VEC)[:, None]
    v = tl.load(v_new_ptrs + dims_v[None, :], mask=is_value)
    v_ptrs = v_ptr + ((entry * stride_vb + slot * stride_vn + head * stride_vh) * VEC)[:, None] + dims_v[None, :]
    tl.store(v_ptrs, v, mask=is_value)
