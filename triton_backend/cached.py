"""Host side of the kernels over a K/V cache: allocation, splits and launch."""

from __future__ import annotations

import operator
from typing import Any

import torch

from flash_rocm import auxiliary, cache_validation, cuda_library, runtime, virtual_device
from flash_rocm.arch import Arch
from flash_rocm.problem import AttentionProblem, CacheInputs
from flash_rocm.runtime import ConfigSource
from flash_rocm.splits import choose_splits

from .cache_kernels import attn_cache_kernel, kv_append_kernel
from .combine import COMBINE, Shapes, fixed_plan, parts_call
from .descriptors import matrix_of
from .launch import is_plain_call, settle, slopes_stride
from .launcher import Call, Launcher, Tensors, divisor_of_strides, far_ones, pointers_of, strides_of
from .mla_hopper import TILE_N, attn_mla_kernel, tile_rows
from .plan import MAX_TILE_D, Plan, block_d, cache_kernel, cache_plan, is_absorbed, is_plain, workgroups_per_cu

ATTEND = Launcher(attn_cache_kernel, attn_mla_kernel, tile_rows)
APPEND = Launcher(kv_append_kernel)


def _getter(*names: str) -> operator.itemgetter:
    """Of these inputs, or of their addresses, in the order of a kernel's pointers."""
    return operator.itemgetter(*map(CacheInputs._fields.index, names))


#: Pointers of the attention kernel behind that of softmax_lse, and of the append kernel, but for the last of both:
#: where checks report.
_OTHERS = _getter(
    *("alibi_slopes", "sinks", "rotary_cos", "rotary_sin", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new"),
    *("seqused_q", "seqused_k", "rotary_seqlens", "cache_batch_idx", "leftpad_k", "block_table"),
)
_APPENDED = _getter(
    *("k_new", "v_new", "k", "v", "rotary_cos", "rotary_sin", "cu_seqlens_k_new", "seqused_k", "rotary_seqlens"),
    *("cache_batch_idx", "block_table"),
)


def _first(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _error_buffer(inputs: CacheInputs) -> torch.Tensor | None:
    """Where checked kernels report; None unless FLASH_ROCM_DEBUG is on."""
    return inputs.q.new_zeros(len(cache_validation.FAULTS), dtype=torch.int32) if runtime.debug() else None


def _raise_reported(errors: torch.Tensor | None, inputs: CacheInputs) -> None:
    """Wait for a checked kernel and raise what it reported."""
    if errors is not None:
        cache_validation.raise_faults(errors.tolist(), inputs)


def parts_of(problem: AttentionProblem, inputs: CacheInputs) -> tuple[torch.Tensor, ...]:
    """q and k of the first tile of head dims, and q and k of the second; there k is v where they are one memory."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.qv is not None:
        return q, k, inputs.qv, v
    if problem.headdim <= MAX_TILE_D:
        return q, k, q, k
    return q[..., MAX_TILE_D:], k[..., MAX_TILE_D:], q[..., :MAX_TILE_D], k[..., :MAX_TILE_D]


def _is_same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def splits_of(problem: AttentionProblem, device: torch.device) -> int:
    """Into how many parts keys are divided; see :class:`flash_rocm.protocols.Backend`."""
    arch = virtual_device.arch_of(device)
    # Of the tensors only their shapes are known here.
    v_is_k2, plain = is_absorbed(problem), is_plain(problem)
    kernel = cache_kernel(problem, v_is_k2)
    _, configs = settle(kernel, problem, device, (), runtime.config_source(), plain)
    return num_splits_of(problem, cache_plan(problem, arch, configs, v_is_k2, plain), arch)


def num_splits_of(problem: AttentionProblem, current: Plan, arch: Arch) -> int:
    """The caller's number of splits, or the one that occupies the chip."""
    if problem.num_splits:
        return problem.num_splits
    config = current.config
    longest = problem.seqlen_k
    if problem.window_left >= 0 and problem.window_right >= 0:
        rows = -(-config.BLOCK_M // problem.group_size)
        longest = min(longest, problem.window_left + problem.window_right + rows)
    if problem.attention_chunk:
        longest = min(longest, 2 * problem.attention_chunk)
    tiles = -(-longest // config.BLOCK_N)
    slots = arch.num_cus * workgroups_per_cu(current, problem.dtype.itemsize, arch)
    return choose_splits(problem.batch * problem.nheads_k * current.blocks, tiles, slots)


class Route:
    """What a call takes that follows from its problem and layout; its identity keys launches."""

    __slots__ = ("plan", "num_splits", "launcher", "dense")

    def __init__(self, problem: AttentionProblem, current: Plan, arch: Arch, launcher: Launcher = ATTEND) -> None:
        self.plan, self.launcher = current, launcher
        self.num_splits = num_splits_of(problem, current, arch)
        #: Those of varlen calls depend on the total of the lengths.
        self.dense: Shapes | None = None
        if not problem.varlen:
            rows = (problem.batch, problem.seqlen_q, problem.nheads)
            self.dense = Shapes.of(rows, problem.headdim_v, self.num_splits)


_routes: dict[tuple[Any, ...], Route] = {}
_ROUTES_MAX = 4096


def _route_of(
    problem: AttentionProblem, inputs: CacheInputs, v_is_k2: bool, plain: bool, configs: ConfigSource | None
) -> Route:
    layout, q = inputs.layout, inputs.q
    # The layout names the device, and a CPU may be one virtual GPU after another.
    chip = None if q.is_cuda else virtual_device.arch_of(q.device).name
    key = (problem, layout and layout.launch, configs, v_is_k2, plain, chip, far_ones(inputs))
    route = _routes.get(key)
    if route is None:
        kernel = cache_kernel(problem, v_is_k2)
        known_as, settled = settle(kernel, problem, q.device, key, configs, plain)
        if known_as is None:
            return _route_of(problem, inputs, v_is_k2, plain, settled)
        arch = virtual_device.arch_of(q.device)
        current = cache_plan(problem, arch, settled, v_is_k2, plain)
        if len(_routes) >= _ROUTES_MAX:
            _routes.clear()
        route = _routes[key] = Route(problem, current, arch)
    return route


def attend(problem: AttentionProblem, inputs: CacheInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and softmax_lse over a K/V cache; see :class:`flash_rocm.protocols.Backend`."""
    inputs = inputs.with_layout()
    parts = q_1, k_1, q_2, k_2 = parts_of(problem, inputs)
    v_is_k2 = plain = False
    if q_2 is not q_1:
        v = inputs.v
        v_is_k2 = k_2 is v or _is_same(k_2, v)
        # Checked kernels are Triton's.
        plain = v_is_k2 and not runtime.debug() and is_plain_call(problem, (q_1, k_1, v, q_2))
    route = _route_of(problem, inputs, v_is_k2, plain, runtime.config_source())
    return attend_along(route, problem, inputs, parts)


def route_with(source: ConfigSource, problem: AttentionProblem, device: torch.device, launcher: Launcher) -> Route:
    """The route of a problem with the configs of a source, for tuning.

    Args:
        launcher: keeps what is compiled.
    """
    arch = virtual_device.arch_of(device)
    return Route(problem, cache_plan(problem, arch, source, is_absorbed(problem)), arch, launcher)


def attend_along(
    route: Route, problem: AttentionProblem, inputs: CacheInputs, parts: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`attend`, whose route is known, of inputs with their layout; parts: :func:`parts_of` them."""
    q, v, num_splits = inputs.q, inputs.v, route.num_splits
    q_1, k_1, q_2, k_2 = parts
    shapes = route.dense or Shapes.of(q.shape[:-1], problem.headdim_v, num_splits)
    device = q.device
    # Kernels write every row that a sequence owns; others keep what is filled in.
    may_skip_rows = problem.varlen or inputs.seqused_q is not None
    if may_skip_rows:
        out, lse = q.new_zeros(shapes.out), q.new_full(shapes.lse, float("-inf"), dtype=torch.float32)
    else:
        # What gives the same in less time than a shape and a type: half, and two thirds of it.
        is_like_q = problem.headdim == problem.headdim_v and q.is_contiguous()
        out = torch.empty_like(q) if is_like_q else q.new_empty(shapes.out)
        lse = torch.empty_strided(shapes.lse, shapes.lse_steps, dtype=torch.float32, device=device)
    outputs: tuple[torch.Tensor, ...] = (out, lse)
    if num_splits > 1:
        # One allocation, which is seen as two tensors only where a tensor is asked for.
        memory = torch.empty(shapes.parts_size, dtype=torch.float32, device=device)
        if may_skip_rows:
            shapes.parts_in(memory)[1].fill_(float("-inf"))
        outputs = (out, lse, memory)
    errors = _error_buffer(inputs)
    pointers, facts = pointers_of(outputs)
    out_at, lse_at = pointers[:2]
    target, target_lse, lse_strides = out_at, lse_at, shapes.lse_strides
    if num_splits > 1:
        target, lse_strides = pointers[2], shapes.parts_lse_strides
        target_lse = target + 4 * shapes.parts_lse_at
    addresses = inputs.addresses or ()
    first = addresses[:3] + addresses[:2] if q_2 is q_1 else [x.data_ptr() for x in (q_1, k_1, v, q_2, k_2)]
    errors_at = None if errors is None else errors.data_ptr()
    key = (route, facts, errors is None)
    fresh = [*first, target, target_lse, *_OTHERS(addresses), errors_at, *lse_strides]
    if not route.launcher.launch_known(key, fresh):
        targets = (out, lse) if num_splits == 1 else shapes.parts_in(memory)
        tensors: Tensors = (q_1, k_1, v, q_2, k_2, *targets, *_OTHERS(inputs), errors)
        call = _attend_call(problem, inputs, route, tensors, (q_1, k_1, v, q_2), lse_strides)
        route.launcher.launch_new(key, call)
    _raise_reported(errors, inputs)
    if num_splits > 1:
        if (launch := cuda_library.launch_of("combine", device)) is not None:
            auxiliary.combine_parts(launch, *shapes.parts_in(memory), out, lse)
            return out, lse
        of_parts = (route, facts, shapes.parts)
        if not COMBINE.launch_known(of_parts, [target, target_lse, out_at, lse_at, *shapes.lse_strides]):
            COMBINE.launch_new(of_parts, parts_call(shapes, memory, out, lse))
    return out, lse


def _table_facts(inputs: CacheInputs) -> tuple[int, int]:
    """Row stride and rows of the rotary tables."""
    cos = inputs.rotary_cos
    return (0, 0) if cos is None else (cos.stride(0), cos.shape[0])


def _are_tiles(problem: AttentionProblem, inputs: CacheInputs, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether TMA can copy keys: tiles are in one page each, of caches that are matrices of all heads."""
    return (
        not inputs.is_packed
        and problem.page_size % TILE_N.value == 0
        and (problem.page_size == 0 or inputs.leftpad_k is None)
        and matrix_of(k) is not None
        and matrix_of(v) is not None
    )


def _attend_call(
    problem: AttentionProblem,
    inputs: CacheInputs,
    route: Route,
    tensors: Tensors,
    strided: tuple[torch.Tensor, ...],
    lse_strides: tuple[int, int],
) -> Call:
    current, num_splits = route.plan, route.num_splits
    strides = tuple(strides_of(x) for x in strided)
    vec = divisor_of_strides(strides, inputs.q.element_size())
    nheads = problem.nheads
    if num_splits == 1:
        lse_row, lse_split, out_strides = 1, 0, (nheads, 1, 0)
    else:
        lse_row, lse_split, out_strides = nheads * num_splits, 1, (nheads * num_splits, num_splits, 1)
    rotary_stride, max_position = _table_facts(inputs)
    scalars: list[int | float] = [lse_row, lse_split, *out_strides]
    scalars += [stride // vec for tensor in strides for stride in tensor]
    scalars += [_first(inputs.block_table), slopes_stride(inputs.alibi_slopes)]
    scalars += [rotary_stride, max_position, nheads, problem.group_size, problem.seqlen_q, problem.seqlen_k]
    scalars += [problem.seqlen_new, inputs.capacity, inputs.k.shape[0], current.blocks, num_splits, current.scale]
    scalars += [current.softcap_log2, current.window_left, current.window_right, problem.attention_chunk]
    longest_row = max(stride[1] for stride in strides)
    wide = longest_row * max(current.config.BLOCK_M, current.config.BLOCK_N) >= 1 << 31
    tiles = route.launcher.tiles_of(current, problem.dtype) if _are_tiles(problem, inputs, *strided[1:3]) else ()
    constants = {"VEC": vec, "WIDE": wide, "CHECKED": tensors[-1] is not None, "TMA": bool(tiles)}
    programs = current.blocks * problem.batch * problem.nheads_k * num_splits
    return Call(current, programs, tensors, lse_strides, tuple(scalars), constants, tiles)


def append(problem: AttentionProblem, inputs: CacheInputs) -> None:
    """Write k_new and v_new into the caches; see :class:`flash_rocm.protocols.Backend`."""
    if (launch := cuda_library.launch_of("append", inputs.k.device)) is not None:
        auxiliary.append(launch, problem, inputs)
        return
    k_new, v_new = inputs.k_new, inputs.v_new
    if k_new is None or v_new is None:
        raise ValueError("k_new, v_new: expected tensors to append, got None")
    inputs = inputs.with_layout()
    errors = _error_buffer(inputs)
    layout = inputs.layout
    key = (problem, layout and layout.launch, errors is None, far_ones(inputs))
    errors_at = None if errors is None else errors.data_ptr()
    if not APPEND.launch_known(key, [*_APPENDED(inputs.addresses or ()), errors_at]):
        tensors: Tensors = (*_APPENDED(inputs), errors)
        strides = tuple(strides_of(x) for x in (k_new, v_new, inputs.k, inputs.v))
        vec = divisor_of_strides(strides, k_new.element_size())
        block_t = min(16, 1 << (max(problem.seqlen_new, 1) - 1).bit_length())
        blocks = -(-problem.seqlen_new // block_t)
        rotary_stride, max_position = _table_facts(inputs)
        units = [stride // vec for tensor in strides for stride in tensor]
        scalars = (
            *units, _first(inputs.block_table), rotary_stride, max_position, problem.nheads_k, problem.seqlen_k,
            problem.seqlen_new, inputs.capacity, inputs.k.shape[0], blocks,
        )  # fmt: skip
        constants = {
            "HEADDIM": problem.headdim,
            "HEADDIM_V": problem.headdim_v,
            "BLOCK_D": block_d(problem.headdim),
            "BLOCK_DV": block_d(problem.headdim_v),
            "BLOCK_T": block_t,
            "PAGE_SIZE": problem.page_size,
            "VEC": vec,
            "ROTARY_HALF": problem.rotary_dim // 2,
            "INTERLEAVED": problem.rotary_interleaved,
            "CHECKED": errors is not None,
        }
        programs = blocks * problem.batch * problem.nheads_k
        current = fixed_plan("append", constants, 4 if block_t > 1 else 1)
        APPEND.launch_new(key, Call(current, programs, tensors, (), scalars, {}))
    _raise_reported(errors, inputs)
