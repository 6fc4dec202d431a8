"""Two-layer perceptrons, plain and gated (Shazeer 2020, arXiv:2002.05202).

Names, arguments and parameters are those of flash-attn's ``flash_attn.modules.mlp``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from flash_rocm import validation
from flash_rocm.layers.activations import swiglu
from flash_rocm.modules.refused import Refused

MlpResult = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Mlp(torch.nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        in_features: columns of x.
        hidden_features: default 4 * in_features.
        out_features: default in_features.
        bias1, bias2: whether fc1 and fc2 have one.
        return_residual: also return x.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.return_residual, self.activation = return_residual, activation
        self.fc1 = torch.nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = torch.nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> MlpResult:
        """(..., in_features) -> (..., out_features); with return_residual also x."""
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class GatedMlp(torch.nn.Module):
    """fc2(y * activation(gate)), y and gate being the halves of fc1(x).

    Args:
        hidden_features: of each half; default 8 / 3 * in_features, rounded up to a multiple of multiple_of.

    The others are those of :class:`Mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] = functional.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        multiple_of = validation.check_count("multiple_of", multiple_of)
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        out = in_features if out_features is None else out_features
        self.return_residual, self.activation = return_residual, activation
        self.fc1 = torch.nn.Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = torch.nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> MlpResult:
        """(..., in_features) -> (..., out_features); with return_residual also x."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        y = swiglu(gate, y) if self.activation is functional.silu else y * self.activation(gate)
        y = self.fc2(y)
        return (y, x) if self.return_residual else y


class ParallelMLP(Refused):
    """Hidden features divided among processes: not implemented."""


class ParallelGatedMlp(Refused):
    """Hidden features divided among processes: not implemented."""
