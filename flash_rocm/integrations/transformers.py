"""Attention of Hugging Face Transformers models (v5), run by flash_rocm.

:func:`register` makes ``attn_implementation="rocm_attention"`` known::

    from flash_rocm.integrations import transformers as integration
    model = AutoModel.from_pretrained(path, attn_implementation=integration.register())

A batch with a padding mask is computed as packed sequences, so padding costs attention nothing.
What the mask says is worked out once per batch, not once per layer.  Causal sliding windows and attention sinks
(gpt-oss) are the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from flash_rocm import v3
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
    window: int = 0


class Window(NamedTuple):
    """A causal sliding window over sequences without padding: a token sees itself and window - 1 before it."""

    window: int


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
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    **unused: Any,
) -> Packing | Window | None:
    """Transformers' mask function: (batch, kv_offset + kv_length) bool mask -> :class:`Packing`.

    Without padding None, or for a sliding window :class:`Window`.  Reads the lengths back once, which waits for the
    GPU.

    Raises:
        NotImplementedError: the model wants a mask other than full, causal or causal sliding window attention.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    window = _window_of(mask_function)
    if use_vmap or not (window or mask_function in (bidirectional_mask_function, causal_mask_function)):
        raise NotImplementedError(
            "mask_function: expected full or causal attention or a causal sliding window, got another pattern (chunks, "
            "packed position_ids or a function of the model's own). Hint: use attn_implementation='sdpa' or 'eager' "
            "for this model."
        )
    causal = mask_function is not bidirectional_mask_function
    if causal and (isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise NotImplementedError(
            "past_key_values: expected a cache that grows (DynamicCache), got one of fixed length. "
            "Hint: use cache_implementation='dynamic'."
        )
    unpadded = Window(window) if window else None
    if attention_mask is None:
        return unpadded
    if kv_offset:  # of a cache that keeps a window only
        attention_mask = attention_mask[:, kv_offset:]
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask: expected shape ({batch_size}, {kv_length}), got {tuple(attention_mask.shape)}."
        )
    rows_k, cu_seqlens_k, max_seqlen_k = _packed(attention_mask)
    if rows_k.shape[0] == attention_mask.numel():
        return unpadded
    if window and not _is_contiguous(attention_mask):
        raise NotImplementedError(
            "attention_mask: expected the tokens of each sequence side by side, as the window counts them, got padding "
            "between them. Hint: pad on the left."
        )
    # The mask is about keys.  In a model with cross attention it may say nothing about the queries.
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    if q_length == kv_length and (causal or not crosses):
        return Packing(rows_k, rows_k, cu_seqlens_k, cu_seqlens_k, max_seqlen_k, max_seqlen_k, window)
    # Decoding: the queries are the last tokens.
    mask_q = attention_mask[:, -q_length:] if causal else attention_mask.new_ones((batch_size, q_length))
    rows_q, cu_seqlens_q, max_seqlen_q = _packed(mask_q)
    return Packing(rows_q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window)


def _window_of(mask_function: Any) -> int:
    """Size of Transformers' causal sliding window, which is known by its parts; 0: another mask function."""
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

    parts = _enclosed(mask_function, and_masks()).get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return 0
    return int(_enclosed(parts[0], sliding_window_overlay(1)).get("sliding_window", 0))


def _enclosed(function: Any, like: Callable[..., Any]) -> dict[str, Any]:
    """What a closure of the same code as another holds, by name."""
    if getattr(function, "__code__", None) is not like.__code__:
        return {}
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _is_contiguous(mask: torch.Tensor) -> bool:
    """Whether the True of each row are one run."""
    mask = mask.bool()
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    return bool((starts <= 1).all())


def _packed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max()) if len(lengths) else 0


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Packing | Window | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key: (batch, nheads_k, seqlen_k, headdim).
        value: (batch, nheads_k, seqlen_k, headdim_v).
        attention_mask: what :func:`packing_of` returned.
        sliding_window: a causal token sees itself and so many less one before it.
        s_aux: (nheads,), attention sinks: ``learnable_sink`` of :mod:`flash_rocm.v3`.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` describe
            sequences packed by the caller into one row.

    Returns:
        (batch, seqlen_q, nheads, headdim_v), rows of padding 0; and None for the weights.

    Raises:
        NotImplementedError: an argument that would change the result and is not implemented.
    """
    for name in ("position_bias", "cache", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"{name}: not supported by this integration yet. Hint: use attn_implementation='sdpa'."
            )
    if not (attention_mask is None or isinstance(attention_mask, (Packing, Window))):
        raise NotImplementedError(
            f"attention_mask: expected (batch, seqlen) padding, got {tuple(attention_mask.shape)}. "
            "Hint: use attn_implementation='sdpa' for masks of another form."
        )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "softcap": softcap or 0.0}
    options["window_size"] = _window_size(attention_mask, sliding_window, causal)
    if s_aux is None:
        options["dropout_p"] = dropout
    elif dropout:
        raise NotImplementedError(f"dropout: expected 0 with attention sinks (s_aux), got {dropout}.")
    else:
        options["learnable_sink"] = s_aux
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, seqlen_q = q.shape[:2]
    if isinstance(attention_mask, Packing):
        q, k, v = (
            x.flatten(0, 1).index_select(0, rows)
            for x, rows in ((q, attention_mask.rows_q), (k, attention_mask.rows_k), (v, attention_mask.rows_k))
        )
        out = _varlen(q, k, v, *attention_mask[2:6], **options)
        padded = out.new_zeros((batch * seqlen_q, *out.shape[1:]))
        return padded.index_copy(0, attention_mask.rows_q, out).unflatten(0, (batch, seqlen_q)), None
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_seqlens = (kwargs["cu_seq_lens_q"].int(), kwargs["cu_seq_lens_k"].int())
        lengths = (int(kwargs["max_length_q"]), int(kwargs["max_length_k"]))
        out = _varlen(*(x.flatten(0, 1) for x in (q, k, v)), *cu_seqlens, *lengths, **options)
        return out.unflatten(0, (batch, seqlen_q)), None
    function = flash_attn_func if s_aux is None else v3.flash_attn_func
    return cast(torch.Tensor, function(q, k, v, **options)), None


def _window_size(mask: Packing | Window | None, sliding_window: int | None, causal: bool) -> tuple[int, int]:
    """flash-attn's window of what the layer and its mask ask for."""
    window = sliding_window or 0
    if mask is not None and mask.window != window:
        raise NotImplementedError(
            f"sliding_window: expected {mask.window or None}, that of the mask, got {sliding_window}. "
            "Hint: use attn_implementation='sdpa' or 'eager' for this model."
        )
    if window and not causal:
        raise NotImplementedError(
            f"sliding_window: expected None in attention to both sides, got {sliding_window}. "
            "Hint: use attn_implementation='sdpa'."
        )
    return (window - 1, 0) if window else (-1, -1)


def _varlen(*args: Any, **options: Any) -> torch.Tensor:
    function = v3.flash_attn_varlen_func if "learnable_sink" in options else flash_attn_varlen_func
    return cast(torch.Tensor, function(*args, **options))
