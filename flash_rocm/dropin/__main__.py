"""``python -m flash_rocm.dropin SCRIPT [args]`` or ``-m MODULE [args]``: run a program with the drop-in installed."""

from __future__ import annotations

import os
import runpy
import sys

from flash_rocm.dropin import install

USAGE = "usage: python -m flash_rocm.dropin SCRIPT [args ...]\n       python -m flash_rocm.dropin -m MODULE [args ...]"


def main() -> int:
    """Run what the command line names, with its own arguments, as python itself would."""
    args = sys.argv[1:]
    if args[:1] in (["-h"], ["--help"]):
        print(__doc__, USAGE, sep="\n\n")
        return 0
    if not args or (args[0] == "-m" and len(args) < 2) or (args[0] != "-m" and args[0].startswith("-")):
        print(USAGE, file=sys.stderr)
        return 2
    if args[0] != "-m" and not os.path.exists(args[0]):
        print(f"SCRIPT: expected a file, got {args[0]!r}.\n{USAGE}", file=sys.stderr)
        return 2
    install()
    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        return 0
    sys.argv = args
    sys.path[0] = os.path.dirname(os.path.abspath(args[0]))
    runpy.run_path(args[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
