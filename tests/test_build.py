"""``flash-rocm build``: what it compiles is what launches look for, and they find it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_keys import Recorded, disk_key, launch, launch_all, offline, record, triton  # noqa: F401, a fixture
from flash_rocm._triton import prebuilt, workers

from flash_rocm import build, cli, runtime, virtual_device
from flash_rocm.arch import arch_named
from flash_rocm.inspect.report import Case
from flash_rocm.testing import make_problem


@pytest.fixture(autouse=True)
def _needs_the_compiler() -> None:
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")


def _broken(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the compiler was used")


def test_builds_what_a_launch_on_amd_looks_for(
    tmp_path: pathlib.Path,
    record: Callable[[str], Recorded],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the key that Triton works out at the launch, in a folder that has moved since."""
    options = [
        "--triton",
        "--arch",
        "gfx942",
        "--dtype",
        "bf16",
        "--headdim",
        "32",
        "--mask",
        "causal",
        "--layout",
        "dense",
        "--jobs",
        "1",
    ]
    assert cli.main(["build", *options, "--output", str(tmp_path / "made" / "triton")]) == 0
    out = capsys.readouterr().out
    assert f"3 kernels in {tmp_path}/made/triton, for Triton " in out
    assert f"launches find them with FLASH_ROCM_CACHE_DIR={tmp_path}/made" in out
    (tmp_path / "made").rename(tmp_path / "image")
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "image"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "usual"))
    recorded = record("gfx942")
    launch_all(make_problem(dtype=torch.bfloat16, headdim=32, window_right=0, needs_grad=True, nheads=4, nheads_k=2))
    for kernel, call in recorded:
        with prebuilt.in_use():
            manager = triton.knobs.cache.manager_class(disk_key(kernel, call, arch_named("gfx942")))
            name = launch.KERNELS[kernel].kernel.__name__
            group = manager.get_group(f"{name}.json")
        assert group is not None, kernel
        paths = {file: pathlib.Path(path) for file, path in group.items()}
        assert {f"{name}.json", f"{name}.hsaco"} <= set(paths)
        assert all(path.is_relative_to(tmp_path / "image") and path.is_file() for path in paths.values())
    assert len(recorded) == 3
    # Triton itself finds them so, and uses no compiler.
    for backend in triton.backends.backends.values():
        monkeypatch.setattr(backend.compiler, "add_stages", _broken)
    chip, problem = arch_named("gfx942"), make_problem(dtype=torch.bfloat16, headdim=32, window_right=0)
    with prebuilt.in_use():
        assert offline.compile_kernel("forward", problem, chip).asm["hsaco"][:4] == b"\x7fELF"
    with pytest.raises(RuntimeError, match="the compiler was used"):
        offline.compile_kernel("forward", problem, chip)
    assert triton.knobs.cache.manager_class is None


def test_what_was_not_built_goes_the_usual_way(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "usual"))
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    with prebuilt.in_use():
        assert triton.knobs.cache.manager_class is None, "nothing built"
    (tmp_path / "triton" / "CUT").mkdir(parents=True)
    (tmp_path / "triton" / "CUT" / "kernel.ttir").write_text("")
    with prebuilt.in_use():
        for key in ("OTHER", "CUT"):
            manager = triton.knobs.cache.manager_class(key)
            assert manager.get_group("kernel.json") is None
            assert manager.put("text", "kernel.json") == str(tmp_path / "usual" / key / "kernel.json")
    assert [x.name for x in (tmp_path / "triton").iterdir()] == ["CUT"]


def test_a_manager_of_the_users_own_stays(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_MANAGER", "triton.runtime.cache:RemoteCacheManager")
    with prebuilt.in_use():
        assert triton.knobs.cache.manager_class.__name__ == "RemoteCacheManager"


def test_every_config_that_a_length_takes_is_built(tmp_path: pathlib.Path) -> None:
    """Entries that match on lengths, and both layouts."""
    options = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    entry = {"kernel": "forward", "provenance": {"how": "first choice"}}
    entries = [
        entry | {"match": {"seqlen": [1, 512]}, "options": options | {"BLOCK_M": 32}},
        entry | {"options": options | {"BLOCK_M": 64}},
    ]
    (tmp_path / "gfx942.json").write_text(json.dumps({"arch": "gfx942", "triton": entries}))
    source = runtime.ConfigSource(folder=str(tmp_path))
    tasks = list(build.tasks_of([Case("gfx942", "forward", "bf16", 64, "full")], build.LAYOUTS, source))
    assert len(tasks) == 4
    assert {task.problem.varlen for task in tasks} == {False, True}
    assert {task.problem.seqlen_k > 512 for task in tasks if not task.problem.varlen} == {False, True}


def test_what_plain_calls_take_is_built() -> None:
    """The Gluon kernels of head dim 64: of short sequences, and dense ones of long ones."""
    from flash_rocm._triton.plan import plan

    tasks = list(build.tasks_of([Case("sm90", "forward", "bf16", 64, "full")], build.LAYOUTS, None))
    found = [(task.problem.varlen, plan("forward", task.problem, task.arch, None, True).config) for task in tasks]
    assert {(varlen, config.implementation, config.BLOCK_M) for varlen, config in found} == {
        (False, "gluon", 128),
        (False, "gluon", 192),
        (True, "gluon", 128),
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--arch gfx942", "one of the arguments --triton --ck --cuda is required"),
        ("--triton --arch gfx000", "arch: expected sm... or one of gfx90a"),
        ("--triton --arch gfx942 --layout ragged", "--layout: expected some of dense, varlen, got 'ragged'"),
        ("--triton --arch gfx942 --headdim 100", "--headdim: expected multiples of 8"),
        ("--triton --arch gfx942 --mask causal --output {file}/x", "--output: expected a folder to write to"),
    ],
)
def test_wrong_arguments(options: str, text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["build", *options.format(file=tmp_path / "file").split()]) == 2
    assert text in capsys.readouterr().err


def test_a_kernel_that_fails_is_told(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "compile_all", lambda tasks, jobs, cache, each: ["broken"] * len(tasks))
    options = [
        "--triton",
        "--arch",
        "gfx942",
        "--kernel",
        "forward",
        "--dtype",
        "bf16",
        "--headdim",
        "32",
        "--mask",
        "full",
        "--layout",
        "dense",
    ]
    assert cli.main(["build", *options, "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "gfx942 forward bfloat16 on cuda" in captured.err and "broken" in captured.err
    assert "0 kernels in" in captured.out


_WITHOUT_COMPILER = """
import torch, triton
from triton.backends import backends

def broken(*args, **kwargs):
    raise RuntimeError("the compiler was used")

for backend in backends.values():
    backend.compiler.add_stages = broken
import flash_rocm
q, k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
out = flash_rocm.flash_attn_func(q, k, v, causal=True)
out.backward(torch.ones_like(out))
torch.cuda.synchronize()
assert torch.isfinite(q.grad).all() and torch.isfinite(out).all()
try:
    flash_rocm.flash_attn_func(q, k, v, causal=False)
except RuntimeError as error:
    assert "the compiler was used" in str(error), error
else:
    raise SystemExit("a kernel that was not built ran without a compiler: this test shows nothing")
print("done")
"""


@pytest.mark.gpu
def test_a_process_without_compiler_runs_what_was_built(tmp_path: pathlib.Path) -> None:
    """Built in one process; run in another whose compiler raises, with no C compiler and Triton's cache empty."""
    arch = virtual_device.arch_of(torch.device("cuda")).name
    options = f"--triton --arch {arch} --dtype fp16 --headdim 64 --mask causal --layout dense".split()
    command = [sys.executable, "-m", "flash_rocm.cli", "build", *options]
    environment = runtime.subprocess_environment(FLASH_ROCM_CACHE_DIR=str(tmp_path / "cache"))
    built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert built.returncode == 0, built.stderr
    assert "3 kernels in" in built.stdout and "could not be built here" not in built.stdout, built.stdout
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "fresh"), "CC": "/bin/false"}
    command = [sys.executable, "-c", _WITHOUT_COMPILER]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stderr


def test_kernels_over_a_cache_are_not_built(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    options = ["--triton", "--arch", "gfx942", "--kernel", "decode", "--output", str(tmp_path / "triton")]
    assert cli.main(["build", *options]) == 2
    assert "--kernel: expected kernels other than those over a K/V cache, which are compiled at first use" in (
        capsys.readouterr().err
    )
