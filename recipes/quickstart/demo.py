"""The main job from end to end on the quickstart's model: measure, apply, train, export merged, verify, measure again.

    python recipes/quickstart/demo.py            # or: make demo

The trained adapter and the merged checkpoint stay in build/quickstart/; another run replaces them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from task import Row, answer, exact_match, read_rows, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import surgery
from surgery.checkpoint import Checkpoint
from surgery.errors import SurgeryError
from surgery.recipe import Recipe
from surgery.recipe_file import read_recipe
from surgery.train import TrainResult

HERE = Path(__file__).resolve().parent
RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB on Linux


@dataclass
class Stopwatch:
    """Wall-clock seconds by stage, in the order in which the stages ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body, and say on stderr that it runs."""
        print(f"{name} ..", file=sys.stderr, flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the table tells. Scores are shares of rows answered exactly; differences are of logits."""

    before: float
    after: float
    rows: int
    training: TrainResult
    total_values: int
    max_logit_difference: float
    peak_memory_bytes: int
    stopwatch: Stopwatch


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES


def score(folder: Path, rows: Sequence[Row], *, title: str) -> float:
    """Load a checkpoint the plain transformers way, show one answer, and measure the task on it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = answer(model, tokenizer, [rows[0]["prompt"]])[0]
    print(f"{title}: {rows[0]['prompt']!r} -> {given!r}")
    return exact_match(model, tokenizer, rows)


def count_values(folder: Path) -> int:
    """All values of a checkpoint, from its headers."""
    return sum(prod(info.shape) for info in Checkpoint.open(folder).values())


def run_demo(recipe: Recipe, out: Path) -> Outcome:
    """Carry the recipe out below `out`, one call of the library a stage."""
    logging.disable_progress_bar()
    watch = Stopwatch()
    base, adapter, merged = Path(recipe.model), out / "adapter", out / "merged"
    rows = read_rows(Path(recipe.data.eval[0]))
    with watch.stage("measure the base"):
        before = score(base, rows, title="base")
    with watch.stage("apply"):
        surgery.apply(base, adapter, recipe.spec(), task=recipe.task_spec())
    with watch.stage("train"):
        training = surgery.train(adapter, recipe.data, recipe.train)
    with watch.stage("export merged"):
        surgery.export(adapter, merged, format="safetensors", check=False)
    with watch.stage("verify"):
        verification = surgery.verify(merged, prompts=[row["prompt"] for row in rows[:16]])
    with watch.stage("measure the merged"):
        after = score(merged, rows, title="merged")
    if verification.max_logit_difference is None:
        sys.exit("demo: the logits were not compared; " + "; ".join(verification.lines()))
    return Outcome(
        before=before,
        after=after,
        rows=len(rows),
        training=training,
        total_values=count_values(base),
        max_logit_difference=verification.max_logit_difference,
        peak_memory_bytes=peak_memory_bytes(),
        stopwatch=watch,
    )


def table(outcome: Outcome) -> list[str]:
    """Write the outcome as two aligned columns."""
    training, seconds = outcome.training, outcome.stopwatch.seconds
    share = training.trained_values / outcome.total_values
    entries = [
        ("exact match, base", f"{outcome.before:.3f} on {outcome.rows} held-out rows"),
        ("exact match, merged", f"{outcome.after:.3f} on the same rows"),
        ("trained values", f"{training.trained_values:,} of {outcome.total_values:,} ({share:.1%})"),
        ("training steps", f"{training.steps:,} on {training.device}"),
        ("time", f"{sum(seconds.values()):.1f} s in all"),
        *((f"  {name}", f"{value:.1f} s") for name, value in seconds.items()),
        ("peak memory", f"{outcome.peak_memory_bytes / 1e6:.0f} MB of this process, PyTorch included"),
        ("largest difference", f"{outcome.max_logit_difference:g} between trained and merged logits"),
    ]
    width = max(len(name) for name, _ in entries)
    return [f"{name:<{width}}  {value}" for name, value in entries]


def prepare_folder(out: Path) -> Path:
    """Empty the demo's own folders below `out` and write the task's data there."""
    for name in ("adapter", "merged", "data"):
        shutil.rmtree(out / name, ignore_errors=True)
    write_task(out / "data")
    return out / "data"


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description="Fine-tune, merge and verify the quickstart's model.")
    parser.add_argument("--out", type=Path, default=Path("build/quickstart"), help="default: build/quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of recipe.yaml to change")
    arguments = parser.parse_args()
    data = prepare_folder(arguments.out).resolve()
    files = [f"data.{part}={json.dumps([str(data / f'{part}.jsonl')])}" for part in ("train", "eval")]
    try:
        outcome = run_demo(read_recipe(HERE / "recipe.yaml", [*files, *arguments.overrides]), arguments.out)
    except SurgeryError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print("\n".join(["", *table(outcome), "", f"The merged checkpoint is in {arguments.out / 'merged'}"]))


if __name__ == "__main__":
    main()
