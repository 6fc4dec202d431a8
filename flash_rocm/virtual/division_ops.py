"""The three steps around a Newton iteration that make a division right: scale, scale back, special cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .builder import Builder, Getter, Handler, Writer
from .floats import exponent_of, fma32, fma64, is_denormal
from .machine import VCC, Group
from .registry import FACTORIES


class Format(NamedTuple):
    """A type of numbers, and where its divisions have to be scaled (ISA, V_DIV_SCALE and its like)."""

    dtype: Any
    fma: Callable[[Any, Any, Any], Any]
    far: int  # exponents of numerator and denominator so far apart that the quotient may be infinite
    low: int  # an exponent of the numerator whose remainder may be denormal
    power: int  # of two, to scale by
    bias: int
    tiny: int  # a difference of exponents whose quotient is zero


SINGLE = Format(np.float32, fma32, far=96, low=23, power=64, bias=127, tiny=-150)
DOUBLE = Format(np.float64, fma64, far=768, low=53, power=128, bias=1023, tiny=-1075)


def div_scale(value: Any, denominator: Any, numerator: Any, kind: Format = SINGLE) -> tuple[Any, Any]:
    """v_div_scale: the scaled operand, and whether the quotient has to be scaled back."""
    value, denominator, numerator = np.broadcast_arrays(value, denominator, numerator)
    with_den = value == denominator
    with_num = value == numerator
    up = np.ldexp(value.astype(np.float64), kind.power).astype(kind.dtype)
    down = np.ldexp(value.astype(np.float64), -kind.power).astype(kind.dtype)
    inverse_small = is_denormal((1 / denominator.astype(np.float64)).astype(kind.dtype))
    quotient_small = is_denormal((numerator.astype(np.float64) / denominator.astype(np.float64)).astype(kind.dtype))
    far = exponent_of(numerator) - exponent_of(denominator) >= kind.far
    cases = [
        ((numerator == 0) | (denominator == 0), np.full_like(value, np.nan), False),
        (far, np.where(with_den, up, value), True),
        (is_denormal(denominator), up, False),
        (inverse_small & quotient_small, np.where(with_den, up, value), True),
        (inverse_small, down, False),
        (quotient_small, np.where(with_num, up, value), True),
        (exponent_of(numerator) <= kind.low, up, False),
    ]
    conditions = [condition for condition, _, _ in cases]
    result = np.select(conditions, [scaled for _, scaled, _ in cases], value).astype(kind.dtype)
    flags = np.select(conditions, [np.full(value.shape, flag) for _, _, flag in cases], False)
    return result, flags


def div_fixup(quotient: Any, denominator: Any, numerator: Any, kind: Format = SINGLE) -> Any:
    """v_div_fixup: the special cases of a division."""
    quotient, denominator, numerator = np.broadcast_arrays(quotient, denominator, numerator)
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    sign = np.where(negative, kind.dtype(-1), kind.dtype(1))
    infinite, nothing = np.isinf(numerator) | (denominator == 0), np.isinf(denominator) | (numerator == 0)
    nan = np.isnan(numerator) | np.isnan(denominator) | (infinite & nothing & ~((denominator == 0) ^ (numerator == 0)))
    both_zero = (numerator == 0) & (denominator == 0)
    both_infinite = np.isinf(numerator) & np.isinf(denominator)
    tiny = exponent_of(numerator) - exponent_of(denominator) < kind.tiny
    conditions = [nan | both_zero | both_infinite, infinite, nothing, tiny]
    choices = [np.full_like(quotient, np.nan), sign * np.inf, sign * kind.dtype(0), sign * kind.dtype(0)]
    return np.select(conditions, choices, np.abs(quotient) * sign).astype(kind.dtype)


def _source(b: Builder, k: int, kind: Format) -> Getter:
    return b.f64(k) if kind is DOUBLE else b.f(k)


def _result(b: Builder, kind: Format) -> Writer:
    return b.put_u64(0) if kind is DOUBLE else b.put_f(0)


def _scale(kind: Format) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.first_source = 2
        value, denominator, numerator = (_source(b, k, kind) for k in range(3))
        put, put_flag = _result(b, kind), b.put_mask(1)

        def run(g: Group) -> None:
            result, flags = div_scale(value(g), denominator(g), numerator(g), kind)
            put(g, result)
            put_flag(g, flags)

        return run

    return compile_one


def _fmas(kind: Format) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        first, second, third = (_source(b, k, kind) for k in range(3))
        flags, put = b.mask_of(VCC), _result(b, kind)

        def run(g: Group) -> None:
            addend = third(g)
            result = np.asarray(kind.fma(first(g), second(g), addend))
            where = flags(g)
            if where.any():
                power = np.where(exponent_of(addend) > kind.bias, kind.power, -kind.power)
                result = np.where(where, np.ldexp(result.astype(np.float64), power).astype(kind.dtype), result)
            put(g, result)

        return run

    return compile_one


def _fixup(kind: Format) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        quotient, denominator, numerator = (_source(b, k, kind) for k in range(3))
        put = _result(b, kind)
        return lambda g: put(g, div_fixup(quotient(g), denominator(g), numerator(g), kind))

    return compile_one


for _name, _kind in (("f32", SINGLE), ("f64", DOUBLE)):
    FACTORIES[f"v_div_scale_{_name}"] = _scale(_kind)
    FACTORIES[f"v_div_fmas_{_name}"] = _fmas(_kind)
    FACTORIES[f"v_div_fixup_{_name}"] = _fixup(_kind)
