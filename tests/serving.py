"""A small inference server: continuous batching over a paged K/V cache, for tests and to be read.

A Llama-shaped model with random weights, and two ways to generate with it: :func:`generate_alone`, one request at a
time, every token from scratch; and :class:`Server`, which at each step gives all running requests what they need in
one batch: a decoding request its next token, a request that has just come a chunk of its prompt.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import nn

import flash_rocm
from flash_rocm import v3


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    vocab: int
    layers: int = 2
    width: int = 64
    heads: int = 4
    heads_k: int = 2
    headdim: int = 16
    feed_forward: int = 96
    positions: int = 512


#: (layer, q, k, v) -> out, all (tokens, heads, headdim), where q and k are not turned by the rotary embedding yet.
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """RMSNorm, attention with grouped queries, RMSNorm, SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads = config.heads + 2 * config.heads_k
        self.split = (config.heads, config.heads_k, config.heads_k)
        self.headdim = config.headdim
        self.norm_1, self.norm_2 = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.qkv = nn.Linear(config.width, heads * config.headdim, bias=False)
        self.out = nn.Linear(config.heads * config.headdim, config.width, bias=False)
        self.gate_up = nn.Linear(config.width, 2 * config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: torch.Tensor, layer: int, attend: Attention) -> torch.Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.headdim))
        x = x + self.out(attend(layer, *heads.split(self.split, dim=1)).flatten(1))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    """Tokens of any requests, one behind the other, to logits; what they attend to is the caller's matter."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, config.headdim, 2) / config.headdim)
        angle = torch.arange(config.positions)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for parameter in self.parameters():  # weights large enough that attention has a say in the next token
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)

    def forward(self, tokens: torch.Tensor, attend: Attention, rows: torch.Tensor) -> torch.Tensor:
        """Logits (len(rows), vocab) of some of the tokens (tokens,)."""
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, attend)
        return self.head(self.norm(x[rows]))


@dataclasses.dataclass
class Request:
    """A prompt, and what is generated for it."""

    prompt: list[int]
    max_new_tokens: int
    generated: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the cache
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """All there are so far."""
        return self.prompt + self.generated

    @property
    def is_done(self) -> bool:
        return len(self.generated) == self.max_new_tokens


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (tokens, heads, headdim), cos and sin (tokens, headdim / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@torch.inference_mode()
def generate_alone(model: Model, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
    """Greedy tokens of one request without any cache, and by how much the closest choice was decided."""
    device, tokens, margin = model.cos.device, list(prompt), float("inf")

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = (_turned(x, model.cos[: len(x)], model.sin[: len(x)]) for x in (q, k))
        return flash_rocm.flash_attn_func(q[None], k[None], v[None], causal=True)[0]

    for _ in range(max_new_tokens):
        last = torch.tensor([len(tokens) - 1], device=device)
        best = model(torch.tensor(tokens, device=device), attend, last)[0].float().topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], margin


class Server:
    """Continuous batching: requests join and leave the batch at every step.

    Args:
        num_pages, page_size: of the K/V cache that all requests share.
        max_batch: requests that run at a time.
        max_tokens: of one step; prompts that are longer come in chunks.
        fused: the rotary embedding and the append are the attention function's (``v3.flash_attn_with_kvcache``);
            else the server's own, before ``flash_attn_varlen_func`` over pages.
    """

    def __init__(
        self, model: Model, num_pages: int, page_size: int, max_batch: int, max_tokens: int, fused: bool = True
    ) -> None:
        config, weight = model.config, model.head.weight
        shape = (config.layers, num_pages, page_size, config.heads_k, config.headdim)
        # NaN: what nobody wrote is not read.
        self.k_cache = torch.full(shape, float("nan"), dtype=weight.dtype, device=weight.device)
        self.v_cache = self.k_cache.clone()
        self.model, self.page_size, self.max_batch, self.max_tokens = model, page_size, max_batch, max_tokens
        self.fused = fused
        self.free = deque(range(num_pages))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.batches: list[list[int]] = []  # for each step how many tokens each request had

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def run(self) -> None:
        """Step until every request is done."""
        while self.waiting or self.running:
            self.step()

    def _pages_of(self, request: Request) -> int:
        """Pages for all that a request can become: it never has to wait in the middle."""
        return -(-(len(request.prompt) + request.max_new_tokens) // self.page_size)

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            count = self._pages_of(self.waiting[0])
            if count > len(self.free):
                return
            request = self.waiting.popleft()
            request.pages = [self.free.popleft() for _ in range(count)]
            self.running.append(request)

    def _schedule(self) -> list[tuple[Request, int]]:
        """Requests of a step and how many tokens of each: first those that decode, then prompts, as many as fit."""
        left, chosen = self.max_tokens, []
        for request in sorted(self.running, key=lambda request: len(request.tokens) - request.cached):
            count = min(left, len(request.tokens) - request.cached)
            if count:
                chosen.append((request, count))
                left -= count
        return chosen

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass of the model for a batch of decoding and starting requests."""
        self._admit()
        batch = self._schedule()
        if not batch:
            raise RuntimeError(f"no request fits {len(self.free)} free pages of {self.page_size} tokens")
        self.batches.append([count for _, count in batch])
        device = self.k_cache.device
        tokens = [token for request, count in batch for token in request.tokens[request.cached :][:count]]
        ends = torch.tensor([0, *(count for _, count in batch)]).cumsum(0)
        attend = (self._fused if self.fused else self._separate)(batch, ends.int().to(device))
        logits = self.model(torch.tensor(tokens, device=device), attend, ends[1:].to(device) - 1)
        for (request, count), token in zip(batch, logits.argmax(-1).tolist(), strict=True):
            request.cached += count
            if request.cached == len(request.tokens):  # else it was a chunk of a prompt, after which nothing comes
                request.generated.append(token)
            if request.is_done:
                self.running.remove(request)
                self.free.extend(request.pages)
                request.pages = []

    def _block_table(self, batch: list[tuple[Request, int]]) -> torch.Tensor:
        """(batch, most pages) int32; -1 behind the pages of a request."""
        longest = max(len(request.pages) for request, _ in batch)
        rows = [request.pages + [-1] * (longest - len(request.pages)) for request, _ in batch]
        return torch.tensor(rows, dtype=torch.int32, device=self.k_cache.device)

    def _fused(self, batch: list[tuple[Request, int]], cu_seqlens: torch.Tensor) -> Attention:
        """Rotary embedding, append and attention in one call."""
        lengths = torch.tensor([r.cached for r, _ in batch], dtype=torch.int32, device=cu_seqlens.device)
        table, longest = self._block_table(batch), max(count for _, count in batch)
        cos, sin = (x.to(self.k_cache.dtype) for x in (self.model.cos, self.model.sin))

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return v3.flash_attn_with_kvcache(
                q,
                self.k_cache[layer],
                self.v_cache[layer],
                k,
                v,
                rotary_cos=cos,
                rotary_sin=sin,
                cache_seqlens=lengths,
                page_table=table,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k_new=cu_seqlens,
                max_seqlen_q=longest,
                causal=True,
                rotary_interleaved=False,
            )

        return attend

    def _separate(self, batch: list[tuple[Request, int]], cu_seqlens: torch.Tensor) -> Attention:
        """The server turns and stores, as vLLM does, then attends to the pages."""
        device, table, size = cu_seqlens.device, self._block_table(batch), self.page_size
        positions = [p for request, count in batch for p in range(request.cached, request.cached + count)]
        owners = [request for request, count in batch for _ in range(count)]
        pages = torch.tensor([r.pages[p // size] for r, p in zip(owners, positions, strict=True)], device=device)
        at = torch.tensor(positions, device=device)
        lengths = [request.cached + count for request, count in batch]
        cu_seqlens_k = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        cos, sin = self.model.cos[at], self.model.sin[at]

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
            k_cache[pages, at % size], v_cache[pages, at % size] = _turned(k, cos, sin), v
            return flash_rocm.flash_attn_varlen_func(
                _turned(q, cos, sin),
                k_cache,
                v_cache,
                cu_seqlens,
                cu_seqlens_k,
                max(count for _, count in batch),
                max(lengths),
                causal=True,
                block_table=table,
            )

        return attend
