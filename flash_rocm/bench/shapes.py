"""What is computed: shapes, presets, inputs and operation counts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NamedTuple

import torch

DIRECTIONS = ("forward", "backward", "both")
MASKS = ("causal", "full")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Multiply-adds over the (seqlen_q, seqlen_k) square, times two: the forward has two matrix products,
#: the backward five (it recomputes q @ k^T), "both" is a forward and a backward.
_FLOPS_PER_SCORE = {"forward": 4, "backward": 10, "both": 14}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Self-attention of ``batch`` sequences, as many key/value heads as query heads."""

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    causal: bool
    dtype: str = "bf16"

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def score_count(self) -> int:
        """Elements of the (batch, nheads, seqlen, seqlen) score matrix."""
        return self.batch * self.nheads * self.seqlen * self.seqlen

    def flops(self, direction: str) -> float:
        """Floating-point operations: 4 * batch * nheads * seqlen^2 * headdim forward, 2.5 times that
        backward, both halved under the causal mask (as FlashAttention-2 counts, arXiv:2307.08691)."""
        full = float(_FLOPS_PER_SCORE[direction] * self.score_count() * self.headdim)
        return full / 2 if self.causal else full

    def __str__(self) -> str:
        return f"B{self.batch} H{self.nheads} S{self.seqlen} d{self.headdim} {self.mask} {self.dtype}"


class Data(NamedTuple):
    """Random inputs of one shape, each (batch, seqlen, nheads, headdim) and contiguous."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor


def make_data(shape: Shape, device: torch.device, seed: int = 0) -> Data:
    """Standard normal numbers: zeros would draw less power and run at a higher clock."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.seqlen, shape.nheads, shape.headdim)
    q, k, v, dout = (
        torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(shape.torch_dtype)
        for _ in range(4)
    )
    return Data(q, k, v, dout)


@dataclasses.dataclass(frozen=True)
class Preset:
    """batch * seqlen = ``tokens`` and nheads * headdim = ``width`` for every shape."""

    tokens: int
    width: int
    seqlens: tuple[int, ...]
    headdims: tuple[int, ...]
    rounds: int


GRID = Preset(16384, 2048, (512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256), 7)
QUICK = Preset(16384, 2048, (1024, 4096), (64, 128), 3)
QUICK_CPU = Preset(256, 128, (64, 128), (32, 64), 3)


def preset_of(name: str | None, device: torch.device) -> Preset:
    """``grid``, ``quick``, or by default ``grid`` on a GPU; the CPU's ``quick`` is tiny."""
    if name == "grid" or (name is None and device.type != "cpu"):
        return GRID
    return QUICK_CPU if device.type == "cpu" else QUICK


def build_shapes(
    tokens: int,
    width: int,
    seqlens: tuple[int, ...],
    headdims: tuple[int, ...],
    masks: tuple[str, ...],
    dtype: str,
) -> list[Shape]:
    """Every combination, head dim by head dim, mask by mask, short to long.

    Raises:
        ValueError: a head dim does not divide ``width``, or a seqlen is over ``tokens``.
    """
    for headdim in headdims:
        if width % headdim:
            raise ValueError(
                f"--headdim: expected divisors of nheads*headdim = {width}, got {headdim}. Hint: set --width"
            )
    for seqlen in seqlens:
        if seqlen > tokens:
            raise ValueError(f"--seqlen: expected at most batch*seqlen = {tokens}, got {seqlen}. Hint: set --tokens.")
    return [
        Shape(tokens // seqlen, seqlen, width // headdim, headdim, mask == "causal", dtype)
        for headdim in headdims
        for mask in masks
        for seqlen in seqlens
    ]


# --------------------------------------------------------------------------------------------------
# Command line values


def parse_length(text: str) -> int:
    """A length such as "512" or "16k"."""
    number = text.strip().lower()
    factor = 1024 if number.endswith("k") else 1
    digits = number.removesuffix("k")
    if not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"expected a length such as 512 or 16k, got {text!r}")
    return int(digits) * factor


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths such as "512,4k" or "512..16k" (doubling)."""
    lengths: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        length, end = parse_length(first), parse_length(last if dots else first)
        while length <= end:
            lengths.append(length)
            length *= 2
    if not lengths:
        raise argparse.ArgumentTypeError(f"expected lengths such as 512,4k or 512..16k, got {text!r}")
    return tuple(dict.fromkeys(lengths))


def choices(allowed: tuple[str, ...]) -> Any:
    """A parser of comma-separated names, for argparse's ``type``."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, got {text!r}")
        return names

    return parse
