"""The operators over a K/V cache inside PyTorch: opcheck, torch.compile, CUDA graphs, and nothing that waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import OPERATORS, assert_equal, best_compiler
from kvcache_calls import BATCH, CAPACITY, DIM, HEADS, full_call, integers, run, without_new
from test_adversarial import random

import flash_rocm
from flash_rocm import cache_ops, v3
from flash_rocm.problem import CacheInputs


def inputs_of(arguments: dict[str, Any]) -> CacheInputs:
    """What the operators get of a call."""
    fields = {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_k": "cache_seqlens"}
    fields |= {"leftpad_k": "cache_leftpad"}
    return CacheInputs(**{name: arguments.get(fields.get(name, name)) for name in CacheInputs._fields})


# --------------------------------------------------------------------------------------------------
# Operators


@pytest.mark.unpoisoned
@pytest.mark.parametrize("paged", (False, True), ids=["entries", "pages"])
class TestOpcheck:
    """torch.library.opcheck: schema with what it mutates, fakes, AOT dispatch with dynamic shapes."""

    @pytest.mark.parametrize("num_splits", (1, 3))
    def test_attention(self, num_splits: int, paged: bool, device: str) -> None:
        inputs = inputs_of(full_call(device, paged))
        tensors = (getattr(inputs, name) for name in cache_ops._ATTEND)
        scalars = (3, CAPACITY, 2, 0.3, -1, 0, 0.0, 0, True, num_splits, "")
        torch.library.opcheck(OPERATORS.attention_cached.default, (*tensors, *scalars))

    def test_append(self, paged: bool, device: str) -> None:
        inputs = inputs_of(full_call(device, paged))
        tensors = tuple(getattr(inputs, name) for name in cache_ops._APPEND)
        before = inputs.k.clone()
        torch.library.opcheck(OPERATORS.append_kv.default, (*tensors, 2, True, ""))
        OPERATORS.append_kv(*tensors, 2, True, "")
        assert not torch.equal(inputs.k, before)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("shape", [(3, 2, 5, 4, 16), (3, 7, 4, 16)], ids=["dense", "varlen"])
def test_opcheck_of_combine(shape: tuple[int, ...], device: str) -> None:
    out, lse = random(device, *shape, dtype=torch.float32), random(device, *shape[:-1], dtype=torch.float32)
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(OPERATORS.combine_splits.default, (out, lse, dtype, ""))


def test_meta_tensors(device: str) -> None:
    """Shapes without data, of varlen and dense queries."""
    arguments = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in full_call(device, True).items()}
    out, lse = flash_rocm.flash_attn_with_kvcache(**arguments)
    assert out.is_meta and out.shape == (2, 3, 4, 8) and lse.shape == (2, 4, 3) and lse.dtype == torch.float32


def calls_of_inference(device: str) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every function that decides on the host how a cache is read."""
    plain, pages = full_call(device), full_call(device, True)
    page_table, starts = pages.pop("block_table"), integers(device, 0, 3, 6)
    packed = {name: pages[name].flatten(0, 1) for name in ("q", "k", "v")}
    new = {"cu_seqlens_q": starts, "max_seqlen_q": 3, "cu_seqlens_k_new": integers(device, 0, 2, 4)}
    varlen: dict[str, Any] = dict(q=packed["q"], cu_seqlens_q=starts, max_seqlen_q=3, max_seqlen_k=CAPACITY)
    over_pages = {"k": pages["k_cache"], "v": pages["v_cache"], "cu_seqlens_k": integers(device, 0, 7, 18)}
    used = {"seqused_k": integers(device, 5, 2), "cu_seqlens_k": integers(device, 0, 6, 12)}
    keys = random(device, 12, 2, DIM, seed=8)
    dense = {name: random(device, BATCH, 5, HEADS, DIM, seed=9) for name in "qkv"}
    parts = random(device, 3, 7, 4, 16, dtype=torch.float32), random(device, 3, 7, 4, dtype=torch.float32)
    shape = dict(batch_size=2, max_seqlen_q=1, max_seqlen_k=64, num_heads_q=4, num_heads_kv=2, headdim=64)
    return {
        "2 with_kvcache": (flash_rocm.flash_attn_with_kvcache, plain),
        "2 varlen over pages": (flash_rocm.flash_attn_varlen_func, varlen | over_pages | {"block_table": page_table}),
        "3 with_kvcache": (v3.flash_attn_with_kvcache, plain | {"learnable_sink": torch.ones(HEADS, device=device)}),
        "3 with_kvcache, packed": (v3.flash_attn_with_kvcache, pages | packed | new | {"page_table": page_table}),
        "3 attention_chunk": (v3.flash_attn_func, dense | {"attention_chunk": 4}),
        "3 qkvpacked": (v3.flash_attn_qkvpacked_func, {"qkv": torch.stack([*dense.values()], 2), "attention_chunk": 4}),
        "3 seqused_k": (v3.flash_attn_varlen_func, varlen | used | {"k": keys, "v": keys}),
        "combine": (v3.flash_attn_combine, dict(zip(("out_partial", "lse_partial"), parts, strict=True))),
        "metadata": (v3.get_scheduler_metadata, shape | {"cache_seqlens": plain["cache_seqlens"]}),
    }


@pytest.mark.parametrize("name", calls_of_inference("cpu"))
def test_nothing_is_read_on_the_host(name: str, device: str) -> None:
    """Fake tensors have no contents: what asks for some raises.  Shapes, dtypes and strides are the real ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    function, arguments = calls_of_inference(device)[name]

    def metadata(given: dict[str, Any]) -> list[Any]:
        results = function(**given)
        results = results if isinstance(results, tuple) else (results,)
        return [(x.shape, x.dtype, x.stride(), x.device.type) for x in results]

    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        found = metadata(fakes)
    assert found == metadata(arguments)


# --------------------------------------------------------------------------------------------------
# torch.compile


def step(arguments: dict[str, Any], token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a model has it: something before the call, something behind."""
    q, k, v = arguments["q"] * token, arguments["k"] + token, arguments["v"] * 2
    out, lse = flash_rocm.flash_attn_with_kvcache(**{**arguments, "q": q, "k": k, "v": v})
    return out + 1, lse


def generate(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Three steps, each behind the tokens of the last; results of all and the caches."""
    results: list[torch.Tensor] = []
    arguments = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    for number in range(3):
        token = torch.full((1,), 1.0 + number, dtype=torch.float16, device=arguments["q"].device)
        results += [x.clone() for x in function(arguments, token)]
        arguments["cache_seqlens"] = arguments["cache_seqlens"] + 2
    return (*results, arguments["k_cache"], arguments["v_cache"])


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    @pytest.mark.parametrize("compiler", ("aot_eager", best_compiler()))
    @pytest.mark.parametrize("paged", (False, True), ids=["entries", "pages"])
    def test_append_and_attend(self, paged: bool, compiler: str, device: str) -> None:
        """One graph, the results of eager, and its caches."""
        arguments = full_call(device, paged) | {"cache_seqlens": integers(device, 3, 6), "causal": True}
        with torch.inference_mode():
            expected = generate(step, arguments)
            found = generate(torch.compile(step, fullgraph=True, backend=compiler), arguments)
        if compiler == "aot_eager":
            assert_equal(found, expected)
        for x, y in zip(found, expected, strict=True):  # inductor rounds what is before and behind at other places
            torch.testing.assert_close(x, y)
        assert not torch.equal(found[-1], arguments["v_cache"])

    def test_reads_follow_writes(self, device: str) -> None:
        """Two calls over one cache in one graph: the second sees what the first appended."""

        def twice(arguments: dict[str, Any], token: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first = step(arguments, token)
            lengths = arguments["cache_seqlens"] + 2
            second = flash_rocm.flash_attn_with_kvcache(**without_new(arguments) | {"cache_seqlens": lengths})
            return (*first, *second, arguments["k_cache"].sum())

        arguments = full_call(device) | {"cache_seqlens": integers(device, 3, 5)}
        expected = generate(twice, arguments)
        assert_equal(generate(torch.compile(twice, fullgraph=True, backend="aot_eager"), arguments), expected)

    def test_new_lengths_do_not_recompile(self, device: str) -> None:
        """Neither as a tensor nor, from the second on, as a number."""
        from torch._dynamo.testing import CompileCounterWithBackend

        for lengths in ([integers(device, n, n) for n in (1, 4, 7, 9)], [1, 4, 7, 9]):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(flash_rocm.flash_attn_with_kvcache, fullgraph=True, backend=counter)
            counts = []
            for length in lengths:
                arguments = without_new(full_call(device)) | {"cache_seqlens": length}
                assert_equal(compiled(**arguments), run(arguments)[:2])
                counts.append(counter.frame_count)
            assert counts[1] <= 2 and counts[-1] == counts[1]

    def test_no_backward(self, device: str) -> None:
        arguments = full_call(device)
        arguments["q"].requires_grad_()
        compiled = torch.compile(flash_rocm.flash_attn_with_kvcache, backend="aot_eager")
        with pytest.raises(Exception, match="has no backward"):
            compiled(**arguments)[0].sum().backward()


# --------------------------------------------------------------------------------------------------
# CUDA graphs


def decode_call(page_size: int) -> dict[str, Any]:
    """Room for 200 tokens of 3 sequences."""
    pages = -(-200 // page_size)
    shape = (3 * pages, page_size) if page_size < 200 else (3, 200)
    arguments = dict(
        q=random("cuda", 3, 1, 8, 64, seed=1),
        k_cache=random("cuda", *shape, 2, 64, seed=2),
        v_cache=random("cuda", *shape, 2, 64, seed=3),
        k=random("cuda", 3, 1, 2, 64, seed=4),
        v=random("cuda", 3, 1, 2, 64, seed=5),
        cache_seqlens=integers("cuda", 5, 90, 120),
        return_softmax_lse=True,
    )
    if page_size < 200:
        order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(6))
        arguments["block_table"] = order.view(3, pages).int().cuda()
    return arguments


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("page_size", (200, 64, 16, 3))
@pytest.mark.parametrize("function", (flash_rocm.flash_attn_with_kvcache, v3.flash_attn_with_kvcache), ids=("v2", "v3"))
def test_graph_follows_lengths_and_pages(function: Callable[..., Any], page_size: int) -> None:
    """Captured once; then lengths, pages and tokens change in place."""
    arguments, table = decode_call(page_size), "block_table"
    if function is v3.flash_attn_with_kvcache and table in arguments:
        arguments["page_table"], table = arguments.pop(table), "page_table"
    function(**arguments)  # compiles
    eager = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = function(**arguments)
    for number, lengths in enumerate([(5, 90, 120), (6, 91, 0), (199, 0, 64), (63, 64, 65)]):
        changes = {"cache_seqlens": integers("cuda", *lengths)}
        for seed, name in enumerate(("q", "k", "v")):
            changes[name] = random("cuda", *arguments[name].shape, seed=10 * number + seed)
        if table in arguments:
            changes[table] = arguments[table].roll(number, 1)
        for name, x in changes.items():
            arguments[name].copy_(x)
            eager[name].copy_(x)
        graph.replay()
        expected = function(**eager)
        assert_equal(
            (out, lse, arguments["k_cache"], arguments["v_cache"]), (*expected, eager["k_cache"], eager["v_cache"])
        )


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("page_size", (200, 16))
def test_nothing_waits_for_the_gpu(page_size: int) -> None:
    arguments = decode_call(page_size)
    flash_rocm.flash_attn_with_kvcache(**arguments)  # compiles
    partial = random("cuda", 3, 7, 4, 16, dtype=torch.float32), random("cuda", 3, 7, 4, dtype=torch.float32)
    flash_rocm.flash_attn_combine(*partial)
    number = {n: x for n, x in arguments.items()} | {"cache_seqlens": 17}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_rocm.flash_attn_with_kvcache(**arguments)
        flash_rocm.flash_attn_with_kvcache(**number)
        flash_rocm.flash_attn_combine(*partial)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", calls_of_inference("cpu"))
def test_no_function_waits_for_the_gpu(name: str) -> None:
    function, arguments = calls_of_inference("cuda")[name]
    function(**arguments)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_call_counts(device: str) -> None:
    """What is remembered between calls keeps no tensor: other lengths and caches of the same shapes are read."""
    first, second = full_call(device), full_call(device)
    second["k_cache"] = random(device, *second["k_cache"].shape, seed=77)
    second["q"] = random(device, BATCH, 3, HEADS, DIM, seed=78)
    alone = run(second)
    run(first)
    assert_equal(tuple(run(second)), tuple(alone))
