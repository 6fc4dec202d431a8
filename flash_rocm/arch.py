"""What selection and launch know of a device: its instruction set, and how much of it there is.  A leaf."""

from __future__ import annotations

import dataclasses
import functools
import re

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Arch:
    """What selection and launch need to know of a device.

    ``name`` is the LLVM target for AMD ("gfx942"), "sm90" and the like for NVIDIA, "cpu" for the
    host.  ``num_xcds`` counts the dies (XCDs) over which the hardware spreads consecutive
    workgroups round-robin, each with an L2 cache of its own: 1 where there is one cache.
    """

    name: str
    vendor: str  # "amd", "nvidia" or "cpu"
    num_cus: int  # compute units (streaming multiprocessors on NVIDIA)
    num_xcds: int
    wave_size: int


CPU = Arch("cpu", "cpu", 1, 1, 1)

#: Compute units per die of the multi-die chips.  Of gfx942, the 80-CU variant has 20 a die, all
#: others 38; the count of dies in the current partition mode follows from the CU count.
_CUS_PER_XCD = {"gfx942": (20, 38), "gfx950": (32,)}


def amd_arch(name: str, num_cus: int) -> Arch:
    """Describe an AMD GPU by LLVM target and compute-unit count (CDNA: wave64, RDNA: wave32)."""
    wave_size = 64 if name.startswith("gfx9") else 32
    num_xcds = 1
    for per_die in _CUS_PER_XCD.get(name, ()):
        if num_cus % per_die == 0:
            num_xcds = num_cus // per_die
    return Arch(name, "amd", num_cus, num_xcds, wave_size)


def nvidia_arch(capability: tuple[int, int], num_cus: int) -> Arch:
    """Describe an NVIDIA GPU by compute capability, (9, 0) being "sm90"."""
    return Arch(f"sm{capability[0]}{capability[1]}", "nvidia", num_cus, 1, 32)


#: Compute units of the largest product of each target, for judging a chip that is not here.
_PRODUCT_CUS = {
    "gfx90a": 110,
    "gfx942": 304,
    "gfx950": 256,
    "gfx1100": 96,
    "gfx1101": 60,
    "gfx1102": 32,
    "gfx1150": 16,
    "gfx1151": 40,
    "gfx1200": 32,
    "gfx1201": 64,
    "sm80": 108,
    "sm90": 132,
    "sm100": 148,
}

#: NVIDIA archs that ``info`` and reports name; others work too.
NVIDIA_ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")


def arch_named(name: str, num_cus: int | None = None) -> Arch:
    """Describe an arch by name: "cpu", "gfx942" and the like, or "sm90" and the like.

    Args:
        num_cus: compute units; default: those of the largest product with this target, 32 if unknown.

    Raises:
        ValueError: the name has none of these forms.
    """
    if name == "cpu":
        return CPU
    count = _PRODUCT_CUS.get(name, 32) if num_cus is None else num_cus
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", name):
        return amd_arch(name, count)
    if re.fullmatch(r"sm[0-9]{2,3}", name):
        return nvidia_arch((int(name[2:-1]), int(name[-1])), count)
    raise ValueError(f"arch: expected cpu, gfx... or sm..., got {name!r}. Hint: gfx942, gfx1100, sm90.")


@functools.cache
def gpu_arch(index: int) -> Arch:
    """Describe the GPU of this index; on a ROCm build of torch it is one of AMD."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return amd_arch(properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return nvidia_arch((properties.major, properties.minor), properties.multi_processor_count)
