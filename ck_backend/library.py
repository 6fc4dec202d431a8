"""The compiled library, loaded at its first use: HIP first, which it is not linked to, then the operators."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import threading
from typing import Any

import torch

from flash_rocm import ck_instances, files
from flash_rocm.ck_instances import CkLibrary

from . import virtual

STAND_IN = "_hip_stand_in.so"
#: Names under which a process may have HIP: torch's own copy, ROCm 7, ROCm 6.
_HIP = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6")
#: What the README asks for; it loads code objects of version 6, which clang 22 makes.
_OLDEST_HIP = (6, 4)
_loaded: CkLibrary | None = None


class LibraryError(RuntimeError):
    """The library is there but cannot be loaded here."""


def load() -> tuple[CkLibrary, Any]:
    """The library in use and its operators; where none is installed, which selection allows if ``ck`` was asked for by
    name, one is compiled.

    Raises:
        LibraryError: it cannot be compiled or loaded, or another one has been, of which a process can have one only.
    """
    library = ck_instances.built() or _compiled()
    return library, _operators(library.folder)


def _compiled() -> CkLibrary:
    from . import on_demand

    forbid_in_graph_capture(ck_instances.BUILD_COMMAND.format(archs=";".join(ck_instances.ARCHS)))
    try:
        on_demand.provide_base()
    except on_demand.BuildError as error:
        raise LibraryError(f"ck: {error}") from error
    library = ck_instances.built()
    if library is None:
        raise LibraryError("ck: expected the library that was compiled, found none")
    return library


def forbid_in_graph_capture(command: str) -> None:
    """Raise LibraryError where a graph is being captured, during which nothing is compiled."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise LibraryError(
            "ck: expected kernels that are compiled before a graph is captured, got one that is not. Hint: make one "
            f"such call before, or {command}"
        )


#: Modules of a library -> number of the first instance of each, for the operators.
_added: dict[pathlib.Path, int] = {}
_adding = threading.Lock()


def number_of(library: CkLibrary, number: int) -> int:
    """An instance as the operators number it, of the library that is loaded; a module is loaded at its first use.

    Raises:
        LibraryError: the module cannot be loaded, or is for another version of the library.
    """
    if number < len(library.own):
        return number
    folder = library.folder_of(number)
    if folder not in _added:
        with _adding:
            if folder not in _added:
                _added[folder] = _add(folder / ck_instances.LIBRARY)
    return _added[folder]


def _add(path: pathlib.Path) -> int:
    try:
        entry = ctypes.CDLL(str(path)).flash_ck_table
        entry.restype = ctypes.c_void_p
        return torch.ops.flash_rocm_ck.add(entry())
    except (OSError, RuntimeError, AttributeError) as error:
        raise LibraryError(
            f"ck: {path}: expected instances that the library takes, {error}. Hint: build the library again, remove "
            "this folder"
        ) from error


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
    # First the one that torch has loaded, wherever it lies.
    loaded = f"{_HIP[0]}.{torch.version.hip.partition('.')[0]}", ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD
    wrong = None
    for name, mode in (loaded, *((name, ctypes.RTLD_GLOBAL) for name in (str(beside_torch), *_HIP))):
        try:
            _check_hip(ctypes.CDLL(name, mode=mode), name)
        except OSError:
            continue
        except LibraryError as error:
            wrong = wrong or error
            continue
        return
    if wrong is not None:
        raise wrong
    raise LibraryError(
        f"ck: expected {_HIP[0]} of the ROCm that torch {torch.__version__} uses, found none beside torch or where "
        "libraries are looked for. Hint: LD_LIBRARY_PATH=/opt/rocm/lib"
    )


def _check_hip(hip: ctypes.CDLL, name: str) -> None:
    """Raise LibraryError for a HIP that cannot be torch's: streams and memory of one mean nothing to the other."""
    number = ctypes.c_int()
    status = hip.hipRuntimeGetVersion(ctypes.byref(number))
    found = number.value // 10_000_000, number.value // 100_000 % 100
    torchs = tuple(int(part) for part in str(torch.version.hip).split(".")[:2])
    if status == 0 and found >= _OLDEST_HIP and found[0] == torchs[0]:
        return
    said = f"an error, {status}" if status else f"{found[0]}.{found[1]}"
    raise LibraryError(
        f"ck: {name}: expected HIP {_OLDEST_HIP[0]}.{_OLDEST_HIP[1]} or newer, and of one major version with that of "
        f"torch {torch.__version__}, {torch.version.hip}; found {said}. Hint: LD_LIBRARY_PATH of the ROCm that this "
        "torch is for, or a torch for the ROCm that is here"
    )
