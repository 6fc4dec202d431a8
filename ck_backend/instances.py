"""What calls of an instance share: which one it is, and tensors as it reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from flash_rocm import ck_instances, virtual_device
from flash_rocm.ck_instances import CkInstance
from flash_rocm.problem import AttentionProblem

from . import library

MAX_STRIDE = (1 << 31) - 1


def instance_of(kernel: str, problem: AttentionProblem, device: torch.device) -> tuple[int, CkInstance, Any]:
    """What runs one kernel of a problem: the instance's number for the operators of the library, it, and these.

    Selection has found that the library has the instance, or, where ``ck`` was asked for by name, that it can be
    compiled: that is done here, for the backward too.

    Raises:
        LibraryError: it could not be compiled, or not now.
    """
    arch = virtual_device.arch_of(device).name
    found, operators = library.load()
    if any(found.find(each, problem, arch) is None for each in ck_instances.kernels_of(problem)):
        _compile(problem, arch)
        found, operators = library.load()
    number = found.find(kernel, problem, arch)
    if number is None:
        raise library.LibraryError(f"ck: expected the {kernel} that was compiled in {found.folder}, found none")
    return library.number_of(found, number), found.instances[number], operators


def _compile(problem: AttentionProblem, arch: str) -> None:
    library.forbid_in_graph_capture(f'flash-rocm build --ck --arch {arch} --problem "{problem.options()}"')
    # Most processes compile nothing, and need nothing of it.
    from . import on_demand

    try:
        on_demand.provide(problem, arch)
    except on_demand.BuildError as error:
        raise library.LibraryError(f"ck: {problem.describe()}: {error}") from error


@contextlib.contextmanager
def workspace(what: str, elements: int, hint: str) -> Iterator[None]:
    """Allocate float32 that a kernel needs beside its results; where memory does not suffice, say what it was for.

    Args:
        what: the call's direction, and what is allocated.
        hint: how the caller gets by with less.

    Raises:
        torch.OutOfMemoryError: there is not as much memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"ck: {what}: expected {4 * elements / 2**20:.1f} MiB of free memory, found less: {error} Hint: {hint}"
        ) from error


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels can read it, in 16 bytes at a time with 32-bit strides; a copy where it is not so."""
    *outer, last = x.stride()
    # Rows of a sequence are addressed with 32 bits, which a view of packed tensors passes before a copy of it does.
    near = (x.shape[-3] - 1) * x.stride(-3) * x.element_size() <= MAX_STRIDE
    if near and last == 1 and x.data_ptr() % 16 == 0 and all(n % 8 == 0 and n <= MAX_STRIDE for n in outer):
        return x
    return x.clone(memory_format=torch.contiguous_format)
