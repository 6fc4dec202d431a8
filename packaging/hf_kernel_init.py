"""flash_rocm, loaded by Hugging Face's ``kernels``: the installed package, or else the one beside this file."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

_INIT = pathlib.Path(__file__).parent / "package" / "flash_rocm" / "__init__.py"


def _mount() -> None:
    spec = importlib.util.spec_from_file_location("flash_rocm", _INIT, submodule_search_locations=[str(_INIT.parent)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{_INIT}: expected the package flash_rocm")
    module = sys.modules["flash_rocm"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["flash_rocm"]
        raise


def _check_version() -> None:
    """A process has one flash_rocm: the names of its torch operators are taken once."""
    found = re.search(r'^__version__ = "([^"]+)"', _INIT.read_text(), re.MULTILINE)
    loaded = sys.modules["flash_rocm"].__version__
    if found is None or found[1] != loaded:
        raise ImportError(
            f"flash_rocm: expected version {found and found[1]}, as this kernel has, got {loaded}, which is installed. "
            "Hint: import flash_rocm instead of the kernel, or uninstall it."
        )


if importlib.util.find_spec("flash_rocm") is None:
    _mount()

from flash_rocm import *  # noqa: E402, F403 - the kernel is the package
from flash_rocm import __all__  # noqa: E402, F401

_check_version()
