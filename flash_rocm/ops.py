"""torch.library operators: schemas, fakes, autograd, and the one place that calls a back end.

Imports torch and leaves only, so that the operators exist before anything is traced.  Schemas and
fakes are the same for every back end; which one runs is decided inside the operator, at run time.
Gradients flow to q, k, v and sinks, from both ``out`` and ``softmax_lse``.

Eager calls on plain tensors skip the dispatcher, whose boxed Python path takes several times as
long on the host as the launch itself.  Both ways run the same three functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from flash_rocm import sinks, virtual_device
from flash_rocm.decision import Decision, decide
from flash_rocm.problem import (
    AttentionInputs,
    AttentionProblem,
    Layout,
    accumulate_dtype,
    is_plain,
    layout_of,
    lse_shape,
)

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "
    "Tensor? rng_state, Tensor? sinks"
)
# backend: "" reads the environment when the operator runs, so that compiled graphs do not freeze it.
_SCALARS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, SymInt window_left, SymInt window_right, "
    "float softcap, float dropout_p, bool deterministic, bool needs_grad, str backend"
)
_NUM_TENSORS = 8
_SINKS = 7

#: out and softmax_lse.
_Forward = tuple[torch.Tensor, torch.Tensor]
#: dq, dk, dv, and dsinks where there are sinks.
_Backward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]

_library = torch.library.Library("flash_rocm", "DEF")
_library.define(f"attention_forward({_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor softmax_lse)")
_library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor softmax_lse, {_TENSORS}, {_SCALARS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)  # dsinks is (0,) without sinks: operators return no optional tensors
_library.define(f"attention_probs(Tensor softmax_lse, {_TENSORS}, {_SCALARS}) -> Tensor")


def problem_of(inputs: AttentionInputs, scalars: tuple[Any, ...]) -> AttentionProblem:
    """Describe a call, given the tensors and the scalars of an operator (schema order)."""
    q, k, v = inputs.q, inputs.k, inputs.v
    max_q, max_k, scale, left, right, softcap, dropout_p, deterministic, needs_grad, _ = scalars
    varlen = inputs.cu_seqlens_q is not None
    return AttentionProblem(
        q.dtype,
        q.device.type,
        inputs.cu_seqlens_q.shape[0] - 1 if inputs.cu_seqlens_q is not None else q.shape[0],
        max_q,
        max_k,
        q.shape[-2],
        k.shape[-2],
        q.shape[-1],
        v.shape[-1],
        scale,
        left,
        right,
        softcap,
        dropout_p,
        varlen,
        inputs.alibi_slopes is not None,
        inputs.sinks is not None,
        deterministic,
        needs_grad,
    )


# Building and deciding take longer on the host than launching a small kernel, and repeat for every
# call of a layer: remember them by the facts they depend on.
_decided: dict[tuple[Any, ...], Decision] = {}
_DECIDED_MAX = 4096


def _decide(args: tuple[Any, ...], layout: Layout) -> Decision:
    """The problem and its back end, for operator arguments in schema order."""
    cu_seqlens_q, alibi_slopes, sink_logits = args[3], args[5], args[_SINKS]
    scalars = args[_NUM_TENSORS:]
    request = scalars[-1] or virtual_device.request_on(args[0].device)
    batch = cu_seqlens_q is None or cu_seqlens_q.shape
    key = (layout, scalars, request, batch, alibi_slopes is None, sink_logits is None)
    found = _decided.get(key)
    if found is None:
        q, k = args[0], args[1]
        problem = problem_of(AttentionInputs(*args[:_NUM_TENSORS]), scalars)
        is_empty = 0 in (q.numel(), k.numel(), problem.seqlen_q, problem.seqlen_k)
        if len(_decided) >= _DECIDED_MAX:
            _decided.clear()
        found = _decided[key] = decide(problem, request, q.device, is_empty)
    return found


def _received(args: tuple[Any, ...]) -> tuple[Decision, AttentionInputs]:
    """What an operator has to do with its arguments, in schema order, and the tensors among them."""
    layout = layout_of(*args[:3])
    return _decide(args, layout), AttentionInputs._make((*args[:_NUM_TENSORS], layout))


def _forward(*args: Any) -> _Forward:
    return _forward_of(layout_of(*args[:3]), args)


def _forward_of(layout: Layout, args: tuple[Any, ...]) -> _Forward:
    decision = _decide(args, layout)
    if decision.is_empty:
        q = args[0]
        out = q.new_zeros((*q.shape[:-1], decision.problem.headdim_v))
        return out, sinks.lse_without_keys(q, decision.problem.seqlen_q, args[3], args[_SINKS])
    return decision.run(decision.backend.forward, AttentionInputs._make((*args[:_NUM_TENSORS], layout)))


def _forward_fake(*args: Any) -> _Forward:
    q, v = args[0], args[2]
    lse = q.new_empty(lse_shape(q), dtype=accumulate_dtype(q.dtype))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


def _backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, softmax_lse: torch.Tensor, *args: Any
) -> _Backward:
    decision, inputs = _received(args)
    if decision.is_empty:
        dq, dk, dv = (x.new_zeros(x.shape) for x in (inputs.q, inputs.k, inputs.v))
        dsinks = None
        if inputs.sinks is not None:
            delta = -dlse if dlse is not None else torch.zeros_like(softmax_lse)
            dsinks = sinks.gradient(inputs.sinks, softmax_lse, delta)
        return dq, dk, dv, dsinks
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    return decision.run(decision.backend.backward, inputs, out, softmax_lse, dout, dlse)


def _backward_operator(*args: Any) -> tuple[torch.Tensor, ...]:
    dq, dk, dv, dsinks = _backward(*args)
    return dq, dk, dv, _no_sinks(dq) if dsinks is None else dsinks


def _backward_fake(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, softmax_lse: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    logits = args[_SINKS]
    dsinks = _no_sinks(args[0]) if logits is None else logits.new_empty(logits.shape, dtype=torch.float32)
    return (*(x.new_empty(x.shape) for x in args[:3]), dsinks)


def _no_sinks(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty((0,), dtype=torch.float32)


def _probs(softmax_lse: torch.Tensor, *args: Any) -> torch.Tensor:
    decision, inputs = _received(args)
    if decision.is_empty:
        problem = decision.problem
        return inputs.q.new_zeros((problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k))
    return decision.run(decision.backend.probs, inputs, softmax_lse)


def _probs_fake(softmax_lse: torch.Tensor, *args: Any) -> torch.Tensor:
    q, cu_seqlens_q, max_seqlen_q, max_seqlen_k = args[0], args[3], args[_NUM_TENSORS], args[_NUM_TENSORS + 1]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    return q.new_empty((batch, q.shape[-2], max_seqlen_q, max_seqlen_k))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    # Undefined gradients stay None: a softmax_lse that nobody differentiates costs nothing.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
    ctx.scalars = inputs[_NUM_TENSORS:]


def _autograd(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    *tensors, out, softmax_lse = ctx.saved_tensors
    between, behind = (None,) * (_SINKS - 3), (None,) * len(ctx.scalars)
    if dout is None and dlse is None:
        return (None,) * (_NUM_TENSORS + len(behind))
    if dout is None:
        dout = torch.zeros_like(out)
    backward: Any = torch.ops.flash_rocm.attention_backward.default
    if torch.is_grad_enabled():  # a graph of the backward is wanted (create_graph, torch.func)
        backward = _DifferentiatedBackward.apply
    elif not (torch.compiler.is_compiling() or is_watched(dout)) and all(map(is_plain, (dout, out, softmax_lse))):
        backward = _backward
    dq, dk, dv, dsinks = backward(dout, dlse, out, softmax_lse, *tensors, *ctx.scalars)
    return (dq, dk, dv, *between, None if tensors[_SINKS] is None else dsinks, *behind)


class _Attention(torch.autograd.Function):
    """Autograd of the direct path; the dispatched path registers the same two functions.

    Torch looks at every argument several times: of those that have no gradient it sees one tuple.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        between: tuple[Any, ...],
        scalars: tuple[Any, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> _Forward:
        args = (q, k, v, *between, sinks, *scalars)
        output = _forward_of(layout, args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        dq, dk, dv, *others = _autograd(ctx, *gradients)
        return None, None, None, dq, dk, dv, others[_SINKS - 3]


def _no_second_derivative(ctx: Any, *gradients: torch.Tensor | None) -> Any:
    raise NotImplementedError("flash_rocm::attention_backward: attention has no second derivative here.")


def _no_vmap(name: str) -> Any:
    def refuse(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"flash_rocm::{name}: torch.func.vmap is not supported. "
            "Hint: attention is batched already, fold the mapped dim into the batch."
        )

    return refuse


class _Transformed(torch.autograd.Function):
    """For torch.func and forward-mode AD, of which registered autograd knows nothing."""

    forward = staticmethod(torch.ops.flash_rocm.attention_forward.default)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)
    vmap = staticmethod(_no_vmap("attention_forward"))


class _DifferentiatedBackward(torch.autograd.Function):
    """Connects the gradients to all they depend on, so that their own derivative is an error, not zero."""

    forward = staticmethod(torch.ops.flash_rocm.attention_backward.default)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_no_second_derivative)
    vmap = staticmethod(_no_vmap("attention_backward"))


def is_watched(x: torch.Tensor) -> bool:
    """Whether a dispatch mode, functorch transform or meta kernel should see the operator."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active() or x.is_meta


def attention_forward(args: tuple[Any, ...], layout: Layout) -> _Forward:
    """out and softmax_lse, differentiable.

    Args:
        args: in the order of the schema.
        layout: that of q, k and v; a shared one says that they are plain tensors and nobody traces this.
    """
    needs_grad = args[-2]
    if forward_ad._current_level >= 0 or (needs_grad and torch._C._are_functorch_transforms_active()):
        return _Transformed.apply(*args)
    if layout.strides is None or is_watched(args[0]):
        return torch.ops.flash_rocm.attention_forward.default(*args)
    if needs_grad:
        q, k, v, *_ = args
        return _Attention.apply(layout, args[3:_SINKS], args[_NUM_TENSORS:], q, k, v, args[_SINKS])
    return _forward_of(layout, args)


def attention_probs(*args: Any) -> torch.Tensor:
    """S_dmask, not differentiable; arguments in the order of the schema."""
    return torch.ops.flash_rocm.attention_probs.default(*args)


for _name, _impl, _fake in (
    ("attention_forward", _forward, _forward_fake),
    ("attention_backward", _backward_operator, _backward_fake),
    ("attention_probs", _probs, _probs_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_rocm::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"flash_rocm::{_name}", _no_vmap(_name), lib=_library)

torch.library.register_autograd("flash_rocm::attention_forward", _autograd, setup_context=_setup_context, lib=_library)
