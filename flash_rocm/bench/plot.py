"""The pictures: speed in a panel per direction, head dim and mask with a line per peer; memory, decoding, models."""

from __future__ import annotations

import importlib.util
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from flash_rocm.bench.decode import Decode
from flash_rocm.bench.environment import headline
from flash_rocm.bench.memory import Peak
from flash_rocm.bench.peers import SUBJECT
from flash_rocm.bench.ratios import panels, peer_names
from flash_rocm.bench.report import Report
from flash_rocm.bench.shapes import DIRECTIONS
from flash_rocm.inspect.model import Prediction
from flash_rocm.inspect.report import Case

HINT = "matplotlib is not installed (pip install matplotlib, or flash_rocm[bench])"

#: Colour-blind safe (Okabe and Ito); flash_rocm is always the first.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8C6D00")
_MARKERS = "osD^vPX<>"


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write(report: Report, path: pathlib.Path) -> bool:
    """Draw the speeds, or the memory if no speed was measured; False if there is neither.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if any(result.tflops is not None for result in report.speed):
        figure = _draw_speed(report, _figure())
    elif any(peak.peak_bytes for peak in report.memory):
        figure = _draw_memory(report.memory, _figure())
    else:
        return False
    figure.suptitle(headline(report.environment), fontsize=9)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=130)
    return True


def speed_svg(report: Report) -> str:
    """The speeds as SVG text; this and the following need matplotlib."""
    return _svg(_draw_speed(report, _figure()))


def memory_svg(report: Report) -> str:
    """The peaks of memory as SVG text."""
    return _svg(_draw_memory(report.memory, _figure()))


def decode_svg(items: Sequence[Decode]) -> str:
    """Bandwidth over a K/V cache as SVG text: a group of bars for each point, and what a large sum reads."""
    # What may be bound by arithmetic has no place among bandwidths.
    drawn = [item for item in items if item.batch and item.seconds and not item.flops]
    points = list(dict.fromkeys((item.batch, item.seqlen_k) for item in drawn))
    names = dict.fromkeys(item.contender for item in drawn)
    bars = {
        name: {
            points.index((item.batch, item.seqlen_k)): item.bandwidth / 1e12 for item in drawn if item.contender == name
        }
        for name in sorted(names, key=lambda name: not name.startswith(SUBJECT))
    }
    roofs = [item.bandwidth / 1e12 for item in items if item.contender == "read" and item.seconds]
    return _svg(_draw_bars([f"{batch} x {keys}" for batch, keys in points], bars, "TB/s", roofs, _figure()))


def modelled_svg(predictions: Mapping[Case, Prediction]) -> str:
    """Predictions as SVG text: a group of bars for each chip, a bar for each kernel."""
    archs = list(dict.fromkeys(case.arch for case in predictions))
    bars: dict[str, dict[int, float]] = {}
    for case, found in predictions.items():
        name = f"{case.kernel} {case.dtype} d{case.headdim} {case.mask}"
        bars.setdefault(name, {})[archs.index(case.arch)] = found.tflops
    return _svg(_draw_bars(archs, bars, "modelled TFLOP/s", [], _figure()))


def _figure() -> Any:
    from matplotlib.figure import Figure

    return Figure


def _svg(figure: Any) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    text = io.StringIO()
    # The same results give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flash_rocm"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _draw_bars(
    groups: list[str], bars: Mapping[str, Mapping[int, float]], label: str, roofs: Sequence[float], figure_class: Any
) -> Any:
    """``bars``: by name the height in each group that has one."""
    figure = figure_class(figsize=(max(7.0, 0.16 * len(groups) * len(bars) + 1.5), 4.2), layout="constrained")
    axes = figure.subplots(1, 1, squeeze=False)
    width = 0.8 / max(1, len(bars))
    for index, (name, heights) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in heights]
        axes[0][0].bar(places, list(heights.values()), width, label=name, color=_COLOURS[index % len(_COLOURS)])
    for roof in roofs:
        axes[0][0].axhline(roof, color="#999999", linestyle="--")
    axes[0][0].set_ylabel(label)
    axes[0][0].set_xticks(range(len(groups)), groups, fontsize=8)
    axes[0][0].grid(alpha=0.3, axis="y")
    _legend(figure, axes)
    return figure


def _style(names: list[str], name: str) -> dict[str, Any]:
    index = names.index(name)
    first = name == SUBJECT
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linewidth": 2.4 if first else 1.2,
        "markersize": 6 if first else 4,
        "zorder": 3 if first else 2,
        "label": name,
    }


def _draw_speed(report: Report, figure_class: Any) -> Any:
    results = report.speed
    names = peer_names(results)
    drawn = dict(panels(results))
    columns = list(dict.fromkeys((headdim, mask) for _, headdim, mask in drawn))
    rows = [direction for direction in DIRECTIONS if any(panel[0] == direction for panel in drawn)]
    seqlens = sorted({result.shape.seqlen for result in results})
    # Columns of one panel still need room for the title and the legend.
    size = (max(7.0, 2.7 * len(columns) + 0.6), max(3.4, 2.5 * len(rows) + 1.1))
    figure = figure_class(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for i, direction in enumerate(rows):
        for j, (headdim, mask) in enumerate(columns):
            axis = axes[i][j]
            for name in names:
                points = [
                    (seqlens.index(result.shape.seqlen), result.tflops)
                    for result in drawn.get((direction, headdim, mask), [])
                    if result.peer == name and result.tflops is not None
                ]
                if points:
                    axis.plot(*zip(*sorted(points), strict=True), **_style(names, name))
            axis.set_title(f"{direction}, d {headdim}, {mask}", fontsize=9)
            _axis(axis, seqlens)
        # Only now: a limit set by hand, shared by the row, stays as it is while lines are added.
        axes[i][0].set_ylim(bottom=0)
        axes[i][0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    _legend(figure, axes)
    return figure


def _draw_memory(peaks: list[Peak], figure_class: Any) -> Any:
    names = sorted(dict.fromkeys(peak.peer for peak in peaks), key=lambda name: name != SUBJECT)
    seqlens = sorted({peak.shape.seqlen for peak in peaks})
    figure = figure_class(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots(1, 1, squeeze=False)
    for name in names:
        points = [
            (seqlens.index(peak.shape.seqlen), peak.peak_bytes / 2**20)
            for peak in peaks
            if peak.peer == name and peak.peak_bytes
        ]
        if points:
            axes[0][0].plot(*zip(*sorted(points), strict=True), **_style(names, name))
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("peak MiB, forward + backward")
    axes[0][0].set_xlabel("sequence length")
    _axis(axes[0][0], seqlens)
    _legend(figure, axes)
    return figure


def _axis(axis: Any, seqlens: list[int]) -> None:
    labels = [f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen) for seqlen in seqlens]
    axis.set_xticks(range(len(seqlens)), labels, fontsize=8)
    axis.grid(alpha=0.3)


def _legend(figure: Any, axes: Any) -> None:
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        lines, labels = axis.get_legend_handles_labels()
        handles.update(zip(labels, lines, strict=True))
    widest = max(map(len, handles), default=0)
    ncols = max(1, min(6, len(handles), int(14 * figure.get_figwidth() / (widest + 8))))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, fontsize=8)
