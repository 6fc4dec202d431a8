"""How kernels are declared."""

from collections.abc import Callable
from typing import Any

import triton.language as tl


def kernel(jit: Callable[..., Any]) -> Callable[[Any], Any]:
    """Decorator of a kernel: ``triton.jit`` or ``gluon.jit``, without specialisation on the values of its numbers.

    These are the arguments with a type.  A new length, stride, scale or window so compiles nothing.
    """

    def declare(function: Any) -> Any:
        numbers = [name for name, kind in function.__annotations__.items() if kind is not tl.constexpr]
        return jit(function, do_not_specialize=numbers)

    return declare
