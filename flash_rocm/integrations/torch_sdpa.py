"""PyTorch's ``scaled_dot_product_attention`` on GPUs, run by flash_rocm where PyTorch chooses its flash back end::

    from flash_rocm.integrations import torch_sdpa

    torch.nn.attention.activate_flash_attention_impl(torch_sdpa.register())

PyTorch decides which calls are for flash attention (fp16 and bf16, no mask tensor), and with
``torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)`` a caller insists on it;
``torch.nn.attention.restore_flash_attention_impl()`` undoes the activation.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flash_rocm import ops, validation
from flash_rocm.attend import draw_rng_state, needs_grad
from flash_rocm.problem import layout_of

NAME = "flash_rocm"
#: The first version of PyTorch with the registry.
OLDEST_TORCH = "2.10"


class _Handle:
    """Keeps the operators registered until PyTorch removes it."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        self.library = None


def register() -> str:
    """Tell PyTorch's registry of flash attention implementations about flash_rocm; returns :data:`NAME`.

    This activates nothing.  A second call changes nothing.

    Raises:
        ImportError: PyTorch has no such registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError as error:
        raise ImportError(
            f"torch: expected {OLDEST_TORCH} or newer, which has torch.nn.attention.register_flash_attention_impl, "
            f"got {torch.__version__}. Hint: call flash_rocm.flash_attn_func."
        ) from error
    register_flash_attention_impl(NAME, register_fn=activate)
    return NAME


def activate(dispatch_key: str = "CUDA") -> _Handle:
    """Replace PyTorch's flash operators of a dispatch key ("CUDA" is AMD GPUs' too) for as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", _forward, dispatch_key)
    library.impl("_scaled_dot_product_flash_attention_backward", _backward, dispatch_key)
    return _Handle(library)


def _arguments(
    tensors: tuple[torch.Tensor, ...],
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    rng_state: torch.Tensor | None,
    has_grad: bool,
) -> tuple[Any, ...]:
    """Arguments of flash_rocm's operators; q, k and v are (batch, nheads, seqlen, headdim).

    has_grad: whether the back end has to have a backward.
    """
    q, k, v = (x.transpose(1, 2) for x in (x if x.stride(-1) == 1 else x.contiguous() for x in tensors))
    validation.check_qkv(q, k, v, 4, 4)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    left, right = validation.check_scalars(dropout_p, scale, (-1, -1), 0.0)
    numbers = (q.shape[1], k.shape[1], scale, left, 0 if is_causal else right, 0.0, float(dropout_p))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (q, k, v, None, None, None, rng_state, None, *numbers, deterministic, has_grad, "")


def _like(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """x (batch, seqlen, nheads, headdim) as (batch, nheads, seqlen, headdim) in the layout that PyTorch promises."""
    x = x.transpose(1, 2)
    return x if x.stride() == query.stride() else torch.empty_like(query).copy_(x)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """``aten::_scaled_dot_product_flash_attention``."""
    if return_debug_mask:
        raise NotImplementedError(
            "return_debug_mask: expected False, got True. Hint: flash_rocm.flash_attn_func has it."
        )
    rng_state = draw_rng_state(query.device) if dropout_p > 0.0 else None
    # Below autograd the tensors and the grad mode are still the caller's.
    has_grad = needs_grad(query, key, value)
    args = _arguments((query, key, value), dropout_p, is_causal, scale, rng_state, has_grad)
    out, softmax_lse = ops.attention_forward(args, layout_of(*args[:3]))
    state = torch.zeros(2, dtype=torch.int64, device=query.device) if rng_state is None else rng_state
    if torch.version.hip:  # what PyTorch's fakes say on AMD GPUs
        seed, offset = state.unbind()
    else:
        seed, offset = state.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=query.device)
    lengths = (query.shape[2], key.shape[2])
    return _like(out, query), softmax_lse, None, None, *lengths, seed, offset, query.new_empty((0,))


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``."""
    state = torch.stack((philox_seed, philox_offset)) if torch.version.hip else philox_seed.view(torch.int64)
    args = _arguments((query, key, value), dropout_p, is_causal, scale, state if dropout_p > 0.0 else None, True)
    dout, out = (x.transpose(1, 2) for x in (grad_out, out))
    gradients = torch.ops.flash_rocm.attention_backward.default(dout, None, out, logsumexp, *args)
    dq, dk, dv = (_like(x, like) for x, like in zip(gradients[:3], (query, key, value), strict=True))
    return dq, dk, dv
