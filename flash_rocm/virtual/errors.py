"""What the virtual GPU raises.  Every fault of a kernel is a :class:`KernelFault` that says where it happened."""

from __future__ import annotations


class VirtualGpuError(RuntimeError):
    """Base of everything that goes wrong on the virtual GPU."""


class UnsupportedInstruction(VirtualGpuError, NotImplementedError):
    """An instruction, modifier, operand or descriptor bit that is not implemented; the message has its text."""


class CodeObjectError(VirtualGpuError, ValueError):
    """A code object that cannot be loaded as asked."""


class KernelFault(VirtualGpuError):
    """A fault of the running kernel.

    ``index`` is the instruction's place in the program, ``text`` the instruction, and ``waves`` up to a few
    ``(workgroup, wave of the workgroup)`` that it happened to; the launch fills them in.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.index = -1
        self.text = ""
        self.waves: tuple[tuple[int, int], ...] = ()

    def locate(self, index: int, text: str, waves: tuple[tuple[int, int], ...]) -> None:
        """Add where it happened; the first place given stays."""
        if self.index < 0:
            self.index, self.text, self.waves = index, text, waves

    def __str__(self) -> str:
        if self.index < 0:
            return self.message
        among = ", ".join(f"workgroup {workgroup} wave {wave}" for workgroup, wave in self.waves)
        return f"{self.message} [instruction {self.index}: {self.text!r}; among {among}]"


class MemoryFault(KernelFault):
    """An access outside of every allocation, to a read-only one, or misaligned."""


class MissingWait(KernelFault):
    """A register or LDS used before the s_waitcnt that its load needs."""


class UninitialisedRead(KernelFault):
    """A read of a register, LDS or memory that nothing has written."""


class LdsRace(KernelFault):
    """Two waves of a workgroup touch the same LDS between two barriers, and at least one writes."""


class GlobalConflict(KernelFault):
    """Two workgroups touch the same memory in one launch, and at least one writes without an atomic."""


class BarrierDivergence(KernelFault):
    """Waves of a workgroup that wait at different barriers, or for a wave that has ended."""


class NanWritten(KernelFault):
    """A float instruction wrote a NaN (only raised when the launch was asked to look for that)."""


class InstructionLimit(KernelFault):
    """The launch ran longer than it was allowed to."""
