"""Wrong arguments of calls over a K/V cache: the exact text of every error, and that nothing was written."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_bad_input import not_contiguous, starts

import flash_rocm
from flash_rocm.problem import MAX_SEQLEN

B, S, H, HK, D, DV = 2, 9, 4, 2, 16, 8
#: Arguments that change, and the whole text.
Wrong = dict[str, tuple[dict[str, Any], str]]


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def cached(**changes: Any) -> dict[str, Any]:
    """A working call that reads."""
    return dict(q=zeros(B, 3, H, D), k_cache=zeros(B, S, HK, D), v_cache=zeros(B, S, HK, DV)) | changes


NEW = {"k": torch.ones(B, 2, HK, D), "v": torch.ones(B, 2, HK, DV), "cache_seqlens": starts(3, 5)}
ROTARY = {"rotary_cos": torch.ones(S, 4), "rotary_sin": torch.ones(S, 4)}
PAGES = {
    "k_cache": zeros(7, 3, HK, D),
    "v_cache": zeros(7, 3, HK, DV),
    "block_table": starts(0, 1, 2, 3, 4, 5).view(2, 3),
}
HUGE = torch.zeros(D).expand(B, MAX_SEQLEN + 1, HK, D), torch.zeros(DV).expand(B, MAX_SEQLEN + 1, HK, DV)
LIKE_Q = "the dtype of q, torch.float32, got torch.float16. Hint: cast the inputs to one dtype."
ONE_LENGTH = (
    "cache_seqlens: expected an int in [0, {}] or an int32 tensor (batch,), got {}. "
    "Hint: the cache holds 9 tokens of a sequence, {} of them new."
)
SPLITS = "num_splits: expected an int in [0, 256], got {}. Hint: 0 leaves the choice to the library."
ON_META = "the device of q, cpu, got meta. Hint: move all inputs to one device."

WHOLE: Wrong = {
    # q and the caches
    "q is a list": (dict(q=[1.0]), "q: expected a tensor, got list."),
    "q is a number": (dict(q=torch.tensor(1.0)), "q: expected 4 dims, got 0 dims ()."),
    "q has 3 dims": (dict(q=zeros(B, H, D)), "q: expected 4 dims, got 3 dims (2, 4, 16)."),
    "k_cache has 3 dims": (dict(k_cache=zeros(B, HK, D)), "k_cache: expected 4 dims, got 3 dims (2, 2, 16)."),
    "v_cache has 5 dims": (
        dict(v_cache=zeros(1, B, S, HK, DV)),
        "v_cache: expected 4 dims, got 5 dims (1, 2, 9, 2, 8).",
    ),
    "q is None": (dict(q=None), "q: expected a tensor, got NoneType."),
    "k_cache is None": (dict(k_cache=None), "k_cache: expected a tensor, got NoneType."),
    "v_cache is None": (dict(v_cache=None), "v_cache: expected a tensor, got NoneType."),
    "q strided": (
        dict(q=not_contiguous(B, 3, H, D)),
        "q: expected stride 1 in the last dim, got 2. Hint: pass q.contiguous().",
    ),
    "v_cache strided": (
        dict(v_cache=not_contiguous(B, S, HK, DV)),
        "v_cache: expected stride 1 in the last dim, got 2. Hint: pass v_cache.contiguous().",
    ),
    "integers": (
        dict(q=zeros(B, 3, H, D, dtype=torch.int32)),
        "q: expected float16, bfloat16, float32 or float64, got torch.int32. Hint: cast the inputs.",
    ),
    "k_cache is half": (dict(k_cache=zeros(B, S, HK, D).half()), "k_cache: expected " + LIKE_Q),
    "v_cache is half": (dict(v_cache=zeros(B, S, HK, DV).half()), "v_cache: expected " + LIKE_Q),
    "k_cache elsewhere": (dict(k_cache=zeros(B, S, HK, D, device="meta")), "k_cache: expected " + ON_META),
    "3 kv heads for 4": (
        dict(k_cache=zeros(B, S, 3, D), v_cache=zeros(B, S, 3, DV)),
        "k_cache: expected a head count that divides q's 4, got 3.",
    ),
    "no kv heads": (
        dict(k_cache=zeros(B, S, 0, D), v_cache=zeros(B, S, 0, DV)),
        "k_cache: expected a head count that divides q's 4, got 0.",
    ),
    "head dim 0": (dict(v_cache=zeros(B, S, HK, 0)), "v_cache: expected a head dim of at least 1, got 0."),
    "head dim of k_cache": (
        dict(k_cache=zeros(B, S, HK, 8)),
        "k_cache: expected shape (2, 9, 2, 16), got (2, 9, 2, 8).",
    ),
    "v_cache is shorter": (
        dict(v_cache=zeros(B, S - 1, HK, DV)),
        "v_cache: expected shape (2, 9, 2, 8), got (2, 8, 2, 8).",
    ),
    "more than can be counted": (
        dict(k_cache=HUGE[0], v_cache=HUGE[1], cache_seqlens=starts(1, 1)),
        f"k_cache: expected a capacity of at most {MAX_SEQLEN}, got {MAX_SEQLEN + 1}.",
    ),
    # lengths and places
    "length below 0": (
        dict(cache_seqlens=-1),
        ONE_LENGTH.format(9, -1, 0),
    ),
    "length beyond the cache": (
        dict(cache_seqlens=10),
        ONE_LENGTH.format(9, 10, 0),
    ),
    "length beyond 32 bits": (
        dict(cache_seqlens=1 << 40),
        ONE_LENGTH.format(9, 1 << 40, 0),
    ),
    "length True": (
        dict(cache_seqlens=True),
        ONE_LENGTH.format(9, True, 0),
    ),
    "no room for new tokens": (
        {**NEW, "cache_seqlens": 8},
        ONE_LENGTH.format(7, 8, 2),
    ),
    "no room in the pages": (
        {**PAGES, **NEW, "cache_seqlens": 8},
        ONE_LENGTH.format(7, 8, 2),
    ),
    "a float": (
        dict(cache_seqlens=3.0),
        "cache_seqlens: expected an int32 tensor, got float. Hint: pass cache_seqlens.int().",
    ),
    "int64 lengths": (
        dict(cache_seqlens=starts(3, 5).long()),
        "cache_seqlens: expected an int32 tensor, got torch.int64. Hint: pass cache_seqlens.int().",
    ),
    "3 lengths": (dict(cache_seqlens=starts(3, 5, 6)), "cache_seqlens: expected shape (2,), got (3,)."),
    "lengths elsewhere": (
        dict(cache_seqlens=starts(3, 5).to("meta")),
        "cache_seqlens: expected device cpu, like q, got meta.",
    ),
    "lengths strided": (
        dict(cache_seqlens=starts(3, 5, 6, 7)[::2]),
        "cache_seqlens: expected a contiguous tensor, got stride (2,). Hint: pass cache_seqlens.contiguous().",
    ),
    "int64 entries": (
        dict(cache_batch_idx=starts(0, 1).long()),
        "cache_batch_idx: expected an int32 tensor, got torch.int64. Hint: pass cache_batch_idx.int().",
    ),
    "1 entry": (dict(cache_batch_idx=starts(0)), "cache_batch_idx: expected shape (2,), got (1,)."),
    "3 paddings": (dict(cache_leftpad=starts(0, 0, 0)), "cache_leftpad: expected shape (2,), got (3,)."),
    "paddings as a list": (
        dict(cache_leftpad=[0, 0]),
        "cache_leftpad: expected an int32 tensor, got list. Hint: pass cache_leftpad.int().",
    ),
    "a larger cache": (
        dict(k_cache=zeros(3, S, HK, D), v_cache=zeros(3, S, HK, DV)),
        "k_cache: expected 2 cache entries, like q's batch, got 3. "
        "Hint: cache_batch_idx names the entries of a larger cache.",
    ),
    # pages
    "table as a list": (
        PAGES | dict(block_table=[[0], [1]]),
        "block_table: expected an int32 tensor (batch, max_pages), got list.",
    ),
    "table of 1 dim": (
        PAGES | dict(block_table=starts(0, 1)),
        "block_table: expected an int32 tensor (batch, max_pages), got (2,).",
    ),
    "int64 table": (
        PAGES | dict(block_table=PAGES["block_table"].long()),
        "block_table: expected int32 of shape (2, max_pages), got torch.int64 of shape (2, 3).",
    ),
    "table of 3 sequences": (
        PAGES | dict(block_table=starts(0, 1, 2).view(3, 1)),
        "block_table: expected int32 of shape (2, max_pages), got torch.int32 of shape (3, 1).",
    ),
    "table elsewhere": (
        PAGES | dict(block_table=PAGES["block_table"].to("meta")),
        "block_table: expected device cpu, like q, got meta.",
    ),
    "table strided": (
        PAGES | dict(block_table=starts(*range(6)).view(3, 2).t()),
        "block_table: expected stride 1 in the last dim, got 2. Hint: make it contiguous.",
    ),
    "page size 0": (
        PAGES | dict(k_cache=zeros(7, 0, HK, D), v_cache=zeros(7, 0, HK, DV)),
        "k_cache: expected a page size of at least 1, got 0.",
    ),
    "table and entries": (
        PAGES | dict(cache_batch_idx=starts(0, 1)),
        "cache_batch_idx: expected None with block_table, which names the pages, got a tensor.",
    ),
    # new tokens
    "k without v": (NEW | dict(v=None), "v: expected a tensor, as k is given, got None."),
    "v without k": (NEW | dict(k=None), "k: expected a tensor, as v is given, got None."),
    "no lengths": (
        NEW | dict(cache_seqlens=None),
        "cache_seqlens: expected the lengths of the cache, as new tokens are given, got None. "
        "Hint: where the new tokens go.",
    ),
    "k has 3 dims": (NEW | dict(k=zeros(B, HK, D)), "k: expected 4 dims, got 3 dims (2, 2, 16)."),
    "k of 1 sequence": (NEW | dict(k=zeros(1, 2, HK, D)), "k: expected shape (2, 2, 2, 16), got (1, 2, 2, 16)."),
    "k has other heads": (NEW | dict(k=zeros(B, 2, H, D)), "k: expected shape (2, 2, 2, 16), got (2, 2, 4, 16)."),
    "v is longer": (NEW | dict(v=zeros(B, 3, HK, DV)), "v: expected shape (2, 2, 2, 8), got (2, 3, 2, 8)."),
    "k is half": (NEW | dict(k=zeros(B, 2, HK, D).half()), "k: expected " + LIKE_Q),
    "v elsewhere": (NEW | dict(v=zeros(B, 2, HK, DV, device="meta")), "v: expected " + ON_META),
    "k strided": (
        NEW | dict(k=not_contiguous(B, 2, HK, D)),
        "k: expected stride 1 in the last dim, got 2. Hint: pass k.contiguous().",
    ),
    "more than the cache holds": (
        NEW | dict(k=zeros(B, 10, HK, D), v=zeros(B, 10, HK, DV)),
        "k: expected at most 9 tokens, what the cache holds, got (2, 10, 2, 16).",
    ),
    "more than the cache holds, from 0": (
        NEW | dict(k=zeros(B, 10, HK, D), v=zeros(B, 10, HK, DV), cache_seqlens=0),
        "k: expected at most 9 tokens, what the cache holds, got (2, 10, 2, 16).",
    ),
    "k_cache is trained": (
        NEW | dict(k_cache=zeros(B, S, HK, D).requires_grad_()),
        "k_cache: expected a tensor that needs no gradient, as tokens are appended, got requires_grad=True.",
    ),
    "v_cache is trained": (
        NEW | dict(v_cache=zeros(B, S, HK, DV).requires_grad_()),
        "v_cache: expected a tensor that needs no gradient, as tokens are appended, got requires_grad=True.",
    ),
    # rotary embedding
    "cos without sin": (
        NEW | ROTARY | dict(rotary_sin=None),
        "rotary_sin: expected a tensor, as the other one is given, got None.",
    ),
    "sin without cos": (
        NEW | ROTARY | dict(rotary_cos=None),
        "rotary_cos: expected a tensor, as the other one is given, got None.",
    ),
    "rotary without tokens": (
        ROTARY,
        "rotary_cos: expected None without new tokens (k), got a tensor. "
        "Hint: keys in the cache are turned already; turn q before the call.",
    ),
    "cos as a list": (NEW | ROTARY | dict(rotary_cos=[1.0]), "rotary_cos: expected a tensor, got list."),
    "cos has 3 dims": (
        NEW | ROTARY | dict(rotary_cos=zeros(1, S, 4)),
        "rotary_cos: expected 2 dims, got 3 dims (1, 9, 4).",
    ),
    "sin is half": (
        NEW | ROTARY | dict(rotary_sin=zeros(S, 4).half()),
        "rotary_sin: expected the dtype of q, torch.float32, got torch.float16. Hint: pass rotary_sin.to(q.dtype).",
    ),
    "sin has other columns": (
        NEW | ROTARY | dict(rotary_sin=zeros(S, 3)),
        "rotary_sin: expected shape (9, 4) and strides (4, 1) of rotary_cos on cpu, got (9, 3) and (3, 1) on cpu.",
    ),
    "sin is part of more": (
        NEW | ROTARY | dict(rotary_sin=zeros(S, 8)[:, :4]),
        "rotary_sin: expected shape (9, 4) and strides (4, 1) of rotary_cos on cpu, got (9, 4) and (8, 1) on cpu.",
    ),
    "cos elsewhere": (
        NEW | ROTARY | dict(rotary_cos=zeros(S, 4, device="meta")),
        "rotary_cos: expected shape (9, 4) and strides (4, 1) of rotary_cos on cpu, got (9, 4) and (4, 1) on meta.",
    ),
    "too many columns": (
        NEW | {name: zeros(S, 9) for name in ROTARY},
        "rotary_cos: expected 1 to headdim / 2 = 8 columns, got 9.",
    ),
    "no columns": (
        NEW | {name: zeros(S, 0) for name in ROTARY},
        "rotary_cos: expected 1 to headdim / 2 = 8 columns, got 0.",
    ),
    "table too short": (
        NEW | {name: zeros(S - 1, 4) for name in ROTARY},
        "rotary_cos: expected at least 9 rows, got 8. Hint: a row for every position of the cache.",
    ),
    # scalars
    "-1 splits": (dict(num_splits=-1), SPLITS.format("-1")),
    "257 splits": (dict(num_splits=257), SPLITS.format("257")),
    "True splits": (dict(num_splits=True), SPLITS.format(1)),
    "1.5 splits": (dict(num_splits=1.5), "num_splits: expected an int, got 1.5 (float)."),
    "scale NaN": (dict(softmax_scale=math.nan), "softmax_scale: expected a finite number, got nan."),
    "softcap below 0": (
        dict(softcap=-1.0),
        "softcap: expected a finite number >= 0, got -1.0. Hint: 0.0 turns softcap off.",
    ),
    "window of 3": (
        dict(window_size=(1, 2, 3)),
        "window_size: expected (left, right), got (1, 2, 3). Hint: (-1, -1) means no window.",
    ),
    "window left -2": (
        dict(window_size=(-2, 0)),
        "window_size: expected entries >= -1, got (-2, 0). Hint: -1 means unlimited.",
    ),
    "slopes of 3 heads": (
        dict(alibi_slopes=zeros(3)),
        "alibi_slopes: expected shape (4,) or (2, 4), got (3,).",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_kvcache(name: str) -> None:
    changes, text = WHOLE[name]
    arguments = cached(**changes)
    # With new tokens in a call that is wrong in something else: those must not be written before that shows.
    if not {"k", "v", "block_table", "rotary_cos"} & set(changes) and "cache_seqlens" not in changes:
        others = (arguments | NEW, arguments)
    else:
        others = (arguments,)
    for call in others:
        tensors = [x for x in call.values() if isinstance(x, torch.Tensor)]
        versions = [x._version for x in tensors]
        with pytest.raises(ValueError) as error:
            flash_rocm.flash_attn_with_kvcache(**call)
        if call is arguments:
            assert str(error.value) == text
        assert [x._version for x in tensors] == versions, "something was written"


def test_unknown_slopes() -> None:
    with pytest.raises(NotImplementedError, match="alibi_slopes: expected a tensor that needs no gradient"):
        flash_rocm.flash_attn_with_kvcache(**cached(alibi_slopes=zeros(H).requires_grad_()))


def test_working_calls() -> None:
    """What the table above changes one thing of."""
    for changes in ({}, NEW, NEW | ROTARY, PAGES, PAGES | NEW):
        flash_rocm.flash_attn_with_kvcache(**copy.deepcopy(cached(**changes)))
