"""LayerNorm and RMSNorm of a sum on every target, against float64 and autograd; dropout; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adversarial import device as on_every_target
from test_adversarial import random, same

from flash_rocm.layers import norm
from flash_rocm.testing import assert_close_to_oracle

device = on_every_target
ROWS, COLUMNS = (3, 7), 72
HALF = (torch.float16, torch.bfloat16)
#: What a case has beside x and weight.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "prenorm": {"prenorm": True},
    "residual": {"bias": True, "residual": True, "prenorm": True},
    "residual-fp32": {"residual": torch.float32, "prenorm": True},
    "sum-fp32": {"prenorm": True, "residual_in_fp32": True},
    "residual-hidden": {"residual": True},
    "rowscale": {"rowscale": True, "residual": True, "prenorm": True},
    "x1": {"x1": True, "prenorm": True},
    "weight1": {"bias": True, "weight1": True, "bias1": True, "prenorm": True, "residual": True},
    "x1-weight1": {"x1": True, "weight1": True},
    "zero-centered": {"zero_centered_weight": True, "bias": True},
    "out-dtype": {"out_dtype": torch.float32, "residual": True},
    "dropout": {"dropout_p": 0.3, "residual": True, "prenorm": True},
    "dropout-everything": {
        **{"dropout_p": 0.3, "residual": torch.float32, "prenorm": True, "x1": True, "weight1": True, "bias": True},
        **{"bias1": True, "zero_centered_weight": True},
    },
    "dropout-rowscale": {"dropout_p": 0.5, "rowscale": True},
}


def make(case: dict[str, Any], dtype: torch.dtype, device: str, columns: int = COLUMNS) -> tuple[Any, Any]:
    """Tensors by name, and the other arguments."""
    shapes = {
        **{"x": (*ROWS, columns), "weight": (columns,), "bias": (columns,), "residual": (*ROWS, columns)},
        **{"x1": (*ROWS, columns), "weight1": (columns,), "bias1": (columns,), "rowscale": ROWS},
    }
    options = {name: value for name, value in case.items() if name not in shapes}
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        given = case.get(name, name in ("x", "weight"))
        if given:
            kind = given if isinstance(given, torch.dtype) else dtype
            tensors[name] = random(device, *shape, dtype=kind, seed=seed) + (1.0 if name == "rowscale" else 0.0)
    return tensors, options


def oracle(tensors: dict[str, torch.Tensor], options: dict[str, Any], rms: bool, masks: tuple[Any, ...]) -> list[Any]:
    """The same step by step, every step in the dtype of its inputs."""
    rescale = 1.0 - options.get("dropout_p", 0.0)
    total = tensors["x"]
    if "rowscale" in tensors:
        total = total * tensors["rowscale"][..., None]
    if masks:
        total = total * masks[0] / rescale
    if "x1" in tensors:
        x1 = tensors["x1"]
        total = total + (x1 * masks[1] / rescale if masks else x1)
    if "residual" in tensors:
        total = total + tensors["residual"]
    results = []
    for suffix in ("", "1"):
        if "weight" + suffix not in tensors:
            continue
        weight, bias = tensors["weight" + suffix], tensors.get("bias" + suffix)
        weight = weight + 1 if options.get("zero_centered_weight") else weight
        centred = total if rms else total - total.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + options.get("eps", 1e-6)).sqrt() * weight
        results.append(y if bias is None else y + bias)
    return [*results, total] if options.get("prenorm") else results


def in_order(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


def check(case: dict[str, Any], dtype: torch.dtype, rms: bool, device: str, columns: int = COLUMNS) -> None:
    tensors, options = make(case, dtype, device, columns)
    leaves = {n: x.detach().clone().requires_grad_(n != "rowscale") for n, x in tensors.items()}
    before = {name: x.clone() for name, x in tensors.items()}
    arguments = {"bias": None, **leaves, **options}
    found = in_order(norm.layer_norm_fn(**arguments, is_rms_norm=rms, return_dropout_mask=True))
    found, masks = found[:-2], tuple(found[-2:])
    dropped = options.get("dropout_p", 0.0) > 0.0
    assert [m is not None for m in masks] == [dropped, dropped and "x1" in tensors]
    douts = [random(device, *y.shape, dtype=y.dtype, seed=20 + n) for n, y in enumerate(found)]
    differentiable = [n for n in leaves if n != "rowscale"]
    gradients = torch.autograd.grad(found, [leaves[n] for n in differentiable], douts)
    wanted = []
    for kind in (torch.float64, None):  # float64, and every tensor's own dtype
        copies = {n: x.to(kind or x.dtype).requires_grad_(n != "rowscale") for n, x in before.items()}
        results = oracle(copies, options, rms, masks if dropped else ())
        grads = torch.autograd.grad(
            results, [copies[n] for n in differentiable], [d.to(r.dtype) for d, r in zip(douts, results, strict=True)]
        )
        wanted.append((results, grads))
    (exact, exact_grads), (plain, plain_grads) = wanted
    for n, y in enumerate(found):
        is_sum = options.get("prenorm") and n == len(found) - 1
        expected = options.get("out_dtype", dtype)
        if is_sum:
            expected = tensors["residual"].dtype if "residual" in tensors else dtype
            expected = torch.float32 if options.get("residual_in_fp32") and "residual" not in tensors else expected
        assert_close_to_oracle(y, exact[n], plain[n].to(dtype), "output", f"result {n}", dtype=expected)
    for name, gradient, right, low in zip(differentiable, gradients, exact_grads, plain_grads, strict=True):
        assert_close_to_oracle(gradient, right, low.to(dtype), "gradient", name, dtype=tensors[name].dtype)
    assert all(torch.equal(leaves[name], x) for name, x in before.items())


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case: dict[str, Any], rms: bool, device: str) -> None:
    check(case, torch.bfloat16, rms, device)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("columns", (1, 5, 300, 1024))
def test_columns_and_dtypes(columns: int, dtype: torch.dtype, device: str) -> None:
    if columns == 1:
        check(CASES["residual"], dtype, True, device, columns)  # a single column has no variance
    else:
        check(CASES["residual"], dtype, False, device, columns)


def test_float64_on_the_reference() -> None:
    tensors, options = make(CASES["weight1"], torch.float64, "cpu")
    found = in_order(norm.layer_norm_fn(**tensors, **options))
    for y, exact in zip(found, oracle(tensors, options, False, ()), strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


def test_every_argument_counts(device: str) -> None:
    """What each adds to the plain call changes the result."""
    tensors, _ = make({"x1": True, "weight1": True, "bias": True, "bias1": True, "residual": True}, HALF[0], device)
    x, weight = tensors["x"], tensors["weight"]
    plain = norm.layer_norm_fn(x, weight, None)
    assert not same(norm.layer_norm_fn(x, weight, None, eps=0.5), plain)
    assert not same(norm.rms_norm_fn(x, weight, None), plain)
    assert same(norm.rms_norm_fn(x, weight, None), norm.layer_norm_fn(x, weight, None, is_rms_norm=True))
    for name in ("bias", "residual", "x1"):
        assert not same(norm.layer_norm_fn(**{"x": x, "weight": weight, "bias": None, name: tensors[name]}), plain)
    second = norm.layer_norm_fn(x, weight, None, weight1=tensors["weight1"])
    both = norm.layer_norm_fn(x, weight, None, weight1=tensors["weight1"], bias1=tensors["bias1"])
    assert same(second[0], plain) and not same(second[1], plain) and not same(both[1], second[1])


def test_dropout_follows_the_generator(device: str) -> None:
    x, weight = torch.ones(40, 200, device=device), torch.ones(200, device=device)
    masks = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        masks.append(norm.layer_norm_fn(x, weight, None, x1=x, dropout_p=0.25, return_dropout_mask=True)[1:])
    assert same(masks[0], masks[2]) and not same(masks[0], masks[1])
    kept, kept1 = masks[0]
    assert kept.dtype == torch.bool and not torch.equal(kept, kept1)
    assert abs(kept.float().mean().item() - 0.75) < 0.02


@pytest.mark.interpret
def test_the_mask_is_that_of_the_reference() -> None:
    import flash_rocm

    x, weight = torch.ones(9, 130), torch.ones(130)
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        with flash_rocm.use_backend(backend):
            found.append(norm.layer_norm_fn(x, weight, None, x1=x, dropout_p=0.5, return_dropout_mask=True)[1:])
    assert same(*found)


def test_strides_and_no_rows(device: str) -> None:
    x = random(device, 6, 5, 2 * COLUMNS)[:, ::2, ::2]
    weight = random(device, 2 * COLUMNS)[::2]
    assert same(norm.layer_norm_fn(x, weight, None), norm.layer_norm_fn(x.contiguous(), weight.contiguous(), None))
    empty = random(device, 0, COLUMNS).requires_grad_()
    leaf = random(device, COLUMNS).requires_grad_()
    norm.layer_norm_fn(empty, leaf, None).sum().backward()
    assert leaf.grad is not None and not leaf.grad.any()


def test_only_the_sum_is_differentiated(device: str) -> None:
    leaf, weight = random(device, 4, 16).requires_grad_(), random(device, 16).requires_grad_()
    _, total = norm.layer_norm_fn(leaf, weight, None, residual=random(device, 4, 16, seed=2), prenorm=True)
    total.sum().backward()
    assert leaf.grad is not None and weight.grad is not None
    assert torch.equal(leaf.grad, torch.ones_like(leaf)) and not weight.grad.any()


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_the_plain_versions_for_comparison(rms: bool) -> None:
    """They agree in float64 about everything; upcast changes what half precision gives."""
    case = {"x1": True, "weight1": True, "bias": True, "bias1": True, "residual": True, "prenorm": True}
    tensors, options = make({**case, "dropout_p": 0.3, "zero_centered_weight": True}, torch.float64, "cpu")
    *found, mask, mask1 = norm.layer_norm_fn(**tensors, **options, is_rms_norm=rms, return_dropout_mask=True)
    plain = norm.rms_norm_ref if rms else norm.layer_norm_ref
    for y, expected in zip(found, plain(**tensors, **options, dropout_mask=mask, dropout_mask1=mask1), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not same(plain(**tensors, **options)[2], plain(**tensors, **options)[2])  # torch's own dropout
    scaled, _ = make({"rowscale": True, "bias": True}, torch.float64, "cpu")
    torch.testing.assert_close(norm.layer_norm_fn(**scaled, is_rms_norm=rms, eps=0.1), plain(**scaled, eps=0.1))
    half, _ = make({"bias": True, "residual": True}, torch.bfloat16, "cpu")
    assert not same(plain(**half, upcast=True), plain(**half)) and plain(**half, upcast=True).dtype == torch.bfloat16


def test_linear_behind_it(device: str) -> None:
    x, weight, bias = random(device, 4, 16), random(device, 16), random(device, 16, seed=2)
    matrix, offset = random(device, 8, 16, seed=3), random(device, 8, seed=4)
    expected = torch.nn.functional.linear(norm.layer_norm_fn(x, weight, bias), matrix, offset)
    assert same(norm.layer_norm_linear_fn(x, weight, bias, matrix, offset), expected)
    out, total = norm.layer_norm_linear_fn(x, weight, None, matrix, None, x, 1e-3, True, is_rms_norm=True)
    y, sum_ = norm.rms_norm_fn(x, weight, None, x, eps=1e-3, prenorm=True)
    assert same((out, total), (torch.nn.functional.linear(y, matrix), sum_))


def test_module(device: str) -> None:
    layer = norm.RMSNorm(16, eps=1e-3, device=device, dtype=torch.float16)
    x, residual = random(device, 4, 16), random(device, 4, 16, seed=2)
    expected = norm.rms_norm_fn(x, torch.ones(16, device=device), None, residual, eps=1e-3, prenorm=True)
    assert same(layer(x, residual, prenorm=True), expected)
    assert layer(x, residual_in_fp32=True, prenorm=True)[1].dtype == torch.float32
    centred = norm.RMSNorm(16, eps=1e-3, zero_centered_weight=True, device=device, dtype=torch.float16)
    assert not centred.weight.any() and same(centred(x), layer(x))
    dropping = norm.RMSNorm(16, dropout_p=0.5, device=device, dtype=torch.float16)
    assert not same(dropping(x), layer(x)) and same(
        dropping.eval()(x), norm.RMSNorm(16, device=device, dtype=x.dtype)(x)
    )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": 1}, ValueError, "x: expected a tensor"),
        ({"x": torch.zeros(4, 0)}, ValueError, "x: expected .*columns"),
        ({"weight": torch.ones(15)}, ValueError, r"weight: expected shape \(16,\)"),
        ({"bias": torch.ones(2, 16)}, ValueError, r"bias: expected shape \(16,\)"),
        ({"residual": torch.ones(5, 16)}, ValueError, r"residual: expected shape \(4, 16\)"),
        ({"residual": torch.ones(4, 16, dtype=torch.float64)}, ValueError, "residual: .*float64 like x"),
        ({"x1": torch.ones(4, 16, dtype=torch.float16)}, ValueError, "x1: expected the dtype of x"),
        ({"bias1": torch.ones(16)}, ValueError, "weight1: expected a tensor with bias1"),
        ({"rowscale": torch.ones(5)}, ValueError, r"rowscale: expected shape \(4,\)"),
        ({"rowscale": torch.ones(4), "x1": torch.ones(4, 16)}, NotImplementedError, "rowscale: expected None with x1"),
        ({"rowscale": torch.ones(4, requires_grad=True)}, NotImplementedError, "rowscale: expected no gradient"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability"),
        ({"eps": -1.0}, ValueError, "eps: expected a number >= 0"),
        ({"out_dtype": torch.int32}, ValueError, "out_dtype: expected float16"),
        ({"out": torch.ones(4, 16)}, NotImplementedError, "out: expected None"),
        ({"residual_out": torch.ones(4, 16)}, NotImplementedError, "residual_out: expected None"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"x": torch.ones(4, 16), "weight": torch.ones(16), "bias": None, **changes}
    with pytest.raises(error, match=words):
        norm.layer_norm_fn(**arguments)
