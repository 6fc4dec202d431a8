"""What each back end supports, as rows of a table: for ``flash-rocm info``, README and docs."""

from __future__ import annotations

import dataclasses

import torch

from flash_rocm import backends
from flash_rocm.arch import Arch, arch_named
from flash_rocm.backends import Capability
from flash_rocm.problem import CACHE_FEATURES, AttentionProblem

#: What a feature is called, in the order of the table.
FEATURE_NAMES = {
    "backward": "backward",
    "varlen": "varlen",
    "causal": "causal",
    "window": "sliding window",
    "gqa": "GQA, MQA",
    "headdim_v": "head dim of v differs",
    "softcap": "softcap",
    "alibi": "ALiBi",
    "sinks": "attention sinks",
    "dropout": "dropout",
    "deterministic": "deterministic",
    "kvcache": "K/V cache, split keys (forward, as all that follows)",
    "paged": "pages of any size",
    "append": "append",
    "rotary": "rotary embedding",
    "cache_batch_idx": "cache_batch_idx",
    "leftpad": "left padding",
    "qv": "qv (MLA)",
    "attention_chunk": "attention_chunk",
}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}

#: A call without features, and what each field of :class:`AttentionProblem` is where its feature is used.
_PLAIN = AttentionProblem(torch.bfloat16, "cuda", 2, 256, 256, 4, 4, 64, 64, 0.125)
_USES: dict[str, dict[str, object]] = {
    "backward": {"needs_grad": True},
    "varlen": {"varlen": True},
    "causal": {"window_right": 0},
    "window": {"window_left": 100, "window_right": 0},
    "gqa": {"nheads_k": 2},
    "headdim_v": {"headdim_v": 32},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.1},
    "deterministic": {"deterministic": True},
    "kvcache": {"cached": True},
    "paged": {"cached": True, "page_size": 16},
    "append": {"cached": True, "seqlen_new": 1},
    "rotary": {"cached": True, "rotary_dim": 32},
    "cache_batch_idx": {"cached": True, "cache_batch_idx": True},
    "leftpad": {"cached": True, "leftpad": True},
    "qv": {"cached": True, "qv": True, "headdim": 64, "headdim_v": 512},
    "attention_chunk": {"cached": True, "attention_chunk": 64},
}


#: Where a back end lacks a feature as above, the part of it that it may have.
_PARTS: dict[str, tuple[str, dict[str, object]]] = {"paged": ("of 64, some of 16", {"cached": True, "page_size": 64})}


def problem_with(feature: str, needs_grad: bool = False) -> AttentionProblem:
    """A call that uses a feature, and what that brings along."""
    problem = dataclasses.replace(_PLAIN, **_USES[feature])  # type: ignore[arg-type]
    return dataclasses.replace(problem, needs_grad=True) if needs_grad else problem


def answer(name: str, feature: str) -> str:
    """``yes``, ``no``, ``forward`` (only) or another part: what a back end that is built whole does with a feature."""
    arch = arch_named((backends.CAPABILITIES[name].archs or ("cpu",))[0])
    if backends.incapacities(name, problem_with(feature), arch):
        part, fields = _PARTS.get(feature, ("no", {}))
        partly = dataclasses.replace(problem_with(feature), **fields)  # type: ignore[arg-type]
        return "no" if backends.incapacities(name, partly, arch) else part
    if feature in CACHE_FEATURES or not backends.incapacities(name, problem_with(feature, True), arch):
        return "yes"
    return "forward"


def devices(capability: Capability) -> str:
    """What a back end runs on, in words."""
    if not capability.archs and not capability.minimum_sm:
        return "any device of torch"
    parts = [f"AMD {', '.join(capability.archs)}"]
    if capability.minimum_sm:
        parts.append(f"NVIDIA sm{capability.minimum_sm} and newer")
    return "; ".join(parts)


def dtypes(capability: Capability) -> str:
    """The dtypes of q, k and v, in words."""
    return ", ".join(name for dtype, name in DTYPE_NAMES.items() if dtype in capability.dtypes)


def headdims(capability: Capability) -> str:
    """The head dims, in words."""
    if capability.max_headdim >= 1 << 20:
        return "any"
    arch = arch_named((capability.archs or ("cpu",))[0])
    odd = dataclasses.replace(_PLAIN, headdim=65, headdim_v=65)
    reach = "multiples of 8 up to" if backends.incapacities(capability.name, odd, arch) else "1 to"
    cached = f", {_headdims_cached(capability, arch)} over a K/V cache" if capability.max_headdim_cached else ""
    return f"{reach} {capability.max_headdim}{cached}"


def _headdims_cached(capability: Capability, arch: Arch) -> str:
    """The largest head dim, or all of them where they are few."""
    largest = capability.max_headdim_cached

    def takes(dim: int) -> bool:
        problem = dataclasses.replace(problem_with("kvcache"), headdim=dim, headdim_v=dim)
        return not backends.incapacities(capability.name, problem, arch)

    return str(largest) if takes(8) else ", ".join(str(dim) for dim in range(8, largest + 1, 8) if takes(dim))


def table() -> list[list[str]]:
    """Rows of label and a cell for each of :data:`backends.CAPABILITIES`; the first row has their names."""
    capabilities = backends.CAPABILITIES.values()
    facts = {"devices": devices, "dtypes": dtypes, "head dims": headdims}
    rows = [["", *backends.CAPABILITIES]]
    rows += [[label, *map(describe, capabilities)] for label, describe in facts.items()]
    rows += [
        [label, *(answer(name, feature) for name in backends.CAPABILITIES)] for feature, label in FEATURE_NAMES.items()
    ]
    return rows
