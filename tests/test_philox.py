"""Philox-4x32-10: published answers, agreement of the two implementations, and statistics of the mask."""

from __future__ import annotations

import pytest
import torch

from flash_rocm.problem import dropout_threshold
from flash_rocm.reference.philox import keep_mask, philox_4x32
from flash_rocm.testing import make_problem, oracle_keep, philox_words

F = 0xFFFFFFFF
#: (counter, key, output) from the known-answer file of the Random123 distribution.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def mask(seed: int, offset: int, p: float, nheads: int = 1, rows: int = 64, columns: int = 64) -> torch.Tensor:
    return keep_mask(
        torch.tensor([seed, offset]),
        torch.arange(nheads)[:, None, None],
        torch.arange(rows)[:, None],
        torch.arange(columns)[None, :],
        dropout_threshold(p),
    )


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    words = philox_4x32((c0, c1, c2, c3), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(word) for word in words) == expected
    assert philox_words(counter, key) == expected


def test_second_implementation_agrees_on_random_words() -> None:
    generator = torch.Generator().manual_seed(0)
    c0, c1, c2, c3, k0, k1 = torch.randint(0, 1 << 32, (6, 4096), generator=generator)
    ours = philox_4x32((c0, c1, c2, c3), (k0, k1))
    for word, other in zip(ours, philox_words((c0, c1, c2, c3), (k0, k1)), strict=True):
        assert torch.equal(word, other)
        assert int(word.min()) >= 0 and int(word.max()) <= F


@pytest.mark.parametrize("seed", (0, 5, (1 << 32) + 5, (1 << 63) - 1, -1))
def test_mask_agrees_with_the_oracle(seed: int) -> None:
    problem = make_problem(nheads=3, dropout_p=0.4)
    state = torch.tensor([seed, (1 << 31) - 1])
    head = (2 * 3 + torch.arange(3))[:, None, None]  # batch 2
    found = keep_mask(state, head, torch.arange(9)[:, None], torch.arange(7)[None, :], dropout_threshold(0.4))
    assert torch.equal(found, oracle_keep(state, problem, 2, 9, 7))


@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 0.9, 1.0))
def test_keep_rate(p: float) -> None:
    found = mask(1234, 0, p, nheads=4, rows=256, columns=256)
    deviation = (p * (1 - p) / found.numel()) ** 0.5
    assert abs(float(found.double().mean()) - (1 - p)) <= 5 * deviation + 2**-30


def test_rows_columns_and_heads_are_independent() -> None:
    found = mask(99, 3, 0.5, nheads=2, rows=256, columns=256).double() - 0.5
    limit = 5 * 0.25 / (255 * 256) ** 0.5
    for a, b in ((found[0], found[1]), (found[0, 1:], found[0, :-1]), (found[0, :, 1:], found[0, :, :-1])):
        assert abs(float((a * b).mean())) < limit
    assert abs(float((found[0] * found[0].T).mean())) < 2 * limit


def test_seed_and_offset_choose_another_mask() -> None:
    base = mask(7, 0, 0.5)
    for other in (mask(8, 0, 0.5), mask(7, 1, 0.5), mask(7 + (1 << 32), 0, 0.5)):
        assert 0.4 < float((base != other).double().mean()) < 0.6
    assert torch.equal(base, mask(7, 0, 0.5))
