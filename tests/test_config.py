"""Kernel configs: what files and variables may say, what they are told when they are wrong, which entry is taken."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from config_files import ENTRY, FACTS, OPTIONS, write

from flash_rocm import backends, config, config_schema, runtime
from flash_rocm.amdgpu.chips import CHIPS, NVIDIA_SHARED
from flash_rocm.config_schema import ConfigError, Facts, KernelConfig
from flash_rocm.runtime import ConfigSource
from flash_rocm.testing import make_problem

CONFIGS = pathlib.Path(config.__file__).parent.parent / "configs"
SCHEMA = json.loads((CONFIGS / "schema.json").read_text())
ARCHS = sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem != "schema")
CK_ENTRY = {
    "kernel": "forward",
    "dtype": ["bfloat16"],
    "tile": [128, 128, 32, 128, 32, 128],
    "warps": [4, 1, 1],
    "warp_tile": [32, 32, 16],
    "pipeline": "qr_async",
    "occupancy": 2,
    "variants": [[], ["masked", "varlen"]],
    "provenance": {"how": "first choice"},
}
CK_BACKWARD = CK_ENTRY | {
    "kernel": "backward",
    "tile": [16, 128, 64, 16, 32, 16, 32, 64, 32],
    "warps": [1, 4, 1, 4, 1, 1, 1, 4, 1],
    "warp_tile": [16, 16, 32, 16, 16, 16],
    "pipeline": "kr_ktr_vr",
    "variants": [["deterministic"]],
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing parsed, warned of or logged before."""
    for cached in (config.arch_configs, config._overrides, runtime.warn_once, runtime.log_once):
        cached.cache_clear()
    yield
    config.arch_configs.cache_clear()
    config._overrides.cache_clear()


def taken(source: ConfigSource | None, kernel: str = "forward", **facts: Any) -> KernelConfig:
    return config.lookup("gfx942", kernel, dataclasses.replace(FACTS, **facts), source)


# --------------------------------------------------------------------------------------------------
# What is shipped


def test_every_arch_has_a_file() -> None:
    wanted = {"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1151", "gfx1200", "gfx1201", "sm80", "sm90"}
    assert wanted | set(backends.TRITON_AMD_ARCHS) | {"generic", "cpu"} <= set(ARCHS)
    assert set(backends.TRITON_AMD_ARCHS) == set(CHIPS)
    assert set(NVIDIA_SHARED) == {arch for arch in ARCHS if arch.startswith("sm")}


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_files_serve_every_problem(arch: str) -> None:
    for kernel in config_schema.KERNELS:
        for dtype in config_schema.DTYPES:
            for headdim in (16, 32, 64, 128, 256, 512):
                for masked in (False, True):
                    config.lookup(arch, kernel, Facts(dtype, headdim, 1 << 20, masked, masked, True))


@pytest.mark.parametrize("arch", ARCHS)
def test_one_entry_per_line(arch: str) -> None:
    text = (CONFIGS / f"{arch}.json").read_text()
    raw = json.loads(text)
    lines = [line.strip().rstrip(",") for line in text.splitlines() if '"kernel"' in line]
    assert lines == [json.dumps(entry) for section in ("triton", "ck") for entry in raw.get(section, [])]


def test_an_unknown_arch_takes_generic_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flash_rocm"):
        for _ in range(3):
            found = config.lookup("gfx1250", "forward", FACTS)
    assert found.source.startswith("generic.json triton[")
    assert [record.message for record in caplog.records] == ["no kernel configs for gfx1250: using generic.json"]


def test_schema_json_documents_what_is_checked() -> None:
    entry, ck = SCHEMA["$defs"]["entry"], SCHEMA["$defs"]["ck"]
    match, limits, provenance = (SCHEMA["$defs"][name] for name in ("match", "limits", "provenance"))
    options = entry["properties"]["options"]
    objects = {
        "file": (SCHEMA, config_schema.FILE_KEYS, {"arch"}),
        "entry": (entry, config_schema.ENTRY_KEYS, {"kernel", "options", "provenance"}),
        "options": (options, config_schema.OPTIONS, set(config_schema.REQUIRED_OPTIONS)),
        "match": (match, config_schema.MATCH_KEYS, set()),
        "limits": (limits, config_schema.LIMITS, set()),
        "provenance": (provenance, config_schema.PROVENANCE_KEYS, {"how"}),
        "ck": (ck, config_schema.CK_KEYS, set(config_schema.CK_REQUIRED)),
    }
    for name, (documented, keys, required) in objects.items():
        assert set(documented["properties"]) == set(keys), name
        assert set(documented.get("required", ())) == required, name
        assert documented["additionalProperties"] is False, name
    assert {name: tuple(rule["enum"]) for name, rule in options["properties"].items()} == config_schema.OPTIONS
    unused = {name: {"properties": {name: {"const": config_schema.OPTIONS[name][0]}}} for name in config_schema.REACH}
    assert entry["allOf"] == [
        {
            "if": {"properties": {"kernel": {"enum": [x for x in config_schema.KERNELS if x not in reach.kernels]}}},
            "then": {"properties": {"options": unused[name]}},
        }
        for name, reach in config_schema.REACH.items()
        if reach.kernels != config_schema.KERNELS
    ]
    assert SCHEMA["allOf"] == [
        {
            "if": {"properties": {"arch": {"pattern": f"^({'|'.join(reach.archs)})"}}},
            "else": {"properties": {"triton": {"items": {"properties": {"options": unused[name]}}}}},
        }
        for name, reach in config_schema.REACH.items()
        if reach.archs != ("",)
    ]
    choices = {
        config_schema.KERNELS: entry["properties"]["kernel"],
        config_schema.DTYPES: match["properties"]["dtype"]["items"],
        config_schema.HOW: provenance["properties"]["how"],
        config_schema.CK_KERNELS: ck["properties"]["kernel"],
        config_schema.CK_DTYPES: ck["properties"]["dtype"]["items"],
        config_schema.CK_VARIANTS: ck["properties"]["variants"]["items"]["items"],
        config_schema.CK_SCHEDULERS: ck["properties"]["scheduler"],
        tuple(dict.fromkeys(itertools.chain(*config_schema.CK_PIPELINES.values()))): ck["properties"]["pipeline"],
    }
    for kernel, rule in zip(config_schema.CK_KERNELS, ck["allOf"], strict=True):
        assert rule["if"] == {"properties": {"kernel": {"const": kernel}}}
        pipelines = {"pipeline": {"enum": list(config_schema.CK_PIPELINES[kernel])}}
        lengths = {key: {"minItems": n, "maxItems": n} for key, n in config_schema.CK_LENGTHS[kernel].items()}
        assert rule["then"]["properties"] == lengths | pipelines
    for allowed, documented in choices.items():
        assert tuple(documented["enum"]) == allowed
    minima = {name: rule.get("minimum", rule.get("exclusiveMinimum")) for name, rule in limits["properties"].items()}
    assert minima == config_schema.LIMITS
    assert {name for name, rule in match["properties"].items() if rule["type"] == "boolean"} == set(config_schema.FLAGS)
    dataclass_fields = {field.name for field in dataclasses.fields(config_schema.Match)}
    assert dataclass_fields == set(config_schema.MATCH_KEYS)
    assert {field.name for field in dataclasses.fields(config_schema.Limits)} == set(config_schema.LIMITS)
    assert set(config_schema.OPTIONS) < {field.name for field in dataclasses.fields(KernelConfig)}


# --------------------------------------------------------------------------------------------------
# Which entry is taken


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        ({"dtype": ["float16", "bfloat16"]}, {"dtype": "float16"}, {"dtype": "float32"}),
        ({"headdim": [64, 128]}, {"headdim": 64}, {"headdim": 256}),
        ({"seqlen": [1, 1024]}, {"seqlen": 1024}, {"seqlen": 2048}),
        ({"shorter": [64, 1024]}, {"shorter": 64}, {"shorter": 32}),
        ({"causal": True}, {"causal": True, "masked": True}, {"masked": True}),
        ({"masked": False}, {"varlen": True}, {"masked": True}),
        ({"varlen": True}, {"varlen": True}, {"varlen": False}),
        ({"page_size": [1, 16]}, {"page_size": 16}, {"page_size": 0}),
        ({"page_size": [0, 0]}, {"page_size": 0}, {"page_size": 1}),
    ],
)
def test_match_rules(
    rule: dict[str, Any], inside: dict[str, Any], outside: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    source = write(tmp_path, triton=[ENTRY | {"match": rule}, ENTRY])
    assert taken(source, **inside).source == f"{tmp_path}/gfx942.json triton[0]"
    assert taken(source, **outside).source == f"{tmp_path}/gfx942.json triton[1]"


def test_facts_of_a_problem() -> None:
    from flash_rocm._triton.plan import facts_of

    fields = dict(dtype=torch.float16, headdim=96, headdim_v=40, seqlen_q=5, seqlen_k=1025, nheads=2, batch=1)
    assert facts_of(make_problem(**fields)) == Facts("float16", 128, 2048, False, False, False, shorter=8)
    window = facts_of(make_problem(**fields, window_left=3, window_right=0, varlen=True))
    assert window == Facts("float16", 128, 2048, causal=False, masked=True, varlen=True, shorter=8)
    assert facts_of(make_problem(**fields | {"seqlen_k": 1024}, window_right=0)).causal
    empty = facts_of(make_problem(**fields | {"seqlen_q": 0, "seqlen_k": 0}))
    assert (empty.seqlen, empty.shorter) == (1, 1)


def test_inherited_files_are_used_whole(tmp_path: pathlib.Path) -> None:
    write(tmp_path, inherits="gfx1199")
    source = write(tmp_path, "gfx1199")
    assert taken(source).source == f"{tmp_path}/gfx1199.json triton[0]"
    with pytest.raises(ConfigError, match=r"gfx1199.json: expected an entry that matches kernel=probs"):
        taken(source, "probs")


def test_a_folder_replaces_files_one_by_one(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, "gfx1199")
    assert taken(source).source.startswith("gfx942.json triton[")


def test_ck_section(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, ck=[CK_ENTRY | {"scheduler": "iterative-minreg"}, CK_BACKWARD])
    forward, backward = config.arch_configs("gfx942", source.folder).ck
    assert (forward.scheduler, backward.scheduler) == ("iterative-minreg", "default")
    assert (forward.tile, forward.pipeline, forward.occupancy) == ((128, 128, 32, 128, 32, 128), "qr_async", 2)
    assert (forward.dtypes, forward.variants) == (("bfloat16",), ((), ("varlen", "masked")))
    assert (forward.headdims, backward.headdims) == ((128, 128), (64, 32))
    assert backward.source == f"{tmp_path}/gfx942.json ck[1]"


def test_limits_and_provenance_reach_the_config(tmp_path: pathlib.Path) -> None:
    provenance = {"how": "measured", "date": "2026-11-21", "compiler": "Triton 3.6", "note": "H200"}
    found = taken(
        write(tmp_path, triton=[ENTRY | {"limits": {"R": 0.85, "waves_per_simd": 2}, "provenance": provenance}])
    )
    assert found.limits == config_schema.Limits(vgpr_spills=0, waves_per_simd=2, R=0.85)
    assert "triton[0]; measured, 2026-11-21, Triton 3.6, H200)" in found.describe()


# --------------------------------------------------------------------------------------------------
# Wrong files


def changed(section: str, **values: Any) -> dict[str, Any]:
    """A file whose one entry has other values in a section."""
    return {"triton": [ENTRY | {section: {**ENTRY.get(section, {}), **values}}]}  # type: ignore[dict-item]


WRONG = {
    "unknown key": ({"speed": 1}, "gfx942.json.speed: expected one of the keys arch, inherits, triton, ck"),
    "other arch": ({"arch": "gfx90a"}, "gfx942.json.arch: expected 'gfx942', the file's name, got 'gfx90a'"),
    "section": ({"triton": {}}, "gfx942.json.triton: expected a list of entries, got {}"),
    "inherits and more": ({"inherits": "gfx90a", "ck": []}, "gfx942.json.ck: expected one of the keys arch, inherits"),
    "inherits a number": ({"inherits": 3}, "gfx942.json.inherits: expected the name of an arch, got 3"),
    "inherits itself": (
        {"inherits": "gfx942"},
        "gfx942.json.inherits: expected an arch whose file exists and does not",
    ),
    "inherits nothing": ({"inherits": "gfx000"}, "gfx942.json.inherits: expected an arch whose file exists"),
    "entry": ({"triton": [3]}, "gfx942.json: triton[0]: expected an object, got 3"),
    "kernel": ({"triton": [ENTRY | {"kernel": "sideways"}]}, "triton[0].kernel: expected one of forward, backward_dq"),
    "no kernel": ({"triton": [{"options": {}}]}, "triton[0].kernel: expected a value, got none"),
    "no provenance": (
        {"triton": [{"kernel": "probs", "options": {}}]},
        "triton[0].provenance: expected a value, got none",
    ),
    "entry key": ({"triton": [ENTRY, ENTRY | {"x": 1}]}, "triton[1].x: expected one of the keys kernel, match"),
    "option": (changed("options", BLOCK_X=32), "triton[0].options.BLOCK_X: expected one of the keys BLOCK_M"),
    "no power of two": (
        changed("options", BLOCK_M=48),
        "options.BLOCK_M: expected one of 16, 32, 64, 128, 192, 256, 512, got 48",
    ),
    "a text": (changed("options", num_warps="4"), "options.num_warps: expected one of 1, 2, 4, 8, 16, got '4'"),
    "a bool": (changed("options", num_stages=True), "options.num_stages: expected one of 1, 2, 3"),
    "unused": (
        {"triton": [ENTRY | {"kernel": "probs", "options": OPTIONS | {"BLOCK_K": 32}}]},
        "triton[0].options.BLOCK_K: expected 0 or no value, probs does not use it, got 32",
    ),
    "unused and a text": (
        {"triton": [ENTRY | {"kernel": "probs", "options": OPTIONS | {"BLOCK_K": "32"}}]},
        "triton[0].options.BLOCK_K: expected one of 0, 16, 32, 64, 128, 256, got '32'",
    ),
    "no option": ({"triton": [ENTRY | {"options": {"BLOCK_M": 64}}]}, "options.BLOCK_N: expected a value, got none"),
    "match key": (
        changed("match", heads=3),
        "match.heads: expected one of the keys dtype, headdim, seqlen, shorter, page_size, ",
    ),
    "dtype": (changed("match", dtype=["fp8"]), "match.dtype: expected one of float16, bfloat16, float32, got 'fp8'"),
    "dtypes": (changed("match", dtype="float16"), "match.dtype: expected a list of float16, bfloat16, float32"),
    "headdim": (changed("match", headdim=128), "match.headdim: expected [min, max], got 128"),
    "headdim order": (changed("match", headdim=[128, 64]), "match.headdim: expected [min, max] with min <= max"),
    "seqlen": (changed("match", seqlen=[0, 64]), "match.seqlen[0]: expected a whole number >= 1, got 0"),
    "flag": (changed("match", causal=1), "match.causal: expected true or false, got 1"),
    "limit": (changed("limits", spills=3), "limits.spills: expected one of the keys vgpr_spills, loop_scratch"),
    "spills": (changed("limits", vgpr_spills=-1), "limits.vgpr_spills: expected a whole number >= 0, got -1"),
    "R": (changed("limits", R="low"), "limits.R: expected a number > 0, got 'low'"),
    "how": (changed("provenance", how="guess"), "provenance.how: expected one of measured, model, static model"),
    "date": (changed("provenance", date="today"), "provenance.date: expected YYYY-MM-DD, got 'today'"),
    "measured": (changed("provenance", how="measured"), "provenance.date: expected a value, got none"),
    "ck tile": ({"ck": [CK_ENTRY | {"tile": [1, 2]}]}, "ck[0].tile: expected a list of 6 numbers, got [1, 2]"),
    "ck pipeline": (
        {"ck": [CK_ENTRY | {"pipeline": "fast"}]},
        "ck[0].pipeline: expected one of qr, qr_async, got 'fast'",
    ),
    "ck pipeline of the other kernel": (
        {"ck": [CK_BACKWARD | {"pipeline": "qr"}]},
        "ck[0].pipeline: expected one of kr_ktr_vr, got 'qr'",
    ),
    "ck dtype": ({"ck": [CK_ENTRY | {"dtype": ["float32"]}]}, "ck[0].dtype[0]: expected one of float16, bfloat16"),
    "ck no variant": ({"ck": [CK_ENTRY | {"variants": []}]}, "ck[0]: expected at least one dtype and one variant"),
    "ck variant twice": (
        {"ck": [CK_ENTRY | {"variants": [["varlen", "varlen"]]}]},
        "ck[0].variants[0]: expected a list of varlen, masked, alibi, softcap, deterministic, each once",
    ),
    "ck variant of the other kernel": (
        {"ck": [CK_BACKWARD | {"variants": [["softcap"]]}]},
        "ck[0].variants[0]: expected another set, got softcap, which is not for backward",
    ),
    "ck variant of splitkv": (
        {"ck": [CK_ENTRY | {"kernel": "splitkv", "pipeline": "qr", "variants": [["varlen"]]}]},
        "ck[0].variants[0]: expected another set, got varlen, which is not for splitkv",
    ),
    "ck pipeline of splitkv": (
        {"ck": [CK_ENTRY | {"kernel": "splitkv"}]},
        "ck[0].pipeline: expected one of qr, got 'qr_async'",
    ),
    "ck occupancy of splitkv": (
        {"ck": [CK_ENTRY | {"kernel": "splitkv", "pipeline": "qr", "occupancy": 0, "variants": [[]]}]},
        "ck[0].occupancy: expected a whole number >= 1, got 0",
    ),
    "ck alibi alone": (
        {"ck": [CK_ENTRY | {"variants": [["alibi"]]}]},
        "ck[0].variants[0]: expected another set, got alibi without masked",
    ),
    "ck alibi and softcap": (
        {"ck": [CK_ENTRY | {"variants": [["masked", "alibi", "softcap"]]}]},
        "ck[0].variants[0]: expected another set, got alibi with softcap",
    ),
}


@pytest.mark.parametrize(("contents", "text"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_says_what_is_wrong(contents: dict[str, Any], text: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, **contents) if "arch" not in contents else ConfigSource(str(tmp_path))
    if "arch" in contents:
        (tmp_path / "gfx942.json").write_text(json.dumps(contents | {"triton": []}))
    with pytest.raises(ConfigError) as caught:
        taken(source)
    assert str(caught.value).startswith(f"{tmp_path}/gfx942.json") and text in str(caught.value)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (b'{"arch": "gfx942", "triton": [', "expected JSON, "),
        (b"[]", "expected an object, got []"),
        (b'{"arch": "gfx942", "arch": "gfx942", "triton": []}', "expected each key once, got 'arch' twice"),
        (b"\xff\xfe", "expected a readable file, "),
    ],
)
def test_a_broken_file(written: bytes, text: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "gfx942.json").write_bytes(written)
    with pytest.raises(ConfigError) as caught:
        taken(ConfigSource(str(tmp_path)))
    assert str(caught.value).startswith(f"{tmp_path}/gfx942.json: {text}")


def test_a_folder_that_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="FLASH_ROCM_CONFIG_DIR: expected a folder, got '.*/no'"):
        taken(ConfigSource(str(tmp_path / "no")))


# --------------------------------------------------------------------------------------------------
# Variables


def test_variables_are_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.config_source() is None
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", '{"forward": {"BLOCK_M": 32}}')
    assert runtime.config_source() == ConfigSource(kernels='{"forward": {"BLOCK_M": 32}}')
    monkeypatch.setenv("FLASH_ROCM_KERNEL_CONFIG", "")
    assert taken(runtime.config_source()) == taken(None)


def test_given_keys_override_the_entry() -> None:
    shipped = taken(None)
    found = taken(ConfigSource(kernels='{"forward": {"BLOCK_M": 32, "kpack": 2}, "probs": {"num_warps": 8}}'))
    assert found == dataclasses.replace(shipped, BLOCK_M=32, kpack=2)
    assert found.source == f"FLASH_ROCM_KERNEL_CONFIG over {shipped.source}"
    assert taken(ConfigSource(kernels='{"probs": {"num_warps": 8}}'), "probs").num_warps == 8
    assert taken(ConfigSource(kernels='{"probs": {"num_warps": 8}}')) == shipped


def test_the_variable_that_flash_attn_users_know() -> None:
    theirs = '{"BLOCK_M": 32, "BLOCK_N": 32, "waves_per_eu": 2, "PRE_LOAD_V": false, "num_stages": 2, "num_warps": 2}'
    with pytest.warns(UserWarning, match="PRE_LOAD_V has no counterpart") as caught:
        for _ in range(2):
            found = taken(ConfigSource(forward=theirs))
    assert len(caught) == 1
    assert (found.BLOCK_M, found.BLOCK_N, found.waves_per_eu, found.num_stages, found.num_warps) == (32, 32, 2, 2, 2)
    assert found.source.startswith("FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON over gfx942.json")
    assert taken(ConfigSource(forward=theirs), "probs") == taken(None, "probs")


def test_our_variable_wins_over_theirs() -> None:
    source = ConfigSource(kernels='{"forward": {"BLOCK_M": 64}}', forward='{"BLOCK_M": 32, "num_warps": 2}')
    with pytest.warns(UserWarning, match="FLASH_ROCM_KERNEL_CONFIG overrides FLASH_ATTENTION_FWD"):
        assert taken(source) == dataclasses.replace(taken(None), BLOCK_M=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = ConfigSource(kernels='{"probs": {"BLOCK_M": 64}}', forward='{"BLOCK_M": 32}')
        assert taken(other).BLOCK_M == 32


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("kernels", "{", "FLASH_ROCM_KERNEL_CONFIG: expected JSON, "),
        ("kernels", "[]", "FLASH_ROCM_KERNEL_CONFIG: expected an object, got []"),
        ("kernels", '{"sideways": {}}', "FLASH_ROCM_KERNEL_CONFIG.sideways: expected one of the keys forward, "),
        (
            "kernels",
            '{"forward": {"BLOCK": 1}}',
            "FLASH_ROCM_KERNEL_CONFIG.forward.BLOCK: expected one of the keys BLOCK_M",
        ),
        (
            "kernels",
            '{"forward": {"BLOCK_N": 48}}',
            "FLASH_ROCM_KERNEL_CONFIG.forward.BLOCK_N: expected one of 16, 32, ",
        ),
        (
            "kernels",
            '{"probs": {"BLOCK_K": 16}}',
            "FLASH_ROCM_KERNEL_CONFIG.probs.BLOCK_K: expected 0 or no value, probs does not use it, got 16",
        ),
        (
            "forward",
            '{"kpack": 1}',
            "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON.kpack: expected one of the keys BLOCK_M, ",
        ),
        (
            "forward",
            '{"num_warps": 3}',
            "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON.num_warps: expected one of 1, 2, 4",
        ),
        ("forward", "3", "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON: expected an object, got 3"),
    ],
)
def test_a_wrong_variable_says_what_is_wrong(name: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        taken(ConfigSource(**{name: value}))
    assert text in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Chips


def test_occupancy_by_registers() -> None:
    bounds = {("gfx942", 128): 4, ("gfx942", 129): 3, ("gfx942", 256): 2, ("gfx942", 512): 1, ("gfx942", 24): 8}
    bounds |= {("gfx1100", 240): 6, ("gfx1100", 256): 5, ("gfx1201", 96): 16, ("gfx1102", 128): 8}
    for (arch, vgprs), waves in bounds.items():
        assert CHIPS[arch].waves_by_vgprs(vgprs) == waves, (arch, vgprs)


def test_occupancy_by_lds() -> None:
    chip = CHIPS["gfx942"]
    bounds = [(0, 8, 8), (32 << 10, 4, 2), (32 << 10, 8, 4), ((32 << 10) + 1, 8, 2), (64 << 10, 4, 1), (64 << 10, 2, 1)]
    for lds, warps, waves in bounds:
        assert chip.waves_by_lds(lds, warps) == waves, (lds, warps)
    assert chip.waves_by_lds((64 << 10) + 1, 4) == 0
    assert CHIPS["gfx950"].waves_by_lds(80 << 10, 4) == 2
    assert CHIPS["gfx1100"].waves_by_lds(32 << 10, 4) == 4
    assert chip.waves_per_simd(256, 64 << 10, 4) == 1
