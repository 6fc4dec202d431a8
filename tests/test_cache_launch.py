"""Host side of Triton's calls over a K/V cache: a launch that is known takes what the first one took."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvcache_calls import full_call, integers, random, without_new

import flash_rocm
from flash_rocm import cache_ops, v3, virtual_device
from flash_rocm.arch import arch_named
from flash_rocm.problem import CacheInputs

pytest.importorskip("triton", reason="the launcher imports Triton")

from flash_rocm._triton import launcher  # noqa: E402


class Launches:
    """What a launch that were known would bring, and what the first one takes, of each launch; none is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs: list[tuple[Any, list[Any], launcher.Call]] = []
        self._asked: list[tuple[Any, list[Any]]] = []
        monkeypatch.setattr(launcher.Launcher, "launch_known", self._known)
        monkeypatch.setattr(launcher.Launcher, "launch_new", self._new)

    def _known(self, key: Any, fresh: list[Any], totals: tuple[int, ...] = ()) -> bool:
        self._asked.append((key, fresh))
        return False

    def _new(self, key: Any, call: launcher.Call) -> None:
        asked, fresh = self._asked.pop()
        assert asked == key
        self.pairs.append((key, fresh, call))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    sm90 = arch_named("sm90")
    monkeypatch.setattr(virtual_device, "arch_of", lambda device: sm90)
    monkeypatch.setattr(cache_ops, "_decided", {})  # what is decided for that chip is not for the CPU
    return Launches(monkeypatch)


def _mla(**changes: Any) -> dict[str, Any]:
    """Keys whose larger part is the values: two parts of queries and keys."""
    whole = random("cpu", 2, 20, 1, 576)
    q = {"q": random("cpu", 2, 1, 16, 64), "qv": random("cpu", 2, 1, 16, 512)}
    return (
        q | {"k_cache": whole[..., 512:], "v_cache": whole[..., :512], "cache_seqlens": integers("cpu", 5, 9)} | changes
    )


def _varlen() -> dict[str, Any]:
    arguments = without_new(full_call("cpu", paged=True))
    arguments["page_table"] = arguments.pop("block_table")
    q = arguments.pop("q").flatten(0, 1)
    return arguments | {"q": q, "cu_seqlens_q": integers("cpu", 0, 2, 6), "max_seqlen_q": 4}


CALLS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "decode": (flash_rocm.flash_attn_with_kvcache, without_new(full_call("cpu")), 1),
    "slopes": (
        flash_rocm.flash_attn_with_kvcache,
        without_new(full_call("cpu")) | {"alibi_slopes": torch.ones(2, 4)},
        1,
    ),
    "two splits": (flash_rocm.flash_attn_with_kvcache, without_new(full_call("cpu")) | {"num_splits": 2}, 2),
    "append, rotary embedding": (flash_rocm.flash_attn_with_kvcache, full_call("cpu"), 2),
    "and pages, two splits": (flash_rocm.flash_attn_with_kvcache, full_call("cpu", True) | {"num_splits": 2}, 3),
    "varlen, three splits": (v3.flash_attn_with_kvcache, _varlen() | {"num_splits": 3}, 2),
    "MLA": (v3.flash_attn_with_kvcache, _mla(), 1),
    "MLA, two splits": (v3.flash_attn_with_kvcache, _mla(num_splits=2), 2),
}


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
@pytest.mark.parametrize("name", CALLS)
def test_a_known_launch_takes_what_the_first_one_took(
    name: str, debug: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses in the kernel's order, though outputs are seen as tensors by the first launch alone."""
    monkeypatch.setenv("FLASH_ROCM_DEBUG", "01"[debug])
    function, arguments, count = CALLS[name]
    for _ in range(2):
        function(**arguments)
    assert len(launches.pairs) == 2 * count
    for _, fresh, call in launches.pairs:
        addresses = [None if x is None else x.data_ptr() for x in call.tensors]
        assert fresh == [*addresses, *call.lse_strides]
        assert len(set(addresses) - {None}) >= 4
    for first, second in zip(launches.pairs[:count], launches.pairs[count:], strict=True):
        assert first[0] == second[0]
        assert first[2]._replace(tensors=()) == second[2]._replace(tensors=())


def test_parts_of_splits_lie_apart_and_start_at_16_bytes(launches: Launches) -> None:
    """Values of 3 dims, of which an odd number of floats come before softmax_lse of the parts."""
    arguments = dict(
        q=random("cpu", 1, 1, 1, 16), k_cache=random("cpu", 1, 40, 1, 16), v_cache=random("cpu", 1, 40, 1, 3)
    )
    flash_rocm.flash_attn_with_kvcache(**arguments, num_splits=3)
    (_, _, attend), (_, _, combine) = launches.pairs
    out, lse = attend.tensors[5:7]
    assert out is not None and lse is not None
    assert (out.shape, lse.shape) == ((1, 1, 1, 3, 3), (1, 1, 1, 3)) and lse.is_contiguous() and out.is_contiguous()
    assert lse.data_ptr() >= out.data_ptr() + 9 * 4 and lse.data_ptr() % 16 == out.data_ptr() % 16 == 0
    assert [x.data_ptr() for x in combine.tensors[:2] if x is not None] == [out.data_ptr(), lse.data_ptr()]


def test_what_starts_elsewhere_is_another_launch(launches: Launches) -> None:
    """Triton compiles another kernel for pointers that do not divide by 16 bytes."""
    arguments = without_new(full_call("cpu"))
    lengths = torch.zeros(3, dtype=torch.int32)[1:]
    flash_rocm.flash_attn_with_kvcache(**arguments)
    flash_rocm.flash_attn_with_kvcache(**arguments | {"cache_seqlens": lengths})
    assert lengths.data_ptr() % 16 and launches.pairs[0][0] != launches.pairs[1][0]


def test_a_layout_is_shared_by_calls_alike() -> None:
    x = torch.zeros(2, 8, 2, 16)
    inputs = CacheInputs(q=x, k=x, v=x).with_layout()
    assert inputs.with_layout() is inputs and inputs.addresses == (x.data_ptr(),) * 3 + (None,) * 16
    others = [x.clone(), x.half(), x[:1], x[:, :7], x.transpose(1, 2), torch.zeros(x.numel() + 1)[1:].view_as(x)]
    layouts = [CacheInputs(q=x, k=other, v=x).with_layout().layout for other in others]
    assert layouts[0] is inputs.layout and len({*layouts}) == len(layouts)
    assert CacheInputs(q=x, k=x, v=x, k_new=x).with_layout().layout is not inputs.layout


@pytest.mark.parametrize(
    ("argument", "good", "wrong"),
    [("num_splits", 1, True), ("attention_chunk", 0, False), ("window_size", (1, 1), (1.0, 1)), ("softcap", 1, -1.0)],
)
def test_what_is_equal_to_a_good_value_is_still_refused(argument: str, good: Any, wrong: Any) -> None:
    """Nothing that a call like an earlier one skips depends on these."""
    arguments = dict(q=torch.zeros(1, 1, 2, 16), k_cache=torch.zeros(1, 4, 2, 16), v_cache=torch.zeros(1, 4, 2, 16))
    v3.flash_attn_with_kvcache(**arguments, **{argument: good})
    with pytest.raises(ValueError, match=argument):
        v3.flash_attn_with_kvcache(**arguments, **{argument: wrong})


def _pages(size: int, count: int = 8, **changes: Any) -> dict[str, Any]:
    """Absorbed MLA of 16 bits over pages."""
    whole = torch.zeros(count, size, 1, 576, dtype=torch.bfloat16)
    table = torch.arange(8, dtype=torch.int32).view(2, 4) % count
    return _of_type(_mla(k_cache=whole[..., 512:], v_cache=whole[..., :512], page_table=table) | changes)


def _of_type(arguments: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    floats = (name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point())
    return arguments | {name: arguments[name].to(dtype) for name in floats}


def _odd_entries() -> dict[str, Any]:
    """A step from one entry to the next that is no number of rows."""
    whole = torch.zeros(2 * (20 * 576 + 64), dtype=torch.bfloat16).as_strided((2, 20, 1, 576), (11584, 576, 576, 1))
    return _of_type(_mla()) | {"k_cache": whole[..., 512:], "v_cache": whole[..., :512]}


def _dense(**changes: Any) -> dict[str, Any]:
    whole = torch.zeros(2, 20, 1, 576, dtype=torch.bfloat16)
    return _of_type(_mla() | {"k_cache": whole[..., 512:], "v_cache": whole[..., :512]} | changes)


@pytest.mark.parametrize(
    "arguments,copied",
    (
        (_pages(64), True),
        (_pages(192), True),
        (_pages(16), False),
        (_pages(96), False),
        (_dense(), True),
        (_dense(cache_leftpad=integers("cpu", 1, 2)), True),
        (_dense(cache_batch_idx=integers("cpu", 1, 0)), True),
        (_odd_entries(), False),
        (_of_type(_mla(), torch.float32), False),
    ),
    ids=("pages of 64", "192", "16", "96", "dense", "leftpad", "entries", "odd entries", "float32"),
)
def test_whose_keys_tma_copies(arguments: dict[str, Any], copied: bool, launches: Launches) -> None:
    """Tiles of 64 keys that are in one page, of matrices; q, the first tensor, is copied by threads."""
    v3.flash_attn_with_kvcache(**arguments)
    _, _, call = launches.pairs[0]
    assert call.constants["TMA"] is copied
    if not copied:
        assert call.tiles == ()
        return
    none, k, v = call.tiles
    assert none is None and k is not None and v is not None
    assert (k.rows, k.cols, v.rows, v.cols) == (64, 64, 64, 128)
    q, described_k, described_v, *_ = call.arguments()
    assert q is call.tensors[0]
    assert described_k.shape[0] == described_v.shape[0] == arguments["k_cache"].shape[:2].numel()


def test_more_pages_are_another_launch(launches: Launches) -> None:
    """A descriptor says how many rows there are."""
    for count in (8, 9, 8):
        v3.flash_attn_with_kvcache(**_pages(64, count))
    first, more, again = (key for key, _, _ in launches.pairs)
    assert first == again != more


def test_a_known_launch_describes_keys_and_values(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first tensors those with a tile: the address is new, rows, columns and stride are the first launch's."""
    v3.flash_attn_with_kvcache(**_pages(64))
    _, _, call = launches.pairs[0]
    monkeypatch.undo()
    brought: list[Any] = []
    compiled = SimpleNamespace(run=lambda *args: brought.extend(args), function=1, packed_metadata=2)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 3))
    monkeypatch.setattr(launcher.triton.runtime, "driver", driver)
    monkeypatch.setattr(launcher, "_current_device", lambda: 0)
    known = launcher.Launcher(None)
    known._known["key",] = launcher._Known(compiled, 0, call, (8, 9))
    assert known.launch_known(("key",), [16, 32, 48, 64])
    programs, _, _, stream, *_ = brought
    q, k, v, other, *tail = brought[9:]
    assert (programs, stream, q, other, tail) == (call.programs, 3, 16, 64, [8, 9])
    rows = 8 * 64
    assert (k.data_ptr(), k.shape, k.strides) == (32, (rows, 64), (576, 1))
    assert (v.data_ptr(), v.shape, v.strides) == (48, (rows, 512), (576, 1))
