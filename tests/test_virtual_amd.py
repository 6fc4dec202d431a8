"""AMD's own assembled attention kernels on the virtual GPU, against float64: evidence for the emulator itself.

They are hand-written around hardware behaviour that two checks of the virtual GPU do not take for granted:
their waves wait at different barriers (one half of them computes while the other loads), and LDS writes
are not waited for before a barrier, since one compute unit's LDS works in order.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

import shutil

from foreign import NO_AITER, aiter_root
from virtual_amd import backward_reference, from_bf16, from_fp16, reference, run_backward, run_forward, to_bf16, to_fp16

from flash_rocm.virtual import Checks, LdsRace

ROOT = aiter_root()
pytestmark = [
    pytest.mark.virtual,
    pytest.mark.skipif(ROOT is None, reason=NO_AITER),
    pytest.mark.skipif(shutil.which("llvm-objdump-22") is None, reason="needs llvm-objdump-22"),
]
CHECKS = Checks(barriers=False, barrier_waits=False)
GFX942 = "gfx942/fmha_v3_fwd/MI300/fwd_hd128_bf16"
GFX950 = "gfx950/fmha_v3_fwd/fwd_hd128_bf16"
_ROUNDINGS = ("rtne", "rtna", "rtz")
#: One rounding of P to bfloat16 to nearest, or towards zero (twice as far and to one side), and of the result.
BOUND = {"rtne": 2.0**-8, "rtna": 2.0**-8, "rtz": 2.0**-6.5, "": 2.0**-8}


def compare(path: str, arch: str, causal: bool, bound: float, checks: Checks, order: str, n: int = 512) -> None:
    assert ROOT is not None
    random = np.random.default_rng(0)
    q, k, v = (to_bf16(random.standard_normal((1, n, heads, 128))) for heads in (2, 1, 1))
    out, lse, stats = run_forward(ROOT / path, arch, q, k, v, causal, checks=checks, order=order)
    expected, expected_lse = reference(*(from_bf16(x) for x in (q, k, v)), scale=128**-0.5, causal=causal)
    assert np.abs(from_bf16(out) - expected).max() <= bound * max(np.abs(expected).max(), 1)
    assert np.abs(lse - expected_lse).max() <= 2e-6
    assert stats.per_class()["matrix"] > 0


@pytest.mark.parametrize("rounding", _ROUNDINGS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gfx942_forward(causal: bool, rounding: str) -> None:
    path = f"{GFX942}{'_causal' if causal else ''}_{rounding}.co"
    compare(path, "gfx942", causal, BOUND[rounding], CHECKS, "shuffled:1")


#: Kernels of the backward: sums in float32 (a32) or 16 bits (a16), masks, padded lengths, sequences one behind the
#: other (group), from the top left and the bottom right (br).
BACKWARD = {
    "gfx942": (
        *(f"bf16_causal_a32_{rounding}" for rounding in _ROUNDINGS),
        *("bf16_a32_rtne", "bf16_causal_a16_rtne", "bf16_causal_br_a32_rtne_psskddv", "fp16_causal_a32"),
        *("bf16_a32_rtne_pssk_group", "bf16_causal_a32_rtz_psskddv_group"),
    ),
    "gfx950": (
        *("bf16_a32_psskddv", "bf16_a16_psskddv"),
        *("bf16_a32_psskddv_group", "bf16_a16_psskddv_group", "bf16_causal_a16_psskddv_group"),
    ),
}
#: Those that only make test-virtual runs: what they do others do too.
MORE_BACKWARD = {
    "gfx942": (
        *("bf16_a32_rtna", "bf16_a32_rtz", "bf16_causal_a16_rtna", "bf16_causal_a16_rtz"),
        *(f"bf16_a16_{rounding}" for rounding in _ROUNDINGS),
        *("fp16_a16", "bf16_a32_rtne_psskddv", "fp16_causal_br_a32_psskddv_group"),
    ),
    "gfx950": ("fp16_a32_psskddv", "fp16_a16_psskddv", "fp16_causal_br_a32_psskddv_group"),
}
_CASES = [
    pytest.param(arch, name, marks=marks)
    for kernels, marks in ((BACKWARD, []), (MORE_BACKWARD, [pytest.mark.exhaustive]))
    for arch, names in kernels.items()
    for name in names
]


def compare_backward(arch: str, name: str, rows: int, checks: Checks = CHECKS, order: str = "shuffled:1") -> None:
    """Two sequences for "group"; lengths that fill no block where the kernel takes such."""
    assert ROOT is not None
    random, kind = np.random.default_rng(0), name.partition("_")[0]
    encode, decode = (to_bf16, from_bf16) if kind == "bf16" else (to_fp16, from_fp16)
    q, k, v, dout = (encode(random.standard_normal((1, rows, 1, 128))) for _ in range(4))
    starts = (0, 110, rows) if "group" in name else ()
    parts = [
        backward_reference(*(decode(x[:, a:b]) for x in (q, k, v, dout)), scale=128**-0.5, causal="causal" in name)
        for a, b in itertools.pairwise(starts or (0, rows))
    ]
    expected = [np.concatenate([part[n] for part in parts], axis=1) for n in range(3)]
    lse, delta = (np.concatenate([part[n] for part in parts], axis=2) for n in (3, 4))
    path = ROOT / f"{arch}/fmha_v3_bwd/bwd_hd128_{name}.co"
    found = run_backward(path, arch, q, k, v, dout, lse, delta, starts, checks=checks, order=order)
    rounding = next((each for each in BOUND if each and each in name), "")
    for actual, wanted in zip((found.dq, found.dk, found.dv), expected, strict=True):
        # P and dS are rounded before they are multiplied, and the result is; with "a16" each sum of dq too.
        assert np.abs(actual - wanted).max() <= 2 * BOUND[rounding] * np.abs(wanted).max()
    assert found.stats.per_class()["matrix"] > 0


@pytest.mark.parametrize(("arch", "name"), _CASES)
def test_backward(arch: str, name: str) -> None:
    """Two workgroups, or one that does two blocks, for each sequence that is long enough."""
    compare_backward(arch, name, 300 if "pssk" in name else 256)


@pytest.mark.parametrize("name", ["bf16_causal_a32_psskddv", "bf16_causal_br_a16_psskddv", "fp16_causal_a16_psskddv"])
def test_gfx950_causal_backward_in_lockstep(name: str) -> None:
    compare_backward("gfx950", name, 500, Checks(barriers=False, barrier_waits=False, races=False), "lockstep")


def test_gfx950_causal_backward_has_no_barrier_between_its_two_tiles() -> None:
    """As the forward: writes of the second tile may overtake the last reads of the first."""
    with pytest.raises(LdsRace, match="ds_write_b128"):
        compare_backward("gfx950", "bf16_causal_a32_psskddv", 500)


def test_gfx950_forward() -> None:
    compare(f"{GFX950}.co", "gfx950", False, BOUND[""], CHECKS, "shuffled:1")


def test_gfx950_causal_forward_in_lockstep() -> None:
    checks = Checks(barriers=False, barrier_waits=False, races=False)
    compare(f"{GFX950}_causal.co", "gfx950", True, BOUND[""], checks, "lockstep")


def test_gfx950_causal_forward_has_no_barrier_between_its_two_tiles() -> None:
    """Its loads of the second tile may overtake the last reads of the first: right only by timing."""
    with pytest.raises(LdsRace, match="buffer_load_dwordx4"):
        compare(f"{GFX950}_causal.co", "gfx950", True, BOUND[""], CHECKS, "lockstep")
