"""A second Philox-4x32-10, written for clarity, and the dropout mask it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flash_rocm.problem import AttentionProblem, dropout_threshold


def philox_words(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, ...]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on four counter and two key words, Python ints or int64 tensors."""

    def multiply(a: int, b: Any) -> tuple[Any, Any]:  # in 16-bit halves, so that nothing passes 63 bits
        low = a * (b & 0xFFFF)
        middle = a * (b >> 16) + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    x = list(counter)
    for r in range(10):
        k0 = (key[0] + r * 0x9E3779B9) % 2**32
        k1 = (key[1] + r * 0xBB67AE85) % 2**32
        (h0, l0), (h1, l1) = multiply(0xD2511F53, x[0]), multiply(0xCD9E8D57, x[2])
        x = [h1 ^ x[1] ^ k0, l1, h0 ^ x[3] ^ k1, l0]
    return tuple(x)


def oracle_keep(rng_state: torch.Tensor, problem: AttentionProblem, b: int, sq: int, sk: int) -> torch.Tensor:
    """Dropout keep mask (nheads, sq, sk) of batch ``b``, bool, on the device of ``rng_state``."""
    seed, offset = rng_state.tolist()
    h, i, j = torch.meshgrid(
        *(torch.arange(n, device=rng_state.device) for n in (problem.nheads, sq, sk)), indexing="ij"
    )
    counter = (j, i, b * problem.nheads + h, torch.full_like(j, offset))
    word = philox_words(counter, (seed % 2**32, (seed // 2**32) % 2**32))[0]
    return word // 2 >= dropout_threshold(problem.dropout_p)
