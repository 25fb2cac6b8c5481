"""GLUE's ten tasks: their columns, their classes and metrics, and how T5 writes them as text.

Columns and class numbers are those of the hub's `nyu-mll/glue`. As text a row is the task's name, then each column's
name and value in alphabetical order, and the answer is a word: "rte sentence1: .. sentence2: .." -> "entailment".
STS-B's number is rounded to a fifth, "3.2". The diagnostic set `ax` is MNLI's task under MNLI's name.
Sources: GLUE, arXiv 1804.07461; T5, arXiv 1910.10683, appendix D, and its `t5/data/glue_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery.errors import DataError, closest, shorten
from surgery.examples import Cells, Labelled, PromptCompletion, target_number

_INFERENCE = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class GlueTask:
    """One of the ten. `classes`: their names, by number; none where the label is a number to predict.

    `metrics`: those that GLUE reports, the first of them first. `prefix`: T5's word for the task.
    """

    name: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    prefix: str = ""

    def prompt(self, texts: Mapping[str, str]) -> str:
        """The row as T5 reads it. texts: by column."""
        return " ".join([self.prefix or self.name, *(f"{column}: {texts[column]}" for column in sorted(self.columns))])

    def number(self, label: object, *, place: str) -> int:
        """A label of the file, a class's number or name, as the number. Raises: DataError."""
        require_label(label, place=place)
        text = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
        numbers = {str(number): number for number in range(len(self.classes))}
        found = {**numbers, **{name: number for number, name in enumerate(self.classes)}}.get(text)
        if found is None or isinstance(label, bool):
            expected = f"one of {', '.join(self.classes)} or 0 to {len(self.classes) - 1}"
            fix = closest(text, self.classes)
            raise DataError(place, f"found the label {shorten(repr(label), 60)}", expected=expected, fix=fix)
        return found

    def word(self, label: object, *, place: str) -> str:
        """A label as T5 writes it: the class's name, or a number rounded to a fifth. Raises: DataError."""
        if self.classes:
            return self.classes[self.number(label, place=place)]
        require_label(label, place=place)
        return f"{round(target_number(label, place=place) * 5) / 5:.1f}"


GLUE: Mapping[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        GlueTask("stsb", ("sentence1", "sentence2"), (), ("pearson", "spearman")),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        GlueTask("mnli", ("premise", "hypothesis"), _INFERENCE),
        GlueTask("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        GlueTask("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        GlueTask("wnli", ("sentence1", "sentence2"), ("not_entailment", "entailment")),
        GlueTask("ax", ("premise", "hypothesis"), _INFERENCE, ("matthews_correlation",), prefix="mnli"),
    )
}
SHAPES = tuple(dict.fromkeys(task.columns for task in GLUE.values()))  # the columns that the tasks have between them


def require_label(label: object, *, place: str) -> None:
    """Raises: DataError: -1, which is GLUE's mark of a row without a label."""
    if label is None or str(label) in ("-1", "-1.0"):
        fix = "Use the validation split: GLUE's test sets have no labels"
        raise DataError(place, f"found the label {label}", expected="a row with its label", fix=fix)


def texts_of(cells: Cells, columns: tuple[str, ...]) -> tuple[str, str | None]:
    """The one text, or the pair."""
    first, *second = (cells.text(column) for column in columns)
    return first, second[0] if second else None


def read_labelled(cells: Cells, task: GlueTask) -> Labelled:
    """A row for a classifier, its label as GLUE's own name of the class; for STS-B as a number."""
    place, label = cells.row.place, cells.cell("label")
    text, pair = texts_of(cells, task.columns)
    if task.classes:
        return Labelled(place, text, pair, task.word(label, place=place))
    require_label(label, place=place)
    return Labelled(place, text, pair, label)


def read_as_it_stands(cells: Cells, columns: tuple[str, ...]) -> Labelled:
    """A row of an unnamed task: the label is what the file has."""
    label = cells.cell("label")
    require_label(label, place=cells.row.place)
    return Labelled(cells.row.place, *texts_of(cells, columns), label)


def read_words(cells: Cells, task: GlueTask) -> PromptCompletion:
    """A row for T5."""
    texts = {column: cells.text(column) for column in task.columns}
    return PromptCompletion(cells.row.place, task.prompt(texts), task.word(cells.cell("label"), place=cells.row.place))
