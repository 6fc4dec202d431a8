"""Small Triton kernels for tests of the virtual GPU."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_rocm.virtual import CodeObject, load_code_object


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask), mask)


@triton.jit
def unmasked_copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, offsets < n))


@triton.jit
def same_place_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, offsets < n) + tl.program_id(0))


@triton.jit
def exp_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(y_ptr + offsets, tl.exp(tl.load(x_ptr + offsets, mask)), mask)


@triton.jit
def reduce_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offsets, offsets < n, other=0.0)
    tl.store(y_ptr + row, tl.sum(x, 0))


@triton.jit
def atomic_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask, other=0)
    tl.atomic_add(y_ptr + x % 7, x, mask)
    tl.atomic_max(y_ptr + 7 + x * 0, x, mask)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, m, n, k, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + rows[:, None] * k + depth[None, :], (rows[:, None] < m) & (depth[None, :] < k), other=0.0)
        b = tl.load(b_ptr + depth[:, None] * n + cols[None, :], (depth[:, None] < k) & (cols[None, :] < n), other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * n + cols[None, :], acc, (rows[:, None] < m) & (cols[None, :] < n))


def build(kernel: Any, arch: str, pointers: dict[str, str], block: int, **options: Any) -> tuple[CodeObject, str]:
    """A kernel compiled for a chip, and its assembly; what is no pointer is an int32."""
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature["BLOCK"] = "constexpr"
    constants = {(kernel.arg_names.index("BLOCK"),): block}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(kernel, signature, constants, attributes)
    wave = 64 if arch.startswith("gfx9") else 32
    compiled = triton.compile(source, target=GPUTarget("hip", arch, wave), options=options)
    text = compiled.asm["amdgcn"]
    return load_code_object(compiled.asm["hsaco"], assembly=text, lds_bytes=compiled.metadata.shared), text
