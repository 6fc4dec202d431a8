"""Kernels that ``flash-rocm build`` has compiled, found where Triton looks before it compiles."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import triton
from triton.runtime.cache import FileCacheManager

from flash_rocm import runtime


class PrebuiltCacheManager(FileCacheManager):
    """Triton's file cache, with the prebuilt folder looked at first and never written to.

    Triton's own manager finds the files of a kernel by absolute paths that it has stored.  Here they are those of
    the kernel's folder, so that an image may have the folder elsewhere than the machine that built it.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        folder = runtime.prebuilt_kernels()
        own = os.path.join(folder, key) if folder and not override and not dump else ""
        self._is_prebuilt = bool(own) and _is_complete(own)
        if self._is_prebuilt:
            self.key, self.cache_dir, self.lock_path = key, own, os.path.join(own, "lock")
        else:
            super().__init__(key, override, dump)

    def get_group(self, filename: str) -> dict[str, str] | None:
        if not self._is_prebuilt:
            return super().get_group(filename)
        names = (name for name in os.listdir(self.cache_dir) if not name.startswith("__grp__"))
        return {name: self._make_path(name) for name in names}


def _is_complete(folder: str) -> bool:
    """Whether a kernel's folder holds its list of files, which is written last, or a compiled host part."""
    return os.path.isdir(folder) and any(
        name.startswith("__grp__") or name.endswith(".so") for name in os.listdir(folder)
    )


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """Triton takes what was built from here; nothing changes where nothing was, or the user has a manager set."""
    if runtime.prebuilt_kernels() is None or triton.knobs.cache.manager_class is not None:
        yield
        return
    with triton.knobs.cache.scope():
        triton.knobs.cache.manager_class = PrebuiltCacheManager
        yield
