# flash_rocm on ROCm.  Not built in CI: it needs the ROCm base image and, to be of use, an AMD GPU.
#
#   docker build -t flash-rocm .
#   docker run --device /dev/kfd --device /dev/dri --group-add video flash-rocm flash-rocm info
#
# The base image brings torch with ROCm and Triton; nothing of it is replaced.
ARG BASE=rocm/pytorch:latest
FROM ${BASE}

COPY . /opt/flash_rocm
RUN python3 -m pip install --no-cache-dir "setuptools>=77" wheel \
 && python3 -m pip install --no-cache-dir --no-build-isolation --no-deps /opt/flash_rocm

# Which back end runs the calls: auto, triton, reference, or ck (which this image is built without).
# Change it for one container with: docker run -e FLASH_ROCM_BACKEND=reference ...
ENV FLASH_ROCM_BACKEND=auto

CMD ["flash-rocm", "info"]
