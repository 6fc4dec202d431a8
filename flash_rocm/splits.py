"""Into how many parts the keys of a call are divided, so that few sequences occupy a whole chip.  A leaf."""

from __future__ import annotations

import functools

MAX_SPLITS = 256
#: What a part costs beside its keys, in tiles of keys: starting, and combining its result.
_OVERHEAD_TILES = 2.0


@functools.lru_cache(maxsize=4096)  # every call of a decode asks
def choose_splits(workgroups: int, tiles: int, slots: int) -> int:
    """The number of splits that a chip is done with first.

    Workgroups run in rounds of as many as the chip holds; the time of a round is that of one split.

    Args:
        workgroups: without splits: batch * nheads_k * blocks of rows.
        tiles: of keys that the longest sequence has.
        slots: workgroups that the chip runs at a time.
    """
    if workgroups == 0 or tiles <= 1:
        return 1
    best, best_cost = 1, float("inf")
    for splits in range(1, min(MAX_SPLITS, tiles) + 1):
        rounds = -(-workgroups * splits // slots)
        cost = rounds * (-(-tiles // splits) + _OVERHEAD_TILES) + (_OVERHEAD_TILES if splits > 1 else 0.0)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best
