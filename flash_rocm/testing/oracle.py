"""The attention oracle: whole matrices in float64, gradients from autograd."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from flash_rocm.problem import AttentionInputs, AttentionProblem, accumulate_dtype, lse_shape
from flash_rocm.testing.philox import oracle_keep


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What :func:`oracle_attention` returns.  Gradients are None without ``dout``.

    ``probs`` is S_dmask (batch, nheads, longest seqlen_q, longest seqlen_k).  ``rounding`` (exact oracle
    only) holds, per result, what one rounding means beyond the result's own:

    * a result is a sum of terms in the accumulation dtype (fp32).  Terms that each pass n roundings leave
      it sqrt(n) * eps / 2 * sum |terms| uncertain in any order of summation (Higham and Mary, "A new
      approach to probabilistic rounding error analysis", 2019).  That matters where terms cancel, as in
      dq and dk of a row that sees one key: they are exactly 0, and so is the error of the plain computation;
    * backward starts from the ``out`` that forward rounded and stored: dq and dk also get the error that
      rounding the exact ``out`` to its dtype causes, computed, not bounded.  Likewise backward
      recomputes P from the LSE that forward stored.  LSE is in natural units while kernels reckon in
      log2 units: it is rounded on the way out and on the way back, 2 * eps / 2 * |lse| off.
    """

    out: torch.Tensor
    lse: torch.Tensor
    probs: torch.Tensor
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None
    dsinks: torch.Tensor | None = None  # without sinks None, too
    rounding: dict[str, float] = dataclasses.field(default_factory=dict)


class _Sequence(NamedTuple):
    """Naive attention of one sequence: q (Sq, H, D), k and v (Sk, H, D), heads expanded."""

    out: torch.Tensor  # (Sq, H, Dv)
    lse: torch.Tensor  # (H, Sq)
    p: torch.Tensor  # (H, Sq, Sk) softmax
    p_sink: torch.Tensor  # (H, Sq) what the sink takes of the softmax
    kept: torch.Tensor  # (H, Sq, Sk) bool
    slope: torch.Tensor | float  # derivative of the softcap
    visible: torch.Tensor  # (Sq, Sk)


def oracle_attention(
    inputs: AttentionInputs,
    problem: AttentionProblem,
    dout: torch.Tensor | None = None,
    dlse: torch.Tensor | None = None,
    *,
    upcast: bool = True,
) -> Oracle:
    """Naive attention and its gradients.

    ``upcast=True``: everything in float64, the truth.  ``upcast=False``: every operation in the input
    dtype, the yardstick of the error budgets; float64 inputs run in float32 then, as nothing is more
    exact than the truth, and :func:`assert_close_to_oracle` scales that error.
    Memory is O(seqlen^2): for small problems.  Runs on the device of the inputs.
    """
    p = problem
    dtype = torch.float64 if upcast else (torch.float32 if p.dtype == torch.float64 else p.dtype)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    sinks = inputs.sinks.detach().to(dtype).requires_grad_() if p.sinks and inputs.sinks is not None else None
    out = q.new_zeros(*q.shape[:-1], p.headdim_v)
    lse = q.new_full(lse_shape(q), float("-inf"))
    probs = q.new_zeros(p.batch, p.nheads, p.seqlen_q, p.seqlen_k)
    rounding: dict[str, float] = {}
    for b in range(p.batch):
        rows, cols = _rows(inputs.cu_seqlens_q, b), _rows(inputs.cu_seqlens_k, b)
        q_b, k_b, v_b = q[rows], k[cols], v[cols]
        k_b, v_b = (x.repeat_interleave(p.nheads // p.nheads_k, dim=1) for x in (k_b, v_b))
        result = naive_sequence(p, inputs, b, q_b, k_b, v_b, sinks)
        lse_rows = (slice(None), rows) if p.varlen else b
        out[rows] = result.out
        lse[lse_rows] = result.lse
        signed = torch.where(result.kept, result.p, -result.p).detach()
        probs[b, :, : q_b.shape[0], : k_b.shape[0]] = signed
        if upcast:
            send = None if dout is None else dout[rows].to(dtype)
            send_lse = None if dlse is None else dlse[lse_rows].to(dtype)
            for name, value in roundings(p, q_b, k_b, v_b, result, send, send_lse).items():
                # All sequences add to the gradient of a sink.
                known = rounding.get(name, 0.0)
                rounding[name] = known + value if name == "dsinks" else max(value, known)
    grads: list[torch.Tensor] = []
    if dout is not None:
        leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
        grads = _gradients(problem, inputs, leaves, (out, lse), dout, dlse)
    by_name = dict(zip(("dq", "dk", "dv", "dsinks"), grads, strict=False))
    return Oracle(out.detach(), lse.detach(), probs, rounding=rounding, **by_name)


def _gradients(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    leaves: tuple[torch.Tensor, ...],
    results: tuple[torch.Tensor, torch.Tensor],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> list[torch.Tensor]:
    if not problem.batch:
        return [torch.zeros_like(x) for x in leaves]
    real = _real_rows(inputs.cu_seqlens_q, dout)
    sent = [dout.to(leaves[0].dtype).masked_fill(~real[..., None, None], 0.0)]
    if dlse is not None:
        sent.append(dlse.to(leaves[0].dtype).masked_fill(~(real if problem.varlen else real[:, None, :]), 0.0))
    grads = torch.autograd.grad(results[: len(sent)], leaves, sent, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def _rows(cu_seqlens: torch.Tensor | None, b: int) -> Any:
    """Index of batch b in a dense tensor, of its rows in a varlen one."""
    return b if cu_seqlens is None else slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))


def _real_rows(cu_seqlens: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Bool mask of the leading (position) dimensions: False for varlen rows of no sequence."""
    if cu_seqlens is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    position = torch.arange(x.shape[0], device=x.device)
    return (position >= cu_seqlens[0]) & (position < cu_seqlens[-1])


def naive_sequence(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    b: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
) -> _Sequence:
    sq, sk = q.shape[0], k.shape[0]
    i = torch.arange(sq, device=q.device)[:, None]
    j = torch.arange(sk, device=q.device)[None, :]
    diagonal = i + (sk - sq)
    scores = torch.einsum("ihd,jhd->hij", q, k) * problem.softmax_scale
    slope: torch.Tensor | float = 1.0
    if problem.softcap > 0.0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
        slope = 1.0 - (scores.detach() / problem.softcap) ** 2
    if problem.alibi and inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes if inputs.alibi_slopes.dim() == 1 else inputs.alibi_slopes[b]
        scores = scores - slopes.to(q.dtype)[:, None, None] * (diagonal - j).abs().to(q.dtype)
    visible = torch.ones(sq, sk, dtype=torch.bool, device=q.device)
    if problem.window_left >= 0:
        visible = visible & (j >= diagonal - problem.window_left)
    if problem.window_right >= 0:
        visible = visible & (j <= diagonal + problem.window_right)
    if problem.attention_chunk > 0:
        start = diagonal - diagonal % problem.attention_chunk
        visible = visible & (j >= start) & (j < start + problem.attention_chunk)
    logits = q.new_full((q.shape[1],), float("-inf")) if sinks is None else sinks
    alive = visible.any(-1) | (logits > float("-inf"))[:, None]  # (H, Sq)
    # A dead row is computed as if nothing were masked, so that autograd sees no NaN, and then erased.
    scores = scores.masked_fill(~visible & alive[..., None], float("-inf"))
    # The sink is a last column without a value.
    scores = torch.cat((scores, logits[:, None, None].expand(-1, sq, 1)), dim=-1)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(~alive, float("-inf"))
    whole = torch.softmax(scores, dim=-1).masked_fill(~alive[..., None], 0.0)
    p, p_sink = whole[..., :sk], whole[..., sk]
    kept, dropped = torch.ones_like(p, dtype=torch.bool), p
    if problem.dropout_p > 0.0 and inputs.rng_state is not None:
        kept = oracle_keep(inputs.rng_state, problem, b, sq, sk)
        dropped = p * kept.to(q.dtype) / (1.0 - problem.dropout_p)
    out = torch.einsum("hij,jhd->ihd", dropped, v)
    return _Sequence(out, lse, p, p_sink, kept, slope, visible)


@torch.no_grad()
def roundings(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    result: _Sequence,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
) -> dict[str, float]:
    """The values of :attr:`Oracle.rounding` for one sequence, named like the results."""
    if result.p.numel() == 0:
        return {}
    unit = torch.finfo(accumulate_dtype(problem.dtype)).eps / 2
    group, scale = problem.group_size, abs(problem.softmax_scale)
    (sq, _, dim), (sk, _, dim_v) = q.shape, v.shape
    p, factor = result.p, result.kept.to(result.p.dtype) / (1.0 - problem.dropout_p)
    p_dropped = p * factor

    def largest(sums: torch.Tensor, roundings: int) -> torch.Tensor:
        return sums.max() * unit * roundings**0.5

    def by_kv_head(x: torch.Tensor) -> torch.Tensor:  # (Sk, H, D) -> (Sk, Hk, D)
        return x.unflatten(1, (-1, group)).sum(2)

    terms = torch.einsum("ihd,jhd->hij", q.abs(), k.abs()) * result.visible * scale
    stored_lse = result.lse.abs().nan_to_num(posinf=0.0)[..., None]
    bands = {
        "out": largest(torch.einsum("hij,jhd->ihd", p_dropped, v.abs()), dim + sk),
        "lse": largest(terms, dim),
        "probs": largest(p * (terms + stored_lse), dim),
    }
    if dout is not None:
        # A rounding of LSE moves a whole row of P at once; its terms do not average out.
        row = stored_lse * (2 * unit)
        dp = torch.einsum("ihd,jhd->hij", dout.abs(), v.abs()) * factor
        ds = dp + (p * dp).sum(-1, keepdim=True)
        if dlse is not None:
            ds = ds + dlse.abs()[..., None]
        ds = ds * p * scale
        lost = (dout * (result.out.to(problem.dtype).to(q.dtype) - result.out)).sum(-1).T  # (H, Sq)
        ds_lost = p * result.slope * lost[..., None] * scale
        bands["dq"] = largest(torch.einsum("hij,jhd->ihd", ds, k.abs()), dim + dim_v + sk)
        bands["dq"] += torch.einsum("hij,jhd->ihd", ds_lost, k).abs().max()
        bands["dk"] = largest(by_kv_head(torch.einsum("hij,ihd->jhd", ds, q.abs())), dim + dim_v + sq * group)
        bands["dk"] += by_kv_head(torch.einsum("hij,ihd->jhd", ds_lost, q)).abs().max()
        bands["dv"] = largest(by_kv_head(torch.einsum("hij,ihd->jhd", p_dropped, dout.abs())), dim + sq * group)
        bands["dq"] += torch.einsum("hij,jhd->ihd", ds * row, k.abs()).max()
        bands["dk"] += by_kv_head(torch.einsum("hij,ihd->jhd", ds * row, q.abs())).max()
        bands["dv"] += by_kv_head(torch.einsum("hij,ihd->jhd", p_dropped * row, dout.abs())).max()
        sent = (dout * result.out).abs().sum(-1).T + (0.0 if dlse is None else dlse.abs())  # (H, Sq)
        bands["dsinks"] = largest((result.p_sink * sent).sum(-1), dim_v + sq * problem.batch)
        bands["dsinks"] += (result.p_sink * lost).sum(-1).abs().max() + (result.p_sink * sent * row[..., 0]).sum(
            -1
        ).max()
    return {name: float(band) for name, band in bands.items()}
