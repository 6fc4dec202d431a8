"""A virtual environment with a wheel and what it needs, and nothing else of the environment that the tests run in."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import sysconfig

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by name, with all that they require in turn."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            wanted = map(Requirement, found[name].requires or [])
            todo += [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def create(folder: pathlib.Path, wheel: pathlib.Path | None, names: list[str]) -> pathlib.Path:
    """Python of a new environment; distributions come as links, for torch alone takes gigabytes."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for distribution in needed(names).values():
        for name in {file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")}:
            source = pathlib.Path(str(distribution.locate_file(name)))
            if source.exists() and not (site / name).exists():
                (site / name).symlink_to(source)
    if wheel is not None:
        command = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(command, check=True)
    return python
