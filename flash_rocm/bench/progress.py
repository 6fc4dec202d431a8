"""A progress bar on stderr: tqdm's if installed, else a plain line."""

from __future__ import annotations

import importlib.util
import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Counts steps towards ``total``; a context manager."""

    def __init__(self, total: int, label: str) -> None:
        self._total, self._label, self._done = max(total, 1), label, 0
        self._start = self._shown = time.monotonic()
        self._bar: Any = None
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, file=sys.stderr, dynamic_ncols=True, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif sys.stderr.isatty():
            print(file=sys.stderr)

    def step(self, text: str = "", steps: int = 1) -> None:
        """Advance, showing ``text``."""
        self._done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(steps)
            return
        # A log gets a line now and then, a terminal one that is rewritten.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        now = time.monotonic()
        if now - self._shown < interval and self._done < self._total:
            return
        self._shown = now
        line = f"{self._label} {self._done}/{self._total} ({now - self._start:.0f} s) {text}"
        print(
            f"\r{line:<79.120}" if sys.stderr.isatty() else line,
            end="" if sys.stderr.isatty() else "\n",
            file=sys.stderr,
            flush=True,
        )
