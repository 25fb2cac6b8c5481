"""Small benches of tiny models: a specification with little to do, and the rows that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.bench.sizes import settle
from surgery.bench.spec import BenchSpec, Entry, make_spec, parse_methods
from surgery.bench.subject import Contender, Subject, build, enter, open_subject
from tests.examples import LABELLED, TEXTS, write_rows

LITTLE = {"batch": 2, "sequence": 16, "rounds": 2, "warmup": 1, "device": "cpu", "rank": 4, "hidden": 8}
CLASSES = {"task": "sequence-classification", "labels": ["animal", "person"]}


def little(model: Path, *methods: str, **given: Any) -> BenchSpec:
    """A specification with little to measure."""
    return make_spec({"model": str(model), "methods": list(methods), **LITTLE, **given})


def subject_of(model: Path, *methods: str, **given: Any) -> tuple[Subject, tuple[Entry, ...]]:
    """The model, and the methods with their sizes."""
    spec = little(model, *methods, **given)
    subject = open_subject(spec)
    return subject, tuple(entry for entry, _ in settle(subject, parse_methods(spec.methods)))


def contender_of(model: Path, method: str, **given: Any) -> Contender:
    """One method on a copy of the model."""
    subject, (entry,) = subject_of(model, method, **given)
    return enter(subject, entry, build(subject))


def text_data(folder: Path) -> dict[str, Any]:
    """Text to train on, and the same to evaluate on, as a specification's data."""
    path = folder / "text.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return {"train": [str(path)], "eval": [str(path)], "max_length": LITTLE["sequence"]}


def labelled_data(folder: Path) -> dict[str, Any]:
    """Two classes."""
    path = write_rows(folder / "labelled.jsonl", LABELLED)
    return {"train": [str(path)], "eval": [str(path)], "max_length": LITTLE["sequence"]}
