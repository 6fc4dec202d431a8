"""Where instances of Composable Kernel lie that were compiled on demand.  A leaf.

``<cache>/ck_on_demand/<sources>/base``: operators and auxiliary kernels, for processes without an installed library;
``<cache>/ck_on_demand/<sources>/<arch>/<instance>-<entry>``: a library of one instance.  Each is a folder as
:mod:`flash_rocm.ck_instances` describes it, made beside its place and moved there whole.  Other sources or another
config entry are another folder, so that nothing stale is found.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib

from flash_rocm.config_schema import CkConfig
from flash_rocm.runtime import OnDemand

#: What an instance is compiled from and with which flags, beside its entry: folders and modules of these packages.
_SOURCES = {
    "flash_rocm._ck": ("csrc/*", "generate.py", "build.py", "hipified.py"),
    "flash_rocm._third_party": ("*.py",),
    "flash_rocm": ("ck_instances.py",),  # chips, and the form of the list
}


def root(on_demand: OnDemand) -> pathlib.Path:
    """The folder for the sources that are installed."""
    return on_demand.folder / _digest(on_demand.ck_home)


def base(on_demand: OnDemand) -> pathlib.Path:
    """The library without instances, be it there or not."""
    return root(on_demand) / "base"


def place(on_demand: OnDemand, arch: str, name: str, entry: CkConfig) -> pathlib.Path:
    """The library of one instance, be it there or not."""
    return root(on_demand) / arch / f"{name}-{hashlib.sha256(repr(entry.built_how).encode()).hexdigest()[:8]}"


@functools.cache
def _digest(ck_home: str) -> str:
    digest = hashlib.sha256(ck_home.encode())
    for package, patterns in _SOURCES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for path in sorted(path for pattern in patterns for path in pathlib.Path(folder).glob(pattern)):
                digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
