"""What Transformers' mask interface is asked for, as what flash_rocm's functions take.

Transformers describes a mask as a function of (batch, head, query, key), composed of functions of its own, beside the
padding.  :func:`mask_of` recognises the compositions that attention without a mask tensor can express, and works the
padding out once for a batch, not once for a layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_HINT = "Hint: use attn_implementation='sdpa' or 'eager' for this model."


class Packing(NamedTuple):
    """Where the tokens of packed sequences are, in (batch, seqlen) flattened; the sequences follow in that order."""

    seqlen_q: int | None  # what the rows were counted with; None: any
    seqlen_k: int | None

    rows_q: torch.Tensor | None  # (total_q,) int64; None: all, in their order
    rows_k: torch.Tensor | None  # (total_k,) int64; None: all, in their order
    cu_seqlens_q: torch.Tensor | None  # (sequences + 1,) int32; None: each row of the batch is a sequence
    cu_seqlens_k: torch.Tensor  # (sequences + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    #: (batch,) int32: every query is a token, and keys are padding up to here and tokens from here to the last query.
    leftpad_k: torch.Tensor | None = None


class Mask(NamedTuple):
    """Takes the place of the mask tensor in every layer."""

    causal: bool
    window: tuple[int, int] = (-1, -1)  # flash-attn's window_size
    seqlen_k: int | None = None  # keys in use, the first ones, of a cache of fixed length
    packing: Packing | None = None

    @property
    def ndim(self) -> int:
        """Transformers' generation hands models finished masks, which it knows from padding by the number of dims."""
        return 4


class _Pattern(NamedTuple):
    causal: bool
    window: tuple[int, int] = (-1, -1)
    sequences: torch.Tensor | None = None  # (batch, seqlen), a number for each sequence of a row


def mask_of(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | Mask | None = None,
    config: Any = None,
    use_vmap: bool = False,
    cache_position: torch.Tensor | None = None,
    **unused: Any,
) -> Mask | None:
    """Transformers' mask function.

    Args:
        q_length, q_offset: number and first position of the queries; in older versions cache_position has them.
        kv_length, kv_offset: number and first position of the keys; a cache of fixed length has not all in use.
        mask_function: the pattern.
        attention_mask: (batch, positions) bool, False for padding; positions that are missing are padding.  A finished
            mask is returned.
        config: that of the model.
        use_vmap: the pattern holds a function of the model's own.
        cache_position: (q_length,) positions of the queries.
        unused: what other implementations need.

    Returns:
        What the layers get; None for causal attention without anything to tell.  Reads lengths of padding, of packed
        sequences and of a cache of fixed length back, which waits for the GPU.

    Raises:
        NotImplementedError: the model wants a mask that cannot be expressed.
        ValueError: attention_mask is of another shape.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    pattern = None if use_vmap or mask_function is None else _pattern_of(mask_function)
    if pattern is None:
        raise NotImplementedError(
            "mask_function: expected full or causal attention, a sliding window or packed position_ids, got another "
            f"pattern (chunks, blocks or a function of the model's own){_named(config)}. {_HINT}"
        )
    if cache_position is not None:
        q_length, q_offset = len(cache_position), cache_position[0]
    if q_length is None:
        raise ValueError("q_length: expected an int, got None.")
    causal, window, _ = pattern
    if pattern.sequences is not None:
        return Mask(causal, window, packing=_packed_sequences(pattern.sequences))
    used = kv_length
    if causal:  # no query sees what is behind the last one
        used = int(q_offset) + q_length - kv_offset
        if not q_length <= used <= kv_length:
            raise NotImplementedError(
                f"past_key_values: expected keys for positions {kv_offset} to {int(q_offset) + q_length - 1}, got "
                f"{kv_length} from {kv_offset}. Hint: use cache_implementation='dynamic'."
            )
    dense = Mask(causal, window, used if used < kv_length else None)
    plain = None if dense == Mask(True) else dense
    if attention_mask is None:
        return plain
    real = _padding(attention_mask, batch_size, kv_length, kv_offset)
    if bool(real[:, :used].all()):
        return plain
    if window != (-1, -1) and not _is_contiguous(real):
        raise _between_tokens()
    real[:, used:] = False
    packing = _packing(real, used, q_length, causal, config)
    if causal and q_length == 1:  # a step of generation
        packing = packing._replace(leftpad_k=_left_padding(real[:, :used]))
    return dense._replace(packing=packing)


def mask_of_padding(attention_mask: torch.Tensor, q_length: int, kv_length: int, causal: bool, windowed: bool) -> Mask:
    """Of models that hand (batch, kv_length) padding to their layers themselves, which tells of keys only."""
    real = _padding(attention_mask, attention_mask.shape[0], kv_length, 0)
    if windowed and not _is_contiguous(real):
        raise _between_tokens()
    if causal:
        return Mask(True, packing=_packing(real, kv_length, q_length, True, None))
    rows_k, cu_seqlens_k, max_seqlen_k = _packed(real)
    return Mask(False, packing=Packing(None, kv_length, None, rows_k, None, cu_seqlens_k, 0, max_seqlen_k))


class _Positions(NamedTuple):
    """What was found of position_ids, for the next layer, which gets the same tensor."""

    position_ids: weakref.ref[torch.Tensor]
    version: int  # changes with writes to it
    seqlen: int
    packing: Packing | None


_last: _Positions | None = None


def packing_of_positions(position_ids: torch.Tensor, seqlen: int) -> Packing | None:
    """Of one row in which each sequence starts where all coordinates of its positions are the smallest.

    Returns None for one sequence.  The answer for the last tensor is remembered; not for those that are made in
    ``torch.inference_mode``, which do not tell whether they were written to.

    Args:
        position_ids: (1, seqlen), or (seqlen, 2) of patches of images; of another shape they tell nothing.
    """
    global _last
    if torch.compiler.is_compiling() or position_ids.is_inference():
        return _packing_of_positions(position_ids, seqlen)
    last, version = _last, position_ids._version
    if last is None or last.position_ids() is not position_ids or last[1:3] != (version, seqlen):
        packing = _packing_of_positions(position_ids, seqlen)
        last = _last = _Positions(weakref.ref(position_ids), version, seqlen, packing)
    return last.packing


def _packing_of_positions(position_ids: torch.Tensor, seqlen: int) -> Packing | None:
    if position_ids.shape == (1, seqlen):
        position_ids = position_ids[0, :, None]
    elif position_ids.shape != (seqlen, 2):
        return None
    starts = (position_ids == position_ids.amin(0)).all(1)
    packing = _packed_sequences(starts.cumsum(0)[None])
    return packing if len(packing.cu_seqlens_k) > 2 else None


def _between_tokens() -> NotImplementedError:
    return NotImplementedError(
        "attention_mask: expected the tokens of each sequence side by side, as the window counts them, got padding "
        "between them. Hint: pad on the left."
    )


def _padding(attention_mask: torch.Tensor, batch_size: int, kv_length: int, kv_offset: int) -> torch.Tensor:
    """(batch, kv_length) bool of these keys, a tensor of its own."""
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask: expected shape ({batch_size}, positions), got {tuple(attention_mask.shape)}. {_HINT}"
        )
    real = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool, copy=True)
    return torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))


def _packing(real: torch.Tensor, used: int, q_length: int, causal: bool, config: Any) -> Packing:
    rows_k, cu_seqlens_k, max_seqlen_k = _packed(real)
    if not causal:
        # The mask is about keys.  In a model with cross attention it says nothing about the queries.
        crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
        if crosses or q_length != real.shape[1]:
            return Packing(None, real.shape[1], None, rows_k, None, cu_seqlens_k, 0, max_seqlen_k)
    elif q_length != real.shape[1]:
        rows_q, cu_seqlens_q, max_seqlen_q = _packed(real[:, used - q_length : used])
        lengths = (q_length, real.shape[1])
        return Packing(*lengths, rows_q, rows_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return Packing(q_length, q_length, rows_k, rows_k, cu_seqlens_k, cu_seqlens_k, max_seqlen_k, max_seqlen_k)


def _left_padding(real: torch.Tensor) -> torch.Tensor | None:
    """(batch,) int32, the padding before the tokens of each row, if they reach to the end."""
    behind = real.cumsum(1) > 0  # from the first token on
    return (~real).sum(1, dtype=torch.int32) if bool((behind == real).all() & real[:, -1].all()) else None


def _packed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max()) if len(lengths) else 0


def _packed_sequences(sequences: torch.Tensor) -> Packing:
    """Of rows that hold several sequences each: a new one starts with each row and where the number changes."""
    first = torch.ones_like(sequences[:, :1], dtype=torch.bool)
    starts = torch.cat([first, sequences.diff(dim=1) != 0], 1).flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=sequences.numel()).int()
    longest = int(cu_seqlens.diff().max())
    seqlen = sequences.shape[1]
    return Packing(seqlen, seqlen, None, None, cu_seqlens, cu_seqlens, longest, longest)


def _is_contiguous(mask: torch.Tensor) -> bool:
    """Whether the True of each row are one run."""
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    return bool((starts <= 1).all())


def _named(config: Any) -> str:
    name = getattr(config, "model_type", None)
    return f" in a model of type {name!r}" if name else ""


# --------------------------------------------------------------------------------------------------
# Transformers' mask functions, which are known by the code of their closures


def _pattern_of(function: Callable[..., Any]) -> _Pattern | None:
    """None: not one that is known."""
    from transformers import masking_utils as known

    if function is known.causal_mask_function:
        return _Pattern(True)
    if function is known.bidirectional_mask_function:
        return _Pattern(False)
    parts = _enclosed(function, known.and_masks()).get("mask_functions", ())
    if len(parts) != 2:
        return None
    nothing = torch.empty(0)
    sequences = _enclosed(parts[1], known.packed_sequence_mask_function(nothing)).get("packed_sequence_mask")
    if sequences is not None:
        inner = parts[0]
        if remap := getattr(known, "remap_positions_for_packed_sequence", None):  # not in the first versions
            inner = _enclosed(inner, remap(inner, nothing)).get("mask_function", inner)
        pattern = _pattern_of(inner)
        return None if pattern is None or pattern.sequences is not None else pattern._replace(sequences=sequences)
    window = _enclosed(parts[0], known.sliding_window_overlay(1)).get("sliding_window")
    if window is not None and parts[1] is known.causal_mask_function:
        return _Pattern(True, (int(window) - 1, 0))
    if overlay := getattr(known, "sliding_window_bidirectional_overlay", None):  # not in the first versions
        window = _enclosed(parts[0], overlay(1)).get("sliding_window")
        if window is not None and parts[1] is known.bidirectional_mask_function:
            return _Pattern(False, (int(window), int(window)))
    return None


def _enclosed(function: Any, like: Callable[..., Any]) -> dict[str, Any]:
    """What a closure of the same code as another holds, by name."""
    if getattr(function, "__code__", None) is not like.__code__:
        return {}
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
