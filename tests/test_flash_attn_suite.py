"""flash-attn's own tests find all that they import under the drop-in, and the smallest of them pass on the CPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

SUITE = pathlib.Path(__file__).with_name("flash_attn_suite.py")
FOLDER = pathlib.Path(os.environ.get("FLASH_ROCM_TEST_FLASH_ATTN", "nowhere"))
pytestmark = pytest.mark.skipif(
    not (FOLDER / "test_flash_attn.py").is_file(), reason="flash-attn's tests are not here: make flash-attn-tests"
)


def run(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUITE), "run", str(FOLDER), "--on-cpu", "--sample", "1", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_test_function_is_collected() -> None:
    names = {line.partition("::")[2].partition("[")[0] for line in run("--collect-only").splitlines() if "::" in line}
    assert {"test_flash_attn_output", "test_flash_attn_kvcache", "test_rotary_emb_qkv"} <= names and len(names) == 19


@pytest.mark.xdist_group("flash-attn's tests")
def test_some_run_on_the_cpu() -> None:
    """With dropout, so that S_dmask counts, and without padding."""
    words = "rotary_emb_func or rotary_emb_varlen or (varlen_qkvpacked and not deterministic)"
    assert "3 passed" in run("--max-seqlen", "100", "-k", words)
