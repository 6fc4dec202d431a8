"""What each chip has to give to a workgroup.  A leaf.

Sources: the CDNA and RDNA instruction set manuals, and LLVM's AMDGPU target features (which chips have half
again as many registers).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one AMD GPU.  VGPRs count per lane, AGPRs among them where the file is shared."""

    lds_per_workgroup: int  # bytes
    lds_pool: int  # bytes that the SIMDs of one compute unit (RDNA: work-group processor) share
    lds_granule: int  # bytes
    simds_per_pool: int
    vgprs_per_simd: int
    vgpr_granule: int
    max_waves_per_simd: int
    wave_size: int
    converts_bf16: bool = False  # has an instruction that rounds float32 to bfloat16

    def waves_by_vgprs(self, vgprs: int) -> int:
        """Waves per SIMD whose registers fit."""
        allocated = _rounded(max(vgprs, 1), self.vgpr_granule)
        return min(self.vgprs_per_simd // allocated, self.max_waves_per_simd)

    def waves_by_lds(self, lds_bytes: int, num_warps: int) -> int:
        """Waves per SIMD whose workgroups' LDS fits; 0: not one workgroup does."""
        if lds_bytes > self.lds_per_workgroup:
            return 0
        if lds_bytes == 0:
            return self.max_waves_per_simd
        workgroups = self.lds_pool // _rounded(lds_bytes, self.lds_granule)
        # Fewer waves than SIMDs still give one to some of them.
        return min(max(workgroups * num_warps // self.simds_per_pool, 1), self.max_waves_per_simd)

    def waves_per_simd(self, vgprs: int, lds_bytes: int, num_warps: int) -> int:
        """Occupancy: how many waves of a kernel one SIMD holds at a time."""
        return min(self.waves_by_vgprs(vgprs), self.waves_by_lds(lds_bytes, num_warps))


def _rounded(number: int, granule: int) -> int:
    return -(-number // granule) * granule


def _cdna(lds: int, granule: int, converts_bf16: bool) -> Chip:
    return Chip(lds, lds, granule, 4, 512, 8, 8, 64, converts_bf16)


def _rdna(vgprs: int, vgpr_granule: int) -> Chip:
    return Chip(64 << 10, 128 << 10, 1024, 4, vgprs, vgpr_granule, 16, 32)


_CDNA3, _CDNA4 = _cdna(64 << 10, 512, False), _cdna(160 << 10, 1280, True)
_RDNA_SMALL, _RDNA_LARGE = _rdna(1024, 16), _rdna(1536, 24)

CHIPS = {
    "gfx90a": _CDNA3,
    "gfx942": _CDNA3,
    "gfx950": _CDNA4,
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1151", "gfx1200", "gfx1201"), _RDNA_LARGE),
    **dict.fromkeys(("gfx1102", "gfx1103", "gfx1150", "gfx1152", "gfx1153"), _RDNA_SMALL),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """The clock and memory of a product, as its data sheet has them; its compute units are in ``runtime``."""

    name: str
    ghz: float  # peak engine clock
    memory_gb_s: float


#: The largest product of each target; of the MI250X, one of its two dies, which is what a device is.
PRODUCTS = {
    "gfx90a": Product("MI250X (one die)", 1.7, 1638.4),
    "gfx942": Product("MI300X", 2.1, 5300.0),
    "gfx950": Product("MI355X", 2.4, 8000.0),
    "gfx1100": Product("RX 7900 XTX", 2.5, 960.0),
    "gfx1201": Product("RX 9070 XT", 2.97, 640.0),
}

#: Bytes of shared memory that one block may ask for on NVIDIA GPUs.
NVIDIA_SHARED = {"sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10}
