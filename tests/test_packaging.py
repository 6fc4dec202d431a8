"""The wheel: one top-level name, importable without Triton, without a GPU, quickly."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import ck_compiler
import clean_environment
import pytest
from test_cuda_library import nvcc_that_says

# Wheels are built once, not by every worker.
pytestmark = pytest.mark.xdist_group("packaging")

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
    """The wheel without a compiled library."""
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
    built = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "FLASH_ROCM_BUILD": "none", **variables}
    )
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


def pretended_rocm(folder: pathlib.Path) -> dict[str, str]:
    """A ROCm and a Composable Kernel that a build takes for real; the variables that name them."""
    if shutil.which("g++") is None or not shutil.which("ninja", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin"):
        pytest.skip("needs g++ and ninja")
    return ck_compiler.sources(folder, FAKE_COMPILER) | {"MAX_JOBS": "1"}


def test_a_wheel_with_the_compiled_library(tmp_path: pathlib.Path) -> None:
    """All of a build but the compiler of HIP and Composable Kernel, which make ck has: files, name, tag, version."""
    source = copy_of_tree(tmp_path / "source")
    variables = pretended_rocm(tmp_path) | {
        "FLASH_ROCM_BUILD": "ck",
        "FLASH_ROCM_ARCHS": "gfx90a;gfx942",
        "FLASH_ROCM_INSTANCES": "*bf16_d128*",
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


@pytest.fixture(scope="module")
def from_sdist(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel that the source distribution gives."""
    source, out = copy_of_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    pure = {**os.environ, "FLASH_ROCM_BUILD": "none"}
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, env=pure)
    assert built.returncode == 0, built.stdout + built.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return build_wheel(out / archive.name.removesuffix(".tar.gz"), tmp_path_factory.mktemp("from_sdist"), {})


@pytest.fixture(scope="module")
def clean_python(from_sdist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Python of an environment in which that wheel was installed beside torch, numpy and mypy."""
    return clean_environment.create(tmp_path_factory.mktemp("clean") / "venv", from_sdist, ["torch", "numpy", "mypy"])


def test_the_source_distribution_gives_the_same_wheel(from_sdist: pathlib.Path, wheel: pathlib.Path) -> None:
    contents = []
    for path in (from_sdist, wheel):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")})
    assert contents[0] == contents[1]
    assert "flash_rocm/py.typed" in contents[0]


def test_a_clean_environment(clean_python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It installs, lacks nothing, and both the package and the command work there."""
    check = subprocess.run([clean_python, "-m", "pip", "check"], capture_output=True, text=True, cwd=tmp_path)
    assert check.returncode == 0 and "No broken requirements" in check.stdout, check.stdout
    code = (
        "import torch, flash_rocm as f; q = torch.ones(1, 5, 2, 8); print(f.__file__, f.flash_attn_func(q, q, q).shape)"
    )
    child = subprocess.run([clean_python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert str(clean_python.parent.parent) in child.stdout and "torch.Size([1, 5, 2, 8])" in child.stdout, child.stderr
    command = subprocess.run([clean_python.parent / "flash-rocm", "info"], capture_output=True, text=True, cwd=tmp_path)
    assert command.returncode == 0 and "reference  available" in command.stdout, command.stderr


CONSUMER = """
import torch
from typing_extensions import assert_type

import flash_rocm
from flash_rocm import v3

q = torch.randn(1, 5, 2, 8)
assert_type(flash_rocm.explain(q, q, q), flash_rocm.backends.Explanation)
with flash_rocm.use_backend("reference"):
    out = flash_rocm.flash_attn_func(q, q, q, causal=True, window_size=(3, 0))
v3.flash_attn_func(q, q, q, softcap=1.0)
"""
#: What a type checker must find in it.
MISTAKES = {
    'flash_rocm.flash_attn_func(q, q, q, causal="yes")': "arg-type",
    "flash_rocm.flash_attn_func(q, q, q, no_such=1)": "call-arg",
    "v3.flash_attn_func(q, q)": "call-arg",
}


def test_type_hints_reach_callers(clean_python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """mypy, with the installed package, on code that uses it."""
    (tmp_path / "consumer.py").write_text(CONSUMER + "\n".join(MISTAKES) + "\n")
    # torch's own source takes long to read, and is not the question.
    config = "[mypy]\nstrict = True\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(config)
    command = [clean_python, "-m", "mypy", "--config-file", "mypy.ini", "consumer.py"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    first = len(CONSUMER.splitlines()) + 1
    expected = [(first + index, code) for index, code in enumerate(MISTAKES.values())]
    errors = [re.match(r"consumer\.py:(\d+): error: .*\[(.*)\]$", line) for line in found]
    assert [(int(error[1]), error[2]) for error in errors if error] == expected, found


def test_the_changelog_is_about_this_version() -> None:
    text, version = (ROOT / "CHANGELOG.md").read_text(), re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
    headings = re.findall(r"^## (\S+?),? .+$", text, re.MULTILINE)
    current = version.search((ROOT / "flash_rocm" / "__init__.py").read_text())
    assert current is not None and headings[0] == current[1]


def test_named_extras_exist() -> None:
    """README, docs and messages name extras that there are."""
    wanted = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert wanted is not None
    extras = set(re.findall(r"^(\w+) = \[", wanted[1], re.MULTILINE))
    paths = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *(ROOT / "flash_rocm").rglob("*.py")]
    named = {
        name
        for path in paths
        for group in re.findall(r"flash_rocm\[([\w,]+)\]", path.read_text())
        for name in group.split(",")
    }
    assert named and named <= extras


@pytest.fixture(scope="module")
def hf_kernel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The repository folder for Hugging Face's kernels."""
    out = tmp_path_factory.mktemp("hf") / "kernel"
    command = [sys.executable, ROOT / "packaging" / "hf_kernel.py", out]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "OUT: expected an empty or new folder" in again.stderr
    return out


USE_KERNEL = """
import pathlib, sys, kernels, torch
kernel = kernels.get_local_kernel(pathlib.Path(sys.argv[1]))
q = torch.randn(1, 5, 2, 8, requires_grad=True)
out = kernel.flash_attn_func(q, q, q, causal=True)
out.sum().backward()
expected = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
torch.testing.assert_close(out, expected)
import flash_rocm
print(kernel.__name__, flash_rocm.__file__, kernel.explain(q, q, q).backend, kernel.v3.flash_attn_func(q, q, q).shape)
"""


def test_hugging_face_kernels_load_it(hf_kernel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """From the folder, where no flash_rocm is installed; nothing is fetched."""
    python = clean_environment.create(tmp_path / "venv", None, ["torch", "numpy", "kernels"])
    command = [python, "-c", USE_KERNEL, hf_kernel]
    child = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert child.returncode == 0, child.stderr
    name, file, backend, *_ = child.stdout.split()
    assert (name, backend) == ("flash_rocm_1_universal", "reference")
    assert file == str(hf_kernel / "build/torch-universal/flash_rocm/package/flash_rocm/__init__.py")
    metadata = json.loads((hf_kernel / "build" / "torch-universal" / "metadata.json").read_text())
    build = kernels_build(hf_kernel)
    assert metadata["name"] == "flash-rocm" and {str(each).lower() for each in build} >= {"cpu", "cuda", "rocm"}


def kernels_build(folder: pathlib.Path) -> list[object]:
    """Back ends of build.toml, as the builder's own parser reads them."""
    from kernels._rust import Build

    return list(Build.open(folder).general.backends)


def test_a_kernel_beside_another_version_refuses(hf_kernel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    package = tmp_path / "flash_rocm"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.0.1"\n__all__ = []\n')
    init = hf_kernel / "build" / "torch-universal" / "flash_rocm" / "__init__.py"
    child = subprocess.run(
        [sys.executable, "-c", f"import runpy; runpy.run_path({str(init)!r})"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert child.returncode == 1
    assert "flash_rocm: expected version 0.1.0, as this kernel has, got 0.0.1, which is installed" in child.stderr


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


def test_an_editable_install_with_the_compiled_library(tmp_path: pathlib.Path) -> None:
    """What is built stands in the tree, where the package is found."""
    source = copy_of_tree(tmp_path / "source")
    variables = pretended_rocm(tmp_path) | {"FLASH_ROCM_BUILD": "ck", "FLASH_ROCM_INSTANCES": "forward_bf16_d64_dense"}
    code = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "+ck.gfx90a.gfx942-" in child.stdout.split()[-1]
    (instance,) = json.loads((source / "ck_backend/instances.json").read_text())["instances"]
    assert instance["headdim"] == 64
    assert all((source / "ck_backend" / name).is_file() for name in ("_C.so", "_hip_stand_in.so"))


def test_composable_kernel_is_the_default_where_rocm_is(tmp_path: pathlib.Path) -> None:
    """Told by the version of what would be built; where pip isolates a build, there is no torch to compile against."""
    variables = pretended_rocm(tmp_path)

    def version_of(before: str = "pass", **changes: str) -> tuple[str, str]:
        code = f"import runpy, sys; {before}; sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
        left_out = ("FLASH_ROCM_BUILD", "FLASH_ROCM_ARCHS", "GPU_ARCHS")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        environment = inherited | variables | changes
        child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        return child.stdout.split()[-1].partition("+")[2], child.stderr

    local, said = version_of()
    assert local == "ck.gfx90a.gfx942" and f"FLASH_ROCM_BUILD: ck, for ROCm is in {tmp_path / 'rocm'}" in said
    assert version_of(FLASH_ROCM_ARCHS="gfx942")[0] == "ck.gfx942"
    for nothing in (
        version_of(FLASH_ROCM_BUILD="none"),
        version_of(ROCM_HOME=str(tmp_path / "none")),
        version_of(before="sys.modules['torch'] = None"),
    ):
        assert nothing[0] == "" and "FLASH_ROCM_BUILD" not in nothing[1]
    (tmp_path / "rocm/lib/llvm/bin/clang++").unlink()
    local, said = version_of()
    assert local == "" and "FLASH_ROCM_BUILD: none, though ROCm is in" in said and "got '" in said


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
