"""The device: memory, launches, and ways to look inside."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from flash_rocm.amdgpu.chips import CHIPS

from .checks import Checks
from .code_object import ARCHS, CodeObject
from .errors import CodeObjectError, NanWritten
from .executable import Step, executable_of
from .machine import SCRATCH_BASE, TTMP, Group, Machine
from .memory import Memory
from .scheduler import Scheduler
from .stats import LaunchStats, Measurements, count_blocks
from .tracking import LdsShadow


@dataclasses.dataclass(frozen=True)
class Registers:
    """What a breakpoint sees: the waves that stand there, copied.

    ``vgprs`` uint32 [register, wave, lane], ``agprs`` likewise, ``sgprs`` uint32 [register, wave] (106 and
    107 are VCC), ``exec`` bool [wave, lane]; ``waves`` lists (workgroup, wave of the workgroup).
    """

    index: int
    text: str
    waves: tuple[tuple[int, int], ...]
    vgprs: np.ndarray
    agprs: np.ndarray
    sgprs: np.ndarray
    exec: np.ndarray


class VirtualGpu:
    """A virtual AMD GPU.

    Args:
        arch: "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1200" or "gfx1201".

    Raises:
        ValueError: another arch.
    """

    def __init__(self, arch: str) -> None:
        if arch not in ARCHS:
            raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch!r}")
        self.arch = arch
        self.memory = Memory()

    def launch(
        self,
        code: CodeObject,
        *,
        grid: tuple[int, int, int],
        block_threads: int | tuple[int, int, int],
        kernargs: bytes | Mapping[str, Any] | Sequence[Any],
        order: str = "lockstep",
        checks: Checks | None = None,
        measure: bool = False,
        trace: TextIO | None = None,
        breakpoints: Mapping[int, Callable[[Registers], None]] | None = None,
        stop_at_nan: bool = False,
        max_wave_instructions: int = 1 << 40,
        max_waves: int = 512,
    ) -> LaunchStats:
        """Run a kernel to the end.

        Args:
            grid: workgroups in x, y, z.
            block_threads: work items of a workgroup, a number or (x, y, z).
            kernargs: see :meth:`CodeObject.pack_arguments`; hidden arguments are filled in.
            order: "lockstep", "forward", "reverse" or "shuffled:SEED", see ``scheduler.phases``.  Run
                a kernel in several: lockstep hides a missing barrier.
            checks: which faults to look for, by default all.
            measure: also count LDS bank conflicts, which costs time.
            trace: a text file that gets a line for each instruction executed.
            breakpoints: index of an instruction to what is called with the registers before it.
            stop_at_nan: raise when a float32 instruction writes a NaN to an active lane.
            max_wave_instructions: raise beyond this.
            max_waves: waves that run at the same time (more need more memory and take fewer steps).

        Raises:
            ValueError: an argument that does not fit the kernel.
            KernelFault: what the kernel did wrong; the message has the instruction.
            UnsupportedInstruction: an instruction that is not implemented was reached.
        """
        if code.arch != self.arch:
            raise CodeObjectError(f"code: expected code for {self.arch}, got {code.arch}")
        lds_limit = CHIPS[self.arch].lds_per_workgroup
        if code.lds_bytes > lds_limit:
            raise CodeObjectError(f"lds_bytes: expected at most the {lds_limit} of {self.arch}, got {code.lds_bytes}")
        block = (block_threads, 1, 1) if isinstance(block_threads, int) else block_threads
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= code.max_threads:
            raise ValueError(f"block_threads: expected 1 to {code.max_threads} for {code.name}, got {block_threads}")
        checks = checks or Checks()
        executable = executable_of(code)
        hooks = _hooks(code, trace, breakpoints, stop_at_nan)
        waves_each = -(-threads // code.descriptor.wave_size)
        total = grid[0] * grid[1] * grid[2]
        each = max(max_waves // waves_each, 1)
        random = np.random.default_rng(checks.poison_seed)
        arguments = np.frombuffer(_with_hidden(code, code.pack_arguments(kernargs), grid, block), np.uint8).copy()
        self.memory.begin_launch(executable.store_granule)
        measured = Measurements() if measure else None
        address = self.memory.add("kernarg", arguments if arguments.size else np.zeros(4, np.uint8), writable=False)
        packet = self.memory.add("dispatch packet", _dispatch_packet(code, grid, block, address), writable=False)
        executed, runs = 0, dict[int, int]()
        try:
            for first in range(0, total, each):
                numbers = np.arange(first, min(first + each, total), dtype=np.int32)
                machine = Machine(code, self.memory, checks, numbers.size, waves_each, random)
                machine.measured = measured
                _start(machine, numbers, grid, block, address, packet, arguments)
                if (checks.races or checks.lds) and code.lds_bytes:
                    machine.shadow = LdsShadow(
                        numbers.size, machine.lds_stride, executable.lds_granule, waves_each, checks.races, checks.lds
                    )
                executed += Scheduler(machine, executable, order, hooks, max_wave_instructions - executed, runs).run()
        finally:
            self.memory.remove("kernarg")
            self.memory.remove("dispatch packet")
        return LaunchStats(
            per_instruction=count_blocks(executable, runs),
            program=code.program,
            wave_instructions=executed,
            waves=total * waves_each,
            workgroups=total,
            wave_size=code.descriptor.wave_size,
            measured=measured,
        )


def _with_hidden(code: CodeObject, packed: bytearray, grid: tuple[int, int, int], block: tuple[int, ...]) -> bytearray:
    """Fill in the hidden arguments; those for printf, heaps and queues are zero."""
    for axis, letter in enumerate("xyz"):
        values = {
            f"hidden_block_count_{letter}": grid[axis],
            f"hidden_group_size_{letter}": block[axis],
            f"hidden_remainder_{letter}": 0,
        }
        for argument in code.arguments:
            if argument.kind in values:
                number = values[argument.kind].to_bytes(argument.size, "little")
                packed[argument.offset : argument.offset + argument.size] = number
    for argument in code.arguments:
        if argument.kind == "hidden_grid_dims":
            dims = 3 if grid[2] * block[2] > 1 else 2 if grid[1] * block[1] > 1 else 1
            packed[argument.offset : argument.offset + argument.size] = dims.to_bytes(argument.size, "little")
    return packed


def _dispatch_packet(code: CodeObject, grid: tuple[int, int, int], block: tuple[int, ...], kernarg: int) -> np.ndarray:
    """The AQL packet of the launch (HSA Platform System Architecture, "Kernel dispatch packet")."""
    items = [count * size for count, size in zip(grid, block, strict=True)]
    sizes = (code.descriptor.scratch_bytes, code.lds_bytes)
    return np.frombuffer(struct.pack("<HHHHHHIIIIIQQQQ", 2, 3, *block, 0, *items, *sizes, 0, kernarg, 0, 0), np.uint8)


def _start(
    machine: Machine,
    numbers: np.ndarray,
    grid: tuple[int, int, int],
    block: tuple[int, ...],
    kernarg: int,
    packet: int,
    arguments: np.ndarray,
) -> None:
    """Registers as the hardware sets them up (AMDGPUUsage, "Initial Kernel Execution State")."""
    descriptor, lanes = machine.code.descriptor, machine.lanes
    machine.workgroup_number = np.repeat(numbers, machine.waves_each)
    defined: list[int] = []
    row = 0

    def put(*values: Any) -> None:
        nonlocal row
        for value in values:
            machine.S[row] = value
            defined.append(row)
            row += 1

    for what, count in descriptor.user_order:
        if what == "kernarg_segment_ptr":
            put(kernarg & 0xFFFFFFFF, kernarg >> 32)
        elif what == "dispatch_ptr":
            put(packet & 0xFFFFFFFF, packet >> 32)
        elif what == "private_segment_buffer":
            put(SCRATCH_BASE & 0xFFFFFFFF, SCRATCH_BASE >> 32, 0xFFFFFFFF, 0)
        elif what in ("flat_scratch_init", "private_segment_size", "dispatch_id"):
            put(*[0] * count)
        else:
            # The queue is the runtime's own: a kernel that looks at it is told that nothing is there.
            row += count
    length, offset = descriptor.preload
    words = np.zeros(length, np.uint32)
    available = np.ascontiguousarray(arguments[: arguments.size // 4 * 4]).view(np.uint32)[offset : offset + length]
    words[: available.size] = available
    put(*words)
    row = descriptor.user_sgprs
    coordinates = numbers % grid[0], numbers // grid[0] % grid[1], numbers // (grid[0] * grid[1])
    waves = [np.repeat(axis, machine.waves_each).astype(np.uint32) for axis in coordinates]
    if machine.code.arch.startswith("gfx12"):
        machine.S[TTMP + 9], machine.S[TTMP + 7] = waves[0], waves[1] | waves[2] << np.uint32(16)
        machine.S[TTMP + 8] = machine.local_wave.astype(np.uint32) << np.uint32(25)
        defined += [TTMP + 7, TTMP + 8, TTMP + 9]
    else:
        for axis in range(3):
            if descriptor.workgroup_ids[axis]:
                put(waves[axis])
        if descriptor.private_segment and not machine.code.arch.startswith(("gfx94", "gfx95", "gfx11")):
            put(0)
    item = np.arange(machine.waves_each * lanes, dtype=np.uint32)
    x, y, z = item % block[0], item // block[0] % block[1], item // (block[0] * block[1])
    packed = x | (y << 10 if descriptor.workitem_ids >= 1 else 0) | (z << 20 if descriptor.workitem_ids >= 2 else 0)
    machine.V[0] = np.tile(packed.reshape(machine.waves_each, lanes), (machine.workgroups, 1))
    active = (item < block[0] * block[1] * block[2]).reshape(machine.waves_each, lanes)
    machine.exec[:] = np.tile(active, (machine.workgroups, 1))
    machine.full[:] = machine.exec.all(axis=1)
    everyone = Group(machine, np.arange(machine.waves))
    everyone.put_lanes(126, machine.exec)
    if machine.tracker is not None:
        machine.tracker.vgprs = descriptor.vgprs
        if machine.checks.registers:
            machine.tracker.expect_defined(defined, [0])


def _hooks(
    code: CodeObject,
    trace: TextIO | None,
    breakpoints: Mapping[int, Callable[[Registers], None]] | None,
    stop_at_nan: bool,
) -> tuple[Callable[[Group, Step], None], Callable[[Group, Step], None]] | None:
    if trace is None and not breakpoints and not stop_at_nan:
        return None
    stops = dict(breakpoints or {})

    def before(group: Group, step: Step) -> None:
        if trace is not None:
            first = group.where()[0]
            trace.write(f"{step.index:6d} waves={group.n:<4d} first={first[0]}.{first[1]} {step.text}\n")
        if step.index in stops:
            stops[step.index](_registers(code, group, step))

    def after(group: Group, step: Step) -> None:
        if not stop_at_nan:
            return
        for row in step.float_rows:
            wrong = np.isnan(group.F[row]) & group.mask
            if wrong.any():
                wave, lane = (int(x[0]) for x in np.nonzero(wrong))
                raise NanWritten(f"NaN written to v{row}, lane {lane} of wave {group.index[wave]} of the batch")

    return before, after


def _registers(code: CodeObject, group: Group, step: Step) -> Registers:
    vgprs = code.descriptor.vgprs
    machine = group.m
    waves = tuple((int(machine.workgroup_number[i]), int(machine.local_wave[i])) for i in group.index)
    return Registers(
        step.index,
        step.text,
        waves,
        np.array(machine.V[:vgprs, group.index]),
        np.array(machine.V[vgprs:, group.index]),
        np.array(machine.S[:, group.index]),
        np.array(machine.exec[group.index]),
    )
