"""The host side of the Triton back end: what a launch is remembered by, and what follows from a layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch

from flash_rocm import backends, config, ops, runtime
from flash_rocm.arch import CPU
from flash_rocm.problem import AttentionProblem, layout_of
from flash_rocm.testing import Case, assert_attention_close, make_inputs, make_problem

triton = pytest.importorskip("triton", reason="the launcher imports Triton")

from flash_rocm._triton import launch  # noqa: E402
from flash_rocm._triton.launcher import Call, Launcher  # noqa: E402
from flash_rocm._triton.plan import plan  # noqa: E402

VARLEN = dict(varlen=True, batch=3, seqlen_q=40, seqlen_k=50, nheads=4, nheads_k=2, headdim=32)
LENGTHS = (([40, 3, 9], [50, 8, 20]), ([40, 40, 40], [50, 50, 50]), ([1, 40, 2], [3, 50, 1]))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(kernel, key, everything else the launch would take) of each call; nothing is launched."""
    recorded: list[tuple[Any, ...]] = []

    def record(self: Any, key: Any, call: Call) -> None:
        constants = call.plan.constants | call.constants
        recorded.append((id(self), key, (call.programs, call.scalars, constants, call.plan.options)))

    monkeypatch.setattr(Launcher, "launch_new", record)
    return recorded


def _all_kernels(problem: AttentionProblem, case: Case) -> None:
    out, lse = launch.forward(problem, case.inputs)
    launch.backward(problem, case.inputs, out, lse, case.dout, None)
    launch.probs(problem, case.inputs, lse)


def _through_the_operator(
    problem: AttentionProblem, data: Case
) -> tuple[tuple[torch.Tensor, torch.Tensor, Any], tuple[Any, ...]]:
    """out, softmax_lse and gradients of a problem, and the operator's arguments."""
    leaves = matrix.leaves_of(data.inputs)
    args = (*matrix.with_leaves(data.inputs, leaves), *matrix.scalars_of(problem, "triton"))
    out, lse = ops.attention_forward(args, layout_of(*args[:3]))
    return (out, lse, torch.autograd.grad([out], leaves, [data.dout])), args


def test_calls_of_one_key_launch_alike(launches: list[tuple[Any, ...]]) -> None:
    """Whatever a key does not hold may not change the launch: totals of varlen calls above all."""
    problem = make_problem(**VARLEN, dropout_p=0.1, alibi=True, sinks=True)
    for seed, (seqlens_q, seqlens_k) in enumerate(LENGTHS):
        _all_kernels(problem, make_inputs(problem, seed, seqlens_q=seqlens_q, seqlens_k=seqlens_k))
    assert len(launches) == 4 * len(LENGTHS)
    seen: dict[Any, Any] = {}
    for kernel, key, call in launches:
        assert seen.setdefault((kernel, key), call) == call
    assert len(seen) == 4


@pytest.mark.parametrize("change", ["layout", "alignment", "problem", "slopes", "configs", "variable"])
def test_what_changes_a_launch_changes_the_key(
    change: str, launches: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(batch=2, seqlen_q=40, seqlen_k=50, nheads=4, headdim=32, alibi=True, sinks=True)
    problem = make_problem(**fields)
    case = make_inputs(problem)
    _all_kernels(problem, case)
    if change == "layout":
        case = make_inputs(problem, layout="bhsd")
    elif change == "alignment":
        shifted = torch.zeros(case.inputs.q.numel() + 1)[1:].view_as(case.inputs.q).copy_(case.inputs.q)
        case = case._replace(inputs=case.inputs._replace(q=shifted))
    elif change == "problem":
        problem = make_problem(**fields, window_right=0)
    elif change == "slopes":
        case = make_inputs(problem, alibi_per_batch=True)
    elif change == "variable":
        everything = {"BLOCK_M": 16, "BLOCK_N": 16}
        names = ("forward", "backward_dq", "backward_dkdv", "probs")
        monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", json.dumps(dict.fromkeys(names, everything)))
    else:
        options = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
        entries = [
            {"kernel": kernel, "options": options, "provenance": {"how": "first choice"}}
            for kernel in ("forward", "backward_dq", "backward_dkdv", "probs")
        ]
        (tmp_path / "cpu.json").write_text(json.dumps({"arch": "cpu", "triton": entries}))
        monkeypatch.setenv("FLASH_ROCM_CONFIG_DIR", str(tmp_path))
    _all_kernels(problem, case)
    first, second = launches[:4], launches[4:]
    assert all(a[1] != b[1] for a, b in zip(first, second, strict=True))
    if change in ("configs", "variable"):
        assert [call[2][2]["BLOCK_M"] for call in second] == [16] * 4


def test_more_lds_than_the_chip_has_names_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge:
        arg_names = launch.KERNELS["forward"].kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def refuse(*args: Any, **kwargs: Any) -> None:
                raise triton.OutOfResources(99999, 65536, "shared memory")

            return refuse

    monkeypatch.setattr(launch.KERNELS["forward"], "kernel", TooLarge())
    problem = make_problem(headdim=16)
    text = r"forward: .*cpu.json triton\[0\].*shared memory <= 65536, got 99999. Hint: smaller blocks"
    with pytest.raises(config.ConfigError, match=text):
        launch.forward(problem, make_inputs(problem).inputs)


@pytest.mark.parametrize(
    ("itemsize", "strides", "vec"),
    [
        (2, (64, 128), 8),
        (4, (64, 128), 4),
        (2, (0, 64), 8),
        (2, (59, 118), 1),
        (2, (100, 20), 4),
        (2, (1 << 40, 48), 8),
    ],
)
def test_vec_divides_every_stride(itemsize: int, strides: tuple[int, int], vec: int) -> None:
    current = plan("forward", make_problem(headdim=64), CPU)
    layout = ((strides[0] * 4, strides[1], strides[0]),)
    assert launch._layout_constants(current, itemsize, layout, 64)["VEC"] == vec


def test_long_rows_take_64_bit_offsets() -> None:
    current = plan("forward", make_problem(headdim=64), CPU)
    rows = max(current.config.BLOCK_M, current.config.BLOCK_N)
    wide = [
        launch._layout_constants(current, 2, ((0, row, 64),), 64)["WIDE"]
        for row in ((1 << 31) // rows - 8, (1 << 31) // rows)
    ]
    assert wide == [False, True]


def test_interpreter_cannot_be_switched_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(headdim=16)
    other = not launch.INTERPRET.value
    monkeypatch.setattr(runtime, "triton_interpret", lambda: other)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        launch.forward(problem, make_inputs(problem).inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("order", [(0, 1, 2, 0), (2, 1, 0, 2)])
def test_warm_launches_of_other_totals(order: tuple[int, ...]) -> None:
    """The second and later calls of one key, with other lengths each, against the oracle."""
    problem = make_problem(**VARLEN, device_type="cuda", dtype=torch.float16, needs_grad=True, window_right=0)
    for which in order:
        data = make_inputs(problem, which, seqlens_q=LENGTHS[which][0], seqlens_k=LENGTHS[which][1], poison=True)
        results, _ = _through_the_operator(problem, data)
        assert_attention_close(problem, data, *results)
    assert backends.load("triton").forward is launch.forward


@pytest.mark.interpret
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_64_bit_offsets_compute_the_same(varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows too far apart for 32 bits would take, on rows that are not."""
    narrow = launch._layout_constants
    monkeypatch.setattr(launch, "_layout_constants", lambda *args: narrow(*args) | {"WIDE": True})
    problem = make_problem(headdim=40, varlen=varlen, window_right=0, nheads=4, nheads_k=2, needs_grad=True)
    data = make_inputs(problem, layout="padded", poison=True)
    results, args = _through_the_operator(problem, data)
    assert_attention_close(problem, data, *results, probs=ops.attention_probs(results[1], *args))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("block_k", "fields"),
    [
        (16, dict(dtype=torch.float32, headdim=24, window_right=0)),
        (32, dict(dtype=torch.float16, headdim=72, headdim_v=40, window_left=20, window_right=9, softcap=8.0)),
        (64, dict(dtype=torch.bfloat16, headdim=72, window_right=0, varlen=True, alibi=True, nheads=2)),
        (256, dict(dtype=torch.float16, headdim=40, dropout_p=0.2)),
    ],
    ids=["half of the padded head dim", "padding fills chunks", "padding within a chunk", "over the head dim"],
)
def test_products_by_chunks_of_the_head_dim(
    block_k: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BLOCK_K of the forward and both backward kernels, on 37 queries and 53 keys of 32x32, 32x16 and 16x32 blocks."""
    override = {kernel: {"BLOCK_K": block_k} for kernel in ("forward", "backward_dq", "backward_dkdv")}
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", json.dumps(override))
    launch_new, launched = Launcher.launch_new, {}

    def noted(launcher: Launcher, key: Any, call: Call) -> None:
        launched[launcher.kernel.__name__] = call.plan.constants["BLOCK_K"]
        launch_new(launcher, key, call)

    monkeypatch.setattr(Launcher, "launch_new", noted)
    problem = make_problem(**{"nheads": 1, **fields}, batch=1, nheads_k=1, seqlen_q=37, seqlen_k=53, needs_grad=True)
    data = make_inputs(problem, layout="padded", poison=True)
    results, _ = _through_the_operator(problem, data)
    kernels = (launch.KERNELS[name].kernel.__name__ for name in override)
    assert launched == dict.fromkeys(kernels, block_k)
    assert_attention_close(problem, data, *results)
