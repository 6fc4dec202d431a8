"""Compile a kernel for any chip without having one, specialised as a launch on that chip would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flash_rocm.arch import Arch

from .descriptors import Tile

ELEMENTS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


#: Buffer instructions of AMD chips reach this far; Triton compiles another kernel beyond.
BUFFER_BYTES = (1 << 31) - 1


class Pointer(NamedTuple):
    """What a kernel is specialised on, of a tensor."""

    dtype: torch.dtype
    aligned: bool = True  # to 16 bytes
    near: bool = True  # its storage is within reach of a buffer instruction (AMD), 2^31 - 1 bytes


def target_of(arch: Arch) -> GPUTarget:
    """Triton's name of an arch."""
    if arch.vendor == "amd":
        return GPUTarget("hip", arch.name, arch.wave_size)
    return GPUTarget("cuda", int(arch.name.removeprefix("sm")), 32)


def source_for(
    arch: Arch,
    function: Any,
    pointers: Mapping[str, Pointer | Tile | None],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for such a launch, and its options.

    Signature and attributes are those that Triton works out at a launch, to the letter: its caches are keyed
    by them, and find what was compiled here.

    Args:
        function: the Triton function.
        pointers: its pointer arguments by name, None where the launch passes None; a tile for a descriptor.
        constants: values of its compile-time arguments by name.
        options: of the compiler.
    """
    buffers = arch.vendor == "amd" and triton.knobs.amd.use_buffer_ops
    specialisation: list[tuple[str, Any]] = []
    for name, param in zip(function.arg_names, function.params, strict=True):
        if param.is_constexpr:
            specialisation.append(("constexpr", constants[name]))
        elif name not in pointers:
            specialisation.append((param.annotation_type, None))
        elif (pointer := pointers[name]) is None:
            specialisation.append(("constexpr", None))
        elif isinstance(pointer, Tile):
            specialisation.append(pointer.specialisation())
        else:
            facts = ("D" if pointer.aligned else "") + ("S" if buffers and pointer.near else "")
            specialisation.append((f"*{ELEMENTS[pointer.dtype]}", facts))
    bound = {name: constants.get(name) for name in function.arg_names}
    # Private, but the only thing that says how this version of Triton words the attributes.
    chosen, signature, constexprs, attrs = function._pack_args(
        triton.compiler.make_backend(target_of(arch)), dict(options), bound, specialisation, None
    )
    source = GluonASTSource if function.is_gluon() else ASTSource
    return source(function, signature, constexprs, attrs), dict(chosen.__dict__)


def compile_for(
    arch: Arch,
    function: Any,
    pointers: Mapping[str, Pointer | Tile | None],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
) -> Any:
    """Compile one kernel; arguments as for :func:`source_for`.

    Returns:
        Triton's compiled kernel: ``asm`` ("amdgcn", "hsaco", "ptx", ...) and ``metadata``.
    """
    source, chosen = source_for(arch, function, pointers, constants, options)
    return triton.compile(source, target=target_of(arch), options=chosen)
