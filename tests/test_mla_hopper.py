"""The Gluon kernel for absorbed MLA on Hopper: when it is taken, what it compiles to and, on a GPU, its results."""

from __future__ import annotations

import re
from typing import Any

import cache_matrix
import pytest
import torch

from flash_rocm import runtime
from flash_rocm.arch import Arch, amd_arch, nvidia_arch
from flash_rocm.config_schema import ConfigError
from flash_rocm.problem import AttentionProblem, CacheInputs
from flash_rocm.testing import CacheCall, CacheCase, make_problem

pytest.importorskip("triton", reason="about a Triton kernel")

SM90 = nvidia_arch((9, 0), 132)
ONE_TENSOR: dict[str, Any] = dict(headdim=576, headdim_v=512, qv=False)
TWO_TENSORS: dict[str, Any] = dict(headdim=64, headdim_v=512, qv=True)


def mla_problem(**fields: Any) -> AttentionProblem:
    """One query of 16 heads on one latent head, over pages."""
    shape = dict(
        batch=3, seqlen_q=1, seqlen_k=300, nheads=16, nheads_k=1, dtype=torch.bfloat16, softmax_scale=576**-0.5,
        device_type="cuda", cached=True, page_size=64,
    )  # fmt: skip
    return make_problem(**shape | TWO_TENSORS | fields)


def implementation(problem: AttentionProblem, arch: Arch = SM90) -> str:
    from flash_rocm._triton import plan

    absorbed = plan.is_absorbed(problem)
    return plan.cache_plan(problem, arch, None, absorbed, plan.is_plain(problem)).config.implementation


@pytest.mark.parametrize("form", (ONE_TENSOR, TWO_TENSORS), ids=("one tensor", "two tensors"))
def test_taken(form: dict[str, Any]) -> None:
    fields: tuple[dict[str, Any], ...] = (
        {}, {"page_size": 1}, {"page_size": 0, "leftpad": True}, {"window_left": 9, "window_right": 3},
        {"dtype": torch.float16, "varlen": True, "seqlen_q": 70}, {"attention_chunk": 16, "num_splits": 3},
    )  # fmt: skip
    assert {implementation(mla_problem(**form | some)) for some in fields} == {"gluon"}


@pytest.mark.parametrize(
    "fields",
    (
        {"softcap": 2.0}, {"sinks": True}, {"alibi": True}, {"softmax_scale": -0.1}, {"dtype": torch.float32},
        {"rotary_dim": 16}, {"headdim": 40}, {"headdim": 128}, {"headdim_v": 300}, {"qv": False, "headdim_v": 64},
        {"headdim": 512, "headdim_v": 64}, {"headdim": 512, "headdim_v": 512},
    ),
    ids=str,
)  # fmt: skip
def test_not_taken(fields: dict[str, Any]) -> None:
    assert implementation(mla_problem(**fields)) == "triton"


def test_other_chips_do_not_take_it() -> None:
    assert implementation(mla_problem(), nvidia_arch((8, 0), 108)) == "triton"
    assert implementation(mla_problem(), amd_arch("gfx942", 304)) == "triton"


def test_explain_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._triton import plan

    (line,) = plan.describe_configs(mla_problem(), SM90)
    assert line.startswith("mla: ") and " implementation=gluon (sm90.json" in line
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "1")  # bounds are checked by the Triton kernel alone
    (line,) = plan.describe_configs(mla_problem(), SM90)
    assert line.startswith("mla: ") and " implementation=triton (sm90.json" in line


@pytest.mark.parametrize("change", ({"BLOCK_M": 32}, {"BLOCK_N": 64}, {"num_warps": 8}, {"num_stages": 2}), ids=str)
def test_options_that_it_has_no_other_value_of(change: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_rocm._triton import plan

    ((name, value),) = change.items()
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", f'{{"mla": {{"{name}": {value}}}}}')
    source = runtime.config_source()
    with pytest.raises(ConfigError, match=rf"expected {name}=\d+ with implementation=gluon, got {value}\. Hint"):
        plan.cache_plan(mla_problem(), SM90, source, True, True)
    assert plan.cache_plan(mla_problem(), SM90, source, True, False).config.implementation == "triton"


# --------------------------------------------------------------------------------------------------
# Compiled, without a GPU


def compiled_kernel(problem: AttentionProblem, tma: bool) -> Any:
    from flash_rocm._triton import mla_hopper, plan
    from flash_rocm._triton.compile import Pointer, compile_for
    from flash_rocm._triton.descriptors import Tile

    kernel = mla_hopper.attn_mla_kernel
    types = {"lse_ptr": torch.float32, "out_ptr": torch.float32, "seqused_k_ptr": torch.int32, "table_ptr": torch.int32}
    given = ("q_ptr", "k_ptr", "v_ptr", "q2_ptr", "k2_ptr", *types)
    pointers: dict[str, Pointer | Tile | None] = {
        name: Pointer(types.get(name, problem.dtype)) if name in given else None
        for name in kernel.arg_names
        if name.endswith("_ptr")
    }
    current = plan.cache_plan(problem, SM90, None, True, True)
    if tma:
        for name, rows in zip(kernel.arg_names, mla_hopper.tile_rows(current.constants), strict=False):
            if rows is not None:
                pointers[name] = Tile(problem.dtype, *rows)
    return compile_for(SM90, kernel, pointers, {**current.constants, "VEC": 8, "TMA": tma}, current.options)


@pytest.mark.skipif(runtime.triton_interpret(), reason="TRITON_INTERPRET=1 replaces the compiler")
@pytest.mark.parametrize("tma", (False, True), ids=("threads", "tma"))
@pytest.mark.parametrize("mask", ({}, {"window_right": 0}, {"window_left": 70, "window_right": 3}), ids=str)
def test_compiles_for_hopper(mask: dict[str, int], tma: bool) -> None:
    """Each of two warpgroups: scores of a tile of 64 keys by 576 / 16 products, and 2 x 4 with the values of both.

    The products do not wait for each other, and no address is kept in memory.
    """
    from flash_rocm._triton.offline import ptxas_report

    compiled = compiled_kernel(mla_problem(**mask), tma)
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k16)", compiled.asm["ptx"])
    assert {name: products.count(name) for name in set(products)} == {"m64n64k16": 2 * 36, "m64n256k16": 2 * 2 * 4}
    # Copies of 64 dims of keys by TMA, the rotary ones and eight of values; where a tile can end behind the
    # last key, of its values again.
    assert compiled.asm["ptx"].count("cp.async.bulk.tensor.2d") == (2 * (2 * 8 + 1) if tma else 0)
    assert compiled.metadata.shared <= 227 << 10
    report = ptxas_report(compiled.asm["ptx"], 90)
    assert not re.search(r"C75\d\d", report), report
    (spilled,) = re.findall(r"(\d+) bytes spill stores", report)
    assert int(spilled) <= (32 if mask else 0), report  # with masks some of their bounds


# --------------------------------------------------------------------------------------------------
# On a GPU


CASES: dict[str, tuple[dict[str, Any], CacheCall]] = {
    "decode": ({}, CacheCall()),
    "fp16": (dict(dtype=torch.float16, nheads=128, window_right=0), CacheCall()),
    "pages of 1": (dict(page_size=1, nheads=128), CacheCall()),
    "pages of 3": (dict(page_size=3, seqlen_q=2, window_right=0), CacheCall()),
    "dense": (dict(page_size=0, nheads=24), CacheCall(seqused_k=False)),
    "leftpad": (dict(page_size=0, leftpad=True), CacheCall()),
    "entries": (dict(page_size=0, cache_batch_idx=True, seqlen_q=3, window_right=0), CacheCall()),
    "packed": (dict(page_size=0, varlen=True, seqlen_q=9, window_right=0), CacheCall(packed=True)),
    "varlen": (dict(varlen=True, seqlen_q=33, window_right=0), CacheCall(seqused_k=False)),
    "used": (dict(seqlen_q=7, nheads_k=2, nheads=10), CacheCall(seqused_q=True)),
    "window": (dict(seqlen_q=5, window_left=70, window_right=3), CacheCall()),
    "chunks": (dict(seqlen_q=40, attention_chunk=48), CacheCall()),
    "long": (dict(seqlen_k=5000, batch=2), CacheCall()),
    "append": (dict(seqlen_new=5, seqlen_q=5, window_right=0), CacheCall(varlen_new=True)),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementation that each call takes."""
    from flash_rocm._triton import cached

    found: list[str] = []
    route_of = cached._route_of

    def recorded(*args: Any) -> Any:
        route = route_of(*args)
        found.append(route.plan.config.implementation)
        return route

    monkeypatch.setattr(cached, "_route_of", recorded)
    return found


def skip_without_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernel is for sm90 alone")


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", (0, 1, 5))
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, num_splits: int, taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations against float64; the same number of splits gives the same bits."""
    skip_without_hopper()
    fields, call = CASES[name]
    problem = mla_problem(**fields, num_splits=num_splits)
    case = cache_matrix.Case("triton", "cuda", problem, call, seed=num_splits, features=("mla",))
    cache_matrix.run(case)
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"mla": {"implementation": "triton"}}')
    cache_matrix.run(case)
    assert taken == ["gluon", "triton"]


#: Around tiles of 64 keys, and around two of them, which two warpgroups share.
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 192]


def one_memory(problem: AttentionProblem) -> CacheCase:
    """Sequences of LENGTHS over pages of 576 dims, the first 512 of which are the values; NaN where no token is."""
    p, generator = problem, torch.Generator().manual_seed(problem.seqlen_q)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(p.device_type, p.dtype)

    pages = max(LENGTHS) // p.page_size
    table = torch.randperm(pages * p.batch + 2, generator=generator)[: pages * p.batch].view(p.batch, pages).int()
    memory = torch.full((pages * p.batch + 2, p.page_size, 1, 576), float("nan"), dtype=p.dtype, device=p.device_type)
    for b, length in enumerate(LENGTHS):
        for position in range(length):
            memory[table[b, position // p.page_size], position % p.page_size] = values(1, 576)
        table[b, -(-length // p.page_size) :] = -7
    inputs = CacheInputs(
        q=values(p.batch, p.seqlen_q, p.nheads, p.headdim),
        k=memory[..., -p.headdim :],
        v=memory[..., :512],
        qv=values(p.batch, p.seqlen_q, p.nheads, 512) if p.qv else None,
        seqused_k=torch.tensor(LENGTHS, dtype=torch.int32, device=p.device_type),
        block_table=table.to(p.device_type),
    )
    return CacheCase(inputs, [p.seqlen_q] * p.batch, LENGTHS, [0] * p.batch, [0] * p.batch)


@pytest.mark.parametrize(
    "implementation",
    ("reference", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("gluon", "triton"))),
)
@pytest.mark.parametrize("num_splits", (1, 2))
@pytest.mark.parametrize("shape", ({"nheads": 128}, {"seqlen_q": 2, "window_right": 0}), ids=("one", "causal"))
@pytest.mark.parametrize("form", (ONE_TENSOR, TWO_TENSORS), ids=("one tensor", "two tensors"))
def test_ends_of_tiles_in_one_memory(
    form: dict[str, Any],
    shape: dict[str, int],
    num_splits: int,
    implementation: str,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a server has: keys and values in one memory, and sequences of any length."""
    is_gpu = implementation != "reference"
    if is_gpu:
        skip_without_hopper()
    if implementation == "triton":
        monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"mla": {"implementation": "triton"}}')
    fields = dict(batch=len(LENGTHS), seqlen_k=max(LENGTHS), device_type="cuda" if is_gpu else "cpu")
    problem = mla_problem(**form | shape | fields, num_splits=num_splits)
    made = one_memory(problem)
    again = one_memory(problem).inputs
    inputs = made.inputs._replace(k=again.k, v=again.v)
    cache_matrix.call_and_compare(problem, made, inputs, "triton" if is_gpu else "reference")
    assert taken == ([implementation] if is_gpu else [])
