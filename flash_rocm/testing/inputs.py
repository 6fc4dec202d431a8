"""Seeded random inputs of a problem, in every memory layout a caller may use."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from flash_rocm.problem import AttentionInputs, AttentionProblem, accumulate_dtype, default_softmax_scale, lse_shape

#: Memory layouts :func:`make_inputs` knows.
LAYOUTS = ("contiguous", "packed", "bhsd", "padded", "strided")
#: Rows of no sequence that poisoned varlen tensors end with.
EXTRA_ROWS = 3


class Case(NamedTuple):
    """Tensors of one test: the inputs, and gradients of out and of softmax_lse to send back."""

    inputs: AttentionInputs
    dout: torch.Tensor
    dlse: torch.Tensor


def make_problem(**fields: Any) -> AttentionProblem:
    """An :class:`AttentionProblem` with small defaults for the fields not given."""
    values: dict[str, Any] = dict(
        dtype=torch.float32, device_type="cpu", batch=2, seqlen_q=37, seqlen_k=53, nheads=2, headdim=16
    )
    values.update(fields)
    values.setdefault("nheads_k", values["nheads"])
    values.setdefault("headdim_v", values["headdim"])
    values.setdefault("softmax_scale", default_softmax_scale(values["headdim"]))
    return AttentionProblem(**values)


def make_inputs(
    problem: AttentionProblem,
    seed: int = 0,
    device: torch.device | str | None = None,
    *,
    seqlens_q: Sequence[int] | None = None,
    seqlens_k: Sequence[int] | None = None,
    layout: str = "contiguous",
    poison: bool = False,
    alibi_per_batch: bool = False,
) -> Case:
    """Random inputs of a problem; the same seed gives the same values on every device.

    Args:
        seed: of the values, lengths, pages, and of the dropout state (beyond 32 bits on purpose).
        device: default ``problem.device_type``.
        seqlens_q, seqlens_k: varlen lengths; default random ones of which the longest is the problem's.
        layout: memory layout of q, k, v and dout. ``packed``: q, k and v are views of one buffer (k and v
            when their lengths differ from q's); ``bhsd``: heads outside of positions; ``padded``: cut out
            of a larger tensor in every dimension; ``strided``: also a stride of 2 in the head dimension.
        poison: NaN in all memory that belongs to no element: around padded and strided tensors, in
            ``EXTRA_ROWS`` rows that varlen tensors get behind their last sequence.
        alibi_per_batch: slopes (batch, nheads) instead of (nheads,).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    p, generator = problem, torch.Generator().manual_seed(seed)
    cu_q = cu_k = None
    rows_q: tuple[int, ...] = (p.batch, p.seqlen_q)
    rows_k: tuple[int, ...] = (p.batch, p.seqlen_k)
    used = [None, None]
    if p.varlen:
        lengths_q = _lengths(generator, p.batch, p.seqlen_q, seqlens_q, "seqlens_q")
        lengths_k = _lengths(generator, p.batch, p.seqlen_k, seqlens_k, "seqlens_k")
        cu_q, cu_k = _cumulative(lengths_q), _cumulative(lengths_k)
        extra = EXTRA_ROWS if poison else 0
        used = [sum(lengths_q), sum(lengths_k)]  # type: ignore[list-item]
        rows_q, rows_k = (sum(lengths_q) + extra,), (sum(lengths_k) + extra,)
    elif seqlens_q is not None or seqlens_k is not None:
        raise ValueError("seqlens_q, seqlens_k: expected None for a dense problem")

    def values(rows: tuple[int, ...], nheads: int, dim: int, end: int | None) -> torch.Tensor:
        x = torch.randn(*rows, nheads, dim, generator=generator, dtype=torch.float64).to(p.dtype)
        if end is not None:
            x[end:] = float("nan")
        return x

    q = values(rows_q, p.nheads, p.headdim, used[0])
    k = values(rows_k, p.nheads_k, p.headdim, used[1])
    v = values(rows_k, p.nheads_k, p.headdim_v, used[1])
    dout = values(rows_q, p.nheads, p.headdim_v, used[0])
    dlse = torch.randn(lse_shape(q), generator=generator, dtype=torch.float64).to(accumulate_dtype(p.dtype))
    slopes = state = None
    if p.alibi:
        shape = (p.batch, p.nheads) if alibi_per_batch else (p.nheads,)
        slopes = torch.rand(shape, generator=generator, dtype=torch.float32)
    sinks = torch.randn(p.nheads, generator=generator, dtype=torch.float32) * 2 + 2 if p.sinks else None
    if p.dropout_p > 0.0:
        state = torch.tensor([seed * 0x1_2345_6789 + 0x2_0000_0001, seed % 1000 + 7], dtype=torch.int64)
    fill = float("nan") if poison else 0.0
    device = torch.device(device or p.device_type)
    q, k, v = _place([x.to(device) for x in (q, k, v)], layout, fill)
    (dout,) = _place([dout.to(device)], layout, fill)
    others = [None if x is None else x.to(device) for x in (cu_q, cu_k, slopes, state, sinks)]
    return Case(AttentionInputs._make((q, k, v, *others, None)), dout, dlse.to(device))


def _lengths(generator: torch.Generator, batch: int, longest: int, given: Sequence[int] | None, name: str) -> list[int]:
    if given is not None:
        if len(given) != batch or (batch and max(given) != longest):
            raise ValueError(f"{name}: expected {batch} lengths, the longest {longest}, got {list(given)}")
        return list(given)
    lengths = torch.randint(0, longest + 1, (batch,), generator=generator).tolist()
    if batch:
        lengths[int(torch.randint(batch, (), generator=generator))] = longest
    return lengths


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _place(tensors: list[torch.Tensor], layout: str, fill: float) -> list[torch.Tensor]:
    """The same values in another memory layout; tensors that can be packed share a buffer."""
    if layout == "contiguous":
        return [x.clone() for x in tensors]
    if layout == "bhsd":
        return [x.transpose(-2, -3).clone(memory_format=torch.contiguous_format).transpose(-2, -3) for x in tensors]
    if layout == "packed":
        groups = [tensors] if len({x.shape[:-2] for x in tensors}) == 1 else [tensors[:1], tensors[1:]]
        return [view for group in groups for view in _pack(group, fill)]
    views = []
    for x in tensors:
        step = 2 if layout == "strided" else 1
        sizes = [n + 2 for n in x.shape[:-1]] + [(x.shape[-1] + 8) * step]
        buffer = torch.full(sizes, fill, dtype=x.dtype, device=x.device)
        view = buffer[(*(slice(1, n + 1) for n in x.shape[:-1]), slice(0, x.shape[-1] * step, step))]
        views.append(view.copy_(x))
    return views


def _pack(group: list[torch.Tensor], fill: float) -> list[torch.Tensor]:
    nheads = [x.shape[-2] for x in group]
    sizes = (*group[0].shape[:-2], sum(nheads), max(x.shape[-1] for x in group))
    buffer = torch.full(sizes, fill, dtype=group[0].dtype, device=group[0].device)
    parts = buffer.split(nheads, dim=-2)
    return [part[..., : x.shape[-1]].copy_(x) for part, x in zip(parts, group, strict=True)]
