"""The HTML page of ``flash-rocm bench --report``: plots, and beneath each a table with every point of it.

One file with everything inside: no script, no font, nothing from the network.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flash_rocm import backends, config
from flash_rocm.arch import NVIDIA_ARCHS
from flash_rocm.bench import plot
from flash_rocm.bench.decode import Decode
from flash_rocm.bench.environment import headline
from flash_rocm.bench.grid import Result
from flash_rocm.bench.memory import Peak
from flash_rocm.bench.overhead import Overhead
from flash_rocm.bench.peers import SUBJECT
from flash_rocm.bench.ratios import panels, peer_names, ratios, summary
from flash_rocm.bench.results import Results
from flash_rocm.config_schema import HOW, PROVENANCE_KEYS
from flash_rocm.inspect.model import Prediction
from flash_rocm.inspect.report import Case
from flash_rocm.timing import median

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3em 0; }
th, td { border: 1px solid #ddd; padding: .15em .6em; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; }
thead th { background: #f4f4f4; }
img { max-width: 100%; }
.note { color: #666; }
"""


class Number(NamedTuple):
    """A cell: what is shown, and the value to full precision for programs that read the page."""

    value: float
    shown: str


_Cell = str | Number


def page(results: Sequence[Results]) -> str:
    """The whole page.

    Args:
        results: runs, in the order of their sections.

    Raises:
        ModuleNotFoundError: no matplotlib.
        ConfigError: a shipped config is wrong.
    """
    body = "".join(section for each in results for section in _sections(each))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>flash_rocm: results</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>flash_rocm: results</h1>\n"
        f'<p class="note">Every result was compared with float64 before it was timed.{_about_amd(results)}</p>\n'
        f"{body}{_provenance()}</body>\n</html>\n"
    )


def _about_amd(results: Sequence[Results]) -> str:
    if any(each.report.environment.get("hip") for each in results):
        return ""
    return " Nothing here was measured on an AMD GPU: what is said of AMD chips is modelled."


def _sections(results: Results) -> Iterator[str]:
    report = results.report
    if results.modelled:
        yield _heading("Modelled AMD chips", results, _modelled_on(report.environment))
        yield _modelled(results.modelled)
        return
    measured_on = headline(report.environment)
    if report.speed:
        yield _heading("Speed", results, measured_on)
        yield _image(plot.speed_svg(report), "TFLOP/s by sequence length")
        yield _summary(report.speed)
        yield from _speed(report.speed)
        yield _not_measured(report.unavailable)
    if report.memory:
        yield _heading("Memory", results, measured_on)
        yield _image(plot.memory_svg(report), "peak memory by sequence length")
        yield _memory(report.memory)
    if results.decode:
        yield _heading("Decoding", results, measured_on)
        yield _image(plot.decode_svg(results.decode), "bandwidth of decoding by batch and keys")
        yield _decode(results.decode)
    if report.overhead:
        yield _heading("Host time of a call", results, measured_on)
        yield _overhead(report.overhead)


# --------------------------------------------------------------------------------------------------
# Blocks.  All text goes through _text.


def _text(value: object) -> str:
    return html.escape(str(value))


def _heading(title: str, results: Results, where: str) -> str:
    return f'<h2>{_text(title)}</h2>\n<p class="note">{_text(results.name)}: {_text(where)}</p>\n'


def _image(svg: str, alt: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<p><img alt="{_text(alt)}" src="data:image/svg+xml;base64,{data}"></p>\n'


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[_Cell]]) -> str:
    lines = [
        f"<table>\n<caption>{_text(caption)}</caption>\n<thead><tr>{''.join(f'<th>{_text(h)}</th>' for h in head)}"
    ]
    lines.append("</tr></thead>\n<tbody>\n")
    lines += [f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows]
    return "".join([*lines, "</tbody>\n</table>\n"])


def _cell(cell: _Cell) -> str:
    if isinstance(cell, Number):
        return f'<td><data value="{cell.value!r}">{_text(cell.shown)}</data></td>'
    return f'<td class="text">{_text(cell)}</td>'


def _failed(status: str, reason: str) -> str:
    return f"{status}: {reason}" if reason else status


# --------------------------------------------------------------------------------------------------
# Measured


def _speed(results: Sequence[Result]) -> Iterator[str]:
    """A table per panel: a row for each shape, a column for each peer."""
    for (direction, headdim, mask), here in panels(results):
        names, rows = peer_names(here), []
        for shape in sorted({result.shape for result in here}, key=lambda shape: (shape.seqlen, str(shape))):
            row: list[_Cell] = [str(shape)]
            for name in names:
                found = next((result for result in here if (result.shape, result.peer) == (shape, name)), None)
                ratio = ratios(here, name).get((direction, shape)) if name != SUBJECT else None
                row.append(_speed_cell(found, ratio))
            rows.append(row)
        yield _table(f"{direction}, head dim {headdim}, {mask}: TFLOP/s (flash_rocm / peer)", ["shape", *names], rows)


def _speed_cell(result: Result | None, ratio: float | None) -> _Cell:
    if result is None:
        return "not measured"
    if result.tflops is None:
        return _failed(result.status, result.reason)
    return Number(result.tflops, f"{result.tflops:.3g}" + ("" if ratio is None else f" ({ratio:.2f}x)"))


def _summary(results: Sequence[Result]) -> str:
    rows: list[list[_Cell]] = [
        [
            *(
                each["peer"],
                each["direction"],
                ", ".join(map(str, each["headdims"])),
                each["mask"],
                str(each["points"]),
            ),
            Number(each["geomean"], f"{each['geomean']:.2f}x"),
            Number(each["lowest"], f"{each['lowest']:.2f}x"),
            each["lowest_shape"],
        ]
        for each in summary(results)
    ]
    head = ["flash_rocm /", "direction", "head dims", "mask", "points", "geometric mean", "lowest", "at"]
    return _table("speed ratios", head, rows) if rows else ""


def _not_measured(unavailable: dict[str, str]) -> str:
    rows = [[name, why] for name, why in unavailable.items()]
    return _table("not measured", ["peer", "why"], rows) if rows else ""


def _memory(peaks: Sequence[Peak]) -> str:
    names = list(dict.fromkeys(peak.peer for peak in peaks))
    found = {(peak.shape, peak.peer): peak for peak in peaks}
    rows = []
    for shape in sorted({peak.shape for peak in peaks}, key=lambda shape: (shape.seqlen, str(shape))):
        row: list[_Cell] = [str(shape)]
        for name in names:
            peak = found.get((shape, name))
            if peak is None or peak.peak_bytes is None:
                row.append("not measured" if peak is None else _failed(peak.status, peak.reason))
            else:
                row.append(Number(peak.peak_bytes, f"{peak.peak_bytes / 2**20:.1f}"))
        rows.append(row)
    return _table("peak MiB of a forward and a backward, without q, k, v and dout", ["shape", *names], rows)


def _decode(items: Sequence[Decode]) -> str:
    """Rows as measured: TB/s, and TFLOP/s of what may be bound by either."""
    rows = []
    for item in items:
        row: list[_Cell] = [item.contender, f"{item.batch} x {item.seqlen_k}" if item.batch else "the GPU's roof"]
        if item.seconds:
            row += [Number(item.bandwidth, f"{item.bandwidth / 1e12:.2f}") if item.read_bytes else ""]
            row += [Number(item.speed, f"{item.speed / 1e12:.0f}") if item.flops else ""]
        else:
            row += [_failed(item.status, item.reason), ""]
        rows.append(row)
    return _table("one query per sequence over a K/V cache", ["contender", "batch x keys", "TB/s", "TFLOP/s"], rows)


def _overhead(items: Sequence[Overhead]) -> str:
    rows = []
    for item in items:
        row: list[_Cell] = [item.mode, item.peer, str(item.shape)]
        if item.seconds:
            row += [Number(seconds, f"{seconds * 1e6:.1f}") for seconds in (median(item.seconds),)]
        else:
            row.append(_failed(item.status, item.reason))
        rows.append(row)
    return _table("microseconds to issue a call", ["mode", "peer", "shape", "us"], rows)


# --------------------------------------------------------------------------------------------------
# Modelled, and where the configs come from


def _modelled_on(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in environment.items())
    return f"modelled from launches that the virtual GPU executed; uncalibrated, an upper bound ({versions})"


def _modelled(predictions: dict[Case, Prediction]) -> str:
    rows = []
    for case, found in predictions.items():
        row: list[_Cell] = [case.arch, case.kernel, case.dtype, str(case.headdim), case.mask]
        row.append(Number(found.tflops, f"{found.tflops:.0f}"))
        row.append(f"{found.tflops / found.peak_tflops:.0%}" if found.peak_tflops else "")
        rows.append([*row, f"{found.bandwidth_share:.0%}", found.binding, str(found.waves_per_simd)])
    head = ["arch", "kernel", "dtype", "head dim", "mask", "TFLOP/s", "of peak", "of bandwidth", "bound by", "waves"]
    return _image(plot.modelled_svg(predictions), "modelled TFLOP/s by chip") + _table("by kernel", head, rows)


def _provenance() -> str:
    """Of the shipped configs: how many entries were found in which way, then every entry."""
    rows: list[list[_Cell]] = []
    details = []
    for arch in (*backends.TRITON_AMD_ARCHS, *NVIDIA_ARCHS, "cpu"):
        found = config.arch_configs(arch)
        if found.arch != arch:
            rows.append([arch, f"{found.arch}.json", *[""] * len(HOW), str(len(found.triton))])
            continue
        kinds = [entry.config.provenance.how for entry in found.triton]
        counts: list[_Cell] = [Number(kinds.count(how), str(kinds.count(how))) for how in HOW]
        rows.append([arch, "its own", *counts, str(len(kinds))])
        details.append(_entries(arch))
    head = ["arch", "file", *HOW, "entries"]
    caption = "entries of the shipped Triton configs, by how their values were found"
    return f"<h2>Where the kernel configs come from</h2>\n{_table(caption, head, rows)}{''.join(details)}"


def _entries(arch: str) -> str:
    rows: list[list[_Cell]] = []
    for entry in config.file_contents(arch)["triton"]:
        match, options = (json.dumps(entry.get(key, {})) for key in ("match", "options"))
        rows.append([entry["kernel"], match, options, *(entry["provenance"].get(k, "") for k in PROVENANCE_KEYS)])
    table = _table(f"{arch}.json", ["kernel", "match", "options", *PROVENANCE_KEYS], rows)
    return f"<details><summary>{_text(arch)}.json</summary>\n{table}</details>\n"
