"""Options that do not act everywhere: refused where they would be ignored."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from config_files import ENTRY, FACTS, OPTIONS, write

from flash_rocm import config, config_schema, runtime
from flash_rocm.arch import arch_named
from flash_rocm.config_schema import ConfigError
from flash_rocm.runtime import ConfigSource
from flash_rocm.testing import make_problem

#: Each option with a value that no compiler takes by default, archs it acts on, and archs it does not act on.
OF_SOME_ARCHS = {
    "waves_per_eu": (4, ("gfx942", "gfx1201", "gfx1250"), ("sm80", "sm90", "cpu", "generic")),
    "matrix_instr_nonkdim": (16, ("gfx90a", "gfx950"), ("gfx1100", "gfx1201", "sm90", "cpu", "generic")),
    "kpack": (2, ("gfx90a", "gfx942"), ("gfx950", "gfx1100", "sm90", "cpu", "generic")),
}
ACTS = [(option, value, arch) for option, (value, archs, _) in OF_SOME_ARCHS.items() for arch in archs]
IGNORED = [(option, value, arch) for option, (value, _, archs) in OF_SOME_ARCHS.items() for arch in archs]


def override(option: str, value: int) -> ConfigSource:
    return ConfigSource(kernels=json.dumps({"forward": {option: value}}))


def assert_refused(source: ConfigSource, arch: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.lookup(arch, "forward", FACTS, source)
    assert str(caught.value) == expected


def refusal(option: str, value: int, arch: str) -> str:
    acts = ", ".join(f"{name}*" for name in config_schema.REACH[option].archs)
    return (
        f"{option}: expected 0 or no value, {arch} does not use it, got {value}. "
        f"Hint: leave it out here, it acts on {acts} only"
    )


def test_every_option_of_some_archs_is_tested() -> None:
    restricted = {name for name, reach in config_schema.REACH.items() if reach.archs != ("",)}
    assert {*OF_SOME_ARCHS, "implementation"} == restricted


@pytest.mark.parametrize(
    ("arch", "kernel", "text"),
    [
        ("sm80", "mla", "sm80 does not use it, got gluon. Hint: leave it out here, it acts on sm90* only"),
        ("generic", "mla", "generic does not use it, got gluon. Hint: leave it out here, it acts on sm90* only"),
        (
            "sm90",
            "decode",
            "decode does not use it, got gluon. Hint: leave it out here, it acts in forward, backward_dq, "
            "backward_dkdv, mla only",
        ),
    ],
)
def test_implementations_that_do_not_exist(arch: str, kernel: str, text: str, tmp_path: pathlib.Path) -> None:
    wrong = ENTRY | {"kernel": kernel, "options": OPTIONS | {"implementation": "gluon"}}
    source = write(tmp_path, arch, triton=[wrong])
    start = f"{tmp_path}/{arch}.json: triton[0].options.implementation: expected triton or no value, "
    assert_refused(source, arch, start + text)


@pytest.mark.parametrize(("arch", "kernel"), [("gfx942", "forward"), ("generic", "forward"), ("sm90", "decode")])
def test_rows_that_only_a_gluon_kernel_takes(arch: str, kernel: str, tmp_path: pathlib.Path) -> None:
    entry = ENTRY | {"kernel": kernel, "options": OPTIONS | {"BLOCK_M": 192}}
    folder = write(tmp_path, arch, triton=[entry])
    with pytest.raises(ConfigError, match=r"options\.BLOCK_M: expected a power of two, got 192\. Hint: others are for"):
        config.lookup("gfx1250" if arch == "generic" else arch, kernel, FACTS, folder)


@pytest.mark.parametrize(("option", "value", "arch"), ACTS)
def test_where_it_acts(option: str, value: int, arch: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, arch, triton=[ENTRY | {"options": OPTIONS | {option: value}}])
    for given in (source, override(option, value)):
        assert config.lookup(arch, "forward", FACTS, given).compile_options()[option] == value


@pytest.mark.parametrize(("option", "value", "arch"), IGNORED)
def test_files_where_it_would_be_ignored(option: str, value: int, arch: str, tmp_path: pathlib.Path) -> None:
    wrong = ENTRY | {"options": OPTIONS | {option: value}}
    text = refusal(option, value, arch)
    source = write(tmp_path, arch, triton=[ENTRY, wrong])
    assert_refused(source, arch, f"{tmp_path}/{arch}.json: triton[1].options.{text}")


@pytest.mark.parametrize(("option", "value", "arch"), IGNORED)
def test_a_file_that_inherits_it(option: str, value: int, arch: str, tmp_path: pathlib.Path) -> None:
    write(tmp_path, "gfx90a", triton=[ENTRY | {"options": OPTIONS | {option: value}}])
    source = write(tmp_path, arch, inherits="gfx90a")
    assert_refused(source, arch, f"{tmp_path}/gfx90a.json: triton[0].options.{refusal(option, value, arch)}")


@pytest.mark.parametrize("served", ["gfx1250", "sm120"])
def test_generic_takes_what_acts_on_any_arch(served: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, "generic", triton=[ENTRY | {"options": OPTIONS | {"waves_per_eu": 2}}])
    assert_refused(
        source, served, f"{tmp_path}/generic.json: triton[0].options.{refusal('waves_per_eu', 2, 'generic')}"
    )


@pytest.mark.parametrize(("option", "value", "arch"), [case for case in IGNORED if case[2] != "generic"])
def test_variables_where_it_would_be_ignored(option: str, value: int, arch: str) -> None:
    text = refusal(option, value, arch)
    assert_refused(override(option, value), arch, f"FLASH_ROCM_KERNEL_CONFIG.forward.{text}")
    if option in config._THEIR_OPTIONS:
        theirs = ConfigSource(forward=json.dumps({option: value}))
        assert_refused(theirs, arch, f"FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON.{text}")


@pytest.mark.parametrize(("option", "value", "arch"), IGNORED)
def test_its_default_may_stand_anywhere(option: str, value: int, arch: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, arch, triton=[ENTRY | {"options": OPTIONS | {option: 0}}])
    source = source._replace(kernels=override(option, 0).kernels)
    assert option not in config.lookup(arch, "forward", FACTS, source).compile_options()


def test_a_variable_is_checked_for_each_arch_and_kernel_that_takes_it() -> None:
    source = override("waves_per_eu", 2)
    assert config.lookup("gfx942", "forward", FACTS, source).waves_per_eu == 2
    assert_refused(source, "sm90", f"FLASH_ROCM_KERNEL_CONFIG.forward.{refusal('waves_per_eu', 2, 'sm90')}")
    assert config.lookup("sm90", "probs", FACTS, source) == config.lookup("sm90", "probs", FACTS)


@pytest.mark.filterwarnings("ignore:kpack is deprecated")
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_the_compiler_acts_on_what_the_table_says(arch: str) -> None:
    triton = pytest.importorskip("triton", reason="compiles Triton kernels")
    if runtime.triton_interpret():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    from flash_rocm._triton.compile import target_of
    from flash_rocm._triton.offline import source_of

    fields = {"batch": 1, "seqlen_q": 512, "seqlen_k": 512, "headdim": 64, "device_type": "cuda"}
    target = arch_named(arch)
    code, options = source_of("probs", make_problem(dtype=torch.float16, **fields), target)
    options |= dict.fromkeys(("waves_per_eu", "matrix_instr_nonkdim"), 0) | {"kpack": 1}

    def compiled(**changed: int) -> str:
        return str(triton.compile(code, target=target_of(target), options=options | changed).asm["amdgcn"])

    plain = compiled()
    for option, (value, *_) in OF_SOME_ARCHS.items():
        acts = arch.startswith(config_schema.REACH[option].archs)
        assert (compiled(**{option: value}) != plain) == acts, option
