"""The frozen description of one attention call that crosses every layer.

A leaf: imports torch only.  The operators build an :class:`AttentionProblem` from the tensors they
receive, back ends read nothing else to decide whether and how to run, and :class:`AttentionInputs`
carries the tensors beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

#: As the command line has them.
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
#: Windows and lengths stay below this, so that sums of two of them fit in 32 bits.
MAX_SEQLEN = 1 << 30


class Layout:
    """Stands for the shapes, strides, dtypes and devices of q, k and v, looked up once per call.

    Asking tensors for all that takes a large part of the host time of a small call.  Instances of
    :func:`layout_of` are shared between calls, so that caches may key on their identity.
    """

    __slots__ = ("q_shape", "k_shape", "strides", "ranks")

    def __init__(self, q: torch.Tensor, k: torch.Tensor, strides: object = None) -> None:
        self.q_shape, self.k_shape = q.shape, k.shape
        #: An object that all layouts with these strides on this device share; None: not a shared layout.
        self.strides = strides
        #: (rank of q, rank of k and v) under which validation has found all of it right.
        self.ranks: tuple[int, int] | None = None


_layouts: dict[tuple[Any, ...], Layout] = {}
_strides: dict[tuple[Any, ...], object] = {}
_LAYOUTS_MAX = 4096


def layout_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Layout:
    """The shared layout of three tensors with these shapes, strides, dtypes and devices (all concrete)."""
    strides = (q.stride(), k.stride(), v.stride())
    key = (q.shape, k.shape, v.shape, strides, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    found = _layouts.get(key)
    if found is None:
        if len(_layouts) >= _LAYOUTS_MAX:
            _layouts.clear()
            _strides.clear()
        found = _layouts[key] = Layout(q, k, _strides.setdefault((strides, q.device), object()))
    return found


class CacheDefaults(NamedTuple):
    """What a call over a K/V cache takes from its tensors where its arguments do not say otherwise."""

    max_seqlen_q: int
    max_seqlen_k: int
    max_seqlen_new: int
    softmax_scale: float


class CacheLayout:
    """Like :class:`Layout`, for all tensors of a call over a K/V cache, and which start at multiples of 16 bytes."""

    __slots__ = ("launch", "defaults")

    def __init__(self, launch: object) -> None:
        #: An object that all layouts share which differ in nothing but numbers of sequences, queries and new tokens.
        self.launch = launch
        #: Set when validation has found all of it right.
        self.defaults: CacheDefaults | None = None


class AttentionInputs(NamedTuple):
    """Tensors of one call.

    Dense: ``q`` (batch, seqlen_q, nheads, headdim), ``k`` (batch, seqlen_k, nheads_k, headdim),
    ``v`` (batch, seqlen_k, nheads_k, headdim_v).  Varlen: ``q`` (total_q, nheads, headdim), ``k``
    and ``v`` likewise with total_k.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,) int32, varlen only
    cu_seqlens_k: torch.Tensor | None = None  # (batch + 1,) int32, varlen only
    alibi_slopes: torch.Tensor | None = None  # (nheads,) or (batch, nheads) float32
    rng_state: torch.Tensor | None = None  # (2,) int64: Philox seed and offset, dropout only
    sinks: torch.Tensor | None = None  # (nheads,) float32: logits that take part in the softmax's denominator
    layout: Layout | None = None  # of q, k and v, where the caller has looked

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All but the layout."""
        return self[:-1]


class CacheInputs(NamedTuple):
    """Tensors of one call over a K/V cache; those that are not given are None.

    ``q`` is (batch, seqlen_q, nheads, headdim), or with ``cu_seqlens_q`` (total_q, nheads, headdim).
    ``k`` and ``v`` are a cache (entries, capacity, nheads_k, headdim), or pages (num_pages, page_size, nheads_k,
    headdim), or with ``cu_seqlens_k`` and no pages packed sequences (total_k, nheads_k, headdim); v has headdim_v.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_new: torch.Tensor | None = None  # (batch, seqlen_new, nheads_k, headdim) or (total_new, ...)
    v_new: torch.Tensor | None = None  # likewise, with headdim_v
    qv: torch.Tensor | None = None  # like q, with headdim_v: scores are q @ k^T + qv @ v^T
    rotary_cos: torch.Tensor | None = None  # (max_position, rotary_dim / 2)
    rotary_sin: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None  # (batch + 1,) int32, as all that follow up to block_table
    cu_seqlens_k: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    seqused_q: torch.Tensor | None = None  # (batch,)
    seqused_k: torch.Tensor | None = None  # (batch,) lengths before the append, left padding included
    rotary_seqlens: torch.Tensor | None = None  # (batch,) position of the first new token; default seqused_k
    cache_batch_idx: torch.Tensor | None = None  # (batch,) cache entry of each sequence
    leftpad_k: torch.Tensor | None = None  # (batch,) where each sequence starts in its cache entry
    block_table: torch.Tensor | None = None  # (batch, max_pages)
    alibi_slopes: torch.Tensor | None = None  # (nheads,) or (batch, nheads) float32
    sinks: torch.Tensor | None = None  # (nheads,) float32
    layout: CacheLayout | None = None  # of all of them, where the caller has looked
    addresses: tuple[Any, ...] | None = None  # of all of them in this order, ints or None, where there is a layout

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All but the layout and the addresses."""
        return self[:-2]

    def with_layout(self) -> CacheInputs:
        """These tensors, all plain or None, their layout and addresses."""
        if self.layout is not None:
            return self
        tensors = self[:-2]
        # One loop, which takes most of the host time that a call of a cache takes before its launch.
        facts: list[Any] = []
        addresses: list[int | None] = []
        combined = 0
        for x in tensors:
            if x is None:
                facts.append(None)
                addresses.append(None)
            else:
                facts.append((x.shape, x.stride(), x.dtype, x.device))
                address = x.data_ptr()
                combined |= address
                addresses.append(address)
        # None, as nearly always: all of them start at multiples of 16 bytes.
        facts.append(tuple([bool(address and address & 15) for address in addresses]) if combined & 15 else None)
        key = tuple(facts)
        layout = _cache_layouts.get(key) or _new_cache_layout(self, key)
        return tuple.__new__(CacheInputs, (*tensors, layout, tuple(addresses)))

    @property
    def requires_grad(self) -> bool:
        """Whether any of them does."""
        for x in self[:-2]:  # noqa: SIM110 - any() takes three times as long
            if x is not None and x.requires_grad:
                return True
        return False

    @property
    def capacity(self) -> int:
        """Keys that a sequence may have."""
        if self.block_table is not None:
            return self.block_table.shape[1] * self.k.shape[1]
        return self.k.shape[0] if self.is_packed else self.k.shape[1]

    @property
    def is_packed(self) -> bool:
        """Whether k and v are packed sequences."""
        return self.cu_seqlens_k is not None and self.block_table is None


_cache_layouts: dict[tuple[Any, ...], CacheLayout] = {}
_launches: dict[tuple[Any, ...], object] = {}


def _new_cache_layout(inputs: CacheInputs, key: tuple[Any, ...]) -> CacheLayout:
    """The shared layout of calls whose tensors have these shapes, strides, dtypes and devices (all concrete).

    Args:
        key: those of each tensor or None, and last which are misaligned.
    """
    if len(_cache_layouts) >= _LAYOUTS_MAX:
        _cache_layouts.clear()
        _launches.clear()
    rest = (*(None if fact is None else fact[1:] for fact in key[:-1]), key[-1])
    table, cos = inputs.block_table, inputs.rotary_cos
    # Slices, because nothing has been checked yet.
    lengths = (inputs.k.shape[:2], table is None or table.shape[1:], cos is None or cos.shape[:1])
    found = _cache_layouts[key] = CacheLayout(_launches.setdefault((rest, lengths), object()))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionProblem:
    """Everything that selection and launch may depend on, and no tensor.

    ``window_left``/``window_right`` are -1 when unlimited; ``causal`` is folded into
    ``window_right = 0``.  Query ``i`` sees key ``j`` when
    ``i + shift - window_left <= j <= i + shift + window_right`` with ``shift = seqlen_k - seqlen_q``
    of that sequence (masks are aligned to the bottom right corner).
    """

    dtype: torch.dtype
    device_type: str
    batch: int
    seqlen_q: int  # varlen: the longest
    seqlen_k: int  # varlen: the longest
    nheads: int
    nheads_k: int
    headdim: int  # of q and k
    headdim_v: int  # of v and the output
    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    varlen: bool = False
    alibi: bool = False
    sinks: bool = False
    deterministic: bool = False
    needs_grad: bool = False
    # Calls over a K/V cache, which have no backward.
    cached: bool = False
    page_size: int = 0  # 0: K and V are not paged
    seqlen_new: int = 0  # tokens to append; varlen: the most that one sequence gets
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    cache_batch_idx: bool = False
    leftpad: bool = False
    qv: bool = False
    attention_chunk: int = 0  # query and key see each other inside blocks of so many positions; 0: anywhere
    num_splits: int = 0  # parts that keys are divided into, 0: the back end's choice
    # Problems key every cache on the way to a kernel; the hash of so many fields is worth keeping.
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = (getattr(self, field.name) for field in dataclasses.fields(self) if field.compare)
        object.__setattr__(self, "_hash", hash(tuple(values)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (1 for MHA)."""
        return self.nheads // self.nheads_k

    @property
    def causal(self) -> bool:
        """Whether the mask is the plain causal one."""
        return self.window_right == 0 and self.window_left < 0

    def features(self) -> frozenset[str]:
        """Names of the optional features this call uses; back ends declare the ones they have."""
        used = {
            "varlen": self.varlen,
            "causal": self.causal,
            "window": not self.causal and (self.window_left >= 0 or self.window_right >= 0),
            "gqa": self.nheads != self.nheads_k,
            "headdim_v": self.headdim != self.headdim_v,
            "softcap": self.softcap > 0.0,
            "dropout": self.dropout_p > 0.0,
            "alibi": self.alibi,
            "sinks": self.sinks,
            "paged": self.page_size > 0,
            "deterministic": self.deterministic,
            "backward": self.needs_grad,
            "kvcache": self.cached,
            "append": self.seqlen_new > 0,
            "rotary": self.rotary_dim > 0,
            "cache_batch_idx": self.cache_batch_idx,
            "leftpad": self.leftpad,
            "qv": self.qv,
            "attention_chunk": self.attention_chunk > 0,
        }
        return frozenset(name for name, is_used in used.items() if is_used)

    def describe(self) -> str:
        """One line for messages and ``explain``."""
        dims = f"{self.headdim}" if self.headdim == self.headdim_v else f"{self.headdim}/{self.headdim_v}"
        return (
            f"{str(self.dtype).removeprefix('torch.')} on {self.device_type}, batch={self.batch}, "
            f"seqlen_q={self.seqlen_q}, seqlen_k={self.seqlen_k}, nheads={self.nheads}, "
            f"nheads_k={self.nheads_k}, headdim={dims}, features: {', '.join(sorted(self.features())) or 'none'}"
        )

    def options(self) -> str:
        """As ``flash-rocm explain`` takes it, without the dashes, as far as that can say it."""
        shape = [self.batch, self.seqlen_q, self.seqlen_k, self.nheads, self.nheads_k, self.headdim]
        shape += [self.headdim_v] if self.headdim_v != self.headdim else []
        values = {
            "shape": ",".join(map(str, shape)),
            "dtype": DTYPE_NAMES.get(self.dtype),
            "window": None if self.causal else f"{self.window_left},{self.window_right}",
            "dropout": self.dropout_p or None,
            "softcap": self.softcap or None,
            "page-size": self.page_size or None,
        }
        if values["window"] == "-1,-1":
            values["window"] = None
        flags = {
            "causal": self.causal,
            "alibi": self.alibi,
            "sink": self.sinks,
            "varlen": self.varlen,
            "deterministic": self.deterministic,
            "backward": self.needs_grad,
            "kvcache": self.cached,
        }
        words = [f"{name}={value}" for name, value in values.items() if value is not None]
        return " ".join([*words, *(name for name, is_set in flags.items() if is_set)])


#: Those of calls over a K/V cache alone.
CACHE_FEATURES = frozenset(
    {"kvcache", "paged", "append", "rotary", "cache_batch_idx", "leftpad", "qv", "attention_chunk"}
)
#: Every feature name :meth:`AttentionProblem.features` can return.
FEATURES = frozenset(
    {
        *("varlen", "causal", "window", "gqa", "headdim_v", "softcap", "dropout", "alibi", "sinks"),
        *("deterministic", "backward"),
        *CACHE_FEATURES,
    }
)


def is_plain(x: torch.Tensor) -> bool:
    """Not of a subclass, which may have symbolic shapes or its own idea of every operator."""
    return type(x) is torch.Tensor or type(x) is torch.nn.Parameter


_PLAIN_OR_ABSENT = {torch.Tensor, torch.nn.Parameter, type(None)}


def are_plain(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """:func:`is_plain` of all that there are, in the least time."""
    return _PLAIN_OR_ABSENT.issuperset(map(type, tensors))


def dropout_threshold(dropout_p: float) -> int:
    """31-bit threshold: an element is kept when ``philox >> 1 >= threshold``.

    One integer comparison, so that every back end drops exactly the same elements.
    """
    return min(int(round(dropout_p * 2.0**31)), 2**31 - 1)


def default_softmax_scale(headdim: int) -> float:
    """1 / sqrt(headdim), the default of every function."""
    return headdim**-0.5


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of softmax_lse and of intermediate results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_shape(q: torch.Tensor) -> tuple[int, ...]:
    """Shape of softmax_lse: (batch, nheads, seqlen_q) dense, (nheads, total_q) varlen."""
    if q.dim() == 4:
        return (q.shape[0], q.shape[2], q.shape[1])
    return (q.shape[1], q.shape[0])
