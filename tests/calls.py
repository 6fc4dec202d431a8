"""Calls, and back ends that record them, for the tests of the operators inside PyTorch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

import flash_rocm
from flash_rocm import backends, ops
from flash_rocm.problem import FEATURES, AttentionInputs, AttentionProblem
from flash_rocm.protocols import Backend
from flash_rocm.testing import Case, assert_attention_close

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

    def __init__(self, name: str, real: Backend, log: list[Received]) -> None:
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
    case = Case(AttentionInputs(*(None if x is None else x.detach() for x in entry.inputs.tensors)), dout, dlse)
    assert_attention_close(entry.problem, case, out, lse, grads, use_dlse=True, probs=probs)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def best_compiler() -> str:
    """Inductor where a compiler for its code is there."""
    return "inductor" if HAS_COMPILER else "aot_eager"


class SeenOperators(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers what passes through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(operator)
        return operator(*args, **(kwargs or {}))
