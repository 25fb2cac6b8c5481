"""What a bench found, as a file: `bench.json` in its folder, written anew whenever a part is done.

Units are in the names. What was not measured is None, or an empty list, and `notes` say why.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.checkpoint import read_json
from surgery.errors import DamagedError, NotAModelError, shorten
from surgery.writing import replace_file

RESULTS_FILE = "bench.json"
SCHEMA = 1
FLOOR, LORA = "floor", "lora"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Where(_Part):
    """What it ran on, and what to type to run it again."""

    device: str
    device_name: str
    threads: int
    versions: dict[str, str]
    command: str
    commit: str = ""
    started: str = Field("", description="UTC, as ISO 8601")


class Size(_Part):
    """How large a method was made: a rank, a hidden width, a bottleneck, so many virtual tokens."""

    name: str
    value: int


class Curve(_Part):
    """One training run: the mean loss at these steps, and what an evaluation after it gave."""

    seed: int
    steps: list[int]
    losses: list[float]
    scores: dict[str, float]
    seconds: float


class Trial(_Part):
    """A learning rate that was tried, and what an evaluation on rows held out of the training set gave.

    scores: empty where the training diverged.
    """

    learning_rate: float
    scores: dict[str, float]


class Row(_Part):
    """One method.

    seconds: of each measured step, in the order of the rounds, so that rows can be compared round by round.
    saved_bytes: kept for backward, weights left out. peak_bytes: the allocator's on CUDA; on the CPU of a process
    of its own (resident set, above the built model's). inference_seconds: of each forward in eval mode, as deployed.
    """

    method: str
    size: Size | None = None
    trained_values: int | None = None
    trained_names: int | None = Field(None, description="tensors that train")
    seconds: list[float] = []
    weight_bytes: int | None = Field(None, description="parameters and buffers, packed ones with their scales")
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    longest_tokens: int | None = None
    longest_by: Literal["", "measured", "predicted"] = ""
    energy_joules: float | None = Field(None, description="of one step")
    curves: list[Curve] = []
    learning_rate: float | None = None
    tried: list[Trial] = []
    inference_seconds: list[float] = []
    inference_bytes: int | None = None
    merged: bool | None = Field(
        None, description="whether inference ran on the merged, plain model; None for the floor"
    )
    done: list[str] = Field([], description="the parts that are finished, for going on")
    notes: list[str] = []


class Results(_Part):
    """A whole bench. `spec`: what was asked for; `energy_by`: nvml, rapl, or empty where nothing counts energy.

    task: of the model; metric: the score that counts, of those in a curve's `scores` (of a loss less is better).
    """

    schema_version: int = SCHEMA
    spec: dict[str, Any]
    where: Where
    task: str = ""
    metric: str = ""
    tokens_per_step: int
    energy_by: str = ""
    rows: list[Row]

    def row(self, method: str) -> Row | None:
        """The row of a method, or None."""
        return next((row for row in self.rows if row.method == method), None)

    def lora(self) -> Row | None:
        """The plain LoRA, else the first of several, or None."""
        return self.row(LORA) or next((row for row in self.rows if row.method.partition(":")[0] == LORA), None)

    def remarks(self) -> list[str]:
        """Each note once, with the methods that it is about unless that is all of them."""
        about: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.notes:
                about.setdefault(note, []).append(row.method)
        everyone = len(self.rows)
        return [note if len(names) == everyone else f"{', '.join(names)}: {note}" for note, names in about.items()]

    def write(self, folder: Path) -> None:
        """Replace the file, whole."""
        replace_file(folder / RESULTS_FILE, json.dumps(self.model_dump(), indent=2) + "\n")


def read_results(folder: Path) -> Results:
    """The bench that lies in a folder. Raises: NotAModelError where none does, DamagedError where it does not parse."""
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise NotAModelError(str(folder), f"no {RESULTS_FILE}", expected="a folder that `surgery bench --out` wrote")
    document = read_json(path)
    found = document.get("schema_version")
    if found != SCHEMA:
        raise DamagedError(str(path), f"schema_version {found!r}", expected=str(SCHEMA))
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(str(path), f"{where}: {shorten(str(first['input']), 60)}", expected=first["msg"]) from error


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The median and the quartiles of the ratios round by round. At least two rounds each."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return quartiles(found)


def step_ratio(row: Row, other: Row | None) -> tuple[float, float, float] | None:
    """Median and quartiles of a method's steps to another's, where both ran in the same rounds."""
    if other is None or len(row.seconds) < 2 or len(row.seconds) != len(other.seconds):
        return None
    return ratios(row.seconds, other.seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high
