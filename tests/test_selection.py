"""Which back end runs a call, and what is said about the others."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch

import flash_rocm
from flash_rocm import backends, runtime
from flash_rocm.arch import CPU, Arch, amd_arch, arch_named, nvidia_arch
from flash_rocm.problem import FEATURES, AttentionProblem

PLAIN = AttentionProblem(torch.float16, "cuda", 2, 128, 128, 4, 4, 64, 64, 0.125)
#: One change of PLAIN for each feature that a problem can have.
FEATURE_CHANGES: dict[str, dict[str, object]] = {
    "varlen": {"varlen": True},
    "causal": {"window_right": 0},
    "window": {"window_left": 16, "window_right": 16},
    "gqa": {"nheads_k": 2},
    "headdim_v": {"headdim_v": 32},
    "softcap": {"softcap": 30.0},
    "dropout": {"dropout_p": 0.1},
    "alibi": {"alibi": True},
    "kvcache": {"cached": True},
    "append": {"cached": True, "seqlen_new": 3},
    "rotary": {"cached": True, "rotary_dim": 16},
    "cache_batch_idx": {"cached": True, "cache_batch_idx": True},
    "leftpad": {"cached": True, "leftpad": True},
    "qv": {"cached": True, "qv": True},
    "attention_chunk": {"cached": True, "attention_chunk": 64},
    "sinks": {"sinks": True},
    "paged": {"varlen": True, "page_size": 16},
    "deterministic": {"deterministic": True},
    "backward": {"needs_grad": True},
}
GFX942 = amd_arch("gfx942", 304)
SM90 = nvidia_arch((9, 0), 132)


@pytest.fixture(autouse=True)
def _fresh_decisions() -> Iterator[None]:
    backends._decide.cache_clear()
    runtime.warn_once.cache_clear()
    yield
    backends._decide.cache_clear()
    runtime.warn_once.cache_clear()


def pretend_built(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Selection on a machine where exactly these are installed, and no interpreter runs."""

    def installation_reasons(name: str) -> list[str]:
        return [] if name in names else ["not built"]

    monkeypatch.setattr(backends, "_installation_reasons", installation_reasons)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_every_feature_has_a_problem() -> None:
    assert set(FEATURE_CHANGES) == set(FEATURES)
    for feature, change in FEATURE_CHANGES.items():
        assert feature in dataclasses.replace(PLAIN, **change).features()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arch", "built", "expected"),
    [
        (GFX942, ("ck", "triton"), "ck"),
        (GFX942, ("triton",), "triton"),
        (amd_arch("gfx90a", 104), ("ck", "triton"), "ck"),
        (amd_arch("gfx1100", 96), ("ck", "triton"), "triton"),  # CK has no RDNA kernels
        (SM90, ("ck", "triton"), "triton"),
        (CPU, ("ck", "triton"), "reference"),
        (CPU, (), "reference"),
    ],
)
def test_auto_order(monkeypatch: pytest.MonkeyPatch, arch: Arch, built: tuple[str, ...], expected: str) -> None:
    pretend_built(monkeypatch, *built)
    assert backends.select(PLAIN, arch, "auto") == expected


def test_auto_passes_over_what_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built(monkeypatch, "ck", "triton")
    beyond_ck = dataclasses.replace(PLAIN, dtype=torch.float32)
    assert backends.select(beyond_ck, GFX942, "auto") == "triton"


def test_auto_on_a_gpu_never_takes_the_reference_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built(monkeypatch)
    with pytest.raises(backends.BackendError, match="reference: could run it"):
        backends.select(PLAIN, GFX942, "auto")


@pytest.mark.parametrize("name", runtime.BACKEND_NAMES)
def test_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_built(monkeypatch, *(other for other in runtime.BACKEND_NAMES if other != name))
    impossible = dataclasses.replace(PLAIN, dtype=torch.complex64)
    with pytest.raises(backends.BackendError) as caught:
        backends.select(impossible, GFX942, name)
    assert f"requested {name}" in str(caught.value)
    assert f"  {name}: " in str(caught.value)


@pytest.mark.parametrize("name", ["ck", "triton"])
def test_explicit_choice_raises_where_another_could(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend_built(monkeypatch)
    with pytest.raises(backends.BackendError, match=f"{name}: not built"):
        backends.select(PLAIN, GFX942, name)
    with pytest.raises(backends.BackendError, match=name), flash_rocm.use_backend(name):
        flash_rocm.flash_attn_func(*torch.randn(3, 1, 4, 2, 8))


def test_all_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built(monkeypatch)
    problem = dataclasses.replace(
        PLAIN, dtype=torch.float64, headdim=640, headdim_v=640, cached=True, page_size=16, qv=True
    )
    reasons = "\n".join(backends.refusal_reasons("triton", problem, amd_arch("gfx906", 60)))
    for word in ("not built", "gfx906", "float64", "headdim 640 is over 576", "qv with headdim 640"):
        assert word in reasons


@pytest.mark.parametrize("name", backends.CAPABILITIES)
@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_features_are_refused_exactly_where_not_declared(
    monkeypatch: pytest.MonkeyPatch, name: str, feature: str
) -> None:
    pretend_built(monkeypatch, *runtime.BACKEND_NAMES)
    problem = dataclasses.replace(PLAIN, **FEATURE_CHANGES[feature])  # type: ignore[arg-type]
    declared = problem.features() <= backends.CAPABILITIES[name].features
    assert bool(backends.refusal_reasons(name, problem, GFX942)) != declared


def test_reasons_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    first = list(backends.refusal_reasons("triton", PLAIN, CPU))
    backends.refusal_reasons("triton", PLAIN, CPU)
    assert backends.refusal_reasons("triton", PLAIN, CPU) == first


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        (nvidia_arch((7, 5), 40), "GPU sm75 is older than sm80"),
        (amd_arch("gfx906", 60), "device gfx906 is not one of"),
        (amd_arch("gfx1030", 72), "device gfx1030 is not one of"),
    ],
)
def test_unsupported_gpu(monkeypatch: pytest.MonkeyPatch, arch: Arch, reason: str) -> None:
    pretend_built(monkeypatch, "ck", "triton")
    with pytest.raises(NotImplementedError, match=reason):
        backends.select(PLAIN, arch, "auto")
    assert backends.select(PLAIN, arch, "reference") == "reference"


def test_compute_capabilities_compare_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built(monkeypatch, "triton")
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert backends.select(PLAIN, nvidia_arch(capability, 100), "auto") == "triton"


# --------------------------------------------------------------------------------------------------
# Environment


def choice() -> str | None:
    q = torch.randn(1, 4, 2, 8)
    return flash_rocm.explain(q, q, q).requested


def test_environment_is_read_at_call_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice() == "auto"
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "reference")
    assert choice() == "reference"
    monkeypatch.setenv("FLASH_ROCM_BACKEND", " CK ")
    assert choice() == "ck"
    with pytest.raises(backends.BackendError, match="ck: "):
        flash_rocm.flash_attn_func(*torch.randn(3, 1, 4, 2, 8))
    monkeypatch.delenv("FLASH_ROCM_BACKEND")
    assert choice() == "auto"


def test_legacy_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    assert choice() == "triton"
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "true")  # anything but TRUE is unset
    assert choice() == "auto"


def test_our_variable_wins_over_the_legacy_one_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "reference")
    with pytest.warns(UserWarning, match="overrides FLASH_ATTENTION_TRITON_AMD_ENABLE"):
        assert choice() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice() == "reference"


def test_invalid_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"FLASH_ROCM_BACKEND: expected one of .*auto.*got 'cuda'"):
        flash_rocm.flash_attn_func(*torch.randn(3, 1, 4, 2, 8))


def test_use_backend_nests_and_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_BACKEND", "ck")
    with flash_rocm.use_backend("reference"):
        assert choice() == "reference"
        with flash_rocm.use_backend("triton"):
            assert choice() == "triton"
        assert choice() == "reference"
        with flash_rocm.use_backend("auto"):
            assert choice() == "auto"
    assert choice() == "ck"


def test_use_backend_is_undone_after_an_error() -> None:
    with pytest.raises(RuntimeError), flash_rocm.use_backend("triton"):
        raise RuntimeError
    assert choice() == "auto"
    with pytest.raises(ValueError, match="name: expected one of"), flash_rocm.use_backend("fastest"):
        pass


def test_backward_uses_the_back_end_of_the_forward() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with flash_rocm.use_backend("reference"):
        out = flash_rocm.flash_attn_func(q, q, q)
    with flash_rocm.use_backend("ck"):
        out.sum().backward()
    assert q.grad is not None and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("value", ["debug", "INFO", "warning"])
def test_log_level(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(runtime.logger, "level", runtime.logger.level)
    monkeypatch.setattr(runtime.logger, "handlers", [])
    monkeypatch.setenv("FLASH_ROCM_LOG", value)
    runtime.configure_logging()
    assert runtime.logger.level == getattr(__import__("logging"), value.upper())


def test_invalid_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ROCM_LOG", "loud")
    with pytest.raises(ValueError, match="FLASH_ROCM_LOG: expected debug, info or warning, got 'loud'"):
        runtime.configure_logging()


# --------------------------------------------------------------------------------------------------
# explain and archs


def test_explain_lists_every_back_ends_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that ``auto`` finds nothing for: float64 on a GPU."""
    pretend_built(monkeypatch)
    q = torch.randn(8, 2, 8, dtype=torch.float64, requires_grad=True)
    pages = torch.randn(4, 16, 2, 8, dtype=torch.float64)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    found = flash_rocm.explain(
        q,
        pages,
        pages,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        block_table=torch.zeros(2, 2, dtype=torch.int32),
        softcap=5.0,
        arch=GFX942,
    )
    assert found.backend is None
    text = str(found)
    assert "none can run it" in text
    for name, reasons in found.reasons.items():
        for reason in reasons:
            assert f"  {name}: no, {reason}" in text
    for name, word in (("ck", "not built"), ("triton", "float64")):
        assert word in " ".join(found.reasons[name])
    assert "  reference: yes" in text and not found.reasons["reference"]


def test_explain_agrees_with_select(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_built(monkeypatch, "ck")
    archs = (GFX942, amd_arch("gfx906", 60), nvidia_arch((7, 5), 40), CPU)
    for arch, change in itertools.product(archs, FEATURE_CHANGES.values()):
        problem = dataclasses.replace(PLAIN, **change)  # type: ignore[arg-type]
        found = backends.explain_problem(problem, arch, "auto")
        if found.backend is None:
            with pytest.raises(backends.BackendError):
                backends.select(problem, arch, "auto")
        else:
            assert backends.select(problem, arch, "auto") == found.backend
            assert not found.reasons[found.backend]


def test_explain_runs_nothing_and_takes_meta_tensors() -> None:
    q = torch.empty(4, 1 << 20, 32, 128, device="meta")
    assert flash_rocm.explain(q, q, q, causal=True).backend == "reference"


@pytest.mark.parametrize(
    ("name", "cus", "xcds", "wave"),
    [
        ("gfx942", 304, 8, 64),
        ("gfx942", 38, 1, 64),
        ("gfx942", 80, 4, 64),
        ("gfx950", 256, 8, 64),
        ("gfx90a", 104, 1, 64),
        ("gfx1100", 96, 1, 32),
    ],
)
def test_amd_archs(name: str, cus: int, xcds: int, wave: int) -> None:
    arch = amd_arch(name, cus)
    assert (arch.num_xcds, arch.wave_size, arch.vendor) == (xcds, wave, "amd")


def test_archs_by_name() -> None:
    assert arch_named("gfx942") == GFX942
    assert arch_named("sm90") == SM90
    assert arch_named("sm100").name == "sm100"
    assert arch_named("cpu") == CPU
    with pytest.raises(ValueError, match="arch: expected"):
        arch_named("mi300x")
