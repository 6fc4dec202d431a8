"""The flash-attn functions: normalise, check, call the operator.

Signatures and return conventions follow FlashAttention-2's Python interface (Dao 2023,
arXiv:2307.08691), with two differences: a row that sees no key has ``softmax_lse`` -inf, and the
gradient through ``softmax_lse`` is computed.

Common arguments:
    dropout_p: probability in [0, 1) of dropping an attention weight.  The mask is Philox noise whose
        seed is drawn from torch's generator at each call.
    softmax_scale: scale of q @ k^T; default 1 / sqrt(headdim).
    causal: query i sees keys up to i + seqlen_k - seqlen_q (aligned to the bottom right corner).
    window_size: (left, right); query i sees keys from i + seqlen_k - seqlen_q - left up to
        i + seqlen_k - seqlen_q + right; -1 means unlimited.  causal sets right to 0.
    softcap: if > 0, scores become softcap * tanh(scores / softcap) (Gemma 2).
    alibi_slopes: (nheads,) or (batch, nheads) float32; adds -slope * |i + seqlen_k - seqlen_q - j|
        (Press et al. 2022, arXiv:2108.12409).
    deterministic: True guarantees bit-equal gradients from run to run (back ends that cannot refuse).
    return_attn_probs: also return softmax_lse and S_dmask.

Returns:
    out, of q's shape with v's head dim.  With return_attn_probs, (out, softmax_lse, S_dmask):
    softmax_lse is float32, (batch, nheads, seqlen_q) or for varlen (nheads, total_q); S_dmask is
    (batch, nheads, max seqlen_q, max seqlen_k), the softmax with a negative sign where dropout
    dropped, if dropout_p > 0, else of shape (0,): no O(seqlen^2) buffer is made for nothing.

Raises:
    ValueError: an argument is wrong; the text names it, what was expected, what came and a hint.
    NotImplementedError: no back end runs this call; the text has every back end's reasons.
"""

from __future__ import annotations

import torch

from flash_rocm import validation
from flash_rocm.attend import AttentionResult, attend, autocast
from flash_rocm.inference import attend_pages


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Attention of dense batches, MHA, GQA or MQA.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16 or fp32 (fp64: reference back end).
        k: (batch, seqlen_k, nheads_k, headdim); nheads_k divides nheads.
        v: (batch, seqlen_k, nheads_k, headdim_v).

    The other arguments, the result and the errors are described in the module docstring.  Strides
    are arbitrary but for a contiguous last dim.
    """
    # Asked here already, because this is the call whose host time small inputs feel.
    if not q.is_cuda or torch.is_autocast_enabled("cuda"):
        q, k, v = autocast(q, k, v)
    layout = validation.check_qkv(q, k, v, 4, 4)
    batch, seqlen_q, _, _ = layout.q_shape
    if alibi_slopes is not None:
        validation.check_alibi(alibi_slopes, q, batch)
    inputs = (q, k, v, None, None, alibi_slopes)
    lengths = (seqlen_q, layout.k_shape[1])
    return attend(
        layout,
        inputs,
        lengths,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Attention with k and v packed: ``kv`` is (batch, seqlen_k, 2, nheads_k, headdim).

    Like :func:`flash_attn_func`; nothing is copied to unpack.
    """
    validation.check_packed("kv", kv, 5, 2)
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Self-attention with q, k and v packed: ``qkv`` is (batch, seqlen, 3, nheads, headdim).

    Like :func:`flash_attn_func`; nothing is copied to unpack.
    """
    validation.check_packed("qkv", qkv, 5, 3)
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> AttentionResult:
    """Attention of sequences of different lengths, packed without padding.

    Args:
        q: (total_q, nheads, headdim).
        k: (total_k, nheads_k, headdim); with block_table (num_pages, page_size, nheads_k, headdim).
        v: like k, with headdim_v.
        cu_seqlens_q: (batch + 1,) int32, starts of the sequences in q and their end.  The contents
            are not read back (no wait for the GPU): entries must not decrease, must stay within
            total_q, and no length may pass max_seqlen_q.  Rows beyond max_seqlen_q are not computed;
            other violations are undefined.
        cu_seqlens_k: likewise for k.
        max_seqlen_q: the longest query sequence, a host number.
        max_seqlen_k: the longest key sequence.
        block_table: (batch, max_pages) int32, page numbers of each sequence, pages of any size.  Forward only,
            without dropout; queries of one token and of many may be in one batch.

    The other arguments, the result and the errors are described in the module docstring.  Rows of
    q beyond cu_seqlens_q[-1] give out 0, softmax_lse -inf and gradient 0.
    """
    q, k, v = autocast(q, k, v)
    if block_table is not None:
        return attend_pages(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            block_table,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            return_attn_probs,
        )
    layout = validation.check_qkv(q, k, v, 3, 3)
    validation.check_varlen(q, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None:
        validation.check_alibi(alibi_slopes, q, cu_seqlens_q.shape[0] - 1)
    lengths = (
        validation.check_max_seqlen("max_seqlen_q", max_seqlen_q),
        validation.check_max_seqlen("max_seqlen_k", max_seqlen_k),
    )
    inputs = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    return attend(
        layout,
        inputs,
        lengths,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Varlen attention with k and v packed: ``kv`` is (total_k, 2, nheads_k, headdim).

    Like :func:`flash_attn_varlen_func`; nothing is copied to unpack.
    """
    validation.check_packed("kv", kv, 4, 2)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Varlen self-attention with q, k and v packed: ``qkv`` is (total, 3, nheads, headdim).

    Like :func:`flash_attn_varlen_func`; nothing is copied to unpack.
    """
    validation.check_packed("qkv", qkv, 4, 3)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
