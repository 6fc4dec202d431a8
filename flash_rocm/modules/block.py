"""One layer of a transformer: mixer, perceptron, and the residual stream around them.

Names, arguments and parameters are those of flash-attn's ``flash_attn.modules.block``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from flash_rocm import validation
from flash_rocm.layers.norm import RMSNorm, layer_norm_fn
from flash_rocm.modules.mha import MHA
from flash_rocm.modules.mlp import Mlp
from flash_rocm.modules.refused import Refused


class StochasticDepth(torch.nn.Module):
    """Drops whole rows of a batch with probability p while training (Huang et al. 2016, arXiv:1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise validation.invalid("p", "a probability in [0, 1]", p)
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, ...), kept rows scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0.0:
            return x
        keep = torch.empty((x.shape[0], *(1,) * (x.dim() - 1)), dtype=x.dtype, device=x.device).bernoulli_(1.0 - self.p)
        return x * (keep / (1.0 - self.p) if self.p < 1.0 else keep)


class Block(torch.nn.Module):
    """dropout, add, norm, mixer, dropout, add, norm, perceptron; or with prenorm=False mixer first, norm last.

    Args:
        dim: columns.
        mixer_cls, mlp_cls, norm_cls, dropout_cls: called with dim (dropout_cls with its probability) for the parts;
            default an :class:`MHA` of dim / 64 heads and an :class:`Mlp` of 4 * dim hidden features.  A perceptron
            that is ``torch.nn.Identity`` is left out with its norm.
        resid_dropout1, resid_dropout2: dropout of what is added to the residual stream.
        drop_path1, drop_path2: the same for whole rows of the batch.
        fused_dropout_add_ln: do dropout, add and norm in one kernel.
        return_residual: with prenorm=False, mixer and perceptron return what the stream goes on from.
        residual_in_fp32: keep the stream in float32; with prenorm.
        sequence_parallel, mark_shared_params: mark the parameters of the norms as ``_sequence_parallel`` and
            ``_shared_params``.

    Raises:
        ValueError: arguments that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], torch.nn.Module] | None = None,
        mlp_cls: Callable[[int], torch.nn.Module] | None = None,
        norm_cls: Callable[[int], torch.nn.Module] = torch.nn.LayerNorm,
        dropout_cls: Callable[[float], torch.nn.Module] = torch.nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        if residual_in_fp32 and not prenorm:
            raise validation.invalid("residual_in_fp32", "False without prenorm", residual_in_fp32)
        if return_residual and prenorm:
            raise validation.invalid("return_residual", "False with prenorm", return_residual)
        self.prenorm, self.fused_dropout_add_ln = prenorm, fused_dropout_add_ln
        self.return_residual, self.residual_in_fp32 = return_residual, residual_in_fp32
        mixer_cls = functools.partial(MHA, num_heads=max(dim // 64, 1)) if mixer_cls is None else mixer_cls
        mlp_cls = functools.partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls
        self.mixer = mixer_cls(dim)
        self.dropout1, self.drop_path1, self.norm1 = (
            dropout_cls(resid_dropout1),
            StochasticDepth(drop_path1),
            norm_cls(dim),
        )
        self.mlp = mlp_cls(dim)
        if not isinstance(self.mlp, torch.nn.Identity):
            self.dropout2, self.drop_path2 = dropout_cls(resid_dropout2), StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)
        norms = [self.norm1, *([self.norm2] if hasattr(self, "norm2") else [])]
        if fused_dropout_add_ln and not all(isinstance(norm, (torch.nn.LayerNorm, RMSNorm)) for norm in norms):
            got = type(self.norm1).__name__
            raise validation.invalid("norm_cls", "torch.nn.LayerNorm or RMSNorm with fused_dropout_add_ln", got)
        for mark, wanted in (("_sequence_parallel", sequence_parallel), ("_shared_params", mark_shared_params)):
            for parameter in (p for norm in norms for p in norm.parameters() if wanted):
                setattr(parameter, mark, True)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kw: Any
    ) -> Any:
        """The cache of the mixer."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kw)  # type: ignore[operator]

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """One layer.

        Args:
            hidden_states: (batch, seqlen, dim) or (total, dim).
            residual: with prenorm, the stream; None in the first layer.
            mixer_subset: tokens that go on from here (hidden_states[:, mixer_subset]); the mixer must know it.
            mixer_kwargs: more arguments of the mixer.

        Returns:
            with prenorm hidden_states and residual, else hidden_states.
        """
        kwargs = dict(mixer_kwargs or {})
        if mixer_subset is not None:
            kwargs["mixer_subset"] = mixer_subset
        has_mlp = not isinstance(self.mlp, torch.nn.Identity)
        if self.prenorm:
            hidden_states, residual = self._added(hidden_states, residual, 1)
            hidden_states = self.mixer(hidden_states, **kwargs)
            if mixer_subset is not None:
                residual = residual[:, mixer_subset]
            if has_mlp:
                hidden_states, residual = self._added(hidden_states, residual, 2)
                hidden_states = self.mlp(hidden_states)
            return hidden_states, residual
        if residual is not None:
            raise validation.invalid("residual", "None without prenorm", "a tensor")
        mixed = self.mixer(hidden_states, **kwargs)
        if self.return_residual:
            mixed, hidden_states = mixed
        if mixer_subset is not None:
            hidden_states = hidden_states[:, mixer_subset]
        hidden_states, _ = self._added(mixed, hidden_states, 1)
        if has_mlp:
            mapped = self.mlp(hidden_states)
            if self.return_residual:
                mapped, hidden_states = mapped
            hidden_states, _ = self._added(mapped, hidden_states, 2)
        return hidden_states

    def _added(self, x: torch.Tensor, residual: torch.Tensor | None, which: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of drop_path(dropout(x)) + residual, and the sum itself."""
        dropout, drop_path, norm = (getattr(self, f"{name}{which}") for name in ("dropout", "drop_path", "norm"))
        if not self.fused_dropout_add_ln:
            dropped = drop_path(dropout(x))
            total = dropped if residual is None else dropped + residual
            y = norm(total.to(norm.weight.dtype))
            return y, total.float() if self.residual_in_fp32 else total
        dropping = drop_path.training and drop_path.p > 0.0
        found = layer_norm_fn(
            x,
            norm.weight,
            norm.bias,
            residual,
            eps=norm.eps,
            dropout_p=dropout.p if dropout.training else 0.0,
            rowscale=drop_path(torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)) if dropping else None,
            prenorm=True,
            residual_in_fp32=self.residual_in_fp32,
            is_rms_norm=isinstance(norm, RMSNorm),
            zero_centered_weight=getattr(norm, "zero_centered_weight", False),
        )
        return cast("tuple[torch.Tensor, torch.Tensor]", found)


class ParallelBlock(Refused):
    """Mixer and perceptron side by side: not implemented."""

    reason = "mixer and perceptron side by side (GPT-J) are not implemented. Hint: Block has them one behind the other."
