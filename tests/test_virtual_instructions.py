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

from virtual_asm import hand_written

from flash_rocm.virtual import Registers, VirtualGpu, known_instructions
from flash_rocm.virtual.registry import base_name

TABLE = pathlib.Path(__file__).with_name("virtual_instructions.txt")
#: Instruction, registers before, registers after, source; a fifth part is the chip.
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
    arch = chip[0] if chip else "gfx942"
    found = execute(instruction, assignments(before), arch, wave_size=64 if arch.startswith("gfx9") else 32)
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


@pytest.mark.parametrize("name", VECTOR_COMPARISONS)
def test_vector_comparison(name: str) -> None:
    _, _, test, kind = name.split("_")
    wide = kind.endswith("64")
    for a, b in pairs(kind):
        values = {f"v4{':' * wide}": encoded(kind, a), f"v6{':' * wide}": encoded(kind, b)}
        first, second = ("v[4:5]", "v[6:7]") if wide else ("v4", "v6")
        expected = ALL_LANES if truth(test, a, b) else 0
        assert register(execute(f"{name}_e64 s[4:5], {first}, {second}", values), "s4:") == {expected}, (a, b)
        found = execute(f"{name.replace('v_cmp_', 'v_cmpx_')}_e64 s[4:5], {first}, {second}", values)
        assert int(found.exec.sum()) == (64 if expected else 0)
        found = execute(f"{name.replace('v_cmp_', 'v_cmpx_')}_e64 {first}, {second}", values, "gfx1100", wave_size=32)
        assert int(found.exec.sum()) == (32 if expected else 0)


def test_comparison_gives_zero_in_inactive_lanes() -> None:
    found = execute("v_cmp_eq_u32_e32 vcc, v4, v4", {"v4": 1, "vcc": ALL_LANES, "exec": 0xF0})
    assert register(found, "vcc") == {0xF0}


SCALAR_COMPARISONS = [name for name in known_instructions() if re.match(r"s_cmpk?_[a-z]+_[uif]32$", name)]


@pytest.mark.parametrize("name", SCALAR_COMPARISONS)
def test_scalar_comparison(name: str) -> None:
    _, form, test, kind = name.split("_")
    test = "ne" if test == "lg" and kind != "f32" else test
    for a, b in pairs(kind):
        second = f"{encoded('i16', b):#x}" if form == "cmpk" else "s5"
        if form == "cmpk" and kind == "u32" and b < 0:
            continue
        found = execute(f"{name} s4, {second}", {"s4": encoded(kind, a), "s5": encoded(kind, b)})
        assert register(found, "scc") == {int(truth(test, a, b))}, (a, b)


def test_class() -> None:
    """Bits of v_cmp_class_f32, from the ISA: signalling, quiet NaN, -inf, -normal, -denormal, -0, and positive."""
    values = [0x7FA00000, 0x7FC00000, 0xFF800000, 0xBF800000, 0x80000001, 0x80000000]
    values += [0, 1, 0x3F800000, 0x7F800000]
    for place, value in enumerate(values):
        for wanted in range(10):
            found = execute("v_cmp_class_f32_e32 vcc, v4, v5", {"v4": value, "v5": 1 << wanted})
            assert register(found, "vcc") == {ALL_LANES if wanted == place else 0}, hex(value)


# Lanes: v0 holds the number of the lane at the start.


def lanes_after(instruction: str, arch: str = "gfx942", before: str = "", **options: Any) -> np.ndarray:
    """v1 of each lane after an instruction that may read v0, the lane's number."""
    size = 64 if arch.startswith("gfx9") else 32
    code = hand_written(f"{before}\n{instruction}\n s_nop 0", arch, lds_bytes=1024, wave_size=size, **options)
    seen: list[Registers] = []
    stop = len(code.program.instructions) - 2
    VirtualGpu(arch).launch(code, grid=(1, 1, 1), block_threads=size, kernargs=b"", breakpoints={stop: seen.append})
    return seen[0].vgprs[1, 0]


L = np.arange(64)
#: Control, source lane of each lane, -1 where none (LLVM's AMDGPUModifierSyntax, "DPP").
DPP = {
    "quad_perm:[3,2,1,0]": L // 4 * 4 + 3 - L % 4,
    "row_shl:1": np.where(L % 16 < 15, L + 1, -1),
    "row_shr:2": np.where(L % 16 >= 2, L - 2, -1),
    "row_ror:8": L // 16 * 16 + (L % 16 + 8) % 16,
    "row_mirror": L // 16 * 16 + 15 - L % 16,
    "row_half_mirror": L // 8 * 8 + 7 - L % 8,
    "row_newbcast:3": L // 16 * 16 + 3,
    "wave_shr:1": L - 1,
    "wave_shl:1": np.where(L < 63, L + 1, -1),
    "wave_ror:1": (L - 1) % 64,
    "wave_rol:1": (L + 1) % 64,
    "row_bcast:15": np.where(L >= 16, L // 16 * 16 - 1, -1),
    "row_bcast:31": np.where(L >= 32, 31, -1),
}


@pytest.mark.parametrize("control", DPP)
def test_dpp(control: str) -> None:
    source = DPP[control]
    masks = "row_mask:0xf bank_mask:0xf"
    found = lanes_after(f"v_mov_b32_dpp v1, v0 {control} {masks} bound_ctrl:1", before="v_mov_b32_e32 v1, 0x77")
    np.testing.assert_array_equal(found, np.where(source < 0, 0, source))
    found = lanes_after(f"v_mov_b32_dpp v1, v0 {control} {masks}", before="v_mov_b32_e32 v1, 0x77")
    np.testing.assert_array_equal(found, np.where(source < 0, 0x77, source))
    found = lanes_after(
        f"v_mov_b32_dpp v1, v0 {control} row_mask:0x5 bank_mask:0x3 bound_ctrl:1", before="v_mov_b32_e32 v1, 0x77"
    )
    enabled = (L // 16 % 2 == 0) & (L % 16 // 4 < 2)
    np.testing.assert_array_equal(found, np.where(enabled, np.where(source < 0, 0, source), 0x77))


def test_dpp_of_gfx11() -> None:
    lane = np.arange(32)
    found = lanes_after("v_mov_b32_dpp v1, v0 row_xmask:5 row_mask:0xf bank_mask:0xf bound_ctrl:1", "gfx1100")
    np.testing.assert_array_equal(found, lane ^ 5)
    found = lanes_after("v_mov_b32_dpp v1, v0 row_share:5 row_mask:0xf bank_mask:0xf bound_ctrl:1", "gfx1100")
    np.testing.assert_array_equal(found, lane // 16 * 16 + 5)


SELECT = "s_mov_b32 s4, 0x76543210\n s_mov_b32 s5, 0xfedcba98\n"


def test_lane_moves() -> None:
    np.testing.assert_array_equal(lanes_after("v_mbcnt_lo_u32_b32 v1, -1, 0"), np.minimum(L, 32))
    np.testing.assert_array_equal(lanes_after("v_mbcnt_hi_u32_b32 v1, -1, 0"), np.maximum(L - 32, 0))
    found = lanes_after("v_writelane_b32 v1, s4, 5", before="v_mov_b32_e32 v1, 1\n s_mov_b32 s4, 99")
    np.testing.assert_array_equal(found, np.where(L == 5, 99, 1))
    rotated = "s_mov_b32 s4, 0x87654321\n s_mov_b32 s5, 0x0fedcba9"
    lane = np.arange(32)
    found = lanes_after("v_permlane16_b32 v1, v0, s4, s5", "gfx1100", rotated)
    np.testing.assert_array_equal(found, lane // 16 * 16 + (lane + 1) % 16)
    found = lanes_after("v_permlanex16_b32 v1, v0, s4, s5", "gfx1100", rotated)
    np.testing.assert_array_equal(found, (lane // 16 ^ 1) * 16 + (lane + 1) % 16)


def test_lane_moves_through_lds() -> None:
    address = "v_lshlrev_b32_e32 v2, 2, v0\n v_xor_b32_e32 v2, 4, v2"
    found = lanes_after("ds_bpermute_b32 v1, v2, v0\n s_waitcnt lgkmcnt(0)", before=address)
    np.testing.assert_array_equal(found, L ^ 1)
    rotate = "v_add_u32_e32 v2, 1, v0\n v_lshlrev_b32_e32 v2, 2, v2"
    found = lanes_after("ds_permute_b32 v1, v2, v0\n s_waitcnt lgkmcnt(0)", before=rotate)
    np.testing.assert_array_equal(found, (L - 1) % 64)
    found = lanes_after("ds_swizzle_b32 v1, v0 offset:swizzle(SWAP,16)\n s_waitcnt lgkmcnt(0)")
    np.testing.assert_array_equal(found, L ^ 16)
    found = lanes_after("ds_swizzle_b32 v1, v0 offset:0x041f\n s_waitcnt lgkmcnt(0)")
    np.testing.assert_array_equal(found, L ^ 1)


@pytest.mark.parametrize("width", [16, 32])
def test_permlane_swap(width: int) -> None:
    """Odd rows of the first register change places with even rows of the second."""
    before = "v_mov_b32_e32 v1, v0\n v_add_u32_e32 v2, 0x100, v0"
    found = lanes_after(f"v_permlane{width}_swap_b32_e32 v1, v2", "gfx950", before)
    np.testing.assert_array_equal(found, np.where(L // width % 2 == 0, L, 0x100 + L - width))


# Matrix instructions: one product of a one-hot A and B shows where each element lies.


MATRICES = {
    "v_mfma_f32_16x16x16_f16": ("gfx942", 16, 2, 4),
    "v_mfma_f32_16x16x16_bf16": ("gfx942", 16, 2, 4),
    "v_mfma_f32_32x32x8_f16": ("gfx942", 32, 2, 16),
    "v_mfma_f32_32x32x8_bf16": ("gfx942", 32, 2, 16),
    "v_mfma_f32_16x16x16f16": ("gfx90a", 16, 2, 4),
    "v_mfma_f32_16x16x16bf16_1k": ("gfx90a", 16, 2, 4),
    "v_mfma_f32_32x32x8f16": ("gfx90a", 32, 2, 16),
    "v_mfma_f32_32x32x8bf16_1k": ("gfx90a", 32, 2, 16),
    "v_mfma_f32_16x16x4_f32": ("gfx942", 16, 1, 4),
    "v_mfma_f32_32x32x2_f32": ("gfx942", 32, 1, 16),
    "v_mfma_f32_16x16x4f32": ("gfx90a", 16, 1, 4),
    "v_mfma_f32_32x32x2f32": ("gfx90a", 32, 1, 16),
    "v_mfma_f32_16x16x32_f16": ("gfx950", 16, 4, 4),
    "v_mfma_f32_16x16x32_bf16": ("gfx950", 16, 4, 4),
    "v_mfma_f32_32x32x16_f16": ("gfx950", 32, 4, 16),
    "v_mfma_f32_32x32x16_bf16": ("gfx950", 32, 4, 16),
    "v_mfma_f32_16x16x32_fp8_fp8": ("gfx942", 16, 2, 4),
    "v_mfma_f32_16x16x32_bf8_bf8": ("gfx942", 16, 2, 4),
    "v_mfma_f32_16x16x32_fp8_bf8": ("gfx942", 16, 2, 4),
    "v_mfma_f32_16x16x32_bf8_fp8": ("gfx942", 16, 2, 4),
    "v_mfma_f32_32x32x16_fp8_fp8": ("gfx942", 32, 2, 16),
    "v_mfma_f32_32x32x16_bf8_bf8": ("gfx942", 32, 2, 16),
    "v_mfma_f32_32x32x16_fp8_bf8": ("gfx942", 32, 2, 16),
    "v_mfma_f32_32x32x16_bf8_fp8": ("gfx942", 32, 2, 16),
}
#: Bits of 1.0 in every element of a register.
ONES = {"f16": 0x3C003C00, "bf16": 0x3F803F80, "f32": 0x3F800000, "fp8": 0x40404040, "bf8": 0x40404040}


@pytest.mark.parametrize("name", MATRICES)
def test_mfma_layout(name: str) -> None:
    """A is 1 in row 5, B is 1 everywhere and C the number of the lane: D[5, :] is the depth, the rest C."""
    arch, size, count, results = MATRICES[name]
    shape = re.search(r"(\d+)x(\d+)x(16|32|8|4|2)", name)
    assert shape is not None
    depth = int(shape.group(3))
    kinds = name[shape.end() :].strip("_").replace("_1k", "").split("_")
    one, other = ONES[kinds[0]], ONES[kinds[-1]]
    lines = [f"v_mov_b32_e32 v{i}, 0" for i in range(8, 8 + count)]
    lines += [f"v_mov_b32_e32 v{i}, {other:#x}" for i in range(16, 16 + count)]
    lines += [f"v_cvt_f32_u32_e32 v{i}, v0" for i in range(24, 24 + results)]
    # Row 5 of A is in the lanes 5 modulo the number of rows.
    lines += [f"v_and_b32_e32 v1, {size - 1}, v0", "v_cmp_eq_u32_e32 vcc, 5, v1", f"v_mov_b32_e32 v2, {one:#x}"]
    lines += [f"v_cndmask_b32_e32 v{i}, v{i}, v2, vcc" for i in range(8, 8 + count)]

    def span(start: int, length: int) -> str:
        return f"v[{start}:{start + length - 1}]" if length > 1 else f"v{start}"

    operands = ", ".join([span(24, results), span(8, count), span(16, count), span(24, results)])
    code = hand_written("\n".join(lines) + f"\n{name} {operands}\n s_nop 0", arch, agprs=0)
    seen: list[Registers] = []
    stop = len(code.program.instructions) - 2
    VirtualGpu(arch).launch(code, grid=(1, 1, 1), block_threads=64, kernargs=b"", breakpoints={stop: seen.append})
    found = seen[0].vgprs[24 : 24 + results, 0].view(np.float32)
    for register_number in range(results):
        for lane in range(64):
            if size == 16:
                row = 4 * (lane // 16) + register_number
            else:
                row = 8 * (register_number // 4) + 4 * (lane // 32) + register_number % 4
            assert found[register_number, lane] == lane + (depth if row == 5 else 0)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("arch", ["gfx1100", "gfx1201"])
def test_wmma_layout(arch: str, kind: str) -> None:
    count = 8 if arch == "gfx1100" else 4
    one = ONES[kind]
    lines = ["v_and_b32_e32 v1, 15, v0", "v_cmp_eq_u32_e32 vcc_lo, 5, v1", f"v_mov_b32_e32 v2, {one:#x}"]
    lines += [f"v_cndmask_b32_e64 v{i}, 0, v2, vcc_lo" for i in range(8, 8 + count)]
    lines += [f"v_mov_b32_e32 v{i}, {one:#x}" for i in range(16, 16 + count)]
    lines += [f"v_cvt_f32_u32_e32 v{i}, v0" for i in range(24, 32)]
    last = count - 1
    lines += [f"v_wmma_f32_16x16x16_{kind} v[24:31], v[8:{8 + last}], v[16:{16 + last}], v[24:31]", "s_nop 0"]
    code = hand_written("\n".join(lines), arch, agprs=0, wave_size=32)
    seen: list[Registers] = []
    stop = len(code.program.instructions) - 2
    VirtualGpu(arch).launch(code, grid=(1, 1, 1), block_threads=32, kernargs=b"", breakpoints={stop: seen.append})
    found = seen[0].vgprs[24:32, 0].view(np.float32)
    for place in range(8):
        for lane in range(32):
            row = 2 * place + lane // 16 if arch == "gfx1100" else place + 8 * (lane // 16)
            assert found[place, lane] == lane + (16 if row == 5 else 0)


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


# What is covered.


#: Executed by other tests: Triton's kernels, attention, AMD's kernels, planted faults, or with no effect here.
ELSEWHERE = re.compile(
    r"(global|buffer|scratch|ds)_|s_(load|buffer_load)_|s_(wait|nop|sleep|setprio|clause|delay_alu|barrier|sendmsg|code_end)"
    r"|s_(inst_prefetch|set_inst_prefetch_distance|icache_inv|dcache_inv|dcache_wb|setreg)|v_cmpx?_|s_cmpk?_|v_mfma_|v_wmma_"
    r"|v_permlane|v_mbcnt|v_writelane|v_cmp_class"
)


def test_every_instruction_is_in_the_table() -> None:
    rows = {base_name(row[0].split()[0]) for row in ROWS}
    assert not {base_name(name) for name in known_instructions() if not ELSEWHERE.match(name)} - rows
