"""Checks of what a caller passes, made before anything runs.  A leaf.

Every message names the argument, what was expected, what came, and what to do.  Nothing here reads
tensor contents, so nothing waits for a GPU.
"""

from __future__ import annotations

import math
import operator

import torch

from flash_rocm.problem import MAX_SEQLEN, Layout, are_plain, layout_of
from flash_rocm.splits import MAX_SPLITS

UNLIMITED = (-1, -1)
FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def invalid(argument: str, expected: str, got: object, hint: str = "") -> ValueError:
    """The one form of an argument error."""
    return ValueError(f"{argument}: expected {expected}, got {got}." + (f" Hint: {hint}" if hint else ""))


#: What errors about FP8 say at their end.
NO_FP8 = "FP8 is not implemented: pass fp16 or bf16."
#: What is expected of q.
_FLOATS = "float16, bfloat16, float32 or float64"


def wrong_dtype(
    argument: str, got: object, expected: str = _FLOATS, hint: str = "cast the inputs."
) -> ValueError | NotImplementedError:
    """The error for a dtype that a call does not take; FP8 is one that flash-attn takes and this library not yet."""
    if str(got).startswith("torch.float8"):
        return NotImplementedError(f"{argument}: expected {expected}, got {got}. Hint: {NO_FP8}")
    return invalid(argument, expected, got, hint)


def check_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dims: int, kv_dims: int) -> Layout:
    """Ranks, dtypes, devices, heads, head dims, contiguity of the last dim; of dense calls batch and lengths.

    Returns:
        What was found right, shared if q, k and v are plain tensors: later ones like them are not looked at.
    """
    if are_plain((q, k, v)) and not torch.compiler.is_compiling():
        layout = layout_of(q, k, v)
        if layout.ranks == (dims, kv_dims):
            return layout
    else:
        layout = Layout(q, k)
    for name, x, rank in (("q", q, dims), ("k", k, kv_dims), ("v", v, kv_dims)):
        if x.dim() != rank:
            raise _wrong_rank(name, x, rank)
    _check_types(q, k, v)
    _check_heads(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] != 1 and not x.is_contiguous():
            raise invalid(name, "stride 1 in the last dim", x.stride(-1), f"pass {name}.contiguous().")
    if dims == 4:
        if k.shape[0] != q.shape[0]:
            raise invalid("k", f"batch {q.shape[0]}, like q", k.shape[0])
        for name, x in (("q", q), ("k", k)):
            if x.shape[1] > MAX_SEQLEN:
                raise invalid(name, f"seqlen <= {MAX_SEQLEN}", x.shape[1])
    layout.ranks = (dims, kv_dims)
    return layout


def _check_types(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise wrong_dtype("q", q.dtype)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise wrong_dtype(name, x.dtype, f"the dtype of q, {q.dtype}", "cast the inputs to one dtype.")
        if x.device != q.device:
            raise invalid(name, f"the device of q, {q.device}", x.device, "move all inputs to one device.")


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if v.shape[-2] != nheads_k:
        raise invalid("v", f"{nheads_k} heads, like k", v.shape[-2], "k and v share their heads.")
    if nheads_k == 0 or nheads % nheads_k != 0:
        raise invalid(
            "k",
            f"a head count that divides q's {nheads}",
            nheads_k,
            "for GQA/MQA nheads must be a multiple of nheads_k.",
        )
    if k.shape[-1] != q.shape[-1]:
        raise invalid("k", f"head dim {q.shape[-1]}, like q", k.shape[-1], "only v may have another head dim.")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise invalid("v" if q.shape[-1] else "q", "a head dim of at least 1", 0)
    if v.shape[:-1] != k.shape[:-1]:
        raise invalid("v", f"leading shape {tuple(k.shape[:-1])}, like k", tuple(v.shape[:-1]))


def _wrong_rank(name: str, x: torch.Tensor, rank: int) -> ValueError:
    layouts = {
        3: "(total, nheads, headdim)",
        4: "(batch, seqlen, nheads, headdim)",
    }
    return invalid(name, f"{rank} dims {layouts[rank]}", f"{x.dim()} dims {tuple(x.shape)}")


def check_packed(name: str, x: torch.Tensor, dims: int, parts: int) -> None:
    """A packed qkv or kv tensor: rank, and the packed dim third from the end."""
    if x.dim() != dims:
        raise invalid(name, f"{dims} dims (..., {parts}, nheads, headdim)", f"{x.dim()} dims {tuple(x.shape)}")
    if x.shape[-3] != parts:
        raise invalid(name, f"size {parts} in dim -3", x.shape[-3], f"{name} stacks its parts there.")


def check_packed_heads(qkv: torch.Tensor, num_heads_q: int) -> int:
    """A qkv tensor (batch, seqlen, num_heads_q + 2 * nheads_k, headdim); returns nheads_k."""
    if qkv.dim() != 4:
        expected = "4 dims (batch, seqlen, heads, headdim) with num_heads_q"
        raise invalid("qkv", expected, f"{qkv.dim()} dims {tuple(qkv.shape)}")
    heads, num_heads_q = qkv.shape[2], _whole_number("num_heads_q", num_heads_q)
    if not 0 < num_heads_q < heads or (heads - num_heads_q) % 2:
        raise invalid("num_heads_q", f"a count that leaves an even number of {heads} heads for k and v", num_heads_q)
    return (heads - num_heads_q) // 2


def check_scalars(
    dropout_p: float, softmax_scale: float, window_size: tuple[int, int], softcap: float
) -> tuple[int, int]:
    """Ranges of the scalar arguments; returns the window as two ints below MAX_SEQLEN."""
    if not 0.0 <= dropout_p < 1.0:
        raise invalid("dropout_p", "a probability in [0, 1)", dropout_p, "0.0 turns dropout off.")
    if not -math.inf < softmax_scale < math.inf:  # not isfinite, which torch.compile cannot trace
        raise invalid("softmax_scale", "a finite number", softmax_scale)
    if not 0.0 <= softcap < math.inf:
        raise invalid("softcap", "a finite number >= 0", softcap, "0.0 turns softcap off.")
    if window_size == UNLIMITED:
        return UNLIMITED
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise invalid("window_size", "(left, right)", window_size, "(-1, -1) means no window.")
    left, right = (_whole_number("window_size", entry) for entry in window_size)
    if left < -1 or right < -1:
        raise invalid("window_size", "entries >= -1", tuple(window_size), "-1 means unlimited.")
    return min(left, MAX_SEQLEN), min(right, MAX_SEQLEN)


def check_alibi(alibi_slopes: torch.Tensor, q: torch.Tensor, batch: int) -> None:
    """(nheads,) or (batch, nheads) float32 on q's device."""
    nheads = q.shape[-2]
    if alibi_slopes.dtype != torch.float32:
        raise invalid("alibi_slopes", "float32", alibi_slopes.dtype, "pass alibi_slopes.float().")
    if alibi_slopes.device != q.device:
        raise invalid("alibi_slopes", f"device {q.device}, like q", alibi_slopes.device)
    if tuple(alibi_slopes.shape) not in ((nheads,), (batch, nheads)):
        raise invalid("alibi_slopes", f"shape ({nheads},) or ({batch}, {nheads})", tuple(alibi_slopes.shape))
    if alibi_slopes.stride(-1) != 1 and nheads > 1:
        raise invalid("alibi_slopes", "stride 1 in the last dim", alibi_slopes.stride(-1), "make it contiguous.")
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "alibi_slopes: expected a tensor that needs no gradient, got requires_grad=True. "
            "Hint: pass alibi_slopes.detach(); slopes are not trained."
        )


def check_sink(learnable_sink: torch.Tensor, q: torch.Tensor) -> None:
    """(nheads,) of any float dtype on q's device."""
    nheads, hint = q.shape[-2], "one logit for each head of q."
    if not isinstance(learnable_sink, torch.Tensor):
        raise invalid("learnable_sink", f"a tensor ({nheads},)", type(learnable_sink).__name__, hint)
    if learnable_sink.dtype not in FLOAT_DTYPES:
        raise invalid("learnable_sink", _FLOATS, learnable_sink.dtype)
    if learnable_sink.device != q.device:
        raise invalid("learnable_sink", f"device {q.device}, like q", learnable_sink.device)
    if tuple(learnable_sink.shape) != (nheads,):
        raise invalid("learnable_sink", f"shape ({nheads},)", tuple(learnable_sink.shape), hint)


def check_num_splits(num_splits: int) -> int:
    """A number of splits, 0 for the back end's choice."""
    if type(num_splits) is int and 0 <= num_splits <= MAX_SPLITS:
        return num_splits
    is_flag, num_splits = isinstance(num_splits, bool), _whole_number("num_splits", num_splits)
    if is_flag or not 0 <= num_splits <= MAX_SPLITS:
        raise invalid("num_splits", f"an int in [0, {MAX_SPLITS}]", num_splits, "0 leaves the choice to the library.")
    return num_splits


def check_hints(num_splits: int, pack_gqa: bool | None, sm_margin: int) -> None:
    """Ranges of what FlashAttention-3 lets callers say about scheduling."""
    check_num_splits(num_splits)
    if pack_gqa is not None and not isinstance(pack_gqa, bool):
        raise invalid("pack_gqa", "True, False or None", pack_gqa, "None leaves the choice to the library.")
    if _whole_number("sm_margin", sm_margin) < 0:
        raise invalid("sm_margin", "an int >= 0", sm_margin)


def check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    """(batch + 1,) int32, contiguous, on q's device; the contents are not read back."""
    if not isinstance(cu_seqlens, torch.Tensor):
        raise invalid(name, "an int32 tensor (batch + 1,)", type(cu_seqlens).__name__)
    if cu_seqlens.dtype != torch.int32:
        raise invalid(name, "int32", cu_seqlens.dtype, f"pass {name}.int().")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise invalid(name, "shape (batch + 1,)", tuple(cu_seqlens.shape), "it starts with 0 and ends with the total.")
    if cu_seqlens.device != q.device:
        raise invalid(name, f"device {q.device}, like q", cu_seqlens.device, f"pass {name}.to(q.device).")
    if not cu_seqlens.is_contiguous():
        raise invalid(name, "a contiguous tensor", f"stride {cu_seqlens.stride()}", f"pass {name}.contiguous().")


def check_max_seqlen(name: str, max_seqlen: int) -> int:
    """A length in [0, MAX_SEQLEN]."""
    max_seqlen = _whole_number(name, max_seqlen)
    if not 0 <= max_seqlen <= MAX_SEQLEN:
        raise invalid(name, f"an int in [0, {MAX_SEQLEN}]", max_seqlen)
    return max_seqlen


def check_count(name: str, value: int) -> int:
    """An int of at least 1."""
    value = _whole_number(name, value)
    if value < 1:
        raise invalid(name, "an int >= 1", value)
    return value


def check_tensor(name: str, x: object) -> None:
    """Before anything is asked of a tensor."""
    if not isinstance(x, torch.Tensor):
        raise invalid(name, "a tensor", type(x).__name__)


def _whole_number(name: str, value: object) -> int:
    """An int (or what is one, such as a numpy integer; symbolic under torch.compile)."""
    if isinstance(value, torch.Tensor):
        raise invalid(name, "an int", "a tensor", "reading it would wait for the GPU: pass a host number.")
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise invalid(name, "an int", f"{value!r} ({type(value).__name__})") from None


def check_varlen(q: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> None:
    """cu_seqlens of one varlen call."""
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise invalid(
            "cu_seqlens_k", f"shape {tuple(cu_seqlens_q.shape)}, like cu_seqlens_q", tuple(cu_seqlens_k.shape)
        )
