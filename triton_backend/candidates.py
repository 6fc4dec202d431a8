"""What tuning tries: options near those of the config that is there, less what cannot fit the chip."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from flash_rocm.amdgpu.chips import CHIPS, NVIDIA_SHARED
from flash_rocm.arch import Arch
from flash_rocm.config_schema import KernelConfig

from .plan import larger_part

#: Values tried for each option, by family of chips.  kpack is left as it is: newer compilers ignore it.
SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "cdna": {
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2),
        "waves_per_eu": (0, 1, 2, 3),
        "matrix_instr_nonkdim": (16, 32),
    },
    "rdna": {
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2),
        "waves_per_eu": (0, 1, 2, 4, 6),
    },
    "nvidia": {
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": (16, 32, 64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    },
}
#: Other values for decoding, which has few rows and waits for memory.
_DECODE: dict[str, dict[str, tuple[int, ...]]] = {
    "cdna": {"BLOCK_M": (16,), "num_warps": (1, 2, 4)},
    "rdna": {"BLOCK_M": (16,), "num_warps": (1, 2, 4, 8)},
    "nvidia": {"BLOCK_M": (16,), "num_warps": (1, 2, 4, 8), "num_stages": (1, 2, 3, 4, 5, 6)},
}
#: How many are compiled at most.
MAX_CANDIDATES = 48
#: Registers of one thread: CDNA has VGPRs and as many AGPRs.
_REGISTERS = {"cdna": 512, "rdna": 256, "nvidia": 255}


def family(arch: Arch) -> str:
    """The space of an arch."""
    if arch.vendor != "amd":
        return arch.vendor
    return "cdna" if arch.wave_size == 64 else "rdna"


def space_of(kernel: str, arch: Arch) -> dict[str, tuple[int, ...]]:
    """Values tried for each option of a kernel."""
    name = family(arch)
    return SPACES[name] | (_DECODE[name] if kernel == "decode" else {})


def registers_at_least(kernel: str, entry: KernelConfig, head: int, wave_size: int) -> int:
    """32-bit registers per thread that the float32 tiles of the inner loop take; addresses and operands come on top.

    Args:
        head: the padded head dim, of MLA the sum of both parts.
    """
    dim_v = larger_part(head) if kernel == "mla" else head
    scores, rows, cols = entry.BLOCK_M * entry.BLOCK_N, entry.BLOCK_M * dim_v, entry.BLOCK_N * dim_v
    # The accumulators, and the score tiles alive with them: P forward; P and dP backward.
    elements = {
        "forward": rows + scores,
        "backward_dq": rows + 2 * scores,
        "backward_dkdv": 2 * cols + 2 * scores,
        "probs": scores,
        "decode": rows + scores,
        "prefill": rows + scores,
        "mla": rows + scores,
    }[kernel]
    return elements // (entry.num_warps * wave_size)


def lds_at_least(kernel: str, entry: KernelConfig, head: int, itemsize: int, family_name: str) -> int:
    """Bytes of LDS that the tiles a loop streams take: one alone, and where loads are pipelined all in flight."""
    row_bytes = head * itemsize
    streamed = entry.BLOCK_M if kernel == "backward_dkdv" else entry.BLOCK_N
    if family_name != "nvidia" or entry.num_stages == 1:
        # On AMD a stage may live in registers.
        return 0 if family_name == "rdna" else streamed * row_bytes
    # "mla" reads one tile for both.
    tiles = 1 if kernel in ("probs", "mla") else 2
    return (entry.num_stages - 1) * tiles * streamed * row_bytes


def fits(kernel: str, entry: KernelConfig, arch: Arch, head: int, itemsize: int) -> bool:
    """False where the chip certainly cannot hold a candidate without spilling.  Unknown limits count as kept."""
    name = family(arch)
    registers = _REGISTERS[name]
    if entry.waves_per_eu and arch.name in CHIPS:
        chip = CHIPS[arch.name]
        registers = min(registers, chip.vgprs_per_simd // entry.waves_per_eu)
    lds = CHIPS[arch.name].lds_per_workgroup if arch.name in CHIPS else NVIDIA_SHARED.get(arch.name, math.inf)
    return (
        registers_at_least(kernel, entry, head, arch.wave_size) <= registers
        and lds_at_least(kernel, entry, head, itemsize, name) <= lds
    )


def candidates(kernel: str, default: KernelConfig, arch: Arch, head: int, itemsize: int) -> list[KernelConfig]:
    """The default, then what fits, nearest to the default first.

    Near: few and small steps in the options, a step being a doubling.

    Args:
        head: the padded head dim.
        itemsize: bytes of an element of q.
    """
    space = space_of(kernel, arch)

    def distance(entry: KernelConfig) -> float:
        steps = (abs(math.log2(getattr(entry, n) or 0.5) - math.log2(getattr(default, n) or 0.5)) for n in space)
        return sum(steps)

    def all_of_them() -> Iterator[KernelConfig]:
        for values in itertools.product(*space.values()):
            yield dataclasses.replace(default, **dict(zip(space, values, strict=True)))  # type: ignore[arg-type]

    found = [entry for entry in all_of_them() if entry != default and fits(kernel, entry, arch, head, itemsize)]
    return [default, *sorted(found, key=distance)[: MAX_CANDIDATES - 1]]
