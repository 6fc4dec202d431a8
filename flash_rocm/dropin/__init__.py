"""flash-attn's import names, answered by flash_rocm: for code that does ``import flash_attn`` and stays as it is.

:func:`install` does it in the running process; ``python -m flash_rocm.dropin SCRIPT`` or ``-m MODULE`` before a program
starts.  Which names there are, :data:`flash_rocm.dropin.finder.MODULES` says; flash-attn's other modules are not found.
"""

from __future__ import annotations

from flash_rocm.dropin.finder import DropInError, install

__all__ = ["DropInError", "install"]
