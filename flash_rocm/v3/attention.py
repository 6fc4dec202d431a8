"""The functions of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) with FlashAttention-4's learnable sinks.

Argument names, their order and what is returned are FlashAttention-3's.  Masks, windows, softcap,
softmax_scale and deterministic mean what they mean in :mod:`flash_rocm.api`; there is no dropout and
no ALiBi.  Gradients flow to q, k, v and learnable_sink, from both results; calls with
qv, attention_chunk, seqused_q or seqused_k have no backward, and say so there.

Common arguments:
    learnable_sink: (nheads,) of any float dtype: one logit for each query head that takes part in the
        softmax's denominator and has no value (gpt-oss).  softmax_lse includes it; a row that sees no
        key gives out 0 and softmax_lse the sink.  -inf is no sink.
    qv: like q, with v's head dim: scores are q @ k^T + qv @ v^T, the default scale is that of both together (MLA,
        DeepSeek-AI 2024, arXiv:2405.04434, absorbed).
    attention_chunk: if > 0, positions are divided into chunks of so many, counted from the first key, and a
        query sees the keys of its own chunk only (Llama 4).
    num_splits, pack_gqa, sm_margin: hints about scheduling, which are checked and change no result but by
        rounding.  num_splits counts for calls with qv, attention_chunk, seqused_q or seqused_k.
    q_descale, k_descale, v_descale: of FP8 inputs, not implemented.
    return_attn_probs: also return softmax_lse.

Returns:
    out, of q's shape with v's head dim, or (out, softmax_lse): float32, (batch, nheads, seqlen_q) or for
    varlen (nheads, total_q).

Raises:
    ValueError: an argument is wrong; the text names it, what was expected, what came and a hint.
    NotImplementedError: an argument is not implemented, or no back end runs this call; the text says why.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import validation
from flash_rocm.attend import attend, autocast
from flash_rocm.inference import attend_cached
from flash_rocm.problem import CacheInputs, Layout

AttentionResult = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
) -> AttentionResult:
    """Attention of dense batches, MHA, GQA or MQA.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16 or fp32 (fp64: reference back end).
        k: (batch, seqlen_k, nheads_k, headdim); nheads_k divides nheads.
        v: (batch, seqlen_k, nheads_k, headdim_v).

    The other arguments, the result and the errors are described in the module docstring.
    """
    refuse_fp8(q_descale, k_descale, v_descale)
    validation.check_hints(num_splits, pack_gqa, sm_margin)
    q, k, v = autocast(q, k, v)
    qv = None if qv is None else autocast(qv, k, v)[0]
    layout = validation.check_qkv(q, k, v, 4, 4)
    if qv is not None or attention_chunk:
        return _attend_cached(
            CacheInputs(q=q, k=k, v=v, qv=qv, sinks=learnable_sink),
            (q.shape[1], k.shape[1]),
            softmax_scale,
            causal,
            window_size,
            softcap,
            attention_chunk,
            num_splits,
            return_attn_probs,
        )
    return _attend(
        layout,
        (q, k, v, None, None, None),
        (layout.q_shape[1], layout.k_shape[1]),
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
        learnable_sink,
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
) -> AttentionResult:
    """Self-attention with q, k and v packed.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or with num_heads_q (batch, seqlen, num_heads_q + 2 * nheads_k,
            headdim), the heads of q, then k, then v.  Nothing is copied to unpack.

    The other arguments, the result and the errors are described in the module docstring.
    """
    q, k, v = _unpacked(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        learnable_sink=learnable_sink,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
) -> AttentionResult:
    """Attention of sequences of different lengths, packed without padding.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim).
        v: (total_k, nheads_k, headdim_v).
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in :func:`flash_rocm.flash_attn_varlen_func`.
        seqused_q, seqused_k: (batch,) int32, how many rows of each sequence are in use; the first ones are.
            Rows of q that are not give out 0 and softmax_lse -inf.

    The other arguments, the result and the errors are described in the module docstring.  Rows of
    q beyond cu_seqlens_q[-1] give out 0, softmax_lse -inf and gradient 0.
    """
    refuse_fp8(q_descale, k_descale, v_descale)
    validation.check_hints(num_splits, pack_gqa, sm_margin)
    q, k, v = autocast(q, k, v)
    qv = None if qv is None else autocast(qv, k, v)[0]
    layout = validation.check_qkv(q, k, v, 3, 3)
    validation.check_varlen(q, cu_seqlens_q, cu_seqlens_k)
    lengths = (
        validation.check_max_seqlen("max_seqlen_q", max_seqlen_q),
        validation.check_max_seqlen("max_seqlen_k", max_seqlen_k),
    )
    if qv is not None or attention_chunk or seqused_q is not None or seqused_k is not None:
        return _attend_cached(
            CacheInputs(
                q=q,
                k=k,
                v=v,
                qv=qv,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                seqused_q=seqused_q,
                seqused_k=seqused_k,
                sinks=learnable_sink,
            ),
            lengths,
            softmax_scale,
            causal,
            window_size,
            softcap,
            attention_chunk,
            num_splits,
            return_attn_probs,
        )
    return _attend(
        layout,
        (q, k, v, cu_seqlens_q, cu_seqlens_k, None),
        lengths,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
        learnable_sink,
    )


def _attend(
    layout: Layout,
    inputs: tuple[Any, ...],
    lengths: tuple[int, int],
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
    return_attn_probs: bool,
    learnable_sink: torch.Tensor | None,
) -> AttentionResult:
    """:func:`flash_rocm.attend.attend` without what FlashAttention-3 does not have."""
    if learnable_sink is not None:
        validation.check_sink(learnable_sink, inputs[0])
    result = attend(
        layout,
        inputs,
        lengths,
        0.0,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
        learnable_sink,
    )
    return result if isinstance(result, torch.Tensor) else result[:2]


def _attend_cached(
    inputs: CacheInputs,
    lengths: tuple[int, int],
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    attention_chunk: int,
    num_splits: int,
    return_attn_probs: bool,
) -> AttentionResult:
    """The same through the operator for inference, to which k and v are a cache that is full."""
    out, softmax_lse = attend_cached(
        inputs,
        {"sinks": "learnable_sink"},
        *lengths,
        softmax_scale,
        causal,
        window_size,
        softcap,
        attention_chunk,
        False,
        num_splits,
    )
    return (out, softmax_lse) if return_attn_probs else out


def refuse_fp8(q_descale: torch.Tensor | None, k_descale: torch.Tensor | None, v_descale: torch.Tensor | None) -> None:
    """Raise NotImplementedError for scales of FP8 inputs."""
    for name, value in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if value is not None:
            raise NotImplementedError(f"{name}: expected None, got {_described(value)}. Hint: {validation.NO_FP8}")


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _unpacked(qkv: torch.Tensor, num_heads_q: int | None) -> tuple[torch.Tensor, ...]:
    """q, k and v as views."""
    if num_heads_q is None:
        validation.check_packed("qkv", qkv, 5, 3)
        return qkv.unbind(2)
    nheads_k = validation.check_packed_heads(qkv, num_heads_q)
    return qkv.split((num_heads_q, nheads_k, nheads_k), dim=2)
