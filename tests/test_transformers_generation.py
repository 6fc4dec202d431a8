"""Transformers' generation, caches and training loop on flash_rocm."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from tiny_models import DECODERS, NAME, WINDOW, assert_same, make, padded_batch, transformers, version

from flash_rocm import ck_instances, virtual_device
from flash_rocm.arch import arch_named
from flash_rocm.integrations import masks
from flash_rocm.integrations import transformers as integration

NEW = 2 * WINDOW  # so that windows are left behind


def generated(model: Any, implementation: str, batch: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """The new tokens, greedy."""
    model.set_attn_implementation(implementation)
    found = model.generate(
        **batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True, **options
    )
    return [row.tolist() for row in found[:, batch["input_ids"].shape[1] :]]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, cache: str) -> None:
    """Token for token, of a padded batch."""
    model, batch = make(name), padded_batch(left=True)
    found = generated(model, NAME, batch, cache_implementation=cache)
    assert found == generated(model, "eager", batch, cache_implementation=cache)
    assert len({tuple(row) for row in found}) > 1


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_generate_with_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps over a static cache, with windows and sinks or with values of another head dim."""
    monkeypatch.setitem(globals(), "NEW", 3)
    model, batch = make(name), padded_batch((6, 2), left=True)
    expected = generated(model, "eager", batch, cache_implementation="static")
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "triton")
    assert generated(model, NAME, batch, cache_implementation="static") == expected


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_generate_without_padding(name: str, cache: str) -> None:
    model, batch = make(name), padded_batch((6, 6))
    options = {"cache_implementation": cache}
    assert generated(model, NAME, batch, **options) == generated(model, "eager", batch, **options)


def test_beams() -> None:
    """The cache is reordered between the steps."""
    model, batch = make("qwen3"), padded_batch(left=True)
    assert generated(model, NAME, batch, num_beams=3) == generated(model, "eager", batch, num_beams=3)


def test_steps_go_to_the_kernels_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are not gathered in a step."""
    seen = []
    for name in ("flash_attn_func", "flash_attn_with_kvcache"):
        owner = integration.v3 if name == "flash_attn_with_kvcache" else integration
        inner = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _name=name, _inner=inner, **named: seen.append(_name) or _inner(*args, **named)
        )
    packed = integration._packed_attention
    monkeypatch.setattr(integration, "_packed_attention", lambda *args: seen.append("packed") or packed(*args))
    model = make("mistral", num_hidden_layers=1)
    expected = generated(model, "eager", padded_batch(left=True))
    assert generated(model, NAME, padded_batch(left=True)) == expected
    assert seen == ["packed"] + ["flash_attn_with_kvcache"] * (NEW - 1)
    seen.clear()
    generated(model, NAME, padded_batch((6, 6)))
    assert seen == ["flash_attn_func"] + ["flash_attn_with_kvcache"] * (NEW - 1)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("requested", "kernels", "headdims", "over_cache"),
    [
        ("ck", ("forward", "splitkv"), (64, 64), True),
        ("ck", ("forward", "splitkv"), (96, 96), False),
        ("ck", ("forward", "splitkv"), (128, 64), False),
        ("ck", ("forward",), (64, 64), False),
        ("auto", ("forward", "splitkv"), (96, 96), True),  # by Triton
    ],
)
def test_steps_that_a_back_end_has_kernels_for(
    requested: str,
    kernels: tuple[str, ...],
    headdims: tuple[int, int],
    over_cache: bool,
    padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Composable Kernel's forward takes more head dims than its kernels for caches, and is not left for others."""
    shipped = ck_instances.shipped("gfx942")
    instances = tuple(instance for instance in shipped.instances if instance.kernel in kernels)
    library = ck_instances.CkLibrary(shipped.folder, shipped.archs, instances)
    monkeypatch.setattr(ck_instances, "built", lambda: library)
    monkeypatch.setattr(virtual_device, "arch_of", lambda device: arch_named("gfx942"))
    monkeypatch.setenv("FLASH_ROCM_BACKEND", requested)
    seen = []

    def stand_in(name: str) -> Any:
        return lambda q, k, v, *rest, **named: seen.append(name) or q.new_zeros(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(integration, "flash_attn_func", stand_in("dense"))
    monkeypatch.setattr(integration, "flash_attn_varlen_func", stand_in("varlen"))
    monkeypatch.setattr(integration.v3, "flash_attn_with_kvcache", stand_in("cache"))
    q, k, v = (
        torch.zeros(2, 2, seqlen, headdim, dtype=torch.bfloat16)
        for seqlen, headdim in ((1, headdims[0]), (5, headdims[0]), (5, headdims[1]))
    )
    real = torch.tensor([[False, False, True, True, True], [True] * 5]) if padded else None
    causal = transformers.masking_utils.causal_mask_function
    mask = masks.mask_of(2, 1, 5, q_offset=4, mask_function=causal, attention_mask=real)
    out, _ = integration.attention(torch.nn.Module(), q, k, v, mask)
    assert out.shape == (2, 1, 2, headdims[1])
    assert seen == ["cache" if over_cache else "varlen" if padded else "dense"]


def steps(model: Any, implementation: str, batch: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
    """Logits of the real tokens, some at a time."""
    model.set_attn_implementation(implementation)
    name = "cache" if version() >= (5, 24) else "past_key_values"
    found = []
    for start, end in ((0, 2), (2, 8), (8, 9), (9, 10), (10, 12)):
        output = model(
            input_ids=batch["input_ids"][:, start:end],
            attention_mask=batch["attention_mask"][:, :end],
            **{name: cache},
            use_cache=True,
        )
        found.append(output.logits)
    return torch.cat(found, 1)[batch["attention_mask"].bool()]


@pytest.mark.parametrize("lengths", [(12, 12), (12, 7, 3)], ids=["full", "padded"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "deepseek-v3"])
@torch.no_grad()
def test_prompts_in_parts(name: str, kind: str, lengths: tuple[int, ...]) -> None:
    """More queries than one over a cache that has keys; a layer with a window forgets what no token sees any more."""
    model, batch = make(name), padded_batch(lengths, left=True)
    found = []
    for implementation in (NAME, "eager"):
        cache = transformers.DynamicCache(config=model.config)
        if kind == "static":
            cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        found.append(steps(model, implementation, batch, cache))
    assert_same(*found)


def test_steps_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dtype of autocast, as the prompt."""
    seen = []
    inner = integration.v3.flash_attn_with_kvcache
    monkeypatch.setattr(
        integration.v3,
        "flash_attn_with_kvcache",
        lambda *qkv, **named: seen.append({x.dtype for x in qkv}) or inner(*qkv, **named),
    )
    with torch.autocast("cpu", torch.bfloat16):
        generated(make("llama", num_hidden_layers=1), NAME, padded_batch(left=True))
    assert seen == [{torch.bfloat16}] * (NEW - 1)


@torch.no_grad()
def test_padding_between_tokens() -> None:
    """As behind prompts that were padded on the right."""
    model, batch = make("llama"), padded_batch((12, 12))
    batch["attention_mask"][1, 4:8] = 0
    found = []
    for implementation in (NAME, "eager"):
        found.append(steps(model, implementation, batch, transformers.DynamicCache(config=model.config)))
    assert_same(*found)


@torch.no_grad()
def test_keys_behind_the_last_token_of_a_static_cache_are_not_read() -> None:
    model, batch = make("llama"), padded_batch((5, 5))
    found = []
    for fill in (0.0, float("nan")):
        model.set_attn_implementation(NAME)
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        name = "cache" if version() >= (5, 24) else "past_key_values"
        model(input_ids=batch["input_ids"][:, :4], **{name: cache}, use_cache=True)
        for layer in cache.layers:
            layer.keys[:, :, 4:] = layer.values[:, :, 4:] = fill
        found.append(model(input_ids=batch["input_ids"][:, 4:], **{name: cache}, use_cache=True).logits)
    assert torch.equal(*found) and torch.isfinite(found[0]).all()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt-oss"])
def test_continuous_batching(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths in one row, keys from pages of Transformers' cache."""
    if version() < (5, 17) and not torch.cuda.is_available():
        pytest.skip("continuous batching of this Transformers needs a GPU")
    model, batch = make(name), padded_batch((9, 6, 2))
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected += generated(model, "eager", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    calls = []
    varlen = integration._varlen
    monkeypatch.setattr(integration, "_varlen", lambda *args, **named: calls.append(1) or varlen(*args, **named))
    model.set_attn_implementation(NAME)
    options = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    limits = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    outputs = model.generate_batch(
        inputs=prompts, generation_config=options, continuous_batching_config=limits, progress_bar=False
    )
    assert [output.error for output in outputs.values()] == [None] * 3
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert calls and model.config._attn_implementation == NAME


# --------------------------------------------------------------------------------------------------
# Training


def losses(implementation: str, folder: pathlib.Path, flattened: bool = False) -> list[float]:
    """Of 20 steps of Trainer over sequences of several lengths."""
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = make("llama", initializer_range=0.05, attn_implementation=implementation)
    data = []
    for seed in range(20):
        lengths = torch.randint(2, 12, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = padded_batch(tuple(lengths))
        data += [{"input_ids": ids[:length].tolist()} for ids, length in zip(batch["input_ids"], lengths, strict=True)]

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True) if flattened else padded
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0, remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 20 and found[-1] < found[0]
    return found


def test_trainer(tmp_path: pathlib.Path) -> None:
    """The same loss curve as with SDPA, padded and flattened."""
    expected = losses("sdpa", tmp_path)
    assert losses(NAME, tmp_path) == pytest.approx(expected, rel=1e-5)
    assert losses(NAME, tmp_path, flattened=True) == pytest.approx(expected, rel=1e-5)
