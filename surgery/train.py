"""The training run: an adapter folder and data in, the trained adapter folder out, checkpoints on the way.

`checkpoints/` in the adapter folder holds `run.json` (what is being trained, and how) and `checkpoint-N` folders: the
trained state exactly, optimizer, schedule, generators and the trainer's counters; never the base. Each appears whole,
by rename.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from surgery.terminal import hush_libraries

if __name__ == "__main__":
    hush_libraries()  # before transformers' trainer imports them

import torch
from transformers import TrainerState

from surgery import acceleration, trackers
from surgery.adapter import Adapter, find_base, open_adapter, update_adapter
from surgery.checkpoint import RECORD_FILE
from surgery.combinations import Request
from surgery.combinations import require as require_together
from surgery.compat import fall_silent
from surgery.delta import ADAPTER_FILE, Delta
from surgery.errors import DataError, InterruptedRunError, counted
from surgery.lookup import backend_of, resolve
from surgery.operate import collect
from surgery.ranks import adopt_slurm, count, from_main, is_launched, is_main, joined, require_own, require_places
from surgery.recipe import DataSection, TrainSection
from surgery.runs import CHECKPOINTS, latest_checkpoint
from surgery.sharding import shard
from surgery.survey import TaskSpec
from surgery.trainer import TRAINER_FILE, Interruption, interruptible, read_state, remove_leftovers, remove_whole
from surgery.training.checks import asked_of_run, known_of, require_evaluation, require_strategy
from surgery.training.evaluation import first_evaluation, last_evaluation
from surgery.training.job import Job, make_trainer, open_features
from surgery.training.model import load_for_training
from surgery.training.resuming import FINISHED, RunNote, began_lean, is_complete, when_started, where_to_start
from surgery.training.task import plan_for_task, prepare_data, store_anew
from surgery.writing import require_disk
from surgery.zero import STAGES
from surgery.zero import prepare as cut

KEPT_PLAIN = "nothing, as the run began; lean=on makes the rest of it lean"


@dataclass(frozen=True)
class TrainResult:
    """What a run did. `before` and `after` are the evaluation's metrics (empty without evaluation data).

    lean: what was made lean, in words, or why a run that goes on is not (empty where nothing was).
    was_finished: nothing was done now, the figures are those of the run that had been finished before.
    """

    adapter: Path
    steps: int
    trained_values: int
    seconds: float
    peak_memory_bytes: int
    device: str
    loss: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    data: tuple[str, ...]
    lean: str = ""
    was_finished: bool = False


_OF_THE_CALL = ("adapter", "lean", "was_finished")  # what a record does not hold: it is not the run's


def train(
    folder: str | Path,
    data: DataSection,
    settings: TrainSection | None = None,
    *,
    task: TaskSpec | None = None,
    base: str | Path | None = None,
    resume: str = "no",
    overwrite: bool = False,
) -> TrainResult:
    """Train an adapter folder in place.

    resume: `no`, or `auto` to go on from the last checkpoint of an interrupted run with the same settings (a finished
    one is left alone). overwrite: throw the checkpoints of an interrupted run away.
    Where a launcher started several processes, all call this with the same arguments, and the folder is one that all
    of them see; rank 0 writes.
    Raises: DataError, RecipeError, RequestError, DamagedError, BaseMismatchError, InterruptedRunError.
    """
    settings = settings or TrainSection()
    backend, device, asked = _begin(settings)
    with interruptible() as interruption, joined(device):
        adapter = open_adapter(folder)
        anew = plan_for_task(adapter, data, task or TaskSpec(), base)
        plan = anew.plan if anew else adapter.plan
        require_together({**asked, **known_of(plan)})
        run = RunNote.describe(adapter, plan, data, settings)
        checkpoint = from_main(lambda: where_to_start(adapter, run, resume=resume, overwrite=overwrite))
        if checkpoint == FINISHED:
            return result_of(adapter)
        run = replace(run, started=when_started(adapter, checkpoint), lean=began_lean(adapter, checkpoint))
        require_strategy(plan, settings.strategy, checkpoint)
        prepared = prepare_data(replace(data.spec(), static_shapes=backend.static_shapes), adapter, plan)
        require_evaluation(settings, plan.task, has_eval=prepared.eval is not None)
        root = find_base(adapter.record, adapter.folder, base)
        if anew:
            adapter = store_anew(adapter, anew)
        mirrors = data.horizontal_flip
        return _run(Job(adapter, root, prepared, settings, backend, device, checkpoint, run, mirrors), interruption)


def _begin(settings: TrainSection) -> tuple[Any, str, Request]:
    """The backend and the device that settings mean, and what they ask for. Raises where that cannot be had."""
    adopt_slurm(os.environ)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    backend = backend_of(settings.device)
    device = backend.choose_device(settings.device)
    asked = asked_of_run(settings, device, has_launcher=is_launched())
    require_together(asked)
    acceleration.require(settings, device)
    trackers.require(settings.report_to)
    require_own(settings.strategy)
    if not is_main():
        fall_silent()
    return backend, device, asked


def launch(arguments: Sequence[str], settings: TrainSection, nproc: int) -> int:
    """Run `python -m surgery.train *arguments` in so many processes on this machine, as the device's backend does it.

    What follows `--` in the arguments is its launcher's. Returns the exit code; the processes' error has been said.
    Raises: RequestError, UnsupportedError.
    """
    backend = backend_of(settings.device)
    device = backend.choose_device(settings.device)
    require_places(device, nproc)
    require_together(asked_of_run(settings, device, has_launcher=True))
    require_own(settings.strategy)
    return int(backend.launch(arguments, nproc))


def _settle_lean(job: Job, model: Any) -> tuple[Job, str]:
    """What `auto` means, by name, and a note: a run that goes on keeps the blocks that it began with, bit for bit."""
    settings, began, note = job.settings, job.run.lean, ""
    is_lean = acceleration.choose_lean(settings, job.device)
    if settings.lean == "auto" and is_lean:
        counts = job.prepared.report.train
        wins = acceleration.is_large(model, settings.batch_size * counts.tokens / max(1, counts.examples))
        is_lean = wins if began is None else began
        note = KEPT_PLAIN if wins and not is_lean else ""
        settings = settings if is_lean else settings.model_copy(update={"lean": "off"})
    return replace(job, settings=settings, run=replace(job.run, lean=is_lean)), note


def _run(job: Job, interruption: Interruption) -> TrainResult:
    adapter, prepared = job.adapter, job.prepared
    started = time.monotonic()
    job.backend.prepare()
    model, autocast = load_for_training(adapter, job.root, job.settings, job.device)
    job, kept_plain = _settle_lean(job, model)
    kernels = acceleration.prepare(model, job.settings, device=job.device, autocast=autocast)
    folder = adapter.folder / CHECKPOINTS
    steps = count_steps(job.settings, len(prepared.train), only_whole_batches=job.backend.static_shapes)
    trainer = _build(job, model, autocast, interruption, folder=folder, steps=steps)
    from_main(lambda: _prepare_folder(job, folder))
    before = first_evaluation(trainer, folder, job.settings, prepared, resumed=bool(job.checkpoint))
    with trainer.surgery_features or nullcontext():
        loss = _go(trainer, job, steps, interruption)
    if interruption.requested:
        raise _interrupted(folder, trainer.state.global_step)
    after = last_evaluation(trainer, prepared)
    result = TrainResult(
        adapter.folder,
        trainer.state.global_step,
        adapter.plan.trained_values,
        time.monotonic() - started,
        job.backend.peak_memory_bytes(job.device),
        job.device,
        loss,
        before,
        after,
        tuple(prepared.report.lines()),
        kernels.lean or kept_plain,
    )
    delta = collect(model)
    if is_main():
        _store(job, delta, result, kernels)
        job.run.write(folder, finished=True)
    return result


def _build(job: Job, model: Any, autocast: str, interruption: Interruption, *, folder: Path, steps: int) -> Any:
    """The Trainer, and the model as the strategy divides it among the devices."""
    settings, has_eval = job.settings, job.prepared.eval is not None
    arguments = job.backend.training_arguments(
        settings, folder=folder, device=job.device, autocast=autocast, steps=steps, has_eval=has_eval
    )
    features = open_features(job, model, autocast)
    if settings.strategy == "fsdp2":
        shard(model, device=job.device, cpu_offload=settings.cpu_offload)
    if settings.strategy in STAGES:
        cut(model, settings.strategy)
    return make_trainer(job, model, arguments, interruption, features)


def _interrupted(folder: Path, step: int) -> InterruptedRunError:
    last = latest_checkpoint(folder)
    where = last.name if last else "no checkpoint"
    return InterruptedRunError("train", f"stopped at step {step}, {where} is whole", fix="Go on with --resume auto")


def _prepare_folder(job: Job, folder: Path) -> None:
    """What killed runs left is gone, and so is an earlier run that is not gone on with; this one's record is there."""
    remove_leftovers(job.adapter.folder)
    if not job.checkpoint:
        remove_whole(folder)
    job.run.write(folder)


def _store(job: Job, delta: Delta, result: TrainResult, kernels: acceleration.Kernels) -> None:
    """Put what was trained, and what the run said, into the adapter folder. Raises: ResourceError."""
    adapter = job.adapter
    figures = {name: value for name, value in asdict(result).items() if name not in _OF_THE_CALL}
    settings = job.settings.model_dump()
    ended = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    origin = {"inputs": job.run.data, "processes": count(), "started": job.run.started, "ended": ended}
    training = {**figures, "settings": settings, "kernels": asdict(kernels), "run": job.run.digest, **origin}
    needed = sum((adapter.folder / name).stat().st_size for name in (ADAPTER_FILE, RECORD_FILE))
    require_disk(adapter.folder, needed, fix="Free some space, and end the run with --resume auto")
    update_adapter(adapter, delta, replace(adapter.record.manifest, training=training))


def _go(trainer: Any, job: Job, steps: int, interruption: Interruption) -> float:
    """Train to the end, and return the mean loss of the steps done now (of those logged, where none was left)."""
    if job.checkpoint and is_complete(Path(job.checkpoint), steps, job.settings.early_stopping_patience):
        trainer.state = TrainerState.load_from_json(str(Path(job.checkpoint) / TRAINER_FILE))
        trainer.surgery_keep_checkpoints()
        read_state(trainer.model, job.adapter.plan, Path(trainer.state.best_model_checkpoint or job.checkpoint))
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return sum(losses) / len(losses)
    interruption.is_training = True
    outcome = trainer.train(resume_from_checkpoint=job.checkpoint or None)
    interruption.is_training = False
    return float(outcome.training_loss)


def result_of(adapter: Adapter) -> TrainResult:
    """The result of a run that is finished, from the record."""
    training = adapter.record.manifest.training
    names = [field.name for field in fields(TrainResult) if field.name not in (*_OF_THE_CALL, "data")]
    figures = {name: training[name] for name in names}
    lean = str(training.get("kernels", {}).get("lean", ""))
    return TrainResult(adapter=adapter.folder, data=tuple(training["data"]), lean=lean, was_finished=True, **figures)


def count_steps(settings: TrainSection, examples: int, *, only_whole_batches: bool = False) -> int:
    """Optimizer steps of the whole run: the last, smaller batch of an epoch counts, unless it is left out.

    Raises: DataError where it is left out, and there is no other.
    """
    batch = settings.batch_size * count()
    if only_whole_batches and examples < batch:
        found = f"found {counted(examples, 'example')}, fewer than one batch, and smaller batches are left out here"
        raise DataError("data.train", found, expected=f"{batch} or more", fix="Lower train.batch_size")
    if settings.max_steps:
        return settings.max_steps
    batches = examples // batch if only_whole_batches else math.ceil(examples / batch)
    return max(1, math.ceil(math.ceil(batches / settings.gradient_accumulation) * settings.epochs))


if __name__ == "__main__":  # what launchers start: `torchrun -m surgery.train ADAPTER ..`
    _flags = list(itertools.takewhile(("-v", "-q").__contains__, sys.argv[1:]))
    resolve("surgery.cli:main")([*_flags, "train", *sys.argv[1 + len(_flags) :]])
