"""One run's results: as JSON values, back from them, and the text of the whole."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from flash_rocm.bench import records
from flash_rocm.bench.environment import headline
from flash_rocm.bench.grid import Result
from flash_rocm.bench.memory import Peak
from flash_rocm.bench.overhead import Overhead
from flash_rocm.bench.ratios import summary
from flash_rocm.bench.tables import memory_table, overhead_table, speed_tables, summary_text

SCHEMA = 1


@dataclasses.dataclass
class Report:
    """Everything that one run measured; what the JSON file holds."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    unavailable: dict[str, str]  # peer -> why it was not measured
    speed: list[Result] = dataclasses.field(default_factory=list)
    memory: list[Peak] = dataclasses.field(default_factory=list)
    overhead: list[Overhead] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "environment": self.environment,
            "settings": self.settings,
            "unavailable": self.unavailable,
            "speed": [result.to_json() for result in self.speed],
            "memory": [peak.to_json() for peak in self.memory],
            "overhead": [item.to_json() for item in self.overhead],
            "summary": summary(self.speed),
        }

    def write(self, path: pathlib.Path) -> None:
        """Replace the file at once: a run that is cut short leaves what it had."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        partial.replace(path)

    @staticmethod
    def from_json(record: Any, where: str = "record") -> Report:
        """What :meth:`to_json` gave, to print or plot it elsewhere.

        Args:
            where: names the record in errors, such as the file that it is from.

        Raises:
            RecordError: the record is of another kind; the text names the key.
        """
        schema = records.member(where, record, "schema")
        if schema != SCHEMA:
            raise records.RecordError(f"{where}.schema: expected {SCHEMA}, got {schema!r}.")
        return Report(
            records.member(where, record, "environment"),
            records.member(where, record, "settings"),
            records.member(where, record, "unavailable"),
            records.items(where, record, "speed", Result),
            records.items(where, record, "memory", Peak),
            records.items(where, record, "overhead", Overhead),
        )

    def text(self) -> str:
        """The whole report."""
        blocks = [headline(self.environment)]
        if self.unavailable:
            blocks.append("\n".join(["not measured:"] + [f"  {name}: {why}" for name, why in self.unavailable.items()]))
        if self.speed:
            blocks += [*speed_tables(self.speed), summary_text(self.speed)]
        if self.memory:
            blocks.append(memory_table(self.memory))
        if self.overhead:
            blocks.append(overhead_table(self.overhead))
        return "\n\n".join(block for block in blocks if block)
