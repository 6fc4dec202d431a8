"""The Composable Kernel back end.

Its compiled part, ``flash_rocm._ck._C``, is not part of this version: selection reports it as not
built (see ``flash_rocm.backends``).
"""
