"""Launches AMD's own assembled attention kernels, which the amd-aiter wheel ships, on the virtual GPU.

The arguments are those of ``fmha_fwd_v3_args`` in aiter's ``csrc/include/mha_fwd.h``, one every 16 bytes, and
of ``fmha_bwd_v3_args`` in ``mha_bwd.h``, which the code objects' metadata name; their values are those of aiter's
``hsa/gfx942/fmha_v3_bwd/codegen.py``.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from flash_rocm.virtual import Launch, LaunchStats, VirtualGpu, load_code_object

#: Rows of q of a workgroup of the forward kernels, of k of one of the backward kernels.
TILE_Q, TILE_K = 256, 192


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


def backward_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, scale: float, causal: bool
) -> tuple[np.ndarray, ...]:
    """dq, dk and dv in float64, softmax_lse and delta (batch, heads, seqlen); as many heads of k as of q."""
    out, lse = reference(q, k, v, scale, causal)
    s = np.einsum("bihd,bjhd->bhij", q, k) * scale
    if causal:
        s = np.where(np.tri(*s.shape[2:], dtype=bool), s, -np.inf)
    p = np.exp(s - lse[..., None])
    delta = np.einsum("bihd,bihd->bhi", dout, out)
    ds = p * (np.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]) * scale
    dq, dk = np.einsum("bhij,bjhd->bihd", ds, k), np.einsum("bhij,bihd->bjhd", ds, q)
    return dq, dk, np.einsum("bhij,bihd->bjhd", p, dout), lse, delta


def run_backward(
    path: Path,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    lse: np.ndarray,
    delta: np.ndarray,
    causal: bool,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, LaunchStats]:
    """dq (float32), dk and dv (bfloat16 bits) by a gfx942 kernel that adds up dq with atomics ("a32").

    All tensors are contiguous (batch, seqlen, heads, 128) of one shape, with a multiple of 64 rows.
    """
    code = load_code_object(path.read_bytes())
    gpu = VirtualGpu("gfx942")
    batch, rows, heads, dim = q.shape
    dq = np.zeros((batch, heads, rows, dim), np.float32)
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    arrays = {"dQ": dq, "dK": dk, "dV": dv, "Q": q, "K": k, "V": v, "dO": dout}
    arrays |= {"Lse": np.float32(lse).copy("C"), "D": np.float32(delta).copy("C")}
    sequence, row, head, _ = q.strides
    kernargs: dict[str, Any] = {name: gpu.memory.add(name, array) for name, array in arrays.items()}
    kernargs |= {"scalar": dim**-0.5, "log2e": float(np.log2(np.e)), "seq_len": rows, "ratio": 1}
    kernargs |= {"Ts": TILE_K * row, "Hs": head, "BAs": sequence, "Seqs": row}
    kernargs |= {"Hs_kv": head, "BAs_kv": sequence, "Seqs_kv": row, "Seqs_dkv": row, "head_dim": dim}
    blocks = -(-rows // TILE_K)
    grid = (-(-blocks // 2) if causal else blocks, heads, batch)
    stats = gpu.launch(code, grid=grid, block_threads=256, kernargs=kernargs, **options)
    return dq.transpose(0, 2, 1, 3), dk, dv, stats
