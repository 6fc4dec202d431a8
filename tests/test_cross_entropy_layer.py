"""Cross entropy on every target, against float64 and autograd; what is ignored; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adversarial import device as on_every_target
from test_adversarial import random, same

from flash_rocm.layers.cross_entropy import CrossEntropyLoss, cross_entropy_loss
from flash_rocm.testing import assert_close_to_oracle

device = on_every_target
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "scale": {"logit_scale": 0.7},
    "z-loss": {"lse_square_scale": 0.1},
    "everything": {"label_smoothing": 0.1, "logit_scale": 1.3, "lse_square_scale": 1e-2, "ignore_index": 3},
}


def labels_of(rows: int, classes: int, device: str) -> torch.Tensor:
    return (torch.arange(rows, device=device) * 7) % classes


def oracle(
    logits: torch.Tensor,
    labels: torch.Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses from log probabilities, and from the square of the logsumexp."""
    scaled = logits * logit_scale
    log_probs, counted = scaled.log_softmax(1), labels != ignore_index
    z_loss = lse_square_scale * scaled.logsumexp(1).square() * counted
    chosen = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    loss = -(1 - label_smoothing) * chosen - label_smoothing * log_probs.mean(1)
    return loss * counted + z_loss, z_loss


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("classes", (2, 50, 5000))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case: dict[str, Any], classes: int, dtype: torch.dtype, device: str) -> None:
    check(case, classes, dtype, False, device)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_gradient_in_the_place_of_the_logits(dtype: torch.dtype, device: str) -> None:
    check(CASES["everything"], 5000, dtype, True, device)


def check(case: dict[str, Any], classes: int, dtype: torch.dtype, inplace: bool, device: str) -> None:
    """Losses and gradient against float64."""
    logits, labels = 4 * random(device, 9, classes, dtype=dtype), labels_of(9, classes, device)
    if case and classes == 2:
        case = {**case, "ignore_index": 0}
    leaf, before = logits.clone().requires_grad_(), logits.clone()
    loss, z_loss = cross_entropy_loss(leaf, labels, **case, inplace_backward=inplace)
    dloss = random(device, 9, dtype=torch.float32, seed=3)
    assert not z_loss.requires_grad
    (gradient,) = torch.autograd.grad(loss, leaf, dloss)
    wanted = []
    for kind in (torch.float64, dtype):
        copy = before.to(kind).requires_grad_()
        found = oracle(copy, labels, **case)
        wanted.append((*found, *torch.autograd.grad(found[0], copy, dloss.to(found[0].dtype))))
    for name, actual, exact, plain, result in zip(
        ("loss", "z_loss", "dlogits"),
        (loss, z_loss, gradient),
        *wanted,
        (torch.float32, torch.float32, dtype),
        strict=True,
    ):
        # lse is a float32 number of its own, which both are differences from.
        rounding = torch.finfo(torch.float32).eps * float(before.detach().abs().max() * 2 + 10)
        kind = "gradient" if name == "dlogits" else "output"
        assert_close_to_oracle(actual, exact, plain.to(dtype), kind, name, dtype=result, rounding=rounding)
    assert torch.equal(leaf, gradient if inplace else before)


def test_ignored_rows_may_hold_anything(device: str) -> None:
    logits, labels = random(device, 4, 20), torch.tensor([1, -100, 2, -100], device=device)
    logits[1], logits[3] = torch.nan, torch.inf
    leaf = logits.requires_grad_()
    loss, _ = cross_entropy_loss(leaf, labels, lse_square_scale=0.1, label_smoothing=0.1)
    loss.sum().backward()
    assert leaf.grad is not None
    assert loss[1] == 0 and loss[3] == 0 and loss.isfinite().all()
    assert leaf.grad.isfinite().all() and not leaf.grad[1::2].any()


def test_labels_that_are_no_class(device: str) -> None:
    """Seen without reading labels back: the loss is NaN."""
    loss, _ = cross_entropy_loss(random(device, 3, 20), torch.tensor([20, 0, -1], device=device))
    assert loss.isnan().tolist() == [True, False, True]


def test_minus_infinity(device: str) -> None:
    """A class that is masked out has no probability and no gradient."""
    logits = random(device, 3, 20, dtype=torch.float32)
    logits[:, 5] = -torch.inf
    leaf = logits.requires_grad_()
    loss, _ = cross_entropy_loss(leaf, labels_of(3, 5, device))
    loss.sum().backward()
    assert leaf.grad is not None and loss.isfinite().all() and not leaf.grad[:, 5].any()
    assert leaf.grad.isfinite().all()


def test_precomputed_lse(device: str) -> None:
    """Used as it is, in the loss and in the gradient."""
    logits, labels = random(device, 5, 30, dtype=torch.float32), labels_of(5, 30, device)
    lse = logits.logsumexp(1)
    plain, given, other = (cross_entropy_loss(logits, labels, p)[0] for p in (None, lse, lse + 1))
    torch.testing.assert_close(plain, given)
    torch.testing.assert_close(other, given + 1)


def test_strides(device: str) -> None:
    whole, labels = random(device, 5, 62, dtype=torch.float32), labels_of(5, 30, device)
    for logits in (whole[:, :30], whole[:, 1:31], whole[:, ::2][:, :30]):
        found = []
        for copy in (logits, logits.contiguous()):
            leaf = copy.detach().requires_grad_()
            loss, _ = cross_entropy_loss(leaf, labels)
            found.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
        assert same(*found)
    leaf = whole.clone()[:, ::2].requires_grad_()
    cross_entropy_loss(leaf, labels, inplace_backward=True)[0].sum().backward()


def test_int32_labels_and_no_rows(device: str) -> None:
    logits, labels = random(device, 5, 30), labels_of(5, 30, device)
    assert same(cross_entropy_loss(logits, labels.int()), cross_entropy_loss(logits, labels))
    assert cross_entropy_loss(logits[:0], labels[:0])[0].shape == (0,)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_module(reduction: str, device: str) -> None:
    logits, labels = random(device, 6, 30, dtype=torch.float32), labels_of(6, 30, device)
    labels[2] = -100
    options = {"label_smoothing": 0.1, "logit_scale": 0.5, "lse_square_scale": 0.01}
    loss, z_loss = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)(logits, labels)
    exact, exact_z = oracle(logits, labels, **options)
    if reduction != "none":
        exact, exact_z = (x.sum() / (5 if reduction == "mean" else 1) for x in (exact, exact_z))
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(z_loss, exact_z)
    alone = CrossEntropyLoss(ignore_index=7, inplace_backward=True)(logits.requires_grad_(), labels.clamp(min=0))
    exact, _ = oracle(logits.detach(), labels.clamp(min=0), ignore_index=7)
    torch.testing.assert_close(alone, exact.sum() / 5)
    before = logits.detach().clone()
    alone.backward()
    assert not same(logits.detach(), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.zeros(4)}, r"logits: .*\(rows, classes\)"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int32)}, "logits: expected float16"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels: expected int64 \(4,\)"),
        ({"labels": torch.zeros(4)}, "labels: expected int64"),
        ({"precomputed_lse": torch.zeros(5)}, r"precomputed_lse: expected float32 \(4,\)"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected a number in"),
        ({"labels": [0, 0, 0, 0]}, "labels: expected a tensor"),
    ],
)
def test_errors(changes: dict[str, Any], words: str) -> None:
    arguments = {"logits": torch.zeros(4, 8), "labels": torch.zeros(4, dtype=torch.int64), **changes}
    with pytest.raises(ValueError, match=words):
        cross_entropy_loss(**arguments)
    with pytest.raises(ValueError, match="reduction: expected mean, none or sum"):
        CrossEntropyLoss(reduction="max")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)
    logits, labels = torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="process_group: expected None or a group of one process, got 2"):
        cross_entropy_loss(logits, labels, process_group=2)
    assert same(cross_entropy_loss(logits, labels, process_group=1), cross_entropy_loss(logits, labels))
