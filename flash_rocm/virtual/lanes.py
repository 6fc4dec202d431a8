"""Selecting lanes (DPP) and bytes (SDWA, true16) of vector sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import Group

_PARTS = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}


def part_of(name: str, sext: bool) -> Callable[[Any], Any]:
    """Function from uint32 to the selected part, zero- or sign-extended."""
    shift, width = _PARTS[name]
    if sext:
        left, right = np.uint32(32 - shift - width), np.int32(32 - width)
        return lambda x: ((x << left).view(np.int32) >> right).view(np.uint32)
    if width == 32:
        return lambda x: x
    down, mask = np.uint32(shift), np.uint32((1 << width) - 1)
    return lambda x: x >> down & mask


def insert_part(builder: Any, name: str, unused: str) -> Callable[[Any, Any], Any]:
    """Function from (old register, value) to the register with the value in the selected part."""
    shift, width = _PARTS[name]
    mask = ((1 << width) - 1) << shift
    keep = np.uint32(0xFFFFFFFF & ~mask)
    place, mask32 = np.uint32(shift), np.uint32(mask)
    if unused == "UNUSED_PRESERVE":
        return lambda old, value: old & keep | value << place & mask32
    if unused == "UNUSED_PAD":
        return lambda old, value: value << place & mask32
    raise builder.unsupported(f"dst_unused:{unused}")


class Dpp:
    """Data-parallel primitives: source 0 comes from another lane.

    ``source[lane]`` is the lane read, -1 where there is none; ``enabled[lane]`` by row and bank masks.
    Lanes without a source read 0 under bound_ctrl and are not written otherwise.
    """

    def __init__(self, source: np.ndarray, enabled: np.ndarray, bound_control: bool, fetch_inactive: bool) -> None:
        self.source, self.enabled = source, enabled
        self.bound_control, self.fetch_inactive = bound_control, fetch_inactive
        self.inside = source >= 0
        self.safe = np.where(self.inside, source, 0)
        self.reaches_all = bool(enabled.all()) and (bound_control or bool(self.inside.all()))
        self.writes_all = bound_control and bool(enabled.all())

    def _valid(self, g: Group) -> np.ndarray:
        if self.fetch_inactive or g.full:
            return np.broadcast_to(self.inside, g.mask.shape)
        return self.inside & g.mask[:, self.safe]

    def fetch(self, g: Group, value: np.ndarray) -> np.ndarray:
        moved = value[:, self.safe]
        if g.full and self.inside.all():
            return moved
        return np.where(self._valid(g), moved, np.uint32(0))

    def put(self, g: Group, row: int, value: Any) -> None:
        where = np.broadcast_to(self.enabled, g.mask.shape)
        if not self.bound_control:
            where = where & self._valid(g)
        g.put_where(row, value, where)


def parse_dpp(builder: Any) -> Dpp:
    """The DPP modifiers of an instruction (LLVM's AMDGPUModifierSyntax, "DPP")."""
    lanes = np.arange(builder.lanes)
    row, place = lanes & ~15, lanes & 15
    row_mask, bank_mask = builder.number("row_mask", 0xF), builder.number("bank_mask", 0xF)
    bound_control = builder.take("bound_ctrl") is not None
    fetch_inactive = builder.number("fi") == 1
    source: np.ndarray | None = None
    for name in builder.modifier_names():
        found = _source_lanes(name, builder._modifiers[name], lanes, row, place)
        if found is not None:
            builder.take(name)
            source = found
    if source is None:
        raise builder.unsupported("this DPP control")
    enabled = ((row_mask >> (lanes >> 4) & 1) & (bank_mask >> (place >> 2) & 1)).astype(bool)
    return Dpp(source, enabled, bound_control, fetch_inactive)


def _source_lanes(name: str, text: str, lanes: Any, row: Any, place: Any) -> np.ndarray | None:
    count = lanes.size
    if name == "quad_perm":
        return (lanes & ~3) + np.array([int(x) for x in text.strip("[]").split(",")])[lanes & 3]
    if name == "dpp8":
        return (lanes & ~7) + np.array([int(x) for x in text.strip("[]").split(",")])[lanes & 7]
    if name == "row_mirror":
        return row + 15 - place
    if name == "row_half_mirror":
        return (lanes & ~7) + 7 - (lanes & 7)
    if not re.fullmatch(r"\d+", text):
        return None
    amount = int(text)
    if name == "row_shl":
        return np.where(place + amount < 16, lanes + amount, -1)
    if name == "row_shr":
        return np.where(place >= amount, lanes - amount, -1)
    if name == "row_ror":
        return row + (place - amount) % 16
    if name in ("row_newbcast", "row_share"):
        return row + amount
    if name == "row_xmask":
        return lanes ^ amount
    if name == "wave_shr" and amount == 1:
        return lanes - 1
    if name == "wave_shl" and amount == 1:
        return np.where(lanes + 1 < count, lanes + 1, -1)
    if name == "wave_ror" and amount == 1:
        return (lanes - 1) % count
    if name == "wave_rol" and amount == 1:
        return (lanes + 1) % count
    if name == "row_bcast" and amount == 15:
        return np.where(row >= 16, row - 1, -1)
    if name == "row_bcast" and amount == 31:
        return np.where(lanes >= 32, (lanes & 32) - 1, -1)
    return None
