"""Taking the padding out of batches and putting it back: the functions of flash-attn's ``flash_attn.bert_padding``.

Raises, of all functions: ``ValueError`` for an argument that is wrong; the text names it.  Lengths and rows are read
back, which waits for the GPU.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from flash_rocm import validation


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of input (rows, ...) at indices (n,) int32 or int64, with a gradient: (n, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """values (n, ...) as the rows indices (n,) of a tensor (first_axis_dim, ...) of zeros, with a gradient."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`index_first_axis`, and input itself, detached."""
    return index_first_axis(input, indices), input.detach()


def _check_mask(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> None:
    validation.check_tensor(name, mask)
    validation.check_tensor("hidden_states", hidden_states)
    if hidden_states.dim() < 2 or mask.shape != hidden_states.shape[:2]:
        raise validation.invalid(name, f"shape (batch, seqlen) {tuple(hidden_states.shape[:2])}", tuple(mask.shape))


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Rows without padding; five results, as since flash-attn 2.7.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 for tokens.
        unused_mask: likewise, 1 for places that are kept, and are no tokens.

    Returns:
        (total, ...), the rows of both masks; their indices (total,) int64 in the flattened batch; cu_seqlens (batch +
        1,) int32 of these rows; the longest sequence of them, an int; tokens of each sequence, (batch,) int32.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Rows without padding, where a row of the batch holds several sequences one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) int, the lengths of the sequences of each row, then zeros.

    Returns:
        (total, ...); indices (total,) int64; cu_seqlens (sequences + 1,) int32; the longest sequence, an int.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    seqlen = hidden_states.shape[1]
    tokens = attention_mask_in_length.sum(dim=-1)
    positions = torch.arange(seqlen, device=tokens.device)
    indices = (positions[None, :] < tokens[:, None]).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _starts(lengths), longest


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Rows back in their places, zeros between: (total, ...) -> (batch, seqlen, ...); indices of unpadding."""
    validation.check_tensor("hidden_states", hidden_states)
    if indices.shape != hidden_states.shape[:1]:
        raise validation.invalid("indices", f"shape ({hidden_states.shape[0]},)", tuple(indices.shape))
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
