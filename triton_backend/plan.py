"""From a problem to kernel constants: pure host code, importable without Triton and tested without a GPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Protocol

import torch

from flash_rocm import config, runtime, tuned
from flash_rocm.amdgpu.chips import CHIPS
from flash_rocm.arch import Arch
from flash_rocm.config_schema import ConfigError, Facts, KernelConfig
from flash_rocm.problem import AttentionProblem, dropout_threshold
from flash_rocm.runtime import ConfigSource
from flash_rocm.tuned import TuneKey

LOG2E = math.log2(math.e)
#: tl.dot needs at least 16 in every dim.
MIN_BLOCK_D = 16


def block_d(headdim: int) -> int:
    """The power of two a head dim is padded to inside a kernel."""
    return max(MIN_BLOCK_D, 1 << (headdim - 1).bit_length())


#: Dims of a head that a kernel holds in one tile; what is beyond is a second part of q and k.
MAX_TILE_D = 512


def score_dims(problem: AttentionProblem) -> tuple[int, int]:
    """Dims of the two tiles that scores are products of; 0: there is one."""
    if problem.qv:
        return problem.headdim, problem.headdim_v
    if problem.cached and problem.headdim > MAX_TILE_D:
        return problem.headdim - MAX_TILE_D, MAX_TILE_D
    return problem.headdim, 0


def larger_part(headdim: int) -> int:
    """Of a sum of two padded head dims, as :class:`Facts` have it for MLA; the values have the larger one."""
    return 1 << ((headdim - 1).bit_length() - 1)


def is_masked(problem: AttentionProblem) -> bool:
    """Whether a causal or window mask applies (ragged ends do not count)."""
    return problem.window_left >= 0 or problem.window_right >= 0


def rounds_in_software(arch: Arch) -> bool:
    """Whether converting float32 to bfloat16 takes several instructions."""
    return arch.vendor == "amd" and arch.name in CHIPS and not CHIPS[arch.name].converts_bf16


def facts_of(problem: AttentionProblem, plain: bool = False) -> Facts:
    """What config entries match on."""
    shorter, longer = sorted((max(problem.seqlen_q, 1), max(problem.seqlen_k, 1)))
    first, second = score_dims(problem)
    return Facts(
        dtype=str(problem.dtype).removeprefix("torch."),
        headdim=max(block_d(first) + (block_d(second) if second else 0), block_d(problem.headdim_v)),
        seqlen=1 << (longer - 1).bit_length(),
        causal=problem.causal,
        masked=is_masked(problem),
        varlen=problem.varlen,
        page_size=problem.page_size,
        plain=plain,
        shorter=1 << (shorter - 1).bit_length(),
    )


def kernel_config(
    kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource | None = None, plain: bool = False
) -> KernelConfig:
    """The config entry one kernel of this problem takes on this arch; plain: see :class:`Facts`."""
    if plain:
        shipped = config.lookup(arch.name, kernel, facts_of(problem, plain), source)
        if shipped.implementation != "triton":
            return shipped  # tuned entries are of the Triton kernels
    folder = source.tuned if source else None
    found = tuned.find(folder, tune_key(kernel, problem, arch)) if folder else None
    return config.lookup(arch.name, kernel, facts_of(problem, plain), source, found)


def tune_key(kernel: str, problem: AttentionProblem, arch: Arch) -> TuneKey:
    """Where a tuned entry for one kernel of this problem is kept."""
    facts, group = facts_of(problem), problem.group_size
    if problem.cached:
        return tuned.cache_key_of(arch.name, kernel, facts, group, problem.seqlen_q, problem.batch)
    return tuned.key_of(arch.name, kernel, facts, group)


def kernels_of(problem: AttentionProblem) -> tuple[str, ...]:
    """Names of the kernels a call launches, the backward ones if gradients are needed."""
    if problem.cached:
        return (cache_kernel(problem, is_absorbed(problem)),)
    return ("forward", "backward_dq", "backward_dkdv") if problem.needs_grad else ("forward",)


def describe_configs(problem: AttentionProblem, arch: Arch) -> list[str]:
    """One line per kernel for ``explain``."""
    # Kernels over a K/V cache are checked ones in debugging; of the tensors' layout nothing is known here.
    source, plain = runtime.config_source(), is_plain(problem) and not (problem.cached and runtime.debug())
    found = ((kernel, kernel_config(kernel, problem, arch, source, plain)) for kernel in kernels_of(problem))
    return [f"{kernel}: {entry.describe()}" for kernel, entry in found]


class Launchable(Protocol):
    """What a launch needs of a plan."""

    @property
    def implementation(self) -> str:
        """Which of the kernels of this name."""

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernel by name."""

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler."""

    def too_large(self, what: str, limit: int, got: int) -> ConfigError:
        """The error for a kernel that the chip has no room for."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one kernel launch of a problem takes besides pointers and strides.

    ``kernel`` is its name in configs.  ``constants`` are compile-time, in the kernel's order of names;
    ``scalars`` are run-time numbers that a new length, scale or window changes without compiling.
    """

    kernel: str
    config: KernelConfig
    constants: dict[str, Any]
    options: dict[str, int]
    blocks: int  # workgroups per head
    scale: float
    softcap_log2: float
    window_left: int
    window_right: int
    dropout_threshold: int
    dropout_rescale: float

    @property
    def implementation(self) -> str:
        """Which of the kernels of this name."""
        return self.config.implementation

    def too_large(self, what: str, limit: int, got: int) -> ConfigError:
        """The error for a kernel that the chip has no room for, which shows only when it is compiled."""
        return ConfigError(
            f"{self.kernel}: {self.config.describe()}: expected a kernel that fits the chip, {what} <= {limit}, "
            f"got {got}. Hint: smaller blocks or fewer stages, there or in FLASH_ROCM_KERNEL_CONFIG"
        )


#: Values of options that the Gluon kernels are written for.
_GLUON_OPTIONS: dict[str, dict[str, tuple[int, ...]]] = {
    "forward": {
        "BLOCK_M": (128, 192),
        "BLOCK_N": (64, 128),
        "BLOCK_K": (0,),
        "num_warps": (4,),
        "num_stages": (1, 2, 3, 4),
    },
    "backward_dq": {
        "BLOCK_M": (128,),
        "BLOCK_N": (32, 64, 128),
        "BLOCK_K": (0,),
        "num_warps": (4,),
        # A tile is released after the next one has come.
        "num_stages": (2, 3, 4),
    },
    "backward_dkdv": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_N": (128,),
        "BLOCK_K": (0,),
        "num_warps": (4,),
        "num_stages": (1, 2, 3, 4),
    },
    "mla": {"BLOCK_M": (64,), "BLOCK_N": (128,), "BLOCK_K": (0,), "num_warps": (4,), "num_stages": (1,)},
}


def _check_implementation(kernel: str, entry: KernelConfig, plain: bool, headdim: int) -> None:
    """Raise ConfigError where the kernel of this name does not take the value of an option, or Gluon's the call."""
    if entry.implementation != "gluon":
        if entry.BLOCK_M & (entry.BLOCK_M - 1):
            raise ConfigError(
                f"{kernel}: {entry.describe()}: expected a power of two for BLOCK_M with implementation=triton, got "
                f"{entry.BLOCK_M}"
            )
        return
    if not plain:
        raise ConfigError(
            f"{kernel}: {entry.describe()}: expected implementation=triton for this call, got gluon. Hint: it takes "
            'plain calls alone (Facts in flash_rocm/config_schema.py); give such an entry "plain": true to match'
        )
    for name, values in _GLUON_OPTIONS[kernel].items():
        if getattr(entry, name) not in values:
            raise ConfigError(
                f"{kernel}: {entry.describe()}: expected {name}={' or '.join(map(str, values))} with "
                f"implementation=gluon, got {getattr(entry, name)}. Hint: implementation=triton takes other values"
            )
    # Three warpgroups have registers for this head dim alone, and wait in turn for tiles that one stage cannot hold.
    if entry.BLOCK_M == 192 and (headdim != 64 or entry.num_stages < 2):
        raise ConfigError(
            f"{kernel}: {entry.describe()}: expected BLOCK_M=128, or head dim 64 and num_stages >= 2, with "
            f"implementation=gluon, got BLOCK_M=192, head dim {headdim} and num_stages={entry.num_stages}"
        )


@functools.lru_cache(maxsize=4096)
def plan(
    kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource | None = None, plain: bool = False
) -> Plan:
    """Constants, options and run-time scalars of one kernel for one problem.

    Args:
        source: :func:`flash_rocm.runtime.config_source`, the user's own configs.
        plain: see :class:`flash_rocm.config_schema.Facts`.
    """
    entry = kernel_config(kernel, problem, arch, source, plain)
    _check_implementation(kernel, entry, plain, problem.headdim)
    softcap, scale = problem.softcap, problem.softmax_scale
    constants: dict[str, Any] = {
        "HEADDIM": problem.headdim,
        "HEADDIM_V": problem.headdim_v,
        "BLOCK_D": block_d(problem.headdim),
        "BLOCK_DV": block_d(problem.headdim_v),
        "BLOCK_M": entry.BLOCK_M,
        "BLOCK_N": entry.BLOCK_N,
        "BLOCK_K": entry.BLOCK_K,
        "NUM_XCDS": arch.num_xcds,
        "VARLEN": problem.varlen,
        "MASK_LEFT": problem.window_left >= 0,
        "MASK_RIGHT": problem.window_right >= 0,
        # Later rows see more keys: the Gluon forward takes a long block with a short one.
        "PAIRED": problem.window_right >= 0 > problem.window_left,
        # The running maximum of unscaled scores is that of the scaled ones only for a positive scale.
        "RAW_SCALE": softcap == 0.0 and not problem.alibi and scale > 0.0,
        "SOFTCAP": softcap > 0.0,
        "ALIBI": problem.alibi,
        "SINKS": problem.sinks,
        "DROPOUT": problem.dropout_p > 0.0,
        "STAGES": entry.num_stages,
        # What changes from tile to tile in a mask: its bounds, or (NVIDIA, whose compiler would keep a register
        # for every column of a tile) the columns.
        "MOVE_BOUNDS": arch.vendor != "nvidia",
        "TIES_UP": problem.dtype == torch.bfloat16 and rounds_in_software(arch),
    }
    over_keys = kernel == "backward_dkdv"
    length, block = (problem.seqlen_k, entry.BLOCK_N) if over_keys else (problem.seqlen_q, entry.BLOCK_M)
    blocks = -(-length // block)
    if kernel == "forward" and entry.implementation == "gluon" and constants["PAIRED"]:
        blocks = -(-blocks // 2)
    return Plan(
        kernel=kernel,
        config=entry,
        constants=constants,
        options=entry.compile_options(),
        blocks=blocks,
        scale=scale / softcap if softcap > 0.0 else scale * LOG2E,
        softcap_log2=softcap * LOG2E,
        window_left=problem.window_left,
        window_right=problem.window_right,
        dropout_threshold=dropout_threshold(problem.dropout_p),
        dropout_rescale=1.0 / (1.0 - problem.dropout_p),
    )


#: Rows of a key head, query heads that share it times their positions, up to which "decode" takes all in one tile.
DECODE_ROWS = 16


def is_absorbed(problem: AttentionProblem) -> bool:
    """Whether the larger part of the keys can be the values: qv, or one tensor that is larger than a tile."""
    return problem.qv or (problem.headdim > MAX_TILE_D and problem.headdim_v == MAX_TILE_D)


def is_plain(problem: AttentionProblem) -> bool:
    """Facts.plain of the config schema, as far as the problem tells.

    Head dims are those that the Gluon kernels are written for: absorbed MLA of 512 and 64, else powers of two that
    the rows of swizzled shared memory divide.
    """
    if problem.cached:
        fits = score_dims(problem) == (64, MAX_TILE_D) and problem.headdim_v == MAX_TILE_D
    else:
        fits = all(dim >= 64 and dim == block_d(dim) for dim in (problem.headdim, problem.headdim_v))
    return (
        fits
        and problem.dtype in (torch.float16, torch.bfloat16)
        and problem.softmax_scale > 0.0
        and not (problem.softcap or problem.alibi or problem.sinks or problem.rotary_dim or problem.dropout_p)
    )


def is_built_plain(kernel: str, problem: AttentionProblem) -> bool:
    """Facts.plain of what is compiled without tensors: for plain ones, where kernel and problem allow that."""
    return kernel != "probs" and not problem.cached and is_plain(problem)


#: Bytes of shared memory of an NVIDIA multiprocessor; others have at least the last.
_SHARED_BYTES = {"sm80": 164 << 10, "sm90": 228 << 10, "": 100 << 10}
_MAX_WORKGROUPS_PER_CU = 8
#: Warps of a multiprocessor with which a decode of 16-bit keys at head dim 128, the next tiles on their way, reads
#: about as fast as with more, as measured: parts that only add warps cost their combination and gain nothing.
_WARPS_THAT_READ = {"sm90": 4}


def workgroups_per_cu(current: Plan, itemsize: int, arch: Arch) -> int:
    """Of the attention kernel over a K/V cache, by the memory that its tiles of keys and values take.

    No more than have a use, where that is known.
    """
    config, constants = current.config, current.constants
    dims = constants["BLOCK_D"] + constants["BLOCK_DV"]
    if constants["HEADDIM_2"] and not constants["V_IS_K2"]:
        dims += constants["BLOCK_D2"]
    tiles = config.BLOCK_N * dims * itemsize * config.num_stages
    pool = CHIPS[arch.name].lds_pool if arch.name in CHIPS else _SHARED_BYTES.get(arch.name, _SHARED_BYTES[""])
    most = _MAX_WORKGROUPS_PER_CU
    measured = dims == 2 * 128 and itemsize == 2 and config.num_stages > 1
    if measured and current.kernel == "decode" and arch.name in _WARPS_THAT_READ:
        most = max(_WARPS_THAT_READ[arch.name] // config.num_warps, 1)
    return min(max(pool // tiles, 1), most)


def cache_kernel(problem: AttentionProblem, v_is_k2: bool) -> str:
    """Name of the config of the attention kernel over a K/V cache."""
    if v_is_k2:
        return "mla"
    return "decode" if problem.seqlen_q * problem.group_size <= DECODE_ROWS else "prefill"


@functools.lru_cache(maxsize=4096)
def cache_plan(
    problem: AttentionProblem,
    arch: Arch,
    source: ConfigSource | None = None,
    v_is_k2: bool = False,
    plain: bool = False,
) -> Plan:
    """Like :func:`plan`, for the attention kernel over a K/V cache.

    Args:
        v_is_k2: the second part of the keys' head dim is the values: they are read once for both.
    """
    base = plan(cache_kernel(problem, v_is_k2), problem, arch, source, plain)
    headdim, headdim_2 = score_dims(problem)
    constants = {
        **base.constants,
        "HEADDIM": headdim,
        "BLOCK_D": block_d(headdim),
        "HEADDIM_2": headdim_2,
        "BLOCK_D2": block_d(headdim_2 or 1),
        "PAGE_SIZE": problem.page_size,
        "ROTARY_HALF": problem.rotary_dim // 2,
        "INTERLEAVED": problem.rotary_interleaved,
        "CHUNK": problem.attention_chunk > 0,
        "V_IS_K2": v_is_k2,
    }
    rows = problem.seqlen_q * problem.group_size
    return dataclasses.replace(base, constants=constants, blocks=-(-rows // base.config.BLOCK_M))
