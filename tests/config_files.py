"""Config files of a user, for tests."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from flash_rocm.config_schema import Facts
from flash_rocm.runtime import ConfigSource

FACTS = Facts("bfloat16", 128, 1024, causal=False, masked=False, varlen=False)
OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
ENTRY = {"kernel": "forward", "options": OPTIONS, "provenance": {"how": "first choice"}}


def write(folder: pathlib.Path, arch: str = "gfx942", **contents: Any) -> ConfigSource:
    """One file of a user's folder."""
    raw = {"arch": arch, **({"triton": [ENTRY]} | contents)}
    if "inherits" in contents:
        del raw["triton"]
    (folder / f"{arch}.json").write_text(json.dumps(raw))
    return ConfigSource(folder=str(folder))
