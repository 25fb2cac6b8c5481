"""All other benchmarks: lm-eval's, run by lm-eval on the model as it stands in memory.

An adapter of PaCA is merged in memory first; READ's side network runs beside its backbone. lm-eval reads its tasks'
data from the hub. A task of one's own is a YAML file, in a folder that `--tasks-folder` names.
Source: github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.adapter import find_model
from surgery.checkpoint import RECORD_FILE
from surgery.errors import RequestError, UnsupportedError
from surgery.evals.scorer import CLASSIFIER
from surgery.evals.scores import Metric, Part
from surgery.evals.task import EvalSpec
from surgery.evals.torch_scorer import open_torch
from surgery.generate import TorchModel
from surgery.lookup import resolve
from surgery.manifest import ADAPTER, MERGED, REMOTE_CODE, read_record
from surgery.onnx_runtime import is_onnx
from surgery.operate import detach

SIMPLE_EVALUATE = "lm_eval:simple_evaluate"
TASK_MANAGER = "lm_eval.tasks:TaskManager"
MODEL_CLASS = "lm_eval.models.huggingface:HFLM"
WHERE = "lm-eval"


def run(model: str, spec: EvalSpec, name: str) -> tuple[TorchModel, Path, Mapping[str, Any]]:
    """The model that was scored, its folder, and lm-eval's own results.

    Raises: RequestError, UnsupportedError: lm-eval is missing, or the model is none that it can score.
    """
    require_options(spec)
    simple_evaluate, manager, model_class = (resolve(name) for name in (SIMPLE_EVALUATE, TASK_MANAGER, MODEL_CLASS))
    if is_onnx(Path(model)):
        fix = "Score the checkpoint or adapter that it was made from"
        raise UnsupportedError(model, "an ONNX folder", expected="a model that torch runs", fix=fix)
    tasks = manager(include_path=str(spec.tasks_folder) if spec.tasks_folder else None)
    if not name or name not in tasks.all_tasks:
        fix = f"`lm-eval ls tasks` lists them{', and so does --tasks-folder' if spec.tasks_folder else ''}"
        raise RequestError("--task", f"unknown name lm-eval:{name}", expected="a task of lm-eval's", fix=fix)
    folder, _ = find_model(model)
    opened = _merged(open_torch(folder, base=spec.base, device=spec.device))
    if opened.kind == CLASSIFIER:
        raise UnsupportedError(model, "a classifier", expected="a decoder or an encoder-decoder for lm-eval")
    wrapped = model_class(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        backend="seq2seq" if opened.kind != "decoder" else "causal",
        batch_size=spec.rows_at_once,
    )
    found: Mapping[str, Any] = simple_evaluate(
        model=wrapped,
        tasks=[name],
        num_fewshot=spec.shots,
        limit=spec.limit,
        task_manager=tasks,
        log_samples=False,
    )
    return opened, folder, found


def require_options(spec: EvalSpec) -> None:
    """Raises: RequestError: what lm-eval's tasks say themselves."""
    given = {
        "--data": spec.data,
        "--shots-data": spec.shots_data,
        "--column": spec.columns,
        "--max-new-tokens": spec.max_new_tokens,
    }
    for option, value in given.items():
        if value:
            found = "given for a task of lm-eval's, which says so itself"
            raise RequestError(option, found, expected=f"no {option}")


def _merged(model: TorchModel) -> TorchModel:
    """The same, as plain layers where it is an adapter of columns."""
    if (model.folder / RECORD_FILE).is_file():
        record = read_record(model.folder, ADAPTER, MERGED, REMOTE_CODE)
        if record.kind == ADAPTER and record.plan.targets:
            detach(model.model, merge=True)
    return model


def metrics_of(found: Mapping[str, Any]) -> tuple[dict[str, Metric], tuple[Part, ...], int]:
    """lm-eval's results as ours: those of the task asked for, of the tasks in its group, and the rows.

    found: what simple_evaluate gives; there a metric is `acc,none` and its standard error `acc_stderr,none`.
    """
    results, samples = found["results"], found["n-samples"]
    metrics = {name: _metrics(values) for name, values in results.items()}
    first, *others = metrics
    rows = {name: int(samples[name]["effective"]) for name in metrics if name in samples}
    parts = tuple(Part("task", name, rows.get(name, 0), metrics[name]) for name in others)
    return metrics[first], parts, rows.get(first, sum(rows.values()))


def _metrics(values: Mapping[str, Any]) -> dict[str, Metric]:
    found = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, float | int):
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        shown = name if filtered == "none" else f"{name} ({filtered})"
        known = float(error) if isinstance(error, float | int) and math.isfinite(error) else None
        found[shown] = Metric(float(value), known)
    return found
