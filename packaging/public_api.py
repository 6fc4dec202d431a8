"""The public API as stubs, so that a change that breaks callers is seen.

``python packaging/public_api.py`` writes packaging/api; ``tests/test_public_api.py`` compares it with today's.
What breaks on purpose goes to CHANGELOG, under Changed, and then here.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import shutil
import sys
import types
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).parent / "api"
#: Modules that users import; of each its __all__, or else the functions and classes that it defines.
MODULES = (
    *("flash_rocm", "flash_rocm.v3", "flash_rocm.bert_padding", "flash_rocm.dropin", "flash_rocm.layers.rotary"),
    *("flash_rocm.layers.norm", "flash_rocm.layers.cross_entropy", "flash_rocm.layers.activations"),
    *("flash_rocm.modules.mha", "flash_rocm.modules.mlp", "flash_rocm.modules.block", "flash_rocm.modules.embedding"),
    *("flash_rocm.integrations.transformers", "flash_rocm.testing"),
)


def public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Names and values."""
    listed = getattr(module, "__all__", None)
    for name in listed or vars(module):
        value = getattr(module, name)
        if name.startswith("_") or isinstance(value, types.ModuleType) or not callable(value):
            continue
        if listed or getattr(value, "__module__", "") == module.__name__:
            yield name, value


def signature(value: Any) -> str:
    """Names, kinds and defaults; annotations are the type checker's matter."""
    found = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=parameter.empty, default=_default(parameter.default))
        for parameter in found.parameters.values()
    ]
    return str(inspect.Signature(parameters))


class _Text:
    """Stands for a default; its repr is an expression."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty or isinstance(value, (int, float, str, tuple, type(None))):
        return value
    return _Text(repr(getattr(value, "__qualname__", str(value))))


def stub(module: types.ModuleType) -> str:
    """The text of one module: functions, and classes with the way they are called, methods and fields."""
    blocks = []
    for name, value in public(module):
        if not isinstance(value, type):
            blocks.append(f"def {name}{signature(value)}: ...\n")
            continue
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        members = [
            f"    def {member}{signature(function)}: ...\n"
            for member, function in vars(value).items()
            if isinstance(function, types.FunctionType) and not member.startswith("_")
        ]
        if not issubclass(value, BaseException):
            members.insert(0, f"    def __init__{signature(value).replace('(', '(self, ', 1)}: ...\n")
        members += [f"    {field}: object\n" for field in getattr(value, "_fields", ())]
        blocks.append(f"class {name}({bases}):\n{''.join(members) or '    ...' + chr(10)}")
    return "\n".join(blocks)


def write(folder: pathlib.Path) -> None:
    """Write the package of stubs, without what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    packages = {name.rpartition(".")[0] for name in MODULES} | {"flash_rocm", "flash_rocm.v3", "flash_rocm.dropin"}
    for name in sorted({*MODULES, *packages} - {""}):
        parts = name.split(".")
        path = (
            folder.joinpath(*parts, "__init__.py") if name in packages else folder.joinpath(*parts).with_suffix(".py")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stub(importlib.import_module(name)) if name in MODULES else "")


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
