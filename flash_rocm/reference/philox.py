"""Philox-4x32-10 on torch integers, and the dropout mask made of it.

The counter based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3" (SC 2011).  A mask element depends on its coordinates and on (seed, offset) alone, so tiles
of any size, in any order and on any device give the same mask, and backward regenerates it.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _multiply(word: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the 64-bit product of two unsigned 32-bit words."""
    # int64 products wrap modulo 2^64, which keeps every bit; only the sign of the shift needs masking off.
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox_4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """The four output words for a counter and a key.

    All are int64 tensors that hold unsigned 32-bit values and broadcast against each other; early
    rounds stay as small as the broadcasting allows.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    rng_state: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor, threshold: int
) -> torch.Tensor:
    """Which elements dropout keeps; bool, of the broadcast shape of ``head``, ``row`` and ``column``.

    ``rng_state`` (2,) int64 is the seed (its 64 bits are the key) and the offset (the last counter
    word); ``head`` is batch * nheads + head, ``row`` and ``column`` are the query and key position
    within the sequence, all int64; ``threshold`` is :func:`flash_rocm.problem.dropout_threshold`.
    Reads nothing back to the host.
    """
    state = rng_state.to(device=row.device, dtype=torch.int64)
    seed, offset = state[0], state[1]
    key = (seed & _WORD, (seed >> 32) & _WORD)
    first, _, _, _ = philox_4x32((column, row, head, offset & _WORD), key)
    return (first >> 1) >= threshold
