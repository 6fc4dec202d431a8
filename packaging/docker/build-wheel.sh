#!/usr/bin/env bash
# First stage of the Dockerfile: build-wheel.sh SOURCE WHEELS makes a wheel with both back ends.
# FLASH_ROCM_ARCHS, FLASH_ROCM_INSTANCES and MAX_JOBS say what is compiled, PYTHON which Python's torch it is for.
set -euo pipefail
source="${1:?SOURCE: the folder of setup.py}"
wheels="${2:?WHEELS: the folder for the wheel}"
python="${PYTHON:-python3}"

"$python" -m pip install --no-cache-dir "setuptools>=77" wheel ninja
FLASH_ROCM_BUILD=ck "$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$wheels" "$source"
