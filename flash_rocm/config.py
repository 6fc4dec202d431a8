"""Kernel configs: the only reader of JSON.  A leaf.

One file per arch, ``<arch>.json``; ``generic.json`` serves archs without one.  A file is::

    {"arch": "gfx1101", "inherits": "gfx1100"}                    another file, used whole, or
    {"arch": "gfx1100", "triton": [ENTRY, ...], "ck": [...]}      entries tried from the top
    {"arch": "sm90", ..., "auxiliary": {"kernels": ["append", "combine"], "provenance": ...}}
                                                    what calls take from C++ where that is built

    ENTRY = {"kernel": "forward" | "backward_dq" | "backward_dkdv" | "probs" | "decode" | "prefill" | "mla",
             "match": {"dtype": [...], "headdim": [min, max], "seqlen": [min, max], "shorter": [min, max],
                       "page_size": [min, max], "causal": true | false, "masked": ..., "varlen": ...,
                       "plain": ...},                                    each optional
             "options": {"BLOCK_M": 128, ...},
             "limits": {"vgpr_spills": 0, "loop_scratch": 0, "waves_per_simd": 1, "R": 0.85,
                        "oldest_spills": 0},                             each optional
             "provenance": {"how": "measured", "date": "2026-11-21", "compiler": "Triton 3.6", "note": "..."}}

    CK ENTRY = {"kernel": "forward" | "backward" | "splitkv", "dtype": [...], "tile": [...], "warps": [...],
                "warp_tile": [...], "pipeline": "qr_async", "occupancy": 0,
                "variants": [["masked"], ["varlen", "masked"], ...], "provenance": ...}
                                                        an instance to compile for each dtype and variant

``flash_rocm/config_schema.py`` says what each value means, ``flash_rocm/config_checks.py`` checks it.  The user's
overrides, in the order of their strength: ``FLASH_ROCM_KERNEL_CONFIG``, ``FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON``
(forward only), entries that were tuned on this machine (``flash_rocm/tuned.py``) and the files in
``FLASH_ROCM_CONFIG_DIR``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import pathlib
from typing import Any, NamedTuple

from flash_rocm import runtime
from flash_rocm.config_checks import check_file, check_kernel_overrides, check_options, check_reach
from flash_rocm.config_schema import ArchConfigs, ConfigError, Facts, KernelConfig
from flash_rocm.runtime import ConfigSource

#: Keys that flash-attn's users give to FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON.
_THEIR_OPTIONS = ("BLOCK_M", "BLOCK_N", "waves_per_eu", "num_stages", "num_warps")
_OURS, _THEIRS = "FLASH_ROCM_KERNEL_CONFIG", "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON"
_SHIPPED = ConfigSource()


def parse(where: str, text: str) -> Any:
    """Contents of JSON text; ``where`` names the file or variable in the error.

    Raises:
        ConfigError: not JSON, or a key stands twice in one object, of which JSON would drop one silently.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        for key, _ in pairs if len(found) != len(pairs) else ():
            if [name for name, _ in pairs].count(key) > 1:
                raise ConfigError(f"{where}: expected each key once, got {key!r} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: expected JSON, {error}") from error


def _read(name: str, folder: str | None) -> tuple[str, str, Any] | None:
    """Path, name to show and contents of ``<name>.json``, the user's before the shipped one; None if neither is."""
    if folder is not None:
        own = pathlib.Path(folder)
        if not own.is_dir():
            raise ConfigError(f"FLASH_ROCM_CONFIG_DIR: expected a folder, got {folder!r}")
        path = own / f"{name}.json"
        if path.is_file():
            try:
                return str(path), str(path), parse(str(path), path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{path}: expected a readable file, {error}") from error
    shipped = importlib.resources.files("flash_rocm._configs") / f"{name}.json"
    if not shipped.is_file():
        return None
    return str(shipped), f"{name}.json", parse(str(shipped), shipped.read_text(encoding="utf-8"))


@functools.cache
def arch_configs(arch: str, folder: str | None = None) -> ArchConfigs:
    """What the file that serves an arch says.

    Args:
        folder: files that replace the shipped ones.

    Raises:
        ConfigError: a file is wrong.
    """
    return _resolved(arch, folder)[0]


def file_contents(arch: str, folder: str | None = None) -> dict[str, Any]:
    """The checked but otherwise raw contents of the file that serves an arch.

    Raises:
        ConfigError: a file is wrong.
    """
    return _resolved(arch, folder)[1]


def _resolved(arch: str, folder: str | None) -> tuple[ArchConfigs, dict[str, Any]]:
    chain, found = [arch], _read(arch, folder)
    if found is None:
        runtime.log_once(f"no kernel configs for {arch}: using generic.json")
        chain, found = [arch, "generic"], _read("generic", folder)
        if found is None:
            raise ConfigError("generic.json: expected among the configs, not found: the installation is incomplete")
    while True:
        path, shown, raw = found
        contents = check_file(path, shown, chain[-1], raw, chain)
        if isinstance(contents, ArchConfigs):
            return contents, raw
        found = _read(contents, folder)
        if found is None or contents in chain:
            raise ConfigError(
                f"{path}.inherits: expected an arch whose file exists and does not lead back here, got {contents!r}"
            )
        chain.append(contents)


class _Override(NamedTuple):
    """Options of a kernel that a variable replaces; ``where`` they stand, for errors."""

    variable: str
    where: str
    options: dict[str, Any]


@functools.cache
def _overrides(kernels: str | None, forward: str | None) -> dict[str, _Override]:
    """What the variables replace, by kernel."""
    found: dict[str, _Override] = {}
    if forward:
        raw = parse(_THEIRS, forward)
        if isinstance(raw, dict) and "PRE_LOAD_V" in raw:
            runtime.warn_once(f"{_THEIRS}: PRE_LOAD_V has no counterpart in these kernels and changes nothing")
            raw = {key: value for key, value in raw.items() if key != "PRE_LOAD_V"}
        options: dict[str, Any] = check_options(_THEIRS, "forward", raw, _THEIR_OPTIONS)
        if options:
            # As its name says it is about Triton's kernel, whatever else a chip may have.
            options["implementation"] = "triton"
        found["forward"] = _Override(_THEIRS, _THEIRS, options)
    if kernels:
        ours = check_kernel_overrides(_OURS, parse(_OURS, kernels))
        if forward and "forward" in ours:
            runtime.warn_once(f"{_OURS} overrides {_THEIRS}")
        found |= {kernel: _Override(_OURS, f"{_OURS}.{kernel}", options) for kernel, options in ours.items()}
    return found


def is_overridden(kernel: str, source: ConfigSource) -> bool:
    """Whether a variable replaces options of a kernel."""
    return kernel in _overrides(source.kernels, source.forward)


def lookup(
    arch: str, kernel: str, facts: Facts, source: ConfigSource | None = None, tuned: KernelConfig | None = None
) -> KernelConfig:
    """The tuned entry or else the first of the arch's file that matches, with the user's overrides.

    Args:
        arch: "gfx942", "sm90", ...; without a file of its own it takes ``generic.json``.
        source: :func:`flash_rocm.runtime.config_source`, None for the shipped configs.
        tuned: what :func:`flash_rocm.tuned.find` knows.

    Raises:
        ConfigError: a file or variable is wrong, also for this arch alone, or no entry matches.
    """
    source = source or _SHIPPED
    override = _overrides(source.kernels, source.forward).get(kernel)
    if override is not None and override.options.get("implementation") == "triton":
        # On top of what Triton's kernel takes, not of options that were chosen for another one.
        facts = dataclasses.replace(facts, plain=False)
    found = tuned or _from_file(arch, kernel, facts, source.folder)
    if override is None or not override.options:
        return found
    # Only here is it known which chip a variable is for.
    check_reach(override.where, kernel, override.options, (arch,))
    return found.overridden(override.options, override.variable)


def _from_file(arch: str, kernel: str, facts: Facts, folder: str | None) -> KernelConfig:
    contents = arch_configs(arch, folder)
    for entry in contents.triton:
        if entry.kernel == kernel and entry.match.matches(facts):
            return entry.config
    raise ConfigError(f"{contents.arch}.json: expected an entry that matches kernel={kernel} {facts}")
