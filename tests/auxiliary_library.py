"""Where the auxiliary kernels can be launched: the virtual GPU with the library of make ck, a GPU with that of CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import flash_rocm
from flash_rocm.auxiliary import Launch

#: On the virtual GPU in two wave orders, for what a missing barrier does shows in some only.
TARGETS = [
    *(
        pytest.param(f"virtual:{arch}:{order}", id=f"virtual-{arch}-{order}", marks=pytest.mark.ck)
        for arch in ("gfx90a", "gfx942")
        for order in ("forward", "reverse")
    ),
]


class Target(NamedTuple):
    name: str
    device: str
    launch: Launch


@contextlib.contextmanager
def target_in_use(name: str) -> Iterator[Target]:
    """A target of TARGETS, inside of which its kernels can be launched."""
    from flash_rocm._ck import auxiliary as on_amd

    _, arch, order = name.split(":")
    with flash_rocm.virtual_gpu(arch, order=order):
        yield Target(f"virtual:{arch}", "cpu", on_amd.launch)
