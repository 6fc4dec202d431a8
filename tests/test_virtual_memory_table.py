"""Each memory instruction on each chip that has it, against virtual_memory.txt, which was worked out by hand."""

from __future__ import annotations

import dataclasses
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from virtual_asm import hand_written, lanes_of, span

from flash_rocm.virtual import Registers, UnsupportedInstruction, VirtualGpu

TABLE = pathlib.Path(__file__).with_name("virtual_memory.txt")
GFX9 = ("gfx90a", "gfx942", "gfx950")
RDNA = ("gfx1100", "gfx1201")
#: Lanes that take part: the others must neither read nor write anything.
ACTIVE = (1, 3, 4, 6)
#: Bytes between the places of two lanes, in memory and in LDS; bytes of a lane's scratch.
SLOT = 32
#: Registers of data, and those that an atomic returns to.
DATA, RETURNED = 8, 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table for one mnemonic; parts are (bytes, distance from the lane's place)."""

    mnemonic: str
    chips: tuple[str, ...]
    registers: tuple[int, ...]
    before: tuple[tuple[bytes, int], ...]
    after: tuple[tuple[bytes, int], ...]
    left: tuple[int, ...]  # registers of a load

    @property
    def space(self) -> str:
        return self.mnemonic.partition("_")[0]

    @property
    def parts(self) -> tuple[tuple[bytes, int], ...]:
        return self.before or self.after


def part_of(text: str) -> tuple[bytes, int]:
    digits, _, place = text.partition("@")
    if digits.startswith("0x"):
        data = int(digits, 16).to_bytes((len(digits) - 2) // 2, "little")
    elif digits[-1] in "fd" and "." in digits:
        data = struct.pack("<" + digits[-1], float(digits[:-1]))
    else:
        data = bytes.fromhex(digits)
    # Bytes and halves lie where no dword starts.
    return data, int(place) if place else {1: 9, 2: 10}.get(len(data), 8)


def rows_of(line: str) -> Iterator[Row]:
    kind, names, registers, before, after, _, *chips = (part.strip() for part in line.split(";"))
    old, new = (names.split() * 2)[:2]
    stems = {
        "load": ["global_load_", "buffer_load_", "scratch_load_"],
        "store": ["global_store_", "buffer_store_", "scratch_store_"],
        "atomic": ["global_atomic_", "buffer_atomic_"],
    }.get(kind, ["ds_" if kind.startswith("ds_") else kind.replace(" ", "_") + "_"])
    named = {old: GFX9, new: RDNA} if old != new else {old: GFX9 + RDNA}
    load = kind.endswith("load")
    for name, having in named.items():
        if name == "-":
            continue
        mnemonics = [stem + name for stem in stems]
        if kind == "ds_atomic":
            mnemonics.append("ds_" + name.replace("_", "_rtn_", 1))
        for mnemonic in mnemonics:
            yield Row(
                mnemonic,
                tuple(chips[0].split()) if chips else having,
                tuple(int(x, 16) for x in registers.split()),
                tuple(part_of(x) for x in before.split()),
                () if load else tuple(part_of(x) for x in after.split()),
                tuple(int(x, 16) for x in after.split()) if load else (),
            )


ROWS = [row for line in TABLE.read_text().splitlines() if line and line[0] != "#" for row in rows_of(line)]
MNEMONICS = sorted({row.mnemonic for row in ROWS})


def forms(row: Row, chip: str) -> Iterator[tuple[str, bool]]:
    """The instruction with each kind of address, and whether it returns what an atomic replaced."""
    name, data, place = row.mnemonic, span(DATA, len(row.registers)), row.parts[0][1]
    size = len(row.parts[0][0])
    if row.space == "ds":
        yield _lds_form(row), "_rtn_" in name
        return
    addresses = {
        "global": [("v1, {}s[4:5]", f"offset:{place}"), ("v[2:3], {}off", f"offset:{place}")],
        "buffer": [
            (f"v1, s[4:7], {'null' if chip == 'gfx1201' else 0} offen", f"offset:{place}"),
            ("v1, s[4:7], s13 offen", f"offset:{place - 8}" if place > 8 else ""),
        ],
        # gfx90a has no form without a register.
        "scratch": [("off, {}s13", f"offset:{place - 8}" if place > 8 else ""), ("v4, {}off", f"offset:{place}")]
        + ([("off, {}off", f"offset:{place}")] if chip != "gfx90a" else []),
    }[row.space]
    for address, offset in addresses:
        for returns in (False, True) if "_atomic_" in name else (False,):
            flag = _return_flag(chip) if returns else ""
            if row.space == "buffer":
                operands = f"{data}, {address}"
            elif "_load_" in name:
                operands = f"{data}, {address.format('')}"
            else:
                operands = address.format(f"{data}, ")
            if returns and row.space == "global":
                operands = f"{span(RETURNED, size // 4)}, {operands}"
            yield " ".join(f"{name} {operands} {offset} {flag}".split()), returns


def _return_flag(chip: str) -> str:
    return {"gfx90a": "glc", "gfx1100": "glc", "gfx1201": "th:TH_ATOMIC_RETURN"}.get(chip, "sc0")


def _lds_form(row: Row) -> str:
    name, count = row.mnemonic, len(row.registers)
    offset = f"offset:{row.parts[0][1]}"
    if len(row.parts) == 2:
        size = len(row.parts[0][0])
        unit = size * (64 if "st64" in name or "stride64" in name else 1)
        offset = " ".join(f"offset{i}:{place // unit}" for i, (_, place) in enumerate(row.parts) if place)
        halves = f"{span(DATA, size // 4)}, {span(DATA + size // 4, size // 4)}"
        return f"{name} {span(DATA, count)}, v1 {offset}" if row.left else f"{name} v1, {halves} {offset}"
    if row.left:
        return f"{name} {span(DATA, count)}, v1 {offset}"
    destination = f"v{RETURNED}, " if "_rtn_" in name else ""
    return f"{name} {destination}v1, {span(DATA, count)} {offset}"


#: v1 holds the lane's place in memory or LDS, v[2:3] its address; LDS and scratch hold copies of the memory.
PROLOGUE = """
    v_lshlrev_b32_e32 v1, 5, v0
    v_add_u32_e32 v2, s4, v1
    v_mov_b32_e32 v3, s5
    v_mov_b32_e32 v4, 0
    s_mov_b32 s13, 8
    global_load_dwordx4 v[20:23], v1, s[4:5]
    global_load_dwordx4 v[24:27], v1, s[4:5] offset:16
    s_waitcnt vmcnt(0)
    ds_write_b128 v1, v[20:23]
    ds_write_b128 v1, v[24:27] offset:16
    scratch_store_dwordx4 off, v[20:23], off
    scratch_store_dwordx4 off, v[24:27], off offset:16
"""
COPY_BACK = {
    "ds": "ds_read_b128 v[20:23], v1\n ds_read_b128 v[24:27], v1 offset:16\n",
    "scratch": "scratch_load_dwordx4 v[20:23], off, off\n scratch_load_dwordx4 v[24:27], off, off offset:16\n",
}
WRITE_BACK = """
    s_waitcnt vmcnt(0) lgkmcnt(0)
    global_store_dwordx4 v1, v[20:23], s[4:5]
    global_store_dwordx4 v1, v[24:27], s[4:5] offset:16
"""


def run(instruction: str, chip: str, registers: dict[int, int], memory: np.ndarray, space: str) -> Registers:
    """One wave executes an instruction in the lanes ACTIVE; ``memory`` holds what its space does afterwards."""
    lanes = lanes_of(chip)
    gpu = VirtualGpu(chip)
    address = gpu.memory.add("memory", memory)
    words = [address & 0xFFFFFFFF, address >> 32, memory.size, 0 if chip in GFX9 else 3 << 28]
    before = [f"s_mov_b32 s{4 + i}, {word:#x}" for i, word in enumerate(words)]
    before += [f"v_mov_b32_e32 v{number}, {value:#x}" for number, value in registers.items()]
    mask = sum(1 << lane for lane in ACTIVE)
    only, all_of_them = (
        (f"s_mov_b64 exec, {mask:#x}", "s_mov_b64 exec, -1")
        if lanes == 64
        else (f"s_mov_b32 exec_lo, {mask:#x}", "s_mov_b32 exec_lo, -1")
    )
    lines = "\n".join(before) + PROLOGUE + f"{only}\n{instruction}\n s_nop 0\n s_waitcnt vmcnt(0) lgkmcnt(0)\n"
    lines += f"{all_of_them}\n{COPY_BACK[space]}{WRITE_BACK}" if space in COPY_BACK else ""
    code = hand_written(lines, chip, lds_bytes=64 * SLOT, scratch_bytes=SLOT, wave_size=lanes)
    stop = [x.text for x in code.program.instructions].index("s_nop 0")
    seen: list[Registers] = []
    gpu.launch(code, grid=(1, 1, 1), block_threads=lanes, kernargs=[0] * 8, breakpoints={stop: seen.append})
    return seen[0]


def overlaid(memory: np.ndarray, parts: tuple[tuple[bytes, int], ...]) -> np.ndarray:
    """The memory with bytes at the places of the active lanes."""
    changed = memory.copy()
    for lane in ACTIVE:
        for data, place in parts:
            changed[SLOT * lane + place :][: len(data)] = np.frombuffer(data, np.uint8)
    return changed


@pytest.mark.parametrize("mnemonic", MNEMONICS)
def test_memory_table(mnemonic: str) -> None:
    for row in (row for row in ROWS if row.mnemonic == mnemonic):
        for chip in row.chips:
            for instruction, returns in forms(row, chip):
                check(row, chip, instruction, returns)


def check(row: Row, chip: str, instruction: str, returns: bool) -> None:
    lanes = lanes_of(chip)
    start = overlaid(np.random.default_rng(0).integers(0, 256, lanes * SLOT, np.uint8), row.before)
    memory, expected = start.copy(), overlaid(start, row.after)
    registers = dict(enumerate(row.registers, DATA))
    size = sum(len(data) for data, _ in row.parts)
    target = RETURNED if row.space in ("global", "ds") else DATA
    if returns:
        registers |= {target + i: registers.get(target + i, 7) for i in range(size // 4)}
    found = run(instruction, chip, registers, memory, row.space)
    np.testing.assert_array_equal(memory, expected, err_msg=f"{chip}: {instruction}")
    results = dict(enumerate(row.left, DATA))
    if returns:
        results = dict(enumerate(np.frombuffer(row.before[0][0], "<u4").tolist(), target))
    active = np.isin(np.arange(lanes), ACTIVE)
    for number, value in registers.items():
        wanted = np.where(active, results.get(number, value), value)
        np.testing.assert_array_equal(found.vgprs[number, 0], wanted, err_msg=f"{chip}: {instruction} v{number}")


# Loads to LDS


#: Name, bytes in memory, bytes in LDS, distance between lanes there, chips.  Source: "Memory Buffer Load to LDS", 9.1.9
#: of the CDNA4 reference, as others quote it: less than a dword is extended to one; three dwords are 16 bytes apart.
TO_LDS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "ubyte": ("f1", "f1000000", 4, ("gfx942", "gfx950")),
    "ushort": ("34f2", "34f20000", 4, ("gfx942", "gfx950")),
    "dword": ("01234567", "01234567", 4, ("gfx942", "gfx950")),
    "dwordx3": ("0123456789abcdef02468ace", "0123456789abcdef02468ace", 16, ("gfx950",)),
    "dwordx4": ("0123456789abcdef02468ace13579bdf", "0123456789abcdef02468ace13579bdf", 16, ("gfx950",)),
}
#: gfx90a has only these, and not the wide ones.
BUFFER_TO_LDS = {name: (*row[:3], ("gfx90a", *row[3]) if "x" not in name else row[3]) for name, row in TO_LDS.items()}
BUFFER_TO_LDS["sbyte"] = ("f1", "f1ffffff", 4, ("gfx90a", "gfx942", "gfx950"))
BUFFER_TO_LDS["sshort"] = ("34f2", "34f2ffff", 4, ("gfx90a", "gfx942", "gfx950"))
LDS_FORMS = [
    *((chip, f"global_load_lds_{name} v1, s[4:5] offset:8", row) for name, row in TO_LDS.items() for chip in row[3]),
    *(
        (chip, f"buffer_load_{name} v1, s[4:7], 0 offen offset:8 lds", row)
        for name, row in BUFFER_TO_LDS.items()
        for chip in row[3]
    ),
]


@pytest.mark.parametrize("form", LDS_FORMS, ids=lambda form: f"{form[0]}-{form[1].split()[0]}")
def test_loads_to_lds(form: tuple[str, str, tuple[str, str, int, tuple[str, ...]]]) -> None:
    """LDS address: M0 + offset + lane * distance; inactive lanes leave their place as it was."""
    chip, instruction, (source, target, distance, _) = form
    memory = overlaid(np.random.default_rng(0).integers(0, 256, 64 * SLOT, np.uint8), ((bytes.fromhex(source), 8),))
    expected = memory.copy()
    data = np.frombuffer(bytes.fromhex(target), np.uint8)
    for lane in ACTIVE:
        expected[64 + 8 + distance * lane :][: data.size] = data
    run(f"s_mov_b32 m0, 64\n{instruction}", chip, {}, memory, "ds")
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize("name", ["dwordx2", "short_d16"])
def test_loads_that_cannot_go_to_lds(name: str) -> None:
    with pytest.raises(UnsupportedInstruction, match="to LDS"):
        run(f"buffer_load_{name} v1, s[4:7], 0 offen lds", "gfx950", {}, np.zeros(64 * SLOT, np.uint8), "ds")


# Scalar loads


#: Name, dwords, chips (LLVM: b96 is new in gfx12).
SCALAR_LOADS: list[tuple[str, int, tuple[str, ...]]] = [
    *(
        (name, 1 << i, GFX9)
        for i, name in ((0, "dword"), (1, "dwordx2"), (2, "dwordx4"), (3, "dwordx8"), (4, "dwordx16"))
    ),
    *((name, 1 << i, RDNA) for i, name in ((0, "b32"), (1, "b64"), (2, "b128"), (3, "b256"), (4, "b512"))),
    ("b96", 3, ("gfx1201",)),
]
SCALAR_FORMS = [
    (chip, f"s_{kind}load_{name} {'s16' if count == 1 else f's[16:{15 + count}]'}, {address}", count)
    for name, count, chips in SCALAR_LOADS
    for chip in chips
    for kind, address in (
        ("", "s[4:5], 0x10"),
        ("", f"s[4:5], s13{' offset:0x8' if chip not in ('gfx90a', 'gfx1100') else ''}"),
        ("buffer_", "s[4:7], 0x10"),
    )
]


@pytest.mark.parametrize("form", SCALAR_FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def test_scalar_loads(form: tuple[str, str, int]) -> None:
    """Dwords in the order of their addresses; of a buffer, the last one is out of range and 0."""
    chip, instruction, count = form
    memory = np.random.default_rng(0).integers(0, 256, lanes_of(chip) * SLOT, np.uint8)
    first = 2 if instruction.endswith("s13") else 4
    expected = memory.view(np.uint32)[first : first + count].copy()
    before = "s_mov_b32 s13, 8\n"
    if "buffer" in instruction:
        before += f"s_mov_b32 s6, {4 * (4 + count - 1)}\n"
        expected[-1] = 0
    found = run(before + instruction, chip, {}, memory, "scalar")
    np.testing.assert_array_equal(found.sgprs[16 : 16 + count, 0], expected)


#: (chip, instruction) of this file, see test_virtual_coverage.py.
EXECUTED = [
    *((chip, text) for row in ROWS for chip in row.chips for text, _ in forms(row, chip)),
    *((chip, text) for chip, text, _ in LDS_FORMS),
    *((chip, text) for chip, text, _ in SCALAR_FORMS),
]
