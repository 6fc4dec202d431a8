"""The library of the ``ck`` back end that the tests run: few instances, which ``make ck`` builds."""

from __future__ import annotations

import functools
import os
import pathlib

from flash_rocm._ck import generate

from flash_rocm import ck_instances
from flash_rocm.ck_instances import CkLibrary

ARCHS = ("gfx90a", "gfx942")
#: One name a line; the Makefile builds from the same file.
NAMES = tuple(pathlib.Path(__file__).with_name("ck_instances.txt").read_text().split())
#: What conftest.py takes out of the environment of each test.
_CACHE = os.environ.get("FLASH_ROCM_TEST_CK")
NO_LIBRARY = (
    "the library of the ck back end is not built: make ck builds it, where clang-22 is or apt-get can install it"
)


def cache_of_tests() -> pathlib.Path | None:
    """The folder that FLASH_ROCM_CACHE_DIR has to name for the library to be found, if it is built."""
    if not _CACHE or not (pathlib.Path(_CACHE) / "ck" / ck_instances.MANIFEST).is_file():
        return None
    return pathlib.Path(_CACHE)


@functools.cache
def library_of_tests() -> CkLibrary:
    """What is in that library, built or not."""
    instances = tuple(unit.instance for unit in generate.units_of(ARCHS, NAMES))
    return CkLibrary(pathlib.Path("/nowhere"), ARCHS, instances)
