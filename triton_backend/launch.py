"""Allocation and launch: the host side of the Triton kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton

from flash_rocm import runtime
from flash_rocm.config_schema import ConfigError
from flash_rocm.problem import AttentionInputs, AttentionProblem, lse_shape

from . import virtual
from .backward_kernels import attn_bwd_dkdv_kernel, attn_bwd_dq_kernel
from .common import INTERPRET
from .forward_kernel import attn_fwd_kernel
from .plan import Plan, plan
from .probs_kernel import attn_probs_kernel

_KNOWN_MAX = 4096
_IS_HIP = bool(torch.version.hip)
_hooks = triton.knobs.runtime
#: Buffer instructions of AMD chips reach this far; Triton compiles another kernel beyond.
_BUFFER_BYTES = (1 << 31) - 1

Strides = tuple[int, int, int]


class _Known:
    """A compiled kernel with everything its launch takes but what is new at each call."""

    __slots__ = ("compiled", "programs", "run", "function", "metadata", "tail", "stream_of")

    def __init__(self, compiled: Any, programs: int, tail: tuple[Any, ...]) -> None:
        self.compiled, self.programs, self.tail = compiled, programs, tail
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.stream_of = triton.runtime.driver.active.get_current_stream


class Launcher:
    """Launches one kernel, remembering what was compiled for which call.

    Triton works out the specialisation of every argument at every launch, which takes longer on the
    host than a small kernel does on the GPU.  Lengths, counts and strides of these kernels are not
    specialised at all, so that all a compiled kernel depends on is its constants and, of its
    pointers, alignment and (on AMD) extent.  The key of a call holds these, and all that its
    run-time numbers follow from; a known key launches without looking at anything again.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[tuple[Any, ...], _Known] = {}

    def launch_known(self, key: tuple[Any, ...], index: int, fresh: list[int | None]) -> bool:
        """Launch on device ``index`` what :meth:`launch_new` remembered under ``key``; False if nothing was.

        Args:
            fresh: what is no part of the key: pointers, and strides of softmax_lse, which for varlen
                follow from the total of the lengths.
        """
        known = self._known.get(key)
        if known is None:
            return False
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self.launch_known(key, index, fresh)
        programs, tail = known.programs, known.tail
        if _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:
            # A profiler wants to see the launch: the way that calls its hooks.
            known.compiled[(programs, 1, 1)](*fresh, *tail)
            return True
        stream = known.stream_of(index)
        known.run(programs, 1, 1, stream, known.function, known.metadata, None, None, None, *fresh, *tail)
        return True

    def launch_new(
        self,
        key: tuple[Any, ...],
        current: Plan,
        programs: int,
        tensors: tuple[torch.Tensor | None, ...],
        lse_strides: tuple[int, int],
        scalars: tuple[int | float, ...],
        layout_constants: dict[str, Any],
    ) -> None:
        """Compile if needed, launch ``programs`` workgroups, remember under ``key``.

        Args:
            scalars: run-time numbers behind the strides of softmax_lse, all of which follow from the key.
            layout_constants: VEC, WIDE and what else does not follow from the problem.
        """
        if INTERPRET.value != runtime.triton_interpret():
            raise RuntimeError(
                "TRITON_INTERPRET: expected the value it had when the kernels were imported, "
                f"{int(INTERPRET.value)}, got {int(runtime.triton_interpret())}. Hint: set it before Python starts."
            )
        values = {**current.constants, **layout_constants}
        names = self.kernel.arg_names[len(tensors) + len(lse_strides) + len(scalars) :]
        tail = (*scalars, *(values[name] for name in names))
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cpu" and not INTERPRET.value:
            virtual.launch(self.kernel, current, programs, tensors, (*lse_strides, *scalars), values)
            return
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            try:
                compiled = self.kernel[(programs,)](*tensors, *lse_strides, *tail, **current.options)
            except triton.OutOfResources as error:
                raise ConfigError(
                    f"{current.config.describe()}: expected a kernel that fits the chip, {error}"
                ) from error
        if not INTERPRET.value:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[key] = _Known(compiled, programs, tail)


#: The kernels by the names that configs use.
KERNELS = {
    "forward": Launcher(attn_fwd_kernel),
    "backward_dq": Launcher(attn_bwd_dq_kernel),
    "backward_dkdv": Launcher(attn_bwd_dkdv_kernel),
    "probs": Launcher(attn_probs_kernel),
}


def _pointers(tensors: tuple[torch.Tensor | None, ...]) -> tuple[list[int | None], Any]:
    """Addresses, and what Triton specialises them on; 0 for the usual case, all 16-byte aligned.

    Launches take numbers: about a tensor Triton would ask the driver, which the first launch has done.
    """
    pointers = [None if x is None else x.data_ptr() for x in tensors]
    combined = 0
    for pointer in pointers:
        if pointer:
            combined |= pointer
    far = _IS_HIP and any(x is not None and _is_far(x) for x in tensors)
    if combined & 15 == 0 and not far:
        return pointers, 0
    return pointers, tuple(None if x is None else (x.data_ptr() & 15 == 0, far and _is_far(x)) for x in tensors)


def _is_far(x: torch.Tensor) -> bool:
    return x.untyped_storage().nbytes() > _BUFFER_BYTES


def _strides(x: torch.Tensor) -> Strides:
    """(batch, row, head) strides in elements; the batch stride of varlen tensors is 0."""
    stride = x.stride()
    return (stride[0], stride[1], stride[2]) if len(stride) == 4 else (0, stride[0], stride[1])


def _lse_strides(softmax_lse: torch.Tensor) -> tuple[int, int]:
    """(batch, head) strides of softmax_lse and of what shares its layout."""
    stride = softmax_lse.stride()
    return (stride[0], stride[1]) if len(stride) == 3 else (0, stride[0])


def _layout_constants(
    current: Plan, itemsize: int, strides: tuple[Strides, ...], contiguous_row: int
) -> dict[str, Any]:
    """Kernel constants that follow from the layout.

    VEC is the largest power of two, up to 16 bytes, that divides every stride.  WIDE: an offset inside
    one tile can pass 2^31 elements.
    """
    combined = 16 // itemsize
    longest_row = contiguous_row
    for batch, row, head in strides:
        combined |= batch | row | head
        longest_row = max(longest_row, row)
    rows = max(current.config.BLOCK_M, current.config.BLOCK_N)
    vec = combined & -combined
    constants: dict[str, Any] = {"VEC": vec, "WIDE": longest_row * rows >= 1 << 31}
    if vec * itemsize < 4 and "BLOCK_DV" in current.constants:
        # Seen on an H200 with Triton 3.6: loads of 2 bytes, which cannot be asynchronous copies, into a
        # V tile narrower than the K tile give wrong results or fault.  Equal tiles are right.
        block = max(current.constants["BLOCK_D"], current.constants["BLOCK_DV"])
        constants |= {"BLOCK_D": block, "BLOCK_DV": block}
    return constants


def _divided(strides: tuple[Strides, ...], vec: int) -> tuple[int, ...]:
    return tuple(stride // vec for tensor in strides for stride in tensor)


def _slopes_stride(slopes: torch.Tensor | None) -> int:
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
    """out and softmax_lse of one call; see :class:`flash_rocm.backends.Backend`."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, rng_state, _ = inputs
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
    tensors = (q, k, v, out, lse, slopes, rng_state, cu_seqlens_q, cu_seqlens_k)
    pointers, facts = _pointers(tensors)
    lse_strides = _lse_strides(lse)
    index = q.get_device()
    configs = runtime.config_source()
    key = (problem, q.stride(), k.stride(), v.stride(), slopes is None or slopes.stride(), index, facts, configs)
    launcher = KERNELS["forward"]
    if launcher.launch_known(key, index, [*pointers, *lse_strides]):
        return out, lse
    current = plan("forward", problem, runtime.arch_of(q.device), configs)
    strides = (_strides(q), _strides(k), _strides(v))
    constants = _layout_constants(current, q.element_size(), strides, problem.nheads * problem.headdim_v)
    scalars = (
        *_divided(strides, constants["VEC"]),
        _slopes_stride(slopes),
        *_counts(problem, current, problem.nheads),
        *_modifiers(current),
        current.dropout_rescale,
    )
    programs = current.blocks * problem.batch * problem.nheads
    launcher.launch_new(key, current, programs, tensors, lse_strides, scalars, constants)
    return out, lse


def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of one call; see :class:`flash_rocm.backends.Backend`.

    Two launches: dQ, which also leaves delta in a (batch, nheads, seqlen_q) float32 buffer, then
    dK and dV, which reads it.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, slopes, rng_state, _ = inputs
    out, softmax_lse = out.contiguous(), softmax_lse.contiguous()
    dlse = dlse.contiguous() if dlse is not None else None
    dq = _new(q, q.shape, problem.varlen)
    dk = _new(k, k.shape, problem.varlen)
    dv = _new(v, v.shape, problem.varlen)
    delta = torch.empty_like(softmax_lse)
    optional = (slopes, rng_state, cu_seqlens_q, cu_seqlens_k)
    dq_tensors = (q, k, v, out, dout, softmax_lse, dlse, delta, dq, *optional)
    dkdv_tensors = (q, k, v, dout, softmax_lse, delta, dk, dv, *optional)
    index = q.get_device()
    configs = runtime.config_source()
    lse_strides = _lse_strides(softmax_lse)
    dq_pointers, dq_facts = _pointers(dq_tensors)
    dkdv_pointers, dkdv_facts = _pointers(dkdv_tensors)
    key = (
        problem,
        q.stride(),
        k.stride(),
        v.stride(),
        dout.stride(),
        slopes is None or slopes.stride(),
        dlse is None,
        index,
        dq_facts,
        dkdv_facts,
        configs,
    )
    dq_done = KERNELS["backward_dq"].launch_known(key, index, [*dq_pointers, *lse_strides])
    if dq_done and KERNELS["backward_dkdv"].launch_known(key, index, [*dkdv_pointers, *lse_strides]):
        return dq, dk, dv

    strides = (_strides(q), _strides(k), _strides(v), _strides(dout))
    longest_row = problem.nheads * max(problem.headdim, problem.headdim_v)
    for kernel, tensors, heads in (
        ("backward_dq", dq_tensors, problem.nheads),
        ("backward_dkdv", dkdv_tensors, problem.nheads_k),
    ):
        current = plan(kernel, problem, runtime.arch_of(q.device), configs)
        constants = _layout_constants(current, q.element_size(), strides, longest_row)
        constants["HAS_DLSE"] = dlse is not None
        scalars = (
            *_divided(strides, constants["VEC"]),
            _slopes_stride(slopes),
            *_counts(problem, current, heads),
            problem.softmax_scale,
            *_modifiers(current),
            current.dropout_rescale,
        )
        programs = current.blocks * problem.batch * heads
        KERNELS[kernel].launch_new(key, current, programs, tensors, lse_strides, scalars, constants)
    return dq, dk, dv


def probs(problem: AttentionProblem, inputs: AttentionInputs, softmax_lse: torch.Tensor) -> torch.Tensor:
    """S_dmask (batch, nheads, seqlen_q, seqlen_k); see :class:`flash_rocm.backends.Backend`."""
    q, k, _, cu_seqlens_q, cu_seqlens_k, slopes, rng_state, _ = inputs
    softmax_lse = softmax_lse.contiguous()
    configs = runtime.config_source()
    current = plan("probs", problem, runtime.arch_of(q.device), configs)
    result = q.new_zeros((problem.batch, problem.nheads, problem.seqlen_q, problem.seqlen_k))
    strides = (_strides(q), _strides(k))
    constants = _layout_constants(current, q.element_size(), strides, 0)
    tensors = (q, k, softmax_lse, result, slopes, rng_state, cu_seqlens_q, cu_seqlens_k)
    scalars = (
        *_divided(strides, constants["VEC"]),
        _slopes_stride(slopes),
        *_counts(problem, current, problem.nheads),
        *_modifiers(current),
    )
    pointers, facts = _pointers(tensors)
    index = q.get_device()
    lse_strides = _lse_strides(softmax_lse)
    key = (problem, q.stride(), k.stride(), slopes is None or slopes.stride(), index, facts, configs)
    if not KERNELS["probs"].launch_known(key, index, [*pointers, *lse_strides]):
        programs = current.blocks * problem.batch * problem.nheads
        KERNELS["probs"].launch_new(key, current, programs, tensors, lse_strides, scalars, constants)
    return result
