"""What a method learns: the same batches in the same order for all, then the task's metrics on held-out rows.

One plain loop trains every method: AdamW, a linear schedule with warm-up, clipping as in our own runs. Learning rates
are given, or tried on rows held out of the training set, the same grid for every method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from surgery.bench.measure import wait
from surgery.bench.results import Curve, Row, Trial
from surgery.bench.spec import BenchSpec, Entry
from surgery.bench.subject import Contender, Feed, Subject, enter
from surgery.errors import CheckError
from surgery.metrics import IGNORED, metric_names, metrics_for, preprocess_for

if TYPE_CHECKING:
    import numpy as np

MOST_POINTS = 200  # of a curve
LANGUAGE = ("causal-lm", "seq2seq")


@dataclass(frozen=True)
class Learnt:
    """One training run. scores: empty where it diverged."""

    losses: list[float]
    scores: dict[str, float]
    seconds: float


def metric_of(spec: BenchSpec, task: str) -> str:
    """What rates are chosen by, and what the table shows: as asked, else the loss of text, else the task's first."""
    return spec.metric or ("loss" if task in LANGUAGE else metric_names(task)[0])


def worth(metric: str, scores: dict[str, float]) -> tuple[float, float]:
    """What a trial counts: its score, and between equal ones its loss. More is better."""
    return (-scores["loss"] if metric == "loss" else scores[metric]), -scores["loss"]


def count_steps(spec: BenchSpec, feed: Feed) -> int:
    """Steps of a training run."""
    assert feed.prepared is not None  # noqa: S101
    return spec.steps or max(1, math.ceil(len(feed.prepared.train) / spec.batch * spec.epochs))


def learn(subject: Subject, entry: Entry, feed: Feed, base: Any, *, rate: float, seed: int, steps: int) -> Learnt:
    """Train a copy of the plain model, and evaluate it."""
    contender = enter(subject, entry, base, rate=rate, seed=seed)
    assert contender.optimizer is not None  # noqa: S101
    warmup = max(1, round(subject.spec.warmup_ratio * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        contender.optimizer, lambda done: min((done + 1) / warmup, (steps - done) / max(1, steps - warmup), 1.0)
    )
    losses: list[torch.Tensor] = []
    wait(subject.device)
    started = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout, where there is any
        for batch in feed.batches(seed, steps):
            losses.append(contender.step(batch))
            schedule.step()
    wait(subject.device)
    seconds = time.perf_counter() - started
    plain = torch.stack(losses).float().tolist()
    return Learnt(plain, evaluate(contender, feed) if all(map(math.isfinite, plain)) else {}, seconds)


@torch.no_grad()
def evaluate(contender: Contender, feed: Feed) -> dict[str, float]:
    """The loss (the mean over rows) and the task's metrics; empty where a prediction is not finite."""
    from transformers import EvalPrediction

    task, model = contender.subject.seen.task, contender.model
    model.eval()
    predictions, labels, losses, rows = [], [], 0.0, 0
    for batch in feed.eval_batches():
        with contender.subject.computing():
            output = model(**batch)
        kept = preprocess_for(task)(output.logits.float(), batch["labels"])
        if task in ("causal-lm", "token-classification"):
            kept = kept[:, -batch["labels"].shape[1] :]  # a prompt's own places come first
        predictions.append(kept.cpu().numpy())
        labels.append(batch["labels"].cpu().numpy())
        losses += float(output.loss) * len(batch["labels"])
        rows += len(batch["labels"])
    model.train()
    try:
        found = metrics_for(task)(EvalPrediction(predictions=_stack(predictions), label_ids=_stack(labels)))
    except CheckError:
        return {}
    return {"loss": losses / rows, **found} if math.isfinite(losses) else {}


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Shapes: (rows, tokens) each, of different lengths, to one array padded with what no metric counts."""
    import numpy as np

    if parts[0].ndim != 2 or parts[0].dtype.kind == "f":
        return np.concatenate(list(parts))
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=IGNORED) for p in parts])


def tune(subject: Subject, entry: Entry, feed: Feed, base: Any, row: Row) -> None:
    """Try each learning rate with the first seed on rows held out of the training set, and keep the best one."""
    spec, metric = subject.spec, metric_of(subject.spec, subject.seen.task)
    steps = spec.tune_steps or count_steps(spec, feed)
    row.tried = []
    for rate in spec.tune:
        learnt = learn(subject, entry, feed, base, rate=rate, seed=0, steps=steps)
        row.tried.append(Trial(learning_rate=rate, scores=learnt.scores))
    found = [trial for trial in row.tried if trial.scores]
    best = max(found, key=lambda trial: worth(metric, trial.scores), default=row.tried[0])
    row.learning_rate = best.learning_rate
    if best.learning_rate in (min(spec.tune), max(spec.tune)):
        row.notes.append(f"the best learning rate, {best.learning_rate:g}, is at the end of those tried")


def measure_seed(subject: Subject, entry: Entry, feed: Feed, base: Any, row: Row, seed: int) -> None:
    """One training run with the method's learning rate, into its row."""
    assert row.learning_rate is not None  # noqa: S101
    steps = count_steps(subject.spec, feed)
    learnt = learn(subject, entry, feed, base, rate=row.learning_rate, seed=seed, steps=steps)
    numbers, losses = thin(learnt.losses)
    row.curves.append(Curve(seed=seed, steps=numbers, losses=losses, scores=learnt.scores, seconds=learnt.seconds))
    if not learnt.scores:
        row.notes.append(f"seed {seed} diverged")


def thin(losses: Sequence[float], most: int = MOST_POINTS) -> tuple[list[int], list[float]]:
    """At most so many points: (last steps of stretches, mean losses over them). What is not finite is left out."""
    width = math.ceil(len(losses) / most)
    steps, means = [], []
    for start in range(0, len(losses), width):
        part = [loss for loss in losses[start : start + width] if math.isfinite(loss)]
        if part:
            steps.append(min(start + width, len(losses)))
            means.append(sum(part) / len(part))
    return steps, means
