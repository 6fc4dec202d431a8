"""Branches, barriers and waits of every chip on the virtual GPU."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from virtual_asm import hand_written, lanes_of

from flash_rocm.virtual import LdsRace, MissingWait, Registers, UninitialisedRead, VirtualGpu

#: Branch, what makes it go, what makes it fall through; EXEC is whole again behind it.
BRANCHES = {
    "s_cbranch_scc0": ("s_cmp_eq_u32 s4, -1", "s_cmp_eq_u32 s4, s4"),
    "s_cbranch_scc1": ("s_cmp_eq_u32 s4, s4", "s_cmp_eq_u32 s4, -1"),
    "s_cbranch_vccz": ("s_mov_b64 vcc, 0", "s_mov_b64 vcc, 0x80"),
    "s_cbranch_vccnz": ("s_mov_b64 vcc, 0x80", "s_mov_b64 vcc, 0"),
    "s_cbranch_execz": ("s_mov_b64 exec, 0", "s_mov_b64 exec, 0x80"),
    "s_cbranch_execnz": ("s_mov_b64 exec, 0x80", "s_mov_b64 exec, 0"),
}


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100", "gfx1201"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_branch(branch: str, arch: str) -> None:
    for going, before in zip((True, False), BRANCHES[branch], strict=True):
        lines = f"""
            s_mov_b32 s4, 0
            {before}
            {branch} .Lthere
            s_mov_b32 s4, 1
            s_branch .Lend
.Lthere:
            s_mov_b32 s4, 2
.Lend:
            s_nop 0
        """
        seen: list[Registers] = []
        code = hand_written(lines, arch, wave_size=lanes_of(arch))
        stop = len(code.program.instructions) - 2
        VirtualGpu(arch).launch(
            code, grid=(1, 1, 1), block_threads=lanes_of(arch), kernargs=b"", breakpoints={stop: seen.append}
        )
        assert seen[0].sgprs[4, 0] == (2 if going else 1)


BARRIERS = {
    "gfx90a": ["s_barrier"],
    "gfx942": ["s_barrier"],
    "gfx950": ["s_barrier"],
    "gfx1100": ["s_barrier"],
    "gfx1201": ["s_barrier_signal -1", "s_barrier_wait -1"],
}


@pytest.mark.parametrize("order", ["lockstep", "forward", "reverse", "shuffled:1"])
@pytest.mark.parametrize("arch", BARRIERS)
def test_barrier(arch: str, order: str) -> None:
    """Each of two waves reads what the other one wrote; without the barrier or the wait before it that is caught."""
    lanes = lanes_of(arch)
    lines = f"""
        v_lshlrev_b32_e32 v1, 2, v0
        v_xor_b32_e32 v2, {4 * lanes}, v1
        ds_write_b32 v1, v0
        s_waitcnt lgkmcnt(0)
        BARRIER
        ds_read_b32 v3, v2
        s_waitcnt lgkmcnt(0)
        s_nop 0
    """
    with_it = lines.replace("BARRIER", "\n".join(BARRIERS[arch]))
    seen: list[Registers] = []

    def launch(text: str) -> None:
        code = hand_written(text, arch, lds_bytes=8 * lanes, wave_size=lanes)
        stop = len(code.program.instructions) - 2
        VirtualGpu(arch).launch(
            code, grid=(1, 1, 1), block_threads=2 * lanes, kernargs=b"", order=order, breakpoints={stop: seen.append}
        )

    launch(with_it)
    for registers in seen:
        for wave, (_, number) in enumerate(registers.waves):
            np.testing.assert_array_equal(registers.vgprs[3, wave], np.arange(lanes) + (1 - number) * lanes)
    with pytest.raises((LdsRace, UninitialisedRead)):
        launch(lines.replace("BARRIER", ""))
    # The wait behind the first instruction of the barrier, with which the wave has entered it.
    first, *others = BARRIERS[arch]
    late = lines.replace("BARRIER", "\n".join([first, "s_waitcnt lgkmcnt(0)", *others]))
    with pytest.raises(MissingWait, match="before the last barrier without waiting"):
        launch(late.replace("s_waitcnt lgkmcnt(0)", "", 1))


LOADS = {
    "vm": ("global_load_dword v4, v1, s[6:7]", "v_mov_b32_e32 v5, v4"),
    "ds": ("ds_read_b32 v4, v1", "v_mov_b32_e32 v5, v4"),
    "sm": ("s_load_dword s4, s[6:7], 0x0", "s_mov_b32 s5, s4"),
}
#: Chip, wait, what it waits for of the above; one load of each is under way.
WAITS: list[tuple[str, str, str]] = [
    ("gfx942", "s_waitcnt vmcnt(0)", "vm"),
    ("gfx942", "s_waitcnt vmcnt(1)", ""),
    ("gfx942", "s_waitcnt lgkmcnt(0)", "ds sm"),
    ("gfx942", "s_waitcnt expcnt(0)", ""),
    ("gfx942", "s_waitcnt vmcnt(0) lgkmcnt(0)", "vm ds sm"),
    ("gfx1100", "s_waitcnt vmcnt(0)", "vm"),
    ("gfx1100", "s_waitcnt lgkmcnt(0)", "ds sm"),
    ("gfx1100", "s_waitcnt_vscnt null, 0x0", ""),
    ("gfx1100", "s_wait_idle", "vm ds sm"),
    ("gfx1201", "s_wait_loadcnt 0x0", "vm"),
    ("gfx1201", "s_wait_loadcnt 0x1", ""),
    ("gfx1201", "s_wait_storecnt 0x0", ""),
    ("gfx1201", "s_wait_dscnt 0x0", "ds"),
    ("gfx1201", "s_wait_kmcnt 0x0", "sm"),
    ("gfx1201", "s_wait_samplecnt 0x0", ""),
    ("gfx1201", "s_wait_bvhcnt 0x0", ""),
    ("gfx1201", "s_wait_expcnt 0x0", ""),
    ("gfx1201", "s_wait_idle", "vm ds sm"),
    # The count of LDS is in the low six bits, the other one behind bit 8 (LLVM, SIInsertWaitcnts).
    ("gfx1201", "s_wait_loadcnt_dscnt 0x0", "vm ds"),
    ("gfx1201", "s_wait_loadcnt_dscnt 0x1", "vm"),
    ("gfx1201", "s_wait_loadcnt_dscnt 0x100", "ds"),
    ("gfx1201", "s_wait_storecnt_dscnt 0x0", "ds"),
]


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("wait", WAITS, ids=lambda wait: f"{wait[0]}-{wait[1]}")
def test_wait(wait: tuple[str, str, str], kind: str) -> None:
    """What a load writes may be used behind the wait for it, and only there."""
    arch, instruction, covered = wait
    load, use = LOADS[kind]
    gpu = VirtualGpu(arch)
    address = gpu.memory.add("memory", np.arange(256, dtype=np.uint32))
    lines = f"""
        s_mov_b32 s6, {address & 0xFFFFFFFF:#x}
        s_mov_b32 s7, {address >> 32:#x}
        v_lshlrev_b32_e32 v1, 2, v0
        ds_write_b32 v1, v0
        s_waitcnt lgkmcnt(0)
        {load}
        {instruction}
        {use}
    """
    code = hand_written(lines, arch, lds_bytes=256, wave_size=lanes_of(arch))
    launch = dict(grid=(1, 1, 1), block_threads=lanes_of(arch), kernargs=b"")
    if kind in covered.split():
        gpu.launch(code, **launch)
    else:
        with pytest.raises(MissingWait):
            gpu.launch(code, **launch)


#: (chip, instruction) of this file, see test_virtual_coverage.py.
EXECUTED = [
    *((arch, f"{branch} 1") for branch in BRANCHES for arch in ("gfx942", "gfx1100", "gfx1201")),
    *(("gfx942", text) for text in ("s_branch 1", "s_endpgm")),
    *((arch, text) for arch, texts in BARRIERS.items() for text in texts),
    *((arch, text) for arch, text, _ in WAITS),
]
