"""Calls described in words: the options of ``flash-rocm explain``, or the same without dashes in one text."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import torch

import flash_rocm
from flash_rocm import backends, cache_ops, cache_validation, info, runtime, validation, virtual_device
from flash_rocm.arch import CPU, Arch, arch_named
from flash_rocm.problem import DTYPE_NAMES, AttentionProblem, CacheInputs, default_softmax_scale

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def _integers(text: str, counts: tuple[int, ...], form: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")
    return numbers


def _shape(text: str) -> list[int]:
    numbers = _integers(text, (6, 7), "B,Sq,Sk,H,Hk,D[,Dv]")
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"expected sizes >= 0, got {text!r}")
    return numbers


def _window(text: str) -> list[int]:
    return _integers(text, (2,), "LEFT,RIGHT")


def _arch(text: str) -> Arch:
    try:
        return arch_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_call_arguments(parser: argparse.ArgumentParser) -> None:
    """What describes a call; :meth:`flash_rocm.problem.AttentionProblem.options` writes the same."""
    add = parser.add_argument
    shape = "B,Sq,Sk,H,Hk,D[,Dv]"
    add("--shape", type=_shape, default="2,1024,1024,16,16,64", metavar=shape, help="default: %(default)s")
    add("--dtype", choices=_DTYPES, default="bf16", help="default: %(default)s")
    add("--causal", action="store_true")
    add("--window", type=_window, default="-1,-1", metavar="LEFT,RIGHT", help="sliding window; -1: unlimited")
    add("--dropout", type=float, default=0.0, metavar="P")
    add("--softcap", type=float, default=0.0, metavar="CAP")
    add("--alibi", action="store_true")
    add("--sink", action="store_true", help="a learnable sink for each head")
    add("--varlen", action="store_true", help="B packed sequences of Sq and Sk tokens")
    add("--deterministic", action="store_true")
    add("--backward", action="store_true", help="the call needs gradients")
    add("--kvcache", action="store_true", help="over a K/V cache of Sk tokens, as flash_attn_with_kvcache")
    add("--page-size", type=int, default=0, metavar="N", help="of a cache in pages; default: not in pages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-rocm explain``."""
    _add_call_arguments(parser)
    add = parser.add_argument
    add("--arch", type=_arch, metavar="ARCH", help="cpu, gfx942, sm90, ...; default: the first GPU here, else cpu")
    add("--backend", choices=runtime.REQUESTS, help="judge as if this one were asked for")


def explanation_of(args: argparse.Namespace) -> backends.Explanation:
    """What :func:`flash_rocm.explain` says of the call that arguments describe.

    Raises:
        ValueError: the call is wrong.
    """
    arch = args.arch or info.devices(virtual_device.active())[-1][1]
    with runtime.use_backend(args.backend or runtime.requested_backend()):
        if args.kvcache or args.page_size:
            return backends.explain_problem(_cache_problem(args), arch, runtime.requested_backend())
        batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v = _sizes(args)
        call: dict[str, Any] = {
            "dropout_p": args.dropout,
            "causal": args.causal,
            "window_size": tuple(args.window),
            "softcap": args.softcap,
            "alibi_slopes": torch.empty(nheads, device="meta") if args.alibi else None,
            "learnable_sink": torch.empty(nheads, device="meta") if args.sink else None,
            "deterministic": args.deterministic,
        }
        if args.varlen:
            cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta")
            call |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            call |= {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k}
        return flash_rocm.explain(
            _tensor(args, seqlen_q, nheads, headdim, args.varlen),
            _tensor(args, seqlen_k, nheads_k, headdim, args.varlen),
            _tensor(args, seqlen_k, nheads_k, headdim_v, args.varlen),
            **call,
            arch=arch,
        )


def _sizes(args: argparse.Namespace) -> list[int]:
    return [*args.shape, args.shape[-1]][:7]


def _tensor(args: argparse.Namespace, seqlen: int, heads: int, dim: int, packed: bool) -> torch.Tensor:
    batch = args.shape[0]
    shape = (batch * seqlen, heads, dim) if packed else (batch, seqlen, heads, dim)
    return torch.empty(shape, dtype=_DTYPES[args.dtype], device="meta", requires_grad=args.backward)


def _cache_problem(args: argparse.Namespace) -> AttentionProblem:
    batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, headdim_v = _sizes(args)
    for name in ("dropout", "backward", "deterministic"):
        if getattr(args, name):
            raise ValueError(f"--{name}: expected without --kvcache and --page-size, got both")
    if args.page_size < 0:
        raise ValueError(f"--page-size: expected a number >= 0, got {args.page_size}")
    cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device="meta") if args.varlen else None
    pages, table = (batch, seqlen_k), None
    if args.page_size:
        of_each = -(-seqlen_k // args.page_size)
        pages = (batch * of_each, args.page_size)
        table = torch.empty((batch, of_each), dtype=torch.int32, device="meta")
    dtype = _DTYPES[args.dtype]
    inputs = CacheInputs(
        _tensor(args, seqlen_q, nheads, headdim, args.varlen),
        torch.empty((*pages, nheads_k, headdim), dtype=dtype, device="meta"),
        torch.empty((*pages, nheads_k, headdim_v), dtype=dtype, device="meta"),
        cu_seqlens_q=cu_seqlens,
        block_table=table,
        alibi_slopes=torch.empty(nheads, device="meta") if args.alibi else None,
        sinks=torch.empty(nheads, device="meta") if args.sink else None,
    )
    cache_validation.check_inputs(inputs, {})
    scale = default_softmax_scale(headdim)
    left, right = validation.check_scalars(0.0, scale, tuple(args.window), args.softcap)
    scalars = (seqlen_q, seqlen_k, 0, scale, left, 0 if args.causal else right, args.softcap, 0, False, 0, "")
    return cache_ops.problem_of(inputs, scalars)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.replace("--", ""))


def problem_of(text: str) -> AttentionProblem:
    """The problem that a text such as ``"shape=2,1024,1024,16,16,128 causal backward"`` describes.

    The words are the options of ``flash-rocm explain`` without dashes; what is not named has the same defaults.

    Raises:
        ValueError: the text describes no call.
    """
    parser = _Parser(prog="problem", add_help=False)
    _add_call_arguments(parser)
    try:
        args = parser.parse_args([f"--{word.lstrip('-')}" for word in text.split()])
        args.arch, args.backend = CPU, "reference"
        return explanation_of(args).problem
    except ValueError as error:
        raise ValueError(f'--problem: expected a text such as "shape=2,1024,1024,16,16,128 causal", {error}') from error
