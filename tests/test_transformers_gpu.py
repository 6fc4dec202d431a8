"""Transformers models on a GPU, on the Triton back end: the cases of the other files where bfloat16 and kernels matter.

For an AMD or NVIDIA GPU: ``python -m pytest -m gpu tests/test_transformers_gpu.py tests/test_torch_sdpa.py``.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_transformers_generation import generated, steps
from tiny_models import CONFIGS, DECODERS, NAME, SIZES, logits, make, padded_batch, transformers

from flash_rocm import runtime

pytestmark = pytest.mark.gpu

#: A router that picks other experts after a rounding makes outputs jump: what experts are in is compared in float32.
ROUTED = ("gpt-oss", "deepseek-v3")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "triton")


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.cuda() for name, x in batch.items()}


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name in ROUTED else torch.bfloat16


def assert_by_rule(
    ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, factor: int
) -> None:
    """Off by at most factor times what Transformers' own function is off in the same dtype, plus some roundings.

    In float32, which is exact's own dtype: the roundings of some thousand additions.
    """
    largest = float(exact.detach().abs().max())
    error, allowed = (float((x - exact).detach().abs().max()) for x in (ours, theirs))
    assert torch.isfinite(ours).all() and largest > 0
    roundings = 1000 if dtype == torch.float32 else 4
    assert error <= factor * allowed + roundings * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients(name: str, left: bool) -> None:
    batch, dtype = on_gpu(padded_batch((70, 33, 1, 64), left=left)), dtype_of(name)
    exact = make(name, max_position_embeddings=128).cuda()
    low = copy.deepcopy(exact).to(dtype)
    found = []
    for model, implementation in ((low, NAME), (low, "eager"), (exact, "eager")):
        model.zero_grad()
        out = logits(model, implementation, **batch).float()
        out.square().mean().backward()
        gradients = [x.grad.float().flatten() for x in model.parameters() if x.grad is not None]
        found.append((out.detach(), torch.cat(gradients)))
    for factor, ours, theirs, wanted in zip((2, 3), *found, strict=True):
        assert_by_rule(ours, theirs, wanted, dtype, factor)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, cache: str) -> None:
    """Token for token in float32, of a padded batch."""
    model, batch = make(name).cuda(), on_gpu(padded_batch(left=True))
    found = generated(model, NAME, batch, cache_implementation=cache)
    assert found == generated(model, "eager", batch, cache_implementation=cache)


def test_generate_compiled(fresh_dynamo: None) -> None:
    """Transformers compiles steps over a static cache by itself."""
    model, batch = make("llama").cuda(), on_gpu(padded_batch(left=True))
    expected = generated(model, "eager", batch)
    model.set_attn_implementation(NAME)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = model.generate(**batch, **options, cache_implementation="static")
    assert found[:, batch["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-oss", "deepseek-v3"])
@torch.no_grad()
def test_prompts_in_parts(name: str, kind: str) -> None:
    batch, dtype = on_gpu(padded_batch((12, 7, 3), left=True)), dtype_of(name)
    exact = make(name).cuda()
    low = copy.deepcopy(exact).to(dtype)
    found = []
    for model, implementation in ((low, NAME), (low, "eager"), (exact, "eager")):
        cache: Any = transformers.DynamicCache(config=model.config)
        if kind == "static":
            cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        found.append(steps(model, implementation, batch, cache).float())
    assert_by_rule(*found, dtype, 2)


def test_continuous_batching() -> None:
    model, batch = make("mistral").cuda(), padded_batch((9, 6, 2))
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt]).cuda()
        expected += generated(model, "eager", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    model.set_attn_implementation(NAME)
    options = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    limits = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    outputs = model.generate_batch(
        inputs=prompts, generation_config=options, continuous_batching_config=limits, progress_bar=False
    )
    assert [output.error for output in outputs.values()] == [None] * 3
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_compiled_model(fresh_dynamo: None) -> None:
    model, batch = make("mistral").cuda(), on_gpu(padded_batch((70, 33)))
    real = batch["attention_mask"].bool()
    exact = logits(model, "eager", **batch)
    model.set_attn_implementation(NAME)
    eager = model(**batch, use_cache=False).logits[real]
    assert_by_rule(torch.compile(model)(**batch, use_cache=False).logits[real], eager, exact, torch.float32, 2)


DROP_IN = f"""
from flash_rocm import dropin
dropin.install()
import torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(**{SIZES!r})
exact = transformers.LlamaForCausalLM(config).eval().cuda()
state = exact.state_dict()
ids, mask = torch.randint(3, 50, (3, 9)).cuda(), torch.ones(3, 9, dtype=torch.long).cuda()
mask[1, :4] = mask[2, :7] = 0
def run(name, dtype):
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype).eval().cuda()
    model.load_state_dict(state)
    assert model.config._attn_implementation == name
    model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float().square().mean().backward()
    found = model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    gradients = torch.cat([x.grad.float().flatten() for x in model.parameters()])
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return found, gradients
found = [run("flash_attention_2", torch.bfloat16), run("eager", torch.bfloat16), run("eager", torch.float32)]
for factor, ours, theirs, wanted in zip((2, 3), *found):
    error, other = ((x - wanted).abs().max() for x in (ours, theirs))
    assert error <= factor * other + 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max(), (error, other)
print("agrees")
"""


def test_flash_attention_2_through_the_drop_in() -> None:
    child = subprocess.run(
        [sys.executable, "-c", DROP_IN],
        env=runtime.subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.stdout.endswith("agrees\n"), child.stderr
