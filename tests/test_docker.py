"""The Dockerfile without an engine: linted, taken apart, and its steps executed on this machine."""

from __future__ import annotations

import fnmatch
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import clean_environment
import pytest
from dockerfile_parse import DockerfileParser

from flash_rocm import runtime, variables

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / "packaging" / "docker"
IGNORED = tuple((ROOT / ".dockerignore").read_text().split())
# Taken before conftest.py cleans the environment of tests.
CK_HOME = os.environ.get("FLASH_ROCM_TEST_CK_HOME", "")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Instructions and values, in order."""
    folder = tmp_path_factory.mktemp("docker")
    shutil.copy(ROOT / "Dockerfile", folder)
    return [step for step in DockerfileParser(str(folder)).structure if step["instruction"] != "COMMENT"]


def of(steps: list[dict[str, Any]], instruction: str) -> list[str]:
    return [step["value"] for step in steps if step["instruction"] == instruction]


def command(value: str) -> list[str]:
    """Words of a RUN or CMD, of either form."""
    return json.loads(value) if value.startswith("[") else shlex.split(value)


def test_the_linter_is_content() -> None:
    hadolint = pathlib.Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


def test_every_step_is_a_script_of_this_repository(steps: list[dict[str, Any]]) -> None:
    scripts = [pathlib.PurePosixPath(command(value)[0]) for value in of(steps, "RUN")]
    assert {script.name for script in scripts} == {path.name for path in SCRIPTS.glob("*")}
    for script in scripts:
        assert os.access(SCRIPTS / script.name, os.X_OK)
        # Where COPY has put it.
        assert str(script.parent) in ("/src/packaging/docker", "/opt/flash_rocm/docker")
    for path in SCRIPTS.glob("*.sh"):
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert "\nset -euo pipefail\n" in path.read_text()


def test_stages_and_settings(steps: list[dict[str, Any]]) -> None:
    stages = of(steps, "FROM")
    assert stages == ["${BASE} AS wheel", "${BASE} AS runtime"]
    (base,) = (value for value in of(steps, "ARG") if value.startswith("BASE="))
    name, tag = base.removeprefix("BASE=").split(":")
    assert name == "rocm/pytorch" and tag.startswith("rocm") and "pytorch_release_2.10" in tag
    arguments = {value.partition("=")[0] for value in of(steps, "ARG")}
    assert {"FLASH_ROCM_ARCHS", "FLASH_ROCM_INSTANCES", "MAX_JOBS"} <= arguments
    assert arguments - {"BASE", "TRITON_ARCHS"} <= variables.BUILD.keys()
    (user,) = of(steps, "USER")
    assert user == "1000:1000"
    order = [step["instruction"] for step in steps]
    assert order.index("USER") > max(i for i, name in enumerate(order) if name in ("RUN", "COPY"))
    (settings,) = of(steps, "ENV")
    values = dict(word.split("=") for word in settings.split())
    assert values["FLASH_ROCM_BACKEND"] == "auto"
    assert values["FLASH_ROCM_CACHE_DIR"] == "/opt/flash_rocm/cache"
    assert any(command(value)[1:] == ["${TRITON_ARCHS}", "/opt/flash_rocm/cache"] for value in of(steps, "RUN"))
    assert [command(value) for value in of(steps, "CMD")] == [["flash-rocm", "info"]]
    (health,) = of(steps, "HEALTHCHECK")
    assert health.endswith('CMD ["flash-rocm", "info"]')


def test_what_is_copied_is_there(steps: list[dict[str, Any]]) -> None:
    scripts, wheels = "packaging/docker /opt/flash_rocm/docker", "--from=wheel /wheels /opt/flash_rocm/wheels"
    assert of(steps, "COPY") == [". /src", scripts, wheels]
    assert not is_ignored("packaging") and not is_ignored("packaging/docker/install.sh")


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path, or a folder that it is in, out of the build; ** stands for any folders."""
    whole = pathlib.PurePosixPath(path)
    return any(
        fnmatch.fnmatch(each.name if pattern.startswith("**/") else str(each), pattern.removeprefix("**/"))
        for each in (whole, *whole.parents)
        for pattern in IGNORED
    )


def build_context(folder: pathlib.Path) -> pathlib.Path:
    """What ``COPY . /src`` copies."""
    tops = [path for path in ROOT.iterdir() if not is_ignored(path.name)]
    paths = [path for top in tops for path in (top.rglob("*") if top.is_dir() else [top]) if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    for name in names:
        if not is_ignored(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def script(name: str, python: pathlib.Path, *arguments: object, **changes: str) -> str:
    """Run a step as the Dockerfile does, with a Python that stands for the image's."""
    env = runtime.subprocess_environment(PYTHON=str(python), **changes)
    words = [str(SCRIPTS / name), *map(str, arguments)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["build-wheel.sh", "install.sh", "compile-kernels.sh", "user.sh"])
def test_scripts_say_what_they_lack(name: str) -> None:
    done = subprocess.run([SCRIPTS / name], capture_output=True, text=True)
    assert done.returncode != 0 and re.search(r": [A-Z]+: ", done.stderr)


def test_folders_of_the_user(tmp_path: pathlib.Path) -> None:
    uid = str(os.getuid())
    folder = tmp_path / "home" / "one"
    subprocess.run([SCRIPTS / "user.sh", uid, folder], check=True)
    assert folder.is_dir() and folder.stat().st_uid == os.getuid()


@pytest.mark.ck
@pytest.mark.xdist_group("docker")
def test_the_steps_make_an_image(tmp_path: pathlib.Path) -> None:
    """One instance, one chip, one Triton kernel: from the build context to a call that finds both back ends."""
    context = build_context(tmp_path / "src")
    image = clean_environment.create(
        tmp_path / "image", None, ["torch", "triton", "numpy", "setuptools", "wheel", "ninja"]
    )
    chosen = {"FLASH_ROCM_ARCHS": "gfx942", "FLASH_ROCM_INSTANCES": "forward_fp16_d64_dense", "MAX_JOBS": "1"}
    if CK_HOME:
        chosen["CK_HOME"] = CK_HOME
    script("build-wheel.sh", image, context, tmp_path / "wheels", **chosen)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name.startswith("flash_rocm-") and "+ck.gfx942-py3-none-linux" in wheel.name
    assert "reference  available" in script("install.sh", image, tmp_path / "wheels")
    cache = tmp_path / "cache"
    few = ["--kernel", "forward", "--dtype", "fp16", "--headdim", "64", "--mask", "full", "--layout", "dense"]
    script("compile-kernels.sh", image, "gfx942;gfx950", cache, *few, "--jobs", "1")
    assert any((cache / "triton").iterdir())
    call = ["--shape", "2,512,512,4,4,64", "--dtype", "fp16"]
    for arch, backend in (("gfx942", "ck"), ("gfx950", "triton")):
        env = runtime.subprocess_environment(FLASH_ROCM_CACHE_DIR=str(cache), FLASH_ROCM_BACKEND="auto")
        words = [image.with_name("flash-rocm"), "explain", "--arch", arch, *call]
        done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert f"back end: {backend}\n" in done.stdout, done.stdout + done.stderr
