"""The compiled library of the ck back end on the virtual GPU, beside the matrix: what it says of wrong use."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import matrix
import pytest
import torch
from ck_library import ARCHS, NAMES, cache_of_tests, library_of_tests

import flash_rocm
from flash_rocm import backends, ck_instances
from flash_rocm.testing import make_problem
from flash_rocm.virtual import KernelFault, Launch, MemoryFault

pytestmark = pytest.mark.ck
HEADS, DIM = 2, 128


def inputs(seqlen: int = 70, heads_k: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((1, seqlen, HEADS, DIM), (1, seqlen + 9, heads_k, DIM), (1, seqlen + 9, heads_k, DIM))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def operators() -> Any:
    from flash_rocm._ck import library

    return library.load()[1]


def launch(number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor, **changes: Any) -> None:
    """A forward without what stands before it."""
    values: dict[str, Any] = {"cu_seqlens": None, "scale": 1.0, "window": (-1, 0)} | changes
    starts = (values["cu_seqlens"],) * 2
    operators().forward(
        number, q, k, v, torch.empty_like(q), lse, *starts, None, q.shape[1], k.shape[1], values["scale"], 0.0,
        *values["window"], 0,
    )  # fmt: skip


def test_manifest_table_and_configs_agree() -> None:
    library = ck_instances.built()
    assert library is not None
    assert library.instances == library_of_tests().instances
    assert {instance.name for instance in library.instances} == set(NAMES) and library.archs == ARCHS
    q = torch.zeros(1, 1, 1, 4)
    for number, instance in enumerate(library.instances):
        with pytest.raises(RuntimeError, match=f"instance {instance.name}: the (head dim|instance is for)"):
            launch(number, q, q, q, torch.zeros(1, 1, 1))


def test_backend_by_environment(monkeypatch: pytest.MonkeyPatch, count_case: Callable[..., None]) -> None:
    """With a gradient, through the public function, against the reference."""
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "ck")
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "gfx942")
    leaves = [x.requires_grad_() for x in inputs()]
    out = flash_rocm.flash_attn_func(*leaves, causal=True)
    torch.manual_seed(1)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "reference")
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = flash_rocm.flash_attn_func(*exact_leaves, causal=True)
    expected = torch.autograd.grad(exact, exact_leaves, dout.double())
    for actual, wanted in zip((out, *grads), (exact, *expected), strict=True):
        assert (actual - wanted).abs().max() <= 2.0**-7 * wanted.abs().max()
    count_case("ck", "virtual:gfx942", ["environment"], ["forward", "backward"])


def test_explain_names_the_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "gfx90a")
    text = str(flash_rocm.explain(*inputs(), causal=True))
    assert "back end: ck" in text and "config forward: forward_bf16_d128_dense_masked" in text
    assert backends.AUTO_ORDER["amd"][0] == "ck"


@pytest.mark.parametrize("arch", ARCHS)
def test_misaligned_and_strided_inputs(arch: str) -> None:
    """The same bits as from tensors that lie as the kernels want them."""
    q, k, v = inputs(seqlen=33)
    odd = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    assert all(x.data_ptr() % 16 for x in odd)
    with flash_rocm.virtual_gpu(arch), flash_rocm.use_backend("ck"):
        expected = flash_rocm.flash_attn_func(q, k, v, causal=True)
        assert torch.equal(flash_rocm.flash_attn_func(*odd, causal=True), expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_head_dim_64_over_several_tiles(arch: str) -> None:
    """Between tiles of 64 keys waves pass a barrier with writes of V to LDS under way, which the next one waits for."""
    problem = make_problem(dtype=torch.float16, headdim=64, seqlen_q=40, seqlen_k=150)
    matrix.run(matrix.Case("ck", f"virtual:{arch}", problem, "contiguous", 0, (), False, ""), ("reverse", "shuffled"))


def test_deterministic_backward_repeats_bit_for_bit() -> None:
    q, k, v = (x[0].requires_grad_() for x in inputs(seqlen=140))
    starts, starts_k = torch.tensor([0, 30, 140]).int(), torch.tensor([0, 149, 149]).int()
    found = []
    for order in ("forward", "reverse", "shuffled:3"):
        with flash_rocm.virtual_gpu("gfx942", order=order), flash_rocm.use_backend("ck"):
            out = flash_rocm.flash_attn_varlen_func(
                q, k, v, starts, starts_k, 110, 149, causal=True, deterministic=True
            )
            found.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, found[0], strict=True))
    assert not found[0][1].isnan().any()


def test_what_is_wrong_in_a_launch_reaches_the_caller() -> None:
    """Through C++ and back: the virtual GPU's own error, not the library's about a failed launch."""

    def fail(ready: Launch) -> None:
        raise KernelFault("planted")

    with (
        flash_rocm.virtual_gpu("gfx942", on_launch=fail),
        flash_rocm.use_backend("ck"),
        pytest.raises(KernelFault, match="planted"),
    ):
        flash_rocm.flash_attn_func(*inputs(), causal=True)


def test_memory_that_was_not_passed_is_out_of_bounds() -> None:
    """A launch sees the tensors of its call alone; so a result that is too short is noticed."""
    from flash_rocm._ck import virtual

    q, k, v = inputs()
    lse = torch.empty(1, HEADS, q.shape[1])
    number = [instance.name for instance in library_of_tests().instances].index("forward_bf16_d128_dense_masked")
    with flash_rocm.virtual_gpu("gfx942"), pytest.raises(MemoryFault), virtual.memory_of([q, k, v, lse]):
        launch(number, q, k, v, lse)


def test_a_launch_without_a_virtual_gpu_fails() -> None:
    q, k, v = inputs()
    number = [instance.name for instance in library_of_tests().instances].index("forward_bf16_d128_dense_masked")
    with pytest.raises(
        RuntimeError, match="forward_bf16_d128_dense_masked: the driver did not launch the kernel, error 719"
    ):
        launch(number, q, k, v, torch.empty(1, HEADS, q.shape[1]))


def test_core_checks_what_it_gets() -> None:
    names = [instance.name for instance in library_of_tests().instances]
    dense, varlen = names.index("forward_bf16_d128_dense_masked"), names.index("forward_bf16_d128_varlen_masked")
    q, k, v = inputs()
    lse = torch.empty(1, HEADS, q.shape[1])
    with pytest.raises(RuntimeError, match="instance [?]: there is no instance of this number"):
        launch(1000, q, k, v, lse)
    with pytest.raises(RuntimeError, match="the instance is for sequences with, the call without cu_seqlens"):
        launch(varlen, q, k, v, lse)
    with pytest.raises(RuntimeError, match="the instance is one of another kernel"):
        launch(names.index("backward_bf16_d128_dense_masked"), q, k, v, lse)
    with pytest.raises(RuntimeError, match="the instance is one of another kernel"):
        operators().dq_splits(dense, 100)
    far = q[:, :1, :1].as_strided((1, 1, 1, DIM), (1 << 31, DIM, DIM, 1))
    with pytest.raises(RuntimeError, match="a stride of Composable Kernel is a 32-bit number"):
        launch(dense, far, k, v, lse)
    deterministic = names.index("backward_bf16_d128_varlen_masked_deterministic")
    assert [operators().dq_splits(deterministic, n) for n in (1, 128, 129)] == [1, 1, 2]
    assert operators().dq_splits(names.index("backward_bf16_d128_dense_masked"), 1000) == 1


def test_one_process_has_one_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._ck import library

    operators()
    cache = cache_of_tests()
    assert cache is not None
    shutil.copytree(cache / "ck", tmp_path / "ck")
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    with pytest.raises(library.LibraryError, match="Hint: set FLASH_ROCM_CACHE_DIR before the first call"):
        library.load()


def test_the_binding_is_bound_to_the_stable_abi_alone() -> None:
    """No symbol of torch's C++ ABI, whose names are mangled, and none of CUDA's."""
    cache = cache_of_tests()
    assert cache is not None
    command = ["nm", "-D", "--undefined-only", str(cache / "ck" / ck_instances.LIBRARY)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names) and "hipLaunchKernel" in names
    assert not [name for name in names if re.search(r"c10|N2at|5torch|cuda", name)]


def test_nothing_is_compiled_twice() -> None:
    """Another build of the same finds all that it wants."""
    from flash_rocm._ck import build

    cache = cache_of_tests()
    assert cache is not None
    command = [build.find_ninja(), "-n", "-f", str(cache / "work" / "build.ninja")]
    assert "no work to do" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
