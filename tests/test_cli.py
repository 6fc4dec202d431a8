"""The flash-rocm command."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import flash_rocm
from flash_rocm import backends, cli, support
from flash_rocm.arch import CPU


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "reference")
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert flash_rocm.__version__ in out
    assert "FLASH_ROCM_BACKEND=reference\n" in out
    assert "FLASH_ROCM_DEBUG=1\n" in out
    assert "device cpu" in out
    assert "requested  reference: used" in out
    assert "gfx942.json" in out
    device_lines = out[out.index("device cpu") : out.index("kernel configs")].splitlines()
    for name in backends.CAPABILITIES:
        reasons = backends.availability_reasons(name, CPU)
        (line,) = (line for line in device_lines if line.split()[:1] == [name])
        assert all(reason in line for reason in reasons)
        assert ("available" in line) == (not reasons)


def test_info_shows_what_back_ends_support(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = run(capsys, "info")
    status, out, _ = run(capsys, "info", "--format", "json")
    assert status == 0
    found = json.loads(out)
    (_, *names), *rows = support.table()
    assert found["support"] == {label: dict(zip(names, cells, strict=True)) for label, *cells in rows}
    assert {"versions", "environment", "errors", "devices", "configs"} <= set(found)
    assert found["devices"][0]["backends"]["reference"] == [] and found["devices"][0]["auto"] == "reference"
    lines = text[text.index("\nsupport") :].splitlines()
    for label, *cells in rows[3:]:
        assert any(line.split() == " ".join((label, *cells)).split() for line in lines), label
    for name, cells in zip(names, zip(*(cells for _, *cells in rows[:3]), strict=True), strict=True):
        assert f"  {name:<10} {cells[0]}; {cells[1]}; head dims {cells[2]}" in lines


def test_info_survives_a_wrong_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "fastest")
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "yes")
    status, out, _ = run(capsys, "info")
    assert status == 0
    assert "error: FLASH_ROCM_BACKEND: expected one of" in out
    assert "error, FLASH_ROCM_AUTOTUNE: expected 0 or 1, got 'yes'" in out


def test_explain_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        capsys, "explain", "--arch", "cpu", "--shape", "2,5,7,4,2,32,16", "--dtype", "fp64", "--causal"
    )
    assert status == 0
    assert "batch=2, seqlen_q=5, seqlen_k=7, nheads=4, nheads_k=2, headdim=32/16" in out
    assert "features: causal, gqa, headdim_v" in out
    assert "back end: reference" in out
    assert "ck: no, dtype float64" in out


def test_explain_takes_every_feature(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--window 3,4 --dropout 0.1 --softcap 20 --alibi --sink --varlen --deterministic --backward"
    status, out, _ = run(capsys, "explain", *options.split(), "--backend", "reference")
    assert status == 0
    assert "features: alibi, backward, deterministic, dropout, sinks, softcap, varlen, window" in out
    assert "requested: reference" in out


@pytest.mark.parametrize("arch", ["gfx906", "sm75"])
def test_explain_says_why_nobody_can(capsys: pytest.CaptureFixture[str], arch: str) -> None:
    status, out, _ = run(capsys, "explain", "--arch", arch, "--backward")
    assert status == 1
    assert "none can run it" in out
    for name in ("ck", "triton"):
        assert f"  {name}: no, " in out
    assert arch in out


def test_explain_on_a_chip_that_is_not_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_installation_reasons", lambda name: [] if name == "triton" else ["not built"])
    backends._decide.cache_clear()
    status, out, _ = run(capsys, "explain", "--arch", "gfx942", "--backward", "--causal")
    backends._decide.cache_clear()
    assert status == 0
    assert "back end: triton" in out
    assert "config forward: " in out and "gfx942.json" in out


def test_explain_shows_where_a_config_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_installation_reasons", lambda name: [] if name == "triton" else ["not built"])
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"backward_dq": {"BLOCK_M": 16}}')
    backends._decide.cache_clear()
    _, out, _ = run(capsys, "explain", "--arch", "gfx1201", "--backward", "--dtype", "fp16")
    backends._decide.cache_clear()
    lines = {line.split(":")[0].split()[-1]: line for line in out.splitlines() if line.startswith("  config")}
    assert set(lines) == {"forward", "backward_dq", "backward_dkdv"}
    assert "(gfx1201.json triton[" in lines["forward"]
    assert "BLOCK_M=16 " in lines["backward_dq"]
    assert "(FLASH_ROCM_KERNEL_CONFIG over gfx1201.json triton[" in lines["backward_dq"]


def test_explain_with_a_wrong_config_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_installation_reasons", lambda name: [] if name == "triton" else ["not built"])
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 17}}')
    backends._decide.cache_clear()
    status, _, err = run(capsys, "explain", "--arch", "gfx942")
    backends._decide.cache_clear()
    assert status == 2
    assert err.startswith("flash-rocm explain: FLASH_ROCM_KERNEL_CONFIG.forward.BLOCK_M: expected one of 16")


WRONG = {
    "nothing": ([], "COMMAND"),
    "unknown command": (["tell"], "tell"),
    "unknown option": (["info", "--loud"], "--loud"),
    "short shape": (["explain", "--shape", "1,2"], "--shape: expected B,Sq,Sk,H,Hk,D[,Dv], got '1,2'"),
    "shape of words": (["explain", "--shape", "a,b,c,d,e,f"], "--shape"),
    "shape below 0": (["explain", "--shape=-1,2,2,1,1,8"], "--shape: expected sizes >= 0"),
    "dtype": (["explain", "--dtype", "fp8"], "--dtype"),
    "window": (["explain", "--window", "3"], "--window: expected LEFT,RIGHT, got '3'"),
    "window below -1": (["explain", "--window=-2,0"], "window_size: expected entries >= -1"),
    "arch": (["explain", "--arch", "mi300x"], "--arch"),
    "backend": (["explain", "--backend", "cuda"], "--backend"),
    "heads": (["explain", "--shape", "1,2,2,3,2,8"], "k: expected a head count that divides q's 3, got 2"),
    "dropout": (["explain", "--dropout", "1"], "dropout_p: expected"),
}


@pytest.mark.parametrize(("arguments", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert text in err and err.count("\n") == 1


def test_explain_with_a_wrong_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "fastest")
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "yes")
    status, _, err = run(capsys, "explain")
    assert status == 2
    assert err.startswith("flash-rocm explain: FLASH_ROCM_BACKEND: expected one of")


@pytest.mark.parametrize("command", ["demo", "bench", "explain", "info", "inspect"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"flash-rocm {command}" in capsys.readouterr().out


def test_the_installed_command() -> None:
    command = pathlib.Path(sys.executable).parent / "flash-rocm"
    if not command.exists():
        pytest.skip("the flash-rocm command is not installed beside this Python")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"flash-rocm {flash_rocm.__version__}")
