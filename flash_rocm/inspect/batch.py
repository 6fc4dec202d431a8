"""Many reports: cached ones at once, the others compiled by several processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Sequence

from flash_rocm.bench.progress import Progress
from flash_rocm.config_schema import ConfigError
from flash_rocm.runtime import ConfigSource

from .counts import InspectError
from .kernels import cached_report, compiled_report
from .report import Case, Report


def _attempt(case: Case, source: ConfigSource | None) -> Report | str:
    """A report, or why there is none."""
    try:
        return compiled_report(case, source)
    except (InspectError, ConfigError) as error:
        return str(error)


def inspect_cases(cases: Sequence[Case], source: ConfigSource | None, jobs: int) -> tuple[list[Report], list[str]]:
    """Reports in the order of ``cases``, and the texts of those that failed.

    Raises:
        ConfigError: a config is wrong.
    """
    found: dict[Case, Report | str] = {}
    for case in cases:
        report = cached_report(case, source)
        if report is not None:
            found[case] = report
    missing = [case for case in cases if case not in found]
    if missing:
        with Progress(len(missing), f"compiling ({len(found)} known)") as progress:
            if jobs == 1 or len(missing) == 1:
                for case in missing:
                    found[case] = _attempt(case, source)
                    progress.step(str(case))
            else:
                found |= _in_processes(missing, source, min(jobs, len(missing)), progress)
    results = [found[case] for case in cases]
    return [x for x in results if isinstance(x, Report)], [x for x in results if isinstance(x, str)]


def _in_processes(
    cases: Sequence[Case], source: ConfigSource | None, jobs: int, progress: Progress
) -> dict[Case, Report | str]:
    found: dict[Case, Report | str] = {}
    # Not forked: this process may have threads of torch.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(_attempt, case, source): case for case in cases}
        for future in concurrent.futures.as_completed(futures):
            case = futures[future]
            try:
                found[case] = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                # LLVM ends the process where it gives up, and every case that waited ends with it.
                found[case] = f"{case}: the compiler process died. Hint: --jobs 1 shows where"
            progress.step(str(case))
    return found
