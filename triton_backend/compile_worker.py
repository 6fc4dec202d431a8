"""The program that workers.py runs: compiles what its standard input names, a pickled task per line."""

from __future__ import annotations

import base64
import os
import pickle
import sys

from . import offline
from .workers import Compiled, Result, Task


def _compile(task: Task) -> Result:
    try:
        compiled = offline.compile_kernel(task.kernel, task.problem, task.arch, source=task.source)
    except Exception as error:  # noqa: BLE001 - compilers raise anything; the caller shows it or goes without
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"
    host_part = offline.build_host_part(compiled, task.arch) if task.with_host_part else ""
    return Compiled(compiled.metadata.shared, host_part)


def main() -> None:
    """Answer each line; what compilers print goes to the standard error."""
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        for line in sys.stdin.buffer:
            answer = _compile(pickle.loads(base64.b64decode(line)))
            output.write(base64.b64encode(pickle.dumps(answer)) + b"\n")
            output.flush()


if __name__ == "__main__":
    main()
