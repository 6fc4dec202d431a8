"""Attention over a K/V cache: the flash-attn functions for inference.

Where the keys of a sequence are, its length, and which of its positions are padding are read by the kernels
on the device: no call waits for the GPU, and a captured graph follows changing lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_rocm import cache_ops, cache_validation, runtime, validation, virtual_device
from flash_rocm.problem import CacheDefaults, CacheInputs, accumulate_dtype, default_softmax_scale
from flash_rocm.splits import MAX_SPLITS

#: How the arguments of :func:`flash_attn_with_kvcache` are called.
NAMES = {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_k": "cache_seqlens"}
NAMES |= {"leftpad_k": "cache_leftpad"}
_NO_BACKWARD = (
    "attention over a K/V cache has no backward. Hint: flash_attn_func and flash_attn_varlen_func without "
    "block_table have one."
)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries over a cache of keys and values, to which new ones are appended first.

    The signature and semantics are FlashAttention-2's; the split of the keys is that of Flash-Decoding (Dao,
    Haziza, Massa and Sizov 2023).

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16 or fp32 (fp64: reference back end).
        k_cache: (entries, capacity, nheads_k, headdim); with block_table pages (num_pages, page_size, nheads_k,
            headdim) of any size.  Updated in place if k is given.
        v_cache: like k_cache, with headdim_v.
        k: (batch, seqlen_new, nheads_k, headdim), keys to append behind cache_seqlens.
        v: likewise, with headdim_v.
        rotary_cos: (at least the capacity, rotary_dim / 2), in q's dtype: k, and q, are turned (Su et al. 2021,
            arXiv:2104.09864) before anything else; needs k.  Key t is at position cache_seqlens + t; query i at
            cache_seqlens + i under a causal or window mask, else at cache_seqlens.
        rotary_sin: like rotary_cos.
        cache_seqlens: int or (batch,) int32, lengths before the append, left padding included; default: the
            whole cache.  Not changed.  With new tokens they must fit; tokens that do not are not written.
        cache_batch_idx: (batch,) int32, the entry of each sequence, no two the same if k is given.
        cache_leftpad: (batch,) int32, where each sequence starts in its entry.
        block_table: (batch, max_pages) int32, pages of each sequence.
        softmax_scale: default 1 / sqrt(headdim).
        causal, window_size, softcap, alibi_slopes: as in :func:`flash_rocm.flash_attn_func`, over the keys
            from the left padding to the end of the new tokens.
        rotary_interleaved: True turns dims (2i, 2i + 1) together (GPT-J), False (i, i + rotary_dim / 2) (NeoX).
        num_splits: parts that the keys are divided into, 1 to 256; 0 lets the back end choose.  The result is the
            same but for rounding, and the same from run to run.
        return_softmax_lse: also return softmax_lse.

    Returns:
        out (batch, seqlen_q, nheads, headdim_v), and softmax_lse (batch, nheads, seqlen_q) float32.

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: no back end runs this call; or, of the result, in backward: there is none.

    With ``FLASH_ROCM_DEBUG=1`` lengths, entries and page numbers are checked on the device, and the call waits:
    one that is out of range raises ``ValueError``, and nothing outside of the cache is read or written.
    """
    inputs = CacheInputs(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seqused_k=None if isinstance(cache_seqlens, int) else cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        leftpad_k=cache_leftpad,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
    )
    if isinstance(cache_seqlens, int):
        inputs = with_lengths(inputs, cache_seqlens, NAMES)
    out, softmax_lse = attend_cached(
        inputs,
        NAMES,
        None,
        None,
        softmax_scale,
        causal,
        window_size,
        softcap,
        0,
        rotary_interleaved,
        num_splits,
    )
    return (out, softmax_lse) if return_softmax_lse else out


def with_lengths(inputs: CacheInputs, cache_seqlens: int, names: dict[str, str]) -> CacheInputs:
    """One length for every sequence, as the tensor that kernels read: a new number makes no new decision.

    Of a number the host sees whether it fits.
    """
    cache_validation.check_ranks(inputs, names)
    new = 0 if inputs.k_new is None or inputs.cu_seqlens_k_new is not None else inputs.k_new.shape[1]
    room = max(inputs.capacity - new, 0)
    if isinstance(cache_seqlens, bool) or not 0 <= cache_seqlens <= room:
        expected = f"an int in [0, {room}] or an int32 tensor (batch,)"
        hint = f"the cache holds {inputs.capacity} tokens of a sequence, {new} of them new."
        raise validation.invalid("cache_seqlens", expected, cache_seqlens, hint)
    q = inputs.q
    lengths = torch.full((cache_ops.batch_of(inputs),), cache_seqlens, dtype=torch.int32, device=q.device)
    return inputs._replace(seqused_k=lengths)


def attend_cached(
    inputs: CacheInputs,
    names: dict[str, str],
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    attention_chunk: int,
    rotary_interleaved: bool,
    num_splits: int,
    max_seqlen_new: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check, append and attend: what all functions over a cache come down to.

    Args:
        names: how the caller's function calls fields of the inputs.
        max_seqlen_q: the longest query sequence; default: those of a dense q.
        max_seqlen_k: the longest key sequence, with appended tokens; default: what the cache holds.
        max_seqlen_new: of varlen new tokens; default: all there are.
    """
    inputs = cache_ops.with_layout(inputs)
    defaults = _checked(inputs, names)
    cache_validation.check_caches_can_change(inputs, names)
    scale = defaults.softmax_scale if softmax_scale is None else float(softmax_scale)
    left, right = validation.check_scalars(0.0, scale, window_size, softcap)
    num_splits = validation.check_num_splits(num_splits)
    attention_chunk = cache_validation.check_attention_chunk(attention_chunk)
    if inputs.sinks is not None:
        sinks = inputs.sinks.to(torch.float32).contiguous()
        if sinks is not inputs.sinks:
            inputs = cache_ops.with_layout(inputs._replace(sinks=sinks, layout=None, addresses=None))
    max_seqlen_q = defaults.max_seqlen_q if max_seqlen_q is None else max_seqlen_q
    max_seqlen_k = defaults.max_seqlen_k if max_seqlen_k is None else max_seqlen_k
    if max_seqlen_new is None or inputs.k_new is None:
        max_seqlen_new = defaults.max_seqlen_new
    is_traced = inputs.layout is None and torch.compiler.is_compiling()
    request = runtime.override() if is_traced else virtual_device.request_of(inputs.q)
    scalars: tuple[Any, ...] = (
        *(max_seqlen_q, max_seqlen_k, max_seqlen_new, scale, left, 0 if causal else right, float(softcap)),
        *(attention_chunk, bool(rotary_interleaved), num_splits, request),
    )
    try:
        if max_seqlen_new:
            cache_ops.append_kv(inputs, max_seqlen_new, bool(rotary_interleaved), request)
        if torch.is_grad_enabled() and inputs.requires_grad:
            args = (inputs, scalars)
            return _WithoutBackward.apply(cache_ops.attention_cached, args, _NO_BACKWARD, *inputs.tensors)
        return cache_ops.attention_cached(inputs, scalars)
    except cache_validation.ContentsError as error:
        raise error.called(names) from None


def _checked(inputs: CacheInputs, names: dict[str, str]) -> CacheDefaults:
    """Shapes, dtypes and devices of a call, looked at once for each layout."""
    layout = inputs.layout
    if layout is not None and layout.defaults is not None:
        return layout.defaults
    cache_validation.check_inputs(inputs, names)
    q, new = inputs.q, 0
    if inputs.k_new is not None:
        new = inputs.k_new.shape[0 if inputs.cu_seqlens_k_new is not None else 1]
    scale = default_softmax_scale(q.shape[-1] + (inputs.v.shape[-1] if inputs.qv is not None else 0))
    found = CacheDefaults(q.shape[1], inputs.capacity, new, scale)
    if layout is not None:
        layout.defaults = found
    return found


class _WithoutBackward(torch.autograd.Function):
    """``function(*args)``, which depends on the tensors: backward is an error, not a missing gradient."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], args: tuple[Any, ...], error: str, *tensors: torch.Tensor | None
    ) -> Any:
        ctx.error = error
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        raise NotImplementedError(ctx.error)


def dropout_over_pages(dropout_p: float) -> NotImplementedError:
    """The error for dropout in a call over pages, which serve inference."""
    return NotImplementedError(f"dropout_p: expected 0 with block_table, got {dropout_p}. Hint: pass 0.0.")


def attend_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_attn_probs: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`flash_rocm.flash_attn_varlen_func` over pages."""
    if dropout_p != 0.0:
        validation.check_scalars(dropout_p, 1.0, window_size, softcap)
        raise dropout_over_pages(dropout_p)
    validation.check_varlen(q, cu_seqlens_q, cu_seqlens_k)
    inputs = CacheInputs(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
    )
    out, softmax_lse = attend_cached(
        inputs,
        {},
        validation.check_max_seqlen("max_seqlen_q", max_seqlen_q),
        validation.check_max_seqlen("max_seqlen_k", max_seqlen_k),
        softmax_scale,
        causal,
        window_size,
        softcap,
        0,
        False,
        0,
    )
    return (out, softmax_lse, q.new_empty((0,))) if return_attn_probs else out


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One attention result from results over disjoint sets of keys (FlashAttention-3's function of this name).

    Args:
        out_partial: (num_splits, batch, seqlen, nheads, headdim) or (num_splits, total, nheads, headdim) float32,
            each normalised over its own keys.
        lse_partial: (num_splits, batch, seqlen, nheads) or (num_splits, total, nheads) float32, -inf where a
            split saw no key, whose out_partial is then not read.
        out: where to write the result, contiguous; default: a new tensor.
        out_dtype: of the result, default out's or else float32.

    Returns:
        out and softmax_lse (batch, seqlen, nheads) or (total, nheads) float32.

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: of the result, in backward: there is none.
    """
    for name, x, dims in (("out_partial", out_partial, (4, 5)), ("lse_partial", lse_partial, (3, 4))):
        is_tensor = isinstance(x, torch.Tensor)
        if not is_tensor or x.dim() not in dims or x.dtype not in (torch.float32, torch.float64):
            got = f"{x.dtype} {tuple(x.shape)}" if is_tensor else type(x).__name__
            raise validation.invalid(name, f"float32 with {dims[0]} or {dims[1]} dims", got)
    device = out_partial.device
    if lse_partial.shape != out_partial.shape[:-1] or lse_partial.device != device:
        got = f"{tuple(lse_partial.shape)} on {lse_partial.device}"
        raise validation.invalid("lse_partial", f"shape {tuple(out_partial.shape[:-1])} on {device}", got)
    if lse_partial.dtype != out_partial.dtype:
        raise validation.invalid("lse_partial", f"the dtype of out_partial, {out_partial.dtype}", lse_partial.dtype)
    if out_partial.shape[0] > MAX_SPLITS:
        raise validation.invalid("out_partial", f"at most {MAX_SPLITS} splits", out_partial.shape[0])
    if out is not None:
        if out.shape != out_partial.shape[1:] or not out.is_contiguous() or out.device != device:
            expected = f"contiguous, shape {tuple(out_partial.shape[1:])} on {device}"
            raise validation.invalid(
                "out", expected, f"stride {out.stride()}, shape {tuple(out.shape)} on {out.device}"
            )
        if out_dtype not in (None, out.dtype):
            raise validation.invalid("out_dtype", f"{out.dtype}, that of out", out_dtype)
    dtype = out.dtype if out is not None else out_dtype or accumulate_dtype(out_partial.dtype)
    if dtype not in validation.FLOAT_DTYPES:
        raise validation.invalid("out_dtype", "a floating point dtype", dtype)
    args = (out_partial, lse_partial, dtype)
    if torch.is_grad_enabled() and (out_partial.requires_grad or lse_partial.requires_grad):
        error = "flash_attn_combine has no backward. Hint: pass detached tensors."
        found, lse = _WithoutBackward.apply(cache_ops.combine, args, error, out_partial, lse_partial)
    else:
        found, lse = cache_ops.combine(*args)
    return (found if out is None else out.copy_(found)), lse
