"""Atomics on memory: what they compute, and in which order lanes take their turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder
from .floats import f16_to_f32, f32_to_bf16_bits, f32_to_f16_bits
from .lane_data import Shape, stored_bytes
from .machine import Group

_U32 = np.uint32
_U64 = np.uint64


def _integer(function: Any, dtype: Any) -> Callable[[Any, Any], Any]:
    return lambda old, new: np.asarray(function(old.view(dtype), new.view(dtype))).view(old.dtype)


def _packed16(to_float: Any, from_float: Any) -> Callable[[Any, Any], Any]:
    def function(old: Any, new: Any) -> Any:
        low = from_float(to_float(old & _U32(0xFFFF)) + to_float(new & _U32(0xFFFF)))
        high = from_float(to_float(old >> _U32(16)) + to_float(new >> _U32(16)))
        return low | high << _U32(16)

    return function


def _bf16(bits: Any) -> Any:
    return (bits << _U32(16)).view(np.float32)


#: name: (bytes, function of unsigned (old, operand)).
ATOMICS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "add": (4, np.add),
    "add_u32": (4, np.add),
    "sub": (4, np.subtract),
    "sub_u32": (4, np.subtract),
    "and": (4, np.bitwise_and),
    "and_b32": (4, np.bitwise_and),
    "or": (4, np.bitwise_or),
    "or_b32": (4, np.bitwise_or),
    "xor": (4, np.bitwise_xor),
    "xor_b32": (4, np.bitwise_xor),
    "swap": (4, lambda old, new: new),
    "swap_b32": (4, lambda old, new: new),
    "umin": (4, np.minimum),
    "min_u32": (4, np.minimum),
    "umax": (4, np.maximum),
    "max_u32": (4, np.maximum),
    "smin": (4, _integer(np.minimum, np.int32)),
    "min_i32": (4, _integer(np.minimum, np.int32)),
    "smax": (4, _integer(np.maximum, np.int32)),
    "max_i32": (4, _integer(np.maximum, np.int32)),
    "add_f32": (4, _integer(np.add, np.float32)),
    "pk_add_f16": (4, _packed16(f16_to_f32, f32_to_f16_bits)),
    "pk_add_bf16": (4, _packed16(_bf16, f32_to_bf16_bits)),
    "add_x2": (8, np.add),
    "add_u64": (8, np.add),
    "swap_x2": (8, lambda old, new: new),
    "swap_b64": (8, lambda old, new: new),
    "add_f64": (8, _integer(np.add, np.float64)),
    "umax_x2": (8, np.maximum),
    "umin_x2": (8, np.minimum),
    "smax_x2": (8, _integer(np.maximum, np.int64)),
    "smin_x2": (8, _integer(np.minimum, np.int64)),
}
#: Compare-and-swap: name to bytes; the operand takes the place of what equals the registers behind it.
SWAPS_IF_EQUAL = {"cmpswap": 4, "cmpswap_b32": 4, "cmpswap_x2": 8, "cmpswap_b64": 8}


def run_atomic(g: Group, places: np.ndarray, operands: np.ndarray, function: Any, compare: Any) -> np.ndarray:
    """Apply an atomic lane after lane; values before, of the dtype of ``operands`` ([n])."""
    size = operands.dtype.itemsize
    before = np.empty_like(operands)
    seen = np.unique(places)
    # Lanes at different addresses do not see each other: one go; else in order of lanes.
    rounds = [np.arange(places.size)] if seen.size == places.size else [np.array([i]) for i in range(places.size)]
    for lanes in rounds:
        where = places[lanes]
        old = g.m.memory.load(where, size, size, None, g.m.checks.memory).view(operands.dtype)[:, 0]
        new = function(old, operands[lanes])
        if compare is not None:
            new = np.where(old == compare[lanes], operands[lanes], old)
        g.m.memory.store(where, np.ascontiguousarray(new).view(np.uint8).reshape(-1, size), size, None, True)
        before[lanes] = old
    return before


def operand_values(g: Group, row: int, size: int) -> np.ndarray:
    data = stored_bytes(g, row, Shape(size))
    return np.ascontiguousarray(data).view(_U32 if size == 4 else _U64)[:, 0]


def returns_old(b: Builder) -> bool:
    th = b.take("th") or ""
    flags = [b.take("sc0") is not None, b.take("glc") is not None]
    return any(flags) or "RETURN" in th
