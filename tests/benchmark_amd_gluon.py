"""A forward for CDNA in Gluon beside the one that is shipped: ``python tests/benchmark_amd_gluon.py gfx950 128 64``.

Arguments: arch, head dim, keys of a tile.  The kernel is a trial: no mask, one head, whole tiles.  It is compiled,
executed on the virtual GPU with all checks, compared with float64, and modelled as ``flash-rocm inspect --model``
models the shipped ones.  docs/kernels-amd.md has the figures.
"""

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from flash_rocm._triton.virtual import launch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd import AMDMFMALayout
from triton.experimental.gluon.language.amd.cdna3 import buffer_load, buffer_store, mfma

import flash_rocm
from flash_rocm.inspect.counts import is_scratch
from flash_rocm.inspect.model import predict
from flash_rocm.virtual import Checks, Launch

#: Version of the matrix layout, depth of a matrix instruction, and consecutive dims that a lane holds.
CHIPS = {"gfx942": (3, 8, 4), "gfx950": (4, 16, 8)}
BLOCK_M = 128


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


def run(chip: str, headdim: int, block_n: int, seqlen: int, on_launch: Callable[[Launch], Any]) -> list[torch.Tensor]:
    """Compile for a chip and hand over a launch on its virtual GPU; q, k, v and out."""
    version, depth, k_width = CHIPS[chip]
    constants = {"D": headdim, "BLOCK_M": BLOCK_M, "BLOCK_N": block_n}
    constants |= {"VERSION": version, "DEPTH": depth, "K_WIDTH": k_width}
    options: Any = SimpleNamespace(options={"num_warps": 4, "waves_per_eu": 2})
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(seqlen, headdim, generator=generator).to(torch.bfloat16) for _ in range(4)]
    scale = headdim**-0.5 * math.log2(math.e)
    with flash_rocm.virtual_gpu(chip, on_launch=on_launch):
        launch(attn_fwd_trial_kernel, options, seqlen // BLOCK_M, tuple(tensors), (seqlen, scale), constants)
    return tensors


def error_of(tensors: list[torch.Tensor]) -> float:
    """Largest difference from float64."""
    q, k, v, out = (x.double() for x in tensors)
    return (out - torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v).abs().max().item()


def main(chip: str, headdim: int, block_n: int) -> None:
    def model(made: Launch) -> None:
        stats = made.run(measure=True, checks=Checks.none())
        found = predict(made, stats, 4.0 * headdim * 2048 * 2048, 2)
        longest = found.cycles[found.binding]
        shares = ", ".join(f"{name} {cycles / longest:.2f}" for name, cycles in found.cycles.items())
        scratch = sum(is_scratch(each, chip) for each in made.code.program.instructions)
        print(f"{made.code.descriptor.vgprs} VGPR, {scratch} scratch instructions")
        print(f"modelled, 2048 tokens: {found.tflops:.0f} TFLOP/s, cycles {shares}")

    error = error_of(run(chip, headdim, block_n, 512, Launch.run))
    print(f"{chip} d{headdim}, tiles of {block_n}: executed with all checks, 512 tokens, error {error:.5f}")
    print(f"error of 2048 tokens {error_of(run(chip, headdim, block_n, 2048, model)):.5f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
