"""``flash-rocm tune``: shapes, what is printed, config files; with a made-up tuner, and on a GPU really."""

from __future__ import annotations

import builtins
import dataclasses
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flash_rocm import backends, cli, config, runtime, tuned, virtual_device
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import Facts, Provenance
from flash_rocm.tune import cli as tune_cli
from flash_rocm.tune import shapes, write
from flash_rocm.tuned import Outcome, TuneKey, TuningError

KEY = TuneKey("gfx942", "forward", "bfloat16", 128, "causal", 4096, 1, False)
OPTIONS = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2, "num_stages": 1, "waves_per_eu": 0}
MEASURED = Provenance("measured", "2026-11-25", "Triton 3.9", "a made-up GPU")
FACTS = Facts("bfloat16", 128, 4096, causal=True, masked=True, varlen=False)


@pytest.fixture
def gfx942(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> list[TuneKey]:
    """A GPU that is not there, and the keys that were tuned on it; forward gets faster, the others do not."""
    tuned.find.cache_clear()
    keys: list[TuneKey] = []

    def tune(key: TuneKey, *args: Any) -> Outcome:
        keys.append(key)
        if key.kernel == "backward_dq" and key.mask == "full":
            raise TuningError("no time")
        return Outcome(OPTIONS, MEASURED, 2e-3, 1e-3 if key.kernel == "forward" else 2e-3)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(virtual_device, "arch_of", lambda device: arch_named("gfx942"))
    monkeypatch.setattr(backends, "_installation_reasons", lambda name: [])
    monkeypatch.setattr(backends, "load_tuner", lambda: SimpleNamespace(tune=tune))
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "cache"))
    return keys


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["tune", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --------------------------------------------------------------------------------------------------
# Shapes


def test_lists_stand_for_each_of_their_values(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "shapes.yaml"
    path.write_text(
        "- {dtype: [bf16, fp16], headdim: 96, seqlen: [1000, 1024], mask: [causal, window], group: 5}\n"
        "- {headdim: 64, seqlen: 100, varlen: true, backward: false}\n"
    )
    found = shapes.read(str(path))
    assert len(found) == 9
    assert found[-1] == {
        "dtype": "bf16",
        "headdim": 64,
        "seqlen": 100,
        "mask": "full",
        "group": 1,
        "varlen": True,
        "backward": False,
    }
    keys = shapes.keys_of(found, ("forward", "backward_dq"), arch_named("gfx942"))
    assert len(keys) == 9, "two lengths of one bucket are one key; the last shape has no backward"
    assert TuneKey("gfx942", "backward_dq", "float16", 128, "window", 1024, 8, False) in keys
    assert TuneKey("gfx942", "forward", "bfloat16", 64, "full", 128, 1, True) in keys


@pytest.mark.parametrize("name", shapes.PRESETS)
def test_presets(name: str) -> None:
    assert shapes.keys_of(shapes.read(name), ("forward", "decode"), arch_named("gfx1100"))


def test_shapes_of_calls_over_a_cache(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "shapes.yaml"
    path.write_text(
        "- {headdim: 128, cache: [1000, 1024, 9000], batch: [1, 100], page_size: [0, 32], mask: causal, group: 5}\n"
        "- {headdim: 128, cache: 4096, queries: 300, group: 8, varlen: true, page_size: 1}\n"
        "- {headdim: 576, cache: 4096, batch: 8, page_size: 64, group: 128}\n"
        "- {headdim: 64, seqlen: 128}\n"
    )
    keys = [str(key) for key in shapes.keys_of(shapes.read(str(path)), tune_cli.KERNELS, arch_named("gfx942"))]
    decoding = [
        f"decode-bfloat16-d128-causal-s{seqlen}-gqa8-dense-q1-b{batch}-page{page}"
        for seqlen in (1024, 16384)
        for batch in (1, 64)
        for page in (0, 16)
    ]
    assert keys[:8] == decoding
    assert keys[8:10] == [
        "prefill-bfloat16-d128-full-s4096-gqa8-varlen-q1024-b1-page1",
        "mla-bfloat16-d576-full-s4096-gqa128-dense-q1-b8-page64",
    ]
    assert [key.split("-")[0] for key in keys[10:]] == ["forward", "backward_dq", "backward_dkdv"]


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        ("a: [", "expected a readable YAML file"),
        ("", "expected a list of shapes, got None"),
        ("- 3", "[0]: expected keys and values, got 3"),
        ("- {headdim: 64, seqlen: 1, heads: 3}", "[0].heads: expected one of the keys dtype, headdim, seqlen"),
        ("- {seqlen: 1}", "[0].headdim: expected 1 to 512, got None"),
        ("- {headdim: 64}", "[0].seqlen: expected a whole number >= 1, got None"),
        ("- {headdim: 64, seqlen: [1, 0]}", "[0].seqlen: expected a whole number >= 1, got 0"),
        ("- {headdim: 1024, seqlen: 1}", "[0].headdim: expected 1 to 512, got 1024"),
        ("- {headdim: 577, cache: 1}", "[0].headdim: expected 1 to 576, got 577"),
        ("- {headdim: 64, cache: 0}", "[0].cache: expected a whole number >= 1, got 0"),
        ("- {headdim: 64, cache: 1, page_size: -1}", "[0].page_size: expected a whole number >= 0, 0 for no pages"),
        ("- {headdim: 64, cache: 1, batch: 0}", "[0].batch: expected a whole number >= 1, got 0"),
        ("- {headdim: 64, cache: 1, queries: true}", "[0].queries: expected a whole number >= 1, got True"),
        ("- {headdim: 64, cache: 1, seqlen: 1}", "[0].seqlen: expected one of the keys dtype, headdim, cache, queries"),
        ("- {headdim: 64, seqlen: 1, batch: 2}", "[0].batch: expected one of the keys dtype, headdim, seqlen, mask"),
        ("- {headdim: 64, seqlen: 1, mask: left}", "[0].mask: expected one of full, causal, window, got 'left'"),
        ("- {headdim: 64, seqlen: 1, dtype: fp8}", "[0].dtype: expected one of fp16, bf16, fp32, got 'fp8'"),
        ("- {headdim: 64, seqlen: 1, varlen: 1}", "[0].varlen: expected true or false, got 1"),
        ("- {headdim: 64, seqlen: 1, group: true}", "[0].group: expected query heads per key head"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(
    contents: str, text: str, tmp_path: pathlib.Path, gfx942: list[TuneKey], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shapes.yaml"
    path.write_text(contents)
    status, _, err = run(capsys, "--shapes", str(path))
    assert status == 2 and not gfx942
    assert err.startswith(f"flash-rocm tune: {path}") and text in err


def test_yaml_is_optional(
    tmp_path: pathlib.Path,
    gfx942: list[TuneKey],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "yaml":
            raise ImportError("No module named 'yaml'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "shapes.yaml").write_text("- {headdim: 64, seqlen: 1}")
    status, _, err = run(capsys, "--shapes", str(tmp_path / "shapes.yaml"))
    assert status == 2 and "takes pyyaml" in err and "Hint: pip install pyyaml" in err


# --------------------------------------------------------------------------------------------------
# The command


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capsys, "--shapes", "quick")
    assert (status, out) == (2, "")
    assert err.startswith("flash-rocm tune: expected a GPU to measure on, found none.")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shapes", "slow"], "--shapes: expected a file or one of quick, training, serving, decoding, got 'slow'"),
        (["--shapes", "quick", "--arch", "gfx90a"], "--arch: expected gfx942, the GPU that is here, got 'gfx90a'"),
        (["--shapes", "quick", "--kernel", "probs"], "--kernel: expected some of forward, backward_dq"),
        (["--shapes", "quick", "--budget", "0"], "--budget: expected seconds >= 1, got '0'"),
        ([], "the following arguments are required: --shapes"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], text: str, gfx942: list[TuneKey], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2 and text in err and not gfx942


def test_old_and_new_are_printed_and_a_second_run_tunes_nothing(
    gfx942: list[TuneKey], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "--shapes", "quick")
    assert status == 1, "one key fails"
    assert len(gfx942) == 6
    name = "forward-bfloat16-d128-causal-s4096-gqa1-dense"
    assert f"[1/6] {name}: 2.0000 ms -> 1.0000 ms, 2.00x: BLOCK_M=32 BLOCK_N=32 num_warps=2 num_stages=1\n" in out
    assert "backward_dkdv-bfloat16-d128-full-s4096-gqa1-dense: 2.0000 ms -> 2.0000 ms, 1.00x, the default wins" in out
    assert "backward_dq-bfloat16-d128-full-s4096-gqa1-dense: not tuned" in out and "no time" in err
    assert "5 keys in" in out and "1 could not be tuned" in out
    gfx942.clear()
    _, out, _ = run(capsys, "--shapes", "quick")
    assert gfx942 == [TuneKey("gfx942", "backward_dq", "bfloat16", 128, "full", 4096, 1, False)]
    assert "2.00x, from the cache:" in out


def test_winners_become_a_config_file(
    gfx942: list[TuneKey], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "configs"
    for _ in range(2):
        status, out, _ = run(capsys, "--shapes", "training", "--kernel", "forward", "--write", str(folder))
        assert status == 0
    assert f"20 entries written to {folder}/gfx942.json" in out
    assert "forward-bfloat16-d128-causal-s4096-gqa8-dense: not written, config files have no rule" in out
    contents = json.loads((folder / "gfx942.json").read_text())
    shipped = config.file_contents("gfx942")
    assert contents["triton"][20:] == shipped["triton"], "a second run replaces the entries of the first"
    assert contents["ck"] == shipped["ck"]
    source = runtime.ConfigSource(folder=str(folder))
    found = config.lookup("gfx942", "forward", FACTS, source)
    assert {name: getattr(found, name) for name in OPTIONS} == OPTIONS
    assert str(found.provenance) == (
        "measured, 2026-11-25, Triton 3.9, a made-up GPU, gqa1, 1.0000 ms, before 2.0000 ms"
    )
    assert config.lookup("gfx942", "probs", FACTS, source) == config.lookup("gfx942", "probs", FACTS)


def test_a_default_that_wins_writes_nothing(
    gfx942: list[TuneKey], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--shapes", "quick", "--kernel", "backward_dkdv", "--write", str(tmp_path / "configs"))
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "nothing written: the defaults win everywhere" in out
    assert not (tmp_path / "configs").exists()


def test_a_folder_that_cannot_be_written(
    gfx942: list[TuneKey], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("--shapes", "quick", "--kernel", "forward", "--write", str(tmp_path / "file" / "configs"))
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "--write: expected a folder to write to" in err


@pytest.mark.parametrize("arch", ["gfx942", "gfx1151", "gfx1250"])
def test_rules_take_the_calls_of_their_key_and_no_others(arch: str, tmp_path: pathlib.Path) -> None:
    """Also for an arch that has no file of its own."""
    outcome = Outcome(OPTIONS, MEASURED, 2e-3, 1e-3)
    keys = [TuneKey(arch, "forward", "bfloat16", 128, "causal", seqlen, 1, False) for seqlen in (128, 4096, 32768)]
    write.write(tmp_path, arch, [(key, outcome) for key in keys])
    source = runtime.ConfigSource(folder=str(tmp_path))

    def is_tuned(**changes: Any) -> bool:
        entry = config.lookup(arch, "forward", Facts(**{**FACTS.__dict__, **changes}), source)
        return entry.BLOCK_M == 32 and entry.num_warps == 2

    for seqlen in (1, 128, 4096, 32768, 1 << 20):
        assert is_tuned(seqlen=seqlen)
    assert not is_tuned(seqlen=2048) and not is_tuned(varlen=True) and not is_tuned(headdim=64)
    assert not is_tuned(causal=False) and not is_tuned(causal=False, masked=False) and not is_tuned(dtype="float16")


@pytest.mark.parametrize(("headdim", "plain_takes"), [(128, "gluon"), (32, "triton")])
def test_rules_leave_plain_calls_to_a_gluon_kernel(headdim: int, plain_takes: str, tmp_path: pathlib.Path) -> None:
    """What was tuned is Triton's, of calls that no Gluon kernel takes."""
    key = TuneKey("sm90", "forward", "bfloat16", headdim, "full", 4096, 1, False)
    write.write(tmp_path, "sm90", [(key, Outcome(OPTIONS, MEASURED, 2e-3, 1e-3))])
    source = runtime.ConfigSource(folder=str(tmp_path))
    facts = Facts("bfloat16", headdim, 4096, causal=False, masked=False, varlen=False)
    plain, other = (
        config.lookup("sm90", "forward", dataclasses.replace(facts, plain=x), source) for x in (True, False)
    )
    assert plain.implementation == plain_takes
    assert (other.implementation, other.BLOCK_M) == ("triton", 32)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_on_a_gpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._triton import candidates

    monkeypatch.setattr(candidates, "MAX_CANDIDATES", 6)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "cache"))
    tuned.find.cache_clear()
    path = tmp_path / "shapes.yaml"
    path.write_text("- {dtype: fp16, headdim: 64, seqlen: 1024, mask: causal, varlen: [true, false]}")
    arguments = ("--shapes", str(path), "--budget", "40", "--write", str(tmp_path / "configs"))
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    assert out.count(" ms -> ") == 6 and "6 keys in" in out
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and out.count("from the cache") == 6
