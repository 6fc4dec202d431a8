"""Files for ninja, which compiles again only what changed."""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections.abc import Sequence


def escaped(path: pathlib.Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def quoted(argument: object) -> str:
    """An argument as the shell reads it, in ninja's commands."""
    text = str(argument).replace("$", "$$")
    return f"'{text}'" if re.search(r"[^\w@%+=:,./$-]", text) else text


def joined(arguments: Sequence[object]) -> str:
    """A command line."""
    return " ".join(map(quoted, arguments))


class BuildFile:
    """What ninja is to make; objects lie in the folder of its file."""

    def __init__(self, work: pathlib.Path) -> None:
        self._work = work
        self._lines = [f"builddir = {escaped(work)}"]
        self._objects: list[str] = []

    def rule(self, name: str, command: str, description: str, *, compiles: bool) -> None:
        """How files of one sort are made; a compiler leaves beside each object what it has included."""
        self._lines.append(f"rule {name}\n  command = {command}\n  description = {description}")
        if compiles:
            self._lines.append("  deps = gcc\n  depfile = $out.d")

    def compile(self, rule: str, source: pathlib.Path, **variables: str) -> None:
        """An object of the library."""
        made = escaped(self._work / f"{source.stem}.o")
        self._objects.append(made)
        self._make(rule, made, escaped(source), name=source.stem, **variables)

    def link(self, rule: str, library: pathlib.Path) -> None:
        """A library of all objects."""
        self._make(rule, escaped(library), " ".join(self._objects), name=library.name)

    def make(self, rule: str, made: pathlib.Path, source: pathlib.Path) -> None:
        """A file that is no part of the library."""
        self._make(rule, escaped(made), escaped(source), name=made.name)

    def _make(self, rule: str, made: str, sources: str, **variables: str) -> None:
        self._lines.append(f"build {made}: {rule} {sources}")
        self._lines.extend(f"  {key} = {value}" for key, value in variables.items())

    def run(self, ninja: str, jobs: int, log: pathlib.Path | None = None) -> bool:
        """Whether ninja made all of it; what the compilers say is printed, or written to ``log``."""
        path = self._work / "build.ninja"
        path.write_text("\n".join(self._lines) + "\n")
        command = [ninja, "-f", str(path), "-j", str(jobs)]
        if log is None:
            return subprocess.run(command).returncode == 0
        with log.open("w") as file:
            return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode == 0
