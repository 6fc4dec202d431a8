"""Packages of the wheel: site-packages gets one name, ``flash_rocm``."""

import os
import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
#: Folder of the tree -> name inside the installed package.
EMBEDDED = {"triton_backend": "flash_rocm._triton", "ck_backend": "flash_rocm._ck", "configs": "flash_rocm._configs"}


def version() -> str:
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "flash_rocm/__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("flash_rocm/__init__.py has no __version__")
    return found.group(1)


def check_build_request() -> None:
    """Refuse to build what this version does not have, instead of leaving it out."""
    request = os.environ.get("FLASH_ROCM_BUILD", "none").strip().lower()
    if request in ("ck", "cuda"):
        raise SystemExit(
            f"FLASH_ROCM_BUILD={request}: this version has no compiled back end yet (ck and cuda are to come). "
            "Unset it: the Triton kernels need no build."
        )
    if request not in ("", "none"):
        raise SystemExit(f"FLASH_ROCM_BUILD: expected ck, cuda or none, got {request!r}.")


check_build_request()

packages = ["flash_rocm", *(f"flash_rocm.{name}" for name in find_packages("flash_rocm"))]
for folder, name in EMBEDDED.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

setup(
    version=version(),
    packages=packages,
    package_dir={"flash_rocm": "flash_rocm", **{name: folder for folder, name in EMBEDDED.items()}},
    package_data={"flash_rocm._configs": ["*.json"]},
)
