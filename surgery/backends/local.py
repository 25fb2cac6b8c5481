"""CPU and CUDA, through transformers' own Trainer."""

from __future__ import annotations

import io
import logging
import math
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from surgery.acceleration import choose_tf32
from surgery.backends import Backend, shared_arguments
from surgery.compat import TRANSFORMERS_5, checkpointing_name
from surgery.errors import InterruptedRunError, RecipeError, RequestError, SurgeryError, UnsupportedError
from surgery.ranks import FOLLOWED, KILLED, STOPPED, RankError, launching, say_why
from surgery.recipe import TrainSection
from surgery.zero import settings as zero_settings


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

    `autocast`: fp32 (none), bf16 or fp16. `steps`: of the whole run. Raises: RecipeError.
    """
    from transformers import TrainingArguments

    _require_own(autocast)
    zero = zero_settings(section.strategy, cpu_offload=section.cpu_offload, autocast=autocast)
    autocast = "fp32" if zero else autocast  # DeepSpeed's own configuration says it
    name, is_on = checkpointing_name(TrainingArguments), section.gradient_checkpointing
    checkpointing = {name: is_on, f"{name}_kwargs": {"use_reentrant": False} if is_on else None}
    return TrainingArguments(
        optim="adamw_torch_fused",
        use_cpu=device == "cpu",
        bf16=autocast == "bf16",
        fp16=autocast == "fp16",
        tf32=choose_tf32(section.tf32, device, autocast),
        dataloader_pin_memory=device == "cuda",
        dataloader_drop_last=False,
        log_level_replica="error",
        deepspeed=zero,
        **shared_arguments(section, folder=folder, steps=steps, has_eval=has_eval),
        **checkpointing,
    )


def _require_own(autocast: str) -> None:
    """What `accelerate launch` was told, and would do beside the run's own settings, is what these say.

    Raises: RecipeError.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    backend, told = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower(), "by accelerate's configuration"
    if TRANSFORMERS_5 and precision not in ("no", autocast):  # 4.55 sets that variable itself
        expected = f"train.precision={precision} in its place"
        raise RecipeError("ACCELERATE_MIXED_PRECISION", f"{precision}, {told}", expected=expected)
    if backend != "no":
        raise RecipeError("ACCELERATE_DYNAMO_BACKEND", f"{backend}, {told}", expected="train.compile=true in its place")


def peak_memory_bytes(device: str) -> int:
    """The allocator's peak on CUDA, the process's peak resident set on the CPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- several processes


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run `python -m surgery.train *arguments` in so many processes on this machine, by torchrun.

    What follows `--` in the arguments is torchrun's. The error that a process ended with first is said once, here.
    Returns its exit code, or 0. Raises: RequestError for arguments that torchrun does not take.
    """
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, torchrun = arguments[:cut], list(arguments[cut + 1 :])
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # pages about a child that fails: it says why in a line
    where = torchrun or ["--standalone"]
    options = _parse_torchrun([f"--nproc-per-node={nproc}", *where, "-m", "surgery.train", *own])
    with launching(nproc) as folder:
        return say_why(folder, _run_torchrun(options))


def _parse_torchrun(options: list[str]) -> Any:
    from torch.distributed.run import parse_args

    usage = io.StringIO()
    try:
        with redirect_stderr(usage):
            return parse_args(options)  # type: ignore[no-untyped-call]
    except SystemExit as error:
        found = usage.getvalue().strip().rpartition("error: ")[2]
        raise RequestError("torchrun", found, expected="arguments that `torchrun --help` lists") from error


def _run_torchrun(options: Any) -> RankError | None:
    """None, or how the first process that failed ended, as far as the launcher sees it."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    def is_killed(failure: Any) -> bool:
        return bool(failure.exitcode < 0) and failure.exitcode != -signal.SIGTERM  # by which torchrun ends the others

    def order(failed: tuple[int, Any]) -> tuple[bool, bool, int]:
        return not is_killed(failed[1]), failed[1].exitcode < 0, failed[1].timestamp

    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        number, failure = min(error.failures.items(), key=order)
        how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        text = str(SurgeryError("train", f"rank {number} ended with {how}", fix="Go on with --resume auto"))
        return RankError(number, 0.0, SurgeryError.exit_code, text, KILLED if is_killed(failure) else FOLLOWED)
    except SignalException as error:
        stopped = InterruptedRunError("train", f"stopped by {error.sigval.name}", fix="Go on with --resume auto")
        return RankError(0, math.inf, stopped.exit_code, str(stopped), STOPPED)
    return None


def needed_environment(_section: TrainSection) -> dict[str, str]:
    """No variable has to be set before torch is imported."""
    return {}


def prepare() -> None:
    """Nothing has to happen before a model is loaded."""


BACKEND = Backend(
    "local",
    ("cpu", "cuda"),
    choose_device,
    trainer_class,
    training_arguments,
    peak_memory_bytes,
    launch,
    needed_environment,
    prepare,
)
