"""FlashAttention-3's functions over a K/V cache."""

from __future__ import annotations

import torch

from flash_rocm import cache_ops, cache_validation, validation
from flash_rocm.inference import NAMES, attend_cached, with_lengths
from flash_rocm.problem import AttentionProblem, CacheInputs, default_softmax_scale
from flash_rocm.v3.attention import AttentionResult, refuse_fp8

#: How the arguments of :func:`flash_attn_with_kvcache` are called.
_NAMES = NAMES | {"block_table": "page_table", "sinks": "learnable_sink"}


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
) -> AttentionResult:
    """Like :func:`flash_rocm.flash_attn_with_kvcache`, with FlashAttention-3's names and additions.

    Args:
        q: (batch, seqlen_q, nheads, headdim), or with cu_seqlens_q (total_q, nheads, headdim).
        k: (batch, seqlen_new, nheads_k, headdim), or with cu_seqlens_k_new (total_new, nheads_k, headdim); v likewise.
        qv: like q, with headdim_v: scores are q @ k^T + qv @ v^T, and values are read once for both (absorbed MLA).
        page_table: (batch, max_pages) int32, what flash-attn 2 calls block_table.
        cu_seqlens_q: (batch + 1,) int32; max_seqlen_q, a host number, is then needed.
        cu_seqlens_k_new: (batch + 1,) int32.
        rotary_seqlens: (batch,) int32, position of the first new token and query; default cache_seqlens.
        attention_chunk, learnable_sink: as in :mod:`flash_rocm.v3.attention`.
        q_descale, k_descale, v_descale: FP8, not implemented.
        scheduler_metadata: what :func:`get_scheduler_metadata` returned: a hint that is checked and not needed.
        pack_gqa, sm_margin: hints that are checked; query heads of one key head always share its reads.
        return_softmax_lse: also return softmax_lse, (batch, nheads, seqlen_q) or (nheads, total_q) float32.

    Raises:
        ValueError, NotImplementedError: as :func:`flash_rocm.flash_attn_with_kvcache`.
    """
    refuse_fp8(q_descale, k_descale, v_descale)
    validation.check_hints(num_splits, pack_gqa, sm_margin)
    validation.check_tensor("q", q)
    if cu_seqlens_q is not None:
        validation.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    cache_validation.check_int32("scheduler_metadata", scheduler_metadata, (1,), q)
    if cu_seqlens_q is None:
        if max_seqlen_q is not None and max_seqlen_q != (longest := q.shape[1] if q.dim() == 4 else 0):
            expected = f"None or {longest}, that of q, without cu_seqlens_q"
            raise validation.invalid("max_seqlen_q", expected, max_seqlen_q)
        max_seqlen_q = None  # whatever type it was of
    elif max_seqlen_q is None:
        raise validation.invalid("max_seqlen_q", "an int, as cu_seqlens_q is given", None, "the longest query.")
    else:
        max_seqlen_q = validation.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    inputs = CacheInputs(
        q=q,
        k=k_cache,
        v=v_cache,
        k_new=k,
        v_new=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_k=None if isinstance(cache_seqlens, int) else cache_seqlens,
        rotary_seqlens=rotary_seqlens,
        cache_batch_idx=cache_batch_idx,
        leftpad_k=cache_leftpad,
        block_table=page_table,
        sinks=learnable_sink,
    )
    if isinstance(cache_seqlens, int):
        inputs = with_lengths(inputs, cache_seqlens, _NAMES)
    out, softmax_lse = attend_cached(
        inputs,
        _NAMES,
        max_seqlen_q,
        None,
        softmax_scale,
        causal,
        window_size,
        softcap,
        attention_chunk,
        rotary_interleaved,
        num_splits,
    )
    return (out, softmax_lse) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> torch.Tensor:
    """Into how many parts a call over a K/V cache divides its keys.

    FlashAttention-3 prepares more ahead of time; here the number of splits is all that is decided on the host, and
    :func:`flash_attn_with_kvcache` decides it alike by itself.

    Args:
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v: of the call;
            max_seqlen_k is what its cache holds; a headdim_v above headdim is taken for a call with qv (absorbed MLA).
        cache_seqlens: (batch,) int32, whose device counts; its values are not read.
        qkv_dtype, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad, page_size, max_seqlen_k_new, causal, window_size,
            attention_chunk, has_softcap, num_splits: as the call has them.
        pack_gqa, sm_margin: hints without use, checked.

    Returns:
        (1,) int32 on the device of cache_seqlens.

    Raises:
        ValueError: an argument is wrong.  NotImplementedError: no back end runs such a call.
    """
    validation.check_hints(num_splits, pack_gqa, sm_margin)
    left, right = validation.check_scalars(0.0, 1.0, window_size, 0.0)
    headdim_v = headdim if headdim_v is None else headdim_v
    counts = {"batch_size": batch_size, "num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "headdim": headdim}
    for name, value in (counts | {"headdim_v": headdim_v, "page_size": 1 if page_size is None else page_size}).items():
        validation.check_count(name, value)
    if num_heads_q % num_heads_kv:
        raise validation.invalid("num_heads_kv", f"a count that divides num_heads_q, {num_heads_q}", num_heads_kv)
    max_seqlen_k = validation.check_max_seqlen("max_seqlen_k", max_seqlen_k)
    if validation.check_max_seqlen("max_seqlen_k_new", max_seqlen_k_new) > max_seqlen_k:
        raise validation.invalid("max_seqlen_k_new", f"at most max_seqlen_k, {max_seqlen_k}", max_seqlen_k_new)
    _check_metadata_tensors(batch_size, cache_seqlens, cu_seqlens_q, cu_seqlens_k_new, cache_leftpad)
    for name, value in (("causal", causal), ("has_softcap", has_softcap)):
        if not isinstance(value, bool):
            raise validation.invalid(name, "True or False", value)
    if qkv_dtype not in validation.FLOAT_DTYPES:
        raise validation.wrong_dtype("qkv_dtype", qkv_dtype, hint="a dtype of torch.")
    problem = AttentionProblem(
        dtype=qkv_dtype,
        device_type=cache_seqlens.device.type,
        batch=batch_size,
        seqlen_q=validation.check_max_seqlen("max_seqlen_q", max_seqlen_q),
        seqlen_k=max_seqlen_k,
        nheads=num_heads_q,
        nheads_k=num_heads_kv,
        headdim=headdim,
        headdim_v=headdim_v,
        softmax_scale=default_softmax_scale(headdim),
        window_left=left,
        window_right=0 if causal else right,
        softcap=1.0 if has_softcap else 0.0,
        varlen=cu_seqlens_q is not None or cu_seqlens_k_new is not None,
        cached=True,
        page_size=page_size or 0,
        seqlen_new=max_seqlen_k_new,
        leftpad=cache_leftpad is not None,
        qv=headdim_v > headdim,
        attention_chunk=cache_validation.check_attention_chunk(attention_chunk),
        num_splits=num_splits,
    )
    splits = cache_ops.splits_of(problem, cache_seqlens.device)
    return torch.full((1,), splits, dtype=torch.int32, device=cache_seqlens.device)


def _check_metadata_tensors(
    batch_size: int,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k_new: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
) -> None:
    """Shapes, dtypes and devices: what a call would be given."""
    for name, tensor, rows in (
        ("cache_seqlens", cache_seqlens, batch_size),
        ("cu_seqlens_q", cu_seqlens_q, batch_size + 1),
        ("cu_seqlens_k_new", cu_seqlens_k_new, batch_size + 1),
        ("cache_leftpad", cache_leftpad, batch_size),
    ):
        cache_validation.check_int32(name, tensor, (rows,), cache_seqlens)
