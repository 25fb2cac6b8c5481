"""What must hold before a run starts: settings that fit each other, the device and the data."""

from __future__ import annotations

from pathlib import Path

from surgery.combinations import Request, facts, of_section
from surgery.errors import RecipeError, UnsupportedError, closest
from surgery.experts import require_layers
from surgery.metrics import metric_names
from surgery.plan import SurgeryPlan
from surgery.ranks import count
from surgery.recipe import TrainSection
from surgery.zero import STAGES, require_deepspeed


def asked_of_run(settings: TrainSection, device: str, *, has_launcher: bool) -> Request:
    """What a run's settings ask for on a device, as the table of combinations has it."""
    known = {"train.device": device, "launched": "yes" if has_launcher else "no"}
    return {**of_section("train", settings), **facts(known)}


def known_of(plan: SurgeryPlan) -> Request:
    """What an adapter's plan adds to that. Where processes are several, all know."""
    held = plan.quantization.kind if plan.quantization else ""
    processes = count() if count() > 1 else 0
    known = {"paca.resample": plan.spec.get("resample"), "method": plan.method, "task": plan.task}
    return facts({**known, "held": held, "processes": processes})


def require_zero(checkpoint: str, strategy: str) -> None:
    """DeepSpeed is there, and nothing is resumed: transformers lets it read its own checkpoints only.

    Raises: UnsupportedError.
    """
    require_deepspeed()
    if checkpoint:
        found, fix = f"{strategy} on the way from {Path(checkpoint).name}", "Go on with strategy fsdp2 or ddp"
        raise UnsupportedError("train.strategy", found, expected="a strategy that resumes", fix=fix)


def require_strategy(plan: SurgeryPlan, strategy: str, checkpoint: str) -> None:
    """A strategy can train what the plan has, and go on from where it is to. Raises: UnsupportedError."""
    if strategy == "zero3":  # it puts together what a module holds itself, and experts' columns lie below
        require_layers(plan, "train.strategy=zero3")
    if strategy in STAGES:
        require_zero(checkpoint, strategy)


def require_evaluation(settings: TrainSection, task: str, *, has_eval: bool) -> None:
    """Early stopping has data to evaluate on, a metric that the task has, and a checkpoint of each evaluation.

    Raises: RecipeError.
    """
    if not settings.early_stopping_patience:
        return
    if not has_eval:
        raise RecipeError("train.early_stopping_patience", "no evaluation data", expected="data.eval or eval_fraction")
    known, found = ("loss", *metric_names(task)), settings.metric_for_best
    if found not in known:
        fix = closest(found, known)
        raise RecipeError("train.metric_for_best", repr(found), expected=f"one of {', '.join(known)}", fix=fix)
    if settings.save_steps and settings.eval_steps and settings.save_steps != settings.eval_steps:
        raise RecipeError(
            "train.save_steps",
            f"{settings.save_steps} with early stopping, which keeps a checkpoint of each evaluation",
            expected=f"{settings.eval_steps}, as train.eval_steps",
            fix="Leave train.save_steps out",
        )
