"""The auxiliary kernels for ROCm: what torch's hipify makes of ``csrc/*.cu``, which are written in CUDA's dialect."""

from __future__ import annotations

import contextlib
import io
import pathlib
import shutil

from torch.utils.hipify import hipify_python

CSRC = pathlib.Path(__file__).with_name("csrc")
#: The kernels, and what they include that hipify has to translate too.
KERNELS = ("auxiliary_cache.cu", "auxiliary_gradients.cu")
_HEADER = "device.cuh"


def write(folder: pathlib.Path) -> list[pathlib.Path]:
    """Translate into a folder of generated files; where the translated kernels are.

    The same sources give the same bytes, and a file that would not change is not written.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*KERNELS, _HEADER):
        shutil.copy(CSRC / name, folder / name)
    sources = [str(folder / name) for name in (*KERNELS, _HEADER)]
    with contextlib.redirect_stderr(io.StringIO()):  # where it says that it was successful
        hipify_python.hipify(
            str(folder),
            output_directory=str(folder),
            includes=sources,
            extensions=(".cu", ".cuh"),
            show_progress=False,
            hip_clang_launch=True,  # clang knows <<<>>>
            is_pytorch_extension=True,
        )
    return [folder / pathlib.Path(name).with_suffix(".hip") for name in KERNELS]
