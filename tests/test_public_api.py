"""Callers keep working: today's public API against packaging/api, by griffe."""

from __future__ import annotations

import importlib.util
import pathlib

import griffe
import pytest

PACKAGING = pathlib.Path(__file__).parent.parent / "packaging"
_spec = importlib.util.spec_from_file_location("public_api", PACKAGING / "public_api.py")
assert _spec is not None and _spec.loader is not None
public_api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(public_api)


def load(folder: pathlib.Path) -> griffe.Object | griffe.Alias:
    return griffe.load("flash_rocm", search_paths=[folder], try_relative_path=False, allow_inspection=False)


def breakages(old: pathlib.Path, new: pathlib.Path) -> list[str]:
    return [
        each.explain(griffe.ExplanationStyle.ONE_LINE) for each in griffe.find_breaking_changes(load(old), load(new))
    ]


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("api")
    public_api.write(folder)
    return folder


def test_nothing_breaks(today: pathlib.Path) -> None:
    found = breakages(PACKAGING / "api", today)
    assert not found, "on purpose? then CHANGELOG, under Changed, and: python packaging/public_api.py\n" + "\n".join(
        found
    )


def test_what_is_new_is_guarded_too(today: pathlib.Path) -> None:
    texts = [
        {path.relative_to(root): path.read_text() for path in root.rglob("*.py")} for root in (PACKAGING / "api", today)
    ]
    assert texts[0] == texts[1], "run: python packaging/public_api.py"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("dropout_p=0.0, softmax_scale=None", "softmax_scale=None", "dropout_p"),
        ("causal=False", "causal=True", "causal"),
        ("def explain(q, k, v, *, ", "def explain(q, k, v, extra, *, ", "extra"),
        ("def use_backend(name): ...", "", "use_backend"),
    ],
)
def test_what_breaks_is_found(before: str, after: str, words: str, today: pathlib.Path, tmp_path: pathlib.Path) -> None:
    public_api.shutil.copytree(today, tmp_path / "changed")
    path = tmp_path / "changed" / "flash_rocm" / "__init__.py"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert any(words in line for line in breakages(today, tmp_path / "changed"))
