"""LayerNorm (Ba, Kiros, Hinton 2016) and RMSNorm (Zhang, Sennrich 2019) with the sum before them, forward and backward.

A row of the sum is ``dropout(x * rowscale) + dropout(x1) + residual``; it has one result for each of two
sets of weights.  A pointer that a call does not need is None.
"""

import triton
import triton.language as tl

from .common import dropout_keep, round_to
from .jit import kernel


@triton.jit
def _kept(x, mask_ptr, rng_ptr, row, cols, row_offset, inside, threshold, rescale, WHICH: tl.constexpr):
    """Dropout of a row: what is kept, scaled; the mask is written where it is asked for."""
    keep = dropout_keep(rng_ptr, row, cols, WHICH, threshold)
    if mask_ptr is not None:
        tl.store(mask_ptr + row_offset + cols, keep.to(tl.uint8), mask=inside)
    return tl.where(keep, x * rescale, 0.0)


@triton.jit
def _weight(weight_ptr, cols, inside, ZERO_CENTERED: tl.constexpr):
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


@triton.jit
def _store_result(out_ptr, normalised, weight_ptr, bias_ptr, row_offset, cols, inside, ZERO_CENTERED: tl.constexpr):
    y = normalised * _weight(weight_ptr, cols, inside, ZERO_CENTERED)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_offset + cols, round_to(y, out_ptr.dtype.element_ty, False), mask=inside)


@kernel(triton.jit)
def norm_fwd_kernel(
    x_ptr, residual_ptr, x1_ptr, rowscale_ptr, rng_ptr, weight_ptr, bias_ptr, weight1_ptr, bias1_ptr,
    out_ptr, out1_ptr, sum_ptr, mean_ptr, rstd_ptr, mask_ptr, mask1_ptr,
    columns: tl.int32, eps: tl.float32, dropout_threshold: tl.int32, rescale: tl.float32,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """One row; columns counts VEC elements."""
    row = tl.program_id(0)
    count = columns * VEC
    cols = tl.arange(0, BLOCK_N)
    inside = cols < count
    row_offset = row.to(tl.int64) * count
    x = tl.load(x_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
    if rowscale_ptr is not None:
        x *= tl.load(rowscale_ptr + row).to(tl.float32)
    if rng_ptr is not None:
        x = _kept(x, mask_ptr, rng_ptr, row, cols, row_offset, inside, dropout_threshold, rescale, 0)
    if x1_ptr is not None:
        x1 = tl.load(x1_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            x1 = _kept(x1, mask1_ptr, rng_ptr, row, cols, row_offset, inside, dropout_threshold, rescale, 1)
        x += x1
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
    if sum_ptr is not None:
        rounded = round_to(x, sum_ptr.dtype.element_ty, False)
        tl.store(sum_ptr + row_offset + cols, rounded, mask=inside)
        # The backward sees the stored sum: normalising the same numbers keeps both consistent.
        x = rounded.to(tl.float32)
    centred = x
    if not RMS:
        mean = tl.sum(x, axis=0) / count
        tl.store(mean_ptr + row, mean)
        centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / count + eps)
    tl.store(rstd_ptr + row, rstd)
    normalised = centred * rstd
    _store_result(out_ptr, normalised, weight_ptr, bias_ptr, row_offset, cols, inside, ZERO_CENTERED)
    if out1_ptr is not None:
        _store_result(out1_ptr, normalised, weight1_ptr, bias1_ptr, row_offset, cols, inside, ZERO_CENTERED)


@kernel(triton.jit)
def norm_bwd_kernel(
    sum_ptr, dy_ptr, dy1_ptr, dsum_ptr, rowscale_ptr, rng_ptr, weight_ptr, weight1_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dx1_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, dweight1_ptr, dbias1_ptr,
    rows: tl.int32, columns: tl.int32, programs: tl.int32, dropout_threshold: tl.int32, rescale: tl.float32,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """Every programs-th row.  Gradients of weights are sums over the rows of a program, (programs, columns) float32.

    dsum is the gradient of the sum as a result of its own; the rest of the names are those of the forward.
    """
    pid = tl.program_id(0)
    count = columns * VEC
    cols = tl.arange(0, BLOCK_N)
    inside = cols < count
    weight = _weight(weight_ptr, cols, inside, ZERO_CENTERED)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    if dy1_ptr is not None:
        weight1 = _weight(weight1_ptr, cols, inside, ZERO_CENTERED)
        dweight1 = tl.zeros([BLOCK_N], tl.float32)
        dbias1 = tl.zeros([BLOCK_N], tl.float32)
    for row in tl.range(pid, rows, programs):
        row_offset = tl.cast(row, tl.int64) * count
        x = tl.load(sum_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if not RMS:
            x = tl.where(inside, x - tl.load(mean_ptr + row), 0.0)
        normalised = x * rstd
        dweight += dy * normalised
        if dbias_ptr is not None:
            dbias += dy
        dnormalised = dy * weight
        if dy1_ptr is not None:
            dy1 = tl.load(dy1_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
            dweight1 += dy1 * normalised
            if dbias1_ptr is not None:
                dbias1 += dy1
            dnormalised += dy1 * weight1
        dx = dnormalised - normalised * (tl.sum(dnormalised * normalised, axis=0) / count)
        if not RMS:
            dx -= tl.sum(dnormalised, axis=0) / count
        dx *= rstd
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row_offset + cols, mask=inside, other=0.0).to(tl.float32)
        if dresidual_ptr is not None:
            dresidual = round_to(dx, dresidual_ptr.dtype.element_ty, False)
            tl.store(dresidual_ptr + row_offset + cols, dresidual, mask=inside)
        if dx1_ptr is not None:
            dx1 = dx
            if rng_ptr is not None:
                dx1 = _kept(dx, None, rng_ptr, row, cols, row_offset, inside, dropout_threshold, rescale, 1)
            tl.store(dx1_ptr + row_offset + cols, round_to(dx1, dx1_ptr.dtype.element_ty, False), mask=inside)
        if rng_ptr is not None:
            dx = _kept(dx, None, rng_ptr, row, cols, row_offset, inside, dropout_threshold, rescale, 0)
        if rowscale_ptr is not None:
            dx *= tl.load(rowscale_ptr + row).to(tl.float32)
        tl.store(dx_ptr + row_offset + cols, round_to(dx, dx_ptr.dtype.element_ty, False), mask=inside)
    part_offset = pid.to(tl.int64) * count
    tl.store(dweight_ptr + part_offset + cols, dweight, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part_offset + cols, dbias, mask=inside)
    if dy1_ptr is not None:
        tl.store(dweight1_ptr + part_offset + cols, dweight1, mask=inside)
        if dbias1_ptr is not None:
            tl.store(dbias1_ptr + part_offset + cols, dbias1, mask=inside)
