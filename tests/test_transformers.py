"""Transformers models run by flash_rocm: results and gradients against Transformers' own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, LENGTHS, NAME, SIZES, assert_same, logits, make, padded_batch, transformers, version

from flash_rocm.integrations import masks
from flash_rocm.integrations import transformers as integration

both_sides = pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
every_model = pytest.mark.parametrize("name", CONFIGS)


def gradients(model: Any, implementation: str, **batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits(model, implementation, **batch).square().mean().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@every_model
@both_sides
def test_logits_and_gradients(name: str, left: bool) -> None:
    model, batch = make(name), padded_batch(left=left)
    assert_same(logits(model, NAME, **batch), logits(model, "eager", **batch))
    ours, theirs = gradients(model, NAME, **batch), gradients(model, "eager", **batch)
    assert ours.keys() == theirs.keys()
    largest = max(float(x.abs().max()) for x in theirs.values())
    for key in theirs:
        # Relative to all: the gradient of a bias of k is 0 but for rounding.
        assert float((ours[key] - theirs[key]).abs().max()) <= 2e-5 * largest, key
    if name == "gpt-oss":
        assert all(x.abs().max() > 0 for key, x in ours.items() if "sinks" in key)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "deepseek-v3", "bert", "modernbert"])
def test_like_sdpa(name: str) -> None:
    """Softcap and sinks have no SDPA.  No padding, with and without a mask that says so."""
    model, batch = make(name), padded_batch((7, 7))
    expected = logits(model, "sdpa", **batch)
    assert_same(logits(model, NAME, **batch), expected)
    assert_same(logits(model, NAME, input_ids=batch["input_ids"]).flatten(0, 1), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": 100}),
        ("modernbert", {"local_attention": 200}),
        ("gemma2", {"sliding_window": 100}),
        ("gemma2", {"attn_logit_softcapping": 50.0}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_what_a_config_says_counts(name: str, change: dict[str, Any]) -> None:
    if name == "gpt2" and version() < (5, 17):
        pytest.skip("this Transformers passes the scale of GPT-2 to its eager function only, which is refused")
    batch = padded_batch(left=True)
    changed = make(name, **change)
    found = logits(changed, NAME, **batch)
    assert_same(found, logits(changed, "eager", **batch))
    assert not torch.allclose(found, logits(make(name), NAME, **batch), rtol=1e-2)


def test_vision() -> None:
    torch.manual_seed(0)
    sizes = {
        key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    found = []
    for implementation in (NAME, "eager"):
        model.set_attn_implementation(implementation)
        found.append(model(pixel_values=pixels).last_hidden_state)
    assert_same(*found)


def test_encoder_and_decoder() -> None:
    """Cross attention: queries and keys of two lengths, padding on the keys' side only, and where both are as long."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.5, max_position_embeddings=64,
    )  # fmt: skip
    model, batch = transformers.BartModel(config).eval(), padded_batch()
    for length in (5, batch["input_ids"].shape[1]):
        decoder_ids = padded_batch((length,) * len(LENGTHS))["input_ids"]
        found = []
        for implementation in (NAME, "sdpa"):
            model.set_attn_implementation(implementation)
            found.append(model(**batch, decoder_input_ids=decoder_ids).last_hidden_state)
        assert_same(*found)


def test_bert_with_cross_attention() -> None:
    """The mask of the encoder says nothing about the decoder's tokens, also at equal length."""
    model, batch = make("bert", is_decoder=True, add_cross_attention=True, use_cache=False).bert, padded_batch()
    memory = torch.randn(*batch["input_ids"].shape, 32)
    found = []
    for implementation in (NAME, "sdpa"):
        model.set_attn_implementation(implementation)
        output = model(
            input_ids=batch["input_ids"], encoder_hidden_states=memory, encoder_attention_mask=batch["attention_mask"]
        )
        found.append(output.last_hidden_state)
    assert_same(*found)


def test_a_decoder_that_sees_both_sides() -> None:
    """config.is_causal=False, where the mask decides and not the layer."""
    model = make("llama")
    model.config.is_causal = False
    for lengths in ((7, 7), LENGTHS):
        batch = padded_batch(lengths)
        found = logits(model, NAME, **batch)
        assert_same(found, logits(model, "eager", **batch))
        assert not torch.allclose(found, logits(make("llama"), NAME, **batch), rtol=1e-2)


def test_padding_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer gets packed sequences of the real tokens, with the lengths worked out once."""
    seen, built = [], []
    monkeypatch.setattr(masks, "_packed", lambda mask, packed=masks._packed: built.append(1) or packed(mask))
    varlen = integration.flash_attn_varlen_func
    monkeypatch.setattr(
        integration,
        "flash_attn_varlen_func",
        lambda q, *rest, **named: seen.append(len(q)) or varlen(q, *rest, **named),
    )
    logits(make("bert"), NAME, **padded_batch())
    assert seen == [sum(LENGTHS)] * 2
    assert built == [1]


def positions_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llama", "position_ids"),
        ("mistral", "position_ids"),
        ("llama", "lengths"),
        ("gpt-oss", "position_ids"),  # which keeps them from its masks
        ("mistral", "lengths"),
        ("gpt-oss", "lengths"),
    ],
)
def test_packed_by_the_caller(name: str, told: str) -> None:
    """Sequences in one row, known by position_ids or by FlashAttention's arguments, give what a padded batch does."""
    model, batch = make(name), padded_batch()
    expected = logits(model, "eager", **batch)
    ids = batch["input_ids"][batch["attention_mask"].bool()][None]
    lengths: dict[str, Any] = {}
    if told == "lengths":
        starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))
    found = logits(model, NAME, input_ids=ids, position_ids=positions_of(LENGTHS), use_cache=False, **lengths)
    assert_same(found[0], expected)


def test_several_rows_of_packed_sequences() -> None:
    model = make("mistral")
    ids = padded_batch((8, 8))["input_ids"]
    positions = torch.cat([positions_of((5, 1, 2)), positions_of((3, 5))])
    batch = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    found = logits(model, NAME, **batch)
    assert_same(found, logits(model, "eager", **batch))
    assert not torch.allclose(found, logits(model, NAME, input_ids=ids), rtol=1e-2)


@pytest.mark.parametrize("shapes", [((4, 4),), ((2, 4), (4, 4), (4, 2))], ids=["one", "three"])
def test_images_in_one_row(shapes: tuple[tuple[int, int], ...]) -> None:
    """Pixtral, which tells layers of the images by lengths or, in older versions, by position_ids alone."""
    sizes = {
        key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.5)
    model, pixels = transformers.PixtralVisionModel(config).eval(), torch.randn(len(shapes), 3, 16, 16)
    image_sizes = torch.tensor([[4 * height, 4 * width] for height, width in shapes])
    found = []
    for implementation in (NAME, "eager"):
        model.set_attn_implementation(implementation)
        found.append(model(pixel_values=pixels, image_sizes=image_sizes).last_hidden_state)
    assert_same(*found)


def test_sequences_known_by_their_positions() -> None:
    patches = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1]])
    for positions in (patches, torch.tensor([[2, 3, 4, 5, 2, 3]])):
        packing = masks.packing_of_positions(positions, 6)
        assert packing is not None and packing.cu_seqlens_q is packing.cu_seqlens_k
        assert packing.cu_seqlens_k.tolist() == [0, 4, 6] and packing.max_seqlen_k == 4
        assert masks.packing_of_positions(positions, 7) is None  # of something else
    assert masks.packing_of_positions(patches[:4], 4) is None  # one image


def test_positions_are_read_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a layer, which would wait for the GPU each time; not for two batches either."""
    calls = []
    inner = masks._packed_sequences
    monkeypatch.setattr(masks, "_packed_sequences", lambda *args: calls.append(1) or inner(*args))
    model, ids = make("gpt-oss", num_hidden_layers=4), padded_batch((8,))["input_ids"]
    for count, lengths in enumerate(((8,), (3, 5), (6, 2)), 1):  # one sequence has an answer too
        found = logits(model, NAME, input_ids=ids, position_ids=positions_of(lengths), use_cache=False)
        assert len(calls) == count
        alone = [logits(model, "eager", input_ids=part, use_cache=False)[0] for part in ids.split(lengths, 1)]
        assert_same(found[0], torch.cat(alone))
    positions = positions_of((3, 5))
    calls.clear()
    for seqlen, total in ((8, 1), (8, 1), (9, 1), (8, 2)):  # of another length they tell nothing
        packing = masks.packing_of_positions(positions, seqlen)
        assert len(calls) == total and (packing is None) == (seqlen == 9)
    positions.copy_(positions_of((2, 6)))  # the same tensor, written to
    packing = masks.packing_of_positions(positions, 8)
    assert packing is not None and packing.cu_seqlens_k.tolist() == [0, 2, 8] and len(calls) == 3
    with torch.inference_mode():  # writes do not show
        positions = positions_of((3, 5))
        masks.packing_of_positions(positions, 8)
        positions.copy_(positions_of((2, 6)))
        packing = masks.packing_of_positions(positions, 8)
    assert packing is not None and packing.cu_seqlens_k.tolist() == [0, 2, 8]


@pytest.mark.parametrize("told", ["no", "argument", "torch"])
def test_deterministic(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ModernBERT's config or torch asks for arrives, dense, packed and with sinks."""
    seen = []
    for owner in (integration, integration.v3):
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            inner = getattr(owner, name)
            monkeypatch.setattr(
                owner,
                name,
                lambda *args, _inner=inner, deterministic=None, **named: (
                    seen.append(deterministic) or _inner(*args, deterministic=deterministic, **named)
                ),
            )
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: told == "torch")
    more = {"deterministic": True} if told == "argument" else {}
    q, module = torch.randn(2, 4, 5, 8, requires_grad=True), torch.nn.Module()
    real = padded_batch((5, 3))["attention_mask"]
    for options in ({}, {"s_aux": torch.zeros(4)}):
        for mask in (None, real):
            integration.attention(module, q, q, q, mask, **options, **more)
    integration.attention(module, q[:, :, -1:].detach(), q.detach(), q.detach(), None, **more)  # a step has no gradient
    assert seen == [told != "no"] * 4
    seen.clear()
    modern = make("modernbert", deterministic_flash_attn=told == "argument")
    logits(modern, NAME, **padded_batch())
    assert seen == [told != "no"] * 2


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padding_that_a_layer_is_handed(causal: bool) -> None:
    """Not through the mask interface; also where queries are others than the keys, but as many."""
    torch.manual_seed(0)
    real = padded_batch((5, 3), left=True)["attention_mask"]
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    module = torch.nn.Module()
    out, _ = integration.attention(module, q, k, v, real, is_causal=causal)
    mask = real.bool()[:, None, None, :].expand(-1, 1, 5, -1)
    mask = mask & torch.ones(5, 5, dtype=torch.bool).tril() if causal else mask
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    rows = real.bool() if causal else torch.ones_like(real, dtype=torch.bool)
    assert_same(out[rows], expected[rows])
    windowed = integration.attention(module, q, k, v, real, is_causal=causal, sliding_window=2)[0]
    assert not torch.allclose(windowed, out)
    real[0, 2] = 0
    with pytest.raises(NotImplementedError, match="attention_mask: expected the tokens of each sequence side by side"):
        integration.attention(module, q, k, v, real, is_causal=causal, sliding_window=2)


def test_packed_sequences_of_a_bidirectional_model() -> None:
    model, batch = make("bert"), padded_batch()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    found = logits(
        model, NAME,
        input_ids=batch["input_ids"][batch["attention_mask"].bool()][None], position_ids=positions_of(LENGTHS),
        cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS),
    )  # fmt: skip
    assert_same(found[0], logits(model, "eager", **batch))


def test_dropout_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate arrives, torch's seed rules it, and evaluation has none."""
    rates = []
    varlen = integration.flash_attn_varlen_func
    monkeypatch.setattr(
        integration,
        "flash_attn_varlen_func",
        lambda *args, dropout_p, **named: rates.append(dropout_p) or varlen(*args, dropout_p=dropout_p, **named),
    )
    model, batch = make("llama", attention_dropout=0.25), padded_batch()
    plain = logits(model, NAME, **batch)
    model.train()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(logits(model, NAME, **batch))
    assert rates == [0.0] * 2 + [0.25] * 6
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], plain)


@pytest.mark.parametrize("name", ["mistral", "gpt-oss"])
def test_gradient_checkpointing(name: str) -> None:
    batch = padded_batch()
    expected = gradients(make(name).train(), NAME, **batch)
    model = make(name).train()
    model.gradient_checkpointing_enable()
    found = gradients(model, NAME, **batch)
    for key, theirs in expected.items():
        torch.testing.assert_close(found[key], theirs)


def test_compiled_model(fresh_dynamo: None) -> None:
    model, batch = make("mistral", num_hidden_layers=1), padded_batch()
    expected = logits(model, "eager", **batch)
    model.set_attn_implementation(NAME)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(compiled(**batch, use_cache=False).logits[batch["attention_mask"].bool()], expected)


def test_one_precision_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers in bfloat16 under autocast, in float32 without: nothing is cast behind the caller's back."""
    seen = []
    function = integration.flash_attn_func
    monkeypatch.setattr(
        integration, "flash_attn_func", lambda q, *rest, **named: seen.append(q.dtype) or function(q, *rest, **named)
    )
    model, batch = make("gpt2"), padded_batch((7, 7))
    logits(model, NAME, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits(model, NAME, **batch)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_with_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, softcap and sinks through the Triton back end, forward and backward."""
    batch = padded_batch((6, 3))
    model = make(name)
    expected = logits(model, "eager", **batch)
    theirs = gradients(model, "eager", **batch)
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "triton")
    assert_same(logits(model, NAME, **batch), expected)
    largest = max(float(x.abs().max()) for x in theirs.values())
    for key, ours in gradients(model, NAME, **batch).items():
        assert float((ours - theirs[key]).abs().max()) <= 2e-5 * largest, key
