"""Packed instructions (VOP3P): two float32, two 16-bit values, and the mixed-precision fma.

op_sel picks for the low result which half of each source it takes, op_sel_hi for the high result;
neg_lo and neg_hi negate.  Source: "AMD Instinct MI300" ISA reference, "Packed math".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Getter, Handler
from .floats import f32_to_f16_bits, flush_f32, fma16_bits, fma32
from .machine import Group
from .operands import float32_of
from .registry import FACTORIES, register
from .vector_ops import u


def _selection(b: Builder, count: int) -> tuple[tuple[int, ...], ...]:
    zeros, ones = (0,) * count, (1,) * count
    return (
        b.bit_list("op_sel", zeros),
        b.bit_list("op_sel_hi", ones),
        b.bit_list("neg_lo", zeros),
        b.bit_list("neg_hi", zeros),
    )


def _float32_of_pair(b: Builder, k: int, second: int, negate: int) -> Getter:
    """One of the two float32 of a source."""
    operand = b.source(k)
    if operand.neg or operand.abs:
        raise b.unsupported(f"operand {operand.text!r}")
    if operand.is_constant:
        if second:
            raise b.unsupported("the upper half of a constant")
        value = float32_of(operand.bits(32))
        value = -value if negate else value
        return lambda g: value
    row = operand.row + second
    b.reads |= 1 << (row + (512 if operand.kind == "s" else 0))
    get = _float_row(operand.kind, row)
    if b.descriptor.flush_f32:
        plain = get
        get = lambda g: flush_f32(plain(g))  # noqa: E731
    return (lambda g: np.negative(get(g))) if negate else get


def _float_row(kind: str, row: int) -> Getter:
    return (lambda g: g.S[row].view(np.float32)[:, None]) if kind == "s" else (lambda g: g.F[row])


def _packed_f32(count: int, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        low, high, neg_low, neg_high = _selection(b, count)
        lows = [_float32_of_pair(b, k, low[k], neg_low[k]) for k in range(count)]
        low_reads, b.reads = b.reads, 0
        highs = [_float32_of_pair(b, k, high[k], neg_high[k]) for k in range(count)]
        operand = b.expect(0, "v", 2)
        b.write_bits(operand)
        row = operand.row
        # Compilers compute pairs of which they need one.
        b.parts = ((low_reads, 1 << row), (b.reads, 2 << row))
        b.reads |= low_reads
        b.float_rows += [row, row + 1]
        flush = b.descriptor.flush_f32
        in_place = isinstance(function, np.ufunc) and not flush
        first_reads_low = any(b.source(k).row == row and b.source(k).kind == "v" and high[k] == 0 for k in range(count))
        first_reads_low = first_reads_low or any(
            b.source(k).kind == "v" and b.source(k).row + high[k] == row for k in range(count)
        )

        def run(g: Group) -> None:
            if in_place and g.fast and not first_reads_low:
                function(*(get(g) for get in lows), out=g.F[row])
                function(*(get(g) for get in highs), out=g.F[row + 1])
                return
            first = np.asarray(function(*(get(g) for get in lows)))
            second = np.asarray(function(*(get(g) for get in highs)))
            if flush:
                first, second = flush_f32(first), flush_f32(second)
            g.put(row, first.view(np.uint32))
            g.put(row + 1, second.view(np.uint32))

        return run

    return compile_one


FACTORIES["v_pk_add_f32"] = _packed_f32(2, np.add)
FACTORIES["v_pk_mul_f32"] = _packed_f32(2, np.multiply)
FACTORIES["v_pk_fma_f32"] = _packed_f32(3, fma32)


@register("v_pk_mov_b32")
def _pk_mov(b: Builder) -> Handler:
    """Low result from source 0, high result from source 1."""
    low, _, _, _ = _selection(b, 2)
    gets = []
    for k in range(2):
        operand = b.source(k)
        if operand.is_constant or operand.count != 2:
            raise b.unsupported(f"operand {operand.text!r}")
        row = operand.row + low[k]
        b.reads |= 1 << (row + (512 if operand.kind == "s" else 0))
        gets.append(_row_getter(operand.kind, row))
    destination = b.expect(0, "v", 2)
    b.write_bits(destination)
    row = destination.row

    def run(g: Group) -> None:
        first, second = np.array(gets[0](g)), np.array(gets[1](g))
        g.put(row, first)
        g.put(row + 1, second)

    return run


def _row_getter(kind: str, row: int) -> Getter:
    return (lambda g: g.S[row][:, None]) if kind == "s" else (lambda g: g.V[row])


def _packed_16(count: int, function: Callable[..., Any], kind: str) -> Callable[[Builder], Handler]:
    """``kind``: "h" float16, "u" or "i" integers."""

    def one(b: Builder, k: int, high: int, negate: int) -> Getter:
        if kind == "h":
            get = b.h(k, bool(high))
            return (lambda g: np.negative(get(g))) if negate else get
        if negate:
            raise b.unsupported("negating an integer")
        bits = b.h_bits(k, bool(high))
        if kind == "i":
            return lambda g: (np.asarray(bits(g)) << u(16)).view(np.int32) >> np.int32(16)
        return bits

    def compile_one(b: Builder) -> Handler:
        low, high, neg_low, neg_high = _selection(b, count)
        lows = [one(b, k, low[k], neg_low[k]) for k in range(count)]
        highs = [one(b, k, high[k], neg_high[k]) for k in range(count)]
        put = b.put_u()

        def bits(values: list[Any]) -> Any:
            result = np.asarray(function(*values))
            if result.dtype == np.float32:
                return f32_to_f16_bits(result)
            return result.view(np.uint32) & u(0xFFFF)

        def run(g: Group) -> None:
            first, second = bits([get(g) for get in lows]), bits([get(g) for get in highs])
            put(g, first | second << u(16))

        return run

    return compile_one


for _name, _count, _function, _kind in (
    ("v_pk_add_f16", 2, np.add, "h"),
    ("v_pk_mul_f16", 2, np.multiply, "h"),
    ("v_pk_max_f16", 2, np.fmax, "h"),
    ("v_pk_min_f16", 2, np.fmin, "h"),
    ("v_pk_fma_f16", 3, fma16_bits, "h"),
    ("v_pk_add_u16", 2, np.add, "u"),
    ("v_pk_sub_i16", 2, np.subtract, "i"),
    ("v_pk_add_i16", 2, np.add, "i"),
    ("v_pk_sub_u16", 2, np.subtract, "u"),
    ("v_pk_mul_lo_u16", 2, np.multiply, "u"),
    ("v_pk_max_i16", 2, np.maximum, "i"),
    ("v_pk_min_i16", 2, np.minimum, "i"),
    ("v_pk_max_u16", 2, np.maximum, "u"),
    ("v_pk_min_u16", 2, np.minimum, "u"),
    ("v_pk_mad_u16", 3, lambda a, b, c: a * b + c, "u"),
    ("v_pk_lshlrev_b16", 2, lambda a, x: x << (a & u(15)), "u"),
    ("v_pk_lshrrev_b16", 2, lambda a, x: x >> (a & u(15)), "u"),
):
    FACTORIES[_name] = _packed_16(_count, _function, _kind)


@register("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16")
def _fma_mix(b: Builder) -> Handler:
    """fma in float32 of sources that are float32 (op_sel_hi 0) or a float16 half chosen by op_sel."""
    half, is_half = b.bit_list("op_sel", (0, 0, 0)), b.bit_list("op_sel_hi", (0, 0, 0))
    gets = [b.h(k, bool(half[k])) if is_half[k] else b.f(k) for k in range(3)]
    if b.name == "v_fma_mix_f32":
        put = b.put_f()
        return lambda g: put(g, fma32(*(get(g) for get in gets)))
    clamp = b.flag("clamp")
    store = b.put_h(0, zero_upper=False, high=b.name == "v_fma_mixhi_f16")

    def run(g: Group) -> None:
        value = fma32(*(get(g) for get in gets))
        if clamp:
            value = np.clip(value, np.float32(0), np.float32(1))
        store(g, f32_to_f16_bits(value))

    return run
