"""Runs the Triton back end's host code with its launches going to the virtual GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import Arch, arch_named
from flash_rocm.virtual import Checks, CodeObject, LaunchStats, VirtualGpu, load_code_object


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Bytes that share memory with a contiguous CPU tensor."""
    if not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor.detach().view(-1).view(torch.uint8).numpy()


@functools.lru_cache(maxsize=64)
def compiled_kernel(kernel: str, problem: AttentionProblem, arch: Arch, has_dlse: bool, wide: bool) -> CodeObject:
    """A kernel of the Triton back end, compiled and loaded."""
    from flash_rocm._triton.offline import compile_kernel

    compiled = compile_kernel(kernel, problem, arch, has_dlse=has_dlse, wide=wide)
    return load_code_object(compiled.asm["hsaco"], assembly=compiled.asm["amdgcn"], lds_bytes=compiled.metadata.shared)


@dataclasses.dataclass
class Device:
    """A virtual GPU that the launchers of the Triton back end launch on."""

    arch: Arch
    order: str = "lockstep"
    checks: Checks = dataclasses.field(default_factory=Checks)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stats: dict[str, LaunchStats] = dataclasses.field(default_factory=dict)

    def launch(
        self, kernel: str, problem: AttentionProblem, programs: int, tensors: Any, numbers: Any, wide: bool
    ) -> None:
        has_dlse = kernel == "backward_dq" and tensors[6] is not None
        code = compiled_kernel(kernel, problem, self.arch, has_dlse, wide)
        gpu = VirtualGpu(self.arch.name)
        values: list[Any] = []
        for index, tensor in enumerate(tensors):
            if tensor is not None:
                values.append(gpu.memory.add(f"{kernel} argument {index}", as_array(tensor)))
        threads = code.max_threads
        self.stats[kernel] = gpu.launch(
            code,
            grid=(programs, 1, 1),
            block_threads=threads,
            kernargs=[*values, *numbers, 0, 0],
            order=self.order,
            checks=self.checks,
            **self.options,
        )


@contextlib.contextmanager
def launches_on(device: Device, problem: AttentionProblem) -> Iterator[Device]:
    """Launches of the Triton back end go to ``device`` inside."""
    from flash_rocm._triton import launch

    from flash_rocm import runtime

    names = {id(launcher): name for name, launcher in launch.KERNELS.items()}

    def launch_new(
        self: Any, key: Any, plan: Any, programs: int, tensors: Any, strides: Any, scalars: Any, layout: Any
    ) -> None:
        if "VEC" in layout and layout["VEC"] != 16 // problem.dtype.itemsize:
            raise ValueError(f"expected 16-byte aligned strides, got {layout}")
        device.launch(
            names[id(self)], problem, programs, tensors, (*strides, *scalars), bool(layout.get("WIDE", False))
        )

    before = launch.Launcher.launch_new, launch.Launcher.launch_known, runtime.arch_of
    launch.Launcher.launch_new = launch_new  # type: ignore[method-assign]
    launch.Launcher.launch_known = lambda *_: False  # type: ignore[method-assign]
    runtime.arch_of = lambda _: device.arch  # type: ignore[assignment]
    try:
        yield device
    finally:
        launch.Launcher.launch_new, launch.Launcher.launch_known, runtime.arch_of = before  # type: ignore[method-assign]


def device(arch: str, **fields: Any) -> Device:
    return Device(arch_named(arch), **fields)
