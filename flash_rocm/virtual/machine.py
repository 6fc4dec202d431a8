"""State of the waves that run together, and views of some of them.

All waves of a batch of workgroups live in shared arrays: ``V[row, wave, lane]`` holds VGPRs and, behind
them, AGPRs; ``S[row, wave]`` holds SGPRs and the special registers below.  A :class:`Group` is the waves
that stand at one program counter: slices where their numbers are evenly spaced (then reads and writes
touch the arrays in place), gathered copies otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .checks import Checks
from .code_object import CodeObject
from .memory import Memory
from .tracking import LdsShadow, Tracker

# Rows of S.  0 to 105 are the SGPRs.
VCC = 106
TTMP = 108
M0 = 124
NULL = 125
EXEC = 126
SCC = 128
FLAT_SCRATCH = 130
XNACK_MASK = 132
S_ROWS = 134
#: Registers as bits of one number: row r of V is bit r, row r of S bit S_BIT + r.
S_BIT = 512

RUNNING, AT_BARRIER, ENDED = 0, 1, 2

#: Start of the addresses that a gfx90a scratch descriptor has.
SCRATCH_BASE = 0x5C4A_7C80_0000


class Machine:
    """One batch of workgroups in execution."""

    def __init__(
        self, code: CodeObject, memory: Memory, checks: Checks, workgroups: int, waves_each: int, random: Any
    ) -> None:
        descriptor = code.descriptor
        self.code, self.memory, self.checks = code, memory, checks
        self.lanes = descriptor.wave_size
        self.workgroups, self.waves_each = workgroups, waves_each
        self.waves = workgroups * waves_each
        self.gfx9 = code.arch.startswith("gfx9")
        rows = descriptor.vgprs + descriptor.agprs
        self.V = random.integers(0, 1 << 32, (rows, self.waves, self.lanes), np.uint32)
        self.F, self.I = self.V.view(np.float32), self.V.view(np.int32)
        self.S = random.integers(0, 1 << 32, (S_ROWS, self.waves), np.uint32)
        self.S[[SCC, NULL]] = 0
        self.exec = np.ones((self.waves, self.lanes), bool)
        self.full = np.ones(self.waves, bool)
        self.local_wave = np.tile(np.arange(waves_each, dtype=np.int32), workgroups)
        self.workgroup = np.repeat(np.arange(workgroups, dtype=np.int32), waves_each)
        self.workgroup_number = self.workgroup  # in the whole launch; the launch sets it
        self.pc = np.full(self.waves, code.entry, np.int32)
        self.status = np.zeros(self.waves, np.int8)
        # A multiple of 64 bytes, so that the widest unit never crosses two workgroups.
        self.lds_stride = -(-code.lds_bytes // 64) * 64
        self.lds = random.integers(0, 256, workgroups * self.lds_stride, np.uint8)
        self.scratch_bytes = -(-descriptor.scratch_bytes // 16) * 16
        size = self.waves * self.lanes * self.scratch_bytes
        self.scratch = random.integers(0, 256, size, np.uint8)
        self.tracker = Tracker(self.waves, rows, self.gfx9) if checks.waits or checks.registers else None
        self.shadow: LdsShadow | None = None
        self.measured: Any = None  # Measurements of the launch, or None

    def write_exec(self, group: Group) -> None:
        """Bring the lane masks up to date after a write to EXEC."""
        mask = group.lanes(EXEC)
        self.exec[group.sel] = mask
        self.full[group.sel] = mask.all(axis=1)
        group.refresh()


class _Gathered:
    """Rows of an array for waves at any places: reads copy, writes go through."""

    __slots__ = ("base", "index")

    def __init__(self, base: np.ndarray, index: np.ndarray) -> None:
        self.base, self.index = base, index

    def __getitem__(self, row: int | slice) -> np.ndarray:
        if isinstance(row, slice):
            return self.base[row].take(self.index, axis=1)
        return self.base[row].take(self.index, axis=0)

    def __setitem__(self, row: int | slice, value: Any) -> None:
        if isinstance(row, slice):
            self.base[row][:, self.index] = value
        else:
            self.base[row][self.index] = value


class Group:
    """Waves at one program counter.

    ``V``, ``F`` and ``I`` (uint32, float32 and int32 views of the vector registers) give [n, lane] for a
    row, ``S`` and ``SI`` [n].  ``full``: every lane of every wave is active.  ``fast``: full, and
    the rows are views that may be written in place.
    """

    __slots__ = (
        "m",
        "sel",
        "index",
        "n",
        "V",
        "F",
        "I",
        "S",
        "SI",
        "full",
        "fast",
        "direct",
        "mask",
        "_mask32",
        "_bases",
    )

    def __init__(self, machine: Machine, index: np.ndarray) -> None:
        self.m, self.index, self.n = machine, index, index.size
        step = int(index[1] - index[0]) if self.n > 1 else 1
        self.direct = self.n < 3 or bool((np.diff(index) == step).all())
        self.V: Any
        if self.direct:
            self.sel: Any = slice(int(index[0]), int(index[-1]) + 1, step)
            self.V, self.F, self.I = (x[:, self.sel] for x in (machine.V, machine.F, machine.I))
            self.S: Any = machine.S[:, self.sel]
            self.SI: Any = self.S.view(np.int32)
        else:
            self.sel = index
            self.V, self.F, self.I = (_Gathered(x, index) for x in (machine.V, machine.F, machine.I))
            self.S, self.SI = _Gathered(machine.S, index), _Gathered(machine.S.view(np.int32), index)
        self._bases: dict[int, np.ndarray] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read EXEC again."""
        self.mask = self.m.exec[self.sel]
        self.full = bool(self.m.full[self.sel].all())
        self.fast = self.full and self.direct
        self._mask32: np.ndarray | None = None

    @property
    def mask32(self) -> np.ndarray:
        """EXEC as uint32 [n, lane]: all ones or zero."""
        if self._mask32 is None:
            self._mask32 = ones_where(self.mask)
        return self._mask32

    def put(self, row: int, value: Any) -> None:
        """Write uint32 (broadcast to [n, lane]) to the active lanes of a row of V."""
        if self.full:
            self.V[row] = value
        else:
            old = self.V[row]
            self.V[row] = old ^ ((old ^ value) & self.mask32)

    def put_where(self, row: int, value: Any, where: np.ndarray) -> None:
        """Like :meth:`put`, for active lanes where ``where`` (bool [n, lane]) holds."""
        old = self.V[row]
        self.V[row] = old ^ ((old ^ value) & ones_where(where & self.mask))

    def active_lanes(self, values: Any) -> np.ndarray:
        """[n, lane] (or what broadcasts to it) to the active lanes in a row."""
        if self.full and values.shape == self.mask.shape:
            return values.reshape(-1)
        values = np.broadcast_to(values, self.mask.shape)
        return values.reshape(-1) if self.full else values[self.mask]

    def lds_base(self) -> np.ndarray:
        """Byte at which each lane's workgroup's part of the LDS starts: int64 [n, lane]."""
        if 0 not in self._bases:
            base = self.m.workgroup[self.sel].astype(np.int64) * self.m.lds_stride
            self._bases[0] = np.repeat(base, self.m.lanes).reshape(self.n, -1)
        return self._bases[0]

    def reader_base(self, per_workgroup: int) -> np.ndarray:
        """What to add to a granule's number in the batch to get each wave's own copy of it: int64 [n, lane]."""
        if 1 not in self._bases:
            m = self.m
            workgroup, wave = m.workgroup[self.sel].astype(np.int64), m.local_wave[self.sel].astype(np.int64)
            base = (workgroup * (m.waves_each - 1) + wave) * per_workgroup
            self._bases[1] = np.repeat(base, m.lanes).reshape(self.n, -1)
        return self._bases[1]

    def lanes(self, row: int) -> np.ndarray:
        """The mask in SGPRs ``row`` (and the next, for 64 lanes) as bool [n, lane]."""
        words = self.m.lanes // 32
        bits = np.empty((self.n, words), np.uint32)
        for word in range(words):
            bits[:, word] = self.S[row + word]
        return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(bool)

    def put_lanes(self, row: int, mask: np.ndarray) -> None:
        """Write bool [n, lane] to the SGPRs of a mask."""
        bits = np.packbits(mask, axis=1, bitorder="little").view(np.uint32)
        if row == NULL:
            return
        for word in range(self.m.lanes // 32):
            self.S[row + word] = bits[:, word]

    def pair(self, row: int) -> np.ndarray:
        """Two SGPRs as uint64 [n]."""
        return self.S[row].astype(np.uint64) | self.S[row + 1].astype(np.uint64) << np.uint64(32)

    def put_pair(self, row: int, value: np.ndarray) -> None:
        """Write uint64 [n] to two SGPRs."""
        if row == NULL:
            return
        self.S[row] = value & np.uint64(0xFFFFFFFF)
        self.S[row + 1] = value >> np.uint64(32)

    def enter_barrier(self) -> None:
        """The waves enter a barrier: note what they have not waited for, where the launch looks for that."""
        m = self.m
        if m.tracker is not None and m.checks.barrier_waits and m.checks.waits:
            m.tracker.enter_barrier(self)

    def where(self) -> tuple[tuple[int, int], ...]:
        """(workgroup of the launch, wave) of the first few waves."""
        few = self.index[:4]
        numbers = self.m.workgroup_number[few], self.m.local_wave[few]
        return tuple((int(a), int(b)) for a, b in zip(*numbers, strict=True))


def ones_where(mask: np.ndarray) -> np.ndarray:
    """bool to uint32: all ones where true."""
    return np.negative(mask.view(np.int8).astype(np.int32)).view(np.uint32)
