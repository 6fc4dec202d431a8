"""What inspect says of one kernel, and how it becomes and comes back from JSON."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from flash_rocm.amdgpu.assembly import Program
from flash_rocm.amdgpu.chips import CHIPS
from flash_rocm.config_schema import Limits

from .counts import InspectError, Mix, flop_rate
from .loops import full_and_masked, hot_loops, loop_scratch

#: Changes when a stored report can no longer be read.
FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """Which kernel; ``kernel`` of a foreign code object is its symbol."""

    arch: str
    kernel: str
    dtype: str = ""
    headdim: int = 0
    mask: str = ""  # "full" or "causal"

    def __str__(self) -> str:
        return " ".join(str(part) for part in dataclasses.astuple(self) if part)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel takes of a chip; ``vgprs`` are the architectural ones, on NVIDIA the registers."""

    vgprs: int
    agprs: int = 0
    sgprs: int = 0
    vgpr_spills: int = 0
    sgpr_spills: int = 0
    scratch_bytes: int = 0
    lds_bytes: int = 0
    code_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """Counts of one way through the hot loop, and the figures that counts.py defines."""

    mix: Mix
    R: float | None
    Ru: float | None
    serial: float | None
    overlapped: float | None
    N: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything inspect knows of one kernel.

    ``waves_per_simd`` is the lower of the bounds by registers and by LDS; all three are None on NVIDIA.
    """

    case: Case
    resources: Resources
    waves_per_simd: int | None = None
    waves_by_vgprs: int | None = None
    waves_by_lds: int | None = None
    loop_scratch: int = 0
    full: LoopReport | None = None
    masked: LoopReport | None = None
    compiler: str = ""
    options: dict[str, int] = dataclasses.field(default_factory=dict)
    config: str = ""  # where the options come from
    limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Work:
    """What one wave does per iteration: enough to tell redundant matrix work.

    Args:
        scores: elements of the score matrix, None where not known.
        flop_per_score: 4 * headdim forward, 10 * headdim for the kernels of a backward together.
        itemsize: bytes of an element of q.
        chunks: how many pieces the head dim is taken in.
    """

    scores: float | None
    flop_per_score: int
    itemsize: int
    chunks: int = 1


def amd_report(case: Case, program: Program, resources: Resources, num_warps: int, work: Work, **facts: Any) -> Report:
    """Judge the code of one AMD kernel.

    Where the number of scores is not known, all matrix work counts as useful.

    Raises:
        InspectError: the arch or an instruction is not known.
    """
    if case.arch not in CHIPS:
        raise InspectError(f"arch: expected one of {', '.join(CHIPS)}, got {case.arch!r}")
    chip = CHIPS[case.arch]
    by_vgprs = chip.waves_by_vgprs(resources.vgprs + resources.agprs)
    by_lds = chip.waves_by_lds(resources.lds_bytes, num_warps)
    mixes = full_and_masked(hot_loops(program, case.arch, work.chunks), case.arch)
    full, masked = (None if mix is None else _loop_report(mix, case.arch, work) for mix in mixes)
    return Report(
        case,
        resources,
        waves_per_simd=min(by_vgprs, by_lds),
        waves_by_vgprs=by_vgprs,
        waves_by_lds=by_lds,
        loop_scratch=loop_scratch(program, case.arch),
        full=full,
        masked=masked,
        **facts,
    )


def _loop_report(mix: Mix, arch: str, work: Work) -> LoopReport:
    scores, useful = work.scores, None
    if scores is None:
        useful = float(mix.matrix_cycles)
        scores = mix.matrix_flop / work.flop_per_score if work.flop_per_score else None
    elif rate := flop_rate(arch, work.itemsize):
        useful = work.flop_per_score * scores / rate
    return LoopReport(mix, **mix.figures(arch, useful, scores))


# --------------------------------------------------------------------------------------------------
# Resources from the text of a compiler


def _number(pattern: str, text: str, what: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise InspectError(f"expected {what} in the compiler's output, found none")
    return int(found.group(1))


def amdgcn_resources(text: str, lds_bytes: int) -> Resources:
    """Registers, spills, scratch and code size in LLVM's assembly of one kernel."""

    def metadata(name: str) -> int:
        return _number(rf"^\s+(?:- )?\.{name}:\s+(\d+)", text, f".{name}")

    def directive(name: str) -> int:
        return _number(rf"^\s+\.amdhsa_{name} (\d+)", text, f".amdhsa_{name}")

    # What the kernel descriptor asks for, not what the code names (.vgpr_count): LLVM asks for more where
    # amdgpu-waves-per-eu sets a maximum of waves, and the chip hands out what is asked.
    total = directive("next_free_vgpr")
    vgprs = min(directive("accum_offset"), total) if ".amdhsa_accum_offset" in text else total
    return Resources(
        vgprs=vgprs,
        agprs=total - vgprs,
        sgprs=metadata("sgpr_count"),
        vgpr_spills=metadata("vgpr_spill_count"),
        sgpr_spills=metadata("sgpr_spill_count"),
        scratch_bytes=metadata("private_segment_fixed_size"),
        lds_bytes=lds_bytes,
        code_bytes=_number(r"^; codeLenInByte = (\d+)", text, "codeLenInByte"),
    )


def ptxas_resources(text: str, shared_bytes: int) -> Resources:
    """Registers and spills in what ``ptxas -v`` says; spilled registers are the bytes stored, in words."""
    return Resources(
        vgprs=_number(r"Used (\d+) registers", text, "the number of registers"),
        vgpr_spills=-(-_number(r"(\d+) bytes spill stores", text, "the bytes of spill stores") // 4),
        scratch_bytes=_number(r"(\d+) bytes stack frame", text, "the stack frame"),
        lds_bytes=shared_bytes,
    )


# --------------------------------------------------------------------------------------------------
# JSON


def to_json(report: Report) -> dict[str, Any]:
    return dataclasses.asdict(report)


def from_json(raw: dict[str, Any]) -> Report:
    """What :func:`to_json` gave.

    Raises:
        TypeError, KeyError: it is something else, or of another version.
    """

    def loop(contents: dict[str, Any] | None) -> LoopReport | None:
        return None if contents is None else LoopReport(**{**contents, "mix": Mix(**contents["mix"])})

    return Report(
        **{
            **raw,
            "case": Case(**raw["case"]),
            "resources": Resources(**raw["resources"]),
            "full": loop(raw["full"]),
            "masked": loop(raw["masked"]),
            "limits": Limits(**raw["limits"]),
        }
    )
