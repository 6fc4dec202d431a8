"""What calls of an instance share: which one it is, and tensors as it reads them."""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import ck_instances, virtual_device
from flash_rocm.ck_instances import CkInstance
from flash_rocm.problem import AttentionProblem

from . import library

MAX_STRIDE = (1 << 31) - 1


def instance_of(kernel: str, problem: AttentionProblem, device: torch.device) -> tuple[int, CkInstance, Any]:
    """The instance that runs one kernel of a problem, its number before it, and the operators of the library."""
    found, operators = library.load()
    arch = virtual_device.arch_of(device).name
    number = found.find(kernel, problem, arch)
    if number is None:  # selection has looked, but another library may have been built since
        reasons = "; ".join(ck_instances.refusals(problem, arch, found))
        raise library.LibraryError(f"ck: expected an instance for {problem.describe()}: {reasons}")
    return number, found.instances[number], operators


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels can read it, in 16 bytes at a time with 32-bit strides; a copy where it is not so."""
    *outer, last = x.stride()
    # Rows of a sequence are addressed with 32 bits, which a view of packed tensors passes before a copy of it does.
    near = (x.shape[-3] - 1) * x.stride(-3) * x.element_size() <= MAX_STRIDE
    if near and last == 1 and x.data_ptr() % 16 == 0 and all(n % 8 == 0 and n <= MAX_STRIDE for n in outer):
        return x
    return x.clone(memory_format=torch.contiguous_format)
