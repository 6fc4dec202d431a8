"""What a K/V cache means: rotary embedding, append, paging and the combination of split results.

Plain torch, written to be read; kernels are checked against it.  Lengths and page tables are read on
the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    seqlen_offsets: int | torch.Tensor = 0,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotary position embedding (Su et al., "RoFormer", 2021) of the first ``rotary_dim`` elements of each head.

    Args:
        x: (batch, seqlen, nheads, headdim), or with ``positions`` any (..., nheads, headdim).
        cos, sin: (max_position, rotary_dim / 2), rotary_dim <= headdim.
        seqlen_offsets: token t of batch b is at position ``seqlen_offsets + t``; int or (batch,).
        positions: integer positions of shape ``x.shape[:-2]``, instead of ``seqlen_offsets``.
        interleaved: rotate elements (2i, 2i + 1) together instead of (i, i + rotary_dim / 2).

    Returns a new tensor like ``x``; computed in fp32 (fp64 for fp64) and rounded once.
    Raises ``ValueError`` for a rotary_dim above headdim and for positions that cos and sin do not hold.
    """
    half = cos.shape[-1]
    if cos.shape != sin.shape or 2 * half > x.shape[-1]:
        raise ValueError(
            f"cos, sin: expected equal shapes (max_position, at most headdim / 2 = {x.shape[-1] // 2}), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if positions is None:
        steps = torch.arange(x.shape[1], device=x.device)
        offsets = torch.as_tensor(seqlen_offsets, device=x.device).reshape(-1, 1)
        positions = (offsets + steps).expand(x.shape[0], -1)
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < cos.shape[0]:
        raise ValueError(
            f"positions: expected 0 <= position < {cos.shape[0]} (rows of cos), "
            f"got {int(positions.min())} to {int(positions.max())}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    c = cos[positions].to(dtype).unsqueeze(-2)  # (..., 1, half)
    s = sin[positions].to(dtype).unsqueeze(-2)
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    result = x.clone()
    result[..., first] = (a * c - b * s).to(x.dtype)
    result[..., second] = (b * c + a * s).to(x.dtype)
    return result


def check_fits(cached: Sequence[int], new: Sequence[int], capacity: int) -> None:
    """Raise ``ValueError`` where new tokens of a sequence do not fit behind what its cache holds."""
    for b, (length, count) in enumerate(zip(cached, new, strict=True)):
        if not 0 <= length <= capacity - count:
            raise ValueError(
                f"cache_seqlens: expected 0 to {capacity - count} ({count} new tokens in a cache "
                f"of {capacity}), got {length} for batch {b}"
            )


def append_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cache_batch_idx: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> None:
    """Write new keys and values behind what the caches hold.  ``k_cache`` and ``v_cache`` change in place.

    Args:
        k_cache, v_cache: (cache entries, capacity, nheads_k, headdim), or with ``block_table``
            (num_pages, page_size, nheads_k, headdim), any page size.
        k, v: (batch, seqlen_new, nheads_k, headdim); token t of batch b goes to position
            ``cache_seqlens[b] + t``.  Left padding, where there is any, is part of that position.
        cache_seqlens: (batch,) lengths before the append; the tensor is not changed.
        cache_batch_idx: (batch,) cache entry of each batch, default 0, 1, 2 ...
        block_table: (batch, max_pages); entries behind the last page used may hold anything.

    Raises ``ValueError`` when the new tokens do not fit or when both a table and entry indices are given.
    Nothing is written then.
    """
    batch, seqlen_new = k.shape[:2]
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: expected None with block_table, which already names the pages")
    page_size = k_cache.shape[1]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    starts = cache_seqlens.tolist()
    check_fits(starts, [seqlen_new] * batch, capacity)
    for b in range(batch):
        position = torch.arange(starts[b], starts[b] + seqlen_new, device=k.device)
        if block_table is not None:
            page, slot = block_table[b, position // page_size].long(), position % page_size
        else:
            entry = b if cache_batch_idx is None else int(cache_batch_idx[b])
            page, slot = torch.full_like(position, entry), position
        k_cache[page, slot] = k[b].to(k_cache.dtype)
        v_cache[page, slot] = v[b].to(v_cache.dtype)


def gather_paged(cache: torch.Tensor, block_table: torch.Tensor, seqlens: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """The tokens of paged sequences, packed one sequence behind the other: (sum of seqlens, nheads_k, headdim).

    ``cache`` is (num_pages, page_size, nheads_k, headdim), ``block_table`` (batch, max_pages), ``seqlens`` (batch,).
    Pages and slots that no sequence reaches are not read.
    """
    page_size = cache.shape[1]
    lengths = seqlens.tolist() if isinstance(seqlens, torch.Tensor) else list(seqlens)
    parts = [cache.new_empty(0, *cache.shape[2:])]
    for b, length in enumerate(lengths):
        if length > page_size * block_table.shape[1]:
            raise ValueError(
                f"seqlens: expected at most {page_size * block_table.shape[1]} (pages of block_table), "
                f"got {length} for batch {b}"
            )
        position = torch.arange(length, device=cache.device)
        parts.append(cache[block_table[b, position // page_size].long(), position % page_size])
    return torch.cat(parts)


def combine_splits(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention result from the results over disjoint sets of keys.

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, headdim), each normalised over its own keys.
        lse_partial: (num_splits, batch, seqlen, nheads), natural logarithm, -inf for a split without a
            visible key, whose ``out_partial`` is then not used, whatever it holds.
        out_dtype: of the result, default that of ``out_partial``.

    Returns ``out`` (batch, seqlen, nheads, headdim) and ``lse`` (batch, seqlen, nheads) in fp32 (fp64 for fp64);
    0 and -inf where every split is dead.
    """
    dtype = torch.promote_types(out_partial.dtype, torch.float32)
    lse_partial = lse_partial.to(dtype)
    dead = lse_partial == float("-inf")
    largest = lse_partial.amax(0)
    base = largest.masked_fill(dead.all(0), 0.0)  # -inf - -inf is NaN
    weights = (lse_partial - base).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    terms = (out_partial.to(dtype) * weights[..., None]).masked_fill(dead[..., None], 0.0)
    return terms.sum(0).to(out_dtype or out_partial.dtype), base + total.log()
