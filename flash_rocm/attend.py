"""What the public functions share, whichever version of flash-attn they follow: autocast, the call, what it returns."""

from __future__ import annotations

from typing import Any

import torch

from flash_rocm import ops, runtime, validation, virtual_device
from flash_rocm.problem import Layout, default_softmax_scale, is_plain

AttentionResult = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast attention runs in the autocast dtype, like torch's own SDPA."""
    device_type = "cuda" if q.is_cuda else q.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    # float64 and integers stay what they are, as in every operation under autocast.
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def needs_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None) -> bool:
    """Whether a gradient of this call may be asked for."""
    return torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )


def draw_rng_state(device: torch.device) -> torch.Tensor:
    """(2,) int64 Philox seed and offset, from torch's generator of the device.

    Drawn as a tensor on the device: no wait, and a captured graph draws anew at each replay.
    """
    return torch.randint(0, 1 << 31, (2,), dtype=torch.int64, device=device)


def attend(
    layout: Layout,
    inputs: tuple[Any, ...],
    lengths: tuple[int, int],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
    return_attn_probs: bool,
    sinks: torch.Tensor | None = None,
) -> AttentionResult:
    """Call the operator, and again for S_dmask if that is asked for.

    Args:
        layout: that of q, k and v, as :func:`flash_rocm.validation.check_qkv` returns it.
        inputs: q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, checked.
        lengths: of the longest query and key sequences.
        sinks: (nheads,) of any float dtype, which its gradient has too.

    The others are those of the public functions; the scalars among them are checked here.
    """
    q, k, v = inputs[:3]
    if sinks is not None:
        if not is_plain(sinks):
            layout = Layout(q, k)  # unshared: whoever watches the sinks sees the operator
        sinks = sinks.to(torch.float32)
    scale = default_softmax_scale(layout.q_shape[-1]) if softmax_scale is None else float(softmax_scale)
    left, right = validation.check_scalars(dropout_p, scale, window_size, softcap)
    traced = layout.strides is None and torch.compiler.is_compiling()
    args = (
        *inputs,
        draw_rng_state(q.device) if dropout_p > 0.0 else None,
        sinks,
        *lengths,
        scale,
        left,
        0 if causal else right,
        float(softcap),
        float(dropout_p),
        bool(deterministic),
        needs_grad(q, k, v, sinks),
        # Eager calls pin their choice for the backward; graphs leave the environment to run time.
        runtime.override() if traced else virtual_device.request_of(q),
    )
    out, softmax_lse = ops.attention_forward(args, layout)
    if not return_attn_probs:
        return out
    if dropout_p == 0.0:
        return out, softmax_lse, q.new_empty((0,))
    with torch.no_grad():
        return out, softmax_lse, ops.attention_probs(softmax_lse, *args)
