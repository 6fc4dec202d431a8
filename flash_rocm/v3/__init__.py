"""The functions of FlashAttention-3: training in :mod:`flash_rocm.v3.attention`, inference in ``kvcache``."""

from __future__ import annotations

from flash_rocm.inference import flash_attn_combine
from flash_rocm.v3.attention import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_rocm.v3.kvcache import flash_attn_with_kvcache, get_scheduler_metadata

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
