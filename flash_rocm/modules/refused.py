"""What of flash-attn's modules is not there: importable, so that files that name it load."""

from __future__ import annotations

from typing import Any

import torch

TENSOR_PARALLEL = "layers divided among processes are not implemented. Hint: use the module for one process."


class Refused(torch.nn.Module):
    """Raises NotImplementedError with the class's reason when it is made."""

    reason = TENSOR_PARALLEL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__}: {self.reason}")
