"""Launches on the virtual GPU: machine code of an AMD chip, executed on the CPU, on CPU tensors."""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Mapping
from typing import Any

import torch

from flash_rocm import virtual_device
from flash_rocm.amdgpu.chips import CHIPS
from flash_rocm.arch import arch_named

from .compile import BUFFER_BYTES, Pointer, compile_for
from .plan import Launchable

# Compiling and decoding take far longer than a lookup, and a layer repeats its calls.  Decoded kernels take
# megabytes each, so that only those used last are kept.
_loaded: collections.OrderedDict[tuple[Any, ...], Any] = collections.OrderedDict()
_KEPT = 64


class _Memory:
    """The storages behind some tensors as memory of a virtual GPU, each there once."""

    def __init__(self, gpu: Any) -> None:
        import numpy as np

        self._gpu, self._array_of = gpu, np.frombuffer
        self._bases: dict[int, int] = {}

    def address(self, name: str, x: torch.Tensor) -> int:
        storage = x.untyped_storage()
        start = storage.data_ptr()
        if start not in self._bases:
            contents = (ctypes.c_uint8 * storage.nbytes()).from_address(start)
            self._bases[start] = self._gpu.memory.add(name, self._array_of(contents, "uint8"))
        return self._bases[start] + x.data_ptr() - start


def launch(
    kernel: Any,
    current: Launchable,
    programs: int,
    tensors: tuple[torch.Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: Mapping[str, Any],
) -> None:
    """Compile a kernel for the virtual GPU in use, and execute it.

    Args:
        kernel: the Triton function.
        tensors: its pointer arguments in order.
        numbers: its run-time numbers behind them, in order.
        constants: its compile-time arguments by name.

    Raises:
        ConfigError: the kernel takes more LDS than the chip has.
        flash_rocm.virtual.VirtualGpuError: the kernel did something wrong, or takes an instruction that is not known.
    """
    from flash_rocm.virtual import Launch, VirtualGpu, load_code_object

    device = virtual_device.active()
    if device is None:
        raise RuntimeError("q: expected a tensor on a GPU, or a virtual GPU in use, got a CPU tensor and none.")
    arch = arch_named(device.arch)
    gpu = VirtualGpu(device.arch)
    memory = _Memory(gpu)
    pointers: dict[str, Pointer | None] = {}
    addresses: list[int] = []
    for name, x in zip(kernel.arg_names, tensors, strict=False):
        if x is None:
            pointers[name] = None
            continue
        address = memory.address(name, x)
        pointers[name] = Pointer(x.dtype, address % 16 == 0, x.untyped_storage().nbytes() <= BUFFER_BYTES)
        addresses.append(address)
    used = {param.name: constants[param.name] for param in kernel.params if param.is_constexpr}
    key = (id(kernel), arch.name, tuple(pointers.items()), tuple(used.items()), tuple(current.options.items()))
    if key not in _loaded:
        compiled = compile_for(arch, kernel, pointers, used, current.options)
        lds_bytes = compiled.metadata.shared
        _loaded[key] = load_code_object(compiled.asm["hsaco"], assembly=compiled.asm["amdgcn"], lds_bytes=lds_bytes)
        if len(_loaded) > _KEPT:
            _loaded.popitem(last=False)
    _loaded.move_to_end(key)
    code, limit = _loaded[key], CHIPS[arch.name].lds_per_workgroup
    if code.lds_bytes > limit:
        raise current.too_large("bytes of LDS", limit, code.lds_bytes)
    ready = Launch(
        gpu,
        code,
        grid=(programs, 1, 1),
        block_threads=current.options["num_warps"] * arch.wave_size,
        # Behind the arguments of a Triton kernel come two pointers to scratch that these kernels do not use.
        kernargs=[*addresses, *numbers, 0, 0],
        order=device.order,
        owner=tensors,
    )
    (device.on_launch or Launch.run)(ready)
