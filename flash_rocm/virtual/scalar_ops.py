"""Scalar instructions: arithmetic, comparisons, EXEC masks, waits and scalar loads.

Source: "AMD Instinct MI300" ISA reference, chapter 12 (SOP1, SOP2, SOPC, SOPK, SOPP, SMEM).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Handler, put_scc
from .errors import UnsupportedInstruction
from .floats import to_integer
from .machine import EXEC, NULL, S_BIT, SCC, Group
from .registry import FACTORIES, register
from .vector_ops import bfe_i32, bfe_u32, count_leading, count_trailing, mul_hi_i32, mul_hi_u32, reverse_bits, u

_U32 = np.uint32
_U64 = np.uint64
_I32 = np.int32


def _i(x: Any) -> Any:
    return np.asarray(x).view(_I32)


def _i64(x: Any) -> Any:
    return np.asarray(x).astype(_I32, copy=False).astype(np.int64) if x.dtype == _I32 else np.asarray(x).view(np.int64)


def _wide(x: Any) -> Any:
    return np.asarray(x).astype(np.uint64)


Result = tuple[Any, Any]


def _nonzero(value: Any) -> Result:
    return value, np.asarray(value) != 0


def _add_u32(a: Any, b: Any) -> Result:
    total = _wide(a) + _wide(b)
    return total.astype(_U32), total >> _U64(32) != 0


def _sub_u32(a: Any, b: Any) -> Result:
    return a - b, np.asarray(b > a)


def _add_i32(a: Any, b: Any) -> Result:
    total = a + b
    return total, _i((total ^ a) & (total ^ b)) < 0


def _sub_i32(a: Any, b: Any) -> Result:
    total = a - b
    return total, _i((a ^ b) & (total ^ a)) < 0


def _lshl_add(shift: int) -> Callable[[Any, Any], Result]:
    def function(a: Any, b: Any) -> Result:
        total = (_wide(a) << _U64(shift)) + _wide(b)
        return total.astype(_U32), total >> _U64(32) != 0

    return function


def _bfe_i32(a: Any, b: Any) -> Result:
    return _nonzero(bfe_i32(_i(a), b & u(31), b >> u(16) & u(0x7F)).view(_U32))


def _bfe_u32(a: Any, b: Any) -> Result:
    width = b >> u(16) & u(0x7F)
    return _nonzero(np.where(width >= u(32), a >> (b & u(31)), bfe_u32(a, b & u(31), width)))


def _absdiff(a: Any, b: Any) -> Result:
    difference = _i(a).astype(np.int64) - _i(b).astype(np.int64)
    return _nonzero((np.abs(difference) & 0xFFFFFFFF).astype(_U32))


def _chosen(second: Any, first: Any, wins: Any) -> Result:
    return np.where(wins, first, second), np.asarray(wins)


#: name: function of uint32 (value, SCC or None to leave it).
_SOP2: dict[str, Callable[[Any, Any], Result]] = {
    "s_add_u32": _add_u32,
    "s_sub_u32": _sub_u32,
    "s_add_i32": _add_i32,
    "s_sub_i32": _sub_i32,
    "s_min_i32": lambda a, b: _chosen(b, a, _i(a) < _i(b)),
    "s_min_u32": lambda a, b: _chosen(b, a, a < b),
    "s_max_i32": lambda a, b: _chosen(b, a, _i(a) > _i(b)),
    "s_max_u32": lambda a, b: _chosen(b, a, a > b),
    "s_and_b32": lambda a, b: _nonzero(a & b),
    "s_or_b32": lambda a, b: _nonzero(a | b),
    "s_xor_b32": lambda a, b: _nonzero(a ^ b),
    "s_andn2_b32": lambda a, b: _nonzero(a & ~b),
    "s_orn2_b32": lambda a, b: _nonzero(a | ~b),
    "s_nand_b32": lambda a, b: _nonzero(~(a & b)),
    "s_nor_b32": lambda a, b: _nonzero(~(a | b)),
    "s_xnor_b32": lambda a, b: _nonzero(~(a ^ b)),
    "s_lshl_b32": lambda a, b: _nonzero(a << (b & u(31))),
    "s_lshr_b32": lambda a, b: _nonzero(a >> (b & u(31))),
    "s_ashr_i32": lambda a, b: _nonzero((_i(a) >> _i(b & u(31))).view(_U32)),
    "s_bfm_b32": lambda a, b: (((u(1) << (a & u(31))) - u(1)) << (b & u(31)), None),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mul_hi_u32": lambda a, b: (mul_hi_u32(a, b), None),
    "s_mul_hi_i32": lambda a, b: (mul_hi_i32(_i(a), _i(b)).view(_U32), None),
    "s_bfe_u32": _bfe_u32,
    "s_bfe_i32": _bfe_i32,
    "s_absdiff_i32": _absdiff,
    "s_lshl1_add_u32": _lshl_add(1),
    "s_lshl2_add_u32": _lshl_add(2),
    "s_lshl3_add_u32": _lshl_add(3),
    "s_lshl4_add_u32": _lshl_add(4),
    "s_pack_ll_b32_b16": lambda a, b: (a & u(0xFFFF) | b << u(16), None),
    "s_pack_lh_b32_b16": lambda a, b: (a & u(0xFFFF) | b & u(0xFFFF0000), None),
    "s_pack_hh_b32_b16": lambda a, b: (a >> u(16) | b & u(0xFFFF0000), None),
    "s_pack_hl_b32_b16": lambda a, b: (a >> u(16) | b << u(16), None),
}


def _float_pair(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Result]:
    return lambda a, b: (np.asarray(function(a.view(np.float32), b.view(np.float32))).view(_U32), None)


for _name, _ufunc in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    _SOP2[f"s_{_name}_f32"] = _float_pair(_ufunc)
_SOP2["s_max_num_f32"], _SOP2["s_min_num_f32"] = _float_pair(np.fmax), _float_pair(np.fmin)

_SOP2_64: dict[str, Callable[[Any, Any], Result]] = {
    "s_and_b64": lambda a, b: _nonzero(a & b),
    "s_or_b64": lambda a, b: _nonzero(a | b),
    "s_xor_b64": lambda a, b: _nonzero(a ^ b),
    "s_andn2_b64": lambda a, b: _nonzero(a & ~b),
    "s_orn2_b64": lambda a, b: _nonzero(a | ~b),
    "s_nand_b64": lambda a, b: _nonzero(~(a & b)),
    "s_nor_b64": lambda a, b: _nonzero(~(a | b)),
    "s_xnor_b64": lambda a, b: _nonzero(~(a ^ b)),
    "s_add_nc_u64": lambda a, b: (a + b, None),
    "s_sub_nc_u64": lambda a, b: (a - b, None),
    "s_mul_u64": lambda a, b: (a * b, None),
}
_SOP1: dict[str, Callable[[Any], Result]] = {
    "s_mov_b32": lambda a: (a, None),
    "s_not_b32": lambda a: _nonzero(~a),
    "s_abs_i32": lambda a: _nonzero(np.abs(_i(a)).view(_U32)),
    "s_brev_b32": lambda a: (reverse_bits(a), None),
    "s_bcnt1_i32_b32": lambda a: _nonzero(np.bitwise_count(np.asarray(a)).astype(_U32)),
    "s_bcnt0_i32_b32": lambda a: _nonzero(np.bitwise_count(~np.asarray(a)).astype(_U32)),
    "s_ff1_i32_b32": lambda a: (count_trailing(a).view(_U32), None),
    "s_flbit_i32_b32": lambda a: (count_leading(a).view(_U32), None),
    "s_sext_i32_i8": lambda a: (((_i(a) << _I32(24)) >> _I32(24)).view(_U32), None),
    "s_sext_i32_i16": lambda a: (((_i(a) << _I32(16)) >> _I32(16)).view(_U32), None),
    "s_cvt_f32_u32": lambda a: (np.asarray(a).astype(np.float32).view(_U32), None),
    "s_cvt_f32_i32": lambda a: (_i(a).astype(np.float32).view(_U32), None),
    "s_cvt_u32_f32": lambda a: (to_integer(a.view(np.float32), 0, (1 << 32) - 1, _U32), None),
    "s_cvt_i32_f32": lambda a: (to_integer(a.view(np.float32), -(1 << 31), (1 << 31) - 1, _I32).view(_U32), None),
}
_SOP1_64: dict[str, Callable[[Any], Result]] = {
    "s_mov_b64": lambda a: (a, None),
    "s_not_b64": lambda a: _nonzero(~a),
}


def _scalar(function: Callable[..., Result], count: int, wide: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        if wide:
            gets = [b.su64(1 + k) for k in range(count)]
            put = b.s_put64(0)
        else:
            gets = [b.su(1 + k) for k in range(count)]
            put = b.s_put(0)
        if count == 2:
            first, second = gets

            def run(g: Group) -> None:
                value, flag = function(first(g), second(g))
                put(g, value)
                if flag is not None:
                    g.S[SCC] = flag

            return run
        (only,) = gets

        def run_one(g: Group) -> None:
            value, flag = function(only(g))
            put(g, value)
            if flag is not None:
                g.S[SCC] = flag

        return run_one

    return compile_one


for _name, _function in _SOP2.items():
    FACTORIES[_name] = _scalar(_function, 2, False)
for _name, _function in _SOP2_64.items():
    FACTORIES[_name] = _scalar(_function, 2, True)
for _name, _one in _SOP1.items():
    FACTORIES[_name] = _scalar(_one, 1, False)
for _name, _one in _SOP1_64.items():
    FACTORIES[_name] = _scalar(_one, 1, True)


@register("s_addc_u32", "s_subb_u32")
def _with_carry(b: Builder) -> Handler:
    first, second, put = b.su(1), b.su(2), b.s_put(0)
    negative = b.name == "s_subb_u32"

    def run(g: Group) -> None:
        x, y = _wide(first(g)).astype(np.int64), _wide(second(g)).astype(np.int64)
        carry = g.S[SCC].astype(np.int64)
        total = x - y - carry if negative else x + y + carry
        put(g, (total & 0xFFFFFFFF).astype(_U32))
        put_scc(g, (total < 0) | (total > 0xFFFFFFFF))

    return run


@register("s_cselect_b32", "s_cselect_b64")
def _cselect(b: Builder) -> Handler:
    wide = b.name.endswith("64")
    get, writer = (b.su64, b.s_put64) if wide else (b.su, b.s_put)
    yes, no, put = get(1), get(2), writer(0)
    return lambda g: put(g, np.where(g.S[SCC] != 0, yes(g), no(g)))


@register("s_cmov_b32")
def _cmov(b: Builder) -> Handler:
    value, old, put = b.su(1), b.su(0), b.s_put(0)
    return lambda g: put(g, np.where(g.S[SCC] != 0, value(g), old(g)))


@register("s_lshl_b64", "s_lshr_b64", "s_ashr_i64")
def _shift64(b: Builder) -> Handler:
    value, amount, put = b.su64(1), b.su(2), b.s_put64(0)
    name = b.name

    def run(g: Group) -> None:
        x, by = np.asarray(value(g)), np.asarray(amount(g) & u(63)).astype(_U64)
        if name == "s_lshl_b64":
            result = x << by
        elif name == "s_lshr_b64":
            result = x >> by
        else:
            result = (x.view(np.int64) >> by.astype(np.int64)).view(_U64)
        put(g, result)
        put_scc(g, result != 0)

    return run


@register("s_bfe_u64", "s_bfe_i64")
def _bfe64(b: Builder) -> Handler:
    value, field, put = b.su64(1), b.su(2), b.s_put64(0)
    is_signed = b.name.endswith("i64")

    def run(g: Group) -> None:
        offset = np.asarray(field(g) & u(63)).astype(_U64)
        width = np.asarray(field(g) >> u(16) & u(0x7F)).astype(_U64)
        left = _U64(64) - np.minimum(width, _U64(64))
        moved = np.where(width == 0, _U64(0), (value(g) >> offset) << np.minimum(left, _U64(63)))
        down = np.minimum(left, _U64(63))
        result = (moved.view(np.int64) >> down.astype(np.int64)).view(_U64) if is_signed else moved >> down
        put(g, result)
        put_scc(g, result != 0)

    return run


@register("s_bfm_b64")
def _bfm64(b: Builder) -> Handler:
    width, offset, put = b.su(1), b.su(2), b.s_put64(0)

    def run(g: Group) -> None:
        ones = (_U64(1) << _wide(width(g) & u(63))) - _U64(1)
        put(g, ones << _wide(offset(g) & u(63)))

    return run


@register("s_bcnt1_i32_b64", "s_ff1_i32_b64", "s_flbit_i32_b64")
def _count64(b: Builder) -> Handler:
    value, put, name = b.su64(1), b.s_put(0), b.name

    def run(g: Group) -> None:
        x = np.asarray(value(g))
        low, high = (x & _U64(0xFFFFFFFF)).astype(_U32), (x >> _U64(32)).astype(_U32)
        if name == "s_bcnt1_i32_b64":
            count = np.bitwise_count(x).astype(_U32)
            put(g, count)
            put_scc(g, count != 0)
        elif name == "s_ff1_i32_b64":
            put(
                g,
                np.where(low != 0, count_trailing(low), np.where(high != 0, count_trailing(high) + 32, -1)).astype(
                    _I32
                ),
            )
        else:
            put(
                g,
                np.where(high != 0, count_leading(high), np.where(low != 0, count_leading(low) + 32, -1)).astype(_I32),
            )

    return run


def _bitset(b: Builder, wide: bool, value: int) -> Handler:
    """Set or clear one bit of the destination."""
    place, put = b.su(1), (b.s_put64 if wide else b.s_put)(0)
    old = (b.su64 if wide else b.su)(0)
    kind: Any = _U64 if wide else _U32

    def run(g: Group) -> None:
        bit = kind(1) << np.asarray(place(g) & u(63 if wide else 31)).astype(kind)
        put(g, old(g) | bit if value else old(g) & ~bit)

    return run


FACTORIES["s_bitset0_b32"] = lambda b: _bitset(b, False, 0)
FACTORIES["s_bitset1_b32"] = lambda b: _bitset(b, False, 1)
FACTORIES["s_bitset0_b64"] = lambda b: _bitset(b, True, 0)
FACTORIES["s_bitset1_b64"] = lambda b: _bitset(b, True, 1)


def _short_immediate(b: Builder, index: int) -> Any:
    """A 16-bit immediate, which is sign-extended however it was printed."""
    number = b.expect(index, ("int", "hex")).number & 0xFFFF
    return np.uint32((number - ((number & 0x8000) << 1)) & 0xFFFFFFFF)


@register("s_movk_i32")
def _movk(b: Builder) -> Handler:
    value, put = _short_immediate(b, 1), b.s_put(0)
    return lambda g: put(g, value)


@register("s_cmovk_i32")
def _cmovk(b: Builder) -> Handler:
    value, old, put = _short_immediate(b, 1), b.su(0), b.s_put(0)
    return lambda g: put(g, np.where(g.S[SCC] != 0, value, old(g)))


@register("s_addk_i32")
def _addk(b: Builder) -> Handler:
    value, old, put = _short_immediate(b, 1), b.su(0), b.s_put(0)

    def run(g: Group) -> None:
        total, overflow = _add_i32(old(g), value)
        put(g, total)
        put_scc(g, overflow)

    return run


@register("s_mulk_i32")
def _mulk(b: Builder) -> Handler:
    value, old, put = _short_immediate(b, 1), b.su(0), b.s_put(0)
    return lambda g: put(g, old(g) * value)


_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}


def _compare(test: Callable[[Any, Any], Any], kind: str, short: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        first = b.su(0)
        if short:
            value = _short_immediate(b, 1)
            # Unsigned comparisons take the immediate without its sign.
            constant = value & u(0xFFFF) if kind == "u32" else value
            second = lambda g: constant  # noqa: E731
        else:
            second = b.su(1)
        if kind == "i32":
            return lambda g: put_scc(g, test(_i(first(g)), _i(second(g))))
        return lambda g: put_scc(g, test(first(g), second(g)))

    return compile_one


for _test, _operation in _TESTS.items():
    for _kind in ("i32", "u32"):
        FACTORIES[f"s_cmp_{_test}_{_kind}"] = _compare(_operation, _kind, False)
        FACTORIES[f"s_cmpk_{_test}_{_kind}"] = _compare(_operation, _kind, True)


@register("s_cmp_eq_u64", "s_cmp_lg_u64")
def _compare64(b: Builder) -> Handler:
    first, second = b.su64(0), b.su64(1)
    test = _TESTS[b.name[6:8]]
    return lambda g: put_scc(g, test(first(g), second(g)))


_FLOAT_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    **_TESTS,
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _compare_float(test: Callable[[Any, Any], Any]) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        first, second = b.su(0), b.su(1)
        return lambda g: put_scc(g, test(first(g).view(np.float32), second(g).view(np.float32)))

    return compile_one


for _test, _operation in _FLOAT_TESTS.items():
    FACTORIES[f"s_cmp_{_test}_f32"] = _compare_float(_operation)


@register("s_bitcmp0_b32", "s_bitcmp1_b32")
def _bitcmp(b: Builder) -> Handler:
    value, place, wanted = b.su(0), b.su(1), u(int(b.name[8]))
    return lambda g: put_scc(g, (value(g) >> (place(g) & u(31)) & u(1)) == wanted)


@register("s_bitcmp0_b64", "s_bitcmp1_b64")
def _bitcmp64(b: Builder) -> Handler:
    value, place, wanted = b.su64(0), b.su(1), _U64(int(b.name[8]))
    return lambda g: put_scc(g, (value(g) >> _wide(place(g) & u(63)) & _U64(1)) == wanted)


def _saveexec(function: Callable[[Any, Any], Any], wide: bool) -> Callable[[Builder], Handler]:
    """Destination gets EXEC, EXEC gets ``function(source, EXEC)``, SCC whether a lane is left."""

    def compile_one(b: Builder) -> Handler:
        source = (b.su64 if wide else b.su)(1)
        put = (b.s_put64 if wide else b.s_put)(0)
        b.writes |= (3 if wide else 1) << (S_BIT + EXEC)

        def run(g: Group) -> None:
            old = g.pair(EXEC) if wide else np.array(g.S[EXEC])
            new = function(source(g), old)
            put(g, old)
            if wide:
                g.put_pair(EXEC, new)
            else:
                g.S[EXEC] = new
            g.m.write_exec(g)
            put_scc(g, new != 0)

        return run

    return compile_one


_RDNA_NAMES = {"andn2": "and_not1", "orn2": "or_not1", "andn1": "and_not0", "orn1": "or_not0"}
for _name, _pair in (
    ("and", lambda s, e: s & e),
    ("or", lambda s, e: s | e),
    ("xor", lambda s, e: s ^ e),
    ("andn2", lambda s, e: s & ~e),
    ("orn2", lambda s, e: s | ~e),
    ("nand", lambda s, e: ~(s & e)),
    ("nor", lambda s, e: ~(s | e)),
    ("xnor", lambda s, e: ~(s ^ e)),
    ("andn1", lambda s, e: ~s & e),
    ("orn1", lambda s, e: ~s | e),
):
    FACTORIES[f"s_{_name}_saveexec_b64"] = _saveexec(_pair, True)
    # Waves of 32 lanes came with the new names.
    _rdna_name = _RDNA_NAMES.get(_name, _name)
    FACTORIES[f"s_{_rdna_name}_saveexec_b64"] = _saveexec(_pair, True)
    FACTORIES[f"s_{_rdna_name}_saveexec_b32"] = _saveexec(_pair, False)


# Waits and hints


def _ignore(b: Builder) -> Handler:
    for name in b.modifier_names():
        b.take(name)
    return lambda g: None


for _name in (
    *("s_nop", "s_sleep", "s_setprio", "s_set_inst_prefetch_distance", "s_clause", "s_delay_alu"),
    *("s_code_end", "s_icache_inv", "s_dcache_inv", "s_dcache_wb", "s_wait_alu", "s_waitcnt_depctr"),
):
    FACTORIES[_name] = _ignore

#: Cache maintenance, which changes nothing here; what follows are flags, not operands.
CACHE_CONTROL = frozenset(
    ("buffer_wbl2", "buffer_inv", "buffer_wbinvl1", "buffer_wbinvl1_vol", "buffer_gl0_inv", "buffer_gl1_inv")
    + ("global_inv", "global_wb", "global_wbinv")
)

_COUNTS = {"vmcnt": ("vm",), "lgkmcnt": ("ds", "sm"), "expcnt": (), "vscnt": ("vs",)}
_SPLIT = {
    "loadcnt": "vm",
    "storecnt": "vs",
    "dscnt": "ds",
    "kmcnt": "sm",
    "samplecnt": "",
    "bvhcnt": "",
    "expcnt": "",
}


def _wait_handler(waits: list[tuple[str, int]]) -> Handler:
    def run(g: Group) -> None:
        tracker = g.m.tracker
        if tracker is not None:
            for counter, outstanding in waits:
                tracker.wait(g, counter, outstanding)

    return run


@register("s_waitcnt")
def _waitcnt(b: Builder) -> Handler:
    waits: list[tuple[str, int]] = []
    for name in b.modifier_names():
        found = re.fullmatch(r"(\w+)\((\d+)\)", name)
        if name == "&":
            b.take(name)
            continue
        if found is None or found.group(1) not in _COUNTS:
            continue
        b.take(name)
        waits += [(counter, int(found.group(2))) for counter in _COUNTS[found.group(1)]]
    for operand in b.operands:
        if operand.number != 0 or operand.kind not in ("int", "hex"):
            raise b.unsupported("a wait by number")
        waits += [(counter, 0) for counter in ("vm", "ds", "sm")]
    return _wait_handler(waits)


@register("s_waitcnt_vscnt")
def _waitcnt_vscnt(b: Builder) -> Handler:
    if b.expect(0, "s").row != NULL:
        raise b.unsupported("a wait that adds an SGPR")
    return _wait_handler([("vs", b.expect(1, ("int", "hex")).number)])


def _split_wait(names: tuple[str, ...]) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        number = b.expect(0, ("int", "hex")).number
        # s_wait_loadcnt_dscnt and its like: the DS count is in the low bits.
        counts = [number] if len(names) == 1 else [number >> 8 & 0x3F, number & 0x3F]
        pairs = [(_SPLIT[name], count) for name, count in zip(names, counts, strict=True)]
        return _wait_handler([(counter, count) for counter, count in pairs if counter])

    return compile_one


for _name in _SPLIT:
    FACTORIES[f"s_wait_{_name}"] = _split_wait((_name,))
FACTORIES["s_wait_loadcnt_dscnt"] = _split_wait(("loadcnt", "dscnt"))
FACTORIES["s_wait_storecnt_dscnt"] = _split_wait(("storecnt", "dscnt"))


@register("s_sendmsg")
def _sendmsg(b: Builder) -> Handler:
    """Only the message that gives registers back early, which changes nothing here."""
    if b.take("sendmsg(MSG_DEALLOC_VGPRS)") is None:
        raise b.unsupported("this message")
    return lambda g: None


@register("s_wait_idle")
def _wait_idle(b: Builder) -> Handler:
    return _wait_handler([(counter, 0) for counter in ("vm", "vs", "ds", "sm")])


# Scalar loads


_LOAD_SIZES = {"dword": 1, "dwordx2": 2, "dwordx4": 4, "dwordx8": 8, "dwordx16": 16}
_LOAD_SIZES |= {"b32": 1, "b64": 2, "b96": 3, "b128": 4, "b256": 8, "b512": 16}


def _scalar_load(count: int, buffer: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "sm"
        destination = b.expect(0, "s", count)
        b.loads = b.write_bits(destination)
        base_operand = b.expect(1, "s", 4 if buffer else 2)
        b.read_bits(base_operand)
        base_row, row = base_operand.row, destination.row
        offset = b.expect(2, ("s", "int", "hex"))
        immediate = b.number("offset")
        b.take("scope"), b.take("th"), b.flag("glc")
        soffset = b.su(2) if offset.kind == "s" else None
        if soffset is None:
            immediate += offset.number

        def run(g: Group) -> None:
            address = g.pair(base_row)
            if buffer:
                address = address & _U64(0xFFFFFFFFFFFF)
            distance = np.full(g.n, immediate, np.int64)
            if soffset is not None:
                distance = distance + np.asarray(soffset(g)).astype(np.int64)
            place = (address.view(np.int64) + distance).view(_U64) & _U64(0xFFFFFFFFFFFFFFFC)
            if buffer:
                _load_in_range(g, place, distance, count, row, base_row)
                return
            checks = g.m.checks
            groups = g.m.workgroup_number[g.sel] if checks.conflicts else None
            data = g.m.memory.load(place, 4 * count, 4, groups, checks.memory).view(_U32)
            for word in range(count):
                g.S[row + word] = data[:, word]

        return run

    return compile_one


def _load_in_range(g: Group, place: Any, distance: Any, count: int, row: int, base_row: int) -> None:
    """Dwords of a scalar buffer load; those past num_records are 0."""
    records = g.S[base_row + 2].astype(np.int64)
    if (g.S[base_row + 1] >> u(16) & u(0x3FFF)).any():
        raise UnsupportedInstruction("a scalar buffer load with a stride")
    for word in range(count):
        inside = distance + 4 * word + 4 <= records
        values = np.zeros(g.n, _U32)
        if inside.any():
            found = g.m.memory.load(place[inside] + _U64(4 * word), 4, 4, None, g.m.checks.memory)
            values[inside] = found.view(_U32)[:, 0]
        g.S[row + word] = values


for _name, _count in _LOAD_SIZES.items():
    FACTORIES[f"s_load_{_name}"] = _scalar_load(_count, False)
    FACTORIES[f"s_buffer_load_{_name}"] = _scalar_load(_count, True)
