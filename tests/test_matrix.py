"""Every back end on every target against the float64 oracle; cases from ``matrix.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import matrix
import pytest
from ck_library import library_of_tests

_MARKS: dict[str, list[pytest.MarkDecorator]] = {
    "cuda": [pytest.mark.gpu],
    "interpret": [pytest.mark.interpret],
    "cpu": [],
    "virtual": [pytest.mark.virtual],
}


def _marks(scope: matrix.Scope) -> list[pytest.MarkDecorator]:
    if scope.backend == "ck":
        return [pytest.mark.ck]
    marks = _MARKS[scope.target.partition(":")[0]]
    return marks if scope.sparse or not scope.orders else [*marks, pytest.mark.exhaustive]


def _parameters() -> list[Any]:
    sparse = {str(case) for scope in matrix.SCOPES if scope.sparse for case in matrix.cases(scope)}
    return [
        pytest.param(case, scope.orders, id=str(case), marks=[*_marks(scope), pytest.mark.xdist_group(case.group)])
        for scope in matrix.SCOPES
        for case in matrix.cases(scope)
        if scope.sparse or str(case) not in sparse
    ]


@pytest.mark.parametrize(("case", "orders"), _parameters())
def test_matrix(case: matrix.Case, orders: tuple[str, ...], count_case: Callable[..., None]) -> None:
    matrix.run(case, orders)
    kind = "varlen" if case.problem.varlen else "dense"
    features = [f"{feature} {kind}" for feature in case.features or ("plain",)]
    count_case(case.backend, case.target, features, ["forward", "backward"] if case.backward else ["forward"])


@pytest.mark.parametrize("scope", [s for s in matrix.SCOPES if s.backend == "ck"], ids=lambda scope: scope.target)
def test_ck_matrix_covers_every_feature(scope: matrix.Scope) -> None:
    """Each feature runs in each direction that it has, dense and varlen, for all that the library of the tests has."""
    cases = list(matrix.cases(scope))
    for backward in (False, True):
        some = [case for case in cases if case.backward or not backward]
        wanted = set(matrix.supported(scope)) - ({"softcap"} if backward else set())
        assert {feature for case in some for feature in case.features} == wanted
        assert {case.problem.varlen for case in some} == {False, True}
        assert {case.problem.dtype for case in some} == matrix.CAPABILITIES["ck"].dtypes
    library, arch = library_of_tests(), scope.target.partition(":")[2]
    directions = [(kernel, c) for c in cases for kernel in ("forward", "backward")[: 1 + c.backward]]
    numbers = {library.find(kernel, c.problem, arch) for kernel, c in directions}
    # Those over a K/V cache are a matter of cache_matrix.py.
    assert numbers >= {n for n, instance in enumerate(library.instances) if instance.kernel != "splitkv"}


@pytest.mark.parametrize("scope", [s for s in matrix.SCOPES if s.sparse], ids=lambda scope: scope.target)
def test_sparse_matrix_covers_every_feature(scope: matrix.Scope) -> None:
    """Each feature runs forward and backward; dense, varlen and each dtype with some feature or other."""
    cases = list(matrix.cases(scope))
    for backward in (False, True):
        some = [case for case in cases if case.backward or not backward]
        assert {feature for case in some for feature in case.features} == set(matrix.COMBINED)
        assert {case.problem.varlen for case in some} == {False, True}
        assert {case.problem.dtype for case in some} == matrix.CAPABILITIES[scope.backend].dtypes


_DENSE_SCOPES = [scope for scope in matrix.SCOPES if not scope.sparse and scope.backend != "ck"]


@pytest.mark.parametrize("scope", _DENSE_SCOPES, ids=lambda scope: f"{scope.backend}-{scope.target}")
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
