"""Kernels written by hand, and Triton kernels changed on purpose, for the virtual GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from flash_rocm.amdgpu.assembly import parse_amdgcn
from flash_rocm.virtual import CodeObject
from flash_rocm.virtual.code_object import Argument, Descriptor

#: As Triton's kernels have them on gfx942: the kernel arguments' address in s[0:1], the workgroup in s2.
GFX942 = Descriptor(
    wave_size=64,
    vgprs=64,
    agprs=64,
    lds_bytes=0,
    scratch_bytes=0,
    kernarg_bytes=64,
    user_sgprs=2,
    user_order=(("kernarg_segment_ptr", 2),),
    preload=(0, 0),
    workgroup_ids=(True, False, False),
    workitem_ids=0,
    private_segment=False,
    flush_f32=False,
    flush_f16_f64=False,
    clamp_nan=True,
)


def hand_written(lines: str, arch: str = "gfx942", lds_bytes: int = 0, **descriptor: Any) -> CodeObject:
    """A kernel from assembly lines; eight pointers or numbers of 8 bytes are its arguments."""
    text = f"\t.amdhsa_kernel k\n\t.end_amdhsa_kernel\nk:\n{lines}\n\ts_endpgm\n.Lfunc_end0:\n"
    return CodeObject(
        name="k",
        arch=arch,
        program=parse_amdgcn(text),
        descriptor=dataclasses.replace(GFX942, **descriptor),
        arguments=tuple(Argument("", 8 * i, 8, "by_value") for i in range(8)),
        lds_bytes=lds_bytes,
        entry=0,
        max_threads=1024,
    )


def lanes_of(arch: str) -> int:
    """Lanes of the waves that an arch is used with."""
    return 64 if arch.startswith("gfx9") else 32


def span(start: int, count: int) -> str:
    """VGPRs from ``start`` on, as operands are written."""
    return f"v[{start}:{start + count - 1}]" if count > 1 else f"v{start}"


def changed(code: CodeObject, assembly: str) -> CodeObject:
    """The same kernel with other instructions."""
    return dataclasses.replace(code, program=parse_amdgcn(assembly))


def places(assembly: str, instruction: str) -> list[int]:
    """Lines of an assembly text that hold an instruction starting so."""
    return [i for i, line in enumerate(assembly.splitlines()) if line.strip().startswith(instruction)]


def without_line(assembly: str, number: int) -> str:
    lines = assembly.splitlines()
    del lines[number]
    return "\n".join(lines)
