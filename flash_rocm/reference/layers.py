"""The layers in plain torch, on any device; see :class:`flash_rocm.protocols.LayerBackend`."""

from __future__ import annotations

import torch

from flash_rocm.layer_calls import NormBackward, NormCall, NormForward, NormGradients
from flash_rocm.problem import accumulate_dtype, dropout_threshold
from flash_rocm.reference.philox import keep_mask


def rotary(
    out: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    offset: int,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Turn the first dims of x into out, which may be x."""
    dtype, half = accumulate_dtype(x.dtype), cos.shape[1]
    if cu_seqlens is None:
        sequence = torch.arange(x.shape[0], device=x.device)[:, None]
        positions = torch.arange(x.shape[1], device=x.device)[None, :]
        turned = torch.ones_like(sequence * positions, dtype=torch.bool)
    else:
        rows = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True).clamp(max=max(cu_seqlens.shape[0] - 2, 0))
        positions = rows - cu_seqlens.long()[sequence]
        turned = (rows < cu_seqlens[-1]) & (rows >= cu_seqlens[0]) & (positions < max_seqlen)
    positions = positions + (offset if seqlen_offsets is None else seqlen_offsets.long()[sequence])
    known = (turned & (positions >= 0) & (positions < cos.shape[0]))[..., None, None]
    index = positions.clamp(0, cos.shape[0] - 1)
    c, s = (table.to(dtype)[index].unsqueeze(-2) for table in (cos, sin))  # (..., seqlen, 1, half)
    if conjugate:
        s = -s
    parts = x[..., : 2 * half]
    x0, x1 = (parts[..., ::2], parts[..., 1::2]) if interleaved else (parts[..., :half], parts[..., half:])
    x0, x1 = x0.to(dtype), x1.to(dtype)
    both = torch.stack((x0 * c - x1 * s, x0 * s + x1 * c), dim=-1 if interleaved else -2).flatten(-2)
    out[..., : 2 * half] = torch.where(known, both.to(x.dtype), parts)


def _keep(inputs: NormForward | NormBackward, call: NormCall, shape: torch.Size, which: int) -> torch.Tensor:
    """Dropout mask of x (0) or x1 (1)."""
    state = inputs.rng_state
    if state is None:
        raise ValueError("rng_state: expected a tensor with dropout_p > 0, got None.")
    row, column = (torch.arange(n, device=state.device) for n in shape)
    second = torch.full((1, 1), which, dtype=torch.int64, device=state.device)
    return keep_mask(state, second, row[:, None], column[None, :], dropout_threshold(call.dropout_p))


def _weight(weight: torch.Tensor, call: NormCall, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) + 1.0 if call.zero_centered else weight.to(dtype)


def norm_forward(inputs: NormForward, call: NormCall) -> tuple[torch.Tensor | None, ...]:
    """Results of a sum and its norm, None for those that there are not."""
    x, dtype, rescale = inputs.x, accumulate_dtype(inputs.x.dtype), 1.0 / (1.0 - call.dropout_p)
    masks: list[torch.Tensor | None] = [None, None]
    total = x.to(dtype)
    if inputs.rowscale is not None:
        total = total * inputs.rowscale.to(dtype)[:, None]
    terms = [total] if inputs.x1 is None else [total, inputs.x1.to(dtype)]
    if call.dropout_p > 0.0:
        for which, term in enumerate(terms):
            keep = _keep(inputs, call, x.shape, which)
            terms[which] = torch.where(keep, term * rescale, 0.0)
            masks[which] = keep if call.return_masks else None
    if inputs.residual is not None:
        terms.append(inputs.residual.to(dtype))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    stored = None
    if call.sum_dtype is not None:
        stored = total.to(call.sum_dtype)
        total = stored.to(dtype)
    mean = None if call.rms else total.mean(1)
    centred = total if mean is None else total - mean[:, None]
    rstd = (centred.square().mean(1) + call.eps).rsqrt()
    normalised = centred * rstd[:, None]
    results: list[torch.Tensor | None] = []
    for weight, bias in ((inputs.weight, inputs.bias), (inputs.weight1, inputs.bias1)):
        if weight is None:
            results.append(None)
            continue
        y = normalised * _weight(weight, call, dtype)
        results.append((y if bias is None else y + bias.to(dtype)).to(call.out_dtype))
    return (*results, stored, mean, rstd, *masks)


def norm_backward(inputs: NormBackward, wanted: NormGradients, call: NormCall) -> tuple[torch.Tensor | None, ...]:
    """Gradients of a sum and its norm, None for those that are not wanted."""
    dtype, rescale = inputs.rstd.dtype, 1.0 / (1.0 - call.dropout_p)
    total, rstd, dy = inputs.total.to(dtype), inputs.rstd[:, None], inputs.dy.to(dtype)
    normalised = (total if inputs.mean is None else total - inputs.mean[:, None]) * rstd
    dnormalised = dy * _weight(inputs.weight, call, dtype)
    dweight, dbias = (dy * normalised).sum(0), dy.sum(0) if wanted.bias else None
    dweight1 = dbias1 = None
    if inputs.weight1 is not None and inputs.dy1 is not None:
        dy1 = inputs.dy1.to(dtype)
        dnormalised = dnormalised + dy1 * _weight(inputs.weight1, call, dtype)
        dweight1, dbias1 = (dy1 * normalised).sum(0), dy1.sum(0) if wanted.bias1 else None
    dtotal = dnormalised - normalised * (dnormalised * normalised).mean(1, keepdim=True)
    if inputs.mean is not None:
        dtotal = dtotal - dnormalised.mean(1, keepdim=True)
    dtotal = dtotal * rstd
    if inputs.dtotal is not None:
        dtotal = dtotal + inputs.dtotal.to(dtype)
    dx = dx1 = dtotal
    if call.dropout_p > 0.0:
        dx = torch.where(_keep(inputs, call, total.shape, 0), dtotal * rescale, 0.0)
        if wanted.x1_dtype is not None:
            dx1 = torch.where(_keep(inputs, call, total.shape, 1), dtotal * rescale, 0.0)
    if inputs.rowscale is not None:
        dx = dx * inputs.rowscale.to(dtype)[:, None]
    return (
        dx.to(wanted.x_dtype),
        None if wanted.x1_dtype is None else dx1.to(wanted.x1_dtype),
        None if wanted.residual_dtype is None else dtotal.to(wanted.residual_dtype),
        *(None if g is None else g.to(inputs.weight.dtype) for g in (dweight, dbias, dweight1, dbias1)),
    )


def cross_entropy_forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    given_lse: torch.Tensor | None,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, lse and z_loss of each row."""
    dtype, classes = accumulate_dtype(logits.dtype), logits.shape[1]
    scaled = logits.to(dtype) * logit_scale
    lse = scaled.logsumexp(1) if given_lse is None else given_lse.to(dtype)
    counted, known = labels != ignore_index, (labels >= 0) & (labels < classes)
    chosen = scaled.gather(1, labels.clamp(0, classes - 1)[:, None].long())[:, 0]
    z_loss = torch.where(counted, lse_square_scale * lse.square(), 0.0)
    loss = lse + z_loss - (1.0 - smoothing) * torch.where(known, chosen, torch.nan)
    if smoothing > 0.0:
        loss = loss - smoothing * scaled.mean(1)
    return torch.where(counted, loss, 0.0), lse.clone(), z_loss


def cross_entropy_backward(
    out: torch.Tensor,
    dloss: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    smoothing: float,
    logit_scale: float,
    lse_square_scale: float,
    ignore_index: int,
) -> None:
    """Write the gradient of the logits to out, which may be the logits."""
    dtype, classes = lse.dtype, logits.shape[1]
    probs = (logits.to(dtype) * logit_scale - lse[:, None]).exp()
    wanted = torch.full_like(probs, smoothing / classes)
    wanted += (torch.arange(classes, device=labels.device) == labels[:, None]) * (1.0 - smoothing)
    gradient = probs * (1.0 + 2.0 * lse_square_scale * lse)[:, None] - wanted
    gradient = gradient * (dloss.to(dtype) * logit_scale)[:, None]
    out.copy_(torch.where((labels != ignore_index)[:, None], gradient, 0.0))
