"""What a TMA copy is told of a matrix, on the host: addresses, bounds and the tile that one copy takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

#: Coordinates in a descriptor are 32-bit numbers.
_END = 1 << 31


class Matrix(NamedTuple):
    """(batch, seqlen, nheads, headdim), or (total, nheads, headdim), as rows of all heads; strides in elements.

    Row batch * (stride of batch / stride of row) + position, column head * stride of head: so any layout whose batch
    stride is a multiple of its row stride is one, also where rows overlap.
    """

    rows: int
    cols: int
    stride: int


def matrix_of(x: torch.Tensor) -> Matrix | None:
    """The tensor as a matrix, None if it is none."""
    *outer, nheads, headdim = x.shape
    batch, seqlen = outer if len(outer) == 2 else (1, outer[0])
    *batch_stride, row, head, _ = x.stride()
    if x.numel() == 0 or row <= 0 or head < 0:
        return None
    step = batch_stride[0] if batch > 1 else 0
    rows, cols = (batch - 1) * (step // row) + seqlen, (nheads - 1) * head + headdim
    if step < 0 or step % row or rows >= _END or cols >= _END:
        return None
    return Matrix(rows, cols, row)


def required_matrix(x: torch.Tensor | None) -> Matrix:
    """The tensor as a matrix, which the choice of the kernel has made sure that it is."""
    found = None if x is None else matrix_of(x)
    if found is None:
        raise ValueError(f"expected a tensor that is a matrix of all heads, got {x if x is None else x.stride()}")
    return found


class Tile(NamedTuple):
    """Rows and columns of one copy; in shared memory it has the swizzle of matrix products."""

    dtype: torch.dtype
    rows: int
    cols: int

    def of(self, x: torch.Tensor | None) -> TensorDescriptor:
        """Triton's descriptor of a tensor that is copied in such tiles."""
        matrix = required_matrix(x)
        return TensorDescriptor(x, [matrix.rows, matrix.cols], [matrix.stride, 1], [self.rows, self.cols], _layout())

    def specialisation(self) -> Any:
        """What Triton specialises a kernel on for such an argument."""
        some = TensorDescriptor(_Address(16, self.dtype), [1, self.cols], [self.cols, 1], [*self[1:]], _layout())
        return native_specialize_impl(BaseBackend, some, False, True, True)


def _layout() -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


class _Address:
    """As much of a tensor as a descriptor asks for."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Known:
    """As much of a descriptor as a launch of a compiled kernel asks for: Triton's checks take longer than all of it."""

    __slots__ = ("address", "shape", "strides")

    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.address, self.shape, self.strides = address, shape, strides

    @property
    def base(self) -> Known:
        """As much of the tensor as is asked for; one object is made in less time than two."""
        return self

    def data_ptr(self) -> int:
        return self.address
