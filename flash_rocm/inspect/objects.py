"""Reports of code objects that something else has made, through LLVM's disassembler."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import subprocess

from flash_rocm import runtime
from flash_rocm.amdgpu.assembly import AssemblyError, parse_objdump_code

from .counts import InspectError, is_cdna
from .report import Case, Report, Resources, Work, amd_report

_MINIMUM_LLVM = 22
_HEADER = re.compile(r"^([0-9a-f]+) <([^>]+)>:$", re.MULTILINE)


def find_objdump() -> pathlib.Path:
    """llvm-objdump of LLVM 22 or newer: a versioned one on PATH, the plain one, or that of ROCm.

    Raises:
        InspectError: none is there, or all are older.
    """
    candidates = [
        shutil.which(f"llvm-objdump-{version}") for version in range(_MINIMUM_LLVM + 8, _MINIMUM_LLVM - 1, -1)
    ]
    candidates += [shutil.which("llvm-objdump"), shutil.which("llvm-objdump", path=f"{runtime.rocm_home()}/llvm/bin")]
    seen = []
    for path in (path for path in candidates if path):
        version = _llvm_version(path)
        if version >= _MINIMUM_LLVM:
            return pathlib.Path(path)
        seen.append(f"{path} is LLVM {version}")
    raise InspectError(
        f"code objects need llvm-objdump of LLVM {_MINIMUM_LLVM} or newer on PATH or in $ROCM_HOME/llvm/bin: "
        f"{'; '.join(seen) or 'none found'}. Hint: apt-get install llvm-{_MINIMUM_LLVM}"
    )


def _llvm_version(path: str) -> int:
    found = re.search(r"LLVM version (\d+)", _run([path, "--version"]))
    return int(found.group(1)) if found else 0


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InspectError(f"{pathlib.Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def inspect_object(path: pathlib.Path, arch: str, kernel: str, headdim: int) -> list[Report]:
    """One report for each kernel in a code object.

    Nobody tells how many scores such a kernel computes at a time, so all its matrix work counts as useful:
    Ru equals R, and N follows from the matrix work and the head dim.

    Args:
        kernel: "forward" or "backward...", for the flop per score.
        headdim: 0 if not known; then there is no N.

    Raises:
        InspectError: no such file, no disassembler, no kernel inside, or an instruction that is not known.
    """
    if not path.is_file():
        raise InspectError(f"--object: expected a file, got {str(path)!r}")
    objdump = find_objdump()
    disassemble = [str(objdump), "-d", f"--mcpu={arch}", str(path)]
    if not is_cdna(arch):
        # LLVM uses the 16-bit halves of registers on RDNA by default, but its disassembler does not know them.
        disassemble.append("--mattr=+real-true16")
    text = _run(disassemble)
    # The kernel descriptors, which LLVM prints as the directives that made them.
    descriptors = _run([*disassemble, "-j", ".rodata"])
    notes = _notes(objdump, path)
    waves = _waves_per_workgroup(notes)
    kernels = re.findall(r"^\.amdhsa_kernel (\S+)\n(.*?)^\.end_amdhsa_kernel", descriptors, re.MULTILINE | re.DOTALL)
    if not kernels:
        raise InspectError(f"{path}: expected a code object with a kernel, found none")
    work = Work(None, (10 if kernel.startswith("backward") else 4) * headdim, 2)
    reports = []
    for name, directives in kernels:
        code, entry = _code_of(text, name, {other for other, _ in kernels})
        try:
            program = parse_objdump_code(code, name, entry)
        except AssemblyError as error:
            raise InspectError(f"{path}: {error}") from error
        resources = _resources(directives, sum(instruction.size for instruction in program.instructions))
        vgpr_spills, sgpr_spills = _spills(notes, name)
        resources = dataclasses.replace(resources, vgpr_spills=vgpr_spills, sgpr_spills=sgpr_spills)
        reports.append(amd_report(Case(arch, name), program, resources, waves, work, config=path.name))
    return reports


def _code_of(text: str, name: str, kernels: set[str]) -> tuple[str, int]:
    """The part of a disassembly from one kernel to the next, and the address it starts at."""
    headers = list(_HEADER.finditer(text))
    for index, header in enumerate(headers):
        if header.group(2) == name:
            following = (later.start() for later in headers[index + 1 :] if later.group(2) in kernels)
            return text[header.start() : next(following, len(text))], int(header.group(1), 16)
    raise InspectError(f"expected the code of {name}, found none")


def _resources(directives: str, code_bytes: int) -> Resources:
    def value(name: str, otherwise: int) -> int:
        found = re.search(rf"\.amdhsa_{name} (\d+)", directives)
        return int(found.group(1)) if found else otherwise

    total = value("next_free_vgpr", 0)
    vgprs = min(value("accum_offset", total), total)
    return Resources(
        vgprs=vgprs,
        agprs=total - vgprs,
        sgprs=value("next_free_sgpr", 0),
        scratch_bytes=value("private_segment_fixed_size", 0),
        lds_bytes=value("group_segment_fixed_size", 0),
        code_bytes=code_bytes,
    )


def demangled(symbol: str) -> str:
    """The C++ name of a symbol."""
    return _run([str(_beside(find_objdump(), "cxxfilt")), symbol]).strip()


def _beside(objdump: pathlib.Path, name: str) -> pathlib.Path:
    """Another tool of the same LLVM."""
    tool = objdump.with_name(objdump.name.replace("objdump", name))
    if not tool.is_file():
        raise InspectError(f"inspecting code objects needs {tool.name} beside {objdump}, found none")
    return tool


def _notes(objdump: pathlib.Path, path: pathlib.Path) -> str:
    """The metadata, as llvm-readelf prints it."""
    return _run([str(_beside(objdump, "readelf")), "--notes", str(path)])


def _spills(notes: str, name: str) -> tuple[int, int]:
    """Spilled VGPRs and SGPRs of a kernel; its keys are sorted.  0 where the metadata does not say."""
    found = re.search(rf"^\s+\.name:\s+{re.escape(name)}\n(.*?)(?:^\s+- \.\w+:|\Z)", notes, re.MULTILINE | re.DOTALL)
    counts = (
        re.search(rf"\.{kind}_spill_count:\s+(\d+)", found.group(1) if found else "") for kind in ("vgpr", "sgpr")
    )
    vgpr, sgpr = (int(count.group(1)) if count else 0 for count in counts)
    return vgpr, sgpr


def _waves_per_workgroup(notes: str) -> int:
    """From the metadata."""
    required = re.search(r"\.reqd_workgroup_size:\n\s+- (\d+)\n\s+- (\d+)\n\s+- (\d+)", notes)
    most = re.search(r"\.max_flat_workgroup_size: (\d+)", notes)
    lanes = re.search(r"\.wavefront_size: (\d+)", notes)
    threads = 1
    if required:
        for size in required.groups():
            threads *= int(size)
    elif most:
        threads = int(most.group(1))
    return max(threads // (int(lanes.group(1)) if lanes else 64), 1)
