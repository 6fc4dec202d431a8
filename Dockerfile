# flash_rocm on ROCm with both back ends.  docs/docker.md has the lines that build and run it.
#
# No engine builds it in CI: each RUN is one script of packaging/docker, which the tests execute on plain Debian.

# Brings torch with ROCm and Triton; nothing of it is replaced.
ARG BASE=rocm/pytorch:rocm7.2.4_ubuntu24.04_py3.12_pytorch_release_2.10.0

FROM ${BASE} AS wheel
ARG FLASH_ROCM_ARCHS="gfx90a;gfx942"
# Patterns of Composable Kernel instances, such as "*bf16_d128*"; all of them take an hour and a half of a processor.
ARG FLASH_ROCM_INSTANCES="*"
ARG MAX_JOBS=""
COPY . /src
RUN ["/src/packaging/docker/build-wheel.sh", "/src", "/wheels"]

FROM ${BASE} AS runtime
# Chips that Triton kernels are compiled for ahead of time; others compile theirs at first use.
ARG TRITON_ARCHS="gfx90a;gfx942;gfx950"
COPY packaging/docker /opt/flash_rocm/docker
COPY --from=wheel /wheels /opt/flash_rocm/wheels
RUN ["/opt/flash_rocm/docker/install.sh", "/opt/flash_rocm/wheels"]
# Layers of their own: the kernels stay where only the user changes.
# hadolint ignore=DL3059
RUN /opt/flash_rocm/docker/compile-kernels.sh "${TRITON_ARCHS}" /opt/flash_rocm/cache
# hadolint ignore=DL3059
RUN ["/opt/flash_rocm/docker/user.sh", "1000", "/home/flash_rocm", "/opt/flash_rocm/cache"]

# A number, so that Kubernetes sees that it is not root.  Libraries that ask for its name find one here.
USER 1000:1000
ENV HOME=/home/flash_rocm \
    USER=flash_rocm \
    FLASH_ROCM_CACHE_DIR=/opt/flash_rocm/cache \
    FLASH_ROCM_BACKEND=auto
WORKDIR /home/flash_rocm

HEALTHCHECK --interval=5m --timeout=1m --start-period=1m CMD ["flash-rocm", "info"]
CMD ["flash-rocm", "info"]
