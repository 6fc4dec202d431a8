"""What the ck back end says where torch, HIP, memory, configs or chips are not as expected; what a build compiles."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

import pytest
import torch
from ck_compiler import made, pretend, program
from ck_library import ARCHS, library_of_tests
from config_files import write
from flash_rocm._ck import backend, build, build_cuda, cached, generate, library

from flash_rocm import backends, ck_instances, cli, config, files, runtime
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import ConfigError
from flash_rocm.runtime import BuildRequest
from flash_rocm.testing import make_problem

#: Of a Composable Kernel that is not there, so that a build that goes on does not go far.
REQUEST = BuildRequest(("gfx942",), "forward_bf16_*", "/nowhere", "", "1")
GFX942 = arch_named("gfx942")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ck_instances.look_again()
    backends._decide.cache_clear()


# --------------------------------------------------------------------------------------------------
# torch and HIP


@pytest.mark.parametrize("version", ["2.9.1+rocm6.4", "1.13.0"])
def test_torch_too_old(version: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For both builds, for compiling at first use, and for a library that is there."""
    monkeypatch.setattr(torch, "__version__", version)
    words = re.escape(
        f"torch: expected 2.10 or newer, whose stable ABI C++ libraries are compiled for, got {version}. Hint"
    )
    for builder in (build, build_cuda):
        with pytest.raises(build.BuildError, match=words):
            builder.build(
                REQUEST._replace(archs=("gfx942" if builder is build else "sm90",)), tmp_path, tmp_path / "out"
            )
    assert not (tmp_path / "out").exists()
    with pytest.raises(library.LibraryError, match=f"_C.so: {words}"):
        files.load_operators(tmp_path / "_C.so", library.LibraryError)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0a0+git1234", "3.0.0"])
def test_torch_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert files.torch_too_old() == ""


def test_torch_without_headers(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    with pytest.raises(
        build.BuildError, match="torch: expected its headers in .*torch/include, .*found none. Hint: pip"
    ):
        build.find_toolchain(REQUEST, tmp_path)


class Hip:
    """Answers as libamdhip64.so does."""

    def __init__(self, number: int, status: int = 0) -> None:
        self.number, self.status = number, status

    def hipRuntimeGetVersion(self, result: Any) -> int:
        result._obj.value = self.number
        return self.status


@pytest.mark.parametrize(
    ("torchs", "hip", "found"),
    [
        ("7.1.25424-4179531dcd", Hip(60_443_483), "6.4"),  # another major version than torch's
        ("6.4.43483", Hip(70_125_424), "7.1"),
        ("6.2.41133", Hip(60_241_133), "6.2"),  # too old, both
        ("7.1.25424", Hip(0, 3), "an error, 3"),
    ],
)
def test_another_hip_than_torchs(torchs: str, hip: Hip, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", torchs)
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name, mode: hip)
    words = (
        f"expected HIP 6.4 or newer, and of one major version with that of torch .*, {torchs}; found {found}. Hint: LD"
    )
    with pytest.raises(library.LibraryError, match=words):
        library._load_hip(pathlib.Path("/nowhere"))


@pytest.mark.parametrize(("torchs", "number"), [("7.1.25424", 70_051_831), ("6.4.43483", 60_443_483)])
def test_hip_of_torchs_major_version(torchs: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", torchs)
    tried: list[str] = []

    def load(name: str, mode: int) -> Hip:
        tried.append(name)
        if len(tried) < 3:
            raise OSError("neither loaded nor beside torch")
        return Hip(number if len(tried) == 4 else 1)  # another ROCm's is found first

    monkeypatch.setattr(library.ctypes, "CDLL", load)
    library._load_hip(pathlib.Path("/nowhere"))
    beside = str(pathlib.Path(torch.__file__).parent / "lib/libamdhip64.so")
    assert tried == [f"libamdhip64.so.{torchs[0]}", beside, "libamdhip64.so", "libamdhip64.so.7"]


def test_no_hip_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, mode: int) -> None:
        raise OSError(f"{name}: not found")

    monkeypatch.setattr(torch.version, "hip", "7.1.25424")
    monkeypatch.setattr(library.ctypes, "CDLL", fail)
    with pytest.raises(library.LibraryError, match="expected libamdhip64.so of the ROCm that torch .* found none"):
        library._load_hip(pathlib.Path("/nowhere"))


# --------------------------------------------------------------------------------------------------
# Memory


def fail_to_allocate(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 1 GiB.")


@pytest.mark.parametrize(
    ("splits", "size", "hint"), [(1, "0.5", "FLASH"), (4, "2.0", "deterministic=False .* of 4; FLASH")]
)
def test_no_memory_for_dq(splits: int, size: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(dtype=torch.bfloat16, batch=1, nheads=2, seqlen_q=512, headdim=128)
    softmax_lse = torch.zeros(1, 2, 512)
    monkeypatch.setattr(torch.Tensor, "new_zeros", fail_to_allocate)
    words = (
        f"^ck: backward: dq in float32: expected {size} MiB of free memory, found less: HIP out .* Hint: {hint}_ROCM"
    )
    with pytest.raises(torch.OutOfMemoryError, match=words):
        backend._dq_acc(problem, softmax_lse, splits)


@pytest.mark.parametrize(("splits", "size", "hint"), [(1, "0.1", "FLASH"), (8, "0.5", "num_splits=1 .* of 8; FLASH")])
def test_no_memory_for_parts(splits: int, size: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(dtype=torch.bfloat16, cached=True, nheads=8, headdim=64)
    q = torch.zeros(32, 8, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.Tensor, "new_empty", fail_to_allocate)
    words = f"^ck: results of parts of the keys: expected {size} MiB of free memory, .* Hint: {hint}_ROCM"
    with pytest.raises(torch.OutOfMemoryError, match=words):
        cached._new_parts(problem, splits, q)


# --------------------------------------------------------------------------------------------------
# Chips and configs


def test_info_says_for_which_chips_the_library_is(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / ck_instances.LIBRARY).touch()
    manifest = ck_instances.manifest(("gfx90a",), list(library_of_tests().instances), "by hand")
    (tmp_path / "ck" / ck_instances.MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    for arch, words in (
        ("gfx90a", "ck         available"),
        (
            "gfx942",
            'ck         no: the library is built for gfx90a, not for gfx942: FLASH_ROCM_BUILD=ck FLASH_ROCM_ARCHS="',
        ),
        ("gfx1100", "ck         no: device gfx1100 is not one of gfx90a, gfx942, gfx950\n"),
    ):
        monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", arch)
        assert cli.main(["info"]) == 0
        assert words in capsys.readouterr().out
    reasons = backends.refusal_reasons("ck", make_problem(dtype=torch.bfloat16, headdim=128), GFX942)
    assert len(reasons) == 1  # once


def configs_with(folder: pathlib.Path, entries: list[dict[str, Any]]) -> str:
    """A folder of configs with other ck entries of gfx942 than the shipped ones."""
    folder.mkdir()
    write(folder, **(config.file_contents("gfx942") | {"ck": entries}))
    return str(folder)


@pytest.mark.parametrize("change", [{}, {"occupancy": 1}, {"variants": [["masked"]], "dtype": ["float16"]}], ids=str)
def test_instances_that_two_entries_make(
    change: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second would never run, and its source would lie in the file of the first."""
    shipped = config.file_contents("gfx942")["ck"]
    folder = configs_with(tmp_path / "configs", [*shipped, shipped[0] | change])
    words = re.escape("ck[12]: expected each instance of gfx942 once, got forward_fp16_d64_dense")
    with pytest.raises(ConfigError, match=f"{words}.*gfx942.json ck\\[0\\] makes too. Hint: take it out"):
        generate.units_of(["gfx942"], folder=folder)
    assert generate.units_of(["gfx90a"], folder=folder)  # which has a file of its own
    monkeypatch.setenv("FLASH_ROCM_CONFIG_DIR", folder)
    with pytest.raises(ConfigError, match=words):
        ck_instances.configured("gfx942")
    assert cli.main(["build", "--ck", "--arch", "gfx942", "--output", str(tmp_path / "ck")]) == 1
    assert "expected each instance of gfx942 once" in capsys.readouterr().err


def test_an_arch_that_is_named_twice_is_one() -> None:
    assert generate.units_of(["gfx942", "gfx942"]) == generate.units_of(["gfx942"])
    assert {unit.instance.archs for unit in generate.units_of([*ARCHS, *ARCHS])} == {ARCHS}


# --------------------------------------------------------------------------------------------------
# What a build compiles


def test_jobs_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.2 GB each, and no more than there are processors."""
    read_text = pathlib.Path.read_text
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for available, jobs in ((1_000_000, 1), (12_000_000, 10), (1_000_000_000, 64)):
        text = f"MemTotal: 9 kB\nMemAvailable:   {available} kB\n"
        monkeypatch.setattr(
            pathlib.Path, "read_text", lambda path, text=text: text if str(path) == "/proc/meminfo" else read_text(path)
        )
        assert build.jobs_of("") == jobs
    assert build.jobs_of("3") == 3


def test_only_what_changed_is_compiled_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And each step says how many there are."""
    log = pretend(tmp_path, monkeypatch)
    request = runtime.build_request()._replace(archs=("gfx942",), instances="forward_bf16_*", max_jobs="1")

    def built(folder: str | None = None) -> list[str]:
        log.write_text("")
        config.arch_configs.cache_clear()
        units = build.build(request, tmp_path / "work", tmp_path / "out", folder)
        assert len(units) == 13
        return sorted(name for name in made(log) if name.startswith(("forward", "table", "binding", "_C")))

    first = built()
    assert first == sorted(["_C.so", "binding.o", "table.o", *(f"{unit.name}.o" for unit in forwards())])
    said = capfd.readouterr().out
    assert "[1/22] " in said and "[22/22] " in said and "forward_bf16_d64_dense for gfx942" in said
    assert built() == []
    assert "no work to do" in capfd.readouterr().out
    shipped = config.file_contents("gfx942")["ck"]
    entries = [entry | ({"occupancy": 1} if entry["tile"][-1] == 256 else {}) for entry in shipped]
    changed = [f"{unit.name}.o" for unit in forwards() if unit.instance.headdim == 256]
    assert built(configs_with(tmp_path / "configs", entries)) == sorted(["_C.so", *changed]) and len(changed) == 2


def forwards() -> list[generate.Unit]:
    return generate.units_of(["gfx942"], ["forward_bf16_*"])


def test_ccache_is_asked_first(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles in place of both compilers; where there is none they do it themselves, as in all other tests."""
    log = pretend(tmp_path, monkeypatch)
    program(tmp_path / "programs/ccache", f'#!/bin/sh\nbasename "$1" >> {tmp_path}/asked.txt\nexec "$@"\n')
    request = runtime.build_request()._replace(archs=("gfx942",), instances="forward_bf16_d64_dense", max_jobs="1")
    build.build(request, tmp_path / "work", tmp_path / "out")
    asked = (tmp_path / "asked.txt").read_text().split()
    assert {"forward_bf16_d64_dense.o", "binding.o", "_C.so"} <= set(made(log))
    assert (asked.count("clang++"), asked.count("g++")) == (3, 5)


@pytest.mark.parametrize("ccache", (False, True))
def test_a_compiler_that_fails(ccache: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names ccache where it is asked."""
    pretend(tmp_path, monkeypatch)
    program(tmp_path / "programs/g++", "#!/bin/sh\nexit 1\n")
    if ccache:
        program(tmp_path / "programs/ccache", '#!/bin/sh\nexec "$@"\n')
    request = runtime.build_request()._replace(archs=("gfx942",), instances="forward_bf16_d64_dense", max_jobs="1")
    hint = "MAX_JOBS=1 where memory is what ran out" + (
        ", CCACHE_DISABLE=1 where ccache cannot write" if ccache else ""
    )
    with pytest.raises(build.BuildError) as error:
        build.build(request, tmp_path / "work", tmp_path / "out")
    assert str(error.value) == f"a compiler failed: its text is above. Hint: {hint}"
