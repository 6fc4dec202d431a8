"""Every kernel compiles for every AMD target, and for NVIDIA, with no GPU: code, matrix instructions, LDS.

This says "compiled", not "executed": nothing here runs the code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_keys import Recorded, cached, compiled, record  # noqa: F401, a fixture

from flash_rocm import runtime
from flash_rocm.arch import Arch, amd_arch, nvidia_arch
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import CacheCall, make_cache_inputs, make_problem

KERNELS = ("forward", "backward_dq", "backward_dkdv", "probs")
#: LDS of one workgroup, bytes.
LDS = {"gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}
AMD = (
    amd_arch("gfx90a", 104),
    amd_arch("gfx942", 304),
    amd_arch("gfx950", 256),
    amd_arch("gfx1100", 96),
    amd_arch("gfx1201", 64),
)
#: The problems whose shipped configs promise no VGPR spill.
UNSPILLED = ("bf16-d64-causal", "bf16-d128-full", "bf16-d128-causal", "fp32-d128-causal")
NVIDIA = (nvidia_arch((8, 0), 108), nvidia_arch((9, 0), 132))
EVERYTHING = dict(
    varlen=True, window_left=100, window_right=20, softcap=20.0, alibi=True, sinks=True, dropout_p=0.1, nheads_k=2
)
#: name, fields: every dtype, every size of block, every feature.
PROBLEMS = {
    "bf16-d64-causal": dict(dtype=torch.bfloat16, headdim=64, window_right=0),
    "bf16-d128-full": dict(dtype=torch.bfloat16, headdim=128),
    "bf16-d128-causal": dict(dtype=torch.bfloat16, headdim=128, window_right=0),
    "fp16-d128-causal-varlen": dict(dtype=torch.float16, headdim=128, window_right=0, varlen=True),
    "bf16-d192v128-causal": dict(dtype=torch.bfloat16, headdim=192, headdim_v=128, window_right=0),
    "fp16-d512-full": dict(dtype=torch.float16, headdim=512),
    "fp32-d128-causal": dict(dtype=torch.float32, headdim=128, window_right=0),
    "fp32-d512-full": dict(dtype=torch.float32, headdim=512),
    "bf16-d96-everything": dict(dtype=torch.bfloat16, headdim=96, **EVERYTHING),
}


#: Over a K/V cache, and the kernel that they take; inspect looks at pages of 16 keys and at dense caches.
CACHED = {
    "bf16-d128-paged": ("decode", dict(headdim=128, page_size=16)),
    "bf16-d128-dense": ("decode", dict(headdim=128)),
    "bf16-d128-page1": ("decode", dict(headdim=128, page_size=1)),
    "bf16-d96-rotary": ("prefill", dict(headdim=96, page_size=64, seqlen_q=512, window_right=0, rotary_dim=64)),
    "bf16-d256-rotary": ("decode", dict(headdim=256, page_size=16, rotary_dim=256)),
    "bf16-mla": ("mla", dict(headdim=576, headdim_v=512, nheads=16, nheads_k=1, page_size=16)),
}


def _cached_problem(fields: dict[str, Any]) -> AttentionProblem:
    shape = {"batch": 2, "seqlen_q": 1, "seqlen_k": 4096, "nheads": 32, "nheads_k": 8, "device_type": "cuda"}
    return make_problem(**{"dtype": torch.bfloat16, "cached": True, **shape, **fields})


def _problem(name: str) -> AttentionProblem:
    fields = {"batch": 2, "seqlen_q": 1024, "seqlen_k": 1024, "nheads": 8, "device_type": "cuda", "needs_grad": True}
    return make_problem(**{**fields, **PROBLEMS[name]})


def _number(name: str, assembly: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if found is None:
        raise AssertionError(f"no {name} in the metadata")
    return int(found.group(1))


@pytest.fixture(autouse=True)
def _needs_the_compiler() -> None:
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("arch", AMD, ids=lambda arch: arch.name)
def test_compiles_for_amd(arch: Arch, name: str) -> None:
    from flash_rocm._triton.offline import compile_kernel

    problem = _problem(name)
    # RDNA has no matrix instruction for fp32.
    matrix = r"v_mfma_" if arch.wave_size == 64 else r"v_wmma_" if problem.dtype != torch.float32 else r"v_(dual_)?fm"
    for kernel in KERNELS:
        compiled = compile_kernel(kernel, problem, arch)
        assembly = compiled.asm["amdgcn"]
        assert re.search(rf'\.amdgcn_target ".*{arch.name}"', assembly)
        assert re.search(matrix, assembly), f"{kernel}: no {matrix} instruction"
        assert compiled.metadata.shared <= LDS[arch.name], kernel
        assert _number("vgpr_count", assembly) <= (512 if arch.wave_size == 64 else 256), kernel
        assert len(compiled.asm["hsaco"]) > 0
        if name in UNSPILLED and kernel != "probs":
            assert _number("vgpr_spill_count", assembly) == 0, kernel


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("arch", AMD, ids=lambda arch: arch.name)
def test_the_kernels_over_a_cache_compile_for_amd(arch: Arch, name: str) -> None:
    from flash_rocm._triton.offline import compile_kernel

    kernel, fields = CACHED[name]
    problem = _cached_problem(fields)
    compiled = compile_kernel(kernel, problem, arch)
    assembly = compiled.asm["amdgcn"]
    assert compiled.metadata.shared <= LDS[arch.name]
    # Keys are read 16 bytes at a time.
    assert re.search(r"(global|buffer)_load_(lds_)?(dwordx4|b128)", assembly)
    if "rotary" not in name:  # which configs were not chosen for
        assert _number("vgpr_spill_count", assembly) == 0


@pytest.mark.parametrize("headdim", [64, 128, 512])
@pytest.mark.parametrize("arch", AMD, ids=lambda arch: arch.name)
def test_the_kernels_that_move_data_of_a_cache_do_not_spill(
    arch: Arch,
    headdim: int,
    record: Callable[[str], Recorded],  # noqa: F811
) -> None:
    """Append and combine have no entry in the configs, so that inspect does not look at them."""
    recorded = record(arch.name)
    fields = dict(batch=1, nheads=4, nheads_k=1, seqlen_k=300, num_splits=20, device_type="cpu", rotary_dim=headdim)
    for seqlen_new in (1, 20):
        problem = _cached_problem(fields | dict(headdim=headdim, page_size=16, seqlen_new=seqlen_new))
        inputs = make_cache_inputs(problem, CacheCall()).inputs
        cached.append(problem, inputs)
        cached.attend(problem, inputs)
    found = [(name, compiled(name, call, arch).asm["amdgcn"]) for name, call in recorded if name != "attend"]
    assert [name for name, _ in found] == ["append", "combine", "append", "combine"]
    for name, assembly in found:
        assert _number("vgpr_spill_count", assembly) == _number("private_segment_fixed_size", assembly) == 0, name


@pytest.mark.parametrize("name", ["bf16-d128-paged", "bf16-d96-rotary", "bf16-mla"])
@pytest.mark.parametrize("arch", NVIDIA, ids=lambda arch: arch.name)
def test_the_kernels_over_a_cache_compile_for_nvidia(arch: Arch, name: str) -> None:
    from flash_rocm._triton.offline import compile_kernel

    kernel, fields = CACHED[name]
    ptx = compile_kernel(kernel, _cached_problem(fields), arch).asm["ptx"]
    assert "mma" in ptx
    assert ".v4.b32" in ptx or "cp.async.cg" in ptx  # 16 bytes at a time


@pytest.mark.parametrize("name", ["bf16-d64-causal", "bf16-d128-full", "fp32-d128-causal", "bf16-d96-everything"])
@pytest.mark.parametrize("arch", NVIDIA, ids=lambda arch: arch.name)
def test_compiles_for_nvidia(arch: Arch, name: str) -> None:
    from flash_rocm._triton.offline import compile_kernel

    problem = _problem(name)
    for kernel in KERNELS:
        ptx = compile_kernel(kernel, problem, arch).asm["ptx"]
        if problem.dtype != torch.float32:
            assert ("wgmma.mma_async" if arch.name == "sm90" else "mma.sync") in ptx, kernel


@pytest.mark.parametrize("arch", [AMD[1], NVIDIA[1]], ids=lambda arch: arch.name)
def test_compiles_with_64_bit_offsets_and_dlse(arch: Arch) -> None:
    from flash_rocm._triton.offline import compile_kernel

    for kernel in KERNELS:
        compiled = compile_kernel(kernel, _problem("bf16-d64-causal"), arch, wide=True, has_dlse=True)
        assert compiled.metadata.shared > 0, kernel


def test_block_order_follows_the_dies() -> None:
    """XCD-aware order comes from the arch description: the remainder by 8 dies is in gfx942's code only."""
    from flash_rocm._triton.plan import plan

    problem = _problem("bf16-d128-full")
    dies = {arch.name: plan("forward", problem, arch).constants["NUM_XCDS"] for arch in AMD}
    assert dies == {"gfx90a": 1, "gfx942": 8, "gfx950": 8, "gfx1100": 1, "gfx1201": 1}
    assert plan("forward", problem, amd_arch("gfx942", 228)).constants["NUM_XCDS"] == 6  # MI300A
    assert plan("forward", problem, amd_arch("gfx942", 38)).constants["NUM_XCDS"] == 1  # one die of MI300X
