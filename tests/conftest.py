"""What every test gets: fresh memory full of NaN, a reason for each skip, a count of the cases that ran."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from calls import device, fresh_dynamo, received  # noqa: F401, fixtures of several files
from ck_library import NO_LIBRARY, cache_of_tests
from flash_rocm._ck import build as ck_build

from flash_rocm import runtime, variables

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_CASE = "attention_case"
_ON_DEMAND = runtime._on_demand


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)  # workers share the cores; small shapes crawl when each wants all of them
    config.addinivalue_line("markers", "unpoisoned: fresh memory is not filled with NaN (timing, memory peaks)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """gpu tests need a GPU; interpret tests a process that was started for them; ck tests a library."""
    no_gpu = pytest.mark.skip(reason="no GPU here")
    no_library = pytest.mark.skip(reason=NO_LIBRARY)
    no_interpreter = pytest.mark.skip(reason="TRITON_INTERPRET=1 is not set: make test runs these in their own process")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpret") and not INTERPRETING:
            item.add_marker(no_interpreter)
        if item.get_closest_marker("ck") and cache_of_tests() is None:
            item.add_marker(no_library)


@pytest.fixture(autouse=True)
def _clean_environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer has set or compiled does not decide which back end a test takes; ck tests find their library.

    Only tests that say so compile instances of Composable Kernel at their first use.
    """
    monkeypatch.setattr(ck_build, "why_not", lambda request: "no compiler in this test")
    monkeypatch.setattr(runtime, "_on_demand", _on_demand_of_a_test)
    for name in {**variables.RUN, **variables.BUILD}.keys() - {"TRITON_INTERPRET"}:
        monkeypatch.delenv(name, raising=False)
    if request.node.get_closest_marker("ck") and (cache := cache_of_tests()):
        monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(cache))


def _on_demand_of_a_test(own: bytes | None, shared: bytes | None, *others: bytes | None) -> runtime.OnDemand:
    """None but in a cache that the test has named."""
    found = _ON_DEMAND(own, shared, *others)
    return found if own or shared else found._replace(folder=pathlib.Path("/nowhere"))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = allocate(*args, **kwargs)
        if fresh.is_floating_point():
            with torch.no_grad():
                fresh.fill_(float("nan"))
        return fresh

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN, so that what a kernel forgets to write shows.

    Mark a test ``unpoisoned`` to have plain memory (timing, memory peaks).
    """
    if request.node.get_closest_marker("unpoisoned"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture
def count_case(record_property: Callable[[str, Any], None]) -> Callable[[str, str, Iterable[str], Iterable[str]], None]:
    """``count_case(back_end, target, features, directions)``: note what this test covered, for the summary."""

    def count(backend: str, target: str, features: Iterable[str], directions: Iterable[str]) -> None:
        named = sorted(features) or ["plain"]
        record_property(_CASE, [[backend, target, name, direction] for name in named for direction in directions])

    return count


def _cases(reports: Iterable[pytest.TestReport]) -> Iterator[tuple[str, ...]]:
    for report in reports:
        for key, rows in report.user_properties:
            if key == _CASE and report.when == "call":
                yield from (tuple(row) for row in rows)  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Cases that passed per (back end, target, feature, direction); reports of pytest-xdist workers count too."""
    counts = collections.Counter(_cases(terminalreporter.stats.get("passed", [])))
    if not counts:
        return
    terminalreporter.section("attention cases that passed")
    directions = sorted({row[3] for row in counts}, reverse=True)
    for backend, target in sorted({row[:2] for row in counts}):
        terminalreporter.write_line(f"{backend} on {target}")
        for feature in sorted({row[2] for row in counts if row[:2] == (backend, target)}):
            numbers = (f"{name} {counts[backend, target, feature, name]:5d}" for name in directions)
            terminalreporter.write_line(f"  {feature:<16} {'   '.join(numbers)}")
