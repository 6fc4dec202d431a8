"""BLOCK_K of the attention kernel over a K/V cache, products over the head dim by chunks, against float64."""

from __future__ import annotations

import json
from typing import Any

import cache_matrix
import pytest
import torch

from flash_rocm.testing import CacheCall, make_problem

pytest.importorskip("triton", reason="runs Triton kernels")

from flash_rocm._triton import cached
from flash_rocm._triton.launcher import Call, Launcher

#: BLOCK_K, fields of the problem.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "rotary-partners-in-a-chunk": (
        16,
        dict(
            dtype=torch.float32,
            headdim=24,
            page_size=3,
            seqlen_new=2,
            rotary_dim=24,
            rotary_interleaved=True,
            window_right=0,
        ),
    ),
    "rotary-partners-in-other-chunks": (
        32,
        dict(dtype=torch.bfloat16, headdim=72, seqlen_new=1, rotary_dim=72, varlen=True, window_right=0, nheads=3),
    ),
    "prefill-window": (
        64,
        dict(dtype=torch.float16, headdim=72, headdim_v=40, seqlen_q=33, window_left=20, window_right=9, softcap=8.0),
    ),
    "partial-sums": (128, dict(dtype=torch.float32, headdim=300, page_size=16, leftpad=True, alibi=True)),
    "mla": (16, dict(dtype=torch.float16, headdim=40, headdim_v=72, qv=True, page_size=16, nheads=20, window_right=0)),
    "mla-partial-sums": (32, dict(dtype=torch.float32, headdim=16, headdim_v=264, qv=True, nheads=2)),
    "head-of-two-tiles": (256, dict(dtype=torch.bfloat16, headdim=576, headdim_v=48, num_splits=2)),
}
KERNELS = ("decode", "prefill", "mla")
TARGETS = [
    *(pytest.param("interpret", name, marks=pytest.mark.interpret) for name in CASES),
    *(
        pytest.param(f"virtual:{arch}", name, marks=pytest.mark.virtual)
        for arch in ("gfx942", "gfx1100")
        for name in ("rotary-partners-in-other-chunks", "partial-sums", "mla")
    ),
]


@pytest.mark.parametrize(("target", "name"), TARGETS)
def test_products_by_chunks_of_the_head_dim(target: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block_k, fields = CASES[name]
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", json.dumps(dict.fromkeys(KERNELS, {"BLOCK_K": block_k})))
    launch_new, used = Launcher.launch_new, []

    def noted(launcher: Launcher, key: Any, call: Call) -> None:
        if launcher is cached.ATTEND:
            used.append(call.plan.constants["BLOCK_K"])
        launch_new(launcher, key, call)

    monkeypatch.setattr(Launcher, "launch_new", noted)
    shape = dict(batch=2, seqlen_q=2, seqlen_k=53, nheads=1, nheads_k=1, softmax_scale=0.2)
    problem = make_problem(cached=True, **shape | fields)
    cache_matrix.run(cache_matrix.Case("triton", target, problem, CacheCall(), 1, ()))
    assert used == [block_k]


LARGE: dict[str, dict[str, Any]] = {
    "decode-d256": dict(dtype=torch.bfloat16, headdim=256, page_size=16, nheads=4),
    "decode-d512": dict(dtype=torch.float32, headdim=512, page_size=16),
    "prefill-d256": dict(dtype=torch.float16, headdim=256, seqlen_q=20, window_right=0),
    "mla": dict(dtype=torch.bfloat16, headdim=64, headdim_v=512, qv=True, page_size=16, nheads=18),
}


@pytest.mark.virtual
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("arch", ("gfx942", "gfx1100", "gfx1201"))
def test_shipped_configs_of_large_heads(arch: str, name: str) -> None:
    """The matrix has small heads."""
    shape = dict(batch=2, seqlen_q=1, seqlen_k=45, nheads=1, nheads_k=1, softmax_scale=0.05)
    problem = make_problem(cached=True, **shape | LARGE[name])
    cache_matrix.run(cache_matrix.Case("triton", f"virtual:{arch}", problem, CacheCall(), 1, ()))
