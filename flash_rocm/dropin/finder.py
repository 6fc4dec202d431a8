"""What makes imports and ``importlib.metadata`` find flash_rocm under flash-attn's names."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import re
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any

from flash_rocm import runtime

#: The version of flash-attn whose interface this is; what ``importlib.metadata.version("flash_attn")`` says.
VERSION = "2.8.3"
#: In the metadata of whatever stands in for flash-attn, and in nothing else's.
SUMMARY = "flash_rocm under the name of flash-attn"

#: Name of a module of flash-attn -> what it is here; None: a package that only holds others.
MODULES: dict[str, str | None] = {
    "flash_attn": None,
    "flash_attn.bert_padding": "flash_rocm.bert_padding",
    "flash_attn.flash_attn_interface": "flash_rocm.dropin.interface",
    "flash_attn.layers": None,
    "flash_attn.layers.rotary": "flash_rocm.layers.rotary",
    "flash_attn.losses": None,
    "flash_attn.losses.cross_entropy": "flash_rocm.layers.cross_entropy",
    "flash_attn.modules": None,
    "flash_attn.modules.block": "flash_rocm.modules.block",
    "flash_attn.modules.embedding": "flash_rocm.modules.embedding",
    "flash_attn.modules.mha": "flash_rocm.modules.mha",
    "flash_attn.modules.mlp": "flash_rocm.modules.mlp",
    "flash_attn.ops": None,
    "flash_attn.ops.activations": "flash_rocm.layers.activations",
    "flash_attn.ops.triton": None,
    "flash_attn.ops.triton.cross_entropy": "flash_rocm.layers.cross_entropy",
    "flash_attn.ops.triton.layer_norm": "flash_rocm.layers.norm",
    "flash_attn.ops.triton.rotary": "flash_rocm.layers.rotary",
    "flash_attn.utils": None,
    "flash_attn.utils.generation": "flash_rocm.modules.inference",
    "flash_attn_interface": "flash_rocm.v3",
}
_TOP_LEVEL = ("flash_attn", "flash_attn_interface")


class DropInError(ImportError):
    """flash_rocm cannot take flash-attn's place here."""


class _Loader(importlib.abc.Loader):
    """Puts a module of flash_rocm, or a package that only holds others, where a module was asked for."""

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        target = MODULES[name]
        if target is not None:
            # The import system returns what is in sys.modules.
            sys.modules[name] = importlib.import_module(target)
            return
        module.__doc__ = f"{SUMMARY}: see flash_rocm.dropin."
        if name == "flash_attn":
            interface = importlib.import_module("flash_rocm.dropin.interface")
            public = [function for function in interface.__all__ if function.startswith("flash_attn_")]
            vars(module).update({function: getattr(interface, function) for function in public})
            vars(module).update(__version__=VERSION, __all__=public)


class _Distribution(importlib.metadata.Distribution):
    """The metadata of an installed flash-attn."""

    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            return f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {VERSION}\nSummary: {SUMMARY}\n"
        return "\n".join(_TOP_LEVEL) + "\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return importlib.metadata.distribution("flash_rocm").locate_file(path)


class Finder(importlib.abc.MetaPathFinder):
    """Finds flash-attn's modules and its distribution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, _Loader(), origin="flash_rocm.dropin", is_package=MODULES[fullname] is None
        )

    def find_distributions(
        self,
        context: importlib.metadata.DistributionFinder.Context = importlib.metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[importlib.metadata.Distribution]:
        if context.name is None or re.sub(r"[-_.]+", "-", context.name).lower() == "flash-attn":
            yield _Distribution()


def install() -> None:
    """Let ``import flash_attn`` and ``import flash_attn_interface`` of this process find flash_rocm.

    Also ``importlib.metadata.version("flash_attn")``, which is :data:`VERSION` then.  A second call changes nothing.
    flash-attn's conventions hold under its names: ``softmax_lse`` is +inf for a row that sees no key, and S_dmask
    is as large and scaled as there.

    Raises:
        DropInError: flash-attn itself is imported already.
    """
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    for name in _TOP_LEVEL:
        _refuse_imported(name)
    _warn_of_installed()
    # First, so that an installed flash-attn is not found.
    sys.meta_path.insert(0, Finder())
    for name in [name for name in _TOP_LEVEL if name in sys.modules]:
        # The separate distribution, which is being imported, gives its place up.
        del sys.modules[name]
        importlib.import_module(name)


def _refuse_imported(name: str) -> None:
    module = sys.modules.get(name)
    if module is None or getattr(module, "__flash_rocm_dropin__", False):
        return
    version = getattr(module, "__version__", "of unknown version")
    raise DropInError(
        f"{name}: expected that it is not imported yet, got {name} {version} from "
        f"{getattr(module, '__file__', 'nowhere')}. Hint: call flash_rocm.dropin.install() before anything that "
        "imports it, or run the program with python -m flash_rocm.dropin."
    )


def _warn_of_installed() -> None:
    """Say what is hidden."""
    try:
        found = importlib.metadata.distribution("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return
    if found.metadata["Summary"] != SUMMARY:
        where = os.path.abspath(str(found.locate_file("")))
        runtime.warn_once(f"flash_rocm.dropin hides the installed flash_attn {found.version} ({where})")
