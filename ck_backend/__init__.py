"""The Composable Kernel back end: generated instances, a torch-free core, and operators on PyTorch's stable ABI.

``generate`` turns the ``ck`` entries of configs/*.json into C++, ``build`` compiles it, ``library`` loads what was
compiled, ``backend`` is what selection calls.
"""
