"""Keys of Triton's caches for launches on chips that are not here, as Triton's JIT works them out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from flash_rocm import virtual_device
from flash_rocm.arch import Arch, arch_named
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import CacheCall, make_cache_inputs, make_inputs

triton = pytest.importorskip("triton", reason="works with Triton's cache keys")

from flash_rocm._triton import cached, launch, offline  # noqa: E402
from flash_rocm._triton.launcher import Call, Launcher  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

#: Those of launch.KERNELS, and over a K/V cache.
LAUNCHERS = {**launch.KERNELS, "attend": cached.ATTEND, "combine": cached.COMBINE, "append": cached.APPEND}
#: (kernel, call) of every launch that would compile.
Recorded = list[tuple[str, Call]]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recorded]:
    """``record(arch)``: from now on launches are for that chip, and are noted instead of done."""
    names = {id(launcher): name for name, launcher in LAUNCHERS.items()}

    def start(arch: str) -> Recorded:
        recorded: Recorded = []
        monkeypatch.setattr(virtual_device, "arch_of", lambda device: arch_named(arch))
        monkeypatch.setattr(Launcher, "launch_new", lambda self, key, call: recorded.append((names[id(self)], call)))
        return recorded

    return start


@functools.cache
def _binder(function: Any, arch: Arch) -> Any:
    return create_function_from_signature(function.signature, function.params, make_backend(offline.target_of(arch)))


def specialised(kernel: str, call: Call, arch: Arch) -> tuple[Any, list[Any], dict[str, Any]]:
    """Bound arguments, specialisation and options, as ``JITFunction.run`` works them out at a launch."""
    tail = LAUNCHERS[kernel].tail_of(call)
    # What run() adds to the options of a call; it leaves out what this version of Triton does not know.
    knobs = triton.knobs
    extra: dict[str, Any] = {"debug": False, "instrumentation_mode": knobs.compilation.instrumentation_mode}
    if hasattr(knobs.compilation, "fpsan_homomorphic_casts"):
        extra["fpsan_homomorphic_casts"] = knobs.compilation.fpsan_homomorphic_casts
    function = LAUNCHERS[kernel].kernel_of(call.plan)
    return _binder(function, arch)(*call.arguments(), *call.lse_strides, *tail, **call.plan.options, **extra)


def jit_key(kernel: str, call: Call, arch: Arch) -> str:
    """Key of the JIT's cache in memory: the same key, the same compiled kernel."""
    _, specialisation, options = specialised(kernel, call, arch)
    return f"{specialisation}{options}"


def _code(kernel: str, call: Call, arch: Arch) -> tuple[ASTSource, dict[str, Any]]:
    """What a launch would compile, and the options."""
    function, backend = LAUNCHERS[kernel].kernel_of(call.plan), make_backend(offline.target_of(arch))
    bound, specialisation, options = specialised(kernel, call, arch)
    parsed, signature, constexprs, attrs = function._pack_args(backend, options, bound, specialisation, options)
    source = GluonASTSource if function.is_gluon() else ASTSource
    return source(function, signature, constexprs, attrs), parsed.__dict__


def disk_key(kernel: str, call: Call, arch: Arch) -> str:
    """Folder of the disk cache in which a launch looks for its compiled kernel."""
    code, options = _code(kernel, call, arch)
    return offline.cache_key(code, arch, options)


def compiled(kernel: str, call: Call, arch: Arch) -> Any:
    """The kernel that a launch would compile."""
    code, options = _code(kernel, call, arch)
    return triton.compile(code, target=offline.target_of(arch), options=options)


def launch_all(problem: AttentionProblem, **inputs: Any) -> None:
    """Forward, and backward if gradients are needed; over a K/V cache without its append.

    There, inputs are what the problem does not say (``CacheCall``).
    """
    if problem.cached:
        cached.attend(problem, make_cache_inputs(problem, CacheCall(**inputs)).inputs)
        return
    case = make_inputs(problem, **inputs)
    out, lse = launch.forward(problem, case.inputs)
    if problem.needs_grad:
        launch.backward(problem, case.inputs, out, lse, case.dout, None)
