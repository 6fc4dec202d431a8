"""What layers share while they generate."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass
class InferenceParams:
    """Progress of a batch that is generated, and the caches of all layers.

    Attributes:
        max_seqlen, max_batch_size: what the caches hold.
        seqlen_offset: tokens that every sequence has in the caches; the caller counts on after each step.
        batch_size_offset: the first entry of the caches that the batch is in.
        key_value_memory_dict: cache of each layer by its layer_idx, (max_batch_size, max_seqlen, 2, nheads_k,
            headdim); made at first use.
        lengths_per_sample: (max_batch_size,) int32, tokens of each sequence, in place of seqlen_offset.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start anew, with the caches that there are."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
