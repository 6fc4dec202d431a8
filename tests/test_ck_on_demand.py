"""Instances of Composable Kernel that are compiled at first use or for a described problem, by programs that pretend.

What a real compiler makes of one stands at the end, for ``make ck``.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ck_compiler import made, pretend
from ck_library import ARCHS, cache_of_tests, library_of_tests
from flash_rocm._ck import build, instances, library, on_demand

import flash_rocm
from flash_rocm import backends, ck_instances, ck_store, cli, config, files, runtime
from flash_rocm.arch import arch_named
from flash_rocm.ck_instances import MANIFEST
from flash_rocm.testing import make_problem

#: As it is, which conftest.py takes away.
WHY_NOT = build.why_not
GFX942 = arch_named("gfx942")
PROBLEM = make_problem(dtype=torch.bfloat16, headdim=128, window_right=0)
NAME = "forward_bf16_d128_dense_masked"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    ck_instances.look_again()
    backends._decide.cache_clear()
    monkeypatch.setattr(on_demand, "_failed", {})


@pytest.fixture
def compiler(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Programs that pretend, and a cache; the file of what they were asked to make."""
    monkeypatch.setattr(build, "why_not", WHY_NOT)
    return pretend(tmp_path, monkeypatch)


def install(folder: pathlib.Path, archs: tuple[str, ...] = ARCHS, *names: str) -> None:
    """A library that selection takes for one."""
    folder.mkdir(parents=True)
    (folder / ck_instances.LIBRARY).touch()
    found = [instance for instance in library_of_tests().instances if instance.name in names]
    (folder / MANIFEST).write_text(json.dumps(ck_instances.manifest(archs, found, "by hand")))


def left_behind(cache: pathlib.Path) -> list[str]:
    """All but locks and what is whole."""
    return [str(path) for path in cache.rglob("*") if path.name.endswith(".tmp")]


# --------------------------------------------------------------------------------------------------
# Who compiles


def test_who_asks_by_name_gets_it_compiled_and_auto_lets_nobody_wait(compiler: pathlib.Path) -> None:
    assert backends.select(PROBLEM, GFX942, "auto") == "triton"
    assert backends.select(PROBLEM, GFX942, "ck") == "ck"
    text = str(backends.explain_problem(PROBLEM, GFX942, "ck"))
    assert f"config forward: {NAME} (compiled at the first call, about" in text
    assert made(compiler) == []  # selecting compiles nothing
    on_demand.provide(PROBLEM, "gfx942")
    assert backends.select(PROBLEM, GFX942, "auto") == "ck"
    assert "ck_on_demand" in str(backends.explain_problem(PROBLEM, GFX942, "auto"))


def test_without_a_compiler_the_refusal_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    with pytest.raises(backends.BackendError) as caught:
        backends.select(PROBLEM, GFX942, "ck")
    assert "ck: not built: FLASH_ROCM_BUILD=ck" in str(caught.value)
    assert "ck: not compiled at first use: no compiler in this test" in str(caught.value)


def test_what_is_missing_counts_as_missing(compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.why_not(runtime.build_request()) == ""
    monkeypatch.setenv("PATH", str(compiler.parent / "programs"))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "expected ninja, found none. Hint: pip install ninja" in build.why_not(runtime.build_request())
    monkeypatch.setenv("ROCM_HOME", "/nowhere")
    assert "ROCM_HOME: expected a ROCm" in build.why_not(runtime.build_request())


@pytest.mark.parametrize(
    "change",
    [{"dropout_p": 0.1}, {"headdim": 60}, {"needs_grad": True, "softcap": 2.0}, {"cached": True, "headdim": 80}],
)
def test_what_no_entry_is_for_stays_refused(compiler: pathlib.Path, change: dict[str, Any]) -> None:
    problem = make_problem(**{"dtype": torch.bfloat16, "headdim": 128} | change)
    with pytest.raises(backends.BackendError):
        backends.select(problem, GFX942, "ck")
    with pytest.raises(build.BuildError):
        on_demand.provide(problem, "gfx942", lambda text: None)


def test_a_chip_that_the_library_is_not_built_for_stays_refused(compiler: pathlib.Path) -> None:
    """Its auxiliary kernels do not run there, and a process has one library."""
    install(runtime.cache_dir() / "ck", ("gfx90a",))
    with pytest.raises(backends.BackendError, match="the library is built for gfx90a, not for gfx942"):
        backends.select(PROBLEM, GFX942, "ck")
    with pytest.raises(build.BuildError, match="the library is built for gfx90a, not for gfx942"):
        on_demand.provide(PROBLEM, "gfx942")


def test_the_refusal_has_the_command_that_helps(compiler: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(runtime.cache_dir() / "ck", ARCHS, NAME)
    problem = make_problem(dtype=torch.float16, headdim=256, nheads=8, nheads_k=2, window_left=5, needs_grad=False)
    assert backends.select(problem, GFX942, "auto") == "triton"
    (reason,) = backends.refusal_reasons("ck", problem, GFX942)
    command = reason.partition("Hint: ")[2]
    assert command.startswith("flash-rocm build --ck --arch gfx942 --problem ")
    assert cli.main(shlex.split(command)[1:]) == 0
    out = capsys.readouterr().out
    assert "compiling forward_fp16_d256_dense_masked of Composable Kernel for gfx942, about" in out
    assert "forward_fp16_d256_dense_masked for gfx942: compiled in" in out
    assert backends.select(problem, GFX942, "auto") == "ck"
    assert cli.main(shlex.split(command)[1:]) == 0
    assert "forward_fp16_d256_dense_masked for gfx942: there already" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# What is compiled, and where it lies


def test_beside_an_installed_library_one_instance_is_compiled(
    compiler: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(runtime.cache_dir() / "ck", ARCHS, "forward_fp16_d64_dense")
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        (found,) = on_demand.provide(PROBLEM, "gfx942")
    assert sorted(made(compiler)) == sorted([f"{NAME}.o", "module.o", "table.o", "_C.so"])
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"compiling {NAME} of Composable Kernel for gfx942"
    ]
    built = ck_instances.built()
    assert built is not None and built.folder == runtime.cache_dir() / "ck"
    assert [instance.name for instance in built.instances] == ["forward_fp16_d64_dense", NAME]
    assert [instance.name for instance in built.own] == ["forward_fp16_d64_dense"]
    assert built.folder_of(1) == found.folder == built.modules[0] and built.folder_of(0) == built.folder
    assert built.instances[1].archs == ("gfx942",)
    # Nothing more, however often it is asked for.
    assert on_demand.provide(PROBLEM, "gfx942") == [(NAME, found.folder, 0.0)]
    assert len(made(compiler)) == 4 and not left_behind(runtime.cache_dir())


def test_without_a_library_the_operators_are_compiled_too(compiler: pathlib.Path) -> None:
    on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    assert {"binding.o", "core.o", "auxiliary_binding.o", f"{NAME}.o", "module.o", "_hip_stand_in.so"} <= set(
        made(compiler)
    )
    built = ck_instances.built()
    assert built is not None and built.own == () and built.archs == ck_instances.ARCHS
    assert built.folder == ck_store.base(runtime.on_demand_ck())


def test_both_directions_are_compiled_together(compiler: pathlib.Path) -> None:
    problem = make_problem(dtype=torch.bfloat16, headdim=128, needs_grad=True)
    names = [found.name for found in on_demand.provide(problem, "gfx90a", lambda text: None)]
    assert names == ["forward_bf16_d128_dense_masked", "backward_bf16_d128_dense_masked"]


def test_other_entries_and_sources_are_other_places(
    compiler: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nothing stale is found."""
    (before,) = on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    shipped = config.file_contents("gfx942")
    entries = [entry | {"occupancy": 1} for entry in shipped["ck"]]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/gfx942.json").write_text(json.dumps(shipped | {"ck": entries}))
    with monkeypatch.context() as changed:
        changed.setenv("FLASH_ROCM_CONFIG_DIR", str(tmp_path / "configs"))
        backends._decide.cache_clear()
        assert backends.select(PROBLEM, GFX942, "auto") == "triton"
        (after,) = on_demand.provide(PROBLEM, "gfx942", lambda text: None)
        assert after.folder != before.folder and after.folder.parent == before.folder.parent
        found = ck_instances.built()
        assert found is not None and found.instances[-1].occupancy == 1
    with monkeypatch.context() as changed:
        changed.setenv("CK_HOME", str(tmp_path / "another"))
        assert ck_instances.built() is None
    assert backends.select(PROBLEM, GFX942, "auto") == "ck"


# --------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_compiler_that_fails_is_heard_and_not_asked_again(
    compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(runtime.cache_dir() / "ck")
    monkeypatch.setenv("PRETEND_FAIL", "1")
    with pytest.raises(build.BuildError, match="a compiler failed; the end of what it said:\n") as caught:
        on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    assert "line 50 of a compiler" in str(caught.value) and "line 1 of" not in str(caught.value)
    count = len(made(compiler))
    monkeypatch.delenv("PRETEND_FAIL")
    with pytest.raises(build.BuildError, match="line 50 of a compiler(?s:.*)not tried again by this process"):
        on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    assert len(made(compiler)) == count
    assert not left_behind(runtime.cache_dir()) and not list(runtime.cache_dir().rglob(f"{NAME}-*/*"))
    built = ck_instances.built()
    assert built is not None and built.instances == ()
    with pytest.raises(library.LibraryError, match="ck: bfloat16 on cpu.*a compiler failed"):
        instances._compile(PROBLEM, "gfx942")
    on_demand._failed.clear()  # as in another process
    on_demand.provide(PROBLEM, "gfx942", lambda text: None)


def test_what_a_killed_process_left_goes(compiler: pathlib.Path) -> None:
    install(runtime.cache_dir() / "ck")
    (found,) = on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    (found.folder / MANIFEST).unlink()  # a library without its list is none
    left = found.folder.with_name(f"{found.folder.name}.abc.tmp")
    (left / "work").mkdir(parents=True)
    ck_instances.look_again()
    assert on_demand.provide(PROBLEM, "gfx942", lambda text: None)[0].seconds > 0.0
    assert (found.folder / MANIFEST).is_file() and not left.exists()


def test_a_cache_that_cannot_be_written(compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(compiler))  # a file
    with pytest.raises(build.BuildError, match="FLASH_ROCM_CACHE_DIR: expected a folder to write to"):
        on_demand.provide(PROBLEM, "gfx942", lambda text: None)


def test_programs_that_are_not_there_are_no_fault_of_the_cache(
    compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(runtime.cache_dir() / "ck")

    def fail(*_: Any) -> None:
        raise FileNotFoundError("no clang++")

    monkeypatch.setattr(build, "build_module", fail)
    with pytest.raises(build.BuildError, match=f"^{NAME}-\\w+: no clang"):
        on_demand.provide(PROBLEM, "gfx942", lambda text: None)


def test_nothing_is_compiled_while_a_graph_is_captured(compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(library.LibraryError, match="before a graph is captured.*flash-rocm build --ck --arch gfx942"):
        instances._compile(PROBLEM, "gfx942")
    with pytest.raises(library.LibraryError, match="before a graph is captured.*FLASH_ROCM_BUILD=ck"):
        library.load()
    assert made(compiler) == []


_CHILD = """
import torch
from flash_rocm._ck import on_demand
from flash_rocm.testing import make_problem
problem = make_problem(dtype=torch.bfloat16, headdim=128, window_right=0)
print(on_demand.provide(problem, "gfx942", lambda text: print("compiles"))[0].folder)
"""


def test_of_several_processes_one_compiles(compiler: pathlib.Path) -> None:
    install(runtime.cache_dir() / "ck")
    env = runtime.subprocess_environment(PRETEND_SECONDS="2")
    command = [sys.executable, "-c", _CHILD]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [child.communicate()[0].split() for child in running]
    assert all(child.returncode == 0 for child in running)
    assert len(made(compiler)) == 4  # objects, the table and a library, once
    assert sum(words.count("compiles") for words in said) == 1
    assert len({words[-1] for words in said}) == 1


def test_who_waits_too_long_is_told(compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(runtime.cache_dir() / "ck")
    monkeypatch.setattr(on_demand, "_PATIENCE", 0.0)
    (entry,) = (
        entry
        for entry in config.arch_configs("gfx942").ck
        for instance in ck_instances.from_config(entry, "gfx942")
        if instance.name == NAME
    )
    place = ck_store.place(runtime.on_demand_ck(), "gfx942", NAME, entry)
    with files.locked(place, 0.0), pytest.raises(build.BuildError, match="another process has compiled this"):
        on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    # That is nothing to remember.
    (found,) = on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    assert found.name == NAME and (found.folder / ck_instances.MANIFEST).is_file()


def test_who_waits_too_long_for_tools_is_told(compiler: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which says no more about the next call than waiting for the instance does."""
    install(runtime.cache_dir() / "ck")
    monkeypatch.setattr(on_demand, "_PATIENCE", 0.0)
    tools = runtime.on_demand_ck().folder / "tools"
    for _ in range(2):
        with files.locked(tools, 0.0), pytest.raises(build.BuildError, match="another process fetches .* for too long"):
            on_demand.provide(PROBLEM, "gfx942", lambda text: None)
    assert not on_demand._failed and not left_behind(runtime.cache_dir()) and made(compiler) == []
    assert on_demand.provide(PROBLEM, "gfx942", lambda text: None)[0].name == NAME


def configs_with(folder: pathlib.Path, *more: dict[str, Any]) -> pathlib.Path:
    """A folder of configs with more entries behind the shipped ones of gfx942."""
    shipped = config.file_contents("gfx942")
    folder.mkdir()
    (folder / "gfx942.json").write_text(json.dumps(shipped | {"ck": [*shipped["ck"], *more]}))
    return folder


def test_problems_of_the_users_own_entries(
    compiler: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(runtime.cache_dir() / "ck")
    words = "shape=2,1,1024,16,16,128 dtype=fp16 softcap=20 kvcache page-size=64"
    command = ["build", "--ck", "--arch", "gfx942", "--problem", words]
    assert cli.main(command) == 1
    assert "--problem" in capsys.readouterr().err
    entry = next(
        entry
        for entry in config.file_contents("gfx942")["ck"]
        if entry["kernel"] == "splitkv" and entry["tile"][-1] == 128 and entry["tile"][1] == 64
    )
    entry = entry | {"dtype": ["float16"], "variants": [["masked", "softcap"]]}
    monkeypatch.setenv("FLASH_ROCM_CONFIG_DIR", str(configs_with(tmp_path / "configs", entry)))
    assert cli.main(command) == 0
    assert "splitkv_fp16_d128_masked_softcap for gfx942: compiled" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Problems in words: flash-rocm build --problem


def test_build_for_problems(compiler: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several, for several chips; each once."""
    options = ["--problem", "dtype=fp16 varlen causal", "--problem", "kvcache page-size=64 shape=1,1,512,8,2,64"]
    assert cli.main(["build", "--ck", "--arch", "gfx90a,gfx942", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "compiled in" in line]
    assert [line.partition(":")[0] for line in lines] == [
        f"{name} for {arch}" for arch in ARCHS for name in ("forward_fp16_d64_varlen_masked", "splitkv_bf16_d64")
    ]


def test_a_compiler_that_fails_is_heard_by_the_command(
    compiler: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_FAIL", "1")
    assert cli.main(["build", "--ck", "--arch", "gfx942", "--problem", "causal"]) == 1
    assert "flash-rocm build: a compiler failed; the end of what it said:" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# With a real compiler


_REAL = """
import torch, flash_rocm
torch.manual_seed(0)
q, k, v = (torch.randn(1, 33, 2, 64).bfloat16() for _ in range(3))
with flash_rocm.virtual_gpu("gfx942"), flash_rocm.use_backend("ck"):
    torch.save(flash_rocm.flash_attn_func(q, k, v), "out.pt")
"""


def real_inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 33, 2, 64).bfloat16() for _ in range(3)]


@pytest.mark.ck
def test_compiled_at_first_use_and_executed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, count_case: Callable[..., None]
) -> None:
    """In a process without a library, which compiles all that it needs; then beside the library of the other tests."""
    ck_home = os.environ.get("FLASH_ROCM_TEST_CK_HOME", "")
    variables = {"FLASH_ROCM_CACHE_DIR": str(tmp_path / "cache"), "CK_HOME": ck_home, "FLASH_ROCM_LOG": "warning"}
    child = subprocess.run(
        [sys.executable, "-c", _REAL],
        cwd=tmp_path,
        env=runtime.subprocess_environment(**variables),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    lines = [line for line in child.stderr.splitlines() if line.startswith("flash_rocm WARNING: compiling")]
    assert ["operators" in line for line in lines] == [True, False] and "forward_bf16_d64_dense" in lines[1]
    out = torch.load(tmp_path / "out.pt")
    inputs = real_inputs()
    exact = flash_rocm.flash_attn_func(*(x.double() for x in inputs))
    assert (out - exact).abs().max() <= 2.0**-7 * exact.abs().max()

    store = runtime.OnDemand(tmp_path / "cache" / "ck_on_demand", ck_home, None)
    monkeypatch.setattr(runtime, "_on_demand", lambda *_: store)
    ck_instances.look_again()
    built = ck_instances.built()
    assert built is not None and len(built.modules) == 1 and built.folder == cache_of_tests() / "ck"  # type: ignore[operator]
    with flash_rocm.virtual_gpu("gfx942"), flash_rocm.use_backend("ck"):
        assert f"({built.modules[0]})" in str(flash_rocm.explain(*inputs))
        assert torch.equal(flash_rocm.flash_attn_func(*inputs), out)
    assert library.number_of(built, len(built.own)) >= len(built.own)
    count_case("ck", "virtual:gfx942", ["on demand"], ["forward"])


class _Table(ctypes.Structure):
    _fields_ = [("layout", ctypes.c_uint64), ("count", ctypes.c_int), ("instances", ctypes.c_void_p)]


@pytest.mark.ck
def test_instances_of_another_version_are_refused(tmp_path: pathlib.Path) -> None:
    operators = library.load()[1]
    table = _Table(1, 0, None)
    with pytest.raises(RuntimeError, match="it was compiled for another version of the library"):
        operators.add(ctypes.addressof(table))
    with pytest.raises(
        library.LibraryError, match="expected instances that the library takes.*Hint: build the library"
    ):
        library._add(tmp_path / "none.so")
