"""How far a result may be from the oracle: measured, never tuned by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from flash_rocm.problem import AttentionProblem, accumulate_dtype
from flash_rocm.testing.inputs import Case
from flash_rocm.testing.oracle import oracle_attention

#: How many times the error of the plain low precision computation is allowed.
BUDGETS = {"output": 2.0, "lse": 2.0, "gradient": 3.0}


class Comparison(NamedTuple):
    """Largest error and what was allowed."""

    error: float
    allowed: float


def assert_close_to_oracle(
    actual: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    kind: str = "output",
    name: str = "out",
    *,
    rounding: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Assert that ``actual`` is as close to ``exact`` (float64) as its budget allows.

    ``kind`` is ``output``, ``lse`` or ``gradient``.  Checked in this order: dtype (``dtype``; default that
    of ``plain``, for an LSE its accumulation dtype) and shape; for an LSE the same -inf rows; finite where
    exact is; then the largest error against

        budget(kind) * largest error of plain + rounding + eps(dtype) / 2 * (max|exact| + rounding).

    The last term is one rounding: a number x of the dtype is at most eps / 2 * |x| off what it stands
    for.  ``rounding`` is :attr:`Oracle.rounding` of the result.  A float64 result has a float32
    ``plain``, whose error counts in proportion of the two eps; as the oracle is no more exact than the
    result then, that error and the rounding count once more.
    Returns the two numbers; raises ``AssertionError`` with both.
    """
    if dtype is None:
        dtype = accumulate_dtype(plain.dtype) if kind == "lse" else plain.dtype
    if actual.dtype != dtype or actual.shape != exact.shape:
        raise AssertionError(f"{name}: expected {dtype} {tuple(exact.shape)}, got {actual.dtype} {tuple(actual.shape)}")
    actual, exact, plain = (x.detach().to(torch.float64) for x in (actual, exact.to(actual.device), plain))
    plain = plain.to(actual.device)
    if kind == "lse" and not torch.equal(actual.isneginf(), exact.isneginf()):
        raise AssertionError(
            f"{name}: expected -inf in {int(exact.isneginf().sum())} rows that see no key, "
            f"got {int(actual.isneginf().sum())} -inf, {int((actual.isneginf() != exact.isneginf()).sum())} rows differ"
        )
    finite = exact.isfinite()
    if not bool(actual[finite].isfinite().all()):
        raise AssertionError(f"{name}: {int((~actual[finite].isfinite()).sum())} elements are NaN or infinite")
    if not bool(plain[finite].isfinite().all()):
        raise ValueError(f"{name}: the plain computation overflows; choose inputs within the range of the dtype")
    if not bool(finite.any()):
        return Comparison(0.0, 0.0)
    factor, eps = BUDGETS[kind], torch.finfo(dtype).eps
    difference = (actual - exact)[finite].abs()
    yardstick = float((plain - exact)[finite].abs().max())
    one_rounding = rounding + eps / 2 * (float(exact[finite].abs().max()) + rounding)
    if dtype == torch.float64:
        factor = (factor + 1.0) * eps / torch.finfo(torch.float32).eps
        one_rounding *= 2.0
    found = Comparison(float(difference.max()), factor * yardstick + one_rounding)
    if found.error > found.allowed:
        raise AssertionError(
            f"{name}: error {found.error:.3e} above the allowed {found.allowed:.3e} = {factor:g} x {yardstick:.3e} "
            f"(plain computation) + {one_rounding:.3e} (one rounding); {int((difference > found.allowed).sum())} of "
            f"{difference.numel()} elements, largest |exact| {float(exact[finite].abs().max()):.3e}"
        )
    return found


def assert_attention_close(
    problem: AttentionProblem,
    case: Case,
    out: torch.Tensor,
    softmax_lse: torch.Tensor | None = None,
    grads: Sequence[torch.Tensor] | None = None,
    *,
    use_dlse: bool = False,
    probs: torch.Tensor | None = None,
) -> dict[str, Comparison]:
    """Compare every given result of a call with the oracle; ``use_dlse``: ``grads`` include ``case.dlse``.

    ``grads`` are dq, dk, dv and, with sinks, dsinks.
    Returns error and allowed error of each result by name (out, lse, dq, dk, dv, dsinks, probs).
    """
    dout = None if grads is None else case.dout
    dlse = case.dlse if use_dlse else None
    exact = oracle_attention(case.inputs, problem, dout, dlse)
    plain = oracle_attention(case.inputs, problem, dout, dlse, upcast=False)
    results: dict[str, tuple[torch.Tensor | None, str]] = {
        "out": (out, "output"),
        "lse": (softmax_lse, "lse"),
        "probs": (probs, "output"),
    }
    if grads is not None:
        names = ("dq", "dk", "dv", "dsinks") if problem.sinks else ("dq", "dk", "dv")
        results.update(zip(names, ((g, "gradient") for g in grads), strict=True))
    found = {}
    for name, (actual, kind) in results.items():
        if actual is None:
            continue
        found[name] = assert_close_to_oracle(
            actual,
            getattr(exact, name),
            getattr(plain, name),
            kind,
            name,
            rounding=exact.rounding.get(name, 0.0),
            dtype=_dtype_of(name, problem),
        )
    return found


def _dtype_of(name: str, problem: AttentionProblem) -> torch.dtype:
    """dtype of a result."""
    if name == "dsinks":
        return torch.float32
    return accumulate_dtype(problem.dtype) if name == "lse" else problem.dtype
