"""What is compiled is remembered and launched again: the way of every Triton kernel to the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton

from flash_rocm import runtime, virtual_device

from . import prebuilt, virtual
from .common import INTERPRET
from .compile import BUFFER_BYTES
from .descriptors import Known, Tile, required_matrix
from .plan import Launchable

_KNOWN_MAX = 4096
#: What torch.cuda.current_device asks, without its check that CUDA has started, which a known launch implies.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_IS_HIP = bool(torch.version.hip)
_hooks = triton.knobs.runtime

Strides = tuple[int, int, int]
Tensors = tuple[torch.Tensor | None, ...]
#: From the constants of a kernel to (rows, dims) of its copies of the first tensors, None for one it has a pointer to.
TileRows = Callable[[Mapping[str, Any]], tuple[tuple[int, int] | None, ...]]


class Call(NamedTuple):
    """What launching one kernel takes, the first time."""

    plan: Launchable
    programs: int  # workgroups
    tensors: Tensors
    lse_strides: tuple[int, ...]  # two, or none
    scalars: tuple[int | float, ...]  # behind the strides of softmax_lse; they follow from problem and strides
    constants: dict[str, Any]  # VEC, WIDE and what else does not follow from the problem
    tiles: tuple[Tile | None, ...] = ()  # by which the kernel copies the first tensors, where it takes descriptors

    def arguments(self) -> tuple[Any, ...]:
        """Tensors and descriptors of them, in the kernel's order."""
        described = (x if tile is None else tile.of(x) for tile, x in zip(self.tiles, self.tensors, strict=False))
        return (*described, *self.tensors[len(self.tiles) :])


class _Known:
    """A compiled kernel with everything its launch takes but what is new at each call."""

    __slots__ = ("compiled", "index", "programs", "run", "function", "metadata", "tail", "stream_of", "matrices")

    def __init__(self, compiled: Any, index: int, call: Call, tail: tuple[Any, ...]) -> None:
        self.compiled, self.index, self.programs, self.tail = compiled, index, call.programs, tail
        # Of those of the first arguments that are descriptors, by their place.
        self.matrices = tuple(
            (n, (matrix.rows, matrix.cols), (matrix.stride, 1))
            for n, tile in enumerate(call.tiles)
            if tile is not None and (matrix := required_matrix(call.tensors[n]))
        )
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.stream_of = triton.runtime.driver.active.get_current_stream


class Launcher:
    """Launches one kernel, remembering what was compiled for which call.

    Triton works out the specialisation of every argument at every launch, which takes longer on the
    host than a small kernel does on the GPU.  Lengths, counts and strides of these kernels are not
    specialised at all, so that all a compiled kernel depends on is its constants and, of its
    pointers, alignment and (on AMD) extent.  The key of a call holds these, and all that its
    run-time numbers follow from; a known key launches without looking at anything again.
    """

    def __init__(self, kernel: Any, gluon: Any = None, tile_rows: TileRows | None = None) -> None:
        self.kernel = kernel
        self.gluon = gluon
        self._tile_rows = tile_rows
        self._known: dict[tuple[Any, ...], _Known] = {}
        #: Triton's hashes of the compiled kernels that were launched.
        self.compiled: set[str] = set()

    def launch_known(self, key: tuple[Any, ...], fresh: list[Any], totals: tuple[int, ...] = ()) -> bool:
        """Launch what :meth:`launch_new` remembered under ``key``; False if nothing was.

        Args:
            fresh: what is no part of the key: pointers, and strides of softmax_lse, which for varlen
                follow from the total of the lengths.
            totals: rows of the first pointers, where they follow from that total too.
        """
        known = self._known.get(key)
        if known is None:
            return False
        if known.index != _current_device():
            with torch.cuda.device(known.index):
                return self.launch_known(key, fresh, totals)
        if known.matrices:
            for n, shape, strides in known.matrices:
                fresh[n] = Known(fresh[n], (totals[n], shape[1]) if totals else shape, strides)
        if _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:
            # A profiler wants to see the launch: the way that calls its hooks.
            known.compiled[(known.programs, 1, 1)](*fresh, *known.tail)
            return True
        stream, metadata = known.stream_of(known.index), known.metadata
        known.run(known.programs, 1, 1, stream, known.function, metadata, None, None, None, *fresh, *known.tail)
        return True

    def launch_new(self, key: tuple[Any, ...] | None, call: Call) -> None:
        """Compile if needed, launch, remember under ``key`` unless that is None."""
        if INTERPRET.value != runtime.triton_interpret():
            raise RuntimeError(
                "TRITON_INTERPRET: expected the value it had when the kernels were imported, "
                f"{int(INTERPRET.value)}, got {int(runtime.triton_interpret())}. Hint: set it before Python starts."
            )
        current, programs, tensors = call.plan, call.programs, call.tensors
        kernel = self.kernel_of(current)
        tail = self.tail_of(call)
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cpu" and virtual_device.active() is not None:
            names = kernel.arg_names[len(tensors) + len(call.lse_strides) :]
            constants = dict(zip(names, tail, strict=True))
            virtual.launch(kernel, current, programs, tensors, (*call.lse_strides, *call.scalars), constants)
            return
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(), prebuilt.in_use():
            try:
                compiled = kernel[(programs,)](*call.arguments(), *call.lse_strides, *tail, **current.options)
            except triton.OutOfResources as error:
                raise current.too_large(error.name, error.limit, error.required) from error
        if not INTERPRET.value:
            self.compiled.add(compiled.hash)
            if key is not None:
                if len(self._known) >= _KNOWN_MAX:
                    self._known.clear()
                self._known[key] = _Known(compiled, device.index, call, tail)

    def kernel_of(self, current: Launchable) -> Any:
        """The Triton function of a plan's implementation."""
        return self.gluon if current.implementation == "gluon" else self.kernel

    def tiles_of(self, current: Launchable, dtype: torch.dtype) -> tuple[Tile | None, ...]:
        """By which the kernel of a plan copies its first tensors, where it takes descriptors of them."""
        if current.implementation != "gluon" or self._tile_rows is None:
            return ()
        return tuple(tile and Tile(dtype, *tile) for tile in self._tile_rows(current.constants))

    def tail_of(self, call: Call) -> tuple[Any, ...]:
        """Arguments of the kernel behind the strides of softmax_lse: run-time numbers, then constants."""
        values = {**call.plan.constants, **call.constants}
        arguments = self.kernel_of(call.plan).arg_names
        names = arguments[len(call.tensors) + len(call.lse_strides) + len(call.scalars) :]
        return (*call.scalars, *(values[name] for name in names))


def pointers_of(tensors: Sequence[torch.Tensor | None]) -> tuple[list[Any], Any]:
    """Addresses, or None, and what Triton specialises them on; 0 for the usual case, all 16-byte aligned.

    Launches take numbers: about a tensor Triton would ask the driver, which the first launch has done.
    """
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    combined = 0
    for pointer in pointers:
        if pointer:
            combined |= pointer
    far = far_ones(tensors)
    if combined & 15 == 0 and far is None:
        return pointers, 0
    return pointers, (far, *(None if pointer is None else pointer & 15 == 0 for pointer in pointers))


def far_ones(inputs: Sequence[Any]) -> tuple[bool, ...] | None:
    """Of which inputs Triton sees that AMD's buffer instructions do not reach all; None if of none."""
    if not _IS_HIP:
        return None
    found = tuple([isinstance(x, torch.Tensor) and _is_far(x) for x in inputs])
    return found if True in found else None


def _is_far(x: torch.Tensor) -> bool:
    return x.untyped_storage().nbytes() > BUFFER_BYTES


def strides_of(x: torch.Tensor) -> Strides:
    """(batch, row, head) strides in elements; the batch stride of varlen tensors is 0."""
    stride = x.stride()
    return (stride[0], stride[1], stride[2]) if len(stride) == 4 else (0, stride[0], stride[1])


def divisor_of_strides(strides: tuple[Strides, ...], itemsize: int) -> int:
    """VEC of the kernels: the largest power of two of elements, up to 16 bytes, that divides every stride."""
    combined = 16 // itemsize
    for batch, row, head in strides:
        combined |= batch | row | head
    return combined & -combined
