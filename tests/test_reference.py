"""The reference back end against the float64 oracle: every feature, dtype and layout, tile edges, dead rows, NaN."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_rocm.problem import AttentionProblem
from flash_rocm.reference import TileSize, attention, backward, forward, probs
from flash_rocm.reference.tiles import default_tile
from flash_rocm.testing import (
    EXTRA_ROWS,
    LAYOUTS,
    Case,
    assert_attention_close,
    assert_close_to_oracle,
    make_inputs,
    make_problem,
    oracle_attention,
    oracle_keep,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Small and odd, so that small shapes cross several tiles in both directions.
TILE = TileSize(16, 11)

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(window_right=0),
    "causal_wide": dict(window_right=0, seqlen_q=53, seqlen_k=37),
    "window": dict(window_left=9, window_right=5),
    "window_left": dict(window_left=7),
    "window_causal": dict(window_left=12, window_right=0, seqlen_q=41, seqlen_k=30),
    "window_zero": dict(window_left=0, window_right=0),
    "gqa": dict(nheads=6, nheads_k=2, window_right=0),
    "mqa": dict(nheads=4, nheads_k=1),
    "headdim_v": dict(headdim=24, headdim_v=40),
    "headdim_odd": dict(headdim=59, headdim_v=7),
    "softcap": dict(softcap=1.5, window_right=0),
    "alibi": dict(alibi=True, window_right=0),
    "sinks": dict(sinks=True, window_right=0, nheads=4, nheads_k=2),
    "alibi_full": dict(alibi=True, nheads=4, nheads_k=2),
    "dropout": dict(dropout_p=0.3),
    "dropout_gqa": dict(dropout_p=0.17, nheads=4, nheads_k=2, window_right=0),
    "scale_negative": dict(softmax_scale=-0.3, window_right=0),
    "scale_zero": dict(softmax_scale=0.0),
    "everything": dict(
        nheads=6,
        nheads_k=3,
        headdim=20,
        headdim_v=12,
        window_left=23,
        window_right=4,
        softcap=2.0,
        alibi=True,
        sinks=True,
        dropout_p=0.2,
        softmax_scale=0.4,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Shapes this small only lose by threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    problem: AttentionProblem, case: Case, *, use_dlse: bool = False, tile: TileSize | None = TILE
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    out, lse = forward(problem, case.inputs, tile=tile)
    grads = backward(problem, case.inputs, out, lse, case.dout, case.dlse if use_dlse else None, tile=tile)
    assert (grads[3] is None) == (not problem.sinks)
    return out, lse, tuple(x for x in grads if x is not None)


def check(problem: AttentionProblem, case: Case, *, use_dlse: bool = False, tile: TileSize | None = TILE) -> None:
    out, lse, grads = run(problem, case, use_dlse=use_dlse, tile=tile)
    assert all(x.is_contiguous() for x in (out, lse, *grads))
    assert_attention_close(problem, case, out, lse, grads, use_dlse=use_dlse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_dense(feature: str, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, **FEATURES[feature])
    check(problem, make_inputs(problem, seed=1), use_dlse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_varlen(feature: str, dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype, varlen=True, batch=5, **FEATURES[feature])
    longest_q, longest_k = problem.seqlen_q, problem.seqlen_k
    case = make_inputs(problem, 2, seqlens_q=[3, longest_q, 0, 20, 1], seqlens_k=[19, longest_k, 8, 0, 1], poison=True)
    check(problem, case)
    out, lse, grads = run(problem, case)
    assert not out[-EXTRA_ROWS:].any() and bool(lse[:, -EXTRA_ROWS:].isneginf().all())
    assert not any(g[-EXTRA_ROWS:].any() for g in grads[:3])


@pytest.mark.parametrize("varlen", (False, True))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, varlen: bool) -> None:
    problem = make_problem(varlen=varlen, seqlen_q=33, seqlen_k=33, nheads=4, nheads_k=2, headdim_v=8, window_right=0)
    lengths = [33, 12] if varlen else None
    make = functools.partial(make_inputs, problem, 3, seqlens_q=lengths, seqlens_k=lengths, poison=True)
    case, plain = make(layout=layout), make()
    for x, y in zip(case.inputs[:3], plain.inputs[:3], strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
        assert (x.stride() == y.stride()) == (layout == "contiguous")
    before = [x.clone() for x in case.inputs[:3]]
    check(problem, case)
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(before, case.inputs[:3], strict=True))


@pytest.mark.parametrize("feature", FEATURES)
def test_float64_agrees_to_rounding(feature: str) -> None:
    """Formulas, not precision: 1e-10 absolute, far below any wrong term."""
    problem = make_problem(dtype=torch.float64, **FEATURES[feature])
    case = make_inputs(problem, seed=4, alibi_per_batch=True)
    out, lse, grads = run(problem, case, use_dlse=True)
    exact = oracle_attention(case.inputs, problem, case.dout, case.dlse)
    results, expected = (out, lse, *grads[:3]), (exact.out, exact.lse, exact.dq, exact.dk, exact.dv)
    for actual, number in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, number, rtol=0, atol=1e-10)
    if problem.sinks:  # float32 whatever the others are, so right to its rounding
        torch.testing.assert_close(grads[3], exact.dsinks, rtol=6e-8, atol=0, check_dtype=False)


@pytest.mark.parametrize("seed", range(24))
def test_random_combinations(seed: int) -> None:
    rng = random.Random(seed)
    nheads_k = rng.choice((1, 2, 3))
    problem = make_problem(
        dtype=rng.choice(DTYPES),
        batch=rng.randint(1, 3),
        seqlen_q=rng.randint(1, 70),
        seqlen_k=rng.randint(1, 70),
        nheads=nheads_k * rng.choice((1, 2, 4)),
        nheads_k=nheads_k,
        headdim=rng.randint(1, 48),
        headdim_v=rng.randint(1, 48),
        softmax_scale=rng.uniform(-0.5, 0.5),
        window_left=rng.choice((-1, -1, 0, 5, 100)),
        window_right=rng.choice((-1, 0, 0, 3, 100)),
        softcap=rng.choice((0.0, 3.0)),
        dropout_p=rng.choice((0.0, 0.1, 0.6)),
        alibi=rng.random() < 0.3,
        sinks=rng.random() < 0.3,
        varlen=rng.random() < 0.5,
    )
    case = make_inputs(problem, seed, layout=rng.choice(LAYOUTS), poison=True, alibi_per_batch=rng.random() < 0.5)
    check(problem, case, use_dlse=rng.random() < 0.5, tile=TileSize(rng.randint(1, 40), rng.randint(1, 40)))


@pytest.mark.parametrize("length_q", (1, 15, 16, 17, 32, 33))
@pytest.mark.parametrize("length_k", (1, 10, 11, 12, 22, 23))
def test_tile_boundaries(length_q: int, length_k: int) -> None:
    for windows in ((-1, -1), (-1, 0), (4, 3)):
        problem = make_problem(
            batch=1, seqlen_q=length_q, seqlen_k=length_k, window_left=windows[0], window_right=windows[1]
        )
        check(problem, make_inputs(problem, seed=length_q * 100 + length_k))


@pytest.mark.parametrize("field", ("batch", "seqlen_q", "seqlen_k"))
@pytest.mark.parametrize("varlen", (False, True))
def test_nothing_there(field: str, varlen: bool) -> None:
    problem = make_problem(varlen=varlen, alibi=True, dropout_p=0.1, window_right=0, **{field: 0})
    case = make_inputs(problem)
    check(problem, case, tile=None)
    out, lse, grads = run(problem, case, tile=None)
    assert not out.any() and bool(lse.isneginf().all()) and not any(g.any() for g in grads)
    assert probs(problem, case.inputs, lse).shape == (problem.batch, 2, problem.seqlen_q, problem.seqlen_k)


def test_dead_rows_are_zero_and_get_no_gradient() -> None:
    problem = make_problem(seqlen_q=50, seqlen_k=20, window_right=0)
    case = make_inputs(problem)
    out, lse, (dq, _, _) = run(problem, case, use_dlse=True)
    assert not out[:, :30].any() and not dq[:, :30].any()
    assert bool(lse[..., :30].isneginf().all()) and bool(lse[..., 30:].isfinite().all())


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), float("-inf")))
def test_hidden_keys_reach_nobody(bad: float) -> None:
    """A poisoned key changes the rows that see it and no bit of the others, in every tile it shares with them."""
    problem = make_problem(seqlen_q=40, seqlen_k=40, window_left=6, window_right=0, nheads=4, nheads_k=2)
    case = make_inputs(problem, seed=5)
    k, v = case.inputs.k.clone(), case.inputs.v.clone()
    k[:, 20], v[:, 20] = bad, bad
    poisoned = case._replace(inputs=case.inputs._replace(k=k, v=v))
    out, lse, (dq, dk, dv) = run(problem, case)
    got, got_lse, (got_dq, got_dk, got_dv) = run(problem, poisoned)
    seers = torch.zeros(40, dtype=torch.bool)
    seers[20:27] = True
    touched = torch.zeros(40, dtype=torch.bool)  # keys that some row seeing key 20 sees too
    touched[14:27] = True
    assert torch.equal(got[:, ~seers], out[:, ~seers]) and torch.equal(got_dq[:, ~seers], dq[:, ~seers])
    assert torch.equal(got_lse[..., ~seers], lse[..., ~seers])
    assert torch.equal(got_dk[:, ~touched], dk[:, ~touched]) and torch.equal(got_dv[:, ~touched], dv[:, ~touched])
    assert not bool(got[:, seers].isfinite().all())


def test_hidden_queries_reach_no_key() -> None:
    """NaN in q, dout and dlse of rows that see nothing leaves every gradient finite and unchanged."""
    problem = make_problem(seqlen_q=40, seqlen_k=27, window_right=0)
    case = make_inputs(problem, seed=6)
    q, dout, dlse = case.inputs.q.clone(), case.dout.clone(), case.dlse.clone()
    q[:, :13], dout[:, :13], dlse[..., :13] = float("nan"), float("nan"), float("nan")
    out, lse, grads = run(problem, case, use_dlse=True)
    got, got_lse, got_grads = run(problem, Case(case.inputs._replace(q=q), dout, dlse), use_dlse=True)
    assert torch.equal(got, out) and torch.equal(got_lse, lse)
    assert all(torch.equal(x, y) for x, y in zip(got_grads, grads, strict=True))


def test_row_with_only_infinitely_low_scores_counts_as_dead() -> None:
    problem = make_problem(seqlen_q=1)
    case = make_inputs(problem)
    inputs = case.inputs._replace(q=torch.ones_like(case.inputs.q), k=torch.full_like(case.inputs.k, float("-inf")))
    out, lse, (_, dk, dv) = run(problem, case._replace(inputs=inputs))
    assert not out.any() and bool(lse.isneginf().all()) and not dk.any() and not dv.any()


def test_seen_nan_is_not_hidden() -> None:
    problem = make_problem(batch=1, seqlen_q=30, seqlen_k=30, window_right=0)
    case = make_inputs(problem)
    case.inputs.v[0, 3] = float("nan")
    out, _ = forward(problem, case.inputs, tile=TILE)
    assert bool(out[0, 3:].isnan().all()) and bool(out[0, :3].isfinite().all())


@pytest.mark.parametrize("varlen", (False, True))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_probs(dtype: torch.dtype, varlen: bool) -> None:
    problem = make_problem(
        dtype=dtype, varlen=varlen, nheads=4, nheads_k=2, dropout_p=0.25, window_right=2, softcap=5.0
    )
    lengths_q, lengths_k = ([37, 5], [9, 53]) if varlen else (None, None)
    case = make_inputs(problem, 8, poison=True, seqlens_q=lengths_q, seqlens_k=lengths_k)
    out, lse = forward(problem, case.inputs, tile=TILE)
    found = probs(problem, case.inputs, lse, tile=TILE)
    assert_attention_close(problem, case, out, lse, probs=found)
    assert case.inputs.rng_state is not None
    for b in range(2):
        keep = oracle_keep(case.inputs.rng_state, problem, b, 37, 53)
        assert not bool((found[b] < 0)[keep].any()) and not bool((found[b] > 0)[~keep].any())
    assert bool((found < 0).any())


def test_without_dropout_probs_rows_sum_to_one() -> None:
    problem = make_problem(seqlen_q=20, seqlen_k=12, window_right=0)
    case = make_inputs(problem)
    _, lse = forward(problem, case.inputs)
    sums = probs(problem, case.inputs, lse).sum(-1)
    torch.testing.assert_close(sums[..., 8:], torch.ones_like(sums[..., 8:]))
    assert not sums[..., :8].any()


def test_tiles_do_not_change_the_dropout_mask_or_the_result_beyond_rounding() -> None:
    problem = make_problem(dtype=torch.float64, dropout_p=0.5, window_right=0)
    case = make_inputs(problem)
    expected = run(problem, case, tile=None)
    for tile in (TileSize(1, 1), TileSize(5, 64), TileSize(64, 5)):
        out, lse, grads = run(problem, case, tile=tile)
        for x, y in zip((out, lse, *grads), (*expected[:2], *expected[2]), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_everything_dropped_gives_zero() -> None:
    problem = make_problem(dropout_p=1.0)
    case = make_inputs(problem)
    out, lse, grads = run(problem, case)
    assert not out.any() and not any(g.any() for g in grads) and bool(lse.isfinite().all())


def test_deterministic_and_no_graph() -> None:
    problem = make_problem(dtype=torch.bfloat16, nheads=4, nheads_k=2, dropout_p=0.1)
    case = make_inputs(problem)
    case.inputs.q.requires_grad_()
    first, second = run(problem, case, tile=None), run(problem, case, tile=None)
    assert not first[0].requires_grad
    for x, y in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        assert torch.equal(x, y)


def test_missing_tensors_are_named() -> None:
    problem = make_problem(dropout_p=0.1)
    inputs = make_inputs(problem).inputs
    with pytest.raises(ValueError, match="rng_state"):
        forward(problem, inputs._replace(rng_state=None))
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        forward(dataclasses.replace(problem, varlen=True), inputs)


def test_long_sequence_computes_only_what_the_window_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """16k tokens: no tile is larger than the fixed budget and hidden tiles are never computed."""
    length, window = 16384, 100
    problem = make_problem(
        batch=1, seqlen_q=length, seqlen_k=length, nheads=1, headdim=16, window_left=window, window_right=0
    )
    case = make_inputs(problem)
    computed: list[int] = []
    original = attention._scores

    def counted(*args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores, tanh = original(*args)
        computed.append(scores.numel())
        return scores, tanh

    monkeypatch.setattr(attention, "_scores", counted)
    out, lse, grads = run(problem, case, tile=None)
    size = default_tile(1, 1)
    assert max(computed) <= size.q * size.k
    assert sum(computed) <= 2 * length * (size.q + window)  # forward and backward, O(length)
    tail = slice(length - 50, length)  # the last rows need no more than the last keys
    short = make_problem(batch=1, seqlen_q=50, seqlen_k=200, nheads=1, headdim=16, window_left=window, window_right=0)
    inputs = case.inputs._replace(q=case.inputs.q[:, tail], k=case.inputs.k[:, -200:], v=case.inputs.v[:, -200:])
    exact, plain = oracle_attention(inputs, short), oracle_attention(inputs, short, upcast=False)
    assert_close_to_oracle(out[:, tail], exact.out, plain.out, rounding=exact.rounding["out"])
    assert all(bool(g.isfinite().all()) for g in (lse, *grads))


def test_tile_budget() -> None:
    for batch, nheads in ((0, 1), (1, 1), (2, 32), (8, 64), (64, 128)):
        size = default_tile(batch, nheads)
        assert 32 <= size.q <= 512 and (size.q == 32 or batch * nheads * size.q * size.k <= 1 << 20)


class TestBudget:
    """The budget must reject what a wrong kernel would produce."""

    exact = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)
    plain = exact.to(torch.bfloat16)

    def test_accepts_one_rounding_of_an_exact_result(self) -> None:
        error, allowed = assert_close_to_oracle(self.plain, self.exact, self.plain)
        assert 0 < error <= allowed

    def test_rejects_dtype_shape_nan_and_error(self) -> None:
        for actual, message in (
            (self.plain.float(), "expected torch.bfloat16"),
            (self.plain[1:], r"got torch.bfloat16 \(63,\)"),
            (torch.full_like(self.plain, float("nan")), "NaN or infinite"),
            (self.plain + 0.05, "above the allowed"),
        ):
            with pytest.raises(AssertionError, match=message):
                assert_close_to_oracle(actual, self.exact, self.plain)

    def test_lse_must_have_the_same_dead_rows(self) -> None:
        exact = torch.tensor([1.0, float("-inf"), 2.0], dtype=torch.float64)
        plain = exact.to(torch.bfloat16)
        assert_close_to_oracle(exact.float(), exact, plain, "lse", "lse")
        for wrong in (torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, float("-inf"), float("-inf")])):
            with pytest.raises(AssertionError, match="see no key"):
                assert_close_to_oracle(wrong, exact, plain, "lse", "lse")

    def test_float64_budget_is_tiny(self) -> None:
        plain = self.exact.float() * (1 + 2**-22)
        with pytest.raises(AssertionError, match="above the allowed"):
            assert_close_to_oracle(self.exact + 1e-12, self.exact, plain, dtype=torch.float64)
        assert_close_to_oracle(self.exact, self.exact, plain, dtype=torch.float64)
