"""Everything a run needs, and the backend's Trainer made of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from surgery import trackers
from surgery.adapter import Adapter
from surgery.data import Prepared
from surgery.features import ROW, FeatureCache, numbered, open_cache
from surgery.images import TASK as IMAGES
from surgery.metrics import metrics_for, preprocess_for
from surgery.ranks import is_main
from surgery.recipe import TrainSection
from surgery.runs import LOG_FILE, step_of
from surgery.trainer import (
    Interruption,
    KeepFrozenInputs,
    LogFile,
    Progress,
    Resample,
    StopEarly,
    StopWhenAsked,
    StopWhenDiverged,
    SurgeryCheckpoints,
)
from surgery.training.resuming import RunNote


@dataclass(frozen=True)
class Job:
    """Everything a run needs. `checkpoint`: the folder to go on from, or empty; `mirrors`: images at random."""

    adapter: Adapter
    root: Path
    prepared: Prepared
    settings: TrainSection
    backend: Any
    device: str
    checkpoint: str
    run: RunNote
    mirrors: bool = False


def open_features(job: Job, model: Any, autocast: str) -> FeatureCache | None:
    """The kept states of the backbone, where a run asks for them. Raises: as `features.open_cache`."""
    section = job.settings
    if section.cache_features is None:
        return None
    return open_cache(
        job.adapter.plan,
        job.prepared.train,
        model,
        section.cache_features,
        limit=section.cache_bytes,
        precision=autocast,
        left_pad=job.prepared.pad_token_id if job.prepared.pads_left else None,
    )


def make_trainer(
    job: Job, model: Any, arguments: Any, interruption: Interruption, features: FeatureCache | None
) -> Any:
    """The backend's Trainer for a job, with our checkpoints and callbacks."""
    adapter, prepared, settings = job.adapter, job.prepared, job.settings
    rows = prepared.train
    if features or job.mirrors:
        rows = rows.add_column(ROW, list(range(len(rows))))
    if features or adapter.plan.task == IMAGES:
        arguments.remove_unused_columns = False  # the trainer would take the numbers away, or the images
    trainer_class = type("SurgeryTrainer", (SurgeryCheckpoints, job.backend.trainer_class()), {})
    task = adapter.plan.task
    trainer: Any = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=prepared.eval,
        data_collator=numbered(prepared.collator),
        compute_metrics=metrics_for(task),
        preprocess_logits_for_metrics=preprocess_for(task),
        callbacks=_callbacks(job, arguments, interruption),
    )
    # Where a batch is accumulated, the trainer believes that a forward with **kwargs divides its loss by the whole
    # batch's labels. Of transformers' classes those of language models do; the others give the mean of their part.
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and task == "causal-lm"
    trainer.remove_callback(PrinterCallback)
    trainer.surgery_plan, trainer.surgery_keep = adapter.plan, settings.save_total_limit
    trainer.surgery_features = features
    trainer.surgery_mirrors = settings.seed if job.mirrors else None
    if settings.strategy == "fsdp2":
        trainer.surgery_take_sharded()
    return trainer


def _callbacks(job: Job, arguments: Any, interruption: Interruption) -> list[Any]:
    """What is done at a run's events, in this order."""
    plan, settings = job.adapter.plan, job.settings
    callbacks: list[Any] = [Progress(), LogFile(job.adapter.folder / LOG_FILE)] if is_main() else []
    if is_main():
        step = step_of(Path(job.checkpoint)) + 1 if job.checkpoint else 0
        tracked = trackers.Tracked(job.adapter.folder, job.run.started, step)
        callbacks += trackers.callbacks(settings.report_to, tracked, arguments)
    callbacks += [StopWhenDiverged(), StopWhenAsked(interruption)]
    if plan.spec.get("resample"):
        callbacks.append(Resample(plan))
    if settings.gradient_checkpointing:
        callbacks.append(KeepFrozenInputs())
    if settings.early_stopping_patience:
        callbacks.append(StopEarly(settings.early_stopping_patience))
    return callbacks
