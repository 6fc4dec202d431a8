"""What only RDNA has: WMMA, 16-bit selections, permutations within and across rows, scalar float functions.

Sources: "RDNA3" and "RDNA4" ISA references, chapters on VOP3P ("WMMA") and VOP3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .builder import Builder, Getter, Handler
from .float_ops import without_denormals
from .floats import fma32
from .machine import VCC, Group, ones_where
from .matrix_ops import addend_source, unpacker
from .registry import FACTORIES, register

_U32 = np.uint32
_F32 = np.float32
_WMMA = re.compile(r"^v_wmma_f32_16x16x16_(f16|bf16)$")


def _wmma_source(b: Builder, k: int, kind: str) -> Getter:
    """float32 [waves, 16 (depth), 16 (row or column)].

    gfx11: every lane of the lower half holds a whole row, and the upper half repeats it; gfx12: the
    upper half holds the second half of the depth.  The order of the depth is alike in both sources.
    """
    each, unpack = unpacker(kind, b.arch)
    repeated = b.arch.startswith("gfx11")
    registers = 8 if repeated else 4
    operand = b.expect(1 + k, "v", registers)
    b.read_bits(operand)
    row = operand.row

    def get(g: Group) -> Any:
        values = np.empty((g.n, registers, each, 32), np.float32)
        for place in range(registers):
            unpack(g.V[row + place], values[:, place])
        if repeated:
            if not np.array_equal(values[..., :16], values[..., 16:], equal_nan=True):
                raise b.unsupported("lanes 16 to 31 that do not repeat lanes 0 to 15")
            return np.ascontiguousarray(values[..., :16]).reshape(g.n, 16, 16)
        return values.reshape(g.n, 16, 16)

    return get


@register("v_wmma_f32_16x16x16_f16", "v_wmma_f32_16x16x16_bf16")
def _wmma(b: Builder) -> Handler:
    """D = A B + C; products summed in float32 in the order of BLAS, see matrix_ops."""
    if b.lanes != 32:
        raise b.unsupported("a wave of 64")
    found = _WMMA.match(b.name)
    kind = found.group(1) if found else ""
    first, second, start = _wmma_source(b, 0, kind), _wmma_source(b, 1, kind), addend_source(b, 8)
    destination = b.expect(0, "v", 8)
    b.float_rows += b.write_bits(destination)
    row = destination.row
    rows_alternate = b.arch.startswith("gfx11")

    def run(g: Group) -> None:
        product = first(g).transpose(0, 2, 1) @ second(g)
        # Row of register r in lane half j: 2 r + j on gfx11, r + 8 j on gfx12.
        if rows_alternate:
            parts = product.reshape(g.n, 8, 2, 16)
        else:
            parts = product.reshape(g.n, 2, 8, 16).transpose(0, 2, 1, 3)
        addend = start(g)
        for place in range(8):
            total = parts[:, place].reshape(g.n, 32) + (addend[place] if addend.ndim else addend)
            g.F[row + place] = total

    return run


@register("v_cndmask_b16")
def _cndmask_b16(b: Builder) -> Handler:
    no, yes = b.h_bits(0), b.h_bits(1)
    for k in range(2):
        if b.source(k).neg or b.source(k).abs:
            raise b.unsupported("changing a sign")
    choose = b.mask(2) if len(b.operands) > 3 else b.mask_of(VCC)
    put = b.put_h(0)

    def run(g: Group) -> None:
        other = no(g)
        put(g, other ^ ((other ^ yes(g)) & ones_where(choose(g))))

    return run


@register("v_permlane16_b32", "v_permlanex16_b32")
def _permlane16(b: Builder) -> Handler:
    """Each lane reads the lane of its row (x: of the other row of the pair) that 4 bits of a scalar name."""
    operand = b.expect(1, "v", 1)
    b.read_bits(operand)
    low, high, put = b.su(2), b.su(3), b.put_u()
    fetch_inactive, bound_control = b.bit_list("op_sel", (0, 0))[:2]
    if bound_control:
        raise b.unsupported("bound_ctrl")
    lane = np.arange(b.lanes)
    row = lane & ~15
    if b.name == "v_permlanex16_b32":
        row = row ^ 16
    place = lane & 15

    def run(g: Group) -> None:
        words = np.empty((g.n, 2), _U32)
        words[:, 0], words[:, 1] = low(g), high(g)
        picks = words[:, place // 8] >> (place % 8 * 4).astype(_U32) & _U32(15)
        source = row + picks.astype(np.int64)
        if not fetch_inactive and not np.take_along_axis(g.mask, source, axis=1)[g.mask].all():
            raise b.unsupported("reading an inactive lane")
        put(g, np.take_along_axis(np.asarray(g.V[operand.row]), source, axis=1))

    return run


def _scalar_function(function: Callable[[Any], Any]) -> Callable[[Builder], Handler]:
    """Transcendental instruction of the vector unit with SGPR operands."""

    def compile_one(b: Builder) -> Handler:
        operand = b.expect(1, ("s", "int", "hex", "float"))
        value, put = b.su(1), b.s_put(0)

        def run(g: Group) -> None:
            x = np.asarray(value(g)).view(_F32)
            x = np.abs(x) if operand.abs else x
            put(g, np.asarray(function(-x if operand.neg else x)).astype(_F32))

        return run

    return compile_one


for _name, _function in (
    ("rcp", lambda x: _F32(1) / x),
    ("rsq", lambda x: (1 / np.sqrt(np.asarray(x, np.float64))).astype(_F32)),
    ("sqrt", np.sqrt),
    ("exp", np.exp2),
    ("log", np.log2),
):
    FACTORIES[f"v_s_{_name}_f32"] = _scalar_function(without_denormals(_function))


@register("s_fmac_f32")
def _s_fmac(b: Builder) -> Handler:
    first, second, addend, put = b.su(1), b.su(2), b.su(0), b.s_put(0)
    return lambda g: put(g, fma32(*(np.asarray(x(g)).view(_F32) for x in (first, second, addend))))


@register("s_barrier_signal")
def _barrier_signal(b: Builder) -> Handler:
    """The barrier of the workgroup; the wait that follows is where waves meet here."""
    if b.expect(0, ("int", "hex")).number != -1:
        raise b.unsupported("a named barrier")
    return Group.enter_barrier
