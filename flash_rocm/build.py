"""``flash-rocm build``: compile the kernels ahead of time into a folder that launches look into."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from flash_rocm import backends, described, runtime, tuned
from flash_rocm.arch import arch_named
from flash_rocm.bench.progress import Progress
from flash_rocm.config_schema import ConfigError
from flash_rocm.inspect import InspectError
from flash_rocm.inspect.cli import add_case_arguments, cases_of, names
from flash_rocm.inspect.kernels import CACHE_KERNELS, DTYPES, MASKS, TRAINING_KERNELS, problem_of
from flash_rocm.inspect.report import Case
from flash_rocm.runtime import ConfigSource

LAYOUTS = ("dense", "varlen")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; every list takes commas."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--triton", action="store_true", help="the Triton kernels")
    what.add_argument("--ck", action="store_true", help="the library of Composable Kernel, for --arch and --instances")
    what.add_argument("--cuda", action="store_true", help="the auxiliary kernels for NVIDIA GPUs, for --arch")
    add_case_arguments(parser, TRAINING_KERNELS)
    add(
        "--instances",
        metavar="PATTERNS",
        help="of the names of Composable Kernel's, such as 'forward_bf16_d128*', with commas between; default: all",
    )
    add(
        "--problem",
        action="append",
        metavar="TEXT",
        help="with --ck: compile what this call needs and is not there, beside the library; options of flash-rocm "
        "explain without dashes, 'shape=2,1024,1024,16,16,128 causal backward'; may be given several times",
    )
    add("--layout", type=names, default=list(LAYOUTS), metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)}; default: both")
    add(
        "--output",
        type=pathlib.Path,
        metavar="DIR",
        help="folder to fill; default: triton, ck or cuda in FLASH_ROCM_CACHE_DIR, where launches find it",
    )


def tasks_of(cases: Sequence[Case], layouts: Sequence[str], source: ConfigSource | None) -> Iterator[Any]:
    """What to compile: each kernel with every config that calls of some length or head grouping take.

    Raises:
        InspectError: a layout or head dim that cannot be built.
        ConfigError: a config is wrong.
    """
    planner, workers = backends.load_planner(), backends.load_workers()
    lengths = [1 << bits for bits in range(18)]
    for case in cases:
        if case.kernel in CACHE_KERNELS:
            # Their code depends on page size, rotary dims and which tensors a call brings.
            what = "kernels other than those over a K/V cache, which are compiled at first use"
            raise InspectError(f"--kernel: expected {what}, got {case.kernel!r}")
        if case.headdim % 8:
            raise InspectError(f"--headdim: expected multiples of 8, which aligned loads need, got {case.headdim}")
        arch = arch_named(case.arch)
        for layout in layouts:
            if layout not in LAYOUTS:
                raise InspectError(f"--layout: expected some of {', '.join(LAYOUTS)}, got {layout!r}")
            found = {}
            for length in lengths:
                for group in tuned.GROUPS:
                    problem = problem_of(case)
                    problem = dataclasses.replace(
                        problem,
                        seqlen_q=length,
                        seqlen_k=length,
                        nheads_k=problem.nheads // group,
                        varlen=layout == "varlen",
                    )
                    plain = planner.is_built_plain(case.kernel, problem)
                    found[planner.kernel_config(case.kernel, problem, arch, source, plain)] = problem
            for problem in found.values():
                yield workers.Task(case.kernel, problem, arch, source, with_host_part=True)


def run(args: argparse.Namespace) -> int:
    """Compile and say what came of it; 1 if a kernel failed, 2 for wrong arguments."""
    if args.problem and not args.ck:
        print("flash-rocm build: --problem: expected no value without --ck", file=sys.stderr)
        return 2
    if args.triton:
        return _run_triton(args)
    return _run_library(args, "ck" if args.ck else "cuda")


def _run_library(args: argparse.Namespace, name: str) -> int:
    """What is compiled from C++."""
    others = {"--kernel": args.kernel, "--headdim": args.headdim}
    others |= {"--dtype": args.dtype != list(DTYPES), "--mask": args.mask != list(MASKS)}
    others["--layout"] = args.layout != list(LAYOUTS)
    for option in (option for option, value in others.items() if value):
        hint = " Hint: --instances" if name == "ck" else ""
        print(f"flash-rocm build: {option}: expected no value with --{name}.{hint}", file=sys.stderr)
        return 2
    if name == "cuda" and args.instances is not None:
        print("flash-rocm build: --instances: expected no value without --ck", file=sys.stderr)
        return 2
    if args.problem:
        return _run_problems(args)
    folder = args.output or runtime.cache_dir() / name
    builder, request, source = backends.load_library_builder(name), runtime.build_request(), runtime.config_source()
    work = folder.parent / ("work" if name == "ck" else f"work-{name}")
    try:
        jobs = min(args.jobs, builder.jobs_of(request.max_jobs))
        request = request._replace(archs=tuple(args.arch), max_jobs=str(jobs))
        if args.instances is not None:
            request = request._replace(instances=args.instances)
        if name == "ck":
            made = len(builder.build(request, work, folder, source.folder if source else None))
            print(f"{made} instances in {folder} for {', '.join(args.arch)}")
        else:
            print(f"auxiliary kernels in {folder} for {', '.join(builder.build(request, work, folder))}")
    except (builder.BuildError, ConfigError, OSError) as error:
        print(f"flash-rocm build: {error}", file=sys.stderr)
        return 1
    if (runtime.built_ck() if name == "ck" else runtime.built_cuda()) != folder:
        named = folder.name == name
        print(f"calls find them with FLASH_ROCM_CACHE_DIR={folder.parent if named else '...'}", end="")
        print("" if named else f", where this folder has to be named {name}")
    return 0


def _run_problems(args: argparse.Namespace) -> int:
    """What described calls need of Composable Kernel."""
    for option, value in (("--instances", args.instances), ("--output", args.output)):
        if value is not None:
            print(f"flash-rocm build: {option}: expected no value with --problem", file=sys.stderr)
            return 2
    builder = backends.load_on_demand()
    try:
        problems = [described.problem_of(text) for text in args.problem]
        lacks = [
            f"{problem.options()}: {reason}"
            for problem in problems
            for arch in args.arch
            for reason in backends.incapacities("ck", problem, arch_named(arch), users_configs=True)
        ]
    except (ValueError, NotImplementedError) as error:
        print(f"flash-rocm build: {error}", file=sys.stderr)
        return 2
    if lacks:
        print("\n".join(f"flash-rocm build: --problem: {line}" for line in lacks), file=sys.stderr)
        return 1
    try:
        for arch in args.arch:
            for problem in problems:
                for found in builder.provide(problem, arch, lambda text: print(text, flush=True)):
                    how = f"compiled in {found.seconds:.0f} s" if found.seconds else "there already"
                    print(f"{found.name} for {arch}: {how}, {found.folder}", flush=True)
    except (builder.BuildError, ConfigError) as error:
        print(f"flash-rocm build: {error}", file=sys.stderr)
        return 1
    return 0


def _run_triton(args: argparse.Namespace) -> int:
    if args.instances is not None:
        print("flash-rocm build: --instances: expected no value without --ck", file=sys.stderr)
        return 2
    folder = args.output or runtime.cache_dir() / "triton"
    try:
        tasks = list(tasks_of(cases_of(args, TRAINING_KERNELS), args.layout, runtime.config_source()))
        folder.mkdir(parents=True, exist_ok=True)
        workers = backends.load_workers()
    except (InspectError, ConfigError) as error:
        print(f"flash-rocm build: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"flash-rocm build: --output: expected a folder to write to, {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"flash-rocm build: expected the triton package, {error}. Hint: pip install triton", file=sys.stderr)
        return 2
    with Progress(len(tasks), "building") as progress:
        results = workers.compile_all(
            tasks,
            args.jobs,
            cache=str(folder),
            each=lambda task, result: progress.step(f"{task.arch.name} {task.kernel}"),
        )
    failures = [(task, result) for task, result in zip(tasks, results, strict=True) if isinstance(result, str)]
    for task, why in failures:
        print(f"{task.arch.name} {task.kernel} {task.problem.describe()}: {why}", file=sys.stderr)
    print(f"{len(tasks) - len(failures)} kernels in {folder}, for Triton {runtime.triton_version()}")
    hosts = {(task.arch.vendor, x.host_part) for task, x in zip(tasks, results, strict=True) if not isinstance(x, str)}
    for vendor, why in sorted(hosts):
        if why:
            print(
                f"the C code that launches them on {vendor} GPUs could not be built here ({why}): the first launch "
                "needs a C compiler. Hint: build where the driver or ROCm is installed."
            )
    if runtime.prebuilt_kernels() != folder:
        named = folder.name == "triton"
        print(f"launches find them with FLASH_ROCM_CACHE_DIR={folder.parent if named else '...'}", end="")
        print("" if named else ", where this folder has to be named triton")
    return 1 if failures else 0
