"""``flash-rocm info``: versions, environment, devices, kernel configs and what each back end supports."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch

import flash_rocm
from flash_rocm import backends, config, runtime, support, virtual_device
from flash_rocm.arch import CPU, NVIDIA_ARCHS, Arch, arch_named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``flash-rocm info``."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Print it; never fails, as a report of what is wrong must come."""
    found = gather()
    print(json.dumps(found, indent=1) if args.format == "json" else as_text(found))
    return 0


def gather() -> dict[str, Any]:
    """All of the report as JSON values.  Needs neither a GPU nor Triton."""
    request, virtual, errors = "auto", None, []
    try:
        request = runtime.requested_backend()
        virtual = virtual_device.active()
    except ValueError as error:
        errors.append(str(error))
    configs: dict[str, list[str]] = {}
    for name in ("cpu", *backends.TRITON_AMD_ARCHS, *NVIDIA_ARCHS):
        configs.setdefault(_config_file(name), []).append(name)
    (_, *names), *rows = support.table()
    return {
        "versions": _versions(),
        "environment": [
            {"name": name, "value": value, "note": note} for name, value, note in runtime.environment_report()
        ],
        "errors": errors,
        "devices": [_device(label, arch, request) for label, arch in devices(virtual)],
        "configs": configs,
        "support": {label: dict(zip(names, cells, strict=True)) for label, *cells in rows},
    }


def as_text(found: dict[str, Any]) -> str:
    """What :func:`gather` found, for people."""
    lines = ["versions"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines.append("environment")
    for each in found["environment"]:
        lines.append(f"  {each['name']}={each['value']}" + (f"   ({each['note']})" if each["note"] else ""))
    if not found["environment"]:
        lines.append("  nothing set")
    lines += [f"  error: {error}" for error in found["errors"]]
    for device in found["devices"]:
        lines += _device_lines(device)
    lines.append("kernel configs")
    lines += [f"  {file}: {', '.join(names)}" for file, names in found["configs"].items()]
    return "\n".join([*lines, *_support_lines(found["support"])])


def _support_lines(rows: dict[str, dict[str, str]]) -> list[str]:
    facts, names = ("devices", "dtypes", "head dims"), list(backends.CAPABILITIES)
    lines = ["support, by back end that is installed and built"]
    for name in names:
        where, dtypes, headdims = (rows[fact][name] for fact in facts)
        lines.append(f"  {name:<10} {where}; {dtypes}; head dims {headdims}")
    width = max(map(len, rows))
    lines.append("  ".join(["", " " * width, *(name.ljust(9) for name in names)]).rstrip())
    for label, cells in rows.items():
        if label not in facts:
            lines.append("  ".join(["", label.ljust(width), *(cells[name].ljust(9) for name in names)]).rstrip())
    return lines


def _config_file(arch: str) -> str:
    """Name of the file an arch takes its kernel configs from."""
    try:
        source = runtime.config_source()
        return f"{config.arch_configs(arch, source.folder if source else None).arch}.json"
    except config.ConfigError as error:
        return f"error, {error}"


def _versions() -> dict[str, str | None]:
    gpu = "none: a CPU build of torch"
    if torch.version.hip:
        gpu = f"HIP {torch.version.hip}"
    elif torch.version.cuda:
        gpu = f"CUDA {torch.version.cuda}"
    return {
        "flash_rocm": flash_rocm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": runtime.triton_version(),
        "GPU runtime": gpu,
    }


def devices(virtual: virtual_device.VirtualDevice | None) -> list[tuple[str, Arch]]:
    """What calls may run on here, the CPU (or the virtual GPU in its place) first."""
    found = [("cpu, executing AMD machine code", arch_named(virtual.arch)) if virtual else ("cpu", CPU)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            label = f"cuda:{index} {torch.cuda.get_device_name(index)}"
            found.append((label, virtual_device.arch_of(torch.device("cuda", index))))
    return found


def _availability_reasons(name: str, arch: Arch) -> list[str]:
    try:
        return backends.availability_reasons(name, arch)
    except ValueError as error:  # a damaged library
        return [f"error, {error}"]


def _device(label: str, arch: Arch, request: str) -> dict[str, Any]:
    reasons = {name: _availability_reasons(name, arch) for name in backends.CAPABILITIES}
    order = backends.AUTO_ORDER[arch.vendor]
    return {
        "device": label,
        "arch": arch.name,
        "compute_units": arch.num_cus,
        "xcds": arch.num_xcds,
        "backends": reasons,  # why each is not available; empty: it is
        "auto_order": list(order),
        "auto": next((name for name in order if not reasons[name]), None),
        "requested": request,
        "configs": _config_file(arch.name),
    }


def _device_lines(device: dict[str, Any]) -> list[str]:
    facts = ""
    if device["arch"] != CPU.name:
        facts = f": {device['arch']}, {device['compute_units']} CUs, {device['xcds']} XCDs"
    lines = [f"device {device['device']}{facts}"]
    for name, why_not in device["backends"].items():
        lines.append(f"  {name:<10} {'no: ' + '; '.join(why_not) if why_not else 'available'}")
    candidates, request = ", ".join(device["auto_order"]), device["requested"]
    if device["auto"]:
        chosen = f"{device['auto']}: the first of ({candidates}) that is available and accepts the call"
        lines.append(f"  auto       {chosen}")
    else:
        lines.append(f"  auto       nothing: none of ({candidates}) is available")
    lines.append(f"  configs    {device['configs']}")
    if request != "auto":
        lines.append(
            f"  requested  {request}: " + ("not available, calls raise" if device["backends"][request] else "used")
        )
    return lines
