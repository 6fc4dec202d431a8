"""What a set of reports breaks of its limits, and what changed between two sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flash_rocm.amdgpu.chips import CHIPS, NVIDIA_SHARED
from flash_rocm.config_schema import Limits

from .report import Report

#: What may be checked: the limits of an entry, or what it may spill with the oldest Triton.
CHECKS = ("all", "oldest")


def violations(reports: Sequence[Report], check: str = "all") -> Iterator[str]:
    """One line for each limit that a kernel does not keep.

    Args:
        check: "all", or "oldest" for spills and LDS alone: waves per SIMD and R follow from what one version of
            the compiler makes of an entry.
    """
    for report in reports:
        limits = report.limits
        if check == "oldest":
            limits = Limits(vgpr_spills=limits.oldest_spills, loop_scratch=limits.oldest_spills)
        for text in _violations(report, limits):
            yield f"{report.case} ({report.config}): {text}"


def _violations(report: Report, limits: Limits) -> Iterator[str]:
    resources = report.resources
    if resources.vgpr_spills > limits.vgpr_spills:
        yield f"{resources.vgpr_spills} VGPR spills, expected at most {limits.vgpr_spills}"
    if report.loop_scratch > limits.loop_scratch:
        yield f"{report.loop_scratch} scratch instructions in loops, expected at most {limits.loop_scratch}"
    arch = report.case.arch
    lds = CHIPS[arch].lds_per_workgroup if arch in CHIPS else NVIDIA_SHARED.get(arch)
    if lds is not None and resources.lds_bytes > lds:
        yield f"{resources.lds_bytes} bytes of LDS, expected at most {lds}"
    elif report.waves_per_simd is not None and report.waves_per_simd < limits.waves_per_simd:
        yield f"{report.waves_per_simd} waves per SIMD, expected at least {limits.waves_per_simd}"
    if limits.R is not None:
        if report.full is None or report.full.R is None:
            yield f"no R, expected at most {limits.R}"
        elif report.full.R > limits.R:
            yield f"R {report.full.R:.4f}, expected at most {limits.R}"


def figures(report: Report) -> dict[str, float | None]:
    """The numbers that a diff compares, by name."""
    resources, full, masked = report.resources, report.full, report.masked
    return {
        "VGPR": resources.vgprs,
        "AGPR": resources.agprs,
        "SGPR": resources.sgprs,
        "spills": resources.vgpr_spills,
        "SGPR spills": resources.sgpr_spills,
        "scratch": resources.scratch_bytes,
        "loop scratch": report.loop_scratch,
        "LDS": resources.lds_bytes,
        "waves": report.waves_per_simd,
        "code": resources.code_bytes,
        "R": full.R if full else None,
        "Ru": full.Ru if full else None,
        "R masked": masked.R if masked else None,
        "serial": full.serial if full else None,
        "N": full.N if full else None,
    }


def differences(old: Sequence[Report], new: Sequence[Report]) -> Iterator[str]:
    """One line for each kernel that changed, came or went."""
    before = {report.case: report for report in old}
    for report in new:
        earlier = before.pop(report.case, None)
        if earlier is None:
            yield f"{report.case}: new"
            continue
        was, now = figures(earlier), figures(report)
        changes = [f"{name} {_short(was[name])} -> {_short(now[name])}" for name in now if was[name] != now[name]]
        changes += [
            f"{name} {earlier.options.get(name)} -> {value}"
            for name, value in report.options.items()
            if earlier.options.get(name) != value
        ]
        if changes:
            yield f"{report.case}: {', '.join(changes)}"
    for case in before:
        yield f"{case}: not inspected now"


def _short(number: float | None) -> str:
    return "-" if number is None else str(number) if isinstance(number, int) else f"{number:.3f}"


def call_ru(reports: Sequence[Report]) -> dict[tuple[str, str, int, str], tuple[float, float | None]]:
    """Ru of whole backward calls, full and masked, by (arch, dtype, headdim, mask): the sum of their kernels'.

    Each kernel's Ru is its vector work per score over the useful matrix work per score of the call.
    """
    parts: dict[tuple[str, str, int, str], dict[str, Report]] = {}
    for report in reports:
        case = report.case
        if case.kernel.startswith("backward_"):
            parts.setdefault((case.arch, case.dtype, case.headdim, case.mask), {})[case.kernel] = report
    found = {}
    for key, kernels in parts.items():
        full = [report.full.Ru if report.full else None for report in kernels.values()]
        masked = [report.masked.Ru if report.masked else None for report in kernels.values()]
        if len(kernels) == 2 and None not in full:
            total = sum(ru for ru in masked if ru) if None not in masked else None
            found[key] = (sum(ru for ru in full if ru), total)
    return found
