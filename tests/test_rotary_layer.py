"""The rotary layer on every target, against float64 in plain torch; its errors; what it changes in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adversarial import device as on_every_target
from test_adversarial import random, same

from flash_rocm.layers import rotary
from flash_rocm.testing import assert_close_to_oracle

device = on_every_target
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLE = 29


def table(device: str, half: int, dtype: torch.dtype, rows: int = TABLE) -> tuple[torch.Tensor, torch.Tensor]:
    angle = 3 * random("cpu", rows, half, dtype=torch.float32, seed=9)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def oracle(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, positions: torch.Tensor
) -> torch.Tensor:
    """One rotation matrix for each position and pair of dims; x (..., heads, dims), positions (...)."""
    half, out = cos.shape[1], x.clone()
    first = torch.arange(half, device=x.device)
    pairs = (2 * first, 2 * first + 1) if interleaved else (first, first + half)
    c, s = cos.to(x.dtype)[positions][..., None, :], sin.to(x.dtype)[positions][..., None, :]
    a, b = x[..., pairs[0]], x[..., pairs[1]]
    out[..., pairs[0]], out[..., pairs[1]] = a * c - b * s, a * s + b * c
    return out


def check(
    run: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, positions: torch.Tensor
) -> None:
    """Result and gradient against float64."""
    leaf = x.clone().requires_grad_()
    out = run(leaf)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(x.device, x.dtype)
    (dx,) = torch.autograd.grad(out, leaf, dout)
    found = []
    for dtype in (torch.float64, x.dtype):
        leaf = x.to(dtype).requires_grad_()
        wanted = oracle(leaf, cos, sin, interleaved, positions)
        found.append((wanted, *torch.autograd.grad(wanted, leaf, dout.to(dtype))))
    (exact, exact_dx), (plain, plain_dx) = found
    assert_close_to_oracle(out, exact, plain)
    assert_close_to_oracle(dx, exact_dx, plain_dx, "gradient", "dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize(("headdim", "half"), [(64, 32), (40, 10), (6, 3)])
@pytest.mark.parametrize("offset", [0, 4, "tensor"])
def test_dense(offset: int | str, headdim: int, half: int, interleaved: bool, dtype: torch.dtype, device: str) -> None:
    x = random(device, 2, 19, 5, headdim, dtype=dtype)
    cos, sin = table(device, half, dtype)
    offsets: Any = torch.tensor([7, 2], device=device) if offset == "tensor" else offset
    positions = torch.arange(19, device=device) + (offsets[:, None] if offset == "tensor" else offsets)
    positions = positions.expand(2, 19)
    before = x.clone()
    check(
        lambda y: rotary.apply_rotary_emb(y, cos, sin, interleaved, seqlen_offsets=offsets),
        *(x, cos, sin, interleaved, positions),
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
@pytest.mark.parametrize("offset", [3, "tensor"])
def test_varlen(offset: int | str, interleaved: bool, device: str) -> None:
    """An empty sequence, and rows that no sequence owns, which stay what they are."""
    lengths = [5, 0, 17]
    x = random(device, sum(lengths) + 4, 3, 32)
    cos, sin = table(device, 12, torch.float32)  # a table more exact than x
    cu_seqlens = torch.tensor([0, 5, 5, 22], device=device, dtype=torch.int32)
    offsets: Any = torch.tensor([1, 9, 6], device=device, dtype=torch.int32) if offset == "tensor" else offset
    first = offsets.tolist() if offset == "tensor" else [offsets] * 3
    rows = [torch.arange(n) + start for n, start in zip(lengths, first, strict=True)]
    positions = torch.cat([*rows, torch.full((4,), TABLE)]).to(device)
    padded = [torch.cat((t, torch.full_like(t[:1], value))) for t, value in ((cos, 1.0), (sin, 0.0))]

    def run(y: torch.Tensor) -> torch.Tensor:
        return rotary.apply_rotary_emb(
            y, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=17
        )

    check(run, x, *padded, interleaved, positions)
    assert torch.equal(run(x)[-4:], x[-4:])


def test_positions_that_the_table_does_not_have(device: str) -> None:
    x = random(device, 2, 8, 2, 16)
    cos, sin = table(device, 8, torch.float16, rows=10)
    out = rotary.apply_rotary(x, cos, sin, torch.tensor([6, -3], device=device))
    assert torch.equal(out[0, 4:], x[0, 4:]) and not torch.equal(out[0, :4], x[0, :4])
    assert torch.equal(out[1, :3], x[1, :3]) and torch.equal(out[1, 3:], rotary.apply_rotary(x[1:, 3:], cos, sin)[0])


def test_conjugate_turns_back(device: str) -> None:
    x = random(device, 2, 19, 5, 32, dtype=torch.float32)
    cos, sin = table(device, 16, torch.float32)
    back = rotary.apply_rotary(rotary.apply_rotary(x, cos, sin), cos, sin, conjugate=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
def test_in_place(interleaved: bool, device: str) -> None:
    """A view of more, whose other elements stay; a leaf that needs a gradient; autograd is told of the change."""
    more = random(device, 2, 19, 5, 48)
    x, before = more[:, 1:, 1:4, 4:36], more.clone()
    cos, sin = table(device, 8, torch.float16)
    wanted = rotary.apply_rotary_emb(x, cos, sin, interleaved)
    version = more._version
    assert rotary.apply_rotary(x, cos, sin, interleaved=interleaved, inplace=True) is x
    assert torch.equal(x, wanted) and more._version > version
    more[:, 1:, 1:4, 4:36] = before[:, 1:, 1:4, 4:36]
    assert torch.equal(more, before)
    leaf = before.requires_grad_()
    out = rotary.apply_rotary_emb(leaf, cos, sin, interleaved, inplace=True)
    assert out.data_ptr() == leaf.data_ptr()
    out.sum().backward()
    other = torch.ones_like(leaf)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, rotary.apply_rotary(other, cos, sin, interleaved=interleaved, conjugate=True))


@pytest.mark.parametrize("xpos", [False, True], ids=["", "xpos"])
@pytest.mark.parametrize("kind", ["packed", "gqa", "strided", "kv"])
def test_packed(kind: str, xpos: bool, device: str) -> None:
    """q and k are turned, each by its table, v is not; the incoming gradient is not changed."""
    if kind == "kv" and xpos:
        pytest.skip("kv has one table")
    heads = {"packed": (3, 4), "strided": (3, 4), "gqa": (4 + 2 * 2,), "kv": (2, 4)}[kind]
    packed = random(device, 2, 11, *heads, 20)
    if kind == "strided":
        packed = random(device, 2, 11, 3, 8, 20)[:, :, :, :4]
    cos, sin = table(device, 6, torch.float16)
    cos_k, sin_k = (0.5 * cos, 0.5 * sin) if xpos else (None, None)
    parts = packed.split((4, 2, 2), 2) if kind == "gqa" else packed.unbind(2)
    if kind == "kv":
        wanted = [rotary.apply_rotary(parts[0], cos, sin, 3), parts[1]]
    else:
        tables = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        wanted = [rotary.apply_rotary(parts[0], cos, sin, 3), rotary.apply_rotary(parts[1], *tables, 3), parts[2]]
    expected = torch.cat(wanted, 2) if kind == "gqa" else torch.stack(wanted, 2)
    leaf = packed.detach().clone() if kind != "strided" else packed.detach()
    leaf.requires_grad_()
    if kind == "kv":
        out = rotary.apply_rotary_emb_kv_(leaf, cos, sin, seqlen_offsets=3)
    else:
        num_heads_q = 4 if kind == "gqa" else None
        out = rotary.apply_rotary_emb_qkv_(leaf, cos, sin, cos_k, sin_k, seqlen_offsets=3, num_heads_q=num_heads_q)
    assert out.data_ptr() == leaf.data_ptr() and torch.equal(out, expected)
    dout = random(device, *out.shape, seed=3)
    kept = dout.clone()
    (gradient,) = torch.autograd.grad(out, leaf, dout)
    assert torch.equal(dout, kept)
    # A turn is linear and orthogonal but for the scale: turning the gradient back.
    options = {"conjugate": True}
    parts = dout.split((4, 2, 2), 2) if kind == "gqa" else dout.unbind(2)
    back = [rotary.apply_rotary(parts[0], cos, sin, 3, **options), *parts[1:]]
    if kind != "kv":
        back[1] = rotary.apply_rotary(parts[1], *tables, 3, **options)
    assert torch.equal(gradient, torch.cat(back, 2) if kind == "gqa" else torch.stack(back, 2))


def test_module(device: str) -> None:
    """Tables grow, follow dtype and device, and hold what the formula says."""
    layer = rotary.RotaryEmbedding(8, base=100.0, device=device)
    qkv = random(device, 2, 5, 3, 2, 16)
    angle = torch.outer(torch.arange(9, dtype=torch.float64), 100.0 ** (-torch.arange(4, dtype=torch.float64) / 4))
    cos, sin = (t.to(device, torch.float16) for t in (angle.cos(), angle.sin()))
    for offset in (0, 4):
        expected = rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin, seqlen_offsets=offset)
        assert torch.equal(layer(qkv.clone(), seqlen_offset=offset), expected)
    offsets = torch.tensor([1, 3], device=device)
    expected = rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin, seqlen_offsets=offsets)
    assert torch.equal(layer(qkv.clone(), seqlen_offset=offsets, max_seqlen=9), expected)
    q, kv = layer(qkv[:, :, 0], qkv[:, :, 1:].clone())
    expected = rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin)
    assert torch.equal(q, expected[:, :, 0]) and torch.equal(kv, expected[:, :, 1:])
    assert layer(random(device, 1, 20, 3, 2, 16, dtype=torch.float32)).dtype == torch.float32
    assert not layer.state_dict()


def test_module_with_xpos(device: str) -> None:
    """The scale of q and that of k cancel where both are at one position."""
    layer = rotary.RotaryEmbedding(8, scale_base=32.0, device=device)
    plain = rotary.RotaryEmbedding(8, device=device)
    qkv = random(device, 1, 5, 3, 2, 8, dtype=torch.float32)
    scaled, unscaled = layer(qkv.clone()), plain(qkv.clone())
    assert not torch.allclose(scaled[:, :, 0], unscaled[:, :, 0])
    products = [(x[:, :, 0] * x[:, :, 1]).sum(-1) for x in (scaled, unscaled)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-5)


def test_module_made_in_inference_mode_trains(device: str) -> None:
    layer = rotary.RotaryEmbedding(8, device=device)
    with torch.inference_mode():
        layer(random(device, 1, 5, 3, 2, 8))
    leaf = random(device, 1, 5, 3, 2, 8).requires_grad_()
    layer(leaf).sum().backward()


def bad(**changes: Any) -> dict[str, Any]:
    arguments = {
        "x": random("cpu", 2, 19, 5, 32),
        **dict(zip(("cos", "sin"), table("cpu", 8, torch.float16), strict=True)),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(19, 5, 32)}, "x: expected 4 dims"),
        ({"x": torch.zeros(2, 19, 5, 32, dtype=torch.int32)}, "x: expected float16"),
        ({"x": torch.zeros(2, 19, 5, 12, dtype=torch.float16)}, "cos: expected .* head dim 12"),
        ({"x": [1]}, "x: expected a tensor"),
        ({"cos": torch.zeros(29, 8, dtype=torch.bfloat16)}, "cos: expected the dtype of x"),
        ({"sin": torch.zeros(28, 8, dtype=torch.float16)}, "sin: expected .* like cos"),
        ({"seqlen_offsets": 11}, "cos: expected at least 30 rows, got 29"),
        ({"seqlen_offsets": -1}, "seqlen_offsets: expected an int in"),
        ({"seqlen_offsets": torch.zeros(3, dtype=torch.int32)}, r"seqlen_offsets: expected shape \(2,\)"),
        ({"seqlen_offsets": torch.zeros(2)}, "seqlen_offsets: expected an int, or int32"),
        ({"max_seqlen": 5}, "max_seqlen: expected at least x's seqlen 19"),
        ({"x": torch.zeros(9, 2, 32), "cu_seqlens": torch.zeros(3, dtype=torch.int32)}, "cos: expected the dtype"),
    ],
)
def test_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rotary.apply_rotary_emb(**bad(**changes))


def test_more_errors() -> None:
    arguments = bad()
    with pytest.raises(ValueError, match="max_seqlen: expected an int with cu_seqlens"):
        rotary.apply_rotary(**bad(x=random("cpu", 9, 2, 32), cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)))
    with pytest.raises(NotImplementedError, match="cos: expected no gradient"):
        rotary.apply_rotary(**bad(cos=arguments["cos"].requires_grad_()))
    with pytest.raises(ValueError, match="stride 1 in the last dim"):
        rotary.apply_rotary(**bad(x=random("cpu", 2, 19, 32, 5).transpose(2, 3)), inplace=True)
    with pytest.raises(ValueError, match="sin_k: expected a table with cos_k"):
        rotary.apply_rotary_emb_qkv_(
            random("cpu", 2, 9, 3, 2, 32), arguments["cos"].detach(), arguments["sin"], arguments["cos"]
        )
    with pytest.raises(ValueError, match="kv: expected size 2"):
        rotary.apply_rotary_emb_kv_(random("cpu", 2, 9, 3, 2, 32), arguments["cos"], arguments["sin"])
    with pytest.raises(ValueError, match="dim: expected an even number"):
        rotary.RotaryEmbedding(7)
    layer = rotary.RotaryEmbedding(8)
    with pytest.raises(ValueError, match="max_seqlen: expected an int if seqlen_offset is a tensor"):
        layer(random("cpu", 2, 9, 3, 2, 32), seqlen_offset=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="num_heads_q: expected None with kv"):
        layer(random("cpu", 2, 9, 2, 32), random("cpu", 2, 9, 2, 2, 32), num_heads_q=2)


def test_empty(device: str) -> None:
    cos, sin = table(device, 8, torch.float16)
    for shape in ((0, 4, 2, 16), (2, 0, 2, 16), (2, 4, 0, 16)):
        assert same(rotary.apply_rotary_emb(random(device, *shape), cos, sin), random(device, *shape))
