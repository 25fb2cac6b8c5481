"""Small rows of benchmarks that a tiny model is scored on, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.evals.task import EvalSpec
from tests.examples import write_rows

ANIMALS = ("fox", "dog", "hen", "cow")
QUESTIONS = tuple(
    {
        "question": f"Which is {'the' if n % 3 else 'a quick brown'} {ANIMALS[n % 4]}?",
        "choices": list(ANIMALS),
        "answer": n % 4,
        "subject": ("anatomy", "virology", "astronomy")[n % 3],
    }
    for n in range(24)
)
SUMS = tuple({"question": f"{n} and 2?", "answer": f"It is {n} + 2.\n#### {n + 2}"} for n in range(6))
SENTENCES = tuple(
    {"sentence": f"{'a user' if n % 2 else 'the quick fox'} {'so ' * n}asks", "label": n % 2} for n in range(17)
)
PAIRS = tuple({"sentence1": "the fox " * (1 + n % 4), "sentence2": ANIMALS[n % 4], "label": n % 2} for n in range(17))
SIMILAR = tuple(
    {**row, "sentence1": "the fox" + " so" * n, "label": (n % 6) - 0.25 * (n % 6 == 5)} for n, row in enumerate(PAIRS)
)
BIG: Mapping[str, Mapping[str, object]] = {"llama": {"max_position_embeddings": 512}, "gpt2": {"n_positions": 512}}


def write_data(folder: Path) -> Path:
    """The rows as files."""
    named = {"mmlu": QUESTIONS, "gsm8k": SUMS, "sst2": SENTENCES, "mrpc": PAIRS, "stsb": SIMILAR}
    for name, rows in named.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def spec_of(task: str, data: Path, **changed: Any) -> EvalSpec:
    """A task on its rows; MMLU with a solved question before each."""
    shots = (str(data / "mmlu.jsonl"),) if task == "mmlu" else ()
    known: dict[str, Any] = {"shots_data": shots, "shots": 1 if shots else None}
    return EvalSpec(task, (str(data / f"{task.rpartition('/')[2]}.jsonl"),), **{**known, **changed})
