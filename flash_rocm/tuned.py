"""Tuned kernel configs, kept between runs: one small file for each key.  A leaf.

``<cache>/tuning/v<schema>-triton-<version>/<arch>/<kernel>-<dtype>-d<D>-<mask>-s<S>-gqa<G>-<dense|varlen>.json``
(over a K/V cache ``...-q<queries>-b<batch>-page<page size>.json``)::

    {"key": {"arch": "gfx942", "kernel": "forward", ...}, "options": {"BLOCK_M": 128, ...},
     "provenance": {"how": "measured", "date": "...", "compiler": "Triton 3.6.0", "note": "AMD Instinct MI300X"},
     "milliseconds": {"before": 0.61, "after": 0.55}}

A file of its own for each key: whoever writes one cannot lose another.  A file that is not what it should be
is renamed to ``*.corrupt``, so that it can be looked at, and its key counts as not tuned.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from flash_rocm import config, files, runtime
from flash_rocm.config_checks import check_all_options, check_object, check_provenance
from flash_rocm.config_schema import VERSION, ConfigError, Facts, KernelConfig, Limits, Provenance

#: Buckets of lengths are powers of two between these: below, a call is one tile, above, nothing changes any more.
SEQLENS = (128, 32768)
#: Buckets of query heads per key head, each named by its largest; the last holds all that are larger.
GROUPS = (1, 4, 8, 16)
#: Of calls over a K/V cache, also of MLA, all of whose heads share one.
CACHE_GROUPS = (*GROUPS, 128)
#: Buckets of new queries of a sequence (one, a few guessed ones, a chunk of a prompt) and of sequences, likewise.
QUERIES = (1, 16, 1024)
BATCHES = (1, 8, 64)
#: Buckets of page sizes, each named by its smallest; 0: no pages.
PAGES = (0, 1, 16, 64, 256)
MASKS = ("full", "causal", "window")
_FILE_KEYS = ("key", "options", "provenance", "milliseconds")
_TIMES = ("before", "after")


class TuningError(RuntimeError):
    """Nothing could be measured; the text says why."""


@dataclasses.dataclass(frozen=True)
class TuneKey:
    """What one tuned entry is for: calls with the same key take the same config."""

    arch: str
    kernel: str
    dtype: str
    headdim: int  # padded to a power of two
    mask: str
    seqlen: int  # bucket of the longer side
    group: int  # bucket of query heads per key head
    varlen: bool

    def __str__(self) -> str:
        layout = "varlen" if self.varlen else "dense"
        return f"{self.kernel}-{self.dtype}-d{self.headdim}-{self.mask}-s{self.seqlen}-gqa{self.group}-{layout}"


@dataclasses.dataclass(frozen=True)
class CacheTuneKey(TuneKey):
    """The same for a kernel over a K/V cache, whose length ``seqlen`` is."""

    queries: int  # bucket of new queries of a sequence
    batch: int  # bucket of sequences
    page_size: int  # bucket

    def __str__(self) -> str:
        return f"{super().__str__()}-q{self.queries}-b{self.batch}-page{self.page_size}"


def _bucket(value: int, largest: Sequence[int]) -> int:
    return next((bucket for bucket in largest if value <= bucket), largest[-1])


def key_of(arch: str, kernel: str, facts: Facts, group_size: int) -> TuneKey:
    """The key of a call, given what config entries match on and its query heads per key head."""
    return TuneKey(arch, kernel, facts.dtype, *_buckets(facts), _bucket(group_size, GROUPS), facts.varlen)


def cache_key_of(arch: str, kernel: str, facts: Facts, group_size: int, queries: int, batch: int) -> CacheTuneKey:
    """The same over a K/V cache.

    Args:
        queries: of the longest sequence.
        batch: sequences.
    """
    group = _bucket(group_size, CACHE_GROUPS)
    page_size = max(smallest for smallest in PAGES if smallest <= facts.page_size)
    places = (_bucket(queries, QUERIES), _bucket(batch, BATCHES), page_size)
    return CacheTuneKey(arch, kernel, facts.dtype, *_buckets(facts), group, facts.varlen, *places)


def _buckets(facts: Facts) -> tuple[int, str, int]:
    """Head dim, mask and bucket of the length."""
    mask = "causal" if facts.causal else "window" if facts.masked else "full"
    return facts.headdim, mask, min(max(facts.seqlen, SEQLENS[0]), SEQLENS[1])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What tuning one key found; ``seconds`` per launch."""

    options: dict[str, int]
    provenance: Provenance
    seconds_before: float  # with the config that was there
    seconds_after: float

    @property
    def gain(self) -> float:
        return self.seconds_before / self.seconds_after


def path_of(folder: str, key: TuneKey) -> pathlib.Path:
    """File of a key for the installed Triton and this version of the schema."""
    return pathlib.Path(folder) / f"v{VERSION}-triton-{runtime.triton_version()}" / key.arch / f"{key}.json"


@functools.cache
def find(folder: str, key: TuneKey) -> KernelConfig | None:
    """The tuned config of a key; None if there is none, or none that can be used.  Never raises."""
    path = path_of(folder, key)
    try:
        outcome = read(path, key)
    except ConfigError:
        _set_aside_if_idle(path, key)
        return None
    if outcome is None:
        return None
    options: dict[str, Any] = outcome.options
    return KernelConfig(**options, limits=Limits(), provenance=outcome.provenance, source=f"tuned, {path}")


def read(path: pathlib.Path, key: TuneKey) -> Outcome | None:
    """What a file holds; None if it is not there or cannot be read, which is logged.

    Raises:
        ConfigError: it holds something else than an outcome for this key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        runtime.log_once(f"{path}: expected a readable file, using the default config: {error}", logging.WARNING)
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text, {error}") from error
    where = str(path)
    contents = check_object(where, config.parse(where, text), _FILE_KEYS, _FILE_KEYS)
    expected = dataclasses.asdict(key)
    if contents["key"] != expected:
        raise ConfigError(f"{where}.key: expected {expected}, got {contents['key']!r}")
    times = check_object(f"{where}.milliseconds", contents["milliseconds"], _TIMES, _TIMES)
    for name, value in times.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ConfigError(f"{where}.milliseconds.{name}: expected a number > 0, got {value!r}")
    return Outcome(
        check_all_options(f"{where}.options", key.kernel, contents["options"], (key.arch,)),
        check_provenance(f"{where}.provenance", contents["provenance"]),
        times["before"] / 1e3,
        times["after"] / 1e3,
    )


def write(path: pathlib.Path, key: TuneKey, outcome: Outcome) -> None:
    """Store an outcome, whole or not at all.  The caller holds the file's lock.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    contents = {
        "key": dataclasses.asdict(key),
        "options": outcome.options,
        "provenance": {name: text for name, text in dataclasses.asdict(outcome.provenance).items() if text},
        "milliseconds": {"before": outcome.seconds_before * 1e3, "after": outcome.seconds_after * 1e3},
    }
    files.write_whole(path, json.dumps(contents, indent=1))
    find.cache_clear()


def set_aside(path: pathlib.Path, why: ConfigError) -> None:
    """Rename a file that is not what it should be.  The caller holds its lock.

    Raises:
        OSError: the folder cannot be written.
    """
    os.replace(path, f"{path}.corrupt")
    runtime.log_once(f"{why}; set aside as {path.name}.corrupt, the key counts as not tuned", logging.WARNING)


def _set_aside_if_idle(path: pathlib.Path, key: TuneKey) -> None:
    """Look again under the lock: another process may have put a good file there meanwhile, or be about to."""
    try:
        with files.locked(path, patience=0.0) as mine:
            if mine:
                _read_or_set_aside(path, key)
    except OSError as error:
        runtime.log_once(f"{path}: expected a file that can be set aside, ignoring it: {error}", logging.WARNING)


def obtain(folder: str, key: TuneKey, make: Callable[[], Outcome | None], patience: float) -> Outcome | None:
    """What is stored for a key, made and stored first if nothing usable is.

    Of several processes that ask at once one makes it, while the others wait for its file.

    Args:
        make: gives the outcome, or None if there is none to store.
        patience: seconds to wait for another process.

    Returns:
        None where the default config is to be used: nothing was made, the folder cannot be written (which is
        logged), or the process that was waited for did not finish.
    """
    path = path_of(folder, key)
    try:
        with files.locked(path, patience) as mine:
            if not mine:
                runtime.log_once(f"{path}: another process tunes this for too long, using the default", logging.WARNING)
                return None
            outcome = _read_or_set_aside(path, key)
            if outcome is None:
                outcome = make()
                if outcome is not None:
                    write(path, key, outcome)
    except OSError as error:
        text = f"FLASH_ROCM_CACHE_DIR: {path.parent}: expected a folder to write to, using the default config: {error}"
        runtime.log_once(text, logging.WARNING)
        return None
    find.cache_clear()
    return outcome


def _read_or_set_aside(path: pathlib.Path, key: TuneKey) -> Outcome | None:
    try:
        return read(path, key)
    except ConfigError as error:
        set_aside(path, error)
        return None
