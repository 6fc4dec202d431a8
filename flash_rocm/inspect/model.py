"""The speed model: cycles of a launch that the virtual GPU executed, and what binds them.

Uncalibrated: no figure of it was compared with a clock on a chip.  It ranks kernels.

All cycles are those of one compute unit that runs the whole launch alone, so that a machine with enough
workgroups takes cycles / compute units:

* matrix: cycles of the matrix instructions, spread over the SIMDs;
* vector: cycles of the vector ALU (counts.py) and the issue of the matrix instructions, likewise;
* scalar: issue of scalar instructions and branches, likewise;
* lds: cycles of the one LDS pipe, bank conflicts included, 128 bytes a cycle, on gfx950 twice that;
* vmem: bytes that loads and stores ask for, 64 a cycle, as if all hit the first cache;
* memory: bytes of all tensors, each moved once (an L2 that never forgets), at the compute unit's share of bandwidth;
* occupancy: what a wave takes alone, nothing overlapping, divided by the waves that a SIMD holds.

The longest of these binds; how near memory is to it is the share of time at full bandwidth.
Latencies, waits, barriers, atomics, the last round of workgroups and clocks below the peak are not in it, so
that real figures are lower, in matrix-bound kernels by a factor of two or so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import flash_rocm
from flash_rocm import runtime
from flash_rocm.amdgpu.chips import CHIPS, PRODUCTS
from flash_rocm.arch import arch_named

from .counts import InspectError, Mix, count, flop_rate, is_cdna
from .kernels import CACHE_KERNELS, DTYPES, MLA_HEADDIM, MLA_HEADDIM_V
from .report import Case

#: Tokens of the launch that is executed, of one head: enough that masked blocks are few.
SEQLEN = 2048


class CachedCall(NamedTuple):
    """The one sequence of a launch over a K/V cache that is executed."""

    keys: int
    rows: int  # query positions
    nheads: int
    nheads_k: int


CACHED = {
    "decode": CachedCall(4096, 1, 32, 8),
    "prefill": CachedCall(2048, 256, 4, 1),
    "mla": CachedCall(1024, 1, 128, 1),
}
PAGE_SIZE = 16
_L1_BYTES = 64
#: Cycles of the 32 banks that the launch counts, for one of the chip's: gfx950 has 64.
_LDS_CYCLES = {"gfx950": 2}
#: Kernels of a training step by their symbols.
KERNEL_OF_SYMBOL = {
    "attn_fwd_kernel": "forward",
    "attn_bwd_dq_kernel": "backward_dq",
    "attn_bwd_dkdv_kernel": "backward_dkdv",
}
#: Multiplications of a score by a row that a kernel has to do, and those of a backward call; 2 * headdim flop each.
PRODUCTS_OF = {"forward": 2, "backward_dq": 3, "backward_dkdv": 4, "decode": 2, "prefill": 2, "mla": 2}
PRODUCTS_OF_BACKWARD = 5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says of one launch.

    Attributes:
        cycles: by resource, the names of the module's text.
        flop: that the launch has to do, without what it does twice.
        tflops: predicted.
        peak_tflops: of the chip's matrix units for this type; None without matrix instructions.
    """

    cycles: dict[str, float]
    waves_per_simd: int
    flop: float
    tflops: float
    peak_tflops: float | None

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        return max(self.cycles, key=lambda name: self.cycles[name])

    @property
    def bandwidth_share(self) -> float:
        """Time that memory takes at its bandwidth, of the time that the resource which binds takes."""
        return self.cycles["memory"] / self.cycles[self.binding]

    @property
    def seconds(self) -> float:
        """Of the whole machine for this launch, as part of one that fills it."""
        return self.flop / self.tflops / 1e12


def _counted(stats: Any, arch: str) -> Mix:
    """Executions by kind, summed over waves."""
    total: dict[str, int] = dict.fromkeys((field.name for field in dataclasses.fields(Mix)), 0)
    for instruction, times in zip(stats.program.instructions, stats.per_instruction, strict=True):
        if times:
            for name, value in dataclasses.asdict(count([instruction], arch)).items():
                total[name] += value * int(times)
    return Mix(**total)


def predict(launch: Any, stats: Any, flop: float, itemsize: int) -> Prediction:
    """Model a launch.

    Args:
        launch: :class:`flash_rocm.virtual.Launch`.
        stats: what its run with ``measure=True`` returned.
        flop: that it has to do.
        itemsize: bytes of an element of q.

    Raises:
        InspectError: a chip, or a matrix instruction, whose rates are not known.
    """
    name = launch.code.arch
    if name not in PRODUCTS:
        raise InspectError(f"arch: the speed model expects one of {', '.join(PRODUCTS)}, got {name!r}")
    product, chip, arch = PRODUCTS[name], CHIPS[name], arch_named(name)
    simds, issue = (4, 4) if is_cdna(name) else (2, 1)
    mix = _counted(stats, name)
    registers = launch.code.descriptor.vgprs + launch.code.descriptor.agprs
    waves = chip.waves_per_simd(registers, launch.code.lds_bytes, launch.block_threads // arch.wave_size)
    vector, rest = mix.vector_cycles(name), mix.salu + mix.lds + mix.vmem + mix.smem + mix.scratch
    branches = sum(n for mnemonic, n in stats.per_mnemonic().items() if "branch" in mnemonic)
    memory_per_cycle = product.memory_gb_s / product.ghz / arch.num_cus
    cycles = {
        "matrix": mix.matrix_cycles / simds,
        "vector": (vector + issue * mix.matrix) / simds,
        "scalar": issue * (mix.salu + mix.smem + branches) / simds,
        "lds": stats.measured.lds_cycles / _LDS_CYCLES.get(name, 1),
        "vmem": stats.vmem_bytes / _L1_BYTES,
        "memory": sum(each.data.size for each in launch.gpu.memory.allocations()) / memory_per_cycle,
        "occupancy": (mix.matrix_cycles + vector + issue * rest) / simds / max(waves, 1),
    }
    per_second = arch.num_cus * product.ghz * 1e9
    rate = flop_rate(name, itemsize)
    peak = rate * simds * per_second / 1e12 if rate else None
    return Prediction(cycles, waves, flop, flop * per_second / max(cycles.values()) / 1e12, peak)


def visible_scores(seqlen: int, left: int, right: int) -> int:
    """Elements of the score matrix of one head of self-attention that a window leaves; -1: no limit."""
    left, right = (seqlen - 1 if side < 0 else min(side, seqlen - 1) for side in (left, right))
    return seqlen * (1 + left + right) - left * (left + 1) // 2 - right * (right + 1) // 2


def flop_of(kernel: str, headdim: int, scores: int) -> float:
    """What a kernel has to do for as many scores."""
    dims = (MLA_HEADDIM + MLA_HEADDIM_V) / 2 if kernel == "mla" else headdim
    return 2.0 * dims * PRODUCTS_OF[kernel] * scores


def predict_cases(cases: Sequence[Case]) -> dict[Case, Prediction]:
    """Execute a launch of each kernel on the virtual GPU, and model it.

    Raises:
        InspectError: see :func:`predict`; or a kernel that the model does not know.
        ValueError: what executes kernels is not installed.
    """
    found: dict[Case, Prediction] = {}
    for case in cases:
        if case.kernel not in PRODUCTS_OF:
            raise InspectError(f"kernel: the speed model expects one of {', '.join(PRODUCTS_OF)}, got {case.kernel!r}")
        if case not in found:
            found |= _predicted(case)
    return {case: found[case] for case in cases}


def _predicted(case: Case) -> dict[Case, Prediction]:
    """The kernels of a call: forward, the two of a backward, or the one over a cache, whichever ``case`` is of."""
    # Without the checks it runs twice as fast, and the tests are where they belong.
    from flash_rocm.virtual import Checks

    dtype, causal, cached = DTYPES[case.dtype], case.mask == "causal", case.kernel in CACHE_KERNELS
    scores = cached_scores(CACHED[case.kernel], causal) if cached else visible_scores(SEQLEN, -1, 0 if causal else -1)
    found: dict[Case, Prediction] = {}

    def run(launch: Any) -> None:
        kernel = case.kernel if launch.code.name == "attn_cache_kernel" else KERNEL_OF_SYMBOL.get(launch.code.name)
        if kernel is None:  # the combination of parts
            launch.run(checks=Checks.none())
            return
        stats = launch.run(measure=True, checks=Checks.none())
        flop = flop_of(kernel, case.headdim, scores)
        found[dataclasses.replace(case, kernel=kernel)] = predict(launch, stats, flop, dtype.itemsize)

    if cached:
        with flash_rocm.use_backend("triton"), flash_rocm.virtual_gpu(case.arch, on_launch=run):
            _attend_to_cache(case, dtype)
        return found
    generator = torch.Generator().manual_seed(0)
    shape, backward = (1, SEQLEN, 1, case.headdim), case.kernel.startswith("backward")
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_(backward) for _ in range(3))
    with flash_rocm.use_backend("triton"), flash_rocm.virtual_gpu(case.arch, on_launch=run):
        out = flash_rocm.flash_attn_func(q, k, v, causal=causal)
        if backward:
            torch.autograd.backward(out, torch.ones_like(q))
    return found


def cached_scores(call: CachedCall, causal: bool) -> int:
    """Elements of the score matrices of a call whose last keys are those of its rows."""
    hidden = call.rows * (call.rows - 1) // 2 if causal else 0
    return call.nheads * (call.rows * call.keys - hidden)


def _attend_to_cache(case: Case, dtype: torch.dtype) -> None:
    """A call over a full cache; mask "causal": in pages, as :func:`kernels.problem_of` has it."""
    call, generator, paged = CACHED[case.kernel], torch.Generator().manual_seed(0), case.mask == "causal"
    pages = call.keys // PAGE_SIZE
    cache = (pages, PAGE_SIZE) if paged else (1, call.keys)
    q = torch.randn((1, call.rows, call.nheads, case.headdim), generator=generator).to(dtype)
    k, v = (torch.randn((*cache, call.nheads_k, case.headdim), generator=generator).to(dtype) for _ in range(2))
    if case.kernel == "mla":
        v = k[..., :MLA_HEADDIM_V]
    table = torch.randperm(pages, generator=generator).int()[None] if paged else None
    flash_rocm.flash_attn_with_kvcache(q, k, v, cache_seqlens=call.keys, block_table=table, causal=paged)


def backward_tflops(predictions: dict[Case, Prediction]) -> dict[Case, float]:
    """Of backward calls whose two kernels were predicted; the case has kernel "backward"."""
    found: dict[Case, float] = {}
    for case, dq in predictions.items():
        dkdv = predictions.get(dataclasses.replace(case, kernel="backward_dkdv"))
        if case.kernel == "backward_dq" and dkdv is not None:
            flop = dq.flop * PRODUCTS_OF_BACKWARD / PRODUCTS_OF["backward_dq"]
            found[dataclasses.replace(case, kernel="backward")] = flop / (dq.seconds + dkdv.seconds) / 1e12
    return found


def as_json(predictions: dict[Case, Prediction]) -> str:
    """The predictions and the versions they are from, one a line; ``flash-rocm bench --report`` reads it."""
    versions = {"flash_rocm": flash_rocm.__version__, "triton": runtime.triton_version()}
    lines = ",\n".join(
        json.dumps({**dataclasses.asdict(case), **dataclasses.asdict(found), "binding": found.binding})
        for case, found in predictions.items()
    )
    return f'{{"environment": {json.dumps(versions)}, "modelled": [\n{lines}\n]}}'


def as_table(predictions: dict[Case, Prediction]) -> str:
    """A row for each kernel, then the backward calls."""
    head = (
        "arch",
        "kernel",
        "dtype",
        "d",
        "mask",
        "waves",
        "TFLOP/s",
        "of peak",
        "of bandwidth",
        "bound by",
        "cycles of it and others",
    )
    rows = [head]
    for case, found in predictions.items():
        longest = max(found.cycles.values())
        shares = sorted(((cycles / longest, name) for name, cycles in found.cycles.items()), reverse=True)
        others = " ".join(f"{name} {share:.2f}" for share, name in shares if share >= 0.1)
        peak = f"{found.tflops / found.peak_tflops:.0%}" if found.peak_tflops else "-"
        speed, share = f"{found.tflops:.0f}", f"{found.bandwidth_share:.0%}"
        numbers = (str(found.waves_per_simd), speed, peak, share, found.binding, f"{longest:.0f}: {others}")
        rows.append((case.arch, case.kernel, case.dtype, str(case.headdim), case.mask, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for case, tflops in backward_tflops(predictions).items():
        lines.append(f"  {case}: {tflops:.0f} TFLOP/s, both kernels together")
    keys = ", ".join(f"{kernel} {call.keys}" for kernel, call in CACHED.items())
    launches = f"{SEQLEN} tokens (keys: {keys})"
    title = f"modelled from a launch of {launches} executed on the virtual GPU; uncalibrated, an upper bound"
    return "\n".join([title, *lines])
