"""Float arithmetic as the hardware does it: one rounding for a fused multiply-add, to nearest even.

Fused multiply-add: the product of two float32 is exact in float64, and adding the third rounds to 53 bits;
rounding that again to 24 bits errs only where the float64 lies exactly between two float32 (or where the
result is denormal, whose rounding position differs).  Those lanes are found by their low bits and
recomputed by rounding to odd, after which a second rounding is exact (Boldo and Melquiond, "Emulation of
FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

_HALF_WAY = np.uint32(0x10000000)
_TAIL = np.uint32(0x1FFFFFFF)
_SMALL = 2.0**-125
with np.errstate(invalid="ignore"):  # the signalling NaNs among them
    _F16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def f16_to_f32(bits: Any) -> Any:
    """float32 of float16 bits below 65536."""
    return _F16.take(bits)


def f32_to_f16_bits(value: Any) -> Any:
    """uint32 with the float16 nearest to each value."""
    return np.asarray(value).astype(np.float16).view(np.uint16).astype(np.uint32)


def bf16_to_f32(bits: Any) -> Any:
    """float32 of bfloat16 bits below 65536."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16_bits(value: Any) -> Any:
    """uint32 with the bfloat16 nearest to each float32, ties to even; NaN stays NaN, made quiet."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), bits >> np.uint32(16) | np.uint32(0x40), rounded)


def flush_f32(value: Any) -> Any:
    """Denormals to zero of the same sign."""
    bits = np.asarray(value).view(np.uint32)
    small = (bits & np.uint32(0x7F800000)) == 0
    return np.where(small, bits & np.uint32(0x80000000), bits).view(np.float32)


def _odd_sum(product: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """float64 sum rounded to odd: inexact results get a last bit of 1."""
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).view(np.float64)


def fma32(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    result = total.astype(np.float32)
    low = total.reshape(-1).view(np.uint32)[::2]
    doubtful = (low & _TAIL) == _HALF_WAY
    if doubtful.any() or (np.abs(result) < _SMALL).any():
        wanted = doubtful.reshape(total.shape) | ((np.abs(total) < _SMALL) & (total != 0))
        if wanted.any():
            product, addend = np.broadcast_arrays(product, addend)
            result = np.array(result)
            result[wanted] = _odd_sum(product[wanted], addend[wanted]).astype(np.float32)
    return result


def fma16_bits(a: Any, b: Any, c: Any) -> Any:
    """uint32 bits of a * b + c in float16, rounded once; a, b, c are float32 holding float16 values."""
    product = np.multiply(a, b, dtype=np.float64)
    product, addend = np.broadcast_arrays(product, np.asarray(c, np.float64))
    return _odd_sum(np.array(product), np.array(addend)).astype(np.float16).view(np.uint16).astype(np.uint32)


def fma64(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float64, rounded once, lane by lane in exact arithmetic (slow)."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c)))
    result = a * b + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    flat = result.reshape(-1)
    for lane in np.nonzero(finite.reshape(-1))[0]:
        exact = Fraction(float(a.flat[lane])) * Fraction(float(b.flat[lane])) + Fraction(float(c.flat[lane]))
        if exact:  # a zero keeps the sign that float64 arithmetic gave it
            try:
                flat[lane] = float(exact)
            except OverflowError:
                flat[lane] = np.inf if exact > 0 else -np.inf
    return flat.reshape(result.shape)


def exponent_of(value: Any) -> Any:
    """Biased exponent field of float32 or float64."""
    value = np.asarray(value)
    if value.dtype == np.float64:
        return (value.view(np.uint64) >> np.uint64(52) & np.uint64(0x7FF)).astype(np.int32)
    return (value.view(np.uint32) >> np.uint32(23) & np.uint32(0xFF)).astype(np.int32)


def is_denormal(value: Any) -> Any:
    """Whether float32 or float64 values are denormal and not zero."""
    return (exponent_of(value) == 0) & (value != 0)


def to_integer(value: Any, low: int, high: int, dtype: Any) -> Any:
    """Truncate to an integer, saturating; NaN gives 0."""
    wide = np.asarray(value, np.float64)
    return np.where(np.isnan(wide), 0.0, np.clip(np.trunc(wide), low, high)).astype(np.int64).astype(dtype)
