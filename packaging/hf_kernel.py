"""flash_rocm as a kernel of Hugging Face's ``kernels``: a repository folder with source and a universal build.

``python packaging/hf_kernel.py OUT``; then ``kernels.get_local_kernel(pathlib.Path("OUT"))`` has the functions.

The folder holds what the pure wheel holds: Triton kernels and the reference.  A process has one flash_rocm, because the
torch operators have one name: beside an installed package of another version the kernel refuses to load.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
NAME, LICENSE = "flash-rocm", "BSD-3-Clause"
#: Counts what users of the kernel would notice; the version of the package is beside it in ``metadata.json``.
VERSION = 1
BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = ["cpu", "cuda", "rocm"]

[torch-noarch]
"""
CARD = """\
---
license: bsd-3-clause
tags:
  - kernels
---

FlashAttention for AMD GPUs first, as Triton kernels that run on NVIDIA GPUs too, with a reference for the CPU.
"""


def unpacked_wheel(folder: pathlib.Path) -> pathlib.Path:
    """The pure wheel of this tree, unpacked.

    Raises:
        CalledProcessError: pip failed; its text is on stderr.
    """
    source = folder / "source"
    # A build leaves folders where it works.
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=unwanted)
    options = ["-q", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, env={**os.environ, "FLASH_ROCM_BUILD": "none"})
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "contents")
    return folder / "contents"


def write(out: pathlib.Path) -> None:
    """Make the repository folder, which must not be there or be empty.

    Raises:
        FileExistsError: there is something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(
            f"OUT: expected an empty or new folder, got {out} with files in it. Hint: remove it first."
        )
    with tempfile.TemporaryDirectory() as temporary:
        package = unpacked_wheel(pathlib.Path(temporary))
        for folder in (out / "torch-ext" / "flash_rocm", out / "build" / "torch-universal" / "flash_rocm"):
            folder.mkdir(parents=True)
            shutil.copy(HERE / "hf_kernel_init.py", folder / "__init__.py")
            shutil.copytree(package / "flash_rocm", folder / "package" / "flash_rocm")
    (out / "build.toml").write_text(BUILD_TOML)
    (out / "README.md").write_text(CARD)
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    metadata = {
        "id": f"flash_rocm_{VERSION}_universal",
        "name": NAME,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (out / "build" / "torch-universal" / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python packaging/hf_kernel.py OUT")
    try:
        write(pathlib.Path(sys.argv[1]))
    except (FileExistsError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"hf_kernel.py: {error}") from error
