"""Code objects in the fat binaries that clang links into a host library."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"


def code_objects(read: Callable[[int, int], bytes]) -> list[tuple[str, bytes]]:
    """(arch, code object) of one fat binary: a table, then the files (ClangOffloadBundler documentation).

    Args:
        read: (offset, size) -> that many bytes from the offset on, counted from the start of the binary.

    Raises:
        ValueError: it is none, or compressed.
    """
    magic = read(0, len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(f"expected an uncompressed fat binary of clang's, got one that starts with {magic!r}")
    place = len(_MAGIC) + 8
    (count,) = struct.unpack("<Q", read(place - 8, 8))
    found = []
    for _ in range(count):
        offset, size, length = struct.unpack("<QQQ", read(place, 24))
        target = read(place + 24, length).decode()
        place += 24 + length
        if "amdgcn" in target:
            found.append((target.rpartition("--")[2].split(":")[0], read(offset, size)))
    return found


def bundles_of(library: bytes) -> Iterator[list[tuple[str, bytes]]]:
    """:func:`code_objects` of each fat binary in a host library, in the order in which its objects were linked."""
    for found in re.finditer(re.escape(_MAGIC), library):
        start = found.start()
        yield code_objects(lambda offset, size, start=start: library[start + offset : start + offset + size])  # type: ignore[misc]
