"""``flash-rocm bench``: what it counts, what it refuses to report, what it writes.  Nothing here judges a time."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_rocm import timing
from flash_rocm.bench import check, cli, grid, memory, overhead, peers, plot, prepared, shapes, tables
from flash_rocm.bench.ratios import summary
from flash_rocm.bench.report import Report

CPU = torch.device("cpu")
TINY = shapes.Shape(batch=2, seqlen=40, nheads=3, headdim=16, causal=True, dtype="fp32")
TINY_ARGS = ["--tokens", "64", "--width", "32", "--seqlen", "16,32", "--headdim", "16", "--rounds", "2"]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(["--device", "cpu", *arguments])


def run_tiny(peer_list: list[peers.Peer], directions: tuple[str, ...] = shapes.DIRECTIONS) -> list[grid.Result]:
    return list(grid.run_shape(TINY, peer_list, directions, 2, CPU, lambda text: None))


def correct(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class FakePeer(peers.Peer):
    def __init__(self, name: str, function: Callable[..., torch.Tensor]) -> None:
        super().__init__(name)
        self.function = function

    def attention(self, shape: shapes.Shape, device: torch.device) -> prepared.Attention:
        return self.function


def made_up(peer: str, tflops: float, shape: shapes.Shape, direction: str = "forward") -> grid.Result:
    seconds = shape.flops(direction) / tflops / 1e12
    return grid.Result(shape, direction, peer, "bshd", "ok", iterations=3, seconds=(seconds, seconds, 9 * seconds))


# --------------------------------------------------------------------------------------------------
# Counting


def test_flops() -> None:
    full = shapes.Shape(2, 1024, 16, 64, causal=False)
    assert full.flops("forward") == 4 * 2 * 16 * 1024 * 1024 * 64
    assert full.flops("backward") == 2.5 * full.flops("forward")
    assert full.flops("both") == full.flops("forward") + full.flops("backward")
    causal = shapes.Shape(2, 1024, 16, 64, causal=True)
    assert [causal.flops(d) * 2 for d in shapes.DIRECTIONS] == [full.flops(d) for d in shapes.DIRECTIONS]


def test_means() -> None:
    assert timing.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert timing.median([3.0, 1.0, 2.0]) == 2.0
    assert timing.median([4.0, 1.0, 2.0, 3.0]) == 2.5
    for function, values in ((timing.geometric_mean, []), (timing.geometric_mean, [1.0, 0.0]), (timing.median, [])):
        with pytest.raises(ValueError, match="expected"):
            function(values)


@pytest.mark.parametrize(
    "text, lengths",
    [("512", (512,)), ("512,4k", (512, 4096)), ("512..4k", (512, 1024, 2048, 4096)), ("1k,1024..2k", (1024, 2048))],
)
def test_lengths(text: str, lengths: tuple[int, ...]) -> None:
    assert shapes.parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "k", "-1", "4k..1k", "x..2"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        shapes.parse_lengths(text)


def test_grid_shapes() -> None:
    preset = shapes.GRID
    todo = shapes.build_shapes(preset.tokens, preset.width, preset.seqlens, preset.headdims, shapes.MASKS, "bf16")
    assert len(todo) == 36
    assert {(s.batch * s.seqlen, s.nheads * s.headdim) for s in todo} == {(16384, 2048)}
    assert {s.seqlen for s in todo} == {512, 1024, 2048, 4096, 8192, 16384}


def test_data_is_random_and_the_same_each_time() -> None:
    first, second = shapes.make_data(TINY, CPU), shapes.make_data(TINY, CPU)
    for x, again in zip(first, second, strict=True):
        assert torch.equal(x, again)
        assert abs(float(x.std()) - 1.0) < 0.1
    assert not torch.equal(first.q, first.k)


# --------------------------------------------------------------------------------------------------
# Checking


@pytest.mark.parametrize("causal", [True, False])
def test_oracle_matches_autograd(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_CHUNK_BYTES", 2 * 40 * 8 * 7)  # chunks of 7 rows
    q, k, v, dout = (torch.randn(2, 40, 16, dtype=torch.float64) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    wanted = [out, *torch.autograd.grad(out, (q, k, v), dout)]
    values = check.attention(q.detach(), k.detach(), v.detach(), dout, causal, torch.float64)
    for name, value in zip(("out", "dq", "dk", "dv"), wanted, strict=True):
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-10, atol=1e-10)


def test_verdict_finds_every_kind_of_wrong_result() -> None:
    data = shapes.make_data(TINY, CPU)
    expected = check.Expected(TINY, data, training=False)
    out = correct(data.q, data.k, data.v)
    assert expected.verdict({"out": out}).problem == ""
    assert "is not finite" in expected.verdict({"out": out * float("nan")}).problem
    assert "float16" in expected.verdict({"out": out.half()}).problem
    assert "expected" in expected.verdict({"out": out.transpose(1, 2)}).problem
    assert "off by" in expected.verdict({"out": out + 1e-3}).problem
    last = out.clone()
    last[-1, -1, -1, -1] += 1.0  # the last element of the last head
    assert "off by" in expected.verdict({"out": last}).problem


def test_wrong_forward_gets_no_speed() -> None:
    fakes: list[peers.Peer] = [
        FakePeer("right", correct),
        FakePeer("wrong", lambda q, k, v: correct(q, k, v) * 1.01),
        FakePeer("unmasked", lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    ]
    results = run_tiny(fakes)
    assert len(results) == 9
    for result in results:
        assert (result.status, result.tflops is not None) == (
            "ok" if result.peer == "right" else "wrong",
            result.peer == "right",
        )
        assert len(result.seconds) == (2 if result.peer == "right" else 0)
    text = "\n".join(tables.speed_tables(results))
    assert "wrong wrong (3 cells" in text and "off by" in text


def test_wrong_gradient_gets_no_speed() -> None:
    def no_gradient_of_k(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return correct(q, 0.5 * k + 0.5 * k.detach(), v)

    fake = FakePeer("fake", no_gradient_of_k)
    assert {result.status for result in run_tiny([fake])} == {"wrong"}
    assert "dk" in run_tiny([fake])[0].reason
    # Its forward is right, and alone it may be timed.
    assert [result.status for result in run_tiny([fake], ("forward",))] == ["ok"]


def test_raising_peer_is_reported() -> None:
    def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No available kernel.\nAborting execution.")

    results = run_tiny([FakePeer("fake", refuse), FakePeer("right", correct)], ("forward",))
    assert [(r.peer, r.status, r.reason) for r in results] == [
        ("fake", "error", "RuntimeError: No available kernel."),
        ("right", "ok", ""),
    ]


def test_peer_that_raises_while_timed_has_no_speed() -> None:
    calls = {"n": 0}

    def tire() -> None:
        calls["n"] += 1
        if calls["n"] > 100:
            raise RuntimeError("tired")

    clock = timing.Clock(CPU)
    clock.target = 1e-5
    entries = [timing.Entry("tires", tire), timing.Entry("steady", lambda: sum(range(1000)))]
    timing.interleave(entries, 50, clock, lambda name: None)
    assert entries[0].error == "RuntimeError: tired" and not entries[0].seconds
    assert not entries[1].error and len(entries[1].seconds) == 50


def test_rounds_are_interleaved_and_rotate() -> None:
    order: list[str] = []
    clock = timing.Clock(CPU)
    clock.target = 1e-6
    entries = [timing.Entry(name, lambda: None) for name in "abc"]
    timing.interleave(entries, 3, clock, order.append)
    assert "".join(order) == "abcbcacab"


# --------------------------------------------------------------------------------------------------
# Peers


def test_backward_of_a_kept_graph_and_release() -> None:
    data = shapes.make_data(TINY, CPU)
    ready = prepared.Prepared(correct, data, "bshd", contextlib.nullcontext)
    with ready.session("backward"):
        first, second, fused = ready.backward(), ready.backward(), ready.both()
    for x, y, z in zip(first, second, fused, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)
    ready.release()
    with ready.session("forward"):
        assert not ready.forward().requires_grad


def test_views_are_not_copies() -> None:
    data = shapes.make_data(TINY, CPU)
    seen: list[torch.Tensor] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(q)
        return q

    prepared.Prepared(spy, data, "bhsd", contextlib.nullcontext).forward()
    assert seen[0].shape == (TINY.batch, TINY.nheads, TINY.seqlen, TINY.headdim)
    assert seen[0].data_ptr() == data.q.data_ptr()


def test_standard_attention_is_skipped_when_its_scores_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "free_bytes", lambda device: TINY.score_count() * 4 * 5)
    peer = peers.all_peers()["sdpa-math"]
    assert peer.shape_reason(TINY, CPU, training=False) is None
    assert "score matrices" in (peer.shape_reason(TINY, CPU, training=True) or "")
    assert {result.status for result in run_tiny([peer])} == {"skipped"}


def test_reduced_math_setting_is_put_back() -> None:
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with peers.all_peers()["sdpa-math-lowp"].session():
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == before


@pytest.mark.parametrize("result", ["out", "pair"])
def test_flash_attn_releases_return_out_or_a_tuple(result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(q: Any, k: Any, v: Any, causal: bool) -> Any:
        assert causal
        return q if result == "out" else (q, k)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    peer = peers.all_peers()["flash-attn-3"]
    assert peer.available_reason(torch.device("cuda")) is None
    q, k, v = torch.ones(1), torch.ones(2), torch.ones(3)
    assert peer.attention(TINY, CPU)(q, k, v) is q


def test_missing_peers_say_why() -> None:
    for name, peer in peers.all_peers().items():
        reason = peer.available_reason(CPU)
        assert (reason is None) == (name in ("flash_rocm", "flash_rocm-reference", *peers.STANDARD, peers.BASELINE)), (
            name
        )
    reason = peers.FlashAttention("fake", "no_such_module").available_reason(torch.device("cuda"))
    assert reason is not None and "No module named" in reason


def test_default_peers_do_not_run_one_back_end_twice() -> None:
    chosen, refused = peers.choose(None, CPU, TINY, True)
    assert [peer.name for peer in chosen] == ["flash_rocm", "sdpa-math", "sdpa-flash"]
    assert refused["flash_rocm-reference"] == "is what flash_rocm runs here"
    chosen, _ = peers.choose(("flash_rocm-reference",), CPU, TINY, True)
    assert [result.note for peer in chosen for result in run_tiny([peer], ("forward",))] == ["back end reference"]


# --------------------------------------------------------------------------------------------------
# Reports


def test_table_aligns_columns() -> None:
    assert tables.table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


def test_ratios_and_summary() -> None:
    small = [shapes.Shape(32, 512, 32, 64, True), shapes.Shape(16, 1024, 32, 64, True)]
    wide = shapes.Shape(32, 512, 8, 256, False)
    results = [made_up("flash_rocm", tflops, shape) for tflops, shape in ((400, small[0]), (200, small[1]), (90, wide))]
    results += [made_up("sdpa-flash", 100, shape) for shape in (*small, wide)]
    results += [made_up("sdpa-cudnn", 800, small[0])]
    records = {(r["peer"], tuple(r["headdims"]), r["mask"]): r for r in summary(results)}
    overall = records["sdpa-flash", (64, 256), "any"]
    assert overall["geomean"] == pytest.approx((4 * 2 * 0.9) ** (1 / 3))
    assert (overall["lowest"], overall["lowest_shape"]) == (pytest.approx(0.9), str(wide))
    assert records["sdpa-flash", (64,), "any"]["geomean"] == pytest.approx(8**0.5)
    assert records["sdpa-flash", (256,), "full"]["points"] == 1
    assert records["sdpa-cudnn", (64,), "any"]["geomean"] == pytest.approx(0.5)
    text = "\n".join(tables.speed_tables(results))
    assert "forward, headdim 64, causal" in text and "4.00x" in text and "2.83x" in text
    assert tables.summary_text(results).splitlines()[2].startswith("sdpa-flash")


def test_command_on_cpu_writes_json(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert cli.run(parse(*TINY_ARGS, "--json", str(path))) == 0
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    assert set(record) == {"schema", "environment", "settings", "unavailable", "speed", "memory", "overhead", "summary"}
    assert {"date", "torch", "triton", "device", "arch", "flash_rocm", "python"} <= set(record["environment"])
    assert len(record["speed"]) == 2 * 2 * 3 * 3  # lengths, masks, directions, peers
    for result in record["speed"]:
        assert result["status"] == "ok", result
        assert len(result["seconds"]) == 2 and result["tflops"] > 0
        assert set(result["errors"]) == {"out", "dq", "dk", "dv"}
    assert {r["peer"] for r in record["summary"]} == {"sdpa-math", "sdpa-flash"}
    for title in ("forward, headdim 16, causal", "both, headdim 16, full", "speed ratios"):
        assert title in printed
    report = Report.from_json(record)
    assert json.loads(json.dumps(report.to_json())) == record
    assert report.text() in printed
    with pytest.raises(ValueError, match="schema"):
        Report.from_json({})


def test_memory_and_overhead_on_cpu(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ("--memory", "--overhead", "--seqlen", "64,128", "--rounds", "1", "--json", str(path))
    assert cli.run(parse(*arguments)) == 0
    printed = capsys.readouterr().out
    assert "peak memory in bytes" in printed and "for 2x the length" in printed
    assert "host overhead per call" in printed and "flash_rocm / sdpa-flash" in printed
    report = Report.from_json(json.loads(path.read_text()))
    assert not report.speed
    assert {(p.shape.seqlen, p.peer) for p in report.memory if p.peak_bytes} == {
        (seqlen, peer) for seqlen in (64, 128) for peer in ("flash_rocm", "sdpa-math", "sdpa-math-lowp")
    }
    assert {(o.mode, o.peer, len(o.seconds)) for o in report.overhead} == {
        (mode, peer, 1) for mode in overhead.MODES for peer in ("flash_rocm", "sdpa-flash")
    }


@pytest.mark.unpoisoned
def test_peak_counts_at_least_the_results_and_standard_attention_its_scores() -> None:
    shape = shapes.Shape(1, 256, 2, 16, False, "fp32")
    data = shapes.make_data(shape, CPU)
    peak = memory.peak_bytes(peers.all_peers()["sdpa-math"].prepare(shape, data), CPU)
    assert peak >= 4 * data.q.nbytes + shape.score_count() * 4
    assert peak < 20 * shape.score_count() * 4


def test_growth_starts_at_4k() -> None:
    def peak(seqlen: int, size: int | None) -> memory.Peak:
        return memory.Peak(shapes.Shape(1, seqlen, 16, 64, False), "x", 1, size, "ok")

    peaks = [peak(512, 900), peak(4096, 1000), peak(65536, 16000), peak(131072, None)]
    assert memory.growth(peaks, "x") == (4096, 65536, 16.0)
    assert memory.growth(peaks[:2], "x") == (512, 4096, pytest.approx(1000 / 900))
    assert memory.growth(peaks[:1], "x") is None


def test_plot(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    assert cli.run(parse(*TINY_ARGS, "--direction", "forward", "--plot", str(path))) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_shows_every_point() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    todo = [shapes.Shape(32, 512, 32, 64, causal) for causal in (True, False)]
    results = [made_up("flash_rocm", 100, todo[0]), made_up("flash_rocm", 700, todo[1])]
    figure = plot._draw_speed(Report({}, {}, {}, results), figures.Figure)
    for axis in figure.axes:
        assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 700


def test_without_matplotlib_the_rest_is_done(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "available", lambda: False)
    arguments = (*TINY_ARGS, "--direction", "forward", "--plot", str(tmp_path / "out.png"))
    assert cli.run(parse(*arguments)) == 0
    captured = capsys.readouterr()
    assert "matplotlib is not installed" in captured.err and "speed ratios" in captured.out


def test_a_wrong_flash_rocm_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = peers.all_peers()
    monkeypatch.setattr(known["flash_rocm"], "attention", lambda shape, device: lambda q, k, v: v * 1.5)
    monkeypatch.setattr(peers, "all_peers", lambda: known)
    assert cli.run(parse(*TINY_ARGS, "--direction", "forward")) == 1
    printed = capsys.readouterr().out
    assert "flash_rocm wrong" in printed and "no ratios" in printed


def test_interrupted_run_keeps_what_it_has(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, seen = grid.run_shape, []

    def stop_at_the_second(shape: shapes.Shape, *rest: Any) -> Any:
        seen.append(shape)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return whole(shape, *rest)

    monkeypatch.setattr(grid, "run_shape", stop_at_the_second)
    path = tmp_path / "out.json"
    assert cli.run(parse(*TINY_ARGS, "--json", str(path))) == 0
    assert "interrupted" in capsys.readouterr().err
    assert {result.shape for result in Report.from_json(json.loads(path.read_text())).speed} == {seen[0]}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--headdim", "48"), "--headdim: expected divisors"),
        (("--seqlen", "64k", "--tokens", "1k"), "--seqlen: expected at most"),
        (("--json", "/no/such/folder/out.json"), "existing folder"),
        (("--device", "nowhere"), "--device: expected"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(parse(*arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--peers", "nobody"), ("--mask", "half"), ("--rounds", "0")])
def test_unknown_names(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert "expected" in capsys.readouterr().err


def test_imports_without_triton_and_matplotlib() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'matplotlib', 'tqdm'): sys.modules[name] = None\n"
        "import argparse, flash_rocm.bench.cli as cli\n"
        "cli.add_arguments(argparse.ArgumentParser())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
