"""The drop-in: what is found under flash-attn's names, its conventions, and where it refuses."""

from __future__ import annotations

import inspect
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from calls import starts
from test_adversarial import random, same

import flash_rocm
from flash_rocm import v3
from flash_rocm.dropin import finder, interface

ROOT = pathlib.Path(__file__).parent.parent
ALIAS = ROOT / "packaging" / "flash-attn-alias"


def run(code: str, *args: str, folder: pathlib.Path | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with a folder before everything else on its path."""
    path = os.pathsep.join(str(each) for each in (folder, ROOT) if each)
    command = [sys.executable, *(args or ("-c", textwrap.dedent(code)))]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done


STATEMENTS = [
    "from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, __version__",
    "from flash_attn import flash_attn_qkvpacked_func, flash_attn_kvpacked_func",
    "from flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func",
    "from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_backward",
    "from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, _flash_attn_varlen_backward",
    "from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward, _wrapped_flash_attn_backward",
    "from flash_attn.flash_attn_interface import _get_block_size_n, USE_TRITON_ROCM, maybe_contiguous",
    "from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input",
    "from flash_attn.bert_padding import unpad_input_for_concatenated_sequences, index_put_first_axis",
    "from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_func, RotaryEmbedding",
    "from flash_attn.layers.rotary import apply_rotary_emb_qkv_, apply_rotary_emb_kv_, apply_rotary_emb_torch",
    "from flash_attn.ops.triton.rotary import apply_rotary",
    "from flash_attn.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn, RMSNorm, layer_norm_linear_fn",
    "from flash_attn.ops.triton.layer_norm import layer_norm_ref, rms_norm_ref",
    "from flash_attn.ops.triton.cross_entropy import cross_entropy_loss",
    "from flash_attn.ops.activations import swiglu, bias_gelu_impl, fast_gelu_impl, sqrelu_fwd",
    "from flash_attn.losses.cross_entropy import CrossEntropyLoss",
    "from flash_attn.modules.mha import MHA, ParallelMHA, FlashSelfAttention, FlashCrossAttention",
    "from flash_attn.modules.mlp import Mlp, GatedMlp, ParallelMLP, ParallelGatedMlp",
    "from flash_attn.modules.block import Block, ParallelBlock",
    "from flash_attn.modules.embedding import GPT2Embeddings, BertEmbeddings, ParallelGPT2Embeddings",
    "from flash_attn.utils.generation import InferenceParams",
    "from flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache",
    "from flash_attn_interface import flash_attn_combine, get_scheduler_metadata",
]


class TestImports:
    def test_every_name(self) -> None:
        """Modules, packages and metadata, found and again what flash_rocm has."""
        run(
            """
            import importlib, importlib.metadata, importlib.util, sys
            from flash_rocm import dropin
            assert importlib.util.find_spec("flash_attn") is None
            dropin.install()
            dropin.install()
            from flash_rocm.dropin.finder import MODULES
            for name, target in MODULES.items():
                assert importlib.util.find_spec(name) is not None
                module = importlib.import_module(name)
                if target:
                    assert module is importlib.import_module(target) and sys.modules[name] is module, name
                parent, _, child = name.rpartition(".")
                assert not parent or getattr(sys.modules[parent], child) is module, name
            import flash_attn, flash_rocm
            assert flash_attn.__version__ == "2.8.3" == importlib.metadata.version("flash_attn")
            assert importlib.metadata.version("flash-attn") == "2.8.3"
            assert set(importlib.metadata.packages_distributions()["flash_attn_interface"]) == {"flash_attn"}
            assert importlib.metadata.version("flash_rocm") != "2.8.3"
            assert importlib.util.find_spec("flash_attn.models") is None and "flash_attn.models" not in sys.modules
            assert sum(isinstance(f, dropin.finder.Finder) for f in sys.meta_path) == 1
            """
        )

    def test_statements_of_callers(self) -> None:
        """As they are in other people's programs, all in one process."""
        code = f"""
        from flash_rocm import dropin
        dropin.install()
        for statement in {STATEMENTS!r}:
            exec(statement, {{}})
        """
        run(code)

    def test_refuses_beside_an_imported_flash_attn(self, tmp_path: pathlib.Path) -> None:
        for name in ("flash_attn", "flash_attn_interface"):
            (tmp_path / f"{name}.py").write_text("__version__ = '1.2.3'\n")
            words = run(
                f"""
                import {name}
                from flash_rocm import dropin
                try:
                    dropin.install()
                except dropin.DropInError as error:
                    print(error)
                assert {name}.__version__ == "1.2.3"
                """,
                folder=tmp_path,
            ).stdout
            assert words.startswith(f"{name}: expected that it is not imported yet, got {name} 1.2.3 from {tmp_path}")
            assert "Hint: " in words

    def test_an_installed_flash_attn_is_hidden_with_a_warning(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "flash_attn.py").write_text("raise RuntimeError('the other one')\n")
        info = tmp_path / "flash_attn-1.2.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 1.2.3\n")
        done = run(
            """
            from flash_rocm import dropin
            dropin.install()
            import flash_attn, importlib.metadata
            print(flash_attn.__version__, importlib.metadata.version("flash_attn"))
            """,
            folder=tmp_path,
        )
        assert done.stdout.split() == ["2.8.3", "2.8.3"]
        assert f"hides the installed flash_attn 1.2.3 ({tmp_path}" in done.stderr

    def test_the_separate_distribution(self, tmp_path: pathlib.Path) -> None:
        """Built from the tree: what it installs resolves to flash_rocm, whatever is imported first."""
        source = tmp_path / "source"  # setuptools leaves its build folder where it works
        shutil.copytree(ALIAS, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target"]
        done = subprocess.run([*command, str(tmp_path), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for first in ("flash_attn_interface", "flash_attn.bert_padding", "flash_rocm.dropin as d; d.install()"):
            done = run(
                f"""
                import {first}
                import flash_attn, flash_attn_interface, flash_attn.bert_padding, importlib.metadata
                import flash_rocm.v3, flash_rocm.bert_padding, flash_rocm.dropin.interface as ours
                assert flash_attn_interface is flash_rocm.v3
                assert flash_attn.bert_padding is flash_rocm.bert_padding
                assert flash_attn.flash_attn_func is ours.flash_attn_func
                print(flash_attn.__version__, importlib.metadata.version("flash_attn"))
                """,
                folder=tmp_path,
            )
            assert done.stdout.split() == ["2.8.3", "2.8.3"] and not done.stderr
        text = (ALIAS / "pyproject.toml").read_text()
        assert f'version = "{finder.VERSION}"' in text and f'description = "{finder.SUMMARY}"' in text


class TestCommandLine:
    PROGRAM = """
    import sys
    import flash_attn
    if __name__ == "__main__":
        print(flash_attn.__version__, sys.argv[0].rpartition("/")[2], *sys.argv[1:], __import__("beside").here)
        sys.exit(3)
    """

    @pytest.mark.parametrize("form", [("{folder}/program.py",), ("-m", "program")], ids=["script", "module"])
    def test_runs_a_program(self, form: tuple[str, ...], tmp_path: pathlib.Path) -> None:
        (tmp_path / "program.py").write_text(textwrap.dedent(self.PROGRAM))
        (tmp_path / "beside.py").write_text("here = 'here'\n")
        args = [part.format(folder=tmp_path) for part in form]
        where = tmp_path if "-m" in form else None
        done = run("", "-m", "flash_rocm.dropin", *args, "-x", "--help", folder=where, status=3)
        assert done.stdout.split() == ["2.8.3", "program.py", "-x", "--help", "here"]

    @pytest.mark.parametrize(
        ("args", "words"),
        [([], "usage: "), (["-m"], "usage: "), (["--x"], "usage: "), (["nowhere.py"], "SCRIPT: expected a file")],
    )
    def test_usage(self, args: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        from flash_rocm.dropin.__main__ import main

        monkeypatch.setattr(sys, "argv", ["flash_rocm.dropin", *args])
        assert main() == 2 and words in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["flash_rocm.dropin", "--help"])
        assert main() == 0 and "usage: " in capsys.readouterr().out
        assert not any(isinstance(each, finder.Finder) for each in sys.meta_path)


class TestDocumentation:
    TEXT = (ROOT / "docs" / "dropin.md").read_text()

    def test_names_what_there_is(self) -> None:
        rows = [line.partition(" | ")[0] for line in self.TEXT.splitlines() if line.startswith("| `flash_attn")]
        named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
        assert named == {name for name, target in finder.MODULES.items() if target} | {"flash_attn"}
        assert f"is {finder.VERSION}, the version whose interface" in self.TEXT

    def test_example_of_layers_runs(self) -> None:
        (example,) = re.findall(r"```python\n(import torch\n.*?)```", self.TEXT, re.DOTALL)
        names: dict[str, Any] = {}
        exec(compile(example, "dropin.md", "exec"), names)
        assert names["losses"].isfinite().all() and names["x"].grad.any() and names["weight"].grad.any()


def qkv(*lengths: int, heads: int = 3, dim: int = 16) -> list[torch.Tensor]:
    shape = (2, heads, dim)
    return [random("cpu", shape[0], n, *shape[1:], dtype=torch.float32, seed=k) for k, n in enumerate(lengths)]


class TestConventions:
    @pytest.mark.parametrize("name", interface.__all__[:7])
    def test_signatures_and_results(self, name: str) -> None:
        ours, theirs = getattr(flash_rocm, name), getattr(interface, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert theirs.__module__ == interface.__name__ and theirs.__name__ == name

    def test_lse_of_rows_that_see_no_key(self) -> None:
        q, k, v = qkv(6, 4, 4)
        options: dict[str, Any] = {"causal": True, "return_attn_probs": True}
        found = interface.flash_attn_func(q, k, v, **options)
        inside = flash_rocm.flash_attn_func(q, k, v, **options)
        assert same(found[0], inside[0]) and found[2].shape == (0,)
        assert bool((found[1][:, :, :2] == math.inf).all()) and same(found[1][:, :, 2:], inside[1][:, :, 2:])
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        varlen = (starts("cpu", 6, 6), starts("cpu", 4, 4), 6, 4)
        _, lse, _ = interface.flash_attn_varlen_func(*packed, *varlen, **options)
        assert same(lse.unflatten(1, (2, 6)).transpose(0, 1), found[1])
        _, lse = interface.flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
        assert same(lse == math.inf, found[1] == math.inf)
        assert bool((v3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[1][:, :, :2] == -math.inf).all())

    def test_s_dmask(self) -> None:
        """Rounded up to 128, and scaled by block: undone, it is the softmax with the signs of dropout."""
        q, k, v = qkv(5, 300, 300)
        arguments = (q, k, v, 0.3, 0.9, False, (200, 20))
        torch.manual_seed(0)
        out, lse, theirs = interface.flash_attn_func(*arguments, return_attn_probs=True)
        torch.manual_seed(0)
        same_out, _, probs = flash_rocm.flash_attn_func(*arguments, return_attn_probs=True)
        assert same(out, same_out) and theirs.shape == (2, 3, 128, 384) and theirs.dtype == q.dtype
        assert not theirs[:, :, 5:].any() and not theirs[..., 300:].any()
        scores = torch.einsum("bihd,bjhd->bhij", q, k).double() * 0.9
        i, j = torch.arange(5)[:, None] + 295, torch.arange(300)
        scores = scores.masked_fill((j < i - 200) | (j > i + 20), -math.inf)
        largest = torch.stack([scores[..., first:].amax(-1) for first in range(0, 300, 128)], -1)
        largest = largest.repeat_interleave(128, -1)[..., :300]
        expected = torch.where(scores == -math.inf, 0.0, (scores - largest).exp())
        torch.testing.assert_close(theirs[:, :, :5, :300].abs().double(), expected, rtol=1e-4, atol=1e-6)
        assert same(theirs[:, :, :5, :300] < 0, probs < 0) and bool((probs < 0).any())
        undone = theirs[:, :, :5, :300].double() * (largest - lse.double()[..., None]).exp().nan_to_num()
        torch.testing.assert_close(undone, probs.double(), rtol=1e-4, atol=1e-6)
        assert interface._get_block_size_n(q.device, 16, True, False) == 128

    def test_inputs_of_any_stride_and_windows_in_tensors(self) -> None:
        q, k, v = qkv(6, 9, 9)
        expected = flash_rocm.flash_attn_func(q, k, v, window_size=(2, 1))
        turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
        window = torch.tensor([2, 1])
        assert same(interface.flash_attn_func(*turned, window_size=window), expected)
        assert same(interface.flash_attn_func(*turned, 0.0, None, False, window), expected)
        assert same(interface.flash_attn_func(q=turned[0], k=turned[1], v=turned[2], window_size=window), expected)
        cached = flash_rocm.flash_attn_with_kvcache(q, k, v, window_size=(2, 1))
        assert same(interface.flash_attn_with_kvcache(turned[0], k, v, window_size=window), cached)
        behind_scale = (None,) * 9 + (False, window)
        assert same(interface.flash_attn_with_kvcache(q, k, v, *behind_scale), cached)

    def test_gradients(self) -> None:
        leaves = [x.requires_grad_() for x in qkv(6, 4, 4)]
        found = []
        for module in (interface, flash_rocm):
            out, lse, _ = module.flash_attn_func(*leaves, causal=True, return_attn_probs=True)
            found.append(torch.autograd.grad(out.sin().sum() + lse[:, :, 2:].sum(), leaves))
        assert same(*found)

    def test_triton_of_rocm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert interface.USE_TRITON_ROCM is False
        monkeypatch.setenv("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
        assert interface.USE_TRITON_ROCM is True
        with pytest.raises(AttributeError, match="no attribute 'USE_NOTHING'"):
            _ = interface.USE_NOTHING

    def test_helpers(self) -> None:
        x = torch.zeros(4, 3).T
        assert interface.maybe_contiguous(x).stride() == (4, 1) and interface.maybe_contiguous(None) is None
        assert [interface.round_multiple(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


#: dropout_p, scale, causal, window, softcap, and whether there are ALiBi slopes.
PRIVATE_CASES = {
    "plain": (0.0, 0.3, False, (-1, -1), 0.0, False),
    "everything": (0.2, 0.3, True, (3, 0), 5.0, True),
}


@pytest.mark.parametrize("as_operator", [False, True], ids=["function", "operator"])
@pytest.mark.parametrize("case", PRIVATE_CASES.values(), ids=PRIVATE_CASES)
class TestPrivateFunctions:
    def functions(self, varlen: bool, as_operator: bool) -> tuple[Any, Any]:
        infix = "varlen_" if varlen else ""
        names = (f"_flash_attn_{infix}forward", f"_flash_attn_{infix}backward")
        return tuple(getattr(interface, f"_wrapped{name}" if as_operator else name) for name in names)  # type: ignore[return-value]

    @pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
    def test_forward_and_backward(self, varlen: bool, case: tuple[Any, ...], as_operator: bool) -> None:
        """They are the public function and its gradients."""
        dropout_p, scale, causal, window, softcap, has_alibi = case
        slopes = torch.tensor([0.5, 0.2, 0.1]) if has_alibi else None
        leaves, extra = [x.requires_grad_() for x in qkv(6, 4, 4)], ()
        public: Any = interface.flash_attn_func
        if varlen:
            leaves = [x.detach().flatten(0, 1).requires_grad_() for x in leaves]
            extra = (starts("cpu", 5, 7), starts("cpu", 3, 5), 7, 5)
            public = interface.flash_attn_varlen_func
        torch.manual_seed(1)
        out, lse, probs = public(
            *(*leaves, *extra, dropout_p, scale, causal, window, softcap, slopes), return_attn_probs=True
        )
        forward, backward = self.functions(varlen, as_operator)
        numbers = (dropout_p, scale, causal, *window, softcap)
        torch.manual_seed(1)
        q, k, v = (x.detach() for x in leaves)
        found, found_lse, found_probs, state = forward(q, k, v, *extra, *numbers, slopes, True)
        assert same((found, found_lse, found_probs), (out, lse, probs)) and not found.requires_grad
        dout = random("cpu", *out.shape, dtype=torch.float32, seed=9)
        targets = [torch.full_like(x, math.nan) for x in (q, k, v)]
        delta = backward(dout, q, k, v, found, found_lse, *targets, *extra, *numbers, slopes, True, state)
        assert same(targets, torch.autograd.grad(out, leaves, dout))
        assert delta.shape == found_lse.shape
        torch.testing.assert_close(delta, (dout * out.detach()).sum(-1).transpose(-1, -2))
        only = torch.zeros_like(k)
        backward(dout, q, k, v, found, found_lse, None, only, None, *extra, *numbers, slopes, True, state)
        assert same(only, targets[1])


class TestPrivateVarlen:
    def test_used_keys_and_left_padding(self) -> None:
        q, k, v = (x.flatten(0, 1) for x in qkv(3, 6, 6))
        cu_q, cu_k, used = starts("cpu", 3, 3), starts("cpu", 6, 6), torch.tensor([4, 2], dtype=torch.int32)
        call = interface._flash_attn_varlen_forward
        out, lse, probs, state = call(q, k, v, cu_q, cu_k, 3, 6, 0.0, 0.25, True, seqused_k=used)
        rows = torch.cat((torch.arange(4), torch.arange(6, 8)))
        expected = interface.flash_attn_varlen_func(
            q, k[rows], v[rows], cu_q, starts("cpu", 4, 2), 3, 4, 0.0, 0.25, True, return_attn_probs=True
        )
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1])
        assert probs.shape == (0,) and state.shape == (2,) and same(lse == math.inf, expected[1] == math.inf)
        with pytest.raises(NotImplementedError, match="dropout_p: expected 0"):
            call(q, k, v, cu_q, cu_k, 3, 6, 0.1, 0.25, True, seqused_k=used)

    def test_pages(self) -> None:
        q, k, v = (x.flatten(0, 1) for x in qkv(3, 6, 6))
        pages = [x.unflatten(0, (4, 3)) for x in (k, v)]
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
        cu_q, cu_k = starts("cpu", 3, 3), starts("cpu", 6, 6)
        numbers = (cu_q, cu_k, 3, 6, 0.0, 0.25, True)
        found = interface._flash_attn_varlen_forward(q, *pages, *numbers, block_table=table)
        plain = interface._flash_attn_varlen_forward(q, k, v, *numbers)
        torch.testing.assert_close(found[:2], plain[:2])

    def test_rows_of_no_sequence_are_zero_either_way(self) -> None:
        q, k, v = (x.flatten(0, 1) for x in qkv(3, 3, 3))
        numbers = (starts("cpu", 4), starts("cpu", 4), 4, 4, 0.0, 0.25, False)
        for zero in (False, True):
            out = interface._flash_attn_varlen_forward(q, k, v, *numbers, zero_tensors=zero)[0]
            assert not out[4:].any() and out[:4].any()

    def test_errors(self) -> None:
        q, k, v = qkv(3, 3, 3)
        numbers = (0.1, 0.25, False, -1, -1, 0.0, None)
        out, lse, _, _ = interface._flash_attn_forward(q, k, v, *numbers, False)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        with pytest.raises(ValueError, match="rng_state: expected what the forward returned"):
            interface._flash_attn_backward(q, q, k, v, out, lse, *gradients, *numbers, True)
        with pytest.raises(ValueError, match="q: expected 4 dims"):
            interface._flash_attn_forward(q[0], k, v, *numbers, False)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.2])
    def test_operators(self, dropout_p: float) -> None:
        """Schemas and fakes say what the operators do."""
        q, k, v = qkv(6, 4, 4)
        numbers = (dropout_p, 0.25, False, -1, -1, 0.0)
        operators = torch.ops.flash_attn
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators._flash_attn_forward, (q, k, v, *numbers, None, True), test_utils=tests)
        varlen = (starts("cpu", 6, 6), starts("cpu", 4, 4), 6, 4)
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        arguments = (*packed, *varlen, *numbers, None, True)
        torch.library.opcheck(operators._flash_attn_varlen_forward, arguments, test_utils=tests)
        out, lse, _, state = operators._flash_attn_forward(q, k, v, *numbers, None, True)
        results = [torch.zeros_like(x) for x in (q, k, v)]
        arguments = (out, q, k, v, out, lse, *results, *numbers, None, True, state)
        torch.library.opcheck(operators._flash_attn_backward, arguments, test_utils=tests)

    def test_traced(self) -> None:
        """Operators have fakes: shapes come out without running anything."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode() as mode:
            q, k, v = (mode.from_tensor(x) for x in qkv(6, 4, 4))
            numbers = (0.0, 0.25, False, -1, -1, 0.0, None)
            out, lse, _, state = torch.ops.flash_attn._flash_attn_forward(q, k, v, *numbers, False)
            assert out.shape == q.shape and lse.shape == (2, 3, 6) and state.shape == (2,)
            grads = [torch.empty_like(x) for x in (q, k, v)]
            delta = torch.ops.flash_attn._flash_attn_backward(out, q, k, v, out, lse, *grads, *numbers, True, state)
            assert delta.shape == (2, 3, 6)
