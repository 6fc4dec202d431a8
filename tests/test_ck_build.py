"""The build of the ck back end up to the compiler: what is generated, found, and said where something is missing."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch
from ck_library import ARCHS, NAMES, library_of_tests
from flash_rocm._ck import build, generate
from flash_rocm._third_party import composable_kernel, rocm_root

from flash_rocm import backends, ck_instances, cli, config, runtime
from flash_rocm.arch import amd_arch, arch_named
from flash_rocm.ck_instances import CkInstance
from flash_rocm.config_schema import ConfigError
from flash_rocm.runtime import BuildRequest
from flash_rocm.testing import make_problem

REQUEST = BuildRequest(("gfx942",), "*", "", "", "")
GFX942 = arch_named("gfx942")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ck_instances._built.cache_clear()
    backends._decide.cache_clear()


# --------------------------------------------------------------------------------------------------
# What is generated


def contents(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_same_configs_give_the_same_bytes_and_touch_nothing(tmp_path: pathlib.Path) -> None:
    for folder in ("one", "other"):
        generate.write(tmp_path / folder, generate.units_of(ARCHS))
    one = contents(tmp_path / "one")
    assert {name: text for name, (text, _) in one.items()} == {
        name: text for name, (text, _) in contents(tmp_path / "other").items()
    }
    generate.write(tmp_path / "one", generate.units_of(ARCHS))
    assert contents(tmp_path / "one") == one


def test_what_is_no_longer_asked_for_goes(tmp_path: pathlib.Path) -> None:
    generate.write(tmp_path, generate.units_of(ARCHS, ["forward_bf16_d128*"]))
    before = contents(tmp_path)
    generate.write(tmp_path, generate.units_of(ARCHS, ["forward_bf16_d128_dense_masked"]))
    after = contents(tmp_path)
    assert set(after) == {"forward_bf16_d128_dense_masked.cpp", "table.cpp"} < set(before)
    assert after["forward_bf16_d128_dense_masked.cpp"] == before["forward_bf16_d128_dense_masked.cpp"]
    assert after["table.cpp"] != before["table.cpp"]


def test_table_and_manifest_have_one_order() -> None:
    units = generate.units_of(ARCHS)
    table = generate.table_of(units)
    assert re.findall(r'\{"(\w+)"', table) == [unit.name for unit in units]
    assert f"instance_count = {len(units)};" in table
    assert len({unit.name for unit in units}) == len(units) <= 60


@pytest.mark.parametrize("name", NAMES)
def test_a_source_says_what_its_name_says(name: str) -> None:
    (unit,) = generate.units_of(ARCHS, [name])
    text = generate.source_of(unit)
    assert unit.instance.archs == ARCHS
    flags = {"varlen": "kVarlen", "masked": "kMasked", "alibi": "kAlibi"}
    for variant, flag in flags.items() if not name.startswith("splitkv") else [*flags.items()][1:]:
        assert f"{flag} = {str(variant in name).lower()};" in text
    rounded = "#define CK_TILE_FMHA_FLOAT_TO_FLOAT16_RTN 1"
    assert (rounded in text.partition("#include")[0]) == name.startswith("forward_fp16")
    assert ("Bf16" in text) == ("bf16" in name)
    assert f"Status {name}(" in text


def test_the_scheduler_of_an_entry_is_a_flag_of_its_instances(tmp_path: pathlib.Path) -> None:
    raw = config.file_contents("gfx942")
    (forward,) = (entry for entry in raw["ck"] if entry["kernel"] == "forward" and entry["tile"][5] == 128)
    flags = {}
    for scheduler in ("default", "iterative-minreg"):
        (tmp_path / "gfx942.json").write_text(json.dumps(raw | {"ck": [forward | {"scheduler": scheduler}]}))
        config.arch_configs.cache_clear()
        flags[scheduler] = {unit.flags for unit in generate.units_of(["gfx942"], folder=str(tmp_path))}
    assert flags == {"default": {()}, "iterative-minreg": {("-mllvm", "-amdgpu-sched-strategy=iterative-minreg")}}


def test_archs_that_differ_in_a_tile_get_an_instance_each(tmp_path: pathlib.Path) -> None:
    """And those that do not share one."""
    for arch in ARCHS:
        raw = config.file_contents(arch)
        raw = raw | {"ck": [dict(entry) for entry in raw["ck"][:2]]}
        if arch == "gfx942":
            raw["ck"][0]["occupancy"] = 2
        (tmp_path / f"{arch}.json").write_text(json.dumps(raw))
    units = generate.units_of(ARCHS, folder=str(tmp_path))
    d64 = [unit for unit in units if unit.instance.headdim == 64]
    assert {unit.instance.archs for unit in d64} == {("gfx90a",), ("gfx942",)}
    assert {unit.name for unit in d64 if "bf16" in unit.name and "dense_masked" in unit.name} == {
        "forward_bf16_d64_dense_masked_gfx90a",
        "forward_bf16_d64_dense_masked_gfx942",
    }
    assert all(unit.instance.archs == ARCHS for unit in units if unit.instance.headdim != 64)
    (text,) = (generate.source_of(unit) for unit in d64 if unit.name == "forward_bf16_d64_dense_masked_gfx942")
    assert "kOccupancy = 2;" in text


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"archs": ("gfx942", "gfx1100")}, "expected archs with ck entries in their configs, got gfx1100"),
        ({"archs": ("mi300",)}, "expected archs with ck entries in their configs, got mi300"),
        ({"instances": "forward_fp8*"}, "FLASH_ROCM_INSTANCES: expected patterns of names such as forward_fp16_d64"),
    ],
)
def test_wrong_requests(request_: dict[str, Any], words: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(build.BuildError, match=re.escape(words)):
        build.build(REQUEST._replace(**request_), tmp_path / "work", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# What is found


def tool(folder: pathlib.Path, name: str, says: str = "") -> None:
    """A program that prints a line."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_no_compiler(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="expected clang.*, found none. Hint: apt-get install clang-22"):
        build._find_rocm("", tmp_path)


def test_an_old_clang(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "clang++", "Debian clang version 19.1.7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="expected clang 20 or newer, got Debian clang version 19.1.7"):
        build._find_rocm("", tmp_path)


def test_a_rocm_is_preferred_and_one_that_is_none_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(build.BuildError, match="ROCM_HOME: expected a ROCm with include/hip/hip_runtime.h"):
        build._find_rocm(str(tmp_path), tmp_path / "stand_in")
    for name in ("lib/llvm/bin/clang++", "include/hip/hip_runtime.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert build._find_rocm(str(tmp_path), tmp_path / "stand_in") == (tmp_path, f"{tmp_path}/lib/llvm/bin/clang++")


def test_jobs() -> None:
    assert build.jobs_of("3") == 3
    assert build.jobs_of("") >= 1
    for wrong in ("0", "-1", "many"):
        with pytest.raises(build.BuildError, match="MAX_JOBS: expected a number >= 1, got"):
            build.jobs_of(wrong)


def ck_tree(root: pathlib.Path, text: str = "// none\n") -> pathlib.Path:
    for name in ("include/ck_tile/core.hpp", f"{composable_kernel.EXAMPLE}/fmha_fwd.hpp"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_ck_home_comes_first_and_must_be_right(tmp_path: pathlib.Path) -> None:
    with pytest.raises(composable_kernel.SourceError, match="CK_HOME: expected a tree with include/ck_tile"):
        composable_kernel.find(str(tmp_path), tmp_path)
    source = composable_kernel.find(str(ck_tree(tmp_path)), tmp_path / "wheel")
    assert (source.root, source.where, source.pinned) == (tmp_path, "CK_HOME", False)


def test_what_was_fetched_is_verified(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composable_kernel, "CLONE", tmp_path / "no clone")
    ck_tree(tmp_path / "wheel" / composable_kernel.ROOT_IN_WHEEL)
    with pytest.raises(composable_kernel.SourceError, match="expected headers with SHA-256 [0-9a-f]{64}, got"):
        composable_kernel.find("", tmp_path / "wheel")
    found = composable_kernel.headers_sha256(tmp_path / "wheel" / composable_kernel.ROOT_IN_WHEEL)
    monkeypatch.setattr(composable_kernel, "HEADERS_SHA256", found)
    assert composable_kernel.find("", tmp_path / "wheel").pinned


def test_another_wheel_stops_the_build(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, folder = tmp_path / "other.whl", tmp_path / "unpacked"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{composable_kernel.ROOT_IN_WHEEL}/include/ck_tile/core.hpp", "// none\n")
        archive.writestr("elsewhere.py", "")
    with pytest.raises(composable_kernel.SourceError, match=f"other.whl: expected SHA-256 .*{'[0-9a-f]' * 4}"):
        composable_kernel.unpack(wheel, folder)
    assert not folder.exists()
    digest = composable_kernel.hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(composable_kernel, "WHEEL_SHA256", digest)
    composable_kernel.unpack(wheel, folder)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert files == [f"{composable_kernel.ROOT_IN_WHEEL}/include/ck_tile/core.hpp"]


def test_no_source_at_all(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composable_kernel, "CLONE", tmp_path / "no clone")
    monkeypatch.setattr(composable_kernel, "WHEEL", "amd-aiter==0.0.0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(composable_kernel.SourceError, match="from PyPI, found none"):
        composable_kernel.find("", tmp_path / "wheel")


def test_a_source_that_is_not_the_pin_is_probed(tmp_path: pathlib.Path) -> None:
    if shutil.which("clang++-22") is None:
        pytest.skip("needs clang++-22, which make ck installs")
    request = REQUEST._replace(ck_home=str(ck_tree(tmp_path / "ck", "#error no Composable Kernel\n")))
    with pytest.raises(build.BuildError, match="got one that does not compile: .*error: no Composable Kernel"):
        build.find_toolchain(request, tmp_path / "work")


def test_control_modules_are_what_the_compiler_looks_for() -> None:
    modules = rocm_root.control_modules()
    assert "@__oclc_ISA_version = " in modules["oclc_isa_version_942"] and "i32 9402" in modules["oclc_isa_version_942"]
    assert "@__oclc_finite_only_opt" in modules["oclc_finite_only_off"]
    assert "@__oclc_correctly_rounded_sqrt32" in modules["oclc_correctly_rounded_sqrt_on"]
    assert modules["opencl"] == ""
    assert len(modules) == 2 * 5 + 3 + 6 + 1


def test_rocm_root_without_triton_or_llvm(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rocm_root.RocmRootError, match="HIP headers and device libraries in"):
        monkeypatch.setattr(rocm_root.importlib.util, "find_spec", lambda name: _Spec(tmp_path / "triton/__init__.py"))
        rocm_root.make(tmp_path / "rocm")
    monkeypatch.setattr(rocm_root.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rocm_root.RocmRootError, match="expected the triton package"):
        rocm_root.make(tmp_path / "rocm")
    monkeypatch.setenv("PATH", str(tmp_path))
    triton_amd(tmp_path / "amd")
    with pytest.raises(rocm_root.RocmRootError, match="expected llvm-as-22, found none"):
        rocm_root.make(tmp_path / "rocm", amd=tmp_path / "amd")


def triton_amd(folder: pathlib.Path) -> None:
    """What the root is made of, of no use to a compiler."""
    texts = {
        "include/hip/hip_runtime.h": "",
        "include/hip/hip_version.h": "#define HIP_VERSION_MAJOR 7\n#define HIP_VERSION_MINOR 1\n",
        "lib/ocml.bc": "",
        "lib/ockl.bc": "",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_rocm_root_is_made_once_for_each_triton(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an assembler that writes nothing but the file."""
    made: list[str] = []

    def assemble(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        made.append(command[2])
        pathlib.Path(command[2]).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(rocm_root.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(rocm_root.subprocess, "run", assemble)
    for name in ("one", "other"):
        triton_amd(tmp_path / name)
    root = tmp_path / "rocm"
    for amd, count in (("one", 20), ("one", 20), ("other", 40)):
        assert rocm_root.make(root, tmp_path / amd) == root
        assert len(made) == count
    assert (root / "share/hip/version").read_text().startswith("HIP_VERSION_MAJOR=7\nHIP_VERSION_MINOR=1\n")
    assert "__half2float" in (root / "include/hip/hip_fp16.h").read_text()
    assert "__float2bfloat16" in (root / "include/hip/hip_bf16.h").read_text()
    assert (root / "amdgcn/bitcode/oclc_abi_version_600.bc").is_file()


@dataclasses.dataclass
class _Spec:
    path: pathlib.Path

    @property
    def origin(self) -> str:
        return str(self.path)


def test_setup_says_what_is_wrong() -> None:
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    child = subprocess.run(
        command,
        cwd=root,
        env=runtime.subprocess_environment(FLASH_ROCM_BUILD="ck", FLASH_ROCM_ARCHS="gfx000"),
        capture_output=True,
        text=True,
    )
    assert child.returncode != 0 and "Traceback" not in child.stderr
    assert "FLASH_ROCM_BUILD=ck: FLASH_ROCM_ARCHS: expected archs with ck entries" in child.stderr


def test_make_says_which_tools_are_missing(tmp_path: pathlib.Path) -> None:
    for name in ("make", "id", "paste"):
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"needs {name}")
        (tmp_path / name).symlink_to(found)
    root = pathlib.Path(__file__).parent.parent
    variables = runtime.subprocess_environment(PATH=str(tmp_path))
    child = subprocess.run(["make", "-s", "ck-tools"], cwd=root, env=variables, capture_output=True, text=True)
    assert child.returncode != 0
    assert "make ck needs clang++-22 ld.lld-22 llvm-as-22 llvm-objdump-22 clang-offload-bundler-22: " in child.stdout
    assert "apt-get install clang-22 lld-22 llvm-22 clang-tools-22" in child.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ck", "--arch", "gfx1100"], "expected archs with ck entries"),
        (["--ck", "--arch", "gfx942", "--dtype", "bf16"], "--dtype: expected no value with --ck"),
        (["--ck", "--arch", "gfx942", "--headdim", "64"], "--headdim: expected no value with --ck"),
        (["--triton", "--arch", "gfx942", "--instances", "x"], "--instances: expected no value without --ck"),
        (["--ck", "--arch", "gfx942", "--instances", "x"], "FLASH_ROCM_INSTANCES: expected patterns"),
    ],
)
def test_the_command_says_what_is_wrong(
    options: list[str], words: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", *options, "--output", str(tmp_path / "ck")]) != 0
    assert words in capsys.readouterr().err


def test_variables_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASH_ROCM_ARCHS", "GPU_ARCHS", "FLASH_ROCM_INSTANCES", "CK_HOME", "ROCM_HOME", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    assert runtime.build_request() == BuildRequest((), "*", "", "", "")
    monkeypatch.setenv("GPU_ARCHS", "gfx90a")
    assert runtime.build_request().archs == ("gfx90a",)
    values = {"FLASH_ROCM_ARCHS": "gfx90a;gfx942", "FLASH_ROCM_INSTANCES": "f*", "MAX_JOBS": "2", "CK_HOME": "/ck"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert runtime.build_request() == BuildRequest(("gfx90a", "gfx942"), "f*", "/ck", "", "2")


# --------------------------------------------------------------------------------------------------
# What selection makes of it


def install(folder: pathlib.Path, instances: list[CkInstance], archs: tuple[str, ...] = ("gfx942",)) -> None:
    """A library that selection takes for one; nothing can be launched."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ck_instances.LIBRARY).touch()
    text = json.dumps(ck_instances.manifest(archs, instances, "by hand"))
    (folder / ck_instances.MANIFEST).write_text(text)


def test_auto_takes_what_is_executed_by_tests(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On gfx950 nothing is: it is there for who asks by name."""
    problem, gfx950 = make_problem(dtype=torch.bfloat16, headdim=128, window_right=0), amd_arch("gfx950", 256)
    instances = [dataclasses.replace(instance, archs=("gfx950",)) for instance in library_of_tests().instances]
    install(tmp_path / "ck", instances, ("gfx950",))
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    assert backends.select(problem, gfx950, "auto") == "triton"
    assert backends.select(problem, gfx950, "ck") == "ck"
    (reason,) = backends.refusal_reasons("ck", problem, gfx950)
    assert reason == "the tests run none of its kernels on gfx950: auto leaves them to who asks by name"
    assert set(ck_instances.TESTED_ARCHS) == set(ARCHS)


def test_a_library_is_found_by_its_cache_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(dtype=torch.bfloat16, headdim=128, window_right=0)
    (before,) = backends.refusal_reasons("ck", problem, GFX942)
    assert before.startswith('not built: FLASH_ROCM_BUILD=ck FLASH_ROCM_ARCHS="gfx90a;gfx942" pip install')
    with pytest.raises(backends.BackendError, match="  ck: not built: FLASH_ROCM_BUILD=ck FLASH_ROCM_ARCHS="):
        backends.select(problem, GFX942, "ck")
    install(tmp_path / "ck", list(library_of_tests().instances), ARCHS)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    assert backends.select(problem, GFX942, "auto") == "ck"
    text = str(backends.explain_problem(problem, GFX942, "auto"))
    assert "ck: yes (chosen)" in text
    assert f"config forward: forward_bf16_d128_dense_masked ({tmp_path}/ck)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"headdim": 60}, "headdim 60, 60 of v: only multiples of 8"),
        ({"softmax_scale": -1.0}, "softmax_scale -1.0: only > 0"),
        ({"dropout_p": 0.1}, "dropout in Composable Kernel compares 8 bits"),
        ({"softcap": 3.0, "needs_grad": True}, "softcap has no backward"),
        ({"softcap": 3.0, "alibi": True}, "softcap and alibi are not combined"),
        ({"sinks": True}, "sinks is not implemented"),
        ({"seqlen_k": (1 << 16) + 1, "alibi": True}, "alibi over more than 65536 positions"),
        (
            {"seqlen_q": 1 << 14, "seqlen_k": 1 << 14, "deterministic": True, "needs_grad": True},
            "deterministic, with parts",
        ),
        ({"seqlen_k": 1 << 23}, "a sequence of 2 GiB or more"),
        ({"headdim": 200}, "no instance of the library runs the forward: expected forward_bf16_d200_dense or"),
        ({"needs_grad": True, "alibi": True}, "runs the backward: expected backward_bf16_d128_dense_masked_alibi"),
        ({"dtype": torch.float32}, "dtype float32 is not one of bfloat16, float16"),
        ({"cached": True, "page_size": 24}, "splitkv_bf16_d128 of a tile whose keys divide pages of 24 or one"),
        ({"cached": True, "headdim": 80}, "no instance of the library runs the splitkv: expected splitkv_bf16_d80 or"),
        ({"cached": True, "headdim_v": 64}, "headdim_v 64 other than headdim over a K/V cache"),
        ({"cached": True, "page_size": 64, "leftpad": True}, "leftpad in pages, of which Composable Kernel reads"),
        ({"cached": True, "qv": True}, "qv is not implemented"),
        ({"cached": True, "attention_chunk": 5}, "attention_chunk is not implemented"),
        ({"cached": True, "seqlen_k": 1 << 23}, "a sequence of 2 GiB or more"),
        ({"cached": True, "batch": 1 << 9, "seqlen_q": 1 << 13}, "results of 2 GiB or more"),
    ],
)
def test_refusals_have_reasons(
    change: dict[str, Any], words: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "ck", list(library_of_tests().instances), ARCHS)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    problem = make_problem(**{"dtype": torch.bfloat16, "headdim": 128} | change)
    reasons = backends.refusal_reasons("ck", problem, GFX942)
    assert any(words in reason for reason in reasons), reasons
    assert backends.select(problem, GFX942, "auto") == "triton"
    with pytest.raises(backends.BackendError, match=re.escape(words)):
        backends.select(problem, GFX942, "ck")


def test_long_caches_are_taken(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is a sequence of the heads of k, and of pages one page."""
    install(tmp_path / "ck", list(library_of_tests().instances), ARCHS)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    shape: dict[str, Any] = dict(dtype=torch.bfloat16, headdim=128, cached=True, seqlen_q=1, nheads=64, nheads_k=8)
    for fields in ({"seqlen_k": 1 << 19}, {"seqlen_k": 1 << 29, "page_size": 64}):
        assert not backends.refusal_reasons("ck", make_problem(**shape | fields), GFX942)
    assert backends.refusal_reasons("ck", make_problem(**shape | {"seqlen_k": 1 << 20}), GFX942)


def test_a_library_without_the_chip(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "ck", list(library_of_tests().instances), ("gfx90a",))
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    (reason,) = backends.refusal_reasons("ck", make_problem(dtype=torch.bfloat16, headdim=128), GFX942)
    assert reason.startswith("the library is built for gfx90a, not for gfx942: FLASH_ROCM_BUILD=ck")
    assert 'FLASH_ROCM_ARCHS="gfx90a;gfx942"' in reason


def test_a_damaged_list(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path / "ck", [])
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    for text, words in (
        ("{", "instances.json: expected JSON"),
        ('{"archs": []}', "instances.json.instances: expected a value, got none"),
        ('{"archs": [], "instances": [{}], "built_with": ""}', "instances.json.kernel: expected a value"),
    ):
        (tmp_path / "ck" / ck_instances.MANIFEST).write_text(text)
        ck_instances._built.cache_clear()
        with pytest.raises(ConfigError, match=re.escape(words)):
            ck_instances.built()
    # The report of what is wrong comes.
    assert cli.main(["info"]) == 0
    assert words in capsys.readouterr().out


def test_the_smallest_head_dim_and_then_the_first_is_taken() -> None:
    library = dataclasses.replace(
        library_of_tests(), instances=tuple(unit.instance for unit in generate.units_of(ARCHS))
    )

    def taken(kernel: str = "forward", dtype: torch.dtype = torch.float16, **fields: Any) -> str:
        number = library.find(kernel, make_problem(dtype=dtype, **fields), "gfx942")
        assert number is not None
        return library.instances[number].name

    assert taken(headdim=16) == "forward_fp16_d64_dense"
    assert taken(headdim=64) == "forward_fp16_d64_dense"
    assert taken(headdim=64, window_left=3) == "forward_fp16_d64_dense_masked"
    assert taken(headdim=72, headdim_v=72) == "forward_fp16_d128_dense_masked"
    assert taken(headdim=136, headdim_v=128) == "forward_fp16_d192v128_dense_masked"
    assert taken(headdim=136, headdim_v=136) == "forward_fp16_d256_dense_masked"
    assert taken("splitkv", headdim=64, cached=True) == "splitkv_fp16_d64"
    assert taken("splitkv", headdim=64, cached=True, seqlen_q=1, window_right=0, varlen=True) == "splitkv_fp16_d64"
    assert taken("splitkv", headdim=64, cached=True, seqlen_q=2, window_right=0) == "splitkv_fp16_d64_masked"
    for page_size, name in ((0, "d128"), (128, "d128"), (16, "d128_n16"), (48, "d128_n16")):
        pages: dict[str, Any] = {"headdim": 128, "cached": True, "page_size": page_size}
        assert taken("splitkv", torch.bfloat16, **pages) == f"splitkv_bf16_{name}"
    decode: dict[str, Any] = {"headdim": 128, "cached": True, "seqlen_q": 1, "alibi": True}
    assert taken("splitkv", torch.bfloat16, **decode) == "splitkv_bf16_d128_masked_alibi"
    assert taken("backward", headdim=64) == "backward_fp16_d64_dense_masked"
    assert taken("backward", headdim=192, headdim_v=128) == "backward_fp16_d256_dense_masked"
    assert taken("backward", headdim=64, deterministic=True) == "backward_fp16_d128_dense_masked_deterministic"
