"""Speeds and their ratios, by panel: (direction, head dim, mask)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flash_rocm.bench.grid import Result
from flash_rocm.bench.peers import SUBJECT
from flash_rocm.bench.shapes import DIRECTIONS, MASKS
from flash_rocm.timing import geometric_mean

Panel = tuple[str, int, str]  # direction, headdim, mask


def panels(results: Sequence[Result]) -> Iterator[tuple[Panel, list[Result]]]:
    """Results by (direction, headdim, mask)."""
    for direction in DIRECTIONS:
        for headdim in sorted({result.shape.headdim for result in results}):
            for mask in MASKS:
                here = [
                    result
                    for result in results
                    if (result.direction, result.shape.headdim, result.shape.mask) == (direction, headdim, mask)
                ]
                if here:
                    yield (direction, headdim, mask), here


def peer_names(results: Sequence[Result]) -> list[str]:
    """In order of appearance, flash_rocm first."""
    return sorted(dict.fromkeys(result.peer for result in results), key=lambda name: name != SUBJECT)


def tflops_by_shape(results: Sequence[Result], peer: str) -> dict[object, float]:
    """(direction, shape) -> TFLOP/s where it was measured."""
    return {
        (result.direction, result.shape): result.tflops
        for result in results
        if result.peer == peer and result.tflops is not None
    }


def ratios(results: Sequence[Result], peer: str) -> dict[Any, float]:
    """(direction, shape) -> speed of flash_rocm / speed of the peer, where both have one."""
    subject, other = tflops_by_shape(results, SUBJECT), tflops_by_shape(results, peer)
    return {key: subject[key] / other[key] for key in subject if key in other}


def summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Ratios flash_rocm / peer by direction: over all head dims, over those up to 128, per panel.

    Each record has direction, headdims, mask ("any" for both), peer, points, geomean, lowest and the
    shape of the lowest.
    """
    records = []
    for peer in peer_names(results):
        if peer == SUBJECT:
            continue
        for direction in DIRECTIONS:
            part = [result for result in results if result.direction == direction]
            found = {shape: ratio for (_, shape), ratio in ratios(part, peer).items()}
            headdims = sorted({shape.headdim for shape in found})
            small = [headdim for headdim in headdims if headdim <= 128]
            groups = [(headdims, "any")] + ([(small, "any")] if 0 < len(small) < len(headdims) else [])
            groups += [([headdim], mask) for headdim in headdims for mask in MASKS]
            for dims, mask in groups:
                values = {s: r for s, r in found.items() if s.headdim in dims and mask in ("any", s.mask)}
                if not values:
                    continue
                lowest = min(values, key=lambda shape: values[shape])
                records.append(
                    {
                        "direction": direction,
                        "headdims": dims,
                        "mask": mask,
                        "peer": peer,
                        "points": len(values),
                        "geomean": geometric_mean(list(values.values())),
                        "lowest": values[lowest],
                        "lowest_shape": str(lowest),
                    }
                )
    return records
