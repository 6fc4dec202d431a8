"""One peer on one shape: its tensors in its layout, and what is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from flash_rocm.bench.shapes import Data

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Prepared:
    """The timed callables of one peer.

    ``forward`` computes out without a graph, ``backward`` the three gradients of one kept graph,
    ``both`` a forward with a graph and its gradients, ``train_forward`` that forward alone.  Run
    them inside :meth:`session`.
    """

    def __init__(
        self, attention: Attention, data: Data, layout: str, session: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._attention, self._layout, self._session = attention, layout, session
        q, k, v, dout = (self._relayout(x) for x in data)
        self._inputs, self._dout = (q, k, v), dout
        self._leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        self._out: torch.Tensor | None = None

    def _relayout(self, x: torch.Tensor) -> torch.Tensor:
        """Between (batch, seqlen, nheads, headdim) and the peer's layout: its own inverse, no copy."""
        return x.transpose(1, 2) if self._layout == "bhsd" else x

    def call(self, direction: str) -> Callable[[], object]:
        """The callable of a direction."""
        return {"forward": self.forward, "backward": self.backward, "both": self.both}[direction]

    @contextlib.contextmanager
    def session(self, direction: str) -> Iterator[None]:
        """Everything that is set up once, not per call."""
        with self._session(), torch.set_grad_enabled(direction != "forward"):
            yield

    def forward(self) -> torch.Tensor:
        return self._attention(*self._inputs)

    def train_forward(self) -> torch.Tensor:
        return self._attention(*self._leaves)

    def backward(self) -> tuple[torch.Tensor, ...]:
        if self._out is None:
            self._out = self.train_forward()
        return torch.autograd.grad(self._out, self._leaves, self._dout, retain_graph=True)

    def both(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.train_forward(), self._leaves, self._dout)

    def release(self) -> None:
        """Drop the kept graph and what it saved."""
        self._out = None

    def results(self, training: bool) -> dict[str, torch.Tensor]:
        """Everything that is checked, as (batch, seqlen, nheads, headdim): out as the timed forward
        computes it, dq, dk, dv if training."""
        with self.session("forward"):
            results = {"out": self._relayout(self.forward())}
        if training:
            with self.session("backward"):
                gradients = self.both()
            results.update(zip(("dq", "dk", "dv"), map(self._relayout, gradients), strict=True))
        return results
