"""Reports of the project's own kernels: which there are, compiled, counted and kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping

import torch

from flash_rocm import backends, config, files, runtime
from flash_rocm.amdgpu.assembly import AssemblyError, parse_amdgcn
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import ConfigError, KernelConfig
from flash_rocm.problem import AttentionProblem, default_softmax_scale
from flash_rocm.runtime import ConfigSource

from .counts import InspectError
from .report import (
    FORMAT,
    Case,
    Report,
    Work,
    amd_report,
    amdgcn_resources,
    from_json,
    ptxas_resources,
    to_json,
)

AMD_ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201")
NVIDIA_ARCHS = ("sm80", "sm90")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADDIMS = (32, 64, 96, 128, 192, 256, 512)
MASKS = ("full", "causal")
#: Kernels that a training step launches; "probs" is there for tests of dropout only.
TRAINING_KERNELS = ("forward", "backward_dq", "backward_dkdv")
#: The attention kernel over a K/V cache, by the names of its configs.
CACHE_KERNELS = ("decode", "prefill", "mla")
SHIPPED_KERNELS = TRAINING_KERNELS + CACHE_KERNELS
KERNELS = (*SHIPPED_KERNELS, "probs")
#: Head dim of the keys of absorbed MLA, whose first 512 dims are the values.
MLA_HEADDIM, MLA_HEADDIM_V = 576, 512
#: Head dims of the kernels over a cache that are inspected, causal only, unless kernels are named: the rest takes time.
SHIPPED_CACHED = {"decode": (64, 128, 256), "prefill": (64, 128, 256), "mla": (MLA_HEADDIM,)}
#: Length of the problems, for entries that match on it.
SEQLEN = 4096
#: Query positions of a prefill, a chunk of a longer prompt.
CHUNK = 1024


def inspect_problem(
    arch_name: str,
    kernel: str,
    dtype: str,
    headdim: int,
    mask: str,
    overrides: Mapping[str, int] | None = None,
) -> Report:
    """Compile one kernel as a call of this kind would take it, and report on it; from the cache if it is there.

    Args:
        arch_name: "gfx942", "sm90", ...
        kernel: "forward", "backward_dq", "backward_dkdv", "probs", "decode", "prefill" or "mla".
        dtype: "fp16", "bf16" or "fp32".
        mask: "full" or "causal"; see :func:`problem_of` for what they stand for over a cache.
        overrides: options that replace those of the config entry.

    Raises:
        InspectError: an argument is none of these, or the kernel does not compile.
        ConfigError: a config or an override is wrong.
    """
    case = Case(arch_name, kernel, dtype, headdim, mask)
    check_case(case)
    source = source_with(kernel, overrides)
    return cached_report(case, source) or compiled_report(case, source)


def check_case(case: Case) -> None:
    """Raise InspectError for an argument that names nothing."""
    choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("kernel", case.kernel, KERNELS),
        ("dtype", case.dtype, tuple(DTYPES)),
        ("mask", case.mask, MASKS),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise InspectError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
    limit = backends.TRITON.max_headdim
    if case.kernel == "mla" and case.headdim != MLA_HEADDIM:
        raise InspectError(f"headdim: expected {MLA_HEADDIM} for mla, got {case.headdim}")
    if case.kernel != "mla" and not 1 <= case.headdim <= limit:
        raise InspectError(f"headdim: expected 1 to {limit}, got {case.headdim}")
    try:
        arch = arch_named(case.arch)
    except ValueError as error:
        raise InspectError(str(error)) from error
    known = arch.name in backends.TRITON.archs if arch.vendor == "amd" else arch.vendor == "nvidia"
    if not known:
        raise InspectError(f"arch: expected sm... or one of {', '.join(backends.TRITON.archs)}, got {case.arch!r}")


def headdims_of(kernel: str) -> tuple[int, ...]:
    """Head dims that a kernel is shipped for."""
    return (MLA_HEADDIM,) if kernel == "mla" else HEADDIMS


def is_shipped(case: Case) -> bool:
    """Whether a case is inspected where its kernel is not named: of the kernels over a cache, not all are."""
    return case.kernel not in CACHE_KERNELS or (case.mask == "causal" and case.headdim in SHIPPED_CACHED[case.kernel])


def source_with(kernel: str, overrides: Mapping[str, int] | None) -> ConfigSource | None:
    """The user's configs, with some options of a kernel replaced."""
    source = runtime.config_source()
    if not overrides:
        return source
    folder = source.folder if source else None
    return ConfigSource(folder=folder, kernels=json.dumps({kernel: dict(overrides)}))


def problem_of(case: Case) -> AttentionProblem:
    """The call whose kernels a case names."""
    if case.kernel in CACHE_KERNELS:
        return _cache_problem_of(case)
    return AttentionProblem(
        dtype=DTYPES[case.dtype],
        device_type="cuda",
        batch=2,
        seqlen_q=SEQLEN,
        seqlen_k=SEQLEN,
        nheads=16,
        nheads_k=16,
        headdim=case.headdim,
        headdim_v=case.headdim,
        softmax_scale=default_softmax_scale(case.headdim),
        window_right=0 if case.mask == "causal" else -1,
        needs_grad=case.kernel.startswith("backward"),
    )


def _cache_problem_of(case: Case) -> AttentionProblem:
    """A call over a K/V cache: 32 query heads on 8 key heads, one position or a chunk of them, no rotary embedding.

    Mask "causal": pages of 16 keys and a causal mask, as servers call it; "full": a dense cache and no mask.
    "mla" is one position of 128 query heads on the one key head of absorbed MLA.
    """
    is_mla, causal = case.kernel == "mla", case.mask == "causal"
    return AttentionProblem(
        dtype=DTYPES[case.dtype],
        device_type="cuda",
        batch=2,
        seqlen_q=CHUNK if case.kernel == "prefill" else 1,
        seqlen_k=SEQLEN,
        nheads=128 if is_mla else 32,
        nheads_k=1 if is_mla else 8,
        headdim=case.headdim,
        headdim_v=MLA_HEADDIM_V if is_mla else case.headdim,
        softmax_scale=default_softmax_scale(case.headdim),
        window_right=0 if causal else -1,
        cached=True,
        page_size=16 if causal else 0,
    )


def compiled_report(case: Case, source: ConfigSource | None) -> Report:
    """Compile, count, and keep the result."""
    arch, problem = arch_named(case.arch), problem_of(case)
    planner = backends.load_planner()
    entry = _entry_of(case, source)
    try:
        text, lds_bytes = backends.load_offline().listing(case.kernel, problem, arch, source)
    except ImportError as error:
        raise InspectError(f"inspect compiles kernels: expected the triton package, {error}") from error
    except Exception as error:
        # Compilers raise anything from AssertionError to their own classes.
        raise InspectError(f"{case}: does not compile with {entry.describe()}: {error!r}") from error
    facts = {
        "compiler": f"Triton {runtime.triton_version()}",
        "options": entry.options(),
        "config": entry.source,
        "limits": entry.limits,
    }
    if arch.vendor == "nvidia":
        report = Report(case, ptxas_resources(text, lds_bytes), **facts)  # type: ignore[arg-type]
    else:
        dims = problem.headdim + problem.headdim_v
        per_score = 5 * dims if case.kernel.startswith("backward") else 2 * dims
        chunks = max(planner.block_d(case.headdim) // entry.BLOCK_K, 1) if entry.BLOCK_K else 1
        scores = entry.BLOCK_M * entry.BLOCK_N / entry.num_warps
        try:
            report = amd_report(
                case,
                parse_amdgcn(text),
                amdgcn_resources(text, lds_bytes),
                entry.num_warps,
                Work(scores, per_score, problem.dtype.itemsize, chunks),
                **facts,
            )
        except AssemblyError as error:
            raise InspectError(f"{case}: {error}") from error
    _store(_cache_path(case, source), report)
    return report


def _entry_of(case: Case, source: ConfigSource | None) -> KernelConfig:
    """The config of the kernel that is compiled: a forward of plain tensors, where the problem allows that."""
    planner, problem = backends.load_planner(), problem_of(case)
    plain = planner.is_built_plain(case.kernel, problem)
    return planner.kernel_config(case.kernel, problem, arch_named(case.arch), source, plain)


# --------------------------------------------------------------------------------------------------
# Cache


@functools.cache
def _sources_hash() -> str:
    """Of everything a report follows from but its config: kernels, and what compiles and counts them."""
    digest = hashlib.sha256()
    for package in ("flash_rocm._triton", "flash_rocm.amdgpu", "flash_rocm.inspect"):
        for path in sorted(importlib.resources.files(package).iterdir(), key=lambda path: path.name):
            if path.name.endswith(".py"):
                digest.update(f"{package}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _cache_path(case: Case, source: ConfigSource | None) -> pathlib.Path:
    arch, problem = arch_named(case.arch), problem_of(case)
    entry = _entry_of(case, source)
    key = (FORMAT, _sources_hash(), runtime.triton_version(), arch, problem, case, entry.options())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    return runtime.cache_dir() / "inspect" / f"{name}.json"


def cached_report(case: Case, source: ConfigSource | None) -> Report | None:
    """What an earlier run found, with the limits and provenance of now; None if nothing usable is there."""
    path = _cache_path(case, source)
    if not path.is_file():
        return None
    try:
        report = from_json(config.parse(str(path), path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, ConfigError, TypeError, KeyError) as error:
        runtime.warn_once(f"{path}: expected a report of inspect, compiling again: {error}")
        return None
    entry = _entry_of(case, source)
    return dataclasses.replace(report, config=entry.source, limits=entry.limits)


def _store(path: pathlib.Path, report: Report) -> None:
    try:
        files.write_whole(path, json.dumps(to_json(report)))
    except OSError as error:
        runtime.warn_once(f"FLASH_ROCM_CACHE_DIR: {path.parent}: expected a folder to write to, nothing kept: {error}")
