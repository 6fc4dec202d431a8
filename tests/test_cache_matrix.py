"""Calls over a K/V cache, every back end on every target, against the float64 oracle: ``cache_matrix.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import cache_matrix
import pytest

_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "cuda": [pytest.mark.gpu],
    "interpret": [pytest.mark.interpret],
    "cpu": [],
    "virtual": [pytest.mark.virtual],
}


def _parameters() -> list[Any]:
    return [
        pytest.param(case, id=str(case), marks=_MARKS[scope.target.partition(":")[0]])
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
    assert all(counts[dtype, feature] >= scope.rounds for dtype in dtypes for feature in cache_matrix.COMBINED)
