"""``flash_attn.flash_attn_interface``: flash_rocm's functions with flash-attn 2's conventions.

The public functions are those of :mod:`flash_rocm.api`, which say what the arguments mean.  What differs:
    - inputs may have any stride in the last dim; window_size may be a tensor of two elements on the CPU;
    - ``softmax_lse`` is +inf for a row that sees no key;
    - S_dmask has seqlens rounded up to multiples of 128, and element (i, j) is scaled to the largest score of
      row i in the blocks of 128 keys from j's own to the last, as flash-attn's kernel leaves it.

The functions with an underscore are the ones that other libraries import; they have no gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from flash_rocm import api, inference, runtime
from flash_rocm.dropin.borders import (
    BLOCK_K,
    lse_at_border,
    maybe_contiguous,
    probs_at_border,
    round_multiple,
    window_of,
)
from flash_rocm.dropin.private import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    # What libraries import beside these.
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "maybe_contiguous",
    "round_multiple",
]

_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward


def __getattr__(name: str) -> Any:
    """``USE_TRITON_ROCM``: whether calls on AMD GPUs are asked to run on the Triton back end."""
    if name == "USE_TRITON_ROCM":
        return runtime.requested_backend() == "triton"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _get_block_size_n(device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys of a block, as far as S_dmask shows it: the same for every device, head_dim, is_dropout and is_causal."""
    return BLOCK_K


def _contiguous(x: Any) -> Any:
    """What is no tensor is left to the checks of the function."""
    return maybe_contiguous(x) if isinstance(x, torch.Tensor) and x.dim() > 0 else x


def _with_conventions(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of flash_rocm with flash-attn's conventions."""
    parameters = list(inspect.signature(function).parameters)
    converters: dict[str, Callable[[Any], Any]] = dict.fromkeys(("q", "k", "v", "kv", "qkv"), _contiguous)
    converters["window_size"] = window_of
    places = {n: converters[name] for n, name in enumerate(parameters) if name in converters}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [places[n](x) if n in places else x for n, x in enumerate(args)]
        named = {name: converters[name](x) if name in converters else x for name, x in kwargs.items()}
        result = function(*given, **named)
        if isinstance(result, torch.Tensor):
            return result
        out, softmax_lse, *probs = result
        return (out, lse_at_border(softmax_lse), *map(probs_at_border, probs))

    call.__module__ = __name__
    return call


flash_attn_func = _with_conventions(api.flash_attn_func)
flash_attn_kvpacked_func = _with_conventions(api.flash_attn_kvpacked_func)
flash_attn_qkvpacked_func = _with_conventions(api.flash_attn_qkvpacked_func)
flash_attn_varlen_func = _with_conventions(api.flash_attn_varlen_func)
flash_attn_varlen_kvpacked_func = _with_conventions(api.flash_attn_varlen_kvpacked_func)
flash_attn_varlen_qkvpacked_func = _with_conventions(api.flash_attn_varlen_qkvpacked_func)
flash_attn_with_kvcache = _with_conventions(inference.flash_attn_with_kvcache)
