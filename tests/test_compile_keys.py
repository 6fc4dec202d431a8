"""Which calls share a compiled kernel: by the keys of Triton's own caches, for chips that are not here.

The keys are worked out by Triton's JIT from the arguments that a launch passes; nothing is compiled.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_keys import Recorded, cached, disk_key, jit_key, launch, launch_all, offline, record  # noqa: F401, a fixture

from flash_rocm import runtime
from flash_rocm.arch import arch_named
from flash_rocm.testing import CacheCall, make_cache_inputs, make_inputs, make_problem

KERNELS = ("forward", "backward_dq", "backward_dkdv")
ARCHS = ("gfx90a", "gfx942", "gfx1100", "gfx1201", "sm90")


@pytest.fixture(autouse=True)
def _needs_the_compiler() -> None:
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")


@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", ["dense", "varlen"])
@pytest.mark.parametrize("arch", ARCHS)
def test_200_new_shapes_share_one_kernel(arch: str, kind: str, record: Callable[[str], Recorded]) -> None:  # noqa: F811
    """Lengths (1 among them), batch, heads, window widths, scale and dropout are run-time values."""
    recorded, rng = record(arch), random.Random(0)
    special = [(1, 1), (1, 300), (300, 1), (16, 16), (17, 15)]
    for number in range(200):
        lengths = special[number] if number < len(special) else (rng.randint(1, 400), rng.randint(1, 400))
        nheads_k = rng.randint(1, 3)
        problem = make_problem(
            dtype=torch.bfloat16,
            batch=rng.randint(1, 5),
            seqlen_q=lengths[0],
            seqlen_k=lengths[1],
            nheads=nheads_k * rng.randint(1, 3),
            nheads_k=nheads_k,
            headdim=32,
            softmax_scale=rng.uniform(0.01, 2.0),
            window_left=rng.randint(0, 400),
            window_right=rng.randint(0, 400),
            dropout_p=rng.uniform(0.05, 0.5),
            varlen=kind == "varlen",
            needs_grad=True,
        )
        launch_all(problem, seed=number)
    assert len(recorded) == 600
    keys: dict[Any, set[str]] = {}
    for kernel, call in recorded:
        keys.setdefault((kernel, call.plan.config), set()).add(jit_key(kernel, call, arch_named(arch)))
    assert {kernel for kernel, _ in keys} == set(KERNELS)
    assert [len(found) for found in keys.values()] == [1] * len(keys)


def test_the_key_notices_what_does_compile(record: Callable[[str], Recorded]) -> None:  # noqa: F811
    """The test above could fail: a mask, a dtype, a head dim or an alignment each take another kernel."""
    recorded = record("gfx942")
    fields: dict[str, Any] = dict(dtype=torch.bfloat16, headdim=32)
    launch_all(make_problem(**fields))
    launch_all(make_problem(**fields, window_right=0))
    launch_all(make_problem(**fields | {"dtype": torch.float16}))
    launch_all(make_problem(**fields | {"headdim": 31}))
    launch_all(make_problem(**fields, softmax_scale=-1.0))
    problem = make_problem(**fields)
    case = make_inputs(problem)
    q = torch.zeros(case.inputs.q.numel() + 1, dtype=torch.bfloat16)[1:].view_as(case.inputs.q)
    launch.forward(problem, case.inputs._replace(q=q))
    assert len({jit_key(kernel, call, arch_named("gfx942")) for kernel, call in recorded}) == len(recorded) == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": torch.bfloat16, "headdim": 128, "window_right": 0},
        {"dtype": torch.float16, "headdim": 96},
        {"dtype": torch.float32, "headdim": 64, "varlen": True, "nheads": 4, "nheads_k": 1},
        dict(dtype=torch.bfloat16, headdim=64, headdim_v=32, alibi=True, sinks=True, dropout_p=0.1, softcap=9.0),
    ],
    ids=["bf16-d128-causal", "fp16-d96-full", "fp32-d64-varlen-mqa", "bf16-everything"],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_compiled_offline_is_what_a_launch_looks_for(
    arch: str,
    fields: dict[str, Any],
    record: Callable[[str], Recorded],  # noqa: F811
) -> None:
    recorded, chip = record(arch), arch_named(arch)
    problem = make_problem(**fields, needs_grad=True)
    launch_all(problem)
    for kernel, call in recorded:
        code, options = offline.source_of(kernel, problem, chip)
        assert offline.cache_key(code, chip, options) == disk_key(kernel, call, chip), kernel
    assert [kernel for kernel, _ in recorded] == list(KERNELS)


CACHED: dict[str, Any] = dict(cached=True, dtype=torch.bfloat16, nheads=4, nheads_k=1, seqlen_q=1, seqlen_k=200)


@pytest.mark.parametrize(
    ("kernel", "fields", "call"),
    [
        ("decode", dict(headdim=128, page_size=16), {}),
        ("decode", dict(headdim=64, num_splits=1), {}),
        ("decode", dict(headdim=256, page_size=16, rotary_dim=128), {}),
        ("prefill", dict(headdim=64, page_size=16, seqlen_q=70, window_right=0, varlen=True), {"seqused_k": False}),
        ("prefill", dict(headdim=96, leftpad=True, alibi=True, sinks=True, rotary_dim=32, seqlen_q=70), {}),
    ],
    ids=["decode-paged", "decode-dense-unsplit", "decode-d256-rotary", "prefill-varlen-paged", "prefill-everything"],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_is_attended_by_what_is_compiled_offline(
    arch: str,
    kernel: str,
    fields: dict[str, Any],
    call: dict[str, Any],
    record: Callable[[str], Recorded],  # noqa: F811
) -> None:
    recorded, chip = record(arch), arch_named(arch)
    problem = make_problem(**CACHED | fields)
    launch_all(problem, **call)
    name, launched = recorded[0]
    code, options = offline.source_of(kernel, problem, chip)
    assert name == "attend"
    assert offline.cache_key(code, chip, options) == disk_key(name, launched, chip)
    assert [other for other, _ in recorded[1:]] in ([], ["combine"])


@pytest.mark.parametrize("arch", ["gfx942", "sm80"])
def test_mla_is_compiled_offline_with_values_read_once(arch: str, record: Callable[[str], Recorded]) -> None:  # noqa: F811
    recorded, chip = record(arch), arch_named(arch)
    problem = make_problem(**CACHED | dict(nheads=16, headdim=576, headdim_v=512, page_size=16))
    inputs = make_cache_inputs(problem, CacheCall()).inputs
    cached.attend(problem, inputs._replace(v=inputs.k[..., :512]))
    code, options = offline.source_of("mla", problem, chip)
    assert recorded[0][1].plan.kernel == "mla" and recorded[0][1].plan.constants["V_IS_K2"]
    assert offline.cache_key(code, chip, options) == disk_key("attend", recorded[0][1], chip)


def test_offline_refuses_the_other_kernel_of_a_cache() -> None:
    with pytest.raises(ValueError, match="kernel: expected 'decode' for .*, got 'prefill'"):
        offline.source_of("prefill", make_problem(**CACHED, headdim=64), arch_named("gfx942"))


_KEY = "from flash_rocm._triton.launch import KERNELS; print([KERNELS[name].kernel.cache_key for name in {}][-1])"


def test_keys_do_not_depend_on_what_ran_before() -> None:
    """A process that has run the forward finds a backward that was compiled in one that has not."""
    orders = (["backward_dq"], ["forward", "backward_dq"], ["backward_dkdv", "probs", "backward_dq"])
    keys = [subprocess.check_output([sys.executable, "-c", _KEY.format(order)], text=True) for order in orders]
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_compilations_counts_kernels() -> None:
    """On a GPU: the first call of a kind counts once for each kernel, another length or batch not at all."""
    before = launch.compilations()
    fields: dict[str, Any] = dict(dtype=torch.float16, device_type="cuda", headdim=56, window_left=7, softcap=11.0)
    fields["needs_grad"] = True
    launch_all(make_problem(**fields, seqlen_q=100, seqlen_k=90))
    first = launch.compilations()
    assert first - before == 3
    rng = random.Random(1)
    for number in range(200):
        lengths = {"seqlen_q": rng.choice((1, 16, rng.randint(1, 400))), "seqlen_k": rng.choice((1, 17, 350))}
        window = {"window_left": rng.randint(0, 50), "softmax_scale": rng.uniform(0.1, 1.0)}
        launch_all(make_problem(**fields | lengths | window, batch=rng.randint(1, 4)), seed=number)
    torch.cuda.synchronize()
    assert launch.compilations() == first
