"""MHA, perceptrons, blocks and embeddings against the same written out in plain torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from calls import starts
from test_adversarial import random, same
from torch.nn import functional

from flash_rocm.layers.norm import RMSNorm
from flash_rocm.layers.rotary import apply_rotary_emb_torch
from flash_rocm.modules import block, embedding, mha, mlp
from flash_rocm.modules.inference import InferenceParams

DIM, HEADS, BATCH, SEQLEN = 48, 6, 2, 11
DOUBLE = torch.float64


def x_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return random("cpu", *(shape or (BATCH, SEQLEN, DIM)), dtype=DOUBLE, seed=seed)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # tables of the rotary embedding are float32


def rotary_table(dim: int, seqlen: int, base: float, scale_base: float | None = None) -> list[torch.Tensor]:
    index, position = torch.arange(0, dim, 2).double(), torch.arange(seqlen).double()
    angle = torch.outer(position, base ** (-index / dim))
    if scale_base is None:
        return [angle.cos(), angle.sin()] * 2
    scale = ((index + 0.4 * dim) / (1.4 * dim)) ** ((position - seqlen // 2) / scale_base)[:, None]
    return [angle.cos() * scale, angle.sin() * scale, angle.cos() / scale, angle.sin() / scale]


def oracle(
    layer: mha.MHA, x: torch.Tensor, x_kv: torch.Tensor | None = None, keep: torch.Tensor | None = None, **o: Any
) -> torch.Tensor:
    """Score matrices in full."""
    heads, heads_k, dim = layer.num_heads, layer.num_heads_kv, layer.head_dim
    if layer.cross_attn:
        q = layer.Wq(x).unflatten(-1, (heads, dim))
        k, v = layer.Wkv(x if x_kv is None else x_kv).unflatten(-1, (2, heads_k, dim)).unbind(2)
    else:
        q, k, v = layer.Wqkv(x).unflatten(-1, (-1, dim)).split((heads, heads_k, heads_k), 2)
    if layer.rotary_emb_dim:
        seqlen = x.shape[1]
        table = rotary_table(layer.rotary_emb_dim, seqlen, o.get("base", 10000.0), o.get("scale_base"))
        interleaved = o.get("interleaved", False)
        q, k = (apply_rotary_emb_torch(t, *table[2 * n : 2 * n + 2], interleaved) for n, t in enumerate((q, k)))
    k, v = (t.repeat_interleave(heads // heads_k, 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (layer.softmax_scale or dim**-0.5)
    i, j = torch.arange(scores.shape[2])[:, None] + scores.shape[3] - scores.shape[2], torch.arange(scores.shape[3])
    if "alibi" in o:
        scores = scores - torch.tensor(mha.get_alibi_slopes(heads)).double()[:, None, None] * (i - j).abs()
    left, right = layer.window_size
    hidden = torch.zeros_like(i - j, dtype=torch.bool)
    if layer.causal:
        right = 0
    if left >= 0:
        hidden = hidden | (j < i - left)
    if right >= 0:
        hidden = hidden | (j > i + right)
    scores = scores.masked_fill(hidden, -torch.inf)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(), v)
    return layer.out_proj(out.flatten(2))


def make(**options: Any) -> mha.MHA:
    torch.manual_seed(0)
    return mha.MHA(DIM, HEADS, **{"use_flash_attn": True, **options}, dtype=DOUBLE)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "torch": ({"use_flash_attn": False}, {}),
    "torch-causal": ({"use_flash_attn": False, "causal": True, "num_heads_kv": 2}, {}),
    "causal": ({"causal": True}, {}),
    "gqa": ({"num_heads_kv": 2, "causal": True}, {}),
    "mqa-no-bias": ({"num_heads_kv": 1, "qkv_proj_bias": False, "out_proj_bias": False}, {}),
    "scale": ({"softmax_scale": 0.1}, {}),
    "window": ({"window_size": (3, 1)}, {}),
    "alibi": ({"use_alibi": True, "causal": True}, {"alibi": True}),
    "rotary": ({"rotary_emb_dim": 8, "causal": True, "rotary_emb_base": 100.0}, {"base": 100.0}),
    "rotary-gqa": (
        {"rotary_emb_dim": 4, "num_heads_kv": 3, "rotary_emb_interleaved": True},
        {"interleaved": True},
    ),
    "xpos": ({"rotary_emb_dim": 8, "rotary_emb_scale_base": 64.0, "causal": True}, {"scale_base": 64.0}),
    "checkpointing": ({"checkpointing": True, "causal": True}, {}),
}


@pytest.mark.parametrize(("options", "extra"), CASES.values(), ids=CASES)
def test_mha(options: dict[str, Any], extra: dict[str, Any]) -> None:
    layer, x = make(**options), x_of().requires_grad_()
    expected = oracle(layer, x, **extra)
    out = layer(x)
    close(out, expected)
    wanted = torch.autograd.grad(expected.sin().sum(), [x, *layer.parameters()])
    close(torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()]), wanted)


@pytest.mark.parametrize("name", ["torch-causal", "rotary-gqa", "alibi"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_mha_in_a_graph(name: str) -> None:
    """Without a break, tables of the rotary embedding included."""
    layer, x = make(**CASES[name][0]), x_of()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(compiled(x), layer(x))


def test_parameters_have_the_names_of_checkpoints() -> None:
    names = {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"}
    assert set(make(use_alibi=True, rotary_emb_dim=8).state_dict()) == names
    assert make(num_heads_kv=2).Wqkv.weight.shape == (DIM + 2 * 2 * 8, DIM)
    assert {"Wq.weight", "Wkv.weight", "dwconv_q.weight"} <= set(make(cross_attn=True, dwconv=True).state_dict())


@pytest.mark.parametrize("name", ["causal", "gqa", "alibi", "window", "rotary", "rotary-gqa"])
def test_packed_sequences(name: str) -> None:
    """As each sequence by itself."""
    options, _ = CASES[name]
    layer, lengths = make(**options), (4, 7)
    x = x_of(sum(lengths), DIM)
    out = layer(x, cu_seqlens=starts("cpu", *lengths), max_seqlen=7)
    close(out, torch.cat([layer(part[None])[0] for part in x.split(lengths)]))


def test_cross_attention() -> None:
    layer, x, x_kv = make(cross_attn=True, num_heads_kv=2), x_of(), x_of(BATCH, 5, DIM, seed=1)
    close(layer(x, x_kv), oracle(layer, x, x_kv))
    close(layer(x), oracle(layer, x))
    subset = torch.tensor([3, 1])
    close(layer(x, mixer_subset=subset), oracle(layer, x[:, subset], x))
    packed = {"cu_seqlens": starts("cpu", 11, 11), "max_seqlen": 11, "cu_seqlens_k": starts("cpu", 5, 5)}
    close(layer(x.flatten(0, 1), x_kv.flatten(0, 1), **packed, max_seqlen_k=5), layer(x, x_kv).flatten(0, 1))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_key_padding_mask(causal: bool) -> None:
    layer = make(use_flash_attn=False, causal=causal)
    keep = torch.arange(SEQLEN) < torch.tensor([[SEQLEN], [7]])
    out, x = layer(x_of(), key_padding_mask=keep), x_of()
    close(out[0], oracle(layer, x[:1])[0])
    if not causal:
        close(out, oracle(layer, x, keep=keep))
    qkv = x_of(2, 5, 3, 2, 8)
    keep = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = mha.SelfAttention(causal)(qkv, key_padding_mask=keep)
    alone = mha.FlashSelfAttention(causal)(qkv[1:, :2])
    close(found[1:, :2], alone)
    close(mha.FlashSelfAttention(causal)(qkv), mha.SelfAttention(causal)(qkv))


def test_dropout_of_attention_is_for_training() -> None:
    for flash in (True, False):
        layer, x = make(dropout=0.5, use_flash_attn=flash), x_of()
        assert not torch.equal(layer(x), layer(x))
        close(layer.eval()(x), oracle(layer, x))


def test_convolution() -> None:
    """Causal: a token does not see those behind it."""
    layer, x = make(dwconv=True, causal=True), x_of()
    out = layer(x)
    changed = x.clone()
    changed[:, 6:] += 1
    close(layer(changed)[:, :6], out[:, :6])
    assert not torch.allclose(out, make(causal=True)(x))


@pytest.mark.parametrize("name", ["causal", "gqa", "alibi", "rotary", "rotary-gqa", "window"])
@pytest.mark.parametrize("by_sample", [False, True], ids=["offset", "lengths"])
def test_generation(name: str, by_sample: bool) -> None:
    """A prompt, then token by token, then two at once: as all tokens at once."""
    options, _ = CASES[name]
    layer, x = make(**{**options, "causal": True, "layer_idx": 3}), x_of()
    expected = layer(x)
    params = InferenceParams(max_seqlen=16, max_batch_size=3, batch_size_offset=1)
    if by_sample:
        params.lengths_per_sample = torch.zeros(3, dtype=torch.int32)
    found, at = [], 0
    with torch.no_grad():
        for tokens in (6, 1, 1, 2, 1):
            found.append(layer(x[:, at : at + tokens], inference_params=params))
            at += tokens
            if params.lengths_per_sample is None:
                params.seqlen_offset = at
            else:
                params.lengths_per_sample += tokens
    close(torch.cat(found, 1), expected)
    assert list(params.key_value_memory_dict) == [3] and params.key_value_memory_dict[3].shape == (
        3,
        16,
        2,
        layer.num_heads_kv,
        8,
    )
    params.reset(16, 3)
    assert params.seqlen_offset == 0 and (params.lengths_per_sample is None or not params.lengths_per_sample.any())
    with torch.no_grad():
        close(layer(x, inference_params=params), expected)


def test_residual_is_returned() -> None:
    x = x_of()
    for layer in (make(return_residual=True), mlp.Mlp(DIM, return_residual=True, dtype=DOUBLE)):
        out, residual = layer(x)
        assert residual is x and out.shape == x.shape


def test_alibi_slopes() -> None:
    assert mha.get_alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert mha.get_alibi_slopes(6) == pytest.approx([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])


@pytest.mark.parametrize(
    ("make_it", "error", "words"),
    [
        (lambda: make(fused_bias_fc=True), NotImplementedError, "fused_bias_fc: expected False"),
        (
            lambda: make(use_flash_attn=False, use_alibi=True),
            ValueError,
            "use_flash_attn: expected True with use_alibi",
        ),
        (lambda: make(use_flash_attn=False, window_size=(1, 1)), ValueError, "use_flash_attn: .* window_size"),
        (lambda: mha.MHA(50, 6), ValueError, "num_heads: expected a number that divides embed_dim 50"),
        (lambda: make(num_heads_kv=4), ValueError, "num_heads_kv: expected a number that divides"),
        (lambda: make(cross_attn=True, rotary_emb_dim=8), ValueError, "rotary_emb_dim: expected 0 with cross_attn"),
        (lambda: make()(x_of(4, 7)), ValueError, "x: expected .*embed_dim 48"),
        (lambda: make()(x_of(), x_of()), ValueError, "x_kv: expected None without cross_attn"),
        (lambda: make()(x_of(), mixer_subset=0), ValueError, "mixer_subset: expected None"),
        (lambda: make()(x_of(11, DIM), cu_seqlens=starts("cpu", 11)), ValueError, "max_seqlen: expected a value"),
        (
            lambda: make(use_flash_attn=False)(x_of(11, DIM), cu_seqlens=starts("cpu", 11), max_seqlen=11),
            ValueError,
            "cu_seqlens: expected None without use_flash_attn",
        ),
        (
            lambda: make()(x_of(), key_padding_mask=torch.ones(2, 11).bool()),
            ValueError,
            "key_padding_mask: expected None with use_flash_attn",
        ),
        (
            lambda: make(use_flash_attn=False)(x_of(), key_padding_mask=torch.ones(2, 4).bool()),
            ValueError,
            r"key_padding_mask: expected bool \(2, 11\)",
        ),
        (lambda: make()(x_of(), inference_params=InferenceParams(8, 2)), ValueError, "layer_idx: expected an int"),
        (
            lambda: make(layer_idx=0)(x_of(), inference_params=InferenceParams(16, 1)),
            ValueError,
            "inference_params: expected room for a batch of 2",
        ),
        (
            lambda: make(layer_idx=0, dwconv=True)(x_of(), inference_params=InferenceParams(16, 2)),
            ValueError,
            "inference_params: expected None with cross_attn, dwconv",
        ),
        (lambda: mha.ParallelMHA(DIM, HEADS, None), NotImplementedError, "ParallelMHA: layers divided among processes"),
        (lambda: mlp.ParallelMLP(DIM), NotImplementedError, "ParallelMLP"),
        (lambda: block.ParallelBlock(DIM), NotImplementedError, "ParallelBlock: mixer and perceptron side by side"),
        (lambda: embedding.VocabParallelEmbedding(9, 8), NotImplementedError, "VocabParallelEmbedding"),
        (
            lambda: block.Block(DIM, residual_in_fp32=True, prenorm=False),
            ValueError,
            "residual_in_fp32: expected False",
        ),
        (lambda: block.Block(DIM, return_residual=True), ValueError, "return_residual: expected False with prenorm"),
        (
            lambda: block.Block(DIM, norm_cls=lambda n: torch.nn.BatchNorm1d(n), fused_dropout_add_ln=True),
            ValueError,
            "norm_cls: expected torch.nn.LayerNorm or RMSNorm",
        ),
        (lambda: block.StochasticDepth(1.5), ValueError, "p: expected a probability"),
    ],
)
def test_errors(make_it: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_it()


def test_mlp() -> None:
    x = x_of()
    plain = mlp.Mlp(DIM, activation=torch.relu, bias1=False, dtype=DOUBLE)
    assert plain.fc1.weight.shape == (4 * DIM, DIM) and plain.fc1.bias is None
    close(plain(x), plain.fc2(torch.relu(plain.fc1(x))))
    assert mlp.Mlp(DIM, 20, 7, bias2=False, dtype=DOUBLE)(x).shape == (BATCH, SEQLEN, 7)
    for activation in (functional.sigmoid, functional.silu, functional.gelu):
        gated = mlp.GatedMlp(DIM, activation=activation, multiple_of=100, dtype=DOUBLE)
        assert gated.fc1.weight.shape == (400, DIM)  # 8/3 * 48 = 128, up to 200, twice
        y, gate = gated.fc1(x).chunk(2, -1)
        close(gated(x), gated.fc2(y * activation(gate)))
    assert mlp.GatedMlp(DIM, 64, 5, multiple_of=64, dtype=DOUBLE)(x).shape == (BATCH, SEQLEN, 5)


def make_block(**options: Any) -> block.Block:
    torch.manual_seed(0)
    parts = {
        "mixer_cls": functools.partial(mha.MHA, num_heads=HEADS, causal=True, use_flash_attn=True),
        "mlp_cls": functools.partial(mlp.Mlp, hidden_features=64),
    }
    return block.Block(DIM, **{**parts, **options}).double()


@pytest.mark.parametrize("norm_cls", [torch.nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_block(fused: bool, norm_cls: Any) -> None:
    layer, x, residual = make_block(fused_dropout_add_ln=fused, norm_cls=norm_cls), x_of(), x_of(seed=1)
    for before in (None, residual):
        total = x if before is None else x + before
        mixed = layer.mixer(layer.norm1(total))
        total = total + mixed
        hidden, stream = layer(x, before)
        close(stream, total)
        close(hidden, layer.mlp(layer.norm2(total)))
    after = make_block(fused_dropout_add_ln=fused, norm_cls=norm_cls, prenorm=False)
    hidden = after.norm1(after.mixer(x) + x)
    close(after(x), after.norm2(after.mlp(hidden) + hidden))


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_block_options(fused: bool) -> None:
    x = x_of()
    alone = make_block(mlp_cls=torch.nn.Identity, fused_dropout_add_ln=fused)
    assert not hasattr(alone, "norm2")
    close(alone(x)[0], alone.mixer(alone.norm1(x)))
    wide = make_block(residual_in_fp32=True, fused_dropout_add_ln=fused).to(torch.bfloat16)
    hidden, stream = wide(x.to(torch.bfloat16))
    assert hidden.dtype == torch.bfloat16 and stream.dtype == torch.float32
    marked = make_block(sequence_parallel=True, mark_shared_params=True)
    assert all(p._sequence_parallel and p._shared_params for n in (marked.norm1, marked.norm2) for p in n.parameters())
    assert not any(hasattr(p, "_shared_params") for p in marked.mixer.parameters())
    stems = {
        "mixer_cls": functools.partial(mha.MHA, num_heads=HEADS, use_flash_attn=True, return_residual=True),
        "mlp_cls": functools.partial(mlp.Mlp, return_residual=True),
    }
    returning = make_block(**stems, prenorm=False, return_residual=True, fused_dropout_add_ln=fused)
    close(returning(x), (r := returning).norm2(r.mlp(h := r.norm1(r.mixer(x)[0] + x))[0] + h))
    cross = make_block(
        mixer_cls=functools.partial(mha.MHA, num_heads=HEADS, cross_attn=True, use_flash_attn=True),
        fused_dropout_add_ln=fused,
    )
    subset = torch.tensor([0, 4])
    hidden, stream = cross(x, mixer_subset=subset)
    close(stream, x[:, subset] + cross.mixer(cross.norm1(x), mixer_subset=subset))
    assert hidden.shape == (BATCH, 2, DIM)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_block_drops_while_training(fused: bool) -> None:
    x, residual = x_of(), x_of(seed=1)
    for name in ("resid_dropout1", "resid_dropout2", "drop_path1", "drop_path2"):
        layer = make_block(**{name: 0.5}, fused_dropout_add_ln=fused)
        torch.manual_seed(1)
        found = [layer(x, residual) for _ in range(4)]
        assert not all(torch.equal(found[0][0], other) for other, _ in found[1:]), name
        close(layer.eval()(x, residual), make_block(fused_dropout_add_ln=fused)(x, residual))
    rows = block.StochasticDepth(0.5).train()(torch.ones(400, 3))
    assert set(rows.flatten().tolist()) == {0.0, 2.0} and same(rows[:, 0], rows[:, 2])
    assert not block.StochasticDepth(1.0)(torch.ones(4, 3)).any()


def test_block_default_parts_and_cache() -> None:
    layer = block.Block(128)
    assert layer.mixer.num_heads == 2 and layer.mlp.fc1.weight.shape == (512, 128)
    assert layer.allocate_inference_cache(3, 16, torch.float16).shape == (3, 16, 2, 2, 64)
    first, second = make_block(), x_of()
    close(first(second, mixer_kwargs={"cu_seqlens": None})[0], first(second)[0])


def test_embeddings() -> None:
    ids, positions = torch.tensor([[1, 2, 0], [3, 3, 1]]), torch.tensor([[2, 0, 1]])
    words = embedding.GPT2Embeddings(8, 5, 4, padding_idx=0)
    table, places = words.word_embeddings.weight, words.position_embeddings.weight
    close(words(ids), table[ids] + places[:3])
    close(words(ids, positions), table[ids] + places[positions])
    assert not words.word_embeddings.weight[0].any()
    projected = embedding.GPT2Embeddings(8, 5, 0, word_embed_proj_dim=3)
    assert projected.project_in is not None and not hasattr(projected, "position_embeddings")
    close(projected(ids), projected.project_in(projected.word_embeddings.weight[ids]))
    bert = embedding.BertEmbeddings(8, 5, 4, 2)
    parts = (bert.word_embeddings.weight, bert.position_embeddings.weight, bert.token_type_embeddings.weight)
    close(bert(ids), parts[0][ids] + parts[1][:3] + parts[2][0])
    close(bert(ids, positions, ids.clamp(max=1)), parts[0][ids] + parts[1][positions] + parts[2][ids.clamp(max=1)])
    assert set(embedding.BertEmbeddings(8, 5, 0, 0).state_dict()) == {"word_embeddings.weight"}
