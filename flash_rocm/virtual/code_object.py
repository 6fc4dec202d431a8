"""Loading of code objects: ELF64, the metadata note, the kernel descriptor, and the instructions.

Sources: LLVM's AMDGPUUsage, "Code Object V3 and above metadata", "Kernel Descriptor" and "Initial Kernel
Execution State".
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
from elftools.elf.elffile import ELFFile

from flash_rocm.amdgpu.assembly import Program, parse_amdgcn, parse_objdump_code

from .errors import CodeObjectError, UnsupportedInstruction

OBJDUMP = "llvm-objdump-22"
_METADATA_NOTE = 32
#: e_flags & 0xff of an AMDGPU ELF file.
_MACHINES = {0x3F: "gfx90a", 0x4C: "gfx942", 0x4F: "gfx950", 0x41: "gfx1100", 0x4E: "gfx1201", 0x48: "gfx1200"}
ARCHS = tuple(_MACHINES.values())


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What the kernel descriptor says about the state a wave starts in."""

    wave_size: int
    vgprs: int
    agprs: int
    lds_bytes: int
    scratch_bytes: int  # per work item
    kernarg_bytes: int
    user_sgprs: int
    user_order: tuple[tuple[str, int], ...]  # (what, SGPRs) in order
    preload: tuple[int, int]  # (dwords, offset in dwords) of kernel arguments in user SGPRs
    workgroup_ids: tuple[bool, bool, bool]
    workitem_ids: int  # 0: x, 1: x and y, 2: x, y and z
    private_segment: bool
    flush_f32: bool
    flush_f16_f64: bool
    clamp_nan: bool  # DX10_CLAMP: clamping makes 0 of NaN


@dataclasses.dataclass(frozen=True)
class Argument:
    """One kernel argument of the metadata."""

    name: str  # "" where the metadata has none
    offset: int
    size: int
    kind: str  # "global_buffer", "by_value", "hidden_block_count_x", ...


@dataclasses.dataclass(frozen=True, eq=False)
class CodeObject:
    """One kernel ready to launch."""

    name: str
    arch: str
    program: Program
    descriptor: Descriptor
    arguments: tuple[Argument, ...]
    lds_bytes: int
    entry: int  # index of the first instruction
    max_threads: int

    def pack_arguments(self, values: bytes | Mapping[str, Any] | Sequence[Any]) -> bytearray:
        """Kernel argument bytes without the hidden ones.

        Args:
            values: the bytes; or numbers by name, where the metadata has names; or one number for each
                visible argument in order.  An int is packed as such, a float as float32 or float64 by size.

        Raises:
            ValueError: a wrong number of arguments, an unknown name, or a value that does not fit.
        """
        packed = bytearray(self.descriptor.kernarg_bytes)
        if isinstance(values, bytes | bytearray):
            if len(values) > len(packed):
                raise ValueError(f"kernargs: expected at most {len(packed)} bytes, got {len(values)}")
            packed[: len(values)] = values
            return packed
        visible = [a for a in self.arguments if not a.kind.startswith("hidden_")]
        if isinstance(values, Mapping):
            unknown = set(values) - {a.name for a in visible}
            if unknown:
                raise ValueError(f"kernargs: expected names of {self.name}, got {sorted(unknown)}")
            pairs = [(a, values[a.name]) for a in visible if a.name in values]
        else:
            if len(values) != len(visible):
                raise ValueError(f"kernargs: expected {len(visible)} values for {self.name}, got {len(values)}")
            pairs = list(zip(visible, values, strict=True))
        for argument, value in pairs:
            packed[argument.offset : argument.offset + argument.size] = _pack(argument, value)
        return packed


def _pack(argument: Argument, value: Any) -> bytes:
    if isinstance(value, float):
        if argument.size not in (4, 8):
            raise ValueError(f"kernargs: expected an int of {argument.size} bytes, got {value!r}")
        return struct.pack("<f" if argument.size == 4 else "<d", value)
    number = int(value)
    if not -(1 << (8 * argument.size - 1)) <= number < 1 << (8 * argument.size):
        raise ValueError(f"kernargs: expected a value of {argument.size} bytes at {argument.offset}, got {number}")
    return (number % (1 << (8 * argument.size))).to_bytes(argument.size, "little")


def load_code_object(
    hsaco: bytes, *, kernel: str | None = None, assembly: str | None = None, lds_bytes: int | None = None
) -> CodeObject:
    """Read one kernel of an AMDGPU ELF file.

    Args:
        hsaco: the file.
        kernel: name of the kernel, needed where the file has several.
        assembly: LLVM's assembly text of the same kernel (Triton's ``asm["amdgcn"]``); without it
            ``llvm-objdump-22`` disassembles the file.
        lds_bytes: LDS of a workgroup where the launch decides it (Triton's ``metadata.shared``); by
            default what the descriptor says.

    Raises:
        CodeObjectError: not such a file, no such kernel, or a text that is not of this kernel.
        UnsupportedInstruction: a descriptor bit that is not implemented.
    """
    try:
        elf = ELFFile(io.BytesIO(hsaco))
    except Exception as error:
        raise CodeObjectError(f"expected an ELF file, got {len(hsaco)} bytes: {error}") from error
    arch = _MACHINES.get(elf["e_flags"] & 0xFF)
    if elf["e_machine"] != "EM_AMDGPU" or arch is None:
        raise CodeObjectError(f"expected AMDGPU code for {', '.join(ARCHS)}, got flags {elf['e_flags']:#x}")
    kernels = _metadata(elf)["amdhsa.kernels"]
    names = [entry[".name"] for entry in kernels]
    if kernel is None and len(kernels) != 1:
        raise CodeObjectError(f"kernel: expected one of {', '.join(names)}, got None")
    if kernel is not None and kernel not in names:
        raise CodeObjectError(f"kernel: expected one of {', '.join(names)}, got {kernel!r}")
    metadata = kernels[0 if kernel is None else names.index(kernel)]
    raw, address = _descriptor_bytes(elf, metadata[".symbol"])
    descriptor = _parse_descriptor(raw, arch)
    # Hand-written descriptors leave the size 0.
    kernarg_bytes = max(descriptor.kernarg_bytes, metadata.get(".kernarg_segment_size", 0))
    descriptor = dataclasses.replace(descriptor, kernarg_bytes=kernarg_bytes)
    name = metadata[".name"]
    if assembly is None:
        program = parse_objdump_code(_disassemble(hsaco), name, address + struct.unpack_from("<q", raw, 16)[0])
    else:
        program = parse_amdgcn(assembly)
        if program.name != name:
            raise CodeObjectError(f"assembly: expected that of {name!r}, got {program.name!r}")
    arguments = tuple(
        Argument(a.get(".name", ""), a[".offset"], a[".size"], a[".value_kind"]) for a in metadata.get(".args", [])
    )
    return CodeObject(
        name=name,
        arch=arch,
        program=program,
        descriptor=descriptor,
        arguments=arguments,
        lds_bytes=descriptor.lds_bytes if lds_bytes is None else lds_bytes,
        entry=_entry(program, descriptor),
        max_threads=metadata.get(".max_flat_workgroup_size", 1024),
    )


def _metadata(elf: Any) -> Any:
    for section in elf.iter_sections():
        if section["sh_type"] != "SHT_NOTE":
            continue
        data, at = section.data(), 0
        while at < len(data):
            name_size, size, kind = struct.unpack_from("<III", data, at)
            start = at + 12 + (name_size + 3) // 4 * 4
            if kind == _METADATA_NOTE and data[at + 12 : at + 18] == b"AMDGPU":
                return msgpack.unpackb(data[start : start + size], strict_map_key=False)
            at = start + (size + 3) // 4 * 4
    raise CodeObjectError("expected a note with AMDGPU metadata, found none")


def _descriptor_bytes(elf: Any, symbol: str) -> tuple[bytes, int]:
    """The 64 bytes of a kernel descriptor and its address."""
    for table in (elf.get_section_by_name(".symtab"), elf.get_section_by_name(".dynsym")):
        found = table.get_symbol_by_name(symbol) if table is not None else None
        if not found:
            continue
        address = found[0]["st_value"]
        section = elf.get_section(found[0]["st_shndx"])
        start = address - section["sh_addr"]
        return section.data()[start : start + 64], address
    raise CodeObjectError(f"expected a kernel descriptor {symbol!r}, found none")


def _disassemble(hsaco: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".co") as file:
        file.write(hsaco)
        file.flush()
        try:
            done = subprocess.run([OBJDUMP, "-d", file.name], capture_output=True, text=True, check=True)
        except FileNotFoundError as error:
            raise CodeObjectError(f"{OBJDUMP} is not installed. Hint: apt-get install llvm-22") from error
    return done.stdout


def _parse_descriptor(raw: bytes, arch: str) -> Descriptor:
    lds, private, kernarg = struct.unpack_from("<III", raw, 0)
    rsrc3, rsrc1, rsrc2 = struct.unpack_from("<III", raw, 44)
    properties, preload = struct.unpack_from("<HH", raw, 56)
    gfx9 = arch.startswith("gfx9")
    wave_size = 32 if properties >> 10 & 1 else 64
    granule = 8 if gfx9 or wave_size == 32 else 4
    total = ((rsrc1 & 0x3F) + 1) * granule
    accumulators = ((rsrc3 & 0x3F) + 1) * 4 if gfx9 else total
    if rsrc1 >> 12 & 0xF:
        raise UnsupportedInstruction(f"rounding mode {rsrc1 >> 12 & 0xF:#x} of the descriptor: only to nearest even")
    if rsrc1 >> 26 & 1:
        raise UnsupportedInstruction("FP16_OVFL of the descriptor")
    if properties >> 11 & 1:
        raise UnsupportedInstruction("a dynamic stack")
    # A mode of 1 flushes results only, 2 sources only: no compiler here asks for either.
    flush = {0: True, 3: False}
    f32, f16 = rsrc1 >> 16 & 3, rsrc1 >> 18 & 3
    if f32 not in flush or f16 not in flush:
        raise UnsupportedInstruction(f"denormal modes {f32} and {f16} of the descriptor: only 0 and 3")
    order = (
        ("private_segment_buffer", 4),
        ("dispatch_ptr", 2),
        ("queue_ptr", 2),
        ("kernarg_segment_ptr", 2),
        ("dispatch_id", 2),
        ("flat_scratch_init", 2),
        ("private_segment_size", 1),
    )
    return Descriptor(
        wave_size=wave_size,
        vgprs=accumulators,
        agprs=max(total - accumulators, 0),
        lds_bytes=lds,
        scratch_bytes=private,
        kernarg_bytes=kernarg,
        user_sgprs=rsrc2 >> 1 & 0x1F,
        user_order=tuple(pair for bit, pair in enumerate(order) if properties >> bit & 1),
        preload=(preload & 0x7F, preload >> 7),
        workgroup_ids=(bool(rsrc2 >> 7 & 1), bool(rsrc2 >> 8 & 1), bool(rsrc2 >> 9 & 1)),
        workitem_ids=rsrc2 >> 11 & 3,
        private_segment=bool(rsrc2 & 1),
        flush_f32=flush[f32],
        flush_f16_f64=flush[f16],
        clamp_nan=arch.startswith("gfx12") or bool(rsrc1 >> 21 & 1),
    )


def _entry(program: Program, descriptor: Descriptor) -> int:
    """Index of the first instruction.

    Hardware that preloads kernel arguments skips the 256 bytes of the code that loads them for
    firmware that cannot; this code ends with a branch to what follows.
    """
    if not descriptor.preload[0]:
        return 0
    for index, instruction in enumerate(program.instructions):
        if instruction.mnemonic == "s_branch":
            target = program.targets[index]
            if program.addresses and program.addresses[target] != program.addresses[0] + 256:
                break
            return target
        if not re.match(r"s_load_|s_waitcnt|s_wait_", instruction.mnemonic):
            break
    raise CodeObjectError(f"{program.name}: preloads arguments, but its first 256 bytes are not their loading")
