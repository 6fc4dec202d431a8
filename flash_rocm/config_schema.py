"""What a kernel config may say: its dataclasses and every check.  A leaf that reads no file.

``configs/schema.json`` documents the same for editors; a test holds the two equal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

#: Changes when entries that were stored under an earlier one can no longer be used.
VERSION = 1
KERNELS = ("forward", "backward_dq", "backward_dkdv", "probs", "decode", "prefill", "mla")
DTYPES = ("float16", "bfloat16", "float32")
#: Each option and the values it may have.  Those of AMD's compiler take 0 for the compiler's default.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "BLOCK_M": (16, 32, 64, 128, 256, 512),
    "BLOCK_N": (16, 32, 64, 128, 256, 512),
    "BLOCK_K": (0, 16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "waves_per_eu": tuple(range(17)),
    "matrix_instr_nonkdim": (0, 16, 32),
    "kpack": (0, 1, 2),
    "implementation": ("triton", "gluon"),
}
REQUIRED_OPTIONS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
COMPILER_OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
#: What entries match by a range, and the smallest value there is.
RANGES = {"headdim": 1, "seqlen": 1, "page_size": 0}
FLAGS = ("causal", "masked", "varlen", "plain")
MATCH_KEYS = ("dtype", *RANGES, *FLAGS)
#: Smallest value of each limit; "R" may have a fraction.
LIMITS = {"vgpr_spills": 0, "loop_scratch": 0, "waves_per_simd": 1, "R": 0, "oldest_spills": 0}
HOW = ("measured", "model", "static model", "inherited", "first choice")
PROVENANCE_KEYS = ("how", "date", "compiler", "note")
ENTRY_KEYS = ("kernel", "match", "options", "limits", "provenance")
FILE_KEYS = ("arch", "inherits", "triton", "ck", "auxiliary")
#: Kernels that calls on NVIDIA GPUs can take from C++ or from Triton.
AUXILIARY_KERNELS = ("append", "combine")
CK_KERNELS = ("forward", "backward", "splitkv")
CK_DTYPES = ("float16", "bfloat16")
#: Pipelines of each kernel; those of AMD's matrix cores with 64 lanes.
CK_PIPELINES = {"forward": ("qr", "qr_async"), "backward": ("kr_ktr_vr",), "splitkv": ("qr",)}
#: What an instance may be compiled for; one that is "masked" also takes calls without a mask, and one of splitkv dense
#: and varlen queries over caches with pages and without.
CK_VARIANTS = ("varlen", "masked", "alibi", "softcap", "deterministic")
#: Numbers in each list of an entry.
CK_LENGTHS = {
    "forward": {"tile": 6, "warps": 3, "warp_tile": 3},
    "backward": {"tile": 9, "warps": 9, "warp_tile": 6},
    "splitkv": {"tile": 6, "warps": 3, "warp_tile": 3},
}
#: Variants that a kernel does not have.
_CK_LACKS = {"forward": {"deterministic"}, "backward": {"softcap"}, "splitkv": {"varlen", "deterministic"}}
CK_REQUIRED = ("kernel", "dtype", "tile", "warps", "warp_tile", "pipeline", "occupancy", "variants", "provenance")
CK_KEYS = (*CK_REQUIRED, "scheduler")
#: Orders of instructions that LLVM's compiler for AMD can be told to look for; the first is its own choice.
CK_SCHEDULERS = ("default", "iterative-minreg")
_UNLIMITED = 1 << 30


class ConfigError(ValueError):
    """A config is wrong; the text names file or variable, entry, key, what was expected and what it got."""


class Reach(NamedTuple):
    """Where an option acts: the kernels, and what the names of the archs begin with."""

    kernels: tuple[str, ...] = KERNELS
    archs: tuple[str, ...] = ("",)


#: Values of options that ask for nothing special.
_NEUTRAL = (None, 0, "triton")
#: Options that do not act everywhere: elsewhere 0 (of implementation, "triton") is all they can be.
#: ``generic.json`` serves any arch, so that only what acts on all of them may stand there.
REACH = {
    "BLOCK_K": Reach(kernels=tuple(kernel for kernel in KERNELS if kernel != "probs")),
    "waves_per_eu": Reach(archs=("gfx",)),
    "matrix_instr_nonkdim": Reach(archs=("gfx9",)),
    "kpack": Reach(archs=("gfx90a", "gfx942")),
    "implementation": Reach(kernels=("forward", "backward_dq", "backward_dkdv", "mla"), archs=("sm90",)),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What entries match on.

    ``headdim`` is the padded one (a power of two, the larger of q's and v's; where q has two parts, as in MLA, the
    sum of both), ``seqlen`` the longer side rounded up to a power of two; ``masked``: a causal or a window mask
    applies; ``page_size`` 0: no pages;
    ``plain``: softmax of scaled scores and nothing else, in a layout of aligned 16-byte rows, not checked.
    """

    dtype: str
    headdim: int
    seqlen: int
    causal: bool
    masked: bool
    varlen: bool
    page_size: int = 0
    plain: bool = False


@dataclasses.dataclass(frozen=True)
class Match:
    """Rule of an entry; None and the empty tuple match anything."""

    dtype: tuple[str, ...] = ()
    headdim: tuple[int, int] = (1, _UNLIMITED)
    seqlen: tuple[int, int] = (1, _UNLIMITED)
    page_size: tuple[int, int] = (0, _UNLIMITED)
    causal: bool | None = None
    masked: bool | None = None
    varlen: bool | None = None
    plain: bool | None = None

    def matches(self, facts: Facts) -> bool:
        return (
            (not self.dtype or facts.dtype in self.dtype)
            and all(low <= getattr(facts, name) <= high for name in RANGES for low, high in [getattr(self, name)])
            and all(getattr(self, name) in (None, getattr(facts, name)) for name in FLAGS)
        )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What ``flash-rocm inspect --check`` holds an entry to."""

    vgpr_spills: int = 0  # registers the compiler may spill
    loop_scratch: int = 0  # scratch instructions inside loops
    waves_per_simd: int = 1  # at least
    R: float | None = None  # at most, in the loop over full blocks
    oldest_spills: int = 0  # vgpr_spills and loop_scratch with the oldest Triton, which no other limit is for


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where the values of an entry come from."""

    how: str
    date: str = ""
    compiler: str = ""
    note: str = ""

    def __str__(self) -> str:
        return ", ".join(text for text in (self.how, self.date, self.compiler, self.note) if text)


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Tuning of one Triton kernel.  Block sizes in rows and columns of the score matrix.

    implementation: "gluon" is another kernel for the same, written in Triton's lower level for one chip.
    BLOCK_K: dims of the head that the products over it take at a time; 0: all, the left operand staying in
    registers.  waves_per_eu, matrix_instr_nonkdim and kpack are options of AMD's compiler, 0 for its default;
    :data:`REACH` says which chips they act on.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    BLOCK_K: int = 0
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0
    kpack: int = 0
    implementation: str = "triton"
    limits: Limits = dataclasses.field(default=Limits(), compare=False)
    provenance: Provenance = dataclasses.field(default=Provenance("first choice"), compare=False)
    source: str = dataclasses.field(default="", compare=False)

    def compile_options(self) -> dict[str, int]:
        """Options of the compiler; 0, which is all that may stand where one does not act, says nothing to it."""
        return {name: getattr(self, name) for name in COMPILER_OPTIONS if getattr(self, name)}

    def options(self) -> dict[str, Any]:
        """Every option by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    def overridden(self, options: Mapping[str, int], source: str) -> KernelConfig:
        """The same with some options replaced, as the source of which the text stands."""
        return dataclasses.replace(self, **options, source=f"{source} over {self.source}")  # type: ignore[arg-type]

    def describe(self) -> str:
        """Values and where they come from, on one line."""
        values = " ".join(f"{name}={value}" for name, value in self.options().items())
        return f"{values} ({self.source}; {self.provenance})"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a file's ``triton`` section."""

    kernel: str
    match: Match
    config: KernelConfig


@dataclasses.dataclass(frozen=True)
class CkConfig:
    """One entry of a file's ``ck`` section: instances of a Composable Kernel pipeline, one for each dtype and variant.

    Attributes:
        tile: forward, splitkv: M0, N0, K0, N1 (the head dim of v), K1 and the head dim of q; backward M0, N0, K0 to
            K4 and the head dims of q and v.
        warps: in M, N, K; backward: of S and dP, of dK and dV, of dQ.
        warp_tile: of one matrix instruction in M, N, K; backward: of S, dP and dQ, of dK and dV.
        occupancy: workgroups per compute unit, 0 for CK's choice.
        variants: sets of :data:`CK_VARIANTS`, tried in this order.
        scheduler: of :data:`CK_SCHEDULERS`; "iterative-minreg" is the order that takes the fewest registers.
    """

    kernel: str
    dtypes: tuple[str, ...]
    tile: tuple[int, ...]
    warps: tuple[int, ...]
    warp_tile: tuple[int, ...]
    pipeline: str
    occupancy: int
    variants: tuple[tuple[str, ...], ...]
    provenance: Provenance
    source: str
    scheduler: str = CK_SCHEDULERS[0]

    @property
    def headdims(self) -> tuple[int, int]:
        """The largest head dims of q and v."""
        return (self.tile[7], self.tile[8]) if self.kernel == "backward" else (self.tile[5], self.tile[3])

    @property
    def built_how(self) -> tuple[object, ...]:
        """All that makes code of one instance differ from that of another with the same name."""
        return self.tile, self.warps, self.warp_tile, self.pipeline, self.occupancy, self.scheduler

    @property
    def tile_of_scores(self) -> tuple[int, int]:
        """Rows of q and keys of a tile."""
        return self.tile[0], self.tile[1]


@dataclasses.dataclass(frozen=True)
class ArchConfigs:
    """The contents of one file."""

    arch: str
    triton: tuple[Entry, ...]
    ck: tuple[CkConfig, ...]
    auxiliary: tuple[str, ...] = ()  # of AUXILIARY_KERNELS: those that calls take from C++ where it is built


# --------------------------------------------------------------------------------------------------
# Checks.  ``where`` is the file or variable with the way to the value.


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
    for key in (key for key in REACH if options.get(key) not in _NEUTRAL):
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
    lacks = sorted(_CK_LACKS[kernel] & variant)
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
