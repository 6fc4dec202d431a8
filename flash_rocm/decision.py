"""Which back end runs a call, decided once and remembered by the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flash_rocm import backends, runtime, virtual_device
from flash_rocm.problem import AttentionProblem
from flash_rocm.protocols import Backend


class Decision(NamedTuple):
    """A problem and what runs it."""

    problem: AttentionProblem
    backend: Backend
    is_empty: bool  # nothing to attend to, or nobody to attend: no kernel is launched
    virtual: str  # arch of the virtual GPU that the call is pinned to, or ""

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the back end, on the virtual GPU if the call is pinned to one."""
        if not self.virtual:
            return function(self.problem, *args)
        return virtual_device.run_pinned(self.virtual, function, self.problem, *args)


def decide(problem: AttentionProblem, request: str, device: torch.device, is_empty: bool) -> Decision:
    """Select the back end of a problem.

    Args:
        request: text of a :class:`flash_rocm.virtual_device.Request`.

    Raises:
        BackendError: no back end takes it.
    """
    requested, virtual = virtual_device.Request.parse(request)
    arch = virtual_device.arch_pinned(virtual, device)
    name = backends.select(problem, arch, requested)
    runtime.log_once(f"back end {name} for {problem.dtype} on {virtual or device.type}")
    return Decision(problem, backends.load(name), is_empty, virtual)
