"""The activations of flash-attn's ``flash_attn.ops.activations``, from torch's own.

GELU is the tanh form (Hendrycks, Gimpel 2016, arXiv:1606.08415), SwiGLU that of Shazeer 2020 (arXiv:2002.05202), the
squared ReLU that of So et al. 2021 (arXiv:2109.08668).  Tensors of one call have one shape but for bias, (columns,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def gelu_fwd(x: torch.Tensor) -> torch.Tensor:
    """GELU of x."""
    return functional.gelu(x, approximate="tanh")


def gelu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of x for the gradient g of :func:`gelu_fwd`."""
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh")


def fast_gelu_impl(x: torch.Tensor) -> torch.Tensor:
    """GELU of x, differentiable."""
    return gelu_fwd(x)


def bias_gelu(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of y + bias."""
    return gelu_fwd(bias + y)


def bias_gelu_back(g: torch.Tensor, y: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of y and of bias for the gradient g of :func:`bias_gelu`."""
    dy = gelu_bwd(g, bias + y).to(y.dtype)
    return dy, dy.sum_to_size(bias.shape).to(bias.dtype)


def bias_gelu_impl(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """GELU of y + bias, differentiable in both."""
    return bias_gelu(y, bias)


def relu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of x for the gradient g of its ReLU; g where x is 0."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: torch.Tensor) -> torch.Tensor:
    """Square of the ReLU of x."""
    return functional.relu(x).square()


def sqrelu_bwd(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of x for the gradient g of :func:`sqrelu_fwd`."""
    return 2.0 * g * functional.relu(x)


def swiglu_fwd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SiLU of x, times y."""
    return functional.silu(x) * y


def swiglu_bwd(x: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and of y for the gradient g of :func:`swiglu_fwd`."""
    return torch.ops.aten.silu_backward(g * y, x), g * functional.silu(x)


class _SwiGLU(torch.autograd.Function):
    """Keeps x and y for the backward, not the SiLU of x as torch would."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return swiglu_fwd(x, y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = ctx.saved_tensors
        return swiglu_bwd(x, y, gradients[0])


def swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SiLU of x, times y, differentiable in both."""
    return _SwiGLU.apply(x, y)
