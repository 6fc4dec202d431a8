"""Device functions that the forward, backward and probability kernels share.

Conventions of every kernel here:

* Rows are queries, columns are keys.  ``shift = seqlen_k - seqlen_q`` aligns masks to the bottom
  right: row i sees columns [i + shift - window_left, i + shift + window_right].
* Strides arrive in units of ``VEC`` elements, ``VEC`` being a constant that divides all of them (16
  bytes where the layout allows it).  The compiler so knows the alignment of every address without
  specialising on the values of strides.
* Batch and head offsets are 64-bit; offsets inside a tile are 32-bit unless ``WIDE``.
* Scores are kept in log2 units: softmax uses exp2, softmax_lse is converted at the border.
"""

import triton
import triton.language as tl

from flash_rocm.runtime import triton_interpret

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Triton's interpreter multiplies bfloat16 in tl.dot as if it were integers, and truncates to it.
INTERPRET = tl.constexpr(triton_interpret())


@triton.jit
def tile_of_program(num_blocks, num_heads_total, NUM_XCDS: tl.constexpr):
    """Map the program id to (block, batch * heads index); the blocks of one head are neighbours.

    Hardware deals consecutive workgroups round-robin to the XCDs of multi-die chips.  Undoing that
    gives each XCD, with its own L2 cache, whole heads, so that the blocks of one head find their
    K and V in cache.
    """
    pid = tl.program_id(0)
    if NUM_XCDS > 1:
        total = num_blocks * num_heads_total
        xcd = pid % NUM_XCDS
        pid = xcd * (total // NUM_XCDS) + tl.minimum(xcd, total % NUM_XCDS) + pid // NUM_XCDS
    return pid % num_blocks, pid // num_blocks


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; full precision also for float32 operands."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr, TIES_UP: tl.constexpr):
    """Round float32 to nearest; ties to even, or with TIES_UP (bfloat16 only) away from zero.

    Chips without a conversion instruction take five instructions to find the even one and keep NaN; ties
    are too rare in P and dS to bias a sum.  TIES_UP keeps inf, and every NaN that arithmetic makes or that
    came as a half-precision number.
    """
    if TIES_UP:
        bits = x.to(tl.int32, bitcast=True) + 0x8000
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def sequence_bounds(cu_seqlens_ptr, batch, seqlen, VARLEN: tl.constexpr):
    """Start row (relative to the batch entry for dense) and length of one sequence."""
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + batch)
        return start, tl.load(cu_seqlens_ptr + batch + 1) - start
    return tl.cast(0, tl.int32), seqlen


@triton.jit
def tile_offsets(rows, stride, dims, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Element offsets [len(rows), len(dims)] of a tile from its first row."""
    if WIDE:
        offsets = rows.to(tl.int64)[:, None] * stride * VEC
    else:
        offsets = rows[:, None] * (stride * VEC)
    return offsets + dims[None, :]


@triton.jit
def load_tile(ptrs, rows, row_limit, dims, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Load [rows, BLOCK_D]; rows beyond row_limit and dims beyond HEADDIM read as 0."""
    if MASK_ROWS:
        mask = rows[:, None] < row_limit
        if HEADDIM != BLOCK_D:
            mask = mask & (dims[None, :] < HEADDIM)
        return tl.load(ptrs, mask=mask, other=0.0)
    if HEADDIM != BLOCK_D:
        return tl.load(ptrs, mask=dims[None, :] < HEADDIM, other=0.0)
    return tl.load(ptrs)


@triton.jit
def dot_by_chunks(
    a_ptr, a_rows, a_limit, stride_a, b_ptr, b_rows, b_limit, stride_b,
    A: tl.constexpr, B: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK_B: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """a @ b^T [A, B] over the head dim, BLOCK_K dims at a time; a_ptr and b_ptr are the first rows of two tiles.

    For chips whose registers do not hold a whole left operand: both are read anew, mostly from cache.
    """
    CHUNK: tl.constexpr = BLOCK_K if BLOCK_K < BLOCK_D else BLOCK_D
    # Chips that need this multiply float32 without matrix instructions: unrolled, that would spill again.
    UNROLL: tl.constexpr = 1 if a_ptr.dtype.element_ty == tl.float32 else BLOCK_D // CHUNK
    # One chain of so many float32 additions is several times less exact than sums of partial sums.
    PARTIAL_SUMS: tl.constexpr = a_ptr.dtype.element_ty == tl.float32 and BLOCK_D > 256
    a_in_tile = tl.arange(0, A)
    b_in_tile = tl.arange(0, B)
    result = tl.zeros([A, B], tl.float32)
    for first in tl.range(0, BLOCK_D, CHUNK, num_stages=1, loop_unroll_factor=UNROLL):
        dims = first + tl.arange(0, CHUNK)
        a = load_tile(
            a_ptr + tile_offsets(a_in_tile, stride_a, dims, VEC, WIDE), a_rows, a_limit, dims, HEADDIM, BLOCK_D, True
        )  # [A, CHUNK]
        b = load_tile(
            b_ptr + tile_offsets(b_in_tile, stride_b, dims, VEC, WIDE), b_rows, b_limit, dims, HEADDIM, BLOCK_D, MASK_B
        )  # [B, CHUNK]
        if PARTIAL_SUMS:
            # Triton would make one chain again of an addition.
            result -= dot(a, tl.trans(b), None)
        else:
            result = dot(a, tl.trans(b), result)
    return -result if PARTIAL_SUMS else result


@triton.jit
def store_tile(ptrs, value, rows, row_limit, dims, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [rows, HEADDIM] of a padded tile, cast to the pointers' type."""
    mask = rows[:, None] < row_limit
    if HEADDIM != BLOCK_D:
        mask = mask & (dims[None, :] < HEADDIM)
    tl.store(ptrs, round_to(value, ptrs.dtype.element_ty, False), mask=mask)


@triton.jit
def visible_keys(rows, shift, seqlen_k, window_left, window_right, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr):
    """First and last column that each row sees."""
    first = rows * 0
    last = rows * 0 + (seqlen_k - 1)
    if MASK_LEFT:
        first = rows + shift - window_left
    if MASK_RIGHT:
        last = tl.minimum(last, rows + shift + window_right)
    return first, last


@triton.jit
def between(index, first, last, CHECK_FIRST: tl.constexpr, CHECK_LAST: tl.constexpr):
    """Mask of first <= index <= last, which broadcast against each other.

    Relative to its tile, index is made of a constant and the lane; what changes from tile to tile is better
    in first and last, of which a lane holds few.
    """
    if CHECK_FIRST and CHECK_LAST:
        return (index >= first) & (index <= last)
    if CHECK_FIRST:
        return index >= first
    return index <= last


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh through exp2; PRECISE adds a series near 0, where 1 - 2 / (e^2x + 1) cancels."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    if PRECISE:
        # Continued fraction of tanh (Lambert), relative error < 1e-8 for |x| < 0.7.
        x2 = x * x
        near = x * (10395.0 + x2 * (1260.0 + x2 * 21.0)) / (10395.0 + x2 * (4725.0 + x2 * (210.0 + x2)))
        return tl.where(tl.abs(x) < 0.7, near, far)
    return far


@triton.jit
def modified_scores(
    qk, rows, cols, shift, scale, softcap_log2, slope_log2,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Scores in log2 units after scale, softcap and ALiBi.

    scale is softmax_scale * log2(e), or softmax_scale / softcap where softcap is on.
    """
    s = qk * scale
    if SOFTCAP:
        s = softcap_log2 * tanh(s, PRECISE)
    if ALIBI:
        s -= slope_log2 * tl.abs(rows + shift - cols).to(tl.float32)
    return s


@triton.jit
def dropout_keep(rng_ptr, rows, cols, head_index, threshold):
    """Philox-4x32-10 (Salmon et al. 2011): one draw per (row, column, batch * nheads + head)."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1).to(tl.int32)
    random, _, _, _ = tl.philox(seed, cols, rows, head_index, offset)
    return (random >> 1).to(tl.int32) >= threshold


@triton.jit
def join_sink(acc, row_sum, row_max, sink_log2):
    """Count the sink in, a key without a value: acc [BLOCK_M, BLOCK_DV]; row_sum, row_max [BLOCK_M]."""
    new_max = tl.maximum(row_max, sink_log2)
    subtract = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - subtract)
    row_sum = row_sum * rescale + tl.exp2(sink_log2 - subtract)
    return acc * rescale[:, None], row_sum, new_max


@triton.jit
def load_slope(alibi_ptr, stride_alibi_batch, batch, head):
    """ALiBi slope of one head in log2 units."""
    return tl.load(alibi_ptr + batch * stride_alibi_batch + head) * LOG2E


@triton.jit
def key_ranges(
    first_row, last_row, shift, seqlen_k, window_left, window_right,
    BLOCK_N: tl.constexpr, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
):  # fmt: skip
    """Columns that rows [first_row, last_row] need: masked [a, b), full [b, c), masked [c, d).

    a, b and c are multiples of BLOCK_N.  In [b, c) every row sees every column.
    """
    end = seqlen_k
    full_end = seqlen_k
    if MASK_RIGHT:
        end = tl.maximum(tl.minimum(end, last_row + shift + window_right + 1), 0)
        full_end = tl.maximum(tl.minimum(full_end, first_row + shift + window_right + 1), 0)
    begin = 0
    full_begin = 0
    if MASK_LEFT:
        begin = (tl.maximum(first_row + shift - window_left, 0) // BLOCK_N) * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_row + shift - window_left, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
        full_begin = tl.maximum(full_begin, begin)
    full_end = tl.maximum((full_end // BLOCK_N) * BLOCK_N, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def query_ranges(
    first_col, shift, seqlen_q, seqlen_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK_LEFT: tl.constexpr, MASK_RIGHT: tl.constexpr,
):  # fmt: skip
    """Rows that columns [first_col, first_col + BLOCK_N) need: masked [a, b), full [b, c), masked [c, d).

    a, b and c are multiples of BLOCK_M.  In [b, c) every row exists and sees every column.
    """
    begin = 0
    full_begin = 0
    if MASK_RIGHT:
        begin = (tl.maximum(first_col - shift - window_right, 0) // BLOCK_M) * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(first_col + BLOCK_N - 1 - shift - window_right, 0), BLOCK_M) * BLOCK_M
    end = seqlen_q
    full_end = seqlen_q
    if MASK_LEFT:
        last_col = tl.minimum(first_col + BLOCK_N, seqlen_k) - 1
        end = tl.maximum(tl.minimum(end, last_col - shift + window_left + 1), 0)
        full_end = tl.maximum(tl.minimum(full_end, first_col - shift + window_left + 1), 0)
    full_begin = tl.maximum(tl.minimum(full_begin, tl.cdiv(end, BLOCK_M) * BLOCK_M), begin)
    full_end = tl.maximum((full_end // BLOCK_M) * BLOCK_M, full_begin)
    return begin, full_begin, full_end, end
