"""torch.library operators over a K/V cache: the append of new tokens, which writes into it, and attention.

No gradients.  As in :mod:`flash_rocm.ops`, schemas and fakes are the same for every back end, and eager calls
on plain tensors skip the dispatcher.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from flash_rocm import runtime, virtual_device
from flash_rocm.decision import Decision, decide
from flash_rocm.ops import is_watched
from flash_rocm.problem import AttentionProblem, CacheInputs, accumulate_dtype, are_plain, is_plain, lse_shape

#: Tensors of both operators, in the order of their schemas.
_ATTEND = tuple(name for name in CacheInputs._fields if name not in ("k_new", "v_new", "layout", "addresses"))
_APPEND = (
    *("k_new", "v_new", "k", "v", "rotary_cos", "rotary_sin", "cu_seqlens_k_new", "seqused_k", "rotary_seqlens"),
    *("cache_batch_idx", "block_table"),
)


def _schema(names: tuple[str, ...], changed: tuple[str, ...] = ()) -> str:
    required = ("q", "k", "v", "k_new", "v_new")
    types = {name: "Tensor" if name in required else "Tensor?" for name in names}
    types |= {name: f"Tensor({'ab'[index]}!)" for index, name in enumerate(changed)}
    return ", ".join(f"{kind} {name}" for name, kind in types.items())


_library = torch.library.Library("flash_rocm", "FRAGMENT")
_library.define(
    f"attention_cached({_schema(_ATTEND)}, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt max_seqlen_new, "
    "float softmax_scale, SymInt window_left, SymInt window_right, float softcap, SymInt attention_chunk, "
    "bool rotary_interleaved, SymInt num_splits, str backend) -> (Tensor out, Tensor softmax_lse)"
)
_library.define(
    f"append_kv({_schema(_APPEND, ('k', 'v'))}, SymInt max_seqlen_new, bool rotary_interleaved, str backend) -> ()"
)
_library.define(
    "combine_splits(Tensor out_partial, Tensor lse_partial, ScalarType out_dtype, str backend) "
    "-> (Tensor out, Tensor lse)"
)


def batch_of(inputs: CacheInputs) -> int:
    """Sequences of a call."""
    return inputs.q.shape[0] if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.shape[0] - 1


def problem_of(inputs: CacheInputs, scalars: tuple[Any, ...]) -> AttentionProblem:
    """Describe an attention call, given its tensors and scalars in the order of the schema."""
    max_q, max_k, max_new, scale, left, right, softcap, chunk, interleaved, num_splits, _ = scalars
    q, k, v, cos = inputs.q, inputs.k, inputs.v, inputs.rotary_cos
    return AttentionProblem(
        dtype=q.dtype,
        device_type=q.device.type,
        batch=batch_of(inputs),
        seqlen_q=max_q,
        seqlen_k=max_k,
        nheads=q.shape[-2],
        nheads_k=k.shape[-2],
        headdim=q.shape[-1],
        headdim_v=v.shape[-1],
        softmax_scale=scale,
        window_left=left,
        window_right=right,
        softcap=softcap,
        varlen=inputs.cu_seqlens_q is not None,
        alibi=inputs.alibi_slopes is not None,
        sinks=inputs.sinks is not None,
        page_size=k.shape[1] if inputs.block_table is not None else 0,
        cached=True,
        seqlen_new=max_new,
        rotary_dim=0 if cos is None else 2 * cos.shape[-1],
        rotary_interleaved=interleaved and cos is not None,
        cache_batch_idx=inputs.cache_batch_idx is not None,
        leftpad=inputs.leftpad_k is not None,
        qv=inputs.qv is not None,
        attention_chunk=chunk,
        num_splits=num_splits,
    )


def _append_problem(inputs: CacheInputs, scalars: tuple[Any, ...]) -> AttentionProblem:
    """The part of a call's problem that its append depends on; q is the new keys, which there are as many of."""
    max_new, interleaved, _ = scalars
    batch = inputs.q.shape[0] if inputs.cu_seqlens_k_new is None else inputs.cu_seqlens_k_new.shape[0] - 1
    found = problem_of(inputs, (max_new, inputs.capacity, max_new, 1.0, -1, -1, 0.0, 0, interleaved, 1, ""))
    return dataclasses.replace(found, batch=batch, varlen=inputs.cu_seqlens_k_new is not None)


_decided: dict[tuple[Any, ...], Decision] = {}
_DECIDED_MAX = 4096


def _decide(kind: str, inputs: CacheInputs, scalars: tuple[Any, ...]) -> Decision:
    request = scalars[-1] or virtual_device.request_on(inputs.q.device)
    key = (kind, inputs.layout, scalars, request)
    found = _decided.get(key)
    if found is None:
        if kind == "append" and inputs.k_new is not None:
            inputs = inputs._replace(q=inputs.k_new)
        problem = problem_of(inputs, scalars) if kind == "attend" else _append_problem(inputs, scalars)
        if len(_decided) >= _DECIDED_MAX:
            _decided.clear()
        is_empty = inputs.q.numel() == 0 or problem.seqlen_q == 0
        found = _decided[key] = decide(problem, request, inputs.q.device, is_empty)
    return found


def _attend(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _attend_to(CacheInputs(**dict(zip(_ATTEND, args, strict=False))).with_layout(), args[len(_ATTEND) :])


def _attend_to(inputs: CacheInputs, scalars: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    decision = _decide("attend", inputs, scalars)
    if decision.is_empty:
        q = inputs.q
        lse = q.new_full(lse_shape(q), float("-inf"), dtype=accumulate_dtype(q.dtype))
        return q.new_zeros((*q.shape[:-1], decision.problem.headdim_v)), lse
    return decision.run(decision.backend.attend, inputs)


def _attend_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    q, v = args[0], args[2]
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse_shape(q), dtype=accumulate_dtype(q.dtype))


def _append(*args: Any) -> None:
    tensors = dict(zip(_APPEND, args, strict=False))
    _append_to(CacheInputs(q=tensors["k_new"], **tensors).with_layout(), args[len(_APPEND) :])


def _append_to(inputs: CacheInputs, scalars: tuple[Any, ...]) -> None:
    decision = _decide("append", inputs, scalars)
    if not decision.is_empty:
        decision.run(decision.backend.append, inputs)


def _append_fake(*args: Any) -> None:
    return None


def with_layout(inputs: CacheInputs) -> CacheInputs:
    """Inputs of a call that skips the dispatcher have a layout: tensors are plain, and nobody traces or watches."""
    # In this order: torch.compile could not trace is_watched.
    if torch.compiler.is_compiling() or not are_plain(inputs.tensors):
        return inputs
    # Nothing has been checked yet: that q and k are no None the checks say.
    if inputs.q is None or inputs.k is None or is_watched(inputs.q):
        return inputs
    return inputs.with_layout()


def attention_cached(inputs: CacheInputs, scalars: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse over a K/V cache; scalars in the order of the schema."""
    if inputs.layout is not None:
        return _attend_to(inputs, scalars)
    tensors = (getattr(inputs, name) for name in _ATTEND)
    return torch.ops.flash_rocm.attention_cached.default(*tensors, *scalars)


def append_kv(inputs: CacheInputs, max_seqlen_new: int, rotary_interleaved: bool, backend: str) -> None:
    """Write ``k_new`` and ``v_new`` into the caches ``k`` and ``v``, in place."""
    scalars = (max_seqlen_new, rotary_interleaved, backend)
    if inputs.layout is not None:
        _append_to(inputs, scalars)
    else:
        torch.ops.flash_rocm.append_kv.default(*(getattr(inputs, name) for name in _APPEND), *scalars)
    if inputs.layout is not None or not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([inputs.k, inputs.v])


def splits_of(problem: AttentionProblem, device: torch.device) -> int:
    """Into how many parts the keys of a problem are divided."""
    decision = decide(problem, virtual_device.request_on(device), device, is_empty=False)
    return decision.run(decision.backend.splits_of, device)


def _combine(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = out_partial.shape if out_partial.dim() == 5 else (out_partial.shape[0], 1, *out_partial.shape[1:])
    problem = AttentionProblem(
        dtype=out_partial.dtype,
        device_type=out_partial.device.type,
        batch=shape[1],
        seqlen_q=shape[2],
        seqlen_k=0,
        nheads=shape[3],
        nheads_k=shape[3],
        headdim=shape[4],
        headdim_v=shape[4],
        softmax_scale=1.0,
        cached=True,
        num_splits=shape[0],
    )
    request = backend or virtual_device.request_on(out_partial.device)
    decision = decide(problem, request, out_partial.device, out_partial.numel() == 0)
    if decision.is_empty:
        lse = lse_partial.new_full(lse_partial.shape[1:], float("-inf"))
        return out_partial.new_zeros(out_partial.shape[1:], dtype=out_dtype), lse
    return decision.run(decision.backend.combine, out_partial, lse_partial, out_dtype)


def _combine_fake(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return out_partial.new_empty(out_partial.shape[1:], dtype=out_dtype), lse_partial.new_empty(lse_partial.shape[1:])


def combine(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of results over disjoint sets of keys."""
    traced = torch.compiler.is_compiling()
    request = runtime.override() if traced else virtual_device.request_on(out_partial.device)
    if not traced and is_plain(out_partial) and not is_watched(out_partial):
        return _combine(out_partial, lse_partial, out_dtype, request)
    return torch.ops.flash_rocm.combine_splits.default(out_partial, lse_partial, out_dtype, request)


for _name, _impl, _fake in (
    ("attention_cached", _attend, _attend_fake),
    ("append_kv", _append, _append_fake),
    ("combine_splits", _combine, _combine_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_rocm::{_name}", _fake, lib=_library)
