"""The ck back end over a K/V cache, beside the matrix: public functions, layouts of caches, splits, wrong contents."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from ck_library import ARCHS, library_of_tests
from kvcache_calls import check, integers, run

import flash_rocm
from flash_rocm import backends, v3
from flash_rocm.arch import arch_named
from flash_rocm.problem import AttentionProblem
from flash_rocm.testing import CacheCall, CacheCase, make_cache_inputs, make_problem
from flash_rocm.virtual import Launch

pytestmark = pytest.mark.ck
GFX942 = arch_named("gfx942")
#: A decode that splitkv_bf16_d128 runs.
DECODE: dict[str, Any] = dict(
    dtype=torch.bfloat16,
    batch=2,
    seqlen_q=1,
    seqlen_k=150,
    nheads=4,
    nheads_k=2,
    headdim=128,
    window_right=0,
    cached=True,
)


def case_of(**changes: Any) -> tuple[AttentionProblem, CacheCase]:
    problem = make_problem(**{**DECODE, **changes})
    return problem, make_cache_inputs(problem, CacheCall(), seed=3)


@pytest.fixture(autouse=True)
def _on_ck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "ck")
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", "gfx942")


def launched(arguments: dict[str, Any]) -> list[Launch]:
    """The launches of a call of flash_attn_with_kvcache, each of which runs."""
    found: list[Launch] = []

    def keep(ready: Launch) -> None:
        found.append(ready)
        ready.run()

    with flash_rocm.virtual_gpu("gfx942", on_launch=keep):
        flash_rocm.flash_attn_with_kvcache(**arguments)
    return found


def arguments_of(case: CacheCase, **changes: Any) -> dict[str, Any]:
    inputs = case.inputs
    given = dict(q=inputs.q, k_cache=inputs.k, v_cache=inputs.v, cache_seqlens=inputs.seqused_k, causal=True)
    return given | changes


@pytest.mark.parametrize("arch", ARCHS)
def test_public_function_on_the_chosen_chip(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode of grouped heads, its keys divided by the chip, with new tokens, against the oracle."""
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", arch)
    problem, case = case_of(seqlen_new=3, rotary_dim=64)
    check(problem, case)


def test_the_chip_divides_keys_and_the_caller_decides() -> None:
    """Workgroups: parts of 640 keys, which are ten tiles; heads of k and v; sequences."""
    _, case = case_of(seqlen_k=640)
    grids = {}
    for splits in (0, 1, 3):
        attend, combine = launched(arguments_of(case, num_splits=splits))
        assert "FmhaFwdSplitKVKernel" in attend.code.name and "combine" in combine.code.name
        grids[splits] = attend.grid
    assert grids == {0: (10, 2, 2), 1: (1, 2, 2), 3: (3, 2, 2)}


def test_a_window_is_not_divided_by_itself() -> None:
    _, case = case_of(seqlen_k=640, dtype=torch.float16, headdim=64, headdim_v=64)
    given = arguments_of(case, window_size=(100, 0))
    attend, _ = launched(given)
    assert attend.grid == (1, 4, 2)
    attend, _ = launched(given | {"num_splits": 4})
    assert attend.grid == (4, 4, 2)


def test_parts_are_as_many_as_32_bits_address() -> None:
    from flash_rocm._ck import cached

    (plain,) = (x for x in library_of_tests().instances if x.name == "splitkv_bf16_d128")
    problem = make_problem(**DECODE | {"seqlen_q": 1 << 12, "num_splits": 256})
    rows = problem.batch * problem.seqlen_q
    assert cached.num_splits_of(problem, plain, GFX942, rows) == ((1 << 31) - 1) // (4 * 2 * 128 * rows) == 255
    masked = dataclasses.replace(plain, variant=("masked",))
    assert cached.num_splits_of(problem, masked, GFX942, rows) == 256


def test_heads_of_a_group_share_tiles_without_a_mask_only() -> None:
    """One query sees all keys under a causal mask too; of more than one each head has tiles of its own."""
    _, case = case_of()
    attend, _ = launched(arguments_of(case, num_splits=1))
    assert attend.grid == (1, 2, 2)
    _, case = case_of(seqlen_q=2, dtype=torch.float16, headdim=64, headdim_v=64)
    attend, _ = launched(arguments_of(case, num_splits=1))
    assert attend.grid == (1, 4, 2)


def test_the_same_bits_from_run_to_run() -> None:
    _, case = case_of()
    found = []
    for order in ("forward", "reverse", "shuffled:5"):
        with flash_rocm.virtual_gpu("gfx942", order=order):
            found.append(
                flash_rocm.flash_attn_with_kvcache(**arguments_of(case, num_splits=3, return_softmax_lse=True))
            )
    assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(again, found[0], strict=True))


def layouts_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same cache with its heads outside, as a part of a longer one, of K and V in one, and not aligned."""
    entries, rows, heads, dim = x.shape
    longer = torch.full((entries, rows + 10, heads, dim), float("nan"), dtype=x.dtype)
    paired = torch.full((entries, rows, 2, heads, dim), float("nan"), dtype=x.dtype)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return {
        "heads outside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "part": longer[:, :rows].copy_(x),
        "paired": paired[:, :, 1].copy_(x),
        "not aligned": shifted.copy_(x),
    }


@pytest.mark.parametrize("name", ["heads outside", "part", "paired", "not aligned"])
def test_layouts_of_caches(name: str) -> None:
    """Entries of a cache are found by strides alone."""
    _, case = case_of()
    k, v = case.inputs.k, case.inputs.v
    given = arguments_of(case, num_splits=2)
    expected = flash_rocm.flash_attn_with_kvcache(**given)
    both = given | {"k_cache": layouts_of(k)[name], "v_cache": layouts_of(v)[name]}
    assert torch.equal(flash_rocm.flash_attn_with_kvcache(**both), expected)
    # Rows of K and V that are not equally far apart.
    assert torch.equal(flash_rocm.flash_attn_with_kvcache(**(given | {"k_cache": both["k_cache"]})), expected)


def test_one_entry_for_all_sequences() -> None:
    """A cache that is expanded, whose entries are no rows apart."""
    _, case = case_of()
    given = arguments_of(case, num_splits=2)
    given |= {name: given[name][:1].nan_to_num(nan=1.0).expand(2, -1, -1, -1) for name in ("k_cache", "v_cache")}
    expected = flash_rocm.flash_attn_with_kvcache(**given | {"k_cache": given["k_cache"].contiguous()})
    assert torch.equal(flash_rocm.flash_attn_with_kvcache(**given), expected)


def test_an_empty_cache() -> None:
    q, cache = torch.ones(2, 1, 4, 128, dtype=torch.bfloat16), torch.ones(2, 0, 2, 128, dtype=torch.bfloat16)
    out, lse = flash_rocm.flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True)
    assert torch.equal(out, torch.zeros_like(q)) and torch.equal(lse, torch.full((2, 4, 1), float("-inf")))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("page_size", [16, 48])
def test_pages_of_fewer_keys_than_a_tile_of_64(arch: str, page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken by the instance whose tiles have 16 keys, against the oracle; divided by the chip."""
    monkeypatch.setenv("FLASH_ROCM_VIRTUAL_GPU", arch)
    problem, case = case_of(page_size=page_size, seqlen_new=3, rotary_dim=64)
    library = library_of_tests()
    number = library.find("splitkv", problem, arch)
    assert number is not None and library.instances[number].name == "splitkv_bf16_d128_n16"
    check(problem, case)


def test_functions_of_v3_and_varlen_over_pages() -> None:
    """The same bits from each of them, and explain names the instance."""
    problem, case = case_of(page_size=64)
    inputs = case.inputs
    assert inputs.block_table is not None and inputs.seqused_k is not None
    expected = flash_rocm.flash_attn_with_kvcache(**arguments_of(case, block_table=inputs.block_table))
    found = v3.flash_attn_with_kvcache(
        inputs.q, inputs.k, inputs.v, cache_seqlens=inputs.seqused_k, page_table=inputs.block_table, causal=True
    )
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)
    starts_q = torch.arange(problem.batch + 1, dtype=torch.int32)
    starts_k = torch.cat((integers("cpu", 0), inputs.seqused_k.cumsum(0).int()))
    longest = inputs.block_table.shape[1] * 64
    varlen = flash_rocm.flash_attn_varlen_func(
        inputs.q.flatten(0, 1), inputs.k, inputs.v, starts_q, starts_k, 1, longest, causal=True,
        block_table=inputs.block_table,
    )  # fmt: skip
    assert torch.equal(varlen.view_as(expected), expected)
    text = str(
        flash_rocm.explain(
            inputs.q.flatten(0, 1), inputs.k, inputs.v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, max_seqlen_q=1,
            max_seqlen_k=longest, causal=True, block_table=inputs.block_table,
        )
    )  # fmt: skip
    assert "back end: ck" in text and "config splitkv: splitkv_bf16_d128 (" in text


WRONG = {
    "length": ({"cache_seqlens": (151, 4)}, "cache_seqlens, cache_leftpad: expected lengths.*in sequence 0"),
    "padding": ({"cache_leftpad": (0, -1)}, "cache_seqlens, cache_leftpad: expected lengths.*in sequence 1"),
    "entry": ({"cache_batch_idx": (0, 2)}, r"cache_batch_idx: expected entries in \[0, 2\), got another in sequence 1"),
    "page": (
        {"block_table": ((0, 1, 2), (3, 9, 4))},
        r"block_table: expected pages in \[0, 8\), got another in sequence 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_contents_with_debug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    changes, words = WRONG[name]
    _, case = case_of(page_size=64 if name == "page" else 0)
    given = arguments_of(case, **{key: integers("cpu", *value) for key, value in changes.items()})
    if name == "page":
        given["cache_seqlens"] = integers("cpu", 150, 65)
    with pytest.raises(ValueError, match=words):
        flash_rocm.flash_attn_with_kvcache(**given)
    if name == "page":  # behind the length of a sequence there is no page
        given["cache_seqlens"] = integers("cpu", 0, 64)
        flash_rocm.flash_attn_with_kvcache(**given)


@pytest.mark.parametrize("bad", (-1, 193))
def test_wrong_lengths_of_a_prefill_with_debug(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of packed queries over pages, which hold 192 tokens of a sequence."""
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    inputs = case_of(page_size=64)[1].inputs
    table = integers("cpu", (0, 1, 2), (3, 4, 5))
    starts = integers("cpu", 0, 1, 2), integers("cpu", 0, 150, 150 + bad)
    words = r"^cu_seqlens_k: expected lengths in \[0, 192\], got another in sequence 1\. Nothing outside"
    with pytest.raises(ValueError, match=words):
        flash_rocm.flash_attn_varlen_func(
            inputs.q.flatten(0, 1), inputs.k, inputs.v, *starts, 1, 192, causal=True, block_table=table
        )


@pytest.mark.parametrize(
    ("bounds", "used"), [((0, 9, 20), (9, 12)), ((0, 9, 21), (9, 8)), ((0, 9, 8), (9, 0)), ((-2, -1, 20), (0, 5))]
)
def test_wrong_packed_keys_with_debug(
    bounds: tuple[int, ...], used: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence that uses more rows than it has, or is not within the 20 that there are."""
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    q, k = torch.zeros(2, 4, 128, dtype=torch.bfloat16), torch.zeros(20, 2, 128, dtype=torch.bfloat16)

    def call(bounds: tuple[int, ...], used: tuple[int, ...]) -> None:
        lengths = {"seqused_k": integers("cpu", *used), "max_seqlen_q": 1, "max_seqlen_k": 20}
        v3.flash_attn_varlen_func(q, k, k, integers("cpu", 0, 1, 2), integers("cpu", *bounds), **lengths)

    words = r"^cu_seqlens_k, seqused_k: expected bounds in \[0, 20\] and lengths within them, got another in sequence 1"
    with pytest.raises(ValueError, match=words):
        call(bounds, used)
    call((0, 9, 20), (9, 11))


def test_debug_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, case = case_of(seqlen_new=2, rotary_dim=32)
    given = arguments_of(case, k=case.inputs.k_new, v=case.inputs.v_new, rotary_cos=case.inputs.rotary_cos)
    given |= {"rotary_sin": case.inputs.rotary_sin}
    expected = run(given)
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")
    assert all(torch.equal(x, y) for x, y in zip(run(given)[:2], expected[:2], strict=True))
    positions = case.inputs.seqused_k
    assert positions is not None and problem.seqlen_new == 2
    given["rotary_cos"], given["rotary_sin"] = (x[:0] for x in (given["rotary_cos"], given["rotary_sin"]))
    with pytest.raises(ValueError, match="rotary_cos"):
        flash_rocm.flash_attn_with_kvcache(**given)


def test_the_operator_checks_what_it_gets() -> None:
    from flash_rocm._ck import library

    operators = library.load()[1]
    names = [instance.name for instance in library.load()[0].instances]
    number = names.index("splitkv_bf16_d128")

    def launch(
        instance: int = number, dim: int = 128, page_size: int = 64, out_stride: int = 128, splits: int = 1
    ) -> None:
        q = torch.zeros(1, 1, dim, dtype=torch.bfloat16)
        out = torch.zeros(1).as_strided((1, splits, 1, 0), (0, out_stride, 0, 1))  # nothing is in it
        ints = integers("cpu", 0, 1)
        operators.splitkv(
            instance, q, q, q, out, torch.zeros(1, splits, 1), ints, ints[1:], ints[:1].unsqueeze(1), None,
            page_size, 1, 1, 1.0, 0.0, -1, -1, 0,
        )  # fmt: skip

    for changes, words in (
        ({"instance": 1000}, "there is no instance of this number"),
        ({"dim": 64}, "the head dim is not one that the instance takes"),
        ({"page_size": 63}, "a size is negative, too large, or not that of its partner"),
        ({"page_size": 0}, "a size is negative, too large, or not that of its partner"),
        ({"out_stride": 1 << 30, "splits": 4}, "a stride of Composable Kernel is a 32-bit number"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(words)):
            launch(**changes)


def test_what_is_refused_runs_on_triton_with_auto() -> None:
    problem = make_problem(**DECODE, page_size=24)
    (reason,) = backends.refusal_reasons("ck", problem, GFX942)
    assert (
        "no instance of the library runs the splitkv: expected splitkv_bf16_d128 of a tile whose keys divide" in reason
    )
    assert backends.select(problem, GFX942, "auto") == "triton"
    assert backends.select(dataclasses.replace(problem, page_size=64), GFX942, "auto") == "ck"
    assert any(instance.kernel == "splitkv" for instance in library_of_tests().instances)
