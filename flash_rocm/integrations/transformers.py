"""Attention of Hugging Face Transformers models (v5), run by flash_rocm.

:func:`register` makes ``attn_implementation="rocm_attention"`` known::

    from flash_rocm.integrations import transformers as integration
    model = AutoModel.from_pretrained(path, attn_implementation=integration.register())

A batch with a padding mask is computed as packed sequences, so padding costs attention nothing.
What the mask says is worked out once per batch, not once per layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

from flash_rocm.api import flash_attn_func, flash_attn_varlen_func

#: Without "flash" in it: Transformers takes such names for kernels that it should download.
NAME = "rocm_attention"


class Packing(NamedTuple):
    """Where the real tokens of a padded batch are.  Takes the place of the mask in every layer.

    Hidden rows are (batch * seqlen, ...) flattened; the sequences are packed in that order.
    """

    rows_q: torch.Tensor  # (total_q,) int64
    rows_k: torch.Tensor  # (total_k,) int64
    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    cu_seqlens_k: torch.Tensor  # (batch + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int


def register(name: str = NAME) -> str:
    """Register the attention function and its mask function; returns the name to pass on."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, packing_of)
    return name


def packing_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    **unused: Any,
) -> Packing | None:
    """Transformers' mask function: (batch, kv_length) bool mask -> :class:`Packing`.

    None if nothing is padded.  Reads the lengths back once, which waits for the GPU.

    Raises:
        NotImplementedError: the model wants a mask other than full or causal attention.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if use_vmap or mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise NotImplementedError(
            "mask_function: expected full or causal attention, got another pattern (sliding window, chunks, packed "
            "position_ids or a function of the model's own). Hint: use attn_implementation='sdpa' for this model."
        )
    causal = mask_function is causal_mask_function
    if causal and (isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_length):
        raise NotImplementedError(
            "past_key_values: expected a cache that grows (DynamicCache), got one of fixed length. "
            "Hint: use cache_implementation='dynamic'."
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask: expected shape ({batch_size}, {kv_length}), got {tuple(attention_mask.shape)}."
        )
    rows_k, cu_seqlens_k, max_seqlen_k = _packed(attention_mask)
    if rows_k.shape[0] == attention_mask.numel():
        return None
    # The mask is about keys.  In a model with cross attention it may say nothing about the queries.
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    if q_length == kv_length and (causal or not crosses):
        return Packing(rows_k, rows_k, cu_seqlens_k, cu_seqlens_k, max_seqlen_k, max_seqlen_k)
    # Decoding: the queries are the last tokens.
    mask_q = attention_mask[:, -q_length:] if causal else attention_mask.new_ones((batch_size, q_length))
    rows_q, cu_seqlens_q, max_seqlen_q = _packed(mask_q)
    return Packing(rows_q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _packed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max()) if len(lengths) else 0


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key: (batch, nheads_k, seqlen_k, headdim).
        value: (batch, nheads_k, seqlen_k, headdim_v).
        attention_mask: what :func:`packing_of` returned.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` describe
            sequences packed by the caller into one row.

    Returns:
        (batch, seqlen_q, nheads, headdim_v), rows of padding 0; and None for the weights.

    Raises:
        NotImplementedError: an argument that would change the result and is not implemented.
    """
    for name in ("sliding_window", "s_aux", "position_bias", "cache", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"{name}: not supported by this integration yet. Hint: use attn_implementation='sdpa'."
            )
    if not (attention_mask is None or isinstance(attention_mask, Packing)):
        raise NotImplementedError(
            f"attention_mask: expected (batch, seqlen) padding, got {tuple(attention_mask.shape)}. "
            "Hint: use attn_implementation='sdpa' for masks of another form."
        )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": causal,
        "softcap": softcap or 0.0,
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, seqlen_q = q.shape[:2]
    if attention_mask is not None:
        q, k, v = (
            x.flatten(0, 1).index_select(0, rows)
            for x, rows in ((q, attention_mask.rows_q), (k, attention_mask.rows_k), (v, attention_mask.rows_k))
        )
        out = _varlen(q, k, v, *attention_mask[2:], **options)
        padded = out.new_zeros((batch * seqlen_q, *out.shape[1:]))
        return padded.index_copy(0, attention_mask.rows_q, out).unflatten(0, (batch, seqlen_q)), None
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_seqlens = (kwargs["cu_seq_lens_q"].int(), kwargs["cu_seq_lens_k"].int())
        lengths = (int(kwargs["max_length_q"]), int(kwargs["max_length_k"]))
        out = _varlen(*(x.flatten(0, 1) for x in (q, k, v)), *cu_seqlens, *lengths, **options)
        return out.unflatten(0, (batch, seqlen_q)), None
    return cast(torch.Tensor, flash_attn_func(q, k, v, **options)), None


def _varlen(*args: Any, **options: Any) -> torch.Tensor:
    return cast(torch.Tensor, flash_attn_varlen_func(*args, **options))
