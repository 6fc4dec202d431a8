"""Checks of calls over a K/V cache, made before anything runs.  Nothing reads tensor contents.  A leaf."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flash_rocm.problem import MAX_SEQLEN, CacheInputs
from flash_rocm.validation import FLOAT_DTYPES, check_alibi, check_sink, invalid, wrong_dtype

#: From a field of the inputs to how the caller's function calls it.
_Name = Callable[[str], str]


#: What FLASH_ROCM_DEBUG=1 finds in contents of tensors, in the order of the numbers that a back end reports.
FAULTS = (
    "{block_table}: expected pages in [0, {entries})",
    "{lengths}",
    "cache_batch_idx: expected entries in [0, {entries})",
    "rotary_cos, rotary_sin: expected positions in [0, {rows})",
)


#: Fields in those texts that functions call differently, by the names of most: a compiled graph knows no caller.
_USUAL = {"block_table": "block_table", "seqused_k": "cache_seqlens", "leftpad_k": "cache_leftpad"}


class ContentsError(ValueError):
    """What FLASH_ROCM_DEBUG=1 found; who knows the caller's names for the fields raises :meth:`called` instead."""

    def __init__(self, template: str) -> None:
        super().__init__(template.format_map(_USUAL))
        self._template = template

    def called(self, names: dict[str, str]) -> ValueError:
        """The same in the names of the caller's function, given where they are not the fields'."""
        return ValueError(self._template.format_map({field: names.get(field, field) for field in _USUAL}))


def raise_faults(reported: Sequence[int], inputs: CacheInputs) -> None:
    """Raise what a back end found: for each of FAULTS the number of a sequence that has it + 1, or 0."""
    if not any(reported):
        return
    rows = 0 if inputs.rotary_cos is None else inputs.rotary_cos.shape[0]
    lengths = f"{{seqused_k}}, {{leftpad_k}}: expected lengths, with the new tokens, in [0, {inputs.capacity}]"
    leftpad = "" if inputs.leftpad_k is None else ", leftpad_k"
    if inputs.is_packed:
        lengths = f"cu_seqlens_k, seqused_k{leftpad}: expected bounds in [0, {inputs.capacity}] and lengths within them"
    elif inputs.cu_seqlens_k is not None and inputs.seqused_k is None:
        lengths = f"cu_seqlens_k{leftpad}: expected lengths in [0, {inputs.capacity}]"
    facts = {"entries": inputs.k.shape[0], "lengths": lengths, "rows": rows, "block_table": "{block_table}"}
    found = [(text.format(**facts), number - 1) for text, number in zip(FAULTS, reported, strict=True) if number]
    lines = [f"{text}, got another in sequence {sequence}." for text, sequence in found]
    raise ContentsError(" ".join(lines) + " Nothing outside of the cache was read or written.")


def check_inputs(inputs: CacheInputs, names: dict[str, str]) -> None:
    """Shapes, dtypes and devices of a whole call.

    Args:
        names: how the caller's function calls a field, where it is not the field's name.
    """

    def name(field: str) -> str:
        return names.get(field, field)

    check_ranks(inputs, names)
    q, v = inputs.q, inputs.v
    if q.dtype not in FLOAT_DTYPES:
        raise wrong_dtype(name("q"), q.dtype)
    batch = q.shape[0] if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1
    _check_places(inputs, batch, name)
    _check_cache(inputs, name)
    if inputs.qv is not None:
        _check_like(name("qv"), inputs.qv, (*q.shape[:-1], v.shape[-1]), q)
    _check_new(inputs, batch, name)
    _check_rotary(inputs, name)
    for field in ("seqused_q", "seqused_k", "rotary_seqlens", "cache_batch_idx", "leftpad_k"):
        check_int32(name(field), getattr(inputs, field), (batch,), q)
    for field in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new"):
        check_int32(name(field), getattr(inputs, field), (batch + 1,), q)
    if inputs.alibi_slopes is not None:
        check_alibi(inputs.alibi_slopes, q, batch)
    if inputs.sinks is not None:
        check_sink(inputs.sinks, q)


def check_caches_can_change(inputs: CacheInputs, names: dict[str, str]) -> None:
    """What a layout does not tell: new tokens are written in place, which no gradient survives."""
    if inputs.k_new is not None and torch.is_grad_enabled():
        for field, x in (("k", inputs.k), ("v", inputs.v)):
            if x.requires_grad:
                expected = "a tensor that needs no gradient, as tokens are appended"
                raise invalid(names.get(field, field), expected, "requires_grad=True")


def check_ranks(inputs: CacheInputs, names: dict[str, str]) -> None:
    """Ranks of all that has a capacity or a number of tokens; what other checks, and the host, compute with."""
    rank, rank_new = (3 if inputs.is_packed else 4), (4 if inputs.cu_seqlens_k_new is None else 3)
    ranks = {"q": 4 if inputs.cu_seqlens_q is None else 3, "k": rank, "v": rank, "k_new": rank_new, "v_new": rank_new}
    for field, rank in ranks.items():
        x = getattr(inputs, field)
        if x is not None or not field.endswith("_new"):
            _check_rank(names.get(field, field), x, rank)
    if (table := inputs.block_table) is not None and (not isinstance(table, torch.Tensor) or table.dim() != 2):
        got = tuple(table.shape) if isinstance(table, torch.Tensor) else type(table).__name__
        raise invalid(names.get("block_table", "block_table"), "an int32 tensor (batch, max_pages)", got)


def check_attention_chunk(attention_chunk: int) -> int:
    """Positions in one chunk, 0 for no chunks."""
    if type(attention_chunk) is int and attention_chunk == 0:
        return 0
    if not isinstance(attention_chunk, int) or isinstance(attention_chunk, bool) or not attention_chunk >= 0:
        raise invalid("attention_chunk", "an int >= 0", attention_chunk, "0 means no chunks.")
    return min(attention_chunk, MAX_SEQLEN)


def _check_rank(name: str, x: torch.Tensor, rank: int) -> None:
    if not isinstance(x, torch.Tensor):
        raise invalid(name, "a tensor", type(x).__name__)
    if x.dim() != rank:
        raise invalid(name, f"{rank} dims", f"{x.dim()} dims {tuple(x.shape)}")
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise invalid(name, "stride 1 in the last dim", x.stride(-1), f"pass {name}.contiguous().")


def _check_like(name: str, x: torch.Tensor, shape: tuple[int, ...], q: torch.Tensor) -> None:
    """Shape as given; dtype and device of q."""
    _check_rank(name, x, len(shape))
    if tuple(x.shape) != shape:
        raise invalid(name, f"shape {shape}", tuple(x.shape))
    if x.dtype != q.dtype:
        raise wrong_dtype(name, x.dtype, f"the dtype of q, {q.dtype}", "cast the inputs to one dtype.")
    if x.device != q.device:
        raise invalid(name, f"the device of q, {q.device}", x.device, "move all inputs to one device.")


def _check_cache(inputs: CacheInputs, name: _Name) -> None:
    q, k, v = inputs.q, inputs.k, inputs.v
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if nheads_k == 0 or nheads % nheads_k:
        raise invalid(name("k"), f"a head count that divides q's {nheads}", nheads_k)
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise invalid(name("v"), "a head dim of at least 1", 0)
    _check_like(name("k"), k, (*k.shape[:-1], q.shape[-1]), q)
    _check_like(name("v"), v, (*k.shape[:-1], v.shape[-1]), q)
    if inputs.capacity > MAX_SEQLEN:
        raise invalid(name("k"), f"a capacity of at most {MAX_SEQLEN}", inputs.capacity)


def check_int32(name: str, x: torch.Tensor | None, shape: tuple[int, ...], q: torch.Tensor) -> None:
    """An optional int32 tensor of one shape on q's device; the contents are not read back."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int32:
        raise invalid(name, "an int32 tensor", getattr(x, "dtype", type(x).__name__), f"pass {name}.int().")
    if tuple(x.shape) != shape:
        raise invalid(name, f"shape {shape}", tuple(x.shape))
    if x.device != q.device:
        raise invalid(name, f"device {q.device}, like q", x.device)
    if not x.is_contiguous():
        raise invalid(name, "a contiguous tensor", f"stride {x.stride()}", f"pass {name}.contiguous().")


def _check_new(inputs: CacheInputs, batch: int, name: _Name) -> None:
    q, k_new, v_new, cu = inputs.q, inputs.k_new, inputs.v_new, inputs.cu_seqlens_k_new
    if (k_new is None) != (v_new is None):
        given, missing = ("k_new", "v_new") if v_new is None else ("v_new", "k_new")
        raise invalid(name(missing), f"a tensor, as {name(given)} is given", None)
    if k_new is None or v_new is None:
        if cu is not None:
            raise invalid("cu_seqlens_k_new", f"None without {name('k_new')}", "a tensor")
        return
    if inputs.cu_seqlens_k is not None:
        raise invalid(name("k_new"), "None with cu_seqlens_k, whose sequences have no room", "a tensor")
    if inputs.seqused_k is None:
        hint = "where the new tokens go."
        raise invalid(name("seqused_k"), "the lengths of the cache, as new tokens are given", None, hint)
    rows = (batch, k_new.shape[1]) if cu is None else (k_new.shape[0],)
    heads = inputs.k.shape[-2]
    _check_like(name("k_new"), k_new, (*rows, heads, q.shape[-1]), q)
    _check_like(name("v_new"), v_new, (*rows, heads, inputs.v.shape[-1]), q)
    if cu is None and k_new.shape[1] > inputs.capacity:
        raise invalid(name("k_new"), f"at most {inputs.capacity} tokens, what the cache holds", tuple(k_new.shape))


def _check_rotary(inputs: CacheInputs, name: _Name) -> None:
    cos, sin, q = inputs.rotary_cos, inputs.rotary_sin, inputs.q
    if (cos is None) != (sin is None):
        raise invalid("rotary_sin" if sin is None else "rotary_cos", "a tensor, as the other one is given", None)
    if cos is None or sin is None:
        if inputs.rotary_seqlens is not None:
            raise invalid("rotary_seqlens", "None without rotary_cos", "a tensor")
        return
    if inputs.k_new is None:
        hint = "keys in the cache are turned already; turn q before the call."
        raise invalid("rotary_cos", f"None without new tokens ({name('k_new')})", "a tensor", hint)
    for label, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_rank(label, x, 2)
        if x.dtype != q.dtype:
            raise invalid(label, f"the dtype of q, {q.dtype}", x.dtype, f"pass {label}.to(q.dtype).")
        if x.device != q.device or x.shape != cos.shape or x.stride() != cos.stride():
            expected = f"shape {tuple(cos.shape)} and strides {cos.stride()} of rotary_cos on {q.device}"
            raise invalid(label, expected, f"{tuple(x.shape)} and {x.stride()} on {x.device}")
    if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise invalid("rotary_cos", f"1 to headdim / 2 = {q.shape[-1] // 2} columns", cos.shape[1])
    if inputs.rotary_seqlens is None and cos.shape[0] < inputs.capacity:
        hint = "a row for every position of the cache."
        raise invalid("rotary_cos", f"at least {inputs.capacity} rows", cos.shape[0], hint)


def _check_places(inputs: CacheInputs, batch: int, name: _Name) -> None:
    """Cache entries and pages."""
    table, k = inputs.block_table, inputs.k
    if table is None:
        if not inputs.is_packed and inputs.cache_batch_idx is None and k.shape[0] != batch:
            hint = "cache_batch_idx names the entries of a larger cache."
            raise invalid(name("k"), f"{batch} cache entries, like q's batch", k.shape[0], hint)
        if inputs.is_packed and inputs.cache_batch_idx is not None:
            raise invalid(name("cache_batch_idx"), "None with packed keys", "a tensor")
        return
    label = name("block_table")
    if inputs.cache_batch_idx is not None:
        raise invalid(name("cache_batch_idx"), f"None with {label}, which names the pages", "a tensor")
    if table.dtype != torch.int32 or table.shape[0] != batch:
        raise invalid(label, f"int32 of shape ({batch}, max_pages)", f"{table.dtype} of shape {tuple(table.shape)}")
    if table.device != inputs.q.device:
        raise invalid(label, f"device {inputs.q.device}, like q", table.device)
    if table.stride(-1) != 1 and table.shape[1] > 1:
        raise invalid(label, "stride 1 in the last dim", table.stride(-1), "make it contiguous.")
    if k.shape[1] == 0:
        raise invalid(name("k"), "a page size of at least 1", 0)
