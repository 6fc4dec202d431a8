"""A program compiled for one launch: basic blocks of closures, made when first reached."""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from flash_rocm.amdgpu.assembly import Instruction

from . import (
    buffer_ops,
    division_ops,
    float_ops,
    global_ops,
    lds_ops,
    matrix_ops,
    packed_ops,
    rdna_ops,
    scalar_ops,
    vector_ops,
)
from .builder import Builder, Handler
from .code_object import CodeObject, Descriptor
from .errors import UnsupportedInstruction
from .lane_data import smallest_store
from .machine import EXEC, S_BIT, SCC, VCC, Group
from .registry import ALIASES, FACTORIES, base_name
from .scalar_ops import CACHE_CONTROL

#: Modules that fill the table of instructions.
TABLES = (
    buffer_ops,
    division_ops,
    float_ops,
    global_ops,
    lds_ops,
    matrix_ops,
    packed_ops,
    rdna_ops,
    scalar_ops,
    vector_ops,
)

Condition = Callable[[Group], np.ndarray]
_BARRIERS = ("s_barrier", "s_barrier_wait")
_ENDS = ("s_endpgm", "s_branch", *_BARRIERS)
_SET_MODE = "s_setreg_imm32_b32"
#: Bits 4 and 5 of MODE are about denormals of float32: 0 flushes, 3 keeps them.  LLVM turns them on for a division.
#: Bits 2 and 3 are the rounding of float16: 0, to nearest even, is what a kernel starts with.
_MODES = re.compile(r"hwreg\(HW_REG_MODE, (?:4, 2\), ([03])|2, 2\), 0)$")
_CONDITIONAL = tuple(f"s_cbranch_{test}" for test in ("scc0", "scc1", "vccz", "vccnz", "execz", "execnz"))


@dataclasses.dataclass(slots=True)
class Step:
    """One instruction that does not change the program counter."""

    run: Handler
    index: int
    text: str
    reads: int
    needs: int  # those of reads that matter if undefined
    writes: int
    counter: str | None
    sink: bool  # undefined sources do harm
    float_rows: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()  # (reads, writes) of results that are undefined one by one


@dataclasses.dataclass(slots=True)
class Block:
    """Instructions up to the next branch, barrier, end or branch target.

    ``end``: "fall", "branch", "barrier" or "end".  A branch goes to ``target``, everywhere if
    ``condition`` is None.
    """

    start: int
    steps: list[tuple[Handler, int, Step]]
    end: str
    next: int  # index behind the block
    target: int = -1
    condition: Condition | None = None
    condition_reads: int = 0
    text: str = ""


class Executable:
    """Compiled blocks of a code object, which all its launches share; see :func:`executable_of`."""

    def __init__(self, code: CodeObject) -> None:
        # Not the code object itself: it would keep itself alive, as the key of its executable.
        self.arch, self.descriptor, self.targets = code.arch, code.descriptor, code.program.targets
        self.instructions = code.program.instructions
        self.leaders = set(self.targets.values())
        self.blocks: dict[int, Block] = {}
        names = {instruction.mnemonic for instruction in self.instructions}
        self.lds_granule = lds_ops.smallest_write(names)
        self.store_granule = smallest_store(names)

    def block(self, start: int) -> Block:
        """The block that starts at an instruction."""
        found = self.blocks.get(start)
        if found is None:
            found = self.blocks[start] = self._compile_block(start)
        return found

    def _compile_block(self, start: int) -> Block:
        steps: list[tuple[Handler, int, Step]] = []
        index, descriptor = start, self.descriptor
        while index < len(self.instructions):
            instruction = self.instructions[index]
            name = base_name(instruction.mnemonic)
            if name in _ENDS or name in _CONDITIONAL:
                self._expect_mode(descriptor, instruction)
                return self._end_block(Block(start, steps, "", index + 1, text=instruction.text), index, name)
            if name == _SET_MODE:
                descriptor = _in_mode(descriptor, instruction)
            step = self._compile_step(instruction, index, descriptor)
            steps.append((step.run, step.reads | step.writes, step))
            index += 1
            if index in self.leaders:
                self._expect_mode(descriptor, instruction)
                return Block(start, steps, "fall", index)
        raise UnsupportedInstruction("the program runs past its end")

    def _expect_mode(self, descriptor: Descriptor, instruction: Instruction) -> None:
        """Steps are compiled for one mode: a block that leaves another one behind is not supported."""
        if descriptor.flush_f32 != self.descriptor.flush_f32:
            raise UnsupportedInstruction(f"{instruction.text!r}: a block that ends in another mode than it started in")

    def _end_block(self, block: Block, index: int, name: str) -> Block:
        if name == "s_endpgm":
            block.end = "end"
        elif name in _BARRIERS:
            block.end = "barrier"
        else:
            if index not in self.targets:
                raise UnsupportedInstruction(f"{block.text!r}: a branch out of the program")
            block.end = "branch"
            block.target = self.targets[index]
            if name != "s_branch":
                block.condition, block.condition_reads = _condition(name, self.descriptor.wave_size)
        return block

    def _compile_step(self, instruction: Instruction, index: int, descriptor: Descriptor) -> Step:
        arch = self.arch
        if instruction.mnemonic in CACHE_CONTROL or instruction.mnemonic == _SET_MODE:
            return Step(lambda g: None, index, instruction.text, 0, 0, 0, None, False, ())
        halves = [instruction] if instruction.paired is None else [instruction, instruction.paired]
        builders, handlers = [], []
        for half in halves:
            name = base_name(half.mnemonic.replace("v_dual_", "v_"))
            factory = FACTORIES.get(name)
            if factory is None:
                raise UnsupportedInstruction(f"{half.text!r} for {arch} is not implemented")
            builder = Builder(half, name, descriptor, arch)
            handlers.append(factory(builder))
            builder.finish()
            builders.append(builder)
        first = builders[0]
        run = handlers[0] if len(halves) == 1 else _both(builders, handlers)
        if first.counter is not None:
            run = _counted(run, first.counter, first.loads)
        reads = needs = writes = 0
        rows: tuple[int, ...] = ()
        for builder in builders:
            reads, writes = reads | builder.reads, writes | builder.writes
            needs |= builder.reads & ~builder.unneeded
            rows += tuple(builder.float_rows)
        sink = first.counter is not None or name.startswith(("s_cmp", "s_bitcmp")) or bool(writes >> S_BIT + EXEC & 3)
        return Step(run, index, instruction.text, reads, needs, writes, first.counter, sink, rows, first.parts)


def _in_mode(descriptor: Descriptor, instruction: Instruction) -> Descriptor:
    """The descriptor with the mode that an instruction sets."""
    found = _MODES.search(instruction.text)
    if found is None:
        raise UnsupportedInstruction(
            f"{instruction.text!r}: only 0 and 3 for hwreg(HW_REG_MODE, 4, 2), and 0 for hwreg(HW_REG_MODE, 2, 2)"
        )
    return descriptor if found.group(1) is None else dataclasses.replace(descriptor, flush_f32=found.group(1) == "0")


_EXECUTABLES: weakref.WeakKeyDictionary[CodeObject, Executable] = weakref.WeakKeyDictionary()


def executable_of(code: CodeObject) -> Executable:
    """What is compiled of a code object so far."""
    found = _EXECUTABLES.get(code)
    if found is None:
        found = _EXECUTABLES[code] = Executable(code)
    return found


def _both(builders: list[Builder], handlers: list[Handler]) -> Handler:
    """The two halves of a VOPD pair, which both read before either writes."""
    (one, other), (first, second) = builders, handlers
    if not other.reads & one.writes:
        return lambda g: (first(g), second(g))[0]
    if not one.reads & other.writes:
        return lambda g: (second(g), first(g))[0]
    row = other.operands[0].row

    def crossed(g: Group) -> None:
        before = np.array(g.V[row])
        second(g)
        after = np.array(g.V[row])
        g.V[row] = before
        first(g)
        g.V[row] = after

    return crossed


def _counted(run: Handler, counter: str, loads: list[int]) -> Handler:
    mask = sum(1 << bit for bit in loads)

    def counted(g: Group) -> None:
        run(g)
        tracker = g.m.tracker
        if tracker is not None and g.m.checks.waits:
            tracker.issue(g, counter, loads, mask)

    return counted


def _condition(name: str, wave_size: int) -> tuple[Condition, int]:
    """Which waves branch (bool [n]), and the registers that decides."""
    words = wave_size // 32
    mask_bits = (1 << words) - 1

    def scc(g: Group) -> np.ndarray:
        return g.S[SCC] != 0

    def any_lane(row: int) -> Condition:
        def test(g: Group) -> np.ndarray:
            found: Any = g.S[row] != 0
            return found | (g.S[row + 1] != 0) if words == 2 else found

        return test

    tests: dict[str, tuple[Condition, int]] = {
        "scc": (scc, 1 << (S_BIT + SCC)),
        "vcc": (any_lane(VCC), mask_bits << (S_BIT + VCC)),
        "exec": (any_lane(EXEC), mask_bits << (S_BIT + EXEC)),
    }
    what = name.removeprefix("s_cbranch_")
    test, reads = tests[what.rstrip("01nz")]
    if what.endswith(("1", "nz")):
        return test, reads
    return (lambda g: ~test(g)), reads


def known_instructions() -> tuple[str, ...]:
    """Mnemonics that are implemented, without encoding suffixes such as _e64."""
    return tuple(sorted({*FACTORIES, *ALIASES, *_ENDS, _SET_MODE, *_CONDITIONAL, *CACHE_CONTROL}))
