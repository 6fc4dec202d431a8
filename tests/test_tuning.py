"""Autotuning: what is tried, what is measured, when; on the CPU with a made-up clock, on a GPU really."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import matrix
import pytest
import torch
from compile_keys import disk_key, launch, offline
from flash_rocm._triton import candidates, plan, tuning, workers

from flash_rocm import ops, runtime, tuned, virtual_device
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import KernelConfig
from flash_rocm.problem import AttentionProblem, layout_of
from flash_rocm.runtime import ConfigSource
from flash_rocm.testing import assert_attention_close, make_inputs, make_problem
from flash_rocm.tuned import Outcome, TuneKey, TuningError

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1201", "sm80", "sm90")
KERNELS = ("forward", "backward_dq", "backward_dkdv")
KEY = TuneKey("gfx942", "forward", "bfloat16", 128, "causal", 4096, 1, False)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gfx942(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner believes that the GPU here is one."""
    tuned.find.cache_clear()
    runtime.log_once.cache_clear()
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setattr(virtual_device, "arch_of", lambda device: arch_named("gfx942"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a made-up GPU")


def shipped(kernel: str, arch: str, **fields: Any) -> tuple[KernelConfig, AttentionProblem]:
    fields = {"dtype": torch.bfloat16, "seqlen_q": 4096, "seqlen_k": 4096, "headdim": 128} | fields
    problem = make_problem(**fields)
    return plan.kernel_config(kernel, problem, arch_named(arch)), problem


# --------------------------------------------------------------------------------------------------
# Candidates


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_candidates_hold_the_default_first_and_what_fits(arch: str, kernel: str) -> None:
    default, _ = shipped(kernel, arch)
    found = candidates.candidates(kernel, default, arch_named(arch), 128, 2)
    assert found[0] is default
    assert 8 <= len(found) == len(set(found)) <= candidates.MAX_CANDIDATES
    assert all(candidates.fits(kernel, entry, arch_named(arch), 128, 2) for entry in found[1:])
    space = candidates.SPACES[candidates.family(arch_named(arch))]
    assert all(getattr(entry, name) in values for entry in found[1:] for name, values in space.items())
    single = sum(sum(getattr(entry, n) != getattr(default, n) for n in space) == 1 for entry in found)
    assert single >= 4, "neighbours of the default come first"


@pytest.mark.parametrize("arch", ARCHS)
def test_no_shipped_config_is_pruned(arch: str) -> None:
    """The bounds are lower bounds: what is known not to spill keeps them."""
    for kernel in KERNELS:
        for headdim in (32, 64, 128):
            default, problem = shipped(kernel, arch, headdim=headdim)
            assert candidates.fits(kernel, default, arch_named(arch), headdim, problem.dtype.itemsize), (
                kernel,
                headdim,
            )


@pytest.mark.parametrize(
    ("arch", "options", "fits"),
    [
        ("gfx942", {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4}, True),
        ("gfx942", {"BLOCK_M": 256, "BLOCK_N": 256, "num_warps": 1}, False),  # registers
        ("gfx942", {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "waves_per_eu": 6}, False),  # registers for 6 waves
        ("gfx942", {"BLOCK_M": 128, "BLOCK_N": 512, "num_warps": 16}, False),  # LDS
        ("gfx1100", {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 2}, False),
        ("sm90", {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4}, True),
        ("sm90", {"BLOCK_M": 128, "BLOCK_N": 256, "num_warps": 16, "num_stages": 4}, False),  # shared memory
        ("sm86", {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4}, False),
    ],
)
def test_pruning_by_the_limits_of_the_chip(arch: str, options: dict[str, int], fits: bool) -> None:
    entry = KernelConfig(**({"num_stages": 1} | options))  # type: ignore[arg-type]
    assert candidates.fits("forward", entry, arch_named(arch), 128, 2) == fits


# --------------------------------------------------------------------------------------------------
# Tuning with a made-up compiler and clock


class Fake:
    """Compiles at once and measures what it is told: seconds by num_warps."""

    def __init__(self, seconds: dict[int, float | None], shared: int = 0, kernel: str = "forward") -> None:
        self.seconds, self.shared, self.kernel = seconds, shared, kernel
        self.compiled: list[dict[str, int]] = []
        self.measured: list[dict[str, int]] = []

    def options_of(self, source: ConfigSource | None) -> dict[str, int]:
        return json.loads(source.kernels or "")[self.kernel]  # type: ignore[union-attr]

    def compile_all(self, tasks: Sequence[workers.Task], jobs: int, deadline: float) -> list[workers.Result]:
        self.compiled = [self.options_of(task.source) for task in tasks]
        return [
            None if n % 5 == 4 else "does not compile" if n % 5 == 3 else workers.Compiled(self.shared)
            for n in range(len(tasks))
        ]

    def measure(
        self, device: Any, kernel: str, problem: AttentionProblem, sources: Sequence[ConfigSource], deadline: float
    ) -> list[float | None]:
        self.measured = [self.options_of(source) for source in sources]
        return [self.seconds.get(options["num_warps"]) for options in self.measured]


def run_tune(fake: Fake, source: ConfigSource | None = None) -> tuple[Outcome, list[str]]:
    lines: list[str] = []
    with_fake = {"compile_all": fake.compile_all, "measure": fake.measure}
    return tuning.tune(KEY, CUDA, source, 60.0, lines.append, **with_fake), lines


def test_the_fastest_wins(gfx942: None) -> None:
    default, _ = shipped("forward", "gfx942", window_right=0)
    other = 4 if default.num_warps == 8 else 8
    fake = Fake({default.num_warps: 2e-3, other: 1e-3})
    outcome, lines = run_tune(fake)
    assert outcome.options["num_warps"] == other
    assert (outcome.seconds_before, outcome.seconds_after, outcome.gain) == (2e-3, 1e-3, 2.0)
    assert outcome.provenance.how == "measured" and outcome.provenance.note == "a made-up GPU"
    assert fake.compiled[0] == fake.measured[0] == default.options()
    assert 0 < len(fake.measured) < len(fake.compiled), "what does not compile is not measured"
    assert "tuning forward-bfloat16-d128-causal-s4096-gqa1-dense on gfx942" in lines[0]
    assert "2.0000 ms -> 1.0000 ms, 2.00x" in lines[-1]


def test_a_gain_that_may_be_noise_keeps_the_default(gfx942: None) -> None:
    default, _ = shipped("forward", "gfx942", window_right=0)
    times: dict[int, float | None] = dict.fromkeys((1, 2, 4, 8, 16), 1.0)
    outcome, _ = run_tune(Fake(times | {default.num_warps: 1.015}))
    assert outcome.options == default.options() and outcome.gain == 1.0


def test_candidates_that_take_more_lds_than_there_is_are_not_measured(gfx942: None) -> None:
    default, _ = shipped("forward", "gfx942", window_right=0)
    fake = Fake({default.num_warps: 1.0}, shared=(64 << 10) + 1)
    run_tune(fake)
    assert fake.measured == [default.options()]


def test_a_default_that_cannot_be_measured_is_an_error(gfx942: None) -> None:
    with pytest.raises(TuningError, match="expected to measure the default config"):
        run_tune(Fake({}))


def test_tuning_starts_from_the_files(gfx942: None, tmp_path: pathlib.Path) -> None:
    """Neither what was tuned before nor an override moves the start."""
    tuned.write(
        tuned.path_of(str(tmp_path), KEY),
        KEY,
        Outcome({"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 1}, OUTCOME.provenance, 1.0, 1.0),
    )
    default, _ = shipped("forward", "gfx942", window_right=0)
    fake = Fake({default.num_warps: 1.0})
    run_tune(fake, ConfigSource(kernels='{"forward": {"BLOCK_M": 16}}', tuned=str(tmp_path), tune=True))
    assert fake.compiled[0] == default.options()


@pytest.mark.parametrize("result", [None, "no compiler"])
def test_nothing_that_compiles_is_an_error(result: workers.Result, gfx942: None) -> None:
    fake = Fake({})
    fake.compile_all = lambda tasks, jobs, deadline: [result] * len(tasks)  # type: ignore[method-assign]
    with pytest.raises(TuningError, match=f"expected candidates that compile, got none: {result or 'no time'}"):
        run_tune(fake)
    assert not fake.measured


@pytest.mark.parametrize("mask", tuned.MASKS)
@pytest.mark.parametrize("group", tuned.GROUPS)
def test_the_measured_problem_has_the_key_it_stands_for(mask: str, group: int) -> None:
    for seqlen in (128, 4096, 32768):
        for varlen in (False, True):
            key = dataclasses.replace(KEY, mask=mask, group=group, seqlen=seqlen, varlen=varlen)
            assert plan.tune_key("forward", tuning.problem_of(key), arch_named("gfx942")) == key


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201", "sm90"])
def test_what_is_measured_is_what_was_compiled(
    arch: str, kernel: str, varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler processes fill Triton's cache with just the kernels that the launches look for."""
    monkeypatch.setattr(virtual_device, "arch_of", lambda device: arch_named(arch))
    monkeypatch.setattr(tuning, "_ELEMENTS", 16 * 64 * 256)
    key = TuneKey(arch, kernel, "bfloat16", 64, "window", 128, 4, varlen)
    problem = tuning.problem_of(key)
    assert problem.batch == 2
    tensors, strided, lse_strides = tuning._tensors(kernel, problem, torch.device("cpu"))
    call = launch.new_call(kernel, problem, None, tensors, strided, lse_strides, None)
    code, options = offline.source_of(kernel, problem, arch_named(arch))
    assert disk_key(kernel, call, arch_named(arch)) == offline.cache_key(code, arch_named(arch), options)


# --------------------------------------------------------------------------------------------------
# At first use

OUTCOME = Outcome(
    {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    tuned.Provenance("measured", "2026-11-25", "Triton 3.9", "a GPU"),
    2e-3,
    1e-3,
)
PROBLEM = make_problem(dtype=torch.bfloat16, seqlen_q=1, seqlen_k=4000, headdim=96, window_right=0)


@pytest.fixture
def asked(gfx942: None, monkeypatch: pytest.MonkeyPatch) -> list[TuneKey]:
    """Keys that were tuned, by a tuner that gives OUTCOME."""
    keys: list[TuneKey] = []

    def tune(key: TuneKey, *args: Any) -> Outcome:
        keys.append(key)
        return OUTCOME

    monkeypatch.setattr(tuning, "tune", tune)
    return keys


def first_use(source: ConfigSource, problem: AttentionProblem = PROBLEM, device: torch.device = CUDA) -> bool:
    return tuning.tune_at_first_use("forward", problem, device, source)


def test_tuned_once_and_then_taken(asked: list[TuneKey], tmp_path: pathlib.Path) -> None:
    source = ConfigSource(tuned=str(tmp_path), tune=True)
    assert first_use(source) and first_use(source)
    assert first_use(source, dataclasses.replace(PROBLEM, seqlen_k=2500, batch=7))
    assert asked == [KEY]
    assert plan.kernel_config("forward", PROBLEM, arch_named("gfx942"), source).BLOCK_M == 32
    assert first_use(source, dataclasses.replace(PROBLEM, window_right=-1))
    assert len(asked) == 2
    # Another process finds it.
    tuning._tried.clear()
    tuned.find.cache_clear()
    assert first_use(source) and len(asked) == 2


def test_not_during_graph_capture(
    asked: list[TuneKey],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = ConfigSource(tuned=str(tmp_path), tune=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        assert launch.settle("forward", PROBLEM, CUDA, ("key",), source) == (None, source._replace(tune=False))
    assert caplog.messages == ["tuning: not during graph capture, using the default config"] and not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launch.settle("forward", PROBLEM, CUDA, ("key",), source) == (("key",), source)
    assert asked == [KEY]


def test_overridden_kernels_and_cpu_tensors_are_not_tuned(asked: list[TuneKey], tmp_path: pathlib.Path) -> None:
    source = ConfigSource(tuned=str(tmp_path), tune=True)
    assert first_use(source._replace(kernels='{"forward": {"BLOCK_M": 64}}'))
    assert first_use(source, device=torch.device("cpu"))
    assert not asked
    assert first_use(source._replace(kernels='{"probs": {"BLOCK_M": 64}}'))
    assert asked == [KEY]


def test_nothing_is_tuned_unless_asked_for(asked: list[TuneKey], tmp_path: pathlib.Path) -> None:
    for source in (None, ConfigSource(), ConfigSource(tuned=str(tmp_path))):
        assert launch.settle("forward", PROBLEM, CUDA, ("key",), source) == (("key",), source)
    assert not asked


@pytest.mark.parametrize("error", [TuningError("no time"), torch.OutOfMemoryError("no memory")])
def test_what_cannot_be_tuned_takes_the_default(
    error: Exception,
    asked: list[TuneKey],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def tune(key: TuneKey, *args: Any) -> Outcome:
        asked.append(key)
        raise error

    monkeypatch.setattr(tuning, "tune", tune)
    source = ConfigSource(tuned=str(tmp_path), tune=True)
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        assert first_use(source) and first_use(source)
    assert asked == [KEY] and len(caplog.messages) == 1 and str(error) in caplog.messages[0]
    default, _ = shipped("forward", "gfx942", window_right=0)
    assert plan.kernel_config("forward", PROBLEM, arch_named("gfx942"), source) == default


def test_explain_says_where_an_entry_comes_from(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flash_rocm import cli

    tuned.find.cache_clear()
    path = tuned.path_of(str(tmp_path / "tuning"), KEY)
    tuned.write(path, KEY, OUTCOME)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    shape = ("--shape", "1,4096,4096,8,8,128", "--causal")
    assert cli.main(["explain", "--arch", "gfx942", "--backend", "triton", *shape]) == 0
    assert f"(tuned, {path}; measured, 2026-11-25, Triton 3.9, a GPU)" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("kernel", KERNELS)
def test_tunes_on_the_gpu(kernel: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few candidates really compiled and measured; the result is right, stored, and used."""
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setattr(tuning, "BUDGET", 40.0)
    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 6)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    tuned.find.cache_clear()
    problem = make_problem(
        dtype=torch.float16, device_type="cuda", seqlen_q=200, seqlen_k=200, headdim=64, window_right=0, needs_grad=True
    )
    source = runtime.config_source()
    assert source is not None and source.tuned is not None
    state = torch.cuda.get_rng_state()
    assert tuning.tune_at_first_use(kernel, problem, CUDA, source)
    assert torch.equal(torch.cuda.get_rng_state(), state), "tuning may not change what the caller draws next"
    key = plan.tune_key(kernel, problem, virtual_device.arch_of(CUDA))
    outcome = tuned.read(tuned.path_of(source.tuned, key), key)
    assert outcome is not None and outcome.gain >= 1.0
    found = plan.kernel_config(kernel, problem, virtual_device.arch_of(CUDA), source)
    assert found.options() == outcome.options and found.source.startswith("tuned, ")


@pytest.mark.gpu
def test_a_call_tunes_and_is_right(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setattr(tuning, "BUDGET", 40.0)
    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 4)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    tuned.find.cache_clear()
    problem = make_problem(
        dtype=torch.float16, device_type="cuda", seqlen_q=150, seqlen_k=190, headdim=64, nheads=4, needs_grad=True
    )
    data = make_inputs(problem)
    leaves = matrix.leaves_of(data.inputs)
    args = (*matrix.with_leaves(data.inputs, leaves), *matrix.scalars_of(problem, "triton"))
    out, lse = ops.attention_forward(args, layout_of(*args[:3]))
    grads = torch.autograd.grad([out], leaves, [data.dout])
    assert_attention_close(problem, data, out, lse, grads)
    assert len(list(tmp_path.glob("tuning/*/*/*.json"))) == 3


@pytest.mark.gpu
def test_capture_takes_the_default(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of a call that was never tuned: captured with the default config, nothing stored."""
    import flash_rocm

    monkeypatch.setattr(tuning, "_tried", set())
    q, k, v = (torch.randn(2, 96, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    expected = flash_rocm.flash_attn_func(q, k, v)  # loads Triton's driver, compiles
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    tuned.find.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_rocm.flash_attn_func(q, k, v)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    assert not list(tmp_path.glob("tuning/*/*/*.json"))


_RANK = """
import sys, torch, flash_rocm
from flash_rocm._triton import candidates, tuning
candidates.MAX_CANDIDATES, tuning.BUDGET = 4, 60.0
q, k, v = (torch.randn(2, 96, 4, 64, device="cuda", dtype=torch.float16) for _ in range(3))
flash_rocm.flash_attn_func(q, k, v)
torch.cuda.synchronize()
print(str(flash_rocm.explain(q, k, v)).split("config forward: ")[1].split(";")[0])
"""


@pytest.mark.gpu
def test_eight_processes_at_once_store_one_file(tmp_path: pathlib.Path) -> None:
    environment = runtime.subprocess_environment(FLASH_ROCM_CACHE_DIR=str(tmp_path), FLASH_ROCM_AUTOTUNE="1")
    command = [sys.executable, "-c", _RANK]
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(8)]
    results = [rank.communicate(timeout=500) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8, results
    assert len({out for out, _ in results}) == 1 and "(tuned, " in results[0][0], results
    assert sum("tuning forward-float16-d64-full-s128-gqa1-dense" in err for _, err in results) == 1, results
    (path,) = tmp_path.glob("tuning/*/*/*.json")
    assert path.name == "forward-float16-d64-full-s128-gqa1-dense.json"
    assert not list(tmp_path.glob("tuning/**/*.tmp")) and not list(tmp_path.glob("tuning/**/*.corrupt"))
