"""A forward for CDNA in Gluon beside the one that is shipped: ``python tests/benchmark_amd_gluon.py gfx950 128 64``.

Arguments: arch, head dim, keys of a tile.  The kernel is a trial: no mask, one head, whole tiles.  It is compiled,
executed on the virtual GPU with all checks, compared with float64, and modelled as ``flash-rocm inspect --model``
models the shipped ones.  docs/kernels-amd.md has the figures.
"""

import ctypes
import math
import sys
from typing import Any

import numpy as np
import torch
from flash_rocm._triton.compile import Pointer, compile_for
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import buffer_load, buffer_store, mfma

from flash_rocm.arch import arch_named
from flash_rocm.inspect.model import predict
from flash_rocm.virtual import Checks, CodeObject, Launch, VirtualGpu, load_code_object

#: Version of the matrix layout, depth of a matrix instruction, and consecutive dims that a lane holds.
CHIPS = {"gfx942": (3, 8, 4), "gfx950": (4, 16, 8)}
BLOCK_M, NUM_WARPS = 128, 4


@gluon.jit
def _rows(ptr, first, D: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """[ROWS, D] of a contiguous matrix."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    return buffer_load(ptr + first * D, rows[:, None] * D + dims[None, :])


@gluon.jit
def _keys(k_ptr, first, D: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """[D, BLOCK_N]: each lane's part of the right operand is consecutive dims of one key, so needs no LDS."""
    dims = gl.arange(0, D, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    return buffer_load(k_ptr + first * D, cols[None, :] * D + dims[:, None])


@gluon.jit
def attn_fwd_trial_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen: gl.int32, scale: gl.float32,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    VERSION: gl.constexpr, DEPTH: gl.constexpr, K_WIDTH: gl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v, scale in log2 units; a wave has 32 rows."""
    scores: gl.constexpr = AMDMFMALayout(
        version=VERSION, instr_shape=[32, 32, DEPTH], transposed=True, warps_per_cta=[4, 1]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, scores, K_WIDTH)
    right: gl.constexpr = gl.DotOperandLayout(1, scores, K_WIDTH)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [64 // (D // 8), D // 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    first_row = gl.program_id(0) * BLOCK_M
    q = _rows(q_ptr, first_row, D, BLOCK_M, left)
    values = gl.allocate_shared_memory(v_ptr.dtype.element_ty, [2, BLOCK_N, D], shared)
    acc = gl.zeros([BLOCK_M, D], gl.float32, scores)
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    row_sum = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, scores))
    k = _keys(k_ptr, 0, D, BLOCK_N, right)
    v = _rows(v_ptr, 0, D, BLOCK_N, copied)
    for start in range(0, seqlen, BLOCK_N):
        stage = (start // BLOCK_N) & 1
        s = mfma(q, k, gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores))
        values.index(stage).store(v)
        # The next tile is on its way during softmax and P V; behind the last one it is that one again.
        following = gl.minimum(start + BLOCK_N, seqlen - BLOCK_N)
        k = _keys(k_ptr, following, D, BLOCK_N, right)
        v = _rows(v_ptr, following, D, BLOCK_N, copied)
        new_max = gl.maximum(row_max, gl.max(s, 1))
        p = gl.exp2(s * scale - (new_max * scale)[:, None])
        factor = gl.exp2((row_max - new_max) * scale)
        row_sum = row_sum * factor + gl.sum(p, 1)
        row_max = new_max
        acc = acc * factor[:, None]
        acc = mfma(gl.convert_layout(p.to(q.dtype), left), values.index(stage).load(right), acc)
    out = (acc / row_sum[:, None]).to(q.dtype)
    rows = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, scores))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, scores))
    buffer_store(out, out_ptr + first_row * D, rows[:, None] * D + dims[None, :])


def build(chip: str, headdim: int, block_n: int) -> tuple[CodeObject, str]:
    """The kernel for a chip, and what its assembly says of its registers."""
    version, depth, k_width = CHIPS[chip]
    constants = {"D": headdim, "BLOCK_M": BLOCK_M, "BLOCK_N": block_n}
    constants |= {"VERSION": version, "DEPTH": depth, "K_WIDTH": k_width}
    pointers = {name: Pointer(torch.bfloat16) for name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")}
    options = {"num_warps": NUM_WARPS, "waves_per_eu": 2}
    compiled = compile_for(arch_named(chip), attn_fwd_trial_kernel, pointers, constants, options)
    text = compiled.asm["amdgcn"]
    registers = [line.strip() for line in text.splitlines() if ".vgpr_count" in line or ".vgpr_spill_count" in line]
    code = load_code_object(compiled.asm["hsaco"], assembly=text, lds_bytes=compiled.metadata.shared)
    return code, ", ".join(registers)


def launch_of(code: CodeObject, chip: str, headdim: int, seqlen: int) -> tuple[Launch, list[torch.Tensor]]:
    """A launch over random tensors, and these: q, k, v and out."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(seqlen, headdim, generator=generator).to(torch.bfloat16) for _ in range(4)]
    gpu = VirtualGpu(chip)
    addresses = []
    for name, x in zip(("q", "k", "v", "out"), tensors, strict=True):
        memory = (ctypes.c_uint8 * x.untyped_storage().nbytes()).from_address(x.data_ptr())
        addresses.append(gpu.memory.add(name, np.frombuffer(memory, "uint8")))
    scale = headdim**-0.5 * math.log2(math.e)
    launch = Launch(
        gpu,
        code,
        grid=(seqlen // BLOCK_M, 1, 1),
        block_threads=NUM_WARPS * 64,
        kernargs=[*addresses, seqlen, scale, 0, 0],
        order="lockstep",
        owner=tensors,
    )
    return launch, tensors


def error_of(tensors: list[torch.Tensor]) -> float:
    """Largest difference from float64."""
    q, k, v, out = (x.double() for x in tensors)
    return (out - torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v).abs().max().item()


def main(chip: str, headdim: int, block_n: int) -> None:
    code, registers = build(chip, headdim, block_n)
    launch, tensors = launch_of(code, chip, headdim, 512)
    launch.run()
    print(f"{chip} d{headdim}, tiles of {block_n}: {registers}; 512 tokens, all checks: error {error_of(tensors):.5f}")
    launch, tensors = launch_of(code, chip, headdim, 2048)
    stats: Any = launch.run(measure=True, checks=Checks.none())
    found = predict(launch, stats, 4.0 * headdim * 2048 * 2048, 2)
    longest = found.cycles[found.binding]
    shares = ", ".join(f"{name} {cycles / longest:.2f}" for name, cycles in found.cycles.items())
    print(f"2048 tokens, modelled: {found.tflops:.0f} TFLOP/s, error {error_of(tensors):.5f}, cycles {shares}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
