"""The command lines that a run can be had with again, from what its record says."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.embedding_rows import NUMBER
from surgery.errors import option_of
from surgery.lookup import METHODS, load
from surgery.plan import SurgeryPlan
from surgery.recipe import DataSection, TrainSection
from surgery.report.reading import Run

BY_FLAG = ("train", "eval", "sha256")  # of the data section: said otherwise


def command_lines(run: Run) -> list[str]:
    """`surgery apply ..` and, where it was trained, `surgery train ..`: what is not said is a default.

    The base is named as from where the report is made; data files are named as they were when training.
    """
    recorded = run.manifest.base
    beside = os.path.normpath((run.adapter or run.folder) / recorded.path) if recorded.path else "MODEL"
    base = recorded.hub_id or beside
    adapter = "adapter"
    lines = [shlex.join(["surgery", "apply", base, "-o", adapter, *_apply_options(run.plan)])]
    if run.settings:
        lines.append(shlex.join(["surgery", "train", adapter, *_train_options(run)]))
    return lines


def _apply_options(plan: SurgeryPlan) -> Iterable[str]:
    if plan.method != "paca":
        yield f"--method={plan.method}"
    spec_type = load(METHODS, plan.method, "--method").spec_type
    usual = json.loads(json.dumps(vars(spec_type())))
    for name, value in plan.spec.items():
        if value == usual.get(name):
            continue
        flag = option_of(name)
        if isinstance(value, Mapping):
            yield from (f"{flag}={pattern}={number}" for pattern, number in value.items())
        elif isinstance(value, list):
            yield from (f"{flag}={NUMBER if type(item) is int else ''}{item}" for item in value)
        else:
            yield flag if value is True else f"{flag}={value}"
    if plan.whole:
        yield f"--task={plan.task}"
        if plan.labels:
            yield f"--labels={','.join(plan.labels)}"


def _train_options(run: Run) -> Iterable[str]:
    for name in run.inputs.get("train", ()):
        yield f"--data={name}"
    for name in run.inputs.get("eval", ()):
        yield f"--eval-data={name}"
    if run.processes > 1:
        yield f"--nproc={run.processes}"
    yield from _changed("train", run.settings, TrainSection().model_dump())
    yield from _changed("data", {k: v for k, v in run.inputs.items() if k not in BY_FLAG}, DataSection().model_dump())


def _changed(section: str, entries: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterable[str]:
    for name, value in entries.items():
        if name in usual and value != usual[name]:
            yield f"{section}.{name}={value if isinstance(value, str) else json.dumps(value)}"
