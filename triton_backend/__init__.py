"""The Triton back end.  Importing this imports no Triton: the kernels come with the first call."""

from __future__ import annotations

import torch

from flash_rocm.problem import AttentionInputs, AttentionProblem


def forward(problem: AttentionProblem, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """See :class:`flash_rocm.backends.Backend`."""
    from . import launch

    return launch.forward(problem, inputs)


def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :class:`flash_rocm.backends.Backend`."""
    from . import launch

    return launch.backward(problem, inputs, out, softmax_lse, dout, dlse)


def probs(problem: AttentionProblem, inputs: AttentionInputs, softmax_lse: torch.Tensor) -> torch.Tensor:
    """See :class:`flash_rocm.backends.Backend`."""
    from . import launch

    return launch.probs(problem, inputs, softmax_lse)
