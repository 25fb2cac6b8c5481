"""GLUE: a classifier's classes, or the word that T5 finds likeliest, measured as GLUE measures each task.

Source: arXiv 1804.07461; for T5, arXiv 1910.10683.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from surgery.errors import UnsupportedError, counted, shorten
from surgery.evals.scorer import CLASSIFIER, ENCODER_DECODER, Scorer, score_rows
from surgery.evals.scores import Array, Metric, Scores, mean, parts_by, resampled
from surgery.evals.task import EvalSpec, EvalTask, Rows
from surgery.examples import Cells, target_number
from surgery.glue import GLUE, GlueTask, require_label, texts_of
from surgery.metrics import classification_metrics, regression_metrics

FIFTHS = tuple(number / 5 for number in range(26))  # what T5 was trained to answer for STS-B


@dataclass(frozen=True)
class Item:
    """A row: for a classifier its texts, for T5 its prompt, and the class's number or the value."""

    text: str
    pair: str | None
    prompt: str
    label: float


@dataclass(frozen=True)
class Prediction:
    """What the trainer's metrics take."""

    predictions: Array
    label_ids: Array


def read(cells: Cells, task: GlueTask) -> Item:
    """A row with its label. Raises: DataError."""
    text, pair = texts_of(cells, task.columns)
    place, label = cells.row.place, cells.cell("label")
    require_label(label, place=place)
    number = task.number(label, place=place) if task.classes else target_number(label, place=place)
    return Item(text, pair, task.prompt({column: cells.text(column) for column in task.columns}), float(number))


def score(scorer: Scorer, rows: Rows, _solved: Rows, spec: EvalSpec, *, task: GlueTask) -> Scores:
    """The task's own metrics. Raises: UnsupportedError: a head of other classes."""
    items: Sequence[Item] = rows.items
    guesses, cut = _guesses(scorer, items, spec.rows_at_once, task)
    labels = np.asarray([item.label for item in items])
    measure = partial(_measure, task=task, guesses=guesses, labels=labels)
    is_words = scorer.kind == ENCODER_DECODER
    return Scores(
        metrics=measure(np.arange(len(items))),
        asked=[(item.prompt if is_words else f"{item.text}\x1f{item.pair or ''}", f"{item.label:g}") for item in items],
        parts=parts_by("file", rows.files, measure),
        settings={"answers": _described(scorer, task)},
        notes=(f"{counted(cut, 'row')} cut to the model's {scorer.positions} positions",) if cut else (),
    )


def _guesses(scorer: Scorer, items: Sequence[Item], batch: int, task: GlueTask) -> tuple[Array, int]:
    """Numbers (rows, classes) in GLUE's order, or values (rows,), and how many rows were cut."""
    where = f"glue/{task.name}"
    if scorer.kind == CLASSIFIER:
        order = class_order(scorer.classes, task)
        tokens = [scorer.encode(item.text, item.pair) for item in items]
        numbers = score_rows(scorer, tokens, (), batch=batch, where=where)
        found = numbers[:, order] if task.classes else numbers[:, 0]
    else:
        words = task.classes or tuple(f"{value:.1f}" for value in FIFTHS)
        tokens = [scorer.encode(item.prompt, None) for item in items]
        numbers = score_rows(scorer, tokens, [scorer.answer(word) for word in words], batch=batch, where=where)
        found = numbers if task.classes else np.asarray(FIFTHS)[numbers.argmax(axis=1)]
    return found, sum(row.is_cut for row in tokens)


def class_order(classes: Sequence[str], task: GlueTask) -> list[int]:
    """The number under which the model has each of the task's classes: by name, or by number where it has no names.

    Raises: UnsupportedError: a head of other classes.
    """
    wanted, count = task.classes, len(classes)
    if sorted(classes) == sorted(wanted):
        return [list(classes).index(name) for name in wanted]
    unnamed = ([f"LABEL_{number}" for number in range(count)], [str(number) for number in range(count)])
    if count == len(wanted) and list(classes) in unnamed:
        return list(range(count))
    if not wanted and count == 1:
        return [0]
    has = f"a head for {shorten(', '.join(classes), 80)}" if count > 1 else "a head for a number"
    expected = f"one for {', '.join(wanted)}" if wanted else "one for a number (regression)"
    raise UnsupportedError(f"glue/{task.name}", has, expected=expected, fix="Train a head for this task first")


def _measure(numbers: Array, *, task: GlueTask, guesses: Array, labels: Array) -> Mapping[str, Metric]:
    own, truth = guesses[numbers], labels[numbers]

    def of(drawn: Array) -> Mapping[str, float]:
        known: Any = Prediction(own[drawn], truth[drawn] if not task.classes else truth[drawn].astype(np.int64))
        return classification_metrics(known) if task.classes else regression_metrics(known)

    drawn_names = [name for name in task.metrics if name != "accuracy"]
    found = resampled(drawn_names, of, len(numbers)) if drawn_names else {}
    if "accuracy" in task.metrics:
        found["accuracy"] = mean(own.argmax(axis=1) == truth)
    return {name: found[name] for name in task.metrics}


def _described(scorer: Scorer, task: GlueTask) -> str:
    if scorer.kind == CLASSIFIER:
        return "the head's classes" if task.classes else "the head's number"
    return f"the likelihoods of {', '.join(task.classes) or '0.0, 0.2, .. 5.0'}"


TASKS: Mapping[str, EvalTask] = {
    f"glue/{task.name}": EvalTask(
        name=f"glue/{task.name}",
        source="arXiv 1804.07461",
        metrics=task.metrics,
        kinds=(CLASSIFIER, ENCODER_DECODER),
        format=f"glue/{task.name}",
        reads_as="seq2seq",
        read=partial(read, task=task),
        score=partial(score, task=task),
    )
    for task in GLUE.values()
}
