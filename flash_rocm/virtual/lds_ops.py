"""LDS instructions, and those that only use its crossbar (bpermute, permute, swizzle).

Source: "AMD Instinct MI300" ISA reference, chapter 11 and 12.13; the transposed reads of gfx950 after LLVM's
tests of llvm.amdgcn.ds.read.tr and Triton's lowering: of every 16 lanes, lane l gets column l.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Handler
from .errors import MemoryFault
from .lane_data import Shape, active, put_active, put_loaded, stored_bytes
from .machine import M0, Group
from .memory import put_bytes, take_bytes
from .registry import FACTORIES, register

_U32 = np.uint32
_ALIGNED = 4


def lds_places(g: Group, address: np.ndarray, size: int) -> np.ndarray:
    """Byte in the LDS of the batch of each active lane's access, checked (int64)."""
    if address.size == 0:
        return address
    # Since gfx9 the sum of base and offset wraps at 32 bits.
    address = address & 0xFFFFFFFF
    limit = g.m.code.lds_bytes
    highest = int(address.max())
    if highest + size > limit:
        raise MemoryFault(f"LDS access of {size} bytes at {highest}, past its end ({limit} bytes)")
    if g.m.checks.alignment and size > 1 and (address & (min(size & -size, _ALIGNED) - 1)).any():
        raise MemoryFault(f"misaligned LDS access of {size} bytes")
    return active(g, g.lds_base()) + address


def _measure(g: Group, places: np.ndarray, size: int) -> None:
    if g.m.measured is not None:
        g.m.measured.lds(g, places % g.m.lds_stride, size)


def read_lds(g: Group, address: np.ndarray, size: int) -> np.ndarray:
    """uint8 [active, size] at LDS addresses (int64 [active])."""
    places = lds_places(g, address, size)
    if g.m.shadow is not None and places.size:
        g.m.shadow.read(g, places, size)
    _measure(g, places, size)
    return take_bytes(g.m.lds, places, size)


def write_lds(g: Group, address: np.ndarray, data: np.ndarray) -> None:
    """Write uint8 [active, size]."""
    places = lds_places(g, address, data.shape[1])
    _measure(g, places, data.shape[1])
    put_places(g, places, data)
    _note_write(g)


def _note_write(g: Group) -> None:
    """The instruction that is about to be counted writes."""
    if g.m.tracker is not None:
        g.m.tracker.last_lds_write[g.sel] = g.m.tracker.issued["ds"][g.sel] + 1


def put_places(g: Group, places: np.ndarray, data: np.ndarray) -> None:
    """Write uint8 [active, size] at checked places in the LDS of the batch."""
    if g.m.shadow is not None and places.size:
        g.m.shadow.write(g, places, data, g.m.lds)
    else:
        put_bytes(g.m.lds, places, data)


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
    places = lds_places(g, address, size)
    put_places(g, places, data)
    if g.m.shadow is not None and g.m.tracker is not None:
        numbers = active(g, g.m.tracker.issued["vm"][g.sel][:, None] + 1)
        waves = active(g, np.arange(g.m.waves)[g.sel][:, None])
        g.m.shadow.landed_by_load(waves, places, size, numbers)


def _address(b: Builder, index: int) -> Callable[[Group], np.ndarray]:
    operand = b.expect(index, "v", 1)
    b.read_bits(operand)
    row = operand.row
    return lambda g: active(g, g.V[row]).astype(np.int64)


def _read(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "ds"
        destination, address = b.expect(0, "v", shape.registers), _address(b, 1)
        b.loads = b.write_bits(destination)
        offset, row = b.number("offset"), destination.row
        return lambda g: put_loaded(g, row, read_lds(g, address(g) + offset, shape.size), shape)

    return compile_one


def _write(shape: Shape) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "ds"
        address, data = _address(b, 0), b.expect(1, "v", shape.registers)
        b.read_bits(data)
        offset, row = b.number("offset"), data.row
        return lambda g: write_lds(g, address(g) + offset, stored_bytes(g, row, shape))

    return compile_one


def _read2(size: int, stride: int) -> Callable[[Builder], Handler]:
    """Two values at two offsets, counted in units of ``size * stride`` bytes."""

    def compile_one(b: Builder) -> Handler:
        b.counter = "ds"
        registers = size // 4
        destination, address = b.expect(0, "v", 2 * registers), _address(b, 1)
        b.loads = b.write_bits(destination)
        first, second = (b.number(f"offset{i}") * size * stride for i in range(2))
        row, shape = destination.row, Shape(size)

        def run(g: Group) -> None:
            place = address(g)
            data = read_lds(g, place + first, size), read_lds(g, place + second, size)
            put_loaded(g, row, data[0], shape)
            put_loaded(g, row + registers, data[1], shape)

        return run

    return compile_one


def _write2(size: int, stride: int) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "ds"
        registers, shape = size // 4, Shape(size)
        address = _address(b, 0)
        values = b.expect(1, "v", registers), b.expect(2, "v", registers)
        for operand in values:
            b.read_bits(operand)
        offsets = [b.number(f"offset{i}") * size * stride for i in range(2)]

        def run(g: Group) -> None:
            place = address(g)
            for operand, offset in zip(values, offsets, strict=True):
                write_lds(g, place + offset, stored_bytes(g, operand.row, shape))

        return run

    return compile_one


_READS = {
    "u8": Shape(1),
    "i8": Shape(1, signed=True),
    "u16": Shape(2),
    "i16": Shape(2, signed=True),
    "u16_d16": Shape(2, half="lo"),
    "u16_d16_hi": Shape(2, half="hi"),
    "u8_d16": Shape(1, half="lo"),
    "u8_d16_hi": Shape(1, half="hi"),
    "b32": Shape(4),
    "b64": Shape(8),
    "b96": Shape(12),
    "b128": Shape(16),
}
_WRITES = {
    "b8": Shape(1),
    "b16": Shape(2),
    "b8_d16_hi": Shape(1, half="hi"),
    "b16_d16_hi": Shape(2, half="hi"),
    "b32": Shape(4),
    "b64": Shape(8),
    "b96": Shape(12),
    "b128": Shape(16),
}


def smallest_write(names: set[str]) -> int:
    """Bytes of the smallest LDS write among mnemonics, 4 at most."""
    sizes = [4]
    for name in names:
        for verb in ("ds_write_", "ds_store_"):
            if name.startswith(verb) and name.removeprefix(verb) in _WRITES:
                sizes.append(_WRITES[name.removeprefix(verb)].size)
    return min(sizes)


def _register_lds() -> None:
    for name, shape in _READS.items():
        FACTORIES[f"ds_read_{name}"] = FACTORIES[f"ds_load_{name}"] = _read(shape)
    for name, shape in _WRITES.items():
        FACTORIES[f"ds_write_{name}"] = FACTORIES[f"ds_store_{name}"] = _write(shape)
    for size, kind in ((4, "b32"), (8, "b64")):
        FACTORIES[f"ds_read2_{kind}"] = FACTORIES[f"ds_load_2addr_{kind}"] = _read2(size, 1)
        FACTORIES[f"ds_read2st64_{kind}"] = FACTORIES[f"ds_load_2addr_stride64_{kind}"] = _read2(size, 64)
        FACTORIES[f"ds_write2_{kind}"] = FACTORIES[f"ds_store_2addr_{kind}"] = _write2(size, 1)
        FACTORIES[f"ds_write2st64_{kind}"] = FACTORIES[f"ds_store_2addr_stride64_{kind}"] = _write2(size, 64)


_register_lds()


def _transposed(b: Builder, bits: int) -> Handler:
    """Of every 16 lanes, each reads 64 bits of a row; lane l gets element l of each of the rows.

    With 16-bit elements, lanes 4 r to 4 r + 3 read the 16 elements of row r, four rows; with 8-bit ones
    lanes 2 r and 2 r + 1 read row r of eight rows.
    """
    b.counter = "ds"
    destination, address = b.expect(0, "v", 2), _address(b, 1)
    b.loads = b.write_bits(destination)
    offset, row = b.number("offset"), destination.row
    rows = 64 // bits
    dtype = np.dtype(np.uint16 if bits == 16 else np.uint8)

    def run(g: Group) -> None:
        if not g.full:
            raise b.unsupported("a transposed read with inactive lanes")
        data = read_lds(g, address(g) + offset, 8).view(dtype).reshape(-1, rows, 16)
        turned = np.ascontiguousarray(data.transpose(0, 2, 1)).view(_U32).reshape(-1, 2)
        put_active(g, row, turned[:, 0])
        put_active(g, row + 1, turned[:, 1])

    return run


FACTORIES["ds_read_b64_tr_b16"] = lambda b: _transposed(b, 16)
FACTORIES["ds_read_b64_tr_b8"] = lambda b: _transposed(b, 8)


# Atomics

_OPERATIONS: dict[str, tuple[Any, Callable[[Any, Any], Any]]] = {
    "add_u32": (np.uint32, np.add),
    "sub_u32": (np.uint32, np.subtract),
    "and_b32": (np.uint32, np.bitwise_and),
    "or_b32": (np.uint32, np.bitwise_or),
    "xor_b32": (np.uint32, np.bitwise_xor),
    "min_u32": (np.uint32, np.minimum),
    "max_u32": (np.uint32, np.maximum),
    "min_i32": (np.int32, np.minimum),
    "max_i32": (np.int32, np.maximum),
    "add_f32": (np.float32, np.add),
    "min_f32": (np.float32, np.fmin),
    "max_f32": (np.float32, np.fmax),
}


def _lds_atomic(dtype: Any, function: Callable[[Any, Any], Any], returns: bool) -> Callable[[Builder], Handler]:
    def compile_one(b: Builder) -> Handler:
        b.counter = "ds"
        start = 1 if returns else 0
        address, data = _address(b, start), b.expect(start + 1, "v", 1)
        b.read_bits(data)
        destination = b.expect(0, "v", 1) if returns else None
        if destination is not None:
            b.loads = b.write_bits(destination)
        offset = b.number("offset")

        def run(g: Group) -> None:
            places = lds_places(g, address(g) + offset, 4)
            if g.m.shadow is not None and places.size:
                g.m.shadow.atomic(g, places, 4)
            _measure(g, places, 4)
            _note_write(g)
            values = active(g, g.V[data.row]).view(dtype)
            words = g.m.lds.view(dtype)
            before = np.empty(places.size, dtype)
            for lane, place in enumerate(places // 4):
                before[lane] = words[place]
                words[place] = function(words[place], values[lane])
            if destination is not None:
                put_active(g, destination.row, before.view(_U32))

        return run

    return compile_one


for _name, (_dtype, _function) in _OPERATIONS.items():
    FACTORIES[f"ds_{_name}"] = _lds_atomic(_dtype, _function, False)
    FACTORIES[f"ds_{_name.replace('_', '_rtn_', 1)}"] = _lds_atomic(_dtype, _function, True)


# Permutations through the crossbar


def _lane_exchange(b: Builder) -> tuple[int, int, Callable[[Group], np.ndarray]]:
    """Rows of destination and data, and the lane (int64 [wave, lane]) that each lane's address in bytes names."""
    b.counter = "ds"
    destination = b.expect(0, "v", 1)
    b.loads = b.write_bits(destination)
    address, data = b.expect(1, "v", 1), b.expect(2, "v", 1)
    b.read_bits(address)
    b.read_bits(data)
    offset = _U32(b.number("offset"))

    def named(g: Group) -> np.ndarray:
        return ((g.V[address.row] + offset) >> _U32(2) & _U32(g.m.lanes - 1)).astype(np.int64)

    return destination.row, data.row, named


@register("ds_bpermute_b32")
def _bpermute(b: Builder) -> Handler:
    """Each lane reads from the lane that its address (in bytes) names; 0 from an inactive one."""
    destination, data, named = _lane_exchange(b)

    def run(g: Group) -> None:
        lane = named(g)
        values = np.take_along_axis(np.asarray(g.V[data]), lane, axis=1)
        if not g.full:
            values = np.where(np.take_along_axis(g.mask, lane, axis=1), values, _U32(0))
        g.put(destination, values)

    return run


@register("ds_permute_b32")
def _permute(b: Builder) -> Handler:
    """Each lane sends to the lane that its address names; the highest sender wins, 0 without one."""
    destination, data, named = _lane_exchange(b)

    def run(g: Group) -> None:
        lane = named(g)
        values, result = np.asarray(g.V[data]), np.zeros(g.mask.shape, _U32)
        wave = np.broadcast_to(np.arange(g.n)[:, None], g.mask.shape)
        result[wave[g.mask], lane[g.mask]] = values[g.mask]
        g.put(destination, result)

    return run


@register("ds_swizzle_b32")
def _swizzle(b: Builder) -> Handler:
    """Bit-masked swizzle within 32 lanes, or a quad permutation."""
    b.counter = "ds"
    destination, data = b.expect(0, "v", 1), b.expect(1, "v", 1)
    b.loads = b.write_bits(destination)
    b.read_bits(data)
    lanes = np.arange(b.lanes)
    source = _swizzle_source(b, lanes)

    def run(g: Group) -> None:
        values = np.asarray(g.V[data.row])[:, source]
        if not g.full:
            values = np.where(g.mask[:, source], values, _U32(0))
        g.put(destination.row, values)

    return run


def _swizzle_source(b: Builder, lanes: np.ndarray) -> np.ndarray:
    text = b.take("offset") or ""
    if text.startswith("swizzle("):
        name, *numbers = text.removeprefix("swizzle(").rstrip(")").split(",")
        values = [x.strip(' "') for x in numbers]
        if name == "SWAP":
            return lanes ^ int(values[0])
        if name == "REVERSE":
            return lanes ^ (int(values[0]) - 1)
        if name == "BROADCAST":
            return lanes // int(values[0]) * int(values[0]) + int(values[1])
        if name == "QUAD_PERM":
            return (lanes & ~3) + np.array([int(x) for x in values])[lanes & 3]
        raise b.unsupported(f"offset:{text}")
    pattern = int(text, 0)
    if pattern & 0x8000:
        return (lanes & ~3) + np.array([pattern >> (2 * i) & 3 for i in range(4)])[lanes & 3]
    low = ((lanes & 31 & (pattern & 31)) | (pattern >> 5 & 31)) ^ (pattern >> 10 & 31)
    return (lanes & ~31) + low
