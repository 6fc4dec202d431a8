"""Tuned entries as config files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from flash_rocm import config, files
from flash_rocm.config_checks import check_file
from flash_rocm.config_schema import Facts
from flash_rocm.tuned import PAGES, SEQLENS, CacheTuneKey, Outcome, TuneKey

#: Sides of the buckets that take everything shorter and longer.
_SHORTEST, _LONGEST = 1, 1 << 30


def match_of(key: TuneKey) -> dict[str, Any]:
    """The rule that takes the calls of a key; files have none on how heads are grouped, on queries and on batches.

    What was tuned is Triton's kernel: plain calls that a Gluon kernel is shipped for are left to it.
    """
    low = _SHORTEST if key.seqlen == SEQLENS[0] else key.seqlen
    high = _LONGEST if key.seqlen == SEQLENS[1] else key.seqlen
    masks = {"full": {"masked": False}, "causal": {"causal": True}, "window": {"masked": True, "causal": False}}
    rule = {"dtype": [key.dtype], "headdim": [key.headdim, key.headdim], "seqlen": [low, high]}
    if isinstance(key, CacheTuneKey):
        # Buckets of page sizes are named by their smallest; what has no pages is one of its own.
        ends = dict(zip(PAGES, (*PAGES[1:], _LONGEST + 1), strict=True))
        rule["page_size"] = [key.page_size, ends[key.page_size] - 1]
    rule |= {**masks[key.mask], "varlen": key.varlen}
    plain = Facts(
        dtype=key.dtype,
        headdim=key.headdim,
        seqlen=key.seqlen,
        causal=key.mask == "causal",
        masked=key.mask != "full",
        varlen=key.varlen,
        page_size=key.page_size if isinstance(key, CacheTuneKey) else 0,
        plain=True,
        shorter=key.seqlen,
    )
    if config.lookup(key.arch, key.kernel, plain).implementation != "triton":
        rule["plain"] = False
    return rule


def left_out_by(key: TuneKey) -> str:
    """What files have no rule on, that keys differ by."""
    return "queries, batches and grouped heads" if isinstance(key, CacheTuneKey) else "grouped heads"


def entry_of(key: TuneKey, outcome: Outcome) -> dict[str, Any]:
    """An entry of a config file."""
    provenance = {name: text for name, text in dataclasses.asdict(outcome.provenance).items() if text}
    call = f"gqa{key.group}"
    if isinstance(key, CacheTuneKey):
        call += f", {key.queries} queries of each of {key.batch}"
    measured = f"{call}, {outcome.seconds_after * 1e3:.4f} ms, before {outcome.seconds_before * 1e3:.4f} ms"
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


def _order(key: TuneKey) -> tuple[int, ...]:
    return (key.group, key.queries, -key.batch) if isinstance(key, CacheTuneKey) else (key.group,)


def one_for_each_rule(
    outcomes: Sequence[tuple[TuneKey, Outcome]],
) -> tuple[list[tuple[TuneKey, Outcome]], list[TuneKey]]:
    """What to write, and keys left out because another one with the same rule is written.

    Written is the one with the fewest grouped heads and queries and the most sequences: there servers spend their time.
    """
    chosen: dict[str, tuple[TuneKey, Outcome]] = {}
    left_out = []
    for key, outcome in sorted(outcomes, key=lambda pair: _order(pair[0])):
        rule = json.dumps([key.kernel, match_of(key)])
        if rule in chosen:
            left_out.append(key)
        else:
            chosen[rule] = (key, outcome)
    return list(chosen.values()), left_out
