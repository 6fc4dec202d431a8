"""The environment variables that :mod:`flash_rocm.runtime` reads, and what they mean.  A leaf."""

from __future__ import annotations

#: Name -> meaning, in Markdown, of what a call or the command looks at.
RUN = {
    "FLASH_ROCM_BACKEND": "`auto` (default), `ck`, `triton` or `reference`",
    "FLASH_ATTENTION_TRITON_AMD_ENABLE": "`TRUE` means `triton`, as in flash-attn; `FLASH_ROCM_BACKEND` wins",
    "FLASH_ROCM_CONFIG_DIR": (
        "folder whose kernel configs (`gfx942.json`, ...; `configs/schema.json` says what they hold) replace the "
        "shipped ones, file by file"
    ),
    "FLASH_ROCM_KERNEL_CONFIG": (
        'inline JSON, `{"forward": {"BLOCK_M": 64}}`: options that replace those of the entry a kernel would '
        "take; `flash-rocm explain` shows which"
    ),
    "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON": (
        "the same for the forward kernel, as in flash-attn (`PRE_LOAD_V` changes nothing); "
        "`FLASH_ROCM_KERNEL_CONFIG` wins"
    ),
    "FLASH_ROCM_AUTOTUNE": "`1` tunes kernel configs at first use and keeps them ([tuning](tuning.md)); default: `0`",
    "FLASH_ATTENTION_TRITON_AMD_AUTOTUNE": "`TRUE` means the same, as in flash-attn; `FLASH_ROCM_AUTOTUNE` wins",
    "FLASH_ROCM_CACHE_DIR": (
        "what is kept between runs: tuned configs, what `flash-rocm build` builds, reports of `flash-rocm "
        "inspect`; default: `flash_rocm` in the user's cache folder. Tuned configs are used if this or "
        "`FLASH_ROCM_AUTOTUNE=1` is set, built kernels only if this is, and instances of Composable Kernel that were "
        "compiled on demand always ([ck.md](ck.md#an-instance-that-is-missing))"
    ),
    "XDG_CACHE_HOME": "the user's cache folder; default: `~/.cache`",
    "FLASH_ROCM_VIRTUAL_GPU": (
        "`gfx90a`, `gfx942`, `gfx950`, `gfx1100`, `gfx1200` or `gfx1201`: CPU tensors run as that chip's machine "
        "code on the virtual GPU ([virtual GPU](virtual-gpu.md))"
    ),
    "FLASH_ROCM_DEBUG": (
        "`1` checks on the device the lengths, cache entries and page numbers of calls over a K/V cache: what is "
        "out of range raises, and nothing outside of the cache is touched; such a call waits for the GPU; "
        "default: `0`"
    ),
    "FLASH_ROCM_LOG": "`debug`, `info` or `warning`",
    "TRITON_INTERPRET": (
        "`1` runs the Triton kernels on the CPU (with `FLASH_ROCM_BACKEND=triton`); slow, for debugging"
    ),
}
#: Likewise, of what a build looks at.
BUILD = {
    "FLASH_ROCM_BUILD": (
        "of `pip install`: `ck`, which compiles the Composable Kernel library (default where `ROCM_HOME` or /opt/rocm "
        "is a ROCm with its compiler, and `--no-build-isolation`); `none` (default elsewhere); `cuda`, which "
        "compiles append and combine in C++ for NVIDIA GPUs ([ck.md](ck.md#the-auxiliary-kernels))"
    ),
    "FLASH_ROCM_ARCHS": 'archs of that library; default: `"gfx90a;gfx942"`, of `cuda` `"sm80;sm90"`',
    "GPU_ARCHS": "the same, as other ROCm projects call it; `FLASH_ROCM_ARCHS` wins",
    "FLASH_ROCM_INSTANCES": (
        'patterns of the instances to compile, with commas between, such as `"forward_bf16_d128*"`; default: all'
    ),
    "CK_HOME": "a clone of Composable Kernel to compile against, instead of the pinned one",
    "CUDA_HOME": "the CUDA toolkit whose nvcc a build takes; default: nvcc on the path, or /usr/local/cuda",
    "ROCM_HOME": (
        "where ROCm is (`/opt/rocm`); `flash-rocm inspect --object` looks for its disassembler, a build for its "
        "compiler there"
    ),
    "MAX_JOBS": "compilers at a time; default: as many as there are processors, and 1.2 GB of memory for each",
}
#: Of the driver and of torch: they decide which devices are seen, and ``flash-rocm info`` shows them.
DEVICES = {
    "HIP_VISIBLE_DEVICES": "GPUs that HIP shows, by index",
    "ROCR_VISIBLE_DEVICES": "GPUs that the ROCm runtime shows, by index or UUID",
    "CUDA_VISIBLE_DEVICES": "GPUs that CUDA shows; on ROCm the same as `HIP_VISIBLE_DEVICES`",
    "HSA_OVERRIDE_GFX_VERSION": "makes the ROCm runtime take a GPU for another chip; kernels follow what it says",
}
