"""Instructions to counts, and counts to the figures of the static model.

Per wave and per iteration of a loop:

* M: matrix cycles.  V: cycles of the vector ALU, 4 per instruction and 16 per transcendental, v_mul_lo or
  v_mad_u64 on CDNA; 1 and, for a transcendental, 4 on RDNA (wave32).
* R = V / M, lower is better.  Ru = V / useful matrix cycles (4 * headdim flop per score forward, 10 * headdim
  backward): Ru > R means redundant matrix work.
* serial share = M / (M + V + issue * (SALU + LDS + VMEM + SMEM)), nothing overlapping;
  overlapped share = M / max(M, issue * matrix instructions + V), everything overlapping.
  ``issue`` is the cycles one instruction takes to issue, 4 on CDNA and 1 on RDNA.
* N: vector ALU instructions per wave and 2048 scores.

Waits, barriers, no-ops, priorities and branches are no SALU work here.  A dual-issue pair is one instruction.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

from flash_rocm.amdgpu.assembly import Instruction

KINDS = ("matrix", "valu", "trans", "slow", "salu", "lds", "vmem", "smem", "scratch", "other")

_MATRIX = re.compile(r"v_(?:mfma|wmma)_\w+?_(\d+)x(\d+)x(\d+)_?(\w+)")
_TRANSCENDENTAL = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos|tanh)_")
_SLOW = ("v_mul_lo_", "v_mad_u64_")
_CONTROL = re.compile(
    r"s_(?:waitcnt|wait_|nop|barrier|setprio|sleep|delay_alu|clause|branch|cbranch|endpgm|code_end|set_inst_prefetch"
    r"|sched_barrier|inst_prefetch)"
)
_SCALAR_MEMORY = re.compile(r"s_(?:load|buffer|store|dcache|scratch|atc|atomic)_")
_COMPARE = re.compile(r"v_(?:dual_)?(?:cmpx?|cndmask)_")

#: Matrix flop per cycle of one SIMD: (16-bit types, float32); 0 where there is no such instruction.
_FLOP_RATES = {"gfx90a": (256, 64), "gfx942": (512, 64), "gfx950": (1024, 64), "gfx11": (256, 0), "gfx12": (512, 0)}


class InspectError(ValueError):
    """Something that inspect cannot count or find; the text says what."""


def flop_rate(arch: str, itemsize: int) -> int:
    """Matrix flop per cycle and SIMD for elements of some bytes; 0 if the chip has no such instruction.

    Raises:
        InspectError: an arch whose rates are not known.
    """
    for prefix, rates in _FLOP_RATES.items():
        if arch.startswith(prefix):
            return rates[0] if itemsize == 2 else rates[1]
    raise InspectError(f"arch: expected one of {', '.join(_FLOP_RATES)}, got {arch!r}")


def is_cdna(arch: str) -> bool:
    return arch.startswith("gfx9")


def kind(instruction: Instruction, arch: str) -> str:
    """What executes an instruction, one of :data:`KINDS`."""
    name = instruction.mnemonic
    if name.startswith(("v_mfma_", "v_wmma_", "v_smfmac_", "v_swmmac_")):
        return "matrix"
    if name.startswith("v_"):
        if _TRANSCENDENTAL.match(name):
            return "trans"
        return "slow" if name.startswith(_SLOW) else "valu"
    if name.startswith("ds_"):
        return "lds"
    if is_scratch(instruction, arch):
        return "scratch"
    if name.startswith(("buffer_", "global_", "flat_", "image_", "tbuffer_")):
        return "vmem"
    if name.startswith("s_"):
        if _SCALAR_MEMORY.match(name):
            return "smem"
        return "other" if _CONTROL.match(name) else "salu"
    return "other"


def is_scratch(instruction: Instruction, arch: str) -> bool:
    """Whether an instruction reads or writes private memory, where spilled registers live.

    gfx90a reaches it through a buffer without a vector address, which is how no kernel reads its tensors.
    """
    if instruction.mnemonic.startswith("scratch_"):
        return True
    return arch == "gfx90a" and instruction.mnemonic.startswith("buffer_") and instruction.operands[1:2] == ("off",)


def is_compare(instruction: Instruction) -> bool:
    """Whether it compares or selects, as masking does."""
    halves = (instruction, instruction.paired)
    return any(half is not None and _COMPARE.match(half.mnemonic) is not None for half in halves)


def matrix_work(instruction: Instruction, arch: str) -> tuple[int, int]:
    """(cycles, flop) of one matrix instruction.

    Raises:
        InspectError: a shape or type whose cycles are not known here.
    """
    found = _MATRIX.match(instruction.mnemonic)
    if found is None:
        raise InspectError(f"no cycle count is known for {instruction.mnemonic!r}")
    m, n, k = (int(size) for size in found.group(1, 2, 3))
    flop = 2 * m * n * k
    if "wmma" in instruction.mnemonic:
        if (m, n, k) == (16, 16, 16) and found.group(4).startswith(("f16", "bf16")):
            return flop // flop_rate(arch, 2), flop
    elif m in (16, 32) and m == n:
        # All depths of a shape take the same time: the shallow ones run below the peak rate.
        passes = 2 if arch == "gfx90a" else 1
        if found.group(4).startswith(("f16", "bf16")):
            return m * passes, flop
        if found.group(4).startswith("f32"):
            return 2 * m, flop
    raise InspectError(f"no cycle count is known for {instruction.mnemonic!r}")


@dataclasses.dataclass(frozen=True)
class Mix:
    """How many instructions of each kind; the work of the matrix ones."""

    matrix: int = 0
    valu: int = 0
    trans: int = 0
    slow: int = 0  # 16-cycle integer multiplies
    salu: int = 0
    lds: int = 0
    vmem: int = 0
    smem: int = 0
    scratch: int = 0
    other: int = 0
    compares: int = 0  # of the vector ALU's: comparisons and selections
    matrix_cycles: int = 0
    matrix_flop: int = 0

    def vector_cycles(self, arch: str) -> int:
        """V of the formulas."""
        if is_cdna(arch):
            return 4 * self.valu + 16 * (self.trans + self.slow)
        return self.valu + self.slow + 4 * self.trans

    def figures(self, arch: str, useful_cycles: float | None, scores: float | None) -> dict[str, float | None]:
        """R, Ru, serial, overlapped and N; None what needs a number that is not known.

        Args:
            useful_cycles: matrix cycles without redundant work.
            scores: per wave and iteration.
        """
        matrix, vector = self.matrix_cycles, self.vector_cycles(arch)
        issue = 4 if is_cdna(arch) else 1
        # Scratch goes the way of VMEM.
        rest = issue * (self.salu + self.lds + self.vmem + self.scratch + self.smem)
        return {
            "R": vector / matrix if matrix else None,
            "Ru": vector / useful_cycles if useful_cycles else None,
            "serial": matrix / (matrix + vector + rest) if matrix else None,
            "overlapped": matrix / max(matrix, issue * self.matrix + vector) if matrix else None,
            "N": self.valu * 2048 / scores if scores else None,
        }


def count(instructions: Iterable[Instruction], arch: str) -> Mix:
    """Counts of a stretch of code."""
    kinds: collections.Counter[str] = collections.Counter()
    compares = cycles = flop = 0
    for instruction in instructions:
        what = kind(instruction, arch)
        kinds[what] += 1
        compares += is_compare(instruction)
        if what == "matrix":
            work = matrix_work(instruction, arch)
            cycles, flop = cycles + work[0], flop + work[1]
    return Mix(**kinds, compares=compares, matrix_cycles=cycles, matrix_flop=flop)
