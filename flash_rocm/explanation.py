"""``explain``: what a call would do, without doing it."""

from __future__ import annotations

import torch

from flash_rocm import backends, cache_ops, cache_validation, ops, runtime, validation, virtual_device
from flash_rocm.arch import Arch
from flash_rocm.attend import autocast, needs_grad
from flash_rocm.inference import dropout_over_pages
from flash_rocm.problem import AttentionInputs, CacheInputs, default_softmax_scale


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    block_table: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    arch: Arch | None = None,
) -> backends.Explanation:
    """Which back end a call with these arguments takes, and for every other one each reason why not.

    Takes the arguments of :func:`flash_attn_func` or :func:`flash_attn_varlen_func` and the
    learnable_sink of :mod:`flash_rocm.v3` (tensors may be on the ``meta`` device).  Nothing runs.

    Args:
        arch: judge for another device, such as ``flash_rocm.arch.amd_arch("gfx942", 304)``; default: q's.

    Raises:
        ValueError: the arguments are wrong.  A call that no back end can run does not raise here.
    """
    q, k, v = autocast(q, k, v)
    varlen_only = {
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "block_table": block_table,
    }
    if cu_seqlens_q is None:
        for name, value in varlen_only.items():
            if value is not None:
                raise validation.invalid(name, "None without cu_seqlens_q", "a value", "a varlen call needs both.")
        validation.check_qkv(q, k, v, 4, 4)
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        if cu_seqlens_k is None:
            raise validation.invalid("cu_seqlens_k", "a tensor like cu_seqlens_q", None)
        batch = cu_seqlens_q.shape[0] - 1
        if block_table is None:
            validation.check_qkv(q, k, v, 3, 3)
            validation.check_varlen(q, cu_seqlens_q, cu_seqlens_k)
        total_k = k.shape[0] if block_table is None else block_table.shape[1] * k.shape[1]
        max_seqlen_q = validation.check_max_seqlen("max_seqlen_q", q.shape[0] if max_seqlen_q is None else max_seqlen_q)
        max_seqlen_k = validation.check_max_seqlen("max_seqlen_k", total_k if max_seqlen_k is None else max_seqlen_k)
    if alibi_slopes is not None:
        validation.check_alibi(alibi_slopes, q, batch)
    if learnable_sink is not None:
        validation.check_sink(learnable_sink, q)
    scale = default_softmax_scale(q.shape[-1]) if softmax_scale is None else softmax_scale
    left, right = validation.check_scalars(dropout_p, scale, window_size, softcap)
    mask = (left, 0 if causal else right, softcap)
    if block_table is None:
        inputs = AttentionInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks=learnable_sink)
        scalars = (
            max_seqlen_q,
            max_seqlen_k,
            scale,
            *mask,
            dropout_p,
            deterministic,
            needs_grad(q, k, v, learnable_sink),
        )
        problem = ops.problem_of(inputs, (*scalars, ""))
    else:
        if dropout_p > 0.0:
            raise dropout_over_pages(dropout_p)
        pages = CacheInputs(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            block_table=block_table,
            alibi_slopes=alibi_slopes,
            sinks=learnable_sink,
        )
        cache_validation.check_inputs(pages, {})
        problem = cache_ops.problem_of(pages, (max_seqlen_q, max_seqlen_k, 0, scale, *mask, 0, False, 0, ""))
    return backends.explain_problem(
        problem, virtual_device.arch_of(q.device) if arch is None else arch, runtime.requested_backend()
    )
