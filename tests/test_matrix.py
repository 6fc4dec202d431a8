"""Every back end on every target against the float64 oracle; cases from ``matrix.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import matrix
import pytest

_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "cuda": [pytest.mark.gpu],
    "interpret": [pytest.mark.interpret],
    "cpu": [],
}


def _parameters() -> list[Any]:
    return [
        pytest.param(case, id=str(case), marks=[*_MARKS[scope.target], pytest.mark.xdist_group(case.group)])
        for scope in matrix.SCOPES
        for case in matrix.cases(scope)
    ]


@pytest.mark.parametrize("case", _parameters())
def test_matrix(case: matrix.Case, count_case: Callable[..., None]) -> None:
    matrix.run(case)
    kind = "varlen" if case.problem.varlen else "dense"
    features = [f"{feature} {kind}" for feature in case.features or ("plain",)]
    count_case(case.backend, case.target, features, ["forward", "backward"] if case.backward else ["forward"])


@pytest.mark.parametrize("scope", matrix.SCOPES, ids=lambda scope: f"{scope.backend}-{scope.target}")
def test_matrix_covers_every_feature(scope: matrix.Scope) -> None:
    """Each (dtype, feature, dense/varlen) runs forward and backward; Triton on a GPU at least 20 times."""
    counts: Counter[Any] = Counter()
    for case in matrix.cases(scope):
        for feature in case.features:
            for direction in ("forward", "backward") if case.backward else ("forward",):
                counts[case.problem.dtype, feature, case.problem.varlen, direction] += 1
    least = 20 if (scope.target, scope.backend) == ("cuda", "triton") else 1
    missing = [
        (dtype, feature, varlen, direction)
        for dtype in matrix.CAPABILITIES[scope.backend].dtypes
        for feature in matrix.COMBINED
        for varlen in (False, True)
        for direction in ("forward", "backward")
        if counts[dtype, feature, varlen, direction] < least
    ]
    assert not missing
