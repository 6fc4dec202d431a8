"""The ``flash-rocm`` command: info, explain, demo, bench, inspect, tune, build.

Exit status: 0 done, 1 the answer is no (no back end takes the call, the demo found a difference, a
kernel breaks its limits), 2 wrong arguments, told in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import flash_rocm
from flash_rocm import info, runtime, virtual_device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


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
        _add_explain_arguments(explain)
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


# --------------------------------------------------------------------------------------------------
# explain


def _integers(text: str, counts: tuple[int, ...], form: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")
    return numbers


def _shape(text: str) -> list[int]:
    numbers = _integers(text, (6, 7), "B,Sq,Sk,H,Hk,D[,Dv]")
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"expected sizes >= 0, got {text!r}")
    return numbers


def _window(text: str) -> list[int]:
    return _integers(text, (2,), "LEFT,RIGHT")


def _arch(text: str) -> runtime.Arch:
    try:
        return runtime.arch_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    shape = "B,Sq,Sk,H,Hk,D[,Dv]"
    add("--shape", type=_shape, default="2,1024,1024,16,16,64", metavar=shape, help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    add("--causal", action="store_true")
    add("--window", type=_window, default="-1,-1", metavar="LEFT,RIGHT", help="sliding window; -1: unlimited")
    add("--dropout", type=float, default=0.0, metavar="P")
    add("--softcap", type=float, default=0.0, metavar="CAP")
    add("--alibi", action="store_true")
    add("--sink", action="store_true", help="a learnable sink for each head")
    add("--varlen", action="store_true", help="B packed sequences of Sq and Sk tokens")
    add("--deterministic", action="store_true")
    add("--backward", action="store_true", help="the call needs gradients")
    add("--arch", type=_arch, metavar="ARCH", help="cpu, gfx942, sm90, ...; default: the first GPU here, else cpu")
    add("--backend", choices=runtime.REQUESTS, help="judge as if this one were asked for")


def _explain(args: argparse.Namespace) -> int:
    batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, *rest = args.shape
    headdim_v = rest[0] if rest else headdim

    def make(seqlen: int, heads: int, dim: int) -> torch.Tensor:
        shape = (batch * seqlen, heads, dim) if args.varlen else (batch, seqlen, heads, dim)
        return torch.empty(shape, dtype=DTYPES[args.dtype], device="meta", requires_grad=args.backward)

    call: dict[str, Any] = {
        "dropout_p": args.dropout,
        "causal": args.causal,
        "window_size": tuple(args.window),
        "softcap": args.softcap,
        "alibi_slopes": torch.empty(nheads, device="meta") if args.alibi else None,
        "learnable_sink": torch.empty(nheads, device="meta") if args.sink else None,
        "deterministic": args.deterministic,
    }
    if args.varlen:
        cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")
        call |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        call |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k}
    try:
        call["arch"] = args.arch or info.devices(virtual_device.active())[-1][1]
        with runtime.use_backend(args.backend or runtime.requested_backend()):
            found = flash_rocm.explain(
                make(seqlen_q, nheads, headdim),
                make(seqlen_k, nheads_k, headdim),
                make(seqlen_k, nheads_k, headdim_v),
                **call,
            )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"flash-rocm explain: {error}") from error
    print(found)
    return 0 if found.backend else 1


if __name__ == "__main__":
    sys.exit(main())
