"""Where instances lie that were compiled on demand: the same for one input, elsewhere for any other that matters."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import shutil
from typing import Any

import pytest

from flash_rocm import ck_store, config
from flash_rocm.runtime import OnDemand

ROOT = pathlib.Path(__file__).parent.parent
#: Package -> its folder in the tree.
FOLDERS = {"flash_rocm._ck": "ck_backend", "flash_rocm._third_party": "third_party", "flash_rocm": "flash_rocm"}
STORE = OnDemand(pathlib.Path("/cache/ck_on_demand"), "", None)
ENTRY = config.arch_configs("gfx942").ck[0]


@dataclasses.dataclass
class _Spec:
    submodule_search_locations: list[str]


@pytest.fixture
def sources(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A copy of the packages that instances are compiled from, which is looked into instead of them."""
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "composable_kernel")
        )
    # The rest of importlib goes on finding what is installed.
    monkeypatch.setattr(ck_store, "importlib", _Importlib(tmp_path))
    return tmp_path


class _Importlib:
    def __init__(self, root: pathlib.Path) -> None:
        self.util, self._root = self, root

    def find_spec(self, name: str) -> _Spec:
        assert importlib.util.find_spec(name) is not None
        return _Spec([str(self._root / FOLDERS[name])])


def root(store: OnDemand = STORE) -> pathlib.Path:
    """As another process would find it."""
    ck_store._digest.cache_clear()
    return ck_store.root(store)


def test_the_same_sources_give_the_same_place(sources: pathlib.Path) -> None:
    before = root()
    assert before == root() and before.parent == STORE.folder
    # The copy lies elsewhere and is newer: contents count.
    for path in (sources / "ck_backend/csrc").iterdir():
        path.touch()
    assert root() == before


def test_what_a_process_that_looked_before_finds(sources: pathlib.Path) -> None:
    """Sources do not change under a process that runs; it reads them once."""
    before = root()
    (sources / "ck_backend/build.py").write_text("")
    assert ck_store.root(STORE) == before
    assert root() != before


SOURCES = (
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "ck_backend/csrc").iterdir())),
    *("ck_backend/generate.py", "ck_backend/build.py", "ck_backend/hipified.py"),
    *("third_party/composable_kernel.py", "third_party/rocm_root.py", "flash_rocm/ck_instances.py"),
)


def test_each_source_counts(sources: pathlib.Path) -> None:
    places = [root()]
    for name in SOURCES:
        path = sources / name
        path.write_text(path.read_text() + "\n")
        places.append(root())
    (sources / "ck_backend/csrc/flash_ck.h").rename(sources / "ck_backend/csrc/renamed.h")
    places.append(root())
    (sources / "ck_backend/csrc/new.hpp").touch()
    places.append(root())
    assert len(SOURCES) > 15 and len(set(places)) == len(places) == len(SOURCES) + 3


@pytest.mark.parametrize("name", ["ck_backend/backend.py", "ck_backend/on_demand.py", "flash_rocm/api.py"])
def test_what_is_not_compiled_does_not_count(name: str, sources: pathlib.Path) -> None:
    before = root()
    (sources / name).write_text("")
    assert root() == before


def test_another_composable_kernel_is_another_place(sources: pathlib.Path) -> None:
    places = [root(STORE._replace(ck_home=home)) for home in ("", "/ck", "/another")]
    assert len(set(places)) == 3
    assert root(STORE._replace(configs="/configs")) == places[0]  # whose entries count one by one


@pytest.mark.parametrize(
    "change",
    [
        {"tile": (*ENTRY.tile[:-1], 128)},
        {"warps": (2, 1, 1)},
        {"warp_tile": (16, 16, 16)},
        {"pipeline": "qr"},
        {"occupancy": 2},
        {"scheduler": "iterative-minreg"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_value_that_is_compiled_in_counts(change: dict[str, Any]) -> None:
    here = ck_store.place(STORE, "gfx942", "forward_fp16_d64_dense", ENTRY)
    assert ck_store.place(STORE, "gfx942", "forward_fp16_d64_dense", dataclasses.replace(ENTRY, **change)) != here


def test_every_field_of_an_entry_counts_or_is_in_the_name() -> None:
    """A new one has to be sorted into one of these."""
    in_the_name, beside_the_code = {"kernel", "dtypes", "variants"}, {"provenance", "source"}
    compiled_in = {"tile", "warps", "warp_tile", "pipeline", "occupancy", "scheduler"}
    assert {field.name for field in dataclasses.fields(ENTRY)} == in_the_name | beside_the_code | compiled_in
    assert len(ENTRY.built_how) == len(compiled_in)


def test_chips_and_names_have_places_of_their_own() -> None:
    names = ("forward_fp16_d64_dense", "forward_bf16_d64_dense")
    places = {ck_store.place(STORE, arch, name, ENTRY) for arch in ("gfx90a", "gfx942") for name in names}
    assert len(places | {ck_store.base(STORE)}) == 5
    source = dataclasses.replace(ENTRY, source="elsewhere", dtypes=("float16",), variants=((),))
    assert ck_store.place(STORE, "gfx90a", names[0], source) in places
