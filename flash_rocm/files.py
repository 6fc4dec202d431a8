"""Files that several processes share: whole or absent, one writer at a time; libraries among them.  A leaf."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

import torch

#: The first whose stable ABI the C++ libraries are compiled for.
OLDEST_TORCH = (2, 10)
#: Between two looks at a lock that somebody else holds.
_POLL_SECONDS = 0.1


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write beside the place and move there: nobody reads half a file, and a failure leaves what was there.

    Raises:
        OSError: no folder to write to, or no space.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: pathlib.Path, patience: float) -> Iterator[bool]:
    """Hold the lock of a file, ``<path>.lock``; False if another holds it for longer than ``patience`` seconds.

    The lock ends with the process that holds it, however that ends.  Its file stays: removing it would let two
    processes lock two files of one name.

    Raises:
        OSError: no folder to write to, or a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _acquired(handle, time.monotonic() + patience)
    finally:
        os.close(handle)


def _acquired(handle: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)


def library_folder(explicit: pathlib.Path | None, *names: str) -> pathlib.Path | None:
    """The folder of a library that was compiled from C++: one that holds all of its files, the package's own last."""
    package = importlib.util.find_spec("flash_rocm._ck")
    inside = [pathlib.Path(folder) for folder in (package and package.submodule_search_locations) or ()]
    folders = (*([explicit] if explicit else []), *inside)
    return next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)


def torch_too_old() -> str:
    """Why this torch neither builds nor loads a library of operators; "" if it does."""
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    if (major, minor) >= OLDEST_TORCH:
        return ""
    oldest = ".".join(map(str, OLDEST_TORCH))
    return (
        f"torch: expected {oldest} or newer, whose stable ABI C++ libraries are compiled for, got {torch.__version__}. "
        f'Hint: pip install "torch>={oldest}"'
    )


def load_operators(path: pathlib.Path, error: type[RuntimeError]) -> None:
    """Load a library of operators for torch, or raise the given error."""
    if why := torch_too_old():
        raise error(f"{path}: {why}")
    try:
        torch.ops.load_library(str(path))
    except OSError as cause:
        hint = "build it again"
        if "version `GLIBC" in str(cause):  # of libc or libstdc++, which are newer where it was built
            hint = "build it here, or on the oldest system that it is to run on"
        raise error(f"{path}: expected a library for torch {torch.__version__}, {cause}. Hint: {hint}") from cause
