"""The Triton back end as selection loads it; see :class:`flash_rocm.protocols.Backend`."""

from __future__ import annotations

from .cached import append, attend, splits_of
from .combine import combine
from .launch import backward, forward, probs

__all__ = ["append", "attend", "backward", "combine", "forward", "probs", "splits_of"]
