"""Text: tables of speed, memory and overhead, and the ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flash_rocm.bench.grid import Result
from flash_rocm.bench.memory import Peak, growth
from flash_rocm.bench.overhead import MODES, Overhead
from flash_rocm.bench.peers import BASELINE, STANDARD, SUBJECT
from flash_rocm.bench.ratios import panels, peer_names, ratios, summary
from flash_rocm.timing import geometric_mean, median


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, the first one to the left."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def speed_tables(results: Sequence[Result]) -> Iterator[str]:
    """A table per panel, then why cells are empty."""
    for (direction, headdim, mask), here in panels(results):
        names = peer_names(here)
        rows = [["seqlen", "batch", "heads", *(cell for name in names for cell in _heads(name))]]
        for shape in sorted({result.shape for result in here}, key=lambda shape: shape.seqlen):
            row = [str(shape.seqlen), str(shape.batch), str(shape.nheads)]
            for name in names:
                found = next((result for result in here if result.shape == shape and result.peer == name), None)
                ratio = ratios(here, name).get((direction, shape))
                row += _cells(name, found, ratio)
            rows.append(row)
        rows.append(["geomean", "", "", *(cell for name in names for cell in _mean_cells(here, name))])
        title = f"{direction}, headdim {headdim}, {mask}: TFLOP/s (and flash_rocm / peer)"
        yield title + "\n" + table(rows)
    yield _reasons(results)


def _heads(name: str) -> list[str]:
    return [name] if name == SUBJECT else [name, ""]


def _cells(name: str, result: Result | None, ratio: float | None) -> list[str]:
    if result is None:
        cell = "-"
    elif result.tflops is None:
        cell = result.status
    else:
        cell = f"{result.tflops:.0f}" if result.tflops >= 10 else f"{result.tflops:.2g}"
    return [cell] if name == SUBJECT else [cell, "" if ratio is None else f"{ratio:.2f}x"]


def _mean_cells(results: Sequence[Result], name: str) -> list[str]:
    found = list(ratios(results, name).values())
    return [""] if name == SUBJECT else ["", f"{geometric_mean(found):.2f}x" if found else ""]


def _reasons(results: Sequence[Result]) -> str:
    seen: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.status != "ok":
            where = seen.setdefault((result.peer, result.status, result.reason), [])
            where.append(f"{result.direction} {result.shape}")
    return "\n".join(
        f"{peer} {status} ({len(where)} cells, first: {where[0]}): {reason}"
        for (peer, status, reason), where in seen.items()
    )


def summary_text(results: Sequence[Result]) -> str:
    """The overall ratios; against PyTorch's FLASH_ATTENTION first."""
    records = [record for record in summary(results) if record["mask"] == "any"]
    if not records:
        return f"no ratios: {SUBJECT} and a peer must both have a speed"
    records.sort(key=lambda record: record["peer"] != BASELINE)
    rows = [["flash_rocm /", "direction", "headdims", "points", "geomean", "lowest", "at"]]
    for record in records:
        dims = ",".join(map(str, record["headdims"]))
        ratio, lowest = f"{record['geomean']:.2f}x", f"{record['lowest']:.2f}x"
        points = str(record["points"])
        rows.append([record["peer"], record["direction"], dims, points, ratio, lowest, record["lowest_shape"]])
    return "speed ratios\n" + table(rows)


def memory_table(peaks: Sequence[Peak]) -> str:
    """Peak bytes per length, the ratio of standard attention to flash_rocm, and the growth."""
    names = list(dict.fromkeys(peak.peer for peak in peaks))
    shapes = sorted({peak.shape for peak in peaks}, key=lambda shape: shape.seqlen)
    found = {(peak.shape, peak.peer): peak for peak in peaks}
    standard = [name for name in names if name in STANDARD and SUBJECT in names]
    rows = [["seqlen", "inputs", *names, *(f"{name} / flash_rocm" for name in standard)]]
    for shape in shapes:
        row = [str(shape.seqlen), f"{next(p.input_bytes for p in peaks if p.shape == shape):,}"]
        for name in names:
            peak = found.get((shape, name))
            row.append("-" if peak is None else peak.status if peak.peak_bytes is None else f"{peak.peak_bytes:,}")
        for name in standard:
            pair = [found.get((shape, name)), found.get((shape, SUBJECT))]
            sizes = [peak.peak_bytes for peak in pair if peak is not None and peak.peak_bytes]
            row.append(f"{sizes[0] / sizes[1]:.1f}x" if len(sizes) == 2 else "")
        rows.append(row)
    first = shapes[0]
    title = (
        f"peak memory in bytes, forward + backward, without q, k, v, dout: batch {first.batch}, {first.nheads} heads, "
        f"headdim {first.headdim}, {first.mask}, {first.dtype}"
    )
    lines = [title, table(rows)]
    for name in names:
        answer = growth(peaks, name)
        if answer is not None:
            start, end, factor = answer
            lines.append(f"{name}: {factor:.1f}x the memory for {end // start}x the length (S {start} -> {end})")
    lines += [f"{p.peer} {p.status} at {p.shape}: {p.reason}" for p in peaks if p.status != "ok"]
    return "\n".join(lines)


def overhead_table(items: Sequence[Overhead]) -> str:
    """Microseconds per call and the ratio flash_rocm / peer (here lower is better)."""
    names = list(dict.fromkeys(item.peer for item in items))
    found = {(item.mode, item.peer): item for item in items}
    rows = [["mode", *(cell for name in names for cell in (f"{name} us", "wait us")), *_others(names)]]
    for mode in MODES:
        medians: dict[str, float] = {}
        row = [mode]
        for name in names:
            item = found.get((mode, name))
            if item is None or not item.seconds:
                row += ["-" if item is None else item.status, ""]
                continue
            medians[name] = median(item.seconds)
            row += [f"{medians[name] * 1e6:.1f}", f"{median(item.wait_seconds) * 1e6:.1f}"]
        for name in names:
            if name != SUBJECT and SUBJECT in names:
                both = SUBJECT in medians and name in medians
                row.append(f"{medians[SUBJECT] / medians[name]:.2f}x" if both else "")
        rows.append(row)
    calls = max(item.calls for item in items)
    title = f"host overhead per call, {items[0].shape}: {calls} calls issued without waiting, then the wait for them"
    reasons = dict.fromkeys(f"{item.peer} {item.status}: {item.reason}" for item in items if item.status != "ok")
    return "\n".join([title, table(rows), *reasons])


def _others(names: Sequence[str]) -> list[str]:
    return [f"flash_rocm / {name}" for name in names if name != SUBJECT] if SUBJECT in names else []
