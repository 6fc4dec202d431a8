"""What memory instructions of every kind share: data types, and registers of the active lanes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from .builder import Builder
from .machine import Group

_U32 = np.uint32
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
_STORE_NAME = re.compile(r"^(?:global|buffer|scratch)_store_(\w+)$")


def smallest_store(names: set[str]) -> int:
    """Bytes of the smallest vector store among mnemonics, 4 at most."""
    sizes = [4]
    for name in names:
        found = _STORE_NAME.match(name)
        if found and found.group(1) in STORES:
            sizes.append(STORES[found.group(1)].size)
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


def groups_of(g: Group) -> np.ndarray | None:
    """Workgroup of each active lane, if conflicts are looked for."""
    return active(g, g.m.workgroup_number[g.sel][:, None]) if g.m.checks.conflicts else None


def alignment_of(g: Group, shape: Shape) -> int:
    return min(shape.size & -shape.size, 4) if g.m.checks.alignment else 1


def drop_cache_flags(b: Builder) -> None:
    """Caches do not change results here."""
    for name in _CACHE_FLAGS:
        b.take(name)
