"""The layers of CONTRIBUTING.md, held in place by reading the source."""

from __future__ import annotations

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
#: Folder of the tree -> name of the package.
PACKAGES = {
    "flash_rocm": "flash_rocm",
    "triton_backend": "flash_rocm._triton",
    "ck_backend": "flash_rocm._ck",
    "third_party": "flash_rocm._third_party",
}
BACKENDS = ("flash_rocm._triton", "flash_rocm._ck", "flash_rocm.reference")

LEAVES = frozenset(
    f"flash_rocm.{name}"
    for name in (
        *("problem", "arch", "runtime", "virtual_device", "validation", "files", "timing", "tuned"),
        *("config", "config_schema", "config_checks"),
        *("sinks", "splits", "cache_validation", "ck_instances", "ck_store", "layer_calls", "variables", "auxiliary"),
        "cuda_library",
        *("amdgpu.assembly", "amdgpu.chips"),
    )
)
#: Leaves of many modules, which back ends may import -> what of flash_rocm these modules may import.
LEAF_PACKAGES = {
    "flash_rocm.amdgpu": ("flash_rocm.amdgpu",),
    "flash_rocm.virtual": ("flash_rocm.amdgpu", "flash_rocm.virtual"),
    "flash_rocm._third_party": (),
}
#: What a module may import of flash_rocm; a module that is not named here is outside (cli, demo, ...).
ALLOWED = {
    **dict.fromkeys(LEAVES, LEAVES),
    "flash_rocm.protocols": LEAVES,
    "flash_rocm.backends": LEAVES | {"flash_rocm.protocols"},
    "flash_rocm.decision": LEAVES | {"flash_rocm.backends", "flash_rocm.protocols"},
    "flash_rocm.ops": LEAVES | {"flash_rocm.decision"},
    "flash_rocm.cache_ops": LEAVES | {"flash_rocm.decision", "flash_rocm.ops"},
    "flash_rocm.attend": LEAVES | {"flash_rocm.ops"},
    "flash_rocm.layers.ops": LEAVES | {"flash_rocm.backends"},
    "flash_rocm.layers.rotary": LEAVES | {"flash_rocm.layers.ops"},
    "flash_rocm.layers.norm": LEAVES | {"flash_rocm.layers.ops", "flash_rocm.attend"},
    "flash_rocm.layers.cross_entropy": LEAVES | {"flash_rocm.layers.ops"},
    "flash_rocm.layers.activations": frozenset(),
    "flash_rocm.inference": LEAVES | {"flash_rocm.cache_ops"},
    "flash_rocm.api": LEAVES | {"flash_rocm.attend", "flash_rocm.inference"},
    "flash_rocm.v3.attention": LEAVES | {"flash_rocm.attend", "flash_rocm.inference"},
    "flash_rocm.v3.kvcache": LEAVES | {"flash_rocm.cache_ops", "flash_rocm.inference", "flash_rocm.v3.attention"},
}


def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file of every module that is shipped."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(), filename=str(MODULES[name]))


def resolve(name: str) -> str:
    """The module that an imported dotted name lives in: itself, or the one that defines it."""
    return name if name in MODULES else name.rpartition(".")[0]


def imports(name: str) -> set[str]:
    """Modules of flash_rocm that a module imports anywhere in its text, functions included."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {resolve(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, base)) if base else ".".join(above)
            found |= {resolve(f"{base}.{alias.name}") for alias in node.names}
    return {imported for imported in found if imported.split(".")[0] == "flash_rocm"}


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def attributes(name: str) -> set[str]:
    """Dotted names ("os.environ") that a module uses."""
    return {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }


def test_the_reader_finds_arrows() -> None:
    assert "flash_rocm.attend" in imports("flash_rocm.api")
    assert "flash_rocm.problem" in imports("flash_rocm.backends")
    assert "os.environ" in attributes("flash_rocm.runtime")


@pytest.mark.parametrize("name", sorted(set(ALLOWED) & set(MODULES)))
def test_layers(name: str) -> None:
    assert imports(name) <= ALLOWED[name] | {name}


@pytest.mark.parametrize("name", [name for name in MODULES if any(is_within(name, package) for package in BACKENDS)])
def test_back_ends_import_only_leaves_and_themselves(name: str) -> None:
    own = next(package for package in BACKENDS if is_within(name, package))
    strangers = {imported for imported in imports(name) - LEAVES if not is_within(imported, own)}
    assert not {imported for imported in strangers if not any(is_within(imported, leaf) for leaf in LEAF_PACKAGES)}


@pytest.mark.parametrize("name", [name for name in MODULES if any(is_within(name, leaf) for leaf in LEAF_PACKAGES)])
def test_leaf_packages(name: str) -> None:
    allowed = next(packages for leaf, packages in LEAF_PACKAGES.items() if is_within(name, leaf))
    assert not {imported for imported in imports(name) if not any(is_within(imported, leaf) for leaf in allowed)}


@pytest.mark.parametrize("name", [name for name in MODULES if not any(is_within(name, p) for p in BACKENDS)])
def test_nobody_else_imports_a_back_end(name: str) -> None:
    """Back ends are loaded by name at their first use (``backends.load``)."""
    assert not {imported for imported in imports(name) if any(is_within(imported, p) for p in BACKENDS)}


@pytest.mark.parametrize("name", MODULES)
def test_only_runtime_touches_the_environment(name: str) -> None:
    used = attributes(name) & {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    named = [
        node
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom)
        and node.module == "os"
        and {a.name for a in node.names} & {"environ", "getenv"}
    ]
    assert name == "flash_rocm.runtime" or not (used or named)


@pytest.mark.parametrize("name", MODULES)
def test_only_config_reads_json(name: str) -> None:
    """Writing is free: ``json.dump`` and ``json.dumps``."""
    from_json = [n for n in ast.walk(tree(name)) if isinstance(n, ast.ImportFrom) and n.module == "json"]
    assert name == "flash_rocm.config" or not (attributes(name) & {"json.load", "json.loads"} or from_json)


@pytest.mark.parametrize("name", MODULES)
def test_no_assert_outside_kernels_and_testing(name: str) -> None:
    """``python -O`` removes asserts: they check nothing that a caller passes."""
    if is_within(name, "flash_rocm.testing"):
        return
    assert not [node.lineno for node in ast.walk(tree(name)) if isinstance(node, ast.Assert)]


def test_every_variable_that_is_read_is_reported() -> None:
    from flash_rocm import variables

    read = {
        name.decode() if isinstance(name := node.args[0].value, bytes) else name
        for node in ast.walk(tree("flash_rocm.runtime"))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("os.environ.get", "_variables.get")
        and isinstance(node.args[0], ast.Constant)
    }
    # Asked for before torch is known to be there.
    assert re.findall(r"os\.environ\S*\"(\w+)\"", (ROOT / "setup.py").read_text()) == ["FLASH_ROCM_BUILD"]
    assert {*read, "FLASH_ROCM_BUILD"} == {**variables.RUN, **variables.BUILD}.keys()
