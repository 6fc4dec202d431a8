"""The rotary position embedding (Su et al. 2021, arXiv:2104.09864) as a kernel of its own."""

import triton
import triton.language as tl

from .common import round_to, sequence_bounds
from .jit import kernel


@kernel(triton.jit)
def rotary_kernel(
    out_ptr, x_ptr, cos_ptr, sin_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_ob: tl.int64, stride_om: tl.int64, stride_oh: tl.int64,
    stride_xb: tl.int64, stride_xm: tl.int64, stride_xh: tl.int64,
    seqlen: tl.int32, nheads: tl.int32, table_len: tl.int32, offset: tl.int32,
    num_blocks: tl.int32, head_blocks: tl.int32,
    HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, VEC: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M positions of BLOCK_H heads; out may be x.  Positions that the table does not have are copied."""
    pid = tl.program_id(0)
    # The heads of a block of positions are neighbours, and find its part of the table in cache.
    first_head = (pid % head_blocks) * BLOCK_H
    block = (pid // head_blocks) % num_blocks
    batch = pid // (head_blocks * num_blocks)
    start, length = sequence_bounds(cu_seqlens_ptr, batch, seqlen, cu_seqlens_ptr is not None)
    first_row = block * BLOCK_M
    if first_row >= length:
        return
    if offsets_ptr is not None:
        offset = tl.load(offsets_ptr + batch).to(tl.int32)
    rows = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_R)
    positions = rows + offset
    inside = (rows < length)[:, None] & (dims < HALF)[None, :]  # [BLOCK_M, BLOCK_R]
    known = inside & ((positions >= 0) & (positions < table_len))[:, None]
    table = positions.to(tl.int64)[:, None] * HALF + dims[None, :]
    cos = tl.load(cos_ptr + table, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=known, other=0.0).to(tl.float32)
    if CONJUGATE:
        sin = -sin
    batch64 = batch.to(tl.int64)
    rows64 = (start + rows).to(tl.int64)[:, None]
    for head in tl.range(first_head, tl.minimum(first_head + BLOCK_H, nheads)):
        head64 = tl.cast(head, tl.int64)
        x_rows = x_ptr + (batch64 * stride_xb + head64 * stride_xh + rows64 * stride_xm) * VEC
        out_rows = out_ptr + (batch64 * stride_ob + head64 * stride_oh + rows64 * stride_om) * VEC
        if INTERLEAVED:
            both = tl.arange(0, 2 * BLOCK_R)
            both_inside = (rows < length)[:, None] & (both < 2 * HALF)[None, :]
            pairs = tl.load(x_rows + both[None, :], mask=both_inside, other=0.0).to(tl.float32)
            x0, x1 = tl.split(tl.reshape(pairs, [BLOCK_M, BLOCK_R, 2]))
            turned = tl.reshape(tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos), [BLOCK_M, 2 * BLOCK_R])
            tl.store(out_rows + both[None, :], round_to(turned, out_ptr.dtype.element_ty, False), mask=both_inside)
        else:
            x0 = tl.load(x_rows + dims[None, :], mask=inside, other=0.0).to(tl.float32)
            x1 = tl.load(x_rows + HALF + dims[None, :], mask=inside, other=0.0).to(tl.float32)
            out0 = round_to(x0 * cos - x1 * sin, out_ptr.dtype.element_ty, False)
            out1 = round_to(x0 * sin + x1 * cos, out_ptr.dtype.element_ty, False)
            tl.store(out_rows + dims[None, :], out0, mask=inside)
            tl.store(out_rows + HALF + dims[None, :], out1, mask=inside)
