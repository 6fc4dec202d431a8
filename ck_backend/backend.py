"""The Composable Kernel back end as selection loads it; see :class:`flash_rocm.protocols.Backend`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flash_rocm import auxiliary
from flash_rocm.problem import AttentionInputs, AttentionProblem, lse_shape

from .auxiliary import launch, launches_on, stream_of
from .cached import append as append
from .cached import attend as attend
from .cached import combine as combine
from .cached import splits_of as splits_of
from .instances import aligned, instance_of, workspace


def _widened(x: torch.Tensor, headdim: int) -> torch.Tensor:
    """The tensor with a head dim that zeros fill up; itself where it has that.

    The forward copies whole tiles of K into LDS, with what lies behind a shorter head dim: times the zeros that Q is
    filled up with it counts for nothing, unless it is NaN or infinite.
    """
    missing = headdim - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else aligned(x)


def _new(x: torch.Tensor, shape: Sequence[int], varlen: bool) -> torch.Tensor:
    """Kernels write every row of dense results; varlen ones may have rows that no sequence owns."""
    return x.new_zeros(shape) if varlen else x.new_empty(shape)


def forward(problem: AttentionProblem, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse of one call; see :class:`flash_rocm.protocols.Backend`."""
    number, instance, operators = instance_of("forward", problem, inputs.q.device)
    q, k, v = aligned(inputs.q), _widened(inputs.k, instance.headdim), aligned(inputs.v)
    slopes = inputs.alibi_slopes.contiguous() if inputs.alibi_slopes is not None else None
    out = _new(q, (*q.shape[:-1], problem.headdim_v), problem.varlen)
    softmax_lse = q.new_full(lse_shape(q), float("-inf"), dtype=torch.float32)
    optional = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, slopes)
    lengths = (problem.seqlen_q, problem.seqlen_k)
    window = (problem.window_left, problem.window_right)
    with launches_on(q, (q, k, v, out, softmax_lse, *optional)):
        operators.forward(
            number, q, k, v, out, softmax_lse, *optional, *lengths,
            problem.softmax_scale, problem.softcap, *window, stream_of(q),
        )  # fmt: skip
    return out, softmax_lse


def _dq_acc(problem: AttentionProblem, softmax_lse: torch.Tensor, splits: int) -> torch.Tensor:
    """Zeros to sum dq up in: (splits, batch, seqlen_q, nheads, headdim) or (splits, total_q, nheads, headdim) float32.

    All of a head lies together, for its parts are addressed with 32 bits from its first.
    """
    *outer, rows = softmax_lse.shape
    shape = (*outer, splits, rows, problem.headdim)
    hint = "FLASH_ROCM_BACKEND=triton needs none, shorter sequences need less"
    if splits > 1:
        hint = f"deterministic=False adds up one part in place of {splits}; {hint}"
    with workspace("backward: dq in float32", math.prod(shape), hint):
        zeros = softmax_lse.new_zeros(shape)
    return zeros.movedim(-3, 0).transpose(-2, -3)


def _summed(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """The gradient of key heads from that of the query heads that share them; (..., nheads, dim)."""
    if group_size == 1:
        return x
    parts = x.unflatten(-2, (-1, group_size)).movedim(-2, 0)
    return auxiliary.reduce(launch, parts, x.new_empty(parts.shape[1:]))


def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dv and no dsinks of one call; see :class:`flash_rocm.protocols.Backend`.

    delta, the row sums of out * dout, less a gradient of softmax_lse; the gradients, with dq summed up in float32, by
    atomic additions or, deterministic, in one part for each block of keys; dq added up and converted.  Heads that share
    one of k and v get a dk and dv each, which are added up at the end.
    """
    number, _, operators = instance_of("backward", problem, inputs.q.device)
    q, k, v = map(aligned, inputs[:3])
    out, dout, softmax_lse = aligned(out), aligned(dout), softmax_lse.contiguous()
    slopes = inputs.alibi_slopes.contiguous() if inputs.alibi_slopes is not None else None
    delta = auxiliary.delta(launch, out, dout, dlse, softmax_lse)
    shape_k = (*k.shape[:-2], problem.nheads)
    dk = _new(k, (*shape_k, problem.headdim), problem.varlen)
    dv = _new(v, (*shape_k, problem.headdim_v), problem.varlen)
    dq_acc = _dq_acc(problem, softmax_lse, operators.dq_splits(number, problem.seqlen_k))
    optional = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, slopes)
    tensors = (q, k, v, dout, softmax_lse, delta, dq_acc, dk, dv, *optional)
    lengths = (problem.seqlen_q, problem.seqlen_k)
    window = (problem.window_left, problem.window_right)
    with launches_on(q, tensors):
        operators.backward(number, *tensors, *lengths, problem.softmax_scale, *window, stream_of(q))
    dq = auxiliary.reduce(launch, dq_acc, q.new_empty(q.shape))
    dk, dv = (_summed(x, problem.group_size) for x in (dk, dv))
    return dq, dk, dv, None


def probs(problem: AttentionProblem, inputs: AttentionInputs, softmax_lse: torch.Tensor) -> torch.Tensor:
    """Only with dropout, which is refused."""
    raise NotImplementedError("ck: dropout is not implemented, and selection does not send it here")
