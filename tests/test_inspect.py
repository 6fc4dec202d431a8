"""``flash-rocm inspect``: limits, differences, cache, its command and foreign code objects."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
from typing import Any

import pytest
from foreign import NO_AITER, aiter_root

from flash_rocm import backends, cli, config, runtime
from flash_rocm.amdgpu.assembly import parse_amdgcn
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import ConfigError, Limits
from flash_rocm.inspect import InspectError, counts, inspect_problem, judge, kernels, objects, tables
from flash_rocm.inspect import cli as inspect_cli
from flash_rocm.inspect.counts import Mix
from flash_rocm.inspect.report import Case, LoopReport, Report, Resources

BF16_D128 = ("bf16", 128, "causal")


def triton_needed() -> None:
    pytest.importorskip("triton", reason="compiles Triton kernels")
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder that inspect keeps its reports in."""
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "cache"))
    config._overrides.cache_clear()
    runtime.warn_once.cache_clear()
    return tmp_path / "cache" / "inspect"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["inspect", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --------------------------------------------------------------------------------------------------
# Limits and differences


UNLIMITED = Limits()


def made(limits: Limits = UNLIMITED, arch: str = "gfx942", r: float = 0.9, **changes: Any) -> Report:
    loop = LoopReport(Mix(), R=r, Ru=1.0, serial=0.5, overlapped=0.9, N=300.0)
    resources = Resources(vgprs=128, lds_bytes=32768, **changes.pop("resources", {}))
    fields = {
        "waves_per_simd": 2,
        "full": loop,
        "options": {"BLOCK_M": 64},
        "config": "gfx942.json triton[0]",
    } | changes
    return Report(Case(arch, "forward", *BF16_D128), resources, limits=limits, **fields)


@pytest.mark.parametrize(
    ("report_", "text"),
    [
        (made(resources={"vgpr_spills": 3}), "3 VGPR spills, expected at most 0"),
        (made(Limits(vgpr_spills=2), resources={"vgpr_spills": 3}), "3 VGPR spills, expected at most 2"),
        (made(loop_scratch=1), "1 scratch instructions in loops, expected at most 0"),
        (made(Limits(waves_per_simd=3)), "2 waves per SIMD, expected at least 3"),
        (made(Limits(R=0.85)), "R 0.9000, expected at most 0.85"),
        (made(Limits(R=0.85), full=None), "no R, expected at most 0.85"),
    ],
)
def test_violations(report_: Report, text: str) -> None:
    (line,) = judge.violations([report_, made()])
    assert line == f"gfx942 forward bf16 128 causal (gfx942.json triton[0]): {text}"


def test_limits_for_the_oldest_compiler() -> None:
    """R and waves follow from what one version of the compiler makes of an entry, spills have a limit of their own."""
    limits = Limits(vgpr_spills=9, loop_scratch=9, waves_per_simd=3, R=0.85, oldest_spills=2)
    slow = made(limits, resources={"vgpr_spills": 3}, loop_scratch=4)
    of_now, of_the_oldest = ([x.split("): ")[1] for x in judge.violations([slow], check)] for check in judge.CHECKS)
    assert of_now == ["2 waves per SIMD, expected at least 3", "R 0.9000, expected at most 0.85"]
    assert of_the_oldest == [
        "3 VGPR spills, expected at most 2",
        "4 scratch instructions in loops, expected at most 2",
    ]
    assert not list(judge.violations([made(limits, resources={"vgpr_spills": 2}, loop_scratch=2)], "oldest"))


def test_more_lds_than_the_chip_has() -> None:
    large = dataclasses.replace(made(), resources=Resources(128, lds_bytes=65537), waves_per_simd=0)
    assert [x.split("): ")[1] for x in judge.violations([large])] == ["65537 bytes of LDS, expected at most 65536"]
    moved = dataclasses.replace(large, case=dataclasses.replace(large.case, arch="gfx950"), waves_per_simd=2)
    assert not list(judge.violations([moved]))
    nvidia = dataclasses.replace(moved, case=dataclasses.replace(large.case, arch="sm80"), waves_per_simd=None)
    assert not list(judge.violations([nvidia]))
    nvidia = dataclasses.replace(nvidia, resources=Resources(128, lds_bytes=(163 << 10) + 1))
    assert len(list(judge.violations([nvidia]))) == 1


def test_what_an_entry_declares_passes() -> None:
    limits = Limits(vgpr_spills=3, loop_scratch=1, waves_per_simd=2, R=0.9)
    assert not list(judge.violations([made(limits, resources={"vgpr_spills": 3}, loop_scratch=1)]))


def test_differences() -> None:
    assert not list(judge.differences([made()], [made()]))
    other = made(r=0.8, resources={"vgpr_spills": 3}, options={"BLOCK_M": 128})
    (line,) = judge.differences([made()], [other])
    assert line == "gfx942 forward bf16 128 causal: spills 0 -> 3, R 0.900 -> 0.800, BLOCK_M 64 -> 128"
    assert list(judge.differences([made()], [made(arch="gfx950")])) == [
        "gfx950 forward bf16 128 causal: new",
        "gfx942 forward bf16 128 causal: not inspected now",
    ]


def test_ru_of_a_backward_call_is_the_sum() -> None:
    kernels = [
        dataclasses.replace(made(), case=Case("gfx942", kernel, *BF16_D128))
        for kernel in ("backward_dq", "backward_dkdv")
    ]
    assert judge.call_ru(kernels) == {("gfx942", *BF16_D128): (2.0, None)}
    assert judge.call_ru(kernels[:1]) == {}


def test_reports_survive_json(tmp_path: pathlib.Path) -> None:
    reports = [made(Limits(R=0.5), masked=made().full), made(arch="gfx950", full=None)]
    path = tmp_path / "old.json"
    path.write_text(tables.as_json(reports))
    assert tables.read_json(path) == reports


# --------------------------------------------------------------------------------------------------
# Compiled kernels


def test_inspect_problem_and_its_cache(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_needed()
    found = inspect_problem("gfx942", "forward", *BF16_D128)
    assert found.full is not None and found.masked is not None and found.full.R is not None
    assert found.full.mix.matrix and found.full.mix.trans and found.masked.mix.compares > found.full.mix.compares
    assert found.resources.code_bytes > 1000 and found.compiler.startswith("Triton ")
    assert len(list(cache.iterdir())) == 1

    def refuse() -> Any:
        raise RuntimeError("nothing may be compiled")

    monkeypatch.setattr(backends, "load_offline", refuse)
    assert inspect_problem("gfx942", "forward", *BF16_D128) == found
    for other in (
        ("gfx950", "forward", *BF16_D128),
        ("gfx942", "probs", *BF16_D128),
        ("gfx942", "forward", "fp16", 128, "full"),
    ):
        with pytest.raises(InspectError, match="nothing may be compiled"):
            inspect_problem(*other)
    with pytest.raises(InspectError, match="nothing may be compiled"):
        inspect_problem("gfx942", "forward", *BF16_D128, {"waves_per_eu": 2})


def test_a_cached_report_has_the_limits_of_now(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_needed()
    found = inspect_problem("gfx942", "forward", *BF16_D128)
    entry = {
        "kernel": "forward",
        "options": found.options,
        "limits": {"R": 0.01},
        "provenance": {"how": "first choice"},
    }
    (tmp_path / "gfx942.json").write_text(json.dumps({"arch": "gfx942", "triton": [entry]}))
    monkeypatch.setenv("FLASH_ROCM_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(backends, "load_offline", None)
    again = inspect_problem("gfx942", "forward", *BF16_D128)
    assert again.limits == Limits(R=0.01) and again.config == f"{tmp_path}/gfx942.json triton[0]"
    assert again.full == found.full


@pytest.mark.parametrize("written", ["", "[]", '{"case": {}}'])
def test_a_broken_cache_file_is_replaced(written: str, cache: pathlib.Path) -> None:
    triton_needed()
    found = inspect_problem("gfx942", "probs", *BF16_D128)
    (path,) = cache.iterdir()
    path.write_text(written)
    with pytest.warns(UserWarning, match="expected a report of inspect, compiling again"):
        assert inspect_problem("gfx942", "probs", *BF16_D128) == found
    assert json.loads(path.read_text())["case"]["kernel"] == "probs"


def test_a_cache_that_cannot_be_written(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_needed()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="FLASH_ROCM_CACHE_DIR: .* expected a folder to write to"):
        inspect_problem("gfx942", "probs", *BF16_D128)


def test_a_full_disk_keeps_no_part_of_a_report(cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="expected a folder to write to, nothing kept: .*No space left"):
        kernels._store(cache / "report.json", made())
    assert not list(cache.iterdir())


def test_a_report_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    report = made()
    kernels._store(kernels._cache_path(report.case, None), report)
    assert kernels.cached_report(report.case, None) is not None

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, "denied")  # root may read everything

    config.arch_configs("gfx942")  # read before reading is refused
    monkeypatch.setattr(pathlib.Path, "read_text", refuse)
    with pytest.warns(UserWarning, match="expected a report of inspect, compiling again: .*denied"):
        assert kernels.cached_report(report.case, None) is None


def test_waves_follow_from_the_registers_that_are_asked_for() -> None:
    # With a maximum of one wave LLVM asks for more registers than the code names.
    triton_needed()
    plain, one_wave = (
        inspect_problem("gfx942", "forward", "bf16", 128, "full", {"waves_per_eu": waves}) for waves in (0, 1)
    )
    assert plain.resources.vgprs <= 256 and plain.waves_per_simd == 2
    assert one_wave.resources.vgprs + one_wave.resources.agprs > 256 and one_wave.waves_per_simd == 1


def test_nvidia_registers() -> None:
    triton_needed()
    found = inspect_problem("sm80", "probs", "fp16", 64, "full")
    assert 16 < found.resources.vgprs <= 255 and found.resources.lds_bytes > 0
    assert found.full is None and found.waves_per_simd is None


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_two_workgroups_of_the_forward_fit_a_multiprocessor(mask: str) -> None:
    """sm90, Triton's, head dims to 64: 256 threads may hold 128 of 65536 registers each; with more it is slower."""
    triton_needed()
    # At 64 itself plain calls take the Gluon kernel; 32 has the same config.
    assert inspect_problem("sm90", "forward", "bf16", 32, mask).resources.vgprs <= 128


def test_the_entry_is_that_of_the_kernel_that_is_compiled() -> None:
    """On sm90 head dim 128 has the Gluon kernels, with limits of their own; 96 has Triton's, as backward 64 does."""
    triton_needed()
    assert kernels._entry_of(Case("sm90", "forward", "bf16", 128, "full"), None).implementation == "gluon"
    assert kernels._entry_of(Case("sm90", "forward", "bf16", 96, "full"), None).implementation == "triton"
    assert kernels._entry_of(Case("sm90", "backward_dq", "bf16", 128, "full"), None).implementation == "gluon"
    assert kernels._entry_of(Case("sm90", "backward_dq", "bf16", 64, "full"), None).implementation == "triton"


def _selected(*arguments: str) -> set[tuple[str, int, str]]:
    parser = argparse.ArgumentParser()
    inspect_cli.add_arguments(parser)
    cases = inspect_cli.cases_of(parser.parse_args(["--arch", "gfx942", "--dtype", "bf16", *arguments]))
    return {(case.kernel, case.headdim, case.mask) for case in cases}


def test_kernels_over_a_cache_are_inspected_at_few_head_dims_unless_named() -> None:
    found = _selected()
    shipped = {(kernel, headdim, "causal") for kernel, some in kernels.SHIPPED_CACHED.items() for headdim in some}
    assert {case for case in found if case[0] in kernels.CACHE_KERNELS} == shipped and len(shipped) == 7
    assert len(found - shipped) == len(kernels.TRAINING_KERNELS) * len(kernels.HEADDIMS) * len(kernels.MASKS)
    assert _selected("--headdim", "96", "--mask", "causal") == {(x, 96, "causal") for x in kernels.TRAINING_KERNELS}
    assert _selected("--kernel", "decode", "--headdim", "96", "--mask", "full") == {("decode", 96, "full")}
    assert found < _selected("--kernel", "all")
    named = _selected("--kernel", "decode,mla")
    assert {case for case in named if case[0] == "mla"} == {("mla", 576, mask) for mask in kernels.MASKS}
    assert len(named) == (len(kernels.HEADDIMS) + 1) * len(kernels.MASKS)


def test_what_is_inspected_over_a_cache() -> None:
    triton_needed()
    planner = backends.load_planner()
    for kernel in kernels.CACHE_KERNELS:
        for headdim in kernels.headdims_of(kernel):
            problem = kernels.problem_of(Case("gfx942", kernel, "bf16", headdim, "causal"))
            assert problem.cached and problem.page_size == 16 and problem.causal
            v_is_k2 = problem.headdim_v != problem.headdim
            assert planner.cache_kernel(problem, v_is_k2) == kernel, "the config is that of a call"
            assert kernels.problem_of(Case("gfx942", kernel, "bf16", headdim, "full")).page_size == 0
    found = inspect_problem("gfx942", "decode", *BF16_D128)
    assert found.full is not None and found.masked is not None and found.full.mix.matrix and found.full.mix.trans
    assert found.full.mix.vmem >= 8 and found.resources.vgpr_spills == 0
    # A tile of 16 rows by BLOCK_N keys: 2 * (128 + 128) flop a score, more where waves repeat the second product.
    scores = found.options["BLOCK_M"] * found.options["BLOCK_N"] / found.options["num_warps"]
    assert found.full.mix.matrix_flop >= scores * 512


def test_a_bad_config_fails_the_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are too large: registers spill, inside loops too, and LDS is over the limit."""
    triton_needed()
    options = ("--arch", "gfx942", "--kernel", "forward", "--dtype", "bf16", "--mask", "full")
    status, out, _ = run(capsys, *options, "--headdim", "128", "--check")
    assert status == 0 and "forward  bf16   128  full" in out
    options = (*options, "--headdim", "512")
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}}')
    status, _, err = run(capsys, *options, "--check")
    lines = [
        line for line in err.splitlines() if line.startswith("check: gfx942 forward bf16 512 full (FLASH_ROCM_KER")
    ]
    assert status == 1
    for text in (
        "VGPR spills, expected at most 0",
        "scratch instructions in loops",
        "bytes of LDS, expected at most 65536",
    ):
        assert sum(text in line for line in lines) == 1, text
    status, _, _ = run(capsys, *options)
    assert status == 0


def test_a_bad_config_of_a_kernel_over_a_cache_fails_the_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RDNA has no room for q at head dim 256: the entry's BLOCK_K is what keeps registers from spilling."""
    triton_needed()
    options = ("--arch", "gfx1100", "--kernel", "decode", "--dtype", "bf16", "--headdim", "256", "--mask", "causal")
    status, out, err = run(capsys, *options, "--check")
    assert status == 0 and "decode  bf16   256  causal" in out, err
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"decode": {"BLOCK_K": 0}}')
    status, _, err = run(capsys, *options, "--check")
    assert status == 1 and "VGPR spills, expected at most 0" in err


def test_several_processes_and_a_diff(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    triton_needed()
    options = ("--arch", "gfx942", "--kernel", "probs", "--dtype", "fp16", "--headdim", "32", "--jobs", "2")
    old = tmp_path / "old.json"
    status, out, _ = run(capsys, *options, "--format", "json", "--output", str(old))
    assert (status, out) == (0, "")
    contents = json.loads(old.read_text())
    assert [entry["case"]["mask"] for entry in contents["reports"]] == ["full", "causal"]
    status, out, _ = run(capsys, *options, "--diff", str(old))
    assert status == 0 and out.endswith("no difference\n")
    contents["reports"][0]["resources"]["vgprs"] = 1
    old.write_text(json.dumps(contents))
    status, out, _ = run(capsys, *options, "--diff", str(old))
    assert status == 0 and "gfx942 probs fp16 32 full: VGPR 1 -> " in out


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942"])
def test_scratch_is_what_llvm_calls_a_spill(arch: str) -> None:
    """Every access to private memory that LLVM annotates is found, and nothing else in a program that only spills."""
    triton_needed()
    from flash_rocm._triton.offline import listing

    from flash_rocm.inspect.kernels import problem_of, source_with

    case = Case(arch, "probs", "fp16", 512, "full")
    source = source_with("probs", {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 1})
    text, _ = listing(case.kernel, problem_of(case), arch_named(arch), source)
    annotated = re.findall(r"^\s+(?:scratch|buffer)_.*; \d+-byte Folded (?:Spill|Reload)", text, re.MULTILINE)
    found = [x for x in parse_amdgcn(text).instructions if counts.is_scratch(x, arch)]
    assert len(annotated) > 10
    assert len(found) >= len(annotated)
    assert not [x for x in found if "offen" in x.modifiers]


WRONG = {
    "no arch": ([], "--arch"),
    "unknown arch": (["--arch", "gfx906"], "arch: expected sm... or one of gfx90a, gfx942"),
    "no arch name": (["--arch", "mi300x"], "arch: expected cpu, gfx... or sm..., got 'mi300x'"),
    "kernel": (
        ["--arch", "gfx942", "--kernel", "combine"],
        "kernel: expected one of forward, backward_dq, backward_dkdv",
    ),
    "dtype": (["--arch", "gfx942", "--dtype", "fp64"], "dtype: expected one of fp16, bf16, fp32, got 'fp64'"),
    "mask": (["--arch", "gfx942", "--mask", "window"], "mask: expected one of full, causal, got 'window'"),
    "headdim": (["--arch", "gfx942", "--headdim", "1024"], "headdim: expected 1 to 512, got 1024"),
    "headdim over a cache": (
        ["--arch", "gfx942", "--kernel", "decode", "--headdim", "576"],
        "headdim: expected 1 to 512, got 576",
    ),
    "headdim of mla": (
        ["--arch", "gfx942", "--kernel", "mla", "--headdim", "64"],
        "headdim: expected 576 for mla, got 64",
    ),
    "headdims": (["--arch", "gfx942", "--headdim", "a"], "--headdim: expected numbers with commas between, got 'a'"),
    "jobs": (["--arch", "gfx942", "--jobs", "0"], "--jobs: expected a number >= 1, got '0'"),
    "check": (["--arch", "gfx942", "--check", "R"], "--check: invalid choice: 'R'"),
    "diff": (["--arch", "gfx942", "--diff", "/no.json"], "/no.json: expected a readable file"),
    "object": (["--arch", "gfx942", "--object", "/no.co"], "--object: expected a file, got '/no.co'"),
    "archs": (
        ["--arch", "amd", "--object", "/no.co"],
        "--arch: expected one value beside --object, got gfx90a, gfx942",
    ),
}


@pytest.mark.parametrize(("arguments", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert text in err and err.startswith("flash-rocm inspect: ") and err.count("\n") == 1


def test_a_diff_with_something_else(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "old.json"
    for written, text in (
        ("{", "expected JSON"),
        ("[]", "expected what inspect"),
        ('{"format": 0}', "expected format 2, got 0"),
    ):
        path.write_text(written)
        status, _, err = run(capsys, "--arch", "gfx942", "--diff", str(path))
        assert status == 2 and text in err and str(path) in err


def test_wrong_overrides_name_the_option() -> None:
    with pytest.raises(ConfigError, match="forward.BLOCK_M: expected one of 16, 32"):
        inspect_problem("gfx942", "forward", *BF16_D128, {"BLOCK_M": 17})


# --------------------------------------------------------------------------------------------------
# Foreign code objects


def objdump_needed() -> None:
    try:
        objects.find_objdump()
    except InspectError as error:
        pytest.skip(str(error))


def test_no_disassembler(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(InspectError, match="need llvm-objdump of LLVM 22 or newer .* none found. Hint: apt-get"):
        objects.find_objdump()
    old = tmp_path / "llvm-objdump"
    old.write_text("#!/bin/sh\necho 'Debian LLVM version 14.0.6'\n")
    old.chmod(0o755)
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: str(old) if name == "llvm-objdump" and not path else None
    )
    with pytest.raises(InspectError, match=f"{old} is LLVM 14"):
        objects.find_objdump()


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100", "gfx1201"])
def test_a_disassembled_kernel_counts_as_its_assembly(arch: str, tmp_path: pathlib.Path) -> None:
    triton_needed()
    objdump_needed()
    from flash_rocm._triton.offline import compile_kernel

    from flash_rocm.inspect.kernels import problem_of

    case = Case(arch, "forward", *BF16_D128)
    compiled = compile_kernel(case.kernel, problem_of(case), arch_named(arch))
    path = tmp_path / "kernel.co"
    path.write_bytes(compiled.asm["hsaco"])
    (disassembled,) = objects.inspect_object(path, arch, case.kernel, case.headdim)
    assembled = inspect_problem(arch, case.kernel, *BF16_D128)
    assert disassembled.full is not None and assembled.full is not None
    assert disassembled.full.mix == assembled.full.mix
    assert disassembled.masked is not None and assembled.masked is not None
    assert disassembled.masked.mix == assembled.masked.mix
    assert disassembled.loop_scratch == assembled.loop_scratch


def test_a_file_that_is_no_code_object(tmp_path: pathlib.Path) -> None:
    objdump_needed()
    path = tmp_path / "kernel.co"
    path.write_bytes(b"nothing")
    with pytest.raises(InspectError, match="llvm-objdump.* failed: "):
        objects.inspect_object(path, "gfx942", "forward", 128)


#: File of amd-aiter 0.1.7.post2.dev18, R or Ru of full and of masked ways, serial share.
FWD = "gfx942/fmha_v3_fwd/MI300/fwd_hd128_bf16"
FOREIGN = [
    (f"{FWD}_rtne.co", "forward", "1.03", "1.16", "0.45", (64, 392, 34, 34, 54, 16)),
    (f"{FWD}_rtna.co", "forward", "0.94", "1.07", "0.47", (64, 344, 34, 34, 54, 16)),
    (f"{FWD}_rtz.co", "forward", "0.75", "0.88", "0.51", (64, 248, 34, 34, 54, 16)),
    (f"{FWD}_causal_rtne.co", "forward", "1.03", "1.29", "0.45", (64, 392, 34, 34, 54, 16)),
    (f"{FWD}_causal_rtz.co", "forward", "0.75", "1.01", "0.51", (64, 248, 34, 34, 54, 16)),
    ("gfx950/fmha_v3_fwd/fwd_hd128_bf16.co", "forward", "1.11", "1.36", "0.42", (64, 304, 66, 36, 96, 8)),
    ("gfx942/fmha_v3_bwd/bwd_hd128_bf16_a32_rtne.co", "backward_dq", "0.50", "0.51", "0.60", None),
    ("gfx942/fmha_v3_bwd/bwd_hd128_bf16_a32_rtz.co", "backward_dq", "0.27", "0.29", "0.69", None),
]


@pytest.mark.parametrize(("name", "kernel", "full", "masked", "serial", "mix"), FOREIGN, ids=lambda value: str(value))
def test_figures_of_assembled_kernels(
    name: str, kernel: str, full: str, masked: str, serial: str, mix: tuple[int, ...] | None
) -> None:
    root = aiter_root()
    if root is None:
        pytest.skip(NO_AITER)
    objdump_needed()
    (found,) = objects.inspect_object(root / name, name.split("/")[0], kernel, 128)
    assert found.full is not None and found.masked is not None
    assert (f"{found.full.Ru:.2f}", f"{found.masked.R:.2f}", f"{found.full.serial:.2f}") == (full, masked, serial)
    assert found.waves_per_simd == (2 if kernel == "forward" else 1)
    counted = found.full.mix
    if mix:
        assert (counted.matrix, counted.valu, counted.trans, counted.salu, counted.lds, counted.vmem) == mix
        assert (found.resources.vgprs, found.resources.agprs) == (160, 96)
