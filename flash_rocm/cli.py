"""The ``flash-rocm`` command: info, explain, demo, bench, inspect, tune, build.

Exit status: 0 done, 1 the answer is no (no back end takes the call, the demo found a difference, a
kernel breaks its limits), 2 wrong arguments, told in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import flash_rocm
from flash_rocm import info


class UsageError(Exception):
    """Wrong arguments; the text is the one line that the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, run = _build_parser(arguments[0] if arguments else "")
        return run(parser.parse_args(arguments))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


def _build_parser(command: str) -> tuple[_Parser, Callable[[argparse.Namespace], int]]:
    """The parser, and what runs ``command``: only that one's module is imported."""
    parser = _Parser(prog="flash-rocm", description="FlashAttention for AMD GPUs first.")
    parser.add_argument("--version", action="version", version=f"flash-rocm {flash_rocm.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    about = commands.add_parser("info", help="versions, devices, environment, back ends and what they support")
    explain = commands.add_parser("explain", help="which back end a call takes, and why the others do not")
    demo = commands.add_parser("demo", help="a pretrained sentence encoder with its attention run by flash_rocm")
    bench = commands.add_parser("bench", help="speed and memory against the peers that are installed")
    inspect = commands.add_parser("inspect", help="what the kernels compile to, for chips that are not here")
    tune = commands.add_parser("tune", help="measure kernel configs on the GPU that is here, and keep the fastest")
    build = commands.add_parser("build", help="compile the kernels ahead of time, for images that start hot")
    if command == "explain":
        from flash_rocm import described

        described.add_arguments(explain)
        return parser, _explain
    if command == "demo":
        from flash_rocm import demo as demo_module

        demo_module.add_arguments(demo)
        return parser, demo_module.run
    if command == "bench":
        from flash_rocm.bench import cli as bench_cli

        bench_cli.add_arguments(bench)
        return parser, bench_cli.run
    if command == "tune":
        from flash_rocm.tune import cli as tune_cli

        tune_cli.add_arguments(tune)
        return parser, tune_cli.run
    if command == "build":
        from flash_rocm import build as build_module

        build_module.add_arguments(build)
        return parser, build_module.run
    if command == "inspect":
        from flash_rocm.inspect import cli as inspect_cli

        inspect_cli.add_arguments(inspect)
        return parser, inspect_cli.run
    info.add_arguments(about)
    return parser, info.run


def _explain(args: argparse.Namespace) -> int:
    from flash_rocm import described

    try:
        found = described.explanation_of(args)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"flash-rocm explain: {error}") from error
    print(found)
    return 0 if found.backend else 1


if __name__ == "__main__":
    sys.exit(main())
