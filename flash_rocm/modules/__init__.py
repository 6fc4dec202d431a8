"""The modules of flash-attn that models are built of, on flash_rocm's attention and layers."""
