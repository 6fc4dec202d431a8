"""Inputs that break kernels: nothing there, strange strides, extreme numbers, NaN where nobody looks.

The same tests on every target: ``cpu`` (reference), ``interpret`` (Triton kernels under its interpreter)
and ``cuda`` (Triton).  Results are held against the float64 oracle unless a test says what else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

import flash_rocm
from flash_rocm.arch import amd_arch
from flash_rocm.problem import AttentionInputs, lse_shape
from flash_rocm.testing import Case, assert_attention_close

TARGETS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("interpret", id="interpret", marks=pytest.mark.interpret),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32)


@pytest.fixture(params=TARGETS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a target, with the target's back end chosen."""
    if request.param == "interpret":
        with flash_rocm.use_backend("triton"):
            yield "cpu"
    else:
        yield request.param


def random(device: str, *shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def three(
    device: str, shape_q: tuple[int, ...], shape_k: tuple[int, ...], dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(random(device, *s, dtype=dtype, seed=i) for i, s in enumerate((shape_q, shape_k, shape_k)))  # type: ignore[return-value]


def starts(device: str, *entries: int) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.int32, device=device)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.uint8)


class Result(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    grads: tuple[torch.Tensor, ...]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor | None = None, **options: Any
) -> Result:
    """Forward and backward through the public function; what the caller passed stays as it was, bit for bit."""
    function = flash_rocm.flash_attn_varlen_func if "cu_seqlens_q" in options else flash_rocm.flash_attn_func
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    if dout is None:
        dout = random(str(q.device), *q.shape[:-1], v.shape[-1], dtype=q.dtype, seed=9)
    given = [q, k, v, dout, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    before = [bits(x).clone() for x in given]
    out, lse, _ = function(*leaves, **options, return_attn_probs=True)
    grads = torch.autograd.grad(out, leaves, dout)
    for x, copy in zip(given, before, strict=True):
        assert torch.equal(bits(x), copy), "an input was modified"
    return Result(out.detach(), lse.detach(), grads)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Result:
    """:func:`attend`, compared with the oracle."""
    result = attend(q, k, v, **options)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    problem = flash_rocm.explain(*leaves, **options).problem
    others = (options.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "alibi_slopes"))
    dout = random(str(q.device), *q.shape[:-1], v.shape[-1], dtype=q.dtype, seed=9)
    dlse = torch.zeros(lse_shape(q), device=q.device)
    case = Case(AttentionInputs(q, k, v, *others), dout, dlse)
    assert_attention_close(problem, case, result.out, result.lse, result.grads)
    return result


def assert_same(actual: Result, expected: Result) -> None:
    for x, y in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0)


# --------------------------------------------------------------------------------------------------
# Nothing there


@pytest.mark.parametrize(
    ("batch", "length_q", "length_k"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0), (0, 0, 0)], ids=str
)
def test_empty_dense(batch: int, length_q: int, length_k: int, device: str) -> None:
    q, k, v = three(device, (batch, length_q, 4, 16), (batch, length_k, 2, 16))
    result = check(q, k, v[..., :8], causal=True)
    assert result.out.shape == (batch, length_q, 4, 8) and not result.out.any()
    assert result.lse.shape == (batch, 4, length_q) and (result.lse == -math.inf).all()
    assert not any(x.any() for x in result.grads)
    probs = flash_rocm.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)[2]
    assert probs.shape == (batch, 4, length_q, length_k)


@pytest.mark.parametrize(
    ("entries_q", "entries_k"),
    [
        ((0,), (0,)),
        ((0, 0), (0, 0)),
        ((0, 0, 5, 5, 9), (0, 3, 3, 3, 10)),
        ((0, 4, 9, 9), (0, 0, 0, 10)),
        ((0, 0, 9), (0, 10, 10)),
        ((0, 9), (0, 0)),
    ],
    ids=str,
)
def test_empty_varlen_entries(entries_q: tuple[int, ...], entries_k: tuple[int, ...], device: str) -> None:
    q, k, v = three(device, (entries_q[-1], 4, 16), (entries_k[-1], 2, 16))
    result = check(
        *(q, k, v), cu_seqlens_q=starts(device, *entries_q), cu_seqlens_k=starts(device, *entries_k),
        max_seqlen_q=9, max_seqlen_k=10, window_size=(4, 2),
    )  # fmt: skip
    assert result.lse.shape == (4, entries_q[-1])


@pytest.mark.parametrize("causal", (False, True))
def test_rows_of_no_sequence(causal: bool, device: str) -> None:
    """cu_seqlens that start behind 0 and end before the total: rows outside give 0, -inf and no gradient."""
    q, k, v = three(device, (50, 4, 16), (60, 2, 16))
    inside_q, inside_k = slice(3, 44), slice(5, 52)
    for x, inside in ((q, inside_q), (k, inside_k), (v, inside_k)):
        x[: inside.start] = math.nan
        x[inside.stop :] = math.nan
    options: dict[str, Any] = dict(max_seqlen_q=40, max_seqlen_k=45, causal=causal)
    options.update(cu_seqlens_q=starts(device, 3, 4, 44), cu_seqlens_k=starts(device, 5, 50, 52))
    dout = random(device, 50, 4, 16, seed=9)
    dout[:3] = dout[44:] = math.nan
    result = attend(q, k, v, dout, **options)
    for x, inside in zip((result.out, *result.grads), (inside_q, inside_q, inside_k, inside_k), strict=True):
        assert not x[: inside.start].any() and not x[inside.stop :].any()
        assert x[inside].isfinite().all()
    assert (result.lse[:, :3] == -math.inf).all() and (result.lse[:, 44:] == -math.inf).all()
    # The same sequences without anything around them.
    options.update(cu_seqlens_q=starts(device, 0, 1, 41), cu_seqlens_k=starts(device, 0, 45, 47))
    alone = attend(q[inside_q], k[inside_k], v[inside_k], dout[inside_q], **options)
    check(q[inside_q], k[inside_k], v[inside_k], **options)
    insides = (inside_q, inside_k, inside_k)
    grads = tuple(x[inside] for x, inside in zip(result.grads, insides, strict=True))
    assert_same(Result(result.out[inside_q], result.lse[:, inside_q], grads), alone)


def test_generous_max_seqlen(device: str) -> None:
    """Longer than any sequence, as a captured graph needs it: the same result."""
    q, k, v = three(device, (45, 2, 16), (50, 2, 16))
    options: dict[str, Any] = dict(cu_seqlens_q=starts(device, 0, 5, 45), cu_seqlens_k=starts(device, 0, 37, 50))
    exact = attend(q, k, v, **options, max_seqlen_q=40, max_seqlen_k=37, causal=True)
    assert_same(attend(q, k, v, **options, max_seqlen_q=200, max_seqlen_k=1000, causal=True), exact)


@pytest.mark.parametrize("headdim", (1, 3, 17))
@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (2, 33)], ids=str)
def test_smallest(lengths: tuple[int, int], headdim: int, device: str) -> None:
    # With a handful of elements the error of the plain computation may be next to nothing, and no yardstick.
    q, k, v = three(device, (1, lengths[0], 6, headdim), (1, lengths[1], 3, headdim))
    check(q, k, v)
    check(q, k, v, causal=True)


def test_head_dim_1_with_another_stride(device: str) -> None:
    """With one element there is no step to the next."""
    q, k, v = (x[..., :1] for x in three(device, (2, 20, 2, 4), (2, 30, 2, 4)))
    check(q, k, v)
    q, k, v = (x[..., None] for x in (random(device, 4, 2, 20, seed=i).permute(1, 2, 0) for i in range(3)))
    check(q, k, v)


# --------------------------------------------------------------------------------------------------
# Strides


def _same(device: str) -> tuple[torch.Tensor, ...]:
    x = random(device, 2, 33, 2, 16)
    return x, x, x


def _overlapping(device: str) -> tuple[torch.Tensor, ...]:
    base = random(device, 800)
    return (
        base.as_strided((2, 40, 2, 16), (5, 3, 7, 1), 1),
        base.as_strided((2, 33, 2, 16), (11, 2, 1, 1), 3),
        base.as_strided((2, 33, 2, 16), (0, 17, 4, 1), 2),
    )


def _one_buffer(device: str) -> tuple[torch.Tensor, ...]:
    buffer = random(device, 2, 5, 33, 2, 3, 24)  # heads, ..., positions, batch, parts
    parts = buffer[:, 2].permute(2, 1, 0, 3, 4)
    return tuple(parts[..., i, 4:20] for i in range(3))


STRIDES: dict[str, Callable[[str], tuple[torch.Tensor, ...]]] = {
    "one batch for all": lambda d: tuple(x.expand(3, -1, -1, -1) for x in three(d, (1, 40, 2, 16), (1, 33, 2, 16))),
    "one kv head for all": lambda d: (
        random(d, 2, 40, 4, 16),
        *(random(d, 2, 33, 1, 16, seed=i).expand(-1, -1, 4, -1) for i in (1, 2)),
    ),
    "one row for all": lambda d: (
        random(d, 2, 1, 2, 16).expand(-1, 40, -1, -1),
        random(d, 2, 33, 2, 16, seed=1),
        random(d, 2, 1, 2, 16, seed=2).expand(-1, 33, -1, -1),
    ),
    "one vector for all": lambda d: tuple(random(d, 16, seed=i).expand(2, 33, 2, 16) for i in range(3)),
    "one tensor": _same,
    "one buffer": _one_buffer,
    "overlapping rows": _overlapping,
    "every third": lambda d: tuple(
        random(d, 5, 99, 6, 40, seed=i)[::3, 1::3, ::3, 3:19] for i in range(3)
    ),
    "off by one": lambda d: tuple(random(d, 2 * 33 * 2 * 16 + 1, seed=i)[1:].view(2, 33, 2, 16) for i in range(3)),
    "mixed": lambda d: (
        random(d, 16 * 2 * 40 * 2 + 3)[3:].view(2, 40, 2, 16).transpose(0, 2),
        random(d, 33, 2, 2, 16, seed=1).transpose(0, 1),
        random(d, 2, 2, 33, 18, seed=2).transpose(1, 2)[..., 1:17],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRIDES)
def test_strides(name: str, device: str) -> None:
    q, k, v = STRIDES[name](device)
    actual = check(q, k, v, causal=True)
    assert actual.out.is_contiguous()
    assert all(x.shape == y.shape for x, y in zip(actual.grads, (q, k, v), strict=True))


@pytest.mark.parametrize("name", [name for name in STRIDES if "batch" not in name])
def test_strides_varlen(name: str, device: str) -> None:
    q, k, v = (x[0] for x in STRIDES[name](device))
    cu_seqlens_q, cu_seqlens_k = starts(device, 0, 13, q.shape[0]), starts(device, 0, 21, k.shape[0])
    lengths: dict[str, Any] = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check(q, k, v, **lengths, max_seqlen_q=40, max_seqlen_k=33)


def test_gradient_reaches_what_was_expanded(device: str) -> None:
    """The gradient of an expanded K is the sum over what was expanded."""
    q, k, v = three(device, (2, 9, 4, 16), (1, 11, 1, 16), torch.float32)
    k.requires_grad_()
    out = flash_rocm.flash_attn_func(q, k.expand(2, -1, 4, -1), v.expand(2, -1, 4, -1))
    (actual,) = torch.autograd.grad(out.sum(), k)

    def of_a_copy(dtype: torch.dtype) -> torch.Tensor:
        copy = k.detach().expand(2, -1, 4, -1).to(dtype, copy=True).requires_grad_()
        with flash_rocm.use_backend("reference" if dtype == torch.float64 else "auto"):
            out = flash_rocm.flash_attn_func(q.to(dtype), copy, v.to(dtype).expand(2, -1, 4, -1))
        return torch.autograd.grad(out.sum(), copy)[0].sum((0, 2), keepdim=True).double()

    expected = of_a_copy(torch.float64)
    plain_error = (of_a_copy(torch.float32) - expected).abs().max()
    rounding = expected.abs().max() * torch.finfo(torch.float32).eps
    assert (actual - expected).abs().max() <= 3 * plain_error + rounding


DOUT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded": lambda x: torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape),
    "expanded rows": lambda x: x[:, :1].expand(x.shape),
    "heads outside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dims outside": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second dim": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "off by one": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("name", DOUT)
def test_layout_of_dout(name: str, device: str) -> None:
    """Any layout of the incoming gradient gives the gradients of a contiguous one."""
    q, k, v = three(device, (1, 40, 2, 16), (1, 20, 2, 16))
    dout = DOUT[name](random(device, 1, 40, 2, 16, seed=9))
    assert_same(attend(q, k, v, dout), attend(q, k, v, dout.contiguous()))


@pytest.mark.gpu
class TestFar:
    """Elements that lie 2^31 and more from the first one.  At most 20 GB."""

    @pytest.fixture(autouse=True)
    def _give_memory_back(self) -> Iterator[None]:
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()

    @pytest.mark.parametrize("causal", (False, True))
    @pytest.mark.parametrize(
        ("batch", "batch_stride", "row_stride"),
        [(2, 1 << 31, 32), (3, 1 << 30, 32), (2, (1 << 31) + 1, 33), (1, 40 << 27, 1 << 27), (1, 0, (1 << 26) + 1)],
        ids=["batch", "third batch", "odd batch", "rows", "odd rows"],
    )
    def test_far_apart(self, batch: int, batch_stride: int, row_stride: int, causal: bool) -> None:
        shapes = ((batch, 40, 2, 16), (batch, 33, 2, 16), (batch, 33, 2, 16), (batch, 40, 2, 16))
        far_rows = row_stride > 1 << 20
        step = 40 if far_rows else 2048  # from one tensor to the next: rows are 32 elements wide
        size = (batch - 1) * batch_stride + 39 * row_stride + 4 * step
        assert size > 1 << 31
        buffer = torch.empty(size, dtype=torch.float16, device="cuda")
        near = [random("cuda", *shape, seed=i) for i, shape in enumerate(shapes)]
        strides = (batch_stride, row_stride, 16, 1)
        views = [buffer.as_strided(shape, strides, i * step) for i, shape in enumerate(shapes)]
        for view, x in zip(views, near, strict=True):
            view.copy_(x)
        for view, x in zip(views, near, strict=True):
            assert torch.equal(view, x), "the views overlap"
        check(*views[:3], causal=causal)
        if not far_rows and batch_stride % 8 == 0:  # the same kernel, only elsewhere
            assert_same(attend(*views, causal=causal), attend(*near, causal=causal))

    def test_more_than_2_31_elements(self) -> None:
        """The last rows of a q, out, dout and dq of 2^31 elements are those of a short call."""
        rows = (1 << 31) // (32 * 64) + 77
        k, v = (random("cuda", 1, 24, 32, 64, seed=i) for i in (1, 2))
        q = torch.randn(1, rows, 32, 64, dtype=torch.float16, device="cuda", requires_grad=True)
        out = flash_rocm.flash_attn_func(q, k, v)
        (dq,) = torch.autograd.grad(out, q, out.detach())
        for part in (slice(0, 64), slice(rows - 100, rows)):
            few = q.detach()[:, part].requires_grad_()
            expected = flash_rocm.flash_attn_func(few, k, v)
            assert torch.equal(out[:, part], expected)
            assert torch.equal(dq[:, part], torch.autograd.grad(expected, few, expected.detach())[0])


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (0.0, -0.0, -0.25, -3.0, 1e-30, 1e4, 1e30, 5.0), ids=str)
def test_scale(scale: float, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.float16:
        scale = min(scale, 100.0)  # beyond, no gradient of q is within the range of float16
    q, k, v = three(device, (1, 40, 2, 16), (1, 35, 1, 16), dtype)
    q = q / max(1.0, scale)
    result = check(q, k, v, softmax_scale=scale, causal=True)
    if scale == 0.0:
        seen = torch.arange(-4, 36, device=device).clamp(0, 35)
        torch.testing.assert_close(result.lse[0, 0], seen.log())


WINDOWS = ((0, 0), (0, 5), (5, 0), (-1, 0), (0, -1), (3, 40), (1 << 40, 0), (0, 1 << 40), (1 << 31, 1 << 31))


@pytest.mark.parametrize("lengths", [(40, 40), (20, 45), (45, 20)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window: tuple[int, int], lengths: tuple[int, int], device: str) -> None:
    q, k, v = three(device, (1, lengths[0], 1, 16), (1, lengths[1], 1, 16))
    result = check(q, k, v, window_size=window)
    equivalent = {(-1, 0): dict(causal=True), (1 << 31, 1 << 31): {}}.get(window)
    if equivalent is not None:
        other = attend(q, k, v, **equivalent)  # type: ignore[arg-type]
        torch.testing.assert_close(result.out, other.out)


def test_causal_takes_precedence_over_the_right_window(device: str) -> None:
    q, k, v = three(device, (1, 40, 2, 16), (1, 40, 2, 16))
    assert_same(attend(q, k, v, causal=True, window_size=(7, 9)), attend(q, k, v, window_size=(7, 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", (1e-3, 0.1, 50.0, 1e4, 1e6), ids=str)
def test_softcap(softcap: float, dtype: torch.dtype, device: str) -> None:
    q, k, v = three(device, (1, 40, 2, 16), (1, 35, 1, 16), dtype)
    if softcap == 1e6 and dtype != torch.float32:
        softcap = 200.0  # no number of float16; and scores of half precision lose 1e-7 of it
    check(q * 4.0, k, v, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 1e4}, {"softmax_scale": -1.0}], ids=str)
def test_large_logits(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Scores of about 1e4, between rows that are nearly one-hot.

    Of about 1e3 in fp16: kernels know the largest probability, which is 1, to |score| * eps(fp32), and
    the plain computation, which knows it exactly, is no yardstick once that shows in 11 bits.
    """
    factor, least = (8.0, 4e2) if dtype == torch.float16 else (25.0, 4e3)
    q, k, v = three(device, (1, 40, 2, 16), (1, 35, 2, 16), dtype)
    result = check(q * factor, k * factor, v, **{"softmax_scale": 1.0, **options})
    largest = float(result.lse[result.lse.isfinite()].abs().max())
    assert least < largest < 3e4


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_equal_large_logits(dtype: torch.dtype, device: str) -> None:
    """All scores are the same large number: the mean of V, however large the number."""
    q, k, v = three(device, (1, 40, 2, 16), (1, 33, 2, 16), dtype)
    q, k = torch.full_like(q, 50.0), torch.full_like(k, -40.0)
    result = check(q, k, v, softmax_scale=1.0)
    assert (result.lse - (math.log(33.0) - 32000.0)).abs().max() <= 4.0 * 32000.0 * torch.finfo(torch.float32).eps


def test_alibi_of_any_sign(device: str) -> None:
    q, k, v = three(device, (2, 33, 3, 16), (2, 20, 3, 16))
    for slopes in ((0.0, -1.0, 30.0), (-0.0, 1e-8, -2.5)):
        check(q, k, v, alibi_slopes=torch.tensor(slopes, device=device))
    per_batch = torch.tensor([[0.5, 0.1, 2.0]], device=device)
    check(q, k, v, alibi_slopes=per_batch.expand(2, 3))
    check(q, k, v, alibi_slopes=torch.stack((per_batch, -per_batch), 1)[0])


# --------------------------------------------------------------------------------------------------
# Rows that see nothing


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf), ids=str)
@pytest.mark.parametrize("spread", (False, True), ids=["one key", "all keys"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"dropout_p": 0.3}, {"softmax_scale": -0.2}], ids=str)
def test_dead_rows_beside_bad_keys(options: dict[str, Any], spread: bool, bad: float, device: str) -> None:
    """40 queries, 25 keys, causal: 15 rows see nothing, in tiles whose other rows see NaN or infinity."""
    q, k, v = three(device, (1, 40, 2, 16), (1, 25, 1, 16))
    where = slice(None) if spread else slice(0, 1)
    k[:, where, :, ::2] = bad
    v[:, where, :, 1::2] = bad
    result = attend(q, k, v, causal=True, **options)
    dead = slice(0, 15)
    assert torch.equal(result.out[:, dead], torch.zeros_like(result.out[:, dead]))
    assert (result.lse[:, :, dead] == -math.inf).all()
    assert torch.equal(result.grads[0][:, dead], torch.zeros_like(result.grads[0][:, dead]))


@pytest.mark.parametrize("varlen", (False, True))
def test_dead_rows_send_no_gradient(varlen: bool, device: str) -> None:
    """Whatever comes back for a row that sees nothing, K and V get what they get without it."""
    q, k, v = three(device, (1, 40, 2, 16), (1, 25, 1, 16))
    options: dict[str, Any] = dict(causal=True)
    quiet = random(device, 1, 40, 2, 16, seed=9)
    quiet[:, :15] = 0.0
    loud = quiet.clone()
    loud[:, :15] = 6e4
    if varlen:
        options.update(cu_seqlens_q=starts(device, 0, 40), cu_seqlens_k=starts(device, 0, 25))
        options.update(max_seqlen_q=40, max_seqlen_k=25)
        q, k, v, quiet, loud = (x[0] for x in (q, k, v, quiet, loud))
    assert_same(attend(q, k, v, loud, **options), attend(q, k, v, quiet, **options))


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_nan_that_is_seen_shows(name: str, causal: bool, device: str) -> None:
    """Loss scaling and anomaly detection rely on it: no NaN turns into a zero."""
    q, k, v = three(device, (1, 40, 2, 16), (1, 40, 2, 16))
    {"q": q, "k": k, "v": v}[name][:] = math.nan
    result = attend(q, k, v, causal=causal)
    assert result.out.isnan().all()
    assert result.lse.isnan().all() or name == "v"
    assert result.grads[0].isnan().all() and result.grads[1].isnan().all()
    assert result.grads[2].isnan().all() or name == "v"


def test_bad_neighbours(device: str) -> None:
    """NaN in one sequence or head stays there."""
    q, k, v = three(device, (70, 2, 16), (60, 2, 16))
    options: dict[str, Any] = dict(cu_seqlens_q=starts(device, 0, 30, 70), cu_seqlens_k=starts(device, 0, 25, 60))
    options.update(max_seqlen_q=40, max_seqlen_k=35)
    clean = check(q, k, v, **options)
    for x, rows in ((q, slice(30, 70)), (k, slice(25, 60)), (v, slice(25, 60))):
        x[rows, 1] = math.nan
    spoiled = attend(q, k, v, **options)
    for x, y, end in zip((spoiled.out, *spoiled.grads), (clean.out, *clean.grads), (30, 30, 25, 25), strict=True):
        assert torch.equal(x[:end], y[:end])
        assert torch.equal(x[:, 0], y[:, 0])
        assert x[end:, 1].isnan().all()


# --------------------------------------------------------------------------------------------------
# Every argument counts

FUNCTIONS = (
    flash_rocm.flash_attn_func,
    flash_rocm.flash_attn_kvpacked_func,
    flash_rocm.flash_attn_qkvpacked_func,
    flash_rocm.flash_attn_varlen_func,
    flash_rocm.flash_attn_varlen_kvpacked_func,
    flash_rocm.flash_attn_varlen_qkvpacked_func,
)
#: Another value for every argument that is no tensor of q, k and v.
OTHER_VALUES: dict[str, Any] = {
    "cu_seqlens_q": (0, 3, 12),
    "cu_seqlens_k": (0, 9, 14),
    "cu_seqlens": (0, 3, 12),
    "max_seqlen_q": 11,
    "max_seqlen_k": 11,
    "max_seqlen": 11,
    "dropout_p": 0.6,
    "softmax_scale": 0.9,
    "causal": True,
    "window_size": (2, 1),
    "softcap": 1.5,
    "alibi_slopes": (0.3, 0.7),
    "learnable_sink": (0.5, 2.0),
    "deterministic": True,
    "return_attn_probs": False,
    "block_table": ((1, 2), (3, 0)),
}


def arguments_of(function: Callable[..., Any], device: str) -> dict[str, Any]:
    """Arguments of a working call, with dropout and S_dmask, so that every result is there."""
    varlen = "varlen" in function.__name__
    rows_q, rows_k = ((12,), (14,)) if varlen else ((2, 6), (2, 7))
    tensors = {
        "q": (*rows_q, 2, 16), "k": (*rows_k, 2, 16), "v": (*rows_k, 2, 16),
        "kv": (*rows_k, 2, 2, 16), "qkv": (*rows_q, 3, 2, 16),
    }  # fmt: skip
    values: dict[str, Any] = {name: random(device, *shape, seed=3) for name, shape in tensors.items()}
    values.update(
        cu_seqlens_q=starts(device, 0, 5, 12), cu_seqlens_k=starts(device, 0, 6, 14),
        cu_seqlens=starts(device, 0, 5, 12), max_seqlen_q=9, max_seqlen_k=9, max_seqlen=9,
        dropout_p=0.3, return_attn_probs=True,
    )  # fmt: skip
    names = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in names}


def other_value(name: str, current: Any, device: str) -> Any:
    if name in ("q", "k", "v", "kv", "qkv"):
        return random(device, *current.shape, seed=4)
    value = OTHER_VALUES[name]
    if name.startswith("cu_seqlens") or name == "block_table":
        return torch.tensor(value, dtype=torch.int32, device=device)
    return torch.tensor(value, device=device) if name in ("alibi_slopes", "learnable_sink") else value


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    results = function(**arguments)
    return results if isinstance(results, tuple) else (results,)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        pytest.param(function, name, id=f"{function.__name__}-{name}")
        for function in FUNCTIONS
        for name in inspect.signature(function).parameters
        if name not in ("deterministic", "block_table")
    ],
)
def test_argument_changes_the_result(function: Callable[..., Any], name: str, device: str) -> None:
    arguments = arguments_of(function, device)
    expected = outcome(function, arguments)
    assert same(outcome(function, arguments), expected)
    changed = {**arguments, name: other_value(name, arguments.get(name), device)}
    assert not same(outcome(function, changed), expected)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_deterministic(function: Callable[..., Any], device: str) -> None:
    """Reruns are bit-equal, backward too."""
    arguments = {**arguments_of(function, device), "deterministic": True}
    leaves = [x for name, x in arguments.items() if name in ("q", "k", "v", "kv", "qkv")]
    for x in leaves:
        x.requires_grad_()
    runs = [outcome(function, arguments) for _ in range(2)]
    runs = [(*results, *torch.autograd.grad(results[0].sum() + results[1].sum(), leaves)) for results in runs]
    assert same(*runs)


def test_block_table(device: str) -> None:
    """Pages are read through the table."""
    arguments = arguments_of(flash_rocm.flash_attn_varlen_func, device) | {"dropout_p": 0.0}
    arguments.update({name: random(device, 4, 4, 2, 16, seed=i) for i, name in enumerate(("k", "v"))})
    arguments.update(cu_seqlens_k=starts(device, 0, 6, 13), max_seqlen_k=7)
    table = torch.tensor(OTHER_VALUES["block_table"], dtype=torch.int32, device=device)
    function = flash_rocm.flash_attn_varlen_func
    assert not same(
        outcome(function, {**arguments, "block_table": table}),
        outcome(function, {**arguments, "block_table": 3 - table}),
    )
    with pytest.raises(NotImplementedError, match="dropout_p: expected 0 with block_table"):
        function(**{**arguments, "block_table": table, "dropout_p": 0.1})


@pytest.mark.parametrize("name", inspect.signature(flash_rocm.explain).parameters)
def test_argument_of_explain_counts(name: str) -> None:
    arguments = arguments_of(flash_rocm.flash_attn_varlen_func, "cpu")
    del arguments["return_attn_probs"]
    expected = flash_rocm.explain(**arguments)
    assert flash_rocm.explain(**arguments) == expected
    changed = dict(arguments)
    if name in ("q", "k", "v"):
        changed[name] = arguments[name].float()
    elif name == "arch":
        changed[name] = amd_arch("gfx942", 304)
    elif name == "block_table":
        changed.update(k=random("cpu", 4, 4, 2, 16), v=random("cpu", 4, 4, 2, 16), dropout_p=0.0)
        changed[name] = other_value(name, None, "cpu")
    elif name.startswith("cu_seqlens"):
        changed[name] = starts("cpu", 0, 5, 7, 12)
    else:
        changed[name] = other_value(name, None, "cpu")
    try:
        assert flash_rocm.explain(**changed) != expected
    except ValueError as error:
        assert "expected" in str(error)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_inputs_stay_as_they_are(function: Callable[..., Any], device: str) -> None:
    """With every feature on, forward and backward, what the caller passed keeps its bits."""
    arguments = arguments_of(function, device)
    for name in ("softmax_scale", "window_size", "softcap", "alibi_slopes"):
        arguments[name] = other_value(name, None, device)
    leaves = [x.requires_grad_() for name, x in arguments.items() if name in ("q", "k", "v", "kv", "qkv")]
    before = {name: bits(x).clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    versions = [x._version for x in leaves]
    out, lse, _ = function(**arguments)
    dout, dlse = random(device, *out.shape, seed=5), torch.randn_like(lse)
    copies = bits(dout).clone(), bits(dlse).clone(), bits(out).clone(), bits(lse).clone()
    torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for name, copy in before.items():
        assert torch.equal(bits(arguments[name]), copy), name
    for x, copy in zip((dout, dlse, out, lse), copies, strict=True):
        assert torch.equal(bits(x), copy)
    assert [x._version for x in leaves] == versions
