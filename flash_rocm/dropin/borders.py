"""flash-attn 2's conventions on this side, flash_rocm's on the other."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

#: Keys that flash-attn's kernel takes at a time, the last first, as far as S_dmask shows it.
BLOCK_K = 128
#: What flash-attn rounds the seqlens of S_dmask up to.
ROUNDED = 128


def maybe_contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x with stride 1 in its last dim."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def round_multiple(x: int, m: int) -> int:
    """x, rounded up to a multiple of m."""
    return -(-x // m) * m


def window_of(window_size: object) -> object:
    """A window as two ints, if it is a tensor of two elements."""
    if isinstance(window_size, torch.Tensor) and window_size.shape == (2,):
        return tuple(window_size.tolist())
    return window_size


def lse_at_border(softmax_lse: torch.Tensor) -> torch.Tensor:
    """softmax_lse with +inf in place of -inf, for rows that see no key."""
    return softmax_lse.masked_fill(softmax_lse == -math.inf, math.inf)


def lse_inside(softmax_lse: torch.Tensor) -> torch.Tensor:
    """softmax_lse with -inf in place of +inf."""
    return softmax_lse.masked_fill(softmax_lse == math.inf, -math.inf)


def probs_at_border(probs: torch.Tensor) -> torch.Tensor:
    """S_dmask (batch, nheads, seqlen_q, seqlen_k) as flash-attn leaves it; (0,) stays.

    Its kernel takes blocks of keys from the last to the first and keeps exp(score - largest score so far), the sign
    saying what dropout drops.  Such a quotient is one of two probabilities, so that these are enough.
    """
    if probs.numel() == 0:
        return probs
    seqlen_q, seqlen_k = probs.shape[-2:]
    missing = (round_multiple(seqlen_q, ROUNDED) - seqlen_q, round_multiple(seqlen_k, ROUNDED) - seqlen_k)
    blocks = functional.pad(probs, (0, missing[1], 0, missing[0])).float().unflatten(-1, (-1, BLOCK_K))
    largest = blocks.abs().amax(-1).flip(-1).cummax(-1).values.flip(-1)
    return (blocks / largest.where(largest > 0, 1.0)[..., None]).flatten(-2).to(probs.dtype)
