"""The wheel: one top-level name, importable without Triton, without a GPU, quickly."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest
from test_cuda_library import nvcc_that_says

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ("flash_rocm", "triton_backend", "ck_backend", "configs", "third_party")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
IMPORT_LIMIT_S = 0.3

#: Makes ``import triton`` fail, as if it were not installed.
BLOCK_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, Block())
sys.modules["triton"] = None
"""


def copy_of_tree(source: pathlib.Path) -> pathlib.Path:
    """What a wheel is built from; setuptools leaves its build folder where it works."""
    source.mkdir(exist_ok=True)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel as it is without FLASH_ROCM_BUILD."""
    return build_wheel(copy_of_tree(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"), {})


def build_wheel(source: pathlib.Path, out: pathlib.Path, variables: dict[str, str]) -> pathlib.Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the wheel's contents and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


#: A compiler of HIP that makes nothing of any source: an object without code, and the list of what it has read.
FAKE_COMPILER = """#!/bin/sh
out= dep=
while [ $# -gt 0 ]; do
    case $1 in -o) out=$2;; -MF) dep=$2;; esac
    shift
done
[ -z "$dep" ] || echo "$out:" > "$dep"
[ -z "$out" ] || echo 'int nothing;' | sed "s/nothing/$(basename "$out" .o)/" | g++ -fPIC -x c++ -c - -o "$out"
"""


def test_a_wheel_with_the_compiled_library(tmp_path: pathlib.Path) -> None:
    """All of a build but the compiler of HIP and Composable Kernel, which make ck has: files, name, tag, version."""
    if shutil.which("g++") is None or not shutil.which("ninja", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin"):
        pytest.skip("needs g++ and ninja")
    source = copy_of_tree(tmp_path / "source")
    for name in ("rocm/lib/llvm/bin/clang++", "rocm/include/hip/hip_runtime.h", "ck/include/ck_tile/core.hpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    compiler = tmp_path / "rocm/lib/llvm/bin/clang++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    example = tmp_path / "ck/example/ck_tile/01_fmha"
    example.mkdir(parents=True)
    (example / "fmha_fwd.hpp").touch()
    variables = {
        "FLASH_ROCM_BUILD": "ck",
        "FLASH_ROCM_ARCHS": "gfx90a;gfx942",
        "FLASH_ROCM_INSTANCES": "*bf16_d128*",
        "ROCM_HOME": str(tmp_path / "rocm"),
        "CK_HOME": str(tmp_path / "ck"),
        "MAX_JOBS": "1",
    }
    path = build_wheel(source, tmp_path / "out", variables)
    assert (
        re.fullmatch(r"flash_rocm-[\d.]+\+ck\.gfx90a\.gfx942-py3-none-\w+\.whl", path.name) and "any" not in path.name
    )
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        listed = json.loads(archive.read("flash_rocm/_ck/instances.json"))
    assert {f"flash_rocm/_ck/{name}" for name in ("_C.so", "_hip_stand_in.so", "backend.py", "csrc/core.cpp")} <= names
    assert not {name for name in names if name.endswith((".o", ".ninja")) or "/generated/" in name}
    assert listed["archs"] == ["gfx90a", "gfx942"] and len(listed["instances"]) == 17
    assert {instance["headdim"] for instance in listed["instances"]} == {128}
    installed = tmp_path / "installed"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(installed)
    code = f"""
    import torch, flash_rocm
    from flash_rocm import cli
    assert flash_rocm.__file__.startswith({str(installed)!r}), flash_rocm.__file__
    options = ["--shape", "2,4096,4096,32,8,128", "--causal", "--dtype", "bf16", "--backward"]
    assert cli.main(["explain", "--arch", "gfx942", *options]) == 0
    """
    out = run(code, installed)
    assert "back end: ck" in out and "config backward: backward_bf16_d128_dense_masked (" in out


def test_a_wheel_for_cuda(tmp_path: pathlib.Path) -> None:
    """All of a build but nvcc."""
    if shutil.which("g++") is None or not shutil.which("ninja", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin"):
        pytest.skip("needs g++ and ninja")
    home = nvcc_that_says(tmp_path / "cuda", "Cuda compilation tools, release 13.0, V13.0.48")
    variables = {"FLASH_ROCM_BUILD": "cuda", "FLASH_ROCM_ARCHS": "sm90", "CUDA_HOME": str(home), "MAX_JOBS": "1"}
    path = build_wheel(copy_of_tree(tmp_path / "source"), tmp_path / "out", variables)
    assert re.fullmatch(r"flash_rocm-[\d.]+\+cuda\.sm90-py3-none-\w+\.whl", path.name) and "any" not in path.name
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        listed = json.loads(archive.read("flash_rocm/_ck/cuda.json"))
    assert listed["archs"] == ["sm90"]
    assert "flash_rocm/_ck/_CUDA.so" in names and not {name for name in names if name.endswith((".o", ".ninja"))}


def run(code: str, path: pathlib.Path, **variables: str) -> str:
    """Run code in a fresh interpreter without a GPU, with ``path`` before everything else."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    started = f"import sys\nsys.path.insert(0, {str(path)!r})\n" + textwrap.dedent(code)
    child = subprocess.run(
        [sys.executable, "-c", started],
        env={**os.environ, **hidden, **variables},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def test_only_one_top_level_name(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"flash_rocm"}
    assert len(names) == 2


def test_every_module_and_config_is_in_the_wheel(installed: pathlib.Path) -> None:
    inside = {"flash_rocm": ".", "triton_backend": "_triton", "ck_backend": "_ck", "configs": "_configs"}
    for folder, package in (inside | {"third_party": "_third_party"}).items():
        for pattern in ("*.py", "*.json", "csrc/*"):
            for path in (ROOT / folder).rglob(pattern):
                relative = path.relative_to(ROOT / folder)
                assert (installed / "flash_rocm" / package / relative).is_file(), f"{folder}/{relative} is missing"


def test_works_without_triton_and_without_a_gpu(installed: pathlib.Path) -> None:
    out = run(
        BLOCK_TRITON
        + f"""
import torch, flash_rocm
from flash_rocm import cli
assert flash_rocm.__file__.startswith({str(installed)!r}), flash_rocm.__file__
q = torch.randn(1, 5, 2, 8, requires_grad=True)
out = flash_rocm.flash_attn_func(q, q, q, causal=True)
out.sum().backward()
assert out.shape == q.shape and torch.isfinite(q.grad).all()
assert cli.main(["info"]) == 0
assert cli.main(["explain", "--arch", "gfx942"]) == 1
        """,
        installed,
    )
    assert "not installed" in out
    assert "the triton package is not installed" in out


def test_import_loads_no_kernel(installed: pathlib.Path) -> None:
    """Neither Triton nor any back end is imported before a call needs it."""
    code = """
    import torch
    before = set(sys.modules)
    import flash_rocm
    new = set(sys.modules) - before
    print([name for name in new if name.startswith(("triton", "flash_rocm._", "flash_rocm.reference", "transformers"))])
    """
    assert run(code, installed).strip() == "[]"


@pytest.mark.unpoisoned
def test_import_is_quick(installed: pathlib.Path) -> None:
    code = """
    import torch, time
    started = time.perf_counter()
    import flash_rocm
    print(time.perf_counter() - started)
    """
    times = sorted(float(run(code, installed)) for _ in range(5))
    assert times[2] < IMPORT_LIMIT_S, times


@pytest.mark.parametrize(
    ("request_", "words"), [("CUDA", "FLASH_ROCM_ARCHS: expected archs of NVIDIA"), ("x", "expected ck, cuda or none")]
)
def test_a_compiled_build_is_refused(request_: str, words: str) -> None:
    """Asking for what cannot be built fails, instead of building something else."""
    child = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env={**os.environ, "FLASH_ROCM_BUILD": request_, "FLASH_ROCM_ARCHS": "gfx942"},
        capture_output=True,
        text=True,
    )
    assert child.returncode != 0
    assert words in child.stderr and "FLASH_ROCM_BUILD" in child.stderr
    assert "Traceback" not in child.stderr
