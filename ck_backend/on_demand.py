"""Instances that are compiled at first use, or ahead of it by ``flash-rocm build --ck --problem``.

Each becomes a small library of its own in the cache, which the operators of the library in use launch.  Where no
library is installed, one without instances is compiled first.  Of several processes that want the same one compiles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flash_rocm import ck_instances, ck_store, files, runtime
from flash_rocm.ck_instances import MANIFEST, SECONDS_TO_COMPILE
from flash_rocm.problem import AttentionProblem

from . import build
from .build import BuildError
from .generate import units_of

#: Of the library without instances.
_SECONDS_OF_BASE = 25
#: Seconds that a process waits for another one to compile the same.
_PATIENCE = 1200.0

Say = Callable[[str], None]


class _StillBusy(BuildError):
    """Another process is at it for too long, which says nothing about the next try."""


class Provided(NamedTuple):
    """An instance that a problem needs."""

    name: str
    folder: pathlib.Path  # of the library that has it
    seconds: float  # that it took to compile, 0.0 if it was there


def _log(text: str) -> None:
    """A line that is seen unless somebody silenced warnings: whoever waits for a compiler should know."""
    runtime.configure_logging()
    runtime.logger.log(logging.WARNING, text)


#: What went wrong in this process, by place: it is not tried again.
_failed: dict[pathlib.Path, str] = {}


def provide_base(say: Say = _log) -> None:
    """See that there is a library, be it one without instances.

    Raises:
        BuildError: it cannot be compiled.
    """
    if ck_instances.built() is None:
        archs = ck_instances.ARCHS
        place = ck_store.base(runtime.on_demand_ck())
        say_it = f"compiling the operators of Composable Kernel for {', '.join(archs)}, about {_SECONDS_OF_BASE} s"
        _made(place, lambda tools, work, out, log: build.build_library(tools, [], archs, work, out, log), say_it, say)


def provide(problem: AttentionProblem, arch: str, say: Say = _log) -> list[Provided]:
    """See that there are the instances that a problem needs, for its backward too.

    Args:
        say: told of each one that is compiled, before.

    Raises:
        BuildError: no config entry is for it, or it cannot be compiled; what failed is not tried again.
        ConfigError: a config file is wrong.
    """
    wanted = ck_instances.configured(arch)
    reasons = ck_instances.refusals(problem, arch, ck_instances.built() or wanted, wanted)
    if reasons:
        raise BuildError("; ".join(reasons))
    provide_base(say)
    return [_provide(kernel, problem, arch, say) for kernel in ck_instances.kernels_of(problem)]


def _provide(kernel: str, problem: AttentionProblem, arch: str, say: Say) -> Provided:
    library = ck_instances.built()
    number = None if library is None else library.find(kernel, problem, arch)
    if library is not None and number is not None:
        return Provided(library.instances[number].name, library.folder_of(number), 0.0)
    wanted = ck_instances.configured(arch)
    number = wanted.find(kernel, problem, arch)
    if number is None:
        raise BuildError(f"{kernel}: expected a ck entry in {arch}.json, found none")
    on_demand = runtime.on_demand_ck()
    (unit,) = units_of((arch,), [wanted.instances[number].name], on_demand.configs)
    place = ck_store.place(on_demand, arch, unit.instance.name, unit.entry)
    seconds = _made(
        place,
        lambda tools, work, out, log: build.build_module(tools, unit, work, out, log),
        f"compiling {unit.instance.name} of Composable Kernel for {arch}, about {SECONDS_TO_COMPILE} s",
        say,
    )
    return Provided(unit.instance.name, place, seconds)


_Build = Callable[[build.Toolchain, pathlib.Path, pathlib.Path, pathlib.Path], None]


def _made(place: pathlib.Path, make: _Build, what: str, say: Say) -> float:
    """Seconds in which a folder was made, by this process; 0.0 if another one has."""
    if place in _failed:
        raise BuildError(_failed[place])
    started = time.monotonic()
    try:
        with files.locked(place, _PATIENCE) as mine:
            if not mine:
                raise _StillBusy(f"{place}: another process has compiled this for {_PATIENCE:.0f} s. Hint: end it")
            is_new = not (place / MANIFEST).is_file()
            if is_new:
                say(f"{what}, into {place}")
                try:
                    _make_whole(place, make)
                except _StillBusy:
                    raise
                except BuildError as error:
                    _failed[place] = f"{error} (not tried again by this process)"
                    raise
    except OSError as error:
        _failed[place] = f"FLASH_ROCM_CACHE_DIR: expected a folder to write to, {error}"
        raise BuildError(_failed[place]) from error
    finally:
        ck_instances.look_again()
    return time.monotonic() - started if is_new else 0.0


def _make_whole(place: pathlib.Path, make: _Build) -> None:
    """Make a folder beside its place and move it there.  The caller holds the lock of the place."""
    for left in place.parent.glob(f"{place.name}.*.tmp"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with _scratch(place) as scratch:
        try:
            make(_toolchain(place), scratch / "work", scratch / "out", scratch / "log.txt")
        except OSError as error:  # of sources and programs
            raise BuildError(f"{place.name}: {error}") from error
        shutil.rmtree(place, ignore_errors=True)  # without its list it is no library
        os.replace(scratch / "out", place)


@contextlib.contextmanager
def _scratch(place: pathlib.Path) -> Iterator[pathlib.Path]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".tmp", dir=place.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _toolchain(place: pathlib.Path) -> build.Toolchain:
    """What compiles; one process at a time fetches what is not there."""
    folder = runtime.on_demand_ck().folder / "tools"
    with files.locked(folder, _PATIENCE) as mine:
        if not mine:
            raise _StillBusy(f"{place}: another process fetches Composable Kernel for too long. Hint: CK_HOME")
        return build.find_toolchain(runtime.build_request(), folder)
