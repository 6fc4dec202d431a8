"""The number of splits, ``get_scheduler_metadata``, and ``flash_attn_combine``: every argument acts or raises."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import test_adversarial
import torch
from test_adversarial import random

import flash_rocm
from flash_rocm import v3
from flash_rocm.arch import nvidia_arch
from flash_rocm.splits import choose_splits
from flash_rocm.testing import make_problem, oracle_combine

device = test_adversarial.device  # the fixture with every target

# --------------------------------------------------------------------------------------------------
# get_scheduler_metadata

METADATA_NAMES = [
    *("batch_size", "max_seqlen_q", "max_seqlen_k", "num_heads_q", "num_heads_kv", "headdim", "cache_seqlens"),
    *("qkv_dtype", "headdim_v", "cu_seqlens_q", "cu_seqlens_k_new", "cache_leftpad", "page_size", "max_seqlen_k_new"),
    *("causal", "window_size", "attention_chunk", "has_softcap", "num_splits", "pack_gqa", "sm_margin"),
]
#: Of a call that a large chip divides.
DECODE: dict[str, Any] = dict(batch_size=3, max_seqlen_q=1, max_seqlen_k=8192, num_heads_q=32, num_heads_kv=8)
DECODE |= dict(headdim=128, cache_seqlens=torch.full((3,), 9, dtype=torch.int32))


def splits(**changes: Any) -> int:
    found = v3.get_scheduler_metadata(**DECODE | changes)
    assert found.shape == (1,) and found.dtype == torch.int32
    return int(found)


def test_metadata_signature() -> None:
    assert list(inspect.signature(v3.get_scheduler_metadata).parameters) == METADATA_NAMES


def test_reference_does_not_split() -> None:
    assert splits() == 1 and splits(num_splits=7) == 1


@pytest.fixture
def mi300() -> Iterator[None]:
    pytest.importorskip("triton", reason="asks the Triton back end")
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    with flash_rocm.virtual_gpu("gfx942"):
        yield


#: What changes the number of splits on an MI300: its workgroups, tiles of keys, and which kernel config counts.
ACTS: tuple[dict[str, Any], ...] = (
    dict(batch_size=60, cache_seqlens=torch.zeros(60, dtype=torch.int32)),
    dict(max_seqlen_q=512),
    dict(max_seqlen_k=100),
    dict(num_heads_q=2048),
    dict(num_heads_kv=1),
    dict(num_heads_kv=32),
    dict(window_size=(100, 0)),
    dict(attention_chunk=64),
    dict(num_splits=3),
    dict(headdim=256),
    dict(headdim_v=64),
    dict(qkv_dtype=torch.float32),
)


@pytest.mark.parametrize("change", ACTS, ids=lambda change: next(iter(change)))
def test_metadata_depends_on(change: dict[str, Any], mi300: None) -> None:
    assert splits() > 1
    assert splits(**change) != splits()


#: What a call may have beside it, of which the number of splits does not depend with the configs of an MI300.
ACCEPTED: tuple[dict[str, Any], ...] = (
    dict(cache_leftpad=torch.zeros(3, dtype=torch.int32)),
    dict(cu_seqlens_q=torch.arange(4, dtype=torch.int32)),
    dict(max_seqlen_k_new=1, cu_seqlens_k_new=torch.arange(4, dtype=torch.int32)),
    dict(cu_seqlens_k_new=torch.arange(4, dtype=torch.int32), max_seqlen_k_new=1),
    dict(causal=True),
    dict(has_softcap=True),
    dict(pack_gqa=True),
    dict(sm_margin=8),
    dict(page_size=16),
)


@pytest.mark.parametrize("change", ACCEPTED, ids=lambda change: next(iter(change)))
def test_metadata_accepts(change: dict[str, Any], mi300: None) -> None:
    assert splits(**change) == splits()


def test_every_argument_of_metadata_has_a_test() -> None:
    """A right value of each, which acts or is known not to, and a wrong one."""
    acts, accepted = ([next(iter(change)) for change in some] for some in (ACTS, ACCEPTED))
    assert not set(acts) & set(accepted) and {*acts, *accepted, "cache_seqlens"} == set(METADATA_NAMES)
    assert {next(iter(change)) for change, _ in WRONG_METADATA} == set(METADATA_NAMES)


def test_larger_chips_divide_keys_more() -> None:
    """MI200 has 110 compute units, MI300 304; and a chip that is full of workgroups divides nothing."""
    pytest.importorskip("triton", reason="asks the Triton back end")
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    found = {}
    for arch in ("gfx90a", "gfx942"):
        with flash_rocm.virtual_gpu(arch):
            found[arch] = splits()
    assert 1 < found["gfx90a"] < found["gfx942"]
    # Workgroups, tiles of keys, workgroups at a time.
    assert choose_splits(304, 64, 304) == choose_splits(608, 64, 304) == choose_splits(1, 1, 304) == 1


@pytest.mark.parametrize(
    ("batch", "keys", "page_size", "expected"),
    ((32, 512, 0, 1), (32, 1024, 0, 1), (32, 2048, 0, 1), (8, 2048, 0, 4), (32, 4096, 16, 2), (16, 8192, 16, 4)),
)
def test_enough_warps_read_all_that_memory_gives(batch: int, keys: int, page_size: int, expected: int) -> None:
    """Four warps on a multiprocessor are enough; of a dense cache a workgroup has two, of pages one.

    On an H200 each of the dense ones is the fastest of 1, 2, 3, 4 and 8 parts, as measured.
    """
    pytest.importorskip("triton", reason="asks the Triton back end")
    from flash_rocm._triton import cached, plan

    problem = make_problem(
        batch=batch, seqlen_q=1, seqlen_k=keys, nheads=32, nheads_k=8, headdim=128, dtype=torch.bfloat16,
        device_type="cuda", window_right=0, cached=True, page_size=page_size,
    )  # fmt: skip
    arch = nvidia_arch((9, 0), 132)
    assert cached.num_splits_of(problem, plan.cache_plan(problem, arch, None, False, True), arch) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    (({"headdim": 64}, 3), ({"headdim": 256}, 2), ({"dtype": torch.float32}, 8), ({"headdim": 512}, 7)),
    ids=str,
)
def test_others_fill_the_memory_of_a_multiprocessor(fields: dict[str, Any], expected: int) -> None:
    """How many warps are enough was measured for 16-bit keys at head dim 128 alone."""
    pytest.importorskip("triton", reason="asks the Triton back end")
    from flash_rocm._triton import plan

    shape = dict(batch=1, seqlen_q=1, seqlen_k=32768, nheads=32, nheads_k=8, headdim=128, dtype=torch.bfloat16)
    problem = make_problem(**shape | fields, device_type="cuda", window_right=0, cached=True)
    arch = nvidia_arch((9, 0), 132)
    found = plan.cache_plan(problem, arch, None, False, True)
    assert plan.workgroups_per_cu(found, problem.dtype.itemsize, arch) == expected


#: What is wrong, and how the text begins.
WRONG_METADATA: tuple[tuple[dict[str, Any], str], ...] = (
    (dict(batch_size=0), "batch_size: expected an int >= 1, got 0"),
    (dict(batch_size=2.0), "batch_size: expected an int, got"),
    (dict(max_seqlen_q=-1), "max_seqlen_q: expected an int in"),
    (dict(max_seqlen_k=1 << 40), "max_seqlen_k: expected an int in"),
    (dict(num_heads_q=0), "num_heads_q: expected an int >= 1"),
    (dict(num_heads_kv=5), "num_heads_kv: expected a count that divides num_heads_q, 32, got 5"),
    (dict(headdim=0), "headdim: expected an int >= 1"),
    (dict(headdim_v=0), "headdim_v: expected an int >= 1"),
    (dict(cache_seqlens=torch.zeros(3)), "cache_seqlens: expected an int32 tensor"),
    (dict(cache_seqlens=[1, 2, 3]), "cache_seqlens: expected an int32 tensor"),
    (dict(cache_seqlens=torch.zeros(2, dtype=torch.int32)), "cache_seqlens: expected shape (3,)"),
    (dict(qkv_dtype="bf16"), "qkv_dtype: expected float16, bfloat16, float32 or float64"),
    (dict(qkv_dtype=torch.int8), "qkv_dtype: expected float16, bfloat16, float32 or float64"),
    (dict(cu_seqlens_q=torch.zeros(3, dtype=torch.int32)), "cu_seqlens_q: expected shape (4,)"),
    (dict(cu_seqlens_k_new=torch.zeros(4)), "cu_seqlens_k_new: expected an int32 tensor"),
    (dict(cache_leftpad=torch.zeros(4, dtype=torch.int32)), "cache_leftpad: expected shape (3,)"),
    (dict(page_size=0), "page_size: expected an int >= 1"),
    (dict(max_seqlen_k_new=-1), "max_seqlen_k_new: expected an int in"),
    (dict(max_seqlen_k_new=8193), "max_seqlen_k_new: expected at most max_seqlen_k, 8192"),
    (dict(window_size=5), "window_size: expected (left, right)"),
    (dict(attention_chunk=-2), "attention_chunk: expected an int >= 0"),
    (dict(causal="no"), "causal: expected True or False"),
    (dict(has_softcap=30.0), "has_softcap: expected True or False"),
    (dict(num_splits=300), "num_splits: expected an int in [0, 256]"),
    (dict(pack_gqa=2), "pack_gqa: expected True, False or None"),
    (dict(sm_margin=-1), "sm_margin: expected an int >= 0"),
)


@pytest.mark.parametrize(
    ("change", "message"), WRONG_METADATA, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_wrong_metadata_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        splits(**change)
    assert str(error.value).startswith(message)


@pytest.mark.virtual
@pytest.mark.parametrize("kind", ("decode", "paged", "window", "mla", "mla in one tensor", "given"))
def test_metadata_is_what_a_call_takes(kind: str) -> None:
    """The workgroups of the attention kernel are as many as the result says, and combined only if there are parts."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    batch, heads, heads_k, dim, dim_v, keys = 1, 4, 2, 32, 32, 320
    options: dict[str, Any] = {}
    page_size = 16 if kind == "paged" or kind.startswith("mla") else None
    if kind == "mla":
        heads, heads_k, dim, dim_v = 4, 1, 16, 64
        options["qv"] = random("cpu", batch, 1, heads, dim_v)
    elif kind == "mla in one tensor":
        heads, heads_k, dim, dim_v = 2, 1, 576, 512
    shape = (keys // 16, 16) if page_size else (batch, keys)
    if page_size:
        options["page_table"] = torch.arange(keys // 16, dtype=torch.int32)[None]
    if kind == "window":
        options["window_size"] = (250, 0)
    if kind == "given":
        options["num_splits"] = 3
    lengths = torch.full((batch,), keys, dtype=torch.int32)
    launches: list[tuple[str, int]] = []

    def note(launch: Any) -> None:
        launches.append((launch.code.name, math.prod(launch.grid)))
        launch.run()

    with flash_rocm.virtual_gpu("gfx942", on_launch=note):
        found = v3.get_scheduler_metadata(
            *(batch, 1, keys, heads, heads_k, dim, lengths, torch.float16, dim_v),
            page_size=page_size,
            **{name: value for name, value in options.items() if name in ("window_size", "num_splits")},
        )
        k_cache = random("cpu", *shape, heads_k, max(dim, dim_v))
        v3.flash_attn_with_kvcache(
            random("cpu", batch, 1, heads, dim),
            k_cache[..., :dim],
            k_cache[..., :dim_v],
            cache_seqlens=lengths,
            scheduler_metadata=found,
            **options,
        )
    number = int(found)
    assert (number == 3) if kind == "given" else (number > 1)
    assert launches[0] == ("attn_cache_kernel", batch * heads_k * number)
    assert [name for name, _ in launches[1:]] == ["attn_combine_kernel"]


# --------------------------------------------------------------------------------------------------
# flash_attn_combine


def parts(device: str, *rows: int, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial results of which some saw no key, whose outputs are NaN."""
    out = random(device, count, *rows, 3, 24, dtype=torch.float32)
    lse = random(device, count, *rows, 3, dtype=torch.float32, seed=1) * 20
    lse[0, ..., 1] = -math.inf
    lse[:, ..., :1, 2] = -math.inf
    out[lse == -math.inf] = math.nan
    return out, lse


def test_combine_is_one_function() -> None:
    assert v3.flash_attn_combine is flash_rocm.flash_attn_combine
    names = list(inspect.signature(v3.flash_attn_combine).parameters)
    assert names == ["out_partial", "lse_partial", "out", "out_dtype"]


@pytest.mark.parametrize("rows", [(2, 4), (7,)], ids=("dense", "varlen"))
@pytest.mark.parametrize("strided", (False, True))
def test_combine(rows: tuple[int, ...], strided: bool, device: str) -> None:
    out_partial, lse_partial = parts(device, *rows)
    exact, exact_lse = oracle_combine(out_partial.cpu(), lse_partial.cpu())
    if strided:
        out_partial = out_partial.movedim(0, -1).contiguous().movedim(-1, 0)
        lse_partial = lse_partial.transpose(0, -1).contiguous().transpose(0, -1)
    out, lse = v3.flash_attn_combine(out_partial, lse_partial)
    assert out.dtype == lse.dtype == torch.float32 and out.shape == (*rows, 3, 24) and lse.shape == (*rows, 3)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-6, atol=1e-6)
    dead = exact_lse == -math.inf
    assert dead.any() and not out.cpu()[dead].any()


def test_combine_arguments_act(device: str) -> None:
    out_partial, lse_partial = parts(device, 2, 4)
    plain, plain_lse = v3.flash_attn_combine(out_partial, lse_partial)
    low, low_lse = v3.flash_attn_combine(out_partial, lse_partial, out_dtype=torch.float16)
    assert torch.equal(low, plain.half()) and torch.equal(low_lse, plain_lse)
    for out_dtype in (None, torch.bfloat16):
        target = torch.full_like(plain, math.nan, dtype=torch.bfloat16)
        found, found_lse = v3.flash_attn_combine(out_partial, lse_partial, target, out_dtype)
        assert found is target and torch.equal(target, plain.bfloat16()) and torch.equal(found_lse, plain_lse)
    assert not torch.equal(v3.flash_attn_combine(out_partial, lse_partial * 0.5)[1], plain_lse)
    assert not torch.equal(v3.flash_attn_combine(out_partial * 0.5, lse_partial)[0], plain)


def test_combine_of_nothing(device: str) -> None:
    for shape in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):
        out, lse = v3.flash_attn_combine(
            torch.zeros(*shape, 3, 8, device=device), torch.zeros(*shape, 3, device=device)
        )
        assert out.shape == (*shape[1:], 3, 8) and not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out_partial=torch.zeros(5, 2, 4, 3, 24).half()), "out_partial: expected float32"),
        (dict(out_partial=torch.zeros(5, 3, 24)), "out_partial: expected float32 with 4 or 5 dims"),
        (dict(out_partial=[1.0]), "out_partial: expected float32"),
        (dict(lse_partial=torch.zeros(5, 2, 4)), "lse_partial: expected shape (5, 2, 4, 3)"),
        (dict(lse_partial=torch.zeros(5, 2, 4, 3).half()), "lse_partial: expected float32"),
        (dict(lse_partial=torch.zeros(5, 2, 4, 3).double()), "lse_partial: expected the dtype of out_partial"),
        (dict(out=torch.zeros(2, 4, 3, 23)), "out: expected contiguous, shape (2, 4, 3, 24)"),
        (dict(out=torch.zeros(2, 4, 24, 3).transpose(2, 3)), "out: expected contiguous"),
        (dict(out=torch.zeros(2, 4, 3, 24), out_dtype=torch.float16), "out_dtype: expected torch.float32, that of out"),
        (dict(out_dtype=torch.int32), "out_dtype: expected a floating point dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_combine_arguments(change: dict[str, Any], message: str) -> None:
    out_partial, lse_partial = parts("cpu", 2, 4)
    with pytest.raises(ValueError) as error:
        v3.flash_attn_combine(**dict(out_partial=out_partial, lse_partial=lse_partial) | change)
    assert str(error.value).startswith(message)


def test_combined_parts_are_the_whole(device: str) -> None:
    """Calls over disjoint keys, combined, are the call over all of them, up to the rounding of parts to fp16."""
    q, k, v = (random(device, 1, n, 2, 16, seed=n) for n in (3, 30, 31))
    k, v = k[:, :30], v[:, :30]
    found = [
        v3.flash_attn_with_kvcache(q, k[:, a:b].contiguous(), v[:, a:b].contiguous(), return_softmax_lse=True)
        for a, b in ((0, 11), (11, 30))
    ]
    out, lse = v3.flash_attn_combine(
        torch.stack([x.float() for x, _ in found]), torch.stack([y.transpose(1, 2) for _, y in found])
    )
    whole, whole_lse = v3.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    torch.testing.assert_close(out, whole.float(), rtol=0, atol=2 * torch.finfo(torch.float16).eps)
    torch.testing.assert_close(lse.transpose(1, 2), whole_lse)
