"""Reports as text and as JSON."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from flash_rocm import config

from .counts import InspectError
from .judge import call_ru
from .report import FORMAT, LoopReport, Report, from_json, to_json

_HEAD = (
    *("arch", "kernel", "dtype", "d", "mask", "VGPR", "spills", "scratch", "LDS", "waves", "code"),
    *("matrix/VALU/trans/SALU/LDS/VMEM", "loop scratch", "R", "R masked", "Ru", "serial", "overlapped", "N"),
)


def _figure(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _mix(loop: LoopReport | None) -> str:
    if loop is None:
        return "-"
    mix = loop.mix
    # Integer multiplies are VALU instructions that take longer; memory other than LDS is one pipe.
    numbers = (mix.matrix, mix.valu + mix.slow, mix.trans, mix.salu, mix.lds, mix.vmem + mix.scratch)
    return "/".join(map(str, numbers))


def _row(report: Report) -> list[str]:
    case, resources, full, masked = report.case, report.resources, report.full, report.masked
    registers = f"{resources.vgprs}+{resources.agprs}" if resources.agprs else str(resources.vgprs)
    return [
        *(case.arch, case.kernel, case.dtype or "-", str(case.headdim or "-"), case.mask or "-"),
        *(registers, str(resources.vgpr_spills), str(resources.scratch_bytes), str(resources.lds_bytes)),
        *("-" if report.waves_per_simd is None else str(report.waves_per_simd), str(resources.code_bytes or "-")),
        *(
            _mix(full),
            str(report.loop_scratch),
            _figure(full.R if full else None),
            _figure(masked.R if masked else None),
        ),
        *(
            _figure(full.Ru if full else None),
            _figure(full.serial if full else None),
            _figure(full.overlapped if full else None),
        ),
        "-" if full is None or full.N is None else f"{full.N:.0f}",
    ]


def as_table(reports: Sequence[Report]) -> str:
    """A row for each kernel, then Ru of each backward call."""
    rows = [list(_HEAD), *(_row(report) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    calls = call_ru(reports)
    if calls:
        lines += ["", "Ru of backward calls, dQ and dK/dV together: full blocks (masked blocks)"]
        for key, (full, masked) in calls.items():
            lines.append(f"  {' '.join(map(str, key))}: {_figure(full)} ({_figure(masked)})")
    return "\n".join(lines)


def as_json(reports: Sequence[Report]) -> str:
    """What :func:`read_json` reads; one report a line."""
    lines = ",\n".join(json.dumps(to_json(report)) for report in reports)
    return f'{{"format": {FORMAT}, "reports": [\n{lines}\n]}}'


def read_json(path: pathlib.Path) -> list[Report]:
    """Reports of an earlier run.

    Raises:
        InspectError: the file cannot be read or is none of :func:`as_json`.
    """
    try:
        raw = config.parse(str(path), path.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise InspectError(f"{path}: expected format {FORMAT}, got {raw['format']!r}")
        return [from_json(report) for report in raw["reports"]]
    except (OSError, UnicodeDecodeError) as error:
        raise InspectError(f"{path}: expected a readable file, {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise InspectError(f"{path}: expected what inspect --format json writes, {error!r}") from error
