"""Compiler processes: they compile, fail, die and are stopped without harm to the others."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time

import pytest
import torch

from flash_rocm import runtime
from flash_rocm.arch import arch_named
from flash_rocm.runtime import ConfigSource
from flash_rocm.testing import make_problem

pytest.importorskip("triton", reason="compiles Triton kernels")

from flash_rocm._triton import workers  # noqa: E402


@pytest.fixture(autouse=True)
def _needs_the_compiler() -> None:
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")


def _task(**options: int) -> workers.Task:
    source = ConfigSource(kernels=json.dumps({"forward": options})) if options else None
    return workers.Task("forward", make_problem(dtype=torch.float16, headdim=32), arch_named("gfx942"), source)


def test_workers_compile_and_survive(tmp_path: pathlib.Path) -> None:
    """A task that fails, and a worker that dies, cost their own results only."""
    tasks = [_task(), _task(BLOCK_M=48), _task(num_warps=2)]
    seen: list[workers.Result] = []
    results = workers.compile_all(tasks, 1, None, str(tmp_path), lambda task, result: seen.append(result))
    assert results == seen
    assert isinstance(results[0], workers.Compiled) and isinstance(results[2], workers.Compiled)
    assert isinstance(results[1], str) and "BLOCK_M: expected one of" in results[1]
    assert any(tmp_path.glob("*/attn_fwd_kernel.hsaco"))


def test_a_worker_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; sys.stdin.readline(); sys.exit('first\\nlast words')"
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", program], **rest))
    results = workers.compile_all([_task(), _task()], 1)
    assert results == ["the compiler process died with status 1: last words"] * 2


def test_the_deadline_stops_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    program = "import time; time.sleep(600)"
    monkeypatch.setattr(subprocess, "Popen", lambda command, **rest: real([sys.executable, "-c", program], **rest))
    assert workers.compile_all([_task()] * 3, 2, time.monotonic() + 0.2) == [None] * 3
