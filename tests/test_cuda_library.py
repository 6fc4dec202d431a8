"""The auxiliary kernels for NVIDIA GPUs: how they are translated and built, and which calls take them."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from auxiliary_library import CUDA_CACHE, cuda_launch
from config_files import write
from flash_rocm._ck import build_cuda, hipified
from flash_rocm._ck.build import BuildError
from kvcache_calls import check
from test_auxiliary import problem_of

import flash_rocm
from flash_rocm import auxiliary, cli, config, cuda_library, files
from flash_rocm.arch import arch_named, gpu_arch
from flash_rocm.config_schema import ConfigError
from flash_rocm.testing import CacheCall, assert_caches_close, make_cache_inputs, oracle_cached
from flash_rocm.testing.kvcache import oracle_combine
from flash_rocm.tune import write as tune_write

SM90 = arch_named("sm90")
CHOICE = {"kernels": ["append"], "provenance": {"how": "first choice"}}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for cache in (cuda_library._built, config.arch_configs):
        cache.cache_clear()
    cuda_library._launches.clear()
    yield
    cuda_library._launches.clear()


# --------------------------------------------------------------------------------------------------
# Translated for ROCm


def test_nothing_of_cuda_is_left_in_what_is_hipified(tmp_path: pathlib.Path) -> None:
    """Types, functions and headers; and no header of torch's C++ ABI, before or after."""
    kernels = hipified.write(tmp_path)
    assert [path.name for path in kernels] == ["auxiliary_cache.hip", "auxiliary_gradients.hip"]
    for path in (*kernels, tmp_path / "device_hip.cuh"):
        text = path.read_text()
        assert not re.findall(r"\w*cuda\w*|__nv_\w+|\bCUDA\w*|\bcu[A-Z]\w+", text, re.IGNORECASE), path
        assert not re.findall(r"#include\s*[<\"](?:c10|ATen|torch)/", text), path
    assert any("hipStream_t" in path.read_text() and "<<<" in path.read_text() for path in kernels)
    for path in hipified.CSRC.iterdir():
        assert not re.findall(r"#include\s*[<\"](?:c10|ATen)/", path.read_text()), path
    times = {path: path.stat().st_mtime_ns for path in kernels}
    assert {path: path.stat().st_mtime_ns for path in hipified.write(tmp_path)} == times


# --------------------------------------------------------------------------------------------------
# Built for CUDA


def nvcc_that_says(folder: pathlib.Path, text: str) -> pathlib.Path:
    """A CUDA toolkit whose compiler makes an object for whatever it is told to compile."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo "{text}"; exit;; esac\n'
        'for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done\n'
        'echo "$*" >> "$(dirname "$0")/calls"; : > "$out"; [ -z "${out%%*.o}" ] && : > "$out.d"; exit 0\n'
    )
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
    return folder


def test_a_build(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """All but nvcc: the files, the flags, the list, and that the library is found."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    home = nvcc_that_says(tmp_path / "cuda-13", "Cuda compilation tools, release 13.0, V13.0.48")
    monkeypatch.setenv("CUDA_HOME", str(home))
    out = tmp_path / "cache/cuda"
    assert cli.main(["build", "--cuda", "--arch", "sm80,sm90", "--jobs", "1", "--output", str(out)]) == 0
    assert "auxiliary kernels in" in capfd.readouterr().out
    calls = (home / "bin/calls").read_text().splitlines()
    assert len(calls) == 3
    # One between the archs takes the code of the older.
    assert all("arch=compute_80,code=[sm_80,compute_80]" in call for call in calls[:2]) and "-shared" in calls[2]
    assert json.loads((out / "cuda.json").read_text())["archs"] == ["sm80", "sm90"]
    assert cuda_library.built() is None
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "cache"))
    found = cuda_library.built()
    assert found is not None and found.folder == out and found.runs_on(SM90)


def test_a_compiler_that_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it said, and a hint that says nothing of ccache, which this build does not ask."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    home = nvcc_that_says(tmp_path / "cuda-13", "Cuda compilation tools, release 13.0, V13.0.48")
    nvcc = home / "bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace("exit 0", "echo no such kernel >&2; exit 1"))
    monkeypatch.setenv("CUDA_HOME", str(home))
    out = tmp_path / "cache/cuda"
    assert cli.main(["build", "--cuda", "--arch", "sm90", "--jobs", "1", "--output", str(out)]) == 1
    said = capfd.readouterr()
    assert "no such kernel" in said.out + said.err
    end = "a compiler failed: its text is above. Hint: MAX_JOBS=1 where memory is what ran out\n"
    assert said.err.endswith(end) and not (out / "cuda.json").exists()


@pytest.mark.parametrize(
    ("archs", "words"),
    [
        (("gfx942",), "FLASH_ROCM_ARCHS: expected archs of NVIDIA such as sm80;sm90, sm80 or newer, got gfx942"),
        (("sm70",), "sm80 or newer, got sm70"),
    ],
)
def test_archs_that_are_none(archs: tuple[str, ...], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        build_cuda.targets_of(archs)


def test_no_compiler_or_an_old_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError, match=r"expected nvcc in CUDA_HOME=.*, found none\. Hint: CUDA_HOME="):
        build_cuda._find_nvcc(str(tmp_path))
    old = nvcc_that_says(tmp_path / "old", "Cuda compilation tools, release 11.8, V11.8.89")
    with pytest.raises(BuildError, match=r"expected nvcc 12 or newer, got Cuda compilation tools, release 11\.8"):
        build_cuda._find_nvcc(str(old))
    monkeypatch.setenv("PATH", str(old / "bin"))
    with pytest.raises(BuildError, match="expected nvcc 12 or newer"):
        build_cuda._find_nvcc("")


@pytest.mark.parametrize("option", [("--dtype", "bf16"), ("--headdim", "64"), ("--instances", "x")], ids=str)
def test_the_command_says_what_is_wrong(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--cuda", "--arch", "sm90", *option]) == 2
    assert f"{option[0]}: expected no value with" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Chosen


def put_library(cache: pathlib.Path, text: str = '{"archs": ["sm90"], "built_with": "nothing"}') -> None:
    (cache / "cuda").mkdir()
    (cache / "cuda" / cuda_library.MANIFEST).write_text(text)
    (cache / "cuda" / cuda_library.LIBRARY).touch()


def explained(arch: str) -> str:
    q = torch.empty(4, 8, 128, dtype=torch.bfloat16, device="meta")
    pages = torch.empty(6, 16, 2, 128, dtype=torch.bfloat16, device="meta")
    starts, table = (torch.empty(n, dtype=torch.int32, device="meta") for n in ((3,), (2, 3)))
    chip = arch_named(arch)
    return str(
        flash_rocm.explain(q, pages, pages, cu_seqlens_q=starts, cu_seqlens_k=starts, block_table=table, arch=chip)
    )


def test_the_config_decides_and_explain_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "C++" not in explained("sm90")
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    put_library(tmp_path)
    assert f"config combine: C++ ({tmp_path}/cuda)" in explained("sm90")
    assert "config append: C++" not in explained("sm90")  # Triton's is faster
    for other in ("sm80", "gfx942"):  # older than the library; of another vendor
        assert "C++" not in explained(other)
    described = cuda_library.describe(("append", "combine"), SM90, None)
    assert [line.partition(":")[0] for line in described] == ["combine"]
    source = write(tmp_path, "sm90", auxiliary=CHOICE)
    assert cuda_library.chosen("append", SM90, source) is cuda_library.built()
    assert cuda_library.chosen("combine", SM90, source) is None
    assert cuda_library.launch_of("append", torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("arch", "value", "words"),
    [
        ("gfx942", CHOICE, "auxiliary: expected it for archs of NVIDIA, got it for gfx942"),
        ("sm90", CHOICE | {"kernels": ["attend"]}, r"auxiliary\.kernels\[0\]: expected"),
        ("sm90", {"kernels": ["append"]}, r"auxiliary\.provenance: expected a value"),
    ],
)
def test_a_wrong_choice(arch: str, value: dict[str, Any], words: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=words):
        config.arch_configs(arch, write(tmp_path, arch, auxiliary=value).folder)


def test_tuning_keeps_the_choice(tmp_path: pathlib.Path) -> None:
    """A file that ``flash-rocm tune --write`` makes says what the shipped one does, beside its own entries."""
    for arch in ("sm90", "sm86", "gfx942"):  # with it, by inheritance, without
        shipped = config.file_contents(arch)
        written = json.loads(tune_write.write(tmp_path, arch, []).read_text())
        assert written == shipped | {"arch": arch}
        assert ("auxiliary" in written) == arch.startswith("sm")


@pytest.mark.parametrize("text", ["{", '{"archs": ["sm90"]}', '{"archs": [], "built_with": ""}'])
def test_a_damaged_list(text: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    put_library(tmp_path, text)
    with pytest.raises(ConfigError, match=r"cuda\.json"):
        cuda_library.built()


def test_a_file_that_is_no_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    put_library(tmp_path)
    library = cuda_library.built()
    assert library is not None
    with pytest.raises(
        cuda_library.CudaLibraryError, match=r"_CUDA\.so: expected a library for torch .* build it again"
    ):
        cuda_library.load(library)


def test_a_library_of_a_newer_system(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by {path})")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    with pytest.raises(cuda_library.CudaLibraryError, match=r"GLIBCXX_3\.4\.32.*Hint: build it here, or on the oldest"):
        files.load_operators(tmp_path / "_C.so", cuda_library.CudaLibraryError)


# --------------------------------------------------------------------------------------------------
# Taken by calls on a GPU


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> list[str]:
    """Names of the kernels in C++ that calls launch, which the configs of a folder choose."""
    launch, names = cuda_launch(), []

    def launch_and_note(name: str, *args: Any) -> None:
        names.append(name)
        launch(name, *args)

    if CUDA_CACHE:
        monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", CUDA_CACHE)
    monkeypatch.setattr(cuda_library, "load", lambda library: launch_and_note)
    return names


@pytest.mark.gpu
@pytest.mark.parametrize("choice", [["append", "combine"], ["append"], []], ids=str)
def test_calls_take_what_the_config_chooses(
    choice: list[str], launched: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = gpu_arch(torch.cuda.current_device()).name
    raw = dict(config.file_contents(arch)) | {"arch": arch, "auxiliary": CHOICE | {"kernels": choice}}
    (tmp_path / f"{arch}.json").write_text(json.dumps(raw))
    monkeypatch.setenv("FLASH_ROCM_CONFIG_DIR", str(tmp_path))
    problem = problem_of(
        device_type="cuda", dtype=torch.float16, rotary_dim=32, window_right=0, num_splits=3, seqlen_k=300, page_size=16
    )
    check(problem, make_cache_inputs(problem, CacheCall(), device="cuda"))
    assert launched == choice
    assert [name for name in ("append", "combine") if f"config {name}: C++" in explained(arch)] == choice
    out, lse = torch.randn(4, 7, 3, 64, device="cuda"), torch.randn(4, 7, 3, device="cuda")
    found = flash_rocm.flash_attn_combine(out, lse)
    exact = oracle_combine(out, lse)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-6, atol=1e-6)
    assert launched == choice + [name for name in choice if name == "combine"]


@pytest.mark.gpu
def test_a_captured_graph_takes_them(launched: list[str]) -> None:
    """Nothing in a launch waits for the GPU or reads from it."""
    problem = problem_of(device_type="cuda", rotary_dim=32)
    case = make_cache_inputs(problem, CacheCall(), device="cuda")
    k, v = case.inputs.k.clone(), case.inputs.v.clone()
    launch = cuda_launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        auxiliary.append(launch, problem, case.inputs._replace(k=k, v=v))
    graph.replay()
    _, _, exact_k, exact_v, _ = oracle_cached(problem, case)
    assert_caches_close(problem, k, v, exact_k, exact_v)


@pytest.mark.gpu
@pytest.mark.usefixtures("launched")
def test_the_library_is_bound_to_the_stable_abi_alone(count_case: Callable[..., None]) -> None:
    """No symbol of torch's C++ ABI, whose names are mangled."""
    library = cuda_library.built()
    assert library is not None
    command = ["nm", "-D", "--undefined-only", str(library.folder / cuda_library.LIBRARY)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if re.search(r"c10|N2at|5torch", name)]
    count_case("auxiliary", "cuda", ["binding"], ["forward"])
