"""PyTorch's scaled_dot_product_attention on flash_rocm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention as registry
from torch.nn.functional import scaled_dot_product_attention

from flash_rocm import ops
from flash_rocm.integrations import torch_sdpa

FLASH = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """PyTorch has no kernel of this operator for the CPU; ours stands there as it does on a GPU."""
    handle = torch_sdpa.activate("CPU")
    yield
    handle.remove()


def inputs(seqlen_q: int = 7, seqlen_k: int = 7, nheads_k: int = 4, transposed: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for seqlen, nheads in ((seqlen_q, 4), (seqlen_k, nheads_k), (seqlen_k, nheads_k)):
        shape = (2, seqlen, nheads, 8) if transposed else (2, nheads, seqlen, 8)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append((x.transpose(1, 2) if transposed else x).requires_grad_())
    return found


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({}, {}),
        ({}, {"is_causal": True}),
        ({"transposed": True}, {"is_causal": True, "scale": 0.3}),
        ({"seqlen_k": 12}, {"scale": 0.7}),
        ({"nheads_k": 2}, {"is_causal": True}),
    ],
    ids=["plain", "causal", "transposed", "lengths", "gqa"],
)
def test_result_and_gradients(on_cpu: None, shapes: dict[str, Any], options: dict[str, Any]) -> None:
    ours, theirs = inputs(**shapes), inputs(**shapes)
    out = FLASH(*ours, **options)[0]
    expected = scaled_dot_product_attention(*theirs, **options, enable_gqa="nheads_k" in shapes)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.stride() == ours[0].stride()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_a_backward_is_asked_for_where_there_is_one(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back ends without a backward kernel run inference: of each call its own tensors and its grad mode count."""
    seen = []
    inner = ops._decide

    def watch(args: tuple[Any, ...], layout: Any) -> Any:
        found = inner(args, layout)
        seen.append(found.problem.needs_grad)
        return found

    monkeypatch.setattr(ops, "_decide", watch)
    q, k, v = inputs()
    out = FLASH(q, k, v)[0]
    assert seen == [True]
    out.sum().backward()
    assert seen == [True, True]
    seen.clear()
    FLASH(q.detach(), k.detach(), v)
    with torch.no_grad():
        FLASH(q, k, v)
    with torch.inference_mode():
        FLASH(q, k, v)
    FLASH(q.detach(), k.detach(), v.detach())
    assert seen == [True, False, False, False]


def test_dropout_drops_the_same_in_backward(on_cpu: None) -> None:
    """The result is linear in v, so that its gradient tells whether both saw the same mask."""
    q, k, v = inputs()
    torch.manual_seed(0)
    out = FLASH(q, k, v, dropout_p=0.5)[0]
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert v.grad is not None
    torch.testing.assert_close((v.grad * v).sum(), (out * weights).sum())
    assert not torch.allclose(FLASH(q, k, v, dropout_p=0.5)[0], out)
    torch.manual_seed(0)
    assert torch.equal(FLASH(q, k, v, dropout_p=0.5)[0], out)


def test_last_dim_may_have_any_stride(on_cpu: None) -> None:
    q, k, v = (x.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs())
    torch.testing.assert_close(FLASH(q, k, v)[0], scaled_dot_product_attention(q, k, v))


def test_debug_mask_is_refused(on_cpu: None) -> None:
    with pytest.raises(NotImplementedError, match="return_debug_mask: expected False, got True"):
        FLASH(*inputs(), return_debug_mask=True)


def has_kernel() -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(FLASH.default.name(), "CUDA"))


def test_registry() -> None:
    before = has_kernel()  # of PyTorch's own, in builds for GPUs
    assert torch_sdpa.register() == torch_sdpa.register() == "flash_rocm"
    assert "flash_rocm" in registry.list_flash_attention_impls()
    assert registry.current_flash_attention_impl() is None and has_kernel() == before
    registry.activate_flash_attention_impl("flash_rocm")
    try:
        assert registry.current_flash_attention_impl() == "flash_rocm" and has_kernel()
    finally:
        registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None and has_kernel() == before


def test_pytorch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registry, "register_flash_attention_impl")
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError, match=r"torch: expected 2\.10 or newer, .*, got 2\.9\.1"):
        torch_sdpa.register()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_on_a_gpu(is_causal: bool, compiled: bool) -> None:
    """What PyTorch's front end chooses flash attention for runs here, with gradients, compiled too."""
    seen = []
    inner = torch_sdpa._arguments

    def attention(*qkv: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*qkv, is_causal=is_causal)

    def results(function: Any, kernel: registry.SDPBackend, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        qkv = [torch.randn(2, 4, 200, 64, generator=generator).cuda().to(dtype).requires_grad_() for _ in range(3)]
        with registry.sdpa_kernel(kernel):
            out = function(*qkv)
        out.float().square().sum().backward()
        return [out.detach(), *(x.grad for x in qkv)]  # type: ignore[misc]

    exact = results(attention, registry.SDPBackend.MATH, torch.float32)
    theirs = results(attention, registry.SDPBackend.MATH, torch.bfloat16)
    registry.activate_flash_attention_impl(torch_sdpa.register())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sdpa, "_arguments", lambda *args: seen.append(1) or inner(*args))
        try:
            function = torch.compile(attention) if compiled else attention
            ours = results(function, registry.SDPBackend.FLASH_ATTENTION, torch.bfloat16)
        finally:
            registry.restore_flash_attention_impl()
    assert len(seen) == 2  # forward and backward
    for factor, mine, other, wanted in zip((2, 3, 3, 3), ours, theirs, exact, strict=True):
        allowed = factor * (other - wanted).abs().max() + torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (mine - wanted).abs().max() <= allowed
