"""Clocks: bursts of calls, calibrated and interleaved."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

Call = Callable[[], object]


class Clock:
    """Times bursts of calls on one device: CUDA/HIP events on a GPU, ``perf_counter`` on the CPU.

    A burst on a GPU is queued without waiting in between, so that what is timed is the GPU's work as
    long as that takes longer than issuing it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        #: Length of a burst: long beside the time of the first launch and the events' resolution.
        self.target = 0.020 if self.is_gpu else 0.002

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def burst(self, call: Call, iterations: int) -> float:
        """Seconds per call of ``iterations`` calls in a row."""
        if not self.is_gpu:
            start = time.perf_counter()
            for _ in range(iterations):
                call()
            return (time.perf_counter() - start) / iterations
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        begin.record()
        for _ in range(iterations):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / iterations

    def calibrate(self, call: Call) -> int:
        """Warm up (compilation, tuning, clocks) and return the calls that fill a burst."""
        for _ in range(2):
            call()
        iterations = 1
        seconds = self.burst(call, iterations)
        while seconds * iterations < self.target / 4 and iterations < 1 << 14:
            iterations *= 4
            seconds = self.burst(call, iterations)
        return max(1, math.ceil(self.target / max(seconds, 1e-9)))


@dataclasses.dataclass
class Entry:
    """One competitor of an interleaved measurement."""

    name: str
    call: Call
    session: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    iterations: int = 0  # 0 until calibrated
    seconds: list[float] = dataclasses.field(default_factory=list)  # per call, one of each round
    error: str = ""


def interleave(entries: Sequence[Entry], rounds: int, clock: Clock, tick: Callable[[str], None]) -> None:
    """Fill ``seconds``: every round times every entry once, each round beginning with another one.

    Whatever drifts (clocks, heat, other work on the machine) then meets all alike.  An entry that
    raises keeps its ``error``, loses its times and drops out.

    Args:
        tick: called with the entry's name before each burst.
    """
    for entry in entries:
        with _recorded(entry), entry.session():
            entry.iterations = clock.calibrate(entry.call)
    for turn in range(rounds):
        offset = turn % max(1, len(entries))
        for entry in (*entries[offset:], *entries[:offset]):
            tick(entry.name)
            if entry.error:
                continue
            with _recorded(entry), entry.session():
                entry.call()
                entry.seconds.append(clock.burst(entry.call, entry.iterations))


@contextlib.contextmanager
def _recorded(entry: Entry) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - other libraries raise anything; the report shows it
        entry.error = describe_error(error)
        entry.seconds.clear()


def describe_error(error: BaseException) -> str:
    """One line for tables."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def median(values: Sequence[float]) -> float:
    """Middle value, the mean of the two middle ones for an even count.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values: expected at least one, got none.")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log(values))).

    Raises:
        ValueError: no values, or one that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError(f"values: expected positive numbers, got {list(values)}.")
    return math.exp(sum(map(math.log, values)) / len(values))


def speed(flops: float, seconds: float) -> float:
    """TFLOP/s."""
    return flops / seconds / 1e12
