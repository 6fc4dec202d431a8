"""Code objects of others that tests read; they are no part of this repository."""

from __future__ import annotations

import os
import pathlib

NO_AITER = "FLASH_ROCM_TEST_AITER: not set to the unpacked amd-aiter wheel, as make test does"


def aiter_root() -> pathlib.Path | None:
    """Folder of the code objects (``gfx942/fmha_v3_fwd/...``) in the unpacked wheel amd-aiter, or None."""
    unpacked = os.environ.get("FLASH_ROCM_TEST_AITER")
    root = pathlib.Path(unpacked) / "aiter_meta" / "hsa" if unpacked else None
    return root if root is not None and root.is_dir() else None
