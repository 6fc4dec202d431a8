"""Launches of the compiled library on the virtual GPU: its host code runs, its device code is executed on the CPU.

The library is linked to no HIP.  :func:`install` gives it a stand-in of libamdhip64.so (``csrc/stand_in_hip.c``) that
hands every launch to :func:`_on_launch`: the kernel's name, its code objects for all archs, the grid and the arguments,
in which tensors stand as their addresses on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flash_rocm import virtual_device
from flash_rocm.amdgpu import bundles

_HIP_SUCCESS, _HIP_LAUNCH_FAILURE = 0, 719


class _Dim3(ctypes.Structure):
    _fields_ = [("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32)]

    def sizes(self) -> tuple[int, int, int]:
        return self.x, self.y, self.z


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(_Dim3),
    ctypes.POINTER(_Dim3),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)

#: Tensors that the call in progress may touch, and what went wrong in its launches; None outside of any call.
_tensors: Sequence[torch.Tensor] | None = None
_failure: BaseException | None = None


@functools.cache
def install(stand_in: pathlib.Path) -> None:
    """Load the stand-in for HIP, so that a library that is loaded afterwards finds it."""
    library = ctypes.CDLL(str(stand_in), mode=ctypes.RTLD_GLOBAL)
    _installed.append(_CALLBACK(_on_launch))
    library.flash_ck_on_launch(_installed[-1])


#: Callbacks that C holds on to.
_installed: list[Any] = []


@contextlib.contextmanager
def memory_of(tensors: Sequence[torch.Tensor | None]) -> Iterator[None]:
    """Let the launches made inside touch these tensors and nothing else; raise what went wrong in them.

    Raises:
        flash_rocm.virtual.VirtualGpuError: a kernel did something wrong, or takes an instruction that is not known.
    """
    global _tensors, _failure
    _tensors, _failure = [x for x in tensors if x is not None], None
    try:
        yield
    except RuntimeError:
        if _failure is None:
            raise
        raise _failure from None  # what the library could only report as a failed launch
    finally:
        _tensors, _failure = None, None


def _on_launch(bundle: int, name: bytes, grid: Any, block: Any, arguments: Any, lds_bytes: int) -> int:
    """What ``hipLaunchKernel`` does.  No exception may cross the C code between here and :func:`memory_of`."""
    global _failure
    try:
        _launch(bundle, name.decode(), grid[0].sizes(), block[0].sizes(), arguments)
    except BaseException as error:  # raised again by memory_of
        _failure = error
        return _HIP_LAUNCH_FAILURE
    return _HIP_SUCCESS


def _launch(bundle: int, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: Any) -> None:
    from flash_rocm.virtual import Launch, VirtualGpu

    device = virtual_device.active()
    if device is None or _tensors is None:
        raise RuntimeError("q: expected a virtual GPU in use and a call of this back end, got neither")
    if block[1:] != (1, 1):
        raise RuntimeError(f"{name}: expected threads of one dim, as the virtual GPU numbers them, got {block}")
    code = _code_object(bundle, name, device.arch)
    packed = bytearray(code.descriptor.kernarg_bytes)
    visible = [argument for argument in code.arguments if not argument.kind.startswith("hidden_")]
    for index, argument in enumerate(visible):
        packed[argument.offset : argument.offset + argument.size] = ctypes.string_at(arguments[index], argument.size)
    gpu = VirtualGpu(device.arch)
    _add_memory(gpu, _tensors)
    ready = Launch(gpu, code, grid, block[0], bytes(packed), device.order, owner=_tensors)
    (device.on_launch or Launch.run)(ready)


def _add_memory(gpu: Any, tensors: Sequence[torch.Tensor]) -> None:
    """The storages behind the tensors, each once, at their addresses."""
    import numpy as np

    added = set()
    for number, x in enumerate(tensors):
        storage = x.untyped_storage()
        if storage.nbytes() == 0 or storage.data_ptr() in added:
            continue
        added.add(storage.data_ptr())
        contents = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        gpu.memory.add(f"tensor {number}", np.frombuffer(contents, "uint8"), address=storage.data_ptr())


@functools.lru_cache(maxsize=64)
def _code_object(bundle: int, name: str, arch: str) -> Any:
    """One kernel, decoded; the library stays loaded, so that an address names its code objects for good."""
    from flash_rocm.virtual import load_code_object

    found = bundles.code_objects(lambda offset, size: ctypes.string_at(bundle + offset, size))
    for target, code in found:
        if target == arch:
            return load_code_object(code, kernel=name)
    raise RuntimeError(f"{name}: expected code for {arch} in the library, found {', '.join(a for a, _ in found)}")
