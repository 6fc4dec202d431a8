"""The speed measurement: every shape, every peer, side by side."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from flash_rocm.bench.check import Expected, Verdict
from flash_rocm.bench.peers import Peer
from flash_rocm.bench.prepared import Prepared
from flash_rocm.bench.shapes import Data, Shape, make_data
from flash_rocm.timing import Clock, Entry, describe_error, interleave, median, speed

#: ok: measured.  skipped: not run, for a reason known before.  wrong: it computed something else, so
#: no speed.  error: it raised.
STATUSES = ("ok", "skipped", "wrong", "error")


@dataclasses.dataclass(frozen=True)
class Result:
    """One peer on one shape in one direction."""

    shape: Shape
    direction: str
    peer: str
    layout: str
    status: str
    reason: str = ""
    note: str = ""
    iterations: int = 0  # calls per burst
    seconds: tuple[float, ...] = ()  # per call, one of each round; empty unless ok
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def tflops(self) -> float | None:
        """Median over the rounds; None unless ok."""
        if self.status != "ok":
            return None
        return speed(self.shape.flops(self.direction), median(self.seconds))

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        record["median_seconds"] = median(self.seconds) if self.seconds else None
        record["tflops"] = self.tflops
        return record


def steps_per_shape(peers: Sequence[Peer], directions: Sequence[str], rounds: int) -> int:
    """Ticks that :func:`run_shape` gives at most."""
    return len(peers) * (1 + len(directions) * rounds)


def run_shape(
    shape: Shape,
    peers: Sequence[Peer],
    directions: Sequence[str],
    rounds: int,
    device: torch.device,
    tick: Callable[[str], None],
) -> Iterator[Result]:
    """Check every peer, then time those that passed; yields a result per direction and peer."""
    training = any(direction != "forward" for direction in directions)
    data = make_data(shape, device)
    expected = Expected(shape, data, training)
    ready: list[tuple[Peer, Prepared, Verdict]] = []
    for peer in peers:
        tick(f"{shape}: checking {peer.name}")
        outcome = check_peer(peer, shape, data, expected, training)
        if isinstance(outcome, tuple):
            ready.append((peer, *outcome))
            continue
        for direction in directions:
            yield dataclasses.replace(outcome, direction=direction)
    for direction in directions:
        yield from _time(shape, direction, ready, rounds, Clock(device), tick)


def check_peer(
    peer: Peer, shape: Shape, data: Data, expected: Expected, training: bool
) -> tuple[Prepared, Verdict] | Result:
    """The peer made ready, or the result (of no direction yet) that says why it is not measured."""
    failed = functools.partial(Result, shape, "", peer.name, peer.layout)
    try:
        reason = peer.shape_reason(shape, data.q.device, training)
        if reason is not None:
            return failed("skipped", reason)
        prepared = peer.prepare(shape, data)
        verdict = expected.verdict(prepared.results(training))
    except Exception as error:  # noqa: BLE001 - other libraries raise anything; the report shows it
        _empty_cache(data.q.device)
        return failed("error", describe_error(error))
    if verdict.problem:
        return failed("wrong", verdict.problem, errors=verdict.errors)
    return prepared, verdict


def _time(
    shape: Shape,
    direction: str,
    ready: Sequence[tuple[Peer, Prepared, Verdict]],
    rounds: int,
    clock: Clock,
    tick: Callable[[str], None],
) -> Iterator[Result]:
    entries = [
        Entry(peer.name, prepared.call(direction), functools.partial(prepared.session, direction))
        for peer, prepared, _ in ready
    ]
    interleave(entries, rounds, clock, lambda name: tick(f"{shape}: {direction} {name}"))
    for (peer, prepared, verdict), entry in zip(ready, entries, strict=True):
        prepared.release()
        yield Result(
            shape,
            direction,
            peer.name,
            peer.layout,
            "error" if entry.error else "ok",
            entry.error,
            peer.note(shape, clock.device),
            entry.iterations,
            tuple(entry.seconds),
            verdict.errors,
        )
    _empty_cache(clock.device)


def _empty_cache(device: torch.device) -> None:
    """What one peer's buffers held must not starve the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
