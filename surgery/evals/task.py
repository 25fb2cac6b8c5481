"""What an evaluation task is, what is asked of it, and how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from surgery.errors import RequestError
from surgery.evals.scorer import Scorer
from surgery.evals.scores import Scores
from surgery.examples import Cells
from surgery.formats import recognise
from surgery.rows import read_rows

DEFAULT_BATCH, DEFAULT_SHOTS, DEFAULT_NEW_TOKENS = 8, 5, 256


@dataclass(frozen=True)
class EvalSpec:
    """What is asked for. None: not given, so that the task's own value holds.

    data, shots_data: files or hub ids, as in training; columns: role -> column. limit: only the first rows.
    tasks_folder: where lm-eval finds tasks of one's own.
    """

    task: str
    data: tuple[str, ...] = ()
    shots_data: tuple[str, ...] = ()
    shots: int | None = None
    limit: int | None = None
    batch: int | None = None
    max_new_tokens: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"
    base: str | None = None
    tasks_folder: Path | None = None

    def __post_init__(self) -> None:
        given = {
            "--shots": (self.shots, 0),
            "--limit": (self.limit, 1),
            "--batch": (self.batch, 1),
            "--max-new-tokens": (self.max_new_tokens, 1),
        }
        for option, (value, least) in given.items():
            if value is not None and value < least:
                raise RequestError(option, str(value), expected=f"{least} or more")

    @property
    def rows_at_once(self) -> int:
        return self.batch or DEFAULT_BATCH

    @property
    def shots_used(self) -> int:
        """How many solved examples stand before each question."""
        return (DEFAULT_SHOTS if self.shots_data else 0) if self.shots is None else self.shots

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or DEFAULT_NEW_TOKENS


@dataclass(frozen=True)
class Rows:
    """What was read of the data, each with the file or data set that it came from."""

    items: Sequence[Any]
    files: Sequence[str]


Score = Callable[[Scorer, Rows, Rows, EvalSpec], Scores]


@dataclass(frozen=True)
class EvalTask:
    """A benchmark. `format`, `reads_as`: the data format of its rows, and for which task of training that is read.

    metrics: their names, the first the one that is quoted. kinds: the kinds of models that it can score. read: a row
    to what `score` takes; score: model, rows and solved examples to scores. options: those of `--shots`,
    `--max-new-tokens` and `--batch` that mean something here.
    """

    name: str
    source: str
    metrics: tuple[str, ...]
    kinds: tuple[str, ...]
    format: str
    reads_as: str
    read: Callable[[Cells], Any]
    score: Score
    options: tuple[str, ...] = ("batch",)


def read_items(task: EvalTask, references: Sequence[str], spec: EvalSpec, *, limit: int | None) -> Rows:
    """The rows of files or hub data sets. Raises: DataError: missing, of other columns, without rows."""
    items: list[Any] = []
    files: list[str] = []
    for reference in references:
        rows = read_rows(reference, columns=spec.columns, default_split=None)
        first = next(rows)
        shape = recognise(first, task=task.reads_as, format_name=task.format, columns=spec.columns)
        left = None if limit is None else limit - len(items)
        found = [task.read(shape.cells(row)) for row in islice(chain([first], rows), left)]
        items += found
        files += [reference] * len(found)
    return Rows(items, files)


def require_options(task: EvalTask, spec: EvalSpec) -> None:
    """Raises: RequestError: an option that would be ignored, or solved examples that are nowhere."""
    if not spec.data:
        raise RequestError("--data", "nothing", expected=f"the rows of {task.name}, as a file or a hub id")
    given = {
        "shots": spec.shots is not None or bool(spec.shots_data),
        "batch": spec.batch is not None,
        "max-new-tokens": spec.max_new_tokens is not None,
    }
    for name, is_given in given.items():
        if is_given and name not in task.options:
            known = ", ".join(f"--{option}" for option in task.options)
            raise RequestError(f"--{name}", f"given for {task.name}, which has none", expected=f"only {known}")
    if spec.tasks_folder is not None:
        raise RequestError("--tasks-folder", f"given for {task.name}", expected="--task lm-eval:NAME with it")
    if spec.shots and not spec.shots_data:
        raise RequestError("--shots", str(spec.shots), expected="--shots-data with rows to take them from")
    if spec.shots == 0 and spec.shots_data:
        raise RequestError("--shots-data", "given with --shots 0", expected="one of the two")
