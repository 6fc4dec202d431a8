"""What the modules of back ends provide: attention, layers, and what the Triton back end can do besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from flash_rocm.arch import Arch
from flash_rocm.config_schema import KernelConfig, Provenance
from flash_rocm.layer_calls import NormBackward, NormCall, NormForward, NormGradients
from flash_rocm.problem import AttentionInputs, AttentionProblem, CacheInputs
from flash_rocm.runtime import ConfigSource
from flash_rocm.tuned import Outcome, TuneKey


class Backend(Protocol):
    """What a back end module provides.  Shapes as in :class:`AttentionInputs`."""

    def forward(self, problem: AttentionProblem, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out (q's shape with headdim_v, contiguous) and softmax_lse."""

    def backward(
        self,
        problem: AttentionProblem,
        inputs: AttentionInputs,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return dq, dk, dv, and dsinks ((nheads,) float32) where there are sinks."""

    def probs(self, problem: AttentionProblem, inputs: AttentionInputs, softmax_lse: torch.Tensor) -> torch.Tensor:
        """Return S_dmask (batch, nheads, seqlen_q, seqlen_k): negative where dropout dropped."""

    def attend(self, problem: AttentionProblem, inputs: CacheInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and softmax_lse over a K/V cache, which holds what is to be appended already."""

    def append(self, problem: AttentionProblem, inputs: CacheInputs) -> None:
        """Write k_new, turned by the rotary embedding, and v_new into the caches."""

    def combine(
        self, problem: AttentionProblem, out_partial: torch.Tensor, lse_partial: torch.Tensor, out_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return out and lse of results over disjoint sets of keys; splits come first in the parts' shapes."""

    def splits_of(self, problem: AttentionProblem, device: torch.device) -> int:
        """Return into how many parts the keys of a call over a K/V cache are divided."""


class LayerBackend(Protocol):
    """The layers beside attention that a back end provides; its module is ``layers``.

    Tensors come checked.  Rows are (rows, columns), statistics (rows,) in the dtype of accumulation.
    """

    def rotary(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        seqlen_offsets: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        offset: int,
        max_seqlen: int,
        interleaved: bool,
        conjugate: bool,
    ) -> None:
        """Write the first dims of x, turned, to out, which may be x; rows of no sequence and other dims stay."""

    def norm_forward(self, inputs: NormForward, call: NormCall) -> tuple[torch.Tensor | None, ...]:
        """Return out, out1, the sum, mean, rstd and the dropout masks of x and x1."""

    def norm_backward(
        self, inputs: NormBackward, wanted: NormGradients, call: NormCall
    ) -> tuple[torch.Tensor | None, ...]:
        """Return dx, dx1, dresidual, dweight, dbias, dweight1 and dbias1."""

    def cross_entropy_forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        given_lse: torch.Tensor | None,
        smoothing: float,
        logit_scale: float,
        lse_square_scale: float,
        ignore_index: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, lse and z_loss."""

    def cross_entropy_backward(
        self,
        out: torch.Tensor,
        dloss: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        lse: torch.Tensor,
        smoothing: float,
        logit_scale: float,
        lse_square_scale: float,
        ignore_index: int,
    ) -> None:
        """Write dlogits to out, which may be logits."""


class OfflineCompiler(Protocol):
    """How the Triton back end compiles for chips that are not here."""

    def listing(
        self, kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource | None
    ) -> tuple[str, int]:
        """Return the text that ``inspect`` reads, and bytes of LDS."""


class Tuner(Protocol):
    """How the Triton back end tunes."""

    def tune(
        self,
        key: TuneKey,
        device: torch.device,
        source: ConfigSource | None,
        budget: float,
        say: Callable[[str], None],
    ) -> Outcome:
        """Return the fastest options for a key on the GPU that is here.

        Raise TuningError if nothing could be measured.
        """

    def search(
        self,
        key: TuneKey,
        arch: Arch,
        source: ConfigSource | None,
        budget: float,
        say: Callable[[str], None],
        clock: Callable[[str, AttentionProblem, Sequence[ConfigSource], float], list[float | None]],
        found_by: Provenance,
    ) -> Outcome:
        """Return the options that ``clock`` finds to be the fastest; raise TuningError as ``tune`` does."""

    def execute(self, kernel: str, problem: AttentionProblem, source: ConfigSource) -> None:
        """Launch a kernel once on the virtual GPU in use."""


class Planner(Protocol):
    """What the Triton back end knows of a kernel without compiling it, and without Triton."""

    def kernel_config(
        self, kernel: str, problem: AttentionProblem, arch: Arch, source: ConfigSource | None, plain: bool = False
    ) -> KernelConfig:
        """Return the config entry the kernel takes."""

    def is_built_plain(self, kernel: str, problem: AttentionProblem) -> bool:
        """Return whether a kernel that is compiled without tensors is for plain ones, see ``Facts`` of the configs."""

    def kernels_of(self, problem: AttentionProblem) -> tuple[str, ...]:
        """Return the names of the kernels that a call launches and that have configs."""

    def tune_key(self, kernel: str, problem: AttentionProblem, arch: Arch) -> TuneKey:
        """Return where a tuned entry for a kernel of this problem is kept."""

    def block_d(self, headdim: int) -> int:
        """Return the size a head dim is padded to inside a kernel."""

    def describe_configs(self, problem: AttentionProblem, arch: Arch) -> list[str]:
        """Return one line per kernel for ``explain``."""
