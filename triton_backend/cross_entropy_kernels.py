"""Softmax cross entropy of rows of logits, forward and backward; a row is read once in each."""

import triton
import triton.language as tl

from .common import round_to
from .jit import kernel


@kernel(triton.jit)
def cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, given_lse_ptr, loss_ptr, lse_ptr, z_loss_ptr,
    stride: tl.int64, classes: tl.int32, smoothing: tl.float32, logit_scale: tl.float32,
    lse_square_scale: tl.float32, ignore_index: tl.int64,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    logits_ptr += row.to(tl.int64) * stride * VEC
    cols = tl.arange(0, BLOCK_N)
    # Lane by lane: the lanes are joined once, behind the loop.
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    logits_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, classes, BLOCK_N):
        inside = start + cols < classes
        logits = tl.load(logits_ptr + start + cols, mask=inside, other=float("-inf")).to(tl.float32) * logit_scale
        logits = tl.where(inside, logits, float("-inf"))  # a scale of 0 or below turns -inf over
        logits_sum += tl.where(inside, logits, 0.0)
        new_largest = tl.maximum(largest, logits)
        subtract = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - subtract) + tl.exp(logits - subtract)
        largest = new_largest
    top = tl.max(largest, axis=0)
    subtract = tl.where(top == float("-inf"), 0.0, top)
    lse = subtract + tl.log(tl.sum(total * tl.exp(largest - subtract), axis=0))
    if given_lse_ptr is not None:
        lse = tl.load(given_lse_ptr + row)
    tl.store(lse_ptr + row, lse)
    loss = 0.0
    z_loss = 0.0
    if label != ignore_index:
        z_loss = lse_square_scale * lse * lse
        loss = lse + z_loss
        if (label >= 0) & (label < classes):
            loss -= (1.0 - smoothing) * tl.load(logits_ptr + label).to(tl.float32) * logit_scale
        else:
            loss = float("nan")
        if smoothing > 0.0:
            loss -= smoothing * tl.sum(logits_sum, axis=0) / classes
    tl.store(loss_ptr + row, loss)
    tl.store(z_loss_ptr + row, z_loss)


@kernel(triton.jit)
def cross_entropy_bwd_kernel(
    logits_ptr, labels_ptr, lse_ptr, dloss_ptr, dlogits_ptr,
    stride: tl.int64, stride_out: tl.int64, stride_dloss: tl.int64, classes: tl.int32, num_blocks: tl.int32,
    smoothing: tl.float32, logit_scale: tl.float32, lse_square_scale: tl.float32, ignore_index: tl.int64,
    BLOCK_N: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """BLOCK_N classes of one row; dlogits may be logits."""
    pid = tl.program_id(0)
    row = pid // num_blocks
    cols = (pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < classes
    row64 = row.to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits = tl.load(logits_ptr + row64 * stride * VEC + cols, mask=inside, other=0.0).to(tl.float32) * logit_scale
    lse = tl.load(lse_ptr + row)
    dloss = tl.where(label != ignore_index, tl.load(dloss_ptr + row64 * stride_dloss), 0.0)
    wanted = smoothing / classes + tl.where(cols == label, 1.0 - smoothing, 0.0)
    gradient = tl.exp(logits - lse) * (1.0 + 2.0 * lse_square_scale * lse) - wanted
    # Not a product with 0, which would keep the NaN of an ignored row.
    gradient = tl.where(label != ignore_index, gradient * (dloss * logit_scale), 0.0)
    out = round_to(gradient, dlogits_ptr.dtype.element_ty, False)
    tl.store(dlogits_ptr + row64 * stride_out * VEC + cols, out, mask=inside)
