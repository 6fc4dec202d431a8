"""docs/write.py as a module, for the tests of the pages that it writes."""

from __future__ import annotations

import importlib.util
import pathlib

_PATH = pathlib.Path(__file__).parent.parent / "docs" / "write.py"
_spec = importlib.util.spec_from_file_location("docs_write", _PATH)
assert _spec is not None and _spec.loader is not None
write = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write)
