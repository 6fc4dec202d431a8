"""What the Transformers integration refuses, and that registering it is safe."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from tiny_models import NAME, SIZES, make, padded_batch, transformers

from flash_rocm import runtime
from flash_rocm.integrations import masks
from flash_rocm.integrations import transformers as integration

masking_utils = transformers.masking_utils
X = torch.randn(1, 2, 4, 8)


class Layer(torch.nn.Module):
    is_causal = True


def test_registering_again_changes_nothing() -> None:
    before = transformers.PreTrainedModel._check_and_adjust_attn_implementation
    assert integration.register() == NAME == "flash_rocm"
    assert transformers.PreTrainedModel._check_and_adjust_attn_implementation is before
    assert transformers.AttentionInterface()[NAME] is integration.attention
    model = make("llama", attn_implementation=NAME)
    assert model.config._attn_implementation == NAME
    for other in ("sdpa", "eager", NAME):  # and names of others are still checked
        model.set_attn_implementation(other)
        assert model.config._attn_implementation == other
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation("no_such_attention")


@pytest.mark.parametrize("found", ["4.57.6", "3.0.2"])
def test_too_old(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", found)
    expected = rf"transformers: expected Transformers 5\.0 or newer .*, got {found}, which is too old.*pip install"
    with pytest.raises(ImportError, match=expected):
        integration.register()


def test_too_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that lacks what is used says so when it is registered."""
    monkeypatch.setattr("transformers.__version__", "7.1.0")
    integration.register()  # has all that is used
    monkeypatch.delattr(masking_utils, "sliding_window_overlay")
    with pytest.raises(ImportError, match=r"got 7\.1\.0, which differs \(.*sliding_window_overlay"):
        integration.register()


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"expected Transformers 5\.0 or newer .*, got none .*flash_rocm\[transformers\]"
    ):
        integration.register()


def test_models_with_attention_of_their_own() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(
        NotImplementedError, match=r"attn_implementation: expected .* got GPTNeoModel of Transformers 5"
    ):
        transformers.AutoModel.from_config(config, attn_implementation=NAME)


def test_a_bias_on_the_scores() -> None:
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model, ids = transformers.AutoModel.from_config(config, attn_implementation=NAME), padded_batch()["input_ids"]
    with pytest.raises(NotImplementedError, match="position_bias: not supported .* in T5Attention of Transformers 5"):
        model(input_ids=ids, decoder_input_ids=ids)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_arguments_of_models(name: str) -> None:
    model, batch = make(name), padded_batch()
    model.set_attn_implementation(NAME)
    ids, seqlen = batch["input_ids"], batch["input_ids"].shape[1]
    with pytest.raises((NotImplementedError, ValueError), match="output_attentions"):
        model(**batch, output_attentions=True)
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(
            NotImplementedError, match=r"attention_mask: expected .*, got Tensor of shape \(4, 1, 9, 9\)"
        ):
            model(input_ids=ids, attention_mask=torch.ones(len(ids), 1, seqlen, seqlen, dtype=dtype))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(4, positions\), got \(4, 9, 9\)"):
        model(input_ids=ids, attention_mask=torch.ones(len(ids), seqlen, seqlen))
    if name == "bert":
        with pytest.raises(ValueError, match="attention_mask: expected one for 9 positions, got one for 5"):
            model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0]] * 4))


def test_arguments_of_layers() -> None:
    for name, value in (
        ("position_bias", X),
        ("output_attentions", True),
        ("head_mask", X),
        ("layer_head_mask", X),
        ("attention_bias", X),
        ("attn_bias", X),
        ("relative_position_bias", X),
        ("score_mod", lambda score, *position: score),
        ("block_mask", X),
        ("alibi", X),
        ("indices", X),
        ("block_indices", X),
        ("sinks", X),
        ("block_table", X),
    ):
        with pytest.raises(NotImplementedError, match=f"{name}: not supported .* in Layer of Transformers 5"):
            integration.attention(Layer(), X, X, X, None, **{name: value})
        integration.attention(Layer(), X, X, X, None, **{name: None})
    with pytest.raises(NotImplementedError, match="attention_mask: expected"):
        integration.attention(Layer(), X, X, X, torch.ones(1, 1, 4, 4, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="dropout: expected 0 with attention sinks"):
        integration.attention(Layer(), X, X, X, None, dropout=0.1, s_aux=torch.zeros(2))
    gpt2 = Layer()
    gpt2.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(NotImplementedError, match="scale_attn_by_inverse_layer_idx"):
        integration.attention(gpt2, X, X, X, None)
    integration.attention(gpt2, X, X, X, None, scaling=0.1)
    mask = masks.Mask(True, (1, 0))
    for window in (None, 3):  # a layer that does not know of the window in its mask
        with pytest.raises(NotImplementedError, match="sliding_window: expected 2, that of the mask"):
            integration.attention(Layer(), X, X, X, mask, sliding_window=window)
    with pytest.raises(NotImplementedError, match="sliding_window: expected None, that of the mask, got 3"):
        integration.attention(Layer(), X, X, X, masks.Mask(False), sliding_window=3)


def test_lengths_of_packed_sequences() -> None:
    starts = torch.tensor([0, 1, 4])
    lengths: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 3, "max_length_k": 3}
    integration.attention(Layer(), X, X, X, None, **lengths)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected cu_seq_lens_k, max_length_q and max_length_k"):
        integration.attention(Layer(), X, X, X, None, **(lengths | {"max_length_k": None}))
    real = torch.tensor([[False, True, True, True]])
    padded = masks.mask_of(1, 4, 4, mask_function=masking_utils.causal_mask_function, attention_mask=real)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q: expected None with padding"):
        integration.attention(Layer(), X, X, X, padded, **lengths)


def test_patterns() -> None:
    ones = torch.ones(1, 6, dtype=torch.bool)
    window = masking_utils.sliding_window_causal_mask_function(4)
    causal = masking_utils.causal_mask_function
    assert masks.mask_of(1, 6, 6, mask_function=causal, attention_mask=ones) is None
    assert masks.mask_of(1, 6, 6, mask_function=window, attention_mask=ones) == masks.Mask(True, (3, 0))
    assert masks.mask_of(1, 2, 9, q_offset=4, mask_function=causal) == masks.Mask(True, seqlen_k=6)
    both = masking_utils.bidirectional_mask_function
    assert masks.mask_of(1, 6, 6, mask_function=both, attention_mask=ones) == masks.Mask(False)
    packed = masking_utils.packed_sequence_mask_function(torch.zeros(1, 6))
    for mask_function in (
        None,
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1)),
        masking_utils.and_masks(causal),
        masking_utils.and_masks(window, causal),
        masking_utils.and_masks(masking_utils.and_masks(causal, packed), packed),
        masking_utils.and_masks(masking_utils.or_masks(causal, both), packed),
        masking_utils.or_masks(masking_utils.sliding_window_overlay(4), causal),
        lambda batch, head, q, k: k <= q,
    ):
        with pytest.raises(NotImplementedError, match="mask_function: expected full or causal attention"):
            masks.mask_of(1, 6, 6, mask_function=mask_function, attention_mask=ones)
    config = types.SimpleNamespace(model_type="strange")
    with pytest.raises(NotImplementedError, match="in a model of type 'strange'"):
        masks.mask_of(1, 6, 6, mask_function=causal, use_vmap=True, config=config)
    ones[0, 2] = False
    with pytest.raises(NotImplementedError, match="attention_mask: expected the tokens of each sequence side by side"):
        masks.mask_of(1, 6, 6, mask_function=window, attention_mask=ones)
    with pytest.raises(NotImplementedError, match="past_key_values: expected keys for positions 0 to 8, got 6 from 0"):
        masks.mask_of(1, 6, 6, q_offset=3, mask_function=causal)
    with pytest.raises(ValueError, match="q_length: expected an int, got None"):
        masks.mask_of(1, None, 6, mask_function=causal)


def test_keys_that_are_not_there_yet() -> None:
    """A mask as long as a static cache says True for tokens that come later."""
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 0] = False
    mask = masks.mask_of(2, 2, 9, q_offset=4, mask_function=masking_utils.causal_mask_function, attention_mask=real)
    assert mask is not None and mask.packing is not None
    assert mask.packing.rows_k is not None and mask.packing.rows_q is not None
    assert mask.packing.rows_k.tolist() == [*range(1, 6), *range(9, 15)]
    assert mask.packing.rows_q.tolist() == [0, 1, 2, 3]
    assert mask.packing.cu_seqlens_k.tolist() == [0, 5, 11] and mask.packing.max_seqlen_k == 6


def test_the_mask_decides_what_is_causal() -> None:
    """As in Transformers' own functions, which ignore is_causal where there is a mask."""
    full = integration.attention(Layer(), X, X, X, None, is_causal=False)[0]
    causal = integration.attention(Layer(), X, X, X, None)[0]
    assert not torch.allclose(full, causal)
    assert torch.equal(integration.attention(Layer(), X, X, X, masks.Mask(False))[0], full)
    assert torch.equal(integration.attention(Layer(), X, X, X, masks.Mask(True), is_causal=False)[0], causal)


def test_a_finished_mask_is_kept() -> None:
    """Transformers makes the masks of a step with a static cache ahead, and asks again."""
    mask = masks.Mask(True, seqlen_k=3)
    assert masks.mask_of(1, 1, 9, mask_function=masking_utils.causal_mask_function, attention_mask=mask) is mask


# --------------------------------------------------------------------------------------------------
# attn_implementation="flash_attention_2", which Transformers runs on a GPU only

DROP_IN = f"""
from flash_rocm import dropin
dropin.install()
import torch
torch.cuda.is_available = lambda: True  # Transformers asks for a GPU when it looks for flash-attn
import transformers
from transformers import modeling_flash_attention_utils as flash
from transformers.utils import is_flash_attn_2_available
assert is_flash_attn_2_available()
functions = flash.lazy_import_flash_attention("flash_attention_2")[0]
from flash_rocm.dropin import interface
assert functions[0] is interface.flash_attn_func and functions[1] is interface.flash_attn_varlen_func
torch.manual_seed(0)
model = transformers.LlamaModel(transformers.LlamaConfig(**{SIZES!r})).eval()
ids, mask = torch.randint(3, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
mask[1, :4] = mask[2, :7] = 0
found = []
for name in ("flash_attention_2", "eager"):
    model.config._attn_implementation = name  # without the check that the model is on a GPU
    found.append(model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()])
assert (found[0] - found[1]).abs().max() <= 2e-5 * found[1].abs().max(), "differ"
print("same")
"""


def test_flash_attention_2_through_the_drop_in() -> None:
    child = subprocess.run(
        [sys.executable, "-c", DROP_IN],
        env=runtime.subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.stdout.endswith("same\n"), child.stderr
