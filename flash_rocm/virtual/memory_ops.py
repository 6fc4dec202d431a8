"""Vector memory instructions: global, buffer and scratch.

Source: "AMD Instinct MI300" ISA reference, chapters 9 (buffers: addressing and range checking) and 10
(flat, global, scratch); LLVM's AMDGPUUsage for scratch descriptors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Getter, Handler
from .errors import MemoryFault, UnsupportedInstruction
from .floats import f16_to_f32, f32_to_bf16_bits, f32_to_f16_bits
from .machine import M0, SCRATCH_BASE, Group
from .memory import put_bytes, take_bytes
from .registry import FACTORIES

_U32 = np.uint32
_U64 = np.uint64
_CACHE_FLAGS = ("glc", "slc", "dlc", "sc0", "sc1", "nt", "scope", "th")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a load or store moves per lane: bytes, and how a part of a register is treated."""

    size: int
    signed: bool = False
    half: str = ""  # "lo" or "hi": 16 bits of a register, the rest stays

    @property
    def registers(self) -> int:
        return max(self.size // 4, 1)


#: Data types of loads, with the names of gfx9 and of gfx11.
LOADS = {
    "ubyte": Shape(1),
    "u8": Shape(1),
    "sbyte": Shape(1, signed=True),
    "i8": Shape(1, signed=True),
    "ushort": Shape(2),
    "u16": Shape(2),
    "sshort": Shape(2, signed=True),
    "i16": Shape(2, signed=True),
    "short_d16": Shape(2, half="lo"),
    "d16_b16": Shape(2, half="lo"),
    "short_d16_hi": Shape(2, half="hi"),
    "d16_hi_b16": Shape(2, half="hi"),
    "ubyte_d16": Shape(1, half="lo"),
    "d16_u8": Shape(1, half="lo"),
    "ubyte_d16_hi": Shape(1, half="hi"),
    "d16_hi_u8": Shape(1, half="hi"),
    "dword": Shape(4),
    "b32": Shape(4),
    "dwordx2": Shape(8),
    "b64": Shape(8),
    "dwordx3": Shape(12),
    "b96": Shape(12),
    "dwordx4": Shape(16),
    "b128": Shape(16),
}
STORES = {
    "byte": Shape(1),
    "b8": Shape(1),
    "short": Shape(2),
    "b16": Shape(2),
    "short_d16_hi": Shape(2, half="hi"),
    "d16_hi_b16": Shape(2, half="hi"),
    "byte_d16_hi": Shape(1, half="hi"),
    "d16_hi_b8": Shape(1, half="hi"),
    **{name: shape for name, shape in LOADS.items() if shape.size >= 4},
}
#: Bytes per lane of what can be loaded to LDS without passing through registers.
_TO_LDS = (1, 2, 4, 12, 16)
_STORE_NAME = re.compile(r"^(?:global|buffer|scratch|flat)_store_(\w+)$")
_ATOMIC_NAME = re.compile(r"^(?:global|buffer|flat)_atomic_")


def smallest_store(names: set[str]) -> int:
    """Bytes of the smallest vector store among mnemonics, 4 at most."""
    sizes = [4]
    for name in names:
        found = _STORE_NAME.match(name)
        if found and found.group(1) in STORES:
            sizes.append(STORES[found.group(1)].size)
        if _ATOMIC_NAME.match(name) and "16" in name:
            sizes.append(4)
    return min(sizes)


def active(g: Group, values: Any) -> np.ndarray:
    """[n, lane] (or what broadcasts to it) to the active lanes in a row."""
    return g.active_lanes(values)


def put_active(g: Group, row: int, values: np.ndarray) -> None:
    """Write uint32 of the active lanes."""
    if g.full:
        g.V[row] = values.reshape(g.mask.shape)
        return
    old = np.array(g.V[row])
    old[g.mask] = values
    g.V[row] = old


def put_loaded(g: Group, row: int, data: np.ndarray, shape: Shape) -> None:
    """Write loaded bytes, uint8 [active, size], to registers from ``row`` on."""
    if shape.size >= 4:
        words = data.view(_U32)
        for word in range(shape.size // 4):
            put_active(g, row + word, words[:, word])
        return
    value = np.ascontiguousarray(data).view(np.uint8 if shape.size == 1 else np.uint16)[:, 0]
    if shape.signed:
        value = value.view(np.int8 if shape.size == 1 else np.int16).astype(np.int32).view(_U32)
    wide = value.astype(_U32)
    if shape.half:
        old = active(g, g.V[row])
        wide = old & _U32(0xFFFF0000) | wide if shape.half == "lo" else old & _U32(0xFFFF) | wide << _U32(16)
    put_active(g, row, wide)


def stored_bytes(g: Group, row: int, shape: Shape) -> np.ndarray:
    """Bytes that a store takes from registers: uint8 [active, size]."""
    if shape.size >= 4:
        count = shape.size // 4
        words = np.empty((active(g, g.mask).size, count), _U32)
        for word in range(count):
            words[:, word] = active(g, g.V[row + word])
        return words.view(np.uint8)
    value = active(g, g.V[row])
    if shape.half == "hi":
        value = value >> _U32(16)
    return np.ascontiguousarray(value).view(np.uint8).reshape(-1, 4)[:, : shape.size]


def _groups(g: Group) -> np.ndarray | None:
    """Workgroup of each active lane, if conflicts are looked for."""
    return active(g, g.m.workgroup_number[g.sel][:, None]) if g.m.checks.conflicts else None


def _alignment(g: Group, shape: Shape) -> int:
    return min(shape.size & -shape.size, 4) if g.m.checks.alignment else 1


def _drop_cache_flags(b: Builder) -> None:
    """Caches do not change results here."""
    for name in _CACHE_FLAGS:
        b.take(name)


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
        _drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if places.size:
                checks = g.m.checks
                data = g.m.memory.load(places, shape.size, _alignment(g, shape), _groups(g), checks.memory)
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
        _drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if places.size:
                g.m.memory.store(places, stored_bytes(g, row, shape), _alignment(g, shape), _groups(g), False)

        return run

    return compile_one


def _global_load_lds(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm"
        b.reads |= 1 << (512 + M0)
        offset = int(b._modifiers.get("offset", "0"), 0)
        address = _global_address(b, 0)
        _drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if places.size:
                data = g.m.memory.load(places, shape.size, _alignment(g, shape), _groups(g), g.m.checks.memory)
                put_lds(g, data, offset, shape)

        return run

    return compile_one


def put_lds(g: Group, data: np.ndarray, offset: int, shape: Shape) -> None:
    """Bytes that went past the registers: LDS address M0 + offset + lane * 4 (16 for more than a dword).

    What is less than a dword is extended to one ("Memory Buffer Load to LDS" of the MI350 reference).
    """
    if shape.size < 4:
        kind = f"{'i' if shape.signed else 'u'}{shape.size}"
        data = np.ascontiguousarray(data).view(kind).astype(f"{kind[0]}4").view(np.uint8)
    size = data.shape[1]
    lane = np.arange(g.m.lanes, dtype=np.int64) * (4 if size == 4 else 16)
    # 16 bits, until gfx950 brought more LDS than they reach.
    start = g.S[M0] & _U32(0x3FFFF if g.m.code.arch == "gfx950" else 0xFFFF)
    address = active(g, start.astype(np.int64)[:, None] + offset + lane)
    from .lds_ops import lds_places, put_places  # a cycle: LDS loads share the helpers of this module

    places = lds_places(g, address, size)
    put_places(g, places, data)
    if g.m.shadow is not None and g.m.tracker is not None:
        numbers = active(g, g.m.tracker.issued["vm"][g.sel][:, None] + 1)
        waves = active(g, np.arange(g.m.waves)[g.sel][:, None])
        g.m.shadow.landed_by_load(waves, places, size, numbers)


# Atomics


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


def _operand_values(g: Group, row: int, size: int) -> np.ndarray:
    data = stored_bytes(g, row, Shape(size))
    return np.ascontiguousarray(data).view(_U32 if size == 4 else _U64)[:, 0]


def _returns(b: Builder) -> bool:
    th = b.take("th") or ""
    flags = [b.take("sc0") is not None, b.take("glc") is not None]
    return any(flags) or "RETURN" in th


def _global_atomic(size: int, function: Any, compare: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        returns = _returns(b)
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
        _drop_cache_flags(b)

        def run(g: Group) -> None:
            places = active(g, address(g))
            if not places.size:
                return
            values = _operand_values(g, data.row, size)
            wanted = _operand_values(g, data.row + registers, size) if compare else None
            before = run_atomic(g, places, values, function, wanted)
            if destination is not None:
                put_loaded(g, destination.row, before.view(np.uint8).reshape(-1, size), Shape(size))

        return run

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
    _drop_cache_flags(b)
    return BufferAddress(descriptor.row, offset_row, index_row, b.su(index + 1), immediate)


def _load_inside(g: Group, address: np.ndarray, inside: np.ndarray, shape: Shape) -> np.ndarray:
    """Bytes of a buffer load: 0 where out of range, dword by dword."""
    checks, alignment = g.m.checks, _alignment(g, shape)
    groups = _groups(g)
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
            b.reads |= 1 << (512 + M0)
        address = _buffer_address(b, 0 if to_lds else 1)

        def run(g: Group) -> None:
            if destination is not None and address.is_scratch(g):
                put_loaded(g, destination.row, _scratch_take(g, address.scratch_places(g), shape), shape)
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
        address = _buffer_address(b, 1)

        def run(g: Group) -> None:
            values = stored_bytes(g, data.row, shape)
            if address.is_scratch(g):
                _scratch_put(g, address.scratch_places(g), values)
                return
            places, inside = address.places(g, shape.size)
            alignment, groups = _alignment(g, shape), _groups(g)
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
        returns = _returns(b)
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
            values = _operand_values(g, data.row, size)
            before = np.zeros_like(values)
            if whole.any():
                wanted = _operand_values(g, data.row + registers, size)[whole] if compare else None
                before[whole] = run_atomic(g, places[whole], values[whole], function, wanted)
            if returns:
                put_loaded(g, data.row, before.view(np.uint8).reshape(-1, size), Shape(size))

        return run

    return compile_one


# Scratch


def _scratch_flat(g: Group, places: np.ndarray, size: int) -> np.ndarray:
    """Bytes of the batch's scratch from those of each lane's own."""
    limit = g.m.code.descriptor.scratch_bytes
    if places.size and (int(places.min()) < 0 or int(places.max()) + size > limit):
        raise MemoryFault(f"scratch access of {size} bytes at {int(places.max())} of {limit}")
    item = np.arange(g.m.waves)[g.sel][:, None] * g.m.lanes + np.arange(g.m.lanes)
    return active(g, item) * g.m.scratch_bytes + places


def _scratch_take(g: Group, places: np.ndarray, shape: Shape) -> np.ndarray:
    return take_bytes(g.m.scratch, _scratch_flat(g, places, shape.size), shape.size)


def _scratch_put(g: Group, places: np.ndarray, values: np.ndarray) -> None:
    put_bytes(g.m.scratch, _scratch_flat(g, places, values.shape[1]), values)


def _scratch_address(b: Builder, vector_index: int, scalar_index: int) -> Getter:
    vector, scalar = b.expect(vector_index, ("v", "off")), b.expect(scalar_index, ("s", "off"))
    offset = b.number("offset")
    _drop_cache_flags(b)
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
        return lambda g: put_loaded(g, destination.row, _scratch_take(g, address(g), shape), shape)

    return compile_one


def _scratch_store(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "vm" if b.gfx9 else "vs"
        data = b.expect(1, "v", shape.registers)
        b.read_bits(data)
        b.unneeded = b.reads  # compilers spill registers whether or not they hold anything
        address = _scratch_address(b, 0, 2)
        return lambda g: _scratch_put(g, address(g), stored_bytes(g, data.row, shape))

    return compile_one


def _register_memory() -> None:
    for name, shape in LOADS.items():
        FACTORIES[f"global_load_{name}"] = _global_load(shape)
        FACTORIES[f"buffer_load_{name}"] = _buffer_load(shape)
        FACTORIES[f"scratch_load_{name}"] = _scratch_load(shape)
    for name in ("ubyte", "ushort", "dword", "dwordx3", "dwordx4"):
        FACTORIES[f"global_load_lds_{name}"] = _global_load_lds(LOADS[name])
    for name, shape in STORES.items():
        FACTORIES[f"global_store_{name}"] = _global_store(shape)
        FACTORIES[f"buffer_store_{name}"] = _buffer_store(shape)
        FACTORIES[f"scratch_store_{name}"] = _scratch_store(shape)
    for name, (size, function) in ATOMICS.items():
        FACTORIES[f"global_atomic_{name}"] = _global_atomic(size, function, False)
        FACTORIES[f"buffer_atomic_{name}"] = _buffer_atomic(size, function, False)
    for name, size in (("cmpswap", 4), ("cmpswap_b32", 4), ("cmpswap_x2", 8), ("cmpswap_b64", 8)):
        FACTORIES[f"global_atomic_{name}"] = _global_atomic(size, lambda old, new: new, True)
        FACTORIES[f"buffer_atomic_{name}"] = _buffer_atomic(size, lambda old, new: new, True)


_register_memory()
