"""Transformers models with random weights, small enough for a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from flash_rocm.integrations import transformers as integration  # noqa: E402

NAME = integration.register()
WORDS = 50
WINDOW = 4
LENGTHS = (9, 4, 1, 6)
SIZES: dict[str, Any] = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.5,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
#: What the attention of DeepSeek-V3 takes: q and k of 20 dims, v of 12.
MLA: dict[str, Any] = dict(
    num_key_value_heads=4, head_dim=8, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12,
    v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
    first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
#: Name -> classes and what their config has beside SIZES.  The last two are no decoders.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {"local_attention": 2 * WINDOW}),
}
DECODERS = [name for name in CONFIGS if "bert" not in name]


def make(name: str, **changes: Any) -> Any:
    """The model in float32, without dropout."""
    model_class, config_class, more = CONFIGS[name]
    if name == "gpt-oss" and version() < (5, 3):
        pytest.skip("the config of gpt-oss in Transformers before 5.3 takes no name with flash in it")
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(SIZES | more | changes))
    config._experts_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    for layer_name, parameter in model.named_parameters():
        if "sinks" in layer_name:
            torch.nn.init.normal_(parameter)
    return model


def version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def padded_batch(lengths: tuple[int, ...] = LENGTHS, left: bool = False) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask."""
    generator = torch.Generator().manual_seed(1)
    places = torch.arange(max(lengths)).expand(len(lengths), -1)
    mask = (places < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, WORDS, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask.flip(1) if left else mask}


def logits(model: Any, implementation: str, **batch: Any) -> torch.Tensor:
    """Those of the real tokens."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    found = model(**batch).logits
    return found[batch["attention_mask"].bool()] if "attention_mask" in batch else found


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """float32 on both sides: what differs is the order of some thousand additions."""
    assert ours.shape == theirs.shape and torch.isfinite(ours).all()
    largest = float(theirs.detach().abs().max())
    assert largest > 0 and float((ours - theirs).detach().abs().max()) <= 2e-5 * largest
