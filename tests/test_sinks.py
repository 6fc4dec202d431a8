"""Attention sinks: what they mean, beyond what the matrix compares with the oracle.

Every test runs on the CPU (reference back end) and, marked ``gpu``, on a GPU (Triton); those of the kernels
also under Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import DEFAULT_BACKEND, Received, assert_close, assert_equal, best_compiler, dtype_on, starts

import flash_rocm
from flash_rocm import backends, v3

B, SQ, SK, H, HK, D = 2, 19, 23, 4, 2, 16
#: The back end of each device, and Triton's kernels under the interpreter.
WAYS = [
    pytest.param("cpu", "reference", id="cpu"),
    pytest.param("cpu", "triton", id="interpret", marks=pytest.mark.interpret),
    pytest.param("cuda", "triton", id="cuda", marks=pytest.mark.gpu),
]
Leaves = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def leaves(
    device: str, dtype: torch.dtype, sq: int = SQ, sk: int = SK, sink_dtype: torch.dtype | None = None
) -> Leaves:
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    return leaf(B, sq, H, D), leaf(B, sk, HK, D), leaf(B, sk, HK, D), leaf(H, dtype=sink_dtype or torch.float32)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, **options: Any) -> Any:
    return v3.flash_attn_func(q, k, v, learnable_sink=sink, return_attn_probs=True, **options)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse of a causal call from the definition: exp, a sum, a division."""
    k, v = (x.repeat_interleave(H // HK, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None, :]
    weights = scores.exp() * (j <= i + k.shape[1] - q.shape[1])
    total = weights.sum(-1) + sink.exp()[None, :, None]
    return torch.einsum("bhij,bjhd->bihd", weights / total[..., None], v), total.log()


@pytest.mark.parametrize(("device", "backend"), WAYS)
@pytest.mark.parametrize("through", ("out", "lse", "both"))
def test_gradients_against_the_definition(device: str, backend: str, through: str) -> None:
    """float32 against float64 autograd of the naive computation; rows without keys are among them."""
    tensors = leaves(device, torch.float32, SK + 5, SK)
    doubles = [x.detach().cpu().double().requires_grad_() for x in tensors]
    with flash_rocm.use_backend(backend):
        results = attend(*tensors, causal=True)
    expected = naive(*doubles)
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x.cpu().double(), y, rtol=2e-6, atol=2e-6)
    chosen = {"out": (0,), "lse": (1,), "both": (0, 1)}[through]
    sent = [torch.randn(expected[i].shape, dtype=torch.float64) for i in chosen]
    grads = torch.autograd.grad(
        [results[i] for i in chosen], tensors, [x.to(device, torch.float32) for x in sent], allow_unused=True
    )
    true = torch.autograd.grad([expected[i] for i in chosen], doubles, sent, allow_unused=True)
    for name, x, y in zip("qkvs", grads, true, strict=True):
        y = torch.zeros_like(doubles["qkvs".index(name)]) if y is None else y
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"d{n}: {text}")


@pytest.mark.parametrize(("device", "backend"), WAYS)
def test_sinks_change_the_result_of_their_head_only(device: str, backend: str) -> None:
    q, k, v, sink = leaves(device, torch.float32)
    other = sink.detach().clone()
    other[1] += 1.0
    with flash_rocm.use_backend(backend), torch.no_grad():
        first, second, without = attend(q, k, v, sink), attend(q, k, v, other), attend(q, k, v, None)
    kept = [0, 2, 3]
    assert torch.equal(first[0][:, :, kept], second[0][:, :, kept]) and torch.equal(
        first[1][:, kept], second[1][:, kept]
    )
    assert not torch.isclose(first[0][:, :, 1], second[0][:, :, 1]).all()
    assert bool((second[1][:, 1] > first[1][:, 1]).all()) and bool((first[1] > without[1]).all())


@pytest.mark.parametrize(("device", "backend"), WAYS)
def test_minus_infinity_is_no_sink(device: str, backend: str) -> None:
    """Bit for bit, rows without keys and gradients included; the sink's own gradient is 0."""
    q, k, v, _ = leaves(device, dtype_on(device), SK + 5, SK)
    sink = torch.full((H,), float("-inf"), device=device, requires_grad=True)
    with flash_rocm.use_backend(backend):
        results, expected = attend(q, k, v, sink, causal=True), attend(q, k, v, None, causal=True)
        assert_equal(results, expected)
        grads = torch.autograd.grad(results[0].float().square().sum(), (q, k, v, sink))
        assert_equal(grads[:3], torch.autograd.grad(expected[0].float().square().sum(), (q, k, v)))
    assert not grads[3].any()


@pytest.mark.parametrize(("device", "backend"), WAYS)
def test_rows_without_keys(device: str, backend: str) -> None:
    """out 0, softmax_lse the sink, no gradient to q, whatever keys hold that other rows see."""
    dead = 5
    q, k, v, sink = leaves(device, torch.float32, SK + dead, SK)
    with torch.no_grad():
        k[:, 3], v[:, 3] = float("nan"), float("nan")
    with flash_rocm.use_backend(backend):
        out, lse = attend(q, k, v, sink, causal=True)
    (dq,) = torch.autograd.grad((out[:, :dead].sum(), lse[..., :dead].sum()), q)
    assert not out[:, :dead].any() and not dq[:, :dead].any()
    assert torch.equal(lse[..., :dead], sink.detach()[None, :, None].expand(B, H, dead))


@pytest.mark.parametrize(("device", "backend"), WAYS)
def test_no_keys_at_all(device: str, backend: str) -> None:
    """No kernel runs; softmax_lse and the gradient of the sink are still right."""
    q, k, v, sink = leaves(device, torch.float32, SQ, 0)
    with flash_rocm.use_backend(backend):
        out, lse = attend(q, k, v, sink)
    assert not out.any() and torch.equal(lse, sink.detach()[None, :, None].expand(B, H, SQ))
    sent = torch.randn_like(lse)
    (dsink,) = torch.autograd.grad(lse, sink, sent)
    torch.testing.assert_close(dsink, sent.sum((0, 2)))
    assert not torch.autograd.grad(attend(q, k, v, sink)[0].sum(), sink)[0].any()


@pytest.mark.parametrize("keys", (0, 7))
def test_varlen_rows_of_nobody(device: str, keys: int) -> None:
    """Sequences without keys, and rows of no sequence, whose softmax_lse is -inf and which count nothing."""
    q, k, v, sink = leaves(device, dtype_on(device))
    q, k, v = (x[0].detach().requires_grad_() for x in (q, k, v))
    lengths = {"cu_seqlens_q": starts(device, 6, 8), "cu_seqlens_k": starts(device, 0, keys)}
    out, lse = v3.flash_attn_varlen_func(
        q, k[:keys], v[:keys], **lengths, max_seqlen_q=8, max_seqlen_k=keys, return_attn_probs=True, learnable_sink=sink
    )
    row = sink.detach()[:, None]
    assert torch.equal(lse[:, :6], row.expand(H, 6)) and bool(lse[:, 14:].isneginf().all())
    assert not out[:6].any() and not out[14:].any()
    assert torch.equal(lse[:, 6:14], row.expand(H, 8)) == (keys == 0)
    (dsink,) = torch.autograd.grad(lse.masked_fill(lse.isneginf(), 0.0).sum(), sink)
    torch.testing.assert_close(dsink, 6.0 + (sink.detach()[:, None] - lse.detach()[:, 6:14]).exp().sum(1))


@pytest.mark.parametrize("sink_dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_gradient_has_the_dtype_of_the_sinks(sink_dtype: torch.dtype, device: str) -> None:
    q, k, v, sink = leaves(device, dtype_on(device), sink_dtype=sink_dtype)
    out, _ = attend(q, k, v, sink)
    (dsink,) = torch.autograd.grad(out.sum(), sink)
    assert dsink.dtype == sink_dtype and dsink.shape == sink.shape and dsink.any()
    same, _ = attend(q, k, v, sink.detach().float())
    assert torch.equal(out, same)


def test_only_the_sinks_are_trained(device: str) -> None:
    """A strided parameter, of which only a part is the sinks, beside tensors that need no gradient."""
    q, k, v, _ = (x.detach() for x in leaves(device, dtype_on(device)))
    table = torch.nn.Parameter(torch.randn(H, 3, device=device))
    out, lse = attend(q, k, v, table[:, 1])
    (out.float().sum() + lse.sum()).backward()
    assert table.grad is not None and table.grad[:, 1].all() and not table.grad[:, [0, 2]].any()
    contiguous, _ = attend(q, k, v, table.detach()[:, 1].contiguous())
    assert torch.equal(out, contiguous)


def test_dsinks_are_deterministic(device: str) -> None:
    q, k, v, sink = leaves(device, dtype_on(device), 300, 300)
    out, _ = attend(q, k, v, sink, deterministic=True)
    first, *others = (torch.autograd.grad(out.sum(), sink, retain_graph=True)[0] for _ in range(4))
    assert all(torch.equal(first, x) for x in others)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled(dynamic: bool, device: str, fresh_dynamo: None) -> None:
    """One graph, the results of eager calls, and the operator in it."""
    tensors = leaves(device, dtype_on(device))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> Any:
        return attend(q, k, v, sink, causal=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=best_compiler())
    results, expected = compiled(*tensors), run(*tensors)
    assert_equal(results, expected)
    grads = torch.autograd.grad(results[0].float().square().sum() + results[1].sum(), tensors)
    assert_equal(grads, torch.autograd.grad(expected[0].float().square().sum() + expected[1].sum(), tensors))


def test_fakes_agree_with_what_runs(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def metadata(tensors: tuple[torch.Tensor, ...]) -> list[Any]:
        results = attend(*tensors)
        results = (*results, *torch.autograd.grad(results[0].float().sum() + results[1].sum(), tensors))
        return [(x.shape, x.dtype, x.stride(), x.device.type) for x in results]

    tensors = leaves(device, dtype_on(device), sink_dtype=torch.bfloat16)
    real = metadata(tensors)
    with FakeTensorMode() as mode:
        assert metadata(tuple(mode.from_tensor(x) for x in tensors)) == real


def test_functorch_and_second_derivatives(device: str) -> None:
    q, k, v, sink = leaves(device, dtype_on(device))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return attend(q.detach(), k.detach(), v.detach(), logits)[0].float().square().sum()

    (expected,) = torch.autograd.grad(loss(sink), sink)
    assert torch.equal(torch.func.grad(loss)(sink.detach()), expected)
    (dsink,) = torch.autograd.grad(loss(sink), sink, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dsink.sum().backward()


def test_autocast_and_the_oracle(device: str, received: list[Received]) -> None:
    """Sinks stay float32 where autocast rounds q, k and v."""
    tensors = leaves(device, torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = attend(*tensors)
    assert received[-1].inputs.sinks is not None and received[-1].inputs.sinks.dtype == torch.float32
    assert received[-1].problem.dtype == torch.bfloat16 and "sinks" in received[-1].problem.features()
    assert_close(received[-1], results)


def test_explain(device: str) -> None:
    """CK does not take them, and says so."""
    q, k, v, sink = leaves(device, torch.bfloat16)
    report = flash_rocm.explain(q, k, v, learnable_sink=sink)
    assert "sinks" in report.problem.describe() and report.backend == DEFAULT_BACKEND[device]
    assert "sinks is not implemented" in report.reasons["ck"]
    assert "sinks" not in backends.CK.features


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        (1.0, "learnable_sink: expected a tensor (4,), got float. Hint: one logit for each head of q."),
        (torch.zeros(3), "learnable_sink: expected shape (4,), got (3,). Hint: one logit for each head of q."),
        (torch.zeros(1, 4), "learnable_sink: expected shape (4,), got (1, 4)."),
        (torch.zeros(4, dtype=torch.int32), "learnable_sink: expected float16, bfloat16, float32 or float64, got"),
        (torch.zeros(4, device="meta"), "learnable_sink: expected device cpu, like q, got meta."),
    ],
)
def test_bad_input(sink: Any, message: str) -> None:
    q, k, v, _ = leaves("cpu", torch.float32)
    with pytest.raises(ValueError) as error:
        attend(q, k, v, sink)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="learnable_sink"):
        flash_rocm.explain(q, k, v, learnable_sink=sink)
