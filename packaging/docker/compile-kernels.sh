#!/usr/bin/env bash
# Second stage of the Dockerfile: compile-kernels.sh ARCHS CACHE [OPTIONS of flash-rocm build] compiles the Triton kernels
# for "gfx90a;gfx942" and the like.  No GPU is needed.
set -euo pipefail
archs="${1:?ARCHS: gfx90a;gfx942 and the like}"
cache="${2:?CACHE: the folder of FLASH_ROCM_CACHE_DIR}"
shift 2
python="${PYTHON:-python3}"

"$python" -m flash_rocm.cli build --triton --arch "${archs//;/,}" --output "$cache/triton" "$@"
chmod -R a+rX "$cache"
