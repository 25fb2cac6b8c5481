"""The metrics before the first step and after the last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.checkpoint import read_json
from surgery.data import Prepared
from surgery.ranks import is_main
from surgery.recipe import TrainSection
from surgery.runs import BEFORE_FILE
from surgery.writing import replace_file
from surgery.zero import STAGES

GAUDI_TIMINGS = ("end_time", "graph_compliation_duration")  # spelt so


def first_evaluation(
    trainer: Any, folder: Path, settings: TrainSection, prepared: Prepared, *, resumed: bool
) -> dict[str, float]:
    """The metrics before the first step, kept in a file so that a resumed run still knows them."""
    path = folder / BEFORE_FILE
    if resumed and path.is_file():
        return {name: float(value) for name, value in read_json(path).items()}
    if prepared.eval is None or not settings.eval_on_start or settings.strategy in STAGES:
        return {}  # DeepSpeed's engine is there from the first step on
    metrics = _metrics(trainer.evaluate())
    if is_main():
        replace_file(path, json.dumps(metrics) + "\n")
    return metrics


def last_evaluation(trainer: Any, prepared: Prepared) -> dict[str, float]:
    """The metrics of the state that is kept; as a rule it has been evaluated already."""
    if prepared.eval is None:
        return {}
    state = trainer.state
    kept = state.best_global_step if state.best_model_checkpoint else state.global_step
    done = [entry for entry in state.log_history if entry["step"] == kept and "eval_loss" in entry]
    return _metrics(done[-1] if done else trainer.evaluate())


def _metrics(raw: Mapping[str, float]) -> dict[str, float]:
    """The metrics without the trainer's timings (and a device's memory) and without its prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", *GAUDI_TIMINGS)
    named = {name.removeprefix("eval_"): float(value) for name, value in raw.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in timings}
