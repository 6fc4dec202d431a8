"""``flash-rocm tune --model``: configs compared by the speed model; with a made-up model, and once really."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")
pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from flash_rocm._triton import candidates, tuning, workers

from flash_rocm import backends, cli, config, runtime, tuned
from flash_rocm.arch import Arch, arch_named
from flash_rocm.config_schema import Facts, Provenance
from flash_rocm.inspect.model import visible_scores
from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import ConfigSource
from flash_rocm.tune import model
from flash_rocm.tuned import Outcome, TuneKey, TuningError
from flash_rocm.virtual import UnsupportedInstruction

if runtime.triton_interpret():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

KEY = TuneKey("gfx942", "forward", "bfloat16", 128, "causal", 4096, 1, False)
GFX942 = arch_named("gfx942")


def options_of(source: ConfigSource) -> dict[str, int]:
    return json.loads(source.kernels or "")["forward"]


@pytest.fixture
def compiles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_all(tasks: Sequence[workers.Task], jobs: int, deadline: float) -> list[workers.Result]:
        return [workers.Compiled(0)] * len(tasks)

    search = functools.partial(tuning.search, compile_all=compile_all)
    monkeypatch.setattr(backends, "load_tuner", lambda: SimpleNamespace(search=search))


@pytest.mark.usefixtures("compiles_at_once")
def test_the_best_of_the_model_wins() -> None:
    asked: list[dict[str, int]] = []

    def predict(kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource) -> float:
        asked.append(options_of(source))
        if asked[-1]["num_warps"] == 2:
            raise UnsupportedInstruction("v_strange_b32")
        return 1e-3 if asked[-1]["BLOCK_N"] == 64 else 2e-3

    lines: list[str] = []
    outcome = model.tune(KEY, GFX942, None, 60.0, lines.append, predict)
    assert outcome.options["BLOCK_N"] == 64 and outcome.options["num_warps"] != 2
    assert (outcome.seconds_before, outcome.seconds_after) == (2e-3, 1e-3)
    assert outcome.provenance.how == "model" and outcome.provenance.note == "MI300X, uncalibrated"
    assert outcome.provenance.date and outcome.provenance.compiler
    assert 2 <= len(asked) <= candidates.MAX_CANDIDATES
    assert any("left out" in line and "v_strange_b32" in line for line in lines)


@pytest.mark.usefixtures("compiles_at_once")
def test_a_budget_that_is_over_leaves_the_default() -> None:
    asked: list[ConfigSource] = []

    def predict(kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource) -> float:
        asked.append(source)
        return 1e-3

    lines: list[str] = []
    assert model.tune(KEY, GFX942, None, 0.0, lines.append, predict).gain == 1.0
    assert len(asked) == 1 and any("the time is over" in line for line in lines)


@pytest.mark.usefixtures("compiles_at_once")
def test_a_default_that_does_not_run() -> None:
    def predict(*arguments: Any) -> float:
        raise UnsupportedInstruction("v_strange_b32")

    with pytest.raises(TuningError, match="expected to measure the default config"):
        model.tune(KEY, GFX942, None, 60.0, lambda text: None, predict)


@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("mask", tuned.MASKS)
def test_the_launch_that_is_executed(mask: str, group: int) -> None:
    """Short, and of the same kind: it takes the same kernel."""
    key = dataclasses.replace(KEY, mask=mask, group=group)
    problem = tuning.problem_of(key)
    short = model.shortened(problem)
    assert tuning.tune_key("forward", dataclasses.replace(short, seqlen_q=4096, seqlen_k=4096), GFX942) == key
    assert short.seqlen_q == short.seqlen_k and 1 << 18 <= short.nheads * short.seqlen_q**2 <= 1 << 20
    for side in ("window_left", "window_right"):
        assert getattr(short, side) in (-1, 0, short.seqlen_q // 4)
    alone = dataclasses.replace(problem, seqlen_q=128, seqlen_k=128)
    assert model.shortened(alone).seqlen_q == 128


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (0, -1), (3, 2), (0, 0), (50, 1)])
def test_scores_that_a_window_leaves(left: int, right: int) -> None:
    seen = [
        (left < 0 or i - j <= left) and (right < 0 or j - i <= right) for i, j in itertools.product(range(9), repeat=2)
    ]
    assert visible_scores(9, left, right) == sum(seen)


# --------------------------------------------------------------------------------------------------
# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "gfx1151"], "--model: expected one of gfx90a, gfx942, gfx950, gfx1100, gfx1201, got 'gfx1151'"),
        (["--model", "sm90"], "--model: expected one of gfx90a"),
        (["--model", "gfx942", "--arch", "gfx942"], "--arch: expected none beside --model"),
        (["--model", "gfx942", "--kernel", "probs"], "--kernel: expected some of forward, backward_dq, backward_dkdv"),
    ],
)
def test_wrong_arguments(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--shapes", "quick", *arguments)
    assert status == 2 and not out and text in err


def test_kernels_over_a_cache_are_not_modelled(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--shapes", "decoding", "--model", "gfx942")
    assert status == 2 and not out and "--model: expected shapes without a cache" in err


def test_winners_become_a_config_file_and_are_not_taken_for_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "cache"))
    options = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2, "num_stages": 1}
    found_by = Provenance("model", "2026-11-25", "Triton 3.9", "MI300X, uncalibrated")
    keys: list[TuneKey] = []

    def tune(key: TuneKey, *arguments: Any) -> Outcome:
        keys.append(key)
        return Outcome(options, found_by, 2e-3, 1e-3)

    monkeypatch.setattr(model, "tune", tune)
    arguments = ("--model", "gfx942", "--shapes", "quick", "--kernel", "forward", "--write", str(tmp_path / "configs"))
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert f"{KEY}: 2.0000 ms -> 1.0000 ms (modelled), 2.00x: BLOCK_M=32" in out
    source = ConfigSource(folder=str(tmp_path / "configs"))
    facts = Facts("bfloat16", 128, 4096, causal=True, masked=True, varlen=False)
    entry = config.lookup("gfx942", "forward", facts, source)
    assert (entry.BLOCK_M, entry.num_warps, entry.provenance.how) == (32, 2, "model")
    assert tuned.find(str(tmp_path / "cache" / "tuning"), KEY) is None
    # A run that was interrupted goes on.
    assert len(keys) == 2
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and len(keys) == 2 and out.count("from the cache") == 2


@pytest.mark.virtual
@pytest.mark.parametrize("kernel", ["forward", "backward_dkdv"])
def test_really(
    kernel: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 2)
    monkeypatch.setattr(model, "_SCORES", 128 * 128)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "cache"))
    shapes = tmp_path / "shapes.yaml"
    shapes.write_text("- {headdim: 64, seqlen: 1024, mask: causal, group: 4, varlen: true}")
    # Nobody waits for the budget to pass; a smaller one would be over, on a busy machine, before anything is compiled.
    arguments = ("--model", "gfx942", "--shapes", str(shapes), "--kernel", kernel, "--budget", "3600")
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert f"{kernel}-bfloat16-d64-causal-s1024-gqa4-varlen" in out and "(modelled)" in out
    (path,) = (tmp_path / "cache" / "modelled").rglob("*.json")
    times = json.loads(path.read_text())["milliseconds"]
    assert 0 < times["after"] <= times["before"]
