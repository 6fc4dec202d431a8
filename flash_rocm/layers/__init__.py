"""The layers around attention that flash-attn has: rotary embedding, norms, cross entropy, activations.

On a GPU they are Triton kernels, on the CPU plain torch; ``FLASH_ROCM_BACKEND`` and
:func:`flash_rocm.use_backend` choose as for attention, but that ``ck`` has no layers of its own.
"""
