"""The Gluon forward for Hopper: when it is taken, what it compiles to and, on a GPU, how it does beside Triton's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import flash_rocm
from flash_rocm import runtime
from flash_rocm.arch import Arch, amd_arch, nvidia_arch
from flash_rocm.config_schema import ConfigError
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import make_problem

pytest.importorskip("triton", reason="about a Triton kernel")

SM90 = nvidia_arch((9, 0), 132)
needs_compiler = pytest.mark.skipif(runtime.triton_interpret(), reason="TRITON_INTERPRET=1 replaces the compiler")


def problem(**fields: Any) -> AttentionProblem:
    shape = dict(batch=2, seqlen_q=512, seqlen_k=512, nheads=8, headdim=128, dtype=torch.bfloat16, device_type="cuda")
    return make_problem(**shape | fields)


def implementation(found: AttentionProblem, arch: Arch = SM90) -> str:
    from flash_rocm._triton.plan import is_plain, plan

    return plan("forward", found, arch, None, is_plain(found)).config.implementation


@pytest.mark.parametrize(
    "fields",
    (
        {}, {"headdim": 256, "window_right": 0}, {"headdim": 64}, {"dtype": torch.float16, "varlen": True},
        {"window_left": 9, "window_right": 3}, {"nheads_k": 2, "needs_grad": True}, {"seqlen_q": 1, "seqlen_k": 7},
    ),
    ids=str,
)  # fmt: skip
def test_taken(fields: dict[str, Any]) -> None:
    assert implementation(problem(**fields)) == "gluon"


@pytest.mark.parametrize(
    "fields",
    (
        {"softcap": 2.0}, {"sinks": True}, {"alibi": True}, {"softmax_scale": -0.1}, {"softmax_scale": 0.0},
        {"dtype": torch.float32}, {"dropout_p": 0.1}, {"headdim": 96}, {"headdim": 32}, {"headdim": 512},
        {"headdim": 192, "headdim_v": 128}, {"headdim": 256, "headdim_v": 32}, {"headdim": 32, "headdim_v": 128},
    ),
    ids=str,
)  # fmt: skip
def test_not_taken(fields: dict[str, Any]) -> None:
    assert implementation(problem(**fields)) == "triton"


def test_other_chips_do_not_take_it() -> None:
    assert implementation(problem(), nvidia_arch((8, 0), 108)) == "triton"
    assert implementation(problem(), amd_arch("gfx942", 304)) == "triton"


def test_explain_tells() -> None:
    from flash_rocm._triton import plan

    (line,) = plan.describe_configs(problem(), SM90)
    assert line.startswith("forward: ") and " implementation=gluon (sm90.json" in line


def test_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._triton.plan import plan

    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 64}}')
    with pytest.raises(ConfigError, match=r"expected BLOCK_M=128 or 192 with implementation=gluon, got 64\. Hint"):
        plan("forward", problem(), SM90, runtime.config_source(), True)
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"num_stages": 5}}')
    with pytest.raises(ConfigError, match="expected num_stages=1 or 2 or 3 or 4 with implementation=gluon, got 5"):
        plan("forward", problem(), SM90, runtime.config_source(), True)
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 192, "implementation": "triton"}}')
    with pytest.raises(ConfigError, match="expected a power of two for BLOCK_M with implementation=triton, got 192"):
        plan("forward", problem(), SM90, runtime.config_source(), True)
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 64, "implementation": "triton"}}')
    found = plan("forward", problem(), SM90, runtime.config_source(), True).config
    without = plan("forward", problem(), SM90, None, False).config
    # Over what Triton's kernel takes, not over the Gluon entry.
    assert found.BLOCK_M == 64 and (found.BLOCK_N, found.num_warps) == (without.BLOCK_N, without.num_warps)
    monkeypatch.delenv("FLASH_ROCM_KERNEL_CONFIG")
    # The variable that flash-attn's users know is about Triton's kernel.
    monkeypatch.setenv("FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON", '{"BLOCK_M": 64, "num_warps": 8}')
    found = plan("forward", problem(), SM90, runtime.config_source(), True).config
    assert (found.implementation, found.BLOCK_M, found.num_warps) == ("triton", 64, 8)


def test_gluon_is_refused_to_calls_that_are_not_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ignore what it does not have."""
    from flash_rocm._triton.plan import is_plain, plan

    options = '{"implementation": "gluon", "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}'
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", f'{{"forward": {options}}}')
    source = runtime.config_source()
    assert plan("forward", problem(), SM90, source, True).config.implementation == "gluon"
    for fields in ({"softcap": 2.0}, {"dropout_p": 0.1}, {"headdim": 96}, {"dtype": torch.float32}):
        found = problem(**fields)
        with pytest.raises(ConfigError, match="expected implementation=triton for this call, got gluon"):
            plan("forward", found, SM90, source, is_plain(found))


def test_tuned_entries_are_of_the_triton_kernel(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a kind of call that has a Gluon kernel is not taken."""
    from flash_rocm._triton import plan

    monkeypatch.setattr("flash_rocm.tuned.find", lambda *_: pytest.fail("asked for a tuned entry"))
    source = runtime.ConfigSource(tuned=str(tmp_path))
    assert plan.kernel_config("forward", problem(), SM90, source, True).implementation == "gluon"


def test_long_sequences_take_three_warpgroups() -> None:
    """Lengths are rounded up to powers of two; short sides, or a window, would leave some of them idle."""
    from flash_rocm._triton.plan import plan

    def rows(seqlen_q: int, seqlen_k: int, **fields: Any) -> int:
        found = problem(**{"headdim": 64, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k} | fields)
        return plan("forward", found, SM90, None, True).config.BLOCK_M

    assert (rows(2048, 2048), rows(2049, 2049), rows(1025, 2049), rows(1024, 2049)) == (128, 192, 192, 128)
    assert (rows(4096, 4096, window_right=0), rows(4097, 4097, window_right=0)) == (128, 192)
    for fields in ({"window_left": 64, "window_right": 0}, {"varlen": True}, {"headdim": 128}):
        assert rows(8192, 8192, **fields) == 128
    assert rows(8192, 77) == 128


def test_three_warpgroups_are_refused_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one stage they would wait for each other for ever; at larger head dims their sums leave the registers."""
    from flash_rocm._triton.plan import plan

    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 192, "num_stages": 1}}')
    with pytest.raises(ConfigError, match=r"expected BLOCK_M=128, or head dim 64 and num_stages >= 2, .* num_stages=1"):
        plan("forward", problem(headdim=64), SM90, runtime.config_source(), True)
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 192}}')
    with pytest.raises(ConfigError, match=r"expected BLOCK_M=128, or head dim 64 .* got BLOCK_M=192, head dim 128"):
        plan("forward", problem(headdim=128), SM90, runtime.config_source(), True)
    assert plan("forward", problem(headdim=64), SM90, runtime.config_source(), True).config.BLOCK_M == 192


# --------------------------------------------------------------------------------------------------
# Compiled, without a GPU


@needs_compiler
@pytest.mark.parametrize(("headdim", "seqlen"), ((64, 512), (64, 8192), (128, 512), (256, 512)))
@pytest.mark.parametrize("mask", ({}, {"window_right": 0}, {"window_left": 100, "window_right": 7}), ids=str)
def test_compiles_for_hopper(mask: dict[str, int], headdim: int, seqlen: int) -> None:
    """Products do not wait for each other, spills stay in the entry's limits, and each loop has its products."""
    from flash_rocm._triton.offline import compile_kernel, ptxas_report
    from flash_rocm._triton.plan import plan

    found = problem(headdim=headdim, seqlen_q=seqlen, seqlen_k=seqlen, **mask)
    current = plan("forward", found, SM90, None, True)
    compiled = compile_kernel("forward", found, SM90)
    # The first tile's scores, the last one's values, and both in each loop, for each warpgroup.
    block_n, loops = current.config.BLOCK_N, 3 if mask.get("window_left") else 2
    scores, values = headdim // 16, block_n // 16
    products = compiled.asm["ptx"].count("wgmma.mma_async.sync")
    assert products == current.config.BLOCK_M // 64 * (1 + loops) * (scores + values)
    assert compiled.metadata.shared <= 227 << 10
    report = ptxas_report(compiled.asm["ptx"], 90)
    assert not re.search(r"C75\d\d", report), report
    (spilled,) = re.findall(r"(\d+) bytes spill stores", report)
    assert int(spilled) <= max(96 if headdim == 256 else 32, 4 * current.config.limits.vgpr_spills), report


# --------------------------------------------------------------------------------------------------
# On a GPU

#: Head dims, and rows of queries of a tile.
TILES = ((64, 128), (64, 192), (128, 128), (256, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("headdim", "block_m"), TILES)
def test_sees_nothing_beyond_its_sequence(
    headdim: int, block_m: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the next sequence, and in rows that nobody owns, stays there."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernel is for sm90 alone")
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", f'{{"forward": {{"BLOCK_M": {block_m}}}}}')
    generator = torch.Generator(device="cuda").manual_seed(0)
    lengths_q, lengths_k = (70, 1, 200), (130, 300, 45)

    def values(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, headdim, device="cuda", dtype=torch.bfloat16, generator=generator)

    q, k, v = values(sum(lengths_q) + 5, 4), values(sum(lengths_k) + 5, 2), values(sum(lengths_k) + 5, 2)
    starts_q, starts_k = (
        torch.tensor([0, *lengths], device="cuda").cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )

    def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_rocm.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 200, 300, causal=causal)

    clean = call(k, v)
    k[130:] = torch.nan
    v[130:] = torch.nan
    assert call(k, v)[:70].equal(clean[:70])
    assert not clean[sum(lengths_q) :].any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", ("full", "causal", "window", "many", "few rows", "few keys", "gqa", "strided", "misaligned", "no matrix")
)
@pytest.mark.parametrize(("headdim", "block_m"), TILES)
def test_both_implementations_agree(headdim: int, block_m: int, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within roundings of the result; ``test_matrix.py`` compares with float64."""
    if block_m == 192:
        if case in ("misaligned", "no matrix"):
            pytest.skip("takes the Triton kernel, as with the other tile")
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the Gluon kernel is for sm90 alone")
        monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 192}}')
    generator = torch.Generator(device="cuda").manual_seed(1)
    # Many: each program takes several tiles, and under the mask one without rows.
    heads = 60 if case == "many" else 6
    heads_k = 2 if case == "gqa" else heads
    wide = 2 * headdim if case == "strided" else headdim + 1 if case == "misaligned" else headdim

    def values(rows: int, heads: int) -> torch.Tensor:
        shape = (3, rows, heads, wide)
        found = torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator)[..., -headdim:]
        if case == "no matrix":
            # The distance of batches is no multiple of that of rows.
            parts = found.new_zeros(3, rows * heads * wide + 8).as_strided
            return parts(found.shape, (rows * heads * wide + 8, heads * wide, wide, 1)).copy_(found)
        return found

    # Few of either leave some warpgroups of a tile without rows, or without keys that their rows see.
    rows = {"few rows": 5, "many": 400}.get(case, 333)
    keys = 100 if case == "few keys" else 517
    q, k, v = values(rows, heads), values(keys, heads_k), values(keys, heads_k)
    options: dict[str, Any] = {
        "causal": case in ("causal", "many", "few keys"),
        "window_size": (90, 20) if case == "window" else (-1, -1),
    }
    out, lse, _ = flash_rocm.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    again, *_ = flash_rocm.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert out.equal(again)
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"implementation": "triton", "BLOCK_N": 64}}')
    other, other_lse, _ = flash_rocm.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    torch.testing.assert_close(out, other, rtol=2**-10, atol=2**-10)
    torch.testing.assert_close(lse, other_lse, rtol=1e-5, atol=1e-5)
