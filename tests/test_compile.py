"""The operators themselves, and under torch.compile.

Every test runs on the CPU (reference back end) and, marked ``gpu``, on a GPU (Triton).  Results are
compared with plain eager calls, bit for bit where nothing but the way to the kernel differs, or with
the float64 oracle through the inputs that the back end received.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import (
    DEFAULT_BACKEND,
    DIM,
    HEADS,
    HEADS_K,
    KINDS,
    OPERATORS,
    Received,
    assert_close,
    assert_equal,
    best_compiler,
    directions,
    dtype_on,
    make_call,
    send_back,
    starts,
)
from matrix import leaves_of, scalars_of, with_leaves

import flash_rocm
from flash_rocm import backends
from flash_rocm.testing import make_inputs, make_problem

# --------------------------------------------------------------------------------------------------
# Operators

OPCHECK_PROBLEMS: dict[str, dict[str, Any]] = {
    "dense": dict(window_right=0),
    "gqa": dict(nheads=HEADS, nheads_k=HEADS_K, headdim_v=24, softcap=5.0),
    "varlen": dict(varlen=True, window_left=7),
    "dropout": dict(dropout_p=0.3),
    "alibi": dict(alibi=True, varlen=True),
    "sinks": dict(sinks=True, window_right=0),
    "sinks varlen": dict(sinks=True, varlen=True),
    "sinks without keys": dict(sinks=True, seqlen_k=0),
    "empty": dict(seqlen_q=0),
}


def operator_arguments(name: str, device: str, requires_grad: bool) -> tuple[Any, ...]:
    fields = dict(dtype=dtype_on(device), device_type=device, seqlen_q=17, seqlen_k=23, needs_grad=True)
    problem = make_problem(**{**fields, **OPCHECK_PROBLEMS[name]})
    inputs = make_inputs(problem).inputs
    return (*with_leaves(inputs, leaves_of(inputs, requires_grad)), *scalars_of(problem, ""))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", OPCHECK_PROBLEMS)
class TestOpcheck:
    """torch.library.opcheck: schema, autograd registration, fakes, AOT dispatch with dynamic shapes."""

    def test_forward(self, name: str, device: str) -> None:
        torch.library.opcheck(OPERATORS.attention_forward.default, operator_arguments(name, device, True))

    def test_backward(self, name: str, device: str) -> None:
        arguments = operator_arguments(name, device, False)
        out, lse = OPERATORS.attention_forward(*arguments)
        for dlse in (None, torch.randn_like(lse)):
            gradients = (torch.randn_like(out), dlse, out, lse)
            torch.library.opcheck(OPERATORS.attention_backward.default, (*gradients, *arguments))

    def test_probs(self, name: str, device: str) -> None:
        arguments = operator_arguments(name, device, False)
        lse = OPERATORS.attention_forward(*arguments)[1]
        torch.library.opcheck(OPERATORS.attention_probs.default, (lse, *arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
def test_fakes_agree_with_what_runs(kind: str, dropout_p: float, device: str) -> None:
    """Shapes, dtypes and strides under FakeTensorMode, forward and backward, are the real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def metadata(run: Callable[..., Any], leaves: tuple[torch.Tensor, ...]) -> list[Any]:
        results = run(*leaves)
        results = (*results, *torch.autograd.grad(results[0].sum() + results[1].sum(), leaves))
        return [(tuple(x.shape), x.dtype, x.stride(), x.device.type) for x in results]

    call = make_call(kind, device, dropout_p=dropout_p, causal=True, return_attn_probs=True)
    real = metadata(call.run, call.leaves)
    with FakeTensorMode() as mode:
        leaves = tuple(mode.from_tensor(x) for x in call.leaves)
        tensors = {n: mode.from_tensor(x) for n, x in call.run.keywords.items() if isinstance(x, torch.Tensor)}  # type: ignore[attr-defined]
        run = functools.partial(call.run, **tensors)
        assert metadata(run, leaves) == real


def test_meta_tensors(received: list[Received]) -> None:
    """Shapes without data; no back end runs."""
    call = make_call("dense", "cpu", causal=True)
    leaves = tuple(x.detach().to("meta").requires_grad_() for x in call.leaves)
    out = call.run(*leaves)
    assert out.is_meta and out.shape == leaves[0].shape
    assert [x.shape for x in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]
    assert not received


# --------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    @pytest.mark.parametrize("probs", (False, True), ids=("out", "probs"))
    @pytest.mark.parametrize("kind", KINDS)
    def test_forward_and_backward_equal_eager(self, kind: str, probs: bool, device: str) -> None:
        call = make_call(kind, device, causal=True, softcap=3.0, return_attn_probs=probs)
        compiled = torch.compile(call.run, fullgraph=True, backend=best_compiler())
        expected, actual = call.run(*call.leaves), compiled(*call.leaves)
        assert_equal(actual, expected)
        assert_equal(send_back(actual, call.leaves), send_back(expected, call.leaves))
        with torch.no_grad():
            assert_equal(compiled(*call.leaves), expected)

    @pytest.mark.parametrize("kind", ("dense", "varlen"))
    def test_dropout_equals_eager_where_the_generator_does(self, kind: str, device: str) -> None:
        call = make_call(kind, device, dropout_p=0.4, return_attn_probs=True)
        compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        expected = call.run(*call.leaves)
        torch.manual_seed(3)
        actual = compiled(*call.leaves)
        assert_equal(actual, expected)
        assert_equal(send_back(actual[:2], call.leaves), send_back(expected[:2], call.leaves))

    def test_dropout_of_inductor(self, received: list[Received], device: str) -> None:
        """Inductor draws other numbers; backward and S_dmask still have the forward's, and calls differ."""
        call = make_call("dense", device, dropout_p=0.4, return_attn_probs=True)
        compiled = torch.compile(call.run, fullgraph=True, backend=best_compiler())
        torch.manual_seed(3)
        results = [compiled(*call.leaves) for _ in range(2)]
        assert not torch.equal(results[0][2], results[1][2])
        torch.manual_seed(3)
        assert_equal(compiled(*call.leaves), results[0])
        received.clear()
        result = compiled(*call.leaves)
        grads = send_back(result[:2], call.leaves)
        default = DEFAULT_BACKEND[device]
        assert directions(received) == [(default, "forward"), (default, "probs"), (default, "backward")]
        states = [entry.inputs.rng_state for entry in received]
        assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
        assert_close(received[0], result, grads)

    @pytest.mark.parametrize("dynamic", (None, True))
    @pytest.mark.parametrize("kind", ("dense", "varlen"))
    def test_new_lengths_do_not_recompile(self, kind: str, dynamic: bool | None, device: str) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
        def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return flash_rocm.flash_attn_func(q, k, v, causal=True)

        @torch.compile(fullgraph=True, dynamic=dynamic, backend=counter)
        def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
            return flash_rocm.flash_attn_varlen_func(q, k, v, *rest, causal=True)

        counts = []
        # Sizes that are equal in the first call would be taken for one, so no count of heads is a batch.
        for batch, length_q, length_k in ((2, 17, 33), (4, 40, 53), (5, 64, 64), (2, 50, 9), (6, 7, 120), (7, 121, 8)):
            if kind == "dense":
                q, k, v = (torch.randn(batch, n, 11, 16, device=device) for n in (length_q, length_k, length_k))
                arguments: tuple[Any, ...] = (q.requires_grad_(), k.requires_grad_(), v)
                function, plain = dense, flash_rocm.flash_attn_func
            else:
                q, k, v = (torch.randn(batch * n, 11, 16, device=device) for n in (length_q, length_k, length_k))
                lengths = (starts(device, *([length_q] * batch)), starts(device, *([length_k] * batch)))
                arguments = (q.requires_grad_(), k.requires_grad_(), v, *lengths, length_q, length_k)
                function, plain = varlen, flash_rocm.flash_attn_varlen_func
            expected, actual = plain(*arguments, causal=True), function(*arguments)
            assert_equal(actual, expected)
            assert_equal(send_back(actual, (q, k)), send_back(expected, (q, k)))
            counts.append(counter.frame_count)
        assert counts[1] <= 2
        assert counts[-1] == counts[1]

    def test_environment_is_read_when_the_graph_runs(
        self, received: list[Received], monkeypatch: pytest.MonkeyPatch, device: str
    ) -> None:
        from torch._dynamo.testing import CompileCounterWithBackend

        call, counter = make_call("dense", device), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call.run, fullgraph=True, backend=counter)
        for name in (DEFAULT_BACKEND[device], "ck", "reference"):
            received.clear()
            if name != DEFAULT_BACKEND[device]:
                monkeypatch.setenv("FLASH_ROCM_BACKEND", name)
            send_back(compiled(*call.leaves), call.leaves)
            assert directions(received) == [(name, "forward"), (name, "backward")]
            monkeypatch.delenv("FLASH_ROCM_BACKEND", raising=False)
        assert counter.frame_count == 1
        monkeypatch.setenv("FLASH_ROCM_BACKEND", "none of these")
        with pytest.raises(ValueError, match="FLASH_ROCM_BACKEND: expected one of"):
            compiled(*call.leaves)

    def test_use_backend_around_a_compiled_call(self, received: list[Received], device: str) -> None:
        call, default = make_call("dense", device), DEFAULT_BACKEND[device]
        compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
        for name in ("ck", None, "ck", "reference", None):
            received.clear()
            with flash_rocm.use_backend(name) if name else contextlib.nullcontext():
                out = compiled(*call.leaves)
            send_back(out, call.leaves)  # outside, and still by the same back end
            assert directions(received) == [(name or default, "forward"), (name or default, "backward")]

    def test_explicit_back_end_that_cannot_run(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        call = make_call("dense", device)
        compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
        with pytest.raises(backends.BackendError, match="requested ck"), flash_rocm.use_backend("ck"):
            compiled(*call.leaves)
        compiled(*call.leaves)
        monkeypatch.setenv("FLASH_ROCM_BACKEND", "ck")
        with pytest.raises(backends.BackendError, match="requested ck"):
            compiled(*call.leaves)

    def test_wrong_arguments_are_named(self, device: str) -> None:
        q = torch.randn(1, 8, 3, 16, device=device)
        compiled = torch.compile(flash_rocm.flash_attn_func, backend="aot_eager")
        with pytest.raises(Exception, match="a head count that divides q's 3"):
            compiled(q, q[:, :, :2], q[:, :, :2])

    def test_autocast(self, device: str) -> None:
        call = make_call("dense", device, torch.float32)
        compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
        with torch.autocast(device):
            expected, actual = call.run(*call.leaves), compiled(*call.leaves)
        assert actual.dtype == torch.get_autocast_dtype(device)
        assert_equal(actual, expected)
        assert_equal(send_back(actual, call.leaves), send_back(expected, call.leaves))

    def test_surroundings(self, device: str) -> None:
        """Inductor code around the operator (projection, reshapes, residual): twice the error of eager at most."""
        call = make_call("qkvpacked", device, torch.float32, causal=True)
        torch.manual_seed(0)
        project = torch.nn.Linear(DIM, DIM, device=device)

        def block(qkv: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            out = call.run(torch.nn.functional.linear(qkv, weight, bias).tanh())
            return (out * 2.0 + qkv[:, :, 0]).flatten(2)

        def results(function: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = function(*leaves)
            return (out, *send_back(out, leaves[:1]))

        leaves = (*call.leaves, *project.parameters())
        with flash_rocm.use_backend("reference"):
            exact = results(block, *(x.detach().double().requires_grad_() for x in leaves))
        plain = results(block, *leaves)
        actual = results(torch.compile(block, fullgraph=True, backend=best_compiler()), *leaves)
        for x, y, z in zip(actual, plain, exact, strict=True):
            one_rounding = torch.finfo(torch.float32).eps / 2 * z.abs().max()
            assert (x - z).abs().max() <= 2.0 * (y - z).abs().max() + one_rounding

    def test_export(self, device: str) -> None:
        call = make_call("varlen", device, causal=True)

        class Model(torch.nn.Module):
            def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return call.run(q, k, v)

        leaves = tuple(x.detach() for x in call.leaves)
        program = torch.export.export(Model(), leaves)
        assert OPERATORS.attention_forward.default in {node.target for node in program.graph.nodes}
        assert_equal(program.module()(*leaves), call.run(*leaves))

    @pytest.mark.gpu
    def test_reduce_overhead(self) -> None:
        """CUDA graphs made by inductor."""
        call = make_call("dense", "cuda", causal=True)
        compiled = torch.compile(call.run, fullgraph=True, mode="reduce-overhead")
        expected = call.run(*call.leaves)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            actual = compiled(*call.leaves)
            assert_equal(actual.clone(), expected)
            grads = tuple(x.clone() for x in send_back(actual, call.leaves))
            assert_equal(grads, send_back(expected, call.leaves, retain_graph=True))


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_autograd_sees_the_operator(device: str) -> None:
    """A backward that is traced while it runs stays one graph with one operator in it."""
    call = make_call("dense", device, causal=True)
    out = call.run(*call.leaves)
    expected = torch.autograd.grad(out.sum(), call.leaves, retain_graph=True)
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=record)):
        out.sum().backward()
    assert len(graphs) == 1
    assert [n.target for n in graphs[0].graph.nodes].count(OPERATORS.attention_backward.default) == 1
    assert_equal(tuple(x.grad for x in call.leaves), expected)
