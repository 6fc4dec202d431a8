"""flash-attn's own tests of version 2.8.3, unchanged, with the drop-in in its place.

    python tests/flash_attn_suite.py fetch FOLDER      # downloads the sdist, checks it, keeps its tests
    python tests/flash_attn_suite.py run FOLDER [--sample N] [--seed S] [--max-seqlen L] [--on-cpu] [pytest's arguments]

``run`` needs no network, so that a machine with a GPU and without one can be given the folder.  Of each test function
it runs N cases, drawn by the seed (0: all, which are half a million).  ``--on-cpu`` runs on the CPU what says "cuda";
only the smallest cases end there in reasonable time.  As a module this is a plugin of pytest.  Nothing of flash-attn
is committed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import pathlib
import random
import subprocess
import sys
import tarfile
import types
import urllib.request
from typing import Any

try:
    import pytest
except ImportError:  # fetched, for the process that run() starts
    pytest = None

URL = (
    "https://files.pythonhosted.org/packages/6c/b1/b77625e3d11260d2bd6a4fc249a4be9a3da97ff848e2222e810c4f0e0211/"
    "flash_attn-2.8.3.post2.tar.gz"
)
SHA256 = "d0f9f0b08a986cdeadbffcf5ec8b3a8f514366c68ad1853d3ab061bc83cc340b"
#: Of the sdist; those for other back ends of flash-attn look into their internals.
FILES = ("test_flash_attn.py", "test_rotary.py", "test_util.py")
#: What they import and a machine without a network may lack.
PACKAGES = ("einops", "pytest")
#: Tests that cannot hold here -> why.
LEFT_OUT = {
    "test_compilation_count": "counts compilations through a hook of Triton 3.5 and older (JITFunction.cache_hook)",
}


def fetch(folder: pathlib.Path) -> None:
    """Download the sdist, compare its SHA-256, and extract the test files; beside them what they import."""
    folder.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(URL, timeout=120) as answer:
        content = answer.read()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{URL}: expected SHA-256 {SHA256}, got {found}")
    archive = folder / "sdist.tar.gz"
    archive.write_bytes(content)
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            path = pathlib.PurePosixPath(member.name)
            if path.parent.name == "tests" and path.name in FILES and len(path.parts) == 3:
                source = opened.extractfile(member)
                if source is not None:
                    (folder / path.name).write_bytes(source.read())
    archive.unlink()
    command = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder / "packages")]
    subprocess.run([*command, *PACKAGES], check=True)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{URL}: expected the tests {', '.join(FILES)}, {', '.join(missing)} not found")


def run(folder: pathlib.Path, arguments: list[str]) -> int:
    """Run pytest on the folder in a process of its own, with the drop-in and this plugin."""
    tests = [str(folder / name) for name in FILES if name != "test_util.py"]
    named = [argument for argument in arguments if not argument.startswith("-") and ".py" in argument]
    command = [sys.executable, "-m", "flash_rocm.dropin", "-m", "pytest", "-q", "-p", "flash_attn_suite"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(folder), *arguments, *([] if named else tests)]
    here = str(pathlib.Path(__file__).resolve().parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    if any(importlib.util.find_spec(name) is None for name in PACKAGES):
        paths.append(str(folder / "packages"))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).returncode


# --------------------------------------------------------------------------------------------------
# The plugin


_config: Any = None


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("flash-attn's tests")
    group.addoption("--sample", type=int, default=0, help="cases of each test function; 0: all")
    group.addoption("--seed", type=int, default=0, help="of the sample")
    group.addoption("--max-seqlen", type=int, default=0, help="draw only from cases with no longer seqlen; 0: all")
    group.addoption("--on-cpu", action="store_true", help='run on the CPU what says "cuda"')


def pytest_configure(config: Any) -> None:
    global _config
    _config = config
    if config.getoption("--on-cpu"):
        pretend_gpu()


def pytest_pycollect_makeitem(name: str, obj: Any) -> None:
    """Draw the cases of a function before pytest makes them: there are half a million."""
    count, longest = _config.getoption("--sample"), _config.getoption("--max-seqlen")
    marks = [mark for mark in getattr(obj, "pytestmark", ()) if mark.name == "parametrize"]
    if not name.startswith("test_") or not marks or not (count or longest):
        return
    names, values = [], []
    for mark in marks:
        given = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else list(mark.args[0])
        rows = [(row,) if len(given) == 1 else tuple(row) for row in mark.args[1]]
        lengths = [k for k, each in enumerate(given) if "seqlen" in each]
        if longest:
            rows = [row for row in rows if all(not isinstance(row[k], int) or row[k] <= longest for k in lengths)]
        names += given
        values.append(rows)
    total = math.prod(map(len, values))
    draw = random.Random(f"{_config.getoption('--seed')} {name}")
    cases = []
    for index in sorted(draw.sample(range(total), min(count or total, total))):
        case: tuple[Any, ...] = ()
        for rows in values:
            index, here = divmod(index, len(rows))
            case += rows[here]
        cases.append(case if len(names) > 1 else case[0])
    drawn = pytest.mark.parametrize(names, cases).mark
    obj.pytestmark = [mark for mark in obj.pytestmark if mark.name != "parametrize"] + [drawn]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out what cannot hold."""
    for item in items:
        if reason := LEFT_OUT.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=reason))


def pretend_gpu() -> None:
    """Answer questions about the GPU, and give CPU tensors where "cuda" is asked for."""
    import torch

    class OnCPU(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    properties = types.SimpleNamespace(total_memory=80 << 30)
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    OnCPU().__enter__()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("fetch", "run"))
    parser.add_argument("folder", type=pathlib.Path)
    parsed, rest = parser.parse_known_args()
    if parsed.action == "run":
        return run(parsed.folder.resolve(), rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    fetch(parsed.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
