"""flash_rocm: FlashAttention for AMD GPUs first, two kernel back ends behind one interface."""

from flash_rocm import v3
from flash_rocm.api import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_rocm.backends import BackendError
from flash_rocm.explanation import explain
from flash_rocm.inference import flash_attn_combine, flash_attn_with_kvcache
from flash_rocm.runtime import use_backend
from flash_rocm.virtual_device import virtual_gpu

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "explain",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "use_backend",
    "v3",
    "virtual_gpu",
]
