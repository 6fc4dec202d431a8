"""Vector memory instructions with a descriptor or a place in scratch: buffer and scratch.

Source: "AMD Instinct MI300" ISA reference, chapters 9 (buffers: addressing and range checking) and 10
(scratch); LLVM's AMDGPUUsage for scratch descriptors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .atomics import ATOMICS, SWAPS_IF_EQUAL, operand_values, returns_old, run_atomic
from .builder import Builder, Getter, Handler
from .errors import MemoryFault, UnsupportedInstruction
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
from .machine import M0, S_BIT, SCRATCH_BASE, Group
from .memory import put_bytes, take_bytes
from .registry import FACTORIES

_U32 = np.uint32
_U64 = np.uint64
#: Bytes per lane of what can be loaded to LDS without passing through registers.
_TO_LDS = (1, 2, 4, 12, 16)


# Scratch


def _scratch_flat(g: Group, places: np.ndarray, size: int) -> np.ndarray:
    """Bytes of the batch's scratch from those of each lane's own."""
    limit = g.m.code.descriptor.scratch_bytes
    if places.size and (int(places.min()) < 0 or int(places.max()) + size > limit):
        raise MemoryFault(f"scratch access of {size} bytes at {int(places.max())} of {limit}")
    item = np.arange(g.m.waves)[g.sel][:, None] * g.m.lanes + np.arange(g.m.lanes)
    return active(g, item) * g.m.scratch_bytes + places


def scratch_take(g: Group, places: np.ndarray, shape: Shape) -> np.ndarray:
    return take_bytes(g.m.scratch, _scratch_flat(g, places, shape.size), shape.size)


def scratch_put(g: Group, places: np.ndarray, values: np.ndarray) -> None:
    put_bytes(g.m.scratch, _scratch_flat(g, places, values.shape[1]), values)


def _scratch_address(b: Builder, vector_index: int, scalar_index: int) -> Getter:
    vector, scalar = b.expect(vector_index, ("v", "off")), b.expect(scalar_index, ("s", "off"))
    offset = b.number("offset")
    drop_cache_flags(b)
    for operand in (vector, scalar):
        b.read_bits(operand)
    vector_row = vector.row if vector.kind == "v" else None
    scalar_row = scalar.row if scalar.kind == "s" else None

    def get(g: Group) -> Any:
        place: Any = np.int64(offset)
        if vector_row is not None:
            place = place + g.V[vector_row].astype(np.int64)
        if scalar_row is not None:
            place = place + g.S[scalar_row].astype(np.int64)[:, None]
        return active(g, place)

    return get


def _scratch_load(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm"
        destination = b.expect(0, "v", shape.registers)
        b.loads = b.write_bits(destination)
        address = _scratch_address(b, 1, 2)
        return lambda g: put_loaded(g, destination.row, scratch_take(g, address(g), shape), shape)

    return compile_one


def _scratch_store(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm" if b.gfx9 else "vs"
        data = b.expect(1, "v", shape.registers)
        b.read_bits(data)
        b.unneeded = b.reads  # compilers spill registers whether or not they hold anything
        address = _scratch_address(b, 0, 2)
        return lambda g: scratch_put(g, address(g), stored_bytes(g, data.row, shape))

    return compile_one


# Buffers


@dataclasses.dataclass(frozen=True)
class BufferAddress:
    """The address part of a buffer instruction."""

    descriptor: int  # row of S
    offset_row: int | None
    index_row: int | None
    soffset: Getter
    immediate: int

    def places(self, g: Group, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Addresses (uint64) of the active lanes and bytes inside the range, from the start of the access."""
        word1, word3 = g.S[self.descriptor + 1], g.S[self.descriptor + 3]
        base = (g.S[self.descriptor].astype(_U64) | (word1 & _U32(0xFFFF)).astype(_U64) << _U64(32)).astype(np.int64)
        records = g.S[self.descriptor + 2].astype(np.int64)
        stride = (word1 >> _U32(16) & _U32(0x3FFF)).astype(np.int64)
        if (word1 >> _U32(31)).any() or (g.m.gfx9 and (word3 >> _U32(23) & _U32(1)).any()):
            raise UnsupportedInstruction("a buffer descriptor with swizzle or thread ids in its address")
        if not g.m.gfx9 and ((word3 >> _U32(28) & _U32(3)) != 3).any():
            raise UnsupportedInstruction("a buffer descriptor whose range check is not that of raw buffers")
        if not g.m.gfx9 and self.index_row is not None:
            raise UnsupportedInstruction("a raw buffer with an index")
        offset: Any = np.int64(self.immediate)
        if self.offset_row is not None:
            offset = g.V[self.offset_row].astype(np.int64) + offset
        if self.index_row is not None:
            offset = g.V[self.index_row].astype(np.int64) * stride[:, None] + offset
        soffset = np.broadcast_to(np.asarray(self.soffset(g)).astype(np.int64), g.n)
        # Linear buffers are checked by byte: offset >= num_records - soffset is out of range, for each dword.
        inside = (records - soffset)[:, None] - offset
        if self.index_row is not None and stride.any():
            # On gfx9 num_records counts strides where an index is used, and the index alone is checked.
            within = g.V[self.index_row].astype(np.int64) < records[:, None]
            inside = np.where((stride != 0)[:, None], np.where(within, size, 0), inside)
        inside = active(g, inside)
        address = active(g, (base + soffset)[:, None] + offset)
        return address.view(_U64), inside

    def is_scratch(self, g: Group) -> bool:
        high = g.S[self.descriptor + 1] & _U32(0xFFFF)
        return bool((high == _U32(SCRATCH_BASE >> 32)).all())

    def scratch_places(self, g: Group) -> np.ndarray:
        """Byte of each active lane's own scratch; soffset counts in units of the whole wave."""
        offset: Any = np.int64(self.immediate)
        if self.offset_row is not None:
            offset = g.V[self.offset_row].astype(np.int64) + offset
        soffset = np.broadcast_to(np.asarray(self.soffset(g)).astype(np.int64), g.n)
        return active(g, soffset[:, None] // g.m.lanes + offset)


def _buffer_address(b: Builder, index: int) -> BufferAddress:
    """Operands at ``index``: [vaddr or off,] descriptor, soffset."""
    operands = b.operands[index:]
    vector = None
    offen, idxen = b.flag("offen"), b.flag("idxen")
    if operands[0].kind == "v":
        vector = operands[0]
        b.read_bits(vector)
    if operands[0].kind in ("v", "off"):
        index += 1
    descriptor = b.expect(index, "s", 4)
    b.read_bits(descriptor)
    if (vector.count if vector else 0) != offen + idxen:
        raise b.unsupported("this address")
    index_row = vector.row if vector and idxen else None
    offset_row = vector.row + idxen if vector and offen else None
    immediate = b.number("offset")
    drop_cache_flags(b)
    return BufferAddress(descriptor.row, offset_row, index_row, b.su(index + 1), immediate)


def _load_inside(g: Group, address: np.ndarray, inside: np.ndarray, shape: Shape) -> np.ndarray:
    """Bytes of a buffer load: 0 where out of range, dword by dword."""
    checks, alignment = g.m.checks, alignment_of(g, shape)
    groups = groups_of(g)
    whole = inside >= shape.size
    if whole.all():
        return g.m.memory.load(address, shape.size, alignment, groups, checks.memory)
    data = np.zeros((address.size, shape.size), np.uint8)
    if whole.any():
        some = None if groups is None else groups[whole]
        data[whole] = g.m.memory.load(address[whole], shape.size, alignment, some, checks.memory)
    for word in range(shape.size // 4):
        part = ~whole & (inside >= 4 * word + 4)
        if part.any():
            some = None if groups is None else groups[part]
            place = address[part] + _U64(4 * word)
            data[part, 4 * word : 4 * word + 4] = g.m.memory.load(place, 4, min(alignment, 4), some, checks.memory)
    return data


def _buffer_load(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm"
        to_lds = b.flag("lds")
        if to_lds and (shape.half or shape.size not in _TO_LDS):
            raise b.unsupported("a load of this type to LDS")
        destination = None if to_lds else b.expect(0, "v", shape.registers)
        if destination is not None:
            b.loads = b.write_bits(destination)
        else:
            b.reads |= 1 << (S_BIT + M0)
        address = _buffer_address(b, 0 if to_lds else 1)

        def run(g: Group) -> None:
            if destination is not None and address.is_scratch(g):
                put_loaded(g, destination.row, scratch_take(g, address.scratch_places(g), shape), shape)
                return
            places, inside = address.places(g, shape.size)
            if not places.size:
                return
            data = _load_inside(g, places, inside, shape)
            if destination is None:
                put_lds(g, data, address.immediate, shape)
            else:
                put_loaded(g, destination.row, data, shape)

        return run

    return compile_one


def _buffer_store(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm" if b.gfx9 else "vs"
        data = b.expect(0, "v", shape.registers)
        b.read_bits(data)
        if b.descriptor.scratch_bytes and b.operands[1].kind == "off":
            # One address for all lanes is what a spill has on chips whose scratch is a buffer; see _scratch_store.
            b.unneeded = b.reads
        address = _buffer_address(b, 1)

        def run(g: Group) -> None:
            values = stored_bytes(g, data.row, shape)
            if address.is_scratch(g):
                scratch_put(g, address.scratch_places(g), values)
                return
            places, inside = address.places(g, shape.size)
            alignment, groups = alignment_of(g, shape), groups_of(g)
            whole = inside >= shape.size
            if whole.any():
                some = None if groups is None else groups[whole]
                g.m.memory.store(places[whole], values[whole], alignment, some, False)
            for word in range(shape.size // 4):
                part = ~whole & (inside >= 4 * word + 4)
                if part.any():
                    some = None if groups is None else groups[part]
                    one = values[part, 4 * word : 4 * word + 4]
                    g.m.memory.store(places[part] + _U64(4 * word), one, min(alignment, 4), some, False)

        return run

    return compile_one


def _buffer_atomic(size: int, function: Any, compare: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        returns = returns_old(b)
        b.counter = "vm" if b.gfx9 or returns else "vs"
        registers = size // 4
        data = b.expect(0, "v", registers * (2 if compare else 1))
        b.read_bits(data)
        if returns:
            b.loads = b.write_bits(data, registers)
        address = _buffer_address(b, 1)

        def run(g: Group) -> None:
            places, inside = address.places(g, size)
            whole = inside >= size
            values = operand_values(g, data.row, size)
            before = np.zeros_like(values)
            if whole.any():
                wanted = operand_values(g, data.row + registers, size)[whole] if compare else None
                before[whole] = run_atomic(g, places[whole], values[whole], function, wanted)
            if returns:
                put_loaded(g, data.row, before.view(np.uint8).reshape(-1, size), Shape(size))

        return run

    return compile_one


for _name, _shape in LOADS.items():
    FACTORIES[f"buffer_load_{_name}"] = _buffer_load(_shape)
    FACTORIES[f"scratch_load_{_name}"] = _scratch_load(_shape)
for _name, _shape in STORES.items():
    FACTORIES[f"buffer_store_{_name}"] = _buffer_store(_shape)
    FACTORIES[f"scratch_store_{_name}"] = _scratch_store(_shape)
for _name, (_size, _function) in ATOMICS.items():
    FACTORIES[f"buffer_atomic_{_name}"] = _buffer_atomic(_size, _function, False)
for _name, _size in SWAPS_IF_EQUAL.items():
    FACTORIES[f"buffer_atomic_{_name}"] = _buffer_atomic(_size, lambda old, new: new, True)
