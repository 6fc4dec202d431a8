"""``flash-rocm tune --model``: kernel configs compared by the speed model instead of on a GPU.

A candidate is compiled, one short launch of it executed on the virtual GPU, and its seconds predicted by
:mod:`flash_rocm.inspect.model`.  Uncalibrated: it ranks, and what it says of time was compared with no chip.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from flash_rocm import backends, virtual_device
from flash_rocm.amdgpu.chips import PRODUCTS
from flash_rocm.arch import Arch
from flash_rocm.bench.progress import Progress
from flash_rocm.config_schema import ConfigError, Provenance
from flash_rocm.inspect import InspectError, model
from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import ConfigSource
from flash_rocm.tuned import Outcome, TuneKey

#: Scores of the launch that is executed: long enough for the loops, short enough for seconds a candidate.
_SCORES = 1024 * 1024
#: (kernel, problem, arch, configs) -> seconds.
Predict = Callable[[str, AttentionProblem, Arch, ConfigSource], float]


def check_arch(arch: str) -> None:
    """Raise VirtualDeviceError for a chip that cannot be executed here, or that the model does not know."""
    if arch not in PRODUCTS:
        raise virtual_device.VirtualDeviceError(f"--model: expected one of {', '.join(PRODUCTS)}, got {arch!r}")
    virtual_device.check(arch, "--model")


def shortened(problem: AttentionProblem) -> AttentionProblem:
    """The same kind of call with one sequence, the query heads of one key head, and few tokens."""
    longest = 1 << int(math.log2(_SCORES / problem.group_size)) // 2
    seqlen = min(problem.seqlen_q, longest)

    def side(window: int) -> int:
        return window if window <= 0 else max(1, window * seqlen // problem.seqlen_q)

    return dataclasses.replace(
        problem,
        device_type="cpu",
        batch=1,
        nheads=problem.group_size,
        nheads_k=1,
        seqlen_q=seqlen,
        seqlen_k=seqlen,
        window_left=side(problem.window_left),
        window_right=side(problem.window_right),
    )


def _flop(kernel: str, problem: AttentionProblem) -> float:
    scores = model.visible_scores(problem.seqlen_q, problem.window_left, problem.window_right)
    return model.flop_of(kernel, problem.headdim, scores * problem.batch * problem.nheads)


def predicted_seconds(kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource) -> float:
    """Seconds of a launch, predicted from a shorter one."""
    from flash_rocm.virtual import Checks

    short = shortened(problem)
    found: list[model.Prediction] = []

    def run(launch: Any) -> None:
        stats = launch.run(measure=True, checks=Checks.none())
        found.append(model.predict(launch, stats, _flop(kernel, short), problem.dtype.itemsize))

    with virtual_device.virtual_gpu(arch.name, on_launch=run):
        backends.load_tuner().execute(kernel, short, source)
    return _flop(kernel, problem) / found[0].tflops / 1e12


def tune(
    key: TuneKey,
    arch: Arch,
    source: ConfigSource | None,
    budget: float,
    say: Callable[[str], None],
    predict: Predict = predicted_seconds,
) -> Outcome:
    """Find the options for a key that the model says are fastest.

    Candidates are looked at nearest to the default first, until ``budget`` seconds have passed.

    Raises:
        TuningError: nothing compiles, or the default does not run.
    """
    # Only this needs numpy.
    from flash_rocm.virtual import CodeObjectError, UnsupportedInstruction

    def clock(
        kernel: str, problem: AttentionProblem, sources: Sequence[ConfigSource], deadline: float
    ) -> list[float | None]:
        found: list[float | None] = [None] * len(sources)
        with Progress(len(sources), "modelling") as progress:
            for number, each in enumerate(sources):
                # The default always: without it there is nothing to compare with.
                if number and time.monotonic() >= deadline:
                    say(f"  the time is over, {len(sources) - number} candidates were not looked at")
                    break
                try:
                    found[number] = predict(kernel, problem, arch, each)
                except (ConfigError, CodeObjectError, UnsupportedInstruction, InspectError) as error:
                    say(f"  left out, {each.kernels}: {error}")
                progress.step()
        return found

    found_by = Provenance("model", note=f"{PRODUCTS[arch.name].name}, uncalibrated")
    return backends.load_tuner().search(key, arch, source, budget, say, clock, found_by)
