"""The auxiliary kernels in C++ on NVIDIA GPUs: whether they are built, who takes them, how they are launched.  A leaf.

The library is a folder that ``FLASH_ROCM_BUILD=cuda`` or ``flash-rocm build --cuda`` fills: ``_CUDA.so`` and
``cuda.json``.  Calls over a K/V cache take its kernels instead of Triton's where the config of the chip says so.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from flash_rocm import config, files, runtime
from flash_rocm.arch import Arch, gpu_arch
from flash_rocm.auxiliary import Launch
from flash_rocm.config_checks import check_object
from flash_rocm.config_schema import ConfigError
from flash_rocm.runtime import ConfigSource

MANIFEST, LIBRARY = "cuda.json", "_CUDA.so"


class CudaLibraryError(RuntimeError):
    """The library is there but cannot be loaded here."""


@dataclasses.dataclass(frozen=True)
class CudaLibrary:
    """A library that is built."""

    folder: pathlib.Path
    archs: tuple[str, ...]

    def runs_on(self, arch: Arch) -> bool:
        """Whether a chip is one of its archs or newer than one; the driver compiles for those that it does not name."""
        return arch.vendor == "nvidia" and int(arch.name[2:]) >= min(int(name[2:]) for name in self.archs)


def built() -> CudaLibrary | None:
    """The library that calls use: that of an explicit ``FLASH_ROCM_CACHE_DIR``, else that of the package, if any.

    Raises:
        ConfigError: its list is damaged.
    """
    return _built(runtime.built_cuda())


@functools.lru_cache(maxsize=16)
def _built(explicit: pathlib.Path | None) -> CudaLibrary | None:
    folder = files.library_folder(explicit, MANIFEST, LIBRARY)
    if folder is None:
        return None
    where = folder / MANIFEST
    raw = config.parse(str(where), where.read_text(encoding="utf-8"))
    archs = check_object(str(where), raw, ("archs", "built_with"), ("archs", "built_with"))["archs"]
    if not isinstance(archs, list) or not archs:
        raise ConfigError(f"{where}: expected a list of archs, got {archs!r}. Hint: build it again")
    return CudaLibrary(folder, tuple(archs))


def manifest(archs: Sequence[str], built_with: str) -> dict[str, object]:
    """What ``cuda.json`` says, for whoever builds."""
    return {"archs": list(archs), "built_with": built_with}


def chosen(kernel: str, arch: Arch, source: ConfigSource | None) -> CudaLibrary | None:
    """The library if calls on an arch take a kernel of it, ``append`` or ``combine``, instead of Triton's.

    The one place that decides: the kernel stands in ``auxiliary`` of the chip's config, and a library is built that
    runs there.
    """
    if arch.vendor != "nvidia":
        return None
    wanted = config.arch_configs(arch.name, source.folder if source else None).auxiliary
    library = built()
    return library if library is not None and kernel in wanted and library.runs_on(arch) else None


def describe(kernels: Sequence[str], arch: Arch, source: ConfigSource | None) -> list[str]:
    """One line for each of some kernels that calls take from the library, for ``explain``."""
    found = ((kernel, chosen(kernel, arch, source)) for kernel in kernels)
    return [f"{kernel}: C++ ({library.folder})" for kernel, library in found if library is not None]


_launches: dict[tuple[Any, ...], Launch | None] = {}
_UNKNOWN: Any = object()


def launch_of(kernel: str, device: torch.device) -> Launch | None:
    """How calls on a device launch a kernel of the library, None where they take Triton's."""
    source = runtime.config_source()
    key = (kernel, device, source)
    # Asked at each call, mostly about a library that there is not.
    found = _launches.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        library = None
        if device.type == "cuda":
            arch = gpu_arch(device.index if device.index is not None else torch.cuda.current_device())
            library = chosen(kernel, arch, source)
        found = _launches[key] = None if library is None else load(library)
    return found


_loaded: CudaLibrary | None = None


@functools.cache
def load(library: CudaLibrary) -> Launch:
    """What launches the kernels of a library.

    Raises:
        CudaLibraryError: it cannot be loaded, or another one has been, of which a process can have one only.
    """
    global _loaded
    if _loaded is not None:
        raise CudaLibraryError(
            f"expected the library of {_loaded.folder}, which this process has loaded, got {library.folder}. "
            "Hint: set FLASH_ROCM_CACHE_DIR before the first call"
        )
    files.load_operators(library.folder / LIBRARY, CudaLibraryError)
    _loaded = library
    namespace = torch.ops.flash_rocm_cuda
    names = ("append", "rotate", "combine", "delta", "reduce", "dropout_mask")
    operators = {name: getattr(namespace, name).default for name in names}
    # Of a CUDA build of torch; what torch.cuda has for it makes an object for each call.
    stream_of, current_device = torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice

    def launch(name: str, tensors: tuple[torch.Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
        first = tensors[0]
        if first is None:
            raise ValueError(f"{name}: expected a first tensor, got None")
        index = first.get_device()
        if index == current_device():
            operators[name](*tensors, *numbers, stream_of(index))
            return
        with torch.cuda.device(index):
            operators[name](*tensors, *numbers, stream_of(index))

    return launch
