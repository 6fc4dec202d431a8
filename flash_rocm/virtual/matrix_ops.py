"""Matrix instructions (MFMA) of CDNA.

Layout (ISA reference, chapter 7, and AMD's matrix instruction calculator): lane l holds row (of A) or column
(of B) l mod M and the elements k = (l // M) * n + i of it, i < n; of the result, register r of lane l is
column l mod N and row 4 (l // 16) + r for M = 16, or 8 (r // 4) + 4 (l // 32) + r mod 4 for M = 32.

Products are exact in float32 (float16, bfloat16, fp8) or rounded to it (float32); they are summed in float32 in
the order that BLAS likes, and the addend comes last.  Hardware documents no order either, so that results
agree to rounding, and to the bit where all partial sums are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Getter, Handler
from .floats import f16_to_f32, flush_f32
from .machine import Group
from .operands import float32_of
from .registry import FACTORIES

_U32 = np.uint32
_NAME = re.compile(r"^v_mfma_f32_(16|32)x\1x(\d+)_?(f16|bf16|bf16_1k|f32|(?:fp8|bf8)_(?:fp8|bf8))$")


def _fp8_table(exponent_bits: int, bias: int, fnuz: bool) -> np.ndarray:
    """float32 of the 256 values of an 8-bit float.

    ``fnuz``: no infinities, no negative zero, whose place NaN takes (gfx942).  Otherwise the OCP formats:
    e4m3 has NaN only at 0x7f and 0xff, e5m2 infinities and NaN as IEEE 754 has.
    """
    table = np.zeros(256, np.float32)
    mantissa_bits = 7 - exponent_bits
    for code in range(256):
        exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        sign = -1.0 if code & 0x80 else 1.0
        if exponent:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
        if fnuz:
            value = np.nan if code == 0x80 else value
        elif exponent_bits == 4:
            value = np.nan if code & 0x7F == 0x7F else value
        elif exponent == 31:
            value = np.nan if mantissa else np.inf
        table[code] = sign * value
    return table


_FP8 = {
    ("fp8", True): _fp8_table(4, 8, True),
    ("bf8", True): _fp8_table(5, 16, True),
    ("fp8", False): _fp8_table(4, 7, False),
    ("bf8", False): _fp8_table(5, 15, False),
}


def _flush_halves(bits: Any, kind: str) -> Any:
    """Denormal 16-bit floats to zero, as the matrix units of gfx90a do."""
    exponent = 0x7C00 if kind == "f16" else 0x7F80
    return np.where(bits & exponent == 0, bits & 0x8000, bits)


Unpack = Callable[[np.ndarray, np.ndarray], None]


def unpacker(kind: str, arch: str) -> tuple[int, Unpack]:
    """(values in a register, function from uint32 [waves, lane] that fills float32 [waves, value, lane])."""
    if kind == "f32":

        def whole(bits: np.ndarray, out: np.ndarray) -> None:
            out[:, 0] = bits.view(np.float32)

        return 1, whole
    if kind in ("fp8", "bf8"):
        table = _FP8[kind, arch == "gfx942"]

        def bytes_of(bits: np.ndarray, out: np.ndarray) -> None:
            for byte in range(4):
                out[:, byte] = table.take(bits >> _U32(8 * byte) & _U32(0xFF))

        return 4, bytes_of
    flush = arch == "gfx90a"
    if kind == "f16":

        def halves(bits: np.ndarray, out: np.ndarray) -> None:
            for half in range(2):
                part = bits >> _U32(16 * half) & _U32(0xFFFF)
                out[:, half] = f16_to_f32(_flush_halves(part, "f16") if flush else part)

        return 2, halves

    def bf16(bits: np.ndarray, out: np.ndarray) -> None:
        np.left_shift(bits, _U32(16), out=out[:, 0].view(_U32))
        np.bitwise_and(bits, _U32(0xFFFF0000), out=out[:, 1].view(_U32))
        if flush:
            # The exponent is where that of float32 is.
            out[:] = flush_f32(out)

    return 2, bf16


def _matrix_source(b: Builder, k: int, kind: str, rows: int, depth: int) -> Getter:
    """float32 [waves, depth, rows] of source ``k``; both sources order the depth alike, by register first."""
    each, unpack = unpacker(kind, b.arch)
    registers = depth * rows // b.lanes // each
    operand = b.expect(b.first_source + k, "v", registers)
    b.read_bits(operand)
    row = operand.row

    def get(g: Group) -> Any:
        values = np.empty((g.n, registers, each, b.lanes), np.float32)
        for register in range(registers):
            unpack(g.V[row + register], values[:, register])
        return values.reshape(g.n, depth, rows)

    return get


def addend_source(b: Builder, registers: int) -> Getter:
    """float32 [register, waves, lanes] of the last source, or a constant."""
    operand = b.source(2)
    if operand.is_constant:
        value = float32_of(operand.bits(32))
        return lambda g: value
    operand = b.expect(3, "v", registers)
    b.read_bits(operand)
    row = operand.row
    result = b.operands[0].row
    if row != result and abs(row - result) < registers:
        # Registers shared in part would be overwritten before they are read.
        return lambda g: np.array(g.F[row : row + registers])
    return lambda g: g.F[row : row + registers]


def compile_mfma(b: Builder) -> Handler:
    """All shapes with one block and float32 results."""
    found = _NAME.match(b.name)
    if found is None:
        raise b.unsupported("this shape")
    size, depth = int(found.group(1)), int(found.group(2))
    kinds = found.group(3).replace("_1k", "")
    first_kind, _, second_kind = kinds.partition("_")
    registers = size * size // b.lanes
    first = _matrix_source(b, 0, first_kind, size, depth)
    second = _matrix_source(b, 1, second_kind or first_kind, size, depth)
    addend = addend_source(b, registers)
    destination = b.expect(0, "v", registers)
    b.float_rows += b.write_bits(destination)
    row, flush = destination.row, b.arch == "gfx90a" and first_kind != "f32"

    groups = b.lanes // size

    def run(g: Group) -> None:
        product = first(g).transpose(0, 2, 1) @ second(g)
        # Row of register r in lane group j: 4 j + r, for 32 rows 8 (r // 4) + 4 j + r % 4.
        rows = product.reshape(g.n, size // (4 * groups), groups, 4, size)
        start = addend(g)
        for register in range(registers):
            place = row + register
            part = rows[:, register // 4, :, register % 4, :].reshape(g.n, b.lanes)
            total = part + (start[register] if start.ndim else start)
            g.F[place] = flush_f32(total) if flush else total

    return run


def _register_mfma() -> None:
    shapes = {
        "f16": ("16x16x16", "32x32x8", "16x16x32", "32x32x16"),
        "bf16": ("16x16x16", "32x32x8", "16x16x32", "32x32x16"),
        "f32": ("16x16x4", "32x32x2"),
    }
    for kind, names in shapes.items():
        for shape in names:
            FACTORIES[f"v_mfma_f32_{shape}_{kind}"] = compile_mfma
    for shape in ("16x16x16", "32x32x8"):
        # gfx90a's names; its bf16 without _1k has half the depth and other operands.
        FACTORIES[f"v_mfma_f32_{shape}f16"] = FACTORIES[f"v_mfma_f32_{shape}bf16_1k"] = compile_mfma
    for shape in shapes["f32"]:
        FACTORIES[f"v_mfma_f32_{shape}f32"] = compile_mfma
    for shape in ("16x16x32", "32x32x16"):
        for first in ("fp8", "bf8"):
            for second in ("fp8", "bf8"):
                FACTORIES[f"v_mfma_f32_{shape}_{first}_{second}"] = compile_mfma


_register_mfma()
