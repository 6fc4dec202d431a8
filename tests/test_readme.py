"""README stays true: its support table is the capability data; its example and those of two pages of docs run.

``python tests/test_readme.py`` writes the table anew.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch

from flash_rocm import backends, runtime
from flash_rocm.problem import FEATURES

README = pathlib.Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- support table:[^\n]*-->\n).*?(<!-- end of support table -->)", re.DOTALL)

#: What a feature is called in the table, in its order.
NAMES = {
    "backward": "backward",
    "varlen": "varlen",
    "causal": "causal",
    "window": "sliding window",
    "gqa": "GQA, MQA",
    "headdim_v": "head dim of v differs",
    "softcap": "softcap",
    "alibi": "ALiBi",
    "sinks": "attention sinks",
    "dropout": "dropout",
    "deterministic": "deterministic",
    "kvcache": "K/V cache, split keys (forward, as all that follows)",
    "paged": "pages of any size",
    "append": "append",
    "rotary": "rotary embedding",
    "cache_batch_idx": "cache_batch_idx",
    "leftpad": "left padding",
    "qv": "qv (MLA)",
    "attention_chunk": "attention_chunk",
}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


def devices(capability: backends.Capability) -> str:
    if not capability.archs and not capability.minimum_sm:
        return "any device of torch"
    parts = [f"AMD {', '.join(capability.archs)}"]
    if capability.minimum_sm:
        parts.append(f"NVIDIA sm{capability.minimum_sm} and newer")
    return "; ".join(parts)


#: What a back end has no backward of.
FORWARD_ONLY = {("ck", "softcap")}


def has(capability: backends.Capability, feature: str) -> str:
    if feature not in capability.features:
        return "no"
    return "forward" if (capability.name, feature) in FORWARD_ONLY else "yes"


def cells(capability: backends.Capability) -> list[str]:
    """Column of one back end."""
    largest = f"1 to {capability.max_headdim}, {capability.max_headdim_cached} over a K/V cache"
    if capability.max_headdim >= 1 << 20:
        largest = "any"
    elif not capability.max_headdim_cached:
        largest = f"multiples of 8 up to {capability.max_headdim}"
    dtypes = ", ".join(name for dtype, name in DTYPES.items() if dtype in capability.dtypes)
    return [devices(capability), dtypes, largest, *(has(capability, name) for name in NAMES)]


def support_table() -> str:
    """The Markdown table that README must hold."""
    rows = [["", *(f"`{name}`" for name in backends.CAPABILITIES)], ["---"] * (1 + len(backends.CAPABILITIES))]
    columns = [cells(capability) for capability in backends.CAPABILITIES.values()]
    labels = ["devices", "dtypes", "head dims", *NAMES.values()]
    rows += [[label, *values] for label, *values in zip(labels, *columns, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def written(text: str) -> str:
    """README with the table of today."""
    return TABLE.sub(lambda found: found[1] + support_table() + found[2], text)


def test_every_feature_has_a_row() -> None:
    assert set(NAMES) == set(FEATURES)
    assert {dtype for capability in backends.CAPABILITIES.values() for dtype in capability.dtypes} == set(DTYPES)


def test_support_table() -> None:
    text = README.read_text()
    assert len(TABLE.findall(text)) == 1
    assert text == written(text), "run: python tests/test_readme.py"


def test_order_of_auto() -> None:
    text = " ".join(README.read_text().split())
    assert backends.AUTO_ORDER == {"amd": ("ck", "triton"), "nvidia": ("triton",), "cpu": ("reference",)}
    assert "on AMD GPUs `ck`, then `triton`; on NVIDIA GPUs `triton`; for CPU tensors `reference`" in text


def test_every_variable_that_is_read_is_described() -> None:
    for name in runtime._VARIABLES:
        assert f"| `{name}` |" in README.read_text()


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
