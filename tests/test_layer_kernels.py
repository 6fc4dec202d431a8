"""The layers' kernels compile for every AMD target and for NVIDIA, run on the virtual GPU, and stay whole in graphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calls import best_compiler
from test_adversarial import random, same

import flash_rocm
from flash_rocm import backends, runtime
from flash_rocm.arch import CPU, Arch, amd_arch, arch_named, nvidia_arch
from flash_rocm.layers import norm, rotary
from flash_rocm.layers.cross_entropy import cross_entropy_loss

ARCHS = (
    *(amd_arch("gfx90a", 104), amd_arch("gfx942", 304), amd_arch("gfx950", 256)),
    *(amd_arch("gfx1100", 96), amd_arch("gfx1201", 64), nvidia_arch((9, 0), 132)),
)


def rotary_step(dtype: torch.dtype, interleaved: bool = False) -> list[torch.Tensor]:
    """Result and gradient of a dense call with offsets, and of a packed one."""
    x = random("cpu", 2, 5, 3, 40, dtype=dtype).requires_grad_()
    angle = random("cpu", 12, 16, dtype=torch.float32, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    offsets = torch.tensor([3, 0])
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)
    packed = random("cpu", 9, 3, 40, dtype=dtype, seed=2).requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 9], dtype=torch.int32)
    varlen = rotary.apply_rotary_emb(packed, cos, sin, interleaved, cu_seqlens=cu_seqlens, max_seqlen=7)
    return [out, varlen, *torch.autograd.grad(out.float().sum() + varlen.float().square().sum(), [x, packed])]


def norm_step(dtype: torch.dtype, columns: int = 100, rms: bool = False) -> list[torch.Tensor]:
    """Results and gradients of everything at once."""
    torch.manual_seed(0)
    rows = [random("cpu", 5, columns, dtype=d, seed=n) for n, d in enumerate((dtype, torch.float32, dtype))]
    weights = [random("cpu", columns, dtype=dtype, seed=5 + n) for n in range(4)]
    x, residual, x1, *weights = (t.requires_grad_() for t in (*rows, *weights))
    y, y1, total = norm.layer_norm_fn(
        *(x, weights[0], weights[1], residual, x1, weights[2], weights[3]),
        **{"dropout_p": 0.25, "prenorm": True, "is_rms_norm": rms},
    )
    loss = y.float().square().sum() + (3 * y1.float()).sin().sum() + total.square().sum()
    return [y, y1, total, *torch.autograd.grad(loss, [x, residual, x1, *weights])]


def loss_step(dtype: torch.dtype, classes: int = 300) -> list[torch.Tensor]:
    """Losses and gradient, in place and not, with a row that is ignored."""
    labels = torch.tensor([1, 7, -100])
    found: list[torch.Tensor] = []
    for inplace in (False, True):
        logits = random("cpu", 3, classes, dtype=dtype).requires_grad_()
        loss, z_loss = cross_entropy_loss(logits, labels, None, 0.1, 0.8, 1e-3, inplace_backward=inplace)
        found += [loss, z_loss, *torch.autograd.grad(loss.sum(), logits)]
    return found


STEPS: dict[str, Callable[[torch.dtype], list[torch.Tensor]]] = {
    "rotary": rotary_step,
    "rotary-interleaved": lambda dtype: rotary_step(dtype, True),
    "layer-norm": norm_step,
    "rms-norm": lambda dtype: norm_step(dtype, rms=True),
    "loss": loss_step,
}


class TestOffline:
    """No GPU, no execution: what the launches of a step would compile."""

    @pytest.fixture(autouse=True)
    def _launches(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        pytest.importorskip("triton", reason="compiles Triton kernels")
        if runtime.triton_interpret():
            pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
        from flash_rocm._triton.launcher import Launcher

        self.calls: list[tuple[Any, Any]] = []
        monkeypatch.setattr(Launcher, "launch_new", lambda own, key, call: self.calls.append((own.kernel, call)))
        monkeypatch.setattr(backends, "select_layers", lambda dtype, arch, requested: "triton")
        yield

    def compiled(self, arch: Arch, step: Callable[[torch.dtype], Any], dtype: torch.dtype) -> Iterator[Any]:
        from flash_rocm._triton.compile import Pointer, compile_for

        step(dtype)
        assert self.calls
        for kernel, call in self.calls:
            pointers = {
                name: None if x is None else Pointer(x.dtype)
                for name, x in zip(kernel.arg_names, call.tensors, strict=False)
            }
            yield compile_for(arch, kernel, pointers, call.plan.constants, call.plan.options)

    @pytest.mark.parametrize(
        ("arch", "name"),
        [
            pytest.param(arch, name, id=f"{arch.name}-{name}")
            for arch in ARCHS
            for name in (STEPS if arch.name == "gfx942" else ("rotary-interleaved", "layer-norm", "loss"))
        ],
    )
    def test_compiles(self, arch: Arch, name: str) -> None:
        kernels = list(self.compiled(arch, STEPS[name], torch.bfloat16))
        assert len(kernels) >= 2  # forward and backward
        for kernel in kernels:
            assert kernel.metadata.shared <= 65536
            if arch.vendor == "amd":
                assembly = kernel.asm["amdgcn"]
                assert re.search(rf'\.amdgcn_target ".*{arch.name}"', assembly)
                assert re.search(r"\.vgpr_spill_count:\s+0\b", assembly)
                assert kernel.asm["hsaco"]

    def test_wide_rows(self) -> None:
        """They do not spill, and are loaded in 16 bytes: the compiler knows the alignment of a row from VEC."""

        def step(dtype: torch.dtype) -> None:
            x, residual = (random("cpu", 2, 16384, dtype=dtype, seed=n).requires_grad_() for n in range(2))
            weight, bias = (random("cpu", 16384, dtype=dtype, seed=n).requires_grad_() for n in range(2))
            sum(y.float().sum() for y in norm.layer_norm_fn(x, weight, bias, residual, prenorm=True)).backward()

        for kernel in self.compiled(ARCHS[1], step, torch.bfloat16):
            assembly = kernel.asm["amdgcn"]
            assert re.search(r"\.vgpr_spill_count:\s+0\b", assembly)
            assert re.search(r"(global|buffer)_load_dwordx4", assembly)


@pytest.mark.virtual
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
@pytest.mark.parametrize("name", STEPS)
def test_on_the_virtual_gpu(name: str, arch: str) -> None:
    """Executed there, forward and backward, in bfloat16 and float32, like the reference."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    for dtype, close in (
        (torch.bfloat16, {"rtol": 2.0**-6, "atol": 2.0**-6}),
        (torch.float32, {"rtol": 1e-4, "atol": 1e-4}),
    ):
        expected = STEPS[name](dtype)
        with flash_rocm.virtual_gpu(arch, order="shuffled:1"):
            found = STEPS[name](dtype)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, **close)


def test_the_virtual_gpu_runs_kernels() -> None:
    pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    launches: list[str] = []

    def on_launch(launch: Any) -> None:
        launches.append(launch.code.name)
        launch.run()

    with flash_rocm.virtual_gpu("gfx942", on_launch=on_launch):
        out = rotary.apply_rotary_emb(*(x := rotary_inputs()))
    assert launches == ["rotary_kernel"]
    out.sum().backward()  # outside, and there all the same
    assert len(launches) == 1 and x[0].grad is not None


def rotary_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    angle = random("cpu", 12, 4, dtype=torch.float32, seed=1)
    return random("cpu", 1, 5, 2, 8, dtype=torch.float32).requires_grad_(), angle.cos(), angle.sin()


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_graphs(name: str) -> None:
    """One graph without a break, with the results of eager calls; what is in place stays in place."""
    if "norm" in name:

        def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y, total = norm.layer_norm_fn(x * 2, weight, weight + 1, x, prenorm=True, is_rms_norm="rms" in name)
            return y + total

        leaves = [random("cpu", 4, 32, dtype=torch.float32), random("cpu", 32, dtype=torch.float32)]
    elif name == "loss":

        def step(x: torch.Tensor) -> torch.Tensor:
            return cross_entropy_loss(x * 2, torch.tensor([1, 2, 0, -100]), inplace_backward=True)[0]

        leaves = [random("cpu", 4, 32, dtype=torch.float32)]
    else:
        _, cos, sin = rotary_inputs()

        def step(x: torch.Tensor) -> torch.Tensor:
            turned = rotary.apply_rotary_emb(x[:, :, 0], cos, sin, name != "rotary")
            qkv = rotary.apply_rotary_emb_qkv_(x * 2, cos, sin, interleaved=name != "rotary")
            return qkv + turned[:, :, None]

        leaves = [random("cpu", 2, 5, 3, 2, 16, dtype=torch.float32)]
    found = []
    for run in (step, torch.compile(step, backend=best_compiler(), fullgraph=True)):
        copies = [x.clone().requires_grad_() for x in leaves]
        y = run(*copies)
        found.append((y, *torch.autograd.grad(y.square().sum(), copies)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("kind", ["plain", "gqa"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_leaf_is_turned_in_place_in_a_graph(kind: str) -> None:
    _, cos, sin = rotary_inputs()
    shape, heads = ((2, 5, 3, 2, 16), None) if kind == "plain" else ((2, 5, 8, 16), 4)
    leaves = [random("cpu", *shape, dtype=torch.float32).requires_grad_() for _ in range(2)]
    run = torch.compile(rotary.apply_rotary_emb_qkv_, backend=best_compiler())
    results = [
        f(x, cos, sin, num_heads_q=heads) for f, x in zip((rotary.apply_rotary_emb_qkv_, run), leaves, strict=True)
    ]
    for result in results:
        result.sin().sum().backward()
    assert same(*(x.detach() for x in results)) and same(*(x.detach() for x in leaves))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_operators(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas and fakes say what the operators do, in every call that the steps make."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Remember(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "flash_rocm":
                copies = tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)
                calls.append((func, copies))
            return func(*args, **(kwargs or {}))

    with Remember():
        if inplace:
            x, cos, sin = rotary_inputs()
            rotary.apply_rotary_emb(x, cos, sin, inplace=True).sum().backward()
            loss_step(torch.float32)
        else:
            for step in (rotary_step, norm_step, loss_step):
                step(torch.float32)
            norm.rms_norm_fn(*(random("cpu", *n, dtype=torch.float32) for n in ((4, 8), (8,))), None)
    assert {"rotary_", "cross_entropy_backward_"} <= {f._opname for f, _ in calls} or not inplace
    assert len({f._opname for f, _ in calls}) >= 4
    for function, args in calls:
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


class TestSelection:
    GPU = amd_arch("gfx942", 304)

    def test_auto(self, monkeypatch: pytest.MonkeyPatch) -> None:
        half, double = torch.float16, torch.float64
        monkeypatch.setattr(backends, "_installation_reasons", lambda name: [])
        for requested in ("auto", "ck"):
            assert backends.select_layers(half, self.GPU, requested) == "triton"
            assert backends.select_layers(double, self.GPU, requested) == "reference"
            assert backends.select_layers(half, CPU, requested) == "reference"
            assert backends.select_layers(half, arch_named("sm70"), requested) == "reference"
        assert backends.select_layers(half, self.GPU, "reference") == "reference"
        assert backends.select_layers(half, self.GPU, "triton") == "triton"

    def test_triton_by_name_gives_its_reasons(self) -> None:
        with pytest.raises(flash_rocm.BackendError, match="float64 is not one of its dtypes"):
            backends.select_layers(torch.float64, self.GPU, "triton")
        with pytest.raises(flash_rocm.BackendError, match="older than sm80"):
            backends.select_layers(torch.float16, arch_named("sm70"), "triton")
        if not runtime.triton_interpret():
            with flash_rocm.use_backend("triton"), pytest.raises(flash_rocm.BackendError, match="on the CPU"):
                rotary.apply_rotary(*rotary_inputs()[:1], *(t.detach() for t in rotary_inputs()[1:]))
