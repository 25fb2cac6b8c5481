"""What a run trains for: the task and its labels, the adapter planned anew for them, and its data."""

from __future__ import annotations

from pathlib import Path

from surgery.adapter import Adapter, find_base, open_adapter, update_adapter
from surgery.checkpoint import Checkpoint
from surgery.data import Prepared, inspect_labels, prepare, prepare_images
from surgery.data_spec import DataSpec
from surgery.delta import Delta
from surgery.errors import RequestError
from surgery.images import TASK as IMAGES
from surgery.images import read_processor
from surgery.operate import replanned
from surgery.plan import SurgeryPlan
from surgery.ranks import from_main
from surgery.recipe import DataSection
from surgery.survey import TASKS, TaskSpec
from surgery.tokens import read_tokenizer


def prepare_data(spec: DataSpec, adapter: Adapter, plan: SurgeryPlan) -> Prepared:
    """The sets that a run trains and evaluates on. Raises: DataError."""
    if plan.task == IMAGES:
        return prepare_images(spec, processor=read_processor(adapter.folder), labels=plan.labels)
    return prepare(spec, task=plan.task, tokenizer=read_tokenizer(adapter.folder), labels=plan.labels)


def store_anew(adapter: Adapter, anew: Delta) -> Adapter:
    """The adapter with its state planned anew, on every rank."""
    from_main(lambda: bool(update_adapter(adapter, anew, adapter.record.manifest)))
    return open_adapter(adapter.folder)


def plan_for_task(adapter: Adapter, data: DataSection, task: TaskSpec, base: str | Path | None) -> Delta | None:
    """A fresh adapter's state planned anew where the task asks for another head; None where it stays as it is."""
    plan = adapter.plan
    name = task.name or plan.task
    if name == "features":
        known = ", ".join(known for known in TASKS if known != "features")
        raise RequestError("--task", f"a {plan.architecture} has no task of its own", expected=f"one of {known}")
    labels = task.labels or (plan.labels if name == plan.task else ()) or inspect_labels(data.spec(), name)
    if name == plan.task and (not labels or labels == plan.labels):
        return None
    if adapter.record.manifest.training:
        raise RequestError(
            "--task",
            f"{name} with labels {', '.join(labels) or 'none'}",
            expected=f"{plan.task} with labels {', '.join(plan.labels) or 'none'}, as trained so far",
            fix="Apply again to train another task",
        )
    checkpoint = Checkpoint.open(find_base(adapter.record, adapter.folder, base))
    return replanned(adapter, checkpoint, TaskSpec(name, labels))
