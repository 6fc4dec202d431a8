"""Text of AMD GPU machine code to instructions.  A leaf that imports nothing of flash_rocm.

Two dialects: what LLVM prints when it compiles (Triton's ``asm["amdgcn"]``) and what ``llvm-objdump -d``
prints of a code object.  Nothing is interpreted here: registers and modifiers stay text.
"""

from __future__ import annotations

import dataclasses
import re

_LABEL = re.compile(r"^([.\w$]+):")
_OBJDUMP_SYMBOL = re.compile(r"^([0-9a-f]+) <([^>]+)>:")
_OBJDUMP_ADDRESS = re.compile(r"//\s*([0-9A-Fa-f]+):((?:\s[0-9A-Fa-f]{8})+)")
_OBJDUMP_TARGET = re.compile(r"<([^>+]+)(?:\+0x([0-9a-f]+))?>\s*$")
_DIRECT_BRANCH = re.compile(r"^s_c?branch")


class AssemblyError(ValueError):
    """Text that is not the machine code it was taken for; the message has the line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction as printed.

    ``operands`` are what commas separate ("v[0:1]", "-v2", "0x3f800000"); ``modifiers`` what follows the
    last of them ("offset:16", "offen", "op_sel_hi:[0,1]", "row_shr:1").  The text of s_waitcnt and its
    like ("vmcnt(0)", "lgkmcnt(0)") is all modifiers.  ``paired`` is the second half of a VOPD pair.
    """

    mnemonic: str
    operands: tuple[str, ...]
    modifiers: tuple[str, ...]
    text: str
    line: int  # 0-based line of the listing
    size: int = 0  # bytes, 0 where the listing does not tell
    paired: Instruction | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """The instructions of one kernel, from its entry to the end of its code."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # label -> index of the instruction it stands before
    targets: dict[int, int]  # index of a direct branch -> index of the instruction it goes to
    addresses: tuple[int, ...] = ()  # byte address of each instruction, empty where the listing has none


def split_instruction(text: str, line: int = 0, size: int = 0) -> Instruction:
    """Take one printed instruction apart."""
    first, separator, second = text.partition(" :: ")
    paired = split_instruction(second.strip(), line) if separator else None
    mnemonic, _, rest = first.strip().partition(" ")
    pieces = _split_at_commas(rest.strip())
    modifiers: list[str] = []
    if pieces:
        last, *after = pieces[-1].split(" ")
        if "(" in last and not last.startswith(("lit(", "lit64(", "neg(", "abs(", "sext(", "-lit(")):
            modifiers = pieces.pop().split(" ")  # vmcnt(0), instid0(VALU_DEP_1), hwreg(...)
        else:
            pieces[-1] = last
            modifiers = after
    return Instruction(mnemonic, tuple(pieces), tuple(m for m in modifiers if m), text, line, size, paired)


def _split_at_commas(text: str) -> list[str]:
    """Pieces between commas outside brackets."""
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append(text[start:position].strip())
            start = position + 1
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if piece]


def parse_amdgcn(text: str) -> Program:
    """The one kernel in the assembly text that LLVM prints.

    Raises:
        AssemblyError: no kernel, or a branch to a label that is not there.
    """
    found = re.search(r"^\s*\.amdhsa_kernel\s+(\S+)", text, re.MULTILINE)
    if found is None:
        raise AssemblyError("expected assembly with an .amdhsa_kernel directive, found none")
    name = found.group(1)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for number, raw in enumerate(text.splitlines()):
        code = raw.split(";", 1)[0].rstrip()
        label = _LABEL.match(code)
        if label:
            inside = inside or label.group(1) == name
            if inside:
                labels[label.group(1)] = len(instructions)
            if label.group(1).startswith(".Lfunc_end"):
                break
            continue
        code = code.strip()
        if inside and code.startswith(".section"):
            break
        if not inside or not code or code.startswith("."):
            continue
        instructions.append(split_instruction(re.sub(r"\s+", " ", code), number))
    targets = {}
    for index, instruction in enumerate(instructions):
        if _DIRECT_BRANCH.match(instruction.mnemonic):
            if instruction.operands[0] not in labels:
                raise AssemblyError(f"line {instruction.line + 1}: no label for {instruction.text!r}")
            targets[index] = labels[instruction.operands[0]]
    return Program(name, tuple(instructions), labels, targets)


def parse_objdump(text: str) -> dict[str, Program]:
    """Every symbol with code in the output of ``llvm-objdump -d``, by name.

    Raises:
        AssemblyError: a branch into another symbol, or to where no instruction starts.
    """
    programs: dict[str, Program] = {}
    name, base = "", 0
    lines: list[tuple[int, int, str, Instruction]] = []

    def finish() -> None:
        if name and lines:
            programs[name] = _objdump_program(name, base, lines)

    for number, raw in enumerate(text.splitlines()):
        symbol = _OBJDUMP_SYMBOL.match(raw)
        if symbol:
            finish()
            base, name, lines = int(symbol.group(1), 16), symbol.group(2), []
            continue
        place = _OBJDUMP_ADDRESS.search(raw)
        if not name or place is None:
            continue
        code = re.sub(r"\s+", " ", raw[: raw.index("//")].strip())
        instruction = split_instruction(code, number, 4 * len(place.group(2).split()))
        lines.append((number, int(place.group(1), 16), raw, instruction))
    finish()
    return programs


def _objdump_program(name: str, base: int, lines: list[tuple[int, int, str, Instruction]]) -> Program:
    addresses = tuple(address for _, address, _, _ in lines)
    index_of = {address: index for index, address in enumerate(addresses)}
    targets = {}
    for index, (number, _, raw, instruction) in enumerate(lines):
        if not _DIRECT_BRANCH.match(instruction.mnemonic):
            continue
        target = _OBJDUMP_TARGET.search(raw)
        if target is None or target.group(1) != name:
            raise AssemblyError(f"line {number + 1}: expected a branch inside {name}, got {raw.strip()!r}")
        address = base + int(target.group(2) or "0", 16)
        if address not in index_of:
            raise AssemblyError(f"line {number + 1}: no instruction starts at the target of {raw.strip()!r}")
        targets[index] = index_of[address]
    return Program(name, tuple(instruction for *_, instruction in lines), {name: 0}, targets, addresses)


def parse_objdump_code(text: str, name: str, entry: int) -> Program:
    """The code from byte address ``entry`` to the end of its section, whatever symbols lie in between.

    For hand-written code objects, whose labels are symbols.  Targets of branches come from their encoding.

    Raises:
        AssemblyError: no instruction starts at ``entry``, or a branch leaves the code.
    """
    instructions: list[Instruction] = []
    addresses: list[int] = []
    offsets: dict[int, int] = {}
    for number, raw in enumerate(text.splitlines()):
        place = _OBJDUMP_ADDRESS.search(raw)
        if place is None or int(place.group(1), 16) < entry:
            continue
        words = place.group(2).split()
        code = re.sub(r"\s+", " ", raw[: raw.index("//")].strip())
        instruction = split_instruction(code, number, 4 * len(words))
        if _DIRECT_BRANCH.match(instruction.mnemonic):
            distance = int(words[0], 16) & 0xFFFF
            offsets[len(instructions)] = distance - (distance >> 15 << 16)
        instructions.append(instruction)
        addresses.append(int(place.group(1), 16))
    index_of = {address: index for index, address in enumerate(addresses)}
    if entry not in index_of:
        raise AssemblyError(f"expected an instruction of {name} at {entry:#x}, found none")
    targets = {}
    for index, distance in offsets.items():
        address = addresses[index] + 4 + 4 * distance
        # What follows the end of the program may be padding that only looks like a branch.
        if address in index_of:
            targets[index] = index_of[address]
    return Program(name, tuple(instructions), {name: 0}, targets, tuple(addresses))
