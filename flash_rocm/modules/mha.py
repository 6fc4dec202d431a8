"""Multi-head attention as a module: MQA, GQA, rotary embedding, ALiBi, windows, varlen, K/V caches.

Names, arguments and parameters are those of flash-attn's ``flash_attn.modules.mha``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from flash_rocm import validation
from flash_rocm.inference import flash_attn_with_kvcache
from flash_rocm.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_rocm.modules.attention import CrossAttention, FlashCrossAttention, FlashSelfAttention, SelfAttention, needed
from flash_rocm.modules.inference import InferenceParams
from flash_rocm.modules.refused import Refused

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "ParallelMHA",
    "SelfAttention",
    "get_alibi_slopes",
]


def get_alibi_slopes(nheads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, arXiv:2108.12409): a geometric sequence, then half of one twice as long."""
    power = 1 << (validation.check_count("nheads", nheads).bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return slopes + between[: nheads - power]


class MHA(torch.nn.Module):
    """Projection, rotary embedding, attention, projection.

    Args:
        embed_dim: columns of x; num_heads divides it.
        num_heads_kv: heads of k and v, which divide num_heads; default num_heads.
        cross_attn: k and v come from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections have one.
        dropout: of attention weights, while training.
        softmax_scale: default 1 / sqrt(headdim).
        layer_idx: the name of this layer's cache; needed to generate.
        dwconv: a causal depthwise convolution over three tokens behind the projections of q, k and v.
        rotary_emb_dim: dims that are turned, 0 for none; rotary_emb_base, _scale_base, _interleaved as in
            :class:`flash_rocm.layers.rotary.RotaryEmbedding`.
        use_alibi, window_size: as in :func:`flash_rocm.flash_attn_func`; need use_flash_attn.
        fused_bias_fc: not implemented.
        use_flash_attn: False computes calls without a cache by torch's own attention, which takes a key_padding_mask.
        return_residual: also return x.
        checkpointing: compute attention again in the backward.

    Raises:
        ValueError: arguments that do not fit each other.
        NotImplementedError: fused_bias_fc.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if fused_bias_fc:
            raise NotImplementedError(
                "fused_bias_fc: expected False, got True. Hint: torch's Linear adds the bias as well."
            )
        if not use_flash_attn and (use_alibi or tuple(window_size) != (-1, -1)):
            name = "use_alibi" if use_alibi else "window_size"
            raise validation.invalid("use_flash_attn", f"True with {name}", use_flash_attn)
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads:
            raise validation.invalid("num_heads", f"a number that divides embed_dim {embed_dim}", num_heads)
        if num_heads % num_heads_kv:
            raise validation.invalid("num_heads_kv", f"a number that divides num_heads {num_heads}", num_heads_kv)
        if cross_attn and rotary_emb_dim:
            raise validation.invalid("rotary_emb_dim", "0 with cross_attn", rotary_emb_dim)
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx, self.dwconv = cross_attn, causal, layer_idx, dwconv
        self.softmax_scale, self.window_size = softmax_scale, (window_size[0], window_size[1])
        self.rotary_emb_dim, self.use_flash_attn = rotary_emb_dim, use_flash_attn
        self.return_residual, self.checkpointing = return_residual, checkpointing
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if rotary_emb_dim:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        widths = {"q": num_heads, "kv": 2 * num_heads_kv} if cross_attn else {"qkv": num_heads + 2 * num_heads_kv}
        for name, heads in widths.items():
            width = heads * self.head_dim
            setattr(self, f"W{name}", torch.nn.Linear(embed_dim, width, bias=qkv_proj_bias, **made))
            if dwconv:
                convolution = torch.nn.Conv1d(width, width, kernel_size=3, padding=2, groups=width, **made)
                setattr(self, f"dwconv_{name}", convolution)
        if use_flash_attn:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
            self.inner_attn: torch.nn.Module = FlashCrossAttention(
                causal, softmax_scale, dropout, slopes, self.window_size
            )
        else:
            self.inner_attn = CrossAttention(causal, softmax_scale, dropout)
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **made)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A cache for :class:`flash_rocm.modules.inference.InferenceParams`."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: torch.Tensor,
        x_kv: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of x.

        Args:
            x: (batch, seqlen, embed_dim), or with cu_seqlens (total, embed_dim).
            x_kv: with cross_attn, what k and v come from; default x.
            key_padding_mask: (batch, seqlen_k) bool, True for keys that are kept; without use_flash_attn.
            cu_seqlens, max_seqlen: of packed sequences, with use_flash_attn; cu_seqlens_k and max_seqlen_k are
                those of x_kv, default those of x.
            mixer_subset: with cross_attn, an index of the tokens of x that are queries (x[:, mixer_subset]).
            inference_params: generate: append to the layer's cache and attend to it; no gradient.

        Returns:
            like x; with return_residual also x.

        Raises:
            ValueError: arguments that do not fit each other or the module.
        """
        self._check_call(x, x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params)
        if self.cross_attn:
            queries = x if mixer_subset is None else x[:, mixer_subset]
            q = self._projected("q", queries)
            kv = self._projected("kv", x if x_kv is None else x_kv)
        else:
            qkv = self._projected("qkv", x)
            if self.rotary_emb_dim:
                qkv = self._turned(qkv, cu_seqlens, max_seqlen, inference_params)
            q, kv = qkv[..., : self.num_heads, :], qkv[..., self.num_heads :, :]
        kv = kv.unflatten(-2, (2, self.num_heads_kv))
        if inference_params is not None:
            context = self._generate(q, kv, inference_params)
        else:
            arguments: dict[str, Any] = {}
            if cu_seqlens is not None:
                arguments = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
                arguments["cu_seqlens_k"] = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
                arguments["max_seqlen_k"] = max_seqlen if max_seqlen_k is None else max_seqlen_k
            elif key_padding_mask is not None:
                arguments = {"key_padding_mask": key_padding_mask}
            context = self._attend(q, kv, arguments)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check_call(
        self,
        x: torch.Tensor,
        x_kv: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
        mixer_subset: Any,
        inference_params: InferenceParams | None,
    ) -> None:
        rank = 3 if cu_seqlens is None else 2
        if x.dim() != rank or x.shape[-1] != self.embed_dim:
            layout = "(batch, seqlen, embed_dim)" if rank == 3 else "(total, embed_dim)"
            raise validation.invalid("x", f"{layout} with embed_dim {self.embed_dim}", tuple(x.shape))
        if not self.cross_attn:
            for name, given in (("x_kv", x_kv), ("mixer_subset", mixer_subset)):
                if given is not None:
                    raise validation.invalid(name, "None without cross_attn", type(given).__name__)
        if cu_seqlens is not None:
            needed("max_seqlen", max_seqlen)
            for name, given in (("key_padding_mask", key_padding_mask), ("inference_params", inference_params)):
                if given is not None:
                    raise validation.invalid(name, "None with cu_seqlens", type(given).__name__)
            if not self.use_flash_attn or self.dwconv:
                raise validation.invalid("cu_seqlens", "None without use_flash_attn, and with dwconv", "a tensor")
        if key_padding_mask is not None and self.use_flash_attn:
            hint = "take the padding out with flash_rocm.bert_padding.unpad_input, and pass cu_seqlens."
            raise validation.invalid("key_padding_mask", "None with use_flash_attn", "a tensor", hint)
        if inference_params is not None:
            if self.cross_attn or self.dwconv or key_padding_mask is not None:
                got = "inference_params"
                raise validation.invalid("inference_params", "None with cross_attn, dwconv or key_padding_mask", got)
            if self.layer_idx is None:
                raise validation.invalid("layer_idx", "an int to generate", None, "pass it when the module is made.")

    def _projected(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(..., heads, headdim)."""
        projected = getattr(self, f"W{name}")(x)
        if self.dwconv:
            convolution = getattr(self, f"dwconv_{name}")
            projected = convolution(projected.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()
        return projected.unflatten(-1, (-1, self.head_dim))

    def _turned(
        self,
        qkv: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
        inference_params: InferenceParams | None,
    ) -> torch.Tensor:
        """qkv (..., num_heads + 2 * num_heads_kv, headdim) with q and k turned."""
        if cu_seqlens is None:
            offset, longest = 0, None
            if inference_params is not None:
                offset, longest = self._lengths(inference_params, qkv.shape[0]), inference_params.max_seqlen
            return self.rotary_emb(qkv, seqlen_offset=offset, max_seqlen=longest, num_heads_q=self.num_heads)
        length = needed("max_seqlen", max_seqlen)
        cos, sin, *table_k = self.rotary_emb.tables(length, qkv.device, qkv.dtype)
        q, k, v = qkv.split((self.num_heads, self.num_heads_kv, self.num_heads_kv), dim=-2)
        options = {"interleaved": self.rotary_emb.interleaved, "cu_seqlens": cu_seqlens, "max_seqlen": length}
        q = apply_rotary_emb(q, cos, sin, **options)
        return torch.cat((q, apply_rotary_emb(k, *(table_k or (cos, sin)), **options), v), dim=-2)

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.inner_attn, q, kv, use_reentrant=False, **arguments)
        return self.inner_attn(q, kv, **arguments)

    @staticmethod
    def _lengths(params: InferenceParams, batch: int) -> Any:
        """Tokens in the cache: an int, or (batch,) int32."""
        if params.lengths_per_sample is None:
            return params.seqlen_offset
        first = params.batch_size_offset
        return params.lengths_per_sample[first : first + batch]

    def _generate(self, q: torch.Tensor, kv: torch.Tensor, params: InferenceParams) -> torch.Tensor:
        """Append k and v to the cache of this layer, and attend to it."""
        index = needed("layer_idx", self.layer_idx)
        caches = params.key_value_memory_dict
        if index not in caches:
            caches[index] = self.allocate_inference_cache(params.max_batch_size, params.max_seqlen, kv.dtype)
        first, batch = params.batch_size_offset, q.shape[0]
        cache = caches[index][first : first + batch]
        if cache.shape[0] != batch:
            hint = f"the cache has {caches[index].shape[0]} entries, the batch starts at {first}."
            raise validation.invalid("inference_params", f"room for a batch of {batch}", cache.shape[0], hint)
        slopes = getattr(self.inner_attn, "alibi_slopes", None)
        return flash_attn_with_kvcache(  # type: ignore[return-value]
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=self._lengths(params, batch),
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
            alibi_slopes=None if slopes is None else slopes.float(),
        )


class ParallelMHA(Refused):
    """Heads divided among processes: not implemented."""
