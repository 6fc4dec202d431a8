"""Speed and memory of the virtual GPU: ``python tests/benchmark_virtual.py``.

A forward launch of 64 workgroups (512 waves), with and without checks, in several wave orders, and the memory
of a 1024 x 1024 forward with 8 heads.  One core: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from virtual_device import device, launches_on

from flash_rocm.testing import make_inputs, make_problem
from flash_rocm.virtual import Checks


def forward(seqlen: int, batch: int, **fields: Any) -> tuple[int, float]:
    """(wave-instructions, CPU seconds) of a causal bfloat16 forward with 8 heads of 128."""
    from flash_rocm._triton import launch

    problem = make_problem(
        dtype=torch.bfloat16, batch=batch, seqlen_q=seqlen, seqlen_k=seqlen, nheads=8, headdim=128, window_right=0
    )
    case = make_inputs(problem)
    used = device("gfx942", **fields)
    with launches_on(used, problem):
        start = time.process_time()
        launch.forward(problem, case.inputs)
        seconds = time.process_time() - start
    return used.stats["forward"].wave_instructions, seconds


def main() -> None:
    forward(512, 2)  # compiles the kernel, and its instructions
    for name, fields in {
        "all checks, lockstep": {},
        "no checks, lockstep": {"checks": Checks.none()},
        "all checks, shuffled:1": {"order": "shuffled:1"},
        "all checks, forward": {"order": "forward"},
    }.items():
        count, seconds = forward(512, 2, **fields)
        print(f"{name:24s} {count} wave-instructions in {seconds:.2f} s: {count / seconds / 1e6:.2f} M/s")
    count, seconds = forward(1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"1024 x 1024, 8 heads: {count} wave-instructions in {seconds:.2f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
