"""The speed model: its arithmetic on hand-written code, its predictions of shipped and of AMD's assembled kernels."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")
pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from foreign import NO_AITER, aiter_root
from virtual_amd import forward_launch, to_bf16
from virtual_asm import hand_written

from flash_rocm import cli, runtime
from flash_rocm.inspect import model
from flash_rocm.inspect.report import Case
from flash_rocm.virtual import Checks, Launch, VirtualGpu

if runtime.triton_interpret():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

pytestmark = pytest.mark.virtual


def predicted(lines: str, arch: str = "gfx942", waves: int = 4, **code: Any) -> model.Prediction:
    """Of one workgroup that runs ``lines`` and has 1000 bytes of memory."""
    gpu = VirtualGpu(arch)
    address = gpu.memory.add("data", np.zeros(1000, np.uint8))
    wave_size = 64 if arch.startswith("gfx9") else 32
    kernel = hand_written(lines, arch, wave_size=wave_size, **code)
    launch = Launch(gpu, kernel, (1, 1, 1), wave_size * waves, [address, *[0] * 7], "lockstep", None)
    return model.predict(launch, launch.run(measure=True, checks=Checks.none()), 1e6, 2)


def test_cycles_of_hand_written_code() -> None:
    lines = """
    v_mov_b32_e32 v1, 0
    v_mov_b32_e32 v2, 0
    v_exp_f32_e32 v1, v1
    s_mov_b32 s8, 0
    v_mfma_f32_32x32x8_bf16 v[16:31], v[0:1], v[0:1], 0
    """
    found = predicted(lines)
    # 4 waves on 4 SIMDs: what one wave takes.  64 VGPRs and 64 AGPRs let 4 waves into a SIMD.
    assert found.waves_per_simd == 4
    assert found.cycles["matrix"] == 32 and found.cycles["vector"] == 2 * 4 + 16 + 4
    assert found.cycles["scalar"] == 4 and found.cycles["lds"] == found.cycles["vmem"] == 0
    assert found.cycles["occupancy"] == (32 + 2 * 4 + 16 + 4) / 4
    assert found.cycles["memory"] == pytest.approx(1000 / (5300 / 2.1 / 304))
    assert found.binding == "memory"
    assert found.tflops == pytest.approx(1e6 * 304 * 2.1e9 / found.cycles["memory"] / 1e12)
    assert found.peak_tflops == pytest.approx(1307, abs=1)


@pytest.mark.parametrize(("stride", "cycles"), [(4, 2), (8, 4), (128, 64)])
def test_bank_conflicts(stride: int, cycles: int) -> None:
    lines = f"v_mul_u32_u24_e32 v1, {stride}, v0\n v_and_b32_e32 v1, 0xfff, v1\n ds_write_b32 v1, v0"
    found = predicted(f"s_mov_b32 m0, -1\n {lines}\n s_waitcnt lgkmcnt(0)", waves=1, lds_bytes=16384)
    # Two halves of a wave; of a stride of 128 bytes all lanes of a half meet in one bank.
    assert found.cycles["lds"] == cycles


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_shipped_kernels(arch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(model, "SEQLEN", 256)
    cases = [Case(arch, kernel, "fp16", 64, "full") for kernel in ("forward", "backward_dq", "backward_dkdv")]
    found = model.predict_cases(cases)
    assert list(found) == cases
    for prediction in found.values():
        assert prediction.peak_tflops is not None and 0 < prediction.tflops < prediction.peak_tflops
        assert prediction.cycles[prediction.binding] == max(prediction.cycles.values())
    (both,) = model.backward_tflops(found).values()
    assert both < max(found[case].tflops for case in cases[1:])
    text = model.as_table(found)
    assert "uncalibrated" in text and f"{both:.0f} TFLOP/s, both kernels together" in text


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_decode_is_as_fast_as_memory(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and in pages; with two stages bank conflicts of LDS, which the model counts, take longer than memory."""
    monkeypatch.setitem(model.CACHED, "decode", model.CachedCall(512, 1, 32, 8))
    case = Case("gfx942", "decode", "bf16", 128, mask)
    found = model.predict_cases([case])[case]
    assert found.binding == "memory" and found.bandwidth_share == 1.0
    cache_bytes = 2 * 512 * 8 * 128 * 2
    per_cycle = 5300 / 2.1 / 304
    assert cache_bytes / per_cycle < found.cycles["memory"] < 2 * cache_bytes / per_cycle
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"decode": {"num_stages": 2}}')
    slower = model.predict_cases([case])[case]
    assert slower.binding == "lds" and slower.bandwidth_share < 0.95
    assert f"{slower.bandwidth_share:.0%}" in model.as_table({case: slower})


@pytest.mark.parametrize(
    ("kernel", "headdim", "call", "flop"),
    [
        ("prefill", 64, model.CachedCall(128, 32, 2, 1), 4 * 64 * 2 * (32 * 128 - 32 * 31 // 2)),
        ("mla", 576, model.CachedCall(64, 1, 32, 1), 2 * (576 + 512) * 32 * 64),
    ],
)
def test_other_kernels_over_a_cache(
    kernel: str, headdim: int, call: model.CachedCall, flop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model.CACHED, kernel, call)
    case = Case("gfx942", kernel, "bf16", headdim, "causal")
    found = model.predict_cases([case])[case]
    assert found.flop == flop and found.peak_tflops is not None and 0 < found.tflops < found.peak_tflops
    cache_bytes = call.keys * call.nheads_k * headdim * 2 * (1 if kernel == "mla" else 2)
    assert found.cycles["memory"] > cache_bytes / (5300 / 2.1 / 304)


def test_command_prints_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the reports; bench --report reads it (tests/test_report.py)."""
    made = model.Prediction({"matrix": 9.0, "memory": 3.0}, 2, 1e9, 100.0, 200.0)
    monkeypatch.setattr(model, "predict_cases", lambda cases: dict.fromkeys(cases, made))
    base = ["inspect", "--arch", "gfx942", "--dtype", "bf16", "--headdim", "64", "--mask", "full"]
    assert cli.main([*base, "--kernel", "forward", "--model", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["environment"]) == {"flash_rocm", "triton"}
    (item,) = found["modelled"]
    assert (item["kernel"], item["tflops"], item["binding"]) == ("forward", 100.0, "matrix")


def test_command_refuses_what_it_cannot_model(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["inspect", "--arch", "gfx942", "--dtype", "bf16", "--headdim", "64", "--mask", "full", "--model"]
    assert cli.main([*base, "--kernel", "probs"]) == 2
    assert "kernel: the speed model expects one of forward" in capsys.readouterr().err
    with pytest.raises(ValueError, match="arch: expected one of gfx90a"):
        model.predict_cases([Case("gfx1151", "forward", "bf16", 64, "full")])


@pytest.mark.skipif(aiter_root() is None, reason=NO_AITER)
@pytest.mark.skipif(shutil.which("llvm-objdump-22") is None, reason="needs llvm-objdump-22")
def test_assembled_kernels_rank_as_published() -> None:
    """Rounding towards zero is fastest, to nearest even slowest, and all are beyond what is published for MI300X."""
    root = aiter_root()
    assert root is not None
    q, k, v = (to_bf16(np.random.default_rng(0).standard_normal((1, 1024, 1, 128))) for _ in range(3))
    rates = []
    for rounding in ("rtz", "rtna", "rtne"):
        path = root / f"gfx942/fmha_v3_fwd/MI300/fwd_hd128_bf16_{rounding}.co"
        launch, _, _ = forward_launch(path, "gfx942", q, k, v, causal=False)
        stats = launch.run(measure=True, checks=Checks.none())
        rates.append(model.predict(launch, stats, 4.0 * 128 * 1024**2, 2).tflops)
    assert 577 < rates[2] < rates[1] <= rates[0] < 1307
