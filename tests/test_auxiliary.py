"""The auxiliary kernels in C++, against float64 and the oracles of the tests.

The same tests where the library of the ``ck`` back end is, its code executed on the virtual GPU, and where that of CUDA
is, on a GPU: after ``flash-rocm build --cuda --arch sm90 --output DIR/cuda``,
``FLASH_ROCM_TEST_CUDA=DIR pytest -m gpu``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from auxiliary_library import ORDERED_TARGETS, TARGETS, Target, target_in_use
from test_adversarial import random, same
from test_combine import SHAPES, check, partials

import flash_rocm
from flash_rocm import auxiliary, cache_validation
from flash_rocm.problem import AttentionProblem, CacheInputs, dropout_threshold
from flash_rocm.testing import CacheCall, assert_caches_close, make_cache_inputs, make_problem, oracle_cached
from flash_rocm.testing.kvcache import oracle_rotary
from flash_rocm.testing.philox import oracle_keep

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with target_in_use(request.param) as found:
        yield found


@pytest.fixture(params=ORDERED_TARGETS)
def ordered(request: pytest.FixtureRequest) -> Iterator[Target]:
    """For kernels whose waves wait for each other."""
    with target_in_use(request.param) as found:
        yield found


# --------------------------------------------------------------------------------------------------
# Append and rotation


def problem_of(**changes: Any) -> AttentionProblem:
    values: dict[str, Any] = dict(
        dtype=torch.bfloat16, device_type="cpu", batch=3, seqlen_q=2, seqlen_k=21, nheads=4, nheads_k=2, headdim=64,
        headdim_v=32, softmax_scale=1.0, cached=True, seqlen_new=5,
    )  # fmt: skip
    return AttentionProblem(**values | changes)


CACHES: dict[str, tuple[dict[str, Any], CacheCall]] = {
    "dense": ({}, CacheCall()),
    "one token": ({"seqlen_new": 1, "dtype": torch.float16}, CacheCall()),
    "odd head dims": ({"headdim": 30, "headdim_v": 5, "rotary_dim": 18, "dtype": torch.float16}, CacheCall()),
    "batch_idx, leftpad": ({"cache_batch_idx": True, "leftpad": True, "rotary_dim": 16}, CacheCall()),
    "pages of 1": ({"page_size": 1, "dtype": torch.float16}, CacheCall()),
    "pages of 3": ({"page_size": 3, "rotary_dim": 64}, CacheCall()),
    "pages of 16, GPT-J": ({"page_size": 16, "rotary_dim": 32, "rotary_interleaved": True}, CacheCall()),
    "GPT-J, odd half": ({"rotary_dim": 6, "rotary_interleaved": True, "dtype": torch.float16}, CacheCall()),
    "NeoX, odd half": ({"rotary_dim": 6}, CacheCall()),
    "varlen new": ({"rotary_dim": 32}, CacheCall(varlen_new=True)),
    "rotary_seqlens": ({"rotary_dim": 32}, CacheCall(rotary_seqlens=True, varlen_new=True)),
    "float32": ({"dtype": torch.float32, "rotary_dim": 64, "page_size": 3}, CacheCall()),
    "many heads": ({"nheads": 20, "nheads_k": 20, "headdim": 128, "headdim_v": 128, "seqlen_new": 2}, CacheCall()),
}


@pytest.mark.parametrize("name", CACHES)
def test_append(name: str, target: Target, count_case: Callable[..., None]) -> None:
    changes, call = CACHES[name]
    problem = problem_of(**changes)
    case = make_cache_inputs(problem, call, seed=len(name), device=target.device)
    _, _, exact_k, exact_v, _ = oracle_cached(problem, case)
    inputs = case.inputs._replace(k=case.inputs.k.clone(), v=case.inputs.v.clone())
    auxiliary.append(target.launch, problem, inputs)
    assert_caches_close(problem, inputs.k, inputs.v, exact_k, exact_v)
    count_case("auxiliary", target.name, ["append", *(["rotary"] if problem.rotary_dim else [])], ["forward"])


def test_append_to_strided_caches(target: Target) -> None:
    """Heads before positions, new tokens out of a packed tensor: the same numbers as from tensors as they come."""
    problem = problem_of(rotary_dim=32)
    inputs = make_cache_inputs(problem, CacheCall(), device=target.device).inputs
    found = []
    for strided in (False, True):
        k, v, k_new, v_new = (x.clone() for x in (inputs.k, inputs.v, inputs.k_new, inputs.v_new) if x is not None)
        if strided:
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
            k_new = torch.cat([k_new, k_new[..., :3]], -1)[..., :64]
            assert k_new.stride(-2) == 67  # no vectors
        auxiliary.append(target.launch, problem, inputs._replace(k=k, v=v, k_new=k_new, v_new=v_new))
        found.append(tuple(x.nan_to_num(nan=9.0).contiguous() for x in (k, v)))
    assert same(*found)


def test_tokens_that_do_not_fit_are_not_written(target: Target) -> None:
    problem = problem_of(batch=3, seqlen_new=5)
    inputs = make_cache_inputs(problem, CacheCall(), device=target.device).inputs
    k, v = torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
    lengths = torch.tensor([19, -1, 1 << 30], dtype=torch.int32, device=target.device)
    auxiliary.append(target.launch, problem, inputs._replace(k=k, v=v, seqused_k=lengths))
    assert inputs.k_new is not None
    assert torch.equal(k[0, 19:], inputs.k_new[0, :2])
    k[0, 19:] = 0
    assert not k.any() and not v[1:].any()


FAULTY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "page": ({"page_size": 7}, {"block_table": [[0, 1, 2], [0, 1, 99], [0, 1, -1]]}, "block_table"),
    "entry": ({"cache_batch_idx": True}, {"cache_batch_idx": [0, 1, 5]}, "cache_batch_idx"),
    "length": ({}, {"seqused_k": [3, 4, 17]}, "cache_seqlens"),
    "negative length": ({}, {"seqused_k": [3, 4, -1]}, "cache_seqlens"),
    "position": ({"rotary_dim": 16}, {"rotary_seqlens": [0, 1, 1000]}, "rotary_cos"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_checked_append(name: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other back ends report it: the highest number of a sequence that has the fault."""
    changes, contents, word = FAULTY[name]
    problem = problem_of(**changes)
    inputs = make_cache_inputs(problem, CacheCall(), device=target.device).inputs
    lengths = torch.tensor([16, 16, 16], dtype=torch.int32, device=target.device)
    inputs = inputs._replace(seqused_k=lengths, rotary_seqlens=lengths if problem.rotary_dim else None)
    tensors = {n: torch.tensor(x, dtype=torch.int32, device=target.device) for n, x in contents.items()}
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"^{word}.*got another in sequence 2\. Nothing outside"):
        auxiliary.append(target.launch, problem, inputs._replace(**tensors))
    right = {"block_table": [[0, 1, 2], [0, 1, 3], [0, 1, 4]]} if name == "page" else {}
    right |= {"cache_batch_idx": [0, 1, 2]} if name == "entry" else {}
    tensors = {n: torch.tensor(x, dtype=torch.int32, device=target.device) for n, x in right.items()}
    auxiliary.append(target.launch, problem, inputs._replace(**tensors))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", ("GPT-J", "NeoX", "varlen", "odd", "rotary_seqlens"))
def test_rotated(name: str, causal: bool, target: Target) -> None:
    changes: dict[str, Any] = {
        "GPT-J": {"rotary_dim": 32, "rotary_interleaved": True},
        "NeoX": {"rotary_dim": 64, "seqlen_q": 7},
        "varlen": {"rotary_dim": 32, "varlen": True, "seqlen_q": 6},
        "odd": {"rotary_dim": 6, "headdim": 7, "dtype": torch.float16},
        "rotary_seqlens": {"rotary_dim": 32, "dtype": torch.float32},
    }[name]
    problem = problem_of(window_right=0 if causal else -1, **changes)
    call = CacheCall(rotary_seqlens=name == "rotary_seqlens", seqused_q=name in ("varlen", "odd"))
    case = make_cache_inputs(problem, call, seed=1, device=target.device)
    inputs = case.inputs
    found = auxiliary.rotated(target.launch, problem, inputs)
    assert inputs.rotary_cos is not None and inputs.rotary_sin is not None
    expected = torch.zeros_like(found, dtype=torch.float64)
    for b in range(problem.batch):
        start = case.lengths_k[b] if inputs.rotary_seqlens is None else int(inputs.rotary_seqlens[b])
        rows = slice(0, case.lengths_q[b])
        if inputs.cu_seqlens_q is not None:
            rows = slice(int(inputs.cu_seqlens_q[b]), int(inputs.cu_seqlens_q[b]) + case.lengths_q[b])
        place = rows if problem.varlen else (b, rows)
        steps = torch.arange(case.lengths_q[b], device=target.device) * int(causal)
        expected[place] = oracle_rotary(
            inputs.q[place].double(), inputs.rotary_cos, inputs.rotary_sin, start + steps, problem.rotary_interleaved
        )
    assert_rounded_once(found, expected)


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, slack: float = 4.0) -> None:
    """One rounding to the dtype, and of float32 arithmetic before it as many as the slack."""
    eps = torch.finfo(found.dtype).eps / 2 + slack * torch.finfo(torch.float32).eps
    largest = float(exact.abs().max())
    assert float((found.double() - exact).abs().max()) <= eps * largest


# --------------------------------------------------------------------------------------------------
# Combine


@pytest.mark.parametrize(
    ("shape", "num_splits"),
    [
        *zip(SHAPES.values(), (2, 17, 3, 2), strict=True),
        *(((1, 2, 128), 256), ((1, 1, 2, 600), 5), ((1, 2, 2, 8), 1)),
    ],
    ids=str,
)
def test_combine(shape: tuple[int, ...], num_splits: int, ordered: Target, count_case: Callable[..., None]) -> None:
    out, lse = partials(ordered.device, num_splits, *shape)
    found = auxiliary.combine(ordered.launch, out, lse, torch.float32)
    check(found, out, lse)
    assert found[0].shape == shape and same(auxiliary.combine(ordered.launch, out, lse, torch.float32), found)
    count_case("auxiliary", ordered.name, ["combine"], ["forward"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("varlen", (False, True))
def test_combine_parts(varlen: bool, dtype: torch.dtype, target: Target) -> None:
    """The layout of attention's own parts: splits before the head dim, softmax_lse with heads first."""
    shape = (5, 3, 64) if varlen else (2, 5, 3, 64)
    out, lse = partials(target.device, 3, *shape)
    expected = auxiliary.combine(target.launch, out, lse, dtype)
    parts, lse_parts = out.movedim(0, -2).contiguous(), lse.movedim(0, -1).contiguous()
    found = torch.empty(shape, dtype=dtype, device=target.device)
    lse_found = torch.empty(shape[:-1], device=target.device).transpose(-1, -2).contiguous()
    auxiliary.combine_parts(target.launch, parts, lse_parts, found, lse_found)
    assert same((found, lse_found.transpose(-1, -2).contiguous()), expected)
    check(expected, out, lse)


def test_combine_counts_nan(target: Target) -> None:
    out, lse = (x.nan_to_num(nan=1.0, neginf=0.0) for x in partials(target.device, 3, 5, 3, 24))
    out[1, 2, 1] = math.nan
    lse[2, 4, 0] = math.nan
    found = auxiliary.combine(target.launch, out, lse, torch.float32)
    assert found[0].isnan().all(-1).nonzero().tolist() == [[2, 1], [4, 0]]
    assert found[1].isnan().nonzero().tolist() == [[4, 0]]


def test_combine_refuses_too_many_parts(target: Target) -> None:
    out, lse = partials(target.device, 257, 2, 3, 8)
    with pytest.raises(RuntimeError, match="auxiliary kernel combine: a size is negative, too large"):
        auxiliary.combine(target.launch, out, lse, torch.float32)


# --------------------------------------------------------------------------------------------------
# Beside a backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (33, 2, 128), (3, 1, 13), (2, 3, 1, 512)], ids=str)
def test_delta(shape: tuple[int, ...], dtype: torch.dtype, target: Target) -> None:
    out, dout = (random(target.device, *shape, dtype=dtype, seed=seed) for seed in (1, 2))
    exact = (out.double() * dout.double()).sum(-1).transpose(-1, -2)
    dlse = random(target.device, *exact.shape, dtype=torch.float32, seed=3)
    allowed = 2.0**-23 * (out.double() * dout.double()).abs().sum(-1).transpose(-1, -2) * (1 + shape[-1] / 8)
    for gradient in (None, dlse, dlse.transpose(-1, -2).contiguous().transpose(-1, -2)):
        found = auxiliary.delta(target.launch, out, dout, gradient, exact)
        expected = exact - (0 if gradient is None else gradient.double())
        assert found.shape == exact.shape and bool(((found - expected).abs() <= allowed + 2.0**-22).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("heads of a group", "parts of dq", "odd"))
def test_reduce(kind: str, dtype: torch.dtype, target: Target) -> None:
    if kind == "heads of a group":
        parts = random(target.device, 2, 5, 6, 64, dtype=dtype).unflatten(-2, (2, 3)).movedim(-2, 0)
    elif kind == "parts of dq":
        parts = random(target.device, 2, 2, 3, 9, 128, dtype=torch.float32).movedim(2, 0).transpose(-2, -3)
    else:
        parts = random(target.device, 4, 7, 3, 11, dtype=torch.float32)
    out = torch.empty(parts.shape[1:], dtype=dtype, device=target.device)
    found = auxiliary.reduce(target.launch, parts, out)
    assert found is out
    assert_rounded_once(found, parts.double().sum(0))


def test_reduce_refuses_other_types(target: Target) -> None:
    parts = random(target.device, 2, 3, 1, 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="auxiliary kernel reduce: a size is negative, too large, or not that of"):
        auxiliary.reduce(target.launch, parts, torch.empty(3, 1, 8, dtype=torch.bfloat16, device=target.device))


@pytest.mark.parametrize("state", [(5, 0), ((1 << 62) + 12345, (1 << 31) - 1), (-7, 9)], ids=str)
def test_dropout_mask(state: tuple[int, int], target: Target) -> None:
    """Bit by bit that of the oracle, so of every back end."""
    rng_state, shape = torch.tensor(state, device=target.device), (2, 3, 5, 300)
    problem, threshold = make_problem(nheads=3, dropout_p=0.3), dropout_threshold(0.3)
    found = auxiliary.dropout_mask(target.launch, rng_state, shape, threshold)
    expected = torch.stack([oracle_keep(rng_state.cpu(), problem, b, 5, 300) for b in range(2)])
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(found, auxiliary.dropout_mask(target.launch, rng_state + 1, shape, threshold))


# --------------------------------------------------------------------------------------------------
# Nothing to do, and what is missing


def test_nothing_to_do(target: Target) -> None:
    empty = torch.empty(3, 0, 2, 8, dtype=torch.float16, device=target.device)
    assert auxiliary.reduce(target.launch, empty[None], empty).numel() == 0
    lse = torch.empty(3, 2, 0, device=target.device)
    assert auxiliary.delta(target.launch, empty, empty, None, lse).shape == lse.shape
    assert (
        auxiliary.dropout_mask(target.launch, torch.tensor([1, 2], device=target.device), (1, 2, 0, 3), 5).numel() == 0
    )


def test_missing_tensors(target: Target) -> None:
    problem = problem_of()
    inputs = make_cache_inputs(problem, CacheCall(), device=target.device).inputs
    with pytest.raises(RuntimeError, match="auxiliary kernel append: a tensor that the kernel needs is not there"):
        auxiliary.append(target.launch, problem, inputs._replace(seqused_k=None))
    with pytest.raises(ValueError, match="k_new, v_new: expected tensors to append, got None"):
        auxiliary.append(target.launch, problem, CacheInputs(inputs.q, inputs.k, inputs.v))
    with pytest.raises(ValueError, match="rotary_cos, cache_seqlens: expected tensors to turn q by, got None"):
        auxiliary.rotated(target.launch, dataclasses.replace(problem, rotary_dim=16), inputs)


def test_slots_are_those_of_the_faults() -> None:
    """The kernels know them by number."""
    assert len(cache_validation.FAULTS) == 4
    words = ("{block_table}", "{lengths}", "cache_batch_idx", "rotary_cos")
    assert all(fault.startswith(word) for fault, word in zip(cache_validation.FAULTS, words, strict=True))


def test_blocks_of_two_dims_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual GPU numbers threads in one dim: it would give all of them row 0."""
    from flash_rocm._ck import virtual

    monkeypatch.setattr(virtual, "_tensors", [])
    with flash_rocm.virtual_gpu("gfx942"), pytest.raises(RuntimeError, match=r"threads of one dim.*got \(4, 2, 1\)"):
        virtual._launch(0, "kernel", (1, 1, 1), (4, 2, 1), None)
