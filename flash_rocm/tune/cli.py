"""``flash-rocm tune``: measure kernel configs on the GPU that is here, or model them, and keep the fastest."""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import sys
from collections.abc import Callable

import torch

from flash_rocm import backends, runtime, tuned, virtual_device
from flash_rocm.arch import Arch, arch_named
from flash_rocm.config_schema import ConfigError
from flash_rocm.inspect.cli import names
from flash_rocm.tuned import CacheTuneKey, Outcome, TuneKey, TuningError

from . import shapes
from .write import left_out_by, one_for_each_rule, write

KERNELS = ("forward", "backward_dq", "backward_dkdv", "decode", "prefill", "mla")


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
    add(
        "--model",
        metavar="ARCH",
        help="compare configs for this chip by the speed model of inspect, without a GPU (modelled, uncalibrated)",
    )


#: (key, configs to start from, seconds, what is said) -> the fastest options.
Tune = Callable[[TuneKey, "runtime.ConfigSource | None", float, Callable[[str], None]], Outcome]


def run(args: argparse.Namespace) -> int:
    """Tune, print old beside new, write; 1 if a key could not be tuned, 2 for wrong arguments or no GPU."""
    try:
        arch, tune, store = _by_model(args) if args.model is not None else _on_gpu(args)
        for kernel in args.kernel:
            if kernel not in KERNELS:
                raise shapes.ShapesError(f"--kernel: expected some of {', '.join(KERNELS)}, got {kernel!r}")
        keys = shapes.keys_of(shapes.read(args.shapes), args.kernel, arch)
        if args.model is not None and any(isinstance(key, CacheTuneKey) for key in keys):
            raise shapes.ShapesError("--model: expected shapes without a cache, which it does not compare, got some")
        done, failed = _tune_all(keys, tune, str(runtime.cache_dir() / store), args.budget)
        if args.write is not None:
            _write(args.write, arch.name, done)
    except (shapes.ShapesError, ConfigError, virtual_device.VirtualDeviceError) as error:
        print(f"flash-rocm tune: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"flash-rocm tune: --write: expected a folder to write to, {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _by_model(args: argparse.Namespace) -> tuple[Arch, Tune, str]:
    """What --model tunes for, how, and where results are kept: apart, so that no call takes them for measured."""
    if args.arch is not None:
        raise shapes.ShapesError(f"--arch: expected none beside --model, which names the chip, got {args.arch!r}")
    # Only this imports what inspect needs.
    from . import model

    model.check_arch(args.model)
    arch = arch_named(args.model)
    return arch, lambda key, *rest: model.tune(key, arch, *rest), "modelled"


def _on_gpu(args: argparse.Namespace) -> tuple[Arch, Tune, str]:
    """The same on the GPU that is here."""
    device, arch = _device(args.arch)
    tune = backends.load_tuner().tune
    return arch, lambda key, *rest: tune(key, device, *rest), "tuning"


def _device(wanted: str | None) -> tuple[torch.device, Arch]:
    if not torch.cuda.is_available():
        raise shapes.ShapesError(
            "expected a GPU to measure on, found none. Hint: --model gfx942 compares configs without one."
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
    keys: list[TuneKey], tune: Tune, folder: str, budget: float
) -> tuple[list[tuple[TuneKey, Outcome]], list[TuneKey]]:
    """Outcomes of all keys, those of earlier runs read from the folder, and the keys that have none."""
    source = runtime.config_source()
    done: list[tuple[TuneKey, Outcome]] = []
    failed: list[TuneKey] = []

    def make(key: TuneKey) -> Outcome | None:
        try:
            return tune(key, source, budget, lambda text: print(text, file=sys.stderr, flush=True))
        except (TuningError, torch.OutOfMemoryError) as error:
            print(f"{key}: {error}", file=sys.stderr)
            return None

    for number, key in enumerate(keys, 1):
        known = tuned.find(folder, key) is not None
        outcome = tuned.obtain(folder, key, functools.partial(make, key), 2 * budget + 60.0)
        if outcome is None:
            failed.append(key)
            print(f"[{number}/{len(keys)}] {key}: not tuned", flush=True)
            continue
        done.append((key, outcome))
        options = " ".join(f"{name}={value}" for name, value in outcome.options.items() if value)
        print(
            f"[{number}/{len(keys)}] {key}: {outcome.seconds_before * 1e3:.4f} ms -> "
            f"{outcome.seconds_after * 1e3:.4f} ms{_uncalibrated(outcome)}, {outcome.gain:.2f}x"
            f"{'' if outcome.gain > 1.0 else ', the default wins'}{', from the cache' if known else ''}: {options}",
            flush=True,
        )
    print(f"{len(done)} keys in {folder}" + (f", {len(failed)} could not be tuned" if failed else ""))
    return done, failed


def _uncalibrated(outcome: Outcome) -> str:
    return "" if outcome.provenance.how == "measured" else " (modelled)"


def _write(folder: pathlib.Path, arch: str, done: list[tuple[TuneKey, Outcome]]) -> None:
    """Only what won: where the default does, the entry that is there stays."""
    chosen, left_out = one_for_each_rule([(key, outcome) for key, outcome in done if outcome.gain > 1.0])
    for key in left_out:
        print(f"{key}: not written, config files have no rule on {left_out_by(key)}; the cache has it")
    if not chosen:
        print("nothing written: the defaults win everywhere")
        return
    print(f"{len(chosen)} entries written to {write(folder, arch, chosen)}")
