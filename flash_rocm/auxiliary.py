"""Host side of the auxiliary kernels in C++ (``ck_backend/csrc/auxiliary.h``): what is allocated, what is launched.

A leaf.  The same kernels are compiled for ROCm, into the library of the ``ck`` back end, and for CUDA, into one of
their own; whoever has loaded one gives a :data:`Launch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_rocm import cache_validation, runtime
from flash_rocm.problem import AttentionProblem, CacheInputs

#: Launch a kernel by its name, on the device and stream of its tensors: (name, tensors, numbers).
Launch = Callable[[str, tuple[torch.Tensor | None, ...], tuple[Any, ...]], None]


def _error_buffer(x: torch.Tensor) -> torch.Tensor | None:
    """Where kernels report what is wrong in lengths and pages; None unless FLASH_ROCM_DEBUG is on."""
    return x.new_zeros(len(cache_validation.FAULTS), dtype=torch.int32) if runtime.debug() else None


def append(launch: Launch, problem: AttentionProblem, inputs: CacheInputs) -> None:
    """Write k_new, turned by the rotary embedding, and v_new into the caches.

    Raises:
        ValueError: nothing is to be appended, or with FLASH_ROCM_DEBUG=1 a length, entry, page or position is out of
            range.
    """
    k_new, v_new = inputs.k_new, inputs.v_new
    if k_new is None or v_new is None:
        raise ValueError("k_new, v_new: expected tensors to append, got None")
    errors = _error_buffer(k_new)
    launch(
        "append",
        (
            *(k_new, v_new, inputs.k, inputs.v, inputs.rotary_cos, inputs.rotary_sin, inputs.cu_seqlens_k_new),
            *(inputs.seqused_k, inputs.rotary_seqlens, inputs.cache_batch_idx, inputs.block_table, errors),
        ),
        (problem.batch, problem.seqlen_new, problem.rotary_interleaved),
    )
    if errors is not None:
        cache_validation.raise_faults(errors.tolist(), inputs)


def rotated(launch: Launch, problem: AttentionProblem, inputs: CacheInputs) -> torch.Tensor:
    """The queries of a call, turned: like q, contiguous; rows that no sequence owns are 0.

    Raises:
        ValueError: the call has no rotary embedding, or with FLASH_ROCM_DEBUG=1 a length or position is out of range.
    """
    if inputs.rotary_cos is None or inputs.seqused_k is None:
        raise ValueError("rotary_cos, cache_seqlens: expected tensors to turn q by, got None")
    q, errors = inputs.q, _error_buffer(inputs.q)
    may_skip_rows = problem.varlen or inputs.seqused_q is not None
    out = q.new_zeros(q.shape) if may_skip_rows else q.new_empty(q.shape)
    moves = problem.window_left >= 0 or problem.window_right >= 0 or problem.attention_chunk > 0
    launch(
        "rotate",
        (
            *(q, out, inputs.rotary_cos, inputs.rotary_sin, inputs.cu_seqlens_q, inputs.seqused_q),
            *(inputs.seqused_k, inputs.rotary_seqlens, errors),
        ),
        (problem.batch, problem.seqlen_q, inputs.capacity, problem.rotary_interleaved, moves),
    )
    if errors is not None:
        cache_validation.raise_faults(errors.tolist(), inputs)
    return out


def combine(
    launch: Launch, out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of results over disjoint sets of keys.

    Args:
        out_partial: (splits, batch, seqlen, nheads, headdim_v) or (splits, total, nheads, headdim_v) float32.
        lse_partial: (splits, batch, seqlen, nheads) or (splits, total, nheads) float32.

    Returns:
        out without the first dim in ``out_dtype``, lse likewise.
    """
    if out_partial.stride(-1) != 1:
        out_partial = out_partial.contiguous()
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype)
    lse = lse_partial.new_empty(lse_partial.shape[1:])
    launch("combine", (out_partial, lse_partial, out, lse), (False,))
    return out, lse


def combine_parts(
    launch: Launch, out_partial: torch.Tensor, lse_partial: torch.Tensor, out: torch.Tensor, softmax_lse: torch.Tensor
) -> None:
    """Combine parts into out and softmax_lse as attention returns them.

    Args:
        out_partial: (batch, seqlen_q, nheads, splits, headdim_v) or (total_q, nheads, splits, headdim_v) float32.
        lse_partial: likewise, without headdim_v.
        out: (batch, seqlen_q, nheads, headdim_v) or (total_q, nheads, headdim_v), written.
        softmax_lse: (batch, nheads, seqlen_q) or (nheads, total_q) float32, written.
    """
    launch("combine", (out_partial, lse_partial, out, softmax_lse), (True,))


def delta(
    launch: Launch, out: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    """The row sums of dout * out, less dlse, float32 of the shape of ``like``, which is softmax_lse's.

    Args:
        out, dout: (batch, seqlen_q, nheads, headdim_v) or (total_q, nheads, headdim_v).
        dlse: (batch, nheads, seqlen_q) or (nheads, total_q) float32.
    """
    found = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    if dlse is not None:
        dlse = dlse.to(torch.float32)
        dlse = dlse if dlse.stride(-1) == 1 else dlse.contiguous()
    launch("delta", (out, dout, found, dlse), ())
    return found


def reduce(launch: Launch, parts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the sum over the first dim of parts, in float32 and in their order, to out and return it.

    Args:
        parts: (parts, batch, seqlen, nheads, headdim) or (parts, total, nheads, headdim), float32 or out's dtype.
        out: without the first dim.
    """
    launch("reduce", (parts, out), ())
    return out


def dropout_mask(launch: Launch, rng_state: torch.Tensor, shape: tuple[int, ...], threshold: int) -> torch.Tensor:
    """Which elements dropout keeps, bool.

    Args:
        rng_state: (2,) int64, seed and offset.
        shape: (batch, nheads, seqlen_q, seqlen_k).
        threshold: :func:`flash_rocm.problem.dropout_threshold`.
    """
    mask = torch.empty(shape, dtype=torch.bool, device=rng_state.device)
    launch("dropout_mask", (rng_state, mask), (threshold,))
    return mask
