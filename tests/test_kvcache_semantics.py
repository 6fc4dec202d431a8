"""Rotary, append, paging and split combination of the reference against independent oracles."""

from __future__ import annotations

import pytest
import torch

from flash_rocm.reference import forward
from flash_rocm.reference.kvcache import append_kv, apply_rotary, combine_splits, gather_paged
from flash_rocm.testing import (
    make_inputs,
    make_problem,
    oracle_append,
    oracle_attention,
    oracle_combine,
    oracle_gather,
    oracle_rotary,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(rotary_dim: int, positions: int = 64, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    frequency = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("rotary_dim", (2, 16, 24))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64), ids=str)
def test_rotary(dtype: torch.dtype, rotary_dim: int, interleaved: bool) -> None:
    x = randn(2, 9, 3, 24, dtype=dtype)
    before = x.clone()
    cos, sin = angles(rotary_dim, dtype=dtype)
    offsets = torch.tensor([4, 55])
    found = apply_rotary(x, cos, sin, seqlen_offsets=offsets, interleaved=interleaved)
    positions = offsets[:, None] + torch.arange(9)
    exact = oracle_rotary(x, cos, sin, positions, interleaved)
    assert found.dtype == dtype and torch.equal(x, before)
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])
    # Two products and a sum in the wider dtype, then one rounding: the eps of each at |x| times sqrt(2).
    wide = torch.promote_types(dtype, torch.float32)
    bound = (torch.finfo(dtype).eps / 2 + 2 * torch.finfo(wide).eps) * 2**0.5 * float(x.abs().max())
    assert float((found.double() - exact).abs().max()) <= bound
    again = apply_rotary(x, cos, sin, positions=positions, interleaved=interleaved)
    assert torch.equal(again, found)


def test_rotary_of_packed_tokens_and_plain_offsets() -> None:
    x, (cos, sin) = randn(2, 5, 3, 8), angles(8)
    whole = apply_rotary(x, cos, sin, seqlen_offsets=3)
    packed = apply_rotary(x.flatten(0, 1), cos, sin, positions=torch.arange(3, 8).repeat(2))
    assert torch.equal(packed, whole.flatten(0, 1))
    assert torch.equal(apply_rotary(x, cos, sin)[:, 0], x[:, 0])  # position 0 turns nothing
    assert apply_rotary(x[:, :0], cos, sin).shape == (2, 0, 3, 8)


def test_rotary_scores_depend_on_distance_only() -> None:
    cos, sin = angles(16, dtype=torch.float64)
    q, k = randn(1, 1, 1, 16, dtype=torch.float64), randn(1, 1, 1, 16, seed=1, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return (apply_rotary(q, cos, sin, seqlen_offsets=i) * apply_rotary(k, cos, sin, seqlen_offsets=j)).sum()

    torch.testing.assert_close(score(5, 2), score(60, 57))


def test_rotary_errors() -> None:
    x, (cos, sin) = randn(1, 5, 1, 8), angles(8)
    with pytest.raises(ValueError, match="positions: expected 0 <= position < 64"):
        apply_rotary(x, cos, sin, seqlen_offsets=60)
    with pytest.raises(ValueError, match="positions"):
        apply_rotary(x, cos, sin, seqlen_offsets=-1)
    with pytest.raises(ValueError, match="cos, sin"):
        apply_rotary(x, *angles(10))
    with pytest.raises(ValueError, match="cos, sin"):
        apply_rotary(x, cos, sin[:, :2])


@pytest.mark.parametrize("cache_batch_idx", (None, [3, 0, 4]))
@pytest.mark.parametrize("seqlen_new", (0, 1, 5))
def test_append_contiguous(seqlen_new: int, cache_batch_idx: list[int] | None) -> None:
    k_cache, v_cache = randn(5, 20, 2, 8), randn(5, 20, 2, 6, seed=1)
    k, v = randn(3, seqlen_new, 2, 8, seed=2), randn(3, seqlen_new, 2, 6, seed=3)
    lengths = [0, 7, 20 - seqlen_new]
    expected_k = oracle_append(k_cache, k, lengths, cache_batch_idx)
    expected_v = oracle_append(v_cache, v, lengths, cache_batch_idx)
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32)
    index = None if cache_batch_idx is None else torch.tensor(cache_batch_idx, dtype=torch.int32)
    append_kv(k_cache, v_cache, k, v, cache_seqlens, index)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    assert cache_seqlens.tolist() == lengths


@pytest.mark.parametrize("page_size", (1, 3, 16))
def test_append_and_gather_paged(page_size: int) -> None:
    lengths, seqlen_new = [0, 7, 13], 5
    pages_each = -(-18 // page_size)
    order = torch.randperm(3 * pages_each, generator=torch.Generator().manual_seed(4)) + 2
    table = order.view(3, pages_each).to(torch.int32)
    num_pages = 3 * pages_each + 2
    k_cache, v_cache = randn(num_pages, page_size, 2, 8), randn(num_pages, page_size, 2, 6, seed=1)
    k, v = randn(3, seqlen_new, 2, 8, seed=2), randn(3, seqlen_new, 2, 6, seed=3)
    old = oracle_gather(k_cache, table, lengths)
    expected_k = oracle_append(k_cache, k, lengths, block_table=table)
    expected_v = oracle_append(v_cache, v, lengths, block_table=table)
    append_kv(k_cache, v_cache, k, v, torch.tensor(lengths), block_table=table)
    assert torch.equal(k_cache, expected_k) and torch.equal(v_cache, expected_v)
    total = torch.tensor(lengths) + seqlen_new
    found = gather_paged(k_cache, table, total)
    assert torch.equal(found, torch.cat(oracle_gather(k_cache, table, total.tolist())))
    assert torch.equal(found, torch.cat([torch.cat([old[b], k[b]]) for b in range(3)]))


def test_gather_reads_no_unused_page() -> None:
    cache = randn(4, 3, 1, 2)
    cache[2, 1:] = float("nan")
    table = torch.tensor([[1, 2, -1], [-7, 99, 99]], dtype=torch.int32)
    assert torch.equal(gather_paged(cache, table, [4, 0]), torch.cat([cache[1], cache[2, :1]]))
    assert gather_paged(cache, table[:0], []).shape == (0, 1, 2)
    with pytest.raises(ValueError, match="seqlens: expected at most 9"):
        gather_paged(cache, table, [10, 0])


def test_append_errors_write_nothing() -> None:
    k_cache, v_cache, new = torch.zeros(2, 4, 1, 2), torch.zeros(2, 4, 1, 2), torch.ones(2, 2, 1, 2)
    for lengths in ([0, 3], [0, -1]):
        with pytest.raises(ValueError, match="cache_seqlens: expected 0 to 2"):
            append_kv(k_cache, v_cache, new, new, torch.tensor(lengths))
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="cache_batch_idx"):
        append_kv(k_cache, v_cache, new, new, index, index, block_table=index[:, None])
    assert not k_cache.any() and not v_cache.any()


@pytest.mark.parametrize("num_splits", (1, 2, 7))
def test_combine(num_splits: int) -> None:
    out_partial, lse_partial = randn(num_splits, 2, 5, 3, 8), 20 * randn(num_splits, 2, 5, 3, seed=1)
    lse_partial[:, :, 0] += 500.0  # beyond what exp can hold
    lse_partial[0, :, :2] = float("-inf")
    lse_partial[:, :, 2] = float("-inf")
    out_partial[lse_partial.isneginf()] = float("nan")
    out, lse = combine_splits(out_partial, lse_partial)
    exact, exact_lse = oracle_combine(out_partial, lse_partial)
    assert out.shape == (2, 5, 3, 8) and lse.shape == (2, 5, 3) and lse.dtype == torch.float32
    assert not out[:, 2].any() and bool(lse[:, 2].isneginf().all())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert combine_splits(out_partial, lse_partial, torch.bfloat16)[0].dtype == torch.bfloat16


def test_combined_attention_of_key_ranges_is_attention() -> None:
    problem = make_problem(dtype=torch.float64, seqlen_q=6, seqlen_k=30)
    inputs = make_inputs(problem).inputs
    parts = []
    for start, end in ((0, 11), (11, 11), (11, 30)):
        part = make_problem(dtype=torch.float64, seqlen_q=6, seqlen_k=end - start)
        parts.append(forward(part, inputs._replace(k=inputs.k[:, start:end], v=inputs.v[:, start:end])))
    lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    out, lse = combine_splits(torch.stack([out for out, _ in parts]), lse_partial)
    exact = oracle_attention(inputs, problem)
    torch.testing.assert_close(out, exact.out, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse.transpose(1, 2), exact.lse, rtol=0, atol=1e-12)
