"""Launches AMD's own assembled attention kernels, which the amd-aiter wheel ships, on the virtual GPU.

The arguments are those of ``fmha_fwd_v3_args`` in aiter's ``csrc/include/mha_fwd.h``, one every 16 bytes, and
of the ``fmha_bwd_v3_..._args`` in ``mha_bwd.h``, which the code objects' metadata name; their values are those of
aiter's ``hsa/<arch>/fmha_v3_bwd/codegen.py``, and the layouts of dq those of its ``csrc/py_itfs_cu``.
"""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import numpy as np

from flash_rocm.virtual import CodeObject, Launch, LaunchStats, VirtualGpu, load_code_object

#: Rows of q of a workgroup of the forward kernels, of k of one of the backward kernels.
TILE_Q, TILE_K = 256, {"gfx942": 192, "gfx950": 256}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16 (no NaN)."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def to_fp16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def from_fp16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float64)


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


@dataclasses.dataclass(frozen=True)
class Backward:
    """Gradients in float64, and what the main kernel's launch took."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    stats: LaunchStats


def run_backward(
    path: Path,
    arch: str,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    lse: np.ndarray,
    delta: np.ndarray,
    starts: tuple[int, ...] = (),
    **options: Any,
) -> Backward:
    """Gradients by one of AMD's kernels, whose file's name says what it does.

    "a32" adds up dq in float32; "a16" in q's type, in q's layout on gfx942 and on gfx950 in one of its own, which
    ``dq_shuffle`` puts right.  "group" takes sequences that lie one behind the other.

    Args:
        q, k, v, dout: bits of bfloat16 or, where the name says so, float16, contiguous (batch, seqlen, heads, 128)
            and all of one shape; batch is 1 for "group".
        lse, delta: (batch, heads, seqlen).
        starts: where the sequences of "group" begin, and the end.
    """
    code, gpu = load_code_object(path.read_bytes()), VirtualGpu(arch)
    batch, rows, heads, dim = q.shape
    decode = from_bf16 if "bf16" in path.name else from_fp16
    in_place, shuffled = "_a16" in path.name and arch == "gfx942", "_a16" in path.name and arch == "gfx950"
    longest = max(np.diff(starts)) if starts else rows
    padded = -(-longest // 16) * 16
    if in_place:
        dq = np.zeros_like(q)
    elif shuffled:
        dq = np.zeros((len(starts) - 1 if starts else batch, heads, padded, dim), np.uint16)
    else:
        dq = np.zeros((batch, heads, rows, dim), np.float32)
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    arrays = {"dQ": dq, "dK": dk, "dV": dv, "Q": q, "K": k, "V": v, "dO": dout}
    arrays |= {"Lse": np.float32(lse).copy("C"), "D": np.float32(delta).copy("C")}
    values: dict[str, Any] = {name: gpu.memory.add(name, array) for name, array in arrays.items()}
    sequence, row, head, _ = q.strides
    tile = TILE_K[arch]
    values |= {"scalar": dim**-0.5, "log2e": float(np.log2(np.e)), "ratio": 1, "nhead_q": heads, "Ts": tile * row}
    values |= dict.fromkeys(("seq_len", "seqlen_q", "seqlen_k"), rows)
    values |= dict.fromkeys(("head_dim", "head_dim_q", "head_dim_k"), dim)
    for tensor in ("", "_q", "_k", "_v", "_do", "_dk", "_dv", "_kv", "_dkv"):
        values |= {f"Hs{tensor}": head, f"BAs{tensor}": sequence, f"Seqs{tensor}": row}
    # Of one head of softmax_lse and delta, which "group" needs.
    values |= dict.fromkeys(("Hs_lsed", "s_Hs_lsed"), 4 * rows)
    values |= {"max_seq_len_dq": padded if shuffled else longest, "mask_x": 0, "mask_y": 0}
    where = gpu.memory.add("starts", np.array(starts or (0, rows), np.int32))
    for side in "qk":
        names = (f"ptr_{side}seq", f"ptr_{side}seq_padded", f"ptr_seqstart_{side}", f"ptr_seqstart_{side}_padded")
        values |= dict.fromkeys(names, where)
    blocks = -(-longest // tile)
    grid = (-(-blocks // 2) if "_causal" in path.name else blocks, heads, len(starts) - 1 if starts else batch)
    stats = gpu.launch(code, grid=grid, block_threads=256, kernargs=_packed(code, values), **options)
    if shuffled:
        result, order = np.zeros_like(q), load_code_object(_dq_shuffle(path).read_bytes())
        values |= {"dQ_acc": values["dQ"], "dQ": gpu.memory.add("dq in order", result)}
        values |= {"BAs_dq_acc": dq.strides[0], "Hs_dq_acc": dq.strides[1], "Seqs_dq_acc": dq.strides[2]}
        values |= {"BAs_dq": sequence, "Hs_dq": head, "Seqs_dq": row, "Ts": 64 * row, "max_seqlen_dq": padded}
        grid = (-(-longest // 64), *grid[1:])
        gpu.launch(order, grid=grid, block_threads=256, kernargs=_packed(order, values), **options)
        dq = result
    exact = decode(dq) if dq.dtype == np.uint16 else dq.transpose(0, 2, 1, 3).astype(np.float64)
    return Backward(exact, decode(dk), decode(dv), stats)


def _dq_shuffle(path: Path) -> Path:
    return path.with_name(f"bwd_hd128_dq_shuffle{'_group' if 'group' in path.name else ''}.co")


def _packed(code: CodeObject, values: dict[str, Any]) -> bytes:
    """Of all values those that a kernel's metadata names, each of which has to be there.

    The metadata of gfx950 give some pointers 4 bytes, with as many unused ones behind them; the C++ structs have 8.
    """
    packed = bytearray(code.descriptor.kernarg_bytes)
    for argument in code.arguments:
        if argument.name != "pad":
            value = values[argument.name]
            kind = "<f" if isinstance(value, float) else "<Q" if value >= 1 << 32 else "<I"
            struct.pack_into(kind, packed, argument.offset, value)
    return bytes(packed)
