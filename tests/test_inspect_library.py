"""``flash-rocm inspect --backend ck``: the kernels of a built library."""

from __future__ import annotations

import json
import pathlib
import struct
from typing import Any

import pytest
from ck_library import ARCHS, NAMES

from flash_rocm import ck_instances, cli
from flash_rocm.amdgpu.bundles import bundles_of, code_objects
from flash_rocm.inspect import ck_model, model
from flash_rocm.inspect.library import _short_name
from flash_rocm.inspect.report import Case


def bundle(*entries: tuple[str, bytes]) -> bytes:
    """As clang writes it: a table, then the files."""
    offset = 32 + sum(24 + len(target) for target, _ in entries)
    table, files = b"", b""
    for target, code in entries:
        table += struct.pack("<QQQ", offset + len(files), len(code), len(target)) + target.encode()
        files += code
    return b"__CLANG_OFFLOAD_BUNDLE__" + struct.pack("<Q", len(entries)) + table + files


def test_code_objects_of_a_library() -> None:
    first = bundle(
        ("host-x86_64-unknown-linux-gnu-", b""),
        ("hipv4-amdgcn-amd-amdhsa--gfx90a:xnack-", b"one"),
        ("hipv4-amdgcn-amd-amdhsa--gfx942", b"two"),
    )
    library = b"ELF" + first + b"between" + bundle(("hipv4-amdgcn-amd-amdhsa--gfx942", b"three")) + b"end"
    assert list(bundles_of(library)) == [[("gfx90a", b"one"), ("gfx942", b"two")], [("gfx942", b"three")]]
    with pytest.raises(
        ValueError, match="expected an uncompressed fat binary of clang's, got one that starts with b'CCOB"
    ):
        code_objects(lambda offset, size: b"CCOB compressed".ljust(size)[offset : offset + size])


def test_short_names() -> None:
    name = "void flash_ck::(anonymous namespace)::combine_kernel<4, __half>(flash_ck::CombineParams)"
    assert _short_name(name) == "combine_kernel<4, __half>"
    assert _short_name("void f::delta_kernel(f::P)") == "delta_kernel"
    assert _short_name("plain") == "plain"


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        ((), "expected a built library, found none. Hint: FLASH_ROCM_BUILD=ck FLASH_ROCM_ARCHS=\"gfx942\" pip"),
        (("--mask", "causal"), "expected without --object and --mask"),
        (("--object", "x.co"), "expected without --object and --mask"),
        (("--model",), "expected a built library, found none"),
    ),
    ids=str,
)  # fmt: skip
def test_errors(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    monkeypatch.setenv("FLASH_ROCM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ck_instances, "built", lambda: None)
    assert cli.main(["inspect", "--backend", "ck", "--arch", "gfx942", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.ck
def test_every_instance_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """By its own name, with what the compiler says of it."""

    def inspect(*arguments: str) -> list[dict[str, Any]]:
        assert cli.main(["inspect", "--backend", "ck", "--format", "json", *arguments]) == 0
        reports: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["reports"]
        return reports

    reports = inspect("--arch", "amd", "--kernel", "forward_*,backward_*,splitkv_*")
    assert {(report["case"]["arch"], report["case"]["kernel"]) for report in reports} == {
        (arch, name) for arch in ARCHS for name in NAMES
    }
    for report in reports:
        case, resources = report["case"], report["resources"]
        assert 0 < resources["vgprs"] <= 512 and 0 < resources["lds_bytes"] <= 65536 and report["waves_per_simd"]
        assert f"_d{case['headdim']}" in case["kernel"] and f"_{case['dtype']}_" in case["kernel"]
    # Loads in inline assembly, which the compiler cannot wait for, would reach a spilled register too late.
    assert all(report["resources"]["vgpr_spills"] == 0 == report["loop_scratch"] for report in reports)
    one = inspect("--arch", "gfx942", "--kernel", "combine_kernel*")
    assert one and all(report["case"]["kernel"].startswith("combine_kernel<") for report in one)
    only = inspect("--arch", "gfx942", "--dtype", "fp16", "--headdim", "64", "--kernel", "forward*")
    assert [report["case"]["kernel"] for report in only] == ["forward_fp16_d64_dense"]
    assert cli.main(["inspect", "--backend", "ck", "--arch", "gfx1100"]) == 2
    assert "expected arguments that fit a kernel of" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHS)
def test_the_call_that_is_modelled_takes_the_instance(arch: str) -> None:
    shipped = ck_instances.shipped(arch)
    for number, instance in enumerate(shipped.instances):
        problem = ck_model.problem_of(instance)
        found = [shipped.find(kernel, problem, arch) for kernel in ck_instances.kernels_of(problem)]
        # Tiles of 16 keys are for small pages, which caches of the model do not have: another instance is the first.
        is_for_small_pages = instance.kernel == "splitkv" and instance.tile[1] < 64
        assert None not in found and (number in found) != is_for_small_pages, instance.name


def test_one_name_for_each_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As instances that were compiled on demand have."""
    instances = [
        next(each for each in ck_instances.shipped(arch).instances if each.name == "forward_fp16_d64_dense")
        for arch in ARCHS
    ]
    modules = tuple(pathlib.Path(arch) for arch in ARCHS)
    library = ck_instances.CkLibrary(pathlib.Path(), ARCHS, tuple(instances), modules)
    monkeypatch.setattr(ck_instances, "built", lambda: library)
    monkeypatch.setattr(ck_model, "_compared", lambda case, kernel, problem: (case.arch, kernel))
    cases = [Case(arch, "forward_fp16_d64_dense", "fp16", 64) for arch in ARCHS]
    assert ck_model.compare(cases) == [(arch, "forward") for arch in ARCHS]


@pytest.mark.ck
def test_instances_are_modelled_beside_triton(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ck_model, "SEQLEN", 128)
    monkeypatch.setattr(ck_model, "CACHED", dict.fromkeys(ck_model.CACHED, model.CachedCall(256, 1, 2, 1)))
    names = ("forward_bf16_d128_dense_masked", "backward_bf16_d128_dense_masked", "splitkv_bf16_d128")
    call = ["inspect", "--backend", "ck", "--arch", "gfx942", "--kernel", ",".join(names), "--model"]
    assert cli.main([*call, "--format", "json"]) == 0
    rows = {row["kernel"]: row for row in json.loads(capsys.readouterr().out)["modelled"]}
    others = ("triton forward", "triton backward_dq", "triton backward_dkdv", "triton cache")
    assert set(rows) == {
        *names,
        *(f"{other} for {name}" for other, name in zip(others, (names[0], *[names[1]] * 2, names[2]), strict=True)),
    }
    assert all(row["tflops"] > 0 and row["waves_per_simd"] > 0 for row in rows.values())
    # Half of the scores are hidden from a causal call: two products of 128 for each of the others.
    flop = {name: rows[name]["flop"] for name in names}
    assert flop[names[0]] == 4 * 128 * (128 * 129 // 2) and flop[names[1]] == 2.5 * flop[names[0]]
    assert flop[names[2]] == 4 * 128 * 2 * 256
    assert cli.main(call[:-2] + [names[2], "--model"]) == 0
    out = capsys.readouterr().out
    assert "uncalibrated" in out and f"gfx942 {names[2]}: ck " in out
    assert cli.main(["inspect", "--backend", "ck", "--arch", "gfx942", "--kernel", "combine*", "--model"]) == 2
    assert "--model: expected an instance that a call takes, got none" in capsys.readouterr().err
