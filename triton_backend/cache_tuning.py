"""What tuning measures of the kernels over a K/V cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_rocm.problem import AttentionProblem, CacheInputs, default_softmax_scale
from flash_rocm.runtime import ConfigSource
from flash_rocm.tuned import CacheTuneKey

from .cached import ATTEND, Route, attend_along, parts_of, route_with
from .launcher import Launcher
from .plan import DECODE_ROWS, MAX_TILE_D, block_d, larger_part

#: Key heads of a measured call, but no more than make a cache of so many bytes, its values included.
_HEADS_K, _CACHE_BYTES = 8, 2 << 30
#: The largest head dim that calls have; what it is padded to nobody calls with.
_MAX_HEADDIM = 576
#: Calls take caches in turn that are this large together: no L2 holds them, as none holds those of a model's layers.
_POOL_BYTES = 1 << 29
_MAX_CACHES = 32


def problem_of(key: CacheTuneKey) -> AttentionProblem:
    """The call that stands for a key: as many sequences, each as long, as the largest of the bucket."""
    dtype, window = getattr(torch, key.dtype), max(1, key.seqlen // 4)
    queries = min(key.queries, key.seqlen)
    heads_k, is_mla = 1, key.kernel == "mla"
    headdim = min(key.headdim, _MAX_HEADDIM)
    # Sums are of heads of two tiles; values of one of them could be MLA's.
    headdim_v = headdim if key.headdim == block_d(key.headdim) else MAX_TILE_D // 2
    if is_mla:
        headdim_v = larger_part(key.headdim)
        headdim = key.headdim - headdim_v
    else:
        bytes_of_head = 2 * key.batch * key.seqlen * headdim * dtype.itemsize
        while 2 * heads_k <= _HEADS_K and 2 * heads_k * bytes_of_head <= _CACHE_BYTES:
            heads_k *= 2
    if key.kernel == "decode":
        queries = min(queries, DECODE_ROWS // key.group)
    return AttentionProblem(
        dtype=dtype,
        device_type="cuda",
        batch=key.batch,
        seqlen_q=queries,
        seqlen_k=key.seqlen,
        nheads=heads_k * key.group,
        nheads_k=heads_k,
        headdim=headdim,
        headdim_v=headdim_v,
        softmax_scale=default_softmax_scale(key.headdim),
        window_left=window if key.mask == "window" else -1,
        window_right={"full": -1, "causal": 0, "window": window}[key.mask],
        varlen=key.varlen,
        cached=True,
        page_size=key.page_size,
        qv=is_mla,
    )


def inputs_of(problem: AttentionProblem, device: torch.device, count: int) -> list[CacheInputs]:
    """Tensors of as many calls; all but the caches are the same.  Pages lie in random order."""
    # A generator of its own: tuning may not change what the caller draws next.
    generator = torch.Generator(device).manual_seed(0)
    batch, seqlen, heads_k, page = problem.batch, problem.seqlen_k, problem.nheads_k, problem.page_size

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=problem.dtype)

    def starts(length: int) -> torch.Tensor:
        return torch.arange(batch + 1, device=device, dtype=torch.int32) * length

    rows = (batch * problem.seqlen_q,) if problem.varlen else (batch, problem.seqlen_q)
    places: tuple[int, ...] = (batch * seqlen,) if problem.varlen else (batch, seqlen)
    rest: dict[str, Any] = {}
    if page:
        pages = -(-seqlen // page)
        places = (batch * pages, page)
        table = torch.randperm(batch * pages, generator=generator, device=device, dtype=torch.int32)
        rest["block_table"] = table.view(batch, pages)
    if problem.varlen:
        rest |= {"cu_seqlens_q": starts(problem.seqlen_q), "cu_seqlens_k": starts(seqlen)}
    else:
        rest["seqused_k"] = torch.full((batch,), seqlen, device=device, dtype=torch.int32)
    q = random(*rows, problem.nheads, problem.headdim)
    if problem.qv:
        rest["qv"] = random(*rows, problem.nheads, problem.headdim_v)

    def caches() -> tuple[torch.Tensor, torch.Tensor]:
        if problem.qv:  # parts of one tensor, as models keep them
            whole = random(*places, heads_k, problem.headdim_v + problem.headdim)
            return whole[..., problem.headdim_v :], whole[..., : problem.headdim_v]
        return random(*places, heads_k, problem.headdim), random(*places, heads_k, problem.headdim_v)

    return [CacheInputs(q, *caches(), **rest).with_layout() for _ in range(count)]


def runner(problem: AttentionProblem, device: torch.device) -> tuple[Callable[[ConfigSource], None], int]:
    """What runs the calls of a problem with the configs of a source, and how many calls that is.

    Combination included where keys are split.  The first run of a source captures a graph, which the others replay:
    a decoding step takes the GPU less time than its launch takes the host.
    """
    rows_bytes = problem.batch * problem.seqlen_k * problem.nheads_k * problem.dtype.itemsize
    cache_bytes = rows_bytes * (problem.headdim + problem.headdim_v)
    calls = inputs_of(problem, device, min(max(1, _POOL_BYTES // cache_bytes), _MAX_CACHES))
    # Their own: what they have loaded and allocated goes when they go.
    launcher, stream, pool = Launcher(ATTEND.kernel), torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    graphs: dict[ConfigSource, torch.cuda.CUDAGraph] = {}

    def launch(route: Route) -> None:
        for inputs in calls:
            attend_along(route, problem, inputs, parts_of(problem, inputs))

    def captured(source: ConfigSource) -> torch.cuda.CUDAGraph:
        graph, route = torch.cuda.CUDAGraph(), route_with(source, problem, device, launcher)
        torch.cuda.synchronize(device)
        with torch.cuda.stream(stream):
            launch(route)
            torch.cuda.synchronize(device)
            # Other threads may go on meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                launch(route)
            finally:
                graph.capture_end()
        return graph

    def run(source: ConfigSource) -> None:
        if source not in graphs:
            graphs[source] = captured(source)
        graphs[source].replay()

    return run, len(calls)
