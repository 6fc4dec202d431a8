"""The reference back end: exact attention in plain torch, on any device torch has."""

from __future__ import annotations

from flash_rocm.reference.attention import backward, forward, probs
from flash_rocm.reference.cached import append, attend, combine, splits_of
from flash_rocm.reference.tiles import TileSize

__all__ = ["TileSize", "append", "attend", "backward", "combine", "forward", "probs", "splits_of"]
