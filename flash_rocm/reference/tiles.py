"""Which tiles of the score matrix exist, which of them need a mask, and products that respect one.

Everything here is about positions; no attention arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from flash_rocm.problem import AttentionProblem

#: Scores that one tile holds over all batches and heads, unless the smallest tile already holds more.
_MAX_SCORES = 1 << 20
_LARGEST, _SMALLEST = 512, 32


class TileSize(NamedTuple):
    """Rows (queries) and columns (keys) of a tile."""

    q: int
    k: int


class Tile(NamedTuple):
    """Half open ranges of query rows and key columns; ``partial`` when some row does not see some column."""

    row: int
    row_end: int
    column: int
    column_end: int
    partial: bool


def default_tile(batch: int, nheads: int) -> TileSize:
    """Square tiles that bound the memory of one step, however many batches and heads run together."""
    size = _LARGEST
    while size > _SMALLEST and batch * nheads * size * size > _MAX_SCORES:
        size //= 2
    return TileSize(size, size)


def key_range(problem: AttentionProblem, row: int, row_end: int, shift: int, seqlen_k: int) -> tuple[int, int]:
    """Half open range of the keys that at least one of the rows sees (empty: start >= end)."""
    start, end = 0, seqlen_k
    if problem.window_left >= 0:
        start = max(start, row + shift - problem.window_left)
    if problem.window_right >= 0:
        end = min(end, row_end + shift + problem.window_right)
    if chunk := problem.attention_chunk:
        start = max(start, (row + shift) // chunk * chunk)
        end = min(end, (row_end - 1 + shift) // chunk * chunk + chunk)
    return start, end


def key_tiles(
    problem: AttentionProblem, row: int, row_end: int, seqlen_q: int, seqlen_k: int, size: int
) -> Iterator[Tile]:
    """The tiles of one block of rows.  Columns that no row of the block sees are in no tile."""
    left, right = problem.window_left, problem.window_right
    shift = seqlen_k - seqlen_q
    start, end = key_range(problem, row, row_end, shift, seqlen_k)
    for column in range(start, end, size):
        column_end = min(column + size, end)
        cut_left = left >= 0 and column < row_end - 1 + shift - left
        cut_right = right >= 0 and column_end - 1 > row + shift + right
        cut_chunk = problem.attention_chunk > 0 and not _in_one_chunk(
            problem.attention_chunk, row + shift, row_end - 1 + shift, column, column_end - 1
        )
        yield Tile(row, row_end, column, column_end, cut_left or cut_right or cut_chunk)


def _in_one_chunk(chunk: int, *positions: int) -> bool:
    return len({position // chunk for position in positions}) == 1


def visible_in(problem: AttentionProblem, tile: Tile, shift: int, device: torch.device) -> torch.Tensor | None:
    """(rows, columns) bool mask of a tile, None when every row sees every column."""
    if not tile.partial:
        return None
    row = torch.arange(tile.row, tile.row_end, device=device)[:, None] + shift
    column = torch.arange(tile.column, tile.column_end, device=device)[None, :]
    visible = torch.ones(row.shape[0], column.shape[1], dtype=torch.bool, device=device)
    if problem.window_left >= 0:
        visible &= column >= row - problem.window_left
    if problem.window_right >= 0:
        visible &= column <= row + problem.window_right
    if problem.attention_chunk > 0:
        visible &= column // problem.attention_chunk == row // problem.attention_chunk
    return visible


def product(weights: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """``weights @ values`` in which hidden terms do not exist, even where ``values`` is NaN or infinite.

    ``weights`` (..., R, C) is 0 where ``visible`` (R, C) is False; ``values`` is (..., C, D).  A zero
    weight does not silence a NaN, so the rare rows of ``values`` that are not finite are left out of
    the product and added one by one to the rows that see them.
    """
    if visible is None:
        return weights @ values
    finite = torch.isfinite(values).all(-1).flatten(0, -2).all(0)  # (C,)
    if bool(finite.all()):
        return weights @ values
    result = weights @ values.masked_fill(~finite[:, None], 0.0)
    for c in (~finite).nonzero().flatten().tolist():
        term = weights[..., c : c + 1] * values[..., c : c + 1, :]
        result += term.masked_fill(~visible[:, c : c + 1], 0.0)
    return result
