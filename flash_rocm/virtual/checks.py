"""Which faults a launch looks for, and what it measures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Checks:
    """Checks that hardware does not make, all on by default.

    Attributes:
        waits: a loaded register or LDS word is used before its s_waitcnt.
        barrier_waits: LDS is touched after a barrier that the wave which wrote it entered without waiting for that;
            needs ``races``.
        registers: a register is read that nothing has written.
        lds: LDS is read that nothing has written.
        memory: memory added with ``initialised=False`` is read before it is written.
        races: LDS races between the waves of a workgroup between two barriers.
        conflicts: two workgroups touch the same memory and one writes, without atomics.
        barriers: waves of a workgroup wait at different barriers, or for a wave that has ended.
        alignment: an access is not aligned to its size (a dword for the wider ones).
        poison_seed: fills registers and LDS with random bits before the launch.

    Out-of-bounds accesses always raise: there is nothing they could return.
    """

    waits: bool = True
    barrier_waits: bool = True
    registers: bool = True
    lds: bool = True
    memory: bool = True
    races: bool = True
    conflicts: bool = True
    barriers: bool = True
    alignment: bool = True
    poison_seed: int = 0

    @classmethod
    def none(cls) -> Checks:
        """Only what the hardware does, for speed."""
        return cls(**{field.name: False for field in dataclasses.fields(cls) if field.type == "bool"})
