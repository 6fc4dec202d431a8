"""README stays true: its support table is the capability data; its example and those of two pages of docs run.

``python tests/test_readme.py`` writes the table anew.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch

from flash_rocm import backends, support
from flash_rocm.problem import FEATURES

README = pathlib.Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- support table:[^\n]*-->\n).*?(<!-- end of support table -->)", re.DOTALL)


def support_table() -> str:
    """The Markdown table that README must hold."""
    (corner, *names), *rows = support.table()
    rows = [[corner, *(f"`{name}`" for name in names)], ["---"] * (1 + len(names)), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(text: str) -> str:
    """README with the table of today."""
    return TABLE.sub(lambda found: found[1] + support_table() + found[2], text)


def test_every_feature_has_a_row() -> None:
    assert set(support.FEATURE_NAMES) == set(FEATURES)
    dtypes = {dtype for capability in backends.CAPABILITIES.values() for dtype in capability.dtypes}
    assert dtypes == set(support.DTYPE_NAMES)


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_cells_are_what_the_feature_alone_gives(feature: str) -> None:
    """The call behind a row uses that feature and no other but those it needs."""
    used = support.problem_with(feature).features()
    assert feature in used and used <= {feature, "kvcache", *({"headdim_v"} if feature == "qv" else ())}
    for name, capability in backends.CAPABILITIES.items():
        assert (support.answer(name, feature) == "no") == (feature not in capability.features)


def test_what_has_no_backward() -> None:
    answers = {(name, feature): support.answer(name, feature) for name in backends.CAPABILITIES for feature in FEATURES}
    assert {key for key, answer in answers.items() if answer == "forward"} == {("ck", "softcap")}


def test_support_table() -> None:
    text = README.read_text()
    assert len(TABLE.findall(text)) == 1
    assert text == written(text), "run: python tests/test_readme.py"


def test_order_of_auto() -> None:
    text = " ".join(README.read_text().split())
    assert backends.AUTO_ORDER == {"amd": ("ck", "triton"), "nvidia": ("triton",), "cpu": ("reference",)}
    assert "on AMD GPUs `ck`, then `triton`; on NVIDIA GPUs `triton`; for CPU tensors `reference`" in text


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(import torch.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(compile(example[1], "README.md", "exec"), names)
    assert "back end: " in capsys.readouterr().out
    out, same = names["out"], names["same"]
    assert isinstance(out, torch.Tensor) and isinstance(same, torch.Tensor)
    assert out.shape == same.shape and torch.isfinite(out).all()


def test_examples_of_inference_run() -> None:
    """One behind the other, as a reader would type them; the two calls of the last agree."""
    text = (README.parent / "docs" / "inference.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    names: dict[str, object] = {}
    exec(compile(examples[0], "inference.md", "exec"), names)
    lengths, cache, out = names["lengths"], names["cache"], names["out"]
    assert isinstance(lengths, torch.Tensor) and isinstance(cache, torch.Tensor) and isinstance(out, torch.Tensor)
    assert lengths.tolist() == [38, 6] and out.isfinite().all()
    written = cache.flatten(-2).any(-1).nonzero().tolist()  # (k or v, sequence, position)
    assert written == [[0, 0, 37], [0, 1, 5], [1, 0, 37], [1, 1, 5]]
    exec(compile(examples[1], "inference.md", "exec"), names)
    out, same = names["out"], names["same"]
    assert isinstance(out, torch.Tensor) and isinstance(same, torch.Tensor)
    assert torch.equal(out, same) and out.any()


def test_examples_of_transformers_run() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = (README.parent / "docs" / "transformers.md").read_text()
    names: dict[str, Any] = {}
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "transformers.md", "exec"), names)
    assert names["model"].config._attn_implementation == "flash_rocm"
    assert names["out"].shape == (2, 20)
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("path", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_somewhere(path: pathlib.Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert "://" in link or (path.parent / link).exists(), link


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
