"""Instructions whose lanes differ on the virtual GPU: DPP, permutations and products of matrices."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from virtual_asm import hand_written, lanes_of, span

from flash_rocm.virtual import Registers, VirtualGpu

# Lanes: v0 holds the number of the lane at the start.


def lanes_after(instruction: str, arch: str = "gfx942", before: str = "", **options: Any) -> np.ndarray:
    """v1 of each lane after an instruction that may read v0, the lane's number."""
    size = lanes_of(arch)
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


FULL_DPP = "row_mask:0xf bank_mask:0xf bound_ctrl:1"
H = np.arange(32)
#: Nibbles that name the next lane of 16, the last one the first.
ROTATED = "s_mov_b32 s4, 0x87654321\n s_mov_b32 s5, 0x0fedcba9"
TO_NEIGHBOUR = "v_lshlrev_b32_e32 v2, 2, v0\n v_xor_b32_e32 v2, 4, v2"
TO_NEXT = "v_add_u32_e32 v2, 1, v0\n v_lshlrev_b32_e32 v2, 2, v2"
HUNDRED_MORE = "v_mov_b32_e32 v1, v0\n v_add_u32_e32 v2, 0x100, v0"
#: Instruction, chip, what comes before it, v1 of each lane behind it.
LANE_MOVES: list[tuple[str, str, str, np.ndarray]] = [
    (f"v_mov_b32_dpp v1, v0 row_xmask:5 {FULL_DPP}", "gfx1100", "", H ^ 5),
    (f"v_mov_b32_dpp v1, v0 row_share:5 {FULL_DPP}", "gfx1100", "", H // 16 * 16 + 5),
    ("v_mbcnt_lo_u32_b32 v1, -1, 0", "gfx942", "", np.minimum(L, 32)),
    ("v_mbcnt_hi_u32_b32 v1, -1, 0", "gfx942", "", np.maximum(L - 32, 0)),
    ("v_writelane_b32 v1, s4, 5", "gfx942", "v_mov_b32_e32 v1, 1\n s_mov_b32 s4, 99", np.where(L == 5, 99, 1)),
    ("v_permlane16_b32 v1, v0, s4, s5", "gfx1100", ROTATED, H // 16 * 16 + (H + 1) % 16),
    ("v_permlanex16_b32 v1, v0, s4, s5", "gfx1100", ROTATED, (H // 16 ^ 1) * 16 + (H + 1) % 16),
    ("ds_bpermute_b32 v1, v2, v0", "gfx942", TO_NEIGHBOUR, L ^ 1),
    ("ds_bpermute_b32 v1, v2, v0", "gfx1201", TO_NEIGHBOUR, H ^ 1),
    ("ds_permute_b32 v1, v2, v0", "gfx942", TO_NEXT, (L - 1) % 64),
    ("ds_permute_b32 v1, v2, v0", "gfx1201", TO_NEXT, (H - 1) % 32),
    ("ds_swizzle_b32 v1, v0 offset:swizzle(SWAP,16)", "gfx942", "", L ^ 16),
    ("ds_swizzle_b32 v1, v0 offset:0x041f", "gfx942", "", L ^ 1),
    # Odd rows of the first register change places with even rows of the second.
    ("v_permlane16_swap_b32_e32 v1, v2", "gfx950", HUNDRED_MORE, np.where(L // 16 % 2 == 0, L, 0x100 + L - 16)),
    ("v_permlane32_swap_b32_e32 v1, v2", "gfx950", HUNDRED_MORE, np.where(L // 32 % 2 == 0, L, 0x100 + L - 32)),
]


@pytest.mark.parametrize("row", LANE_MOVES, ids=lambda row: f"{row[1]}-{row[0]}")
def test_lane_moves(row: tuple[str, str, str, np.ndarray]) -> None:
    instruction, arch, before, expected = row
    wait = "\n s_waitcnt lgkmcnt(0)" if instruction.startswith("ds_") else ""
    np.testing.assert_array_equal(lanes_after(instruction + wait, arch, before), expected)


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


def mfma(name: str) -> str:
    """The instruction with A from v8 on, B from v16 on, C and D from v24 on."""
    _, _, count, results = MATRICES[name]
    return f"{name} {span(24, results)}, {span(8, count)}, {span(16, count)}, {span(24, results)}"


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
    code = hand_written("\n".join(lines) + f"\n{mfma(name)}\n s_nop 0", arch, agprs=0)
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


#: Registers of A and B: the two halves of a wave hold the same on gfx11.
WMMA = {"gfx1100": 8, "gfx1201": 4}


def wmma(arch: str, kind: str) -> str:
    count = WMMA[arch]
    return f"v_wmma_f32_16x16x16_{kind} {span(24, 8)}, {span(8, count)}, {span(16, count)}, {span(24, 8)}"


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("arch", WMMA)
def test_wmma_layout(arch: str, kind: str) -> None:
    count = WMMA[arch]
    one = ONES[kind]
    lines = ["v_and_b32_e32 v1, 15, v0", "v_cmp_eq_u32_e32 vcc_lo, 5, v1", f"v_mov_b32_e32 v2, {one:#x}"]
    lines += [f"v_cndmask_b32_e64 v{i}, 0, v2, vcc_lo" for i in range(8, 8 + count)]
    lines += [f"v_mov_b32_e32 v{i}, {one:#x}" for i in range(16, 16 + count)]
    lines += [f"v_cvt_f32_u32_e32 v{i}, v0" for i in range(24, 32)]
    lines += [wmma(arch, kind), "s_nop 0"]
    code = hand_written("\n".join(lines), arch, agprs=0, wave_size=32)
    seen: list[Registers] = []
    stop = len(code.program.instructions) - 2
    VirtualGpu(arch).launch(code, grid=(1, 1, 1), block_threads=32, kernargs=b"", breakpoints={stop: seen.append})
    found = seen[0].vgprs[24:32, 0].view(np.float32)
    for place in range(8):
        for lane in range(32):
            row = 2 * place + lane // 16 if arch == "gfx1100" else place + 8 * (lane // 16)
            assert found[place, lane] == lane + (16 if row == 5 else 0)


#: (chip, instruction) of this file, see test_virtual_coverage.py.
EXECUTED = [
    *(("gfx942", f"v_mov_b32_dpp v1, v0 {control} row_mask:0xf bank_mask:0xf") for control in DPP),
    *((arch, instruction) for instruction, arch, _, _ in LANE_MOVES),
    *((MATRICES[name][0], mfma(name)) for name in MATRICES),
    *((arch, wmma(arch, kind)) for arch in WMMA for kind in ("f16", "bf16")),
]
