"""The store of tuned configs: what is kept, who makes it, and every way a cache folder can be wrong."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pathlib
import time
from typing import Any

import pytest

from flash_rocm import config, files, runtime, tuned
from flash_rocm.config_schema import ConfigError, Facts, Provenance
from flash_rocm.runtime import ConfigSource
from flash_rocm.tuned import Outcome, TuneKey

KEY = TuneKey("gfx942", "forward", "bfloat16", 128, "causal", 4096, 1, False)
OTHER = TuneKey("gfx942", "forward", "bfloat16", 128, "full", 4096, 1, False)
OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
OUTCOME = Outcome(OPTIONS, Provenance("measured", "2026-11-25", "Triton 3.9", "a GPU"), 2e-3, 1e-3)
FACTS = Facts("bfloat16", 128, 4096, causal=True, masked=True, varlen=False)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Nothing known from other tests, and lines that were logged are logged again."""
    tuned.find.cache_clear()
    runtime.log_once.cache_clear()


def stored(folder: pathlib.Path, key: TuneKey = KEY) -> pathlib.Path:
    path = tuned.path_of(str(folder), key)
    tuned.write(path, key, OUTCOME)
    return path


def never() -> Outcome:
    raise AssertionError("expected the stored outcome to be taken")


def test_what_is_stored_is_found(tmp_path: pathlib.Path) -> None:
    assert tuned.find(str(tmp_path), KEY) is None
    assert tuned.obtain(str(tmp_path), KEY, lambda: OUTCOME, 0.0) == OUTCOME
    found = tuned.find(str(tmp_path), KEY)
    assert found is not None and {name: getattr(found, name) for name in OPTIONS} == OPTIONS
    path = tuned.path_of(str(tmp_path), KEY)
    assert found.source == f"tuned, {path}" and found.provenance == OUTCOME.provenance
    assert tuned.obtain(str(tmp_path), KEY, never, 0.0) == OUTCOME
    assert sorted(x.name for x in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]
    assert tuned.find(str(tmp_path), OTHER) is None


def test_a_key_has_its_triton_and_schema(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path)
    monkeypatch.setattr(runtime, "triton_version", lambda: "99.0")
    assert tuned.find(str(tmp_path), KEY) is None
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "VERSION", 99)
    assert tuned.find(str(tmp_path), KEY) is None


@pytest.mark.parametrize(
    ("facts", "group", "expected"),
    [
        ({}, 1, "forward-bfloat16-d128-causal-s4096-gqa1-dense"),
        ({"seqlen": 1}, 3, "forward-bfloat16-d128-causal-s128-gqa4-dense"),
        ({"seqlen": 1 << 20, "causal": False}, 8, "forward-bfloat16-d128-window-s32768-gqa8-dense"),
        ({"causal": False, "masked": False, "varlen": True}, 9, "forward-bfloat16-d128-full-s4096-gqa16-varlen"),
    ],
)
def test_keys_are_buckets(facts: dict[str, Any], group: int, expected: str) -> None:
    values = {**FACTS.__dict__, **facts}
    assert str(tuned.key_of("gfx942", "forward", Facts(**values), group)) == expected


def test_order_of_configs(tmp_path: pathlib.Path) -> None:
    """Variable over tuned over file."""
    stored(tmp_path)
    found = tuned.find(str(tmp_path), KEY)
    shipped = config.lookup("gfx942", "forward", FACTS)
    assert found != shipped
    assert config.lookup("gfx942", "forward", FACTS, ConfigSource(), found) == found
    above = config.lookup("gfx942", "forward", FACTS, ConfigSource(kernels='{"forward": {"BLOCK_M": 256}}'), found)
    assert (256, OPTIONS["BLOCK_N"]) == (above.BLOCK_M, above.BLOCK_N)
    assert above.source.startswith("FLASH_ROCM_KERNEL_CONFIG over tuned, ")


# --------------------------------------------------------------------------------------------------
# Wrong files


def changed(**values: Any) -> str:
    contents = {
        "key": KEY.__dict__,
        "options": OPTIONS,
        "provenance": {"how": "measured", "date": "2026-11-25", "compiler": "Triton 3.9"},
        "milliseconds": {"before": 2.0, "after": 1.0},
    }
    return json.dumps(contents | values)


WRONG = {
    "cut": changed()[:-20].encode(),
    "empty": b"",
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "key missing": b'{"options": {}}',
    "other key": changed(key=OTHER.__dict__).encode(),
    "unknown key": changed(speed=1).encode(),
    "option": changed(options=OPTIONS | {"BLOCK_M": 48}).encode(),
    "no option": changed(options={"BLOCK_M": 64}).encode(),
    "provenance": changed(provenance={"how": "measured"}).encode(),
    "time": changed(milliseconds={"before": "1", "after": 1.0}).encode(),
    "NaN": changed(milliseconds={"before": float("nan"), "after": 1.0}).encode(),
}


@pytest.mark.parametrize("use", ["find", "obtain"])
@pytest.mark.parametrize("contents", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_set_aside(
    contents: bytes, use: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, path = stored(tmp_path, OTHER), tuned.path_of(str(tmp_path), KEY)
    path.write_bytes(contents)
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        if use == "find":
            assert tuned.find(str(tmp_path), KEY) is None
        else:
            assert tuned.obtain(str(tmp_path), KEY, lambda: OUTCOME, 0.0) == OUTCOME
    (line,) = caplog.messages
    assert str(path) in line and "set aside" in line
    assert pathlib.Path(f"{path}.corrupt").read_bytes() == contents
    assert path.exists() == (use == "obtain")
    assert tuned.read(other, OTHER) == OUTCOME


def test_a_wrong_file_that_is_being_replaced_is_left_alone(tmp_path: pathlib.Path) -> None:
    path = tuned.path_of(str(tmp_path), KEY)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with files.locked(path, 0.0) as mine:
        assert mine and tuned.find(str(tmp_path), KEY) is None
    assert path.read_text() == "{"


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "tuning")
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        for _ in range(2):
            assert tuned.find(folder, KEY) is None
            assert tuned.obtain(folder, KEY, never, 0.0) is None
    assert sum("expected a folder to write to, using the default config" in x for x in caplog.messages) == 1


def test_a_file_that_cannot_be_read(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(pathlib.Path, "read_text", refuse)  # root may read everything
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        assert tuned.find(str(tmp_path), KEY) is None
    (line,) = caplog.messages
    assert f"{path}: expected a readable file" in line


@pytest.mark.parametrize("call", ["write", "replace"])
def test_disk_full_leaves_nothing_half_written(
    call: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = stored(tmp_path, OTHER)
    before = {x.name for x in other.parent.iterdir()}

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        opened = os.fdopen

        def fdopen(*args: Any, **kwargs: Any) -> Any:
            file = opened(*args, **kwargs)
            file.write = full
            return file

        monkeypatch.setattr(os, "fdopen", fdopen)
    with caplog.at_level(logging.WARNING, "flash_rocm"):
        assert tuned.obtain(str(tmp_path), KEY, lambda: OUTCOME, 0.0) is None
    monkeypatch.undo()
    assert len(caplog.messages) == 1 and "No space left" in caplog.messages[0]
    assert tuned.find(str(tmp_path), KEY) is None
    path = tuned.path_of(str(tmp_path), KEY)
    assert {x.name for x in path.parent.iterdir()} - before == {f"{path.name}.lock"}
    assert tuned.read(other, OTHER) == OUTCOME


def test_nothing_made_stores_nothing(tmp_path: pathlib.Path) -> None:
    assert tuned.obtain(str(tmp_path), KEY, lambda: None, 0.0) is None
    assert not tuned.path_of(str(tmp_path), KEY).exists()


def test_patience_with_another_process_ends(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tuned.path_of(str(tmp_path), KEY)
    with files.locked(path, 0.0) as mine, caplog.at_level(logging.WARNING, "flash_rocm"):
        assert mine and tuned.obtain(str(tmp_path), KEY, never, 0.0) is None
    assert "another process tunes this for too long" in caplog.messages[0]


def _rank(folder: str, rank: int) -> tuple[int, dict[str, int]]:
    """What one of several processes that start at once gets."""

    def make() -> Outcome:
        with open(pathlib.Path(folder) / "made", "a") as file:
            file.write(f"{rank}\n")
        time.sleep(0.3)
        return Outcome(OPTIONS | {"num_warps": (1, 2, 4, 8)[rank % 4]}, OUTCOME.provenance, 2e-3, 1e-3)

    outcome = tuned.obtain(folder, KEY, make, 60.0)
    if outcome is None:
        raise AssertionError("expected an outcome")
    return rank, outcome.options


def test_eight_processes_at_once_make_it_once(tmp_path: pathlib.Path) -> None:
    with multiprocessing.get_context("fork").Pool(8) as pool:
        results = dict(pool.starmap(_rank, [(str(tmp_path), rank) for rank in range(8)], chunksize=1))
    made = (tmp_path / "made").read_text().split()
    assert len(made) == 1 and len(results) == 8
    assert all(options == results[int(made[0])] for options in results.values())
    read = tuned.read(tuned.path_of(str(tmp_path), KEY), KEY)
    assert read is not None and read.options == results[int(made[0])]


def test_a_process_that_dies_frees_the_lock(tmp_path: pathlib.Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_die_with_the_lock, args=(str(tmp_path),))
    child.start()
    child.join()
    assert tuned.obtain(str(tmp_path), KEY, lambda: OUTCOME, 0.0) == OUTCOME


def _die_with_the_lock(folder: str) -> None:
    tuned.obtain(folder, KEY, lambda: os._exit(1), 0.0)


# --------------------------------------------------------------------------------------------------
# Variables


def test_stored_entries_are_used_where_asked_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime.config_source() is None
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "0")
    assert runtime.config_source() == ConfigSource()
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "1")
    assert runtime.config_source() == ConfigSource(tuned=str(tmp_path / "flash_rocm/tuning"), tune=True)
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path / "own"))
    assert runtime.config_source() == ConfigSource(tuned=str(tmp_path / "own/tuning"), tune=True)
    monkeypatch.delenv("FLASH_ROCM_AUTOTUNE")
    assert runtime.config_source() == ConfigSource(tuned=str(tmp_path / "own/tuning"))


def test_the_variable_of_rocm_users(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime._config_source.cache_clear()
    for value, tune in (("TRUE", True), ("1", False), ("true", False)):
        monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_AUTOTUNE", value)
        source = runtime.config_source()
        assert source is not None and source.tune == tune
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_AUTOTUNE", "TRUE")
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "0")
    runtime.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="FLASH_ROCM_AUTOTUNE=0 overrides FLASH_ATTENTION_TRITON_AMD_AUTOTUNE"):
        source = runtime.config_source()
    assert source is not None and not source.tune


def test_a_wrong_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FLASH_ROCM_AUTOTUNE: expected 0 or 1, got 'yes'"):
        runtime.config_source()


def test_wrong_contents_raise_where_they_are_read(tmp_path: pathlib.Path) -> None:
    path = stored(tmp_path)
    path.write_text(changed(options=OPTIONS | {"BLOCK_M": 48}))
    with pytest.raises(ConfigError, match="options.BLOCK_M: expected one of 16, 32, "):
        tuned.read(path, KEY)
