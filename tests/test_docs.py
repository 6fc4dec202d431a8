"""The pages that docs/write.py writes are those of today, and docs/index.md leads to every page."""

from __future__ import annotations

import pathlib
import re
import subprocess

import pytest
from doc_pages import write as pages

from flash_rocm import runtime, variables

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("name", pages.PAGES)
def test_written_pages_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages.PAGES[name](), "run: python docs/write.py"


def test_the_index_leads_everywhere() -> None:
    links = set(re.findall(r"\]\(([^)#]+\.md)", (DOCS / "index.md").read_text()))
    assert {path.name for path in DOCS.glob("*.md")} - {"index.md"} <= links


def test_every_variable_that_pages_name_is_read() -> None:
    known = {**variables.RUN, **variables.BUILD, **variables.DEVICES}
    for path in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        named = set(re.findall(r"\b(?:FLASH_ROCM|FLASH_ATTENTION)_[A-Z_]+\b", path.read_text()))
        assert named <= known.keys(), (path.name, named - known.keys())


def test_examples_for_clusters() -> None:
    """Both switch the back end by the one variable; the shell and YAML are sound."""
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((DOCS / "examples" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert [each["name"] for each in container["env"]] == ["FLASH_ROCM_BACKEND"]
    assert container["resources"]["limits"] == {"amd.com/gpu": 1}
    text = (DOCS / "examples" / "slurm.sh").read_text()
    asked = re.search(r"^backends=\((.*)\)$", text, re.MULTILINE)
    assert asked is not None and set(asked[1].split()) <= set(runtime.REQUESTS)
    assert f"--array=0-{len(asked[1].split()) - 1}\n" in text


@pytest.mark.parametrize("index", range(3))
def test_the_slurm_job_runs_one_back_end(index: int, tmp_path: pathlib.Path) -> None:
    """With programs of the cluster that say what they were given."""
    for name in ("flash-rocm", "srun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$(basename "$0") $* on $FLASH_ROCM_BACKEND"\n')
        (tmp_path / name).chmod(0o755)
    env = runtime.subprocess_environment(
        PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_ARRAY_TASK_ID=str(index), SLURM_GPUS_ON_NODE="4"
    )
    command = ["bash", str(DOCS / "examples" / "slurm.sh"), "train.py", "--steps", "3"]
    lines = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    backend = ("auto", "ck", "triton")[index]
    assert lines == [
        f"flash-rocm info on {backend}",
        f"srun torchrun --standalone --nproc-per-node=4 train.py --steps 3 on {backend}",
    ]


def test_public_names_are_documented() -> None:
    """A name of the two modules that most users import; the others are listed by their own __all__."""
    import flash_rocm

    text = (DOCS / "api.md").read_text()
    for name in flash_rocm.__all__:
        assert f"### flash_rocm.{name}\n" in text or name == "v3"
    for name in flash_rocm.v3.__all__:
        assert f"### flash_rocm.v3.{name}\n" in text
