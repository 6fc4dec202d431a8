"""flash_rocm under the name of flash-attn: flash_rocm.dropin puts its own module in the place of this one."""

__flash_rocm_dropin__ = True

from flash_rocm.dropin import install  # noqa: E402

install()
