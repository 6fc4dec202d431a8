"""Planted faults: kernels that are wrong in ways the hardware does not report, each of which must be caught."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="compiles Triton kernels")
pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

import virtual_kernels as kernels
from virtual_asm import changed, hand_written, places, without_line

import flash_rocm
from flash_rocm import runtime
from flash_rocm.arch import arch_named
from flash_rocm.testing import make_inputs, make_problem
from flash_rocm.virtual import (
    BarrierDivergence,
    Checks,
    CodeObject,
    GlobalConflict,
    InstructionLimit,
    KernelFault,
    Launch,
    LdsRace,
    MemoryFault,
    MissingWait,
    NanWritten,
    UninitialisedRead,
    UnsupportedInstruction,
    VirtualGpu,
)

if runtime.triton_interpret():
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)

FLOATS = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
ORDERS = ("lockstep", "forward", "reverse", "shuffled:1")


def run(code: CodeObject, x: np.ndarray, y: np.ndarray, n: int, workgroups: int = 1, **options: Any) -> Any:
    gpu = VirtualGpu(code.arch)
    pointers = [gpu.memory.add("x", x), gpu.memory.add("y", y)]
    return gpu.launch(
        code,
        grid=(workgroups, 1, 1),
        block_threads=code.max_threads,
        kernargs=[*pointers, n, 0, 0],
        **options,
    )


def run_lines(lines: str, *, waves: int = 1, workgroups: int = 1, words: int = 1024, **options: Any) -> np.ndarray:
    """A hand-written kernel whose arguments are a buffer of dwords and its size; the buffer afterwards."""
    lds = options.pop("lds_bytes", 4096)
    gpu, data = VirtualGpu("gfx942"), np.arange(words, dtype=np.uint32)
    address = gpu.memory.add("data", data)
    gpu.launch(
        hand_written(lines, lds_bytes=lds),
        grid=(workgroups, 1, 1),
        block_threads=64 * waves,
        kernargs=[address, words, *[0] * 6],
        **options,
    )
    return data


#: s[4:5] holds the buffer, v1 the work item's byte in it.
PROLOGUE = """
    s_load_dwordx2 s[4:5], s[0:1], 0x0
    v_lshlrev_b32_e32 v1, 2, v0
    s_waitcnt lgkmcnt(0)
"""


@pytest.fixture(scope="module")
def reduction() -> tuple[CodeObject, str]:
    """A sum over 4 waves, which meet in LDS."""
    return kernels.build(kernels.reduce_kernel, "gfx942", FLOATS, 1024, num_warps=4)


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier(reduction: tuple[CodeObject, str], order: str) -> None:
    code, text = reduction
    x, y = np.ones(1000, np.float32), np.zeros(1, np.float32)
    run(code, x, y, 1000, order=order)
    assert y[0] == 1000
    barriers = places(text, "s_barrier")
    assert barriers
    for line in barriers:
        with pytest.raises((LdsRace, UninitialisedRead)):
            run(changed(code, without_line(text, line)), x, y, 1000, order=order)


def test_lockstep_alone_would_not_see_it(reduction: tuple[CodeObject, str]) -> None:
    """Why the checks and the wave orders are there: in lockstep the result without barriers is right."""
    code, text = reduction
    broken = changed(code, without_line(text, places(text, "s_barrier")[0]))
    x, y = np.ones(1000, np.float32), np.zeros(1, np.float32)
    run(broken, x, y, 1000, checks=Checks.none())
    assert y[0] == 1000
    run(broken, x, y, 1000, checks=Checks.none(), order="forward")
    run(broken, x, z := np.zeros(1, np.float32), 1000, checks=Checks.none(), order="reverse")
    assert y[0] != 1000 or z[0] != 1000


@pytest.mark.parametrize("kernel", ["exp_kernel", "reduce_kernel"])
def test_every_removed_wait_is_noticed(kernel: str) -> None:
    code, text = kernels.build(getattr(kernels, kernel), "gfx942", FLOATS, 256, num_warps=4)
    waits = places(text, "s_waitcnt")
    entry = code.program.instructions[code.entry].line
    executed = [line for line in waits if line > entry]
    assert executed
    for line in executed:
        with pytest.raises(MissingWait):
            run(changed(code, without_line(text, line)), np.ones(1024, np.float32), np.zeros(1024, np.float32), 1024)


def test_store_past_the_end() -> None:
    code, _ = kernels.build(kernels.unmasked_copy_kernel, "gfx942", FLOATS, 256)
    x, y = np.ones(1000, np.float32), np.zeros(1000, np.float32)
    with pytest.raises(MemoryFault, match=r"past the end of 'y' \(4000 bytes\)|byte 3984 of 'y'") as caught:
        run(code, x, y, 1000, workgroups=4)
    assert "store" in caught.value.text and caught.value.waves


def test_load_past_the_end() -> None:
    code, _ = kernels.build(kernels.copy_kernel, "gfx942", FLOATS, 256)
    with pytest.raises(MemoryFault, match="'x'"):
        run(code, np.ones(990, np.float32), np.zeros(1000, np.float32), 1000, workgroups=4)


def test_store_to_read_only_memory() -> None:
    code, _ = kernels.build(kernels.copy_kernel, "gfx942", FLOATS, 256)
    gpu = VirtualGpu("gfx942")
    x = gpu.memory.add("x", np.ones(256, np.float32))
    y = gpu.memory.add("y", np.ones(256, np.float32), writable=False)
    with pytest.raises(MemoryFault, match="read-only"):
        gpu.launch(code, grid=(1, 1, 1), block_threads=code.max_threads, kernargs=[x, y, 256, 0, 0])


def test_misaligned_access() -> None:
    lines = PROLOGUE + "v_add_u32_e32 v1, 2, v1\n global_load_dword v2, v1, s[4:5]\n s_waitcnt vmcnt(0)"
    with pytest.raises(MemoryFault, match="misaligned access of 4 bytes to byte 2 of 'data'"):
        run_lines(lines)


def test_uninitialised_lds(reduction: tuple[CodeObject, str]) -> None:
    code, text = reduction
    for line in places(text, "ds_write"):
        with pytest.raises(UninitialisedRead, match="LDS byte"):
            run(changed(code, without_line(text, line)), np.ones(1000, np.float32), np.zeros(1, np.float32), 1000)


def test_uninitialised_register() -> None:
    """Computing with it does no harm yet, storing it or branching on it does."""
    with pytest.raises(UninitialisedRead, match="v5"):
        run_lines(PROLOGUE + "global_store_dword v1, v5, s[4:5]")
    with pytest.raises(UninitialisedRead, match="v2"):
        run_lines(PROLOGUE + "v_add_u32_e32 v2, v5, v1\n global_store_dword v1, v2, s[4:5]")
    with pytest.raises(UninitialisedRead, match="s9"):
        run_lines("s_cmp_eq_u32 s9, 0")


def test_uninitialised_half_of_a_pair() -> None:
    """Of a packed instruction each result depends on its own half of the sources, which it may overwrite."""
    packed = (
        PROLOGUE + "v_mov_b32_e32 v2, 1.0\n v_pk_mul_f32 v[2:3], v[2:3], v[2:3] op_sel:[{0},0] op_sel_hi:[{1},{1}]\n "
    )
    run_lines(packed.format(0, 1) + "global_store_dword v1, v2, s[4:5]")
    run_lines(packed.format(0, 0) + "global_store_dword v1, v3, s[4:5]")
    with pytest.raises(UninitialisedRead, match="v3"):
        run_lines(packed.format(0, 1) + "global_store_dword v1, v3, s[4:5]")
    with pytest.raises(UninitialisedRead, match="v2"):
        run_lines(packed.format(1, 0) + "global_store_dword v1, v2, s[4:5]")


def test_uninitialised_memory() -> None:
    code, _ = kernels.build(kernels.copy_kernel, "gfx942", FLOATS, 256)
    gpu = VirtualGpu("gfx942")
    x = gpu.memory.add("x", np.ones(256, np.float32), initialised=False)
    y = gpu.memory.add("y", np.zeros(256, np.float32))
    with pytest.raises(UninitialisedRead, match="of 'x'"):
        gpu.launch(code, grid=(1, 1, 1), block_threads=code.max_threads, kernargs=[x, y, 256, 0, 0])


@pytest.mark.parametrize("order", ORDERS)
def test_lds_race(order: str) -> None:
    """Every wave writes its number to one place."""
    lines = """
    v_lshrrev_b32_e32 v2, 6, v0
    v_mov_b32_e32 v1, 0
    ds_write_b32 v1, v2
    s_waitcnt lgkmcnt(0)
    """
    with pytest.raises(LdsRace, match=r"writes LDS byte 0 .* wave \d wrote"):
        run_lines(lines, waves=2, order=order)


ATOMIC = "v_mov_b32_e32 v1, 0\n v_mov_b32_e32 v2, 1\n{}\n s_waitcnt lgkmcnt(0)\n"
ZERO = ATOMIC.format("ds_write_b32 v1, v1") + "s_barrier\n"


@pytest.mark.parametrize("order", ORDERS)
def test_lds_atomics_race_with_loads_and_stores_only(order: str) -> None:
    """Between two barriers other waves may change the same place by atomics, and neither read nor write it."""
    add = "ds_add_u32 v1, v2\n"
    run_lines(ATOMIC.format(f"{ZERO}{add}"), waves=2, order=order)
    after = "s_waitcnt lgkmcnt(0)\n s_barrier\n ds_read_b32 v3, v1"
    run_lines(ATOMIC.format(f"{ZERO}{add}{after}"), waves=2, order=order)
    for other in ("ds_read_b32 v3, v1", "ds_write_b32 v1, v2"):
        for both in (f"{add}{other}", f"{other}\n{add}"):
            with pytest.raises(LdsRace, match="LDS byte 0"):
                run_lines(ATOMIC.format(f"{ZERO}{both}"), waves=2, order=order)


def test_lds_atomics_need_a_value_and_a_wait() -> None:
    with pytest.raises(UninitialisedRead, match="LDS byte 0"):
        run_lines(ATOMIC.format("ds_add_u32 v1, v2"))
    with pytest.raises(MissingWait, match="reads LDS byte 0 .* wave . changed before the last barrier without"):
        run_lines(ATOMIC.format(ZERO + "ds_add_u32 v1, v2\n s_barrier\n ds_read_b32 v3, v1"), waves=2)


def test_waves_may_store_the_same_value() -> None:
    run_lines("v_mov_b32_e32 v1, 0\n ds_write_b32 v1, v1\n s_waitcnt lgkmcnt(0)", waves=2)


def test_neighbouring_bytes_do_not_race() -> None:
    lines = "v_lshrrev_b32_e32 v1, 6, v0\n ds_write_b8 v1, v1\n s_waitcnt lgkmcnt(0)"
    run_lines(lines, waves=4)


def test_lds_past_the_end() -> None:
    lines = "v_mov_b32_e32 v1, 0\n ds_write_b32 v1, v1 offset:64\n s_waitcnt lgkmcnt(0)"
    with pytest.raises(MemoryFault, match=r"LDS access of 4 bytes at 64, past its end \(64 bytes\)"):
        run_lines(lines, lds_bytes=64)


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_that_do_not_match(order: str) -> None:
    lines = """
    v_readfirstlane_b32 s4, v0
    s_cmp_lt_u32 s4, 64
    s_cbranch_scc1 .Lother
    s_barrier
    s_endpgm
.Lother:
    s_barrier
    """
    with pytest.raises(BarrierDivergence, match="wave 0 waits at instruction 5, wave 1 waits at instruction 3"):
        run_lines(lines, waves=2, order=order)
    run_lines(lines, waves=2, order=order, checks=Checks(barriers=False))


@pytest.mark.parametrize("order", ORDERS)
def test_a_wave_that_ends_before_the_barrier(order: str) -> None:
    lines = """
    v_readfirstlane_b32 s4, v0
    s_cmp_lt_u32 s4, 64
    s_cbranch_scc1 .Lend
    s_barrier
.Lend:
    s_nop 0
    """
    with pytest.raises(BarrierDivergence, match="wave 0 has ended"):
        run_lines(lines, waves=2, order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_lds_writes_not_waited_for_at_a_barrier(order: str) -> None:
    """What another wave wrote is there after a barrier that this one entered with its writes waited for, no other."""
    lines = """
    v_lshlrev_b32_e32 v1, 2, v0
    v_xor_b32_e32 v2, 0x100, v1
    ds_write_b32 v1, v1
    {}
    s_barrier
    {}
    {} v2{}
    s_waitcnt lgkmcnt(0)
    """
    wait = "s_waitcnt lgkmcnt(0)"
    for does, access in (("reads", ("ds_read_b32 v3,", "")), ("writes", ("ds_write_b32", ", v0"))):
        for after in ("", wait):
            missing = lines.format("", after, *access)
            with pytest.raises(MissingWait, match=f"{does} LDS byte .* before the last barrier without waiting"):
                run_lines(missing, waves=2, order=order)
            run_lines(missing, waves=2, order=order, checks=Checks(barrier_waits=False))
        run_lines(lines.format(wait, "", *access), waves=2, order=order)
        # 15 reads behind it fill the counter: the write has ended.
        reads = "\n".join(f"ds_read_b32 v{number}, v1" for number in range(3, 18))
        run_lines(lines.format(reads, "", *access), waves=2, order=order)
        # As in Composable Kernel, one of whose barriers is for something else.
        run_lines(lines.format("", f"{wait}\n s_barrier", *access), waves=2, order=order)


@pytest.mark.parametrize(
    ("load", "most"), [("global_load_dword v{}, v1, s[4:5]", 63), ("ds_read_b32 v{}, v1", 15)], ids=("vm", "ds")
)
def test_no_wait_where_the_counter_is_full(load: str, most: int) -> None:
    """Of more loads than the counter holds the first has returned, whose wait compilers leave out."""
    store = "ds_write_b32 v1, v1\n s_waitcnt lgkmcnt(0)\n"
    for younger in (most, most - 1):
        loads = "\n".join(load.format(2 + number) for number in range(1 + younger))
        lines = f"{PROLOGUE}\n{store}\n{loads}\n v_mov_b32_e32 v1, v2\n s_waitcnt vmcnt(0) lgkmcnt(0)"
        if younger == most:
            run_lines(lines)
            with pytest.raises(MissingWait, match="v3 is used before the wait for its load"):
                run_lines(lines.replace("v1, v2", "v1, v3"))
        else:
            with pytest.raises(MissingWait, match="v2 is used before the wait for its load"):
                run_lines(lines)


def test_workgroups_that_write_to_one_place() -> None:
    code, _ = kernels.build(kernels.same_place_kernel, "gfx942", FLOATS, 256)
    with pytest.raises(GlobalConflict, match="writes what workgroup . wrote in this launch: byte .* of 'y'"):
        run(code, np.ones(256, np.float32), np.zeros(256, np.float32), 256, workgroups=2)


def test_workgroups_that_read_what_another_wrote() -> None:
    lines = (
        PROLOGUE
        + """
    s_cmp_lg_u32 s2, 0
    s_cbranch_scc1 .Lread
    global_store_dword v1, v0, s[4:5]
.Lread:
    global_load_dword v2, v1, s[4:5]
    s_waitcnt vmcnt(0)
    """
    )
    with pytest.raises(GlobalConflict, match="workgroup 1 reads"):
        run_lines(lines, workgroups=2)
    run_lines(lines, workgroups=2, checks=Checks(conflicts=False))


def test_load_to_lds_not_waited_for() -> None:
    lines = (
        PROLOGUE
        + """
    s_mov_b32 m0, 0
    global_load_lds_dword v1, s[4:5]
    WAIT
    ds_read_b32 v2, v1
    s_waitcnt lgkmcnt(0)
    global_store_dword v1, v2, s[4:5]
    """
    )
    with pytest.raises(MissingWait, match="LDS byte"):
        run_lines(lines.replace("WAIT", ""))
    np.testing.assert_array_equal(run_lines(lines.replace("WAIT", "s_waitcnt vmcnt(0)")), np.arange(1024))


def test_waits_count_what_is_left() -> None:
    """vmcnt(1) covers the older of two loads."""
    lines = (
        PROLOGUE
        + """
    global_load_dword v2, v1, s[4:5]
    global_load_dword v3, v1, s[4:5]
    s_waitcnt vmcnt(1)
    v_mov_b32_e32 v4, REGISTER
    s_waitcnt vmcnt(0)
    """
    )
    run_lines(lines.replace("REGISTER", "v2"))
    with pytest.raises(MissingWait, match="v3 is used before the wait for its load"):
        run_lines(lines.replace("REGISTER", "v3"))


def test_overwriting_a_register_that_a_load_will_write() -> None:
    with pytest.raises(MissingWait, match="v2"):
        run_lines(PROLOGUE + "global_load_dword v2, v1, s[4:5]\n v_mov_b32_e32 v2, 0\n s_waitcnt vmcnt(0)")


def test_scalar_loads_return_in_any_order() -> None:
    lines = "s_load_dword s4, s[0:1], 0x0\n s_load_dword s5, s[0:1], 0x4\n s_waitcnt lgkmcnt(1)\n s_mov_b32 s6, s4"
    with pytest.raises(MissingWait, match="s4"):
        run_lines(lines)


def test_nan() -> None:
    lines = "v_mov_b32_e32 v1, 0x7f800000\n v_sub_f32_e32 v2, v1, v1"
    run_lines(lines)
    with pytest.raises(NanWritten, match=r"v2, lane 0.*v_sub_f32_e32 v2, v1, v1"):
        run_lines(lines, stop_at_nan=True)


def test_endless_loop() -> None:
    with pytest.raises(InstructionLimit):
        run_lines(".Lagain:\n s_branch .Lagain", max_wave_instructions=1000)


@pytest.mark.parametrize(
    "line",
    [
        "v_made_up_b32 v1, v0",
        "v_add_u32_e64 v1, v0, v0 clamp",
        "v_mfma_f32_16x16x16_f16 v[4:7], v[8:9], v[10:11], 0 cbsz:1",
        "v_add_f32_e32 v1, v200, v0",
        "v_mov_b32_e32 v1, src_shared_base",
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE), 3",
    ],
)
def test_what_is_not_implemented_raises_with_its_text(line: str) -> None:
    with pytest.raises(UnsupportedInstruction):
        run_lines(line)


def test_breakpoint_and_trace(tmp_path: Any) -> None:
    seen: list[Any] = []
    with (tmp_path / "trace").open("w+") as trace:
        run_lines("v_add_u32_e32 v1, 5, v0\n s_nop 0", breakpoints={1: seen.append}, trace=trace)
        trace.seek(0)
        lines = trace.read().splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["v0", "0"]
    (registers,) = seen
    assert registers.text == "s_nop 0" and registers.waves == ((0, 0),)
    np.testing.assert_array_equal(registers.vgprs[1, 0], np.arange(64) + 5)


def test_attention_without_a_barrier_or_a_wait() -> None:
    """The shipped forward kernel with each barrier, and each wait, removed in turn."""
    from flash_rocm._triton.offline import compile_kernel

    fields: dict[str, Any] = dict(dtype=torch.bfloat16, batch=1, nheads=1, seqlen_q=128, seqlen_k=256, headdim=64)
    problem = make_problem(**fields)
    text = compile_kernel("forward", problem, arch_named("gfx942")).asm["amdgcn"]
    captured: list[Launch] = []
    with flash_rocm.virtual_gpu("gfx942", on_launch=captured.append):
        flash_rocm.flash_attn_func(*make_inputs(problem).inputs[:3])
    (launch,) = captured
    # The text has no more code than the kernel that was loaded, so its lines are those of the instructions.
    assert [x.text for x in changed(launch.code, text).program.instructions] == [
        x.text for x in launch.code.program.instructions
    ]
    counts = launch.run().per_instruction
    executed = {launch.code.program.instructions[i].line for i in np.nonzero(counts)[0]}
    missed = []
    for name in ("s_barrier", "s_waitcnt"):
        lines = [line for line in places(text, name) if line in executed]
        assert lines
        for line in lines:
            try:
                launch.run(changed(launch.code, without_line(text, line)))
            except KernelFault:
                continue
            missed.append((name, line))
    # A wait that repeats an earlier one, and a barrier between reads only, may go without harm.
    assert len(missed) <= 2, [text.splitlines()[line - 3 : line + 3] for _, line in missed]
