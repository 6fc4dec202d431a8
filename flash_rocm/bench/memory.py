"""The memory measurement: peak of a forward and a backward over the sequence length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from flash_rocm.bench.check import Expected
from flash_rocm.bench.grid import Result, check_peer
from flash_rocm.bench.peers import Peer
from flash_rocm.bench.prepared import Prepared
from flash_rocm.bench.shapes import Shape, make_data
from flash_rocm.timing import describe_error

GPU_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
CPU_SEQLENS = (256, 512, 1024, 2048)
HEADDIM = 64
GPU_NHEADS, CPU_NHEADS = 16, 2
#: Where the growth is counted from: below, buffers of fixed size still show.
LINEAR_FROM = 4096


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak of one peer at one length, without q, k, v and dout; None with the reason why not."""

    shape: Shape
    peer: str
    input_bytes: int
    peak_bytes: int | None
    status: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def shapes_of(seqlens: Sequence[int], dtype: str, causal: bool, device: torch.device) -> list[Shape]:
    """Batch 1, head dim 64, 16 heads (2 on the CPU)."""
    nheads = CPU_NHEADS if device.type == "cpu" else GPU_NHEADS
    return [Shape(1, seqlen, nheads, HEADDIM, causal, dtype) for seqlen in seqlens]


def run(
    shapes: Sequence[Shape], peers: Sequence[Peer], device: torch.device, tick: Callable[[str], None]
) -> Iterator[Peak]:
    """Check, then measure, every peer at every length."""
    for shape in shapes:
        data = make_data(shape, device)
        input_bytes = sum(x.numel() * x.element_size() for x in data)
        expected = Expected(shape, data, training=True)
        for peer in peers:
            tick(f"{shape}: {peer.name}")
            outcome = check_peer(peer, shape, data, expected, training=True)
            if isinstance(outcome, Result):
                yield Peak(shape, peer.name, input_bytes, None, outcome.status, outcome.reason)
                continue
            try:
                yield Peak(shape, peer.name, input_bytes, peak_bytes(outcome[0], device), "ok")
            except Exception as error:  # noqa: BLE001 - such as out of memory; the report shows it
                yield Peak(shape, peer.name, input_bytes, None, "error", describe_error(error))


def peak_bytes(prepared: Prepared, device: torch.device) -> int:
    """Most bytes that torch held during a forward and a backward beyond those held before.

    out, dq, dk and dv are among them.  Call it warm, so that workspaces which stay are not counted.
    """
    if device.type != "cuda":
        return _cpu_peak_bytes(prepared)
    with prepared.session("both"):
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gradients = prepared.both()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    del gradients
    return peak


def _cpu_peak_bytes(prepared: Prepared) -> int:
    """From the profiler's record of every allocation: the CPU allocator keeps no peak."""
    from torch.profiler import ProfilerActivity, profile

    with prepared.session("both"), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gradients = prepared.both()
    del gradients
    results = profiler.profiler.kineto_results if profiler.profiler is not None else None
    if results is None:
        raise RuntimeError("the profiler recorded nothing")
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    return peak


def growth(peaks: Sequence[Peak], peer: str) -> tuple[int, int, float] | None:
    """(first length, last length, peak at the last / peak at the first), the first being 4k or else
    the shortest; None where there are no two."""
    known = {peak.shape.seqlen: peak.peak_bytes for peak in peaks if peak.peer == peer and peak.peak_bytes}
    if len(known) < 2:
        return None
    first = LINEAR_FROM if LINEAR_FROM in known and max(known) > LINEAR_FROM else min(known)
    last = max(known)
    return first, last, known[last] / known[first]  # type: ignore[operator]
