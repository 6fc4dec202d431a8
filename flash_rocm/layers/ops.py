"""torch.library operators of the layers: schemas, fakes, and the one place that calls their back end.

Imports torch and leaves only.  Autograd is that of the layers, which call a forward and a backward operator; so
``torch.compile`` sees both and traces neither kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import backends, runtime, virtual_device
from flash_rocm.layer_calls import NormBackward, NormCall, NormForward, NormGradients
from flash_rocm.problem import accumulate_dtype

_library = torch.library.Library("flash_rocm", "FRAGMENT")
_ROTARY = (
    "Tensor cos, Tensor sin, Tensor? seqlen_offsets, Tensor? cu_seqlens, SymInt offset, SymInt max_seqlen, "
    "bool interleaved, bool conjugate, str backend"
)
_NORM = (
    "float eps, float dropout_p, bool rms, bool zero_centered, ScalarType out_dtype, ScalarType? sum_dtype, "
    "bool return_masks"
)
_LOSS = "float smoothing, float logit_scale, float lse_square_scale, int ignore_index, str backend"
_library.define(f"rotary(Tensor x, {_ROTARY}) -> Tensor")
_library.define(f"rotary_(Tensor(a!) x, {_ROTARY}) -> ()")
# What is not there is (0,): operators return no optional tensors.
_library.define(
    "norm_forward(Tensor x, Tensor? residual, Tensor? x1, Tensor? rowscale, Tensor? rng_state, Tensor weight, "
    f"Tensor? bias, Tensor? weight1, Tensor? bias1, {_NORM}, str backend) -> (Tensor out, Tensor out1, Tensor total, "
    "Tensor mean, Tensor rstd, Tensor mask, Tensor mask1)"
)
_library.define(
    "norm_backward(Tensor total, Tensor dy, Tensor? dy1, Tensor? dtotal, Tensor? rowscale, Tensor? rng_state, "
    "Tensor weight, Tensor? weight1, Tensor? mean, Tensor rstd, ScalarType x_dtype, ScalarType? x1_dtype, "
    f"ScalarType? residual_dtype, bool bias, bool bias1, {_NORM}, str backend) -> (Tensor dx, Tensor dx1, "
    "Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dweight1, Tensor dbias1)"
)
_library.define(
    f"cross_entropy_forward(Tensor logits, Tensor labels, Tensor? given_lse, {_LOSS}) "
    "-> (Tensor loss, Tensor lse, Tensor z_loss)"
)
_library.define(f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor lse, {_LOSS}) -> Tensor")
_library.define(f"cross_entropy_backward_(Tensor(a!) logits, Tensor dloss, Tensor labels, Tensor lse, {_LOSS}) -> ()")


def request(x: torch.Tensor) -> str:
    """What a layer's operators are told of the back end: eager calls pin it for the backward, graphs do not."""
    return runtime.override() if torch.compiler.is_compiling() else virtual_device.request_on(x.device)


def _call(backend: str, x: torch.Tensor, function: str, *args: Any) -> Any:
    """Run a function of the back end that this request means for x, on the virtual GPU that it names."""
    requested, virtual = virtual_device.Request.parse(backend or virtual_device.request_on(x.device))
    arch = virtual_device.arch_pinned(virtual, x.device)
    run = getattr(backends.load_layers(backends.select_layers(x.dtype, arch, requested)), function)
    return virtual_device.run_pinned(virtual, run, *args)


def _rotary(x: torch.Tensor, cos: torch.Tensor, *args: Any) -> torch.Tensor:
    if args[2] is not None:  # rows that no sequence owns
        out = x.clone(memory_format=torch.contiguous_format)
    else:
        out = x.new_empty(x.shape)
        turned = 2 * cos.shape[1]
        out[..., turned:] = x[..., turned:]
    _call(args[-1], x, "rotary", out, x, cos, *args[:-1])
    return out


def _rotary_in_place(x: torch.Tensor, cos: torch.Tensor, *args: Any) -> None:
    _call(args[-1], x, "rotary", x, x, cos, *args[:-1])
    _note_change(x)


def _note_change(x: torch.Tensor) -> None:
    """Tell autograd that a kernel wrote to a tensor, so that a backward that has saved it raises."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _present(x: torch.Tensor, found: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty((0,)) if each is None else each for each in found)


_FORWARD, _CALL = len(NormForward._fields), len(NormCall._fields)
_BACKWARD, _WANTED = len(NormBackward._fields), len(NormGradients._fields)


def _norm_forward(*args: Any) -> tuple[torch.Tensor, ...]:
    inputs, call = NormForward._make(args[:_FORWARD]), NormCall._make(args[_FORWARD:-1])
    return _present(inputs.x, _call(args[-1], inputs.x, "norm_forward", inputs, call))


def _norm_forward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    inputs, call = NormForward._make(args[:_FORWARD]), NormCall._make(args[_FORWARD:-1])
    x, accumulated = inputs.x, accumulate_dtype(inputs.x.dtype)
    masked = call.return_masks and call.dropout_p > 0.0
    found = (
        x.new_empty(x.shape, dtype=call.out_dtype),
        x.new_empty(x.shape, dtype=call.out_dtype) if inputs.weight1 is not None else None,
        x.new_empty(x.shape, dtype=call.sum_dtype) if call.sum_dtype is not None else None,
        None if call.rms else x.new_empty(x.shape[:1], dtype=accumulated),
        x.new_empty(x.shape[:1], dtype=accumulated),
        x.new_empty(x.shape, dtype=torch.bool) if masked else None,
        x.new_empty(x.shape, dtype=torch.bool) if masked and inputs.x1 is not None else None,
    )
    return _present(x, found)


def _norm_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    inputs, wanted = NormBackward._make(args[:_BACKWARD]), NormGradients._make(args[_BACKWARD : _BACKWARD + _WANTED])
    call = NormCall._make(args[_BACKWARD + _WANTED : -1])
    return _present(inputs.total, _call(args[-1], inputs.total, "norm_backward", inputs, wanted, call))


def _norm_backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    inputs, wanted = NormBackward._make(args[:_BACKWARD]), NormGradients._make(args[_BACKWARD : _BACKWARD + _WANTED])
    total, weight, second = inputs.total, inputs.weight, inputs.weight1 is not None
    rows = (wanted.x_dtype, wanted.x1_dtype, wanted.residual_dtype)
    found = [None if dtype is None else total.new_empty(total.shape, dtype=dtype) for dtype in rows]
    for here in (True, wanted.bias, second, second and wanted.bias1):
        found.append(weight.new_empty(weight.shape) if here else None)
    return _present(total, tuple(found))


def _loss_forward(logits: torch.Tensor, labels: torch.Tensor, given_lse: torch.Tensor | None, *args: Any) -> Any:
    return _call(args[-1], logits, "cross_entropy_forward", logits, labels, given_lse, *args[:-1])


def _loss_forward_fake(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    dtype = accumulate_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[:1], dtype=dtype) for _ in range(3))


def _loss_backward(dloss: torch.Tensor, logits: torch.Tensor, *args: Any) -> torch.Tensor:
    out = logits.new_empty(logits.shape)
    _call(args[-1], logits, "cross_entropy_backward", out, dloss, logits, *args[:-1])
    return out


def _loss_backward_in_place(logits: torch.Tensor, dloss: torch.Tensor, *args: Any) -> None:
    _call(args[-1], logits, "cross_entropy_backward", logits, dloss, logits, *args[:-1])
    _note_change(logits)


for _name, _impl, _fake in (
    ("rotary", _rotary, lambda x, *args: x.new_empty(x.shape)),
    ("rotary_", _rotary_in_place, lambda *args: None),
    ("norm_forward", _norm_forward, _norm_forward_fake),
    ("norm_backward", _norm_backward, _norm_backward_fake),
    ("cross_entropy_forward", _loss_forward, _loss_forward_fake),
    ("cross_entropy_backward", _loss_backward, lambda dloss, logits, *args: logits.new_empty(logits.shape)),
    ("cross_entropy_backward_", _loss_backward_in_place, lambda *args: None),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_rocm::{_name}", _fake, lib=_library)
