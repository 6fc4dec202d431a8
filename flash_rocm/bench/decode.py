"""The decode measurement: bytes of a K/V cache read per second, one query per sequence.

Device time under graph replay.  Calls of one graph take turns on caches that together exceed any L2 cache
by far; contenders take turns round by round.  A large sum in the same run says what the memory gives.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import flash_rocm
import flash_rocm.v3
from flash_rocm.timing import describe_error, median

NHEADS, NHEADS_K, HEADDIM = 32, 8, 128
#: (batch, keys)
POINTS = ((1, 32768), (1, 131072), (16, 8192), (64, 4096), (128, 1024), (64, 16384))
QUICK_POINTS = ((1, 32768), (128, 1024))
PAGE_SIZES = (1, 16, 64, 256)
#: Absorbed MLA: dims of the latent, which are the values too, and of the rotary part; (query heads, batch, keys).
LATENT, ROPE, MLA_PAGE_SIZE = 512, 64, 64
MLA_POINTS = ((128, 128, 4096), (128, 32, 8192), (16, 128, 4096))
_MATMUL = 8192
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
    flops: int = 0  # of MLA, which may be bound by either

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.read_bytes / median(self.seconds)

    @property
    def speed(self) -> float:
        """FLOP per second."""
        return self.flops / median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        speeds = {"bandwidth": self.bandwidth, "speed": self.speed} if self.seconds else {}
        return dataclasses.asdict(self) | speeds


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
    side.wait_stream(torch.cuda.current_stream())
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


class _Latents:
    """Calls of absorbed MLA, one query per sequence, over two caches in turn that no L2 holds."""

    def __init__(self, heads: int, batch: int, seqlen_k: int, dtype: torch.dtype, device: torch.device) -> None:
        def values(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        pages = batch * seqlen_k // MLA_PAGE_SIZE
        self.q, self.qv = values(batch, 1, heads, ROPE), values(batch, 1, heads, LATENT)
        self.caches = [values(pages, MLA_PAGE_SIZE, 1, LATENT + ROPE) for _ in range(2)]
        self.table = torch.randperm(pages, device=device).view(batch, -1).int()
        self.lengths = torch.full((batch,), seqlen_k, dtype=torch.int32, device=device)
        self.read_bytes = self.caches[0].nbytes
        self.flops = 2 * batch * heads * seqlen_k * (2 * LATENT + ROPE)

    def call(self, cache: torch.Tensor) -> torch.Tensor:
        latent, rope = cache.split((LATENT, ROPE), -1)
        return flash_rocm.v3.flash_attn_with_kvcache(  # type: ignore[return-value]
            self.q, rope, latent, cache_seqlens=self.lengths, page_table=self.table, qv=self.qv, causal=True
        )

    def is_close(self) -> bool:
        """The first and the last head of the first sequence."""
        keys = self.caches[0][self.table[0].long()].flatten(0, 2).double()
        q = torch.cat([self.qv, self.q], -1)[0, :, [0, -1]].double()
        scores = q @ keys.T * (LATENT + ROPE) ** -0.5
        expected = torch.softmax(scores, -1) @ keys[:, :LATENT]
        error = (self.call(self.caches[0])[0, :, [0, -1]].double() - expected).abs().max()
        return bool(error <= 4 * torch.finfo(self.q.dtype).eps * expected.abs().max())


def run_mla(rounds: int, dtype: torch.dtype, device: torch.device) -> Iterator[Decode]:
    """Measure absorbed MLA, first of all what a large matrix product reaches."""
    a, b = (torch.randn(_MATMUL, _MATMUL, dtype=dtype, device=device) for _ in "ab")
    product = _graph([functools.partial(torch.matmul, a, b)])
    seconds = tuple(_seconds(product) for _ in range(rounds + 2))[2:]
    yield Decode(0, 0, "matmul", "ok", "", seconds, flops=2 * _MATMUL**3)
    del product, a, b
    for heads, batch, seqlen_k in MLA_POINTS:
        point = _Latents(heads, batch, seqlen_k, dtype, device)
        name = f"flash_rocm mla {heads}"
        if not point.is_close():
            yield Decode(batch, seqlen_k, name, "wrong", "not the float64 result")
            continue
        graph = _graph([lambda cache=cache, at=point: at.call(cache) for cache in point.caches])  # type: ignore[misc]
        seconds = tuple(_seconds(graph) / len(point.caches) for _ in range(rounds + 1))[1:]
        yield Decode(batch, seqlen_k, name, "ok", "", seconds, point.read_bytes, point.flops)


def mla_text(results: list[Decode]) -> str:
    """A table of TFLOP/s and TB/s, and of the share of the roof that bounds a point."""
    roofs = {item.contender: item for item in results if item.batch == 0}
    read, matmul = roofs["read"].bandwidth, roofs["matmul"].speed
    lines = [
        f"absorbed MLA, q=1, {LATENT + ROPE}/{LATENT}, pages of {MLA_PAGE_SIZE}: a matrix product of {_MATMUL} reaches "
        f"{matmul / 1e12:.0f} TFLOP/s, a large sum reads {read / 1e12:.2f} TB/s",
        "| heads | batch x keys | TFLOP/s | TB/s | of its roof |",
        "|---|---|---|---|---|",
    ]
    for item in results:
        if item.contender.startswith("flash_rocm mla"):
            heads, where = item.contender.rpartition(" ")[2], f"{item.batch} x {item.seqlen_k}"
            if not item.seconds:
                lines.append(f"| {heads} | {where} | {item.status}: {item.reason} | | |")
                continue
            speed, bandwidth = item.speed, item.bandwidth
            share = max(speed / matmul, bandwidth / read)
            lines.append(f"| {heads} | {where} | {speed / 1e12:.0f} | {bandwidth / 1e12:.2f} | {share:.0%} |")
    return "\n".join(lines)


def text(results: list[Decode]) -> str:
    """Tables of TB/s and of the ratio to SDPA on dense caches."""
    (read,) = (item for item in results if item.contender == "read")
    results = [item for item in results if item.batch and not item.flops]
    names = list(dict.fromkeys(item.contender for item in results))
    lines = [
        f"decode, q=1, heads {NHEADS}/{NHEADS_K}, d{HEADDIM}: TB/s (ratio to sdpa dense); "
        f"a large sum reads {read.bandwidth / 1e12:.2f}",
        "| batch x keys | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    points = list(dict.fromkeys((item.batch, item.seqlen_k) for item in results))
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
