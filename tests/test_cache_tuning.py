"""Autotuning of the kernels over a K/V cache: what is tried, what is measured, when; on a GPU really."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compile_keys import Recorded, disk_key, launch, offline, record  # noqa: F401
from flash_rocm._triton import cache_tuning, cached, candidates, plan, tuning
from test_tuning import ARCHS, CUDA, Fake, gfx942  # noqa: F401

from flash_rocm import backends, config, runtime, tuned, virtual_device
from flash_rocm.arch import arch_named
from flash_rocm.problem import AttentionProblem, CacheLayout
from flash_rocm.runtime import ConfigSource
from flash_rocm.testing import CacheCall, assert_cached_close, make_cache_inputs, make_problem
from flash_rocm.tune import write
from flash_rocm.tuned import BATCHES, CACHE_GROUPS, MASKS, PAGES, QUERIES, CacheTuneKey, Outcome, TuneKey

KERNELS = ("decode", "prefill", "mla")
KEY = CacheTuneKey("gfx942", "decode", "bfloat16", 128, "causal", 4096, 4, False, 1, 8, 16)
CALL: dict[str, Any] = dict(
    dtype=torch.bfloat16, cached=True, batch=5, seqlen_q=1, seqlen_k=4000, nheads=16, nheads_k=4, headdim=96
)
PROBLEM = make_problem(**CALL, window_right=0, page_size=48)
OUTCOME = Outcome(
    {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 1, "num_stages": 2},
    tuned.Provenance("measured", "2026-11-28", "Triton 3.9", "a GPU"),
    2e-3,
    1e-3,
)


def keys(kernel: str, arch: str = "gfx942") -> list[CacheTuneKey]:
    """Every key of a kernel of one dtype; calls of other buckets take another kernel."""
    found = []
    dims = {"decode": (64, 128, 576, 1024), "prefill": (128, 1024), "mla": (576, 1024)}[kernel]
    buckets = (MASKS, (128, 4096), CACHE_GROUPS, (False, True), QUERIES, BATCHES, PAGES)
    for headdim, (mask, seqlen, group, varlen, queries, batch, page) in itertools.product(
        dims, itertools.product(*buckets)
    ):
        rows = {1: 1, 16: 2, 1024: 17}[queries] * {1: 1, 4: 2, 8: 5, 16: 9, 128: 17}[group]
        is_decoded = rows <= plan.DECODE_ROWS
        if kernel == "mla" or is_decoded == (kernel == "decode"):
            found.append(
                CacheTuneKey(arch, kernel, "bfloat16", headdim, mask, seqlen, group, varlen, queries, batch, page)
            )
    return found


# --------------------------------------------------------------------------------------------------
# Candidates, and what is measured


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_candidates_hold_the_default_first_and_what_fits(arch: str, kernel: str) -> None:
    chip = arch_named(arch)
    key = keys(kernel, arch)[0]
    problem = cache_tuning.problem_of(key)
    default = plan.kernel_config(kernel, problem, chip)
    found = candidates.candidates(kernel, default, chip, key.headdim, 2)
    assert found[0] is default and 4 <= len(found) == len(set(found)) <= candidates.MAX_CANDIDATES
    space = candidates.space_of(kernel, chip)
    for entry in found[1:]:
        assert candidates.fits(kernel, entry, chip, key.headdim, 2)
        assert all(getattr(entry, name) in values for name, values in space.items())
        assert kernel != "decode" or entry.BLOCK_M == plan.DECODE_ROWS


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_no_shipped_config_is_pruned(arch: str, kernel: str) -> None:
    for headdim in (576,) if kernel == "mla" else (32, 64, 128, 256, 512):
        for page_size in (0, 16):
            key = dataclasses.replace(keys(kernel, arch)[0], headdim=headdim, page_size=page_size)
            default = plan.kernel_config(kernel, cache_tuning.problem_of(key), arch_named(arch))
            assert candidates.fits(kernel, default, arch_named(arch), headdim, 2), (headdim, page_size)


def test_mla_reads_one_tile_and_accumulates_its_values() -> None:
    entry = plan.kernel_config("mla", cache_tuning.problem_of(keys("mla", "sm80")[0]), arch_named("sm80"))
    entry = dataclasses.replace(entry, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3)
    assert candidates.registers_at_least("mla", entry, 576, 32) == 64 * (512 + 64) // 128
    assert candidates.lds_at_least("mla", entry, 576, 2, "nvidia") == 2 * 64 * 576 * 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_measured_problem_has_the_key_it_stands_for(kernel: str) -> None:
    found = keys(kernel)
    assert len(found) > 500
    for key in found:
        problem = tuning.problem_of(key)
        assert plan.tune_key(kernel, problem, arch_named("gfx942")) == key
        assert plan.kernels_of(problem) == (kernel,), key
        assert not backends.refusal_reasons("triton", problem, arch_named("gfx942")), key


def test_a_measured_cache_stays_small() -> None:
    key = dataclasses.replace(KEY, seqlen=32768, batch=64)
    problem = cache_tuning.problem_of(key)
    assert 2 * problem.batch * problem.seqlen_k * problem.nheads_k * problem.headdim * 2 <= 2 << 30
    assert cache_tuning.problem_of(KEY).nheads_k == 8


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201", "sm90"])
def test_what_is_measured_is_what_was_compiled(
    arch: str,
    kernel: str,
    page_size: int,
    varlen: bool,
    record: Callable[[str], Recorded],  # noqa: F811
) -> None:
    """The compiler processes fill Triton's cache with just the kernels that the launches look for."""
    recorded, chip = record(arch), arch_named(arch)
    group, headdim = (4, 64) if kernel != "mla" else (16, 576)
    queries = 1 if kernel != "prefill" else 16
    key = CacheTuneKey(arch, kernel, "bfloat16", headdim, "causal", 128, group, varlen, queries, 1, page_size)
    problem, launcher = tuning.problem_of(key), cached.ATTEND
    first, second = cache_tuning.inputs_of(problem, torch.device("cpu"), 2)
    assert first.k.data_ptr() != second.k.data_ptr() and first.q is second.q
    route = cached.route_with(ConfigSource(), problem, torch.device("cpu"), launcher)
    cached.attend_along(route, problem, first, cached.parts_of(problem, first))
    name, call = recorded[0]
    code, options = offline.source_of(kernel, problem, chip)
    assert name == "attend" and call.plan.kernel == kernel
    assert disk_key(name, call, chip) == offline.cache_key(code, chip, options)


# --------------------------------------------------------------------------------------------------
# At first use, with a made-up tuner


@pytest.fixture
def asked(gfx942: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> list[TuneKey]:  # noqa: F811
    """Keys that were tuned, by a tuner that gives OUTCOME; autotuning is on."""
    found: list[TuneKey] = []

    def tune(key: TuneKey, *args: Any) -> Outcome:
        found.append(key)
        return OUTCOME

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setattr(cached, "_routes", {})
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    return found


def route(problem: AttentionProblem = PROBLEM) -> cached.Route:
    """The route of a call on a GPU that is not there."""
    inputs: Any = SimpleNamespace(layout=CacheLayout(problem), q=SimpleNamespace(device=CUDA, is_cuda=True))
    return cached._route_of(problem, inputs, False, False, runtime.config_source())


def test_a_call_is_tuned_once_and_takes_the_winner(asked: list[TuneKey]) -> None:
    first = route()
    assert first.plan.config.BLOCK_N == 128 and asked == [KEY]
    assert route() is first
    # Another length, batch and page size of the same buckets.
    assert route(dataclasses.replace(PROBLEM, seqlen_k=3000, batch=8, page_size=16)).plan.config.BLOCK_N == 128
    assert asked == [KEY]
    for changes in ({"batch": 9}, {"page_size": 0}, {"seqlen_q": 2}, {"window_right": -1}, {"seqlen_k": 5000}):
        before = len(asked)
        route(dataclasses.replace(PROBLEM, **changes))
        assert len(asked) == before + 1, changes
    assert len(set(asked)) == len(asked)


def test_the_number_of_splits_is_that_of_the_tuned_call(asked: list[TuneKey]) -> None:
    """What asks for it first, as ``get_scheduler_metadata`` does, may not settle the call on the default."""
    splits = cached.splits_of(PROBLEM, CUDA)
    assert asked == [KEY]
    found = route()
    assert (found.num_splits, found.plan.config.BLOCK_N) == (splits, 128) and asked == [KEY]


def test_not_during_graph_capture(asked: list[TuneKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    default = plan.kernel_config("decode", PROBLEM, arch_named("gfx942"))
    assert route().plan.config == default and not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert route().plan.config.BLOCK_N == 128 and asked == [KEY]


def test_nothing_is_tuned_unless_asked_for(asked: list[TuneKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASH_ROCM_AUTOTUNE")
    default = plan.kernel_config("decode", PROBLEM, arch_named("gfx942"))
    assert route().plan.config == default
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"decode": {"BLOCK_N": 64}}')
    assert route().plan.config.BLOCK_N == 64
    assert not asked


def test_the_gluon_kernel_is_not_tuned(asked: list[TuneKey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_device, "arch_of", lambda device: arch_named("sm90"))
    problem = make_problem(**CALL | dict(nheads=16, nheads_k=1, headdim=64, headdim_v=512), qv=True)
    inputs: Any = SimpleNamespace(layout=CacheLayout(problem), q=SimpleNamespace(device=CUDA, is_cuda=True))
    found = cached._route_of(problem, inputs, True, True, runtime.config_source())
    assert found.plan.implementation == "gluon" and not asked
    other = cached._route_of(problem, inputs, True, False, runtime.config_source())
    assert other.plan.implementation == "triton" and [key.kernel for key in asked] == ["mla"]


def test_the_search_starts_from_the_shipped_config(gfx942: None) -> None:  # noqa: F811
    default = plan.kernel_config("decode", tuning.problem_of(KEY), arch_named("gfx942"))
    fake = Fake({default.num_warps: 2e-3, 1: 1e-3}, kernel="decode")
    with_fake = {"compile_all": fake.compile_all, "measure": fake.measure}
    lines: list[str] = []
    outcome = tuning.tune(KEY, CUDA, None, 60.0, lines.append, **with_fake)  # type: ignore[arg-type]
    assert fake.compiled[0] == fake.measured[0] == default.options()
    assert outcome.options["num_warps"] == 1 and outcome.gain == 2.0
    assert "tuning decode-bfloat16-d128-causal-s4096-gqa4-dense-q1-b8-page16 on gfx942" in lines[0]


# --------------------------------------------------------------------------------------------------
# Kept


def test_keys_are_stored_apart_and_read_back(tmp_path: pathlib.Path) -> None:
    tuned.find.cache_clear()
    for key in (KEY, dataclasses.replace(KEY, batch=64)):
        tuned.write(tuned.path_of(str(tmp_path), key), key, OUTCOME)
    assert len(list(tmp_path.rglob("decode-bfloat16-d128-causal-s4096-gqa4-dense-q1-b*-page16.json"))) == 2
    found = tuned.find(str(tmp_path), KEY)
    assert found is not None and found.BLOCK_N == 128
    assert tuned.find(str(tmp_path), dataclasses.replace(KEY, page_size=0)) is None


@pytest.mark.parametrize("page_size", PAGES)
def test_rules_take_the_pages_of_their_key_and_no_others(page_size: int, tmp_path: pathlib.Path) -> None:
    write.write(tmp_path, "gfx942", [(dataclasses.replace(KEY, page_size=page_size), OUTCOME)])
    source = ConfigSource(folder=str(tmp_path))
    for size in (0, 1, 15, 16, 48, 63, 64, 128, 255, 256, 4096):
        problem = dataclasses.replace(PROBLEM, page_size=size)
        found = config.lookup("gfx942", "decode", plan.facts_of(problem), source)
        assert (found.BLOCK_N == 128) == (plan.tune_key("decode", problem, arch_named("gfx942")).page_size == page_size)  # type: ignore[attr-defined]


def test_of_keys_with_one_rule_the_largest_batch_is_written() -> None:
    large = dataclasses.replace(KEY, batch=64)
    others = [dataclasses.replace(large, group=8), dataclasses.replace(large, queries=16)]
    outcomes = [(key, OUTCOME) for key in (KEY, *others, large)]
    chosen, left_out = write.one_for_each_rule(outcomes)
    assert [key for key, _ in chosen] == [large] and set(left_out) == {KEY, *others}
    assert write.left_out_by(KEY) == "queries, batches and grouped heads"
    assert "gqa4, 1 queries of each of 64" in write.entry_of(large, OUTCOME)["provenance"]["note"]


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture
def tunes_little(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(tuning, "_tried", set())
    monkeypatch.setattr(tuning, "BUDGET", 40.0)
    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 5)
    monkeypatch.setattr(cached, "_routes", {})
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    tuned.find.cache_clear()


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "fields",
    [
        dict(page_size=16, window_right=0),
        dict(seqlen_q=40, headdim=64),
        dict(
            nheads=16, nheads_k=1, headdim=64, headdim_v=512, qv=True, page_size=64, softcap=9.0
        ),  # on sm90 not Gluon's
        dict(varlen=True, seqlen_q=30, page_size=16, window_right=0),
    ],
    ids=["decode-paged", "prefill", "mla", "prefill-varlen-paged"],
)
def test_a_call_tunes_and_is_right(fields: dict[str, Any], tunes_little: None, tmp_path: pathlib.Path) -> None:
    problem = make_problem(**CALL | dict(dtype=torch.float16, device_type="cuda", seqlen_k=300) | fields)
    case = make_cache_inputs(problem, CacheCall())
    state = torch.cuda.get_rng_state()
    out, lse = cached.attend(problem, case.inputs)
    assert torch.equal(torch.cuda.get_rng_state(), state), "tuning may not change what the caller draws next"
    assert_cached_close(problem, case, out, lse, case.inputs.k, case.inputs.v)
    (path,) = tmp_path.glob("tuning/*/*/*.json")
    key = plan.tune_key(*plan.kernels_of(problem), problem, virtual_device.arch_of(CUDA))
    outcome = tuned.read(path, key)
    assert path.name == f"{key}.json" and outcome is not None and outcome.gain >= 1.0


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_the_losers_are_given_back(tunes_little: None) -> None:
    problem = cache_tuning.problem_of(dataclasses.replace(KEY, arch=virtual_device.arch_of(CUDA).name, seqlen=1024))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    assert None not in tuning.measure(CUDA, "decode", problem, [ConfigSource()], float("inf"))
    assert torch.cuda.memory_allocated() == before


_RANK = """
import torch, flash_rocm
from flash_rocm._triton import candidates, tuning
candidates.MAX_CANDIDATES, tuning.BUDGET = 4, 60.0
q = torch.randn(3, 1, 8, 64, device="cuda", dtype=torch.float16)
k, v = (torch.randn(3, 90, 2, 64, device="cuda", dtype=torch.float16) for _ in "kv")
flash_rocm.flash_attn_with_kvcache(q, k, v, causal=True)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_eight_processes_at_once_store_one_file(tmp_path: pathlib.Path) -> None:
    environment = runtime.subprocess_environment(FLASH_ROCM_CACHE_DIR=str(tmp_path), FLASH_ROCM_AUTOTUNE="1")
    start = functools.partial(subprocess.Popen, env=environment, stdout=-1, stderr=-1, text=True)
    ranks = [start([sys.executable, "-c", _RANK]) for _ in range(8)]
    results = [rank.communicate(timeout=500) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8, results
    name = "decode-float16-d64-causal-s128-gqa4-dense-q1-b8-page0"
    assert sum(f"tuning {name}" in err for _, err in results) == 1, results
    (path,) = tmp_path.glob("tuning/*/*/*.json")
    assert path.name == f"{name}.json"
    assert not list(tmp_path.glob("tuning/**/*.tmp")) and not list(tmp_path.glob("tuning/**/*.corrupt"))
