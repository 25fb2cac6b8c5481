"""`surgery eval`: a model's scores on a benchmark, with what it takes to get them again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, require_model
from surgery.errors import RequestError, UnsupportedError, counted, require_known
from surgery.evals import glue, gsm8k, mmlu
from surgery.evals.scorer import Scorer
from surgery.evals.scores import Metric, Part
from surgery.evals.task import EvalSpec, EvalTask, read_items, require_options
from surgery.onnx_runtime import is_onnx
from surgery.table import align
from surgery.tensorfile import file_sha256

TASKS: Mapping[str, EvalTask] = {mmlu.TASK.name: mmlu.TASK, gsm8k.TASK.name: gsm8k.TASK, **glue.TASKS}
_ALWAYS = ("checkpoint-surgery", "tokenizers", "numpy", "scikit-learn", "scipy")
_BY_RUNTIME = {
    "torch": ("torch", "transformers"),
    "onnxruntime": ("onnxruntime",),
    "lm-eval": ("torch", "transformers", "lm-eval"),
}
OTHERS = "lm-eval:"  # what follows is a task of lm-eval's


@dataclass(frozen=True)
class EvalResult:
    """Scores, and how they came to be.

    asked_sha256: of all that the model read and what was right, so that two results can be compared. model_sha256: of
    the folder's surgery.json, or of config.json where surgery did not make it. data: sha256 by file, empty for the hub.
    """

    task: str
    model: str
    model_sha256: str
    kind: str
    runtime: str
    device: str
    rows: int
    metrics: Mapping[str, Metric]
    parts: tuple[Part, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    asked_sha256: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what was scored, a table of the metrics and of their parts."""
        how = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        head = f"{self.task}: {self.model} ({self.kind}, {self.runtime} on {self.device}), {counted(self.rows, 'row')}"
        table = [_cells("all", self.rows, self.metrics)]
        table += [_cells(f"{part.kind} {part.name}", part.rows, part.metrics) for part in self.parts]
        names = ["", "rows", *self.metrics]
        rows = [names, *([*row, *[""] * (len(names) - len(row))] for row in table)]
        notes = [f"note: {note}" for note in self.notes]
        return [head, *([how] if how else []), "", *align(rows, right=range(1, len(names))), *notes]


def _cells(name: str, rows: int, metrics: Mapping[str, Metric]) -> list[str]:
    return [name, str(rows), *map(_shown, metrics.values())]


def _shown(metric: Metric) -> str:
    error = "" if metric.standard_error is None else f" +- {metric.standard_error:.4f}"
    return f"{metric.value:.4f}{error}"


def evaluate(model: str, spec: EvalSpec) -> EvalResult:
    """Score a folder (a checkpoint, an adapter, a merged or an ONNX folder) or a hub id.

    Raises: RequestError: an unknown task, an option that means nothing; DataError; UnsupportedError: a model that
    cannot be scored on it; what opening the model raises.
    """
    require_model(model)
    started = time.monotonic()
    if spec.task.startswith(OTHERS):
        result = _by_lm_eval(model, spec)
    else:
        require_known("--task", spec.task, (*TASKS, f"{OTHERS}NAME"))
        result = _by_us(model, spec, TASKS[spec.task])
    return replace(result, seconds=round(time.monotonic() - started, 3))


def _by_us(model: str, spec: EvalSpec, task: EvalTask) -> EvalResult:
    require_options(task, spec)
    rows = read_items(task, spec.data, spec, limit=spec.limit)
    solved = read_items(task, spec.shots_data, spec, limit=None)
    folder, device, scorer = _open(model, spec)
    if scorer.kind not in task.kinds:
        fix = f"{OTHERS}NAME hands decoders to lm-eval" if spec.task in glue.TASKS else ""
        raise UnsupportedError(model, f"a {scorer.kind}", expected=f"a {' or '.join(task.kinds)}", fix=fix)
    scores = task.score(scorer, rows, solved, spec)
    batch = {"batch": spec.rows_at_once} if "batch" in task.options else {}
    return EvalResult(
        task=task.name,
        model=model,
        model_sha256=_model_digest(folder),
        kind=scorer.kind,
        runtime=scorer.runtime,
        device=device,
        rows=len(rows.items),
        metrics=scores.metrics,
        parts=scores.parts,
        settings={**scores.settings, **batch, **({"limit": spec.limit} if spec.limit else {})},
        notes=(*scores.notes, *(scorer.notes if "max-new-tokens" in task.options else ())),
        data={name: _digest(name) for name in (*spec.data, *spec.shots_data)},
        asked_sha256=hashlib.sha256(json.dumps(scores.asked).encode()).hexdigest(),
        versions=_versions(scorer.runtime),
    )


def _by_lm_eval(model: str, spec: EvalSpec) -> EvalResult:
    from surgery.evals import harness

    opened, folder, found = harness.run(model, spec, spec.task.removeprefix(OTHERS))
    metrics, parts, rows = harness.metrics_of(found)
    asked = {"shots": spec.shots, "limit": spec.limit}
    return EvalResult(
        task=spec.task,
        model=model,
        model_sha256=_model_digest(folder),
        kind=opened.kind,
        runtime="lm-eval",
        device=str(opened.model.device),
        rows=rows,
        metrics=metrics,
        parts=parts,
        settings={"batch": spec.rows_at_once, **{name: value for name, value in asked.items() if value is not None}},
        versions=_versions("lm-eval"),
    )


def _open(model: str, spec: EvalSpec) -> tuple[Path, str, Scorer]:
    """The folder, the device and the model: in onnxruntime where the folder has graphs, else in torch."""
    if is_onnx(Path(model)):
        from surgery.evals import onnx_scorer

        asked = {"--base": spec.base is not None, "--device": spec.device not in ("auto", "cpu")}
        for option, is_given in asked.items():
            if is_given:
                raise RequestError(option, "given for an ONNX folder, which runs on the CPU", expected=f"no {option}")
        return Path(model), "cpu", onnx_scorer.open_scorer(Path(model))
    from surgery.adapter import find_model
    from surgery.evals import torch_scorer

    folder, _ = find_model(model)
    opened = torch_scorer.open_torch(folder, base=spec.base, device=spec.device)
    return folder, str(opened.model.device), torch_scorer.scorer_of(opened)


def _model_digest(folder: Path) -> str:
    """The sha256 of what says which model it is."""
    found = next((folder / name for name in (RECORD_FILE, CONFIG_FILE) if (folder / name).is_file()), None)
    return file_sha256(found) if found else ""


def _versions(runtime: str) -> dict[str, str]:
    """The versions of what read the data, ran the model and measured."""
    found = {"python": platform.python_version()}
    for package in (*_ALWAYS, *_BY_RUNTIME[runtime]):
        found[package] = importlib.metadata.version(package)
    return found


def _digest(reference: str) -> str:
    return file_sha256(Path(reference)) if Path(reference).is_file() else ""
