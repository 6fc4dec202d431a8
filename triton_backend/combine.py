"""Host side of the kernel that combines results over disjoint sets of keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from flash_rocm import auxiliary, cuda_library
from flash_rocm.config_schema import KernelConfig
from flash_rocm.problem import AttentionProblem

from .cache_kernels import attn_combine_kernel
from .launcher import Call, Launcher, pointers_of
from .plan import Plan, block_d

COMBINE = Launcher(attn_combine_kernel)
#: Parts of a sequence that the kernel weighs at a time.
_BLOCK_S = 16


class Shapes(NamedTuple):
    """Of what a call writes, all of it contiguous; strides are (batch, head) ones, 0 for the batch of varlen."""

    out: tuple[int, ...]
    lse: tuple[int, ...]
    lse_steps: tuple[int, ...]  # its strides
    lse_strides: tuple[int, int]
    parts: tuple[int, ...]  # softmax_lse of splits; out of splits has headdim_v besides
    parts_lse_strides: tuple[int, int]
    parts_lse_at: int  # where it starts in the memory that both have, of parts_size floats
    parts_size: int

    @classmethod
    def of(cls, rows: tuple[int, ...], headdim_v: int, num_splits: int) -> Shapes:
        """rows: (batch, seqlen_q, nheads), or of varlen (total_q, nheads)."""
        *batch, length, nheads = rows
        parts = (*rows, num_splits)
        count = math.prod(parts)
        lse_at = -(-count * headdim_v // 4) * 4  # a multiple of 16 bytes
        return cls(
            out=(*rows, headdim_v),
            lse=(*batch, nheads, length),
            lse_steps=(*(nheads * length for _ in batch), length, 1),
            lse_strides=(nheads * length if batch else 0, length),
            parts=parts,
            parts_lse_strides=(length * nheads * num_splits if batch else 0, num_splits),
            parts_lse_at=lse_at,
            parts_size=lse_at + count,
        )

    def parts_in(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out and softmax_lse of splits, in that order in the memory that they share."""
        headdim_v = self.out[-1]
        out = memory[: math.prod(self.parts) * headdim_v].view(*self.parts, headdim_v)
        return out, memory[self.parts_lse_at :].view(self.parts)


def parts_call(shapes: Shapes, memory: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> Call:
    """What combining the parts in memory into out and softmax_lse takes."""
    *_, rows, nheads, num_splits = shapes.parts
    dim_v, varlen = out.shape[-1], out.dim() == 3
    head, row = num_splits, nheads * num_splits  # both are contiguous, and softmax_lse's dims are in another order
    return _combine_call(
        (*shapes.parts_in(memory), out, lse),
        (*shapes.lse_strides, 1),
        (0 if varlen else rows * row * dim_v, row * dim_v, head * dim_v, dim_v),
        (0 if varlen else rows * row, row, head, 1),
        num_splits,
    )


def combine(
    problem: AttentionProblem, out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of results over disjoint sets of keys; see :class:`flash_rocm.protocols.Backend`."""
    if out_dtype != torch.float64 and (launch := cuda_library.launch_of("combine", out_partial.device)) is not None:
        return auxiliary.combine(launch, out_partial, lse_partial, out_dtype)
    if out_partial.stride(-1) != 1:
        out_partial = out_partial.contiguous()
    out = out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype)
    lse = lse_partial.new_empty(lse_partial.shape[1:])
    tensors = (out_partial, lse_partial, out, lse)
    pointers, facts = pointers_of(tensors)
    varlen = out.dim() == 3
    lse_strides = (0 if varlen else lse.stride(0), lse.stride(-1))
    strides = (out_partial.stride(), lse_partial.stride())
    key = (out_partial.shape, strides, out_partial.dtype, out_dtype, out.device, facts)
    if not COMBINE.launch_known(key, [*pointers, *lse_strides]):
        (split, *part), (lse_split, *lse_part) = strides
        call = _combine_call(
            tensors,
            (*lse_strides, lse.stride(-2)),
            (0 if varlen else part[0], part[-3], part[-2], split),
            (0 if varlen else lse_part[0], lse_part[-2], lse_part[-1], lse_split),
            out_partial.shape[0],
        )
        COMBINE.launch_new(key, call)
    return out, lse


def _combine_call(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    lse_strides: tuple[int, int, int],
    out_partial_strides: tuple[int, int, int, int],
    lse_partial_strides: tuple[int, int, int, int],
    num_splits: int,
) -> Call:
    """What launching the combine kernel takes.

    Args:
        tensors: out_partial, lse_partial, out, softmax_lse.
        lse_strides, out_partial_strides, lse_partial_strides: of (batch, head, row), (batch, row, head, split) twice.
    """
    out = tensors[2]
    rows, nheads, headdim_v = out.shape[-3:]
    constants = {
        "HEADDIM_V": headdim_v,
        "BLOCK_DV": block_d(headdim_v),
        "MAX_SPLITS": max(_BLOCK_S, 1 << (num_splits - 1).bit_length()),
        "BLOCK_S": _BLOCK_S,
    }
    scalars = (lse_strides[2], *out_partial_strides, *lse_partial_strides, rows, nheads, num_splits)
    current = fixed_plan("combine", constants, 4 if headdim_v > 64 else 2)
    return Call(current, out.shape[:-1].numel(), tensors, lse_strides[:2], scalars, {})


def fixed_plan(kernel: str, constants: dict[str, Any], warps: int) -> Plan:
    """For kernels that move data and have nothing to tune."""
    config = KernelConfig(BLOCK_M=16, BLOCK_N=16, num_warps=warps, num_stages=1)
    return Plan(kernel, config, constants, {"num_warps": warps, "num_stages": 1}, 1, 0.0, 0.0, 0, 0, 0, 1.0)
