"""``v3.flash_attn_with_kvcache``: every argument acts or raises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import test_adversarial
import torch
from test_adversarial import random, same

import flash_rocm
from flash_rocm import v3
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import (
    CacheCall,
    CacheCase,
    assert_cached_close,
    make_cache_inputs,
    make_problem,
)

device = test_adversarial.device  # the fixture with every target

BATCH, ENTRIES, CAPACITY, NEW, ROWS = 2, 4, 12, 2, 3
HEADS, HEADS_K, DIM, DIM_V, PAGE = 4, 2, 16, 8, 3
#: FlashAttention-3's order.
NAMES = [
    *("q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx"),
    *("cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q", "rotary_seqlens"),
    *("q_descale", "k_descale", "v_descale", "softmax_scale", "causal", "window_size", "attention_chunk", "softcap"),
    *("rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin", "return_softmax_lse"),
]
DESCALES = ("q_descale", "k_descale", "v_descale")
HINTS = ("scheduler_metadata", "num_splits", "pack_gqa", "sm_margin")


def integers(device: str, *values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def arguments(device: str, form: str) -> dict[str, Any]:
    """Of a call with rotary embedding and an append.

    Args:
        form: "dense", with entries and left padding; "paged"; or "varlen": pages, 3 and 2 queries, 1 and 3 new tokens.
    """
    rotary = random(device, CAPACITY + 4, DIM // 4, seed=7).float() * 3
    pages = CAPACITY // PAGE
    shape = (ENTRIES, CAPACITY) if form == "dense" else (BATCH * pages + 1, PAGE)
    rows, new = ((5,), (4,)) if form == "varlen" else ((BATCH, ROWS), (BATCH, NEW))
    places: dict[str, Any] = {"cache_batch_idx": integers(device, 2, 0), "cache_leftpad": integers(device, 1, 3)}
    if form != "dense":
        places = {"page_table": torch.arange(2 * pages, dtype=torch.int32, device=device).flip(0).view(2, pages)}
    if form == "varlen":
        places |= {"cu_seqlens_q": integers(device, 0, 3, 5), "cu_seqlens_k_new": integers(device, 0, 1, 4)}
        places |= {"max_seqlen_q": 3}
    return dict(
        q=random(device, *rows, HEADS, DIM, seed=1),
        k_cache=random(device, *shape, HEADS_K, DIM, seed=2),
        v_cache=random(device, *shape, HEADS_K, DIM_V, seed=3),
        k=random(device, *new, HEADS_K, DIM, seed=4),
        v=random(device, *new, HEADS_K, DIM_V, seed=5),
        rotary_cos=rotary.cos().half(),
        rotary_sin=rotary.sin().half(),
        cache_seqlens=integers(device, 5, 9),
        return_softmax_lse=True,
        **places,
    )


def run(function: Callable[..., Any], given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Results, and copies of the caches as they are afterwards; nothing else may change."""
    given = {**given, **{name: given[name].clone() for name in ("k_cache", "v_cache")}}
    fixed = {n: x for n, x in given.items() if isinstance(x, torch.Tensor) and not n.endswith("_cache")}
    before = {name: x.clone() for name, x in fixed.items()}
    result = function(**given)
    for name, x in fixed.items():
        assert torch.equal(x, before[name]), f"{name} was modified"
    return (*(result if isinstance(result, tuple) else (result,)), given["k_cache"], given["v_cache"])


def run_v3(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return run(v3.flash_attn_with_kvcache, given)


# --------------------------------------------------------------------------------------------------
# Every argument counts

#: Another value for every argument that is no tensor of values; tuples become int32 tensors where a tensor is wanted.
OTHER_VALUES: dict[str, Any] = {
    "cache_seqlens": (4, 8),
    "cache_batch_idx": (2, 3),
    "cache_leftpad": (0, 3),
    "page_table": ((1, 0, 2, 3), (4, 5, 6, 7)),
    "cu_seqlens_q": (0, 2, 5),
    "cu_seqlens_k_new": (0, 2, 4),
    "rotary_seqlens": (3, 9),
    "softmax_scale": 0.9,
    "causal": True,
    "window_size": (2, 1),
    "attention_chunk": 3,
    "softcap": 1.5,
    "rotary_interleaved": False,
    "return_softmax_lse": False,
    "learnable_sink": (0.5, 2.0, -1.0, 0.0),
}


def other_value(name: str, given: dict[str, Any], device: str) -> Any:
    if name == "qv":
        return random(device, *given["q"].shape[:-1], DIM_V, seed=11)
    if name == "learnable_sink":
        return torch.tensor(OTHER_VALUES[name], device=device)
    if name not in OTHER_VALUES:
        return random(device, *given[name].shape, seed=11)
    value = OTHER_VALUES[name]
    return integers(device, *value) if name.startswith(("cache_", "page", "cu_", "rotary_s")) else value


def form_of(name: str) -> str:
    return {"page_table": "paged", "cu_seqlens_q": "varlen", "cu_seqlens_k_new": "varlen"}.get(name, "dense")


def test_signature() -> None:
    parameters = inspect.signature(v3.flash_attn_with_kvcache).parameters
    assert list(parameters) == [*NAMES, "learnable_sink"]
    assert parameters["learnable_sink"].kind is inspect.Parameter.KEYWORD_ONLY
    expected: dict[str, Any] = {"window_size": (-1, -1), "attention_chunk": 0, "softcap": 0.0, "sm_margin": 0}
    expected |= {"causal": False, "rotary_interleaved": True, "num_splits": 0, "return_softmax_lse": False}
    for name, x in parameters.items():
        assert x.default == (inspect.Parameter.empty if name in NAMES[:3] else expected.get(name)), name


ACTING = [name for name in (*NAMES, "learnable_sink") if name not in (*DESCALES, *HINTS, "max_seqlen_q")]


@pytest.mark.parametrize("name", ACTING)
def test_argument_changes_the_result(name: str, device: str) -> None:
    given = arguments(device, form_of(name))
    expected = run_v3(given)
    assert same(run_v3(given), expected)
    assert not same(run_v3({**given, name: other_value(name, given, device)}), expected)


@pytest.mark.parametrize("form", ("dense", "paged", "varlen"))
def test_what_is_read_reaches_the_output(form: str, device: str) -> None:
    """Not only the caches, which new tokens change in any case."""
    given = arguments(device, form)
    expected = run_v3(given)
    for name in ("q", "k", "v", "k_cache", "v_cache", "rotary_cos", "rotary_sin"):
        assert not torch.equal(run_v3({**given, name: other_value(name, given, device)})[0], expected[0]), name


@pytest.mark.parametrize("name", DESCALES)
def test_fp8_says_that_it_is_not_there(name: str, device: str) -> None:
    for value in (torch.ones(BATCH, HEADS_K, device=device), 1.0):
        with pytest.raises(NotImplementedError) as error:
            run_v3(arguments(device, "dense") | {name: value})
        assert str(error.value).startswith(f"{name}: expected None, got ") and "FP8" in str(error.value)


@pytest.mark.parametrize("form", ("dense", "paged", "varlen"))
def test_hints_change_nothing(form: str, device: str) -> None:
    given = arguments(device, form)
    expected = run_v3(given)
    metadata = integers(device, 4)
    for hint in ({"pack_gqa": True}, {"pack_gqa": False}, {"sm_margin": 8}, {"scheduler_metadata": metadata}):
        assert same(run_v3(given | hint), expected), hint


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("dense", {"pack_gqa": 1}, "pack_gqa: expected True, False or None, got 1"),
        ("dense", {"sm_margin": -1}, "sm_margin: expected an int >= 0, got -1"),
        ("dense", {"sm_margin": 0.5}, "sm_margin: expected an int, got"),
        ("dense", {"num_splits": -1}, "num_splits: expected an int in [0, 256], got -1"),
        ("dense", {"num_splits": 257}, "num_splits: expected an int in [0, 256], got 257"),
        ("dense", {"num_splits": 1.0}, "num_splits: expected an int, got"),
        ("dense", {"scheduler_metadata": torch.ones(1)}, "scheduler_metadata: expected an int32 tensor"),
        ("dense", {"scheduler_metadata": torch.ones(3, dtype=torch.int32)}, "scheduler_metadata: expected shape (1,)"),
        ("dense", {"scheduler_metadata": 4}, "scheduler_metadata: expected an int32 tensor"),
        ("dense", {"max_seqlen_q": 7}, "max_seqlen_q: expected None or 3, that of q, without cu_seqlens_q, got 7"),
        ("varlen", {"max_seqlen_q": None}, "max_seqlen_q: expected an int, as cu_seqlens_q is given, got None"),
        ("varlen", {"max_seqlen_q": -1}, "max_seqlen_q: expected an int in"),
        ("varlen", {"max_seqlen_q": torch.tensor(3)}, "max_seqlen_q: expected an int, got a tensor"),
        ("varlen", {"cu_seqlens_q": torch.tensor([0, 3, 5])}, "cu_seqlens_q: expected int32"),
        ("varlen", {"cu_seqlens_q": [0, 3, 5]}, "cu_seqlens_q: expected an int32 tensor"),
        ("varlen", {"cu_seqlens_k_new": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens_k_new: expected shape (3,)"),
        ("varlen", {"cu_seqlens_k_new": None}, "k: expected"),
        ("varlen", {"k": None, "v": None, "rotary_cos": None, "rotary_sin": None}, "cu_seqlens_k_new: expected None"),
        ("paged", {"cache_batch_idx": torch.zeros(2, dtype=torch.int32)}, "cache_batch_idx: expected None with page"),
        ("paged", {"page_table": torch.zeros(3, 4, dtype=torch.int32)}, "page_table: expected int32 of shape (2, max"),
        ("dense", {"cache_leftpad": torch.zeros(2)}, "cache_leftpad: expected an int32 tensor"),
        ("dense", {"cache_seqlens": None}, "cache_seqlens: expected the lengths of the cache"),
        ("dense", {"cache_seqlens": -1}, "cache_seqlens: expected an int in [0, "),
        ("dense", {"rotary_seqlens": torch.zeros(3, dtype=torch.int32)}, "rotary_seqlens: expected shape (2,)"),
        ("dense", {"rotary_sin": None}, "rotary_sin: expected a tensor"),
        ("dense", {"qv": torch.zeros(BATCH, ROWS, HEADS, DIM)}, "qv: expected shape (2, 3, 4, 8)"),
        ("dense", {"v": None}, "v: expected a tensor, as k is given"),
        ("dense", {"k": torch.zeros(BATCH, 13, HEADS_K, DIM, dtype=torch.float16)}, "v: expected shape (2, 13"),
        ("dense", {"attention_chunk": -1}, "attention_chunk: expected an int >= 0"),
        ("dense", {"attention_chunk": 1.5}, "attention_chunk: expected an int >= 0"),
        ("dense", {"softcap": -1.0}, "softcap: expected a finite number >= 0"),
        ("dense", {"softmax_scale": math.nan}, "softmax_scale: expected a finite number"),
        ("dense", {"window_size": (1,)}, "window_size: expected (left, right)"),
        ("dense", {"learnable_sink": torch.zeros(3)}, "learnable_sink: expected shape (4,)"),
        ("dense", {"q": 1.0}, "q: expected a tensor"),
        ("dense", {"k_cache": torch.zeros(ENTRIES, CAPACITY, 3, DIM)}, "k_cache: expected a head count"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_wrong_arguments(form: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        v3.flash_attn_with_kvcache(**arguments("cpu", form) | change)
    assert str(error.value).startswith(message)


def test_max_seqlen_q_is_a_bound(device: str) -> None:
    """As a captured graph needs it."""
    given = arguments(device, "varlen")
    assert same(run_v3(given | {"max_seqlen_q": 40}), run_v3(given))
    dense = arguments(device, "dense")
    assert same(run_v3(dense | {"max_seqlen_q": ROWS}), run_v3(dense))


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "softmax_scale": 0.3, "softcap": 2.0, "num_splits": 3},
    {"window_size": (4, 0), "rotary_interleaved": False, "cache_seqlens": 6, "return_softmax_lse": False},
)


@pytest.mark.parametrize("options", OPTIONS, ids=("plain", "causal", "window"))
@pytest.mark.parametrize("form", ("dense", "paged"))
def test_agrees_with_the_function_of_version_2(form: str, options: dict[str, Any], device: str) -> None:
    """Bit for bit, with every argument that both have."""
    given = arguments(device, form) | options
    renamed = {"block_table" if name == "page_table" else name: x for name, x in given.items()}
    assert same(run_v3(given), run(flash_rocm.flash_attn_with_kvcache, renamed))


# --------------------------------------------------------------------------------------------------
# Against the float64 oracle


def call_of(problem: AttentionProblem, case: CacheCase, num_splits: int) -> dict[str, Any]:
    """Arguments for a random case that the function can express."""
    inputs = case.inputs
    return dict(
        q=inputs.q,
        k_cache=inputs.k,
        v_cache=inputs.v,
        k=inputs.k_new,
        v=inputs.v_new,
        qv=inputs.qv,
        rotary_cos=inputs.rotary_cos,
        rotary_sin=inputs.rotary_sin,
        cache_seqlens=inputs.seqused_k,
        cache_batch_idx=inputs.cache_batch_idx,
        cache_leftpad=inputs.leftpad_k,
        page_table=inputs.block_table,
        cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_k_new=inputs.cu_seqlens_k_new,
        max_seqlen_q=problem.seqlen_q if problem.varlen else None,
        rotary_seqlens=inputs.rotary_seqlens,
        softmax_scale=problem.softmax_scale,
        causal=problem.causal,
        window_size=(problem.window_left, problem.window_right),
        attention_chunk=problem.attention_chunk,
        softcap=problem.softcap,
        rotary_interleaved=problem.rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=True,
        learnable_sink=inputs.sinks,
    )


def check(problem: AttentionProblem, case: CacheCase, num_splits: int = 0) -> None:
    assert_cached_close(problem, case, *run_v3(call_of(problem, case, num_splits)))


CASES: dict[str, tuple[dict[str, Any], CacheCall]] = {
    "decode": (dict(seqlen_q=1, page_size=4), CacheCall()),
    "chunked prefill": (dict(seqlen_q=9, varlen=True, page_size=4, window_right=0), CacheCall()),
    "append": (
        dict(seqlen_q=5, varlen=True, page_size=4, seqlen_new=4, rotary_dim=8, window_right=0),
        CacheCall(varlen_new=True, rotary_seqlens=True),
    ),
    "entries": (
        dict(seqlen_q=2, cache_batch_idx=True, leftpad=True, seqlen_new=2, softcap=2.0, window_left=9),
        CacheCall(),
    ),
    "sinks": (dict(seqlen_q=3, sinks=True, attention_chunk=11, page_size=16), CacheCall()),
    "qv": (dict(seqlen_q=2, qv=True, headdim_v=24, window_right=0, page_size=3), CacheCall()),
}


@pytest.mark.parametrize("num_splits", (0, 1, 3))
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str, num_splits: int, device: str) -> None:
    """Any number of splits is the same but for rounding: within the same bounds."""
    fields, call = CASES[name]
    shape = dict(batch=3, seqlen_k=37, nheads=4, nheads_k=2, headdim=16, headdim_v=16, softmax_scale=0.3)
    problem = make_problem(dtype=torch.float16, device_type=device, cached=True, **shape | fields)
    check(problem, make_cache_inputs(problem, call, seed=2), num_splits)


# --------------------------------------------------------------------------------------------------
# MLA, absorbed: one latent of 512 dims that is key and value, and 64 dims of key with the rotary embedding

LATENT, ROPE = 512, 64


def mla(device: str, dtype: torch.dtype, seqlen_new: int = 0, rows: int = 2) -> tuple[AttentionProblem, CacheCase]:
    """The one-tensor form: v_cache is a view of k_cache."""
    problem = make_problem(
        dtype=dtype, device_type=device, batch=2, seqlen_q=rows, seqlen_k=40, nheads=16, nheads_k=1,
        headdim=LATENT + ROPE, headdim_v=LATENT, softmax_scale=(LATENT + ROPE) ** -0.5, window_right=0, cached=True,
        page_size=16, seqlen_new=seqlen_new,
    )  # fmt: skip
    case = make_cache_inputs(problem, CacheCall(), seed=4)
    inputs = case.inputs._replace(v=case.inputs.k[..., :LATENT])
    if inputs.k_new is not None:
        inputs = inputs._replace(v_new=inputs.k_new[..., :LATENT])
    return problem, case._replace(inputs=inputs)


def two_tensors(problem: AttentionProblem, case: CacheCase) -> tuple[AttentionProblem, CacheCase]:
    """The same with q of the rotary dims alone, and qv."""
    fields = {name: getattr(problem, name) for name in problem.__dataclass_fields__ if name != "_hash"}
    inputs = case.inputs
    inputs = inputs._replace(q=inputs.q[..., LATENT:], qv=inputs.q[..., :LATENT], k=inputs.k[..., LATENT:])
    if inputs.k_new is not None:
        inputs = inputs._replace(k_new=inputs.k_new[..., LATENT:])
    return AttentionProblem(**fields | dict(headdim=ROPE, qv=True)), case._replace(inputs=inputs)


@pytest.mark.parametrize("num_splits", (0, 2))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_absorbed_mla(dtype: torch.dtype, num_splits: int, device: str) -> None:
    """Both forms against float64, which is one result for both; the default scale is that of 576 dims in both."""
    results = []
    for problem, case in (mla(device, dtype), two_tensors(*mla(device, dtype))):
        given = call_of(problem, case, num_splits)
        pages = given["k_cache"], given["v_cache"]
        out, lse = v3.flash_attn_with_kvcache(**given | {"softmax_scale": None})  # the caches stay one memory
        assert_cached_close(problem, case, out, lse, *pages)
        results.append((out, lse))
    if dtype == torch.float32:
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)


def test_absorbed_mla_appends_through_both_views(device: str) -> None:
    """k and v are written to one memory, whose values agree."""
    problem, case = mla(device, torch.float32, seqlen_new=2)
    given = call_of(problem, case, 0)
    k_cache = given["k_cache"].clone()
    given |= {"k_cache": k_cache, "v_cache": k_cache[..., :LATENT]}
    out, lse = v3.flash_attn_with_kvcache(**given)
    assert_cached_close(problem, case, out, lse, k_cache, k_cache[..., :LATENT])
