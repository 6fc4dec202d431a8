"""``flash-rocm bench --report``: the page holds every point of its input, and refuses what is none, by file and key."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html.parser
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from flash_rocm import backends, config
from flash_rocm.bench import cli, grid, memory, page, plot, records, results, shapes
from flash_rocm.bench.overhead import Overhead
from flash_rocm.bench.report import Report
from flash_rocm.config_schema import HOW
from flash_rocm.inspect import model
from flash_rocm.inspect.report import Case

pytest.importorskip("matplotlib")

SHIPPED = pathlib.Path(__file__).parent.parent / "docs" / "results"
ENVIRONMENT = {
    **{"device": "<b>Some & GPU</b>", "arch": "sm90", "torch": "2.11", "cuda": "13.0", "hip": None, "cudnn": 91900},
    **{"triton": "3.6.0", "flash_rocm": "0.1.0", "date": "2026-11-27"},
}


class Tables(html.parser.HTMLParser):
    """The rows of all tables as texts, the values of all numbers, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.values: list[float] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.inside = False  # of a cell
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.fetched.append(value or "")
            if (tag, name) == ("data", "value"):
                self.values.append(float(value or "nan"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def speed(peer: str, shape: shapes.Shape, direction: str, seconds: float) -> grid.Result:
    return grid.Result(shape, direction, peer, "bshd", "ok", iterations=3, seconds=(seconds, seconds, 2 * seconds))


def made_up() -> Report:
    """One of everything: two panels, a peer that failed, memory, host time."""
    todo = [shapes.Shape(4, 512, 8, 64, True), shapes.Shape(2, 1024, 8, 64, True), shapes.Shape(2, 1024, 4, 128, False)]
    report = Report(dict(ENVIRONMENT), {}, {"other": "is <not> here"})
    for index, shape in enumerate(todo):
        report.speed += [speed("flash_rocm", shape, "forward", 1e-4 * (index + 1)), speed("x", shape, "forward", 2e-4)]
    report.speed.append(grid.Result(todo[0], "backward", "x", "bshd", "error", "<script>alert(1)</script>"))
    report.memory = [memory.Peak(shape, "flash_rocm", 1, 1000 + shape.seqlen, "ok") for shape in todo]
    report.memory.append(memory.Peak(todo[0], "x", 1, None, "skipped", "too large"))
    report.overhead = [Overhead(todo[0], "no_grad", "flash_rocm", "ok", calls=9, seconds=(3e-5,), wait_seconds=(1e-6,))]
    return report


def decoded() -> dict[str, Any]:
    base = {"status": "ok", "reason": "", "flops": 0}
    items = [
        {**base, "batch": 0, "seqlen_k": 0, "contender": "read", "seconds": [1e-3], "read_bytes": 4 << 30},
        {
            **base,
            "batch": 4,
            "seqlen_k": 512,
            "contender": "flash_rocm dense",
            "seconds": [2e-5],
            "read_bytes": 1 << 24,
        },
    ]
    failed = {"batch": 4, "seqlen_k": 512, "contender": "y", "status": "error", "reason": "no", "seconds": []}
    return {"environment": ENVIRONMENT, "decode": [*items, failed]}


def modelled() -> dict[Case, model.Prediction]:
    cycles = {"matrix": 100.0, "memory": 60.0}
    return {
        Case(arch, "forward", "bf16", 128, "causal"): model.Prediction(cycles, 2, 1e9, 100.5 + index, 1300.0)
        for index, arch in enumerate(("gfx942", "gfx1100"))
    }


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "results"
    path.mkdir()
    (path / "speed.json").write_text(json.dumps(made_up().to_json()))
    (path / "decode.json").write_text(json.dumps(decoded()))
    (path / "modelled.json").write_text(model.as_json(modelled()))
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_page_holds_every_point(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "new" / "page"
    assert run("--report", out, "--results", folder) == 0
    found = Tables((out / "index.html").read_text())
    report = made_up()
    expected = [result.tflops for result in report.speed if result.tflops is not None]
    expected += [peak.peak_bytes for peak in report.memory if peak.peak_bytes]
    expected += [prediction.tflops for prediction in modelled().values()] + [3e-5, (4 << 30) / 1e-3, (1 << 24) / 2e-5]
    assert len(expected) == 6 + 3 + 2 + 3
    for value in expected:
        found.values.remove(float(value))  # raises where it is not there once more
    for row in (
        ["B4 H8 S512 d64 causal bf16", "error: <script>alert(1)</script>"],
        ["other", "is <not> here"],
        ["y", "4 x 512", "error: no", ""],
    ):
        assert row in found.rows
    assert any("skipped: too large" in row for row in found.rows)


def test_the_page_is_self_contained_and_escaped(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run("--report", tmp_path, "--results", folder)
    text = (tmp_path / "index.html").read_text()
    found = Tables(text)
    assert not found.tags & {"script", "link", "iframe", "b"} and "@import" not in text and "url(" not in text
    assert len(found.fetched) == 4  # speed, memory, decoding, modelled
    for source in found.fetched:
        head, _, data = source.partition(",")
        assert head == "data:image/svg+xml;base64" and "</svg>" in base64.b64decode(data).decode()
    assert "&lt;b&gt;Some &amp; GPU&lt;/b&gt;" in text
    again = tmp_path / "again"
    run("--report", again, "--results", folder)
    assert (again / "index.html").read_text() == text


def test_the_page_says_what_was_not_measured_on_amd(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = "Nothing here was measured on an AMD GPU"
    found = results.collect([folder])
    assert words in page.page(found)
    found[0].report.environment["hip"] = "7.1"
    assert words not in page.page(found)


def test_the_page_says_where_configs_come_from() -> None:
    rows = Tables(page.page([])).rows
    (head,) = [row for row in rows if row[:2] == ["arch", "file"]]
    by_arch = {row[0]: row for row in rows if row and row[0] in backends.TRITON_AMD_ARCHS and len(row) == len(head)}
    assert set(by_arch) == set(backends.TRITON_AMD_ARCHS)
    assert by_arch["gfx1101"][1] == "gfx1100.json"
    entries = config.arch_configs("gfx942").triton
    hows = [entry.config.provenance.how for entry in entries]
    assert by_arch["gfx942"][2:] == [*(str(hows.count(how)) for how in HOW), str(len(entries))]
    assert sum(json.dumps(raw["options"]) in row for raw in config.file_contents("gfx942")["triton"] for row in rows)


def test_the_results_of_this_repository(tmp_path: pathlib.Path) -> None:
    files = sorted(SHIPPED.glob("*.json"))
    assert run("--report", tmp_path, "--results", SHIPPED) == 0
    found = Tables((tmp_path / "index.html").read_text())
    for each in map(results.read, files):
        values = [result.tflops for result in each.report.speed if result.tflops is not None]
        values += [item.bandwidth for item in each.decode if item.read_bytes]
        values += [prediction.tflops for prediction in each.modelled.values()]
        assert values and set(values) <= set(found.values)


def test_a_run_writes_its_page(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("--tokens", "64", "--width", "32", "--seqlen", "32", "--headdim", "16", "--rounds", "1", "--device", "cpu")
    path = tmp_path / "out.json"
    assert run(*tiny, "--direction", "forward", "--json", path, "--report", tmp_path) == 0
    speeds = {item["tflops"] for item in json.loads(path.read_text())["speed"]}
    assert speeds <= set(Tables((tmp_path / "index.html").read_text()).values)
    assert f"wrote {tmp_path / 'index.html'}" in capsys.readouterr().out


def test_results_come_back_as_they_were(folder: pathlib.Path) -> None:
    assert results.read(folder / "speed.json").report == made_up()
    assert results.read(folder / "modelled.json").modelled == modelled()
    (read, dense, failed) = results.read(folder / "decode.json").decode
    assert dense.to_json() == {**decoded()["decode"][1], "bandwidth": dense.bandwidth, "speed": 0.0, "seconds": (2e-5,)}
    assert read.contender == "read" and failed.reason == "no"


def change(record: Any, way: list[Any], value: Any) -> Any:
    """A copy with one value replaced, or, by ``...``, removed."""
    changed = json.loads(json.dumps(record))
    place = changed
    for key in way[:-1]:
        place = place[key]
    if value is ...:
        del place[way[-1]]
    else:
        place[way[-1]] = value
    return changed


BROKEN: dict[str, tuple[Callable[[], Any], list[Any], Any, str]] = {
    "schema": (lambda: made_up().to_json(), ["schema"], 2, ".schema: expected 1, got 2"),
    "missing": (lambda: made_up().to_json(), ["memory"], ..., ".memory: expected a value, got none"),
    "list": (lambda: made_up().to_json(), ["speed"], {}, ".speed: expected a list, got {}"),
    "shape": (
        lambda: made_up().to_json(),
        ["speed", 1, "shape", "seqlen"],
        "9",
        ".speed[1].shape.seqlen: expected an int",
    ),
    "bool": (
        lambda: made_up().to_json(),
        ["speed", 0, "shape", "batch"],
        True,
        ".speed[0].shape.batch: expected an integ",
    ),
    "size": (
        lambda: made_up().to_json(),
        ["memory", 0, "shape", "seqlen"],
        0,
        ".memory[0].shape.seqlen: expected at le",
    ),
    "dtype": (
        lambda: made_up().to_json(),
        ["speed", 0, "shape", "dtype"],
        "fp7",
        ".speed[0].shape.dtype: expected one of",
    ),
    "direction": (
        lambda: made_up().to_json(),
        ["speed", 0, "direction"],
        "up",
        ".speed[0].direction: expected one of for",
    ),
    "seconds": (
        lambda: made_up().to_json(),
        ["speed", 0, "seconds", 1],
        "x",
        ".speed[0].seconds[1]: expected a number",
    ),
    "zero": (lambda: made_up().to_json(), ["speed", 0, "seconds"], [0.0], ".speed[0].seconds: expected times above 0"),
    "none": (lambda: made_up().to_json(), ["overhead", 0, "seconds"], [], ".overhead[0].seconds: expected times, for"),
    "pair": (
        lambda: made_up().to_json(),
        ["speed", 0, "errors"],
        {"out": [1.0]},
        ".speed[0].errors.out: expected a list of",
    ),
    "environment": (decoded, ["environment", "arch"], ..., ".environment.arch: expected a value"),
    "status": (decoded, ["decode", 1, "status"], "fine", ".decode[1].status: expected one of ok"),
    "cycles": (
        lambda: json.loads(model.as_json(modelled())),
        ["modelled", 0, "cycles"],
        3,
        ".modelled[0].cycles: expected an object, got 3",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_results_name_file_and_key(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, way, value, message = BROKEN[name]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(make()))
    assert results.read(path).name == "broken.json"
    path.write_text(json.dumps(change(make(), way, value)))
    assert run("--report", tmp_path / "none", "--results", path) == 2
    assert f"flash-rocm bench: {path}{message}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("contents", "message"),
    [("{", "expected JSON"), ("[]", "expected an object"), ('{"a": 1, "a": 2}', "'a' twice"), ("{}", ".environment: ")],
)
def test_files_that_are_no_results(contents: str, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(contents)
    with pytest.raises(records.RecordError) as error:
        results.collect([path])
    assert str(path) in str(error.value) and message in str(error.value)


def test_bad_arguments(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    cases = [
        (("--results", folder), "--results: expected --report DIR"),
        (("--report", folder / "speed.json"), "--report: expected a folder, got the file"),
        (("--report", tmp_path, "--results", tmp_path / "no.json"), "no.json"),
        (("--report", tmp_path, "--results", tmp_path / "empty"), "expected a folder with JSON files"),
        *(
            (("--report", tmp_path, "--results", folder, *option), f"{option[0]}: expected none beside --results")
            for option in (
                ("--speed",),
                ("--memory",),
                ("--overhead",),
                ("--decode",),
                ("--json", "x"),
                ("--plot", "x"),
            )
        ),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(plot, "available", lambda: False)
    assert run("--report", tmp_path, "--results", folder) == 2
    assert "--report: expected matplotlib" in capsys.readouterr().err


def test_every_field_of_a_record_is_checked() -> None:
    good = json.loads(json.dumps(dataclasses.asdict(made_up().speed[0])))
    for field in good:
        with pytest.raises(records.RecordError, match=rf"here\.{field}"):
            records.record("here", {**good, field: object()}, grid.Result)
