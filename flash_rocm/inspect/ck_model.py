"""The speed model of instances of Composable Kernel, beside that of the Triton kernels for the same call.

Both are executed on the virtual GPU, one head of self-attention or one sequence over a K/V cache, and judged by
:mod:`flash_rocm.inspect.model`: modelled, uncalibrated.  The auxiliary kernels of either (row sums, conversion,
combination of parts) are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import flash_rocm
from flash_rocm import ck_instances
from flash_rocm.ck_instances import CkInstance
from flash_rocm.problem import AttentionProblem, default_softmax_scale

from . import model
from .counts import InspectError
from .library import short_dtype
from .model import (
    CACHED,
    KERNEL_OF_SYMBOL,
    PRODUCTS_OF,
    PRODUCTS_OF_BACKWARD,
    SEQLEN,
    CachedCall,
    Prediction,
    cached_scores,
)
from .report import Case

#: Part of the symbol of each kernel of Composable Kernel.
_SYMBOLS = {
    "forward": "FmhaFwdKernel",
    "backward": "FmhaBwdDQDKDVKernel",
    "splitkv": "FmhaFwdSplitKVKernel",
}
#: Multiplications of a score by a row that a call has to do.
_PRODUCTS = {"forward": PRODUCTS_OF["forward"], "backward": PRODUCTS_OF_BACKWARD, "splitkv": PRODUCTS_OF["decode"]}


def _triton_kernels(kernel: str) -> dict[str, tuple[str, int]]:
    """Triton's by their symbols, and the multiplications that each does."""
    if kernel == "splitkv":
        return {"attn_cache_kernel": ("cache", PRODUCTS_OF["decode"])}
    return {symbol: (name, PRODUCTS_OF[name]) for symbol, name in KERNEL_OF_SYMBOL.items() if name.startswith(kernel)}


class Comparison(NamedTuple):
    """An instance, and what the Triton kernels make of its call: one kernel, or the two of a backward."""

    case: Case  # whose kernel is the instance
    ck: Prediction
    triton: dict[str, Prediction]

    @property
    def triton_tflops(self) -> float:
        """Of all kernels together."""
        return self.ck.flop / sum(found.seconds for found in self.triton.values()) / 1e12


def problem_of(instance: CkInstance) -> AttentionProblem:
    """The call that is modelled: causal where the instance has masks, with all that it is for."""
    has = frozenset(instance.variant)
    masked = "masked" in has
    call = CACHED["prefill" if masked else "decode"]
    is_cached = instance.kernel == "splitkv"
    return AttentionProblem(
        dtype=getattr(torch, instance.dtype),
        device_type="cpu",
        batch=1,
        seqlen_q=call.rows if is_cached else SEQLEN,
        seqlen_k=call.keys if is_cached else SEQLEN,
        nheads=call.nheads if is_cached else 1,
        nheads_k=call.nheads_k if is_cached else 1,
        headdim=instance.headdim,
        headdim_v=instance.headdim_v,
        softmax_scale=default_softmax_scale(instance.headdim),
        window_right=0 if masked else -1,
        softcap=30.0 if "softcap" in has else 0.0,
        varlen="varlen" in has,
        alibi="alibi" in has,
        deterministic="deterministic" in has,
        needs_grad=instance.kernel == "backward",
        cached=is_cached,
    )


def compare(cases: Sequence[Case]) -> list[Comparison]:
    """Model instances of the built library, which cases name, beside Triton; those that no call takes are left out.

    Raises:
        InspectError: see :func:`flash_rocm.inspect.model.predict`; or no call of the model takes any of them.
    """
    library = ck_instances.built()
    # What was compiled on demand has one name for each chip.
    numbers = (
        {}
        if library is None
        else {(each.name, arch): number for number, each in enumerate(library.instances) for arch in each.archs}
    )
    found = []
    for case in cases:
        number = numbers.get((case.kernel, case.arch))
        if library is None or number is None:
            continue  # an auxiliary kernel
        instance = library.instances[number]
        problem = problem_of(instance)
        # Another instance may be the first that takes it; and what a backward needs besides may be missing.
        needed = [library.find(kernel, problem, case.arch) for kernel in ck_instances.kernels_of(problem)]
        if number not in needed or None in needed:
            continue
        case = dataclasses.replace(case, dtype=short_dtype(instance), mask="causal" if problem.causal else "full")
        found.append(_compared(case, instance.kernel, problem))
    if not found:
        raise InspectError(
            "--model: expected an instance that a call takes, got none. Hint: a backward needs the forward in the "
            "library too"
        )
    return found


def _flop(problem: AttentionProblem, products: int) -> float:
    call = CachedCall(problem.seqlen_k, problem.seqlen_q, problem.nheads, problem.nheads_k)
    return (problem.headdim + problem.headdim_v) * products * cached_scores(call, problem.causal)


def _compared(case: Case, kernel: str, problem: AttentionProblem) -> Comparison:
    own = _executed(case.arch, "ck", problem, {_SYMBOLS[kernel]: (case.kernel, _PRODUCTS[kernel])})
    triton = _executed(case.arch, "triton", problem, _triton_kernels(kernel))
    return Comparison(case, own[case.kernel], triton)


def _executed(
    arch: str, backend: str, problem: AttentionProblem, kernels: dict[str, tuple[str, int]]
) -> dict[str, Prediction]:
    """Predictions by name for the launches of a call whose symbols hold one of ``kernels``."""
    from flash_rocm.virtual import Checks

    found: dict[str, Prediction] = {}

    def run(launch: Any) -> None:
        name = next((named for symbol, named in kernels.items() if symbol in launch.code.name), None)
        if name is None:
            launch.run(checks=Checks.none())
            return
        stats = launch.run(measure=True, checks=Checks.none())
        found[name[0]] = model.predict(launch, stats, _flop(problem, name[1]), problem.dtype.itemsize)

    with flash_rocm.use_backend(backend), flash_rocm.virtual_gpu(arch, on_launch=run):
        _call(problem)
    if len(found) != len(kernels):
        raise InspectError(f"{backend} on {arch}: expected launches of {', '.join(kernels)}, got {sorted(found)}")
    return found


def _call(p: AttentionProblem) -> None:
    generator = torch.Generator().manual_seed(0)
    slopes = torch.full((p.nheads,), 0.01) if p.alibi else None

    def random(seqlen: int, heads: int, dim: int) -> torch.Tensor:
        shape = (seqlen, heads, dim) if p.varlen else (1, seqlen, heads, dim)
        return torch.randn(shape, generator=generator).to(p.dtype).requires_grad_(p.needs_grad)

    q, k = random(p.seqlen_q, p.nheads, p.headdim), random(p.seqlen_k, p.nheads_k, p.headdim)
    v = random(p.seqlen_k, p.nheads_k, p.headdim_v)
    options: dict[str, Any] = {"causal": p.causal, "softcap": p.softcap, "alibi_slopes": slopes}
    if p.cached:
        flash_rocm.flash_attn_with_kvcache(q, k, v, cache_seqlens=p.seqlen_k, **options)
        return
    options["deterministic"] = p.deterministic
    if p.varlen:
        starts, starts_k = (torch.tensor([0, n], dtype=torch.int32) for n in (p.seqlen_q, p.seqlen_k))
        out: Any = flash_rocm.flash_attn_varlen_func(q, k, v, starts, starts_k, p.seqlen_q, p.seqlen_k, **options)
    else:
        out = flash_rocm.flash_attn_func(q, k, v, **options)
    if p.needs_grad:
        torch.autograd.backward(out, torch.ones_like(out))


def _by_case(comparisons: Sequence[Comparison]) -> dict[Case, Prediction]:
    """All kernels, those of Triton named after the instance that they stand beside."""
    found: dict[Case, Prediction] = {}
    for each in comparisons:
        found[each.case] = each.ck
        for name, prediction in each.triton.items():
            found[dataclasses.replace(each.case, kernel=f"triton {name} for {each.case.kernel}")] = prediction
    return found


def as_json(comparisons: Sequence[Comparison]) -> str:
    """As :func:`flash_rocm.inspect.model.as_json` writes it."""
    return model.as_json(_by_case(comparisons))


def as_table(comparisons: Sequence[Comparison]) -> str:
    """A row for each kernel, then each instance beside Triton in one line."""
    lines = [
        f"  {each.case.arch} {each.case.kernel}: ck {each.ck.tflops:.0f}, triton {each.triton_tflops:.0f} TFLOP/s"
        for each in comparisons
    ]
    return "\n".join([model.as_table(_by_case(comparisons)), *lines])
