"""A run's memory by part, as `surgery plan` predicts it from the run's own settings."""

from __future__ import annotations

import json
from collections.abc import Sequence

from surgery.checkpoint import read_json
from surgery.errors import SurgeryError
from surgery.forecast import Question, forecast
from surgery.memory.prediction import ADDED, Prediction
from surgery.report import charts
from surgery.report.parts import NOTHING, Figure, Table, Text, size
from surgery.report.reading import Run

ACTIVATIONS = "activations"
PREDICTED_BY = ("batch_size", "precision", "attention", "gradient_checkpointing", "strategy", "cpu_offload")


def predicted_memory(run: Run) -> Figure | Text:
    """The parts as a chart, or why there is none."""
    try:
        found = forecast(str(run.adapter or run.folder), _question(run), _settings(run))
    except SurgeryError as error:
        return Text((f"Memory by part is not predicted: {error}",))
    return _figure(found)


def _question(run: Run) -> Question:
    said = " ".join(run.training.get("data", ()))
    packed = "packed to" in said if said else None
    return Question(
        device=str(run.training.get("device") or run.settings.get("device", "")),
        devices=run.processes,
        padded=None if packed is None else not packed,
    )


def _settings(run: Run) -> list[str]:
    section = {f"train.{name}": run.settings[name] for name in PREDICTED_BY if name in run.settings}
    if "max_length" in run.inputs:
        section["data.max_length"] = _length(run)
    return [f"{key}={json.dumps(value)}" for key, value in section.items()]


def _length(run: Run) -> int:
    """The tokens of a row that training saw at most: a smaller limit of the tokenizer wins."""
    path = (run.adapter or run.folder) / "tokenizer_config.json"
    limit = read_json(path).get("model_max_length") if path.is_file() else None
    wanted = int(run.inputs["max_length"])
    return min(wanted, int(limit)) if isinstance(limit, (int, float)) else wanted


def _figure(found: Prediction) -> Figure:
    names = {"columns": ADDED[found.method]}
    held = [(names.get(name, name), value, "held") for name, value in found.parts.items()]
    parts = [*held, *((name, value, ACTIVATIONS) for name, value in found.activations.items())]
    parts = [part for part in parts if part[1]]
    rows = [{"name": name, "value": value, "label": size(value), "group": group} for name, value, group in parts]
    kept = sum(found.activations.values())
    shape = f"{found.run.batch} x {found.run.sequence} tokens on {found.run.device}"
    summary = (
        f"Predicted, not measured: a step of {shape} holds {size(found.total)}, of which {size(kept)} are activations "
        "kept for the backward pass."
    )
    table = tuple((n, group, size(v), f"{v:,}") for n, v, group in [*parts, ("sum", found.total, NOTHING)])
    spec = charts.bars(rows, x="bytes", description=summary, unit="bytes")
    data = Table("Memory by part, predicted", ("part", "kind", "size", "bytes"), table, right=(2, 3))
    return Figure("Memory by part (predicted)", summary, spec, data, _sentence(found.notes))


def _sentence(notes: Sequence[str]) -> str:
    text = "; ".join(notes)
    return f"{text[:1].upper()}{text[1:]}."
