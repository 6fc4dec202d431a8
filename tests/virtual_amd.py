"""Launches AMD's own assembled attention kernels, which the amd-aiter wheel ships, on the virtual GPU.

The argument layout is that of ``fmha_fwd_v3_args`` in aiter's ``csrc/include/mha_fwd.h``: one argument every
16 bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from flash_rocm.virtual import Launch, LaunchStats, VirtualGpu, load_code_object

TILE_Q = 256


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 (no NaN)."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64 of (batch, seqlen, heads, dim) arrays, and its LSE (batch, heads, seqlen)."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    s = np.einsum("bihd,bjhd->bhij", q, k) * scale
    if causal:
        rows, cols = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])
        s = np.where(cols <= rows + k.shape[1] - q.shape[1], s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", p / total, v), (np.log(total) + top)[..., 0]


def run_forward(
    path: Path, arch: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, **options: Any
) -> tuple[np.ndarray, np.ndarray, LaunchStats]:
    """out and LSE of bfloat16 bits (batch, seqlen, heads, 128) by the kernel in ``path``."""
    launch, out, lse = forward_launch(path, arch, q, k, v, causal)
    return out, lse, launch.run(**options)


def forward_launch(
    path: Path, arch: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool
) -> tuple[Launch, np.ndarray, np.ndarray]:
    """What :func:`run_forward` runs, and the arrays that get its results."""
    code = load_code_object(path.read_bytes())
    gpu = VirtualGpu(arch)
    batch, rows, heads, dim = q.shape
    columns, heads_k = k.shape[1:3]
    out = np.zeros((batch, rows, heads, v.shape[3]), np.uint16)
    lse = np.zeros((batch, heads, rows), np.float32)
    pointers = [gpu.memory.add(n, x) for n, x in (("o", out), ("q", q), ("k", k), ("v", v), ("lse", lse))]
    scale = dim**-0.5

    def strides(x: np.ndarray) -> tuple[int, int, int]:
        return x.strides[1], x.strides[2], x.strides[0]

    row, head, sequence = strides(q)
    options_word = 5 if not causal or heads % 8 == 0 else 3
    words: list[Any] = [*pointers, scale, rows, row, TILE_Q * row, head, sequence, heads // heads_k]
    words += [*strides(k), options_word, 1, columns, dim, v.shape[3], heads, *strides(v), *strides(out)]
    words += [0, 0, lse.strides[1], 0, 0]
    packed = b"".join(
        struct.pack("<f12x", word) if isinstance(word, float) else struct.pack("<Q8x", word) for word in words
    )
    blocks = -(-rows // TILE_Q)
    grid = (-(-blocks // 2) if causal else blocks, heads, batch)
    kernargs = packed[: code.descriptor.kernarg_bytes]
    return Launch(gpu, code, grid, block_threads=512, kernargs=kernargs, order="lockstep", owner=None), out, lse
