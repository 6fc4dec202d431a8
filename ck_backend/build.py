"""Builds the library of the ``ck`` back end, on machines with ROCm or without, with or without a GPU.

What can be missing is looked for before anything is compiled, and each error says what to install.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch
from flash_rocm._third_party import composable_kernel, rocm_root

from flash_rocm import ck_instances, files
from flash_rocm.runtime import BuildRequest

from . import hipified
from .generate import NothingToBuild, Unit, units_of, write
from .ninja import BuildFile, joined

CSRC = pathlib.Path(__file__).with_name("csrc")
STAND_IN = "_hip_stand_in.so"
#: Of LLVM's own clang; 19 does not compile the asynchronous forward.  AMD's, which comes with ROCm, counts otherwise.
OLDEST_CLANG = 20
#: What is compiled for where FLASH_ROCM_ARCHS names nothing.
DEFAULT_ARCHS = ck_instances.TESTED_ARCHS
#: A job of the compiler at its largest.
BYTES_PER_JOB = 1_200_000_000
#: The stable ABI of torch that the binding is compiled for.
TORCH_TARGET = "0x{:02x}{:02x}000000000000".format(*files.OLDEST_TORCH)
#: Composable Kernel's own, with bf16 rounded to nearest: exp2 without a base change, and two passes of LLVM told not
#: to undo the order of instructions that the pipelines ask for.  The linker would warn of each bitcode module of the
#: stand-in root, which holds one constant and no data layout.
_HIP_FLAGS = (
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-D__HIP_PLATFORM_AMD__=1", "-DCK_TILE_FMHA_FWD_FAST_EXP2=1"),
    *("-DCK_TILE_FLOAT_TO_BFLOAT16_DEFAULT=3", "-fgpu-flush-denormals-to-zero", "-fvisibility=hidden"),
    *("-mllvm", "--lsr-drop-solution=1", "-mllvm", "-enable-post-misched=0", "-Wno-linker-warnings"),
)
_HOST_CODE = ("status.cpp", "core.cpp", "binding.cpp", "auxiliary_binding.cpp")
_CXX_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}")


COMPILER_FAILED = "a compiler failed: its text is above. Hint: MAX_JOBS=1 where memory is what ran out"
_CCACHE_HINT = ", CCACHE_DISABLE=1 where ccache cannot write"
#: What an error shows of a log.
_LAST_LINES = 15


class BuildError(RuntimeError):
    """The library cannot be built here, or a compiler failed; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """What a build uses."""

    rocm: pathlib.Path
    hip_compiler: str
    cxx: str
    cc: str
    ninja: str
    source: composable_kernel.Source
    jobs: int
    ccache: str  # "" where there is none

    def describe(self) -> str:
        """One line for the record of a build."""
        where = f"Composable Kernel of {self.source.where}"
        return f"{self.hip_compiler}, ROCm {self.rocm}, {where}, torch {torch.__version__}"


def find_toolchain(request: BuildRequest, cache: pathlib.Path) -> Toolchain:
    """Look for all that a build needs.

    Args:
        cache: folder for the stand-in of ROCm and for Composable Kernel, where they have to be fetched.

    Raises:
        BuildError: something is missing, or not what is expected.
    """
    check_torch()
    try:
        source = composable_kernel.find(request.ck_home, cache / "composable_kernel")
        rocm, compiler = _find_rocm(request.rocm_home, cache / "rocm")
    except (composable_kernel.SourceError, rocm_root.RocmRootError) as error:
        raise BuildError(str(error)) from error
    toolchain = Toolchain(
        rocm=rocm,
        hip_compiler=compiler,
        cxx=find_program("g++", "c++", hint="apt-get install g++"),
        cc=find_program("gcc", "cc", hint="apt-get install gcc"),
        ninja=find_ninja(),
        source=source,
        jobs=jobs_of(request.max_jobs),
        ccache=shutil.which("ccache") or "",
    )
    if not source.pinned:
        _probe(toolchain, cache)
    return toolchain


def why_not(request: BuildRequest) -> str:
    """What keeps this machine from compiling, as far as a look at its programs tells; "" if nothing does."""
    try:
        check_torch()
        find_hip_compiler(request.rocm_home)
        find_ninja()
        find_program("g++", "c++", hint="apt-get install g++")
        find_program("gcc", "cc", hint="apt-get install gcc")
    except BuildError as error:
        return str(error)
    return ""


def check_torch() -> None:
    """Raise BuildError where libraries cannot be compiled against this torch."""
    headers = pathlib.Path(torch.__file__).parent / "include"
    if why := files.torch_too_old():
        raise BuildError(why)
    if not (headers / "torch/csrc/stable/library.h").is_file():
        raise BuildError(
            f"torch: expected its headers in {headers}, with torch/csrc/stable/library.h, found none. "
            "Hint: pip install torch, whose wheel has them"
        )


def find_ninja() -> str:
    """The program, on the path or beside Python, where pip puts it; another one than last time compiles all again."""
    return find_program("ninja", str(pathlib.Path(sys.executable).with_name("ninja")), hint="pip install ninja")


def find_program(*names: str, hint: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"expected {names[0]}, found none. Hint: {hint}")


def _find_rocm(home: str, stand_in: pathlib.Path) -> tuple[pathlib.Path, str]:
    """A ROCm and its compiler, see :func:`find_hip_compiler`; LLVM's clang gets the stand-in."""
    root, compiler = find_hip_compiler(home)
    return root or rocm_root.make(stand_in), compiler


def is_rocm(root: pathlib.Path) -> bool:
    """Whether a folder has the headers of HIP."""
    return (root / "include/hip/hip_runtime.h").is_file()


def find_hip_compiler(home: str) -> tuple[pathlib.Path | None, str]:
    """A compiler and the ROCm that it is of: that of ``ROCM_HOME``, that of /opt/rocm, or LLVM's clang and None.

    Raises:
        BuildError: there is none, or it is too old.
    """
    root = pathlib.Path(home or "/opt/rocm")
    for inside in ("lib/llvm/bin/clang++", "llvm/bin/clang++", "bin/amdclang++"):
        if (root / inside).is_file() and is_rocm(root):
            return root, str(root / inside)
    if home:
        raise BuildError(
            f"ROCM_HOME: expected a ROCm with include/hip/hip_runtime.h and lib/llvm/bin/clang++, got {home!r}. "
            "Hint: unset it to compile without ROCm"
        )
    compiler = find_program("clang++-22", "clang++", hint="apt-get install clang-22 lld-22 llvm-22 clang-tools-22")
    check_clang(compiler)
    for tool in ("clang-offload-bundler", "ld.lld"):
        beside = pathlib.Path(compiler).resolve().with_name(tool)
        find_program(str(beside), f"{tool}-22", tool, hint="apt-get install lld-22 clang-tools-22")
    return None, compiler


def check_clang(compiler: str) -> None:
    """Raise BuildError for a clang that is too old."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    found = re.search(r"clang version (\d+)", done.stdout)
    if found is None or int(found.group(1)) < OLDEST_CLANG:
        version = done.stdout.splitlines()[0] if done.stdout else "no answer"
        raise BuildError(
            f"{compiler}: expected clang {OLDEST_CLANG} or newer, got {version}. Hint: apt-get install clang-22 lld-22"
        )


def jobs_of(max_jobs: str) -> int:
    """``MAX_JOBS``, or as many as there are processors and memory for.

    Raises:
        BuildError: it is no number >= 1.
    """
    if max_jobs:
        if not max_jobs.isdecimal() or int(max_jobs) < 1:
            raise BuildError(f"MAX_JOBS: expected a number >= 1, got {max_jobs!r}. Hint: unset it to go by memory")
        return int(max_jobs)
    available = re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text())
    by_memory = int(available.group(1)) * 1024 // BYTES_PER_JOB if available else 1
    return max(1, min(os.cpu_count() or 1, by_memory))


def _probe(toolchain: Toolchain, cache: pathlib.Path) -> None:
    """Whether another Composable Kernel than the pinned one has what the instances use."""
    cache.mkdir(parents=True, exist_ok=True)
    probe = cache / "probe.cpp"
    probe.write_text('#include "forward.hpp"\n')
    flags = hip_flags(toolchain, ("gfx942",))
    command = [toolchain.hip_compiler, *flags, "-fsyntax-only", "--cuda-host-only", str(probe)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        raise BuildError(
            f"{toolchain.source.root}: expected a Composable Kernel like that of {composable_kernel.WHEEL}, got one "
            f"that does not compile: {(errors or ['no error text'])[0]}. Hint: unset CK_HOME"
        )


def cxx_flags() -> str:
    """Flags that compile host code, for the shell."""
    torch_root = pathlib.Path(torch.__file__).parent
    return joined([*_CXX_FLAGS, "-isystem", torch_root / "include", "-I", CSRC])


def torch_libraries() -> str:
    """What a library is linked to, for the shell."""
    return joined([f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"])


def hip_flags(toolchain: Toolchain, archs: Sequence[str]) -> list[str]:
    """Flags that compile an instance."""
    includes = [flag for folder in toolchain.source.include_dirs for flag in ("-isystem", str(folder))]
    targets = [f"--offload-arch={arch}" for arch in archs]
    return ["-x", "hip", *targets, f"--rocm-path={toolchain.rocm}", *_HIP_FLAGS, *includes, "-I", str(CSRC)]


def _build_file(
    toolchain: Toolchain,
    sources: dict[Unit, pathlib.Path],
    auxiliary: Sequence[pathlib.Path],
    archs: Sequence[str],
    work: pathlib.Path,
    out: pathlib.Path,
) -> BuildFile:
    """An object for each unit, auxiliary kernel and file of host code; the library; the stand-in."""
    file = BuildFile(work)
    _add_rules(file, toolchain)
    file.rule("stand_in", f"{toolchain.cc} -O2 -fPIC -shared -o $out $in", "$name", compiles=False)
    _add_instances(file, toolchain, sources)
    for source in auxiliary:
        _add_device_code(file, toolchain, source, archs)
    for source in (*(CSRC / name for name in _HOST_CODE), work / "generated" / "table.cpp"):
        file.compile("cxx", source)
    file.link("link", out / ck_instances.LIBRARY)
    file.make("stand_in", out / STAND_IN, CSRC / "stand_in_hip.c")
    return file


def _add_rules(file: BuildFile, toolchain: Toolchain) -> None:
    """How device code and host code are compiled, and a library is linked."""
    hip, cxx = (joined([*filter(None, [toolchain.ccache]), name]) for name in (toolchain.hip_compiler, toolchain.cxx))
    file.rule("hip", f"{hip} -MD -MF $out.d $flags -c $in -o $out", "$name for $archs", compiles=True)
    file.rule("cxx", f"{cxx} -MD -MF $out.d {cxx_flags()} -c $in -o $out", "$name", compiles=True)
    file.rule("link", f"{toolchain.cxx} -shared -o $out $in {torch_libraries()}", "link $name", compiles=False)


def _add_instances(file: BuildFile, toolchain: Toolchain, sources: dict[Unit, pathlib.Path]) -> None:
    for unit, source in sources.items():
        _add_device_code(file, toolchain, source, unit.instance.archs, unit.flags)


def _add_device_code(
    file: BuildFile, toolchain: Toolchain, source: pathlib.Path, archs: Sequence[str], own_flags: Sequence[str] = ()
) -> None:
    flags = joined([*hip_flags(toolchain, archs), *own_flags])
    file.compile("hip", source, flags=flags, archs=", ".join(archs))


def build(request: BuildRequest, work: pathlib.Path, out: pathlib.Path, folder: str | None = None) -> list[Unit]:
    """Compile what is not compiled yet into ``out``: the library, the stand-in of HIP, and the list of instances.

    Args:
        work: generated files and objects, which the next build starts from.
        folder: config files that replace the shipped ones.

    Raises:
        BuildError: something is missing, or a compiler failed; what it said has been printed.
        ConfigError: a config file is wrong.
    """
    archs = request.archs or DEFAULT_ARCHS
    try:
        patterns = [name.strip() for name in request.instances.split(",")]
        units = units_of(archs, patterns, folder)
    except NothingToBuild as error:
        raise BuildError(str(error)) from error
    build_library(find_toolchain(request, work.resolve()), units, archs, work, out)
    return units


def build_library(
    toolchain: Toolchain,
    units: Sequence[Unit],
    archs: tuple[str, ...],
    work: pathlib.Path,
    out: pathlib.Path,
    log: pathlib.Path | None = None,
) -> None:
    """Compile a whole library: operators, auxiliary kernels and instances, of which there may be none.

    Args:
        log: where compilers write to; default: printed.

    Raises:
        BuildError: a compiler failed.
    """
    work, out = work.resolve(), out.resolve()
    sources = write(work / "generated", units)
    file = _build_file(toolchain, sources, hipified.write(work / "hipified"), archs, work, out)
    _make(file, toolchain, units, archs, out, log)


def build_module(toolchain: Toolchain, unit: Unit, work: pathlib.Path, out: pathlib.Path, log: pathlib.Path) -> None:
    """Compile a library of one instance, which the operators of a whole one launch; see ``csrc/module.cpp``.

    Raises:
        BuildError: a compiler failed.
    """
    work, out = work.resolve(), out.resolve()
    sources = write(work / "generated", [unit])
    file = BuildFile(work)
    _add_rules(file, toolchain)
    _add_instances(file, toolchain, sources)
    for source in (CSRC / "module.cpp", work / "generated" / "table.cpp"):
        file.compile("cxx", source)
    file.link("link", out / ck_instances.LIBRARY)
    _make(file, toolchain, [unit], unit.instance.archs, out, log)


def _make(
    file: BuildFile,
    toolchain: Toolchain,
    units: Sequence[Unit],
    archs: tuple[str, ...],
    out: pathlib.Path,
    log: pathlib.Path | None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    # A library without its list is no library, so that an interrupted build leaves none that is half.
    (out / ck_instances.MANIFEST).unlink(missing_ok=True)
    if not file.run(toolchain.ninja, toolchain.jobs, log):
        if log is None:
            raise BuildError(COMPILER_FAILED + (_CCACHE_HINT if toolchain.ccache else ""))
        lines = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        raise BuildError("\n".join(["a compiler failed; the end of what it said:", *lines]))
    contents = ck_instances.manifest(archs, [unit.instance for unit in units], toolchain.describe())
    (out / ck_instances.MANIFEST).write_text(json.dumps(contents, indent=1) + "\n")
