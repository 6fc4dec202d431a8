"""A launch that is ready to run, for whoever wants to run it in a way of his own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .code_object import CodeObject
from .gpu import VirtualGpu
from .stats import LaunchStats


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel on a virtual GPU that holds the memory its arguments point to.

    Attributes:
        owner: keeps that memory alive.
    """

    gpu: VirtualGpu
    code: CodeObject
    grid: tuple[int, int, int]
    block_threads: int
    kernargs: Sequence[Any]
    order: str
    owner: Any

    def run(self, code: CodeObject | None = None, **options: Any) -> LaunchStats:
        """Run to the end; may be repeated.

        Args:
            code: another code object to run in place of the kernel's.
            options: of :meth:`VirtualGpu.launch`: ``checks``, ``trace``, ``breakpoints``, ``stop_at_nan``, ...
        """
        return self.gpu.launch(
            code or self.code,
            grid=self.grid,
            block_threads=self.block_threads,
            kernargs=self.kernargs,
            **{"order": self.order, **options},
        )
