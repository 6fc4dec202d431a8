"""The test matrix of calls over a K/V cache: cases for every back end and target, from declared capabilities."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from ck_library import ARCHS, library_of_tests

import flash_rocm
from flash_rocm import cache_ops, ck_instances
from flash_rocm.backends import CAPABILITIES
from flash_rocm.problem import AttentionProblem, CacheInputs
from flash_rocm.testing import CacheCall, CacheCase, assert_cached_close, make_cache_inputs, make_problem
from flash_rocm.virtual_device import Request

#: What cases combine, features and ways to call; the first name of a case is what it is there for.
COMBINED = (
    *("plain", "causal", "window", "gqa", "headdim_v", "softcap", "alibi", "sinks", "varlen", "append", "rotary"),
    *("rotary_neox", "paged", "paged_prefill", "cache_batch_idx", "leftpad", "qv", "attention_chunk", "splits"),
    *("packed", "seqused_q", "varlen_new", "rotary_seqlens", "large_head"),
)
#: Pairs that no call can have.
_EXCLUSIVE = (
    *({"packed", other} for other in ("append", "rotary", "rotary_neox", "paged", "paged_prefill", "cache_batch_idx")),
    *({"packed", other} for other in ("leftpad", "varlen_new", "rotary_seqlens")),
    *({"cache_batch_idx", other} for other in ("paged", "paged_prefill")),
    *({"causal", "window"}, {"rotary", "rotary_neox"}, {"paged", "paged_prefill"}, {"qv", "large_head"}),
    *({"paged_prefill", other} for other in ("append", "rotary", "rotary_neox", "varlen_new", "rotary_seqlens")),
    *({"large_head", other} for other in ("rotary", "rotary_neox", "rotary_seqlens")),
)
PAGE_SIZES = (1, 3, 16, 64)
#: Beyond the 512 of a tile: MLA's, and what is not a multiple of anything.
_LARGE_HEADS = (576, 544, 576, 515)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case; ``problem.device_type`` follows from the target."""

    backend: str
    target: str
    problem: AttentionProblem
    call: CacheCall
    seed: int
    features: tuple[str, ...]

    def __str__(self) -> str:
        p = self.problem
        shape = f"b{p.batch}q{p.seqlen_q}k{p.seqlen_k}n{p.seqlen_new}h{p.nheads}k{p.nheads_k}d{p.headdim}v{p.headdim_v}"
        dtype = str(p.dtype).removeprefix("torch.")
        return "-".join(
            [self.backend, self.target, dtype, "+".join(self.features), shape, f"p{p.page_size}", str(self.seed)]
        )


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much of the matrix a target runs."""

    target: str
    backend: str
    longest: int  # keys
    rounds: int  # cases for each feature and dtype
    headdims: tuple[int, ...] = (16, 32, 40, 64)
    queries: tuple[int, ...] = (1, 1, 2, 7, 33)
    page_sizes: tuple[int, ...] = PAGE_SIZES
    without: frozenset[str] = frozenset()  # of COMBINED, what the back end refuses
    apart: tuple[frozenset[str], ...] = ()  # what it does not combine

    @property
    def combined(self) -> tuple[str, ...]:
        """Names that cases combine."""
        return tuple(name for name in COMBINED if name not in self.without)


#: What Composable Kernel has no instance for, and what it does not combine.
_NOT_CK = frozenset({"headdim_v", "sinks", "qv", "attention_chunk", "large_head"})
_CK_APART = tuple(map(frozenset, ({"leftpad", "paged"}, {"leftpad", "paged_prefill"}, {"alibi", "softcap"})))

SCOPES = (
    Scope("cpu", "reference", 70, 2),
    Scope("interpret", "triton", 70, 1),
    Scope("cuda", "triton", 700, 8, headdims=(32, 40, 64, 80, 96, 128, 192, 256, 512), queries=(1, 1, 3, 17, 130)),
    Scope("cuda", "reference", 70, 1),
    *(Scope(f"virtual:{arch}", "triton", 90, 1) for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
    *(
        Scope(f"virtual:{arch}", "ck", 150, 1, (64, 128), page_sizes=(64, 128), without=_NOT_CK, apart=_CK_APART)
        for arch in ARCHS
    ),
)


def _feature_sets(rng: random.Random, scope: Scope) -> Iterator[tuple[str, ...]]:
    """Each feature alone, and with one or two others."""
    combined = scope.combined
    for feature in combined:
        for number in range(scope.rounds):
            others = rng.sample(combined[1:], number % 3 if scope.rounds > 1 else rng.randint(0, 2))
            found = tuple(dict.fromkeys((feature, *others)))
            while any(pair <= set(found) for pair in (*_EXCLUSIVE, *scope.apart)):
                found = found[:-1]
            yield found


def cases(scope: Scope) -> Iterator[Case]:
    """All cases of a target, the same in every process."""
    sizes = itertools.cycle(scope.page_sizes)
    seed = 0
    for dtype in sorted(CAPABILITIES[scope.backend].dtypes, key=str):
        rng = random.Random(f"{scope.backend}{scope.target}{dtype}")
        for features in _feature_sets(rng, scope):
            seed += 1
            # Each size in turn, whatever comes between calls over pages.
            page_size = next(sizes) if {"paged", "paged_prefill"} & set(features) else 0
            if scope.backend != "ck":
                yield _case(rng, scope, dtype, features, seed, page_size)
                continue
            # The library of the tests has few instances.
            wanted = (*[features] * _DRAWS, *[features[:1]] * _DRAWS)
            drawn = (_case(rng, scope, dtype, some, seed, page_size) for some in wanted)
            yield from itertools.islice(filter(_has_instance, drawn), 1)


#: Cases that are drawn for features until the library of the tests runs one, and as many for the first of them alone.
_DRAWS = 10


def _has_instance(case: Case) -> bool:
    return not ck_instances.refusals(case.problem, case.target.partition(":")[2], library_of_tests())


def _case(
    rng: random.Random, scope: Scope, dtype: object, features: tuple[str, ...], seed: int, page_size: int
) -> Case:
    some = set(features)
    new = bool(some & {"append", "rotary", "rotary_neox", "varlen_new", "rotary_seqlens"})
    rotary = bool(some & {"rotary", "rotary_neox", "rotary_seqlens"})
    seqlen_k = rng.randint(2, scope.longest)
    if page_size:
        seqlen_k = max(seqlen_k, page_size + 2)  # one page alone says nothing about the next
    if "splits" in some:
        seqlen_k = scope.longest  # of one tile of keys only one split gets any
    headdim = rng.choice(scope.headdims)
    if "large_head" in some:
        headdim = _LARGE_HEADS[seed % len(_LARGE_HEADS)]
    nheads_k = rng.randint(1, 2)
    problem = make_problem(
        dtype=dtype,
        device_type="cuda" if scope.target == "cuda" else "cpu",
        batch=rng.randint(1, 3),
        seqlen_q=rng.choice(scope.queries),
        seqlen_k=seqlen_k,
        nheads=nheads_k * (rng.choice((3, 4, 8)) if "gqa" in some else 1),
        nheads_k=nheads_k,
        headdim=headdim,
        headdim_v=rng.choice((24, 48, 64)) if "headdim_v" in some else min(headdim, 512),
        softmax_scale=rng.uniform(0.5, 1.5) / headdim**0.5,
        window_left=rng.randint(0, seqlen_k) if "window" in some else -1,
        window_right=0 if "causal" in some else rng.choice((-1, rng.randint(0, 9))) if "window" in some else -1,
        softcap=rng.choice((1.5, 8.0)) if "softcap" in some else 0.0,
        varlen=bool(some & {"varlen", "paged_prefill", "packed"}),
        alibi="alibi" in some,
        sinks="sinks" in some,
        cached=True,
        page_size=page_size,
        seqlen_new=rng.randint(1, min(5, seqlen_k)) if new else 0,
        rotary_dim=rng.choice((8, 16)) if rotary else 0,
        rotary_interleaved="rotary" in some,
        cache_batch_idx="cache_batch_idx" in some,
        leftpad="leftpad" in some,
        qv="qv" in some,
        attention_chunk=rng.randint(1, 40) if "attention_chunk" in some else 0,
        num_splits=rng.choice((2, 3, 5)) if "splits" in some else rng.choice((0, 1)),
    )
    call = CacheCall(
        packed="packed" in some,
        seqused_q="seqused_q" in some,
        seqused_k="paged_prefill" not in some and "packed" not in some,
        varlen_new="varlen_new" in some,
        rotary_seqlens="rotary_seqlens" in some,
        alibi_per_batch=rng.random() < 0.5,
    )
    return Case(scope.backend, scope.target, problem, call, seed, features)


def run(case: Case) -> None:
    """Run one case through the operators and compare results and caches with the float64 oracle."""
    arch = case.target.partition(":")[2]
    if arch:
        with flash_rocm.virtual_gpu(arch, order=f"shuffled:{case.seed}"):
            _run(case, arch)
    else:
        _run(case, arch)


def _run(case: Case, arch: str) -> None:
    made = make_cache_inputs(case.problem, case.call, case.seed)
    inputs = made.inputs._replace(k=made.inputs.k.clone(), v=made.inputs.v.clone())
    call_and_compare(case.problem, made, inputs, str(Request(case.backend, virtual=arch)))


def call_and_compare(p: AttentionProblem, made: CacheCase, inputs: CacheInputs, request: str) -> None:
    """Append and attend; ``inputs`` are those of the case, over copies of its caches."""
    before = [None if x is None else x.clone() for x in made.inputs]
    if p.seqlen_new:
        cache_ops.append_kv(inputs, p.seqlen_new, p.rotary_interleaved, request)
    scalars = (
        p.seqlen_q, p.seqlen_k, p.seqlen_new, p.softmax_scale, p.window_left, p.window_right, p.softcap,
        p.attention_chunk, p.rotary_interleaved, p.num_splits, request,
    )  # fmt: skip
    out, lse = cache_ops.attention_cached(inputs, scalars)
    assert_cached_close(p, made, out, lse, inputs.k, inputs.v)
    for name, x, y in zip(CacheInputs._fields, made.inputs, before, strict=True):
        assert (x is None) == (y is None) and (x is None or x.equal(y) or name in "kv"), name
