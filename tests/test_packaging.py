"""The wheel: one top-level name, importable without Triton, without a GPU, quickly."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel, built from a copy: setuptools leaves its build folder where it works."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
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
    built = subprocess.run(command, capture_output=True, text=True)
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


@pytest.mark.parametrize(("request_", "words"), [("CUDA", "no compiled"), ("x", "expected ck, cuda or none")])
def test_a_compiled_build_is_refused(request_: str, words: str) -> None:
    """Asking for what cannot be built fails, instead of building something else."""
    child = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FLASH_ROCM_BUILD": request_},
        capture_output=True,
        text=True,
    )
    assert child.returncode != 0
    assert words in child.stderr and "FLASH_ROCM_BUILD" in child.stderr
    assert "Traceback" not in child.stderr
