"""What the layers beside attention hand to a back end.  A leaf."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NormCall(NamedTuple):
    """Numbers and types of one norm."""

    eps: float
    dropout_p: float
    rms: bool  # RMSNorm, else LayerNorm
    zero_centered: bool  # weights are 1 more than what is stored
    out_dtype: torch.dtype
    sum_dtype: torch.dtype | None  # of the sum as a result; None: it is x itself
    return_masks: bool  # which elements dropout keeps


class NormForward(NamedTuple):
    """Tensors of a norm, all contiguous; what follows x and weight may be None."""

    x: torch.Tensor  # (rows, columns)
    residual: torch.Tensor | None  # like x, of any dtype
    x1: torch.Tensor | None  # like x
    rowscale: torch.Tensor | None  # (rows,)
    rng_state: torch.Tensor | None  # (2,) int64, with dropout
    weight: torch.Tensor  # (columns,)
    bias: torch.Tensor | None  # (columns,)
    weight1: torch.Tensor | None  # (columns,), of the second result
    bias1: torch.Tensor | None  # (columns,)


class NormBackward(NamedTuple):
    """Tensors of a norm's backward, all contiguous."""

    total: torch.Tensor  # (rows, columns): the sum, or x where it is x
    dy: torch.Tensor
    dy1: torch.Tensor | None  # with weight1
    dtotal: torch.Tensor | None  # of the sum as a result
    rowscale: torch.Tensor | None
    rng_state: torch.Tensor | None
    weight: torch.Tensor
    weight1: torch.Tensor | None
    mean: torch.Tensor | None  # (rows,) float32, None for RMSNorm
    rstd: torch.Tensor


class NormGradients(NamedTuple):
    """Which gradients a backward computes beside those of x and weight, and their dtypes; None: not this one."""

    x_dtype: torch.dtype
    x1_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None
    bias: bool
    bias1: bool
