"""``flash-rocm inspect``: what the kernels compile to, for chips that are not here."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable

from flash_rocm import runtime, virtual_device
from flash_rocm.config_schema import ConfigError

from .batch import inspect_cases
from .counts import InspectError
from .judge import CHECKS, differences, violations
from .kernels import (
    AMD_ARCHS,
    DTYPES,
    HEADDIMS,
    KERNELS,
    MASKS,
    NVIDIA_ARCHS,
    SHIPPED_KERNELS,
    check_case,
    headdims_of,
    is_shipped,
)
from .library import inspect_library
from .objects import inspect_object
from .report import Case, Report
from .tables import as_json, as_table, read_json


def names(text: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in text.split(",")]


def names_and_groups(groups: dict[str, tuple[str, ...]]) -> Callable[[str], list[str]]:
    """Names with commas between, groups of them written out."""
    return lambda text: [member for name in names(text) for member in groups.get(name, (name,))]


def numbers(text: str) -> list[int]:
    """Numbers with commas between."""
    try:
        return [int(name) for name in names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}") from error


def jobs(text: str) -> int:
    """A number of processes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text!r}")
    return int(text)


def add_case_arguments(parser: argparse.ArgumentParser, kernels: tuple[str, ...] = SHIPPED_KERNELS) -> None:
    """Arguments that say which kernels, by default ``kernels``; every list takes commas."""
    add = parser.add_argument
    add(
        "--arch",
        type=names_and_groups({"all": AMD_ARCHS + NVIDIA_ARCHS, "amd": AMD_ARCHS}),
        required=True,
        metavar="ARCH",
        help=f"gfx942 and the like, amd ({', '.join(AMD_ARCHS)}) or all",
    )
    add(
        "--kernel",
        type=names_and_groups({"all": kernels}),
        metavar="KERNEL",
        help=f"of {', '.join(KERNELS)}, or all ({', '.join(kernels)}); default: all, but of those over a K/V cache "
        "a part of their head dims and masks",
    )
    add("--dtype", type=names, default=list(DTYPES), metavar="DTYPE", help=f"of {', '.join(DTYPES)}; default: all")
    add("--headdim", type=numbers, metavar="D", help=f"default: {', '.join(map(str, HEADDIMS))}; of mla 576")
    add("--mask", type=names, default=list(MASKS), metavar="MASK", help=f"of {', '.join(MASKS)}; default: both")
    add("--jobs", type=jobs, default=os.cpu_count() or 1, help="compiler processes; default: %(default)s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_case_arguments(parser)
    add = parser.add_argument
    add("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    add("--output", type=pathlib.Path, metavar="FILE", help="write there instead of to the terminal")
    add("--diff", type=pathlib.Path, metavar="OLD.json", help="print what changed since a run with --format json")
    add(
        "--check",
        nargs="?",
        const=CHECKS[0],
        choices=CHECKS,
        help="exit with 1 if a kernel breaks the limits of its config entry; oldest: only what it may spill with the "
        "oldest Triton, since R and waves per SIMD were declared for a newer one",
    )
    add(
        "--model",
        action="store_true",
        help="also execute a launch of each kernel on the virtual GPU and predict TFLOP/s and what binds it "
        "(modelled, uncalibrated; seconds a kernel), with --backend ck beside Triton's; with --format json only that "
        "is printed",
    )
    add("--object", type=pathlib.Path, metavar="FILE.co", help="inspect this code object instead of our kernels")
    add(
        "--backend",
        choices=("triton", "ck"),
        default="triton",
        help="ck: the built library, of which --kernel takes patterns of names, 'forward_*'; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    """Inspect and print; 1 if a check or a compilation failed, 2 for wrong arguments."""
    try:
        old = read_json(args.diff) if args.diff else None
        reports, failures = _reports(args)
        text = as_json(reports) if args.format == "json" else as_table(reports)
        if args.model and args.format == "json":
            text = _model(args, reports)
        elif args.model:
            text += f"\n\n{_model(args, reports)}"
        _write(text, args.output)
    except (InspectError, ConfigError, virtual_device.VirtualDeviceError) as error:
        print(f"flash-rocm inspect: {error}", file=sys.stderr)
        return 2
    if old is not None:
        lines = list(differences(old, reports))
        print("\n".join(lines) or "no difference", file=sys.stderr if args.format == "json" else sys.stdout)
    broken = [f"check: {line}" for line in violations(reports, args.check)] if args.check else []
    for line in (*failures, *broken):
        print(line, file=sys.stderr)
    return 1 if failures or broken else 0


def _model(args: argparse.Namespace, reports: list[Report]) -> str:
    """What --model prints: a table beneath that of the reports, or as JSON in its place."""
    if args.object:
        raise InspectError("--model: expected without --object, got both")
    # Only this needs numpy.
    from . import ck_model, model

    cases = [report.case for report in reports]
    if args.backend == "ck":
        compared = ck_model.compare(list(dict.fromkeys(cases)))
        return ck_model.as_json(compared) if args.format == "json" else ck_model.as_table(compared)
    found = model.predict_cases(cases)
    return model.as_json(found) if args.format == "json" else model.as_table(found)


def _write(text: str, output: pathlib.Path | None) -> None:
    if output is None:
        print(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InspectError(f"--output: expected a file to write to, {error}") from error


def cases_of(args: argparse.Namespace, kernels: tuple[str, ...] = SHIPPED_KERNELS) -> list[Case]:
    """The kernels that :func:`add_case_arguments` name; of kernels that are not named, what :func:`is_shipped`.

    Raises:
        InspectError: a name is none.
    """
    cases = [
        Case(arch, kernel, dtype, headdim, mask)
        for arch in args.arch
        for kernel in args.kernel or kernels
        for dtype in args.dtype
        for headdim in args.headdim or headdims_of(kernel)
        for mask in args.mask
    ]
    cases = [case for case in dict.fromkeys(cases) if args.kernel or is_shipped(case)]
    for case in cases:
        check_case(case)
    return cases


def _reports(args: argparse.Namespace) -> tuple[list[Report], list[str]]:
    if args.backend == "ck":
        if args.object or args.mask != list(MASKS):
            raise InspectError("--backend ck: expected without --object and --mask. Hint: --kernel '*_masked'")
        return inspect_library(args.arch, args.kernel or [], args.dtype, args.headdim or []), []
    return _object_reports(args) if args.object else _kernel_reports(args)


def _kernel_reports(args: argparse.Namespace) -> tuple[list[Report], list[str]]:
    return inspect_cases(cases_of(args), runtime.config_source(), args.jobs)


def _object_reports(args: argparse.Namespace) -> tuple[list[Report], list[str]]:
    kernels, headdims = args.kernel or ["forward"], args.headdim or [0]
    for name, values in (("--arch", args.arch), ("--kernel", kernels), ("--headdim", headdims)):
        if len(values) != 1:
            raise InspectError(f"{name}: expected one value beside --object, got {', '.join(map(str, values))}")
    return inspect_object(args.object, args.arch[0], kernels[0], headdims[0]), []
