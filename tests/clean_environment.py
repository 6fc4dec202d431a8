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
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for distribution in needed([*names, "pip"]).values():
        files = distribution.files or []
        places = {
            site / file.parts[0]: distribution.locate_file(file.parts[0]) for file in files if file.parts[0] != ".."
        }
        places |= {folder / "bin" / file.name: file.locate() for file in files if file.parts[-2:-1] == ("bin",)}
        for place, source in places.items():
            if pathlib.Path(str(source)).exists() and not place.exists():
                place.symlink_to(str(source))
    if wheel is not None:
        command = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(command, check=True)
    return python
