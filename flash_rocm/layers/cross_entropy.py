"""Softmax cross entropy with label smoothing and the z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311).

Names and arguments are those of flash-attn's ``flash_attn.ops.triton.cross_entropy`` and ``flash_attn.losses``.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import validation
from flash_rocm.layers import ops


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row: lse - (1 - label_smoothing) * l[label] - label_smoothing * mean(l) + lse_square_scale * lse^2.

    l are the logits times logit_scale, lse is their logsumexp.

    Args:
        logits: (rows, classes), fp16, bf16, fp32 or fp64.
        labels: (rows,) int32 or int64.  A row of ignore_index has loss 0 and gradient 0; one of another label that is
            no class has loss NaN: contents are not read back.
        precomputed_lse: (rows,), lse where the caller has it; no gradient flows to it.
        label_smoothing: in [0, 1].
        logit_scale: a factor of the logits.
        lse_square_scale: of the z-loss.
        inplace_backward: the backward writes the gradient over the logits, which then are lost.
        process_group: of classes divided among processes: groups of one process only.

    Returns:
        losses, which include the z-loss, and the z-losses, which have no gradient: (rows,) float32 (fp64 for fp64).

    Raises:
        ValueError: an argument is wrong; the text names it, what was expected, what came and a hint.
        NotImplementedError: a process group of several processes.
    """
    _check(logits, labels, precomputed_lse, label_smoothing, process_group)
    numbers = (float(label_smoothing), float(logit_scale), float(lse_square_scale), int(ignore_index))
    return _CrossEntropy.apply(logits, labels, precomputed_lse, bool(inplace_backward), numbers)


def _check(
    logits: torch.Tensor, labels: torch.Tensor, precomputed_lse: torch.Tensor | None, smoothing: float, group: Any
) -> None:
    for name, x in (("logits", logits), ("labels", labels)):
        validation.check_tensor(name, x)
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in validation.FLOAT_DTYPES:
        expected = "float16, bfloat16, float32 or float64 (rows, classes)"
        raise validation.invalid("logits", expected, f"{logits.dtype} {tuple(logits.shape)}")
    rows, device = logits.shape[0], logits.device
    if labels.dtype not in (torch.int32, torch.int64) or labels.shape != (rows,) or labels.device != device:
        got = f"{labels.dtype} {tuple(labels.shape)} on {labels.device}"
        raise validation.invalid("labels", f"int64 ({rows},) on {device}", got)
    lse = precomputed_lse
    if lse is not None and (lse.shape != (rows,) or lse.device != device or not lse.is_floating_point()):
        got = f"{lse.dtype} {tuple(lse.shape)} on {lse.device}"
        raise validation.invalid("precomputed_lse", f"float32 ({rows},) on {device}", got)
    if not 0.0 <= smoothing <= 1.0:
        raise validation.invalid("label_smoothing", "a number in [0, 1]", smoothing)
    if group is not None and torch.distributed.get_world_size(group) > 1:
        raise NotImplementedError(
            f"process_group: expected None or a group of one process, got {torch.distributed.get_world_size(group)}. "
            "Hint: gather the classes first."
        )


class _CrossEntropy(torch.autograd.Function):
    """losses and z-losses."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        precomputed_lse: torch.Tensor | None,
        inplace_backward: bool,
        numbers: tuple[float, float, float, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        given = logits
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        labels = labels.to(torch.int64).contiguous()
        accumulated = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = None if precomputed_lse is None else precomputed_lse.to(accumulated).contiguous()
        ctx.request = ops.request(logits)
        loss, lse, z_loss = torch.ops.flash_rocm.cross_entropy_forward.default(
            logits, labels, lse, *numbers, ctx.request
        )
        ctx.save_for_backward(given if inplace_backward else logits, labels, lse)
        ctx.inplace, ctx.numbers = inplace_backward, numbers
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        args = (labels, lse, *ctx.numbers, ctx.request)
        if ctx.inplace and logits.stride(1) == 1:
            torch.ops.flash_rocm.cross_entropy_backward_.default(logits, gradients[0], *args)
            return (logits, *(None,) * 4)
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        return (torch.ops.flash_rocm.cross_entropy_backward.default(gradients[0], logits, *args), *(None,) * 4)


class CrossEntropyLoss(torch.nn.Module):
    """:func:`cross_entropy_loss` as a module, reduced.

    Args:
        reduction: ``mean`` over the rows that are not ignored, ``sum`` or ``none``.
        return_z_loss: also return the z-loss, reduced alike.

    The others are those of :func:`cross_entropy_loss`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise validation.invalid("reduction", "mean, none or sum", reduction)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.logit_scale, self.lse_square_scale, self.inplace_backward = logit_scale, lse_square_scale, inplace_backward
        self.process_group, self.return_z_loss = process_group, return_z_loss

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, precomputed_lse: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Loss of input (rows, classes) for target (rows,); with return_z_loss a pair."""
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        if self.reduction != "none":
            losses = tuple(x.sum() for x in losses)  # type: ignore[assignment]
        if self.reduction == "mean":
            counted = (target != self.ignore_index).sum()
            losses = tuple(x / counted for x in losses)  # type: ignore[assignment]
        return losses if self.return_z_loss else losses[0]
