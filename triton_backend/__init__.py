"""The Triton back end.  Importing this imports no Triton: ``launch`` comes with the first call.

``backend`` is what selection loads, ``launch`` and ``cached`` are its host side; ``plan`` turns problems
into kernel constants;
``offline`` compiles kernels for chips that are not here; the kernels are in ``*_kernel*.py``.
"""
