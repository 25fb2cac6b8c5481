"""The training run: an adapter folder and data in, the trained adapter folder out, checkpoints on the way.

`checkpoints/` in the adapter folder holds `run.json` (what is being trained, and how) and `checkpoint-N` folders: the
trained state exactly, optimizer, schedule, generators and the trainer's counters; never the base. Each appears whole,
by rename.
"""

from __future__ import annotations

import hashlib
import itertools
import json
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
from transformers import PrinterCallback, TrainerState

from surgery import acceleration, trackers
from surgery.adapter import Adapter, find_base, open_adapter, update_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint, read_json
from surgery.combinations import Request, facts, of_section
from surgery.combinations import require as require_together
from surgery.compat import fall_silent, keep_no_cache
from surgery.data import DataSpec, Prepared, inspect_labels, prepare, prepare_images
from surgery.delta import ADAPTER_FILE, Delta
from surgery.errors import (
    DataError,
    InterruptedRunError,
    RecipeError,
    RequestError,
    UnsupportedError,
    closest,
    counted,
)
from surgery.experts import require_layers
from surgery.features import ROW, FeatureCache, numbered, open_cache
from surgery.images import TASK as IMAGES
from surgery.images import folder_digest, read_processor
from surgery.lookup import backend_of, resolve
from surgery.metrics import metric_names, metrics_for, preprocess_for
from surgery.operate import attach_plan, collect, load_base_model, replanned
from surgery.plan import SurgeryPlan
from surgery.ranks import (
    adopt_slurm,
    count,
    from_main,
    is_launched,
    is_main,
    joined,
    require_own,
    require_places,
)
from surgery.recipe import DataSection, TrainSection
from surgery.runs import (
    BEFORE_FILE,
    CHECKPOINTS,
    LOG_FILE,
    RUN_FILE,
    latest_checkpoint,
    open_run,
    step_of,
    this_process,
)
from surgery.sharding import shard
from surgery.survey import TASKS, TaskSpec
from surgery.tensorfile import file_sha256
from surgery.tokens import read_tokenizer
from surgery.trainer import (
    TRAINER_FILE,
    Interruption,
    KeepFrozenInputs,
    LogFile,
    Progress,
    Resample,
    StopEarly,
    StopWhenAsked,
    StopWhenDiverged,
    SurgeryCheckpoints,
    interruptible,
    read_state,
    remove_leftovers,
    remove_whole,
)
from surgery.writing import replace_file, require_disk
from surgery.zero import STAGES, require_deepspeed
from surgery.zero import prepare as cut

# Settings that change neither the result (but for rounding) nor the schedule: a resumed run may have others.
FREE_SETTINGS = (
    "logging_steps",
    "save_total_limit",
    "eval_batch_size",
    "threads",
    "device",
    "tf32",
    "attention",
    "compile",
    "liger",
    "lean",
    "hpu_mode",
    "hpu_warmup_steps",
    "cache_features",
    "cache_bytes",
    "strategy",
    "cpu_offload",
    "report_to",
)
GAUDI_TIMINGS = ("end_time", "graph_compliation_duration")  # spelt so
PER_STEP = ("batch_size", "gradient_accumulation")  # these and the number of processes decide what a step sees


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


# --- the run


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
    with interruptible() as interruption, joined(device):
        adapter = open_adapter(folder)
        anew = _for_task(adapter, data, task or TaskSpec(), base)
        plan = anew.plan if anew else adapter.plan
        require_together({**asked, **known_of(plan)})
        run = _Run.describe(adapter, plan, data, settings)
        checkpoint = from_main(lambda: _where_to_start(adapter, run, resume=resume, overwrite=overwrite))
        if checkpoint == FINISHED:
            return result_of(adapter)
        run = replace(run, started=_when_started(adapter, checkpoint), lean=_began_lean(adapter, checkpoint))
        if (
            settings.strategy == "zero3"
        ):  # which puts together what a module holds itself, and experts' columns lie below
            require_layers(plan, "train.strategy=zero3")
        if settings.strategy in STAGES:
            _require_zero(checkpoint, settings.strategy)
        prepared = _prepare(replace(data.spec(), static_shapes=backend.static_shapes), adapter, plan)
        _require_evaluation(settings, plan.task, has_eval=prepared.eval is not None)
        root = find_base(adapter.record, adapter.folder, base)
        if anew:
            adapter = _replan(adapter, anew)
        mirrors = data.horizontal_flip
        return _run(_Job(adapter, root, prepared, settings, backend, device, checkpoint, run, mirrors), interruption)


def _prepare(spec: DataSpec, adapter: Adapter, plan: SurgeryPlan) -> Prepared:
    if plan.task == IMAGES:
        return prepare_images(spec, processor=read_processor(adapter.folder), labels=_labels(plan))
    return prepare(spec, task=plan.task, tokenizer=read_tokenizer(adapter.folder), labels=_labels(plan))


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


def _require_zero(checkpoint: str, strategy: str) -> None:
    """DeepSpeed is there, and nothing is resumed: transformers lets it read its own checkpoints only.

    Raises: UnsupportedError.
    """
    require_deepspeed()
    if checkpoint:
        found, fix = f"{strategy} on the way from {Path(checkpoint).name}", "Go on with strategy fsdp2 or ddp"
        raise UnsupportedError("train.strategy", found, expected="a strategy that resumes", fix=fix)


def _replan(adapter: Adapter, anew: Delta) -> Adapter:
    """The adapter with its state planned anew, on every rank."""
    from_main(lambda: bool(update_adapter(adapter, anew, adapter.record.manifest)))
    return open_adapter(adapter.folder)


def _require_evaluation(settings: TrainSection, task: str, *, has_eval: bool) -> None:
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


@dataclass(frozen=True)
class _Job:
    """Everything a run needs. `checkpoint`: the folder to go on from, or empty; `mirrors`: images at random."""

    adapter: Adapter
    root: Path
    prepared: Prepared
    settings: TrainSection
    backend: Any
    device: str
    checkpoint: str
    run: _Run
    mirrors: bool = False


KEPT_PLAIN = "nothing, as the run began; lean=on makes the rest of it lean"


def _settle_lean(job: _Job, model: Any) -> tuple[_Job, str]:
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


def _run(job: _Job, interruption: Interruption) -> TrainResult:
    adapter, prepared = job.adapter, job.prepared
    started = time.monotonic()
    job.backend.prepare()
    model, autocast = _load_for_training(adapter, job.root, job.settings, job.device)
    job, kept_plain = _settle_lean(job, model)
    settings = job.settings
    kernels = acceleration.prepare(model, settings, device=job.device, autocast=autocast)
    folder = adapter.folder / CHECKPOINTS
    steps = count_steps(settings, len(prepared.train), only_whole_batches=job.backend.static_shapes)
    arguments = job.backend.training_arguments(
        settings, folder=folder, device=job.device, autocast=autocast, steps=steps, has_eval=prepared.eval is not None
    )
    features = _open_features(job, model, autocast)
    if settings.strategy == "fsdp2":
        shard(model, device=job.device, cpu_offload=settings.cpu_offload)
    if settings.strategy in STAGES:
        cut(model, settings.strategy)
    trainer = _trainer(job, model, arguments, interruption, features)
    from_main(lambda: _prepare_folder(job, folder))
    before = _first_evaluation(trainer, folder, settings, prepared, resumed=bool(job.checkpoint))
    with features or nullcontext():
        loss = _go(trainer, job, steps, interruption)
    if interruption.requested:
        last = latest_checkpoint(folder)
        where = last.name if last else "no checkpoint"
        raise InterruptedRunError(
            "train", f"stopped at step {trainer.state.global_step}, {where} is whole", fix="Go on with --resume auto"
        )
    after = _last_evaluation(trainer, prepared)
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


def _prepare_folder(job: _Job, folder: Path) -> None:
    """What killed runs left is gone, and so is an earlier run that is not gone on with; this one's record is there."""
    remove_leftovers(job.adapter.folder)
    if not job.checkpoint:
        remove_whole(folder)
    job.run.write(folder)


def _store(job: _Job, delta: Delta, result: TrainResult, kernels: acceleration.Kernels) -> None:
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


def _go(trainer: Any, job: _Job, steps: int, interruption: Interruption) -> float:
    """Train to the end, and return the mean loss of the steps done now (of those logged, where none was left)."""
    if job.checkpoint and _is_complete(Path(job.checkpoint), steps, job.settings.early_stopping_patience):
        trainer.state = TrainerState.load_from_json(str(Path(job.checkpoint) / TRAINER_FILE))
        trainer.surgery_keep_checkpoints()
        read_state(trainer.model, job.adapter.plan, Path(trainer.state.best_model_checkpoint or job.checkpoint))
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        return sum(losses) / len(losses)
    interruption.is_training = True
    outcome = trainer.train(resume_from_checkpoint=job.checkpoint or None)
    interruption.is_training = False
    return float(outcome.training_loss)


def _is_complete(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Whether nothing is left to train: the run was stopped between its last step and its end."""
    stored = read_json(checkpoint / TRAINER_FILE).get("stateful_callbacks", {}).get(StopEarly.__name__)
    out_of_patience = bool(patience and stored and stored["attributes"][StopEarly.COUNTER] >= patience)
    return out_of_patience or step_of(checkpoint) >= steps


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


# --- the task


def _for_task(adapter: Adapter, data: DataSection, task: TaskSpec, base: str | Path | None) -> Delta | None:
    """A fresh adapter's state planned anew where the task asks for another head; None where it stays as it is."""
    plan = adapter.plan
    name = task.name or plan.task
    if name == "features":
        known = ", ".join(known for known in TASKS if known != "features")
        raise RequestError("--task", f"a {plan.architecture} has no task of its own", expected=f"one of {known}")
    labels = task.labels or (_labels(plan) if name == plan.task else ()) or inspect_labels(data.spec(), name)
    if name == plan.task and (not labels or labels == _labels(plan)):
        return None
    if adapter.record.manifest.training:
        raise RequestError(
            "--task",
            f"{name} with labels {', '.join(labels) or 'none'}",
            expected=f"{plan.task} with labels {', '.join(_labels(plan)) or 'none'}, as trained so far",
            fix="Apply again to train another task",
        )
    checkpoint = Checkpoint.open(find_base(adapter.record, adapter.folder, base))
    return replanned(adapter, checkpoint, TaskSpec(name, labels))


def _labels(plan: SurgeryPlan) -> tuple[str, ...]:
    names = plan.config.get("id2label", {})
    return () if plan.task == "regression" else tuple(names[key] for key in sorted(names, key=int))


def _load_for_training(adapter: Adapter, root: Path, settings: TrainSection, device: str) -> tuple[Any, str]:
    """The attached model on the CPU and the autocast it trains under (fp32: none).

    Weights keep the checkpoint's dtype, but fp16 on a CPU computes in fp32 (what is trained still rounds to fp16).
    Heads train in fp32, which beside 16-bit weights needs autocast.
    """
    dtype = torch.float32 if device == "cpu" and _is_half(adapter.plan, root) else None
    model = load_base_model(root, adapter.plan, dtype=dtype)
    attach_plan(model, adapter.plan, adapter.delta)
    keep_no_cache(model)
    autocast = acceleration.choose_autocast(settings.precision, device)
    if adapter.plan.whole and model.dtype != torch.float32:
        acceleration.set_heads(model, {name: patch.values.float() for name, patch in adapter.delta.whole.items()})
        has_bf16 = device != "cuda" or acceleration.has_bf16()
        autocast = "bf16" if model.dtype == torch.bfloat16 and has_bf16 else "fp16"
    return model, autocast


def _is_half(plan: SurgeryPlan, root: Path) -> bool:
    """Whether what trains, or the backbone that a side network reads, has fp16 weights."""
    weights = plan.targets or Checkpoint.open(root).values()
    return any(weight.dtype == "F16" for weight in weights)


# --- resuming, or not

FINISHED = "finished"


@dataclass(frozen=True)
class _Run:
    """What a run is: its plan, its settings, its data. Two runs with the same digest give the same result.

    `start`, the digest of the adapter file it began with, and `started`, when it did, are no part of what the run is:
    they tell a second run with the same settings from the first. Nor is `lean`, whether its blocks are to be so (None:
    it has not begun), which changes how sums are rounded.
    """

    plan: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    start: str = ""
    started: str = ""
    lean: bool | None = None

    @classmethod
    def describe(cls, adapter: Adapter, plan: SurgeryPlan, data: DataSection, settings: TrainSection) -> _Run:
        kept = {k: v for k, v in settings.model_dump().items() if k not in (*FREE_SETTINGS, *PER_STEP)}
        kept["examples_per_step"] = settings.batch_size * settings.gradient_accumulation * count()
        names = [name for name in (*data.train, *data.eval) if Path(name).exists()]
        files = {n: file_sha256(Path(n)) if Path(n).is_file() else folder_digest(Path(n)) for n in names}
        start = adapter.record.manifest.files[ADAPTER_FILE]
        return cls(plan.id, kept, {**data.model_dump(), "sha256": files}, start)

    @property
    def digest(self) -> str:
        parts = asdict(replace(self, start=""))
        del parts["started"], parts["lean"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: Path, *, finished: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        document = {"digest": self.digest, "finished": finished, "process": this_process(), **asdict(self)}
        replace_file(folder / RUN_FILE, json.dumps(document, indent=2) + "\n")

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The settings in which an earlier run was different, by name."""
        ours: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        flat = [("plan", ours["plan"], other.get("plan"))]
        for part in ("settings", "data"):
            theirs = other.get(part, {})
            flat += [(f"{part}.{key}", value, theirs.get(key)) for key, value in ours[part].items()]
        return [name for name, mine, theirs in flat if mine != theirs]


def _when_started(adapter: Adapter, checkpoint: str) -> str:
    """Now, in UTC; of a run that is resumed, as its note has it. A name for folders: no colons."""
    noted = open_run(adapter).get("started", "") if checkpoint else ""
    return noted or datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")


def _began_lean(adapter: Adapter, checkpoint: str) -> bool | None:
    """Whether a run that is resumed began with lean blocks; without a word of it, as of old, it did not."""
    return bool(open_run(adapter).get("lean", False)) if checkpoint else None


def _where_to_start(adapter: Adapter, run: _Run, *, resume: str, overwrite: bool) -> str:
    """The checkpoint to go on from, FINISHED, or the empty string for a fresh start."""
    folder = adapter.folder / CHECKPOINTS
    if resume not in ("auto", "no"):
        raise RequestError("--resume", repr(resume), expected="auto or no")
    earlier = open_run(adapter)
    if resume == "auto" and adapter.record.manifest.training.get("run") == run.digest and not earlier:
        return FINISHED
    if earlier and not overwrite:
        if resume == "no":
            raise RequestError(
                str(folder),
                "an interrupted run",
                expected="a decision",
                fix="Go on with --resume auto, or drop its checkpoints with --overwrite",
            )
        if earlier.get("digest") != run.digest:
            changed = ", ".join(run.differences(earlier)) or "settings"
            raise RequestError(
                str(folder),
                f"an interrupted run with other {changed}",
                expected="the same settings",
                fix="Give the settings it was started with, or drop it with --overwrite",
            )
        last = latest_checkpoint(folder)
        return str(last) if last else ""
    return ""


# --- the trainer


def _open_features(job: _Job, model: Any, autocast: str) -> FeatureCache | None:
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


def _trainer(job: _Job, model: Any, arguments: Any, interruption: Interruption, features: FeatureCache | None) -> Any:
    adapter, prepared, settings = job.adapter, job.prepared, job.settings
    rows = prepared.train
    if features or job.mirrors:
        rows = rows.add_column(ROW, list(range(len(rows))))
    if features or adapter.plan.task == IMAGES:
        arguments.remove_unused_columns = False  # the trainer would take the numbers away, or the images
    trainer_class = type("SurgeryTrainer", (SurgeryCheckpoints, job.backend.trainer_class()), {})
    callbacks: list[Any] = [Progress(), LogFile(adapter.folder / LOG_FILE)] if is_main() else []
    if is_main():
        step = step_of(Path(job.checkpoint)) + 1 if job.checkpoint else 0
        tracked = trackers.Tracked(adapter.folder, job.run.started, step)
        callbacks += trackers.callbacks(settings.report_to, tracked, arguments)
    callbacks += [StopWhenDiverged(), StopWhenAsked(interruption)]
    if adapter.plan.spec.get("resample"):
        callbacks.append(Resample(adapter.plan))
    if settings.gradient_checkpointing:
        callbacks.append(KeepFrozenInputs())
    if settings.early_stopping_patience:
        callbacks.append(StopEarly(settings.early_stopping_patience))
    task = adapter.plan.task
    trainer: Any = trainer_class(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=prepared.eval,
        data_collator=numbered(prepared.collator),
        compute_metrics=metrics_for(task),
        preprocess_logits_for_metrics=preprocess_for(task),
        callbacks=callbacks,
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


def _first_evaluation(
    trainer: Any, folder: Path, settings: TrainSection, prepared: Prepared, *, resumed: bool
) -> dict[str, float]:
    """The metrics before the first step, kept in a file so that a resumed run still knows them."""
    path = folder / BEFORE_FILE
    if resumed and path.is_file():
        return {name: float(value) for name, value in read_json(path).items()}
    if prepared.eval is None or not settings.eval_on_start or settings.strategy in STAGES:
        return {}  # DeepSpeed's engine is there from the first step on
    metrics = _metrics(trainer.evaluate())
    if is_main():
        replace_file(path, json.dumps(metrics) + "\n")
    return metrics


def _last_evaluation(trainer: Any, prepared: Prepared) -> dict[str, float]:
    """The metrics of the state that is kept; as a rule it has been evaluated already."""
    if prepared.eval is None:
        return {}
    state = trainer.state
    kept = state.best_global_step if state.best_model_checkpoint else state.global_step
    done = [entry for entry in state.log_history if entry["step"] == kept and "eval_loss" in entry]
    return _metrics(done[-1] if done else trainer.evaluate())


def _metrics(raw: Mapping[str, float]) -> dict[str, float]:
    """The metrics without the trainer's timings (and a device's memory) and without its prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", *GAUDI_TIMINGS)
    named = {name.removeprefix("eval_"): float(value) for name, value in raw.items() if name.startswith("eval_")}
    return {name: value for name, value in named.items() if name not in timings}


if __name__ == "__main__":  # what launchers start: `torchrun -m surgery.train ADAPTER ..`
    _flags = list(itertools.takewhile(("-v", "-q").__contains__, sys.argv[1:]))
    resolve("surgery.cli:main")([*_flags, "train", *sys.argv[1 + len(_flags) :]])
