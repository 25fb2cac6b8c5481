"""CPU and CUDA, through transformers' own Trainer."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from surgery.backends import Backend
from surgery.compat import accepts
from surgery.errors import UnsupportedError
from surgery.recipe import TrainSection


def choose_device(wanted: str) -> str:
    """The device that `auto`, `cpu` or `cuda` means here. Raises: UnsupportedError."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        why = "this torch is built for the CPU" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UnsupportedError("--device cuda", why, expected="a CUDA device", fix="See `surgery doctor`")
    return wanted


def trainer_class() -> Any:
    """transformers' Trainer."""
    from transformers import Trainer

    return Trainer


def training_arguments(
    section: TrainSection, *, folder: Path, device: str, autocast: str, steps: int, has_eval: bool
) -> Any:
    """A TrainingArguments with everything that matters set, so that no version's default decides.

    `autocast`: fp32 (none), bf16 or fp16. `steps`: of the whole run.
    """
    from transformers import TrainingArguments

    stops_early = section.early_stopping_patience is not None
    save_steps = section.save_steps or max(1, steps // 10)
    eval_steps = section.eval_steps or (save_steps if stops_early else steps)
    checkpointing = {f"{_checkpointing_key(TrainingArguments)}": section.gradient_checkpointing}
    if section.gradient_checkpointing:
        checkpointing[f"{_checkpointing_key(TrainingArguments)}_kwargs"] = {"use_reentrant": False}  # type: ignore[assignment]
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.eval_batch_size or section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        max_steps=steps,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.lr_scheduler,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        adam_beta1=section.adam_beta1,
        adam_beta2=section.adam_beta2,
        adam_epsilon=section.adam_epsilon,
        optim="adamw_torch_fused",
        seed=section.seed,
        data_seed=section.seed,
        use_cpu=device == "cpu",
        bf16=autocast == "bf16",
        fp16=autocast == "fp16",
        logging_strategy="steps",
        logging_steps=min(section.logging_steps, steps),  # at least one line in the log
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=eval_steps if has_eval else None,
        eval_on_start=False,
        save_strategy="steps",
        save_steps=eval_steps if stops_early else save_steps,
        save_total_limit=None,
        load_best_model_at_end=stops_early,
        metric_for_best_model=f"eval_{section.metric_for_best}" if stops_early else None,
        greater_is_better=section.metric_for_best != "loss" if stops_early else None,
        dataloader_pin_memory=device == "cuda",
        dataloader_drop_last=False,
        remove_unused_columns=True,
        disable_tqdm=True,
        report_to=[],
        push_to_hub=False,
        **checkpointing,
    )


def _checkpointing_key(arguments: Any) -> str:
    return "activation_checkpointing" if accepts(arguments, "activation_checkpointing") else "gradient_checkpointing"


def peak_memory_bytes(device: str) -> int:
    """The allocator's peak on CUDA, the process's peak resident set on the CPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m surgery.train *arguments` in so many processes on this machine. Returns the exit code."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return subprocess.run([*command, "surgery.train", *arguments], check=False).returncode  # noqa: S603  ourselves


def environment(_section: TrainSection) -> dict[str, str]:
    """No variable has to be set before torch is imported."""
    return {}


BACKEND = Backend(
    "local", ("cpu", "cuda"), choose_device, trainer_class, training_arguments, peak_memory_bytes, launch, environment
)
