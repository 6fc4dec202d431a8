"""Reports of the kernels in the library of the ``ck`` back end: Composable Kernel's and the auxiliary ones."""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
import re
import tempfile
from collections.abc import Sequence

from flash_rocm import ck_instances
from flash_rocm.amdgpu.bundles import bundles_of
from flash_rocm.ck_instances import BUILD_COMMAND, LIBRARY, CkInstance, CkLibrary

from .counts import InspectError
from .kernels import DTYPES
from .objects import demangled, inspect_object
from .report import Case, Report


def inspect_library(
    archs: Sequence[str], patterns: Sequence[str], dtypes: Sequence[str], headdims: Sequence[int]
) -> list[Report]:
    """One report for each kernel that a build has put into the library, for the chips that it was built for.

    Args:
        archs: of these, all that the library has.
        patterns: of names of instances and auxiliary kernels, with ``*``; none for all.
        dtypes, headdims: those of instances to look at; no head dims for all.

    Raises:
        InspectError: no library is built, or nothing in it fits.
    """
    library = ck_instances.built()
    if library is None:
        command = BUILD_COMMAND.format(archs=";".join(archs))
        raise InspectError(f"--backend ck: expected a built library, found none. Hint: {command}")
    reports = [
        report
        for instance, code in _contents(library)
        for arch, contents in code
        if arch in archs and (instance is None or _is_asked_for(instance, dtypes, headdims))
        for report in _reports(arch, instance, contents)
    ]
    found = [each for each in reports if not patterns or any(fnmatch.fnmatch(each.case.kernel, p) for p in patterns)]
    if not found:
        raise InspectError(
            f"--backend ck: expected arguments that fit a kernel of {library.folder}, built for "
            f"{', '.join(library.archs)}, got none that does. Hint: --kernel takes patterns such as 'forward_*'"
        )
    return found


def _contents(library: CkLibrary) -> list[tuple[CkInstance | None, list[tuple[str, bytes]]]]:
    """(instance, code objects by arch): instances are linked in the order of the list, then auxiliary kernels."""
    found = _contents_of(library.folder, library.own)
    for instance, folder in zip(library.instances[len(library.own) :], library.modules, strict=True):
        found += _contents_of(folder, [instance])
    return found


def _contents_of(
    folder: pathlib.Path, instances: Sequence[CkInstance]
) -> list[tuple[CkInstance | None, list[tuple[str, bytes]]]]:
    bundles = list(bundles_of((folder / LIBRARY).read_bytes()))
    if len(bundles) < len(instances):
        raise InspectError(
            f"{folder / LIBRARY}: expected code of {len(instances)} instances, found {len(bundles)}. "
            "Hint: build it again"
        )
    others = [None] * (len(bundles) - len(instances))
    return list(zip([*instances, *others], bundles, strict=True))


def _is_asked_for(instance: CkInstance, dtypes: Sequence[str], headdims: Sequence[int]) -> bool:
    return short_dtype(instance) in dtypes and (not headdims or instance.headdim in headdims)


def short_dtype(instance: CkInstance) -> str:
    """As the command line has it."""
    return next(name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{instance.dtype}")


def _reports(arch: str, instance: CkInstance | None, code: bytes) -> list[Report]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "code.co"
        path.write_bytes(code)
        kernel, headdim = (instance.kernel, instance.headdim) if instance else ("forward", 0)
        found = inspect_object(path, arch, kernel, headdim)
    reports = []
    for report in found:
        if instance is None:
            case = Case(arch, _short_name(demangled(report.case.kernel)))
        else:
            case = Case(arch, instance.name, short_dtype(instance), instance.headdim)
        reports.append(dataclasses.replace(report, case=case, config="the built library"))
    return reports


def _short_name(signature: str) -> str:
    """``combine_kernel<4, float>`` of a demangled name with its namespaces and parameters."""
    found = re.search(r"(\w+)(<[^()]*>)?\(\w", signature)
    return found.group(1) + (found.group(2) or "") if found else signature
