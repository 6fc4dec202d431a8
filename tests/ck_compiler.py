"""Programs that stand for the compilers of the ``ck`` back end: builds run whole, in no time."""

from __future__ import annotations

import os
import pathlib

import pytest
from flash_rocm._third_party import composable_kernel

#: Stands for clang, g++ and gcc: writes the output and the depfile that it is asked for, and a line about it.
PROGRAM = """#!/bin/sh
output=; depfile=
while [ $# -gt 0 ]; do
  case "$1" in -o) output=$2;; -MF) depfile=$2;; -fsyntax-only) exit 0;; esac
  shift
done
[ -z "$output" ] && exit 0
echo "$(basename "$output")" >> "$PRETEND_LOG"
if [ -n "$PRETEND_FAIL" ]; then
  for n in $(seq 50); do echo "line $n of a compiler"; done
  echo half > "$output"
  exit 1
fi
sleep "${PRETEND_SECONDS:-0}"
echo made > "$output"
[ -z "$depfile" ] || echo "$output:" > "$depfile"
"""


def program(path: pathlib.Path, text: str) -> None:
    """Write one that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def sources(folder: pathlib.Path, compiler: str) -> dict[str, str]:
    """A ROCm with a program for its compiler, an empty Composable Kernel, and the variables that name them."""
    rocm, ck = folder / "rocm", folder / "ck"
    program(rocm / "lib/llvm/bin/clang++", compiler)
    for path in (
        rocm / "include/hip/hip_runtime.h",
        ck / "include/ck_tile/core.hpp",
        ck / composable_kernel.EXAMPLE / "fmha_fwd.hpp",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return {"ROCM_HOME": str(rocm), "CK_HOME": str(ck), "CCACHE_DISABLE": "1"}


def pretend(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Set the environment to them, to a Composable Kernel without contents, and to a cache, all in a folder.

    Returns the file of what they were asked to make, see :func:`made`.
    """
    programs = folder / "programs"
    for name in ("g++", "gcc"):
        program(programs / name, PROGRAM)
    log = folder / "made.txt"
    log.touch()
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FLASH_ROCM_CACHE_DIR": str(folder / "cache"),
        "PRETEND_LOG": str(log),
    }
    for name, value in (variables | sources(folder, PROGRAM)).items():
        monkeypatch.setenv(name, value)
    return log


def made(log: pathlib.Path) -> list[str]:
    """Names of the files that they were asked to make, in order."""
    return log.read_text().split()
