"""Memory of the virtual GPU: a set of named allocations at 64-bit addresses.

Every access is looked up in the set; what lies outside raises with the nearest allocation's name.
Between allocations lie gaps wider than any 32-bit offset error is likely to jump exactly.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

import numpy as np

from .errors import GlobalConflict, MemoryFault, UninitialisedRead

_FIRST = 0x7F00_0000_0000
_ALIGN = 1 << 16
_GAP = 1 << 20

#: numpy dtypes that move 1 to 16 bytes at once.
UNITS: dict[int, Any] = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
UNITS[16] = np.dtype("V16")


@dataclasses.dataclass
class Allocation:
    """One allocation; ``data`` shares memory with the array it was made from, as bytes."""

    name: str
    base: int
    data: np.ndarray  # uint8 [size]
    writable: bool
    written: np.ndarray | None = None  # bool [size]: bytes that hold something, None if all do
    writer: np.ndarray | None = None  # int32 per granule: workgroup that wrote it in this launch, -1 none
    granule: int = 4

    @property
    def end(self) -> int:
        return self.base + self.data.size


class Memory:
    """The allocations of one GPU."""

    def __init__(self) -> None:
        self._allocations: list[Allocation] = []
        self._bases: list[int] = []
        self._next = _FIRST

    def add(
        self,
        name: str,
        array: np.ndarray,
        writable: bool = True,
        initialised: bool = True,
        address: int | None = None,
    ) -> int:
        """Make a C-contiguous array visible to kernels and return its address.

        The memory is shared: stores of a kernel show in ``array``.  With ``initialised=False`` its
        content counts as undefined, and a kernel that reads it before writing it is reported.

        Args:
            address: where kernels see it, for compiled host code that knows it by its address on the host; by
                default a free place, 64 KiB aligned, with a gap on both sides.

        Raises:
            ValueError: not C-contiguous, or the name or a byte at the address is taken.
        """
        if not array.flags.c_contiguous:
            raise ValueError(f"array: expected a C-contiguous array for {name!r}, got strides {array.strides}")
        if any(a.name == name for a in self._allocations):
            raise ValueError(f"name: expected a new name, got {name!r}. Hint: remove() the old allocation first.")
        data = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        if address is None:
            while (taken := self._overlapped(self._next - _GAP, data.size + 2 * _GAP)) is not None:
                self._next = (taken.end + _GAP + _ALIGN - 1) // _ALIGN * _ALIGN
            base = self._next
            self._next = (base + data.size + _GAP + _ALIGN - 1) // _ALIGN * _ALIGN
        else:
            base = address
            if (taken := self._overlapped(base, data.size)) is not None:
                raise ValueError(f"address: expected free memory for {name!r}, got that of {taken.name!r}")
        written = None if initialised else np.zeros(data.size, bool)
        index = bisect.bisect_right(self._bases, base)
        self._allocations.insert(index, Allocation(name, base, data, writable and array.flags.writeable, written))
        self._bases.insert(index, base)
        return base

    def _overlapped(self, base: int, size: int) -> Allocation | None:
        """The last allocation that has a byte in a range, or None."""
        index = bisect.bisect_left(self._bases, base + size) - 1
        if index >= 0 and self._allocations[index].end > base:
            return self._allocations[index]
        return None

    def remove(self, name: str) -> None:
        """Forget an allocation; its addresses are not used again.

        Raises:
            KeyError: no allocation of that name.
        """
        for index, allocation in enumerate(self._allocations):
            if allocation.name == name:
                del self._allocations[index], self._bases[index]
                return
        raise KeyError(name)

    def allocations(self) -> tuple[Allocation, ...]:
        return tuple(self._allocations)

    def at(self, address: int) -> Allocation | None:
        """The allocation that holds ``address``, or None."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0 or address >= self._allocations[index].end:
            return None
        return self._allocations[index]

    def describe(self, address: int) -> str:
        """Where an address lies, in words."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0:
            return f"address {address:#x}, below every allocation"
        near = self._allocations[index]
        if address < near.end:
            return f"byte {address - near.base} of {near.name!r} ({near.data.size} bytes)"
        return (
            f"address {address:#x}, {address - near.end} bytes past the end of {near.name!r} ({near.data.size} bytes)"
        )

    def begin_launch(self, granule: int) -> None:
        """Forget who wrote what; ``granule`` is the smallest store of the kernel in bytes."""
        for allocation in self._allocations:
            allocation.writer = None
            allocation.granule = granule

    def split(self, addresses: np.ndarray, size: int, alignment: int) -> list[tuple[Allocation, np.ndarray | slice]]:
        """Group lanes by allocation.

        Args:
            addresses: uint64 [n], n > 0.
            size: bytes each lane touches.
            alignment: bytes every address must divide by.

        Returns:
            (allocation, which of the n) pairs.

        Raises:
            MemoryFault: a lane is outside of every allocation, or misaligned.
        """
        if alignment > 1:
            rest = addresses & np.uint64(alignment - 1)
            if rest.any():
                wrong = int(addresses[rest != 0][0])
                raise MemoryFault(f"misaligned access of {size} bytes to {self.describe(wrong)}")
        low, high = int(addresses.min()), int(addresses.max())
        first = self.at(low)
        if first is not None and high + size <= first.end:
            return [(first, slice(None))]
        owner = np.searchsorted(np.array(self._bases, np.uint64), addresses, side="right") - 1
        groups: list[tuple[Allocation, np.ndarray | slice]] = []
        for index in np.unique(owner):
            chosen = np.nonzero(owner == index)[0]
            mine = addresses[chosen]
            if index < 0:
                raise MemoryFault(f"access of {size} bytes to {self.describe(int(mine[0]))}")
            allocation = self._allocations[index]
            outside = mine + np.uint64(size) > np.uint64(allocation.end)
            if outside.any():
                raise MemoryFault(f"access of {size} bytes to {self.describe(int(mine[outside][0]))}")
            groups.append((allocation, chosen))
        return groups

    def load(
        self, addresses: np.ndarray, size: int, alignment: int, workgroups: np.ndarray | None, check_written: bool
    ) -> np.ndarray:
        """Bytes at ``addresses`` (uint64 [n]) as uint8 [n, size].

        Args:
            workgroups: int32 [n], to look for reads of what another workgroup wrote; None not to.
        """
        result: np.ndarray | None = None
        for allocation, chosen in self.split(addresses, size, alignment):
            offsets = (addresses[chosen] - np.uint64(allocation.base)).astype(np.int64)
            if check_written and allocation.written is not None:
                self._check_written(allocation, offsets, size)
            if workgroups is not None and allocation.writer is not None:
                self._check_writer(allocation, offsets, size, workgroups[chosen], "reads")
            part = take_bytes(allocation.data, offsets, size)
            if isinstance(chosen, slice):
                return part
            if result is None:
                result = np.empty((addresses.size, size), np.uint8)
            result[chosen] = part
        if result is None:
            raise ValueError("addresses: expected at least one")
        return result

    def store(
        self, addresses: np.ndarray, values: np.ndarray, alignment: int, workgroups: np.ndarray | None, atomic: bool
    ) -> None:
        """Write uint8 [n, size] to ``addresses`` (uint64 [n]).

        Raises:
            MemoryFault: outside, misaligned, or read-only.
            GlobalConflict: another workgroup wrote there in this launch.
        """
        size = values.shape[1]
        for allocation, chosen in self.split(addresses, size, alignment):
            if not allocation.writable:
                raise MemoryFault(f"store to read-only {self.describe(int(addresses[chosen][0]))}")
            offsets = (addresses[chosen] - np.uint64(allocation.base)).astype(np.int64)
            if workgroups is not None and not atomic:
                if allocation.writer is None:
                    allocation.writer = np.full(-(-allocation.data.size // allocation.granule), -1, np.int32)
                self._check_writer(allocation, offsets, size, workgroups[chosen], "writes")
                for part in range(0, size, allocation.granule):
                    allocation.writer[(offsets + part) // allocation.granule] = workgroups[chosen]
                # Again, for workgroups that write to one place in this very instruction.
                self._check_writer(allocation, offsets, size, workgroups[chosen], "writes")
            if allocation.written is not None:
                for part in range(size):
                    allocation.written[offsets + part] = True
            put_bytes(allocation.data, offsets, values[chosen])

    def _check_written(self, allocation: Allocation, offsets: np.ndarray, size: int) -> None:
        if allocation.written is None:
            return
        for part in range(size):
            good = allocation.written[offsets + part]
            if not good.all():
                where = int(offsets[~good][0]) + part
                raise UninitialisedRead(f"read of uninitialised memory: {self.describe(allocation.base + where)}")

    def _check_writer(
        self, allocation: Allocation, offsets: np.ndarray, size: int, workgroups: np.ndarray, verb: str
    ) -> None:
        if allocation.writer is None:
            return
        for part in range(0, size, allocation.granule):
            before = allocation.writer[(offsets + part) // allocation.granule]
            wrong = (before >= 0) & (before != workgroups)
            if wrong.any():
                lane = int(np.nonzero(wrong)[0][0])
                where = self.describe(allocation.base + int(offsets[lane]) + part)
                raise GlobalConflict(
                    f"workgroup {workgroups[lane]} {verb} what workgroup {before[lane]} wrote in this launch: {where}"
                )


def take_bytes(data: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, size] from ``data`` (uint8 [m]) at byte ``offsets`` (int64 [n])."""
    if size in UNITS and not (offsets & (size - 1)).any():
        whole = data[: data.size // size * size].view(UNITS[size])
        return whole.take(offsets if size == 1 else offsets // size).view(np.uint8).reshape(-1, size)
    unit = 4 if size % 4 == 0 and not (offsets & 3).any() else 1
    whole = data[: data.size // unit * unit].view(UNITS[unit])
    places = (offsets // unit)[:, None] + np.arange(size // unit)
    return whole.take(places).view(np.uint8).reshape(-1, size)


def put_bytes(data: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> None:
    """Write uint8 [n, size] at byte ``offsets``; of equal offsets the last one stays."""
    size = values.shape[1]
    values = np.ascontiguousarray(values)
    if size in UNITS and not (offsets & (size - 1)).any():
        data[: data.size // size * size].view(UNITS[size])[offsets // size] = values.view(UNITS[size]).reshape(-1)
        return
    unit = 4 if size % 4 == 0 and not (offsets & 3).any() else 1
    places = (offsets // unit)[:, None] + np.arange(size // unit)
    data[: data.size // unit * unit].view(UNITS[unit])[places] = values.view(UNITS[unit]).reshape(-1, size // unit)
