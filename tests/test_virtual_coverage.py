"""Every instruction of the virtual GPU is one that LLVM has, and a test with values worked out by hand executes it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

import test_virtual_control
import test_virtual_instructions
import test_virtual_lanes
import test_virtual_memory
import test_virtual_memory_table

from flash_rocm.virtual import known_instructions

MODULES = (
    test_virtual_control,
    test_virtual_instructions,
    test_virtual_lanes,
    test_virtual_memory,
    test_virtual_memory_table,
)
#: (chip, instruction): what the parametrised tests of those files run, from the tables that they are made of.
EXECUTED = sorted({pair for module in MODULES for pair in module.EXECUTED})
CHIPS = sorted({chip for chip, _ in EXECUTED})
_SUFFIX = re.compile(r"_(e32|e64|dpp|sdwa)$")


def test_every_instruction_is_executed() -> None:
    executed = {_SUFFIX.sub("", text.split()[0]) for _, text in EXECUTED}
    assert executed == set(known_instructions())


@pytest.mark.skipif(shutil.which("llvm-mc-22") is None, reason="needs llvm-mc-22, which make test installs")
@pytest.mark.parametrize("chip", CHIPS)
def test_llvm_has_what_is_executed(chip: str) -> None:
    """LLVM assembles each instruction for its chip, and prints it under the same name."""
    texts = [text for arch, text in EXECUTED if arch == chip]
    options = ["-triple=amdgcn", f"-mcpu={chip}"] + (["-mattr=+real-true16"] if chip.startswith("gfx1") else [])
    done = subprocess.run(["llvm-mc-22", *options], input="\n".join(texts), capture_output=True, text=True)
    assert not done.stderr
    printed = [line.split()[0] for line in done.stdout.splitlines() if line.strip() and line.split()[0][0] != "."]
    assert printed == [text.split()[0] for text in texts]
