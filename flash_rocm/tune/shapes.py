"""What to tune for: presets, and files in YAML.

A file is a list of shapes; each value may be a list of values, which stands for a shape with each of them::

    - {dtype: bf16, headdim: 128, seqlen: [2048, 8192], mask: causal, group: 8}
    - {dtype: [bf16, fp16], headdim: 64, seqlen: 512, varlen: true, backward: false}
    - {headdim: 128, cache: 32768, batch: [1, 64], page_size: 16, mask: causal, group: 4}

A shape with ``cache`` is of calls over a K/V cache, of so many keys.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flash_rocm import backends
from flash_rocm.arch import Arch
from flash_rocm.problem import AttentionProblem, default_softmax_scale
from flash_rocm.tuned import CACHE_GROUPS, GROUPS, MASKS, TuneKey

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PRESETS: dict[str, list[dict[str, Any]]] = {
    "quick": [{"headdim": 128, "seqlen": 4096, "mask": ["causal", "full"]}],
    "training": [
        {"headdim": [64, 128], "seqlen": [1024, 2048, 4096, 8192, 16384], "mask": ["causal", "full"], "group": [1, 8]}
    ],
    "serving": [
        {
            "headdim": [64, 128],
            "seqlen": [512, 2048, 8192, 32768],
            "mask": "causal",
            "group": [1, 4, 8],
            "varlen": [False, True],
            "backward": False,
        }
    ],
    "decoding": [
        {
            "headdim": 128,
            "cache": [1024, 4096, 32768],
            "batch": [1, 8, 64],
            "page_size": [0, 16, 64],
            "mask": "causal",
            "group": 4,
        }
    ],
}


class ShapesError(ValueError):
    """Shapes are wrong; the text names file, shape, key, what was expected and what it got."""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


#: Key -> default (None: it must be given), what is right, and how to say so.
_Keys = dict[str, tuple[Any, Callable[[Any], bool], str]]


def _headdim(limit: int) -> tuple[Any, Callable[[Any], bool], str]:
    return None, lambda value: _is_size(value) and value <= limit, f"1 to {limit}"


_FIRST: _Keys = {
    "dtype": ("bf16", lambda value: isinstance(value, str) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "headdim": _headdim(backends.TRITON.max_headdim),
}
_SECOND: _Keys = {
    "mask": ("full", lambda value: isinstance(value, str) and value in MASKS, f"one of {', '.join(MASKS)}"),
    "group": (1, lambda value: _is_size(value) and value <= 1024, "query heads per key head, 1 to 1024"),
    "varlen": (False, lambda value: isinstance(value, bool), "true or false"),
}
_KEYS: _Keys = {
    **_FIRST,
    "seqlen": (None, _is_size, "a whole number >= 1"),
    **_SECOND,
    "backward": (True, lambda value: isinstance(value, bool), "true or false"),
}
#: Of shapes with a cache.  Head dims above the others' are absorbed MLA's.
_CACHE_KEYS: _Keys = {
    **_FIRST,
    "headdim": _headdim(backends.TRITON.max_headdim_cached),
    "cache": (None, _is_size, "a whole number >= 1"),
    "queries": (1, _is_size, "a whole number >= 1"),
    "batch": (1, _is_size, "a whole number >= 1"),
    "page_size": (0, lambda value: value == 0 or _is_size(value), "a whole number >= 0, 0 for no pages"),
    **_SECOND,
}


def read(name: str) -> list[dict[str, Any]]:
    """The shapes of a preset or file, one value for each key.

    Raises:
        ShapesError: no such preset or file, no YAML, or something in it is wrong.
    """
    if name in PRESETS:
        return list(_expanded(name, PRESETS[name]))
    path = pathlib.Path(name)
    if not path.is_file():
        raise ShapesError(f"--shapes: expected a file or one of {', '.join(PRESETS)}, got {name!r}")
    try:
        import yaml
    except ImportError as error:
        raise ShapesError(f"--shapes: reading {name} takes pyyaml, {error}. Hint: pip install pyyaml") from error
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ShapesError(f"{name}: expected a readable YAML file, {error}") from error
    if not isinstance(contents, list) or not contents:
        raise ShapesError(f"{name}: expected a list of shapes, got {contents!r}")
    return list(_expanded(name, contents))


def _expanded(where: str, shapes: list[Any]) -> Iterable[dict[str, Any]]:
    for index, shape in enumerate(shapes):
        if not isinstance(shape, dict):
            raise ShapesError(f"{where}[{index}]: expected keys and values, got {shape!r}")
        keys = _CACHE_KEYS if "cache" in shape else _KEYS
        for key in shape:
            if key not in keys:
                raise ShapesError(f"{where}[{index}].{key}: expected one of the keys {', '.join(keys)}")
        columns: list[list[Any]] = []
        for key, (default, is_right, text) in keys.items():
            value = shape.get(key, default)
            values = value if isinstance(value, list) else [value]
            for one in values:
                if not is_right(one):
                    raise ShapesError(f"{where}[{index}].{key}: expected {text}, got {one!r}")
            columns.append(values)
        for combination in itertools.product(*columns):
            yield dict(zip(keys, combination, strict=True))


def keys_of(shapes: Iterable[dict[str, Any]], kernels: Iterable[str], arch: Arch) -> list[TuneKey]:
    """What to tune for some shapes, each key once: many lengths fall into one bucket."""
    planner, found, wanted = backends.load_planner(), [], tuple(kernels)
    for shape in shapes:
        problem = _problem_of(shape)
        found += [planner.tune_key(name, problem, arch) for name in planner.kernels_of(problem) if name in wanted]
    return list(dict.fromkeys(found))


def _problem_of(shape: dict[str, Any]) -> AttentionProblem:
    """A call of a shape."""
    is_cached, headdim = "cache" in shape, shape["headdim"]
    longest = shape["cache" if is_cached else "seqlen"]
    window = longest if shape["mask"] == "window" else -1
    return AttentionProblem(
        dtype=DTYPES[shape["dtype"]],
        device_type="cuda",
        batch=shape.get("batch", 1),
        seqlen_q=shape.get("queries", longest),
        seqlen_k=longest,
        nheads=min(shape["group"], (CACHE_GROUPS if is_cached else GROUPS)[-1]),
        nheads_k=1,
        headdim=headdim,
        headdim_v=min(headdim, backends.TRITON.max_headdim),  # MLA's, where that is less
        softmax_scale=default_softmax_scale(headdim),
        window_left=window,
        window_right=0 if shape["mask"] == "causal" else window,
        varlen=shape["varlen"],
        needs_grad=shape.get("backward", False),
        cached=is_cached,
        page_size=shape.get("page_size", 0),
    )
