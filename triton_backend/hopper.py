"""What the Gluon kernels for Hopper share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

#: Their names since Triton 3.9, and before.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
#: Of a warpgroup, each of which arrives when its copies have.
THREADS = gl.constexpr(128)


@gluon.jit
def copy_rows(buffer, ptr, stride, rows_left, ROWS: gl.constexpr, DIMS: gl.constexpr):
    """A warpgroup starts the copy of [ROWS, DIMS] 16-bit numbers; rows from rows_left on become 0."""
    LANES: gl.constexpr = DIMS // 8 if DIMS < 256 else 32
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, DIMS, layout=gl.SliceLayout(0, layout))
    ptrs = ptr + rows[:, None].to(gl.int64) * stride + dims[None, :]
    copy(buffer, ptrs, mask=(rows < rows_left)[:, None])
