"""Where the auxiliary kernels can be launched: the virtual GPU with the library of make ck, a GPU with that of CUDA."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

import flash_rocm
from flash_rocm import cuda_library
from flash_rocm.auxiliary import Launch


def _virtual(*orders: tuple[str, str]) -> list[Any]:
    return [
        pytest.param(f"virtual:{arch}:{order}", id=f"virtual-{arch}-{order}", marks=pytest.mark.ck)
        for arch, order in orders
    ]


_CUDA = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
TARGETS = [*_virtual(("gfx90a", "forward"), ("gfx942", "reverse")), _CUDA]
#: Each chip in two wave orders, for what a missing barrier does shows in some only.
ORDERED_TARGETS = [
    *_virtual(*((arch, order) for arch in ("gfx90a", "gfx942") for order in ("forward", "reverse"))),
    _CUDA,
]
NO_LIBRARY = (
    "the auxiliary kernels are not built for CUDA: flash-rocm build --cuda --output DIR/cuda, FLASH_ROCM_TEST_CUDA=DIR"
)
#: What conftest.py takes out of the environment of each test.
CUDA_CACHE = os.environ.get("FLASH_ROCM_TEST_CUDA")


class Target(NamedTuple):
    name: str
    device: str
    launch: Launch


@contextlib.contextmanager
def target_in_use(name: str) -> Iterator[Target]:
    """A target, inside of which its kernels can be launched."""
    if name == "cuda":
        yield Target(name, "cuda", cuda_launch())
        return
    from flash_rocm._ck import auxiliary as on_amd

    _, arch, order = name.split(":")
    with flash_rocm.virtual_gpu(arch, order=order):
        yield Target(f"virtual:{arch}", "cpu", on_amd.launch)


def cuda_launch() -> Launch:
    """That of the library for CUDA which the tests use; without one the test is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        if CUDA_CACHE:
            patch.setenv("FLASH_ROCM_CACHE_DIR", CUDA_CACHE)
        library = cuda_library.built()
    if library is None:
        pytest.skip(NO_LIBRARY)
    return cuda_library.load(library)
