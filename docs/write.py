"""Writes the pages that are generated: api.md, arguments.md and environment.md.  ``python docs/write.py``

A test says whether they are up to date.
"""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flash_rocm
from flash_rocm import backends, support, v3, variables

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "packaging"))
import public_api  # noqa: E402

_NOTE = "<!-- written by python docs/write.py, checked by the tests -->\n"

# --------------------------------------------------------------------------------------------------
# environment.md


def environment() -> str:
    """The page of environment variables."""
    groups = {
        "Calls and the command": variables.RUN,
        "Building": variables.BUILD,
        "Read by the driver and by torch": variables.DEVICES,
    }
    blocks = [
        "# Environment variables",
        _NOTE + "Read when a call or a build needs them, not at import: what is set later counts from then on.\n"
        "`flash-rocm info` shows those that are set. The names are in `flash_rocm/variables.py`; nothing else is read.",
    ]
    for title, group in groups.items():
        rows = [f"| `{name}` | {meaning} |" for name, meaning in group.items()]
        blocks.append("\n".join([f"## {title}\n", "| Variable | Meaning |", "|---|---|", *rows]))
    return "\n\n".join(blocks) + "\n"


# --------------------------------------------------------------------------------------------------
# arguments.md


class Argument(NamedTuple):
    """What using an argument asks of a back end.

    Attributes:
        features: of :data:`flash_rocm.problem.FEATURES`; all of them must be there.
        note: what else is to be known; on its own the answer where no back end has a part in it.
        refused: the argument is known, and raises.
    """

    features: tuple[str, ...] = ()
    note: str = ""
    refused: bool = False


_FP8 = Argument((), "raises `NotImplementedError`: there is no FP8 yet", refused=True)
_HINT = Argument((), "a hint to FlashAttention-3's scheduler; checked, and changes nothing here")
_SPLITS = Argument((), "a hint; with qv, attention_chunk, seqused_q or seqused_k the parts that keys are divided into")
_ARGUMENTS = {
    **dict.fromkeys(("q", "k", "v", "kv", "qkv", "k_cache", "v_cache"), Argument()),
    **dict.fromkeys(
        ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"),
        Argument(("varlen",)),
    ),
    "dropout_p": Argument(("dropout",)),
    "softmax_scale": Argument((), "`ck`: above 0"),
    "causal": Argument(("causal",)),
    "window_size": Argument(("window",)),
    "softcap": Argument(("softcap",), "`ck`: not with ALiBi"),
    "alibi_slopes": Argument(("alibi",)),
    "deterministic": Argument(("deterministic",)),
    "return_attn_probs": Argument((), "adds softmax_lse, and with dropout_p in flash-attn 2's functions S_dmask"),
    "block_table": Argument(
        ("paged",), "no gradients, no dropout; `ck`: pages of multiples of 64, in bf16 at head dim 128 of 16"
    ),
    "learnable_sink": Argument(("sinks",)),
    "qv": Argument(("qv",), "no gradients"),
    "attention_chunk": Argument(("attention_chunk",), "no gradients"),
    "seqused_q": Argument(("varlen", "kvcache"), "no gradients"),
    "seqused_k": Argument(("varlen", "kvcache"), "no gradients"),
    "q_descale": _FP8,
    "k_descale": _FP8,
    "v_descale": _FP8,
    "pack_gqa": _HINT,
    "sm_margin": _HINT,
    "num_heads_q": Argument((), "how many of the packed heads are of q"),
    "cache_seqlens": Argument(),
    "rotary_cos": Argument(("append", "rotary")),
    "rotary_sin": Argument(("append", "rotary")),
    "rotary_interleaved": Argument(("append", "rotary")),
    "rotary_seqlens": Argument(("append", "rotary")),
    "cache_batch_idx": Argument(("cache_batch_idx",)),
    "cache_leftpad": Argument(("leftpad",)),
    "page_table": Argument(("paged",)),
    "cu_seqlens_k_new": Argument(("append",)),
    "num_splits": Argument((), "into how many parts the keys are divided; 0: the back end's choice"),
    "scheduler_metadata": Argument((), "of `get_scheduler_metadata`, in place of num_splits"),
    "return_softmax_lse": Argument(),
}
#: Where an argument means something else than elsewhere: (function, argument).
_EXCEPTIONS = {
    ("flash_rocm.flash_attn_with_kvcache", "k"): Argument(("append",)),
    ("flash_rocm.flash_attn_with_kvcache", "v"): Argument(("append",)),
    ("flash_rocm.v3.flash_attn_with_kvcache", "k"): Argument(("append",)),
    ("flash_rocm.v3.flash_attn_with_kvcache", "v"): Argument(("append",)),
    ("flash_rocm.v3.flash_attn_func", "num_splits"): _SPLITS,
    ("flash_rocm.v3.flash_attn_varlen_func", "num_splits"): _SPLITS,
}
#: Not calls of attention: their arguments have no back ends.
_OTHERS = ("flash_attn_combine", "get_scheduler_metadata")


def functions() -> dict[str, Callable[..., Any]]:
    """The attention functions by the name that users write, flash-attn 2's first."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (flash_rocm, v3)
        for name in module.__all__
        if name.startswith("flash_attn") and name not in _OTHERS
    }


def argument(function: str, name: str) -> Argument:
    """What using an argument of a function asks for, its own features and those of every call of the function.

    Raises:
        KeyError: a new argument, which needs an entry above.
    """
    found = _EXCEPTIONS.get((function, name), _ARGUMENTS[name])
    base = {"varlen": "varlen", "kvcache": "kvcache"}
    always = tuple(feature for part, feature in base.items() if part in function)
    return found._replace(features=tuple(dict.fromkeys((*always, *found.features))))


def cell(function: str, name: str, backend: str) -> str:
    """``yes``, ``forward``, ``no``, or ``raises`` on every back end."""
    found = argument(function, name)
    if found.refused:
        return "raises"
    answers = {support.answer(backend, feature) for feature in found.features}
    # Over a K/V cache there are no gradients to lack.
    limits = ("no",) if "kvcache" in found.features else ("no", "forward")
    return next((answer for answer in limits if answer in answers), "yes")


def arguments() -> str:
    """The page that maps arguments to back ends."""
    names = tuple(backends.CAPABILITIES)
    blocks = [
        "# Arguments and back ends",
        _NOTE
        + "For each argument of the attention functions: which back end takes a call that uses it, on a device of its\n"
        "own and with the needed instances built. `forward`: not with gradients. A back end that does not take it is\n"
        "passed over by `auto`, and raises if it was asked for by name; nothing is ignored. `flash_rocm.explain`\n"
        "answers for a whole call.",
    ]
    for function, made in functions().items():
        rows = []
        for name in inspect.signature(made).parameters:
            cells = [cell(function, name, backend) for backend in names]
            rows.append(f"| `{name}` | {' | '.join(cells)} | {argument(function, name).note} |")
        head = f"| argument | {' | '.join(f'`{name}`' for name in names)} | |\n|{'---|' * (len(names) + 2)}"
        blocks.append("\n".join([f"## {function}\n", head, *rows]))
    return "\n\n".join(blocks) + "\n"


# --------------------------------------------------------------------------------------------------
# api.md

#: Its text is about the functions that flash_rocm.v3 exports.
_TEXT_OF = {"flash_rocm.v3": "flash_rocm.v3.attention"}


def _text(docstring: str) -> str:
    """A docstring as Markdown: roles become code, and indented sections blocks of their own."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring)
    text = text.replace("``", "`")
    return re.sub(r"^(\w[\w ]*:)\n(?=    )", r"\1\n\n", text, flags=re.MULTILINE)


def _signature(name: str, value: Any) -> str:
    """The way it is called, one argument a line where it is long."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return f"class {name}({value.__bases__[0].__name__})"
    found = inspect.signature(value)
    text = f"{name}{found}"
    if len(text) > 100:
        parts = [str(parameter) for parameter in found.parameters.values()]
        returned = "" if found.return_annotation is found.empty else str(found).rpartition(" -> ")[2]
        kinds = [parameter.kind for parameter in found.parameters.values()]
        if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
            parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        text = (
            f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")" + (f" -> {returned}" if returned else "")
        )
    # Annotations are strings, and a default that is a function has an address.
    return re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text.replace("'", ""))


def api() -> str:
    """The API reference."""
    blocks = ["# API reference", _NOTE + "From the docstrings."]
    for name in public_api.MODULES:
        module = importlib.import_module(name)
        blocks.append(f"## {name}")
        blocks.append(_text(inspect.getdoc(importlib.import_module(_TEXT_OF.get(name, name))) or ""))
        for title, value in public_api.public(module):
            blocks.append(f"### {name}.{title}")
            blocks.append(f"```python\n{_signature(title, value)}\n```")
            blocks.append(_text(inspect.getdoc(value) or ""))
    return "\n\n".join(block for block in blocks if block) + "\n"


PAGES = {"api.md": api, "arguments.md": arguments, "environment.md": environment}

if __name__ == "__main__":
    for file, make in PAGES.items():
        (HERE / file).write_text(make(), encoding="utf-8")
