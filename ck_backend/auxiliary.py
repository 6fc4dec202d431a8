"""The auxiliary kernels in the library of the ``ck`` back end, on AMD GPUs and on the virtual GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from . import library, virtual


def stream_of(x: torch.Tensor) -> int:
    """The stream of a tensor's device as the library takes it."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def launches_on(x: torch.Tensor, tensors: Sequence[torch.Tensor | None]) -> contextlib.AbstractContextManager[None]:
    """Launch where a tensor is: on its GPU, or on the virtual GPU, which is told of the tensors that there are."""
    if x.is_cuda:
        return torch.cuda.device(x.device)  # type: ignore[return-value]
    if torch.version.hip:
        raise library.LibraryError("ck: expected a CPU build of torch for the virtual GPU, got one whose HIP is real")
    return virtual.memory_of(tensors)


def launch(name: str, tensors: tuple[torch.Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
    """A :data:`flash_rocm.auxiliary.Launch`; the first tensor is there and says where."""
    first = tensors[0]
    if first is None:
        raise ValueError(f"{name}: expected a first tensor, got None")
    operators = library.load_auxiliary()
    with launches_on(first, tensors):
        getattr(operators, name)(*tensors, *numbers, stream_of(first))
