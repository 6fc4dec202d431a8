"""``flash_rocm.virtual_gpu``: CPU tensors through selection, configs, launch code and AMD machine code.

What the kernels compute there is the business of the matrix (targets ``virtual:*``).
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import importlib.util
import json
import pathlib
import re
import warnings
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="compiles Triton kernels")
pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

import triton
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import flash_rocm
from flash_rocm import cli, runtime, virtual_device
from flash_rocm.amdgpu.chips import CHIPS
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import ConfigError
from flash_rocm.testing import assert_attention_close, make_inputs, make_problem
from flash_rocm.virtual import Launch, LaunchStats

if runtime.triton_interpret():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

pytestmark = [pytest.mark.virtual, pytest.mark.xdist_group("virtual_gpu")]
SHAPE: dict[str, Any] = dict(dtype=torch.bfloat16, batch=1, seqlen_q=70, seqlen_k=100, nheads=2, headdim=64)


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> dict[str, LaunchStats]:
    """Counts of each launch, by the name of its kernel."""
    found: dict[str, LaunchStats] = {}
    run = Launch.run

    def counted(launch: Launch) -> None:
        found[launch.code.name] = run(launch)

    monkeypatch.setattr(Launch, "run", counted)
    return found


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 40, 2, 64, generator=generator).bfloat16().requires_grad_() for _ in range(3))


def test_variable_takes_calls_to_the_chip(
    stats: dict[str, LaunchStats], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    q, k, v = inputs()
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "gfx942")
    assert virtual_device.arch_of(q.device) == arch_named("gfx942")
    found = str(flash_rocm.explain(q, k, v, causal=True))
    assert "gfx942.json triton" in found
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "FLASH_ROCM_VIRTUAL_GPU=gfx942" in text
    assert "device cpu, executing AMD machine code: gfx942, 304 CUs" in text
    flash_rocm.flash_attn_func(q, k, v, causal=True)
    assert stats["attn_fwd_kernel"].per_class()["matrix"] > 0


def test_backward_outside_runs_there_too(stats: dict[str, LaunchStats]) -> None:
    leaves = inputs()
    with flash_rocm.virtual_gpu("gfx1100"):
        out = flash_rocm.flash_attn_func(*leaves, causal=True)
    assert list(stats) == ["attn_fwd_kernel"]
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert set(stats) == {"attn_fwd_kernel", "attn_bwd_dq_kernel", "attn_bwd_dkdv_kernel"}
    expected = torch.autograd.grad(flash_rocm.flash_attn_func(*leaves, causal=True), leaves, torch.ones_like(out))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled:7"])
def test_wave_order_changes_nothing(order: str) -> None:
    q, k, v = inputs()
    results = []
    for wanted in ("lockstep", order):
        with flash_rocm.virtual_gpu("gfx942", order=wanted):
            results.append(flash_rocm.flash_attn_func(q, k, v))
    assert torch.equal(*results)


def test_storages_may_be_shared_and_shifted() -> None:
    """q, k and v are slices of one tensor, whose addresses divide by 2 bytes only."""
    from flash_rocm._triton import launch

    problem = make_problem(**SHAPE)
    case = make_inputs(problem, seed=3, layout="packed")
    with flash_rocm.virtual_gpu("gfx942"):
        out, lse = launch.forward(problem, case.inputs)
    assert_attention_close(problem, case, out, lse, None)
    flat = torch.randn(1 + 3 * 40 * 2 * 64).bfloat16()[1:]
    q, k, v = (part.view(1, 40, 2, 64) for part in flat.chunk(3))
    with flash_rocm.virtual_gpu("gfx942"):
        shifted = flash_rocm.flash_attn_func(q, k, v)
        aligned = flash_rocm.flash_attn_func(q.clone(), k.clone(), v.clone())
    assert torch.equal(shifted, aligned)


def test_says_once_that_it_is_slow() -> None:
    runtime.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with flash_rocm.virtual_gpu("gfx942"):
                pass
    assert [str(warning.message) for warning in caught if "gfx942 machine code" in str(warning.message)] != []
    assert len(caught) == 1


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    with (
        pytest.raises(ValueError, match="arch: expected one of gfx90a, .*, got 'gfx803'"),
        flash_rocm.virtual_gpu("gfx803"),
    ):
        pass
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "mi300")
    with pytest.raises(ValueError, match="FLASH_ROCM_VIRTUAL_GPU: expected one of gfx90a, .*, got 'mi300'"):
        flash_rocm.flash_attn_func(q, k, v)
    assert cli.main(["info"]) == 0
    with (
        pytest.raises(ValueError, match="order: expected .* got 'random'"),
        flash_rocm.virtual_gpu("gfx942", order="random"),
    ):
        flash_rocm.flash_attn_func(q, k, v)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="expected TRITON_INTERPRET to be unset"), flash_rocm.virtual_gpu("gfx942"):
        pass
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = r"triton, numpy, elftools, msgpack not found. Hint: pip install .flash_rocm\[virtual\]"
    with pytest.raises(ValueError, match=missing), flash_rocm.virtual_gpu("gfx942"):
        pass


def test_more_lds_than_the_chip_has_names_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    options = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 2, "num_stages": 1}
    entries = [
        {"kernel": name, "options": options, "provenance": {"how": "first choice"}} for name in ("probs", "forward")
    ]
    (tmp_path / "gfx942.json").write_text(json.dumps({"arch": "gfx942", "triton": entries}))
    monkeypatch.setenv("FLASH_ROCM_CONFIG_DIR", str(tmp_path))
    # Blocks that pass the real limit take minutes to compile.
    monkeypatch.setitem(CHIPS, "gfx942", dataclasses.replace(CHIPS["gfx942"], lds_per_workgroup=1024))
    named = rf"forward: .*BLOCK_N=32 .*\({tmp_path}/gfx942.json triton\[1\]; first choice\)"
    with (
        pytest.raises(ConfigError, match=rf"^{named}: .*bytes of LDS <= 1024, got \d+. Hint: smaller blocks"),
        flash_rocm.virtual_gpu("gfx942"),
    ):
        flash_rocm.flash_attn_func(*inputs())


def _identity(source: ASTSource, options: Any) -> tuple[Any, ...]:
    # Triton's launcher notes of compile-time arguments that nothing is known about them.
    facts = {place: known for place, known in source.attrs.items() if known}
    return source.signature, source.constants, facts, options.hash()


@pytest.mark.parametrize("layout", ["contiguous", "packed", "shifted"])
def test_specialisation_is_that_of_tritons_launcher(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its cache key is made of: signature, constants, facts about pointers, options."""
    from flash_rocm._triton import compile as compiling
    from flash_rocm._triton import launch, virtual

    problem = make_problem(**SHAPE, dropout_p=0.1, varlen=True)
    tensors = make_inputs(problem, seed=3, layout="contiguous" if layout == "shifted" else layout).inputs
    if layout == "shifted":
        tensors = tensors._replace(q=torch.empty(tensors.q.numel() + 1).bfloat16()[1:].view(tensors.q.shape))
    asked: list[Any] = []
    compiled: list[Any] = []
    original, compile_source = virtual.launch, triton.compile

    def compiles(source: ASTSource, target: Any, options: dict[str, Any]) -> Any:
        compiled.append(_identity(source, make_backend(target).parse_options(options)))
        return compile_source(source, target=target, options=options)

    def launches(kernel: Any, current: Any, programs: int, tensors: Any, numbers: Any, constants: Any) -> None:
        backend = make_backend(compiling.target_of(arch_named("gfx942")))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        used = {param.name: constants[param.name] for param in kernel.params if param.is_constexpr}
        arguments, specialization, options = bind(*tensors, *numbers, **used, **current.options)
        options, *parts = kernel._pack_args(backend, current.options, arguments, specialization, options)
        asked.append(_identity(ASTSource(kernel, *parts), options))
        original(kernel, current, programs, tensors, numbers, constants)

    monkeypatch.setattr(virtual, "_loaded", collections.OrderedDict())
    monkeypatch.setattr(virtual, "launch", launches)
    monkeypatch.setattr(triton, "compile", compiles)
    with flash_rocm.virtual_gpu("gfx942", on_launch=lambda launch: None):
        launch.forward(problem, tensors)
        q, lse = tensors.q, torch.zeros(2, len(tensors.q))
        launch.backward(problem, tensors, q, lse, q, None)
    assert len(asked) == 3 and asked == compiled
    pointers = [facts for place, facts in asked[0][2].items() if place == (0,)]
    assert pointers == [
        [["tt.pointer_range", 32]] if layout == "shifted" else [["tt.divisibility", 16], ["tt.pointer_range", 32]]
    ]


def test_kernels_used_long_ago_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._triton import virtual

    monkeypatch.setattr(virtual, "_loaded", collections.OrderedDict())
    monkeypatch.setattr(virtual, "_KEPT", 1)
    q, k, v = (x.detach() for x in inputs())
    with flash_rocm.virtual_gpu("gfx942"):
        flash_rocm.flash_attn_func(q, k, v)
        first = weakref.ref(next(iter(virtual._loaded.values())))
        flash_rocm.flash_attn_func(q, k, v, causal=True)
    gc.collect()
    assert first() is None and len(virtual._loaded) == 1


def test_session_of_the_documentation(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code runs one block after the other, and prints what the text says of it but for the numbers."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / "virtual-gpu.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # noqa: S102
    printed = capsys.readouterr().out
    assert re.search(r"^attn_fwd_kernel \(2, 1, 1\)", printed, re.MULTILINE)
    assert len(re.findall(r"^\d+ v_mfma_\S+ .* \[", printed, re.MULTILINE)) >= 1
    assert re.search(r"^NaN written to v\d+, lane 5 of wave 0 .*v_mfma_", printed, re.MULTILINE)
    assert re.search(r"^ *\d+ waves=\d+ +first=0\.0 \S", (tmp_path / "trace.txt").read_text())
