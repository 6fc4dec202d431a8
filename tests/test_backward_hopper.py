"""The Gluon backward for Hopper: what it takes, what it compiles to and, on a GPU, how it does beside Triton's."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

import flash_rocm
from flash_rocm import runtime
from flash_rocm.arch import nvidia_arch
from flash_rocm.config_schema import ConfigError
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import make_problem

pytest.importorskip("triton", reason="about a Triton kernel")

SM90 = nvidia_arch((9, 0), 132)
KERNELS = ("backward_dq", "backward_dkdv")
#: What is asked for here at every head dim; at 128 the configs do.
OPTIONS = {
    "backward_dq": {"implementation": "gluon", "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "backward_dkdv": {"implementation": "gluon", "BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
}
#: Products per tile and head dim or block of keys: those of scores and dP, then those whose left operand is made.
PRODUCTS = {"backward_dq": (2, 1), "backward_dkdv": (2, 2)}
needs_compiler = pytest.mark.skipif(runtime.triton_interpret(), reason="TRITON_INTERPRET=1 replaces the compiler")


def problem(**fields: Any) -> AttentionProblem:
    shape = dict(batch=2, seqlen_q=512, seqlen_k=512, nheads=8, headdim=128, dtype=torch.bfloat16, device_type="cuda")
    return make_problem(**shape | {"needs_grad": True} | fields)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", json.dumps(OPTIONS))


def implementation(kernel: str, found: AttentionProblem) -> str:
    from flash_rocm._triton.plan import is_plain, plan

    return plan(kernel, found, SM90, runtime.config_source(), is_plain(found)).config.implementation


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "fields", ({}, {"window_right": 0}, {"dtype": torch.float16, "varlen": True}, {"nheads_k": 2}), ids=str
)
def test_taken(kernel: str, fields: dict[str, Any]) -> None:
    assert implementation(kernel, problem(**fields)) == "gluon"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "fields",
    ({"softcap": 2.0}, {"sinks": True}, {"alibi": True}, {"dtype": torch.float32}, {"dropout_p": 0.1}, {"headdim": 96}),
    ids=str,
)
def test_not_taken(kernel: str, fields: dict[str, Any]) -> None:
    """It would ignore what it does not have."""
    with pytest.raises(ConfigError, match="expected implementation=triton for this call, got gluon"):
        implementation(kernel, problem(**fields))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "fields,expected",
    (
        ({}, "gluon"),
        ({"dtype": torch.float16, "window_right": 0, "varlen": True}, "gluon"),
        ({"softcap": 2.0}, "triton"),
        ({"headdim": 96}, "triton"),
        ({"headdim": 64}, "triton"),
        ({"headdim": 256}, "triton"),
    ),
    ids=str,
)
def test_default(fields: dict[str, Any], expected: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was faster, and takes the call."""
    monkeypatch.delenv("FLASH_ROCM_KERNEL_CONFIG")
    assert implementation(kernel, problem(**fields)) == expected


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_default_is_what_is_tested(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._triton.plan import plan

    monkeypatch.delenv("FLASH_ROCM_KERNEL_CONFIG")
    shipped = plan(kernel, problem(), SM90, runtime.config_source(), True).config
    assert {name: getattr(shipped, name) for name in OPTIONS[kernel]} == OPTIONS[kernel]


def test_explain_tells() -> None:
    from flash_rocm._triton import plan

    _, *lines = plan.describe_configs(problem(), SM90)
    assert [line.split(":")[0] for line in lines] == list(KERNELS)
    assert all(" implementation=gluon (FLASH_ROCM_KERNEL_CONFIG" in line for line in lines)


@pytest.mark.parametrize(
    "kernel,option,allowed,got",
    (
        ("backward_dq", "BLOCK_M", "128", 256),
        ("backward_dq", "num_stages", "2 or 3 or 4", 1),
        ("backward_dkdv", "BLOCK_N", "128", 256),
    ),
)
def test_options_it_is_not_written_for(
    kernel: str, option: str, allowed: str, got: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_rocm._triton.plan import plan

    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", json.dumps({kernel: OPTIONS[kernel] | {option: got}}))
    with pytest.raises(ConfigError, match=f"expected {option}={allowed} with implementation=gluon, got {got}. Hint"):
        plan(kernel, problem(), SM90, runtime.config_source(), True)


# --------------------------------------------------------------------------------------------------
# Compiled, without a GPU


@needs_compiler
@pytest.mark.parametrize("headdim", (64, 128))
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", ({}, {"window_right": 0}, {"window_left": 100, "window_right": 7}), ids=str)
def test_compiles_for_hopper(mask: dict[str, int], kernel: str, headdim: int) -> None:
    """Products do not wait for each other, little spills, and there are as many as the loops ask for."""
    from flash_rocm._triton.offline import compile_kernel, ptxas_report
    from flash_rocm._triton.plan import plan

    source = runtime.config_source()
    current = plan(kernel, problem(headdim=headdim, **mask), SM90, source, True)
    compiled = compile_kernel(kernel, problem(headdim=headdim, **mask), SM90, source=source)
    over_dims, over_tile = PRODUCTS[kernel]
    if kernel == "backward_dq":
        # The first tile's scores, the last one's dQ, and both in each loop.
        tile, loops = current.config.BLOCK_N, 1 + (3 if "window_left" in mask else 2)
    else:
        tile, loops = current.config.BLOCK_M, 3 if mask else 2
    products = compiled.asm["ptx"].count("wgmma.mma_async.sync")
    assert products == 2 * loops * (over_dims * headdim // 16 + over_tile * tile // 16)
    assert compiled.metadata.shared <= 227 << 10
    report = ptxas_report(compiled.asm["ptx"], 90)
    assert not re.search(r"C75\d\d", report), report
    (spilled,) = re.findall(r"(\d+) bytes spill stores", report)
    assert int(spilled) <= (560 if (kernel, headdim) == ("backward_dkdv", 128) else 0), report


# --------------------------------------------------------------------------------------------------
# On a GPU


def require_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for sm90 alone")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("headdim", (64, 128))
def test_sees_nothing_beyond_its_sequence(headdim: int, causal: bool) -> None:
    """NaN in the next sequence, and in rows that nobody owns, stays there."""
    require_hopper()
    generator = torch.Generator(device="cuda").manual_seed(0)
    lengths_q, lengths_k = (70, 1, 200), (130, 300, 45)

    def values(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows + 5, heads, headdim, device="cuda", dtype=torch.bfloat16, generator=generator)

    heads = (4, 2, 2)
    inputs = [values(sum(length), n) for length, n in zip((lengths_q, lengths_k, lengths_k), heads, strict=True)]
    dout = values(sum(lengths_q), 4)
    starts_q, starts_k = (
        torch.tensor([0, *lengths], device="cuda").cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )

    def gradients() -> tuple[torch.Tensor, ...]:
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = flash_rocm.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 200, 300, causal=causal)
        return torch.autograd.grad(out, (q, k, v), dout)

    clean = gradients()
    for x in (inputs[0], dout):
        x[70:] = torch.nan
    for x in inputs[1:]:
        x[130:] = torch.nan
    for found, expected, first in zip(gradients(), clean, (70, 130, 130), strict=True):
        assert found[:first].equal(expected[:first])
        assert not expected[-5:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ("full", "causal", "window", "gqa", "strided", "dlse", "no keys"))
@pytest.mark.parametrize("headdim", (64, 128))
def test_both_implementations_agree(headdim: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within roundings of the result, and twice the same; ``test_matrix.py`` compares with float64."""
    require_hopper()
    generator = torch.Generator(device="cuda").manual_seed(1)
    heads_k = 2 if case == "gqa" else 6
    wide = 2 * headdim if case == "strided" else headdim

    def values(rows: int, heads: int) -> torch.Tensor:
        shape = (3, rows, heads, wide)
        return torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator)[..., -headdim:]

    rows = 633 if case == "no keys" else 333
    inputs = [x.requires_grad_() for x in (values(rows, 6), values(517, heads_k), values(517, heads_k))]
    dout, dlse = values(rows, 6), torch.randn(3, 6, rows, device="cuda", generator=generator)
    causal = case in ("causal", "no keys")
    window = (90, 20) if case == "window" else (-1, -1)

    def gradients() -> tuple[torch.Tensor, ...]:
        out, lse, _ = flash_rocm.flash_attn_func(*inputs, causal=causal, window_size=window, return_attn_probs=True)
        outputs, grads = ((out, lse), (dout, dlse)) if case == "dlse" else ((out,), (dout,))
        return torch.autograd.grad(outputs, inputs, grads)

    found = gradients()
    assert all(a.equal(b) for a, b in zip(gradients(), found, strict=True))
    other = '{"implementation": "triton", "BLOCK_N": 64}'
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", f'{{"backward_dq": {other}, "backward_dkdv": {other}}}')
    for name, mine, theirs in zip("qkv", found, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=2**-8, msg=lambda text, name=name: f"d{name}: {text}")
