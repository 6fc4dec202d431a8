"""Elementwise vector instructions of the integer and bit kind, moves and lane transfers.

Sources: "AMD Instinct MI300" ISA reference, chapter 12 (VOP1, VOP2, VOP3A), and LLVM's AMDGPUAsmGFX940.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Getter, Handler
from .machine import EXEC, S_BIT, VCC, Group, ones_where
from .registry import FACTORIES, register

_U32 = np.uint32
_ALL = np.uint32(0xFFFFFFFF)


def u(number: int) -> Any:
    return np.uint32(number)


def elementwise(b: Builder, kinds: str, function: Callable[..., Any], result: str = "u") -> Handler:
    """Compile ``result = function(sources)`` lane by lane.

    Args:
        kinds: a letter per source, method of Builder that gets it ("u", "i", "f").
        result: "u" for bits, "f" for float32 with its result modifiers.
    """
    gets = [getattr(b, kind)(k) for k, kind in enumerate(kinds)]
    put = b.put_f() if result == "f" else b.put_u()
    row = b.operands[0].row
    whole = b.plain and isinstance(function, np.ufunc) and put.__name__ != "change"
    if len(gets) == 1:
        (first,) = gets
        return lambda g: put(g, np.asarray(function(first(g))))
    if len(gets) == 2:
        first, second = gets
        if not whole:
            return lambda g: put(g, function(first(g), second(g)))
        view = {"u": "V", "i": "I", "f": "F"}[kinds[0]]

        def run(g: Group) -> None:
            if g.fast:
                function(first(g), second(g), out=getattr(g, view)[row])
            else:
                put(g, function(first(g), second(g)))

        return run
    first, second, third = gets
    return lambda g: put(g, function(first(g), second(g), third(g)))


def _shift(function: Any, bits: int = 31) -> Callable[[Any, Any], Any]:
    """``value shifted by amount`` of a reversed shift: amount first, only its low bits count."""
    mask = u(bits)
    if function is np.right_shift:
        return lambda amount, value: value >> (amount & mask).astype(value.dtype)
    return lambda amount, value: value << (amount & mask)


def mul_hi_u32(a: Any, b: Any) -> Any:
    return (np.multiply(a, b, dtype=np.uint64) >> np.uint64(32)).astype(_U32)


def mul_hi_i32(a: Any, b: Any) -> Any:
    return (np.multiply(a, b, dtype=np.int64) >> np.int64(32)).astype(np.int32)


def _i24(x: Any) -> Any:
    return (x << np.int32(8)) >> np.int32(8)


def _u24(x: Any) -> Any:
    return x & u(0xFFFFFF)


def sad_u16(a: Any, b: Any, total: Any) -> Any:
    """The distances of the two halves of a and b, added to a total of 32 bits."""
    for shift in (0, 16):
        x, y = a >> u(shift) & u(0xFFFF), b >> u(shift) & u(0xFFFF)
        total = total + (np.maximum(x, y) - np.minimum(x, y))
    return total


def bfe_u32(value: Any, offset: Any, width: Any) -> Any:
    """Bits [offset, offset + width)."""
    width = width & u(31)
    return (value >> (offset & u(31))) & ((u(1) << width) - u(1))


def bfe_i32(value: Any, offset: Any, width: Any) -> Any:
    """The same, sign-extended."""
    width = np.asarray(width & u(31)).astype(np.int64)
    field = bfe_u32(value.view(_U32), offset, width.astype(_U32)).astype(np.int64)
    sign = np.where(width > 0, np.int64(1) << np.maximum(width - 1, 0), 0)
    return ((field ^ sign) - sign).astype(np.int32)


def reverse_bits(x: Any) -> Any:
    x = np.asarray(x)
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = (x >> u(shift)) & u(mask) | (x & u(mask)) << u(shift)
    return x >> u(16) | x << u(16)


def perm(a: Any, b: Any, selector: Any) -> Any:
    """v_perm_b32: each byte of ``selector`` picks a byte of {a, b}; b holds bytes 0 to 3."""
    both = np.asarray(a).astype(np.uint64) << np.uint64(32) | np.asarray(b).astype(np.uint64)
    result: Any = u(0)
    for byte in range(4):
        pick = np.asarray(selector >> u(8 * byte) & u(0xFF)).astype(np.uint64)
        value = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        special = pick > 7
        if special.any():
            signs = {8: 15, 9: 31, 10: 47, 11: 63}
            for code, bit in signs.items():
                filled = (both >> np.uint64(bit) & np.uint64(1)) * np.uint64(0xFF)
                value = np.where(pick == code, filled, value)
            value = np.where(pick == 12, np.uint64(0), np.where(pick > 12, np.uint64(0xFF), value))
        result = result | value.astype(_U32) << u(8 * byte)
    return result


def count_leading(value: Any) -> Any:
    """Zeros above the highest one; all ones (-1) for 0."""
    value = np.asarray(value)
    # float64 holds 32-bit integers exactly, so its exponent is the place of the highest one.
    exponent = np.frexp(value.astype(np.float64))[1]
    return np.where(value == 0, -1, 32 - exponent).astype(np.int32)


def count_trailing(value: Any) -> Any:
    """Zeros below the lowest one; all ones (-1) for 0."""
    value = np.asarray(value)
    return np.where(value == 0, -1, 31 - count_leading(value & (~value + u(1)))).astype(np.int32)


def sad_u32(a: Any, b: Any, c: Any) -> Any:
    return np.maximum(a, b) - np.minimum(a, b) + c


def alignbit(a: Any, b: Any, amount: Any) -> Any:
    both = np.asarray(a).astype(np.uint64) << np.uint64(32) | np.asarray(b).astype(np.uint64)
    return (both >> np.asarray(amount & u(31)).astype(np.uint64)).astype(_U32)


def _median(a: Any, b: Any, c: Any) -> Any:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


#: name: (kinds of the sources, function).
_SIMPLE: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_mov_b32": ("u", lambda a: a),
    "v_accvgpr_mov_b32": ("u", lambda a: a),
    "v_accvgpr_read_b32": ("u", lambda a: a),
    "v_accvgpr_write_b32": ("u", lambda a: a),
    "v_not_b32": ("u", np.invert),
    "v_bfrev_b32": ("u", reverse_bits),
    "v_ffbh_u32": ("u", count_leading),
    "v_ffbl_b32": ("u", count_trailing),
    "v_add_u32": ("uu", np.add),
    "v_add_i32": ("uu", np.add),
    "v_sub_i32": ("uu", np.subtract),
    "v_sub_u32": ("uu", np.subtract),
    "v_subrev_u32": ("uu", lambda a, b: b - a),
    "v_and_b32": ("uu", np.bitwise_and),
    "v_or_b32": ("uu", np.bitwise_or),
    "v_xor_b32": ("uu", np.bitwise_xor),
    "v_xnor_b32": ("uu", lambda a, b: ~(a ^ b)),
    "v_lshlrev_b32": ("uu", _shift(np.left_shift)),
    "v_lshrrev_b32": ("uu", _shift(np.right_shift)),
    "v_ashrrev_i32": ("ui", _shift(np.right_shift)),
    "v_max_i32": ("ii", np.maximum),
    "v_min_i32": ("ii", np.minimum),
    "v_max_u32": ("uu", np.maximum),
    "v_min_u32": ("uu", np.minimum),
    "v_mul_lo_u32": ("uu", np.multiply),
    "v_mul_hi_u32": ("uu", mul_hi_u32),
    "v_mul_hi_i32": ("ii", mul_hi_i32),
    "v_mul_u32_u24": ("uu", lambda a, b: _u24(a) * _u24(b)),
    "v_mul_i32_i24": ("ii", lambda a, b: _i24(a) * _i24(b)),
    "v_mul_hi_u32_u24": ("uu", lambda a, b: mul_hi_u32(_u24(a), _u24(b))),
    "v_mad_u32_u24": ("uuu", lambda a, b, c: _u24(a) * _u24(b) + c),
    "v_mad_i32_i24": ("iii", lambda a, b, c: _i24(a) * _i24(b) + c),
    "v_bfe_u32": ("uuu", bfe_u32),
    "v_bfe_i32": ("iuu", bfe_i32),
    "v_bfi_b32": ("uuu", lambda m, a, b: m & a | ~m & b),
    "v_bfm_b32": ("uu", lambda width, offset: ((u(1) << (width & u(31))) - u(1)) << (offset & u(31))),
    "v_bcnt_u32_b32": ("uu", lambda a, b: np.bitwise_count(a).astype(_U32) + b),
    "v_perm_b32": ("uuu", perm),
    "v_alignbit_b32": ("uuu", alignbit),
    "v_alignbyte_b32": ("uuu", lambda a, b, c: alignbit(a, b, (c & u(3)) * u(8))),
    "v_sad_u16": ("uuu", sad_u16),
    "v_add3_u32": ("uuu", lambda a, b, c: a + b + c),
    "v_add_lshl_u32": ("uuu", lambda a, b, c: (a + b) << (c & u(31))),
    "v_lshl_add_u32": ("uuu", lambda a, b, c: (a << (b & u(31))) + c),
    "v_lshl_or_b32": ("uuu", lambda a, b, c: (a << (b & u(31))) | c),
    "v_and_or_b32": ("uuu", lambda a, b, c: a & b | c),
    "v_or3_b32": ("uuu", lambda a, b, c: a | b | c),
    "v_xor3_b32": ("uuu", lambda a, b, c: a ^ b ^ c),
    "v_xad_u32": ("uuu", lambda a, b, c: (a ^ b) + c),
    "v_max3_u32": ("uuu", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_max3_i32": ("iii", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_u32": ("uuu", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_min3_i32": ("iii", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_minmax_i32": ("iii", lambda a, b, c: np.maximum(np.minimum(a, b), c)),
    "v_minmax_u32": ("uuu", lambda a, b, c: np.maximum(np.minimum(a, b), c)),
    "v_maxmin_i32": ("iii", lambda a, b, c: np.minimum(np.maximum(a, b), c)),
    "v_maxmin_u32": ("uuu", lambda a, b, c: np.minimum(np.maximum(a, b), c)),
    "v_med3_i32": ("iii", _median),
    "v_med3_u32": ("uuu", _median),
    "v_sad_u32": ("uuu", sad_u32),
}


def _simple(kinds: str, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    return lambda b: elementwise(b, kinds, function)


for _name, (_kinds, _function) in _SIMPLE.items():
    FACTORIES[_name] = _simple(_kinds, _function)


@register("v_nop")
def _nop(b: Builder) -> Handler:
    return lambda g: None


@register("v_bitop3_b32")
def _bitop3(b: Builder) -> Handler:
    """Any bitwise function of three inputs: bit (a << 2 | b << 1 | c) of the table."""
    table = b.number("bitop3")

    def function(a_bits: Any, b_bits: Any, c_bits: Any) -> Any:
        result: Any = u(0)
        for place in range(8):
            if table >> place & 1:
                term = (a_bits if place & 4 else ~a_bits) & (b_bits if place & 2 else ~b_bits)
                result = result | term & (c_bits if place & 1 else ~c_bits)
        return result

    return elementwise(b, "uuu", function)


@register("v_cndmask_b32")
def _cndmask(b: Builder) -> Handler:
    """VCC, or a mask operand, chooses source 1 where set."""
    no, yes = b.f_bits(0), b.f_bits(1)
    choose = b.mask(2) if len(b.operands) > 3 else b.mask_of(VCC)
    put = b.put_u()

    def run(g: Group) -> None:
        other = no(g)
        put(g, other ^ ((other ^ yes(g)) & ones_where(choose(g))))

    return run


def _carry(b: Builder, function: Callable[[Any, Any], Any], has_carry_in: bool) -> Handler:
    b.first_source = 2
    first, second = b.u(0), b.u(1)
    carry_in: Getter | None = b.mask(2) if has_carry_in else None
    put, put_carry = b.put_u(0), b.put_mask(1)

    def run(g: Group) -> None:
        total = function(np.asarray(first(g)).astype(np.int64), np.asarray(second(g)).astype(np.int64))
        if carry_in is not None:
            carry = carry_in(g).astype(np.int64)
            total = total + function(np.int64(0), carry)
        put(g, (total & 0xFFFFFFFF).astype(_U32))
        put_carry(g, (total < 0) | (total > 0xFFFFFFFF))

    return run


@register("v_add_co_u32")
def _add_co(b: Builder) -> Handler:
    return _carry(b, lambda x, y: x + y, False)


@register("v_sub_co_u32")
def _sub_co(b: Builder) -> Handler:
    return _carry(b, lambda x, y: x - y, False)


@register("v_subrev_co_u32")
def _subrev_co(b: Builder) -> Handler:
    return _carry(b, lambda x, y: y - x, False)


@register("v_addc_co_u32")
def _addc_co(b: Builder) -> Handler:
    return _carry(b, lambda x, y: x + y, True)


@register("v_subb_co_u32")
def _subb_co(b: Builder) -> Handler:
    return _carry(b, lambda x, y: x - y, True)


# 64 bits


@register("v_mov_b64")
def _mov_b64(b: Builder) -> Handler:
    value, put = b.u64(0), b.put_u64()
    return lambda g: put(g, value(g))


@register("v_lshl_add_u64")
def _lshl_add_u64(b: Builder) -> Handler:
    value, amount, addend, put = b.u64(0), b.u(1), b.u64(2), b.put_u64()
    return lambda g: put(g, (value(g) << (amount(g) & u(7)).astype(np.uint64)) + addend(g))


@register("v_lshlrev_b64")
def _lshlrev_b64(b: Builder) -> Handler:
    amount, value, put = b.u(0), b.u64(1), b.put_u64()
    return lambda g: put(g, value(g) << (amount(g) & u(63)).astype(np.uint64))


@register("v_lshrrev_b64")
def _lshrrev_b64(b: Builder) -> Handler:
    amount, value, put = b.u(0), b.u64(1), b.put_u64()
    return lambda g: put(g, value(g) >> (amount(g) & u(63)).astype(np.uint64))


@register("v_ashrrev_i64")
def _ashrrev_i64(b: Builder) -> Handler:
    amount, value, put = b.u(0), b.u64(1), b.put_u64()
    return lambda g: put(g, np.asarray(value(g)).view(np.int64) >> (amount(g) & u(63)).astype(np.int64))


@register("v_mad_u64_u32")
def _mad_u64_u32(b: Builder) -> Handler:
    """64-bit a * b + c; the carry out is a mask."""
    b.first_source = 2
    first, second, addend = b.u(0), b.u(1), b.u64(2)
    put, put_carry = b.put_u64(0), b.put_mask(1)
    operand = b.source(2)
    if operand.kind == "v":
        # Compilers leave the upper addend undefined where only the lower result counts.
        b.unneeded = 1 << (operand.row + 1)

    def run(g: Group) -> None:
        product = np.multiply(first(g), second(g), dtype=np.uint64)
        total = np.asarray(product + addend(g))
        put(g, total)
        put_carry(g, total < product)

    return run


@register("v_mad_i64_i32")
def _mad_i64_i32(b: Builder) -> Handler:
    b.first_source = 2
    first, second, addend = b.i(0), b.i(1), b.u64(2)
    put, put_carry = b.put_u64(0), b.put_mask(1)

    def run(g: Group) -> None:
        product = np.asarray(np.multiply(first(g), second(g), dtype=np.int64)).view(np.uint64)
        total = np.asarray(product + addend(g))
        put(g, total)
        # Signed overflow of the 64-bit sum.
        put_carry(g, (total ^ product) & (total ^ addend(g)) >> np.uint64(63) != 0)

    return run


# 16-bit integers


def _short(kinds: str, function: Callable[..., Any]) -> Callable[[Builder], Handler]:
    """16-bit instruction on the low (or, by op_sel, high) halves."""

    def compile_one(b: Builder) -> Handler:
        count = len(kinds)
        select = b.bit_list("op_sel", (0,) * (count + 1))
        gets = [b.h_bits(k, bool(select[k])) for k in range(count)]
        put = b.put_h(0, high=True if select[-1] else None)

        def run(g: Group) -> None:
            values = []
            for kind, get in zip(kinds, gets, strict=True):
                value = np.asarray(get(g))
                values.append((value << u(16)).view(np.int32) >> np.int32(16) if kind == "i" else value)
            put(g, np.asarray(function(*values)).view(_U32) & u(0xFFFF))

        return run

    return compile_one


for _name, _kinds, _function in (
    ("v_add_u16", "uu", np.add),
    ("v_sub_u16", "uu", np.subtract),
    ("v_mul_lo_u16", "uu", np.multiply),
    ("v_lshlrev_b16", "uu", lambda a, x: x << (a & u(15))),
    ("v_lshrrev_b16", "uu", lambda a, x: x >> (a & u(15))),
    ("v_ashrrev_i16", "ui", lambda a, x: x >> (a & u(15)).astype(np.int32)),
    ("v_max_u16", "uu", np.maximum),
    ("v_min_u16", "uu", np.minimum),
    ("v_max_i16", "ii", np.maximum),
    ("v_min_i16", "ii", np.minimum),
    ("v_and_b16", "uu", np.bitwise_and),
    ("v_or_b16", "uu", np.bitwise_or),
    ("v_xor_b16", "uu", np.bitwise_xor),
    ("v_not_b16", "u", np.invert),
    ("v_mov_b16", "u", lambda a: a),
    ("v_mad_u16", "uuu", lambda a, x, c: a * x + c),
):
    FACTORIES[_name] = _short(_kinds, _function)


@register("v_cvt_u32_u16", "v_cvt_i32_i16")
def _widen(b: Builder) -> Handler:
    get, put, extend = b.h_bits(0), b.put_u(), b.name == "v_cvt_i32_i16"

    def run(g: Group) -> None:
        bits = np.asarray(get(g))
        put(g, ((bits << u(16)).view(np.int32) >> np.int32(16)).view(_U32) if extend else bits)

    return run


# Between lanes


@register("v_readfirstlane_b32")
def _readfirstlane(b: Builder) -> Handler:
    """Lane 0 where no lane is active."""
    value, put = b.u(0), b.s_put(0)

    def run(g: Group) -> None:
        lanes = np.broadcast_to(value(g), g.mask.shape)
        put(g, lanes[:, 0] if g.full else lanes[np.arange(g.n), g.mask.argmax(axis=1)])

    return run


@register("v_readlane_b32")
def _readlane(b: Builder) -> Handler:
    value, put = b.u(0), b.s_put(0)
    lane, last = b.su(2), u(b.lanes - 1)

    def run(g: Group) -> None:
        lanes = np.broadcast_to(value(g), g.mask.shape)
        put(g, lanes[np.arange(g.n), np.broadcast_to(lane(g) & last, g.n)])

    return run


@register("v_writelane_b32")
def _writelane(b: Builder) -> Handler:
    """EXEC does not matter; the other lanes stay, and need not hold anything."""
    value, lane, last = b.su(1), b.su(2), u(b.lanes - 1)
    row = b.dst_row(0)
    # Compilers spill SGPRs this way whether or not they hold anything, a lane each; lanes are not followed.
    b.unneeded = b.reads

    def run(g: Group) -> None:
        lanes = np.array(g.V[row])
        lanes[np.arange(g.n), np.broadcast_to(lane(g) & last, g.n)] = value(g)
        g.V[row] = lanes

    return run


def _swap_halves(b: Builder, width: int) -> Handler:
    """Swap odd rows of ``width`` lanes of the first register with even rows of the second."""
    first, second = b.expect(0, "v", 1), b.expect(1, "v", 1)
    for operand in (first, second):
        b.read_bits(operand)
        b.write_bits(operand)
    fetch_inactive = b.number("fi")
    bound_control = b.number("bound_ctrl")

    def run(g: Group) -> None:
        if not g.full or fetch_inactive or bound_control:
            raise b.unsupported("swapping with inactive lanes")
        x = np.array(g.V[first.row]).reshape(g.n, -1, 2, width)
        y = np.array(g.V[second.row]).reshape(g.n, -1, 2, width)
        odd = x[:, :, 1].copy()
        x[:, :, 1] = y[:, :, 0]
        y[:, :, 0] = odd
        g.V[first.row], g.V[second.row] = x.reshape(g.n, -1), y.reshape(g.n, -1)

    return run


@register("v_permlane16_swap_b32")
def _permlane16_swap(b: Builder) -> Handler:
    return _swap_halves(b, 16)


@register("v_permlane32_swap_b32")
def _permlane32_swap(b: Builder) -> Handler:
    return _swap_halves(b, 32)


@register("v_swap_b32")
def _swap(b: Builder) -> Handler:
    first, second = b.expect(0, "v", 1), b.expect(1, "v", 1)
    for operand in (first, second):
        b.read_bits(operand)
        b.write_bits(operand)

    def run(g: Group) -> None:
        x, y = np.array(g.V[first.row]), np.array(g.V[second.row])
        g.put(first.row, y)
        g.put(second.row, x)

    return run


def _mbcnt(b: Builder, upper: bool) -> Handler:
    """Bits of a mask below this lane, in the lower or upper half of the wave, plus source 1."""
    mask, addend, put = b.u(0), b.u(1), b.put_u()
    lane = np.arange(b.lanes)
    below = np.clip(lane - 32, 0, 32) if upper else np.clip(lane, 0, 32)
    thread_mask = ((np.uint64(1) << below.astype(np.uint64)) - np.uint64(1)).astype(_U32)
    return lambda g: put(g, np.bitwise_count(mask(g) & thread_mask).astype(_U32) + addend(g))


@register("v_mbcnt_lo_u32_b32")
def _mbcnt_lo(b: Builder) -> Handler:
    return _mbcnt(b, False)


@register("v_mbcnt_hi_u32_b32")
def _mbcnt_hi(b: Builder) -> Handler:
    return _mbcnt(b, True)


# Comparisons


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ne": np.not_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "ge": np.greater_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
}
_INTEGER_TESTS = ("lt", "eq", "le", "gt", "ne", "ge")
_FLOAT_TESTS = ("lt", "eq", "le", "gt", "lg", "ge", "o", "u", "nge", "nlg", "ngt", "nle", "neq", "nlt")


def _short_source(b: Builder, k: int, signed: bool) -> Getter:
    get = b.h_bits(k)
    if not signed:
        return get
    return lambda g: (np.asarray(get(g)) << u(16)).view(np.int32) >> np.int32(16)


def _long_source(b: Builder, k: int, signed: bool) -> Getter:
    get = b.u64(k, signed_literal=signed)
    return (lambda g: np.asarray(get(g)).view(np.int64)) if signed else get


def compare_source(b: Builder, k: int, kind: str) -> Getter:
    """Source of a comparison of kind "f32", "u16", ..."""
    if kind in ("u32", "i32", "f32"):
        return getattr(b, kind[0])(k)
    if kind in ("u16", "i16"):
        return _short_source(b, k, kind == "i16")
    if kind in ("u64", "i64"):
        return _long_source(b, k, kind == "i64")
    return b.h(k) if kind == "f16" else b.f64(k)


def _compare(test: Callable[[Any, Any], Any], kind: str, writes_exec: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        implicit = writes_exec and not b.gfx9
        b.first_source = 0 if implicit else 1
        first, second = compare_source(b, 0, kind), compare_source(b, 1, kind)
        # gfx9 may name EXEC, which is written anyhow, as the result.
        only_exec = implicit or (writes_exec and b.expect(0, "s").row == EXEC)
        put = None if only_exec else b.put_mask(0)
        if writes_exec:
            b.writes |= ((1 << b.mask_words) - 1) << (S_BIT + EXEC)

        def run(g: Group) -> None:
            result = test(first(g), second(g))
            if put is not None:
                put(g, result)
            if writes_exec:
                g.put_lanes(EXEC, np.broadcast_to(result, g.mask.shape) & g.mask)
                g.m.write_exec(g)

        return run

    return compile_one


def _register_comparisons() -> None:
    for kind in ("u32", "i32", "u16", "i16", "u64", "i64", "f32", "f16", "f64"):
        for test in _FLOAT_TESTS if kind[0] == "f" else _INTEGER_TESTS:
            FACTORIES[f"v_cmp_{test}_{kind}"] = _compare(_COMPARE[test], kind, False)
            FACTORIES[f"v_cmpx_{test}_{kind}"] = _compare(_COMPARE[test], kind, True)


_register_comparisons()


def _class_f32(value: Any, wanted: Any) -> Any:
    """v_cmp_class_f32: bits of ``wanted`` are signalling and quiet NaN, -inf, -normal, -denormal, -0, +0, ..."""
    bits = np.asarray(value).view(_U32)
    exponent, fraction = bits >> u(23) & u(0xFF), bits & u(0x7FFFFF)
    negative = bits >> u(31) == 1
    nan = (exponent == 255) & (fraction != 0)
    kinds = {2: (exponent == 255) & (fraction == 0), 3: (exponent > 0) & (exponent < 255)}
    kinds[4] = (exponent == 0) & (fraction != 0)
    kinds[5] = (exponent == 0) & (fraction == 0)
    number = np.where(fraction >> u(22) == 1, 1, 0)
    for place, holds in kinds.items():
        number = np.where(holds, np.where(negative, place, 11 - place), number)
    number = np.where(nan, np.where(fraction >> u(22) == 1, 1, 0), number)
    return wanted >> number.astype(_U32) & u(1) != 0


@register("v_cmp_class_f32")
def _cmp_class(b: Builder) -> Handler:
    value, wanted, put = b.f(0, flush=False), b.u(1), b.put_mask(0)
    return lambda g: put(g, _class_f32(value(g), wanted(g)))
