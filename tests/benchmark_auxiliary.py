"""The auxiliary kernels in C++ against Triton's, on an NVIDIA GPU: ``python tests/benchmark_auxiliary.py``.

Needs their library (``flash-rocm build --cuda``; FLASH_ROCM_CACHE_DIR names its folder).  For append and combine, at
several sizes, microseconds of the GPU under graph replay, and of the host for one call that nothing waits for, each the
median of rounds in which both take turns.  Which of the two calls take is what the configs of this folder say.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import torch

import flash_rocm
from flash_rocm import cache_ops, config, cuda_library
from flash_rocm.arch import gpu_arch
from flash_rocm.problem import CacheInputs
from flash_rocm.timing import median

ROUNDS, CALLS = 21, 50
CHOICES = {"triton": [], "c++": ["append", "combine"]}


def folders(root: pathlib.Path) -> dict[str, str]:
    """Config folders by what they choose."""
    arch = gpu_arch(torch.cuda.current_device()).name
    found = {}
    for name, kernels in CHOICES.items():
        raw = dict(config.file_contents(arch)) | {"arch": arch}
        raw["auxiliary"] = {"kernels": kernels, "provenance": {"how": "first choice"}}
        (root / name).mkdir()
        (root / name / f"{arch}.json").write_text(json.dumps(raw))
        found[name] = str(root / name)
    return found


def append_of(batch: int, new: int, page_size: int, rotary: bool) -> Callable[[], object]:
    """Tokens of 8 heads of 128 in bfloat16 to a cache of 4096."""
    capacity, heads, dim = 4096, 8, 128
    x = torch.randn(batch, new, heads, dim, device="cuda", dtype=torch.bfloat16)
    rows = (batch * capacity // page_size, page_size) if page_size else (batch, capacity)
    k, v = (torch.zeros(*rows, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(rows[0], device="cuda").view(batch, -1).int() if page_size else None
    lengths = torch.full((batch,), 1000, device="cuda", dtype=torch.int32)
    cos = torch.rand(capacity, dim // 2, device="cuda").bfloat16() if rotary else None
    inputs = CacheInputs(
        q=x, k=k, v=v, k_new=x, v_new=x, rotary_cos=cos, rotary_sin=cos, seqused_k=lengths, block_table=table
    )
    return lambda: cache_ops.append_kv(inputs, new, False, "")


def combine_of(splits: int, batch: int, rows: int) -> Callable[[], object]:
    """Parts of 32 heads of 128."""
    out = torch.randn(splits, batch, rows, 32, 128, device="cuda")
    lse = torch.randn(splits, batch, rows, 32, device="cuda")
    return lambda: flash_rocm.flash_attn_combine(out, lse, out_dtype=torch.bfloat16)


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def device_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def host_seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    if not torch.cuda.is_available() or torch.version.hip or cuda_library.built() is None:
        raise SystemExit("expected an NVIDIA GPU and a library in FLASH_ROCM_CACHE_DIR (flash-rocm build --cuda)")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds: GPU, host of one call")
    calls = {
        f"append b{batch} new {new} {f'page {page}' if page else 'dense'}{' rotary' if rotary else ''}": append_of(
            batch, new, page, rotary
        )
        for batch, new, page, rotary in (
            *((1, 1, 0, False), (64, 1, 0, False), (64, 1, 16, True), (128, 1, 1, True)),
            *((8, 1024, 0, True), (8, 1024, 16, True)),
        )
    }
    calls |= {
        f"combine {splits} of b{batch} q{rows}": combine_of(splits, batch, rows)
        for splits, batch, rows in ((2, 64, 1), (8, 16, 1), (32, 1, 1), (128, 1, 1), (4, 8, 512))
    }
    with tempfile.TemporaryDirectory() as root:
        choices = folders(pathlib.Path(root))
        for label, call in calls.items():
            graphs, device, host = {}, {name: [] for name in choices}, {name: [] for name in choices}
            for name, folder in choices.items():
                os.environ["FLASH_ROCM_CONFIG_DIR"] = folder
                graphs[name] = graph_of(call)
            for _ in range(ROUNDS):
                for name, folder in choices.items():
                    os.environ["FLASH_ROCM_CONFIG_DIR"] = folder
                    device[name].append(device_seconds(graphs[name]))
                    host[name].append(host_seconds(call))
            shown = [f"{name} {median(device[name]) * 1e6:.1f}, {median(host[name]) * 1e6:.1f}" for name in choices]
            print(f"{label:32} {'   '.join(shown)}")


if __name__ == "__main__":
    main()
