"""What the Gluon kernels for Hopper share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

#: Their names since Triton 3.9, and before.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

#: Rows of one multiplying warpgroup.
ROWS = gl.constexpr(64)


@gluon.constexpr_function
def row_layout(dims):
    """Which thread of a warpgroup copies which 8 numbers of rows of so many 16-bit numbers."""
    lanes = min(dims // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def copy_at(buffer, rows, exists, DIMS: gl.constexpr):
    """A warpgroup starts the copy of DIMS numbers from each of the row starts; rows that do not exist become 0.

    64 dims of a row at a time: so a thread has few rows, whose starts stay in registers.
    """
    dims = gl.arange(0, DIMS, layout=gl.SliceLayout(0, row_layout(64)))
    copy(buffer, rows[:, None] + dims[None, :], mask=exists[:, None])


@gluon.jit
def clear_from(tile, rows_left, TILE_ROWS: gl.constexpr):
    """A warp or a warpgroup sets rows of a tile to 0 from row rows_left on: what lies behind a sequence can be NaN."""
    ROWS_AT_ONCE: gl.constexpr = 16 if gl.num_warps() == 4 else 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, ROWS_AT_ONCE, layout=gl.SliceLayout(1, layout))
    for first in gl.static_range(0, TILE_ROWS, ROWS_AT_ONCE):
        if first + ROWS_AT_ONCE > rows_left:
            part = tile.slice(first, ROWS_AT_ONCE, dim=0)
            x = part.load(layout)
            part.store(gl.where((first + rows < rows_left)[:, None], x, 0.0).to(tile.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def init_ring(full, empty, STAGES: gl.constexpr, READERS: gl.constexpr = 2):
    """Barriers of a ring that one warp fills and so many warpgroups empty."""
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)


@gluon.jit
def fill(desc, row, col, tile, ring, full, empty, STAGES: gl.constexpr):
    """Copy a tile into its place in a ring, once that is free."""
    stage = tile % STAGES
    mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), ring.shape[1] * ring.shape[2] * 2)
    load(desc, [row, col], full.index(stage), ring.index(stage))
