"""Learnable attention sinks: what no kernel has to do about them.  A leaf.

A sink is one logit for each query head that takes part in the softmax's denominator and has no value:
``P_ij = exp(s_ij) / (exp(sink_h) + sum_j exp(s_ij))`` (gpt-oss; Xiao et al. 2023, arXiv:2309.17453, for what
first tokens do in models without them).  softmax_lse includes the sink, so that ``P = exp(s - lse)`` holds
with and without.  A sink of -inf is none.
"""

from __future__ import annotations

import torch

from flash_rocm.problem import accumulate_dtype, lse_shape


def lse_without_keys(
    q: torch.Tensor, seqlen_q: int, cu_seqlens_q: torch.Tensor | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """softmax_lse of a call in which no row sees a key: the sink, -inf without.

    Args:
        seqlen_q: the longest; rows of a varlen call are those of no sequence if it is 0.
        cu_seqlens_q: rows of no sequence are -inf.  Not read back.
    """
    lse = q.new_full(lse_shape(q), float("-inf"), dtype=accumulate_dtype(q.dtype))
    if sinks is None or seqlen_q == 0:
        return lse
    row_sinks = sinks.to(lse.dtype)[:, None].expand(lse.shape)
    if cu_seqlens_q is None:
        return lse.copy_(row_sinks)
    row = torch.arange(q.shape[0], device=q.device)
    return torch.where((row >= cu_seqlens_q[0]) & (row < cu_seqlens_q[-1]), row_sinks, lse)


def gradient(sinks: torch.Tensor, softmax_lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """dsinks (nheads,) float32: the sum over rows of P_sink (dlse - sum_j P_ij dP_ij).  Deterministic.

    Args:
        sinks: (nheads,).
        softmax_lse: (batch, nheads, seqlen_q) or (nheads, total_q); rows of -inf count nothing.
        delta: like softmax_lse, ``sum_j P_ij dP_ij - dlse``; may hold anything where softmax_lse is -inf.
    """
    shares = (sinks[:, None] - softmax_lse).exp() * -delta
    shares = shares.masked_fill(softmax_lse == float("-inf"), 0.0)
    return shares.sum([dim for dim in range(shares.dim()) if dim != shares.dim() - 2]).to(torch.float32)
