"""Tuned entries as config files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from flash_rocm import config, files
from flash_rocm.config_schema import check_file
from flash_rocm.tuned import SEQLENS, Outcome, TuneKey

#: Sides of the buckets that take everything shorter and longer.
_SHORTEST, _LONGEST = 1, 1 << 30


def match_of(key: TuneKey) -> dict[str, Any]:
    """The rule that takes the calls of a key; files have none on how heads are grouped."""
    low = _SHORTEST if key.seqlen == SEQLENS[0] else key.seqlen
    high = _LONGEST if key.seqlen == SEQLENS[1] else key.seqlen
    masks = {"full": {"masked": False}, "causal": {"causal": True}, "window": {"masked": True, "causal": False}}
    rule = {"dtype": [key.dtype], "headdim": [key.headdim, key.headdim], "seqlen": [low, high]}
    return {**rule, **masks[key.mask], "varlen": key.varlen}


def entry_of(key: TuneKey, outcome: Outcome) -> dict[str, Any]:
    """An entry of a config file."""
    provenance = {name: text for name, text in dataclasses.asdict(outcome.provenance).items() if text}
    measured = f"gqa{key.group}, {outcome.seconds_after * 1e3:.4f} ms, before {outcome.seconds_before * 1e3:.4f} ms"
    provenance["note"] = ", ".join(text for text in (outcome.provenance.note, measured) if text)
    options = {name: value for name, value in outcome.options.items() if value}
    return {"kernel": key.kernel, "match": match_of(key), "options": options, "provenance": provenance}


def write(folder: pathlib.Path, arch: str, outcomes: Sequence[tuple[TuneKey, Outcome]]) -> pathlib.Path:
    """Put entries before all others of ``<folder>/<arch>.json``, replacing those with the same rule.

    A file that is not there yet starts as the shipped one.

    Args:
        outcomes: one for each rule.

    Raises:
        ConfigError: the file that is there is wrong.
        OSError: it cannot be written.
    """
    path = folder / f"{arch}.json"
    contents = config.file_contents(arch, str(folder) if folder.is_dir() else None)
    new = [entry_of(key, outcome) for key, outcome in outcomes]
    rules = [(entry["kernel"], entry["match"]) for entry in new]
    kept = [entry for entry in contents["triton"] if (entry["kernel"], entry.get("match", {})) not in rules]
    contents = {"ck": []} | contents | {"arch": arch, "triton": new + kept}
    check_file(str(path), path.name, arch, contents)
    files.write_whole(path, _dumped(contents))
    return path


def _dumped(contents: dict[str, Any]) -> str:
    """JSON with one entry a line, as the shipped files have it."""

    def section(name: str) -> str:
        lines = ",\n".join(f"    {json.dumps(entry)}" for entry in contents[name])
        return f'"{name}": [\n{lines}\n  ]' if lines else f'"{name}": []'

    parts = [f'"arch": {json.dumps(contents["arch"])}', section("triton"), section("ck")]
    if "auxiliary" in contents:
        parts.append(f'"auxiliary": {json.dumps(contents["auxiliary"])}')
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def one_for_each_rule(
    outcomes: Sequence[tuple[TuneKey, Outcome]],
) -> tuple[list[tuple[TuneKey, Outcome]], list[TuneKey]]:
    """What to write, and keys left out because another grouping of heads with the same rule is written."""
    chosen: dict[str, tuple[TuneKey, Outcome]] = {}
    left_out = []
    for key, outcome in sorted(outcomes, key=lambda pair: pair[0].group):
        rule = json.dumps([key.kernel, match_of(key)])
        if rule in chosen:
            left_out.append(key)
        else:
            chosen[rule] = (key, outcome)
    return list(chosen.values()), left_out
