"""What the Gluon kernels for Hopper share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

#: Their names since Triton 3.9, and before.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def row_layout(dims):
    """Which thread of a warpgroup copies which 8 numbers of rows of so many 16-bit numbers."""
    lanes = min(dims // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def copy_at(buffer, rows, exists, DIMS: gl.constexpr):
    """A warpgroup starts the copy of DIMS numbers from each of the row starts; rows that do not exist become 0."""
    dims = gl.arange(0, DIMS, layout=gl.SliceLayout(0, row_layout(DIMS)))
    copy(buffer, rows[:, None] + dims[None, :], mask=exists[:, None])
