"""Autotuning: candidates compiled by several processes, measured, the winner kept by ``tuned``.

What is measured follows from the key alone, not from the call that happens to come first, so that every
process finds the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flash_rocm import config, runtime, timing, tuned, virtual_device
from flash_rocm.amdgpu.chips import CHIPS, NVIDIA_SHARED
from flash_rocm.arch import Arch
from flash_rocm.config_schema import KernelConfig, Provenance
from flash_rocm.problem import AttentionProblem, default_softmax_scale
from flash_rocm.runtime import ConfigSource
from flash_rocm.tuned import CacheTuneKey, Outcome, TuneKey, TuningError

from . import cache_tuning, launch, workers
from .candidates import candidates
from .launcher import Launcher, pointers_of
from .plan import kernel_config, tune_key

#: Seconds for one key.
BUDGET = 60.0
#: Of these for compiling; measuring starts when it is over or everything is compiled.
_COMPILE_SHARE = 0.6
#: A winner must be this much faster than the config that was there: less is noise.
MIN_GAIN = 1.02
#: Elements of q: 64 MB of 16-bit numbers, enough work for every compute unit of the largest chip.
_ELEMENTS = 1 << 25
_HEADS = 16
_FINALISTS = 5
_ROUNDS = 7
_JOBS_MAX = 16

Say = Callable[[str], None]
#: (kernel, problem, one source of configs for each candidate, deadline) -> seconds of each, None: not known.
Clock = Callable[[str, AttentionProblem, Sequence[ConfigSource], float], list[float | None]]
#: The same, given the device to measure on first.
Measure = Callable[[torch.device, str, AttentionProblem, Sequence[ConfigSource], float], list[float | None]]
Compile = Callable[[Sequence[workers.Task], int, float], list[workers.Result]]


def problem_of(key: TuneKey) -> AttentionProblem:
    """The call that stands for a key: self-attention of sequences as long as the bucket's largest."""
    if isinstance(key, CacheTuneKey):
        return cache_tuning.problem_of(key)
    window = max(1, key.seqlen // 4)
    return AttentionProblem(
        dtype=getattr(torch, key.dtype),
        device_type="cuda",
        batch=max(1, _ELEMENTS // (_HEADS * key.headdim * key.seqlen)),
        seqlen_q=key.seqlen,
        seqlen_k=key.seqlen,
        nheads=_HEADS,
        nheads_k=_HEADS // key.group,
        headdim=key.headdim,
        headdim_v=key.headdim,
        softmax_scale=default_softmax_scale(key.headdim),
        window_left=window if key.mask == "window" else -1,
        window_right={"full": -1, "causal": 0, "window": window}[key.mask],
        varlen=key.varlen,
        needs_grad=key.kernel != "forward",
    )


# --------------------------------------------------------------------------------------------------
# Measuring


def _tensors(kernel: str, problem: AttentionProblem, device: torch.device) -> tuple[launch.Tensors, Any, Any]:
    """Pointers of a kernel, the tensors whose strides it takes, and the strides of softmax_lse."""
    # A generator of its own: tuning may not change what the caller draws next.
    generator = torch.Generator(device).manual_seed(0)
    rows = (problem.batch * problem.seqlen_q,) if problem.varlen else (problem.batch, problem.seqlen_q)

    def random(heads: int) -> torch.Tensor:
        shape = (*rows, heads, problem.headdim)
        return torch.randn(shape, generator=generator, device=device, dtype=problem.dtype)

    q, k, v = random(problem.nheads), random(problem.nheads_k), random(problem.nheads_k)
    starts = None
    if problem.varlen:
        starts = torch.arange(problem.batch + 1, device=device, dtype=torch.int32) * problem.seqlen_q
    lse_shape = (problem.nheads, *rows) if problem.varlen else (problem.batch, problem.nheads, problem.seqlen_q)
    # Values have no influence on speed, but for infinities and NaN.
    lse = torch.full(lse_shape, 10.0, device=device)
    lse_strides = launch.lse_strides_of(lse)
    optional = (None, None, starts, starts)
    if kernel == "forward":
        return (q, k, v, torch.empty_like(q), lse, *optional, None), (q, k, v), lse_strides
    dout, delta = random(problem.nheads), torch.zeros_like(lse)
    tensors: launch.Tensors
    if kernel == "backward_dq":
        tensors = (q, k, v, dout, torch.zeros_like(q), lse, None, delta, torch.empty_like(q), *optional)
    else:
        tensors = (q, k, v, dout, lse, delta, torch.empty_like(k), torch.empty_like(v), *optional)
    return tensors, (q, k, v, dout), lse_strides


def execute(kernel: str, problem: AttentionProblem, source: ConfigSource) -> None:
    """Launch a kernel once on the virtual GPU in use."""
    tensors, strided, lse_strides = _tensors(kernel, problem, torch.device("cpu"))
    call = launch.new_call(kernel, problem, source, tensors, strided, lse_strides, None)
    launch.KERNELS[kernel].launch_new(None, call)


def _runner(kernel: str, problem: AttentionProblem, device: torch.device) -> tuple[Callable[[ConfigSource], None], int]:
    """What launches a kernel with the configs of a source, and how often."""
    tensors, strided, lse_strides = _tensors(kernel, problem, device)
    # Its own: what it has loaded goes when it goes, but for the winner.
    launcher = Launcher(launch.KERNELS[kernel].kernel)
    pointers, _ = pointers_of(tensors)

    def run(source: ConfigSource) -> None:
        if not launcher.launch_known((source,), [*pointers, *lse_strides]):
            call = launch.new_call(kernel, problem, source, tensors, strided, lse_strides, None)
            launcher.launch_new((source,), call)

    return run, 1


def measure(
    device: torch.device, kernel: str, problem: AttentionProblem, sources: Sequence[ConfigSource], deadline: float
) -> list[float | None]:
    """Seconds per launch under each source of configs, the first being the default.

    Each is timed once; the default and the fastest then in rounds in turn, of which the median counts, and
    what is left at the deadline has no time.
    """
    with torch.cuda.device(device):
        run, launches = cache_tuning.runner(problem, device) if problem.cached else _runner(kernel, problem, device)
        clock = timing.Clock(device)
        entries = [timing.Entry(str(number), functools.partial(run, source)) for number, source in enumerate(sources)]
        for entry in entries:
            if entry is entries[0] or time.monotonic() < deadline:
                timing.interleave([entry], 1, clock, lambda name: None)
        timed = sorted((entry for entry in entries[1:] if entry.seconds), key=lambda entry: entry.seconds[0])
        finalists = [entries[0], *timed[:_FINALISTS]]
        if timed and entries[0].seconds:
            # A round times each once after a call that is not timed; before the first come calls to calibrate.
            round_seconds = sum((entry.iterations + 3) * entry.seconds[0] for entry in finalists)
            rounds = min(_ROUNDS, max(1, int((deadline - time.monotonic()) / round_seconds)))
            for entry in finalists:
                entry.seconds.clear()
            timing.interleave(finalists, rounds, clock, lambda name: None)
    return [timing.median(x.seconds) / launches if x in finalists and x.seconds else None for x in entries]


# --------------------------------------------------------------------------------------------------
# Tuning


def _jobs() -> int:
    return min(_JOBS_MAX, len(os.sched_getaffinity(0)))


def _fits(result: workers.Result, arch: Arch) -> bool:
    limit = CHIPS[arch.name].lds_per_workgroup if arch.name in CHIPS else NVIDIA_SHARED.get(arch.name)
    return isinstance(result, workers.Compiled) and (limit is None or result.shared <= limit)


def tune(
    key: TuneKey,
    device: torch.device,
    source: ConfigSource | None,
    budget: float,
    say: Say,
    *,
    compile_all: Compile = workers.compile_all,
    measure: Measure = measure,
) -> Outcome:
    """Find the fastest options for a key on the GPU that is here; see :func:`search`."""
    found_by = Provenance("measured", note=torch.cuda.get_device_name(device))
    clock = functools.partial(measure, device)
    return search(key, virtual_device.arch_of(device), source, budget, say, clock, found_by, compile_all)


def search(
    key: TuneKey,
    arch: Arch,
    source: ConfigSource | None,
    budget: float,
    say: Say,
    clock: Clock,
    found_by: Provenance,
    compile_all: Compile = workers.compile_all,
) -> Outcome:
    """Find the options for a key that take the fewest seconds, as some clock has it.

    Args:
        source: the configs to start from, without entries that were tuned before.
        budget: seconds.
        found_by: how and by what seconds are told; date and compiler are filled in.

    Raises:
        TuningError: nothing compiled, or the default could not be measured.
    """
    start, problem = time.monotonic(), problem_of(key)
    plain = ConfigSource(folder=source.folder if source else None)
    default = kernel_config(key.kernel, problem, arch, plain)
    tried = candidates(key.kernel, default, arch, key.headdim, problem.dtype.itemsize)
    say(f"tuning {key} on {arch.name}: {len(tried)} candidates, at most {budget:.0f} s")
    sources = [plain._replace(kernels=json.dumps({key.kernel: entry.options()})) for entry in tried]
    tasks = [workers.Task(key.kernel, problem, arch, each) for each in sources]
    try:
        compiled = compile_all(tasks, _jobs(), start + _COMPILE_SHARE * budget)
    except OSError as error:
        raise TuningError(f"{key}: expected to start compiler processes, {error}") from error
    if not any(isinstance(result, workers.Compiled) for result in compiled):
        raise TuningError(f"{key}: expected candidates that compile, got none: {compiled[0] or 'no time'}")
    usable = [n for n, result in enumerate(compiled) if n == 0 or _fits(result, arch)]
    say(f"  {len(usable)} compiled and fit, {time.monotonic() - start:.0f} s")
    seconds = clock(key.kernel, problem, [sources[n] for n in usable], start + budget)
    timed = {tried[n]: found for n, found in zip(usable, seconds, strict=True) if found is not None}
    if default not in timed:
        raise TuningError(f"{key}: expected to measure the default config, {default.describe()}, and could not")
    outcome = _outcome(default, timed, found_by)
    say(
        f"  {found_by.how}: {outcome.seconds_before * 1e3:.4f} ms -> {outcome.seconds_after * 1e3:.4f} ms, "
        f"{outcome.gain:.2f}x with {outcome.options}, {time.monotonic() - start:.0f} s"
    )
    return outcome


def _outcome(default: KernelConfig, timed: dict[KernelConfig, float], found_by: Provenance) -> Outcome:
    best = min(timed, key=lambda entry: timed[entry])
    if timed[default] < MIN_GAIN * timed[best]:
        best = default
    today = datetime.date.today().isoformat()
    provenance = dataclasses.replace(found_by, date=today, compiler=f"Triton {runtime.triton_version()}")
    return Outcome(best.options(), provenance, timed[default], timed[best])


# --------------------------------------------------------------------------------------------------
# At first use


_tried: set[tuple[str, TuneKey]] = set()
_one_at_a_time = threading.RLock()


def _say(text: str) -> None:
    print(f"flash_rocm: {text}", file=sys.stderr, flush=True)


def tune_at_first_use(kernel: str, problem: AttentionProblem, device: torch.device, source: ConfigSource) -> bool:
    """See to it that the key of a call is tuned, or cannot be; False where now is not the time.

    Never raises for want of a GPU, memory, time or a folder: the default config serves, and the log says why.
    """
    if device.type != "cuda" or source.tuned is None or config.is_overridden(kernel, source):
        return True
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            runtime.log_once("tuning: not during graph capture, using the default config", logging.WARNING)
            return False
    key = tune_key(kernel, problem, virtual_device.arch_of(device))
    with _one_at_a_time:
        if (source.tuned, key) in _tried or tuned.find(source.tuned, key) is not None:
            return True
        _tried.add((source.tuned, key))
        tuned.obtain(source.tuned, key, lambda: _tune_or_say_why_not(key, device, source), 2 * BUDGET + 60.0)
    return True


def _tune_or_say_why_not(key: TuneKey, device: torch.device, source: ConfigSource) -> Outcome | None:
    try:
        return tune(key, device, source, BUDGET, _say)
    except (TuningError, torch.OutOfMemoryError) as error:
        runtime.log_once(f"tuning {key}: not done, using the default config: {error}", logging.WARNING)
        return None
