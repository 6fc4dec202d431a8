"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with xPos's scale (Sun et al. 2022, arXiv:2212.10554).

Names, arguments and layouts are those of flash-attn's ``flash_attn.layers.rotary``.

Common arguments:
    cos, sin: (table_len, rotary_dim / 2), of x's dtype or float32, no gradients; the first rotary_dim dims are turned.
    interleaved: True turns dims (2i, 2i + 1) together (GPT-J), False (i, i + rotary_dim / 2) (NeoX).
    seqlen_offsets: position of the first token, an int or (batch,) int32 or int64.  Of a tensor the contents are
        not read back: tokens at positions that the table does not have stay as they are.
    cu_seqlens: (batch + 1,) int32; x is then (total, nheads, headdim), and max_seqlen is needed.

Raises:
    ValueError: an argument is wrong; the text names it, what was expected, what came and a hint.
    NotImplementedError: gradients of cos or sin are asked for.
"""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import validation
from flash_rocm.layers import ops


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Turn x, without autograd.

    Args:
        x: (batch, seqlen, nheads, headdim), fp16, bf16, fp32 or fp64.
        inplace: write to x, which needs stride 1 in the last dim.
        conjugate: turn back, as the backward does.

    The other arguments and the errors are described in the module docstring.

    Returns:
        x turned, of its shape and dtype; x itself if inplace.
    """
    args = _checked(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    args = (*args, bool(interleaved), bool(conjugate), ops.request(x))
    if not inplace:
        return torch.ops.flash_rocm.rotary.default(_rows(x), *args)
    _turn_in_place("x", x, args)
    return x


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _turn_in_place(name: str, x: torch.Tensor, args: tuple[Any, ...]) -> None:
    if x.stride(-1) != 1 and x.numel():
        raise validation.invalid(name, "stride 1 in the last dim to be changed in place", x.stride(-1))
    torch.ops.flash_rocm.rotary_.default(x, *args)


def _checked(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> tuple[Any, ...]:
    """Arguments of the operator behind x, up to max_seqlen."""
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        validation.check_tensor(name, tensor)
    rank, layout = (4, "(batch, seqlen, nheads, headdim)") if cu_seqlens is None else (3, "(total, nheads, headdim)")
    if x.dim() != rank:
        raise validation.invalid("x", f"{rank} dims {layout}", f"{x.dim()} dims {tuple(x.shape)}")
    if x.dtype not in validation.FLOAT_DTYPES:
        raise validation.invalid("x", "float16, bfloat16, float32 or float64", x.dtype)
    _check_table(x, cos, sin)
    if cu_seqlens is None:
        batch, seqlen = x.shape[:2]
        if max_seqlen is not None and validation.check_max_seqlen("max_seqlen", max_seqlen) < seqlen:
            raise validation.invalid("max_seqlen", f"at least x's seqlen {seqlen}, or None", max_seqlen)
    else:
        validation.check_cu_seqlens("cu_seqlens", cu_seqlens, x)
        batch = cu_seqlens.shape[0] - 1
        if max_seqlen is None:
            raise validation.invalid("max_seqlen", "an int with cu_seqlens", None, "the longest sequence.")
        seqlen = validation.check_max_seqlen("max_seqlen", max_seqlen)
    if isinstance(seqlen_offsets, torch.Tensor):
        _check_offsets(x, seqlen_offsets, batch)
        return cos, sin, seqlen_offsets.contiguous(), cu_seqlens, 0, seqlen
    offset = validation.check_max_seqlen("seqlen_offsets", seqlen_offsets)
    if offset + seqlen > cos.shape[0]:
        hint = f"{seqlen} tokens from position {offset} need as many rows."
        raise validation.invalid("cos", f"at least {offset + seqlen} rows", cos.shape[0], hint)
    return cos, sin, None, cu_seqlens, offset, seqlen


def _check_table(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (x.dtype, torch.float32):
            raise validation.invalid(name, f"the dtype of x, {x.dtype}, or float32", table.dtype)
        if table.device != x.device:
            raise validation.invalid(name, f"device {x.device}, like x", table.device)
        if table.dim() != 2 or not 0 < 2 * table.shape[1] <= x.shape[-1]:
            expected = f"(table_len, rotary_dim / 2) with rotary_dim at most the head dim {x.shape[-1]}"
            raise validation.invalid(name, expected, tuple(table.shape))
        if table.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name}: expected no gradient, got requires_grad=True. Hint: pass {name}.detach()."
            )
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        expected = f"{cos.dtype} {tuple(cos.shape)}, like cos"
        raise validation.invalid("sin", expected, f"{sin.dtype} {tuple(sin.shape)}")


def _check_offsets(x: torch.Tensor, seqlen_offsets: torch.Tensor, batch: int) -> None:
    if seqlen_offsets.dtype not in (torch.int32, torch.int64):
        raise validation.invalid("seqlen_offsets", "an int, or int32 or int64", seqlen_offsets.dtype)
    if tuple(seqlen_offsets.shape) != (batch,) or seqlen_offsets.device != x.device:
        got = f"{tuple(seqlen_offsets.shape)} on {seqlen_offsets.device}"
        raise validation.invalid("seqlen_offsets", f"shape ({batch},) on {x.device}", got)


class _Rotary(torch.autograd.Function):
    """Turning is a rotation: its backward turns back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        inplace: bool,
        seqlen_offsets: int | torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: int | None,
    ) -> torch.Tensor:
        args = _checked(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
        ctx.save_for_backward(*args[:4])
        ctx.scalars = (*args[4:], interleaved)
        ctx.request = ops.request(x)
        if not inplace:
            return torch.ops.flash_rocm.rotary.default(_rows(x), *args, interleaved, False, ctx.request)
        # Not marked dirty, because flash-attn's callers turn leaves in place, which autograd forbids.
        _turn_in_place("x", x, (*args, interleaved, False, ctx.request))
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = torch.ops.flash_rocm.rotary.default(
            _rows(gradients[0]), *ctx.saved_tensors, *ctx.scalars, True, ctx.request
        )
        return (dx, *(None,) * 7)


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Turn x, with a gradient for x; as :func:`apply_rotary` otherwise.

    In place, a gradient that needs x as it was raises in its backward.
    """
    return _Rotary.apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


#: Its name in older versions of flash-attn.
apply_rotary_emb_func = apply_rotary_emb


def _parts_of_qkv(qkv: torch.Tensor, num_heads_q: int | None, together: bool) -> list[torch.Tensor]:
    """Views (batch, seqlen, heads, headdim) of q and k, one view of both if they are turned alike."""
    if num_heads_q is None:
        validation.check_packed("qkv", qkv, 5, 3)
        if together and qkv.stride(2) == qkv.shape[3] * qkv.stride(3):
            return [qkv[:, :, :2].flatten(2, 3)]
        return [qkv[:, :, 0], qkv[:, :, 1]]
    nheads_k = validation.check_packed_heads(qkv, num_heads_q)
    if together:
        return [qkv[:, :, : num_heads_q + nheads_k]]
    return [qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + nheads_k]]


def _turn_parts(
    name: str,
    parts: list[torch.Tensor],
    tables: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    interleaved: bool,
    conjugate: bool,
    seqlen_offsets: int | torch.Tensor,
    request: str,
) -> None:
    for part, (cos, sin) in zip(parts, tables, strict=False):
        args = _checked(part, cos, sin, seqlen_offsets, None, None)
        _turn_in_place(name, part, (*args, interleaved, conjugate, request))


class _RotaryPacked(torch.autograd.Function):
    """Parts of a packed tensor in place; the gradient is turned back in a copy."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cos_k: torch.Tensor | None,
        sin_k: torch.Tensor | None,
        seqlen_offsets: int | torch.Tensor,
        interleaved: bool,
        name: str,
        num_heads_q: int | None,
    ) -> torch.Tensor:
        is_tensor = isinstance(seqlen_offsets, torch.Tensor)
        ctx.save_for_backward(cos, sin, cos_k, sin_k, seqlen_offsets if is_tensor else None)
        ctx.offset = 0 if is_tensor else seqlen_offsets
        ctx.scalars = (interleaved, name, num_heads_q)
        ctx.request = ops.request(packed)
        _turn_packed(packed, (cos, sin, cos_k, sin_k), seqlen_offsets, False, ctx.request, *ctx.scalars)
        return packed  # not marked dirty, as in _Rotary

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tables, offsets = ctx.saved_tensors
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        _turn_packed(gradient, tables, ctx.offset if offsets is None else offsets, True, ctx.request, *ctx.scalars)
        return (gradient, *(None,) * 8)


def _turn_packed(
    packed: torch.Tensor,
    tables: Any,
    seqlen_offsets: int | torch.Tensor,
    conjugate: bool,
    request: str,
    interleaved: bool,
    name: str,
    num_heads_q: int | None,
) -> None:
    cos, sin, cos_k, sin_k = tables
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    if name == "kv":
        parts, pairs = [packed[:, :, 0]], ((cos, sin),)
    else:
        parts = _parts_of_qkv(packed, num_heads_q, cos_k is None)
        pairs = ((cos, sin), (cos, sin) if cos_k is None else (cos_k, sin_k))
    _turn_parts(name, parts, pairs, interleaved, conjugate, seqlen_offsets, request)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Turn q and k inside qkv, in place, with a gradient for qkv.

    Args:
        qkv: (batch, seqlen, 3, nheads, headdim), or with num_heads_q (batch, seqlen, num_heads_q + 2 * nheads_k,
            headdim), the heads of q, then k, then v.
        cos_k, sin_k: the table of k, if it has its own (xPos); both or neither.

    The other arguments and the errors are described in the module docstring.

    Returns:
        qkv itself, changed.
    """
    validation.check_tensor("qkv", qkv)
    if (cos_k is None) != (sin_k is None):
        raise validation.invalid("sin_k", "a table with cos_k, and none without", "one of the two")
    return _RotaryPacked.apply(qkv, cos, sin, cos_k, sin_k, seqlen_offsets, bool(interleaved), "qkv", num_heads_q)


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Turn k inside kv (batch, seqlen, 2, nheads_k, headdim), in place, with a gradient for kv; returns kv itself."""
    validation.check_tensor("kv", kv)
    validation.check_packed("kv", kv, 5, 2)
    return _RotaryPacked.apply(kv, cos, sin, None, None, seqlen_offsets, bool(interleaved), "kv", None)


def rotate_half(x: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """(-b, a) for the halves (a, b) of the last dim, or for its pairs if interleaved."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Turn x in plain torch, differentiable in everything: what flash-attn's tests compare with.

    Args:
        x: (batch, seqlen, nheads, headdim).
        cos, sin: (seqlen, rotary_dim / 2) or (batch, seqlen, rotary_dim / 2).
    """

    def spread(table: torch.Tensor) -> torch.Tensor:
        doubled = table.repeat_interleave(2, dim=-1) if interleaved else torch.cat((table, table), dim=-1)
        return doubled.unsqueeze(-2)

    cos, sin = spread(cos), spread(sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned, interleaved) * sin, rest), dim=-1)


class RotaryEmbedding(torch.nn.Module):
    """Tables of cos and sin that grow as they are needed, and the turn by them.

    Args:
        dim: the dims that are turned, an even number.
        base: of the frequencies.
        interleaved: as in the module docstring.
        scale_base: of xPos; None for none.
        device: of the frequencies.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if validation.check_count("dim", dim) % 2:
            raise validation.invalid("dim", "an even number", dim)
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        index = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self.base ** (-index / dim), persistent=False)
        scale = None if scale_base is None else (index + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._tables: tuple[torch.Tensor, ...] = ()

    def tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """cos and sin, and for xPos cos_k and sin_k, of at least so many positions."""
        found = self._tables
        fits = bool(found) and found[0].shape[0] >= seqlen and found[0].device == device and found[0].dtype == dtype
        # Tables made in inference mode cannot be saved for a backward.
        if not fits or (found[0].is_inference() and torch.is_grad_enabled()):
            self._tables = self._new_tables(seqlen, device, dtype)
        return self._tables

    def _new_tables(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # From dim and base, not inv_freq: a model cast to half precision has lost the frequencies.
        index = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        angle = torch.outer(position, self.base ** (-index / self.dim))
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            return cos.to(dtype), sin.to(dtype)
        power = (position - seqlen // 2) / self.scale_base
        scale = ((index + 0.4 * self.dim) / (1.4 * self.dim)) ** power[:, None]
        return tuple(table.to(dtype) for table in (cos * scale, sin * scale, cos / scale, sin / scale))

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Turn q and k.

        Args:
            qkv: as in :func:`apply_rotary_emb_qkv_`; with kv, q (batch, seqlen, nheads, headdim).
            kv: (batch, seqlen, 2, nheads_k, headdim).
            seqlen_offset: position of the first token, an int or (batch,).
            max_seqlen: positions that the tables need at least; default: what an int seqlen_offset asks for.

        Returns:
            qkv itself, changed in place; or q turned and kv itself, changed in place.
        """
        needed = max_seqlen
        if needed is None:
            if isinstance(seqlen_offset, torch.Tensor):
                hint = "contents of a tensor are not read back."
                raise validation.invalid("max_seqlen", "an int if seqlen_offset is a tensor", None, hint)
            needed = qkv.shape[1] + seqlen_offset
        cos, sin, *table_k = self.tables(needed, qkv.device, qkv.dtype)
        cos_k, sin_k = table_k or (None, None)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        if num_heads_q is not None:
            raise validation.invalid("num_heads_q", "None with kv", num_heads_q, "it is for packed qkv.")
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, seqlen_offsets=seqlen_offset)
        table = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, *table, self.interleaved, seqlen_offset)
