"""Process state: the only reader of ``os.environ``.

A leaf.  Nothing is read at import and nothing is frozen: the environment is looked at when a call
needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from flash_rocm import variables
from flash_rocm.config_schema import ConfigError

BACKEND_NAMES = ("ck", "triton", "reference")
REQUESTS = ("auto", *BACKEND_NAMES)

logger = logging.getLogger("flash_rocm")

# Each attention call looks for variables that are hardly ever set.  os.environ would raise and catch a
# KeyError for each; the table behind it (the same live data) just answers.
_variables: Mapping[bytes, bytes] = getattr(os.environb, "_data", os.environb)

#: Set by :func:`use_backend`.  A plain global, because torch.compile guards on globals: a graph
#: traced under one choice is traced again under another.
_override: str | None = None


def environment_request() -> str:
    """The back end asked for by the environment: ``auto``, ``ck``, ``triton`` or ``reference``.

    ``FLASH_ROCM_BACKEND`` wins; ``FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE``, which ROCm users of
    flash-attn know, means ``triton``.

    Raises:
        ValueError: ``FLASH_ROCM_BACKEND`` names no back end.
    """
    raw = _variables.get(b"FLASH_ROCM_BACKEND")
    theirs = _variables.get(b"FLASH_ATTENTION_TRITON_AMD_ENABLE")
    if raw:
        ours = os.fsdecode(raw)
        request = ours.strip().lower()
        if request not in REQUESTS:
            raise ValueError(
                f"FLASH_ROCM_BACKEND: expected one of {', '.join(REQUESTS)}, got {ours!r}. Hint: unset it for 'auto'."
            )
        if theirs == b"TRUE" and request != "triton":
            warn_once(
                f"FLASH_ROCM_BACKEND={request} overrides FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE (which asks for triton)"
            )
        return request
    return "triton" if theirs == b"TRUE" else "auto"


def requested_backend() -> str:
    """The back end asked for now: by :func:`use_backend` if inside one, else by the environment."""
    return _override or environment_request()


def override() -> str:
    """The name given to the innermost :func:`use_backend`, or "" outside of any."""
    return _override or ""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Route the attention calls made inside to one back end.

    Process-wide, like the environment variable it overrides.  The backward of a call made inside
    uses the same back end even when it runs outside.

    Args:
        name: ``ck``, ``triton``, ``reference`` (each raises where it cannot run the call, with its
            reasons) or ``auto``.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _override
    if name not in REQUESTS:
        raise ValueError(
            f"name: expected one of {', '.join(REQUESTS)}, got {name!r}. "
            "Hint: flash_rocm.explain shows what each can run."
        )
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


def environment_virtual_gpu() -> str:
    """``FLASH_ROCM_VIRTUAL_GPU``: the arch that CPU tensors run on as machine code, "" if unset."""
    return os.fsdecode(_variables.get(b"FLASH_ROCM_VIRTUAL_GPU") or b"")


class ConfigSource(NamedTuple):
    """What the user's variables say of kernel configs, unread; None where a variable is not set."""

    folder: str | None = None  # FLASH_ROCM_CONFIG_DIR, whose files replace the shipped ones one by one
    kernels: str | None = None  # FLASH_ROCM_KERNEL_CONFIG, inline JSON
    forward: str | None = None  # FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON, inline JSON
    tuned: str | None = None  # folder of tuned entries, where FLASH_ROCM_CACHE_DIR or autotuning is set
    tune: bool = False  # FLASH_ROCM_AUTOTUNE: tune what has no entry there


def config_source() -> ConfigSource | None:
    """Where kernel configs come from besides the shipped files; None, as nearly always, if from nowhere else.

    Part of the key of every launch, so it looks before it reads.

    Raises:
        ConfigError: ``FLASH_ROCM_AUTOTUNE`` is neither 0 nor 1.
    """
    if (
        b"FLASH_ROCM_CONFIG_DIR" in _variables
        or b"FLASH_ROCM_KERNEL_CONFIG" in _variables
        or b"FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON" in _variables
        or b"FLASH_ROCM_CACHE_DIR" in _variables
        or b"FLASH_ROCM_AUTOTUNE" in _variables
        or b"FLASH_ATTENTION_TRITON_AMD_AUTOTUNE" in _variables
    ):
        return _config_source(
            _variables.get(b"FLASH_ROCM_CONFIG_DIR"),
            _variables.get(b"FLASH_ROCM_KERNEL_CONFIG"),
            _variables.get(b"FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON"),
            _variables.get(b"FLASH_ROCM_AUTOTUNE"),
            _variables.get(b"FLASH_ATTENTION_TRITON_AMD_AUTOTUNE"),
            _variables.get(b"FLASH_ROCM_CACHE_DIR"),
            _variables.get(b"XDG_CACHE_HOME"),
        )
    return None


@functools.lru_cache(maxsize=64)
def _config_source(
    folder: bytes | None,
    kernels: bytes | None,
    forward: bytes | None,
    autotune: bytes | None,
    their_autotune: bytes | None,
    cache: bytes | None,
    shared_cache: bytes | None,
) -> ConfigSource | None:
    """A source for the values of the variables, so that launches with equal ones share it."""
    texts = [os.fsdecode(value) if value else None for value in (folder, kernels, forward)]
    tune = _autotune(os.fsdecode(autotune or b""), their_autotune == b"TRUE")
    tuned = str(_cache_dir(cache, shared_cache) / "tuning") if tune or cache else None
    return ConfigSource(texts[0], texts[1], texts[2], tuned, tune)


def _autotune(ours: str, theirs: bool) -> bool:
    if ours not in ("", "0", "1"):
        raise ConfigError(f"FLASH_ROCM_AUTOTUNE: expected 0 or 1, got {ours!r}. Hint: unset it for 0.")
    if ours == "0" and theirs:
        warn_once("FLASH_ROCM_AUTOTUNE=0 overrides FLASH_ATTENTION_TRITON_AMD_AUTOTUNE=TRUE")
    return ours == "1" or (theirs and not ours)


def debug() -> bool:
    """``FLASH_ROCM_DEBUG``: kernels over a K/V cache check what they read from the device, and calls wait for it.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    value = _variables.get(b"FLASH_ROCM_DEBUG")
    if value not in (None, b"", b"0", b"1"):
        raise ConfigError(f"FLASH_ROCM_DEBUG: expected 0 or 1, got {os.fsdecode(value)!r}. Hint: unset it for 0.")
    return value == b"1"


def cache_dir() -> pathlib.Path:
    """``FLASH_ROCM_CACHE_DIR``: what is kept between runs; default: ``flash_rocm`` in the user's cache folder."""
    return _cache_dir(_variables.get(b"FLASH_ROCM_CACHE_DIR"), _variables.get(b"XDG_CACHE_HOME"))


def _cache_dir(own: bytes | None, shared: bytes | None) -> pathlib.Path:
    if own:
        return pathlib.Path(os.fsdecode(own))
    return (pathlib.Path(os.fsdecode(shared)) if shared else pathlib.Path.home() / ".cache") / "flash_rocm"


def prebuilt_kernels() -> pathlib.Path | None:
    """Where ``flash-rocm build`` has put compiled kernels: ``triton`` in an explicit ``FLASH_ROCM_CACHE_DIR``."""
    return _built_in_cache("triton")


def built_ck() -> pathlib.Path | None:
    """Where ``flash-rocm build --ck`` has put its library: ``ck`` in an explicit ``FLASH_ROCM_CACHE_DIR``."""
    return _built_in_cache("ck")


def built_cuda() -> pathlib.Path | None:
    """Where ``flash-rocm build --cuda`` has put its library: ``cuda`` in an explicit ``FLASH_ROCM_CACHE_DIR``."""
    return _built_in_cache("cuda")


class OnDemand(NamedTuple):
    """What the variables say of instances of Composable Kernel that are compiled at first use."""

    folder: pathlib.Path  # of FLASH_ROCM_CACHE_DIR, or of its default
    ck_home: str
    configs: str | None  # FLASH_ROCM_CONFIG_DIR, whose entries they are of


def on_demand_ck() -> OnDemand:
    """Where they are kept, and what the user wants them of."""
    names = (b"FLASH_ROCM_CACHE_DIR", b"XDG_CACHE_HOME", b"CK_HOME", b"FLASH_ROCM_CONFIG_DIR")
    return _on_demand(*map(_variables.get, names))


@functools.lru_cache(maxsize=64)  # each launch asks
def _on_demand(own: bytes | None, shared: bytes | None, ck_home: bytes | None, configs: bytes | None) -> OnDemand:
    folder = _cache_dir(own, shared) / "ck_on_demand"
    return OnDemand(folder, os.fsdecode(ck_home or b""), os.fsdecode(configs) if configs else None)


def _built_in_cache(name: str) -> pathlib.Path | None:
    if not _variables.get(b"FLASH_ROCM_CACHE_DIR"):
        return None
    folder = cache_dir() / name
    return folder if folder.is_dir() else None


class BuildRequest(NamedTuple):
    """What the variables say of a build of the ``ck`` back end or of the kernels for CUDA, unchecked."""

    archs: tuple[str, ...]  # FLASH_ROCM_ARCHS, or GPU_ARCHS as other ROCm projects call it
    instances: str  # FLASH_ROCM_INSTANCES, patterns of names with commas between
    ck_home: str
    rocm_home: str  # only if set
    max_jobs: str
    cuda_home: str = ""


def build_request() -> BuildRequest:
    """Variables of a build; ``FLASH_ROCM_ARCHS`` wins over ``GPU_ARCHS``."""
    archs = os.environ.get("FLASH_ROCM_ARCHS") or os.environ.get("GPU_ARCHS") or ""
    return BuildRequest(
        tuple(name for name in re.split(r"[;,\s]+", archs) if name),
        os.environ.get("FLASH_ROCM_INSTANCES") or "*",
        os.environ.get("CK_HOME") or "",
        os.environ.get("ROCM_HOME") or "",
        os.environ.get("MAX_JOBS") or "",
        os.environ.get("CUDA_HOME") or "",
    )


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, read without importing it; None if there is none."""
    for distribution in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown" if importlib.util.find_spec("triton") else None


def rocm_home() -> str:
    """``ROCM_HOME``: where ROCm is installed."""
    return os.environ.get("ROCM_HOME") or "/opt/rocm"


def triton_interpret() -> bool:
    """Whether Triton kernels run under its CPU interpreter (Triton reads this when it decorates)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def environment_report() -> list[tuple[str, str, str]]:
    """(name, value, note) of every variable that is set and matters, for ``flash-rocm info``."""
    groups = (
        ({**variables.RUN, **variables.BUILD}, ""),
        (variables.DEVICES, "read by the driver"),
    )
    return [(name, os.environ[name], note) for names, note in groups for name in names if name in os.environ]


def subprocess_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process, with some variables changed."""
    return {**os.environ, **changes}


def set_default_variable(name: str, value: str) -> None:
    """Set a variable that another library reads, unless the user has set it."""
    os.environ.setdefault(name, value)


def configure_logging() -> None:
    """Apply ``FLASH_ROCM_LOG`` (debug, info or warning) to the ``flash_rocm`` logger.

    Raises:
        ValueError: any other value.
    """
    level = os.environ.get("FLASH_ROCM_LOG")
    if not level:
        return
    if level.lower() not in ("debug", "info", "warning"):
        raise ValueError(f"FLASH_ROCM_LOG: expected debug, info or warning, got {level!r}.")
    logger.setLevel(level.upper())
    if not logger.handlers:
        logger.propagate = False  # the root logger, if it has a handler, would print the line again
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("flash_rocm %(levelname)s: %(message)s"))
        logger.addHandler(handler)


@functools.cache
def warn_once(message: str) -> None:
    """A warning, however often the same thing happens."""
    warnings.warn(message, stacklevel=4)


@functools.cache
def log_once(message: str, level: int = logging.INFO) -> None:
    """One line, at info level unless stated, however often the same thing happens.

    Raises:
        ValueError: ``FLASH_ROCM_LOG`` is none of debug, info and warning.
    """
    configure_logging()
    logger.log(level, message)
