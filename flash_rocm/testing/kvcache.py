"""Oracles for what happens to a K/V cache: rotary, append, gather, combination of splits."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def oracle_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotary embedding of x (..., nheads, headdim) at ``positions`` (...), as complex products in float64."""
    if not x.numel():
        return x.double()
    half = cos.shape[-1]
    angle = torch.complex(cos.double(), sin.double())[positions.long()].unsqueeze(-2)  # (..., 1, half)
    turned, rest = x.double().split([2 * half, x.shape[-1] - 2 * half], dim=-1)
    # Pairs as (..., half, 2): neighbours, or the same place of both halves.
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).transpose(-1, -2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def oracle_append(
    cache: torch.Tensor,
    new: torch.Tensor,
    cache_seqlens: Sequence[int],
    cache_batch_idx: Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """A copy of one cache with ``new`` (batch, seqlen_new, nheads_k, headdim) behind its tokens, token by token."""
    result = cache.clone()
    for b, start in enumerate(cache_seqlens):
        for t in range(new.shape[1]):
            if block_table is None:
                result[b if cache_batch_idx is None else cache_batch_idx[b]][start + t] = new[b, t]
            else:
                pages, slot = divmod(start + t, cache.shape[1])
                result[int(block_table[b, pages])][slot] = new[b, t]
    return result


def oracle_gather(cache: torch.Tensor, block_table: torch.Tensor, seqlens: Sequence[int]) -> list[torch.Tensor]:
    """The tokens of each paged sequence, (seqlen, nheads_k, headdim), whole pages first and then cut."""
    sequences = []
    for pages, length in zip(block_table.tolist(), seqlens, strict=True):
        count = -(-length // cache.shape[1])
        sequences.append(torch.cat([cache[:0].flatten(0, 1), *(cache[page] for page in pages[:count])])[:length])
    return sequences


def oracle_combine(out_partial: torch.Tensor, lse_partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combination of splits, in float64: sum of exp(lse_s - lse) * out_s over the splits that saw a key."""
    lse = torch.logsumexp(lse_partial.double(), dim=0)
    out = torch.zeros_like(out_partial[0], dtype=torch.float64)
    for out_s, lse_s in zip(out_partial.double(), lse_partial.double(), strict=True):
        saw = ~lse_s.isneginf()
        out[saw] += (lse_s - lse)[saw].exp()[..., None] * out_s[saw]
    return out, lse
