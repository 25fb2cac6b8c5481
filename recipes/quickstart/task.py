"""The quickstart's task: read a parcel note, answer with a JSON record, which the base model has never seen done.

    python recipes/quickstart/task.py data/      # writes data/train.jsonl and data/eval.jsonl

Rows are {"prompt": ..., "completion": ...}. Names in eval.jsonl appear in no training row and in no pretraining page.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corpus import Parcel, draw_parcel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, str]
TRAIN_ROWS = 4000
EVAL_ROWS = 200
EVAL_BATCH_ROWS = 50
MAX_NEW_TOKENS = 64


def to_row(parcel: Parcel) -> Row:
    """Write a parcel as a prompt and its completion."""
    record = {"from": parcel.sender, "to": parcel.receiver, "item": parcel.item, "count": parcel.count}
    return {"prompt": f"{parcel.sentence()}\nAs JSON: ", "completion": json.dumps(record)}


def make_rows(count: int, *, seed: int, for_eval: bool) -> list[Row]:
    """Draw rows with training names or, for_eval, with the names kept for evaluation."""
    rng = random.Random(f"{'eval' if for_eval else 'train'}/{seed}")
    return [to_row(draw_parcel(rng, for_eval=for_eval)) for _ in range(count)]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read rows written by write_rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_task(folder: Path, *, seed: int = 0) -> None:
    """Write train.jsonl and eval.jsonl into the folder; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", make_rows(TRAIN_ROWS, seed=seed, for_eval=False))
    write_rows(folder / "eval.jsonl", make_rows(EVAL_ROWS, seed=seed, for_eval=True))


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Complete prompts greedily, in one batch padded on the left."""
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    texts: list[str] = tokenizer.batch_decode(generated[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> float:
    """Return the share of rows whose greedy answer is the completion, character for character."""
    was_training = model.training
    model.eval()
    hits = 0
    for start in range(0, len(rows), EVAL_BATCH_ROWS):
        batch = rows[start : start + EVAL_BATCH_ROWS]
        answers = answer(model, tokenizer, [row["prompt"] for row in batch])
        hits += sum(text.strip() == row["completion"] for text, row in zip(answers, batch, strict=True))
    model.train(was_training)
    return hits / len(rows)


def main() -> None:
    """Write the task's two files."""
    parser = argparse.ArgumentParser(description="Write the quickstart's task.")
    parser.add_argument("folder", type=Path, help="where train.jsonl and eval.jsonl go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows (default 0)")
    arguments = parser.parse_args()
    write_task(arguments.folder, seed=arguments.seed)


if __name__ == "__main__":
    main()
