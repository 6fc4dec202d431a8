"""Attention of packed tensors as modules, as in flash-attn's ``flash_attn.modules.mha``."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from flash_rocm import api, validation


class _Attention(torch.nn.Module):
    """Options that the attention modules share."""

    alibi_slopes: torch.Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = torch.nn.Dropout(attention_dropout)
        self.window_size, self.deterministic = window_size, deterministic
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def options(self, causal: bool | None) -> dict[str, Any]:
        """Arguments of the attention functions."""
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            # A model cast to half precision has cast them too.
            "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """Attention of packed q, k and v; the arguments are those of :func:`flash_rocm.flash_attn_func`."""

    def forward(
        self,
        qkv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """Attention of qkv (batch, seqlen, 3, nheads, headdim), or with cu_seqlens (total, 3, nheads, headdim)."""
        if cu_seqlens is None:
            return api.flash_attn_qkvpacked_func(qkv, **self.options(causal))  # type: ignore[return-value]
        length = needed("max_seqlen", max_seqlen)
        return api.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, length, **self.options(causal))  # type: ignore[return-value]


class FlashCrossAttention(_Attention):
    """Attention of q over packed k and v."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> torch.Tensor:
        """Attention of q (batch, seqlen_q, nheads, headdim) over kv (batch, seqlen_k, 2, nheads_k, headdim).

        With cu_seqlens (total_q, nheads, headdim) over (total_k, 2, nheads_k, headdim).
        """
        if cu_seqlens is None:
            return api.flash_attn_kvpacked_func(q, kv, **self.options(causal))  # type: ignore[return-value]
        starts = (cu_seqlens, needed("cu_seqlens_k", cu_seqlens_k))
        lengths = (needed("max_seqlen", max_seqlen), needed("max_seqlen_k", max_seqlen_k))
        return api.flash_attn_varlen_kvpacked_func(q, kv, *starts, *lengths, **self.options(causal))  # type: ignore[return-value]


def needed(name: str, value: Any) -> Any:
    """The value, which must not be None."""
    if value is None:
        raise validation.invalid(name, "a value with cu_seqlens", None)
    return value


class CrossAttention(torch.nn.Module):
    """Attention of q over packed k and v with a mask of keys, by torch's own attention."""

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = torch.nn.Dropout(attention_dropout)

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        causal: bool | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q (batch, seqlen_q, nheads, headdim) over kv (batch, seqlen_k, 2, nheads_k, headdim).

        Args:
            causal: default that of the module; aligned to the bottom right, at the last key that is kept.
            key_padding_mask: (batch, seqlen_k) bool, True for keys that are kept; of a causal call they come first.

        Returns:
            (batch, seqlen_q, nheads, headdim); 0 for rows that see no key.
        """
        kept = key_padding_mask
        shift: Any = kv.shape[1] if kept is None else kept.sum(-1)[:, None, None, None]
        return self.masked(q, kv, causal, kept, shift - q.shape[1])

    def masked(
        self, q: torch.Tensor, kv: torch.Tensor, causal: bool | None, kept: torch.Tensor | None, shift: Any
    ) -> torch.Tensor:
        """The same, query i of a causal call seeing keys up to i + shift."""
        if kept is not None and (kept.shape != kv.shape[:2] or kept.dtype != torch.bool):
            got = f"{kept.dtype} {tuple(kept.shape)}"
            raise validation.invalid("key_padding_mask", f"bool {tuple(kv.shape[:2])}", got)
        mask = None if kept is None else kept[:, None, None, :]
        if self.causal if causal is None else causal:
            rows, cols = (torch.arange(x.shape[1], device=q.device) for x in (q, kv))
            below = cols <= rows[:, None] + shift
            mask = below if mask is None else mask & below
        q, k, v = (x.transpose(1, 2) for x in (q, *kv.unbind(2)))
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            self.drop.p if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        if mask is not None:
            out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
        return out.transpose(1, 2)


class SelfAttention(CrossAttention):
    """The same of packed q, k and v."""

    def forward(  # type: ignore[override]
        self, qkv: torch.Tensor, causal: bool | None = None, key_padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of qkv (batch, seqlen, 3, nheads, headdim), causal from the token itself."""
        validation.check_packed("qkv", qkv, 5, 3)
        return self.masked(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask, 0)
