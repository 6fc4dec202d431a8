"""The Triton back end.  Importing this imports no Triton: ``launch`` comes with the first call.

``launch`` is the back end that selection loads; ``plan`` turns problems into kernel constants;
``offline`` compiles kernels for chips that are not here; the kernels are in ``*_kernel*.py``.
"""
