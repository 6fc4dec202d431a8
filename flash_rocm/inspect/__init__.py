"""What the kernels compile to, for chips that are not here: registers, spills, occupancy, the mix of hot loops.

A static model: nothing is run.  ``flash-rocm inspect`` is its command, :func:`inspect_problem` its function.
"""

from .counts import InspectError
from .kernels import inspect_problem
from .report import Report

__all__ = ["InspectError", "Report", "inspect_problem"]
