"""What the numbers were measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from typing import Any

import torch

import flash_rocm
from flash_rocm import runtime, virtual_device

#: Distributions whose version matters, with the names they go by.
_DISTRIBUTIONS = {
    "triton": ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"),
    "flash-attn": ("flash-attn", "flash_attn"),
    "flash-attn-3": ("flash-attn-3", "flash_attn_3"),
    "flash-attn-4": ("flash-attn-4",),
}

#: Keys that :func:`headline` shows.
HEADLINE = ("device", "arch", "torch", "cuda", "hip", "cudnn", "triton", "flash_rocm", "date")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, device, date and the back end asked for; JSON values only."""
    arch = virtual_device.arch_of(device)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "flash_rocm": flash_rocm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": None if torch.version.hip or device.type == "cpu" else torch.backends.cudnn.version(),
        "device": platform.processor() or platform.machine(),
        "arch": arch.name,
        "compute_units": arch.num_cus,
        "backend_request": runtime.requested_backend(),
        "own_configs": runtime.config_source() is not None,
        "triton_interpret": runtime.triton_interpret(),
    }
    facts.update({name: _version(candidates) for name, candidates in _DISTRIBUTIONS.items()})
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["device_memory_bytes"] = properties.total_memory
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def _version(candidates: tuple[str, ...]) -> str | None:
    for name in candidates:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def headline(facts: dict[str, Any]) -> str:
    """One line of it, for the head of a table."""
    runtime_name = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU"
    cudnn = f", cuDNN {facts['cudnn']}" if facts["cudnn"] else ""
    return (
        f"{facts['device']} ({facts['arch']}), torch {facts['torch']} ({runtime_name}{cudnn}), "
        f"triton {facts['triton'] or 'not installed'}, flash_rocm {facts['flash_rocm']}, {facts['date']}"
    )
