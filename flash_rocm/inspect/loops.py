"""Loops of a program, and the ways through one.

A loop is what a backward branch jumps over.  Hand-written kernels branch around the masking inside their one
loop, compilers make one loop for full and one for masked blocks; both come out as ways through hot loops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from flash_rocm.amdgpu.assembly import Instruction, Program

from .counts import InspectError, Mix, count, is_scratch, kind

_NO_FALL_THROUGH = ("s_branch", "s_endpgm", "s_setpc_b64", "s_swappc_b64")


@dataclasses.dataclass(frozen=True)
class Loop:
    """Indices of the first instruction and of the backward branch, and two ways through what lies between.

    Both ways do all the matrix work that a way can; the short one has the least vector work, the long one the most.
    """

    first: int
    last: int
    short: Mix
    long: Mix


def spans(program: Program) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop."""
    return sorted((target, branch) for branch, target in program.targets.items() if target <= branch)


def loop_scratch(program: Program, arch: str) -> int:
    """Instructions inside loops that reach private memory.

    Raises:
        InspectError: a loop holds what the disassembler could not read.
    """
    inside = {index for first, last in spans(program) for index in range(first, last + 1)}
    code = [program.instructions[index] for index in inside]
    unread = next((instruction for instruction in code if instruction.mnemonic.startswith(".")), None)
    if unread is not None:
        raise InspectError(f"{program.name}: expected instructions in a loop, got {unread.text!r}. Hint: another arch?")
    return sum(is_scratch(instruction, arch) for instruction in code)


def _ways(program: Program, first: int, last: int, arch: str) -> tuple[list[Instruction], list[Instruction]] | None:
    """Instructions of the short and of the long way from ``first`` to ``last``; None if none gets there."""
    code = program.instructions
    # (matrix instructions, -+ vector cycles) of the best way from each instruction to the end, and the next on it.
    best: list[dict[int, tuple[int, int]]] = [{last: (0, 0)}, {last: (0, 0)}]
    following: list[dict[int, int]] = [{}, {}]
    for index in range(last - 1, first - 1, -1):
        what = kind(code[index], arch)
        vector = count([code[index]], arch).vector_cycles(arch) if what in ("valu", "trans", "slow") else 0
        successors = [] if code[index].mnemonic in _NO_FALL_THROUGH else [index + 1]
        target = program.targets.get(index)
        if target is not None and index < target <= last:
            successors.append(target)
        for sign, scores, after in zip((-1, 1), best, following, strict=True):
            reachable = [(scores[successor], successor) for successor in successors if successor in scores]
            if reachable:
                (matrix, cycles), after[index] = max(reachable)
                scores[index] = (matrix + (what == "matrix"), cycles + sign * vector)
    if first not in best[0]:
        return None
    found = []
    for after in following:
        way, index = [code[first]], first
        while index != last:
            index = after[index]
            way.append(code[index])
        found.append(way)
    return found[0], found[1]


def hot_loops(program: Program, arch: str, inner_trips: int = 1) -> list[Loop]:
    """Innermost loops with matrix instructions and exponentials, or with what the program has of the two.

    Args:
        inner_trips: how often the loops inside them go round, for kernels that take the head dim in chunks.
    """
    code = program.instructions
    all_spans = spans(program)

    def holds(span: tuple[int, int], test: Callable[[Instruction], bool]) -> bool:
        return any(test(code[index]) for index in range(span[0], span[1] + 1))

    def is_matrix(instruction: Instruction) -> bool:
        return kind(instruction, arch) == "matrix"

    matrix = [span for span in all_spans if holds(span, is_matrix)]
    exponential = [span for span in all_spans if holds(span, lambda x: x.mnemonic.startswith("v_exp_"))]
    hot = [span for span in matrix if span in exponential] or matrix or exponential
    found = []
    for first, last in hot:
        if any((a, b) != (first, last) and first <= a and b <= last for a, b in hot):
            continue
        ways = _ways(program, first, last, arch)
        if ways is not None:
            nested = [(a, b) for a, b in all_spans if first < a and b < last]
            again = [index for a, b in nested for index in range(a, b + 1)] * (inner_trips - 1)
            repeated = [code[index] for index in again]
            found.append(Loop(first, last, *(count([*way, *repeated], arch) for way in ways)))
    return found


def full_and_masked(loops: list[Loop], arch: str) -> tuple[Mix | None, Mix | None]:
    """The way of full blocks, with the fewest comparisons and selections, and that of masked ones, with the most.

    The masked one is None where nothing tells it from the full one.
    """
    if not loops:
        return None, None

    def by_compares(mix: Mix) -> tuple[float, float]:
        # Per matrix instruction, because loops may be unrolled differently.
        work = max(mix.matrix, 1)
        return mix.compares / work, mix.vector_cycles(arch) / work

    full = min((loop.short for loop in loops), key=by_compares)
    masked = max((loop.long for loop in loops), key=by_compares)
    return full, masked if by_compares(masked) > by_compares(full) else None
