"""Single instructions on the virtual GPU, against virtual_instructions.txt, which was worked out by hand."""

from __future__ import annotations

import operator
import pathlib
import re
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from virtual_asm import hand_written, lanes_of

from flash_rocm.virtual import Registers, UnsupportedInstruction, VirtualGpu, known_instructions

TABLE = pathlib.Path(__file__).with_name("virtual_instructions.txt")
#: Instruction, registers before, registers after, source; a fifth part is the chip ("gfx1100 wave64").
ROWS = [
    tuple(part.strip() for part in line.split(";"))
    for line in TABLE.read_text().splitlines()
    if line and not line.startswith("#")
]
ALL_LANES = (1 << 64) - 1


def bits(text: str) -> int:
    """Value of the table as bits."""
    for suffix, code in (("f", "<f"), ("h", "<e"), ("d", "<d")):
        if text.endswith(suffix) and not text.startswith("0x"):
            return int.from_bytes(struct.pack(code, float(text[:-1])), "little")
    return int(text, 0)


def assignments(text: str) -> dict[str, int]:
    """Registers of one part of a row: name of the (first) register, with a colon for a pair."""
    return {name: bits(value) for name, _, value in (word.partition("=") for word in text.split())}


def set_up(values: dict[str, int]) -> tuple[str, str]:
    """Instructions that put values into registers; those that set EXEC come last."""
    lines, last = [], []
    for name, value in values.items():
        low, high = value & 0xFFFFFFFF, value >> 32
        if name == "scc":
            last.append(f"s_cmp_lg_u32 {value}, 0")
        elif name in ("vcc", "exec"):
            target = lines if name == "vcc" else last
            target += [f"s_mov_b32 {name}_lo, {low:#x}", f"s_mov_b32 {name}_hi, {high:#x}"]
        else:
            kind, number = name[0], int(name[1:].rstrip(":"))
            move = {"v": "v_mov_b32_e32", "s": "s_mov_b32", "a": "v_accvgpr_write_b32"}[kind]
            lines.append(f"{move} {kind}{number}, {low:#x}")
            if name.endswith(":"):
                lines.append(f"{move} {kind}{number + 1}, {high:#x}")
    return "\n".join(lines), "\n".join(last)


def execute(instruction: str, values: dict[str, int], arch: str = "gfx942", **options: Any) -> Registers:
    """Registers after one instruction of one wave."""
    before, last = set_up(values)
    code = hand_written(f"{before}\n{last}\n{instruction}\n s_nop 0\n", arch, **options)
    seen: list[Registers] = []
    gpu = VirtualGpu(arch)
    stop = len(code.program.instructions) - 2
    gpu.launch(
        code, grid=(1, 1, 1), block_threads=code.descriptor.wave_size, kernargs=b"", breakpoints={stop: seen.append}
    )
    return seen[0]


def register(found: Registers, name: str) -> set[int]:
    """Value of a register (of each lane), of a pair if the name ends in a colon."""

    def one(kind: str, number: int) -> np.ndarray:
        if kind == "s":
            return found.sgprs[number]
        return (found.vgprs if kind == "v" else found.agprs)[number][found.exec]

    if name == "scc":
        return {int(x) for x in found.sgprs[128]}
    place = {"vcc": "s106:", "exec": "s126:"}.get(name, name)
    kind, number = place[0], int(place[1:].rstrip(":"))
    low = one(kind, number)
    if not place.endswith(":"):
        return {int(x) for x in low}
    return {int(x) | int(y) << 32 for x, y in zip(low, one(kind, number + 1), strict=True)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table(row: tuple[str, ...]) -> None:
    instruction, before, after, _, *chip = row
    arch, _, wave = chip[0].partition(" ") if chip else ("gfx942", "", "")
    found = execute(instruction, assignments(before), arch, wave_size=64 if wave else lanes_of(arch))
    for name, value in assignments(after).items():
        assert register(found, name) == {value}, (name, hex(value), [hex(x) for x in register(found, name)])


# Comparisons: from the meaning of their names.

_ORDERED = {
    "lt": operator.lt,
    "eq": operator.eq,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
NAN = float("nan")


def truth(test: str, a: float, b: float) -> bool:
    """What a comparison says of two numbers (a, b may be NaN)."""
    unordered = a != a or b != b
    if test in ("ne", "neq"):
        return a != b
    if test in ("o", "u"):
        return unordered == (test == "u")
    if test == "lg":
        return not unordered and a != b
    if test == "nlg":
        return unordered or a == b
    if test.startswith("n"):
        return unordered or not _ORDERED[test[1:]](a, b)
    return not unordered and _ORDERED[test](a, b)


def encoded(kind: str, value: float) -> int:
    """Bits of a value of type "f32", "u16", ..."""
    width = int(kind[1:])
    if kind[0] == "f":
        return int.from_bytes(struct.pack({16: "<e", 32: "<f", 64: "<d"}[width], value), "little")
    return int(value) & ((1 << width) - 1)


def pairs(kind: str) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = [(1, 2), (2, 1), (2, 2)]
    if kind[0] == "i":
        found += [(-1, 1), (1, -1)]
    if kind[0] == "f":
        found += [(-1.5, 1.0), (NAN, 1.0), (1.0, NAN), (NAN, NAN)]
    return found


VECTOR_COMPARISONS = [name for name in known_instructions() if re.match(r"v_cmp_(?!class)[a-z]+_[uif]\d\d$", name)]


def vector_comparison(name: str, arch: str) -> str:
    """Instruction that compares v4 and v6, or the pairs there; on gfx942 with the result in s[4:5]."""
    wide, half = name.endswith("64"), name.endswith("16") and arch != "gfx942"
    first, second = ("v[4:5]", "v[6:7]") if wide else ("v4.l", "v6.l") if half else ("v4", "v6")
    return f"{name}_e64 {'s[4:5], ' if arch == 'gfx942' else ''}{first}, {second}"


@pytest.mark.parametrize("name", VECTOR_COMPARISONS)
def test_vector_comparison(name: str) -> None:
    _, _, test, kind = name.split("_")
    to_exec = name.replace("v_cmp_", "v_cmpx_")
    for a, b in pairs(kind):
        wide = ":" * kind.endswith("64")
        values = {f"v4{wide}": encoded(kind, a), f"v6{wide}": encoded(kind, b)}
        expected = ALL_LANES if truth(test, a, b) else 0
        assert register(execute(vector_comparison(name, "gfx942"), values), "s4:") == {expected}, (a, b)
        for arch in ("gfx942", "gfx1100"):
            found = execute(vector_comparison(to_exec, arch), values, arch, wave_size=lanes_of(arch))
            assert int(found.exec.sum()) == (lanes_of(arch) if expected else 0), (a, b)


def test_comparison_gives_zero_in_inactive_lanes() -> None:
    found = execute("v_cmp_eq_u32_e32 vcc, v4, v4", {"v4": 1, "vcc": ALL_LANES, "exec": 0xF0})
    assert register(found, "vcc") == {0xF0}


SCALAR_COMPARISONS = [name for name in known_instructions() if re.match(r"s_cmpk?_[a-z]+_[uif]32$", name)]


def scalar_comparison(name: str, second: float) -> tuple[str, str]:
    """Chip and instruction; s_cmpk has the second value in it."""
    _, form, _, kind = name.split("_")
    arch = "gfx1201" if kind == "f32" else "gfx942"
    return arch, f"{name} s4, {encoded('i16', second):#x}" if form == "cmpk" else f"{name} s4, s5"


@pytest.mark.parametrize("name", SCALAR_COMPARISONS)
def test_scalar_comparison(name: str) -> None:
    _, form, test, kind = name.split("_")
    test = "ne" if test == "lg" and kind != "f32" else test
    for a, b in pairs(kind):
        if form == "cmpk" and kind == "u32" and b < 0:
            continue
        arch, instruction = scalar_comparison(name, b)
        values = {"s4": encoded(kind, a), "s5": encoded(kind, b)}
        found = execute(instruction, values, arch, wave_size=lanes_of(arch))
        assert register(found, "scc") == {int(truth(test, a, b))}, (a, b)


CLASS = "v_cmp_class_f32_e32 vcc, v4, v5"


def test_class() -> None:
    """Bits of v_cmp_class_f32, from the ISA: signalling, quiet NaN, -inf, -normal, -denormal, -0, and positive."""
    values = [0x7FA00000, 0x7FC00000, 0xFF800000, 0xBF800000, 0x80000001, 0x80000000]
    values += [0, 1, 0x3F800000, 0x7F800000]
    for place, value in enumerate(values):
        for wanted in range(10):
            found = execute(CLASS, {"v4": value, "v5": 1 << wanted})
            assert register(found, "vcc") == {ALL_LANES if wanted == place else 0}, hex(value)


def test_fma_rounds_once() -> None:
    """Random float32 triples against exact rational arithmetic, the hard cases among them."""
    from flash_rocm.virtual.floats import fma32

    random = np.random.default_rng(0)
    a = random.integers(0, 1 << 32, 3000, np.uint32).view(np.float32)
    b = random.integers(0, 1 << 32, 3000, np.uint32).view(np.float32)
    # Addends near halves of the last place of the product, and far below it.
    c = (-(a.astype(np.float64) * b) * (1 + 2.0 ** -random.integers(1, 60, 3000))).astype(np.float32)
    with np.errstate(all="ignore"):
        result = fma32(a, b, c)
    for x, y, z, found in zip(a, b, c, result, strict=True):
        if np.isfinite([x, y, z]).all():
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            assert nearest_float32(exact) == found or exact == 0


def nearest_float32(exact: Any) -> float:
    """Exact rational to float32, ties to even."""
    if exact == 0:
        return 0.0
    magnitude = abs(exact)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length(), -126)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = exponent - 23
    scaled = magnitude / Fraction(2) ** unit
    rounded = round(scaled)  # Python rounds ties to even
    value = float(rounded) * 2.0**unit if rounded.bit_length() + unit <= 128 else float("inf")
    return -value if exact < 0 else value


def test_comparison_may_name_exec() -> None:
    """Compiled code for gfx9 does, where it wants nothing but EXEC."""
    found = execute("v_cmpx_le_u32_e64 exec, 1, v4", {"v4": 0})
    assert not found.exec.any()
    assert execute("v_cmpx_le_u32_e64 exec, 1, v4", {"v4": 1}).exec.all()


SET_MODE = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 3"
RESET_MODE = SET_MODE.removesuffix("3") + "0"


def test_mode_keeps_denormals() -> None:
    """Between the two, as compiled divisions have them, and not around."""
    values = {"v4": 1, "v5": 0}
    add = "v_add_f32_e32 v{}, v4, v5"
    to_nearest = SET_MODE.replace("4, 2), 3", "2, 2), 0")  # which changes nothing
    lines = [add.format(0), SET_MODE, to_nearest, add.format(1), RESET_MODE, add.format(2)]
    found = execute("\n".join(lines), values, flush_f32=True)
    assert [register(found, f"v{number}") for number in range(3)] == [{0}, {1}, {0}]


@pytest.mark.parametrize(
    ("instruction", "words"),
    [(SET_MODE, "ends in another mode"), (SET_MODE.replace("4, 2), 3", "2, 2), 3"), "only 0 and 3")],
)
def test_other_modes_are_not_supported(instruction: str, words: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=words):
        execute(instruction, {}, flush_f32=True)


#: (chip, instruction) of this file, see test_virtual_coverage.py.
EXECUTED = [
    *((row[4].partition(" ")[0] if len(row) > 4 else "gfx942", row[0]) for row in ROWS),
    *(("gfx942", vector_comparison(name, "gfx942")) for name in VECTOR_COMPARISONS),
    *(
        (arch, vector_comparison(name.replace("v_cmp_", "v_cmpx_"), arch))
        for name in VECTOR_COMPARISONS
        for arch in ("gfx942", "gfx1100")
    ),
    *(scalar_comparison(name, 1) for name in SCALAR_COMPARISONS),
    ("gfx942", CLASS),
    ("gfx942", SET_MODE),
]
