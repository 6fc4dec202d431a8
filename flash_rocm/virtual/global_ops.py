"""Vector memory instructions with a 64-bit address: global loads, stores, atomics and loads to LDS.

Source: "AMD Instinct MI300" ISA reference, chapter 10 (flat, global, scratch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .atomics import ATOMICS, SWAPS_IF_EQUAL, operand_values, returns_old, run_atomic
from .builder import Builder, Getter, Handler
from .lane_data import (
    LOADS,
    STORES,
    Shape,
    active,
    alignment_of,
    drop_cache_flags,
    groups_of,
    put_loaded,
    stored_bytes,
)
from .lds_ops import put_lds
from .machine import M0, S_BIT, Group
from .registry import FACTORIES

_U64 = np.uint64


def _global_address(b: Builder, index: int) -> Getter:
    """uint64 [n, lane] of the address operands at ``index`` and ``index + 1``, and the offset."""
    vector, scalar = b.expect(index, ("v", "off")), b.expect(index + 1, ("s", "off"))
    offset = np.int64(b.number("offset"))
    if scalar.kind == "off":
        if vector.kind != "v" or vector.count != 2:
            raise b.unsupported(f"address {vector.text!r}")
        b.read_bits(vector)
        row = vector.row

        def absolute(g: Group) -> Any:
            address = g.V[row].astype(_U64) | g.V[row + 1].astype(_U64) << _U64(32)
            return (address.view(np.int64) + offset).view(_U64)

        return absolute
    if vector.kind != "v" or vector.count != 1 or scalar.count != 2:
        raise b.unsupported(f"address {vector.text!r}, {scalar.text!r}")
    b.read_bits(vector)
    b.read_bits(scalar)
    row, base = vector.row, scalar.row

    def relative(g: Group) -> Any:
        start = (g.pair(base).view(np.int64) + offset)[:, None]
        return (start + g.V[row].astype(np.int64)).view(_U64)

    return relative


def _global_load(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm"
        destination = b.expect(0, "v", shape.registers)
        b.loads = b.write_bits(destination)
        address, row = _global_address(b, 1), destination.row
        drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if places.size:
                checks = g.m.checks
                data = g.m.memory.load(places, shape.size, alignment_of(g, shape), groups_of(g), checks.memory)
                put_loaded(g, row, data, shape)

        return run

    return compile_one


def _global_store(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm" if b.gfx9 else "vs"
        vector, data = b.operands[0], b.expect(1, "v", shape.registers)
        b.read_bits(data)
        # The data operand stands between the two of the address.
        b.operands[1] = vector
        address, row = _global_address(b, 1), data.row
        drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if places.size:
                g.m.memory.store(places, stored_bytes(g, row, shape), alignment_of(g, shape), groups_of(g), False)

        return run

    return compile_one


def _global_load_lds(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm"
        b.reads |= 1 << (S_BIT + M0)
        offset = int(b._modifiers.get("offset", "0"), 0)
        address = _global_address(b, 0)
        drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if places.size:
                data = g.m.memory.load(places, shape.size, alignment_of(g, shape), groups_of(g), g.m.checks.memory)
                put_lds(g, data, offset, shape)

        return run

    return compile_one


def _global_atomic(size: int, function: Any, compare: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        returns = returns_old(b)
        b.counter = "vm" if b.gfx9 or returns else "vs"
        registers = size // 4
        start = 1 if returns else 0
        data = b.expect(start + 1, "v", registers * (2 if compare else 1))
        b.read_bits(data)
        destination = b.expect(0, "v", registers) if returns else None
        if destination is not None:
            b.loads = b.write_bits(destination)
        b.operands[start + 1] = b.operands[start]
        address = _global_address(b, start + 1)
        drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if not places.size:
                return
            values = operand_values(g, data.row, size)
            wanted = operand_values(g, data.row + registers, size) if compare else None
            before = run_atomic(g, places, values, function, wanted)
            if destination is not None:
                put_loaded(g, destination.row, before.view(np.uint8).reshape(-1, size), Shape(size))

        return run

    return compile_one


for _name, _shape in LOADS.items():
    FACTORIES[f"global_load_{_name}"] = _global_load(_shape)
for _name, _shape in STORES.items():
    FACTORIES[f"global_store_{_name}"] = _global_store(_shape)
for _name in ("ubyte", "ushort", "dword", "dwordx3", "dwordx4"):
    FACTORIES[f"global_load_lds_{_name}"] = _global_load_lds(LOADS[_name])
for _name, (_size, _function) in ATOMICS.items():
    FACTORIES[f"global_atomic_{_name}"] = _global_atomic(_size, _function, False)
for _name, _size in SWAPS_IF_EQUAL.items():
    FACTORIES[f"global_atomic_{_name}"] = _global_atomic(_size, lambda old, new: new, True)
