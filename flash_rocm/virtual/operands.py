"""Operands of instructions: from text to register rows and constants."""

from __future__ import annotations

import dataclasses
import re
import struct
from typing import Any

import numpy as np

from .code_object import Descriptor
from .errors import UnsupportedInstruction
from .machine import EXEC, FLAT_SCRATCH, M0, NULL, SCC, TTMP, VCC, XNACK_MASK

_REGISTER = re.compile(r"^(v|s|a|ttmp)(?:(\d+)|\[(\d+)(?::(\d+))?\])(?:\.([lh]))?$")
_NAMED = {
    "vcc": (VCC, 2),
    "vcc_lo": (VCC, 1),
    "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2),
    "exec_lo": (EXEC, 1),
    "exec_hi": (EXEC + 1, 1),
    "m0": (M0, 1),
    "null": (NULL, 1),
    "scc": (SCC, 1),
    "src_scc": (SCC, 1),
    "flat_scratch": (FLAT_SCRATCH, 2),
    "flat_scratch_lo": (FLAT_SCRATCH, 1),
    "flat_scratch_hi": (FLAT_SCRATCH + 1, 1),
    "xnack_mask": (XNACK_MASK, 2),
}
_INTEGER = re.compile(r"^-?(0x[0-9a-f]+|\d+)$")
_FLOAT = re.compile(r"^-?\d+\.\d*(e[+-]?\d+)?$")
_WRAPPED = re.compile(r"^(lit|lit64|neg|abs|sext)\((.*)\)$")
#: 1/(2 pi), whose printed digits differ from the constant that hardware has.
_INVERSE_2PI = {16: 0x3118, 32: 0x3E22F983, 64: 0x3FC45F306DC9C882}


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand.

    ``kind``: "v" (row of V), "s" (row of S), "int" and "hex" (``number``), "float" (``real``), "off".
    """

    kind: str
    text: str
    row: int = 0
    count: int = 1
    number: int = 0
    real: float = 0.0
    neg: bool = False
    abs: bool = False
    sext: bool = False
    half: str = ""  # "l" or "h" of a register of 16-bit code

    @property
    def is_constant(self) -> bool:
        return self.kind in ("int", "hex", "float")

    def bits(self, width: int, signed: bool = False) -> int:
        """The constant as ``width`` bits, for an operand of that width.

        Raises:
            UnsupportedInstruction: not a constant of that width.
        """
        mask = (1 << width) - 1
        if self.kind == "int":
            return self.number & mask
        if self.kind == "hex":
            if width == 64 and signed and self.number >> 31 == 1:
                return self.number | 0xFFFFFFFF00000000
            return self.number & mask
        if self.kind != "float":
            raise UnsupportedInstruction(f"expected a constant, got {self.text!r}")
        if abs(abs(self.real) - 0.15915494) < 1e-6:
            return _INVERSE_2PI[width] | ((1 << (width - 1)) if self.real < 0 else 0)
        code = {16: "<e", 32: "<f", 64: "<d"}[width]
        return int.from_bytes(struct.pack(code, self.real), "little")


def parse_operand(text: str, descriptor: Descriptor) -> Operand:
    """Understand one printed operand.

    Raises:
        UnsupportedInstruction: a form that is not known, or a register that the kernel has not got.
    """
    neg = absolute = sext = False
    inner = text
    while True:
        wrapped = _WRAPPED.match(inner)
        if wrapped:
            inner = wrapped.group(2)
            neg, absolute = neg or wrapped.group(1) == "neg", absolute or wrapped.group(1) == "abs"
            sext = sext or wrapped.group(1) == "sext"
        elif inner.startswith("|") and inner.endswith("|") and len(inner) > 2:
            inner, absolute = inner[1:-1], True
        elif inner.startswith("-") and not (_INTEGER.match(inner) or _FLOAT.match(inner)):
            inner, neg = inner[1:], True
        else:
            break
    flags: dict[str, Any] = {"neg": neg, "abs": absolute, "sext": sext}
    if inner == "off":
        return Operand("off", text)
    if inner in _NAMED:
        row, count = _NAMED[inner]
        return Operand("s", text, row, count, **flags)
    register = _REGISTER.match(inner)
    if register:
        kind, single, first, last, half = register.groups()
        row = int(single if single is not None else first)
        count = int(last) - row + 1 if last is not None else 1
        if kind in "va":
            # One register file: VGPR numbers may reach into the AGPRs behind them, as AMD's assembly does.
            limit = descriptor.agprs + (descriptor.vgprs if kind == "v" else 0)
            if row + count > limit:
                raise UnsupportedInstruction(f"register {text!r}: the kernel has {limit} of them")
            return Operand("v", text, row + (descriptor.vgprs if kind == "a" else 0), count, half=half or "", **flags)
        return Operand("s", text, row + (TTMP if kind == "ttmp" else 0), count, half=half or "", **flags)
    if _INTEGER.match(inner):
        kind = "hex" if "0x" in inner else "int"
        return Operand(kind, text, number=int(inner, 0), **flags)
    if _FLOAT.match(inner):
        return Operand("float", text, real=float(inner), **flags)
    raise UnsupportedInstruction(f"operand {text!r}")


def float32_of(bits: int) -> np.float32:
    """float32 with these bits."""
    return np.uint32(bits).view(np.float32)
