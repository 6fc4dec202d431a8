"""The host overhead measurement: what issuing one small call costs the CPU."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from flash_rocm.bench.check import Expected
from flash_rocm.bench.grid import check_peer
from flash_rocm.bench.peers import Peer
from flash_rocm.bench.prepared import Prepared
from flash_rocm.bench.shapes import Shape, make_data
from flash_rocm.timing import describe_error, median

MODES = ("no_grad", "autograd forward", "autograd forward+backward")

#: Calls per loop.  Few enough that no launch queue fills up, which would make the host wait.
GPU_CALLS, CPU_CALLS = 100, 5
GPU_ROUNDS, CPU_ROUNDS = 31, 5


@dataclasses.dataclass(frozen=True)
class Overhead:
    """One peer in one mode: seconds per call, one of each round.

    ``seconds`` is the loop that issues the calls, ``wait_seconds`` the wait for the GPU after it.  If
    that is a large part, the GPU was behind, and the loop may have waited for it too.
    """

    shape: Shape
    mode: str
    peer: str
    status: str
    reason: str = ""
    calls: int = 0
    seconds: tuple[float, ...] = ()
    wait_seconds: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        record["median_seconds"] = median(self.seconds) if self.seconds else None
        return record


def small_shape(dtype: str, device: torch.device) -> Shape:
    """Batch 1, 8 heads, seqlen 128, head dim 64, full mask."""
    return Shape(1, 128, 8, 64, False, dtype)


def rounds_and_calls(device: torch.device) -> tuple[int, int]:
    return (CPU_ROUNDS, CPU_CALLS) if device.type == "cpu" else (GPU_ROUNDS, GPU_CALLS)


def run(
    shape: Shape, peers: Sequence[Peer], device: torch.device, rounds: int, calls: int, tick: Callable[[str], None]
) -> Iterator[Overhead]:
    """Check the peers, then time loops of calls, round by round and peer by peer."""
    data = make_data(shape, device)
    expected = Expected(shape, data, training=True)
    ready: list[tuple[Peer, Prepared]] = []
    for peer in peers:
        outcome = check_peer(peer, shape, data, expected, training=True)
        if isinstance(outcome, tuple):
            ready.append((peer, outcome[0]))
        else:
            for mode in MODES:
                yield Overhead(shape, mode, peer.name, outcome.status, outcome.reason)
    for mode in MODES:
        times: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer, _ in ready}
        problems: dict[str, str] = {}
        for turn in range(rounds + 1):
            offset = turn % max(1, len(ready))
            for peer, prepared in (*ready[offset:], *ready[:offset]):
                tick(f"{mode}: {peer.name}")
                if peer.name in problems:
                    continue
                try:
                    session, call = _mode(prepared, mode)
                    with session:
                        measured = issue(call, calls, device)
                except Exception as error:  # noqa: BLE001 - other libraries raise anything; the report shows it
                    problems[peer.name] = describe_error(error)
                    continue
                if turn > 0:  # the first round warms up
                    times[peer.name].append(measured)
        for peer, _ in ready:
            if peer.name in problems:
                yield Overhead(shape, mode, peer.name, "error", problems[peer.name])
                continue
            seconds, waits = zip(*times[peer.name], strict=True)
            yield Overhead(shape, mode, peer.name, "ok", "", calls, seconds, waits)


def _mode(prepared: Prepared, mode: str) -> tuple[AbstractContextManager[None], Callable[[], object]]:
    if mode == "no_grad":
        return prepared.session("forward"), prepared.forward
    return prepared.session("both"), prepared.train_forward if mode == "autograd forward" else prepared.both


def issue(call: Callable[[], object], calls: int, device: torch.device) -> tuple[float, float]:
    """Seconds per call to issue them without waiting, and then to wait for the GPU."""
    gpu = device.type == "cuda"
    call()
    if gpu:
        torch.cuda.synchronize(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        issued = time.perf_counter()
        if gpu:
            torch.cuda.synchronize(device)
        done = time.perf_counter()
    finally:
        if collecting:
            gc.enable()
    return (issued - start) / calls, (done - issued) / calls
