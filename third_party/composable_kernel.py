"""Composable Kernel, whose headers the ``ck`` back end is compiled against: the pin, and where it is found.

In this order: ``CK_HOME``; ``third_party/composable_kernel``, a clone or submodule that you made; the pinned wheel from
PyPI, which carries the sources, downloaded into a folder and verified.  An installed ROCm is not looked into: it has
``ck_tile`` but not the headers of ``example/ck_tile/01_fmha``, which hold the arguments of the kernels.

Only the standard library is needed:  ``python third_party/composable_kernel.py FOLDER`` prints the path.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

REPOSITORY = "https://github.com/ROCm/composable_kernel"
LICENCE = "MIT"
WHEEL = "amd-aiter==0.1.7.post2.dev18"
WHEEL_SHA256 = "fe139d74438217c35e87e3b961166bac8db2d381eadccb371da2e63615f05a31"
ROOT_IN_WHEEL = "aiter_meta/3rdparty/composable_kernel"
#: Of the headers that are compiled: see :func:`headers_sha256`.
HEADERS_SHA256 = "bf32af42def92bca14ea097714764028cc250c06fb5ed6a78d890c707c9095f5"
CLONE = pathlib.Path(__file__).with_name("composable_kernel")
EXAMPLE = "example/ck_tile/01_fmha"


class SourceError(RuntimeError):
    """There is no Composable Kernel to compile against; the text says where it was looked for."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A tree of Composable Kernel."""

    root: pathlib.Path
    where: str  # "CK_HOME", "third_party" or "wheel"
    pinned: bool  # its headers are those of the pin, byte for byte; else a compile probe has to show that they serve

    @property
    def include_dirs(self) -> tuple[pathlib.Path, pathlib.Path]:
        return self.root / "include", self.root / EXAMPLE


def headers(root: pathlib.Path) -> list[pathlib.Path]:
    """What may be included of a tree, sorted by path."""
    found = [*(root / "include/ck_tile").rglob("*.hpp"), *(root / EXAMPLE).glob("*.hpp")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def headers_sha256(root: pathlib.Path) -> str:
    """SHA-256 over the path and SHA-256 of each header, in order."""
    digest = hashlib.sha256()
    for path in headers(root):
        name, contents = path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{contents}  {name}\n".encode())
    return digest.hexdigest()


def find(ck_home: str, folder: pathlib.Path) -> Source:
    """The first tree in the order above.

    Args:
        ck_home: value of ``CK_HOME``, "" if unset.
        folder: where the wheel is unpacked, or was before.

    Raises:
        SourceError: none is found, or what was fetched is not what is pinned.
    """
    for where, root in (("CK_HOME", pathlib.Path(ck_home) if ck_home else None), ("third_party", CLONE)):
        if root is not None and (root / EXAMPLE / "fmha_fwd.hpp").is_file():
            return Source(root, where, headers_sha256(root) == HEADERS_SHA256)
        if where == "CK_HOME" and root is not None:
            raise SourceError(
                f"CK_HOME: expected a tree with include/ck_tile and {EXAMPLE}, got {ck_home!r}. "
                f"Hint: a clone of {REPOSITORY}"
            )
    root = folder / ROOT_IN_WHEEL
    if not root.is_dir():
        _fetch(folder)
    found = headers_sha256(root)
    if found != HEADERS_SHA256:
        raise SourceError(f"{root}: expected headers with SHA-256 {HEADERS_SHA256}, got {found}. Hint: remove {folder}")
    return Source(root, "wheel", True)


def _fetch(folder: pathlib.Path) -> None:
    """Download the wheel, compare its checksum, and unpack what is Composable Kernel's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", temporary, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(pathlib.Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise SourceError(
                f"expected CK_HOME, {CLONE} or {WHEEL} from PyPI, found none: {done.stderr.strip()[-500:]}. "
                f"Hint: CK_HOME=<a clone of {REPOSITORY}>"
            )
        unpack(wheels[0], folder)


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpack Composable Kernel of the pinned wheel into a folder, whole or not at all.

    Raises:
        SourceError: another wheel.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise SourceError(f"{wheel.name}: expected SHA-256 {WHEEL_SHA256}, got {found}: not the wheel that is pinned")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, zipfile.ZipFile(wheel) as archive:
        archive.extractall(temporary, [name for name in archive.namelist() if name.startswith(ROOT_IN_WHEEL)])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        os.mkdir(temporary)  # which the context manager removes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=pathlib.Path, help="where the wheel of PyPI is unpacked if nothing else is found"
    )
    parser.add_argument("--ck-home", default="", help="what CK_HOME would be")
    args = parser.parse_args()
    try:
        source = find(args.ck_home, args.folder)
    except SourceError as error:
        print(f"composable_kernel: {error}", file=sys.stderr)
        return 1
    print(f"{source.root} ({source.where}, {'pinned' if source.pinned else 'another version than the pinned one'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
