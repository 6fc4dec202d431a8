"""The compiled library, loaded at its first use: HIP first, which it is not linked to, then the operators."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import Any

import torch

from flash_rocm import ck_instances, files
from flash_rocm.ck_instances import CkLibrary

from . import virtual

STAND_IN = "_hip_stand_in.so"
#: Names under which a process may have HIP: torch's own copy, ROCm 7, ROCm 6.
_HIP = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")
_loaded: CkLibrary | None = None


class LibraryError(RuntimeError):
    """The library is there but cannot be loaded here."""


def load() -> tuple[CkLibrary, Any]:
    """The library in use and its operators.

    Raises:
        LibraryError: it cannot be loaded, or another one has been, of which a process can have one only.
    """
    library = ck_instances.built()
    if library is None:
        raise LibraryError("ck: expected a library that is built, found none")
    return library, _operators(library.folder)


def load_auxiliary() -> Any:
    """The operators of the auxiliary kernels, which are in the same library.

    Raises:
        LibraryError: as :func:`load` does.
    """
    load()
    return torch.ops.flash_rocm_auxiliary


@functools.cache
def _operators(folder: pathlib.Path) -> Any:
    global _loaded
    if _loaded is not None:
        raise LibraryError(
            f"ck: expected the library of {_loaded.folder}, which this process has loaded, got {folder}. "
            "Hint: set FLASH_ROCM_CACHE_DIR before the first call"
        )
    _load_hip(folder)
    files.load_operators(folder / ck_instances.LIBRARY, LibraryError)
    _loaded = ck_instances.built()
    return torch.ops.flash_rocm_ck


def _load_hip(folder: pathlib.Path) -> None:
    """Make HIP's functions visible to what is loaded next: those of ROCm, or on a CPU build of torch the stand-in."""
    if not torch.version.hip:
        virtual.install(folder / STAND_IN)
        return
    beside_torch = pathlib.Path(torch.__file__).parent / "lib" / _HIP[0]
    for name in (str(beside_torch), *_HIP):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    raise LibraryError(f"ck: expected {_HIP[0]} of the ROCm that torch {torch.__version__} uses, found none")
