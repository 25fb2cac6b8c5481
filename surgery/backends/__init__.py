"""Where training runs: one module for each kind of device, and what such a module offers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Backend:
    """Where training runs: which Trainer, which arguments, which device. Knows nothing about methods.

    launch: run `python -m surgery.train *arguments` in so many processes on this machine; returns the exit code.
    environment: the variables that a run with these settings needs before torch is imported, and that are not set.
    prepare: what has to happen in this process before the model is loaded.
    static_shapes: every training batch has the same shape: rows are padded to `data.max_length`, and an epoch's last,
    smaller batch is left out.
    spends_process: a run changes its process for good, so that what comes after it must have another.
    """

    name: str
    devices: tuple[str, ...]
    choose_device: Any
    trainer_class: Any
    training_arguments: Any
    peak_memory_bytes: Any
    launch: Callable[[Sequence[str], int], int]
    environment: Callable[[Any], Mapping[str, str]]
    prepare: Callable[[], None]
    static_shapes: bool = False
    spends_process: bool = False


def shared_arguments(section: Any, *, folder: Path, steps: int, has_eval: bool) -> dict[str, Any]:
    """What every backend's TrainingArguments have in common, set so that no version's default decides.

    section: the train section of a recipe; steps: of the whole run.
    """
    stops_early = section.early_stopping_patience is not None
    save_steps = section.save_steps or max(1, steps // 10)
    eval_steps = section.eval_steps or (save_steps if stops_early else steps)
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": section.batch_size,
        "per_device_eval_batch_size": section.eval_batch_size or section.batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation,
        "max_steps": steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_scheduler,
        "warmup_steps": section.warmup_steps or math.ceil(steps * section.warmup_ratio),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "adam_beta1": section.adam_beta1,
        "adam_beta2": section.adam_beta2,
        "adam_epsilon": section.adam_epsilon,
        "seed": section.seed,
        "data_seed": section.seed,
        "logging_strategy": "steps",
        "logging_steps": min(section.logging_steps, steps),  # at least one line in the log
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if has_eval else "no",
        "eval_steps": eval_steps if has_eval else None,
        "eval_on_start": False,
        "save_strategy": "steps",
        "save_steps": eval_steps if stops_early else save_steps,
        "save_total_limit": None,
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": f"eval_{section.metric_for_best}" if stops_early else None,
        "greater_is_better": section.metric_for_best != "loss" if stops_early else None,
        "remove_unused_columns": True,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": True,
        "report_to": [],
        "push_to_hub": False,
    }
