"""Padding taken out and put back, against loops over the rows."""

from __future__ import annotations

import pytest
import torch
from test_adversarial import random, same

from flash_rocm import bert_padding as bp


def test_unpad_and_pad() -> None:
    x = random("cpu", 3, 6, 2, 4, dtype=torch.float32).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]])
    rows, indices, cu_seqlens, longest, used = bp.unpad_input(x, mask)
    assert same(rows, x[mask.bool()]) and indices.tolist() == [0, 1, 2, 13, 14, 16, 17]
    assert cu_seqlens.tolist() == [0, 3, 3, 7] and cu_seqlens.dtype == torch.int32
    assert longest == 4 and isinstance(longest, int)
    assert used.tolist() == [3, 0, 4] and used.dtype == torch.int32
    for one, other in zip(bp.unpad_input(x, mask.bool()), (rows, indices, cu_seqlens, longest, used), strict=True):
        assert bool(torch.as_tensor(one == other).all())
    back = bp.pad_input(rows, indices, 3, 6)
    assert same(back, x * mask[..., None, None])
    back.sum().backward()
    assert x.grad is not None and same(x.grad, mask[..., None, None].expand_as(x).float())


def test_unused_places_are_kept_and_not_counted() -> None:
    x = random("cpu", 2, 4, 3)
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    rows, indices, cu_seqlens, longest, used = bp.unpad_input(x, mask, unused)
    assert same(rows, x[(mask + unused).bool()]) and indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 3, 7] and longest == 4 and used.tolist() == [2, 1]


def test_concatenated_sequences() -> None:
    x = random("cpu", 2, 6, 3)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    rows, indices, cu_seqlens, longest = bp.unpad_input_for_concatenated_sequences(x, lengths)
    assert same(rows, torch.cat((x[0, :5], x[1, :4]))) and indices.tolist() == [*range(5), *range(6, 10)]
    assert cu_seqlens.tolist() == [0, 2, 5, 9] and longest == 4 and cu_seqlens.dtype == torch.int32


def test_rows() -> None:
    x, indices = random("cpu", 5, 2, 3), torch.tensor([4, 0, 2])
    assert same(bp.index_first_axis(x, indices), x[indices])
    rows, residual = bp.index_first_axis_residual(x.requires_grad_(), indices)
    assert same(rows, x[indices]) and same(residual, x.detach()) and not residual.requires_grad
    placed = bp.index_put_first_axis(rows, indices, 6)
    # Transformers gives 32-bit ones.
    assert same(bp.index_put_first_axis(rows, indices.int(), 6), placed)
    assert same(bp.index_first_axis(x, indices.int()), bp.index_first_axis(x, indices))
    assert placed.shape == (6, 2, 3) and same(placed[indices], rows) and not placed[[1, 3, 5]].any()


def test_errors() -> None:
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(batch, seqlen\) \(2, 4\), got \(2, 5\)"):
        bp.unpad_input(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match="unused_mask: expected shape"):
        bp.unpad_input(x, torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="attention_mask_in_length: expected shape"):
        bp.unpad_input_for_concatenated_sequences(x, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"indices: expected shape \(4,\)"):
        bp.pad_input(torch.zeros(4, 3), torch.arange(3), 2, 4)
