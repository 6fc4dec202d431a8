"""Compile the kernels for any chip without having one: what CI checks and ``inspect`` reads."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import Any

import torch

from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import Arch, ConfigSource

from .compile import Pointer, compile_for
from .launch import KERNELS
from .plan import plan

#: Pointers whose type is not that of q.
_POINTERS = {
    "lse_ptr": torch.float32,
    "dlse_ptr": torch.float32,
    "delta_ptr": torch.float32,
    "alibi_ptr": torch.float32,
    "rng_ptr": torch.int64,
    "cu_seqlens_q_ptr": torch.int32,
    "cu_seqlens_k_ptr": torch.int32,
}


def _absent(name: str, problem: AttentionProblem, has_dlse: bool) -> bool:
    """Whether a pointer argument is None for this problem."""
    return (
        (name == "dlse_ptr" and not has_dlse)
        or (name == "alibi_ptr" and not problem.alibi)
        or (name == "rng_ptr" and problem.dropout_p == 0.0)
        or (name.startswith("cu_seqlens") and not problem.varlen)
    )


def compile_kernel(
    kernel: str,
    problem: AttentionProblem,
    arch: Arch,
    *,
    has_dlse: bool = False,
    wide: bool = False,
    source: ConfigSource | None = None,
) -> Any:
    """Compile one kernel of a problem as a launch would whose addresses and strides divide by 16 bytes.

    Args:
        kernel: a key of :data:`flash_rocm._triton.launch.KERNELS`.
        has_dlse: with a gradient through softmax_lse.
        wide: with 64-bit offsets inside a tile.
        source: :func:`flash_rocm.runtime.config_source`, the user's own configs.

    Returns:
        Triton's compiled kernel: ``asm`` ("amdgcn", "hsaco", "ptx", ...) and ``metadata``.
    """
    function = KERNELS[kernel].kernel
    current = plan(kernel, problem, arch, source)
    vec = 16 // problem.dtype.itemsize
    constants = {**current.constants, "VEC": vec, "WIDE": wide, "HAS_DLSE": has_dlse}
    pointers = {
        name: None if _absent(name, problem, has_dlse) else Pointer(_POINTERS.get(name, problem.dtype))
        for name in function.arg_names
        if name.endswith("_ptr")
    }
    return compile_for(arch, function, pointers, constants, current.options)


def listing(kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource | None) -> tuple[str, int]:
    """What ``inspect`` reads of a kernel: text and bytes of LDS (shared memory on NVIDIA).

    The text is AMD assembly with the comments that LLVM puts into it or, on NVIDIA, what ptxas tells of its
    registers.
    """
    compiled = compile_kernel(kernel, problem, arch, source=source)
    if arch.vendor == "amd":
        return compiled.asm["amdgcn"], compiled.metadata.shared
    return _ptxas_report(compiled.asm["ptx"], int(arch.name.removeprefix("sm"))), compiled.metadata.shared


def _ptxas_report(ptx: str, capability: int) -> str:
    # Builds of Triton for ROCm may come without this part.
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("expected PTX with a .target, found none")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target.group(1)}", str(path)]
        command += ["-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ptxas failed with status {done.returncode}: {done.stderr.strip()}")
        return done.stderr
