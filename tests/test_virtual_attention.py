"""The shipped kernels as AMD machine code on the virtual GPU, under the test rule, in several wave orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="compiles Triton kernels")
pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from virtual_device import device, launches_on

from flash_rocm import runtime
from flash_rocm.testing import assert_attention_close, make_inputs, make_problem

if runtime.triton_interpret():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
EVERYTHING: dict[str, Any] = dict(window_left=70, window_right=5, softcap=20.0, alibi=True, dropout_p=0.2)
#: fields of the problem, wave order.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "bf16-d64-causal": (dict(dtype=torch.bfloat16, headdim=64, window_right=0), "reverse"),
    "bf16-d128-full": (dict(dtype=torch.bfloat16, headdim=128), "shuffled:1"),
    "fp16-d128-causal": (dict(dtype=torch.float16, headdim=128, window_right=0, nheads_k=1), "shuffled:2"),
    "fp16-d64-varlen": (dict(dtype=torch.float16, headdim=64, varlen=True, batch=3), "lockstep"),
    "fp32-d64-causal": (dict(dtype=torch.float32, headdim=64, window_right=0), "lockstep"),
    "bf16-d64-everything": (dict(dtype=torch.bfloat16, headdim=64, varlen=True, **EVERYTHING), "shuffled:3"),
    "fp32-d64-everything": (dict(dtype=torch.float32, headdim=64, nheads_k=1, **EVERYTHING), "lockstep"),
}


#: Every case on one chip; on the others one for each dtype, every feature among them.
RUNS = [
    (arch, name)
    for arch in ARCHS
    for name in CASES
    if arch == "gfx942" or name in ("fp16-d128-causal", "fp32-d64-causal", "bf16-d64-everything")
]


@pytest.mark.parametrize(("arch", "name"), RUNS)
def test_forward_and_backward(arch: str, name: str, count_case: Any) -> None:
    from flash_rocm._triton import launch

    fields, order = CASES[name]
    problem = make_problem(needs_grad=True, **{"batch": 1, "seqlen_q": 70, "seqlen_k": 150, "nheads": 2, **fields})
    case = make_inputs(problem, seed=3)
    with launches_on(device(arch, order=order), problem) as used:
        out, lse = launch.forward(problem, case.inputs)
        grads = launch.backward(problem, case.inputs, out, lse, case.dout, case.dlse)
        probs = launch.probs(problem, case.inputs, lse) if problem.dropout_p else None
    assert_attention_close(problem, case, out, lse, grads, use_dlse=True, probs=probs)
    # RDNA has no matrix instruction for fp32.
    if not (arch.startswith("gfx1") and problem.dtype == torch.float32):
        assert used.stats["forward"].per_class()["matrix"] > 0
    count_case("triton", f"virtual:{arch}", problem.features(), ("forward", "backward"))


@pytest.mark.parametrize("order", ["lockstep", "forward", "reverse", "shuffled:7"])
def test_wave_order_changes_nothing(order: str) -> None:
    from flash_rocm._triton import launch

    fields = dict(dtype=torch.bfloat16, batch=1, seqlen_q=150, seqlen_k=200, nheads=2, headdim=64, window_right=0)
    problem = make_problem(**fields)
    case = make_inputs(problem, seed=3)
    results = []
    for wanted in ("lockstep", order):
        with launches_on(device("gfx942", order=wanted), problem):
            results.append(launch.forward(problem, case.inputs)[0])
    assert torch.equal(*results)
