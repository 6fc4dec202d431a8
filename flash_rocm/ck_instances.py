"""Instances of Composable Kernel: what each takes, which are built, and which one a call gets.  A leaf.

The library of the ``ck`` back end is a folder that its build fills: ``_C.so`` and ``instances.json``, which says what
is in it in the order of the library's own table.  Selection reads that list alone, and so knows what the library can do
without loading it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

from flash_rocm import ck_store, config, files, runtime
from flash_rocm.config_checks import check_object
from flash_rocm.config_schema import CK_VARIANTS, CkConfig, ConfigError
from flash_rocm.problem import AttentionProblem
from flash_rocm.runtime import OnDemand

#: Chips that the shipped configs have instances for.
ARCHS = ("gfx90a", "gfx942", "gfx950")
#: Of these, the ones on which the tests execute them, and so ``auto`` takes them.
TESTED_ARCHS = ("gfx90a", "gfx942")
MANIFEST, LIBRARY = "instances.json", "_C.so"
_SHORT = {"float16": "fp16", "bfloat16": "bf16"}
#: Composable Kernel addresses the rows of one sequence with a 32-bit number of bytes.
_MAX_BYTES = 1 << 31
#: ... and takes the distances of ALiBi with v_sad_u16.
_MAX_ALIBI_SEQLEN = 1 << 16
#: Seconds of a processor that an instance takes to compile, 30 to 90, for whoever waits.
SECONDS_TO_COMPILE = 60
BUILD_COMMAND = 'FLASH_ROCM_BUILD=ck FLASH_ROCM_ARCHS="{archs}" pip install --no-build-isolation .'


@dataclasses.dataclass(frozen=True)
class CkInstance:
    """One compiled kernel, or for backward the three of a pass."""

    kernel: str  # of config_schema.CK_KERNELS
    dtype: str
    headdim: int  # the largest that it takes
    headdim_v: int
    variant: tuple[str, ...]  # of CK_VARIANTS, in that order
    archs: tuple[str, ...]
    tile: tuple[int, int]  # rows of q and keys that a workgroup takes at a time
    occupancy: int  # workgroups of a compute unit, 0 for Composable Kernel's choice

    @property
    def name(self) -> str:
        """A C identifier.  That of splitkv has the keys of a tile, which divide pages, where they are not 64."""
        dims = f"d{self.headdim}" if self.headdim == self.headdim_v else f"d{self.headdim}v{self.headdim_v}"
        if self.kernel == "splitkv":
            layout = () if self.tile[1] == 64 else (f"n{self.tile[1]}",)
        else:
            layout = ("varlen" if "varlen" in self.variant else "dense",)
        rest = [name for name in self.variant if name != "varlen"]
        return "_".join((self.kernel, _SHORT[self.dtype], dims, *layout, *rest))

    def takes(self, kernel: str, problem: AttentionProblem, arch: str) -> bool:
        """Whether it runs one direction of a problem."""
        has = {name: name in self.variant for name in CK_VARIANTS}
        return (
            (self.kernel, self.dtype) == (kernel, str(problem.dtype).removeprefix("torch."))
            and arch in self.archs
            and self._takes_layout(problem)
            and has["alibi"] == problem.alibi
            and has["softcap"] == (problem.softcap > 0.0)
            and (has["masked"] or not is_masked(problem))
            and (has["deterministic"] or not problem.deterministic or kernel != "backward")
        )

    def _takes_layout(self, problem: AttentionProblem) -> bool:
        if self.kernel == "splitkv":
            # Over a cache, of which nothing is copied, rows are read in vectors; a tile of keys lies in one page.
            dims = (problem.headdim, problem.headdim_v) == (self.headdim, self.headdim_v)
            return dims and problem.page_size % self.tile[1] == 0
        is_varlen = "varlen" in self.variant
        return problem.headdim <= self.headdim and problem.headdim_v <= self.headdim_v and is_varlen == problem.varlen


@dataclasses.dataclass(frozen=True, eq=False)
class CkLibrary:
    """A library that is built, and its instances in the order of its table; there is one object for each.

    ``modules`` are folders of libraries that were compiled on demand: their instances, one each, are the last.
    """

    folder: pathlib.Path
    archs: tuple[str, ...]
    instances: tuple[CkInstance, ...]
    modules: tuple[pathlib.Path, ...] = ()

    @property
    def own(self) -> tuple[CkInstance, ...]:
        """Those that are no module's."""
        return self.instances[: len(self.instances) - len(self.modules)]

    def folder_of(self, number: int) -> pathlib.Path:
        """Of the library that has an instance."""
        after = number - len(self.own)
        return self.folder if after < 0 else self.modules[after]

    def find(self, kernel: str, problem: AttentionProblem, arch: str) -> int | None:
        """Number of the instance that runs one direction of a problem: the smallest head dim, then the first."""
        return _find(self, kernel, problem, arch)


@functools.lru_cache(maxsize=4096)  # each launch asks
def _find(library: CkLibrary, kernel: str, problem: AttentionProblem, arch: str) -> int | None:
    instances = library.instances
    found = [n for n, instance in enumerate(instances) if instance.takes(kernel, problem, arch)]
    return min(found, key=lambda n: (instances[n].headdim + instances[n].headdim_v, n), default=None)


def describe(problem: AttentionProblem, arch: str, library: CkLibrary | None) -> list[str]:
    """One line for each direction of a problem that the library runs, now or once it is compiled, for ``explain``."""
    lines, wanted = [], configured(arch)
    for kernel in kernels_of(problem):
        number = None if library is None else library.find(kernel, problem, arch)
        if library is not None and number is not None:
            lines.append(f"{kernel}: {library.instances[number].name} ({library.folder_of(number)})")
            continue
        number = wanted.find(kernel, problem, arch)
        if number is not None:
            when = f"compiled at the first call, about {SECONDS_TO_COMPILE} s of a processor"
            lines.append(f"{kernel}: {wanted.instances[number].name} ({when})")
    return lines


def kernels_of(problem: AttentionProblem) -> tuple[str, ...]:
    """The kernels that a problem needs an instance of."""
    if problem.cached:
        return ("splitkv",)
    return ("forward", "backward") if problem.needs_grad else ("forward",)


def is_masked(problem: AttentionProblem) -> bool:
    """Whether a mask hides keys, be it a causal one or a window; what is right of one query over a cache is nothing."""
    hides_right = problem.window_right >= 0 and not (problem.cached and problem.seqlen_q == 1)
    return problem.window_left >= 0 or hides_right


def from_config(entry: CkConfig, arch: str) -> list[CkInstance]:
    """The instances that an entry of a config file asks for."""
    return [
        CkInstance(entry.kernel, dtype, *entry.headdims, variant, (arch,), entry.tile_of_scores, entry.occupancy)
        for dtype in entry.dtypes
        for variant in entry.variants
    ]


def wanted_of(arch: str, folder: str | None = None) -> list[tuple[CkConfig, CkInstance]]:
    """What the ``ck`` entries of an arch ask for, in the order in which selection tries it.

    Args:
        folder: config files that replace the shipped ones.

    Raises:
        ConfigError: a file is wrong, or two entries make instances of one name, of which the second would never run.
    """
    found: dict[str, tuple[CkConfig, CkInstance]] = {}
    for entry in config.arch_configs(arch, folder).ck:
        for instance in from_config(entry, arch):
            if instance.name in found:
                raise ConfigError(
                    f"{entry.source}: expected each instance of {arch} once, got {instance.name}, which "
                    f"{found[instance.name][0].source} makes too. Hint: take it out of one of them"
                )
            found[instance.name] = entry, instance
    return list(found.values())


def built() -> CkLibrary | None:
    """The library that calls use: that of an explicit ``FLASH_ROCM_CACHE_DIR``, else that of the package, if any.

    With what was compiled on demand: instances, and where nothing is installed what launches them.

    Raises:
        ConfigError: its list of instances is damaged.
    """
    return _built(runtime.built_ck(), runtime.on_demand_ck())


def look_again() -> None:
    """Something was compiled since :func:`built` looked."""
    _built.cache_clear()


def shipped(arch: str) -> CkLibrary:
    """The library that all entries of the shipped configs would make; no folder holds it."""
    return _all_of(arch, None)


def configured(arch: str) -> CkLibrary:
    """Likewise, where the user may have replaced the shipped configs."""
    return _all_of(arch, runtime.on_demand_ck().configs)


@functools.lru_cache(maxsize=16)
def _all_of(arch: str, folder: str | None) -> CkLibrary:
    return CkLibrary(pathlib.Path(), (arch,), tuple(instance for _, instance in wanted_of(arch, folder)))


@functools.lru_cache(maxsize=16)
def _built(explicit: pathlib.Path | None, on_demand: OnDemand) -> CkLibrary | None:
    folder = files.library_folder(explicit, MANIFEST, LIBRARY)
    is_there = on_demand.folder.is_dir()  # nearly never: then nothing is looked for
    if folder is None and is_there and (ck_store.base(on_demand) / MANIFEST).is_file():
        folder = ck_store.base(on_demand)
    if folder is None:
        return None
    library = _read(folder)
    if not is_there:
        return library
    modules = tuple(
        place
        for arch in ARCHS
        if arch in library.archs
        for entry, instance in wanted_of(arch, on_demand.configs)
        if ((place := ck_store.place(on_demand, arch, instance.name, entry)) / MANIFEST).is_file()
    )
    instances = (*library.instances, *(instance for place in modules for instance in _read(place).instances))
    return CkLibrary(folder, library.archs, instances, modules)


def _read(folder: pathlib.Path) -> CkLibrary:
    where = str(folder / MANIFEST)
    hint = "Hint: build it again"
    try:
        raw = config.parse(where, (folder / MANIFEST).read_text(encoding="utf-8"))
        contents = check_object(where, raw, ("archs", "instances", "built_with"), ("archs", "instances", "built_with"))
        names = [field.name for field in dataclasses.fields(CkInstance)]
        rows = [check_object(where, row, names, names) for row in contents["instances"]]
        tuples = ("variant", "archs", "tile")
        instances = tuple(CkInstance(**row | {key: tuple(row[key]) for key in tuples}) for row in rows)
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{where}: expected the list of a library's instances, {error}. {hint}") from error
    return CkLibrary(folder, tuple(contents["archs"]), instances)


def manifest(archs: tuple[str, ...], instances: list[CkInstance], built_with: str) -> dict[str, object]:
    """What ``instances.json`` says, for whoever builds."""
    return {
        "archs": archs,
        "built_with": built_with,
        "instances": [dataclasses.asdict(instance) for instance in instances],
    }


def refusals(
    problem: AttentionProblem, arch: str, library: CkLibrary | None, others: CkLibrary | None = None
) -> list[str]:
    """Why Composable Kernel does not run a problem, beside the features that the back end lacks as a whole.

    Args:
        library: whose instances there are; None where that is of no interest.
        others: with instances that count as there.
    """
    reasons = []
    if problem.dropout_p > 0.0:
        reasons.append(
            "dropout in Composable Kernel compares 8 bits of a random number, elsewhere 31: masks would differ"
        )
    if problem.headdim % 8 or problem.headdim_v % 8:
        reasons.append(f"headdim {problem.headdim}, {problem.headdim_v} of v: only multiples of 8")
    if problem.softmax_scale <= 0.0:
        reasons.append(f"softmax_scale {problem.softmax_scale}: only > 0, as the largest score is found before scaling")
    if problem.softcap > 0.0 and problem.needs_grad:
        reasons.append("softcap has no backward in Composable Kernel")
    if problem.softcap > 0.0 and problem.alibi:
        reasons.append("softcap and alibi are not combined in Composable Kernel")
    if problem.alibi and max(problem.seqlen_q, problem.seqlen_k) > _MAX_ALIBI_SEQLEN:
        reasons.append(f"alibi over more than {_MAX_ALIBI_SEQLEN} positions, whose distances are 16-bit numbers there")
    if problem.needs_grad and problem.deterministic:
        # Blocks of 64 keys, the smallest that there are, have a part of dq each.
        part = -(-problem.seqlen_k // 64) * problem.seqlen_q * problem.headdim
        if part >= 1 << 29 or problem.batch * problem.nheads * part >= 1 << 31:
            reasons.append("deterministic, with parts of dq that are too large for Composable Kernel's 32-bit strides")
    rows, rows_k = problem.seqlen_q, problem.seqlen_k
    heads_k = problem.nheads
    if problem.cached:
        reasons += _cache_refusals(problem)
        rows_k, heads_k = problem.page_size or problem.seqlen_k, problem.nheads_k
    if 2 * max(problem.headdim, problem.headdim_v) * max(problem.nheads * rows, heads_k * rows_k) >= _MAX_BYTES:
        reasons.append("a sequence of 2 GiB or more, which Composable Kernel addresses with 32 bits")
    if library is None or reasons:
        return reasons
    if lacks := why_not_on(arch, library):
        return lacks
    for kernel in kernels_of(problem):
        if library.find(kernel, problem, arch) is None and (
            others is None or others.find(kernel, problem, arch) is None
        ):
            reasons.append(f"no instance of the library runs the {kernel}: {_wanted(kernel, problem, arch)}")
    return reasons


def why_not_on(arch: str, library: CkLibrary) -> list[str]:
    """Why a library runs nothing on a chip; empty if it is built for it."""
    if arch in library.archs:
        return []
    command = BUILD_COMMAND.format(archs=";".join((*library.archs, arch)))
    return [f"the library is built for {', '.join(library.archs)}, not for {arch}: {command}"]


def _cache_refusals(problem: AttentionProblem) -> list[str]:
    """Why Composable Kernel does not run a problem over a K/V cache."""
    reasons = []
    if problem.headdim != problem.headdim_v:
        reasons.append(f"headdim_v {problem.headdim_v} other than headdim over a K/V cache: no tile in the configs")
    if problem.leftpad and problem.page_size:
        reasons.append("leftpad in pages, of which Composable Kernel reads the padding beside the first keys")
    # Results are (nheads, splits, rows, headdim_v) float32.  Without a mask the heads of a group are one view.
    head = problem.batch * problem.seqlen_q * problem.headdim_v
    if (head if is_masked(problem) or problem.alibi else 4 * head * problem.group_size) >= _MAX_BYTES:
        reasons.append("results of 2 GiB or more, which Composable Kernel addresses with 32 bits")
    return reasons


def _wanted(kernel: str, problem: AttentionProblem, arch: str) -> str:
    """The name that an instance for exactly this problem would have, and how it would be built."""
    used = {
        "varlen": problem.varlen and kernel != "splitkv",
        "masked": is_masked(problem) or problem.alibi,
        "alibi": problem.alibi,
        "softcap": problem.softcap > 0.0,
        "deterministic": kernel == "backward" and problem.deterministic,
    }
    variant = tuple(name for name in CK_VARIANTS if used[name])
    dtype = str(problem.dtype).removeprefix("torch.")
    if dtype not in _SHORT:
        return f"{dtype} has none"
    exact = CkInstance(kernel, dtype, problem.headdim, problem.headdim_v, variant, (arch,), (64, 64), 0)
    pages = f" of a tile whose keys divide pages of {problem.page_size}" if problem.page_size else ""
    hint = f"build with it in the ck entries of {arch}.json"
    if configured(arch).find(kernel, problem, arch) is not None:
        hint = f'flash-rocm build --ck --arch {arch} --problem "{problem.options()}"'
    return f"expected {exact.name}{pages} or one that takes more. Hint: {hint}"
