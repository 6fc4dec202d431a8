"""``flash-rocm bench``: speed, memory and host overhead of flash_rocm beside other attention libraries.

``shapes`` says what is computed, ``peers`` who computes it, ``check`` whether the result is right,
``timing`` how long it took; ``grid``, ``memory`` and ``overhead`` are the three measurements,
``report`` and ``plot`` show them.  Importing this needs neither a GPU nor Triton nor matplotlib.
"""
