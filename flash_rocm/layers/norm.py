"""LayerNorm (Ba, Kiros, Hinton 2016, arXiv:1607.06450) and RMSNorm (Zhang, Sennrich 2019, arXiv:1910.07467) of a sum.

Names and arguments are those of flash-attn's ``flash_attn.ops.triton.layer_norm``.  A row of the sum is
``dropout(x * rowscale) + dropout(x1) + residual``; everything is computed in float32 (float64 for float64).

Common arguments:
    x: (..., columns), fp16, bf16, fp32 or fp64.
    weight: (columns,).
    bias: (columns,) or None.
    residual: like x, of any of these dtypes but fp64 where x is not; its dtype is that of the sum.
    x1: like x, a second input.  weight1, bias1: of a second result.
    eps: added to the variance (the mean square for RMSNorm).
    dropout_p: probability in [0, 1) of dropping an element of x, and of x1; Philox noise, whose seed is drawn from
        torch's generator.
    rowscale: x.shape[:-1], factors of the rows of x; not with x1.
    prenorm: also return the sum.
    residual_in_fp32: without a residual, the sum is float32.
    zero_centered_weight: the weights are 1 + weight, and 1 + weight1.
    return_dropout_mask: also return which elements of x, and of x1, are kept, bool or None.
    out_dtype: of the results, default that of x.
    out, residual_out: tensors to write to, not implemented.

Returns:
    the norm of the sum, like x; a tuple with what else was asked for, in the order result, result of weight1, sum,
    mask of x, mask of x1.

Raises:
    ValueError: an argument is wrong; the text names it, what was expected, what came and a hint.
    NotImplementedError: out, residual_out, or rowscale with x1.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from flash_rocm import validation
from flash_rocm.attend import draw_rng_state
from flash_rocm.layer_calls import NormBackward, NormCall, NormForward, NormGradients
from flash_rocm.layers import ops

#: Columns that the kernels keep in registers.
MAX_COLUMNS = 65536
NormResult = torch.Tensor | tuple[torch.Tensor | None, ...]


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> NormResult:
    """LayerNorm, or RMSNorm if is_rms_norm, of a sum; see the module docstring."""
    for name, given in (("out", out), ("residual_out", residual_out)):
        if given is not None:
            raise NotImplementedError(f"{name}: expected None, got a tensor. Hint: use the result that is returned.")
    _check(x, weight, bias, residual, x1, weight1, bias1, rowscale, eps, dropout_p, out_dtype)
    tensors = (x, residual, x1, weight, bias, weight1, bias1)
    total_dtype = x.dtype if not residual_in_fp32 or x.dtype == torch.float64 else torch.float32
    total_dtype = total_dtype if residual is None else residual.dtype
    is_x = residual is None and x1 is None and rowscale is None and dropout_p == 0.0 and total_dtype == x.dtype
    call = NormCall(
        float(eps),
        float(dropout_p),
        bool(is_rms_norm),
        bool(zero_centered_weight),
        x.dtype if out_dtype is None else out_dtype,
        None if is_x else total_dtype,
        bool(return_dropout_mask),
    )
    y, y1, total, mask, mask1 = _Norm.apply(*tensors, rowscale, call)
    results = [y, *([y1] if weight1 is not None else []), *([total] if prenorm else [])]
    if return_dropout_mask:
        results += [mask if dropout_p > 0.0 else None, mask1 if dropout_p > 0.0 and x1 is not None else None]
    return y if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> NormResult:
    """RMSNorm of a sum; see the module docstring."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    x1: torch.Tensor | None,
    weight1: torch.Tensor | None,
    bias1: torch.Tensor | None,
    rowscale: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype | None,
) -> None:
    """Shapes, dtypes, devices and ranges."""
    for name, required in (("x", x), ("weight", weight)):
        validation.check_tensor(name, required)
    if x.dim() == 0 or not 0 < x.shape[-1] <= MAX_COLUMNS:
        raise validation.invalid("x", f"(..., columns) with 1 to {MAX_COLUMNS} columns", tuple(x.shape))
    if bias1 is not None and weight1 is None:
        raise validation.invalid("weight1", "a tensor with bias1", None)
    if rowscale is not None and x1 is not None:
        raise NotImplementedError("rowscale: expected None with x1, got a tensor. Hint: scale x before the call.")
    shapes = (
        (x.shape, {"x": x, "residual": residual, "x1": x1}),
        (x.shape[-1:], {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}),
        (x.shape[:-1], {"rowscale": rowscale}),
    )
    for shape, tensors in shapes:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.device != x.device:
                got = f"{tuple(tensor.shape)} on {tensor.device}"
                raise validation.invalid(name, f"shape {tuple(shape)} on {x.device}", got)
            wide = tensor.dtype == torch.float64 and x.dtype != torch.float64
            if tensor.dtype not in validation.FLOAT_DTYPES or wide:
                expected = "float16, bfloat16, float32" + (", or float64 like x" if wide else " or float64")
                raise validation.invalid(name, expected, tensor.dtype)
    if rowscale is not None and rowscale.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("rowscale: expected no gradient, got requires_grad=True. Hint: pass a detached one.")
    if x1 is not None and x1.dtype != x.dtype:
        raise validation.invalid("x1", f"the dtype of x, {x.dtype}", x1.dtype)
    if not 0.0 <= dropout_p < 1.0:
        raise validation.invalid("dropout_p", "a probability in [0, 1)", dropout_p, "0.0 turns dropout off.")
    if not eps >= 0.0:
        raise validation.invalid("eps", "a number >= 0", eps)
    if out_dtype is not None and out_dtype not in validation.FLOAT_DTYPES - {torch.float64} | {x.dtype}:
        raise validation.invalid("out_dtype", "float16, bfloat16 or float32", out_dtype)


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1]).contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


class _Norm(torch.autograd.Function):
    """result, result of weight1, sum, mask of x, mask of x1; what there is not is empty."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        x, residual, x1, weight, bias, weight1, bias1, rowscale, call = args
        shape, request = x.shape, ops.request(x)
        rng_state = draw_rng_state(x.device) if call.dropout_p > 0.0 else None
        rowscale = None if rowscale is None else rowscale.reshape(-1).contiguous()
        inputs = NormForward(
            _rows(x),  # type: ignore[arg-type]
            _rows(residual),
            _rows(x1),
            rowscale,
            rng_state,
            weight.contiguous(),
            _contiguous(bias),
            _contiguous(weight1),
            _contiguous(bias1),
        )
        y, y1, total, mean, rstd, mask, mask1 = torch.ops.flash_rocm.norm_forward.default(*inputs, *call, request)
        kept = inputs.x if call.sum_dtype is None else total
        ctx.save_for_backward(kept, rowscale, rng_state, inputs.weight, inputs.weight1, mean, rstd)
        ctx.call, ctx.request, ctx.shape, ctx.x_dtype = call, request, shape, x.dtype
        ctx.x1_dtype = None if x1 is None else x1.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.dtypes = tuple(None if w is None else w.dtype for w in (weight, bias, weight1, bias1))
        ctx.set_materialize_grads(False)
        total = x if call.sum_dtype is None else total.view(shape)
        masks = [m.view(shape) if m.numel() == x.numel() else m for m in (mask, mask1)]
        ctx.mark_non_differentiable(*masks)
        return (y.view(shape), y1.view(shape) if weight1 is not None else y1, total, *masks)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, rowscale, rng_state, weight, weight1, mean, rstd = ctx.saved_tensors
        call = ctx.call
        dy, dtotal = _rows(gradients[0]), _rows(gradients[2])
        if dy is None:
            dy = torch.zeros_like(total, dtype=call.out_dtype)
        dy1 = None
        if weight1 is not None:
            dy1 = torch.zeros_like(dy) if gradients[1] is None else _rows(gradients[1])
        # Without dropout and scale the gradients of all terms are one.
        same = call.dropout_p == 0.0 and rowscale is None
        shared = same and ctx.residual_dtype == ctx.x_dtype
        wanted = NormGradients(
            ctx.x_dtype,
            None if same else ctx.x1_dtype,
            None if shared else ctx.residual_dtype,
            ctx.dtypes[1] is not None,
            ctx.dtypes[3] is not None,
        )
        inputs = NormBackward(
            total, dy, dy1, dtotal, rowscale, rng_state, weight, weight1, None if call.rms else mean, rstd
        )
        found = torch.ops.flash_rocm.norm_backward.default(*inputs, *wanted, *call, ctx.request)
        dx, dx1, dresidual = (g.view(ctx.shape) if g.numel() == total.numel() else g for g in found[:3])
        weights = (None if dtype is None else g.to(dtype) for g, dtype in zip(found[3:], ctx.dtypes, strict=True))
        return (
            dx,
            None if ctx.residual_dtype is None else dx if shared else dresidual,
            None if ctx.x1_dtype is None else dx if same else dx1,
            *weights,
            None,
            None,
        )


def layer_norm_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: torch.Tensor | None = None,
    dropout_mask1: torch.Tensor | None = None,
    upcast: bool = False,
    *,
    is_rms_norm: bool = False,
) -> NormResult:
    """:func:`layer_norm_fn` by torch's own functions, differentiable by autograd: what flash-attn's tests compare with.

    Args:
        dropout_mask, dropout_mask1: elements of x and of x1 that dropout keeps; default: torch's own dropout.
        upcast: compute in float32.

    Returns:
        result, result of weight1, sum, those that there are; results in x's dtype.
    """
    dtype = x.dtype

    def ready(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return tensor.float() if tensor is not None and upcast else tensor

    def dropped(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if dropout_p == 0.0:
            return tensor
        if mask is None:
            return torch.nn.functional.dropout(tensor, dropout_p)
        return tensor.masked_fill(~mask, 0.0) / (1.0 - dropout_p)

    total = x.float() if upcast else x
    if rowscale is not None:
        total = total * rowscale[..., None]
    total = dropped(total, dropout_mask)
    if x1 is not None:
        total = total + dropped(x1.float() if upcast else x1, dropout_mask1)
    if residual is not None:
        total = (total + residual).to(total.dtype)
    norm = torch.nn.functional.rms_norm if is_rms_norm else torch.nn.functional.layer_norm
    results = []
    for w, b in ((ready(weight), ready(bias)), (ready(weight1), ready(bias1))):
        if w is None:
            continue
        w = w + 1.0 if zero_centered_weight else w
        y = norm(total.to(w.dtype), x.shape[-1:], w, eps=eps)
        results.append((y if b is None else y + b).to(dtype))
    results += [total] if prenorm else []
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_ref(*args: Any, **kwargs: Any) -> NormResult:
    """:func:`rms_norm_fn` by torch's own functions, with the arguments of :func:`layer_norm_ref`."""
    return layer_norm_ref(*args, **kwargs, is_rms_norm=True)


def layer_norm_linear_fn(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> NormResult:
    """A norm as in :func:`layer_norm_fn`, and torch's linear layer behind it; with prenorm also the sum."""
    found = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    y, total = cast("tuple[torch.Tensor, torch.Tensor]", found)
    bias = None if linear_bias is None else linear_bias.to(y.dtype)
    out = torch.nn.functional.linear(y, linear_weight.to(y.dtype), bias)
    return (out, total) if prenorm else out


class RMSNorm(torch.nn.Module):
    """RMSNorm as a module, with the sum before it.

    Args:
        hidden_size: columns.
        eps, dropout_p, zero_centered_weight: as in the module docstring; dropout while training only.
    """

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_weight = eps, zero_centered_weight
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights that change nothing."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> NormResult:
        """The norm of x, or of dropout(x) + residual; with prenorm also the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )
