"""Host side of the layers' kernels; see :class:`flash_rocm.protocols.LayerBackend`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from flash_rocm import virtual_device
from flash_rocm.config_schema import ConfigError
from flash_rocm.layer_calls import NormBackward, NormCall, NormForward, NormGradients
from flash_rocm.problem import dropout_threshold

from .cross_entropy_kernels import cross_entropy_bwd_kernel, cross_entropy_fwd_kernel
from .launcher import Call, Launcher, Tensors, divisor_of_strides, pointers_of, strides_of
from .norm_kernels import norm_bwd_kernel, norm_fwd_kernel
from .rotary_kernel import rotary_kernel

ROTARY = Launcher(rotary_kernel)
NORM_FORWARD = Launcher(norm_fwd_kernel)
NORM_BACKWARD = Launcher(norm_bwd_kernel)
CROSS_ENTROPY_FORWARD = Launcher(cross_entropy_fwd_kernel)
CROSS_ENTROPY_BACKWARD = Launcher(cross_entropy_bwd_kernel)


class LayerPlan(NamedTuple):
    """What compiling a layer's kernel takes.  These kernels move memory and little else: nothing of it is tuned."""

    kernel: str
    constants: dict[str, Any]
    num_warps: int

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler."""
        return {"num_warps": self.num_warps}

    @property
    def implementation(self) -> str:
        """There is no other."""
        return "triton"

    def too_large(self, what: str, limit: int, got: int) -> ConfigError:
        """The error for a kernel that the chip has no room for."""
        return ConfigError(f"{self.kernel}: expected {what} <= {limit}, got {got}.")


def _launch(
    launcher: Launcher,
    programs: int,
    tensors: Tensors,
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
    num_warps: int = 4,
) -> None:
    """Launch, if there is anything to do; a launch like an earlier one is not worked out again."""
    if programs == 0:
        return
    pointers, facts = pointers_of(tensors)
    types = tuple(x if x is None else (x.dtype, x.device) for x in tensors)
    key = (programs, types, scalars, tuple(constants.values()), facts)
    if not launcher.launch_known(key, pointers):
        plan = LayerPlan(launcher.kernel.__name__, constants, num_warps)
        launcher.launch_new(key, Call(plan, programs, tensors, (), scalars, {}))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int) -> int:
    """Waves of a workgroup for a row of so many elements, some 8 a lane on AMD."""
    return min(max(_power_of_two(elements) // 512, 1), 16)


def rotary(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    offset: int,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Turn the first dims of x into out, which may be x."""
    cos, sin = cos.contiguous(), sin.contiguous()
    strides = (strides_of(out), strides_of(x))
    vec = divisor_of_strides(strides, x.element_size())
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    nheads, half = x.shape[-2], cos.shape[1]
    block_r = _power_of_two(half)
    constants = {"HALF": half, "BLOCK_R": block_r, "BLOCK_M": max(2048 // block_r, 1), "BLOCK_H": 4, "VEC": vec}
    constants |= {"INTERLEAVED": interleaved, "CONJUGATE": conjugate}
    blocks, head_blocks = -(-max_seqlen // constants["BLOCK_M"]), -(-nheads // constants["BLOCK_H"])
    scalars = (*(stride // vec for entry in strides for stride in entry), max_seqlen, nheads, cos.shape[0], offset)
    tensors = (out, x, cos, sin, seqlen_offsets, cu_seqlens)
    _launch(ROTARY, batch * blocks * head_blocks, tensors, (*scalars, blocks, head_blocks), constants)


def _norm_constants(x: torch.Tensor, call: NormCall) -> tuple[dict[str, Any], int, int]:
    """Constants of the kernels, columns in units of VEC, and waves."""
    columns = x.shape[1]
    vec = math.gcd(columns, 16 // x.element_size())
    constants = {"BLOCK_N": _power_of_two(columns), "VEC": vec, "RMS": call.rms, "ZERO_CENTERED": call.zero_centered}
    return constants, columns // vec, _warps(columns)


def _dropout(call: NormCall) -> tuple[int, float]:
    return dropout_threshold(call.dropout_p), 1.0 / (1.0 - call.dropout_p)


def norm_forward(inputs: NormForward, call: NormCall) -> tuple[torch.Tensor | None, ...]:
    """Results of a sum and its norm, None for those that there are not."""
    x = inputs.x
    constants, columns, warps = _norm_constants(x, call)
    rows = x.shape[0]
    out = x.new_empty(x.shape, dtype=call.out_dtype)
    out1 = torch.empty_like(out) if inputs.weight1 is not None else None
    total = x.new_empty(x.shape, dtype=call.sum_dtype) if call.sum_dtype is not None else None
    mean = None if call.rms else x.new_empty((rows,), dtype=torch.float32)
    rstd = x.new_empty((rows,), dtype=torch.float32)
    mask = x.new_empty(x.shape, dtype=torch.uint8) if call.return_masks else None
    mask1 = torch.empty_like(mask) if mask is not None and inputs.x1 is not None else None
    tensors = (*inputs, out, out1, total, mean, rstd, mask, mask1)
    _launch(NORM_FORWARD, rows, tensors, (columns, call.eps, *_dropout(call)), constants, warps)
    masks = (None if m is None else m.view(torch.bool) for m in (mask, mask1))
    return (out, out1, total, mean, rstd, *masks)


def norm_backward(inputs: NormBackward, wanted: NormGradients, call: NormCall) -> tuple[torch.Tensor | None, ...]:
    """Gradients of a sum and its norm, None for those that are not wanted."""
    total = inputs.total
    constants, columns, warps = _norm_constants(total, call)
    rows, count = total.shape
    programs = min(rows, 4 * virtual_device.arch_of(total.device).num_cus)
    dx = total.new_empty(total.shape, dtype=wanted.x_dtype)
    dx1 = None if wanted.x1_dtype is None else total.new_empty(total.shape, dtype=wanted.x1_dtype)
    dresidual = None if wanted.residual_dtype is None else total.new_empty(total.shape, dtype=wanted.residual_dtype)
    second = inputs.weight1 is not None
    parts = [
        total.new_empty((programs, count), dtype=torch.float32) if here else None
        for here in (True, wanted.bias, second, second and wanted.bias1)
    ]
    tensors = (*inputs, dx, dx1, dresidual, *parts)
    _launch(NORM_BACKWARD, programs, tensors, (rows, columns, programs, *_dropout(call)), constants, warps)
    sums = (None if part is None else part.sum(0).to(inputs.weight.dtype) for part in parts)
    return (dx, dx1, dresidual, *sums)


def cross_entropy_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    given_lse: torch.Tensor | None,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, lse and z_loss of each row."""
    rows, classes = logits.shape
    vec = divisor_of_strides(((0, 0, logits.stride(0)),), logits.element_size())
    loss, lse, z_loss = (logits.new_empty((rows,), dtype=torch.float32) for _ in range(3))
    constants = {"BLOCK_N": min(_power_of_two(classes), 4096), "VEC": vec}
    scalars = (logits.stride(0) // vec, classes, smoothing, logit_scale, lse_square_scale, ignore_index)
    tensors = (logits, labels, given_lse, loss, lse, z_loss)
    _launch(CROSS_ENTROPY_FORWARD, rows, tensors, scalars, constants, _warps(constants["BLOCK_N"]))
    return loss, lse, z_loss


def cross_entropy_backward(
    out: torch.Tensor,
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> None:
    """Write the gradient of the logits to out, which may be the logits."""
    rows, classes = logits.shape
    vec = divisor_of_strides(((0, out.stride(0), logits.stride(0)),), logits.element_size())
    constants = {"BLOCK_N": min(_power_of_two(classes), 4096), "VEC": vec}
    blocks = -(-classes // constants["BLOCK_N"])
    strides = (logits.stride(0) // vec, out.stride(0) // vec, dloss.stride(0))
    scalars = (*strides, classes, blocks, smoothing, logit_scale, lse_square_scale, ignore_index)
    tensors = (logits, labels, lse, dloss, out)
    _launch(CROSS_ENTROPY_BACKWARD, rows * blocks, tensors, scalars, constants, _warps(constants["BLOCK_N"]))
