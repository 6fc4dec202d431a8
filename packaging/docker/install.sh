#!/usr/bin/env bash
# Second stage of the Dockerfile: install.sh WHEELS installs what the first has built.  The base image brings torch and
# Triton; nothing of it is replaced.
set -euo pipefail
wheels="${1:?WHEELS: the folder with the wheel}"
python="${PYTHON:-python3}"

"$python" -m pip install --no-cache-dir --no-index --no-deps "$wheels"/flash_rocm-*.whl
# Fails where the package cannot be imported, and shows in the build's log what is in the image.
"$python" -m flash_rocm.cli info
