"""Dispatch modes, tracing, tensor subclasses, dropout state, graph capture, streams.

Every test runs on the CPU (reference back end) and, marked ``gpu``, on a GPU (Triton).  Results are
compared with plain eager calls, bit for bit where nothing but the way to the kernel differs, or with
the float64 oracle through the inputs that the back end received.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import (
    BATCH,
    DIM,
    HEADS,
    HEADS_K,
    KINDS,
    OPERATORS,
    SEQLEN_K,
    SEQLEN_Q,
    Received,
    SeenOperators,
    assert_close,
    assert_equal,
    dtype_on,
    make_call,
    send_back,
    starts,
)
from matrix import scalars_of

import flash_rocm
from flash_rocm.problem import AttentionInputs
from flash_rocm.testing import Case, assert_attention_close, make_inputs, make_problem
from flash_rocm.virtual_device import Request

# --------------------------------------------------------------------------------------------------
# Dispatch


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_modes_see_the_operators(kind: str, device: str) -> None:
    call = make_call(kind, device, dropout_p=0.2, return_attn_probs=True)
    torch.manual_seed(5)
    expected = call.run(*call.leaves)
    torch.manual_seed(5)
    with SeenOperators() as mode:
        actual = call.run(*call.leaves)
        grads = send_back(actual[:2], call.leaves)
    ours = [operator for operator in mode.seen if operator.namespace == "flash_rocm"]
    assert ours == [
        OPERATORS.attention_forward.default,
        OPERATORS.attention_probs.default,
        OPERATORS.attention_backward.default,
    ]
    assert_equal(actual, expected)
    assert_equal(grads, send_back(expected[:2], call.leaves))


def test_flop_counter_can_count(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    call = make_call("dense", device)

    def count(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
        batch, seqlen_q, nheads, headdim = q_shape
        return 4 * batch * nheads * seqlen_q * k_shape[1] * headdim

    with FlopCounterMode(display=False, custom_mapping={OPERATORS.attention_forward: count}) as counter:
        call.run(*call.leaves)
    assert counter.get_total_flops() == 4 * BATCH * HEADS * SEQLEN_Q * SEQLEN_K * DIM


@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
def test_make_fx(mode: str, device: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    call = make_call("dense", device, causal=True)

    def step(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = tuple(x.detach().requires_grad_() for x in leaves)
        out = call.run(*leaves)
        return (out, *torch.autograd.grad(out.sum(), leaves))

    graph = make_fx(step, tracing_mode=mode)(*call.leaves)
    targets = {node.target for node in graph.graph.nodes}
    assert {OPERATORS.attention_forward.default, OPERATORS.attention_backward.default} <= targets
    other = make_call("dense", device, seed=1, causal=True)
    for x, y in zip(graph(*other.leaves), step(*other.leaves), strict=True):
        assert_equal(x.detach(), y.detach())


class Wrapped(torch.Tensor):
    """A tensor subclass that holds another tensor and notes the operators it meets."""

    seen: list[Any] = []

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            requires_grad=requires_grad,
        )  # type: ignore[return-value]

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(operator)
        unwrap = functools.partial(torch.utils._pytree.tree_map_only, Wrapped, lambda x: x.inner)
        result = operator(*unwrap(args), **unwrap(kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, Wrapped, result)


@pytest.mark.parametrize("wrapped", [(0, 1, 2), (0,), (1,), (2,)], ids=str)
def test_tensor_subclasses_go_through_the_dispatcher(wrapped: tuple[int, ...], device: str) -> None:
    call = make_call("dense", device, causal=True)
    leaves = tuple(Wrapped(x.detach(), requires_grad=True) if i in wrapped else x for i, x in enumerate(call.leaves))
    Wrapped.seen.clear()
    out = call.run(*leaves)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert isinstance(out, Wrapped)
    assert OPERATORS.attention_forward.default in Wrapped.seen
    assert OPERATORS.attention_backward.default in Wrapped.seen
    expected = call.run(*call.leaves)
    assert_equal(out.inner, expected.detach())
    inner = tuple(x.inner if isinstance(x, Wrapped) else x for x in grads)
    assert_equal(inner, torch.autograd.grad(expected.sum(), call.leaves))


def test_sinks_of_a_subclass_go_through_the_dispatcher(device: str) -> None:
    """Though q, k and v are plain."""
    q, k, v = (x.detach() for x in make_call("dense", device).leaves)
    sink = torch.randn(q.shape[2], device=device)
    Wrapped.seen.clear()
    out = flash_rocm.v3.flash_attn_func(q, k, v, learnable_sink=Wrapped(sink))
    assert isinstance(out, Wrapped) and OPERATORS.attention_forward.default in Wrapped.seen
    assert_equal(out.inner, flash_rocm.v3.flash_attn_func(q, k, v, learnable_sink=sink))


def test_plain_subclasses_keep_their_type(device: str) -> None:
    class Named(torch.Tensor):
        pass

    q, k, v = (x.detach() for x in make_call("dense", device).leaves)
    out = flash_rocm.flash_attn_func(q.as_subclass(Named), k, v)
    assert type(out) is Named
    assert_equal(out.as_subclass(torch.Tensor), flash_rocm.flash_attn_func(q, k, v))
    parameter = torch.nn.Parameter(q)
    assert type(flash_rocm.flash_attn_func(parameter, k, v)) is torch.Tensor


# --------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_mask_follows_the_seed(kind: str, received: list[Received], device: str) -> None:
    call = make_call(kind, device, dropout_p=0.35, return_attn_probs=True)
    torch.manual_seed(1)
    first, second = call.run(*call.leaves), call.run(*call.leaves)
    assert not torch.equal(first[2] < 0, second[2] < 0)
    torch.manual_seed(1)
    assert_equal(call.run(*call.leaves), first)
    torch.manual_seed(2)
    assert not torch.equal(call.run(*call.leaves)[2] < 0, first[2] < 0)
    received.clear()
    result = call.run(*call.leaves)
    if kind == "dense":
        assert_close(received[0], result, send_back(result, call.leaves))
    dropped, kept = (result[2] < 0).sum().item(), (result[2] > 0).sum().item()
    n = dropped + kept
    assert abs(dropped / n - 0.35) < 5.0 * math.sqrt(0.35 * 0.65 / n)


def test_dropout_state_of_the_raw_operator(device: str) -> None:
    """The mask is a function of (seed, offset) and nothing else."""
    problem = make_problem(dtype=dtype_on(device), device_type=device, dropout_p=0.5)
    inputs, scalars = make_inputs(problem).inputs, scalars_of(problem, "")

    def run(*state: int) -> tuple[torch.Tensor, ...]:
        arguments = (*inputs._replace(rng_state=torch.tensor(state, device=device)).tensors, *scalars)
        out, lse = OPERATORS.attention_forward(*arguments)
        return out, lse, OPERATORS.attention_probs(lse, *arguments)

    expected = run(7, 3)
    torch.rand(5, device=device)
    assert_equal(run(7, 3), expected)
    for other in ((8, 3), (7, 4), (7 + (1 << 32), 3)):
        out, lse, probs = run(*other)
        assert not torch.equal(probs < 0, expected[2] < 0), other
        assert_equal(lse, expected[1])
        assert_equal(probs.abs(), expected[2].abs())


def generator_state(device: str) -> torch.Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()


def test_generator_is_left_alone_without_dropout(device: str) -> None:
    call = make_call("dense", device)
    other = make_call("dense", device, dropout_p=0.1)
    before = generator_state(device)
    send_back(call.run(*call.leaves), call.leaves)
    assert torch.equal(generator_state(device), before)
    out = other.run(*other.leaves)
    after = generator_state(device)
    assert not torch.equal(after, before)
    send_back(out, other.leaves)
    assert torch.equal(generator_state(device), after)


# --------------------------------------------------------------------------------------------------
# GPU only: graphs, synchronisation, compilation, streams


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one step, warmed up on a side stream as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.gpu
class TestGraphCapture:
    @pytest.mark.parametrize("kind", ("dense", "varlen"))
    def test_dropout_is_drawn_anew_at_each_replay(self, kind: str, received: list[Received]) -> None:
        call = make_call(kind, "cuda", dropout_p=0.3, causal=True, return_attn_probs=True)
        generator = torch.Generator().manual_seed(99)
        sizes = [(x.shape, x.dtype) for x in call.run(*call.leaves)[:2]]
        dout, dlse = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape, dtype in sizes)

        def step() -> tuple[torch.Tensor, ...]:
            out, lse, probs = call.run(*call.leaves)
            # Rows without keys have lse -inf; what they send back is dropped, as in the oracle.
            sent = dlse.masked_fill(lse.detach().isinf(), 0.0)
            return out, lse, probs, *torch.autograd.grad((out, lse), call.leaves, (dout, sent))

        received.clear()
        graph, results = captured(step)
        (entry,) = (entry for entry in received[-3:] if entry.direction == "forward")
        seen = []
        for _ in range(3):
            graph.replay()
            out, lse, probs, *grads = (x.clone() for x in results)
            assert_close(entry, (out, lse, probs), tuple(grads))
            seen.append((out, probs < 0, int(entry.inputs.rng_state[0])))  # type: ignore[index]
        for a, b in ((0, 1), (1, 2), (0, 2)):
            assert not torch.equal(seen[a][0], seen[b][0])
            assert not torch.equal(seen[a][1], seen[b][1])
            assert seen[a][2] != seen[b][2]

    def test_new_contents_of_cu_seqlens(self, received: list[Received]) -> None:
        """Lengths are read on the GPU: one graph serves every batch that fits its buffers."""
        generator = torch.Generator().manual_seed(0)
        rows, longest = 160, 96
        q, k, v = (
            torch.randn(rows, heads, DIM, generator=generator).half().cuda().requires_grad_()
            for heads in (HEADS, HEADS_K, HEADS_K)
        )
        cu_seqlens = [starts("cuda", 30, 50, 20), starts("cuda", 60, 10, 5)]
        dout = torch.randn(rows, HEADS, DIM, generator=torch.Generator().manual_seed(99)).half().cuda()
        dlse = torch.zeros(HEADS, rows, device="cuda")

        def step() -> tuple[torch.Tensor, ...]:
            out, lse, _ = flash_rocm.flash_attn_varlen_func(
                q, k, v, *cu_seqlens, longest, longest, causal=True, return_attn_probs=True
            )
            return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

        graph, results = captured(step)
        entry = next(entry for entry in reversed(received) if entry.direction == "forward")
        for lengths_q, lengths_k in (((30, 50, 20), (60, 10, 5)), ((96, 0, 64), (1, 90, 69)), ((0, 0, 0), (5, 5, 5))):
            cu_seqlens[0].copy_(starts("cuda", *lengths_q))
            cu_seqlens[1].copy_(starts("cuda", *lengths_k))
            graph.replay()
            out, lse, *grads = (x.clone() for x in results)
            inputs = AttentionInputs(*(None if x is None else x.detach() for x in entry.inputs.tensors))
            assert_attention_close(entry.problem, Case(inputs, dout, dlse), out, lse, grads)


@pytest.mark.gpu
@pytest.mark.parametrize("probs", (False, True))
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_gpu(kind: str, dropout_p: float, probs: bool) -> None:
    call = make_call(kind, "cuda", dropout_p=dropout_p, causal=True, return_attn_probs=probs)
    slopes = torch.rand(HEADS, device="cuda")

    def step() -> None:
        out = call.run(*call.leaves, alibi_slopes=slopes)
        out = out[0] if probs else out
        out.sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", ("dense", "varlen"))
def test_new_numbers_compile_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths (1 among them), batch, head counts, window widths and scale are run-time values."""
    import triton

    compiled: list[str] = []
    rng = random.Random(0)

    def note(**facts: Any) -> None:
        compiled.append(facts["fn"].name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)

    def step(batch: int, length_q: int, length_k: int, heads_k: int, window: tuple[int, int], scale: float) -> None:
        options: dict[str, Any] = dict(window_size=window, softmax_scale=scale, dropout_p=rng.uniform(0.05, 0.5))
        rows = ((batch, length_q), (batch, length_k)) if kind == "dense" else ((batch * length_q,), (batch * length_k,))
        q = torch.randn(*rows[0], 2 * heads_k, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        k, v = (torch.randn(*rows[1], heads_k, 64, device="cuda", dtype=torch.float16) for _ in range(2))
        if kind == "dense":
            out = flash_rocm.flash_attn_func(q, k.requires_grad_(), v, **options)
        else:
            lengths = (starts("cuda", *([length_q] * batch)), starts("cuda", *([length_k] * batch)))
            out = flash_rocm.flash_attn_varlen_func(q, k, v, *lengths, length_q, length_k, **options)
        out.backward(torch.ones_like(out))

    step(2, 100, 130, 2, (20, 30), 0.1)
    first = list(compiled)
    for number in range(200):
        lengths = [rng.choice((1, 2, 15, 16, 17, 64, 128, rng.randint(1, 700))) for _ in range(2)]
        if number < 4:
            lengths = [(1, 1), (1, 300), (300, 1), (16, 16)][number]  # type: ignore[assignment]
        window = (rng.randint(0, 400), rng.randint(0, 400))
        step(rng.randint(1, 5), *lengths, rng.randint(1, 4), window, rng.uniform(0.01, 2.0))
    assert compiled == first
    assert len(set(compiled)) <= 3  # forward, dQ, dK and dV: none, where another test has compiled them


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal(kind: str, deterministic: bool) -> None:
    call = make_call(kind, "cuda", dropout_p=0.2, deterministic=deterministic, return_attn_probs=True)

    def step() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        results = call.run(*call.leaves)
        return (*results, *send_back(results, call.leaves))

    expected = step()
    for _ in range(20):
        assert_equal(step(), expected)


def test_deterministic_is_part_of_the_problem(received: list[Received], device: str) -> None:
    """Bit-equal reruns, and back ends are told."""
    for deterministic in (False, True):
        call = make_call("dense", device, deterministic=deterministic)
        first = send_back(call.run(*call.leaves), call.leaves)
        assert_equal(send_back(call.run(*call.leaves), call.leaves), first)
        assert {entry.problem.deterministic for entry in received[-4:]} == {deterministic}


@pytest.mark.gpu
class TestStreams:
    def test_launches_on_the_current_stream(self) -> None:
        """Inputs arrive late on a side stream: a launch on any other stream would read what was there before."""
        call = make_call("dense", "cuda", causal=True)
        expected = call.run(*call.leaves)
        expected_grads = send_back(expected, call.leaves, retain_graph=True)
        late = tuple(torch.zeros_like(x).requires_grad_() for x in call.leaves)
        call.run(*late)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            with torch.no_grad():
                for x, y in zip(late, call.leaves, strict=True):
                    x.copy_(y)
            actual = call.run(*late)
            grads = send_back(actual, late)
        stream.synchronize()
        assert_equal(actual, expected)
        assert_equal(grads, expected_grads)

    def test_tensors_elsewhere_than_the_current_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("one GPU only")
        expected_call, call = make_call("dense", "cuda:0"), make_call("dense", "cuda:1")
        expected = expected_call.run(*expected_call.leaves)
        expected_grads = send_back(expected, expected_call.leaves)
        with torch.cuda.device(0):
            for _ in range(2):  # compiled, then known
                out = call.run(*call.leaves)
                grads = send_back(out, call.leaves)
                assert torch.cuda.current_device() == 0
                assert out.device == torch.device("cuda:1")
                assert_equal(out.cpu(), expected.cpu())
                assert_equal(tuple(x.cpu() for x in grads), tuple(x.cpu() for x in expected_grads))


@pytest.mark.parametrize("request_", [Request("auto"), Request("triton", "gfx942")], ids=str)
def test_a_request_survives_the_schema(request_: Request) -> None:
    """Operators take it as a string."""
    assert Request.parse(str(request_)) == request_
