"""AMD's own assembled attention kernels on the virtual GPU, against float64: evidence for the emulator itself.

They are hand-written around hardware behaviour that two checks of the virtual GPU do not take for granted:
their waves wait at different barriers (one half of them computes while the other loads), and LDS writes
are not waited for before a barrier, since one compute unit's LDS works in order.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

import shutil

from foreign import NO_AITER, aiter_root
from virtual_amd import backward_reference, from_bf16, reference, run_backward, run_forward, to_bf16

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


@pytest.mark.parametrize("rounding", ["rtne", "rtna", "rtz"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gfx942_forward(causal: bool, rounding: str) -> None:
    path = f"{GFX942}{'_causal' if causal else ''}_{rounding}.co"
    compare(path, "gfx942", causal, BOUND[rounding], CHECKS, "shuffled:1")


@pytest.mark.parametrize("rounding", ["rtne", "rtna", "rtz"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gfx942_backward(causal: bool, rounding: str) -> None:
    """The kernels that add up dq with float32 atomics; two workgroups, or one that does two blocks."""
    assert ROOT is not None
    random = np.random.default_rng(0)
    q, k, v, dout = (to_bf16(random.standard_normal((1, 256, 1, 128))) for _ in range(4))
    exact = [from_bf16(x) for x in (q, k, v, dout)]
    *expected, lse, delta = backward_reference(*exact, scale=128**-0.5, causal=causal)
    path = ROOT / f"gfx942/fmha_v3_bwd/bwd_hd128_bf16_{'causal_' if causal else ''}a32_{rounding}.co"
    dq, dk, dv, stats = run_backward(path, q, k, v, dout, lse, delta, causal, checks=CHECKS, order="shuffled:1")
    for found, wanted in zip((dq, from_bf16(dk), from_bf16(dv)), expected, strict=True):
        # P and dS are rounded before they are multiplied, and the result is.
        assert np.abs(found - wanted).max() <= 2 * BOUND[rounding] * np.abs(wanted).max()
    assert stats.per_class()["matrix"] > 0


def test_gfx950_forward() -> None:
    compare(f"{GFX950}.co", "gfx950", False, BOUND[""], CHECKS, "shuffled:1")


def test_gfx950_causal_forward_in_lockstep() -> None:
    checks = Checks(barriers=False, barrier_waits=False, races=False)
    compare(f"{GFX950}_causal.co", "gfx950", True, BOUND[""], checks, "lockstep")


def test_gfx950_causal_forward_has_no_barrier_between_its_two_tiles() -> None:
    """Its loads of the second tile may overtake the last reads of the first: right only by timing."""
    with pytest.raises(LdsRace, match="buffer_load_dwordx4"):
        compare(f"{GFX950}_causal.co", "gfx950", True, BOUND[""], CHECKS, "lockstep")
