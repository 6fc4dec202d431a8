"""Compile the kernels for any chip without having one: what CI checks and ``inspect`` reads."""

from __future__ import annotations

import hashlib
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_key, get_cache_manager

from flash_rocm.arch import Arch
from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import ConfigSource

from .cached import ATTEND, num_splits_of
from .compile import Pointer, source_for, target_of
from .descriptors import Tile
from .launch import KERNELS
from .plan import cache_kernel, cache_plan, is_absorbed, is_built_plain, plan

#: Pointers whose type is not that of q.
_POINTERS = {
    "lse_ptr": torch.float32,
    "dlse_ptr": torch.float32,
    "delta_ptr": torch.float32,
    "alibi_ptr": torch.float32,
    "sinks_ptr": torch.float32,
    "rng_ptr": torch.int64,
    "cu_seqlens_q_ptr": torch.int32,
    "cu_seqlens_k_ptr": torch.int32,
}
#: Pointers of the attention kernel over a K/V cache that every call has.
_CACHE_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "q2_ptr", "k2_ptr")


def _absent(name: str, problem: AttentionProblem, has_dlse: bool) -> bool:
    """Whether a pointer argument is None for this problem."""
    return (
        (name == "dlse_ptr" and not has_dlse)
        or (name == "alibi_ptr" and not problem.alibi)
        or (name == "sinks_ptr" and not problem.sinks)
        or (name == "rng_ptr" and problem.dropout_p == 0.0)
        or (name.startswith("cu_seqlens") and not problem.varlen)
    )


def source_of(
    kernel: str,
    problem: AttentionProblem,
    arch: Arch,
    *,
    has_dlse: bool = False,
    wide: bool = False,
    source: ConfigSource | None = None,
) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch on contiguous tensors whose addresses divide by 16 bytes, and its options.

    Args: as :func:`compile_kernel`.
    """
    if problem.cached:
        return _cache_source(kernel, problem, arch, wide, source)
    current = plan(kernel, problem, arch, source, is_built_plain(kernel, problem))
    function = KERNELS[kernel].kernel_of(current)
    vec = math.gcd(16 // problem.dtype.itemsize, problem.headdim, problem.headdim_v)
    constants: dict[str, Any] = {**current.constants, "VEC": vec, "WIDE": wide, "HAS_DLSE": has_dlse}
    pointers: dict[str, Pointer | Tile | None] = {
        name: None if _absent(name, problem, has_dlse) else Pointer(_POINTERS.get(name, problem.dtype))
        for name in function.arg_names
        if name.endswith("_ptr")
    }
    described = (name for name in function.arg_names if name.endswith("_desc"))
    pointers |= dict(zip(described, KERNELS[kernel].tiles_of(current, problem.dtype), strict=True))
    return source_for(arch, function, pointers, constants, current.options)


def _cache_source(
    kernel: str, problem: AttentionProblem, arch: Arch, wide: bool, source: ConfigSource | None
) -> tuple[ASTSource, dict[str, Any]]:
    """:func:`source_of` for the attention kernel over a K/V cache.

    The lengths of the cache are given by sequence, or for varlen cumulated as those of q are.  Where the values can
    be dims of the keys, as in MLA, they are.
    """
    v_is_k2 = is_absorbed(problem)
    if kernel != cache_kernel(problem, v_is_k2):
        raise ValueError(
            f"kernel: expected {cache_kernel(problem, v_is_k2)!r} for {problem.describe()}, got {kernel!r}"
        )
    # The Gluon kernel for MLA is not looked at here: without plain facts no entry asks for it.
    function = ATTEND.kernel
    current = cache_plan(problem, arch, source, v_is_k2)
    in_parts = num_splits_of(problem, current, arch) > 1
    vec = math.gcd(16 // problem.dtype.itemsize, problem.headdim, problem.headdim_v)
    constants: dict[str, Any] = {**current.constants, "VEC": vec, "WIDE": wide, "CHECKED": False}
    found: dict[str, Pointer | None] = {name: None for name in function.arg_names if name.endswith("_ptr")}
    found |= dict.fromkeys(_CACHE_POINTERS, Pointer(problem.dtype))
    found["out_ptr"] = Pointer(torch.float32 if in_parts else problem.dtype)
    found["lse_ptr"] = Pointer(torch.float32)
    optional = {
        "alibi_ptr": (problem.alibi, torch.float32),
        "sinks_ptr": (problem.sinks, torch.float32),
        "cos_ptr": (problem.rotary_dim > 0, problem.dtype),
        "sin_ptr": (problem.rotary_dim > 0, problem.dtype),
        "cu_seqlens_q_ptr": (problem.varlen, torch.int32),
        "cu_seqlens_k_ptr": (problem.varlen, torch.int32),
        "seqused_k_ptr": (not problem.varlen, torch.int32),
        "batch_idx_ptr": (problem.cache_batch_idx, torch.int32),
        "leftpad_ptr": (problem.leftpad, torch.int32),
        "table_ptr": (problem.page_size > 0, torch.int32),
    }
    found |= {name: Pointer(dtype) for name, (is_there, dtype) in optional.items() if is_there}
    return source_for(arch, function, found, constants, current.options)


def compile_kernel(
    kernel: str,
    problem: AttentionProblem,
    arch: Arch,
    *,
    has_dlse: bool = False,
    wide: bool = False,
    source: ConfigSource | None = None,
) -> Any:
    """Compile one kernel of a problem as a launch on contiguous, aligned tensors would.

    Args:
        kernel: a key of :data:`flash_rocm._triton.launch.KERNELS`, or for a problem over a K/V cache "decode" or
            "prefill" or "mla", whichever it takes.
        has_dlse: with a gradient through softmax_lse.
        wide: with 64-bit offsets inside a tile.
        source: :func:`flash_rocm.runtime.config_source`, the user's own configs.

    Returns:
        Triton's compiled kernel: ``asm`` ("amdgcn", "hsaco", "ptx", ...) and ``metadata``.
    """
    code, options = source_of(kernel, problem, arch, has_dlse=has_dlse, wide=wide, source=source)
    return triton.compile(code, target=target_of(arch), options=options)


def cache_key(code: ASTSource, arch: Arch, options: dict[str, Any]) -> str:
    """Name of the folder in Triton's cache that holds a compiled kernel."""
    backend = triton.compiler.make_backend(target_of(arch))
    variables = triton._C.libtriton.get_cache_invalidating_env_vars()
    key = get_cache_key(code, backend, backend.parse_options(dict(options)), env_vars=variables)
    return get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).key


def build_host_part(compiled: Any, arch: Arch) -> str:
    """Compile and keep the C code with which Triton launches a kernel; "" or why it could not be.

    It needs the libraries of the GPU's driver or runtime, but no GPU.
    """
    name = "amd" if arch.vendor == "amd" else "nvidia"
    try:
        driver = triton.backends.backends[name].driver()
        # Older versions of Triton also write C code for each signature.
        if hasattr(sys.modules[type(driver).__module__], "make_launcher"):
            driver.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:  # noqa: BLE001 - assertions, loader and compiler errors, each in its own class
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"
    return ""


def listing(kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource | None) -> tuple[str, int]:
    """What ``inspect`` reads of a kernel: text and bytes of LDS (shared memory on NVIDIA).

    The text is AMD assembly with the comments that LLVM puts into it or, on NVIDIA, what ptxas tells of its
    registers.
    """
    compiled = compile_kernel(kernel, problem, arch, source=source)
    if arch.vendor == "amd":
        return compiled.asm["amdgcn"], compiled.metadata.shared
    return ptxas_report(compiled.asm["ptx"], int(arch.name.removeprefix("sm"))), compiled.metadata.shared


def ptxas_report(ptx: str, capability: int) -> str:
    """What ptxas says of a kernel: its registers, spills and warnings."""
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
