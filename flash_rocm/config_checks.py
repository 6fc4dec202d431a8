"""Every check of a kernel config against :mod:`flash_rocm.config_schema`.  A leaf that reads no file.

``where`` is the file or variable with the way to the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flash_rocm.config_schema import (
    AUXILIARY_KERNELS,
    CK_DTYPES,
    CK_KERNELS,
    CK_KEYS,
    CK_LACKS,
    CK_LENGTHS,
    CK_PIPELINES,
    CK_REQUIRED,
    CK_SCHEDULERS,
    CK_VARIANTS,
    DTYPES,
    ENTRY_KEYS,
    FILE_KEYS,
    FLAGS,
    HOW,
    KERNELS,
    LIMITS,
    MATCH_KEYS,
    NEUTRAL,
    OPTIONS,
    PROVENANCE_KEYS,
    RANGES,
    REACH,
    REQUIRED_OPTIONS,
    ArchConfigs,
    CkConfig,
    ConfigError,
    Entry,
    KernelConfig,
    Limits,
    Match,
    Provenance,
)


def check_object(where: str, raw: Any, allowed: Iterable[str], required: Iterable[str] = ()) -> dict[str, Any]:
    """``raw`` as an object with none but the allowed keys, and the required ones."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected an object, got {raw!r}")
    for key in raw:
        if key not in allowed:
            raise ConfigError(f"{where}.{key}: expected one of the keys {', '.join(allowed)}")
    for key in required:
        if key not in raw:
            raise ConfigError(f"{where}.{key}: expected a value, got none")
    return raw


def _check_choice(where: str, raw: Any, choices: tuple[Any, ...]) -> Any:
    # True is an int that equals 1.
    if isinstance(raw, bool) or raw not in choices:
        raise ConfigError(f"{where}: expected one of {', '.join(map(str, choices))}, got {raw!r}")
    return raw


def _check_integer(where: str, raw: Any, minimum: int) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < minimum:
        raise ConfigError(f"{where}: expected a whole number >= {minimum}, got {raw!r}")
    return raw


def check_options(where: str, kernel: str, raw: Any, allowed: Iterable[str] = tuple(OPTIONS)) -> dict[str, int]:
    """Options of a kernel, all of them optional, for an arch that :func:`check_reach` is told when it is known."""
    options = check_object(where, raw, allowed)
    checked = {key: _check_choice(f"{where}.{key}", value, OPTIONS[key]) for key, value in options.items()}
    check_reach(where, kernel, checked)
    return checked


def check_reach(where: str, kernel: str, options: Mapping[str, int], archs: Iterable[str] = ()) -> None:
    """Raise ConfigError for an option that the kernel, or one of the archs, would ignore."""
    for key in (key for key in REACH if options.get(key) not in NEUTRAL):
        reach = REACH[key]
        strangers = [arch for arch in archs if not arch.startswith(reach.archs)]
        if kernel not in reach.kernels:
            who, acts = kernel, f"in {', '.join(reach.kernels)}"
        elif strangers:
            who, acts = strangers[0], f"on {', '.join(f'{name}*' for name in reach.archs)}"
        else:
            continue
        raise ConfigError(
            f"{where}.{key}: expected {OPTIONS[key][0]} or no value, {who} does not use it, got {options[key]}. "
            f"Hint: leave it out here, it acts {acts} only"
        )
    rows, reach = options.get("BLOCK_M", 1), REACH["implementation"]
    if rows & (rows - 1) and (kernel != "forward" or not all(arch.startswith(reach.archs) for arch in archs)):
        raise ConfigError(
            f"{where}.BLOCK_M: expected a power of two, got {rows}. Hint: others are for forward with "
            f"implementation=gluon, on {', '.join(f'{name}*' for name in reach.archs)} only"
        )


def check_all_options(where: str, kernel: str, raw: Any, archs: Iterable[str]) -> dict[str, int]:
    """Options of a kernel for some archs, with none missing that has no default."""
    options = check_options(where, kernel, raw)
    check_reach(where, kernel, options, archs)
    return check_object(where, options, OPTIONS, REQUIRED_OPTIONS)


def check_kernel_overrides(where: str, raw: Any) -> dict[str, dict[str, int]]:
    """``{"forward": {"BLOCK_M": 64}, ...}``, for one kernel or several."""
    kernels = check_object(where, raw, KERNELS)
    return {kernel: check_options(f"{where}.{kernel}", kernel, options) for kernel, options in kernels.items()}


def _check_match(where: str, raw: Any) -> Match:
    rules = check_object(where, raw, MATCH_KEYS)
    dtypes = rules.get("dtype", [])
    if not isinstance(dtypes, list) or ("dtype" in rules and not dtypes):
        raise ConfigError(f"{where}.dtype: expected a list of {', '.join(DTYPES)}, got {dtypes!r}")
    values: dict[str, Any] = {"dtype": tuple(_check_choice(f"{where}.dtype", dtype, DTYPES) for dtype in dtypes)}
    for key in (key for key in RANGES if key in rules):
        pair = rules[key]
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(f"{where}.{key}: expected [min, max], got {pair!r}")
        low, high = (_check_integer(f"{where}.{key}[{index}]", value, RANGES[key]) for index, value in enumerate(pair))
        if low > high:
            raise ConfigError(f"{where}.{key}: expected [min, max] with min <= max, got {pair!r}")
        values[key] = (low, high)
    for key in (key for key in FLAGS if key in rules):
        if not isinstance(rules[key], bool):
            raise ConfigError(f"{where}.{key}: expected true or false, got {rules[key]!r}")
        values[key] = rules[key]
    return Match(**values)


def _check_limits(where: str, raw: Any) -> Limits:
    limits = check_object(where, raw, LIMITS)
    for key, value in limits.items():
        if key != "R":
            _check_integer(f"{where}.{key}", value, LIMITS[key])
        elif not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise ConfigError(f"{where}.R: expected a number > 0, got {value!r}")
    return Limits(**limits)


def check_provenance(where: str, raw: Any) -> Provenance:
    """Where values come from; what was measured or modelled says when and with which compiler."""
    facts = check_object(where, raw, PROVENANCE_KEYS, ("how",))
    _check_choice(f"{where}.how", facts["how"], HOW)
    for key, value in facts.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}.{key}: expected a text, got {value!r}")
    if "date" in facts and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", facts["date"]):
        raise ConfigError(f"{where}.date: expected YYYY-MM-DD, got {facts['date']!r}")
    if facts["how"] in ("measured", "model"):
        check_object(where, raw, PROVENANCE_KEYS, ("date", "compiler"))
    return Provenance(**facts)


def _check_entry(where: str, source: str, raw: Any, archs: Sequence[str]) -> Entry:
    entry = check_object(where, raw, ENTRY_KEYS, ("kernel", "options", "provenance"))
    kernel = _check_choice(f"{where}.kernel", entry["kernel"], KERNELS)
    options = check_all_options(f"{where}.options", kernel, entry["options"], archs)
    config = KernelConfig(
        **options,  # type: ignore[arg-type]
        limits=_check_limits(f"{where}.limits", entry.get("limits", {})),
        provenance=check_provenance(f"{where}.provenance", entry["provenance"]),
        source=source,
    )
    return Entry(kernel, _check_match(f"{where}.match", entry.get("match", {})), config)


def _check_numbers(where: str, raw: Any, count: int) -> tuple[int, ...]:
    if not isinstance(raw, list) or len(raw) != count:
        raise ConfigError(f"{where}: expected a list of {count} numbers, got {raw!r}")
    return tuple(_check_integer(f"{where}[{index}]", value, 1) for index, value in enumerate(raw))


def _check_names(where: str, raw: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(raw, list) or len(set(map(str, raw))) != len(raw):
        raise ConfigError(f"{where}: expected a list of {', '.join(choices)}, each once, got {raw!r}")
    return tuple(_check_choice(f"{where}[{index}]", name, choices) for index, name in enumerate(raw))


def _check_variant(where: str, kernel: str, raw: Any) -> tuple[str, ...]:
    """The names in the order of :data:`CK_VARIANTS`, if Composable Kernel has what they ask for together."""
    variant = set(_check_names(where, raw, CK_VARIANTS))
    lacks = sorted(CK_LACKS[kernel] & variant)
    reasons = {
        f"{', '.join(lacks)}, which is not for {kernel}": bool(lacks),
        "alibi without masked, whose corner its distances are from": "alibi" in variant and "masked" not in variant,
        "alibi with softcap, which Composable Kernel does not combine": {"alibi", "softcap"} <= variant,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{where}: expected another set, got {reason}")
    return tuple(name for name in CK_VARIANTS if name in variant)


def _check_ck_entry(where: str, source: str, raw: Any) -> CkConfig:
    entry = check_object(where, raw, CK_KEYS, CK_REQUIRED)
    kernel = _check_choice(f"{where}.kernel", entry["kernel"], CK_KERNELS)
    dtypes = _check_names(f"{where}.dtype", entry["dtype"], CK_DTYPES)
    variants = entry["variants"]
    if not dtypes or not isinstance(variants, list) or not variants:
        raise ConfigError(f"{where}: expected at least one dtype and one variant, got {dtypes} and {variants!r}")
    numbers = {key: _check_numbers(f"{where}.{key}", entry[key], count) for key, count in CK_LENGTHS[kernel].items()}
    return CkConfig(
        kernel=kernel,
        dtypes=dtypes,
        **numbers,
        pipeline=_check_choice(f"{where}.pipeline", entry["pipeline"], CK_PIPELINES[kernel]),
        # Into how many parts keys are divided follows from it.
        occupancy=_check_integer(f"{where}.occupancy", entry["occupancy"], 1 if kernel == "splitkv" else 0),
        variants=tuple(_check_variant(f"{where}.variants[{i}]", kernel, names) for i, names in enumerate(variants)),
        provenance=check_provenance(f"{where}.provenance", entry["provenance"]),
        source=source,
        scheduler=_check_choice(f"{where}.scheduler", entry.get("scheduler", CK_SCHEDULERS[0]), CK_SCHEDULERS),
    )


def _check_auxiliary(where: str, raw: Any, arch: str) -> tuple[str, ...]:
    entry = check_object(where, raw, ("kernels", "provenance"), ("kernels", "provenance"))
    if not arch.startswith("sm"):
        raise ConfigError(f"{where}: expected it for archs of NVIDIA, got it for {arch}")
    check_provenance(f"{where}.provenance", entry["provenance"])
    return _check_names(f"{where}.kernels", entry["kernels"], AUXILIARY_KERNELS)


def check_file(path: str, shown: str, arch: str, raw: Any, served: Sequence[str] = ()) -> ArchConfigs | str:
    """The contents of a file, or the name of the arch whose file it inherits.

    Args:
        path: for errors.
        shown: how ``explain`` names the file.
        arch: the file's name without suffix, which it must repeat: a renamed copy is noticed.
        served: other archs that take this file.
    """
    contents = check_object(path, raw, FILE_KEYS, ("arch",))
    if contents["arch"] != arch:
        raise ConfigError(f"{path}.arch: expected {arch!r}, the file's name, got {contents['arch']!r}")
    if "inherits" in contents:
        check_object(path, raw, ("arch", "inherits"))
        if not isinstance(contents["inherits"], str):
            raise ConfigError(f"{path}.inherits: expected the name of an arch, got {contents['inherits']!r}")
        return contents["inherits"]
    check_object(path, raw, FILE_KEYS, ("triton",))
    for section in ("triton", "ck"):
        if not isinstance(contents.get(section, []), list):
            raise ConfigError(f"{path}.{section}: expected a list of entries, got {contents[section]!r}")
    return ArchConfigs(
        arch,
        tuple(
            _check_entry(f"{path}: triton[{index}]", f"{shown} triton[{index}]", entry, (arch, *served))
            for index, entry in enumerate(contents["triton"])
        ),
        tuple(
            _check_ck_entry(f"{path}: ck[{index}]", f"{shown} ck[{index}]", entry)
            for index, entry in enumerate(contents.get("ck", []))
        ),
        _check_auxiliary(f"{path}.auxiliary", contents["auxiliary"], arch) if "auxiliary" in contents else (),
    )
