"""Which back end runs a call: capabilities as data, one pure selection, all reasons.

The capability records live here, not in the back ends, so that selecting and explaining import
no kernel, no compiler and no Triton.  The back ends themselves are imported at first use.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

import torch

from flash_rocm import ck_instances, cuda_library, runtime
from flash_rocm.arch import Arch
from flash_rocm.ck_instances import CkLibrary
from flash_rocm.config_schema import AUXILIARY_KERNELS
from flash_rocm.problem import FEATURES, AttentionProblem
from flash_rocm.protocols import Backend, LayerBackend, OfflineCompiler, Planner, Tuner


@dataclasses.dataclass(frozen=True)
class Capability:
    """What one back end accepts.  Tests are generated from it: whatever it names is tested."""

    name: str
    module: str
    dtypes: frozenset[torch.dtype]
    max_headdim: int
    features: frozenset[str]
    max_headdim_cached: int = 0  # of calls over a K/V cache
    archs: tuple[str, ...] = ()  # empty: any
    minimum_sm: int = 0  # NVIDIA: smallest compute capability, 80 for sm80


REFERENCE = Capability(
    name="reference",
    module="flash_rocm.reference",
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    max_headdim=1 << 20,
    max_headdim_cached=1 << 20,
    features=FEATURES,
)

#: AMD chips whose matrix instructions the Triton kernels compile for, CDNA then RDNA.
TRITON_AMD_ARCHS = (
    *("gfx90a", "gfx942", "gfx950"),
    *("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153"),
    *("gfx1200", "gfx1201"),
)

TRITON = Capability(
    name="triton",
    module="flash_rocm._triton.backend",
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    max_headdim=512,
    max_headdim_cached=576,
    features=FEATURES,
    archs=TRITON_AMD_ARCHS,
    minimum_sm=80,
)

#: What the shipped configs have instances for; which of them a library has, its build decides.
CK = Capability(
    name="ck",
    module="flash_rocm._ck.backend",
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    max_headdim=256,
    max_headdim_cached=256,
    features=frozenset(
        {
            *("varlen", "causal", "window", "gqa", "headdim_v", "softcap", "alibi", "deterministic", "backward"),
            *("kvcache", "paged", "append", "rotary", "cache_batch_idx", "leftpad"),
        }
    ),
    archs=ck_instances.ARCHS,
)

CAPABILITIES = {capability.name: capability for capability in (CK, TRITON, REFERENCE)}

#: Order of ``auto`` by vendor.
AUTO_ORDER = {"amd": ("ck", "triton"), "nvidia": ("triton",), "cpu": ("reference",)}


class BackendError(NotImplementedError):
    """No back end, or not the one asked for, can run the call.  The text lists every reason."""


def availability_reasons(name: str, arch: Arch) -> list[str]:
    """Why a back end cannot run at all on this machine and arch; empty if it can."""
    if name == "reference":
        return []
    reasons = list(_installation_reasons(name))
    if name == "triton" and arch.vendor == "cpu":
        if not runtime.triton_interpret():
            reasons.append(
                "the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels under Triton's interpreter)"
            )
        return reasons
    reasons += _arch_reasons(CAPABILITIES[name], arch)
    if name == "ck" and not reasons and (library := ck_instances.built()) is not None:
        return ck_instances.why_not_on(arch.name, library)
    return reasons


def _installation_reasons(name: str) -> list[str]:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return ["the triton package is not installed (pip install triton, or a ROCm/CUDA build of torch brings it)"]
    if name == "ck" and ck_instances.built() is None:
        return [f"not built: {ck_instances.BUILD_COMMAND.format(archs='gfx90a;gfx942')}"]
    return []


def _arch_reasons(capability: Capability, arch: Arch) -> list[str]:
    if arch.vendor == "nvidia" and capability.minimum_sm:
        if int(arch.name.removeprefix("sm")) < capability.minimum_sm:
            return [f"GPU {arch.name} is older than sm{capability.minimum_sm}"]
        return []
    if capability.archs and arch.name not in capability.archs:
        return [f"device {arch.name} is not one of {', '.join(capability.archs)}"]
    return []


def refusal_reasons(name: str, problem: AttentionProblem, arch: Arch, by_name: bool = False) -> list[str]:
    """Every reason why a back end does not run this problem on this arch; empty if it does.

    Args:
        by_name: it was asked for by name: then ``ck`` runs on chips on which no test executes it, and compiles an
            instance that is missing at its first use, where the configs have it and this machine has a compiler.
            ``auto`` lets nobody wait for that.
    """
    reasons = availability_reasons(name, arch) + _problem_reasons(name, problem)
    if name == "ck":
        if not by_name and arch.name in set(CK.archs) - set(ck_instances.TESTED_ARCHS):
            reasons.append(f"the tests run none of its kernels on {arch.name}: auto leaves them to who asks by name")
        # Which instance is missing is of interest only where one could help.
        reasons += ck_instances.refusals(problem, arch.name, None if reasons else ck_instances.built())
        if reasons and by_name and _is_compilable(problem, arch):
            why_not = load_library_builder("ck").why_not(runtime.build_request())
            return [*reasons, f"not compiled at first use: {why_not}"] if why_not else []
    return reasons


def _is_compilable(problem: AttentionProblem, arch: Arch) -> bool:
    """Whether all that Composable Kernel lacks for a problem is an instance that the configs have."""
    if _arch_reasons(CK, arch) or _problem_reasons("ck", problem):
        return False
    wanted = ck_instances.configured(arch.name)
    return not ck_instances.refusals(problem, arch.name, ck_instances.built() or wanted, wanted)


def incapacities(name: str, problem: AttentionProblem, arch: Arch, *, users_configs: bool = False) -> list[str]:
    """The reasons that no installation or build removes.

    Args:
        users_configs: of what ``ck`` has, count what the configs of FLASH_ROCM_CONFIG_DIR add to the shipped ones.
    """
    entries = ck_instances.configured if users_configs else ck_instances.shipped
    own = ck_instances.refusals(problem, arch.name, entries(arch.name)) if name == "ck" else []
    return _arch_reasons(CAPABILITIES[name], arch) + _problem_reasons(name, problem) + own


def _problem_reasons(name: str, problem: AttentionProblem) -> list[str]:
    capability, reasons = CAPABILITIES[name], []
    if problem.dtype not in capability.dtypes:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in capability.dtypes)
        reasons.append(f"dtype {str(problem.dtype).removeprefix('torch.')} is not one of {', '.join(names)}")
    limit = capability.max_headdim_cached if problem.cached else capability.max_headdim
    if max(problem.headdim, problem.headdim_v) > limit:
        reasons.append(f"headdim {max(problem.headdim, problem.headdim_v)} is over {limit}")
    if name == "triton" and problem.cached and problem.headdim > capability.max_headdim:
        reasons += [
            f"{feature} with headdim {problem.headdim}, over {capability.max_headdim}, is not implemented"
            for feature in sorted(problem.features() & {"qv", "rotary"})
        ]
    lacks = sorted(problem.features() - capability.features)
    return reasons + [f"{feature} is not implemented" for feature in lacks]


@functools.lru_cache(maxsize=4096)
def _decide(
    problem: AttentionProblem, arch: Arch, requested: str, interpret: bool, library: CkLibrary | None
) -> str | None:
    # The last two are what the reasons depend on beside the rest.
    names = _candidates(arch, requested)
    by_name = requested != "auto"
    return next((name for name in names if not refusal_reasons(name, problem, arch, by_name)), None)


def _candidates(arch: Arch, requested: str) -> tuple[str, ...]:
    return AUTO_ORDER[arch.vendor] if requested == "auto" else (requested,)


def _refusal(problem: AttentionProblem, arch: Arch, requested: str) -> BackendError:
    candidates = _candidates(arch, requested)
    lines = [f"no back end can run this call: {problem.describe()}; device {arch.name}; requested {requested}"]
    for name in CAPABILITIES:
        reasons = refusal_reasons(name, problem, arch, requested != "auto")
        if name in candidates:
            lines += [f"  {name}: {reason}" for reason in reasons]
        elif reasons:
            lines += [f"  {name} (not asked for): {reason}" for reason in reasons]
        else:
            lines.append(f"  {name}: could run it, choose it with FLASH_ROCM_BACKEND={name} or use_backend({name!r})")
    return BackendError("\n".join(lines))


def choice(problem: AttentionProblem, arch: Arch, requested: str) -> str | None:
    """What :func:`select` returns; None where it raises."""
    return _decide(problem, arch, requested, runtime.triton_interpret(), ck_instances.built())


def select(problem: AttentionProblem, arch: Arch, requested: str) -> str:
    """Name of the back end that runs a call.

    Reads only the problem, the arch, the request and what is built; never a tensor, never a device.

    Args:
        requested: ``auto`` walks :data:`AUTO_ORDER`; any other name is that back end or an error.

    Raises:
        BackendError: no candidate accepts the problem; the text has every back end's reasons.
    """
    found = choice(problem, arch, requested)
    if found is None:
        raise _refusal(problem, arch, requested)
    return found


@functools.cache
def load(name: str) -> Backend:
    """The back end itself, imported at its first use."""
    return importlib.import_module(CAPABILITIES[name].module)  # type: ignore[return-value]


def select_layers(dtype: torch.dtype, arch: Arch, requested: str) -> str:
    """Name of the back end that runs a layer beside attention: ``triton`` or ``reference``.

    ``ck`` has attention only: asked for, its layers are those of ``auto``, the Triton kernels on a GPU and
    the reference on the CPU and for what they do not take.

    Raises:
        BackendError: ``triton`` was asked for by name and cannot run here.
    """
    if requested == "reference" or (requested != "triton" and arch.vendor == "cpu"):
        return "reference"
    reasons = availability_reasons("triton", arch)
    if dtype not in TRITON.dtypes:
        reasons.append(f"dtype {str(dtype).removeprefix('torch.')} is not one of its dtypes")
    if requested != "triton":
        return "reference" if reasons else "triton"
    if reasons:
        raise BackendError("the Triton kernels cannot run this layer:\n" + "\n".join(f"  triton: {r}" for r in reasons))
    return "triton"


def load_layers(name: str) -> LayerBackend:
    """The layers of a back end, imported at their first use."""
    module = CAPABILITIES[name].module.removesuffix(".backend")
    return importlib.import_module(f"{module}.layers")  # type: ignore[return-value]


def load_offline() -> OfflineCompiler:
    """The compiler of the Triton kernels, imported with Triton itself."""
    return importlib.import_module("flash_rocm._triton.offline")  # type: ignore[return-value]


def load_tuner() -> Tuner:
    """The tuner of the Triton kernels, imported with Triton itself."""
    return importlib.import_module("flash_rocm._triton.tuning")  # type: ignore[return-value]


def load_workers() -> Any:
    """The compiler processes: ``Task``, ``Compiled`` and ``compile_all`` of triton_backend/workers.py."""
    return importlib.import_module("flash_rocm._triton.workers")


def load_library_builder(name: str) -> Any:
    """What compiles a library from C++, "ck" or "cuda": ``build``, ``jobs_of`` and ``BuildError`` of its module."""
    return importlib.import_module("flash_rocm._ck.build" if name == "ck" else "flash_rocm._ck.build_cuda")


def load_on_demand() -> Any:
    """What compiles instances of Composable Kernel for described problems: ``provide`` and ``BuildError``."""
    return importlib.import_module("flash_rocm._ck.on_demand")


def load_planner() -> Planner:
    """Configs and constants of the Triton kernels; needs no Triton."""
    return importlib.import_module("flash_rocm._triton.plan")  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Answer of :func:`flash_rocm.explain`; ``str()`` of it is the report."""

    problem: AttentionProblem
    arch: Arch
    requested: str
    backend: str | None  # the choice, None if no back end takes the call
    reasons: dict[str, tuple[str, ...]]  # back end -> why not; empty: it could run the call
    configs: tuple[str, ...] = ()  # kernel configs that the choice would use

    def __str__(self) -> str:
        lines = [f"call: {self.problem.describe()}", f"device: {self.arch.name}   requested: {self.requested}"]
        lines.append(f"back end: {self.backend or 'none can run it'}")
        for name, reasons in self.reasons.items():
            if reasons:
                lines += [f"  {name}: no, {reason}" for reason in reasons]
            else:
                lines.append(f"  {name}: yes" + (" (chosen)" if name == self.backend else ""))
        lines += [f"  config {line}" for line in self.configs]
        return "\n".join(lines)


def _auxiliary_configs(problem: AttentionProblem, arch: Arch) -> list[str]:
    """The C++ kernels that calls over a K/V cache take beside Triton's, if they append and if keys are split."""
    return cuda_library.describe(AUXILIARY_KERNELS, arch, runtime.config_source()) if problem.cached else []


def explain_problem(problem: AttentionProblem, arch: Arch, requested: str) -> Explanation:
    """What :func:`select` would say, with every back end's reasons, without raising."""
    chosen = choice(problem, arch, requested)
    by_name = requested == "ck"
    reasons = {name: tuple(refusal_reasons(name, problem, arch, by_name)) for name in CAPABILITIES}
    configs: tuple[str, ...] = ()
    if chosen == "triton":
        configs = (*load_planner().describe_configs(problem, arch), *_auxiliary_configs(problem, arch))
    elif chosen == "ck":
        configs = tuple(ck_instances.describe(problem, arch.name, ck_instances.built()))
    return Explanation(problem, arch, requested, chosen, reasons, configs)
