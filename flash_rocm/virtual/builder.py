"""What compiles one instruction: getters of its sources, writers of its results, and its modifiers.

A getter takes a :class:`Group` and returns an array that broadcasts to [waves, lanes]; a writer takes a
group and a value.  Every modifier has to be asked for: what is left over at the end raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from flash_rocm.amdgpu.assembly import Instruction

from . import lanes as lane_access
from .code_object import Descriptor
from .errors import UnsupportedInstruction
from .floats import f16_to_f32, flush_f32
from .machine import EXEC, NULL, S_BIT, SCC, Group
from .operands import Operand, parse_operand

Getter = Callable[[Group], Any]
Writer = Callable[[Group, Any], None]
Handler = Callable[[Group], None]

_SUFFIX = re.compile(r"_(e32|e64|dpp8?|sdwa|e64_dpp)$")


class Builder:
    """One instruction being compiled.

    Attributes:
        name: mnemonic without encoding suffix.
        first_source: index of the operand that is src0.
        reads, writes: registers as bits, collected from the getters and writers asked for.
        unneeded: those of ``reads`` that may be undefined without harm.
        parts: (reads, writes) of results that do not depend on each other's sources; empty: one result of all.
        counter: the counter that counts it ("vm", "vs", "ds", "sm"), None for what loads nothing.
        loads: bits of the registers that arrive later, under ``counter``.
        float_rows: rows of V that get float32 results.
    """

    def __init__(self, instruction: Instruction, name: str, descriptor: Descriptor, arch: str) -> None:
        self.instruction, self.descriptor, self.arch = instruction, descriptor, arch
        suffix = _SUFFIX.search(instruction.mnemonic)
        self.name = name
        self.encoding = suffix.group(1) if suffix else ""
        self.gfx9 = arch.startswith("gfx9")
        self.lanes = descriptor.wave_size
        self.mask_words = self.lanes // 32
        self.first_source = 1
        self.reads = self.writes = self.unneeded = 0
        self.parts: tuple[tuple[int, int], ...] = ()
        self.counter: str | None = None
        self.loads: list[int] = []
        self.float_rows: list[int] = []
        self.operands = [parse_operand(text, descriptor) for text in instruction.operands]
        self._modifiers: dict[str, str] = {}
        for modifier in instruction.modifiers:
            key, _, value = modifier.partition(":")
            self._modifiers[key] = value
        self._dpp = lane_access.parse_dpp(self) if self.encoding in ("dpp", "dpp8", "e64_dpp") else None
        self._sdwa = self._take_sdwa() if self.encoding == "sdwa" else None

    # Modifiers

    def take(self, name: str, default: str | None = None) -> str | None:
        """Text behind ``name:``, "" for a bare flag, ``default`` where it is not there."""
        return self._modifiers.pop(name, default)

    def flag(self, name: str) -> bool:
        return self._modifiers.pop(name, None) is not None

    def number(self, name: str, default: int = 0) -> int:
        text = self._modifiers.pop(name, None)
        return default if text is None else int(text, 0)

    def bit_list(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A modifier like ``op_sel:[0,1]``."""
        text = self._modifiers.pop(name, None)
        return default if text is None else tuple(int(x) for x in text.strip("[]").split(","))

    def modifier_names(self) -> tuple[str, ...]:
        return tuple(self._modifiers)

    def finish(self) -> None:
        """Raise if a modifier was not asked for."""
        if self._modifiers:
            raise self.unsupported(f"modifier {next(iter(self._modifiers))!r}")

    def unsupported(self, what: str) -> UnsupportedInstruction:
        return UnsupportedInstruction(f"{self.instruction.text!r} for {self.arch}: {what} is not implemented")

    # Registers

    def read_bits(self, operand: Operand, count: int | None = None) -> None:
        """Note that registers are read."""
        if operand.kind in "vs":
            base = operand.row + (S_BIT if operand.kind == "s" else 0)
            self.reads |= ((1 << (operand.count if count is None else count)) - 1) << base

    def write_bits(self, operand: Operand, count: int | None = None) -> list[int]:
        """Note that registers are written; their bits."""
        base = operand.row + (S_BIT if operand.kind == "s" else 0)
        bits = [base + i for i in range(operand.count if count is None else count)]
        if not (operand.kind == "s" and operand.row == NULL):
            self.writes |= sum(1 << bit for bit in bits)
        return bits

    def expect(self, index: int, kinds: str | tuple[str, ...], count: int | None = None) -> Operand:
        """The operand at ``index``, of one of the kinds and, where given, so many registers."""
        if index >= len(self.operands):
            raise self.unsupported(f"having {len(self.operands)} operands")
        operand = self.operands[index]
        allowed = (kinds,) if kinds in ("v", "s") else kinds
        if operand.kind not in allowed or (count is not None and operand.count != count):
            raise self.unsupported(f"operand {operand.text!r}")
        return operand

    def source(self, k: int) -> Operand:
        index = self.first_source + k
        if index >= len(self.operands):
            raise self.unsupported(f"having {len(self.operands)} operands")
        return self.operands[index]

    # Vector sources, 32 bits

    def _raw(self, operand: Operand, k: int, view: str) -> Getter:
        """Bits of a source in the view "V", "F" or "I", before neg and abs."""
        if operand.kind == "v":
            self.read_bits(operand, 1)
            row = operand.row
            selected = self._dpp is not None and k == 0
            if self._sdwa is not None or selected or operand.half == "h":
                return self._changed(operand, k, view)
            if view == "F":
                return lambda g: g.F[row]
            if view == "I":
                return lambda g: g.I[row]
            return lambda g: g.V[row]
        if self._sdwa is not None and self._sdwa.get(f"src{k}_sel", "DWORD") != "DWORD":
            raise self.unsupported(f"a selected part of {operand.text!r}")
        if operand.kind == "s":
            self.read_bits(operand, 1)
            row = operand.row
            if view == "F":
                return lambda g: g.S[row].view(np.float32)[:, None]
            return lambda g: (g.S[row] if view == "V" else g.SI[row])[:, None]
        bits = np.uint32(operand.bits(32))
        value: Any = bits if view == "V" else bits.view(np.float32 if view == "F" else np.int32)
        return lambda g: value

    def _changed(self, operand: Operand, k: int, view: str) -> Getter:
        """A VGPR whose lanes (DPP) or bytes (SDWA, true16) are selected."""
        row, dpp = operand.row, self._dpp if k == 0 else None
        part = self._sdwa.get(f"src{k}_sel", "DWORD") if self._sdwa is not None else "DWORD"
        if operand.half == "h":
            part = "WORD_1"
        select = lane_access.part_of(part, operand.sext)
        dtype = {"V": np.uint32, "F": np.float32, "I": np.int32}[view]

        def get(g: Group) -> Any:
            value = g.V[row]
            if dpp is not None:
                value = dpp.fetch(g, value)
            return select(value).view(dtype)

        return get

    def u(self, k: int) -> Getter:
        """uint32 of source ``k``."""
        operand = self.source(k)
        if operand.neg or operand.abs:
            raise self.unsupported(f"operand {operand.text!r}")
        return self._raw(operand, k, "V")

    def i(self, k: int) -> Getter:
        """int32 of source ``k``."""
        operand = self.source(k)
        if operand.neg or operand.abs:
            raise self.unsupported(f"operand {operand.text!r}")
        return self._raw(operand, k, "I")

    def f(self, k: int, flush: bool = True) -> Getter:
        """float32 of source ``k`` with its modifiers, denormals flushed where the mode says so."""
        operand = self.source(k)
        get = self._raw(operand, k, "F")
        if flush and self.descriptor.flush_f32:
            unflushed = get
            get = lambda g: flush_f32(unflushed(g))  # noqa: E731
        return signed(operand, get)

    def f_bits(self, k: int) -> Getter:
        """uint32 of source ``k`` as float bits: neg and abs change the sign bit (v_cndmask)."""
        operand = self.source(k)
        get = self._raw(operand, k, "V")
        if operand.abs:
            plain = get
            get = lambda g: plain(g) & np.uint32(0x7FFFFFFF)  # noqa: E731
        if operand.neg:
            positive = get
            get = lambda g: positive(g) ^ np.uint32(0x80000000)  # noqa: E731
        return get

    # Vector sources, 16 and 64 bits

    def h_bits(self, k: int, high: bool = False) -> Getter:
        """uint32 with the 16 bits of source ``k``, the upper half of the register if ``high``."""
        operand = self.source(k)
        if operand.is_constant:
            value = np.uint32(0 if high else operand.bits(16))
            return lambda g: value
        get = self._raw(operand, k, "V")
        if high:
            return lambda g: get(g) >> np.uint32(16)
        return lambda g: get(g) & np.uint32(0xFFFF)

    def h(self, k: int, high: bool = False) -> Getter:
        """float32 of the float16 in source ``k``."""
        get = self.h_bits(k, high)
        return signed(self.source(k), lambda g: f16_to_f32(get(g)))

    def u64(self, k: int, signed_literal: bool = False) -> Getter:
        """uint64 of source ``k``, two registers; a 32-bit literal is zero-extended unless of a signed type."""
        operand = self.source(k)
        if operand.neg or operand.abs:
            raise self.unsupported(f"operand {operand.text!r}")
        return self._raw64(operand, operand.bits(64, signed_literal) if operand.is_constant else 0)

    def f64(self, k: int) -> Getter:
        """float64 of source ``k``, two registers; a 32-bit literal is the upper half."""
        operand = self.source(k)
        bits = 0
        if operand.is_constant:
            bits = operand.number << 32 if operand.kind == "hex" else operand.bits(64)
        get = self._raw64(operand, bits)
        return signed(operand, lambda g: np.asarray(get(g)).view(np.float64))

    def _raw64(self, operand: Operand, bits: int) -> Getter:
        if operand.kind == "v":
            self.read_bits(operand, 2)
            row = operand.row
            return lambda g: g.V[row].astype(np.uint64) | g.V[row + 1].astype(np.uint64) << np.uint64(32)
        if operand.kind == "s":
            self.read_bits(operand, 2)
            row = operand.row
            return lambda g: g.pair(row)[:, None]
        value = np.uint64(bits)
        return lambda g: value

    def mask(self, k: int) -> Getter:
        """bool [waves, lanes] of source ``k``, SGPRs with a bit per lane."""
        operand = self.source(k)
        if operand.kind != "s":
            raise self.unsupported(f"operand {operand.text!r}")
        return self.mask_of(operand.row)

    def mask_of(self, row: int) -> Getter:
        self.reads |= ((1 << self.mask_words) - 1) << (S_BIT + row)
        return lambda g: g.lanes(row)

    # Vector results

    def dst_row(self, index: int = 0) -> int:
        """Row of a one-register vector result."""
        operand = self.expect(index, "v")
        self.write_bits(operand, 1)
        return operand.row

    @property
    def plain(self) -> bool:
        """Whether results go to whole registers unchanged."""
        return self._dpp is None and self._sdwa is None and self.instruction.operands[0][-2:] not in (".l", ".h")

    def put_u(self, index: int = 0) -> Writer:
        """Writer of uint32 (or int32 or float32, by their bits)."""
        row, dpp, sdwa = self.dst_row(index), self._dpp, self._sdwa
        if dpp is not None:
            # Lanes that DPP leaves out keep what they had.
            self.reads |= 0 if dpp.reaches_all else 1 << row
            return lambda g, value: g.put(row, bits32(value)) if dpp.writes_all else dpp.put(g, row, bits32(value))
        if sdwa is not None and sdwa["dst_sel"] != "DWORD":
            insert = lane_access.insert_part(self, sdwa["dst_sel"], sdwa["dst_unused"])
            if sdwa["dst_unused"] == "UNUSED_PRESERVE":
                self.reads |= 1 << row
            return lambda g, value: g.put(row, insert(g.V[row], bits32(value)))
        return lambda g, value: g.put(row, bits32(value))

    def put_f(self, index: int = 0) -> Writer:
        """Writer of float32: clamp, omod, flushed denormals."""
        put = self.put_u(index)
        self.float_rows.append(self.operands[index].row)
        scale = {"2": 2.0, "4": 4.0}.get(self.take("mul") or "")
        if self.take("div") is not None:
            scale = 0.5
        clamp, clamp_nan, flush = self.flag("clamp"), self.descriptor.clamp_nan, self.descriptor.flush_f32
        if scale is None and not clamp and not flush:
            return put

        def change(g: Group, value: Any) -> None:
            if flush:
                value = flush_f32(value)
            if scale is not None:
                value = value * np.float32(scale)
            if clamp:
                value = np.clip(value, np.float32(0), np.float32(1))
                if clamp_nan:
                    value = np.where(np.isnan(value), np.float32(0), value)
            put(g, value)

        return change

    def put_h(self, index: int = 0, zero_upper: bool = True, high: bool | None = None) -> Writer:
        """Writer of 16 bits (uint32 below 65536) to a half of a register.

        Args:
            zero_upper: whether gfx9 clears the upper half (most of its 16-bit instructions do).
            high: write the upper half and keep the lower one.
        """
        operand = self.expect(index, "v")
        row = self.dst_row(index)
        if self._sdwa is not None or self._dpp is not None:
            return self.put_u(index)
        upper = operand.half == "h" if high is None else high
        if upper:
            # The other half stays, whether or not it holds anything.
            self.reads |= 1 << row
            self.unneeded |= 1 << row
            return lambda g, value: g.put(row, g.V[row] & np.uint32(0xFFFF) | value << np.uint32(16))
        if zero_upper and self.gfx9 and high is None:
            return lambda g, value: g.put(row, value)
        # Keeping the other half is no use of it: the first half of a pair is written into anything.
        return lambda g, value: g.put(row, g.V[row] & np.uint32(0xFFFF0000) | value)

    def put_u64(self, index: int = 0) -> Writer:
        """Writer of uint64 or float64 to two registers."""
        operand = self.expect(index, "v", 2)
        self.write_bits(operand)
        row = operand.row

        def put(g: Group, value: Any) -> None:
            value = np.asarray(value).view(np.uint64)
            g.put(row, value.astype(np.uint32))
            g.put(row + 1, (value >> np.uint64(32)).astype(np.uint32))

        return put

    def put_mask(self, index: int) -> Writer:
        """Writer of bool [waves, lanes] to SGPRs with a bit per lane; inactive lanes get 0."""
        operand = self.expect(index, "s")
        self.write_bits(operand, self.mask_words)
        row = operand.row
        if row == EXEC:
            raise self.unsupported("EXEC as a result")

        def put(g: Group, value: Any) -> None:
            if g.full and value.shape == g.mask.shape:
                g.put_lanes(row, value)
            else:
                g.put_lanes(row, np.broadcast_to(value, g.mask.shape) & g.mask)

        return put

    # Scalars

    def su(self, index: int) -> Getter:
        """uint32 [waves] (or a constant) of operand ``index``."""
        operand = self.expect(index, ("s", "int", "hex", "float"))
        if operand.is_constant:
            value = np.uint32(operand.bits(32))
            return lambda g: value
        self.read_bits(operand, 1)
        row = operand.row
        return lambda g: g.S[row]

    def su64(self, index: int) -> Getter:
        """uint64 [waves] (or a constant) of operand ``index``; a 32-bit literal is zero-extended."""
        operand = self.expect(index, ("s", "int", "hex", "float"))
        if operand.is_constant:
            value = np.uint64(operand.bits(64))
            return lambda g: value
        self.read_bits(operand, 2)
        row = operand.row
        return lambda g: g.pair(row)

    def s_put(self, index: int = 0) -> Writer:
        """Writer of uint32 [waves]."""
        operand = self.expect(index, "s")
        self.write_bits(operand, 1)
        row = operand.row
        if row == NULL:
            return lambda g, value: None

        def put(g: Group, value: Any) -> None:
            g.S[row] = bits32(value)
            if row in (EXEC, EXEC + 1):
                g.m.write_exec(g)

        return put

    def s_put64(self, index: int = 0) -> Writer:
        """Writer of uint64 [waves]."""
        operand = self.expect(index, "s")
        self.write_bits(operand, 2)
        row = operand.row

        def put(g: Group, value: Any) -> None:
            g.put_pair(row, np.asarray(value))
            if row == EXEC:
                g.m.write_exec(g)

        return put

    def _take_sdwa(self) -> dict[str, str]:
        names = ("dst_sel", "dst_unused", "src0_sel", "src1_sel")
        found = {name: self.take(name) for name in names}
        return {"dst_sel": "DWORD", **{name: text for name, text in found.items() if text is not None}}


def put_scc(g: Group, value: Any) -> None:
    """Write bool [waves] to SCC."""
    g.S[SCC] = value


def bits32(value: Any) -> Any:
    """The bits of 32-bit values."""
    return value if value.dtype == np.uint32 else value.view(np.uint32)


def signed(operand: Operand, get: Getter) -> Getter:
    """With the abs and neg of an operand, for floats."""
    if operand.abs and operand.neg:
        return lambda g: np.negative(np.abs(get(g)))
    if operand.abs:
        return lambda g: np.abs(get(g))
    if operand.neg:
        return lambda g: np.negative(get(g))
    return get
