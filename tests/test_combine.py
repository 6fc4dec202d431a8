"""``flash_attn_combine`` on every target, against the float64 oracle; its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_adversarial import device as on_every_target
from test_adversarial import random, same

import flash_rocm
from flash_rocm.testing import oracle_combine

device = on_every_target
SHAPES = {"dense": (2, 5, 3, 24), "varlen": (7, 3, 24), "long head": (1, 2, 2, 130), "no rows": (2, 0, 3, 24)}


def partials(device: str, num_splits: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of splits; some, and for the first head of the first row all, saw no key: their out is NaN."""
    out = random(device, num_splits, *shape, dtype=torch.float32)
    lse = 20 * random(device, num_splits, *shape[:-1], dtype=torch.float32, seed=1)
    lse[..., 1] += 500.0  # beyond what exp can hold
    lse[num_splits // 2, ..., -1:, :] = -math.inf
    lse[(slice(None), *([slice(0, 1)] * (len(shape) - 2)), 0)] = -math.inf
    out[lse == -math.inf] = math.nan
    return out, lse


def check(found: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, lse: torch.Tensor) -> None:
    """A float32 sum of up to 256 products, rounded once more to the dtype of the result."""
    exact, exact_lse = oracle_combine(out, lse)
    eps = torch.finfo(found[0].dtype).eps + 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found[0].double(), exact, rtol=eps, atol=4 * eps)
    torch.testing.assert_close(found[1].double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_splits", (1, 2, 17, 256))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_combine(shape: tuple[int, ...], num_splits: int, device: str) -> None:
    out, lse = partials(device, num_splits, *shape)
    before = out.clone(), lse.clone()
    found = flash_rocm.flash_attn_combine(out, lse)
    check(found, out, lse)
    assert found[0].shape == shape and found[1].shape == shape[:-1]
    assert same((out.nan_to_num(), lse), (before[0].nan_to_num(), before[1]))
    assert same(flash_rocm.flash_attn_combine(out, lse), found)


def test_nothing_seen(device: str) -> None:
    out, lse = partials(device, 3, 2, 5, 3, 24)
    found = flash_rocm.flash_attn_combine(out, torch.full_like(lse, -math.inf))
    assert not found[0].any() and bool((found[1] == -math.inf).all())


def test_nan_that_counts_shows(device: str) -> None:
    out, lse = (x.nan_to_num(nan=1.0, neginf=0.0) for x in partials(device, 3, 5, 3, 24))
    out[1, 2, 1] = math.nan
    lse[2, 4, 0] = math.nan
    found = flash_rocm.flash_attn_combine(out, lse)
    assert found[0].isnan().all(-1).nonzero().tolist() == [[2, 1], [4, 0]]
    assert found[1].isnan().nonzero().tolist() == [[4, 0]]


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_dtype_of_the_result(dtype: torch.dtype, device: str) -> None:
    partial = partials(device, 3, 2, 5, 3, 24)
    found = flash_rocm.flash_attn_combine(*partial, out_dtype=dtype)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    check(found, *partial)
    out = torch.full((2, 5, 3, 24), 9.0, dtype=dtype, device=device)
    again = flash_rocm.flash_attn_combine(*partial, out=out)
    assert again[0] is out and same(again, found)
    assert same(flash_rocm.flash_attn_combine(*partial, out, dtype), found)


@pytest.mark.parametrize("kind", ("dims turned", "part of more", "repeated", "strided dims"))
@pytest.mark.parametrize("shape", [SHAPES["dense"], SHAPES["varlen"]], ids=["dense", "varlen"])
def test_strides(shape: tuple[int, ...], kind: str, device: str) -> None:
    out, lse = partials(device, 3, *shape)
    if kind == "repeated":
        out, lse = out[:1].expand(3, *shape), lse[:1].expand(3, *shape[:-1])
    expected = flash_rocm.flash_attn_combine(out.contiguous(), lse.contiguous())
    if kind == "dims turned":
        out, lse = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (out, lse))
    elif kind == "part of more":
        out, lse = torch.cat([out] * 2, 1)[:, : shape[0]], torch.cat([lse] * 2, -1)[..., : shape[-2]]
    elif kind == "strided dims":
        out, lse = torch.stack([out] * 2, -1)[..., 0], torch.stack([lse] * 2, -1)[..., 0]
    assert out.is_contiguous() is False and lse.is_contiguous() is False
    assert same(flash_rocm.flash_attn_combine(out, lse), expected)


@pytest.mark.parametrize("index", (0, 1), ids=["out_partial", "lse_partial"])
def test_backward_is_refused(index: int, device: str) -> None:
    partial = list(partials(device, 3, 7, 3, 24))
    partial[index].requires_grad_()
    buffer = torch.empty(7, 3, 24, device=device)
    for out in (None, buffer):
        found, _ = flash_rocm.flash_attn_combine(*partial, out)
        with pytest.raises(NotImplementedError) as error:
            found.sum().backward()
        assert str(error.value) == "flash_attn_combine has no backward. Hint: pass detached tensors."
    with torch.no_grad():
        assert not flash_rocm.flash_attn_combine(*partial)[0].requires_grad


OUT, LSE = torch.zeros(3, 2, 5, 4, 8), torch.zeros(3, 2, 5, 4)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "list": (dict(out_partial=[1.0]), "out_partial: expected float32 with 4 or 5 dims, got list."),
    "half": (
        dict(out_partial=OUT.half()),
        "out_partial: expected float32 with 4 or 5 dims, got torch.float16 (3, 2, 5, 4, 8).",
    ),
    "3 dims": (
        dict(out_partial=OUT[0, 0]),
        "out_partial: expected float32 with 4 or 5 dims, got torch.float32 (5, 4, 8).",
    ),
    "half lse": (
        dict(lse_partial=LSE.half()),
        "lse_partial: expected float32 with 3 or 4 dims, got torch.float16 (3, 2, 5, 4).",
    ),
    "2 dims": (
        dict(lse_partial=LSE[0, 0]),
        "lse_partial: expected float32 with 3 or 4 dims, got torch.float32 (5, 4).",
    ),
    "another shape": (
        dict(lse_partial=LSE[:2]),
        "lse_partial: expected shape (3, 2, 5, 4) on cpu, got (2, 2, 5, 4) on cpu.",
    ),
    "heads first": (
        dict(lse_partial=LSE.transpose(2, 3)),
        "lse_partial: expected shape (3, 2, 5, 4) on cpu, got (3, 2, 4, 5) on cpu.",
    ),
    "elsewhere": (
        dict(lse_partial=LSE.to("meta")),
        "lse_partial: expected shape (3, 2, 5, 4) on cpu, got (3, 2, 5, 4) on meta.",
    ),
    "double lse": (
        dict(lse_partial=LSE.double()),
        "lse_partial: expected the dtype of out_partial, torch.float32, got torch.float64.",
    ),
    "257 splits": (
        dict(out_partial=torch.zeros(257, 1, 1, 8), lse_partial=torch.zeros(257, 1, 1)),
        "out_partial: expected at most 256 splits, got 257.",
    ),
    "out of another shape": (
        dict(out=torch.zeros(2, 5, 4, 9)),
        "out: expected contiguous, shape (2, 5, 4, 8) on cpu, got stride (180, 36, 9, 1), shape (2, 5, 4, 9) on cpu.",
    ),
    "out strided": (
        dict(out=torch.zeros(2, 5, 8, 4).transpose(2, 3)),
        "out: expected contiguous, shape (2, 5, 4, 8) on cpu, got stride (160, 32, 1, 4), shape (2, 5, 4, 8) on cpu.",
    ),
    "out and another dtype": (
        dict(out=torch.zeros(2, 5, 4, 8), out_dtype=torch.half),
        "out_dtype: expected torch.float32, that of out, got torch.float16.",
    ),
    "integers": (dict(out_dtype=torch.int32), "out_dtype: expected a floating point dtype, got torch.int32."),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument(name: str) -> None:
    changes, text = WRONG[name]
    out = changes.get("out")
    with pytest.raises(ValueError) as error:
        flash_rocm.flash_attn_combine(**{"out_partial": OUT, "lse_partial": LSE, **changes})
    assert str(error.value) == text
    assert out is None or not out.any()
