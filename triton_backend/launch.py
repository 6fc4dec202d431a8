"""Host side of the forward and backward kernels: allocation and launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flash_rocm import runtime, sinks, virtual_device
from flash_rocm.problem import AttentionInputs, AttentionProblem, layout_of, lse_shape
from flash_rocm.runtime import ConfigSource

from .backward_hopper import (
    attn_bwd_dkdv_hopper_kernel,
    attn_bwd_dq_hopper_kernel,
    tile_rows_dkdv,
    tile_rows_dq,
)
from .backward_kernels import attn_bwd_dkdv_kernel, attn_bwd_dq_kernel
from .common import INTERPRET
from .descriptors import matrix_of
from .forward_hopper import attn_fwd_hopper_kernel, tile_rows
from .forward_kernel import attn_fwd_kernel
from .launcher import Call, Launcher, Strides, Tensors, divisor_of_strides, pointers_of, strides_of
from .plan import Plan, is_plain, kernel_config, plan
from .probs_kernel import attn_probs_kernel

#: The kernels by the names that configs use.
KERNELS = {
    "forward": Launcher(attn_fwd_kernel, attn_fwd_hopper_kernel, tile_rows),
    "backward_dq": Launcher(attn_bwd_dq_kernel, attn_bwd_dq_hopper_kernel, tile_rows_dq),
    "backward_dkdv": Launcher(attn_bwd_dkdv_kernel, attn_bwd_dkdv_hopper_kernel, tile_rows_dkdv),
    "probs": Launcher(attn_probs_kernel),
}
if not INTERPRET.value:
    # Triton's key of a function depends on whether those it calls have been asked for theirs before (seen with
    # 3.6, not with 3.9).  Asked for in one order here, so that any process finds what another has compiled.
    for _launcher in KERNELS.values():
        for _function in (_launcher.kernel, _launcher.gluon):
            _ = _function and _function.cache_key


def compilations() -> int:
    """How many compiled kernels the launches of this process have needed so far."""
    return sum(len(launcher.compiled) for launcher in KERNELS.values())


def settle(
    kernel: str,
    problem: AttentionProblem,
    device: torch.device,
    key: tuple[Any, ...],
    configs: ConfigSource | None,
    plain: bool = False,
) -> tuple[tuple[Any, ...] | None, ConfigSource | None]:
    """Key and configs of a launch that is not known yet, after tuning where that is asked for.

    Args:
        plain: see :class:`flash_rocm.config_schema.Facts`.
    """
    if configs is None or not configs.tune:
        return key, configs
    if (
        plain
        and kernel_config(kernel, problem, virtual_device.arch_of(device), configs, plain).implementation != "triton"
    ):
        return key, configs  # has nothing to tune
    from .tuning import tune_at_first_use  # measures by launching, so it imports this module

    if tune_at_first_use(kernel, problem, device, configs):
        return key, configs
    # Not now: the default config, and nothing remembered that would keep a later call from tuning.
    return None, configs._replace(tune=False)


def new_call(
    kernel: str,
    problem: AttentionProblem,
    configs: ConfigSource | None,
    tensors: Tensors,
    strided: tuple[torch.Tensor, ...],
    lse_strides: tuple[int, int],
    alibi_slopes: torch.Tensor | None,
    has_dlse: bool = False,
) -> Call:
    """What launching a kernel takes that no earlier launch has worked out.

    Args:
        tensors: the kernel's pointers.
        strided: of these, the ones whose strides it takes: q, k and, where it reads them, v and dout.
    """
    q = strided[0]
    strides = tuple(strides_of(x) for x in strided)
    plain = kernel != "probs" and is_plain_call(problem, strided)
    current = plan(kernel, problem, virtual_device.arch_of(q.device), configs, plain)
    is_backward = kernel.startswith("backward")
    row = max(problem.headdim if is_backward else 0, problem.headdim_v if kernel != "probs" else 0)
    constants = _layout_constants(current, q.element_size(), strides, problem.nheads * row)
    heads = problem.nheads_k if kernel == "backward_dkdv" else problem.nheads
    scalars: list[int | float] = [*_divided(strides, constants["VEC"]), slopes_stride(alibi_slopes)]
    scalars += _counts(problem, current, heads)
    if is_backward:
        constants["HAS_DLSE"] = has_dlse
        scalars.append(problem.softmax_scale)
    scalars += _modifiers(current)
    if kernel != "probs":
        scalars.append(current.dropout_rescale)
    programs = current.blocks * problem.batch * heads
    tiles = KERNELS[kernel].tiles_of(current, problem.dtype)
    if tiles and kernel == "forward":
        # Programs take one tile after another; unequal ones the chip deals better, as programs become free.
        programs = programs if problem.varlen else min(programs, virtual_device.arch_of(q.device).num_cus)
    return Call(current, programs, tensors, lse_strides, tuple(scalars), constants, tiles)


def _strides_key(inputs: AttentionInputs) -> object:
    """Stands for the strides of q, k and v and their device in the key of a launch."""
    return (inputs.layout or layout_of(inputs.q, inputs.k, inputs.v)).strides


def lse_strides_of(softmax_lse: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of softmax_lse and of what shares its layout."""
    stride = softmax_lse.stride()
    return (stride[0], stride[1]) if len(stride) == 3 else (0, stride[0])


def is_plain_call(problem: AttentionProblem, strided: tuple[torch.Tensor, ...]) -> bool:
    """Facts.plain of the config schema for a problem and its tensors.

    Their rows start at multiples of 16 bytes, and those that TMA copies are matrices to it; of a K/V cache not all
    are (``cached._are_tiles``).
    """
    itemsize = problem.dtype.itemsize
    return (
        is_plain(problem)
        and all(x.data_ptr() % 16 == 0 for x in strided)
        and divisor_of_strides(tuple(map(strides_of, strided)), itemsize) * itemsize == 16
        and (problem.cached or all(matrix_of(x) is not None for x in strided))
    )


def _layout_constants(
    current: Plan, itemsize: int, strides: tuple[Strides, ...], contiguous_row: int
) -> dict[str, Any]:
    """Kernel constants that follow from the layout.  WIDE: an offset inside one tile can pass 2^31 elements."""
    longest_row = max(contiguous_row, *(row for _, row, _ in strides))
    rows = max(current.config.BLOCK_M, current.config.BLOCK_N)
    vec = divisor_of_strides(strides, itemsize)
    constants: dict[str, Any] = {"VEC": vec, "WIDE": longest_row * rows >= 1 << 31}
    if vec * itemsize < 4 and "BLOCK_DV" in current.constants:
        # Seen on an H200 with Triton 3.6: loads of 2 bytes, which cannot be asynchronous copies, into a
        # V tile narrower than the K tile give wrong results or fault.  Equal tiles are right.
        block = max(current.constants["BLOCK_D"], current.constants["BLOCK_DV"])
        constants |= {"BLOCK_D": block, "BLOCK_DV": block}
    return constants


def _divided(strides: tuple[Strides, ...], vec: int) -> tuple[int, ...]:
    return tuple(stride // vec for tensor in strides for stride in tensor)


def slopes_stride(slopes: torch.Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def _counts(problem: AttentionProblem, current: Plan, heads: int) -> tuple[int, ...]:
    """Kernel arguments from batch_heads to num_blocks; heads: those the grid runs over."""
    lengths = (problem.seqlen_q, problem.seqlen_k)
    return (problem.batch * heads, heads, problem.group_size, *lengths, current.blocks)


def _modifiers(current: Plan) -> tuple[int | float, ...]:
    """Kernel arguments from scale to dropout_threshold."""
    return (
        current.scale,
        current.softcap_log2,
        current.window_left,
        current.window_right,
        current.dropout_threshold,
    )


def _new(x: torch.Tensor, shape: Sequence[int], varlen: bool) -> torch.Tensor:
    """Kernels write every row of dense results; varlen ones may have rows that no sequence owns."""
    return x.new_zeros(shape) if varlen else x.new_empty(shape)


def forward(problem: AttentionProblem, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse of one call; see :class:`flash_rocm.protocols.Backend`."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, rng_state, logits, _ = inputs
    if logits is not None:
        logits = logits.contiguous()
    if problem.varlen:
        # Rows that no sequence owns are not written by the kernel.
        out = q.new_zeros((*q.shape[:-1], problem.headdim_v))
        lse = q.new_full(lse_shape(q), float("-inf"), dtype=torch.float32)
    else:
        # empty_like where it gives the same: half the host time of a shape in Python.
        if problem.headdim == problem.headdim_v and q.is_contiguous():
            out = torch.empty_like(q)
        else:
            out = q.new_empty((problem.batch, problem.seqlen_q, problem.nheads, problem.headdim_v))
        lse = q.new_empty((problem.batch, problem.nheads, problem.seqlen_q), dtype=torch.float32)
    tensors = (q, k, v, out, lse, slopes, rng_state, cu_seqlens_q, cu_seqlens_k, logits)
    pointers, facts = pointers_of(tensors)
    lse_strides = lse_strides_of(lse)
    configs = runtime.config_source()
    key = (problem, _strides_key(inputs), slopes is None or slopes.stride(), facts, configs)
    launcher = KERNELS["forward"]
    totals = (q.shape[0], k.shape[0], v.shape[0]) if problem.varlen else ()
    if launcher.launch_known(key, [*pointers, *lse_strides], totals):
        return out, lse
    known_as, configs = settle("forward", problem, q.device, key, configs, is_plain_call(problem, (q, k, v)))
    launcher.launch_new(known_as, new_call("forward", problem, configs, tensors, (q, k, v), lse_strides, slopes))
    return out, lse


def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dv and dsinks of one call; see :class:`flash_rocm.protocols.Backend`.

    Two launches: dQ, which also leaves delta in a (batch, nheads, seqlen_q) float32 buffer, then
    dK and dV, which reads it.  dsinks is a sum over that buffer.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, rng_state, *_ = inputs
    out, softmax_lse = out.contiguous(), softmax_lse.contiguous()
    dlse = dlse.contiguous() if dlse is not None else None
    dq = _new(q, q.shape, problem.varlen)
    dk = _new(k, k.shape, problem.varlen)
    dv = _new(v, v.shape, problem.varlen)
    delta = torch.empty_like(softmax_lse)
    optional = (slopes, rng_state, cu_seqlens_q, cu_seqlens_k)
    dq_tensors = (q, k, v, dout, out, softmax_lse, dlse, delta, dq, *optional)
    dkdv_tensors = (q, k, v, dout, softmax_lse, delta, dk, dv, *optional)
    configs = runtime.config_source()
    lse_strides = lse_strides_of(softmax_lse)
    totals = (q.shape[0], k.shape[0], v.shape[0], dout.shape[0]) if problem.varlen else ()
    dq_pointers, dq_facts = pointers_of(dq_tensors)
    dkdv_pointers, dkdv_facts = pointers_of(dkdv_tensors)
    key = (
        problem,
        _strides_key(inputs),
        dout.stride(),
        slopes is None or slopes.stride(),
        dlse is None,
        dq_facts,
        dkdv_facts,
        configs,
    )
    dq_done = KERNELS["backward_dq"].launch_known(key, [*dq_pointers, *lse_strides], totals)
    if dq_done and KERNELS["backward_dkdv"].launch_known(key, [*dkdv_pointers, *lse_strides], totals):
        return dq, dk, dv, _dsinks(inputs, softmax_lse, delta)

    for kernel, tensors in (("backward_dq", dq_tensors), ("backward_dkdv", dkdv_tensors)):
        known_as, settled = settle(kernel, problem, q.device, key, configs, is_plain_call(problem, (q, k, v, dout)))
        call = new_call(
            kernel, problem, settled, tensors, (q, k, v, dout), lse_strides, slopes, has_dlse=dlse is not None
        )
        KERNELS[kernel].launch_new(known_as, call)
    return dq, dk, dv, _dsinks(inputs, softmax_lse, delta)


def _dsinks(inputs: AttentionInputs, softmax_lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor | None:
    return None if inputs.sinks is None else sinks.gradient(inputs.sinks, softmax_lse, delta)


def probs(problem: AttentionProblem, inputs: AttentionInputs, softmax_lse: torch.Tensor) -> torch.Tensor:
    """S_dmask (batch, nheads, seqlen_q, seqlen_k); see :class:`flash_rocm.protocols.Backend`."""
    q, k, _, cu_seqlens_q, cu_seqlens_k, slopes, rng_state, *_ = inputs
    softmax_lse = softmax_lse.contiguous()
    configs = runtime.config_source()
    result = q.new_zeros((problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k))
    tensors = (q, k, softmax_lse, result, slopes, rng_state, cu_seqlens_q, cu_seqlens_k)
    pointers, facts = pointers_of(tensors)
    lse_strides = lse_strides_of(softmax_lse)
    key = (problem, _strides_key(inputs), slopes is None or slopes.stride(), facts, configs)
    if not KERNELS["probs"].launch_known(key, [*pointers, *lse_strides]):
        KERNELS["probs"].launch_new(key, new_call("probs", problem, configs, tensors, (q, k), lse_strides, slopes))
    return result
