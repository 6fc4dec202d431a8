"""``flash-rocm bench``: arguments, and the order of the work."""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys

import torch

from flash_rocm import files
from flash_rocm.bench import decode, environment, grid, memory, overhead, page, peers, plot, results, shapes
from flash_rocm.bench.progress import Progress
from flash_rocm.bench.report import Report

_DECODE_ROUNDS = 7
_EPILOG = """\
Every result is first compared with float64 on two heads; whoever is wrong gets no speed.  Peers take
turns in one process, each round starting with another one; a speed is the median over the rounds.  Calls
follow each other on the same inputs, so small inputs may stay in the L2 cache for all peers alike.  Peers
of layout bhsd get transposed views of the same tensors.  Exit status: 0 done, 1 flash_rocm has a wrong
or failed result, 2 wrong arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flash-rocm bench``."""
    parser.epilog = _EPILOG
    lengths, names = shapes.parse_lengths, tuple(peers.all_peers())
    what = parser.add_argument_group("what is measured (default: speed)")
    what.add_argument("--speed", action="store_true", help="TFLOP/s; to have it beside --memory or --overhead")
    what.add_argument("--memory", action="store_true", help="peak memory against standard attention")
    what.add_argument("--overhead", action="store_true", help="host time of one small call against sdpa-flash")
    what.add_argument("--decode", action="store_true", help="bytes of a K/V cache read per second; needs a GPU")
    size = parser.add_argument_group("shapes")
    size.add_argument("--preset", choices=("grid", "quick"), help="default: grid on a GPU, quick on the CPU")
    size.add_argument("--headdim", type=lengths, metavar="64,128,256", help="head dims")
    size.add_argument("--seqlen", type=lengths, metavar="512..16k", help="lengths: 512,4k or 512..16k (doubling)")
    size.add_argument("--mask", type=shapes.choices(shapes.MASKS), metavar="causal,full", help="default: both")
    size.add_argument("--dtype", choices=tuple(shapes.DTYPES), default="bf16", help="default: bf16")
    size.add_argument("--tokens", type=shapes.parse_length, metavar="16k", help="batch * seqlen")
    size.add_argument("--width", type=shapes.parse_length, metavar="2048", help="nheads * headdim")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--direction",
        type=shapes.choices(shapes.DIRECTIONS),
        default=shapes.DIRECTIONS,
        metavar="forward,backward,both",
        help="default: all three",
    )
    how.add_argument("--peers", type=shapes.choices(names), metavar="NAME,...", help=f"some of {', '.join(names)}")
    how.add_argument("--rounds", type=_positive, metavar="N", help="default: 7 (grid), 3 (quick), 31 (overhead)")
    how.add_argument("--device", default=None, help="default: cuda (also on ROCm) if there is one, else cpu")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=pathlib.Path, metavar="FILE", help="every round, written as it goes")
    output.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="PNG; needs matplotlib")
    output.add_argument(
        "--report", type=pathlib.Path, metavar="DIR", help="write an HTML page, DIR/index.html; needs matplotlib"
    )
    output.add_argument(
        "--results",
        type=pathlib.Path,
        nargs="+",
        metavar="PATH",
        help="with --report: measure nothing, show these JSON files of bench and inspect --model, or folders of them",
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a count of at least 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; returns the exit status."""
    try:
        _check_report(args)
        if args.results:
            _write_page(args, results.collect(args.results))
            return 0
        if args.decode:
            return _decode(args)
        report = _measure(args)
    except (ValueError, OSError) as error:
        print(f"flash-rocm bench: {error}", file=sys.stderr)
        return 2
    print(report.text())
    if args.json:
        print(f"\nwrote {args.json}")
    if args.plot:
        _plot(report, args.plot)
    if args.report:
        _write_page(args, [results.Results("this run", report)])
    statuses = {result.status for result in report.speed if result.peer == peers.SUBJECT}
    statuses |= {peak.status for peak in report.memory if peak.peer == peers.SUBJECT}
    statuses |= {item.status for item in report.overhead if item.peer == peers.SUBJECT}
    return 1 if {"wrong", "error"} & statuses else 0


def _check_report(args: argparse.Namespace) -> None:
    """Before anything is measured."""
    if args.results and not args.report:
        raise ValueError("--results: expected --report DIR beside it, got none.")
    if args.results:
        for name in ("speed", "memory", "overhead", "decode", "json", "plot"):
            if getattr(args, name):
                raise ValueError(f"--{name}: expected none beside --results, which measures nothing, got it.")
    if args.report and not plot.available():
        raise ValueError(f"--report: expected matplotlib. Hint: {plot.HINT}.")
    if args.report and args.report.exists() and not args.report.is_dir():
        raise ValueError(f"--report: expected a folder, got the file {args.report}.")


def _write_page(args: argparse.Namespace, shown: list[results.Results]) -> None:
    text, path = page.page(shown), args.report / "index.html"
    args.report.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


def _decode(args: argparse.Namespace) -> int:
    """Measure on its own: neither shapes nor peers are those of the others."""
    device = _device(args.device)
    if device.type != "cuda":
        raise ValueError(f"--decode: expected a GPU, got {device}.")
    if args.speed or args.memory or args.overhead or args.plot:
        raise ValueError("--decode: expected none of --speed, --memory, --overhead and --plot beside it.")
    dtype, found = shapes.DTYPES[args.dtype], []
    rounds = args.rounds or _DECODE_ROUNDS
    measured = decode.run(rounds, dtype, device, quick=args.preset == "quick")
    for item in itertools.chain(measured, decode.run_mla(rounds, dtype, device)):
        found.append(item)
        if args.json:
            record = {"environment": environment.describe(device), "decode": [each.to_json() for each in found]}
            files.write_whole(args.json, json.dumps(record, indent=1))
    print(decode.text(found), decode.mla_text(found), sep="\n\n")
    if args.report:
        shown = Report(environment.describe(device), {}, {})
        _write_page(args, [results.Results("this run", shown, found)])
    return 1 if any(item.status != "ok" for item in found if item.contender.startswith(peers.SUBJECT)) else 0


def _plot(report: Report, path: pathlib.Path) -> None:
    if not plot.available():
        print(f"no plot: {plot.HINT}", file=sys.stderr)
    elif plot.write(report, path):
        print(f"wrote {path}")
    else:
        print("no plot: nothing was measured that could be drawn", file=sys.stderr)


def _measure(args: argparse.Namespace) -> Report:
    device = _device(args.device)
    preset = shapes.preset_of(args.preset, device)
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: expected a file in an existing folder. Hint: create {path.absolute().parent}.")
    if args.plot and not plot.available():
        print(f"note: {plot.HINT}: there will be no plot", file=sys.stderr)
    rounds = args.rounds or preset.rounds
    settings = {
        "preset": args.preset,
        "directions": list(args.direction),
        "rounds": rounds,
        "dtype": args.dtype,
        "burst_seconds": 0.020 if device.type == "cuda" else 0.002,
        "inputs": "standard normal, float64 check on the first and the last head",
    }
    report = Report(environment.describe(device), settings, {})
    try:
        if args.speed or not (args.memory or args.overhead):
            _speed(args, report, preset, rounds, device)
        if args.memory:
            _memory(args, report, device)
        if args.overhead:
            _overhead(args, report, device)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
    _save(args, report)
    return report


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: expected cuda, cuda:N or cpu, got {name!r}.") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device: expected {'cuda, cuda:N or ' * torch.cuda.is_available()}cpu, got {name!r}.")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _save(args: argparse.Namespace, report: Report) -> None:
    if args.json:
        report.write(args.json)


def _choose(
    names: tuple[str, ...] | None, report: Report, device: torch.device, example: shapes.Shape, training: bool
) -> list[peers.Peer]:
    chosen, refused = peers.choose(names, device, example, training)
    report.unavailable.update(refused)
    return chosen


def _speed(
    args: argparse.Namespace,
    report: Report,
    preset: shapes.Preset,
    rounds: int,
    device: torch.device,
) -> None:
    todo = shapes.build_shapes(
        args.tokens or preset.tokens,
        args.width or preset.width,
        args.seqlen or preset.seqlens,
        args.headdim or preset.headdims,
        args.mask or shapes.MASKS,
        args.dtype,
    )
    training = set(args.direction) != {"forward"}
    chosen = _choose(args.peers, report, device, todo[0], training)
    steps = grid.steps_per_shape(chosen, args.direction, rounds)
    with Progress(len(todo) * steps, "speed") as bar:
        for shape in todo:
            used = 0

            def tick(text: str) -> None:
                nonlocal used
                used += 1
                bar.step(text)

            report.speed += grid.run_shape(shape, chosen, args.direction, rounds, device, tick)
            bar.step(str(shape), steps - used)
            _save(args, report)


def _memory(args: argparse.Namespace, report: Report, device: torch.device) -> None:
    lengths = args.seqlen or (memory.CPU_SEQLENS if device.type == "cpu" else memory.GPU_SEQLENS)
    todo = memory.shapes_of(sorted(lengths), args.dtype, args.mask == ("causal",), device)
    names = args.peers or (peers.SUBJECT, *peers.STANDARD)
    chosen = _choose(names, report, device, todo[0], True)
    with Progress(len(todo) * len(chosen), "memory") as bar:
        for peak in memory.run(todo, chosen, device, bar.step):
            report.memory.append(peak)
            _save(args, report)


def _overhead(args: argparse.Namespace, report: Report, device: torch.device) -> None:
    shape = overhead.small_shape(args.dtype, device)
    rounds, calls = overhead.rounds_and_calls(device)
    rounds = args.rounds or rounds
    names = args.peers or (peers.SUBJECT, peers.BASELINE)
    chosen = _choose(names, report, device, shape, True)
    with Progress(len(overhead.MODES) * len(chosen) * (rounds + 1), "overhead") as bar:
        report.overhead += overhead.run(shape, chosen, device, rounds, calls, bar.step)
