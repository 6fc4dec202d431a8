"""The operators inside PyTorch: compile, autograd, checkpointing, autocast, transforms, tracing, graphs, streams.

Every test runs on the CPU (reference back end) and, marked ``gpu``, on a GPU (Triton).  Results are
compared with plain eager calls, bit for bit where nothing but the way to the kernel differs, or with
the float64 oracle through the inputs that the back end received.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from matrix import scalars_of
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_rocm
from flash_rocm import backends, ops
from flash_rocm.problem import FEATURES, AttentionInputs, AttentionProblem
from flash_rocm.testing import Case, assert_attention_close, make_inputs, make_problem

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
DEFAULT_BACKEND = {"cpu": "reference", "cuda": "triton"}
OPERATORS = torch.ops.flash_rocm
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
BATCH, HEADS, HEADS_K, DIM = 2, 4, 2, 16
LENGTHS_Q, LENGTHS_K = (37, 12), (25, 40)  # of the varlen sequences
SEQLEN_Q, SEQLEN_K = 37, 53  # of dense calls


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def dtype_on(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.float16


def starts(device: str, *lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


class Call(NamedTuple):
    """A public function with all arguments but the differentiable ones bound, and those."""

    run: Callable[..., Any]
    leaves: tuple[torch.Tensor, ...]


KINDS = ("dense", "kvpacked", "qkvpacked", "varlen", "varlen_kvpacked", "varlen_qkvpacked")


def make_call(kind: str, device: str, dtype: torch.dtype | None = None, seed: int = 0, **options: Any) -> Call:
    """A call of one of the public functions with random leaves."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        x = torch.randn(*shape, generator=generator).to(device, dtype or dtype_on(device))
        return x.requires_grad_()

    if kind.startswith("varlen"):
        rows_q, rows_k = (sum(LENGTHS_Q),), (sum(LENGTHS_K),)
    else:
        rows_q, rows_k = (BATCH, SEQLEN_Q), (BATCH, SEQLEN_K)
    leaves: tuple[torch.Tensor, ...]
    function = getattr(flash_rocm, "flash_attn_varlen_func" if kind == "varlen" else f"flash_attn_{kind}_func", None)
    if kind.endswith("qkvpacked"):
        leaves = (leaf(*rows_q, 3, HEADS, DIM),)
    elif kind.endswith("kvpacked"):
        leaves = (leaf(*rows_q, HEADS, DIM), leaf(*rows_k, 2, HEADS_K, DIM))
    else:
        function = function or flash_rocm.flash_attn_func
        leaves = (leaf(*rows_q, HEADS, DIM), leaf(*rows_k, HEADS_K, DIM), leaf(*rows_k, HEADS_K, DIM))
    if kind == "varlen_qkvpacked":
        options.update(cu_seqlens=starts(device, *LENGTHS_Q), max_seqlen=max(LENGTHS_Q))
    elif kind.startswith("varlen"):
        options.update(cu_seqlens_q=starts(device, *LENGTHS_Q), cu_seqlens_k=starts(device, *LENGTHS_K))
        options.update(max_seqlen_q=max(LENGTHS_Q), max_seqlen_k=max(LENGTHS_K))
    return Call(functools.partial(function, **options), leaves)


def send_back(results: Any, leaves: tuple[torch.Tensor, ...], **options: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of the leaves for fixed gradients of all differentiable results."""
    results = results if isinstance(results, tuple) else (results,)
    results = tuple(x for x in results if x.requires_grad)
    generator = torch.Generator().manual_seed(99)
    sent = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]
    sent = [x.masked_fill(y.detach().isinf(), 0.0) for x, y in zip(sent, results, strict=True)]
    return torch.autograd.grad(results, leaves, sent, **options)


def assert_equal(actual: Any, expected: Any) -> None:
    """Bit for bit, in shape, dtype and value, of one tensor or a tuple."""
    if not isinstance(expected, tuple):
        actual, expected = (actual,), (expected,)
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0)


class Received(NamedTuple):
    """What a back end was called with."""

    backend: str
    direction: str
    problem: AttentionProblem
    inputs: AttentionInputs


class _Recorder:
    """Stands for a back end, notes every call and passes it on."""

    def __init__(self, name: str, real: backends.Backend, log: list[Received]) -> None:
        self.name, self.real, self.log = name, real, log

    def __getattr__(self, direction: str) -> Any:
        function = getattr(self.real, direction)

        def call(problem: AttentionProblem, inputs: AttentionInputs, *args: Any) -> Any:
            self.log.append(Received(self.name, direction, problem, inputs))
            return function(problem, inputs, *args)

        return call


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Received]:
    """Calls that back ends get; "ck" is a working stand-in, the reference under another name."""
    log: list[Received] = []
    stand_in = backends.Capability("ck", "flash_rocm.reference", backends.REFERENCE.dtypes, 512, FEATURES)
    real_load, real_reasons = backends.load, backends._installation_reasons
    loaded: dict[str, _Recorder] = {}

    def load(name: str) -> _Recorder:
        if name not in loaded:
            loaded[name] = _Recorder(name, real_load("reference" if name == "ck" else name), log)
        return loaded[name]

    monkeypatch.setitem(backends.CAPABILITIES, "ck", stand_in)
    monkeypatch.setattr(backends, "_installation_reasons", lambda name: [] if name == "ck" else real_reasons(name))
    monkeypatch.setattr(backends, "_decide", backends._decide.__wrapped__)  # not what others have decided
    monkeypatch.setattr(backends, "load", load)
    monkeypatch.setattr(ops, "_decided", {})
    return log


def directions(log: list[Received]) -> list[tuple[str, str]]:
    return [(entry.backend, entry.direction) for entry in log]


def assert_close(
    entry: Received, results: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...] | None = None, seed: int = 99
) -> None:
    """Compare a call with the oracle; results are out and softmax_lse, grads those of :func:`send_back` or None."""
    out, lse = results[:2]
    generator = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    dlse = torch.randn(lse.shape, generator=generator).to(lse.device, lse.dtype).masked_fill(lse.isinf(), 0.0)
    probs = results[2] if len(results) > 2 and results[2].numel() else None
    case = Case(AttentionInputs(*(None if x is None else x.detach() for x in entry.inputs)), dout, dlse)
    assert_attention_close(entry.problem, case, out, lse, grads, use_dlse=True, probs=probs)


# --------------------------------------------------------------------------------------------------
# Operators

OPCHECK_PROBLEMS: dict[str, dict[str, Any]] = {
    "dense": dict(window_right=0),
    "gqa": dict(nheads=HEADS, nheads_k=HEADS_K, headdim_v=24, softcap=5.0),
    "varlen": dict(varlen=True, window_left=7),
    "dropout": dict(dropout_p=0.3),
    "alibi": dict(alibi=True, varlen=True),
    "empty": dict(seqlen_q=0),
}


def operator_arguments(name: str, device: str, requires_grad: bool) -> tuple[Any, ...]:
    fields = dict(dtype=dtype_on(device), device_type=device, seqlen_q=17, seqlen_k=23, needs_grad=True)
    problem = make_problem(**{**fields, **OPCHECK_PROBLEMS[name]})
    inputs = make_inputs(problem).inputs
    leaves = [x.detach().requires_grad_(requires_grad) for x in inputs[:3]]
    return (*leaves, *inputs[3:], *scalars_of(problem, ""))


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


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def best_compiler() -> str:
    """Inductor where a compiler for its code is there."""
    return "inductor" if HAS_COMPILER else "aot_eager"


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


# --------------------------------------------------------------------------------------------------
# Dispatch


class SeenOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers what passes through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(operator)
        return operator(*args, **(kwargs or {}))


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
        arguments = (*inputs[:6], torch.tensor(state, device=device), None, *scalars)
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
            inputs = AttentionInputs(*(None if x is None else x.detach() for x in entry.inputs))
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
