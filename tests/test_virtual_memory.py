"""Loads, stores and atomics whose lanes differ on the virtual GPU, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("elftools", reason="needs flash_rocm[virtual]")

from virtual_asm import hand_written

from flash_rocm.virtual import Checks, Memory, VirtualGpu

LANES = np.arange(64)
#: Bytes, sign, which half of the register.
LOADS: dict[str, tuple[int, bool, str]] = {
    "ubyte": (1, False, ""),
    "sbyte": (1, True, ""),
    "ushort": (2, False, ""),
    "sshort": (2, True, ""),
    "short_d16": (2, False, "lo"),
    "short_d16_hi": (2, False, "hi"),
    "ubyte_d16": (1, False, "lo"),
    "ubyte_d16_hi": (1, False, "hi"),
    "dword": (4, False, ""),
    "dwordx2": (8, False, ""),
    "dwordx3": (12, False, ""),
    "dwordx4": (16, False, ""),
}
LDS_LOADS = {
    "u8": LOADS["ubyte"],
    "i8": LOADS["sbyte"],
    "u16": LOADS["ushort"],
    "i16": LOADS["sshort"],
    "u16_d16": LOADS["short_d16"],
    "u16_d16_hi": LOADS["short_d16_hi"],
    "u8_d16": LOADS["ubyte_d16"],
    "u8_d16_hi": LOADS["ubyte_d16_hi"],
    "b32": LOADS["dword"],
    "b64": LOADS["dwordx2"],
    "b96": LOADS["dwordx3"],
    "b128": LOADS["dwordx4"],
}
STORES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
GFX11 = {"ubyte": "u8", "sbyte": "i8", "ushort": "u16", "sshort": "i16", "short_d16": "d16_b16"}
GFX11 |= {"short_d16_hi": "d16_hi_b16", "ubyte_d16": "d16_u8", "ubyte_d16_hi": "d16_hi_u8", "dword": "b32"}
GFX11 |= {"dwordx2": "b64", "dwordx3": "b96", "dwordx4": "b128", "byte": "b8", "short": "b16"}

#: s[4:5] holds the data, s[8:9] the result, s[4:7] also a buffer descriptor of the data; v1 = lane * 16.
PROLOGUE = """
    s_load_dwordx4 s[4:7], s[0:1], 0x0
    s_load_dwordx4 s[8:11], s[0:1], 0x10
    s_waitcnt lgkmcnt(0)
    v_lshlrev_b32_e32 v1, 4, v0
"""
FILL = "\n".join(f"v_mov_b32_e32 v{i}, 0x77777777" for i in range(4, 8)) + "\n"
SAVE = """
    s_waitcnt vmcnt(0) lgkmcnt(0)
    global_store_dwordx4 v1, v[4:7], s[8:9]
"""


def run(lines: str, data: np.ndarray, arch: str = "gfx942", **options: Any) -> np.ndarray:
    """uint32 [64, 4] that a wave leaves in its result."""
    result = np.zeros((64, 4), np.uint32)
    gpu = VirtualGpu(arch)
    size = 32 if arch.startswith("gfx1") else 64
    first, second = gpu.memory.add("data", data), gpu.memory.add("result", result)
    words = [first, data.nbytes, second, 0, 0, 0, 0, 0]
    if size == 32:
        words[1] |= 3 << 60  # the range check of raw buffers
    code = hand_written(lines, arch, lds_bytes=4096, scratch_bytes=64, wave_size=size)
    gpu.launch(code, grid=(1, 1, 1), block_threads=size, kernargs=words, **options)
    return result[:size]


def span(start: int, size: int) -> str:
    return f"v[{start}:{start + size // 4 - 1}]" if size > 4 else f"v{start}"


def loaded(data: np.ndarray, offset: int, kind: tuple[int, bool, str], lanes: int = 64) -> np.ndarray:
    """uint32 [lanes, 4]: what each lane reads at lane * 16 + offset into registers full of 0x77."""
    size, signed, half = kind
    expected = np.full((lanes, 4), 0x77777777, np.uint32)
    raw = data.view(np.uint8)
    for lane in range(lanes):
        part = raw[16 * lane + offset : 16 * lane + offset + size].tobytes()
        if size >= 4:
            expected[lane, : size // 4] = np.frombuffer(part, np.uint32)
            continue
        value = int.from_bytes(part, "little", signed=signed) & 0xFFFFFFFF
        if half:
            value = 0x77770000 | value if half == "lo" else 0x7777 | value << 16
        expected[lane, 0] = value
    return expected


@pytest.fixture
def data() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << 32, 64 * 4 + 16, np.uint32)


@pytest.mark.parametrize("name", LOADS)
def test_loads(name: str, data: np.ndarray) -> None:
    kind = LOADS[name]
    offset = 4 if kind[0] >= 4 else 3 if kind[0] == 1 else 6
    expected, target = loaded(data, offset, kind), span(4, kind[0])
    forms = {
        f"global_load_{name} {target}, v1, s[4:5] offset:{offset}": "",
        f"global_load_{name} {target}, v[2:3], off offset:{offset}": """
            v_mov_b32_e32 v3, s5
            v_add_co_u32_e32 v2, vcc, s4, v1
            v_addc_co_u32_e32 v3, vcc, 0, v3, vcc
        """,
        f"buffer_load_{name} {target}, v1, s[4:7], 0 offen offset:{offset}": "s_mov_b32 s7, 0",
        f"buffer_load_{name} {target}, v1, s[4:7], s12 offen": f"s_mov_b32 s12, {offset}",
    }
    for line, before in forms.items():
        np.testing.assert_array_equal(run(f"{PROLOGUE}{before}\n{FILL}{line}{SAVE}", data), expected, err_msg=line)
    lines = f"{PROLOGUE}{FILL}global_load_{GFX11[name]} {target}, v1, s[4:5] offset:{offset}{SAVE}"
    np.testing.assert_array_equal(run(lines, data, "gfx1100"), expected[:32])


@pytest.mark.parametrize("name", STORES)
def test_stores(name: str, data: np.ndarray) -> None:
    size = STORES[name]
    load = f"{PROLOGUE}global_load_dwordx4 v[4:7], v1, s[4:5]\n s_waitcnt vmcnt(0)\n"
    expected = np.zeros((64, 16), np.uint8)
    expected[:, :size] = data.view(np.uint8)[:1024].reshape(64, 16)[:, :size]
    source = span(4, size)
    buffer = f"s_mov_b32 s10, 1024\n s_mov_b32 s11, 0\n buffer_store_{name} {source}, v1, s[8:11], 0 offen"
    for line in (f"global_store_{name} v1, {source}, s[8:9]", buffer):
        np.testing.assert_array_equal(run(load + line, data).view(np.uint8), expected, err_msg=line)
    found = run(f"{load}global_store_{GFX11[name]} v1, {source}, s[8:9]", data, "gfx1100")
    np.testing.assert_array_equal(found.view(np.uint8), expected[:32])


TO_LDS = """
    global_load_dwordx4 v[4:7], v1, s[4:5]
    s_waitcnt vmcnt(0)
    ds_write_b128 v1, v[4:7]
    s_waitcnt lgkmcnt(0)
"""


@pytest.mark.parametrize("name", LDS_LOADS)
def test_lds_loads(name: str, data: np.ndarray) -> None:
    kind = LDS_LOADS[name]
    offset = 0 if kind[0] >= 4 else 3 if kind[0] == 1 else 6
    lines = f"{PROLOGUE}{TO_LDS}{FILL}ds_read_{name} {span(4, kind[0])}, v1 offset:{offset}{SAVE}"
    np.testing.assert_array_equal(run(lines, data), loaded(data, offset, kind))


@pytest.mark.parametrize("name", ["b8", "b16", "b32", "b64", "b96", "b128", "b8_d16_hi", "b16_d16_hi"])
def test_lds_stores(name: str, data: np.ndarray) -> None:
    kind, _, upper = name.partition("_")
    size = int(kind[1:]) // 8
    zero = "\n".join(f"v_mov_b32_e32 v{i}, 0" for i in range(8, 12)) + "\n ds_write_b128 v1, v[8:11]\n"
    load = f"{PROLOGUE}{zero}global_load_dwordx4 v[4:7], v1, s[4:5]\n s_waitcnt vmcnt(0) lgkmcnt(0)\n"
    lines = f"{load}ds_write_{name} v1, {span(4, size)}\n s_waitcnt lgkmcnt(0)\n ds_read_b128 v[4:7], v1{SAVE}"
    expected = np.zeros((64, 16), np.uint8)
    start = 2 if upper else 0
    expected[:, :size] = data.view(np.uint8)[:1024].reshape(64, 16)[:, start : start + size]
    np.testing.assert_array_equal(run(lines, data).view(np.uint8), expected)


@pytest.mark.parametrize("stride", ["", "st64"])
@pytest.mark.parametrize("size", [4, 8])
def test_lds_pairs(size: int, stride: str, data: np.ndarray) -> None:
    """Two values at two offsets in units of their size, or of 64 times that."""
    unit = size * (64 if stride else 1)
    address = f"v_mul_u32_u24_e32 v2, {size}, v0\n" if stride else f"v_mul_u32_u24_e32 v2, {2 * size}, v0\n"
    load = f"{PROLOGUE}global_load_dwordx4 v[4:7], v1, s[4:5]\n{address}s_waitcnt vmcnt(0)\n"
    first, second = span(4, size), span(4 + size // 4, size)
    write = f"ds_write2{stride}_b{8 * size} v2, {first}, {second} offset1:1\n s_waitcnt lgkmcnt(0)\n"
    read = f"{FILL}ds_read2{stride}_b{8 * size} {span(4, 2 * size)}, v2 offset1:1{SAVE}"
    expected = np.full((64, 4), 0x77777777, np.uint32)
    expected[:, : size // 2] = data[:256].reshape(64, 4)[:, : size // 2]
    np.testing.assert_array_equal(run(load + write + read, data), expected)
    # And where they lie: the second value of lane 0 is a unit further.
    single = f"{FILL}v_mov_b32_e32 v3, {unit}\n ds_read_b{8 * size} {first}, v3{SAVE}"
    found = run(load + write + single, data)
    np.testing.assert_array_equal(found[5, : size // 4], data[size // 4 : size // 2])


#: Instruction, bits of an element.
TRANSPOSED = {"ds_read_b64_tr_b16 v[4:5], v2": 16, "ds_read_b64_tr_b8 v[4:5], v2": 8}
#: (chip, instruction), see test_virtual_coverage.py.
EXECUTED = [("gfx950", instruction) for instruction in TRANSPOSED]


@pytest.mark.parametrize("instruction", TRANSPOSED)
def test_transposed_lds_reads(instruction: str, data: np.ndarray) -> None:
    """Of every 16 lanes, lane l gets column l of the rows that they read together."""
    address = "v_lshlrev_b32_e32 v2, 3, v0\n"
    bits = TRANSPOSED[instruction]
    found = run(f"{PROLOGUE}{TO_LDS}{address}{FILL}{instruction}{SAVE}", data, "gfx950")[:, :2]
    rows = 64 // bits
    dtype = np.uint16 if bits == 16 else np.uint8
    tiles = data[:128].view(dtype).reshape(4, rows, 16)
    np.testing.assert_array_equal(found.copy().view(dtype).reshape(4, 16, rows), tiles.transpose(0, 2, 1))


def test_buffer_range(data: np.ndarray) -> None:
    """Dwords past num_records read 0, dword by dword; stores there are dropped; soffset counts."""
    lines = f"{PROLOGUE}s_mov_b32 s7, 0\n s_mov_b32 s6, 40\n{FILL}"
    expected = np.zeros((64, 4), np.uint32)
    expected.reshape(-1)[:10] = data[:10]
    load = "buffer_load_dwordx4 v[4:7], v1, s[4:7], 0 offen"
    np.testing.assert_array_equal(run(f"{lines}{load}{SAVE}", data), expected)
    shifted = "s_mov_b32 s12, 8\n buffer_load_dwordx4 v[4:7], v1, s[4:7], s12 offen"
    expected = np.zeros((64, 4), np.uint32)
    expected.reshape(-1)[:8] = data[2:10]
    np.testing.assert_array_equal(run(f"{lines}{shifted}{SAVE}", data), expected)
    store = "s_mov_b32 s10, 40\n s_mov_b32 s11, 0\n buffer_store_dwordx4 v[4:7], v1, s[8:11], 0 offen"
    found = run(f"{PROLOGUE}{FILL}{store}", data).reshape(-1)
    np.testing.assert_array_equal(found, np.where(np.arange(256) < 10, 0x77777777, 0))


def test_buffer_index(data: np.ndarray) -> None:
    """idxen: index and num_records count in strides, bits 16 to 29 of the second word.

    So the comment of Mesa's radeonsi on NUM_RECORDS ("GFX9: for VMEM and inst.IDXEN == 1 and STRIDE != 0").
    """
    lines = f"{PROLOGUE}s_or_b32 s5, s5, 0x80000\n s_mov_b32 s7, 0\n{FILL}"
    load = "buffer_load_dword v4, v0, s[4:7], 0 idxen offset:4"
    expected = np.full((64, 4), 0x77777777, np.uint32)
    expected[:, 0] = data[2 * LANES + 1]
    np.testing.assert_array_equal(run(f"{lines}{load}{SAVE}", data), expected)
    expected[:, 0] = np.where(LANES < 40, data[2 * LANES + 1], 0)
    np.testing.assert_array_equal(run(f"{lines}s_mov_b32 s6, 40\n{load}{SAVE}", data), expected)


def test_scratch_is_private(data: np.ndarray) -> None:
    load = f"{PROLOGUE}global_load_dwordx4 v[4:7], v1, s[4:5]\n s_waitcnt vmcnt(0)\n"
    lines = f"{load}scratch_store_dwordx4 off, v[4:7], off offset:16\n{FILL}s_mov_b32 s12, 16\n"
    lines += f"scratch_load_dwordx2 v[4:5], off, s12\n scratch_load_dwordx2 v[6:7], off, off offset:24{SAVE}"
    np.testing.assert_array_equal(run(lines, data), data[:256].reshape(64, 4))


@pytest.mark.parametrize("kind", ["global", "buffer"])
@pytest.mark.parametrize("width", ["dword", "dwordx4"])
def test_load_to_lds(kind: str, width: str, data: np.ndarray) -> None:
    """LDS address: M0 + offset + lane * size."""
    size = 4 if width == "dword" else 16
    lines = f"{PROLOGUE}s_mov_b32 s7, 0\n s_mov_b32 m0, 64\n v_mul_u32_u24_e32 v2, {size}, v0\n"
    load = {
        "global": f"global_load_lds_{width} v2, s[4:5]",
        "buffer": f"buffer_load_{width} v2, s[4:7], 0 offen lds",
    }[kind]
    read = f"{FILL}ds_read_b{8 * size} {span(4, size)}, v2 offset:64{SAVE}"
    expected = np.full((64, 4), 0x77777777, np.uint32)
    expected[:, : size // 4] = data[: 64 * size // 4].reshape(64, -1)
    found = run(f"{lines}{load}\n s_waitcnt vmcnt(0)\n{read}", data, "gfx950")
    np.testing.assert_array_equal(found, expected)


#: Operation on Python ints: dtype, function of (memory, operand).
ATOMICS: dict[str, tuple[Any, Any]] = {
    "add": (np.uint32, lambda a, b: a + b),
    "sub": (np.uint32, lambda a, b: a - b),
    "and": (np.uint32, lambda a, b: a & b),
    "or": (np.uint32, lambda a, b: a | b),
    "xor": (np.uint32, lambda a, b: a ^ b),
    "swap": (np.uint32, lambda a, b: b),
    "umin": (np.uint32, min),
    "umax": (np.uint32, max),
    "smin": (np.int32, min),
    "smax": (np.int32, max),
    "add_f32": (np.float32, lambda a, b: a + b),
    "add_x2": (np.uint64, lambda a, b: a + b),
    "swap_x2": (np.uint64, lambda a, b: b),
    "umin_x2": (np.uint64, min),
    "umax_x2": (np.uint64, max),
    "smin_x2": (np.int64, min),
    "smax_x2": (np.int64, max),
    "add_f64": (np.float64, lambda a, b: a + b),
}


def operands(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    if np.issubdtype(dtype, np.floating):
        return random.integers(-9, 9, 64).astype(dtype), random.integers(-9, 9, 64).astype(dtype)
    bits = 8 * np.dtype(dtype).itemsize
    low, high = (0, 1 << bits) if np.issubdtype(dtype, np.unsignedinteger) else (-(1 << (bits - 1)), 1 << (bits - 1))
    draw = lambda: random.integers(low, high, 64, dtype=dtype)  # noqa: E731
    return draw(), draw()


def wrapped(value: Any, dtype: Any) -> Any:
    if np.issubdtype(dtype, np.floating):
        return dtype(value)
    bits = 8 * np.dtype(dtype).itemsize
    return np.array(int(value) & ((1 << bits) - 1), f"u{bits // 8}").view(dtype)[()]


@pytest.mark.parametrize("kind", ["global", "buffer"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name: str, kind: str) -> None:
    """Each lane on a place of its own, returning what was there."""
    dtype, function = ATOMICS[name]
    memory, values = operands(dtype)
    expected = np.array([wrapped(function(a.item(), b.item()), dtype) for a, b in zip(memory, values, strict=True)])
    size = memory.itemsize
    before, result = memory.copy(), np.zeros_like(memory)
    gpu = VirtualGpu("gfx942")
    arguments = [gpu.memory.add(n, x) for n, x in (("m", memory), ("v", values), ("r", result))]
    target, source = span(4, size), span(6, size)
    atomic = {
        "global": f"global_atomic_{name} {target}, v1, {source}, s[4:5] sc0",
        "buffer": f"buffer_atomic_{name} {source}, v1, s[12:15], 0 offen sc0",
    }[kind]
    width = "dword" if size == 4 else "dwordx2"
    lines = f"""
        s_load_dwordx4 s[4:7], s[0:1], 0x0
        s_load_dwordx2 s[8:9], s[0:1], 0x10
        v_mul_u32_u24_e32 v1, {size}, v0
        s_waitcnt lgkmcnt(0)
        s_mov_b64 s[12:13], s[4:5]
        s_mov_b32 s14, 0x7fffffff
        s_mov_b32 s15, 0
        global_load_{width} {source}, v1, s[6:7]
        s_waitcnt vmcnt(0)
        {atomic}
        s_waitcnt vmcnt(0)
        global_store_{width} v1, {target if kind == "global" else source}, s[8:9]
    """
    gpu.launch(hand_written(lines), grid=(1, 1, 1), block_threads=64, kernargs=[*arguments, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(memory, expected)
    np.testing.assert_array_equal(result, before)


def test_atomics_of_many_lanes_at_one_place() -> None:
    total = np.zeros(1, np.uint32)
    gpu = VirtualGpu("gfx942")
    lines = """
        s_load_dwordx2 s[4:5], s[0:1], 0x0
        v_mov_b32_e32 v1, 0
        s_waitcnt lgkmcnt(0)
        global_atomic_add v1, v0, s[4:5]
    """
    address = gpu.memory.add("total", total)
    gpu.launch(hand_written(lines), grid=(3, 1, 1), block_threads=128, kernargs=[address, *[0] * 7])
    assert total[0] == 3 * sum(range(128))


LDS_ATOMICS: dict[str, tuple[Any, Any]] = {
    "add_u32": ATOMICS["add"],
    "sub_u32": ATOMICS["sub"],
    "and_b32": ATOMICS["and"],
    "or_b32": ATOMICS["or"],
    "xor_b32": ATOMICS["xor"],
    "min_u32": ATOMICS["umin"],
    "max_u32": ATOMICS["umax"],
    "min_i32": ATOMICS["smin"],
    "max_i32": ATOMICS["smax"],
    "add_f32": ATOMICS["add_f32"],
    "min_f32": (np.float32, min),
    "max_f32": (np.float32, max),
}


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("name", LDS_ATOMICS)
def test_lds_atomics(name: str, returns: bool) -> None:
    dtype, function = LDS_ATOMICS[name]
    memory, values = operands(dtype)
    expected = np.array([wrapped(function(a.item(), b.item()), dtype) for a, b in zip(memory, values, strict=True)])
    words = np.zeros((80, 4), np.uint32)
    words[:64, 0], words[:64, 1] = memory.view(np.uint32), values.view(np.uint32)
    atomic = f"ds_{name.replace('_', '_rtn_', 1)} v6, v1, v5" if returns else f"ds_{name} v1, v5"
    lines = f"""{PROLOGUE}{FILL}
        global_load_dwordx2 v[4:5], v1, s[4:5]
        s_waitcnt vmcnt(0)
        ds_write_b32 v1, v4
        {atomic}
        ds_read_b32 v7, v1
    {SAVE}"""
    found = run(lines, words.reshape(-1))
    np.testing.assert_array_equal(found[:, 3].copy().view(dtype), expected)
    if returns:
        np.testing.assert_array_equal(found[:, 2].copy().view(dtype), memory)


def test_inactive_lanes_touch_nothing(data: np.ndarray) -> None:
    """Their addresses are garbage."""
    lines = f"{PROLOGUE}{FILL}v_mul_lo_u32 v2, v0, v0\n v_lshlrev_b32_e32 v2, 20, v2\n s_mov_b64 exec, 1\n"
    lines += "global_load_dword v4, v2, s[4:5]\n s_waitcnt vmcnt(0)\n ds_write_b32 v2, v4\n s_waitcnt lgkmcnt(0)\n"
    lines += f"ds_read_b32 v5, v2\n s_waitcnt lgkmcnt(0)\n s_mov_b64 exec, -1{SAVE}"
    found = run(lines, data, checks=Checks())
    np.testing.assert_array_equal(found[0, :2], [data[0], data[0]])
    assert (found[1:] == 0x77777777).all()


def test_memory_at_an_address() -> None:
    """Of host code that knows it so; what else is added later stays out of its way."""
    memory = Memory()
    first = memory.add("first", np.zeros(64, np.uint8))
    for address in (first + 4096, first + (1 << 40), 0x5555_0000_0040):
        assert memory.add(f"at {address}", np.zeros(64, np.uint8), address=address) == address
        found = memory.at(address + 63)
        assert found is not None and found.name == f"at {address}"
        assert memory.at(address + 64) is None
    for taken in (first + 63, first - 63, 0x5555_0000_0000 + 1):
        with pytest.raises(ValueError, match="address: expected free memory for 'x', got that of"):
            memory.add("x", np.zeros(64, np.uint8), address=taken)
    following = memory.add("following", np.zeros(64, np.uint8))
    assert following > first + 4096 + 64
    bases = [allocation.base for allocation in memory.allocations()]
    assert bases == sorted(bases)


def test_free_places_pass_over_fixed_ones() -> None:
    memory = Memory()
    first = memory.add("first", np.zeros(64, np.uint8))
    memory.add("fixed", np.zeros(1 << 24, np.uint8), address=first + 4096)
    assert memory.add("next", np.zeros(64, np.uint8)) >= first + 4096 + (1 << 24)
