"""Many kernels compiled by several processes, for tuning and for ``flash-rocm build``.

Not threads: LLVM ends the process where it gives up, which may be somebody's training.  Not
``multiprocessing``: a fork after CUDA has started does not work, and a spawned child runs the main module
again, which a script that merely calls attention is not written for.  So each worker is a program of its own,
compile_worker.py; tasks and results cross its pipes, a line each.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flash_rocm import runtime
from flash_rocm.arch import Arch
from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import ConfigSource

_PROGRAM = f"{__package__}.compile_worker"


class Task(NamedTuple):
    """One kernel to compile, as a launch on contiguous, aligned tensors would."""

    kernel: str
    problem: AttentionProblem
    arch: Arch
    source: ConfigSource | None
    with_host_part: bool = False  # also the C code that launches it


class Compiled(NamedTuple):
    """What is known of a kernel that now lies in Triton's cache."""

    shared: int  # bytes of LDS
    host_part: str = ""  # why there is none, where it was asked for


#: A text says why a task failed, None that time was up before it was done.
Result = Compiled | str | None


def compile_all(
    tasks: Sequence[Task],
    jobs: int,
    deadline: float | None = None,
    cache: str | None = None,
    each: Callable[[Task, Result], None] = lambda task, result: None,
) -> list[Result]:
    """Compile into Triton's cache, ``jobs`` at a time.

    Args:
        deadline: of ``time.monotonic()``, after which workers are stopped.
        cache: folder to use as Triton's cache instead of the usual one.
        each: called as results come in, by one thread at a time.

    Returns:
        Results in the order of ``tasks``.
    """
    results: list[Result] = [None] * len(tasks)
    numbers = iter(range(len(tasks)))
    lock, workers = threading.Lock(), [_Worker(cache) for _ in range(min(jobs, len(tasks)))]

    def work(worker: _Worker) -> None:
        while deadline is None or time.monotonic() < deadline:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            result = worker.compile(tasks[number])
            with lock:
                results[number] = result
                each(tasks[number], result)

    with concurrent.futures.ThreadPoolExecutor(len(workers) or 1) as pool:
        running = [pool.submit(work, worker) for worker in workers]
        try:
            concurrent.futures.wait(running, None if deadline is None else max(0.0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.stop()
    for worker in workers:
        worker.close()
    for future in running:
        future.result()
    return results


class _Worker:
    """A process that compiles, started at its first task and again after it died."""

    def __init__(self, cache: str | None) -> None:
        self._cache, self._closed, self._lock = cache, False, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._resources = contextlib.ExitStack()
        self._log = self._resources.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - in the stack

    def _started(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is None:
                changes = {"TRITON_CACHE_DIR": self._cache} if self._cache else {}
                process = subprocess.Popen(
                    [sys.executable, "-m", _PROGRAM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    env=runtime.subprocess_environment(**changes),
                )
                self._process = self._resources.enter_context(process)
            return self._process

    def compile(self, task: Task) -> Result:
        process = self._started()
        if process is None:
            return None
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(base64.b64encode(pickle.dumps(task)) + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            answer = process.stdout.readline()  # type: ignore[union-attr]
        if answer:
            return pickle.loads(base64.b64decode(answer))
        with self._lock:
            status, self._process = process.wait(), None
            return None if self._closed else f"the compiler process died with status {status}{self._last_words()}"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def stop(self) -> None:
        """End the process; who waits for its answer gets None."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Give everything back, when nobody waits for an answer any more."""
        with contextlib.suppress(BrokenPipeError):  # a task that a dead process never read
            self._resources.close()
