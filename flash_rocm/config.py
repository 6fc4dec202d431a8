"""Kernel configs: the only reader of configs/*.json.  A leaf.

One file per arch, ``<arch>.json``; ``generic.json`` serves archs without one.  A file is::

    {"inherits": "gfx1100"}          another file, used whole, or
    {"triton": [ENTRY, ...]}         entries tried from the top, the first that matches is taken

    ENTRY = {"kernel": "forward" | "backward_dq" | "backward_dkdv" | "probs",
             "match": {"dtype": [...], "headdim": [min, max], "masked": true | false},
             "options": {"BLOCK_M": 128, ...},
             "provenance": "where these values come from"}

Every key of ``match`` is optional.  ``headdim`` is the padded one (a power of two); ``masked`` is
whether a causal or window mask applies.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from typing import Any

from flash_rocm import runtime

KERNELS = ("forward", "backward_dq", "backward_dkdv", "probs")
_MATCH_KEYS = ("dtype", "headdim", "masked")
_AMD_OPTIONS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")


class ConfigError(ValueError):
    """A config file is wrong; the text names file, entry, key and what was expected."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Tuning of one kernel.  Block sizes in rows and columns of the score matrix.

    waves_per_eu, matrix_instr_nonkdim and kpack are AMD's compiler options, 0 for its default.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 0
    source: str = dataclasses.field(default="", compare=False)

    def compile_options(self, vendor: str) -> dict[str, int]:
        """Options of the compiler for one vendor."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if vendor == "amd":
            options |= {name: getattr(self, name) for name in _AMD_OPTIONS if getattr(self, name)}
        return options

    def describe(self) -> str:
        """Values and where they come from, on one line."""
        values = (f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if f.name != "source")
        return f"{' '.join(values)} ({self.source})"


_OPTIONS = {field.name for field in dataclasses.fields(KernelConfig)} - {"source"}
_REQUIRED = {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"}


@dataclasses.dataclass(frozen=True)
class _Entry:
    kernel: str
    dtypes: tuple[str, ...]
    headdim: tuple[int, int]
    masked: bool | None
    config: KernelConfig

    def matches(self, kernel: str, dtype: str, headdim: int, masked: bool) -> bool:
        return (
            self.kernel == kernel
            and (not self.dtypes or dtype in self.dtypes)
            and self.headdim[0] <= headdim <= self.headdim[1]
            and self.masked in (None, masked)
        )


def _checked_entry(path: str, index: int, raw: Any) -> _Entry:
    where = f"{path}: triton[{index}]"
    if not isinstance(raw, dict) or not {"kernel", "options"} <= raw.keys():
        raise ConfigError(f"{where}: expected an object with keys kernel and options, got {raw!r}")
    if raw["kernel"] not in KERNELS:
        raise ConfigError(f"{where}.kernel: expected one of {', '.join(KERNELS)}, got {raw['kernel']!r}")
    match, options = raw.get("match", {}), raw["options"]
    for key in match.keys() - set(_MATCH_KEYS):
        raise ConfigError(f"{where}.match.{key}: expected one of {', '.join(_MATCH_KEYS)}")
    for key in options.keys() - _OPTIONS:
        raise ConfigError(f"{where}.options.{key}: expected one of {', '.join(sorted(_OPTIONS))}")
    for key in _REQUIRED - options.keys():
        raise ConfigError(f"{where}.options.{key}: expected a value, got none")
    for key, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{where}.options.{key}: expected a whole number >= 0, got {value!r}")
        if key in ("BLOCK_M", "BLOCK_N") and (value < 16 or value & (value - 1)):
            raise ConfigError(f"{where}.options.{key}: expected a power of two >= 16, got {value}")
    headdim = match.get("headdim", [1, 1 << 20])
    if not (isinstance(headdim, list) and len(headdim) == 2 and all(isinstance(x, int) for x in headdim)):
        raise ConfigError(f"{where}.match.headdim: expected [min, max], got {headdim!r}")
    config = KernelConfig(**options, source=f"{pathlib.PurePath(path).name} triton[{index}]")
    return _Entry(raw["kernel"], tuple(match.get("dtype", ())), tuple(headdim), match.get("masked"), config)


def _read(name: str, override: str | None) -> tuple[str, dict[str, Any]] | None:
    """Path and contents of ``<name>.json``, the user's folder before the shipped one; None if neither has it."""
    shipped = importlib.resources.files("flash_rocm._configs")
    for folder in (pathlib.Path(override) if override else None, shipped):
        if folder is None:
            continue
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            contents = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: expected JSON, {error}") from error
        if not isinstance(contents, dict):
            raise ConfigError(f"{path}: expected an object, got {type(contents).__name__}")
        return str(path), contents
    return None


@functools.cache
def _entries(arch: str, override: str | None) -> tuple[_Entry, ...]:
    found = _read(arch, override)
    if found is None:
        runtime.log_once(f"no kernel configs for {arch}: using generic.json")
        found = _read("generic", override)
    if found is None:
        raise ConfigError("generic.json: expected among the shipped configs, not found: the installation is incomplete")
    path, contents = found
    if "inherits" in contents:
        if not isinstance(contents["inherits"], str) or contents["inherits"] == arch:
            raise ConfigError(f"{path}: inherits: expected the name of another file, got {contents['inherits']!r}")
        return _entries(contents["inherits"], override)
    if not isinstance(contents.get("triton"), list):
        raise ConfigError(f"{path}: triton: expected a list of entries")
    return tuple(_checked_entry(path, index, raw) for index, raw in enumerate(contents["triton"]))


def lookup(
    arch: str, kernel: str, *, dtype: str, headdim: int, masked: bool, config_dir: str | None = None
) -> KernelConfig:
    """The first entry of the arch's file that matches.

    Args:
        arch: "gfx942", "sm90", ...; without a file of its own it takes ``generic.json``.
        headdim: the padded head dim, the larger of q's and v's.
        config_dir: a folder whose files replace the shipped ones.

    Raises:
        ConfigError: a file is wrong, or no entry matches.
    """
    for entry in _entries(arch, config_dir):
        if entry.matches(kernel, dtype, headdim, masked):
            return entry.config
    raise ConfigError(
        f"{arch}.json: expected an entry that matches kernel={kernel} dtype={dtype} headdim={headdim} masked={masked}"
    )
