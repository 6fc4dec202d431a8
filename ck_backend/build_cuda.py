"""Builds the auxiliary kernels for NVIDIA GPUs: nvcc compiles ``csrc/*.cu`` as they are."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Sequence

import torch

from flash_rocm import cuda_library
from flash_rocm.runtime import BuildRequest

from .build import (
    COMPILER_FAILED,
    CSRC,
    BuildError,
    check_torch,
    cxx_flags,
    find_ninja,
    find_program,
    jobs_of,
    torch_libraries,
)
from .hipified import KERNELS
from .ninja import BuildFile, joined

#: What is built where no archs are named.
DEFAULT_ARCHS = ("sm80", "sm90")
#: The first whose standard library and language the sources were compiled with is 13; 12 knows C++20 too.
OLDEST_NVCC = 12
_HOST_CODE = ("status.cpp", "auxiliary_binding.cpp")
_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden")
#: Another name than that of the library for ROCm, which a process can have too, for the virtual GPU.
_NAME = "-DFLASH_ROCM_AUXILIARY=flash_rocm_cuda"


def _find_nvcc(home: str) -> str:
    """The compiler of ``CUDA_HOME``, that on the path, or that of /usr/local/cuda.

    Raises:
        BuildError: there is none, or it is too old.
    """
    found = shutil.which(str(pathlib.Path(home) / "bin/nvcc")) if home else shutil.which("nvcc")
    found = found or (None if home else shutil.which("/usr/local/cuda/bin/nvcc"))
    if found is None:
        where = f"in CUDA_HOME={home}" if home else "on the path or in /usr/local/cuda"
        raise BuildError(f"expected nvcc {where}, found none. Hint: CUDA_HOME=/path/of/the/CUDA/toolkit")
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)", said)
    if version is None or int(version.group(1)) < OLDEST_NVCC:
        got = said.strip().splitlines()[-1] if said.strip() else "no answer"
        raise BuildError(f"{found}: expected nvcc {OLDEST_NVCC} or newer, got {got}. Hint: CUDA_HOME of a newer one")
    return found


def targets_of(archs: Sequence[str]) -> list[str]:
    """Flags that compile for archs, and for all GPUs that are newer than the oldest of them.

    Raises:
        BuildError: a name is not that of an NVIDIA arch.
    """
    for arch in archs:
        if not re.fullmatch(r"sm\d{2,3}", arch) or int(arch[2:]) < 80:
            raise BuildError(f"FLASH_ROCM_ARCHS: expected archs of NVIDIA such as sm80;sm90, sm80 or newer, got {arch}")
    numbers = sorted({int(arch[2:]) for arch in archs})
    # The driver compiles the code of the nearest older arch for a GPU that is not named.
    return [f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]" for number in numbers]


def build(request: BuildRequest, work: pathlib.Path, out: pathlib.Path) -> tuple[str, ...]:
    """Compile what is not compiled yet into ``out``: the library and the list of its archs, which is returned.

    Args:
        work: objects, which the next build starts from.

    Raises:
        BuildError: something is missing, or a compiler failed; what it said has been printed.
    """
    check_torch()
    archs = request.archs or DEFAULT_ARCHS
    targets, nvcc, ninja = targets_of(archs), _find_nvcc(request.cuda_home), find_ninja()
    cxx = find_program("g++", "c++", hint="apt-get install g++")
    work, out = work.resolve(), out.resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    file = BuildFile(work)
    flags = joined([*_FLAGS, *targets, "-I", CSRC])
    file.rule("nvcc", f"{nvcc} -MD -MF $out.d {flags} -c $in -o $out", "$name for $archs", compiles=True)
    file.rule("cxx", f"{cxx} -MD -MF $out.d {cxx_flags()} {_NAME} -c $in -o $out", "$name", compiles=True)
    file.rule("link", f"{nvcc} -shared -o $out $in {torch_libraries()}", "link $name", compiles=False)
    for name in KERNELS:
        file.compile("nvcc", CSRC / name, archs=", ".join(archs))
    for name in _HOST_CODE:
        file.compile("cxx", CSRC / name)
    file.link("link", out / cuda_library.LIBRARY)
    # A library without its list is no library, so that an interrupted build leaves none that is half.
    (out / cuda_library.MANIFEST).unlink(missing_ok=True)
    if not file.run(ninja, min(jobs_of(request.max_jobs), os.cpu_count() or 1)):
        raise BuildError(COMPILER_FAILED)
    contents = cuda_library.manifest(archs, f"{nvcc}, torch {torch.__version__}")
    (out / cuda_library.MANIFEST).write_text(json.dumps(contents, indent=1) + "\n")
    return archs
