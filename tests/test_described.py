"""Calls described in words: ``flash-rocm explain``, and ``flash-rocm build --ck --problem``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_rocm import cli, described
from flash_rocm.testing import make_problem

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 7, "window_right": 0},
    "right": {"window_right": 3},
    "gqa, of v": {"nheads": 8, "nheads_k": 2, "headdim": 192, "headdim_v": 128},
    "varlen": {"varlen": True, "alibi": True},
    "backward": {"needs_grad": True, "deterministic": True, "window_right": 0},
    "softcap": {"softcap": 20.5},
    "dropout, sinks": {"dropout_p": 0.25, "sinks": True},
    "decode": {"cached": True, "seqlen_q": 1},
    "pages": {"cached": True, "page_size": 64, "varlen": True, "window_right": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_the_words_of_a_problem_describe_it(name: str) -> None:
    problem = make_problem(**{"dtype": torch.bfloat16, "headdim": 128, "device_type": "meta"} | CASES[name])
    assert described.problem_of(problem.options()) == problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shape=1,2,3", "shape: expected B,Sq,Sk,H,Hk,D[,Dv], got '1,2,3'"),
        ("colour=red", "unrecognized arguments: colour=red"),
        ("dtype=int8", "dtype: invalid choice: 'int8'"),
        ("kvcache backward", "backward: expected without --kvcache"),
        ("kvcache deterministic", "deterministic: expected without --kvcache"),
        ("page-size=-1", "--page-size: expected a number >= 0, got -1"),
        ("shape=1,2,3,5,2,64", "nheads"),
    ],
)
def test_words_that_describe_nothing(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--ck", "--arch", "gfx942", "--problem", text]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flash-rocm build: --problem: expected a text such as") and words in said


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--triton", "--arch", "gfx942", "--problem", "causal"], 2, "--problem: expected no value without --ck"),
        (["--ck", "--arch", "gfx942", "--problem", "causal", "--instances", "f*"], 2, "--instances: expected no value"),
        (["--ck", "--arch", "gfx942", "--problem", "causal", "--output", "x"], 2, "--output: expected no value with"),
        (["--ck", "--arch", "gfx942", "--problem", "dropout=0.5"], 1, "dropout in Composable Kernel compares 8 bits"),
        (["--ck", "--arch", "gfx1100", "--problem", "causal"], 1, "device gfx1100 is not one of"),
        (["--ck", "--arch", "nothing", "--problem", "causal"], 2, "arch: expected cpu, gfx"),
    ],
)
def test_build_for_problems_says_what_is_wrong(
    options: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["build", *options]) == status
    assert words in capsys.readouterr().err


def test_explain_of_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["explain", "--arch", "gfx942", "--shape", "3,1,500,8,2,128", "--page-size", "64", "--alibi"]
    assert cli.main(call) == 0
    assert "features: alibi, gqa, kvcache, paged" in capsys.readouterr().out
    assert cli.main([*call, "--dropout", "0.5"]) == 2
    assert "--dropout: expected without --kvcache" in capsys.readouterr().err
