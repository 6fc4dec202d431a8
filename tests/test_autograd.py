"""Autograd: checkpointing, autocast, second calls and derivatives, torch.func.

Every test runs on the CPU (reference back end) and, marked ``gpu``, on a GPU (Triton).  Results are
compared with plain eager calls, bit for bit where nothing but the way to the kernel differs, or with
the float64 oracle through the inputs that the back end received.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from calls import (
    DEFAULT_BACKEND,
    KINDS,
    OPERATORS,
    Call,
    Received,
    SeenOperators,
    assert_close,
    assert_equal,
    directions,
    make_call,
    send_back,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_rocm

# --------------------------------------------------------------------------------------------------
# Checkpointing


def block(call: Call, *leaves: torch.Tensor) -> torch.Tensor:
    """Attention with something to recompute before and behind it."""
    return call.run(leaves[0] * 1.25, *leaves[1:]).sin()


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind: str, use_reentrant: bool, received: list[Received], device: str) -> None:
    """Recomputed with the dropout state of the forward: the gradients of the plain call, bit for bit."""
    call = make_call(kind, device, dropout_p=0.3, causal=True)
    torch.manual_seed(11)
    expected = block(call, *call.leaves)
    after = torch.rand(3, device=device)
    grads = send_back(expected, call.leaves)
    received.clear()
    torch.manual_seed(11)
    actual = checkpoint(functools.partial(block, call), *call.leaves, use_reentrant=use_reentrant)
    assert_equal(torch.rand(3, device=device), after)
    torch.manual_seed(12)  # what happens between forward and backward does not matter
    assert_equal(actual, expected)
    if use_reentrant:  # which knows .backward() alone
        generator = torch.Generator().manual_seed(99)
        actual.backward(torch.randn(actual.shape, generator=generator).to(actual.device, actual.dtype))
        actual_grads = tuple(x.grad for x in call.leaves)
    else:
        actual_grads = send_back(actual, call.leaves)
    assert_equal(actual_grads, grads)
    assert [entry.direction for entry in received] == ["forward", "forward", "backward"]


@pytest.mark.parametrize("save", (False, True))
def test_selective_checkpointing_sees_the_operator(save: bool, received: list[Received], device: str) -> None:
    call = make_call("dense", device, dropout_p=0.3)
    torch.manual_seed(11)
    expected = block(call, *call.leaves)
    grads = send_back(expected, call.leaves)
    kept = [OPERATORS.attention_forward.default] if save else []

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    received.clear()
    torch.manual_seed(11)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    actual = checkpoint(functools.partial(block, call), *call.leaves, use_reentrant=False, context_fn=contexts)
    assert_equal(actual, expected)
    assert_equal(send_back(actual, call.leaves), grads)
    assert [entry.direction for entry in received].count("forward") == (1 if save else 2)


# --------------------------------------------------------------------------------------------------
# Autocast


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, dtype: torch.dtype, device: str) -> None:
    """float32 inputs: what the cast inputs give without autocast, and gradients in float32."""
    call = make_call(kind, device, torch.float32, causal=True, return_attn_probs=True)
    with torch.autocast(device, dtype):
        out, lse, _ = call.run(*call.leaves)
        grads = send_back((out, lse), call.leaves)
    assert out.dtype == dtype and lse.dtype == torch.float32
    cast = tuple(x.detach().to(dtype).requires_grad_() for x in call.leaves)
    expected = call.run(*cast)
    assert_equal((out, lse), expected[:2])
    assert_equal(grads, tuple(x.float() for x in send_back(expected, cast)))


def test_autocast_takes_what_sdpa_takes(device: str) -> None:
    """Mixed dtypes are cast, float64 and integers are not, and explain tells the same."""
    q, k, v = (x.detach() for x in make_call("dense", device, torch.float32).leaves)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device):
        out = flash_rocm.flash_attn_func(q, k.to(dtype), v)
        assert_equal(out, flash_rocm.flash_attn_func(q, k, v))
        assert flash_rocm.explain(q, k, v).problem.dtype == dtype
        with pytest.raises(ValueError, match="q: expected float16"):
            flash_rocm.flash_attn_func(q.int(), k.int(), v.int())
        with flash_rocm.use_backend("reference"):
            doubles = flash_rocm.flash_attn_func(q.double(), k.double(), v.double())
        assert doubles.dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert flash_rocm.flash_attn_func(q, k, v).dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Autograd


@pytest.mark.parametrize("kind", KINDS)
def test_backward_twice_with_retained_graph(kind: str, device: str) -> None:
    call = make_call(kind, device, dropout_p=0.2, return_attn_probs=True)
    results = call.run(*call.leaves)[:2]
    first = send_back(results, call.leaves, retain_graph=True)
    assert_equal(send_back(results, call.leaves), first)
    with pytest.raises(RuntimeError, match="second time"):
        send_back(results, call.leaves)


def test_gradient_through_softmax_lse(received: list[Received], device: str) -> None:
    call = make_call("varlen", device, causal=True, return_attn_probs=True)
    results = call.run(*call.leaves)
    assert_close(received[0], results, send_back(results, call.leaves))
    # From softmax_lse alone: v plays no part.
    lse_only = torch.autograd.grad(call.run(*call.leaves)[1].exp().sum(), call.leaves)
    assert lse_only[0].any() and lse_only[1].any() and not lse_only[2].any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_some_inputs_need_a_gradient(wanted: tuple[int, ...], device: str) -> None:
    call = make_call("dense", device)
    everything = send_back(call.run(*call.leaves), call.leaves)
    leaves = tuple(x.detach().requires_grad_(i in wanted) for i, x in enumerate(call.leaves))
    some = send_back(call.run(*leaves), tuple(leaves[i] for i in wanted))
    assert_equal(some, tuple(everything[i] for i in wanted))


def test_no_graph_where_none_is_wanted(device: str) -> None:
    call = make_call("dense", device)
    assert not call.run(*(x.detach() for x in call.leaves)).requires_grad
    with torch.no_grad():
        assert not call.run(*call.leaves).requires_grad
    with torch.inference_mode():
        assert call.run(*call.leaves).is_inference()


def test_s_dmask_is_not_differentiable(device: str) -> None:
    call = make_call("dense", device, dropout_p=0.2, return_attn_probs=True)
    assert [x.requires_grad for x in call.run(*call.leaves)] == [True, True, False]


def test_inputs_changed_after_the_forward_are_noticed(device: str) -> None:
    call = make_call("dense", device)
    q = call.leaves[0] * 1.0
    out = call.run(q, *call.leaves[1:])
    q.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def second_derivative(q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    # q itself is part of the sum: a first derivative that forgot its own graph would go unnoticed.
    return torch.autograd.grad(first.square().sum() + q.sum(), q)[0]


@pytest.mark.parametrize("dispatched", (False, True))
def test_second_derivative_is_refused(dispatched: bool, device: str) -> None:
    call = make_call("dense", device)
    with SeenOperators() if dispatched else contextlib.nullcontext():
        out = call.run(*call.leaves)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        second_derivative(call.leaves[0], out)
    # The first derivative with a graph around it is no error.
    (first,) = torch.autograd.grad(call.run(*call.leaves).sum(), call.leaves[:1], create_graph=True)
    assert_equal(first.detach(), torch.autograd.grad(call.run(*call.leaves).sum(), call.leaves[0])[0])


def test_second_derivative_of_compiled_code_is_refused(device: str) -> None:
    call = make_call("dense", device)
    compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
    with pytest.raises((RuntimeError, NotImplementedError), match="double backward|no second derivative"):
        second_derivative(call.leaves[0], compiled(*call.leaves))


def test_backward_by_the_back_end_of_the_forward(
    received: list[Received], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    call, default = make_call("dense", device), DEFAULT_BACKEND[device]
    with flash_rocm.use_backend("ck"):
        chosen = call.run(*call.leaves)
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "ck")
    by_environment = call.run(*call.leaves)
    monkeypatch.delenv("FLASH_ROCM_BACKEND")
    by_default = call.run(*call.leaves)
    received.clear()
    with flash_rocm.use_backend("reference"):
        for out in (by_default, chosen, by_environment):
            send_back(out, call.leaves)
    assert directions(received) == [(default, "backward"), ("ck", "backward"), ("ck", "backward")]


# --------------------------------------------------------------------------------------------------
# Transforms


def test_vmap_is_refused(device: str) -> None:
    q = torch.randn(3, 2, 5, 2, 8, device=device)
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.func.vmap(flash_rocm.flash_attn_func)(q, q, q)
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.func.vmap(lambda k: flash_rocm.flash_attn_func(q[0], k, k))(q)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: flash_rocm.flash_attn_func(x, x, x).sum()))
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        per_sample(q)
    with pytest.raises(NotImplementedError, match="vmap is not supported"):
        torch.func.jacrev(lambda x: flash_rocm.flash_attn_func(x, x, x))(q[0])


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad(kind: str, device: str) -> None:
    call = make_call(kind, device, causal=True, return_attn_probs=True)

    def loss(leaves: tuple[torch.Tensor, ...]) -> torch.Tensor:
        out, lse, _ = call.run(*leaves)
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()

    detached = tuple(x.detach() for x in call.leaves)
    assert_equal(torch.func.grad(loss)(detached), torch.autograd.grad(loss(call.leaves), call.leaves))
    value, pullback = torch.func.vjp(loss, detached)
    assert_equal(value, loss(detached))
    assert_equal(pullback(torch.ones_like(value))[0], torch.autograd.grad(loss(call.leaves), call.leaves))


def test_func_grad_of_grad_is_refused(device: str) -> None:
    q, k, v = (x.detach() for x in make_call("dense", device).leaves)

    def inner(x: torch.Tensor) -> torch.Tensor:
        return flash_rocm.flash_attn_func(x, k, v).square().sum()

    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(inner)(x).sum() + x.sum())(q)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_forward_mode_is_refused(requires_grad: bool, device: str) -> None:
    """Never a tangent of zeros."""
    q, k, v = (x.detach().requires_grad_(requires_grad) for x in make_call("dense", device).leaves)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: flash_rocm.flash_attn_func(x, k, v), (q,), (torch.ones_like(q),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k, torch.ones_like(k))
        with pytest.raises(NotImplementedError, match="jvp"):
            flash_rocm.flash_attn_func(q, dual, v)
        assert_equal(flash_rocm.flash_attn_func(q, k, v), flash_rocm.flash_attn_func(q.detach(), k, v))


def test_functionalize(device: str) -> None:
    q, k, v = (x.detach() for x in make_call("dense", device).leaves)
    assert_equal(torch.func.functionalize(flash_rocm.flash_attn_func)(q, k, v), flash_rocm.flash_attn_func(q, k, v))
