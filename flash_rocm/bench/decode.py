"""The decode measurement: bytes of a K/V cache read per second, one query per sequence.

Device time under graph replay.  Calls of one graph take turns on caches that together exceed any L2 cache
by far; contenders take turns round by round.  A large sum in the same run says what the memory gives.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import flash_rocm
from flash_rocm.timing import describe_error, median

NHEADS, NHEADS_K, HEADDIM = 32, 8, 128
#: (batch, keys)
POINTS = ((1, 32768), (1, 131072), (16, 8192), (64, 4096), (128, 1024), (64, 16384))
QUICK_POINTS = ((1, 32768), (128, 1024))
PAGE_SIZES = (1, 16, 64, 256)
FLASHINFER_PAGE_SIZES = (16, 64)
_POOL_BYTES = 1 << 30
_MAX_CACHES = 64
_READ_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Decode:
    """One contender at one point; ``seconds`` per call, one of each round."""

    batch: int
    seqlen_k: int
    contender: str
    status: str
    reason: str = ""
    seconds: tuple[float, ...] = ()
    read_bytes: int = 0

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.read_bytes / median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bandwidth": self.bandwidth if self.seconds else None}


class _Point:
    """Caches of one point, as dense ones and as pages in random order."""

    def __init__(self, batch: int, seqlen_k: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, seqlen_k, NHEADS_K, HEADDIM)
        self.batch, self.seqlen_k = batch, seqlen_k
        self.read_bytes = 2 * batch * seqlen_k * NHEADS_K * HEADDIM * dtype.itemsize
        count = min(max(2, -(-_POOL_BYTES // self.read_bytes)), _MAX_CACHES)
        self.caches = [tuple(torch.randn(shape, dtype=dtype, device=device) for _ in "kv") for _ in range(count)]
        self.q = torch.randn(batch, 1, NHEADS, HEADDIM, dtype=dtype, device=device)
        self.lengths = torch.full((batch,), seqlen_k, dtype=torch.int32, device=device)

    def table(self, page_size: int) -> torch.Tensor:
        pages = self.batch * self.seqlen_k // page_size
        return torch.randperm(pages, device=self.q.device).view(self.batch, -1).int()

    def pages(self, cache: tuple[torch.Tensor, ...], page_size: int) -> tuple[torch.Tensor, ...]:
        return tuple(x.view(-1, page_size, NHEADS_K, HEADDIM) for x in cache)

    def expected(self, table: torch.Tensor | None, page_size: int) -> torch.Tensor:
        """(batch, 1, 2, headdim) of the first and the last head over the first cache, float64."""
        k, v = self.caches[0]
        if table is not None:
            k, v = (x[table.long()].flatten(1, 2) for x in self.pages((k, v), page_size))
        heads = [0, NHEADS - 1]
        k, v = (x[:, :, [0, NHEADS_K - 1]].double().transpose(1, 2) for x in (k, v))
        q = self.q[:, :, heads].double().transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


_Calls = Callable[[], tuple[list[Callable[[], torch.Tensor]], torch.Tensor]]


def _contenders(point: _Point) -> dict[str, _Calls]:
    """By name what makes the calls, one for each cache, and what the first one should give."""

    def sdpa() -> tuple[list[Callable[[], torch.Tensor]], torch.Tensor]:
        def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (point.q, k, v))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return [lambda c=cache: call(*c) for cache in point.caches], point.expected(None, 0)  # type: ignore[misc]

    def ours(page_size: int) -> _Calls:
        def make() -> tuple[list[Callable[[], torch.Tensor]], torch.Tensor]:
            table = point.table(page_size) if page_size else None

            def call(cache: tuple[torch.Tensor, ...]) -> torch.Tensor:
                k, v = point.pages(cache, page_size) if page_size else cache
                return flash_rocm.flash_attn_with_kvcache(  # type: ignore[return-value]
                    point.q, k, v, cache_seqlens=point.lengths, causal=True, block_table=table
                )

            return [lambda c=cache: call(c) for cache in point.caches], point.expected(table, page_size)  # type: ignore[misc]

        return make

    def flashinfer(page_size: int) -> _Calls:
        def make() -> tuple[list[Callable[[], torch.Tensor]], torch.Tensor]:
            import flashinfer  # type: ignore[import-not-found]

            table = point.table(page_size)
            pages, device = table.shape[1], point.q.device
            workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            starts = torch.arange(point.batch + 1, dtype=torch.int32, device=device) * pages
            last = torch.full((point.batch,), page_size, dtype=torch.int32, device=device)
            dtype = point.q.dtype
            wrapper.plan(
                starts, table.flatten(), last, NHEADS, NHEADS_K, HEADDIM, page_size, q_data_type=dtype, data_type=dtype
            )

            def call(cache: tuple[torch.Tensor, ...]) -> torch.Tensor:
                return wrapper.run(point.q.squeeze(1), point.pages(cache, page_size)).unsqueeze(1)

            return [lambda c=cache: call(c) for cache in point.caches], point.expected(table, page_size)  # type: ignore[misc]

        return make

    found: dict[str, _Calls] = {"sdpa dense": sdpa, "flash_rocm dense": ours(0)}
    found |= {f"flash_rocm page {size}": ours(size) for size in PAGE_SIZES}
    if importlib.util.find_spec("flashinfer") is not None:
        found |= {f"flashinfer page {size}": flashinfer(size) for size in FLASHINFER_PAGE_SIZES}
    return found


def _graph(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _is_close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within a few roundings of the results, which are averages of standard normal numbers."""
    found = out[:, :, [0, NHEADS - 1]].double()
    return bool((found - expected).abs().max() <= 4 * torch.finfo(out.dtype).eps * expected.abs().max())


def run(rounds: int, dtype: torch.dtype, device: torch.device, quick: bool) -> Iterator[Decode]:
    """Measure every contender at every point; first of all what a large sum reads."""
    x = torch.empty(_READ_BYTES // 4, dtype=torch.float32, device=device)
    read = _graph([x.sum])
    yield Decode(0, 0, "read", "ok", "", tuple(_seconds(read) for _ in range(rounds + 2))[2:], x.nbytes)
    del x, read
    for batch, seqlen_k in QUICK_POINTS if quick else POINTS:
        point = _Point(batch, seqlen_k, dtype, device)
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        alive: list[Any] = []  # graphs do not keep tables and workspaces of their calls
        for name, make in _contenders(point).items():
            try:
                calls, expected = make()
                if not _is_close(calls[0](), expected):
                    yield Decode(batch, seqlen_k, name, "wrong", "not the float64 result")
                    continue
                graphs[name] = _graph(calls)  # type: ignore[arg-type]
                alive.append(calls)
            except Exception as error:  # noqa: BLE001 - other libraries raise anything; the report shows it
                yield Decode(batch, seqlen_k, name, "error", describe_error(error))
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(rounds + 1):
            names = list(graphs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds = _seconds(graphs[name]) / len(point.caches)
                if turn > 0:  # the first round warms up
                    times[name].append(seconds)
        for name, seconds_of in times.items():
            yield Decode(batch, seqlen_k, name, "ok", "", tuple(seconds_of), point.read_bytes)
        del point, graphs, alive
        torch.cuda.empty_cache()


def text(results: list[Decode]) -> str:
    """Tables of TB/s and of the ratio to SDPA on dense caches."""
    (read,) = (item for item in results if item.contender == "read")
    names = list(dict.fromkeys(item.contender for item in results if item is not read))
    lines = [
        f"decode, q=1, heads {NHEADS}/{NHEADS_K}, d{HEADDIM}: TB/s (ratio to sdpa dense); "
        f"a large sum reads {read.bandwidth / 1e12:.2f}",
        "| batch x keys | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    points = list(dict.fromkeys((item.batch, item.seqlen_k) for item in results if item is not read))
    for batch, seqlen_k in points:
        found = {item.contender: item for item in results if (item.batch, item.seqlen_k) == (batch, seqlen_k)}
        base = found["sdpa dense"].bandwidth if found["sdpa dense"].seconds else None
        cells = []
        for name in names:
            item = found[name]
            if not item.seconds:
                cells.append(f"{item.status}: {item.reason}")
            else:
                ratio = f" ({item.bandwidth / base:.2f})" if base else ""
                cells.append(f"{item.bandwidth / 1e12:.2f}{ratio}")
        lines.append(f"| {batch} x {seqlen_k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
