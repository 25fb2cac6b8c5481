"""Small data sets that a tiny model learns something from in a few steps, in the formats and shapes that are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec

Row = Mapping[str, Any]
NEEDS_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: make test-torchao has it")

ANIMALS = ("fox", "dog", "hen", "cow", "cat", "owl")
TEXTS = tuple(f"the {a} jumps over the {b} and {n} more" for n, a in enumerate(ANIMALS) for b in ANIMALS)
QUESTIONS = tuple((f"what is {a} plus {b}?", f"the answer is {a + b}") for a in range(6) for b in range(6))
LABELLED = tuple(
    {"text": f"{'the quick fox' if n % 2 else 'a user asks'} about {a}", "label": "animal" if n % 2 else "person"}
    for n, a in enumerate(ANIMALS * 6)
)
PAIRS = tuple(
    {"sentence1": a, "sentence2": a if n % 2 else b, "label": n % 2}
    for n, (a, b) in enumerate(zip(ANIMALS * 6, ANIMALS[1:] * 7, strict=False))
)
SCORED = tuple({"text": "fox " * (1 + n % 5) + a, "label": (n % 5) / 4} for n, a in enumerate(ANIMALS * 6))
TAGGED = tuple({"tokens": ["the", a, "sees", b], "tags": ["O", "B", "O", "B"]} for a in ANIMALS for b in ANIMALS)


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Rows in the format of the path's ending: jsonl, csv, tsv or parquet."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return path


def _chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _sharegpt(question: str, answer: str) -> Row:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _alpaca(question: str, answer: str) -> Row:
    return {"instruction": question, "input": "", "output": answer}


@dataclass(frozen=True)
class Case:
    """A tiny model, what it learns, and from which file. `data`: what the data section has beside the file."""

    family: str
    task: str
    file: str
    rows: tuple[Row, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}-{self.task}-{self.file}"

    def spec(self) -> TaskSpec:
        return TaskSpec(self.task)

    def write(self, folder: Path) -> DataSection:
        """Write the file; train and evaluate on it."""
        path = folder / self.file
        if self.rows:
            write_rows(path, self.rows)
        else:
            path.write_text("\n".join(TEXTS), encoding="utf-8")
        return DataSection(train=[str(path)], eval=[str(path)], **{"max_length": 64, **self.data})

    def train_section(self) -> TrainSection:
        return fast(**self.settings)


def fast(**settings: Any) -> TrainSection:
    """Settings under which a tiny model learns in a second."""
    usual = {"learning_rate": 2e-2, "max_steps": 10, "batch_size": 8, "logging_steps": 2, "lr_scheduler": "linear"}
    return TrainSection(**{**usual, **settings})


_QA = tuple({"prompt": question, "completion": answer} for question, answer in QUESTIONS)
_SEQ2SEQ = tuple({"source": question, "target": answer} for question, answer in QUESTIONS)

CASES = (
    Case("llama", "causal-lm", "text.txt"),
    Case("llama", "causal-lm", "chat.jsonl", tuple(_chat(*pair) for pair in QUESTIONS)),
    Case("gpt2", "causal-lm", "prompts.csv", _QA),
    Case("llama", "causal-lm", "sharegpt.jsonl", tuple(_sharegpt(*pair) for pair in QUESTIONS)),
    Case("opt", "causal-lm", "alpaca.parquet", tuple(_alpaca(*pair) for pair in QUESTIONS), {"max_length": 128}),
    Case("qwen3", "causal-lm", "text.parquet", tuple({"text": text} for text in TEXTS), {"packing": False}),
    Case("bert", "sequence-classification", "labelled.tsv", LABELLED),
    Case("roberta", "sequence-classification", "pairs.csv", PAIRS, settings={"learning_rate": 5e-2}),
    Case("llama", "sequence-classification", "labelled.jsonl", LABELLED),
    Case("bert", "regression", "scored.csv", SCORED),
    Case("bert", "token-classification", "tagged.jsonl", TAGGED),
    Case("t5", "seq2seq", "pairs.jsonl", _SEQ2SEQ, settings={"learning_rate": 5e-2}),
    Case("bart", "seq2seq", "prompts.tsv", _QA),
)


def mostly_long(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Cases for `parametrize`, of which all but the named ones take part in `make test-long` only."""
    listed = list(cases)
    assert all(case in listed for case in fast)
    marked = [(c if isinstance(c, tuple) else (c,), () if c in fast else pytest.mark.long) for c in listed]
    return [pytest.param(*values, marks=marks) for values, marks in marked]
