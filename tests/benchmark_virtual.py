"""Speed and memory of the virtual GPU: ``python tests/benchmark_virtual.py``.

A forward launch of 64 workgroups (512 waves), with and without checks, in several wave orders, and the memory
of a 1024 x 1024 forward with 8 heads.  One core: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

import flash_rocm
from flash_rocm.virtual import Checks, Launch


def forward(seqlen: int, batch: int) -> Launch:
    """The launch of a causal bfloat16 forward with 8 heads of 128."""
    launches: list[Launch] = []
    q, k, v = (torch.randn(batch, seqlen, 8, 128, dtype=torch.bfloat16) for _ in range(3))
    with flash_rocm.virtual_gpu("gfx942", on_launch=launches.append):
        flash_rocm.flash_attn_func(q, k, v, causal=True)
    return launches[0]


def timed(launch: Launch, **options: Any) -> tuple[int, float]:
    """(wave-instructions, CPU seconds) of a run."""
    start = time.process_time()
    count = launch.run(**options).wave_instructions
    return count, time.process_time() - start


def main() -> None:
    launch = forward(512, 2)
    launch.run()  # compiles the instructions
    for name, options in {
        "all checks, lockstep": {},
        "no checks, lockstep": {"checks": Checks.none()},
        "all checks, shuffled:1": {"order": "shuffled:1"},
        "all checks, forward": {"order": "forward"},
    }.items():
        count, seconds = timed(launch, **options)
        print(f"{name:24s} {count} wave-instructions in {seconds:.2f} s: {count / seconds / 1e6:.2f} M/s")
    count, seconds = timed(forward(1024, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"1024 x 1024, 8 heads: {count} wave-instructions in {seconds:.2f} s, peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
