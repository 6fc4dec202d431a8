"""Who computes: every attention function that may be installed, behind one small interface."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_rocm
from flash_rocm import backends, runtime, virtual_device
from flash_rocm.bench.prepared import Attention, Prepared
from flash_rocm.bench.shapes import Data, Shape
from flash_rocm.timing import describe_error

#: Bytes that the score buffers of standard attention may take on the CPU.
_CPU_SCORE_BYTES = 4 << 30


class Peer:
    """One attention function.

    ``layout`` is how it takes its tensors: "bshd" (batch, seqlen, nheads, headdim), or "bhsd", given
    as transposed views of the same memory, without copies.  ``default``: measured unless ``--peers``
    names others.
    """

    def __init__(self, name: str, layout: str = "bshd", default: bool = True) -> None:
        self.name, self.layout, self.default = name, layout, default

    def available_reason(self, device: torch.device) -> str | None:
        """Why it cannot run on this device at all; None if it can."""
        return None

    def shape_reason(self, shape: Shape, device: torch.device, training: bool) -> str | None:
        """Why it is not run on this shape; None if it is."""
        return None

    def session(self) -> AbstractContextManager[object]:
        """Entered once around a row of calls."""
        return contextlib.nullcontext()

    def attention(self, shape: Shape, device: torch.device) -> Attention:
        """The function (q, k, v) -> out, in its layout."""
        raise NotImplementedError(self.name)

    def note(self, shape: Shape, device: torch.device) -> str:
        """What else a reader of the result should know."""
        return ""

    def prepare(self, shape: Shape, data: Data) -> Prepared:
        """Callables for the forward, the backward and both."""
        return Prepared(self.attention(shape, data.q.device), data, self.layout, self.session)


class FlashRocm(Peer):
    """This library: as requested by the environment, or one back end of it."""

    def __init__(self, backend: str | None = None) -> None:
        super().__init__("flash_rocm" if backend is None else f"flash_rocm-{backend}", default=backend != "reference")
        self.backend = backend

    def session(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self.backend is None else flash_rocm.use_backend(self.backend)

    def available_reason(self, device: torch.device) -> str | None:
        if self.backend is None:
            return None
        return "; ".join(backends.availability_reasons(self.backend, virtual_device.arch_of(device))) or None

    def explanation(self, shape: Shape, device: torch.device, training: bool) -> backends.Explanation:
        q = torch.empty(
            (shape.batch, shape.seqlen, shape.nheads, shape.headdim),
            dtype=shape.torch_dtype,
            device="meta",
            requires_grad=training,
        )
        with self.session():
            return flash_rocm.explain(q, q, q, causal=shape.causal, arch=virtual_device.arch_of(device))

    def shape_reason(self, shape: Shape, device: torch.device, training: bool) -> str | None:
        answer = self.explanation(shape, device, training)
        if answer.backend is not None:
            return None
        return "; ".join(f"{name}: {reason}" for name, reasons in answer.reasons.items() for reason in reasons)

    def note(self, shape: Shape, device: torch.device) -> str:
        return f"back end {self.explanation(shape, device, True).backend}"

    def attention(self, shape: Shape, device: torch.device) -> Attention:
        function: Callable[..., Any] = flash_rocm.flash_attn_func
        causal = shape.causal
        return lambda q, k, v: function(q, k, v, causal=causal)


class TorchSdpa(Peer):
    """torch.nn.functional.scaled_dot_product_attention held to one of its back ends."""

    def __init__(self, name: str, backend: SDPBackend, on_cpu: bool) -> None:
        super().__init__(name, layout="bhsd")
        self.backend, self.on_cpu = backend, on_cpu

    def available_reason(self, device: torch.device) -> str | None:
        if device.type == "cpu" and not self.on_cpu:
            return "needs a GPU"
        if self.backend == SDPBackend.CUDNN_ATTENTION and torch.version.hip:
            return "cuDNN is for NVIDIA GPUs"
        return None

    def session(self) -> AbstractContextManager[object]:
        return sdpa_kernel(self.backend)

    def attention(self, shape: Shape, device: torch.device) -> Attention:
        function, causal = F.scaled_dot_product_attention, shape.causal
        return lambda q, k, v: function(q, k, v, is_causal=causal)


class StandardAttention(TorchSdpa):
    """Standard attention, which stores the scores: PyTorch's MATH back end.

    By default PyTorch computes it in float32 for fp16 and bf16 inputs; ``reduced`` lets it stay in
    their dtype, which takes less memory and time.
    """

    def __init__(self, name: str, reduced: bool) -> None:
        super().__init__(name, SDPBackend.MATH, on_cpu=True)
        self.reduced, self.default = reduced, not reduced

    @contextlib.contextmanager
    def session(self) -> Any:
        before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(self.reduced)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)

    def shape_reason(self, shape: Shape, device: torch.device, training: bool) -> str | None:
        # Scores and softmax, plus a masked copy; training keeps the softmax and adds two gradients
        # of that size and their casts.
        item = shape.torch_dtype.itemsize if self.reduced else max(4, shape.torch_dtype.itemsize)
        needed = shape.score_count() * item * (6 if training else 3)
        free = free_bytes(device)
        if needed <= 0.9 * free:
            return None
        return f"its score matrices need about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


class FlexAttention(Peer):
    """torch.compile'd flex_attention with a causal block mask."""

    def __init__(self) -> None:
        super().__init__("flex", layout="bhsd")

    def available_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "needs a GPU (its backward does)"

    def session(self) -> AbstractContextManager[object]:
        # The backward is timed again and again on one graph; donated buffers would forbid that.
        config = importlib.import_module("torch._functorch.config")
        return config.patch(donated_buffer=False)

    def attention(self, shape: Shape, device: torch.device) -> Attention:
        flex = importlib.import_module("torch.nn.attention.flex_attention")
        # Each shape is compiled for itself, as it is fastest; without this the count of compilations
        # of one function would hit torch's limit, and the rest of them run uncompiled.
        torch.compiler.reset()
        function = torch.compile(flex.flex_attention, dynamic=False)
        if not shape.causal:
            return lambda q, k, v: function(q, k, v)
        mask = flex.create_block_mask(_causal, None, None, shape.seqlen, shape.seqlen, device=device)
        return lambda q, k, v: function(q, k, v, block_mask=mask)


def _causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


class FlashAttention(Peer):
    """A release of Dao-AILab's flash-attn, if importable.  Some return (out, lse), some out."""

    def __init__(self, name: str, module: str) -> None:
        super().__init__(name)
        self.module = module

    def available_reason(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "needs a GPU"
        try:
            function = self._function()
        except Exception as error:  # noqa: BLE001 - a broken build raises anything; the reason is shown
            return f"cannot import {self.module}: {describe_error(error)}"
        if function.__module__.startswith("flash_rocm"):
            return f"{self.module} is flash_rocm itself"
        return None

    def _function(self) -> Callable[..., Any]:
        return importlib.import_module(self.module).flash_attn_func

    def attention(self, shape: Shape, device: torch.device) -> Attention:
        function, causal = self._function(), shape.causal

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            result = function(q, k, v, causal=causal)
            return result[0] if isinstance(result, tuple) else result

        return call


def free_bytes(device: torch.device) -> int:
    """Memory still to be had on a GPU, with what torch holds but does not use."""
    if device.type != "cuda":
        return _CPU_SCORE_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


#: Name of the peer whose speed is compared with all others.
SUBJECT = "flash_rocm"
#: The peer of the headline ratio.
BASELINE = "sdpa-flash"
STANDARD = ("sdpa-math", "sdpa-math-lowp")


def all_peers() -> dict[str, Peer]:
    """Every peer that this command knows, available or not."""
    peers: tuple[Peer, ...] = (
        FlashRocm(),
        *(FlashRocm(name) for name in runtime.BACKEND_NAMES),
        StandardAttention("sdpa-math", reduced=False),
        StandardAttention("sdpa-math-lowp", reduced=True),
        TorchSdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, on_cpu=True),
        TorchSdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, on_cpu=False),
        TorchSdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, on_cpu=False),
        FlexAttention(),
        FlashAttention("flash-attn-2", "flash_attn"),
        FlashAttention("flash-attn-3", "flash_attn_interface"),
        FlashAttention("flash-attn-4", "flash_attn.cute"),
    )
    return {peer.name: peer for peer in peers}


def choose(
    names: tuple[str, ...] | None, device: torch.device, example: Shape, training: bool
) -> tuple[list[Peer], dict[str, str]]:
    """Peers to measure, and for every other one why not.

    Args:
        names: those asked for; None takes every available default, and no back end of flash_rocm twice.
    """
    chosen, refused = [], {}
    known = all_peers()
    subject = known[SUBJECT]
    current = subject.explanation(example, device, training).backend if isinstance(subject, FlashRocm) else None
    for name, peer in known.items():
        reason = peer.available_reason(device)
        if names is not None and name not in names:
            continue
        if names is None and isinstance(peer, FlashRocm) and peer.backend is not None and peer.backend == current:
            reason = f"is what {SUBJECT} runs here"
        elif names is None and not peer.default:
            reason = "not measured unless named by --peers"
        if reason is None:
            chosen.append(peer)
        else:
            refused[name] = reason
    return chosen, refused
