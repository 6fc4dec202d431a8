"""The Triton back end as selection loads it; see :class:`flash_rocm.protocols.Backend`."""

from __future__ import annotations

from .cached import append, attend, combine, splits_of
from .launch import backward, forward, probs

__all__ = ["append", "attend", "backward", "combine", "forward", "probs", "splits_of"]
