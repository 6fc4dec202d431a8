"""``flash-rocm tune``: measure kernel configs on the GPU that is here, and keep the fastest."""

from __future__ import annotations

import argparse
import math
import pathlib
import sys

import torch

from flash_rocm import backends, runtime, tuned, virtual_device
from flash_rocm.config_schema import ConfigError
from flash_rocm.inspect.cli import names
from flash_rocm.tuned import Outcome, TuneKey, TuningError

from . import shapes
from .write import one_for_each_rule, write

KERNELS = ("forward", "backward_dq", "backward_dkdv")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1.0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds >= 1, got {text!r}")
    return seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--shapes", required=True, metavar="FILE.yaml|PRESET", help=f"presets: {', '.join(shapes.PRESETS)}")
    add(
        "--write",
        type=pathlib.Path,
        metavar="DIR",
        help="put the winners into DIR/<arch>.json, a folder for FLASH_ROCM_CONFIG_DIR; the cache has them anyway",
    )
    add("--budget", type=_seconds, default=60.0, metavar="SECONDS", help="for each key; default: %(default)s")
    add("--kernel", type=names, default=list(KERNELS), help=f"of {', '.join(KERNELS)}; default: all")
    add("--arch", metavar="ARCH", help="refuse to run on any other chip; default: whatever is here")


def run(args: argparse.Namespace) -> int:
    """Tune, print old beside new, write; 1 if a key could not be tuned, 2 for wrong arguments or no GPU."""
    try:
        device, arch = _device(args.arch)
        for kernel in args.kernel:
            if kernel not in KERNELS:
                raise shapes.ShapesError(f"--kernel: expected some of {', '.join(KERNELS)}, got {kernel!r}")
        keys = shapes.keys_of(shapes.read(args.shapes), args.kernel, arch)
        done, failed = _tune_all(keys, device, args.budget)
        if args.write is not None:
            _write(args.write, arch.name, done)
    except (shapes.ShapesError, ConfigError) as error:
        print(f"flash-rocm tune: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"flash-rocm tune: --write: expected a folder to write to, {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _device(wanted: str | None) -> tuple[torch.device, runtime.Arch]:
    if not torch.cuda.is_available():
        raise shapes.ShapesError(
            "expected a GPU to measure on, found none. Hint: flash-rocm inspect compares configs without one."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    arch = virtual_device.arch_of(device)
    if wanted not in (None, arch.name):
        raise shapes.ShapesError(f"--arch: expected {arch.name}, the GPU that is here, got {wanted!r}")
    reasons = backends.availability_reasons("triton", arch)
    if reasons:
        raise shapes.ShapesError(f"the triton back end cannot run here: {'; '.join(reasons)}")
    return device, arch


def _tune_all(
    keys: list[TuneKey], device: torch.device, budget: float
) -> tuple[list[tuple[TuneKey, Outcome]], list[TuneKey]]:
    """Outcomes of all keys, those of earlier runs read from the cache, and the keys that have none."""
    tuner, source = backends.load_tuner(), runtime.config_source()
    folder = str(runtime.cache_dir() / "tuning")
    done: list[tuple[TuneKey, Outcome]] = []
    failed: list[TuneKey] = []

    def make(key: TuneKey) -> Outcome | None:
        try:
            return tuner.tune(key, device, source, budget, lambda text: print(text, file=sys.stderr, flush=True))
        except (TuningError, torch.OutOfMemoryError) as error:
            print(f"{key}: {error}", file=sys.stderr)
            return None

    for number, key in enumerate(keys, 1):
        known = tuned.find(folder, key) is not None
        outcome = tuned.obtain(folder, key, lambda key=key: make(key), 2 * budget + 60.0)  # type: ignore[misc]
        if outcome is None:
            failed.append(key)
            print(f"[{number}/{len(keys)}] {key}: not tuned", flush=True)
            continue
        done.append((key, outcome))
        options = " ".join(f"{name}={value}" for name, value in outcome.options.items() if value)
        print(
            f"[{number}/{len(keys)}] {key}: {outcome.seconds_before * 1e3:.4f} ms -> "
            f"{outcome.seconds_after * 1e3:.4f} ms, {outcome.gain:.2f}x"
            f"{'' if outcome.gain > 1.0 else ', the default wins'}{', from the cache' if known else ''}: {options}",
            flush=True,
        )
    print(f"{len(done)} keys in {folder}" + (f", {len(failed)} could not be tuned" if failed else ""))
    return done, failed


def _write(folder: pathlib.Path, arch: str, done: list[tuple[TuneKey, Outcome]]) -> None:
    """Only what won: where the default does, the entry that is there stays."""
    chosen, left_out = one_for_each_rule([(key, outcome) for key, outcome in done if outcome.gain > 1.0])
    for key in left_out:
        print(f"{key}: not written, config files have no rule on grouped heads; the cache has it")
    if not chosen:
        print("nothing written: the defaults win everywhere")
        return
    print(f"{len(chosen)} entries written to {write(folder, arch, chosen)}")
