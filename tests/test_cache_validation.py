"""Wrong arguments of calls over packed keys and pages, and of fields that only other interfaces have: exact texts."""

from __future__ import annotations

from typing import Any

import pytest
from test_bad_input import starts
from test_kvcache_bad_input import DV, HK, LIKE_Q, PAGES, ROTARY, B, D, H, S, Wrong, zeros

import flash_rocm
from flash_rocm import cache_validation
from flash_rocm.problem import MAX_SEQLEN, CacheInputs

# --------------------------------------------------------------------------------------------------
# Fields that flash_attn_with_kvcache has no argument for


def inputs(**changes: Any) -> CacheInputs:
    return CacheInputs(**dict(q=zeros(B, 3, H, D), k=zeros(B, S, HK, D), v=zeros(B, S, HK, DV)) | changes)


def packed(**changes: Any) -> CacheInputs:
    return inputs(k=zeros(B * S, HK, D), v=zeros(B * S, HK, DV), cu_seqlens_k=starts(0, 9, 18), **changes)


RAGGED = dict(k_new=zeros(5, HK, D), v_new=zeros(5, HK, DV), seqused_k=starts(3, 5), cu_seqlens_k_new=starts(0, 2, 5))
FIELDS: dict[str, tuple[CacheInputs, str]] = {
    "qv of another shape": (
        inputs(qv=zeros(B, 3, H, D)),
        "qv: expected shape (2, 3, 4, 8), got (2, 3, 4, 16).",
    ),
    "qv is half": (inputs(qv=zeros(B, 3, H, DV).half()), "qv: expected " + LIKE_Q),
    "seqused_q of 3": (inputs(seqused_q=starts(1, 1, 1)), "seqused_q: expected shape (2,), got (3,)."),
    "cu_seqlens_q of 1": (
        inputs(
            q=zeros(6, H, D), cu_seqlens_q=starts(0), k=zeros(0, S, HK, D), v=zeros(0, S, HK, DV), seqused_k=starts(1)
        ),
        "seqused_k: expected shape (0,), got (1,).",
    ),
    "packed q with 4 dims": (inputs(cu_seqlens_q=starts(0, 3, 6)), "q: expected 3 dims, got 4 dims (2, 3, 4, 16)."),
    "cu_seqlens_k int64": (
        packed()._replace(cu_seqlens_k=starts(0, 9, 18).long()),
        "cu_seqlens_k: expected an int32 tensor, got torch.int64. Hint: pass cu_seqlens_k.int().",
    ),
    "packed k with 4 dims": (inputs(cu_seqlens_k=starts(0, 9, 18)), "k: expected 3 dims, got 4 dims (2, 9, 2, 16)."),
    "packed k and entries": (
        packed(cache_batch_idx=starts(0, 1)),
        "cache_batch_idx: expected None with packed keys, got a tensor.",
    ),
    "packed k and new tokens": (
        packed(k_new=zeros(B, 1, HK, D), v_new=zeros(B, 1, HK, DV)),
        "k_new: expected None with cu_seqlens_k, whose sequences have no room, got a tensor.",
    ),
    "starts of no new tokens": (
        inputs(cu_seqlens_k_new=starts(0, 1, 2)),
        "cu_seqlens_k_new: expected None without k_new, got a tensor.",
    ),
    "starts of 1 sequence": (
        inputs(**RAGGED | dict(cu_seqlens_k_new=starts(0, 5))),
        "cu_seqlens_k_new: expected shape (3,), got (2,).",
    ),
    "ragged tokens with 4 dims": (
        inputs(**RAGGED | dict(k_new=zeros(B, 2, HK, D))),
        "k_new: expected 3 dims, got 4 dims (2, 2, 2, 16).",
    ),
    "rotary_seqlens alone": (
        inputs(rotary_seqlens=starts(1, 1)),
        "rotary_seqlens: expected None without rotary_cos, got a tensor.",
    ),
    "3 rotary_seqlens": (
        inputs(**RAGGED, **ROTARY, rotary_seqlens=starts(1, 1, 1)),
        "rotary_seqlens: expected shape (2,), got (3,).",
    ),
    "sinks of 3 heads": (
        inputs(sinks=zeros(3)),
        "learnable_sink: expected shape (4,), got (3,). Hint: one logit for each head of q.",
    ),
    "sinks elsewhere": (
        inputs(sinks=zeros(4, device="meta")),
        "learnable_sink: expected device cpu, like q, got meta.",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name: str) -> None:
    given, text = FIELDS[name]
    with pytest.raises(ValueError) as error:
        cache_validation.check_inputs(given, {})
    assert str(error.value) == text


@pytest.mark.parametrize(
    "given",
    [inputs(), packed(), inputs(**RAGGED, **ROTARY, rotary_seqlens=starts(1, 1))],
    ids=["dense", "packed", "ragged"],
)
def test_working_fields(given: CacheInputs) -> None:
    cache_validation.check_inputs(given, {})


@pytest.mark.parametrize("value", (-1, True, 1.5, None), ids=str)
def test_attention_chunk(value: Any) -> None:
    with pytest.raises(ValueError) as error:
        cache_validation.check_attention_chunk(value)
    assert str(error.value) == f"attention_chunk: expected an int >= 0, got {value}. Hint: 0 means no chunks."
    assert cache_validation.check_attention_chunk(1 << 40) == MAX_SEQLEN


# --------------------------------------------------------------------------------------------------
# Varlen attention over pages


def over_pages(**changes: Any) -> dict[str, Any]:
    pages = dict(k=PAGES["k_cache"], v=PAGES["v_cache"], block_table=PAGES["block_table"])
    lengths = dict(cu_seqlens_q=starts(0, 1, 5), cu_seqlens_k=starts(0, 6, 14), max_seqlen_q=4, max_seqlen_k=8)
    return dict(q=zeros(5, H, D), **pages, **lengths) | changes


OVER_PAGES: Wrong = {
    "dense q": (dict(q=zeros(B, 3, H, D)), "q: expected 3 dims, got 4 dims (2, 3, 4, 16)."),
    "packed k": (dict(k=zeros(9, HK, D)), "k: expected 4 dims, got 3 dims (9, 2, 16)."),
    "table of 3 sequences": (
        dict(block_table=starts(0, 1, 2).view(3, 1)),
        "block_table: expected int32 of shape (2, max_pages), got torch.int32 of shape (3, 1).",
    ),
    "cu_seqlens_q is a list": (
        dict(cu_seqlens_q=[0, 1, 5]),
        "cu_seqlens_q: expected an int32 tensor (batch + 1,), got list.",
    ),
    "cu_seqlens_q int64": (
        dict(cu_seqlens_q=starts(0, 1, 5).long()),
        "cu_seqlens_q: expected int32, got torch.int64. Hint: pass cu_seqlens_q.int().",
    ),
    "no cu_seqlens_k": (
        dict(cu_seqlens_k=None),
        "cu_seqlens_k: expected an int32 tensor (batch + 1,), got NoneType.",
    ),
    "cu_seqlens_k of 1 sequence": (
        dict(cu_seqlens_k=starts(0, 6)),
        "cu_seqlens_k: expected shape (3,), like cu_seqlens_q, got (2,).",
    ),
    "max_seqlen_q below 0": (dict(max_seqlen_q=-1), f"max_seqlen_q: expected an int in [0, {MAX_SEQLEN}], got -1."),
    "max_seqlen_k as a float": (dict(max_seqlen_k=8.5), "max_seqlen_k: expected an int, got 8.5 (float)."),
    "dropout": (dict(dropout_p=0.1), "dropout_p: expected 0 with block_table, got 0.1. Hint: pass 0.0."),
    "dropout of 2": (
        dict(dropout_p=2.0),
        "dropout_p: expected a probability in [0, 1), got 2.0. Hint: 0.0 turns dropout off.",
    ),
}


@pytest.mark.parametrize("name", OVER_PAGES)
def test_varlen_over_pages(name: str) -> None:
    changes, text = OVER_PAGES[name]
    with pytest.raises((ValueError, NotImplementedError)) as error:
        flash_rocm.flash_attn_varlen_func(**over_pages(**changes))
    assert str(error.value) == text
    assert isinstance(error.value, NotImplementedError) == (name == "dropout")


def test_working_call_over_pages() -> None:
    flash_rocm.flash_attn_varlen_func(**over_pages())
