"""What ``flash-rocm inspect`` counts in machine code, and the formulas of its static model."""

from __future__ import annotations

import dataclasses

import pytest

from flash_rocm.amdgpu.assembly import parse_amdgcn, split_instruction
from flash_rocm.inspect import InspectError, counts, loops
from flash_rocm.inspect.counts import Mix

#: Written by hand: a loop that branches around its mask, inside an outer loop, and a second, masked loop.
SNIPPET = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
.outer:
	v_mov_b32_e32 v9, 0
.first:
	ds_read_b128 v[0:3], v8
	s_waitcnt lgkmcnt(0)
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	s_cmp_lt_i32 s0, s1
	s_cbranch_scc1 .unmasked
	v_cmp_gt_i32_e32 vcc, s0, v9
	v_cndmask_b32_e32 v4, v5, v6, vcc
.unmasked:
	v_pk_mul_f32 v[4:5], v[4:5], v[6:7]
	v_exp_f32_e32 v4, v4
	v_mul_lo_u32 v4, v4, v5
	v_nop
	s_nop 1
	s_barrier
	s_add_i32 s0, s0, 64
	s_cbranch_scc1 .exit
	global_load_dwordx4 v[0:3], v[6:7], off
	s_branch .first
.exit:
	scratch_load_dword v3, off, off offset:16
	s_cbranch_vccnz .outer
.second:
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_cmp_gt_i32_e32 vcc, s0, v9
	v_cndmask_b32_e32 v4, v5, v6, vcc
	v_cndmask_b32_e32 v4, v5, v6, vcc
	v_exp_f32_e32 v4, v4
	scratch_store_dword off, v3, off offset:16
	s_cbranch_scc0 .second
	scratch_load_dword v3, off, off offset:16
	s_endpgm
.Lfunc_end0:
	.amdhsa_kernel kernel
	.end_amdhsa_kernel
"""


# --------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]", "matrix"),
        ("v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]", "matrix"),
        ("v_exp_f32_e32 v1, v2", "trans"),
        ("v_rcp_iflag_f32_e32 v1, v2", "trans"),
        ("v_mul_lo_u32 v1, v2, v3", "slow"),
        ("v_mad_u64_u32 v[0:1], s[0:1], v2, v3, v[4:5]", "slow"),
        ("v_mul_f32_e32 v1, v2, v3", "valu"),
        ("v_accvgpr_read_b32 v1, a2", "valu"),
        ("v_dual_mul_f32 v1, v2, v3 :: v_dual_add_f32 v4, v5, v6", "valu"),
        ("v_nop", "valu"),
        ("ds_bpermute_b32 v1, v2, v3", "lds"),
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "vmem"),
        ("global_store_short v[0:1], v2, off", "vmem"),
        ("buffer_store_dword v1, off, s[88:91], 0 offset:4", "scratch"),
        ("scratch_load_b32 v1, off, off", "scratch"),
        ("s_load_dword s0, s[4:5], 0x0", "smem"),
        ("s_buffer_load_b32 s0, s[4:7], 0x0", "smem"),
        ("s_add_i32 s0, s0, 64", "salu"),
        ("s_cmp_lt_i32 s0, s1", "salu"),
        ("s_waitcnt lgkmcnt(0)", "other"),
        ("s_wait_dscnt 0x0", "other"),
        ("s_delay_alu instid0(VALU_DEP_1)", "other"),
        ("s_barrier", "other"),
        ("s_cbranch_scc1 .L1", "other"),
        ("s_setprio 2", "other"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert counts.kind(split_instruction(text), "gfx90a") == kind


def test_a_buffer_without_an_address_is_scratch_on_gfx90a_only() -> None:
    text = "buffer_load_dword v1, off, s[88:91], 0 offset:4"
    assert counts.kind(split_instruction(text), "gfx942") == "vmem"


@pytest.mark.parametrize(
    ("arch", "name", "cycles"),
    [
        ("gfx942", "v_mfma_f32_32x32x8_bf16", 32),
        ("gfx942", "v_mfma_f32_16x16x16_f16", 16),
        ("gfx90a", "v_mfma_f32_32x32x8bf16_1k", 64),
        ("gfx90a", "v_mfma_f32_16x16x16f16", 32),
        ("gfx950", "v_mfma_f32_32x32x16_bf16", 32),
        ("gfx950", "v_mfma_f32_16x16x32_f16", 16),
        ("gfx942", "v_mfma_f32_32x32x2_f32", 64),
        ("gfx90a", "v_mfma_f32_16x16x4f32", 32),
        ("gfx1100", "v_wmma_f32_16x16x16_bf16", 32),
        ("gfx1201", "v_wmma_f32_16x16x16_f16", 16),
    ],
)
def test_matrix_cycles(arch: str, name: str, cycles: int) -> None:
    assert counts.matrix_work(split_instruction(f"{name} v[0:7], v[8:9], v[10:11], v[0:7]"), arch)[0] == cycles


@pytest.mark.parametrize("name", ["v_mfma_f64_16x16x4_f64", "v_mfma_f32_32x32x16_fp8_fp8", "v_smfmac_f32_16x16x32_f16"])
def test_an_unknown_matrix_instruction_is_refused(name: str) -> None:
    with pytest.raises(InspectError, match=f"no cycle count is known for '{name}'"):
        counts.count([split_instruction(f"{name} a[0:3], v[0:1], v[2:3], a[0:3]")], "gfx942")


def mix_of(matrix: int, valu: int, trans: int, salu: int = 0, lds: int = 0, vmem: int = 0, cycles: int = 32) -> Mix:
    return Mix(matrix=matrix, valu=valu, trans=trans, salu=salu, lds=lds, vmem=vmem, matrix_cycles=matrix * cycles)


#: Counts of public kernels at bf16, d128, and what references give for them: R, serial share, N.
PUBLIC = [
    ("gfx942", mix_of(64, 386, 33, 8, 46, 8), 2048, 1.01, 0.47, 386),
    ("gfx942", mix_of(128, 669, 65, 41, 82, 47), 4096, 0.91, 0.48, 334),
    ("gfx942", mix_of(64, 392, 34, 34, 54, 16), 2048, 1.03, 0.45, 392),
    ("gfx942", mix_of(64, 248, 34, 34, 54, 16), 2048, 0.75, 0.51, 248),
    ("gfx950", mix_of(32, 202, 33, 8, 56, 8), 2048, 1.30, 0.39, 202),
    ("gfx950", mix_of(64, 304, 66, 36, 96, 8), 4096, 1.11, 0.42, 152),
    ("gfx1100", mix_of(64, 501, 33), None, 0.31, None, None),
    ("gfx1201", mix_of(32, 279, 17, cycles=16), None, 0.68, None, None),
]


@pytest.mark.parametrize(("arch", "mix", "scores", "r", "serial", "n"), PUBLIC)
def test_formulas(arch: str, mix: Mix, scores: float | None, r: float, serial: float | None, n: float | None) -> None:
    found = mix.figures(arch, None, scores)
    assert found["R"] == pytest.approx(r, abs=0.006)
    assert serial is None or found["serial"] == pytest.approx(serial, abs=0.006)
    assert n is None or found["N"] == pytest.approx(n, abs=0.6)


def test_redundant_matrix_work_shows_in_ru() -> None:
    """gfx90a: 48 MFMA of 64 cycles where 32 would do, each exponential twice."""
    mix = mix_of(48, 406, 33, cycles=64)
    useful = 4 * 128 * (64 * 64 / 4) / counts.flop_rate("gfx90a", 2)
    found = mix.figures("gfx90a", useful, 1024)
    assert found["Ru"] == pytest.approx(1.05, abs=0.006) and found["N"] == 812
    assert found["R"] == pytest.approx(0.70, abs=0.006)


def test_overlapped_share() -> None:
    assert mix_of(64, 100, 0).figures("gfx942", None, None)["overlapped"] == 1.0
    assert mix_of(64, 448, 0).figures("gfx942", None, None)["overlapped"] == 1.0  # 4 * 64 + 4 * 448 = 2048
    assert mix_of(64, 960, 0).figures("gfx942", None, None)["overlapped"] == 0.5
    assert mix_of(64, 960, 0).figures("gfx1100", None, None)["overlapped"] == 1.0


def test_no_matrix_work_has_no_ratio() -> None:
    assert set(mix_of(0, 10, 1).figures("gfx1100", None, None).values()) == {None}


# --------------------------------------------------------------------------------------------------
# Loops


def test_ways_through_the_loops_of_a_snippet() -> None:
    program = parse_amdgcn(SNIPPET)
    assert len(loops.spans(program)) == 3
    first, second = loops.hot_loops(program, "gfx942")
    assert (first.short.valu, first.short.trans, first.short.slow, first.short.compares) == (2, 1, 1, 0)
    assert (first.short.matrix, first.short.lds, first.short.vmem, first.short.salu) == (1, 1, 1, 2)
    assert first.short.matrix_cycles == 32 and first.short.matrix_flop == 2 * 32 * 32 * 8
    assert first.long == dataclasses.replace(first.short, valu=4, compares=2)
    assert (second.short.compares, second.short.scratch) == (3, 1) and second.short == second.long
    assert loops.full_and_masked([first, second], "gfx942") == (first.short, second.long)
    assert loops.full_and_masked([second, first], "gfx942") == (first.short, second.long)
    assert loops.full_and_masked([second], "gfx942") == (second.short, None)
    assert loops.full_and_masked([], "gfx942") == (None, None)
    assert loops.loop_scratch(program, "gfx942") == 2  # not the one behind the loops


def test_without_matrix_instructions_the_loop_with_an_exponential_counts() -> None:
    text = SNIPPET.replace("v_mfma_f32_32x32x8_bf16", "v_fma_f32")
    text = text.replace("v_exp_f32_e32 v4, v4\n\tscratch_store", "scratch_store")
    (only,) = loops.hot_loops(parse_amdgcn(text), "gfx1100")
    assert (only.short.matrix, only.short.trans) == (0, 1)
