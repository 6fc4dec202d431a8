"""Results of several runs, read from the JSON files that ``bench`` and ``inspect --model`` write."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from flash_rocm import config
from flash_rocm.bench import records
from flash_rocm.bench.decode import Decode
from flash_rocm.bench.environment import HEADLINE
from flash_rocm.bench.grid import STATUSES
from flash_rocm.bench.records import RecordError
from flash_rocm.bench.report import Report
from flash_rocm.bench.shapes import DIRECTIONS, DTYPES
from flash_rocm.inspect.model import Prediction
from flash_rocm.inspect.report import Case


@dataclasses.dataclass(frozen=True)
class Results:
    """One file, or one run: at least one of speed, memory, overhead, decode and modelled is not empty.

    Attributes:
        name: of the file, without its folder.
        report: speed, memory and host overhead; its environment is that of the decoding too.
        modelled: what ``flash-rocm inspect --model --format json`` predicts, by kernel.
    """

    name: str
    report: Report
    decode: list[Decode] = dataclasses.field(default_factory=list)
    modelled: dict[Case, Prediction] = dataclasses.field(default_factory=dict)


def collect(paths: Sequence[pathlib.Path]) -> list[Results]:
    """Read files, and of folders every ``*.json`` in them.

    Raises:
        RecordError: a file that is none of ours, by file and key; a folder without any.
        OSError: a file that cannot be read.
    """
    found: list[pathlib.Path] = []
    for path in paths:
        here = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not here:
            raise RecordError(f"{path}: expected a folder with JSON files, got one without")
        found += here
    return [read(path) for path in found]


def read(path: pathlib.Path) -> Results:
    """Read one file; errors as of :func:`collect`."""
    where = str(path)
    try:
        raw = config.parse(where, path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, config.ConfigError) as error:
        text = str(error) if isinstance(error, config.ConfigError) else f"{where}: expected JSON, {error}"
        raise RecordError(text) from error
    environment = records.member(where, raw, "environment")
    if "modelled" in raw:
        cases = records.items(where, raw, "modelled", Case)
        predictions = records.items(where, raw, "modelled", Prediction)
        return Results(path.name, Report(environment, {}, {}), [], dict(zip(cases, predictions, strict=True)))
    for key in HEADLINE:
        records.member(f"{where}.environment", environment, key)
    if "decode" in raw:
        items = records.items(where, raw, "decode", Decode)
        for index, item in enumerate(items):
            _check_timing(f"{where}.decode[{index}]", item)
        return Results(path.name, Report(environment, {}, {}), items)
    report = Report.from_json(raw, where)
    for key in ("speed", "memory", "overhead"):
        for index, item in enumerate(getattr(report, key)):
            _check_item(f"{where}.{key}[{index}]", item)
    return Results(path.name, report)


def _check_item(where: str, item: Any) -> None:
    """What types do not say of a :class:`Result`, a :class:`Peak` or an :class:`Overhead`."""
    _check_choice(f"{where}.shape.dtype", item.shape.dtype, tuple(DTYPES))
    for name in ("batch", "seqlen", "nheads", "headdim"):
        if getattr(item.shape, name) < 1:
            raise RecordError(f"{where}.shape.{name}: expected at least 1, got {getattr(item.shape, name)}")
    if hasattr(item, "direction"):
        _check_choice(f"{where}.direction", item.direction, DIRECTIONS)
    if hasattr(item, "seconds"):
        _check_timing(where, item)
    else:
        _check_choice(f"{where}.status", item.status, STATUSES)


def _check_timing(where: str, item: Any) -> None:
    _check_choice(f"{where}.status", item.status, STATUSES)
    if (item.status == "ok") != bool(item.seconds):
        expected = "times, for its status is ok" if item.status == "ok" else f"none, for its status is {item.status}"
        raise RecordError(f"{where}.seconds: expected {expected}, got {len(item.seconds)}")
    if not all(0 < seconds < float("inf") for seconds in item.seconds):
        raise RecordError(f"{where}.seconds: expected times above 0, got {list(item.seconds)}")


def _check_choice(where: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RecordError(f"{where}: expected one of {', '.join(choices)}, got {value!r}")
