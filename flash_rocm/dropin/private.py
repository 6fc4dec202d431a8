"""The functions of ``flash_attn.flash_attn_interface`` that are not public and that other libraries call.

They have no gradients: libraries that divide sequences among GPUs write their own.  Each is also an operator of
``torch.ops.flash_attn``, under its name.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import ops, validation
from flash_rocm.attend import draw_rng_state
from flash_rocm.dropin.borders import (
    ROUNDED,
    lse_at_border,
    lse_inside,
    maybe_contiguous,
    probs_at_border,
    round_multiple,
)
from flash_rocm.inference import attend_cached, dropout_over_pages
from flash_rocm.problem import CacheInputs, accumulate_dtype, layout_of, lse_shape

_Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _arguments(
    tensors: tuple[torch.Tensor | None, ...],
    lengths: tuple[int, int],
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    deterministic: bool,
    rng_state: torch.Tensor | None,
) -> tuple[Any, ...]:
    """Arguments of the attention operators, checked; tensors are q, k, v, both cu_seqlens and alibi_slopes."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes = tensors
    for name, x in (("q", q), ("k", k), ("v", v)):
        validation.check_tensor(name, x)
    if q is None or k is None or v is None:
        raise validation.invalid("q, k, v", "tensors", None)
    rank = 4 if cu_seqlens_q is None else 3
    validation.check_qkv(q, k, v, rank, rank)
    batch = q.shape[0]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        validation.check_varlen(q, cu_seqlens_q, cu_seqlens_k)
        batch = cu_seqlens_q.shape[0] - 1
    if alibi_slopes is not None:
        validation.check_alibi(alibi_slopes, q, batch)
    left, right = validation.check_scalars(dropout_p, softmax_scale, window, softcap)
    names = ("max_seqlen_q", "max_seqlen_k")
    lengths = tuple(validation.check_max_seqlen(name, n) for name, n in zip(names, lengths, strict=True))  # type: ignore[assignment]
    numbers = (*lengths, float(softmax_scale), left, 0 if causal else right, float(softcap), float(dropout_p))
    # "" for the back end: what is asked for when the operator runs.
    return (*tensors, rng_state, None, *numbers, bool(deterministic), True, "")


def _attend(args: tuple[Any, ...], rng_state: torch.Tensor | None, return_softmax: bool) -> _Forward:
    q, k, v = args[:3]
    with torch.no_grad():
        out, softmax_lse = ops.attention_forward(args, layout_of(q, k, v))
        probs = q.new_empty((0,))
        if return_softmax and rng_state is not None:
            probs = probs_at_border(ops.attention_probs(softmax_lse, *args))
    state = torch.zeros(2, dtype=torch.int64, device=q.device) if rng_state is None else rng_state
    return out, lse_at_border(softmax_lse), probs, state


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> _Forward:
    """out, softmax_lse, S_dmask and rng_state of a dense batch; arguments as in :func:`flash_rocm.flash_attn_func`.

    S_dmask is (0,) unless return_softmax and dropout_p > 0.  rng_state (2,) int64 is for the backward.
    """
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))  # type: ignore[assignment]
    rng_state = draw_rng_state(q.device) if dropout_p > 0.0 else None
    args = _arguments(
        (q, k, v, None, None, alibi_slopes),
        (q.shape[1], k.shape[1]),
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        False,
        rng_state,
    )
    return _attend(args, rng_state, return_softmax)


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> _Forward:
    """The same of packed sequences; arguments as in :func:`flash_rocm.flash_attn_varlen_func`.

    seqused_k (batch,) int32 are the keys of each sequence that are in use, leftpad_k (batch,) int32 where they start;
    block_table as there.  These three take no dropout.  Rows of no sequence are 0 whether or not zero_tensors asks
    for it.
    """
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))  # type: ignore[assignment]
    window = (window_size_left, window_size_right)
    if block_table is not None or leftpad_k is not None or seqused_k is not None:
        if dropout_p != 0.0:
            raise dropout_over_pages(dropout_p)
        inputs = CacheInputs(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            block_table=block_table,
            leftpad_k=leftpad_k,
            seqused_k=seqused_k,
            alibi_slopes=alibi_slopes,
        )
        longest_q = validation.check_max_seqlen("max_seqlen_q", max_seqlen_q)
        longest_k = validation.check_max_seqlen("max_seqlen_k", max_seqlen_k)
        with torch.no_grad():
            out, softmax_lse = attend_cached(
                inputs, {}, longest_q, longest_k, softmax_scale, causal, window, softcap, 0, False, 0
            )
        state = torch.zeros(2, dtype=torch.int64, device=q.device)
        return out, lse_at_border(softmax_lse), q.new_empty((0,)), state
    rng_state = draw_rng_state(q.device) if dropout_p > 0.0 else None
    args = _arguments(
        (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes),
        (max_seqlen_q, max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        window,
        softcap,
        False,
        rng_state,
    )
    return _attend(args, rng_state, return_softmax)


def _write_gradients(
    dout: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    targets: tuple[torch.Tensor | None, ...],
    args: tuple[Any, ...],
) -> torch.Tensor:
    with torch.no_grad():
        backward = torch.ops.flash_rocm.attention_backward.default
        gradients = backward(dout, None, out, lse_inside(softmax_lse).contiguous(), *args)
        for target, gradient in zip(targets, gradients[:3], strict=True):
            if target is not None:
                target.copy_(gradient)
        delta = (dout.float() * out.float()).sum(-1)
    return delta.transpose(-1, -2).contiguous()


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the gradients of a dense batch to dq, dk and dv, those that are not None.

    out and softmax_lse may be those of more keys than k has: of parts that were combined.

    Returns:
        softmax_d, the row sums of dout * out, (batch, nheads, seqlen_q) float32.
    """
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))  # type: ignore[assignment]
    args = _arguments(
        (q, k, v, None, None, alibi_slopes),
        (q.shape[1], k.shape[1]),
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        deterministic,
        _state(dropout_p, rng_state),
    )
    return _write_gradients(dout, out, softmax_lse, (dq, dk, dv), args)


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    """The same of packed sequences; softmax_d is (nheads, total_q).

    Gradients of rows of no sequence are 0 whether or not zero_tensors asks for it.
    """
    q, k, v = (maybe_contiguous(x) for x in (q, k, v))  # type: ignore[assignment]
    args = _arguments(
        (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes),
        (max_seqlen_q, max_seqlen_k),
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        deterministic,
        _state(dropout_p, rng_state),
    )
    return _write_gradients(dout, out, softmax_lse, (dq, dk, dv), args)


def _state(dropout_p: float, rng_state: torch.Tensor | None) -> torch.Tensor | None:
    if dropout_p == 0.0:
        return None
    if rng_state is None:
        raise validation.invalid("rng_state", "what the forward returned, with dropout_p > 0", None)
    return rng_state


# --------------------------------------------------------------------------------------------------
# Operators

_library = torch.library.Library("flash_attn", "FRAGMENT")
_NUMBERS = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left{0}, SymInt window_size_right{0}, "
    "float softcap"
)
_STARTS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
_RESULTS = "(Tensor out, Tensor softmax_lse, Tensor p, Tensor rng_state)"
_GRADIENTS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, Tensor(b!)? dk, "
    "Tensor(c!)? dv, "
)
_BEHIND = "Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None"
_OPERATORS = {
    "_flash_attn_forward": f"(Tensor q, Tensor k, Tensor v, {_NUMBERS.format('')}, Tensor? alibi_slopes, "
    f"bool return_softmax) -> {_RESULTS}",
    "_flash_attn_varlen_forward": f"(Tensor q, Tensor k, Tensor v, {_STARTS}{_NUMBERS.format('=-1')}=0.0, "
    "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, "
    f"Tensor? seqused_k=None, bool zero_tensors=False) -> {_RESULTS}",
    "_flash_attn_backward": f"({_GRADIENTS}{_NUMBERS.format('')}, {_BEHIND}) -> Tensor",
    "_flash_attn_varlen_backward": f"({_GRADIENTS}{_STARTS}{_NUMBERS.format('')}, {_BEHIND}, "
    "bool zero_tensors=False) -> Tensor",
}


def _forward_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, *args: Any, **kwargs: Any
) -> _Forward:
    shape = (*q.shape[:2], k.shape[1])
    return _fake_results(q, v, dropout_p > 0.0 and args[-1], (shape[0], q.shape[2], *shape[1:]))


def _varlen_forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    *args: Any,
    **kwargs: Any,
) -> _Forward:
    shape = (cu_seqlens_q.shape[0] - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
    return _fake_results(q, v, dropout_p > 0.0 and return_softmax, shape)


def _fake_results(q: torch.Tensor, v: torch.Tensor, has_probs: bool, shape: tuple[int, ...]) -> _Forward:
    rounded = tuple(round_multiple(n, ROUNDED) for n in shape[2:])
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(lse_shape(q), dtype=accumulate_dtype(q.dtype)),
        q.new_empty((*shape[:2], *rounded) if has_probs else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


def _backward_fake(dout: torch.Tensor, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return q.new_empty(lse_shape(q), dtype=torch.float32)


for _name, _schema in _OPERATORS.items():
    _library.define(_name + _schema)
    _library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
    _fake: Any = _backward_fake
    if "forward" in _name:
        _fake = _varlen_forward_fake if "varlen" in _name else _forward_fake
    torch.library.register_fake(f"flash_attn::{_name}", _fake, lib=_library)
