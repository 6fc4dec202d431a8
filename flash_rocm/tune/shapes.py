"""What to tune for: presets, and files in YAML.

A file is a list of shapes; each value may be a list of values, which stands for a shape with each of them::

    - {dtype: bf16, headdim: 128, seqlen: [2048, 8192], mask: causal, group: 8}
    - {dtype: [bf16, fp16], headdim: 64, seqlen: 512, varlen: true, backward: false}
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flash_rocm import backends
from flash_rocm.problem import AttentionProblem, default_softmax_scale
from flash_rocm.runtime import Arch
from flash_rocm.tuned import GROUPS, MASKS, TuneKey

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
}


class ShapesError(ValueError):
    """Shapes are wrong; the text names file, shape, key, what was expected and what it got."""


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


#: Key -> default (None: it must be given), what is right, and how to say so.
_KEYS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "dtype": ("bf16", lambda value: isinstance(value, str) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "headdim": (
        None,
        lambda value: _is_size(value) and value <= backends.TRITON.max_headdim,
        f"1 to {backends.TRITON.max_headdim}",
    ),
    "seqlen": (None, _is_size, "a whole number >= 1"),
    "mask": ("full", lambda value: isinstance(value, str) and value in MASKS, f"one of {', '.join(MASKS)}"),
    "group": (1, lambda value: _is_size(value) and value <= 1024, "query heads per key head, 1 to 1024"),
    "varlen": (False, lambda value: isinstance(value, bool), "true or false"),
    "backward": (True, lambda value: isinstance(value, bool), "true or false"),
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
        for key in shape:
            if key not in _KEYS:
                raise ShapesError(f"{where}[{index}].{key}: expected one of the keys {', '.join(_KEYS)}")
        columns: list[list[Any]] = []
        for key, (default, is_right, text) in _KEYS.items():
            value = shape.get(key, default)
            values = value if isinstance(value, list) else [value]
            for one in values:
                if not is_right(one):
                    raise ShapesError(f"{where}[{index}].{key}: expected {text}, got {one!r}")
            columns.append(values)
        for combination in itertools.product(*columns):
            yield dict(zip(_KEYS, combination, strict=True))


def keys_of(shapes: Iterable[dict[str, Any]], kernels: Iterable[str], arch: Arch) -> list[TuneKey]:
    """What to tune for some shapes, each key once: many lengths fall into one bucket."""
    planner, found = backends.load_planner(), []
    for shape in shapes:
        seqlen, causal = shape["seqlen"], shape["mask"] == "causal"
        group = min(shape["group"], GROUPS[-1])
        problem = AttentionProblem(
            dtype=DTYPES[shape["dtype"]],
            device_type="cuda",
            batch=1,
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            nheads=group,
            nheads_k=1,
            headdim=shape["headdim"],
            headdim_v=shape["headdim"],
            softmax_scale=default_softmax_scale(shape["headdim"]),
            window_left=seqlen if shape["mask"] == "window" else -1,
            window_right=0 if causal else seqlen if shape["mask"] == "window" else -1,
            varlen=shape["varlen"],
        )
        for kernel in kernels:
            if kernel == "forward" or shape["backward"]:
                found.append(planner.tune_key(kernel, problem, arch))
    return list(dict.fromkeys(found))
