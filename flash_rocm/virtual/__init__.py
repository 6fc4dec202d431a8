"""The virtual AMD GPU: executes AMD machine code on the CPU, instruction by instruction, and checks it.

::

    from flash_rocm.virtual import Checks, VirtualGpu, load_code_object

    code = load_code_object(compiled.asm["hsaco"], assembly=compiled.asm["amdgcn"], lds_bytes=compiled.metadata.shared)
    gpu = VirtualGpu("gfx942")
    x = gpu.memory.add("x", array)        # an address; shares memory with the array
    y = gpu.memory.add("y", result)
    stats = gpu.launch(code, grid=(8, 1, 1), block_threads=256, kernargs=[x, y, 1024, 0, 0], order="shuffled:1")

``kernargs`` are bytes, numbers by name (where the metadata has names), or one number per argument in order;
Triton's kernels take two more pointers at the end (global and profile scratch), which may be 0.
``stats`` counts wave-instructions: ``per_instruction``, ``per_mnemonic()``, ``per_class()``.

What is emulated: the instruction sets of gfx90a, gfx942, gfx950, gfx1100, gfx1200 and gfx1201 as far as
:func:`known_instructions` goes; registers, LDS, memory and barriers exactly; MFMA sums in float32 in an
order of their own; transcendental instructions to about one unit in the last place.  What is not: time,
caches, and the wait states that some pairs of instructions need between them.

Faults that hardware does not report raise (see :class:`Checks`), as do accesses outside of the memory added.
Nothing of this is imported by ``import flash_rocm``.
"""

from .checks import Checks
from .code_object import CodeObject, load_code_object
from .errors import (
    BarrierDivergence,
    CodeObjectError,
    GlobalConflict,
    InstructionLimit,
    KernelFault,
    LdsRace,
    MemoryFault,
    MissingWait,
    NanWritten,
    UninitialisedRead,
    UnsupportedInstruction,
    VirtualGpuError,
)
from .executable import known_instructions
from .gpu import Registers, VirtualGpu
from .launch import Launch
from .memory import Memory
from .stats import LaunchStats, Measurements

__all__ = [
    "BarrierDivergence",
    "Checks",
    "CodeObject",
    "CodeObjectError",
    "GlobalConflict",
    "InstructionLimit",
    "KernelFault",
    "Launch",
    "LaunchStats",
    "LdsRace",
    "Measurements",
    "Memory",
    "MemoryFault",
    "MissingWait",
    "NanWritten",
    "Registers",
    "UninitialisedRead",
    "UnsupportedInstruction",
    "VirtualGpu",
    "VirtualGpuError",
    "known_instructions",
    "load_code_object",
]
