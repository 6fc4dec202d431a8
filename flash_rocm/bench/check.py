"""Is a result right?  Whoever fails here gets no speed.

Two (batch, head) pairs, the first and the last, are computed again in float64, chunk by chunk of the
queries, so that a 64k sequence fits.  How much error is fine is measured, not set: the same
formula computed plainly in the inputs' dtype may be off by E, and a peer by 2 E in the output and
3 E in the gradients, plus one rounding of the largest element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from flash_rocm.bench.shapes import Data, Shape

#: Allowed error as a multiple of the plain low-precision computation's.
FACTORS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}
_CHUNK_BYTES = 256 << 20


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor | None,
    causal: bool,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Plain attention and its gradients with every intermediate result in ``dtype``.

    Args:
        q: (heads, seqlen, headdim), like k, v and dout; without dout only ``out`` is computed.

    Returns:
        ``out`` and, given dout, ``dq``, ``dk``, ``dv``, each (heads, seqlen, headdim) of ``dtype``.
    """
    heads, seqlen, headdim = q.shape
    scale = 1.0 / math.sqrt(headdim)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    accumulate = torch.promote_types(dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros(k.shape, dtype=accumulate, device=k.device) for _ in range(2))
    rows = max(1, min(seqlen, _CHUNK_BYTES // (heads * seqlen * accumulate.itemsize)))
    for start in range(0, seqlen, rows):
        end = min(start + rows, seqlen)
        keys = end if causal else seqlen
        scores = q[:, start:end] @ k[:, :keys].mT * scale
        if causal:
            row, column = torch.arange(start, end, device=q.device), torch.arange(keys, device=q.device)
            scores.masked_fill_(column > row[:, None], -math.inf)
        probs = scores.softmax(-1)
        out[:, start:end] = probs @ v[:, :keys]
        if dout is None:
            continue
        do = dout[:, start:end].to(dtype)
        dprobs = do @ v[:, :keys].mT
        dscores = probs * (dprobs - (probs * dprobs).sum(-1, keepdim=True))
        dq[:, start:end] = dscores @ k[:, :keys] * scale
        dk[:, :keys] += dscores.mT @ q[:, start:end] * scale
        dv[:, :keys] += probs.mT @ do
    if dout is None:
        return {"out": out}
    return {"out": out, "dq": dq, "dk": dk.to(dtype), "dv": dv.to(dtype)}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Result of a check; ``problem`` is empty if it passed."""

    problem: str
    errors: dict[str, tuple[float, float]]  # tensor -> (largest error, allowed)


class Expected:
    """What every peer must compute for one shape, on the two heads looked at."""

    def __init__(self, shape: Shape, data: Data, training: bool) -> None:
        self.shape = shape
        self.pairs = tuple(dict.fromkeys(((0, 0), (shape.batch - 1, shape.nheads - 1))))
        q, k, v, dout = (self._heads(x) for x in data)
        given = dout if training else None
        self.values = attention(q, k, v, given, shape.causal, torch.float64)
        naive = attention(q, k, v, given, shape.causal, shape.torch_dtype)
        eps = torch.finfo(shape.torch_dtype).eps
        self.allowed = {
            name: FACTORS[name] * _largest(naive[name].double() - value) + eps * _largest(value)
            for name, value in self.values.items()
        }

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[batch, :, head] for batch, head in self.pairs])

    def verdict(self, results: Mapping[str, torch.Tensor]) -> Verdict:
        """Judge tensors of shape (batch, seqlen, nheads, headdim): dtype, shape, finite, values."""
        shape = self.shape
        errors: dict[str, tuple[float, float]] = {}
        size = (shape.batch, shape.seqlen, shape.nheads, shape.headdim)
        for name, value in self.values.items():
            result = results[name]
            if result.dtype != shape.torch_dtype or tuple(result.shape) != size:
                got = f"{result.dtype} {tuple(result.shape)}"
                return Verdict(f"{name} is {got}, expected {shape.torch_dtype} {size}", errors)
            heads = self._heads(result)
            if not bool(torch.isfinite(heads).all()):
                return Verdict(f"{name} is not finite", errors)
            errors[name] = (_largest(heads.double() - value), self.allowed[name])
        wrong = [
            f"{name} is off by {error:.3g}, allowed {allowed:.3g}"
            for name, (error, allowed) in errors.items()
            if error > allowed
        ]
        return Verdict("; ".join(wrong), errors)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max())
