"""Bookkeeping for the checks: loads in flight, undefined registers, LDS races.

Registers are bits of one Python int (see ``machine.S_BIT``), so that the usual case, an instruction that
touches no register under suspicion, costs one AND.  Only where that is not zero are the waves looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import LdsRace, MissingWait, UninitialisedRead
from .memory import put_bytes, take_bytes

_S_BIT = 512
_S_ROWS = 134
#: SCC, NULL, EXEC, VCC-like rows that always hold something.
_ALWAYS_DEFINED = (125, 126, 127, 128)


def bits_of(mask: int) -> list[int]:
    """Numbers of the bits set."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def register_name(bit: int, vgprs: int) -> str:
    """The name of a register by its bit."""
    if bit >= _S_BIT:
        return {106: "vcc_lo", 107: "vcc_hi", 124: "m0"}.get(bit - _S_BIT, f"s{bit - _S_BIT}")
    return f"v{bit}" if bit < vgprs else f"a{bit - vgprs}"


class Tracker:
    """Loads in flight per counter ("vm", "vs", "ds", "sm"), and registers nothing has written.

    Each wave numbers what it issues on a counter; ``ready`` is the number of the load a register waits
    for, ``done`` the last number a wait has covered.  What returns out of order (SMEM) is only
    covered by a wait for zero.
    """

    COUNTERS = ("vm", "vs", "ds", "sm")
    #: The most that CDNA's counters can hold: what would be one more is not issued before the oldest has returned.
    MOST_IN_FLIGHT = {"vm": 63, "ds": 15}

    def __init__(self, waves: int, rows: int, gfx9: bool) -> None:
        self.rows = rows
        self.vgprs = rows
        self.most = self.MOST_IN_FLIGHT if gfx9 else {}
        size = _S_BIT + _S_ROWS
        self.issued = {c: np.zeros(waves, np.int32) for c in self.COUNTERS}
        self.done = {c: np.zeros(waves, np.int32) for c in self.COUNTERS}
        self.ready = {c: np.zeros((size, waves), np.int32) for c in self.COUNTERS}
        self.pending = dict.fromkeys(self.COUNTERS, 0)
        self.last_lds_write = np.zeros(waves, np.int32)
        #: Since they entered a barrier, until it lets them go.
        self.late = np.zeros(waves, bool)
        self.defined = np.zeros((size, waves), bool)
        self.undefined = 0
        self.watch = 0

    def expect_defined(self, defined_sgprs: list[int], defined_vgprs: list[int]) -> None:
        """From now on, report reads of registers that are not among these rows and not written since."""
        always = [*defined_vgprs, *(_S_BIT + row for row in (*defined_sgprs, *_ALWAYS_DEFINED))]
        self.defined[always] = True
        everything = [*range(self.rows), *range(_S_BIT, _S_BIT + _S_ROWS)]
        self.undefined = sum(1 << bit for bit in set(everything) - set(always))
        self._update()

    def _update(self) -> None:
        watch = self.undefined
        for mask in self.pending.values():
            watch |= mask
        self.watch = watch

    def before(self, group: Any, step: Any) -> None:
        """Check one instruction (a ``Step``) that touches a register under suspicion."""
        self._check_pending(group, step.reads, step.writes, step.counter)
        if self.undefined & (step.needs | step.writes):
            if step.parts:
                # All sources are read before the first result is written.
                found = [(writes, self._missing(group, reads, False)) for reads, writes in step.parts]
                for writes, missing in found:
                    self._define(group, writes, missing)
            else:
                self._define(group, step.writes, self._missing(group, step.needs, step.sink))
            self._update()

    def before_condition(self, group: Any, reads: int) -> None:
        """Check what a branch depends on."""
        self._check_pending(group, reads, 0, None)
        self._missing(group, reads, True)

    def _check_pending(self, group: Any, reads: int, writes: int, counter: str | None) -> None:
        for name, mask in self.pending.items():
            # Loads of one counter return in order and may write the same register.
            touched = mask & (reads if name == counter else reads | writes)
            if touched:
                bits = bits_of(touched)
                late = self.ready[name][bits][:, group.sel] > self.done[name][group.sel]
                if late.any():
                    bit = bits[int(np.nonzero(late.any(axis=1))[0][0])]
                    raise MissingWait(f"{register_name(bit, self.vgprs)} is used before the wait for its load ({name})")

    def _missing(self, group: Any, reads: int, sink: bool) -> Any:
        """Which waves lack a source, as results of undefined sources are undefined; a sink must not lack any.

        A sink is where undefined values do harm: addresses, stored data, conditions.  Anything else only
        hands them on, as compilers let instructions compute with parts that are never used.
        """
        missing: Any = np.zeros(1, bool)
        sources = self.undefined & reads
        if sources:
            bits = bits_of(sources)
            lacking = ~self.defined[bits][:, group.sel]
            missing = lacking.any(axis=0)
            if sink and missing.any():
                bit = bits[int(np.nonzero(lacking.any(axis=1))[0][0])]
                raise UninitialisedRead(f"{register_name(bit, self.vgprs)} is used, and nothing has given it a value")
        return missing

    def _define(self, group: Any, writes: int, missing: Any) -> None:
        """Note that registers are written, of undefined sources in the waves that are missing one."""
        spread = bool(missing.any())
        for bit in bits_of(writes if spread else self.undefined & writes):
            self.defined[bit, group.sel] = ~missing
            if self.defined[bit].all():
                self.undefined &= ~(1 << bit)
            else:
                self.undefined |= 1 << bit

    def issue(self, group: Any, counter: str, registers: list[int], mask: int) -> None:
        """Count one memory instruction; ``registers`` (bits, also as ``mask``) are what it loads."""
        issued = self.issued[counter]
        issued[group.sel] += 1
        now = issued[group.sel]
        if counter in self.most:
            done = self.done[counter]
            done[group.sel] = np.maximum(done[group.sel], now - self.most[counter])
        if registers:
            ready = self.ready[counter]
            for bit in registers:
                ready[bit, group.sel] = now
            self.pending[counter] |= mask
            self.watch |= mask

    def wait(self, group: Any, counter: str, outstanding: int) -> None:
        """At most ``outstanding`` of the counter are left."""
        done = self.done[counter]
        if counter == "sm" and outstanding:
            return
        done[group.sel] = np.maximum(done[group.sel], self.issued[counter][group.sel] - outstanding)
        if self.pending[counter]:
            bits = bits_of(self.pending[counter])
            left = np.asarray((self.ready[counter][bits] > done).any(axis=1)).tolist()
            self.pending[counter] = sum(1 << bits[i] for i in range(len(bits)) if left[i])
            self._update()

    def enter_barrier(self, group: Any) -> None:
        """Note which waves enter a barrier before they have waited for their LDS writes."""
        self.late[group.sel] |= self.last_lds_write[group.sel] > self.done["ds"][group.sel]


#: Words that hold several granules' states at once, by bytes.
_WIDE: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class LdsShadow:
    """Who read and wrote each granule of LDS since the last barrier, and whether it was ever written.

    ``state`` has a word per granule: a bit per wave that wrote it since the barrier, and the highest bit once
    anything was written.  ``readers`` has a byte per wave of the batch and granule.  A granule is the
    smallest LDS store of the kernel, so that neighbours do not clash.
    """

    def __init__(self, workgroups: int, stride: int, granule: int, waves_each: int, races: bool, written: bool) -> None:
        self.granule, self.races, self.written, self.waves_each = granule, races, written, waves_each
        self.dtype = np.dtype(np.uint16 if waves_each <= 15 else np.uint32 if waves_each <= 31 else np.uint64)
        self.bits = self.dtype.itemsize * 8
        # 32 waves share the 63 bits beside the highest one with room to spare.
        self.ever = 1 << (self.bits - 1)
        self.per_workgroup = stride // granule
        self.state = np.zeros(workgroups * self.per_workgroup, self.dtype)
        self.readers = np.zeros(workgroups * waves_each * self.per_workgroup, np.uint8)
        self.read_since = np.zeros(workgroups, bool)
        # Loads from memory to LDS in flight: number of the load, and its wave, per granule.
        self.landing: np.ndarray | None = None
        self.landing_wave: np.ndarray | None = None
        # A bit per wave that changed a granule by an atomic since the barrier.
        self.atomics: np.ndarray | None = None
        # A bit per wave that passed the last barrier with LDS writes under way.
        self.late = np.zeros(workgroups, self.dtype)

    def _units(self, places: np.ndarray, size: int) -> np.ndarray:
        """Granules of accesses of ``size`` bytes at bytes ``places``: int64 [n, granules]."""
        first = places // self.granule
        count = max(size // self.granule, 1)
        return first[:, None] + np.arange(count) if count > 1 else first[:, None]

    def read(self, group: Any, places: np.ndarray, size: int) -> None:
        """Note a read; ``places``: int64 [n], byte in the LDS of the batch for each active lane."""
        if self.landing is not None:
            self._check_landing(group, self._units(places, size))
        self._check_atomics(group, places, size, "reads")
        count = max(size // self.granule, 1)
        word = self.dtype.itemsize * count
        base = group.active_lanes(group.reader_base(self.per_workgroup))
        if word not in _WIDE or (count > 1 and (places & (size - 1)).any()):
            self._read_slowly(group, places, size, base)
            return
        # All granules of an access in one word.
        place = places // size if count > 1 else places // self.granule
        found = self.state.view(_WIDE[word]).take(place)
        every = sum(self.ever << (self.bits * i) for i in range(count))
        if self.written and int(np.bitwise_and.reduce(found)) & every != every:
            self._read_slowly(group, places, size, base)
        if self.races:
            if int(np.bitwise_or.reduce(found)) & ~every:
                self._read_slowly(group, places, size, base)
            flags = _WIDE[count](int.from_bytes(bytes([1]) * count, "little"))
            self.readers.view(_WIDE[count])[base // count + place] = flags
            self.read_since[group.m.workgroup[group.sel]] = True

    def _read_slowly(self, group: Any, places: np.ndarray, size: int, base: np.ndarray) -> None:
        units, kind = self._units(places, size), self.dtype.type
        found = self.state[units]
        self._check_written(found, units)
        if not self.races:
            return
        waves = group.active_lanes(group.m.local_wave[group.sel][:, None])
        own = (np.uint64(1) << waves.astype(np.uint64)).astype(self.dtype)[:, None]
        clash = found & kind(self.ever - 1) & ~own
        # A wave that wrote the same bytes itself knows what it reads, see write().
        clash[found & own != 0] = 0
        if clash.any():
            lane, part = (int(x[0]) for x in np.nonzero(clash))
            self._report(int(waves[lane]), int(units[lane, part]), "reads", bits_of(int(clash[lane, part]))[0], "wrote")
        self.readers[base[:, None] + units] = 1
        self.read_since[group.m.workgroup[group.sel]] = True

    def _check_written(self, found: np.ndarray, units: np.ndarray) -> None:
        missing = found < self.dtype.type(self.ever)
        if self.written and missing.any():
            where = int(units[missing][0]) % self.per_workgroup * self.granule
            raise UninitialisedRead(f"read of LDS byte {where}, which nothing has written")

    def atomic(self, group: Any, places: np.ndarray, size: int) -> None:
        """Note atomics, which race with what other waves read and write, and not with their atomics."""
        units = self._units(places, size)
        self._check_landing(group, units)
        self._check_written(self.state[units], units)
        if not self.races:
            return
        if self.atomics is None:
            self.atomics = np.zeros_like(self.state)
        waves = group.active_lanes(group.m.local_wave[group.sel][:, None])
        for wave in np.unique(waves):
            mine, own = units[waves == wave], self.dtype.type(1 << int(wave))
            self._check_write(int(wave), mine, self.state[mine] & ~(own | self.dtype.type(self.ever)))
            self.atomics[mine] |= own

    def _check_atomics(self, group: Any, places: np.ndarray, size: int, does: str) -> None:
        if self.atomics is None:
            return
        units = self._units(places, size)
        waves = group.active_lanes(group.m.local_wave[group.sel][:, None])
        own = (np.uint64(1) << waves.astype(np.uint64)).astype(self.dtype)[:, None]
        clash = self.atomics[units] & ~own
        if clash.any():
            lane, part = (int(x[0]) for x in np.nonzero(clash))
            other = bits_of(int(clash[lane, part]))[0]
            self._report(int(waves[lane]), int(units[lane, part]), does, other, "changed")

    def write(self, group: Any, places: np.ndarray, data: np.ndarray, lds: np.ndarray) -> None:
        """Write uint8 [n, size] to ``lds``, wave after wave, noting it.

        A wave that writes what is there already does not race: layouts that repeat a value in several
        waves let each of them store it.
        """
        size, kind = data.shape[1], self.dtype.type
        self._check_atomics(group, places, size, "writes")
        if self._write_at_once(group, places, size):
            put_bytes(lds, places, data)
            return
        units = self._units(places, size)
        waves = group.active_lanes(group.m.local_wave[group.sel][:, None])
        present = np.unique(group.m.local_wave[group.sel])
        read_before = self.races and bool(self.read_since[group.m.workgroup[group.sel]].any())
        for wave in present:
            chosen = slice(None) if present.size == 1 else waves == wave
            mine, values, where = units[chosen], data[chosen], places[chosen]
            own = kind(1 << int(wave))
            before = self.state[mine]
            if self.races:
                clash = before & ~(own | kind(self.ever))
                if clash.any() or read_before:
                    changed = (take_bytes(lds, where, size) != values).any(axis=1)
                    self._check_write(int(wave), mine[changed], clash[changed])
            self.state[mine] = before | (own | kind(self.ever))
            put_bytes(lds, where, values)

    def _write_at_once(self, group: Any, places: np.ndarray, size: int) -> bool:
        """Note a write of all waves together; False (and nothing noted) where one needs a closer look."""
        count = max(size // self.granule, 1)
        word = self.dtype.itemsize * count
        if word not in _WIDE or (count > 1 and (places & (size - 1)).any()):
            return False
        if self.races and self.read_since[group.m.workgroup[group.sel]].any():
            return False
        place = places // size if count > 1 else places // self.granule
        view = self.state.view(_WIDE[word])
        found = view.take(place)
        every = sum(self.ever << (self.bits * i) for i in range(count))
        if self.races and int(np.bitwise_or.reduce(found)) & ~every:
            return False
        repeat = sum(1 << (self.bits * i) for i in range(count))
        own = (np.uint64(1) << group.m.local_wave[group.sel].astype(np.uint64)).astype(_WIDE[word])
        noted = found | group.active_lanes((own * _WIDE[word](repeat) | _WIDE[word](every))[:, None])
        view[place] = noted
        if (view.take(place) == noted).all():
            return True
        # Two waves at one place.
        view[place] = found
        return False

    def _check_write(self, wave: int, units: np.ndarray, clash: np.ndarray) -> None:
        if clash.any():
            first = tuple(int(x[0]) for x in np.nonzero(clash))
            self._report(wave, int(units[first]), "writes", bits_of(int(clash[first]))[0], "wrote")
        workgroup = units // self.per_workgroup
        base = units + workgroup * (self.waves_each - 1) * self.per_workgroup
        for other in range(self.waves_each):
            if other == wave or not units.size:
                continue
            seen = self.readers[base + other * self.per_workgroup]
            if seen.any():
                self._report(wave, int(units[seen != 0][0]), "writes", other, "read")

    def _report(self, wave: int, unit: int, does: str, other: int, did: str) -> None:
        workgroup, place = divmod(unit, self.per_workgroup)
        what = f"wave {wave} {does} LDS byte {place * self.granule} of workgroup {workgroup} of the batch, which"
        if did != "read" and int(self.late[workgroup]) >> other & 1:
            raise MissingWait(f"{what} wave {other} {did} before the last barrier without waiting for it, or since")
        raise LdsRace(f"{what} wave {other} {did} since the last barrier")

    def barrier(self, workgroups: np.ndarray, late: np.ndarray | None) -> None:
        """These workgroups have passed a barrier.

        Args:
            late: bool [workgroups of the batch, waves_each], waves whose LDS writes it does not separate from what
                follows: all since the barrier before, as it is not known which of them have ended.
        """
        kept = self.state.reshape(-1, self.per_workgroup)
        bits = np.uint64(1) << np.arange(self.waves_each, dtype=np.uint64)
        self.late[workgroups] = 0 if late is None else (late[workgroups] * bits).sum(1, dtype=np.uint64)
        stay = self.late[workgroups]
        kept[workgroups] &= (stay | self.dtype.type(self.ever))[:, None]
        if self.atomics is not None:
            self.atomics.reshape(-1, self.per_workgroup)[workgroups] &= stay[:, None]
        readers = self.readers.reshape(-1, self.waves_each * self.per_workgroup)
        readers[workgroups[self.read_since[workgroups]]] = 0
        self.read_since[workgroups] = False

    def landed_by_load(self, waves: np.ndarray, places: np.ndarray, size: int, numbers: np.ndarray) -> None:
        """Loads from memory write here once their vmcnt wait is over.

        Args:
            waves: int [n], wave of the batch.
            numbers: int32 [n], number of the load on the wave's counter.
        """
        if self.landing is None or self.landing_wave is None:
            self.landing = np.zeros(self.state.size, np.int32)
            self.landing_wave = np.zeros(self.state.size, np.int32)
        units = self._units(places, size)
        self.landing[units] = numbers[:, None]
        self.landing_wave[units] = waves[:, None]

    def _check_landing(self, group: Any, units: np.ndarray) -> None:
        if self.landing is None or self.landing_wave is None or group.m.tracker is None:
            return
        done = group.m.tracker.done["vm"]
        late = self.landing[units] > done[self.landing_wave[units]]
        if late.any():
            where = int(units[late][0]) % self.per_workgroup * self.granule
            raise MissingWait(f"LDS byte {where} is read before the wait for the load that writes it (vm)")
