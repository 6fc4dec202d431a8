"""Calls over a K/V cache, every back end on every target, against the float64 oracle: ``cache_matrix.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cache_matrix
import pytest
from ck_library import library_of_tests

_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "cuda": [pytest.mark.gpu],
    "interpret": [pytest.mark.interpret],
    "cpu": [],
    "virtual": [pytest.mark.virtual],
}


def _marks(scope: cache_matrix.Scope) -> list[pytest.MarkDecorator]:
    return [pytest.mark.ck] if scope.backend == "ck" else _MARKS[scope.target.partition(":")[0]]


def _parameters() -> list[Any]:
    return [
        pytest.param(case, id=str(case), marks=_marks(scope))
        for scope in cache_matrix.SCOPES
        for case in cache_matrix.cases(scope)
    ]


@pytest.mark.parametrize("case", _parameters())
def test_cache_matrix(case: cache_matrix.Case, count_case: Callable[..., None]) -> None:
    cache_matrix.run(case)
    count_case(case.backend, case.target, [f"cache {feature}" for feature in case.features], ["forward"])


@pytest.mark.parametrize("scope", cache_matrix.SCOPES, ids=lambda scope: f"{scope.backend}-{scope.target}")
def test_cache_matrix_covers_every_feature(scope: cache_matrix.Scope) -> None:
    counts = Counter((case.problem.dtype, feature) for case in cache_matrix.cases(scope) for feature in case.features)
    dtypes = cache_matrix.CAPABILITIES[scope.backend].dtypes
    if scope.backend == "ck":  # each instance that the library of the tests has, and with it each dtype
        assert {feature for _, feature in counts} == set(scope.combined)
        found, arch = library_of_tests(), scope.target.partition(":")[2]
        numbers = {found.find("splitkv", case.problem, arch) for case in cache_matrix.cases(scope)}
        # test_ck_cache.py has those for small pages, which take next to nothing else.
        assert {found.instances[n] for n in numbers if n is not None} == {
            instance
            for instance in found.instances
            if instance.kernel == "splitkv" and not instance.name.endswith("_n16")
        }
    else:
        assert all(counts[dtype, feature] >= scope.rounds for dtype in dtypes for feature in scope.combined)
