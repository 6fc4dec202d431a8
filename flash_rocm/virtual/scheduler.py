"""Running a batch of workgroups: which waves go next, branches, barriers.

Waves of one workgroup run up to their next barrier or end in the order that the launch asks for; waves of
different workgroups that play the same part run together.  Among the waves allowed to run, those with the
lowest program counter go first, so that waves which took different ways meet again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import BarrierDivergence, InstructionLimit, KernelFault, UnsupportedInstruction
from .executable import Block, Executable, Step
from .machine import AT_BARRIER, ENDED, RUNNING, Group, Machine

#: Called before each instruction: (group, index, text).
Hook = Callable[[Group, Step], None]


def phases(order: str) -> Callable[[int], list[list[int]]]:
    """Function from the number of waves of a workgroup to sets of waves that run one after the other.

    Called anew between any two barriers.  ``lockstep``: all together; ``forward``/``reverse``: one wave
    as far as it goes, then the next; ``shuffled:SEED``: random sets in random order.

    Raises:
        ValueError: any other order.
    """
    if order == "lockstep":
        return lambda waves: [list(range(waves))]
    if order == "forward":
        return lambda waves: [[wave] for wave in range(waves)]
    if order == "reverse":
        return lambda waves: [[wave] for wave in reversed(range(waves))]
    name, _, seed = order.partition(":")
    if name == "shuffled" and seed.lstrip("-").isdigit():
        source = random.Random(int(seed))

        def shuffled(waves: int) -> list[list[int]]:
            members = source.sample(range(waves), waves)
            sets: list[list[int]] = []
            while members:
                count = source.randint(1, len(members))
                sets.append(sorted(members[:count]))
                members = members[count:]
            return sets

        return shuffled
    raise ValueError(f"order: expected lockstep, forward, reverse or shuffled:SEED, got {order!r}")


class Scheduler:
    """Runs one machine to the end."""

    def __init__(
        self,
        machine: Machine,
        executable: Executable,
        order: str,
        hooks: tuple[Any, Any] | None,
        limit: int,
        runs: dict[int, int],
    ) -> None:
        """``runs`` counts wave executions of blocks by their start; ``limit``: wave-instructions allowed."""
        self.m, self.executable = machine, executable
        self.phases = phases(order)
        self.hooks = hooks
        self.limit, self.runs = limit, runs
        self.executed = 0
        self._groups: dict[bytes, Group] = {}

    def run(self) -> int:
        """All waves to their ends; the number of wave-instructions."""
        m = self.m
        # Overflow and NaN are results here, as they are on the chip.
        with np.errstate(all="ignore"):
            while (m.status == RUNNING).any():
                for members in self.phases(m.waves_each):
                    allowed = np.isin(m.local_wave, members)
                    while self._step(allowed):
                        pass
                self._release_barriers()
        return self.executed

    def _step(self, allowed: np.ndarray) -> bool:
        """Run the lowest waves until they stop, split, or catch up with others."""
        m = self.m
        waves = np.nonzero(allowed & (m.status == RUNNING))[0]
        if waves.size == 0:
            return False
        pcs = m.pc[waves]
        pc = int(pcs.min())
        here = pcs == pc
        others = pcs[~here]
        stop = int(others.min()) if others.size else 1 << 30
        group = self._group(waves[here])
        while pc < stop:
            block = self.executable.block(pc)
            following = self._run_block(group, block)
            if following is None:
                return True
            pc = following
        m.pc[group.sel] = pc
        return True

    def _group(self, waves: np.ndarray) -> Group:
        key = waves.tobytes()
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) > 256:
                self._groups.clear()
            group = self._groups[key] = Group(self.m, waves)
        else:
            group.refresh()
        return group

    def _run_block(self, group: Group, block: Block) -> int | None:
        """Where all waves of the group go next; None where they stopped or parted."""
        tracker = self.m.tracker
        step: Step | None = None
        self.runs[block.start] = self.runs.get(block.start, 0) + group.n
        self.executed += group.n * (len(block.steps) + (block.end != "fall"))
        if self.executed > self.limit:
            raise InstructionLimit(f"more than {self.limit} wave-instructions")
        try:
            if self.hooks is not None:
                self._run_watched(group, block, self.hooks)
            elif tracker is None:
                for run, _, step in block.steps:  # noqa: B007
                    run(group)
            else:
                for run, touched, step in block.steps:
                    if tracker.watch & touched:
                        tracker.before(group, step)
                    run(group)
            step = None
            return self._finish(group, block)
        except KernelFault as fault:
            index, text = (step.index, step.text) if step is not None else (block.next - 1, block.text)
            fault.locate(index, text, group.where())
            raise
        except UnsupportedInstruction as error:
            if step is None:
                raise
            raise UnsupportedInstruction(f"{error} [instruction {step.index}: {step.text!r}]") from error

    def _run_watched(self, group: Group, block: Block, hooks: tuple[Any, Any]) -> None:
        before, after = hooks
        tracker = self.m.tracker
        for run, touched, step in block.steps:
            before(group, step)
            try:
                if tracker is not None and tracker.watch & touched:
                    tracker.before(group, step)
                run(group)
                after(group, step)
            except KernelFault as fault:
                fault.locate(step.index, step.text, group.where())
                raise

    def _finish(self, group: Group, block: Block) -> int | None:
        m = self.m
        if block.end == "fall":
            return block.next
        if block.end == "branch":
            if block.condition is None:
                return block.target
            if m.tracker is not None and m.tracker.watch & block.condition_reads:
                m.tracker.before_condition(group, block.condition_reads)
            taken = block.condition(group)
            if taken.all():
                return block.target
            if not taken.any():
                return block.next
            m.pc[group.sel] = np.where(taken, block.target, block.next)
            return None
        if block.end == "barrier":
            group.enter_barrier()
            m.status[group.sel] = AT_BARRIER
            m.pc[group.sel] = block.next
            return None
        m.status[group.sel] = ENDED
        return None

    def _release_barriers(self) -> None:
        """Every wave stands at a barrier or has ended: let the barriers go."""
        m = self.m
        status = m.status.reshape(m.workgroups, m.waves_each)
        waiting = (status == AT_BARRIER).any(axis=1)
        if not waiting.any():
            return
        if m.checks.barriers:
            self._check_divergence(status, waiting)
        if m.shadow is not None:
            late = None if m.tracker is None else m.tracker.late.reshape(status.shape)
            m.shadow.barrier(np.nonzero(waiting)[0], late)
        if m.tracker is not None:
            m.tracker.late[m.status == AT_BARRIER] = False
        m.status[m.status == AT_BARRIER] = RUNNING

    def _check_divergence(self, status: np.ndarray, waiting: np.ndarray) -> None:
        m = self.m
        pcs = m.pc.reshape(m.workgroups, m.waves_each)
        for workgroup in np.nonzero(waiting & ((status == ENDED).any(axis=1) | (pcs != pcs[:, :1]).any(axis=1)))[0]:
            number = int(m.workgroup_number[workgroup * m.waves_each])
            states = ", ".join(
                f"wave {wave} {'has ended' if state == ENDED else f'waits at instruction {pc - 1}'}"
                for wave, (state, pc) in enumerate(zip(status[workgroup], pcs[workgroup], strict=True))
            )
            raise BarrierDivergence(f"the waves of workgroup {number} do not meet at one barrier: {states}")
