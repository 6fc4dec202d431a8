"""What a kernel config may say: keys, values and dataclasses.  A leaf that reads no file.

``flash_rocm/config_checks.py`` holds configs to it; ``configs/schema.json`` documents the same for editors, and a
test holds the two equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

#: Changes when entries that were stored under an earlier one can no longer be used.
VERSION = 1
KERNELS = ("forward", "backward_dq", "backward_dkdv", "probs", "decode", "prefill", "mla")
DTYPES = ("float16", "bfloat16", "float32")
#: Each option and the values it may have.  Those of AMD's compiler take 0 for the compiler's default.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "BLOCK_M": (16, 32, 64, 128, 192, 256, 512),
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
RANGES = {"headdim": 1, "seqlen": 1, "shorter": 1, "page_size": 0}
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
CK_LACKS = {"forward": {"deterministic"}, "backward": {"softcap"}, "splitkv": {"varlen", "deterministic"}}
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
NEUTRAL = (None, 0, "triton")
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
    sum of both), ``seqlen`` the longer side rounded up to a power of two, ``shorter`` the other side likewise;
    ``masked``: a causal or a window mask applies; ``page_size`` 0: no pages;
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
    shorter: int = 1


@dataclasses.dataclass(frozen=True)
class Match:
    """Rule of an entry; None and the empty tuple match anything."""

    dtype: tuple[str, ...] = ()
    headdim: tuple[int, int] = (1, _UNLIMITED)
    seqlen: tuple[int, int] = (1, _UNLIMITED)
    shorter: tuple[int, int] = (1, _UNLIMITED)
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
