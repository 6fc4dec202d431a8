"""Packages of the wheel: site-packages gets one name, ``flash_rocm``.

``FLASH_ROCM_BUILD=ck`` adds the library of Composable Kernel, which is the default where ROCm is found, ``cuda`` that
of the auxiliary kernels for NVIDIA GPUs.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
#: Folder of the tree -> name inside the installed package.
EMBEDDED = {
    "triton_backend": "flash_rocm._triton",
    "ck_backend": "flash_rocm._ck",
    "configs": "flash_rocm._configs",
    "third_party": "flash_rocm._third_party",
}


def version() -> str:
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "flash_rocm/__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("flash_rocm/__init__.py has no __version__")
    return found.group(1)


def build_request() -> str:
    """What ``FLASH_ROCM_BUILD`` asks for: ck, cuda or none."""
    request = os.environ.get("FLASH_ROCM_BUILD", "").strip().lower()
    if request not in ("", "none", "ck", "cuda"):
        raise SystemExit(f"FLASH_ROCM_BUILD: expected ck, cuda or none, got {request!r}.")
    return request or default_request()


def default_request() -> str:
    """ck where ROCm is found and what a build needs.  In a build that pip isolates there is no torch, and so none."""
    if importlib.util.find_spec("torch") is None:
        return "none"
    mount()
    from flash_rocm._ck import build

    from flash_rocm import runtime

    rocm = pathlib.Path(runtime.rocm_home())
    if not build.is_rocm(rocm):
        return "none"
    if why := build.why_not(runtime.build_request()):
        print(f"FLASH_ROCM_BUILD: none, though ROCm is in {rocm}: {why}", file=sys.stderr)
        return "none"
    print(
        f"FLASH_ROCM_BUILD: ck, for ROCm is in {rocm}: 1 to 2 minutes of a processor for each of its instances. "
        "FLASH_ROCM_BUILD=none leaves it out",
        file=sys.stderr,
    )
    return "ck"


def mount() -> None:
    """Make the tree importable as the package that it becomes, for the build that is part of it."""
    if "flash_rocm._ck" in sys.modules:
        return
    sys.path.insert(0, str(ROOT))
    for folder, name in EMBEDDED.items():
        init = ROOT / folder / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
        if spec is None or spec.loader is None:
            raise SystemExit(f"{init}: expected the package {name}")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def local_version() -> str:
    """What a wheel with a compiled library is called: "+ck.gfx90a.gfx942"."""
    mount()
    try:
        from flash_rocm._ck import build, build_cuda

        from flash_rocm import runtime
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"FLASH_ROCM_BUILD={REQUEST}: {error}. Hint: pip install --no-build-isolation, beside torch."
        ) from error
    archs = runtime.build_request().archs or (build if REQUEST == "ck" else build_cuda).DEFAULT_ARCHS
    # A name that is no arch is the build's to refuse, which says what it expected.
    return "+" + ".".join([REQUEST, *re.findall(r"[0-9a-z]+", " ".join(archs))])


class BuildLibrary(build_ext):
    """Compiles a library instead of a module of Python's."""

    def build_extension(self, ext: Extension) -> None:
        mount()
        from flash_rocm._ck import build, build_cuda

        from flash_rocm import runtime
        from flash_rocm.config_schema import ConfigError

        source, request = runtime.config_source(), runtime.build_request()
        out = pathlib.Path(self.get_ext_fullpath(ext.name)).parent
        try:
            if REQUEST == "cuda":
                build_cuda.build(request, ROOT / "build" / "cuda", out)
            else:
                build.build(request, ROOT / "build" / "ck", out, source.folder if source else None)
        except (build.BuildError, ConfigError) as error:
            raise SystemExit(
                f"FLASH_ROCM_BUILD={REQUEST}: {error} (FLASH_ROCM_BUILD=none installs without it)"
            ) from error

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: what is built stands where the package is, in the tree."""
        for path in pathlib.Path(self.build_lib, "flash_rocm", "_ck").iterdir():
            if path.suffix in (".so", ".json"):
                shutil.copy(path, ROOT / "ck_backend")

    def get_outputs(self) -> list[str]:
        """None: the files are no module, and a list of them is only asked for by installs that are no wheel."""
        return []


class ArchWheel(bdist_wheel):
    """One wheel serves all versions of Python, for nothing of it is a module of Python's; but one platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


packages = ["flash_rocm", *(f"flash_rocm.{name}" for name in find_packages("flash_rocm"))]
for folder, name in EMBEDDED.items():
    packages += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]

compiled = {}
local = ""
REQUEST = build_request()
if REQUEST != "none":
    local = local_version()
    compiled = {
        "ext_modules": [Extension("flash_rocm._ck._C", [])],
        "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": ArchWheel},
    }

setup(
    version=version() + local,
    packages=packages,
    package_dir={"flash_rocm": "flash_rocm", **{name: folder for folder, name in EMBEDDED.items()}},
    package_data={"flash_rocm": ["py.typed"], "flash_rocm._configs": ["*.json"], "flash_rocm._ck": ["csrc/*"]},
    **compiled,
)
