"""What a training log says, as curves: `training_log.jsonl` to series of numbers over steps."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import DamagedError

POINTS = 250  # of a curve on the page: as many as can be told apart, and few enough to be drawn at once
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A quantity over steps. `low` and `high`: of the logged values that a point is the mean of."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    logged: int = 0

    @property
    def is_thinned(self) -> bool:
        return self.logged > len(self.steps)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """A log's entries, none where there is no log. A killed run may have left half a line at the end.

    Raises: DamagedError for a line that is no entry.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    entries = []
    for count, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if count == len(lines):
                break
            raise DamagedError(str(path), f"line {count} is no JSON", expected="an entry a line") from error
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            raise DamagedError(str(path), f"line {count} has no step", expected="an entry a line")
        entries.append(entry)
    return entries


def curve(entries: Iterable[Entry], key: str) -> Curve:
    """One quantity over the steps, thinned to what can be drawn; what is no finite number is left out."""
    found = [(e["step"], float(e[key])) for e in entries if isinstance(e.get(key), (int, float))]
    return thin([point for point in found if math.isfinite(point[1])])


def score_names(entries: Iterable[Entry]) -> list[str]:
    """The evaluation's metrics in a log, the loss first, without the trainer's timings."""
    names = {key.removeprefix("eval_") for entry in entries for key in entry if key.startswith("eval_")}
    kept = {name for name in names if not name.endswith(TIMINGS)}
    return sorted(kept, key=lambda name: (name != "loss", name))


def step_points(entries: Sequence[Entry]) -> list[tuple[int, float]]:
    """(step, seconds of one step), between each entry and the one before it, so that evaluations do not count.

    Before the first entry a model was loaded, so it gives no time; nor does the first one of a resumed run, which
    counts its seconds anew.
    """
    found = []
    timed = [entry for entry in entries if isinstance(entry.get("seconds"), (int, float))]
    for before, after in itertools.pairwise(timed):
        steps, elapsed = after["step"] - before["step"], after["seconds"] - before["seconds"]
        if steps > 0 and elapsed > 0 and "loss" in after:
            found.append((after["step"], elapsed / steps))
    return found


def thin(points: Sequence[tuple[int, float]], limit: int = POINTS) -> Curve:
    """At most so many points: means of neighbours, at the last one's step, with the lowest and highest of them."""
    width = max(1, math.ceil(len(points) / limit))
    groups = [points[first : first + width] for first in range(0, len(points), width)]
    values = [[value for _, value in group] for group in groups]
    return Curve(
        tuple(group[-1][0] for group in groups),
        tuple(math.fsum(group) / len(group) for group in values),
        tuple(map(min, values)),
        tuple(map(max, values)),
        len(points),
    )
