"""Float vector instructions.

Sources: "AMD Instinct MI300" ISA reference, chapter 12.  The transcendental instructions are computed to
about one unit in the last place of float32, as the hardware promises, not to its very bits; like the
hardware's they take and give no denormals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Getter, Handler, Writer
from .floats import (
    bf16_to_f32,
    f32_to_bf16_bits,
    f32_to_f16_bits,
    flush_f32,
    fma16_bits,
    fma32,
    fma64,
    to_integer,
)
from .machine import Group
from .registry import FACTORIES, register
from .vector_ops import elementwise, u

_F32 = np.float32
_U32 = np.uint32


def without_denormals(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function with denormal arguments and results flushed to zero."""
    return lambda x: flush_f32(np.asarray(function(flush_f32(x))))


def _fract(x: Any) -> Any:
    return np.minimum(x - np.floor(x), _F32(1 - 2.0**-24))


def _max3(a: Any, b: Any, c: Any) -> Any:
    return np.fmax(np.fmax(a, b), c)


def _min3(a: Any, b: Any, c: Any) -> Any:
    return np.fmin(np.fmin(a, b), c)


def _med3(a: Any, b: Any, c: Any) -> Any:
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, _min3(a, b, c), np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c)))


def _mul_legacy(a: Any, b: Any) -> Any:
    """0 times anything is 0."""
    return np.where((a == 0) | (b == 0), _F32(0), a * b)


def _turns(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """v_sin_f32 and v_cos_f32 take turns, not radians."""
    return lambda x: function(np.asarray(x, np.float64) % 1.0 * (2 * np.pi)).astype(_F32)


def _exponent(x: Any) -> Any:
    """Exponent of the fraction form, 0 for infinities and NaN."""
    parts: Any = np.frexp(x)
    exponent: Any = np.where(np.isfinite(x), parts[1], 0)
    return exponent.astype(np.int32)


_FLOAT: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_add_f32": ("ff", np.add),
    "v_sub_f32": ("ff", np.subtract),
    "v_subrev_f32": ("ff", lambda a, b: b - a),
    "v_mul_f32": ("ff", np.multiply),
    "v_mul_legacy_f32": ("ff", _mul_legacy),
    "v_max_f32": ("ff", np.fmax),
    "v_min_f32": ("ff", np.fmin),
    "v_maximum_f32": ("ff", np.maximum),
    "v_minimum_f32": ("ff", np.minimum),
    "v_max3_f32": ("fff", _max3),
    "v_min3_f32": ("fff", _min3),
    "v_med3_f32": ("fff", _med3),
    "v_maximum3_f32": ("fff", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_minimum3_f32": ("fff", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_fma_f32": ("fff", fma32),
    "v_mad_f32": ("fff", lambda a, b, c: a * b + c),
    "v_exp_f32": ("f", without_denormals(np.exp2)),
    "v_log_f32": ("f", without_denormals(np.log2)),
    "v_rcp_f32": ("f", without_denormals(lambda x: _F32(1) / x)),
    "v_rcp_iflag_f32": ("f", without_denormals(lambda x: _F32(1) / x)),
    "v_rsq_f32": ("f", without_denormals(lambda x: (1 / np.sqrt(np.asarray(x, np.float64))).astype(_F32))),
    "v_sqrt_f32": ("f", without_denormals(np.sqrt)),
    "v_sin_f32": ("f", _turns(np.sin)),
    "v_cos_f32": ("f", _turns(np.cos)),
    "v_floor_f32": ("f", np.floor),
    "v_ceil_f32": ("f", np.ceil),
    "v_trunc_f32": ("f", np.trunc),
    "v_rndne_f32": ("f", np.rint),
    "v_fract_f32": ("f", _fract),
    "v_cvt_f32_i32": ("i", lambda x: np.asarray(x).astype(_F32)),
    "v_cvt_f32_u32": ("u", lambda x: np.asarray(x).astype(_F32)),
    "v_cvt_f32_ubyte0": ("u", lambda x: (x & u(0xFF)).astype(_F32)),
    "v_cvt_f32_ubyte1": ("u", lambda x: (x >> u(8) & u(0xFF)).astype(_F32)),
    "v_cvt_f32_ubyte2": ("u", lambda x: (x >> u(16) & u(0xFF)).astype(_F32)),
    "v_cvt_f32_ubyte3": ("u", lambda x: (x >> u(24)).astype(_F32)),
    "v_cvt_f32_bf16": ("u", lambda x: bf16_to_f32(x & u(0xFFFF))),
    "v_ldexp_f32": ("fi", lambda x, e: np.ldexp(np.asarray(x, np.float64), np.clip(e, -400, 400)).astype(_F32)),
}
_TO_INTEGER: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_cvt_i32_f32": ("f", lambda x: to_integer(x, -(1 << 31), (1 << 31) - 1, np.int32)),
    "v_cvt_u32_f32": ("f", lambda x: to_integer(x, 0, (1 << 32) - 1, _U32)),
    "v_cvt_rpi_i32_f32": ("f", lambda x: to_integer(np.floor(x + _F32(0.5)), -(1 << 31), (1 << 31) - 1, np.int32)),
    "v_cvt_flr_i32_f32": ("f", lambda x: to_integer(np.floor(x), -(1 << 31), (1 << 31) - 1, np.int32)),
    "v_frexp_exp_i32_f32": ("f", lambda x: _exponent(x)),
    "v_cvt_pk_bf16_f32": ("ff", lambda a, b: f32_to_bf16_bits(a) | f32_to_bf16_bits(b) << u(16)),
    "v_cvt_pk_f16_f32": ("ff", lambda a, b: f32_to_f16_bits(a) | f32_to_f16_bits(b) << u(16)),
}


def _float(kinds: str, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    return lambda b: elementwise(b, kinds, function, "f")


def _bits(kinds: str, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    return lambda b: elementwise(b, kinds, function)


for _name, (_kinds, _function) in _FLOAT.items():
    FACTORIES[_name] = _float(_kinds, _function)
for _name, (_kinds, _function) in _TO_INTEGER.items():
    FACTORIES[_name] = _bits(_kinds, _function)
FACTORIES["v_frexp_mant_f32"] = _float(
    "f", lambda x: np.where(np.isfinite(x), np.asarray(np.frexp(x)[0]), x).astype(_F32)
)


def _destination_as_source(b: Builder) -> Getter:
    """float32 of the destination register (v_fmac)."""
    operand = b.expect(0, "v", 1)
    b.read_bits(operand)
    row = operand.row
    if b.descriptor.flush_f32:
        return lambda g: flush_f32(g.F[row])
    return lambda g: g.F[row]


@register("v_fmac_f32")
def _fmac(b: Builder) -> Handler:
    first, second, addend, put = b.f(0), b.f(1), _destination_as_source(b), b.put_f()
    return lambda g: put(g, fma32(first(g), second(g), addend(g)))


@register("v_mac_f32")
def _mac(b: Builder) -> Handler:
    first, second, addend, put = b.f(0), b.f(1), _destination_as_source(b), b.put_f()
    return lambda g: put(g, first(g) * second(g) + addend(g))


@register("v_fmaak_f32", "v_fmamk_f32")
def _fma_literal(b: Builder) -> Handler:
    """The literal is where it is printed: last (addend) or in the middle (factor)."""
    return elementwise(b, "fff", fma32, "f")


@register("v_madak_f32", "v_madmk_f32")
def _mad_literal(b: Builder) -> Handler:
    """The same of gfx90a, rounded twice."""
    return elementwise(b, "fff", lambda x, y, z: x * y + z, "f")


# float16


def _half(kinds: int, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    """float16 instruction: computed in float32, which a second rounding to float16 cannot spoil."""

    def compile_one(b: Builder) -> Handler:
        select = b.bit_list("op_sel", (0,) * (kinds + 1))
        gets = [b.h(k, bool(select[k])) for k in range(kinds)]
        put = _put_float16(b, bool(select[-1]))
        return lambda g: put(g, function(*(get(g) for get in gets)))

    return compile_one


def _put_float16(b: Builder, high: bool) -> Writer:
    """Writer of float32 as float16."""
    clamp, put = b.flag("clamp"), b.put_h(0, high=True if high else None)

    def write(g: Group, value: Any) -> None:
        if clamp:
            value = np.where(np.isnan(value), _F32(0), np.clip(value, _F32(0), _F32(1)))
        put(g, f32_to_f16_bits(value))

    return write


for _name, _count, _function in (
    ("v_add_f16", 2, np.add),
    ("v_sub_f16", 2, np.subtract),
    ("v_subrev_f16", 2, lambda a, b: b - a),
    ("v_mul_f16", 2, np.multiply),
    ("v_max_f16", 2, np.fmax),
    ("v_min_f16", 2, np.fmin),
    ("v_max3_f16", 3, _max3),
    ("v_min3_f16", 3, _min3),
    ("v_exp_f16", 1, np.exp2),
    ("v_log_f16", 1, np.log2),
    ("v_rcp_f16", 1, lambda x: _F32(1) / x),
    ("v_sqrt_f16", 1, np.sqrt),
    ("v_floor_f16", 1, np.floor),
    ("v_ceil_f16", 1, np.ceil),
    ("v_rndne_f16", 1, np.rint),
    ("v_trunc_f16", 1, np.trunc),
):
    FACTORIES[_name] = _half(_count, _function)


@register("v_fma_f16")
def _fma_f16(b: Builder) -> Handler:
    select = b.bit_list("op_sel", (0, 0, 0, 0))
    first, second, third = (b.h(k, bool(select[k])) for k in range(3))
    put = b.put_h(0, high=True if select[3] else None)
    return lambda g: put(g, fma16_bits(first(g), second(g), third(g)))


@register("v_cvt_f16_f32")
def _cvt_f16_f32(b: Builder) -> Handler:
    value, select = b.f(0), b.bit_list("op_sel", (0, 0))
    put = _put_float16(b, bool(select[1]))
    return lambda g: put(g, value(g))


@register("v_cvt_f32_f16")
def _cvt_f32_f16(b: Builder) -> Handler:
    select = b.bit_list("op_sel", (0, 0))
    value, put = b.h(0, bool(select[0])), b.put_f()
    return lambda g: put(g, value(g))


@register("v_cvt_f16_i16", "v_cvt_f16_u16")
def _cvt_f16_short(b: Builder) -> Handler:
    value, put, is_signed = b.h_bits(0), b.put_h(0), b.name.endswith("i16")

    def run(g: Group) -> None:
        number = np.asarray(value(g)).astype(np.uint16)
        put(g, f32_to_f16_bits((number.view(np.int16) if is_signed else number).astype(_F32)))

    return run


def rtz_f16_bits(value: Any) -> Any:
    """uint32 with the float16 towards zero; what is too large for float16 becomes its largest number."""
    near = np.asarray(value).astype(np.float16)
    back = near.astype(np.float64)
    bits = near.view(np.uint16).astype(_U32)
    # The magnitude of a float is the order of its bits: one step back where rounding went outwards.
    return np.where(np.isfinite(value) & (np.abs(back) > np.abs(np.asarray(value, np.float64))), bits - u(1), bits)


FACTORIES["v_cvt_pkrtz_f16_f32"] = _bits("ff", lambda a, b: rtz_f16_bits(a) | rtz_f16_bits(b) << u(16))
FACTORIES["v_pack_b32_f16"] = lambda b: _pack_b32_f16(b)


def _pack_b32_f16(b: Builder) -> Handler:
    select = b.bit_list("op_sel", (0, 0, 0))
    low, high, put = b.h_bits(0, bool(select[0])), b.h_bits(1, bool(select[1])), b.put_u()
    if b.source(0).neg or b.source(1).neg or b.source(0).abs or b.source(1).abs:
        raise b.unsupported("changing a sign")
    return lambda g: put(g, np.asarray(low(g) | high(g) << u(16)))


# float64


def _double(kinds: int, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        gets = [b.f64(k) for k in range(kinds)]
        put = b.put_u64()
        return lambda g: put(g, np.asarray(function(*(get(g) for get in gets))))

    return compile_one


for _name, _count, _function in (
    ("v_add_f64", 2, np.add),
    ("v_mul_f64", 2, np.multiply),
    ("v_max_f64", 2, np.fmax),
    ("v_min_f64", 2, np.fmin),
    ("v_fma_f64", 3, fma64),
    ("v_rcp_f64", 1, lambda x: 1.0 / x),
    ("v_rsq_f64", 1, lambda x: 1.0 / np.sqrt(x)),
    ("v_sqrt_f64", 1, np.sqrt),
    ("v_floor_f64", 1, np.floor),
    ("v_ceil_f64", 1, np.ceil),
    ("v_trunc_f64", 1, np.trunc),
    ("v_rndne_f64", 1, np.rint),
):
    FACTORIES[_name] = _double(_count, _function)


@register("v_fmac_f64")
def _fmac_f64(b: Builder) -> Handler:
    operand = b.expect(0, "v", 2)
    b.read_bits(operand)
    row, first, second, put = operand.row, b.f64(0), b.f64(1), b.put_u64()

    def run(g: Group) -> None:
        addend = g.V[row].astype(np.uint64) | g.V[row + 1].astype(np.uint64) << np.uint64(32)
        put(g, np.asarray(fma64(first(g), second(g), addend.view(np.float64))))

    return run


@register("v_cvt_f64_f32", "v_cvt_f64_i32", "v_cvt_f64_u32")
def _cvt_to_f64(b: Builder) -> Handler:
    value, put = getattr(b, b.name[-3])(0), b.put_u64()
    return lambda g: put(g, np.asarray(value(g)).astype(np.float64))


@register("v_cvt_f32_f64")
def _cvt_f32_f64(b: Builder) -> Handler:
    value, put = b.f64(0), b.put_f()
    return lambda g: put(g, np.asarray(value(g)).astype(_F32))


@register("v_cvt_i32_f64")
def _cvt_i32_f64(b: Builder) -> Handler:
    value, put = b.f64(0), b.put_u()
    return lambda g: put(g, to_integer(value(g), -(1 << 31), (1 << 31) - 1, np.int32))


@register("v_cvt_u32_f64")
def _cvt_u32_f64(b: Builder) -> Handler:
    value, put = b.f64(0), b.put_u()
    return lambda g: put(g, to_integer(value(g), 0, (1 << 32) - 1, _U32))


@register("v_ldexp_f64")
def _ldexp_f64(b: Builder) -> Handler:
    value, power, put = b.f64(0), b.i(1), b.put_u64()
    return lambda g: put(g, np.ldexp(np.asarray(value(g)), np.clip(power(g), -3000, 3000)))
