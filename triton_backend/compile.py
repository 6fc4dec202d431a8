"""Compile a kernel for any chip without having one, specialised as a launch on that chip would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_rocm.runtime import Arch

ELEMENTS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


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


def compile_for(
    arch: Arch,
    function: Any,
    pointers: Mapping[str, Pointer | None],
    constants: Mapping[str, Any],
    options: Mapping[str, int],
) -> Any:
    """Compile one kernel.

    Args:
        function: the Triton function.
        pointers: its pointer arguments by name, None where the launch passes None.
        constants: values of its compile-time arguments by name.
        options: of the compiler.

    Returns:
        Triton's compiled kernel: ``asm`` ("amdgcn", "hsaco", "ptx", ...) and ``metadata``.
    """
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, param in enumerate(function.params):
        name = param.name
        if param.is_constexpr or pointers.get(name, param) is None:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants[name] if param.is_constexpr else None
        elif name in pointers:
            pointer: Any = pointers[name]
            signature[name] = f"*{ELEMENTS[pointer.dtype]}"
            facts = [["tt.divisibility", 16]] if pointer.aligned else []
            if arch.vendor == "amd" and pointer.near:
                facts.append(["tt.pointer_range", 32])
            if facts:
                attrs[(index,)] = facts
        else:
            signature[name] = param.annotation_type
    source = ASTSource(function, signature, constexprs, attrs)
    return triton.compile(source, target=target_of(arch), options=dict(options))
