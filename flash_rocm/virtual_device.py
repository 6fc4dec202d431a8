"""What tensors run on: their GPU, the CPU, or for CPU tensors a virtual AMD GPU.  A leaf.

Operators pin a call to its back end and virtual GPU by one string, because their schemas take no more:
:class:`Request` is the only place that knows how it is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from flash_rocm import runtime
from flash_rocm.arch import CPU, Arch, arch_named, gpu_arch

#: What the virtual GPU can be.
ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1200", "gfx1201")


class VirtualDeviceError(ValueError):
    """There is no such virtual GPU, or what executes it is not installed."""


@dataclasses.dataclass(frozen=True)
class VirtualDevice:
    """A virtual AMD GPU that CPU tensors run on; what its fields mean, :func:`virtual_gpu` says."""

    arch: str
    order: str = "lockstep"
    on_launch: Callable[[Any], Any] | None = None


_override: VirtualDevice | None = None


def active() -> VirtualDevice | None:
    """The virtual GPU in use: that of :func:`virtual_gpu` if inside one, else of ``FLASH_ROCM_VIRTUAL_GPU``.

    Raises:
        VirtualDeviceError: the variable names no chip that there is, or what executes it is not installed.
    """
    if _override is not None:
        return _override
    arch = runtime.environment_virtual_gpu()
    return _environment_device(arch) if arch else None


@functools.cache
def _environment_device(arch: str) -> VirtualDevice:
    check(arch, "FLASH_ROCM_VIRTUAL_GPU")
    return VirtualDevice(arch)


def check(arch: str, argument: str) -> None:
    """Raise VirtualDeviceError if there is no virtual GPU of this arch; ``argument`` is the name that asked for it."""
    if arch not in ARCHS:
        raise VirtualDeviceError(f"{argument}: expected one of {', '.join(ARCHS)}, got {arch!r}.")
    missing = [name for name in ("triton", "numpy", "elftools", "msgpack") if importlib.util.find_spec(name) is None]
    if missing:
        raise VirtualDeviceError(
            f"{argument}: expected the packages that execute {arch} code, {', '.join(missing)} not found. "
            'Hint: pip install "flash_rocm[virtual]" triton'
        )
    if runtime.triton_interpret():
        raise VirtualDeviceError(
            f"{argument}: expected TRITON_INTERPRET to be unset, which replaces the compiler; it is set."
        )
    runtime.warn_once(
        f"attention on CPU tensors runs as {arch} machine code on the virtual GPU: a check of the code, and slow"
    )


@contextlib.contextmanager
def virtual_gpu(arch: str, *, order: str = "lockstep", on_launch: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Run the attention calls that are made inside, on CPU tensors, as machine code of an AMD GPU.

    The kernels are compiled for the chip and executed instruction by instruction: a check of the code,
    thousands of times slower than a GPU.  Process-wide, like the variable ``FLASH_ROCM_VIRTUAL_GPU`` that it
    overrides.  The backward of a call made inside runs there too.

    Args:
        arch: ``gfx90a``, ``gfx942``, ``gfx950``, ``gfx1100``, ``gfx1200`` or ``gfx1201``.
        order: how waves take turns between barriers: ``lockstep``, ``forward``, ``reverse`` or
            ``shuffled:SEED``.  A missing barrier shows in some of them only.
        on_launch: called with each :class:`flash_rocm.virtual.Launch` instead of its ``run()``, which it has to
            call, with a trace or breakpoints for example.

    Raises:
        VirtualDeviceError: another arch, or a package is missing that this needs (the text says which).
    """
    global _override
    check(arch, "arch")
    before, _override = _override, VirtualDevice(arch, order, on_launch)
    try:
        yield
    finally:
        _override = before


class Request(NamedTuple):
    """The back end asked for, and the virtual GPU that the tensors of the call run on; as text "auto@gfx942"."""

    backend: str
    virtual: str = ""  # its arch, "" for none

    def __str__(self) -> str:
        return f"{self.backend}@{self.virtual}" if self.virtual else self.backend

    @classmethod
    def parse(cls, text: str) -> Request:
        """What ``str`` made a text of."""
        backend, _, virtual = text.partition("@")
        return cls(backend, virtual)


def request_on(device: torch.device) -> str:
    """Text of the :class:`Request` that a call on this device makes now."""
    if device.type == "cpu" and (virtual := active()):
        return str(Request(runtime.requested_backend(), virtual.arch))
    return runtime.requested_backend()


def request_of(x: torch.Tensor) -> str:
    """:func:`request_on` the device of a tensor, in less time: to ask a device for its type makes a text."""
    return request_on(x.device) if x.is_cpu else runtime.requested_backend()


def arch_of(device: torch.device) -> Arch:
    """The architecture of a device; "cuda" devices are AMD GPUs on a ROCm build of torch.

    The CPU is the virtual GPU where one is in use.
    """
    if device.type != "cuda":
        virtual = active() if device.type == "cpu" else None
        return arch_named(virtual.arch) if virtual else CPU
    return gpu_arch(device.index if device.index is not None else torch.cuda.current_device())


def arch_pinned(virtual: str, device: torch.device) -> Arch:
    """The architecture that a request's call on this device runs on; ``virtual``: of :class:`Request`."""
    return arch_named(virtual) if virtual else arch_of(device)


def run_pinned(virtual: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, on the virtual GPU that a request names if it names one."""
    found = active() if virtual else None
    if not virtual or (found is not None and found.arch == virtual):
        return function(*args)
    with virtual_gpu(virtual):
        return function(*args)
