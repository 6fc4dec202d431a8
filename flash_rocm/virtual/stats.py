"""Counts of a launch: instructions, LDS bank conflicts, memory traffic."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flash_rocm.amdgpu.assembly import Program

from .executable import Executable
from .lane_data import LOADS, STORES
from .registry import base_name


def instruction_class(mnemonic: str) -> str:
    """The unit that executes an instruction."""
    if mnemonic.startswith(("v_mfma", "v_wmma", "v_smfmac", "v_swmmac")):
        return "matrix"
    if mnemonic.startswith("ds_"):
        return "lds"
    if mnemonic.startswith(("global_load", "global_store", "global_atomic", "buffer_", "flat_", "scratch_", "global_")):
        return "vmem"
    if mnemonic.startswith(("s_load", "s_buffer_load")):
        return "smem"
    if mnemonic.startswith(("s_cbranch", "s_branch", "s_endpgm")):
        return "branch"
    if mnemonic.startswith(
        ("s_waitcnt", "s_wait_", "s_barrier", "s_nop", "s_sleep", "s_setprio", "s_delay", "s_clause")
    ):
        return "wait"
    if mnemonic.startswith("s_"):
        return "salu"
    name = base_name(mnemonic)
    if name.startswith(("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")):
        return "transcendental"
    return "valu"


@dataclasses.dataclass
class Measurements:
    """What counting accesses adds (``measure=True``).

    ``lds_cycles``: cycles that LDS accesses take with 32 banks of a dword, 64 lanes in groups of 32 for
    4-byte, 16 for 8-byte and 8 for 16-byte accesses; ``lds_ideal_cycles`` without bank conflicts.
    """

    lds_accesses: int = 0
    lds_cycles: int = 0
    lds_ideal_cycles: int = 0

    def lds(self, group: Any, places: np.ndarray, size: int) -> None:
        """One LDS access; ``places``: byte in the workgroup's LDS of each active lane."""
        if not group.full:
            return
        lanes = group.m.lanes
        at_once = max(32 * 4 // max(size, 4), 1)
        words = (places.reshape(-1, lanes // at_once if lanes > at_once else 1, min(at_once, lanes)) // 4)[..., None]
        words = words + np.arange(max(size // 4, 1))
        words = words.reshape(-1, words.shape[2] * words.shape[3])
        # Equal words of one bank are served together: count different ones.
        words = np.sort(words, axis=1)
        fresh = np.ones(words.shape, bool)
        fresh[:, 1:] = words[:, 1:] != words[:, :-1]
        counts = np.zeros((words.shape[0], 32), np.int32)
        rows = np.broadcast_to(np.arange(words.shape[0])[:, None], words.shape)
        np.add.at(counts, (rows[fresh], words[fresh] & 31), 1)
        self.lds_accesses += group.n
        self.lds_cycles += int(counts.max(axis=1).sum())
        self.lds_ideal_cycles += words.shape[0]


@dataclasses.dataclass(frozen=True)
class LaunchStats:
    """What a launch executed.

    Attributes:
        per_instruction: int64, wave executions of each instruction of the program.
        program: the instructions they belong to.
        wave_instructions: their sum.
        waves, workgroups: launched.
        vmem_bytes: bytes that loads and stores (not atomics) asked for, counting all lanes.
        measured: LDS cycles, only with ``measure=True``.
    """

    per_instruction: np.ndarray
    program: Program
    wave_instructions: int
    waves: int
    workgroups: int
    wave_size: int
    measured: Measurements | None = None

    def per_mnemonic(self) -> dict[str, int]:
        """Wave executions by mnemonic as printed, most first."""
        counts: dict[str, int] = {}
        for instruction, count in zip(self.program.instructions, self.per_instruction, strict=True):
            if count:
                counts[instruction.mnemonic] = counts.get(instruction.mnemonic, 0) + int(count)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def per_class(self) -> dict[str, int]:
        """Wave executions by the unit that executes them, most first."""
        counts: dict[str, int] = {}
        for mnemonic, count in self.per_mnemonic().items():
            kind = instruction_class(mnemonic)
            counts[kind] = counts.get(kind, 0) + count
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def vmem_bytes(self) -> int:
        """Bytes of loads and stores to global memory and buffers, with all lanes counted as active."""
        total = 0
        for mnemonic, count in self.per_mnemonic().items():
            for verb, shapes in (("_load_", LOADS), ("_store_", STORES)):
                head, found, tail = mnemonic.partition(verb)
                if found and head in ("global", "buffer") and tail.removeprefix("lds_") in shapes:
                    total += shapes[tail.removeprefix("lds_")].size * self.wave_size * count
        return total


def count_blocks(executable: Executable, runs: dict[int, int]) -> np.ndarray:
    """Wave executions of each instruction, from those of the blocks by their start."""
    counts = np.zeros(len(executable.instructions), np.int64)
    for start, waves in runs.items():
        counts[start : executable.blocks[start].next] += waves
    return counts
