"""Kernel configs: one JSON file per arch, read by ``flash_rocm.config``."""
