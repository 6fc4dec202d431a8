"""Simple Triton kernels, as machine code of every chip on the virtual GPU, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")
pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from flash_rocm import runtime
from flash_rocm.virtual import CodeObject, LaunchStats, VirtualGpu

if runtime.triton_interpret():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

import virtual_kernels as kernels

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
ORDERS = ("lockstep", "forward", "reverse", "shuffled:1")
FLOATS = {"x_ptr": "*fp32", "y_ptr": "*fp32"}


def launch(
    code: CodeObject, grid: tuple[int, int, int], arrays: dict[str, np.ndarray], numbers: list[int], order: str
) -> LaunchStats:
    gpu = VirtualGpu(code.arch)
    pointers = [gpu.memory.add(name, array) for name, array in arrays.items()]
    return gpu.launch(
        code, grid=grid, block_threads=code.max_threads, kernargs=[*pointers, *numbers, 0, 0], order=order
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_copy(arch: str, order: str) -> None:
    code, _ = kernels.build(kernels.copy_kernel, arch, FLOATS, 256)
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    y = np.full(1000, np.nan, np.float32)
    launch(code, (4, 1, 1), {"x": x, "y": y}, [1000], order)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("arch", ARCHS)
def test_exp(arch: str) -> None:
    code, _ = kernels.build(kernels.exp_kernel, arch, FLOATS, 256)
    x = np.linspace(-100, 88, 1000, dtype=np.float32)
    y = np.empty_like(x)
    launch(code, (4, 1, 1), {"x": x, "y": y}, [1000], "lockstep")
    expected = np.exp(x.astype(np.float64))
    # Triton computes exp2(x * log2(e)): the product, rounded to float32, is off by up to its half unit.
    assert (np.abs(y - expected) <= (np.abs(x) + 2) * 2.0**-22 * expected + 1e-38).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_reduce(arch: str, order: str) -> None:
    code, _ = kernels.build(kernels.reduce_kernel, arch, FLOATS, 1024)
    x = np.random.default_rng(0).integers(-50, 50, (5, 1000)).astype(np.float32)
    y = np.empty(5, np.float32)
    launch(code, (5, 1, 1), {"x": x, "y": y}, [1000], order)
    np.testing.assert_array_equal(y, x.sum(1))


@pytest.mark.parametrize("arch", ARCHS)
def test_atomics(arch: str) -> None:
    code, _ = kernels.build(kernels.atomic_kernel, arch, {"x_ptr": "*i32", "y_ptr": "*i32"}, 256)
    x = np.random.default_rng(0).integers(0, 1000, 1000).astype(np.int32)
    y = np.zeros(8, np.int32)
    launch(code, (4, 1, 1), {"x": x, "y": y}, [1000], "shuffled:2")
    np.testing.assert_array_equal(y[:7], [x[x % 7 == i].sum() for i in range(7)])
    assert y[7] == x.max()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_matmul(arch: str, dtype: str) -> None:
    """Small whole numbers: every sum is exact, in any order."""
    pointers = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32"}
    code, _ = kernels.build(kernels.matmul_kernel, arch, pointers, 32, num_warps=4)
    random = np.random.default_rng(0)
    a, b = random.integers(-8, 8, (70, 50)), random.integers(-8, 8, (50, 40))
    c = np.full((70, 40), np.nan, np.float32)

    def stored(x: np.ndarray) -> Any:
        if dtype == "bf16":
            return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return x.astype(np.float16 if dtype == "fp16" else np.float32)

    launch(code, (3, 2, 1), {"a": stored(a), "b": stored(b), "c": c}, [70, 40, 50], "shuffled:3")
    np.testing.assert_array_equal(c, a @ b)


def test_statistics_count_what_ran() -> None:
    code, _ = kernels.build(kernels.copy_kernel, "gfx942", FLOATS, 256)
    x, y = np.zeros(1000, np.float32), np.zeros(1000, np.float32)
    stats = launch(code, (4, 1, 1), {"x": x, "y": y}, [1000], "lockstep")
    assert stats.waves == 4 * code.max_threads // 64
    assert stats.per_mnemonic()["s_endpgm"] == stats.waves
    assert sum(stats.per_class().values()) == stats.wave_instructions == stats.per_instruction.sum()
    assert stats.vmem_bytes >= 2 * x.nbytes
