"""Activations against their formulas in float64, and the backward functions against autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_adversarial import random, same

from flash_rocm.layers import activations as act
from flash_rocm.testing import assert_close_to_oracle

DTYPES = (torch.bfloat16, torch.float32)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x)) * y


def sqrelu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0) ** 2


def check(run: Callable[..., torch.Tensor], formula: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    """Result and gradients of a differentiable function."""
    results = []
    for function, dtype in ((run, inputs[0].dtype), (formula, torch.float64), (formula, inputs[0].dtype)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, random("cpu", *y.shape, dtype=dtype, seed=7))))
    for name, actual, exact, plain in zip(("out", "first", "second"), *results, strict=False):
        assert_close_to_oracle(actual, exact, plain, "output" if name == "out" else "gradient", name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differentiable(dtype: torch.dtype) -> None:
    x, y, bias = (2 * random("cpu", *shape, dtype=dtype, seed=n) for n, shape in enumerate(((9, 40), (9, 40), (40,))))
    check(act.fast_gelu_impl, gelu, x)
    check(act.bias_gelu_impl, lambda a, b: gelu(a + b), x, bias)
    check(act.swiglu, swiglu, x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_of_forward_and_backward(dtype: torch.dtype) -> None:
    x, y, g = (2 * random("cpu", 9, 40, dtype=dtype, seed=n) for n in range(3))
    bias = random("cpu", 40, dtype=dtype, seed=4)
    for forward, backward, inputs in (
        (act.gelu_fwd, act.gelu_bwd, (x,)),
        (act.sqrelu_fwd, act.sqrelu_bwd, (x,)),
        (torch.relu, act.relu_bwd, (x,)),
    ):
        leaf = inputs[0].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(forward(leaf), leaf, g)
        torch.testing.assert_close(backward(g, inputs[0]), wanted, rtol=2e-2 if dtype == DTYPES[0] else 1e-5, atol=1e-6)
    torch.testing.assert_close(act.sqrelu_fwd(x), sqrelu(x))
    leaves = [t.clone().requires_grad_() for t in (x, y)]
    assert same(act.swiglu_bwd(x, y, g), torch.autograd.grad(act.swiglu(*leaves), leaves, g))
    dy, dbias = act.bias_gelu_back(g, y, bias)
    assert dy.dtype == dtype and same(dy, act.gelu_bwd(g, y + bias)) and same(dbias, dy.sum(0).to(dtype))
    assert same(act.bias_gelu(y, bias), act.gelu_fwd(y + bias)) and same(act.swiglu_fwd(x, y), act.swiglu(x, y))


def test_relu_at_zero() -> None:
    assert act.relu_bwd(torch.ones(3), torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 1.0, 1.0]
