"""Attention of Hugging Face Transformers models (v5), run by flash_rocm.

:func:`register` makes ``attn_implementation="flash_rocm"`` known::

    from flash_rocm.integrations import transformers as integration
    integration.register()
    model = AutoModel.from_pretrained(path, attn_implementation="flash_rocm")

A batch with a padding mask is computed as packed sequences, so padding costs attention nothing.  What the mask says is
worked out once per batch, not once per layer (:mod:`flash_rocm.integrations.masks`).
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch

from flash_rocm import backends, cache_ops, runtime, v3, virtual_device
from flash_rocm.api import flash_attn_func, flash_attn_varlen_func
from flash_rocm.attend import autocast, needs_grad
from flash_rocm.integrations.masks import Mask, Packing, mask_of, mask_of_padding, packing_of_positions
from flash_rocm.problem import FEATURES, CacheInputs, default_softmax_scale

NAME = "flash_rocm"
#: Of older versions of Transformers, for continuous batching; newer ones ask for :data:`NAME` itself.
PAGED_NAME = f"paged|{NAME}"
#: The first version of Transformers with the interfaces that are used here, and the last one that was tried.
VERSIONS = ("5.0", "5.24")

#: Arguments of attention functions that change the result, and what models call them for.
_REFUSED = {
    "position_bias": "a bias that is added to the scores (T5, Moonshine)",
    "attention_bias": "a bias that is added to the scores",
    "attn_bias": "a bias that is added to the scores",
    "relative_position_bias": "a bias that is added to the scores",
    "score_mod": "a function of the scores (FlexAttention)",
    "block_mask": "the masks of FlexAttention",
    "alibi": "a bias that is added to the scores",
    "head_mask": "head masks",
    "layer_head_mask": "head masks",
    "output_attentions": "attention weights, which are never made",
    "indices": "sparse attention (DeepSeek-V3.2)",
    "block_indices": "block-sparse attention",
    "sinks": "sinks of another kind than gpt-oss's s_aux",
    "block_table": "Transformers' block tables",
}


def register() -> str:
    """Register the attention function and its mask function; returns :data:`NAME`.  A second call changes nothing.

    Raises:
        ImportError: Transformers is not installed, or is a version without these interfaces.
    """
    try:
        import transformers
        from packaging.version import Version  # which Transformers depends on
    except ImportError as error:
        raise ImportError(
            f"transformers: expected {_expected()}, got none ({error}). Hint: pip install 'flash_rocm[transformers]'."
        ) from error
    if Version(transformers.__version__) < Version(VERSIONS[0]):
        raise _wrong_version(transformers.__version__, "is too old")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

        for name in ("and_masks", "causal_mask_function", "packed_sequence_mask_function", "sliding_window_overlay"):
            getattr(masking_utils, name)
        check = PreTrainedModel._check_and_adjust_attn_implementation
    except (ImportError, AttributeError) as error:
        raise _wrong_version(transformers.__version__, f"differs ({error})") from error
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(PAGED_NAME, attention)
    AttentionMaskInterface.register(NAME, mask_of)
    if not getattr(check, "knows_flash_rocm", False):
        PreTrainedModel._check_and_adjust_attn_implementation = _knowing_flash_rocm(check)  # type: ignore[method-assign]
    return NAME


def _expected() -> str:
    return f"Transformers {VERSIONS[0]} or newer (tried up to {VERSIONS[1]})"


def _wrong_version(version: str, reason: str) -> ImportError:
    return ImportError(
        f"transformers: expected {_expected()}, got {version}, which {reason}. "
        f"Hint: pip install 'transformers>={VERSIONS[0]},<={VERSIONS[1]}'."
    )


def _knowing_flash_rocm(check: Any) -> Any:
    """Transformers' check of a name, which takes each name with "flash" in it for kernels that it should download."""

    @functools.wraps(check)
    def checked(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (NAME, PAGED_NAME):
            return cast(str, check(self, attn_implementation, *args, **kwargs))
        if not type(self)._can_set_attn_implementation():
            raise NotImplementedError(
                f"attn_implementation: expected a model whose attention goes through AttentionInterface for {NAME!r}, "
                f"got {_of(self)}. "
                "Hint: use attn_implementation='sdpa' or 'eager' for this model."
            )
        return attn_implementation

    checked.knows_flash_rocm = True  # type: ignore[attr-defined]
    return checked


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key: (batch, nheads_k, seqlen_k, headdim).
        value: (batch, nheads_k, seqlen_k, headdim_v).
        attention_mask: what :func:`flash_rocm.integrations.masks.mask_of` returned, or (batch, seqlen_k), True for
            tokens.
        scaling: of the scores; default 1 / sqrt(headdim).
        softcap: scores become softcap * tanh(scores / softcap); None and 0: they stay.
        is_causal: without attention_mask, whether attention is causal; default: what the module says.
        sliding_window: a causal token sees itself and so many less one before it; one that sees both sides, so many
            less one on each.
        s_aux: (nheads,), attention sinks: ``learnable_sink`` of :mod:`flash_rocm.v3`.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``, or without
            attention_mask ``position_ids`` that start again, describe sequences packed by the caller into one row, as
            for all of Transformers' functions with "flash" in their names; ``cache`` is that of continuous batching;
            ``deterministic``: of the gradients, as ``torch.use_deterministic_algorithms`` asks for too.

    Returns:
        (batch, seqlen_q, nheads, headdim_v), rows of padding 0; and None for the weights.

    Raises:
        NotImplementedError: an argument that would change the result and is not implemented.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else bool(is_causal)
    window = _window_size(None, sliding_window, causal)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        found = mask_of_padding(attention_mask, query.shape[2], key.shape[2], causal, bool(sliding_window))
        attention_mask = found._replace(window=window)
    _refuse(module, attention_mask, scaling, kwargs)
    if kwargs.get("cache") is not None and "write_index" in kwargs:
        key, value = _updated(module, key, value, kwargs)
    mask = cast("Mask | None", attention_mask)
    if mask is not None:
        causal = mask.causal
        window = _window_size(mask, sliding_window, causal)
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": causal, "softcap": softcap or 0.0}
    options["window_size"] = window
    options["deterministic"] = bool(kwargs.get("deterministic")) or torch.are_deterministic_algorithms_enabled()
    if s_aux is None:
        options["dropout_p"] = dropout
    elif dropout:
        raise NotImplementedError(
            f"dropout: expected 0 with attention sinks (s_aux), got {dropout}. Hint: config.attention_dropout=0."
        )
    else:
        options["learnable_sink"] = s_aux
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    packing = _packing_of(mask, q, k, kwargs)
    used = None if mask is None else mask.seqlen_k
    used_k, used_v = (k, v) if used is None else (k[:, :used], v[:, :used])
    if packing is None or packing.leftpad_k is not None:
        step = _step(q, used_k, used_v, None if packing is None else packing.leftpad_k, options)
        if step is not None:
            return step, None
    if packing is not None:
        return _packed_attention(q, k, v, packing, options), None
    function = flash_attn_func if s_aux is None else v3.flash_attn_func
    return cast(torch.Tensor, function(q, used_k, used_v, **options)), None


def _step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, leftpad: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor | None:
    """A step of generation by the kernels for K/V caches, which divide the keys and skip left padding.

    None: it is no step, or the back end in use has no such kernel for it, as Composable Kernel for head dim 96.
    """
    sinks = options.get("learnable_sink")
    if q.shape[1] != 1 or options.get("dropout_p") or needs_grad(q, k, v, sinks):
        return None
    q, k, v = autocast(q, k, v)
    if not _runs_over_cache(CacheInputs(q, k, v, leftpad_k=leftpad, sinks=sinks), options):
        return None
    options = {name: value for name, value in options.items() if name not in ("dropout_p", "deterministic")}
    used = k.shape[1] if leftpad is not None else None
    return cast(torch.Tensor, v3.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, cache_leftpad=leftpad, **options))


def _runs_over_cache(inputs: CacheInputs, options: dict[str, Any]) -> bool:
    """Whether selection finds a back end for a step over a K/V cache."""
    requested = runtime.requested_backend()
    if torch.compiler.is_compiling():  # shapes may be symbols: only of back ends that take all of them is it known
        return requested == "auto" or backends.CAPABILITIES[requested].features == FEATURES
    q, scale, (left, right) = inputs.q, options["softmax_scale"], options["window_size"]
    scale = default_softmax_scale(q.shape[-1]) if scale is None else scale
    right = 0 if options["causal"] else right
    problem = cache_ops.problem_of(
        inputs, (1, inputs.capacity, 0, scale, left, right, options["softcap"], 0, True, 0, "")
    )
    return backends.choice(problem, virtual_device.arch_of(q.device), requested) is not None


def _refuse(module: Any, attention_mask: Any, scaling: float | None, kwargs: dict[str, Any]) -> None:
    """Raise for what would change the result and is not implemented."""
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(
                f"{name}: not supported by attn_implementation={NAME!r}: {what}, in {_of(module)}. "
                "Hint: use attn_implementation='sdpa' or 'eager'."
            )
    if not (attention_mask is None or isinstance(attention_mask, Mask)):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise NotImplementedError(
            f"attention_mask: expected padding of shape (batch, seqlen), got {type(attention_mask).__name__} of shape "
            f"{shape} in {_of(module)}: masks for each query and key and additive masks are not supported. "
            "Hint: use attn_implementation='sdpa' or 'eager'."
        )
    # GPT-2 of the first versions does these two in its eager function only.
    layerwise = getattr(module, "scale_attn_by_inverse_layer_idx", False)
    if scaling is None and (layerwise or not getattr(module, "scale_attn_weights", True)):
        raise NotImplementedError(
            "scale_attn_by_inverse_layer_idx, scale_attn_weights: expected False and True, as the scale does not come "
            f"through AttentionInterface, in {_of(module)}. Hint: use attn_implementation='eager'."
        )


def _of(module: Any) -> str:
    """The layer and the version of Transformers, for errors."""
    import transformers

    return f"{type(module).__name__} of Transformers {transformers.__version__}"


def _window_size(mask: Mask | None, sliding_window: int | None, causal: bool) -> tuple[int, int]:
    """flash-attn's window of what the layer and its mask ask for."""
    if mask is None:
        left = (sliding_window or 0) - 1
        return (left, 0 if causal and left >= 0 else left)
    left = mask.window[0]
    # Models count their layer's window with the token itself; some of those that see both sides do not.
    fitting = (None, 0) if left < 0 else (left + 1,) if causal else (left, left + 1)
    if sliding_window not in fitting:
        raise NotImplementedError(
            f"sliding_window: expected {fitting[-1] or None}, that of the mask, got {sliding_window}. "
            "Hint: use attn_implementation='sdpa' or 'eager' for this model."
        )
    return mask.window


def _packing_of(mask: Mask | None, q: torch.Tensor, k: torch.Tensor, kwargs: dict[str, Any]) -> Packing | None:
    """The packing that the mask or the caller describes; q and k are (batch, seqlen, nheads, headdim)."""
    given = kwargs.get("cu_seq_lens_q")
    if given is None:
        packing = None if mask is None else mask.packing
        positions, seqlen = kwargs.get("position_ids"), k.shape[1]
        is_open = mask is None or mask == Mask(True, mask.window)  # may hold more sequences than one
        if is_open and positions is not None and len(q) == 1 and q.shape[1] == seqlen > 1:
            packing = packing_of_positions(positions, seqlen)
        for expected, x in ((packing.seqlen_q, q), (packing.seqlen_k, k)) if packing is not None else ():
            if expected not in (None, x.shape[1]):
                raise ValueError(
                    f"attention_mask: expected one for {x.shape[1]} positions, got one for {expected}. "
                    "Hint: it has a column for each key, those in the cache included."
                )
        return packing
    if mask is not None and (
        mask.seqlen_k is not None or (mask.packing is not None and mask.packing.rows_k is not None)
    ):
        raise NotImplementedError(
            "cu_seq_lens_q: expected None with padding or a cache of fixed length, got both. "
            "Hint: pass no attention_mask with packed sequences."
        )
    lengths = [kwargs.get(f"max_length_{x}", kwargs.get(f"max_seqlen_{x}")) for x in "qk"]
    cu_seqlens_k = kwargs.get("cu_seq_lens_k")
    if cu_seqlens_k is None or None in lengths:
        raise ValueError("cu_seq_lens_q: expected cu_seq_lens_k, max_length_q and max_length_k with it, got None.")
    given = (given.int(), cu_seqlens_k.int(), int(lengths[0]), int(lengths[1]))  # type: ignore[arg-type]
    return Packing(None, None, None, None, *given)


def _packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: dict[str, Any]
) -> torch.Tensor:
    """Attention of packed sequences within (batch, seqlen, nheads, headdim); other rows are 0."""
    batch, seqlen_q = q.shape[:2]
    cu_seqlens_q, max_seqlen_q = packing.cu_seqlens_q, packing.max_seqlen_q
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen_q
        max_seqlen_q = seqlen_q
    rows_q = packing.rows_q
    q, k, v = (
        x.flatten(0, 1) if rows is None else x.flatten(0, 1).index_select(0, rows)
        for x, rows in ((q, rows_q), (k, packing.rows_k), (v, packing.rows_k))
    )
    lengths = (cu_seqlens_q, packing.cu_seqlens_k, max_seqlen_q, packing.max_seqlen_k)
    out = _varlen(q, k, v, *lengths, **options)
    if rows_q is not None:
        out = out.new_zeros((batch * seqlen_q, *out.shape[1:])).index_copy(0, rows_q, out)
    return out.unflatten(0, (batch, seqlen_q))


def _varlen(*args: Any, **options: Any) -> torch.Tensor:
    function = v3.flash_attn_varlen_func if "learnable_sink" in options else flash_attn_varlen_func
    return cast(torch.Tensor, function(*args, **options))


def _updated(
    module: Any, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values, (1, nheads_k, total_k, headdim), of older versions' continuous batching.

    There the attention function writes new keys to the cache, and finds lengths by type of layer in kwargs, which are
    changed to those of this layer.
    """
    key, value = kwargs["cache"].update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    layer_type = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    for name in ("cu_seq_lens_k", "max_seqlen_k"):
        if isinstance(kwargs[name], dict):
            kwargs[name] = kwargs[name][layer_type]
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]
