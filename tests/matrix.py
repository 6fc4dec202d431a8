"""The one test matrix: cases for every back end and target, generated from declared capabilities.

A case is a problem, a memory layout and a direction.  Cases come in groups that share everything a
kernel is compiled for (dtype, head dims, features) and differ in what it is not compiled for
(lengths, batch, heads, group size, window widths, scale, layout), so that a large matrix compiles
few kernels.  Groups cover every feature alone and seeded samples of pairs and triples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ck_library import library_of_tests

import flash_rocm
from flash_rocm import ck_instances, ops
from flash_rocm.backends import CAPABILITIES
from flash_rocm.problem import CACHE_FEATURES, FEATURES, AttentionInputs, AttentionProblem, layout_of
from flash_rocm.testing import assert_attention_close, make_inputs, make_problem
from flash_rocm.virtual_device import Request

#: Features that the matrix combines.  Dense/varlen and forward/backward are dimensions of their own;
#: calls over a K/V cache have a matrix of their own; dlse is a gradient through softmax_lse.
COMBINED = (*sorted(FEATURES - CACHE_FEATURES - {"varlen", "backward"}), "dlse")
#: Head dim 1 is in test_adversarial.py: with a handful of elements, the largest error of the plain
#: computation is a matter of luck, and no yardstick.
HEADDIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256, 512, 16, 8, 100)
#: (head dim of q and k, of v)
HEADDIM_PAIRS = ((192, 128), (128, 64), (40, 72), (64, 96), (59, 17), (256, 32))
LENGTHS = (
    (113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1024, 1024), (1023, 1024),
    (1024, 1023), (2048, 2048), (1, 1), (1, 147), (64, 1), (3, 799), (300, 129),
)  # fmt: skip
SMALL_LENGTHS = ((1, 1), (5, 33), (33, 5), (37, 53), (64, 64), (65, 63), (70, 41), (1, 50))
LAYOUTS = ("contiguous", "packed", "bhsd", "padded")


@dataclasses.dataclass(frozen=True)
class Case:
    """One case; ``problem.device_type`` is filled in from the target when it runs."""

    backend: str
    target: str
    problem: AttentionProblem
    layout: str
    seed: int
    features: tuple[str, ...]
    alibi_per_batch: bool
    group: str  # cases of one group compile the same kernels

    @property
    def backward(self) -> bool:
        return self.problem.needs_grad

    @property
    def request(self) -> str:
        """What the operator is asked for: the back end and, if so, the virtual GPU that it runs on."""
        return str(Request(self.backend, virtual=self.target.partition(":")[2]))

    def __str__(self) -> str:
        p = self.problem
        dims = f"d{p.headdim}" if p.headdim == p.headdim_v else f"d{p.headdim}v{p.headdim_v}"
        return "-".join(
            [
                self.backend,
                self.target,
                str(p.dtype).removeprefix("torch."),
                "varlen" if p.varlen else "dense",
                "+".join(self.features) or "plain",
                f"b{p.batch}q{p.seqlen_q}k{p.seqlen_k}h{p.nheads}k{p.nheads_k}{dims}",
                self.layout,
                "backward" if self.backward else "forward",
                str(self.seed),
            ]
        )


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much of the matrix a target runs."""

    target: str
    backend: str
    lengths: tuple[tuple[int, int], ...]
    headdims: tuple[int, ...]
    headdim_pairs: tuple[tuple[int, int], ...]
    combinations: int  # sampled feature sets of two and three per dtype and dense/varlen
    members: int  # cases per group
    max_nheads_k: int
    #: Of the groups of each feature set only the one of a dtype and of dense or varlen, another for the next set,
    #: and none that is slow.
    sparse: bool = False

    @property
    def orders(self) -> tuple[str, ...]:
        """Wave orders that a case runs in; lockstep alone would hide missing barriers."""
        return ("reverse", "shuffled") if self.target.startswith("virtual:") else ()


#: Archs whose machine code the matrix executes on the virtual GPU.
VIRTUAL_ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
_SMALL = (SMALL_LENGTHS, (16, 40, 59, 64, 8, 100), ((24, 40), (64, 17)))
CK_ARCHS = ("gfx90a", "gfx942")
_VIRTUAL_CK = ((*SMALL_LENGTHS, (150, 190)), (64, 128, 40, 96, 8), ((64, 128), (128, 40), (192, 128)))
_VIRTUAL = ((*SMALL_LENGTHS, (150, 190)), (64, 128, 40, 256, 59, 96), ((64, 128), (59, 17)))
SCOPES = (
    Scope("cpu", "reference", *_SMALL, combinations=10, members=2, max_nheads_k=2),
    Scope("interpret", "triton", *_SMALL, combinations=6, members=2, max_nheads_k=2),
    Scope("cuda", "triton", LENGTHS, HEADDIMS, HEADDIM_PAIRS, combinations=24, members=15, max_nheads_k=2),
    Scope("cuda", "reference", *_SMALL, combinations=4, members=2, max_nheads_k=2),
    *(
        Scope(f"virtual:{arch}", "triton", *_VIRTUAL, combinations=6, members=2, max_nheads_k=2, sparse=sparse)
        for sparse in (True, False)
        for arch in VIRTUAL_ARCHS
    ),
    *(Scope(f"virtual:{arch}", "ck", *_VIRTUAL_CK, combinations=6, members=2, max_nheads_k=2) for arch in CK_ARCHS),
)


def _feature_sets(rng: random.Random, scope: Scope, supported: tuple[str, ...]) -> list[tuple[str, ...]]:
    singles = [(), *((feature,) for feature in supported)]
    several = [pair for size in (2, 3) for pair in itertools.combinations(supported, size)]
    several = [pair for pair in several if not {"causal", "window"} <= set(pair)]
    return singles + rng.sample(several, min(scope.combinations, len(several)))


def _fields(rng: random.Random, features: tuple[str, ...], lengths: tuple[int, int]) -> dict[str, Any]:
    """Problem fields that features ask for, with run-time values drawn anew for each case."""
    fields: dict[str, Any] = {}
    longest = max(lengths)
    if "causal" in features:
        fields.update(window_right=0)
    if "softcap" in features:
        fields.update(softcap=rng.choice((1.5, 8.0, 30.0)))
    if "alibi" in features:
        fields.update(alibi=True)
    if "sinks" in features:
        fields.update(sinks=True)
    if "dropout" in features:
        fields.update(dropout_p=rng.choice((0.1, 0.17, 0.5)))
    if "deterministic" in features:
        fields.update(deterministic=True)
    if "window" in features:
        fields.update(window_left=rng.randint(0, longest), window_right=rng.randint(0, longest))
    return fields


def cases(scope: Scope) -> Iterator[Case]:
    """All cases of a target, the same in every process."""
    groups = list(_groups(scope))
    if scope.sparse:
        groups = list(_sparse(groups, VIRTUAL_ARCHS.index(scope.target.partition(":")[2])))
    for _, _, members in groups:
        yield from members


#: Number of the feature set, of dtype and dense or varlen, and the cases.
_Group = tuple[int, int, list[Case]]
#: Of :func:`_cost`: what takes longer than about 20 seconds on the virtual GPU.
_SLOW = 40e6


def _cost(case: Case) -> float:
    """Multiplications, weighted by how long the virtual GPU takes for them: found by timing cases."""
    p = case.problem
    scores = p.batch * p.nheads * math.prod(-(-length // 64) * 64 for length in (p.seqlen_q, p.seqlen_k))
    padded = 1 << (max(p.headdim, p.headdim_v) - 1).bit_length()
    wave32 = case.target.startswith("virtual:gfx1")
    return scores * padded * (4 if p.dtype == torch.float32 else 1) * (2 if wave32 else 1) * (3 if case.backward else 1)


def _sparse(groups: list[_Group], first: int) -> Iterator[_Group]:
    """One group for each feature set: the first in turn that is not slow, else the fastest."""
    kinds = 1 + max(kind for _, kind, _ in groups)
    for features in sorted({number for number, _, _ in groups}):
        turns = sorted((g for g in groups if g[0] == features), key=lambda g: (g[1] - features - first) % kinds)
        costs = [sum(map(_cost, members)) for _, _, members in turns]
        yield next((g for g, cost in zip(turns, costs, strict=True) if cost < _SLOW), turns[costs.index(min(costs))])


def _groups(scope: Scope) -> Iterator[_Group]:
    """Every group of a target."""
    capability = CAPABILITIES[scope.backend]
    headdims = itertools.cycle(scope.headdims)
    pairs = itertools.cycle(scope.headdim_pairs)
    seed = 0
    kinds = itertools.product(sorted(capability.dtypes, key=str), (False, True))
    for kind, (dtype, varlen) in enumerate(kinds):
        rng = random.Random(f"{dtype}{varlen}")
        for number, features in enumerate(_feature_sets(rng, scope, supported(scope))):
            headdim = next(headdims)
            headdim, headdim_v = next(pairs) if "headdim_v" in features else (headdim, headdim)
            window_kind = rng.choice(("both", "left", "right"))
            # Kernels treat the sign of the scale as a constant, its size not.
            sign = rng.choice((1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 0.0))
            sign = 1.0 if scope.backend == "ck" else sign  # which refuses others
            layouts = rng.sample(LAYOUTS, 2)
            group_name = f"{scope.target}-{dtype}-{varlen}-{features}"
            found: list[Case] = []
            for member in range(scope.members):
                seed += 1
                lengths = rng.choice(scope.lengths)
                nheads_k = rng.randint(1, scope.max_nheads_k)
                group = rng.choice((2, 3, 4)) if "gqa" in features else 1
                if lengths[0] * lengths[1] > 1 << 20:  # what the oracle's matrices may take
                    nheads_k, group = 1, min(group, 2)
                fields = _fields(rng, features, lengths)
                if window_kind == "left" and "window" in features:
                    fields.update(window_right=-1)
                if window_kind == "right" and "window" in features:
                    fields.update(window_left=-1)
                problem = make_problem(
                    dtype=dtype,
                    device_type="cuda" if scope.target == "cuda" else "cpu",
                    batch=rng.randint(1, 4 if varlen else 3),
                    seqlen_q=lengths[0],
                    seqlen_k=lengths[1],
                    nheads=nheads_k * group,
                    nheads_k=nheads_k,
                    headdim=headdim,
                    headdim_v=headdim_v,
                    softmax_scale=sign * rng.uniform(0.5, 1.5) / headdim**0.5,
                    varlen=varlen,
                    needs_grad=member % 3 != 0,
                    **fields,
                )
                layout, alibi_per_batch = rng.choice(layouts), rng.random() < 0.5
                found.append(
                    Case(scope.backend, scope.target, problem, layout, seed, features, alibi_per_batch, group_name)
                )
            if scope.backend == "ck":
                found = [case for case in found if _has_instance(case)]
            if found:
                yield number, kind, found


def supported(scope: Scope) -> tuple[str, ...]:
    """Names that a target combines."""
    return tuple(f for f in COMBINED if f == "dlse" or f in CAPABILITIES[scope.backend].features)


def _has_instance(case: Case) -> bool:
    """Whether the few instances that the tests build of Composable Kernel run a case."""
    return not ck_instances.refusals(case.problem, case.target.partition(":")[2], library_of_tests())


def scalars_of(problem: AttentionProblem, backend: str) -> tuple[Any, ...]:
    """The operator's arguments behind the tensors."""
    p = problem
    return (
        p.seqlen_q, p.seqlen_k, p.softmax_scale, p.window_left, p.window_right, p.softcap, p.dropout_p,
        p.deterministic, p.needs_grad, backend,
    )  # fmt: skip


def leaves_of(inputs: AttentionInputs, requires_grad: bool = True) -> list[torch.Tensor]:
    """q, k, v and, if they are there, sinks, as leaves of autograd."""
    tensors = (x for x in (*inputs[:3], inputs.sinks) if x is not None)
    return [x.detach().requires_grad_(requires_grad) for x in tensors]


def with_leaves(inputs: AttentionInputs, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """The operator's tensors, of which some are the leaves."""
    sinks = leaves[3] if len(leaves) > 3 else None
    return inputs._replace(q=leaves[0], k=leaves[1], v=leaves[2], sinks=sinks).tensors


def run(case: Case, orders: tuple[str, ...] = ()) -> None:
    """Run one case, on the virtual GPU in each of some wave orders."""
    if not orders:
        run_once(case)
    arch = case.target.partition(":")[2]
    for order in orders:
        with flash_rocm.virtual_gpu(arch, order=f"shuffled:{case.seed}" if order == "shuffled" else order):
            run_once(case)


def run_once(case: Case) -> None:
    """Run one case through the operator and compare all it returns with the float64 oracle."""
    problem = case.problem
    data = make_inputs(problem, case.seed, layout=case.layout, poison=True, alibi_per_batch=case.alibi_per_batch)
    leaves = leaves_of(data.inputs, case.backward)
    before = [x.clone() for x in data.inputs.tensors if x is not None]
    scalars = scalars_of(problem, case.request)
    args = (*with_leaves(data.inputs, leaves), *scalars)
    out, lse = ops.attention_forward(args, layout_of(*args[:3]))
    probs = ops.attention_probs(lse.detach(), *args) if "dropout" in case.features else None
    grads = None
    use_dlse = "dlse" in case.features
    if case.backward:
        results, sent = ([out, lse], [data.dout, data.dlse]) if use_dlse else ([out], [data.dout])
        grads = torch.autograd.grad(results, leaves, sent)
    for x, y in zip((x for x in data.inputs.tensors if x is not None), before, strict=True):
        assert torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True), "an input was modified"
    assert_attention_close(problem, data, out, lse, grads, use_dlse=use_dlse, probs=probs)
