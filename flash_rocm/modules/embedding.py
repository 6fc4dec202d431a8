"""Embeddings of tokens, positions and types.

Names, arguments and parameters are those of flash-attn's ``flash_attn.modules.embedding``.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm.modules.refused import Refused


def _positions(input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device) if position_ids is None else position_ids


class GPT2Embeddings(torch.nn.Module):
    """Embeddings of tokens plus those of positions.

    Args:
        max_position_embeddings: 0 or below for none.
        padding_idx: the token whose embedding is 0 and is not trained.
        word_embed_proj_dim: columns of the tokens' embeddings, projected to embed_dim; None: embed_dim, not projected.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        padding_idx: int | None = None,
        word_embed_proj_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = embed_dim if word_embed_proj_dim is None else word_embed_proj_dim
        self.word_embeddings = torch.nn.Embedding(
            vocab_size, width, padding_idx=padding_idx, device=device, dtype=dtype
        )
        projected = word_embed_proj_dim is not None
        self.project_in = (
            torch.nn.Linear(width, embed_dim, bias=False, device=device, dtype=dtype) if projected else None
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = torch.nn.Embedding(
                max_position_embeddings, embed_dim, device=device, dtype=dtype
            )

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, seqlen) -> (batch, seqlen, embed_dim); positions count from 0 if not given."""
        embeddings = self.word_embeddings(input_ids)
        if self.project_in is not None:
            embeddings = self.project_in(embeddings)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        return embeddings


class BertEmbeddings(torch.nn.Module):
    """Embeddings of tokens, positions and types, added.

    Args:
        max_position_embeddings, type_vocab_size: 0 or below for none.
        padding_idx: as in :class:`GPT2Embeddings`.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        max_position_embeddings: int,
        type_vocab_size: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.word_embeddings = torch.nn.Embedding(vocab_size, embed_dim, padding_idx=padding_idx, **made)
        self.max_position_embeddings, self.type_vocab_size = max_position_embeddings, type_vocab_size
        if max_position_embeddings > 0:
            self.position_embeddings = torch.nn.Embedding(max_position_embeddings, embed_dim, **made)
        if type_vocab_size > 0:
            self.token_type_embeddings = torch.nn.Embedding(type_vocab_size, embed_dim, **made)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, seqlen) -> (batch, seqlen, embed_dim); positions count from 0 and types are 0 if not given."""
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            embeddings = embeddings + self.position_embeddings(_positions(input_ids, position_ids))
        if self.type_vocab_size > 0:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            embeddings = embeddings + self.token_type_embeddings(types)
        return embeddings


class VocabParallelEmbedding(Refused):
    """Vocabulary divided among processes: not implemented."""


class ColumnParallelEmbedding(Refused):
    """Columns divided among processes: not implemented."""


class ParallelGPT2Embeddings(Refused):
    """Embeddings divided among processes: not implemented."""
