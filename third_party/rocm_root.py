"""A stand-in for ``/opt/rocm``, made of what PyPI and apt have: compiles HIP code where no ROCm is.

The wheel of Triton carries AMD's HIP headers and device libraries.  Besides them the compiler wants a version file,
three headers, and one-constant bitcode modules that say how the device libraries are to behave.  Only the standard
library is needed:  ``python third_party/rocm_root.py FOLDER`` fills a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

LLVM_AS = "llvm-as-22"
#: Numbers that the device libraries know chips by.
ISA_VERSIONS = {"90a": 9010, "942": 9402, "950": 9500, "1100": 11000, "1200": 12000, "1201": 12001}
_SWITCHES = ("daz_opt", "unsafe_math", "finite_only", "correctly_rounded_sqrt", "wavefrontsize64")
#: Global of a switch, where its name is not that of the file.
_GLOBALS = {"unsafe_math": "unsafe_math_opt", "finite_only": "finite_only_opt"}
_GLOBALS["correctly_rounded_sqrt"] = "correctly_rounded_sqrt32"
_SHIM = "#pragma once\n#include <cassert>\n#include <hip/hip_runtime.h>\n"
#: Headers that the wheel lacks, with as much of HIP's 16-bit numbers as the auxiliary kernels take.
_HEADERS = {
    "hip_bfloat16.h": _SHIM,
    "hip_fp16.h": _SHIM
    + """
struct __half {
    _Float16 value;
};
__host__ __device__ inline float __half2float(__half x) { return x.value; }
__host__ __device__ inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
""",
    # Rounded to the nearest even one; a NaN stays one whatever its bits are.
    "hip_bf16.h": _SHIM
    + """
struct __hip_bfloat16 {
    unsigned short bits;
};
__host__ __device__ inline float __bfloat162float(__hip_bfloat16 x)
{
    return __builtin_bit_cast(float, static_cast<unsigned>(x.bits) << 16);
}
__host__ __device__ inline __hip_bfloat16 __float2bfloat16(float x)
{
    const unsigned bits = __builtin_bit_cast(unsigned, x);
    const unsigned even = bits + 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<unsigned short>((x != x ? bits | 0x400000u : even) >> 16)};
}
""",
}
_READY = ".complete"


class RocmRootError(RuntimeError):
    """The stand-in root cannot be made here; the text says what is missing."""


def control_modules() -> dict[str, str]:
    """File name -> LLVM text of each module with one constant, as clang looks for them by name."""
    modules = {}
    for switch in _SWITCHES:
        for value, word in ((1, "on"), (0, "off")):
            modules[f"oclc_{switch}_{word}"] = _constant(_GLOBALS.get(switch, switch), "i8", value)
    for abi in (400, 500, 600):
        modules[f"oclc_abi_version_{abi}"] = _constant("ABI_version", "i32", abi)
    for isa, number in ISA_VERSIONS.items():
        modules[f"oclc_isa_version_{isa}"] = _constant("ISA_version", "i32", number)
    modules["opencl"] = ""
    return modules


def _constant(name: str, kind: str, value: int) -> str:
    return f"@__oclc_{name} = linkonce_odr protected local_unnamed_addr addrspace(4) constant {kind} {value}\n"


def make(folder: pathlib.Path, amd: pathlib.Path | None = None) -> pathlib.Path:
    """Fill a folder, unless it is complete already and of the same Triton, and return it.

    Args:
        amd: ``backends/amd`` of Triton; default: that of the installed one.

    Raises:
        RocmRootError: Triton or LLVM's assembler is not here.
    """
    amd, ready = amd or _triton_amd(), folder / _READY
    headers = hashlib.sha256(repr(_HEADERS).encode()).hexdigest()
    made_of = f"{amd} {(amd / 'lib/ocml.bc').stat().st_mtime_ns} {headers}\n"
    if ready.is_file() and ready.read_text() == made_of:
        return folder
    if shutil.which(LLVM_AS) is None:
        raise RocmRootError(f"expected {LLVM_AS}, found none. Hint: apt-get install llvm-22 clang-22 lld-22")
    bitcode = folder / "amdgcn" / "bitcode"
    bitcode.mkdir(parents=True, exist_ok=True)
    shutil.copytree(amd / "include", folder / "include", dirs_exist_ok=True)
    for name, text in _HEADERS.items():
        (folder / "include/hip" / name).write_text(text)
    version = folder / "share/hip/version"
    version.parent.mkdir(parents=True, exist_ok=True)
    version.write_text(_version(folder / "include/hip/hip_version.h"))
    for library in ("ocml.bc", "ockl.bc"):
        shutil.copy(amd / "lib" / library, bitcode / library)
    for name, text in control_modules().items():
        command = [LLVM_AS, "-o", str(bitcode / f"{name}.bc"), "-"]
        done = subprocess.run(command, input=text, text=True, capture_output=True)
        if done.returncode:
            raise RocmRootError(f"{LLVM_AS} failed on {name}: {done.stderr.strip()}")
    ready.write_text(made_of)
    return folder


def _triton_amd() -> pathlib.Path:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise RocmRootError(
            "expected the triton package, whose wheel has HIP's headers, found none. Hint: pip install triton"
        )
    amd = pathlib.Path(found.origin).parent / "backends/amd"
    if not (amd / "include/hip/hip_runtime.h").is_file() or not (amd / "lib/ocml.bc").is_file():
        raise RocmRootError(f"expected HIP headers and device libraries in {amd}, found none. Hint: Triton 3.6 to 3.9")
    return amd


def _version(header: pathlib.Path) -> str:
    """The version file of a ROCm installation, from the header that repeats it."""
    text = header.read_text()
    numbers = {part: re.search(rf"#define HIP_VERSION_{part} (\w+)", text) for part in ("MAJOR", "MINOR", "PATCH")}
    return "".join(f"HIP_VERSION_{part}={found.group(1) if found else 0}\n" for part, found in numbers.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    try:
        print(make(parser.parse_args().folder))
    except RocmRootError as error:
        print(f"rocm_root: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
