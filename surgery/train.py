"""The training run: an adapter folder and data in, the trained adapter folder out, checkpoints on the way.

`checkpoints/` in the adapter folder holds `run.json` (what is being trained, and how) and `checkpoint-N` folders: the
trained state exactly, optimizer, schedule, generators and the trainer's counters; never the base. Each appears whole,
by rename.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState

from surgery.adapter import Adapter, find_base, fresh_delta, open_adapter, update_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint, read_json
from surgery.compat import quiet_loading
from surgery.data import Prepared, inspect_labels, prepare
from surgery.delta import ADAPTER_FILE, ColumnDelta
from surgery.errors import CheckError, DamagedError, InterruptedRunError, RecipeError, RequestError, closest
from surgery.lookup import BACKENDS, METHODS
from surgery.lookup import load as lookup
from surgery.metrics import metric_names, metrics_for, preprocess_for
from surgery.operate import attach_plan, collect, load_base_model
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TASKS, TaskSpec
from surgery.tensorfile import file_sha256, read_header
from surgery.writing import fsync_path, replace_file, require_disk, write_file

CHECKPOINTS, RUN_FILE, LOG_FILE = "checkpoints", "run.json", "training_log.jsonl"
STATE_FILE, TRAINER_FILE = "state.safetensors", "trainer_state.json"
CHECKPOINT_BYTES = 16  # of each trained value: itself, AdamW's two moments, and as much again for all else
# Settings that change neither the result nor the schedule: a resumed run may have others.
FREE_SETTINGS = ("logging_steps", "save_total_limit", "eval_batch_size", "threads", "device")


@dataclass(frozen=True)
class TrainResult:
    """What a run did. `before` and `after` are the evaluation's metrics (empty without evaluation data)."""

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
    Raises: DataError, RecipeError, RequestError, DamagedError, BaseMismatchError, InterruptedRunError.
    """
    settings = settings or TrainSection()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    backend = lookup(BACKENDS, "gaudi" if settings.device == "hpu" else "local", "--device")
    device = backend.choose_device(settings.device)
    with _interruptible() as interruption:
        adapter = open_adapter(folder)
        anew = _for_task(adapter, data, task or TaskSpec(), base)
        plan = anew.plan if anew else adapter.plan
        run = _Run.describe(adapter, plan, data, settings)
        checkpoint = _where_to_start(adapter, run, resume=resume, overwrite=overwrite)
        if checkpoint == FINISHED:
            return _result_of(adapter)
        tokenizer = read_tokenizer(adapter.folder)
        prepared = prepare(data.spec(), task=plan.task, tokenizer=tokenizer, labels=_labels(plan))
        _require_evaluation(settings, plan.task, has_eval=prepared.eval is not None)
        root = find_base(adapter.record, adapter.folder, base)
        if anew:
            adapter = update_adapter(adapter, anew, adapter.record.manifest)
        return _run(_Job(adapter, root, prepared, settings, backend, device, checkpoint, run), interruption)


def _require_evaluation(settings: TrainSection, task: str, *, has_eval: bool) -> None:
    """Early stopping has data to evaluate on, and looks at a metric that the task has. Raises: RecipeError."""
    if not settings.early_stopping_patience:
        return
    if not has_eval:
        raise RecipeError("train.early_stopping_patience", "no evaluation data", expected="data.eval or eval_fraction")
    known, found = ("loss", *metric_names(task)), settings.metric_for_best
    if found not in known:
        fix = closest(found, known)
        raise RecipeError("train.metric_for_best", repr(found), expected=f"one of {', '.join(known)}", fix=fix)


@dataclass(frozen=True)
class _Job:
    """Everything a run needs. `checkpoint`: the folder to go on from, or empty."""

    adapter: Adapter
    root: Path
    prepared: Prepared
    settings: TrainSection
    backend: Any
    device: str
    checkpoint: str
    run: _Run


def _run(job: _Job, interruption: Interruption) -> TrainResult:
    adapter, prepared, settings = job.adapter, job.prepared, job.settings
    started = time.monotonic()
    model, autocast = _load_for_training(adapter, job.root, settings, job.device)
    folder = adapter.folder / CHECKPOINTS
    steps = count_steps(settings, len(prepared.train))
    arguments = job.backend.training_arguments(
        settings, folder=folder, device=job.device, autocast=autocast, steps=steps, has_eval=prepared.eval is not None
    )
    trainer = _trainer(job, model, arguments, interruption)
    _remove_leftovers(adapter.folder)
    if not job.checkpoint:
        remove_whole(folder)
    job.run.write(folder)
    before = _first_evaluation(trainer, folder, settings, prepared, resumed=bool(job.checkpoint))
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
    )
    training = {**asdict(result), "adapter": "", "settings": settings.model_dump(), "run": job.run.digest}
    delta = collect(model)
    require_disk(adapter.folder, sum((adapter.folder / name).stat().st_size for name in (ADAPTER_FILE, RECORD_FILE)))
    update_adapter(adapter, delta, replace(adapter.record.manifest, training=training))
    job.run.write(folder, finished=True)
    return result


def _go(trainer: Any, job: _Job, steps: int, interruption: Interruption) -> float:
    """Train to the end, and return the mean loss of the steps done now (of those logged, where none was left)."""
    if job.checkpoint and _is_complete(Path(job.checkpoint), steps, job.settings.early_stopping_patience):
        trainer.state = TrainerState.load_from_json(str(Path(job.checkpoint) / TRAINER_FILE))
        trainer.surgery_place_best()
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
    return out_of_patience or _step_of(checkpoint) >= steps


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs were writing, or removing, in an adapter folder."""
    for path in (*folder.glob(".*.partial"), *folder.glob(f"{CHECKPOINTS}/.*.partial")):
        pid = path.name.rsplit(".", 2)[1]
        if pid == str(os.getpid()) or not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_whole(folder: Path) -> None:
    """Remove a folder, if it is there: whoever is killed in between leaves no half of it under its name."""
    aside = partial_beside(folder)
    if folder.exists():
        folder.rename(aside)
        shutil.rmtree(aside)


def partial_beside(path: Path) -> Path:
    """Where something is put together, or taken apart, that is not to be seen in part."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _result_of(adapter: Adapter) -> TrainResult:
    """The result of a run that is finished, from the record."""
    training = adapter.record.manifest.training
    names = [name for name in TrainResult.__dataclass_fields__ if name not in ("adapter", "data")]
    return TrainResult(adapter=adapter.folder, data=tuple(training["data"]), **{name: training[name] for name in names})


def count_steps(settings: TrainSection, examples: int) -> int:
    """Optimizer steps of the whole run: the last, smaller batch of an epoch counts."""
    if settings.max_steps:
        return settings.max_steps
    batches = math.ceil(examples / settings.batch_size)
    return max(1, math.ceil(math.ceil(batches / settings.gradient_accumulation) * settings.epochs))


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies with an adapter. Raises: RequestError."""
    try:
        with quiet_loading():
            return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(
            str(folder), f"its tokenizer does not load ({first_line[:160]})", expected="the base's tokenizer files"
        ) from error


# --- the task


def _for_task(adapter: Adapter, data: DataSection, task: TaskSpec, base: str | Path | None) -> ColumnDelta | None:
    """A fresh adapter's state planned anew where the task asks for another head; None where it stays as it is."""
    plan = adapter.plan
    name = task.name or plan.task
    if name == "features":
        known = ", ".join(known for known in TASKS if known not in ("features", "image-classification"))
        raise RequestError("--task", f"a {plan.architecture} has no task of its own", expected=f"one of {known}")
    if name == "image-classification":
        raise RequestError(
            "--task",
            "images cannot be read yet",
            expected="a task on text",
            fix="Train in Python with surgery.attach and your own loop",
        )
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
    spec = lookup(METHODS, plan.method, "--method").spec_type(**plan.spec)
    return fresh_delta(checkpoint, plan_checkpoint(checkpoint, spec, TaskSpec(name, labels)))


def _labels(plan: SurgeryPlan) -> tuple[str, ...]:
    names = plan.config.get("id2label", {})
    return () if plan.task == "regression" else tuple(names[key] for key in sorted(names, key=int))


def _load_for_training(adapter: Adapter, root: Path, settings: TrainSection, device: str) -> tuple[Any, str]:
    """The attached model on the CPU and the autocast it trains under (fp32: none).

    Weights keep the checkpoint's dtype, but fp16 on a CPU computes in fp32 (what is trained still rounds to fp16).
    Heads train in fp32, which beside 16-bit weights needs autocast.
    """
    dtype = torch.float32 if device == "cpu" and _is_half(adapter.plan) else None
    model = load_base_model(root, adapter.plan, dtype=dtype)
    attach_plan(model, adapter.plan, adapter.delta)
    model.config.use_cache = False
    autocast = settings.precision
    if autocast == "auto":
        autocast = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if adapter.plan.whole and model.dtype != torch.float32:
        for target in adapter.plan.whole:
            module_name, _, name = target.parameter.rpartition(".")
            parameter = model.get_submodule(module_name)._parameters[name]  # noqa: SLF001
            parameter.data = adapter.delta.whole[target.parameter].values.to(torch.float32)
        autocast = "bf16" if model.dtype == torch.bfloat16 else "fp16"
    return model, autocast


def _is_half(plan: SurgeryPlan) -> bool:
    return any(target.dtype == "F16" for target in plan.targets)


# --- resuming, or not

FINISHED = "finished"


@dataclass(frozen=True)
class _Run:
    """What a run is: its plan, its settings, its data. Two runs with the same digest give the same result.

    `start`, the digest of the adapter file it began with, is no part of what the run is: it tells a second run with the
    same settings from the first.
    """

    plan: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    start: str = ""

    @classmethod
    def describe(cls, adapter: Adapter, plan: SurgeryPlan, data: DataSection, settings: TrainSection) -> _Run:
        kept = {k: v for k, v in settings.model_dump().items() if k not in FREE_SETTINGS}
        files = {name: file_sha256(Path(name)) for name in (*data.train, *data.eval) if Path(name).is_file()}
        start = adapter.record.manifest.files[ADAPTER_FILE]
        return cls(plan.id, kept, {**data.model_dump(), "sha256": files}, start)

    @property
    def digest(self) -> str:
        parts = asdict(replace(self, start=""))
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: Path, *, finished: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        document = {"digest": self.digest, "finished": finished, **asdict(self)}
        replace_file(folder / RUN_FILE, json.dumps(document, indent=2) + "\n")

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The settings in which an earlier run was different, by name."""
        ours: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        flat = [("plan", ours["plan"], other.get("plan"))]
        for part in ("settings", "data"):
            theirs = other.get(part, {})
            flat += [(f"{part}.{key}", value, theirs.get(key)) for key, value in ours[part].items()]
        return [name for name, mine, theirs in flat if mine != theirs]


def _where_to_start(adapter: Adapter, run: _Run, *, resume: str, overwrite: bool) -> str:
    """The checkpoint to go on from, FINISHED, or the empty string for a fresh start."""
    folder = adapter.folder / CHECKPOINTS
    if resume not in ("auto", "no"):
        raise RequestError("--resume", repr(resume), expected="auto or no")
    earlier = read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    last_run = adapter.record.manifest.training.get("run")
    # A run that was stopped between writing the adapter and saying so left another adapter than it began with.
    is_done = bool(earlier) and earlier["digest"] == last_run and earlier.get("start") != run.start
    is_open = bool(earlier) and not earlier["finished"] and not is_done
    if resume == "auto" and last_run == run.digest and not is_open:
        return FINISHED
    if is_open and not overwrite:
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


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return max(found, key=_step_of, default=None)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


# --- the trainer


class SurgeryCheckpoints:
    """Mixed into a backend's Trainer: checkpoints hold what trains and not the base, and appear by rename."""

    surgery_plan: SurgeryPlan
    surgery_keep: int
    surgery_staging: str | None = None
    args: Any
    model: Any
    state: Any

    def _get_output_dir(self, trial: Any) -> str:
        return self.surgery_staging or super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        staging = partial_beside(folder / "saving")
        self.surgery_staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.state.best_model_checkpoint = None  # a path would not outlive a move: `best_global_step` says which
            self.state.save_to_json(str(staging / name / TRAINER_FILE))
            for path in (staging / name).iterdir():
                fsync_path(path)
            fsync_path(staging / name)
            remove_whole(folder / name)
            (staging / name).rename(folder / name)
            fsync_path(folder)
        except (OSError, RuntimeError):  # the latter is how torch.save says that the disk is full
            require_disk(folder, self.surgery_plan.trained_values * CHECKPOINT_BYTES)
            raise
        finally:
            self.surgery_staging = None
            shutil.rmtree(staging, ignore_errors=True)
        self.surgery_place_best()
        self._drop_old(folder)

    def surgery_place_best(self) -> None:
        """Tell the trainer's state where its best checkpoint lies now."""
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        keeps = self.args.load_best_model_at_end and self.state.best_global_step and best.is_dir()
        self.state.best_model_checkpoint = str(best) if keeps else None

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As the trainer's, but how often one evaluates does not change what dropout draws."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]

    def _drop_old(self, folder: Path) -> None:
        kept = sorted(folder.glob("checkpoint-*"), key=_step_of)[-self.surgery_keep :]
        for path in folder.glob("checkpoint-*"):
            if path not in kept and str(path) != self.state.best_model_checkpoint:
                remove_whole(path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        if self.args.should_save and output_dir:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_state(self.model, self.surgery_plan, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_state(model or self.model, self.surgery_plan, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        read_state(self.model, self.surgery_plan, Path(self.state.best_model_checkpoint))


def write_state(model: Any, plan: SurgeryPlan, folder: Path) -> None:
    """Every trainable parameter, exactly as it is."""
    names = lookup(METHODS, plan.method, "--method").trainable_names(plan)
    tensors = {name: model.get_parameter(name).detach().cpu().contiguous() for name in sorted(names)}
    write_file(folder / STATE_FILE, safetensors.torch.save(tensors, {"plan": plan.id}))


def read_state(model: Any, plan: SurgeryPlan, folder: Path) -> None:
    """The inverse of `write_state`. Raises: DamagedError, RequestError for a state of another plan."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise DamagedError(str(folder), f"no {STATE_FILE}", expected="a training checkpoint")
    if read_header(path).metadata.get("plan") != plan.id:
        raise RequestError(str(path), "the state of another plan", expected=f"plan {plan.id}")
    tensors = safetensors.torch.load(path.read_bytes())
    names = lookup(METHODS, plan.method, "--method").trainable_names(plan)
    if set(tensors) != names:
        raise DamagedError(str(path), "its tensors are not the plan's", expected=f"{len(names)} tensors")
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)


def _trainer(job: _Job, model: Any, arguments: Any, interruption: Interruption) -> Any:
    adapter, prepared, settings = job.adapter, job.prepared, job.settings
    trainer_class = type("SurgeryTrainer", (SurgeryCheckpoints, job.backend.trainer_class()), {})
    callbacks = [Progress(), LogFile(adapter.folder / LOG_FILE), StopWhenDiverged(), StopWhenAsked(interruption)]
    if settings.early_stopping_patience:
        callbacks.append(StopEarly(settings.early_stopping_patience))
    task = adapter.plan.task
    trainer: Any = trainer_class(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=prepared.collator,
        compute_metrics=metrics_for(task),
        preprocess_logits_for_metrics=preprocess_for(task),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.surgery_plan, trainer.surgery_keep = adapter.plan, settings.save_total_limit
    return trainer


def _first_evaluation(
    trainer: Any, folder: Path, settings: TrainSection, prepared: Prepared, *, resumed: bool
) -> dict[str, float]:
    """The metrics before the first step, kept in a file so that a resumed run still knows them."""
    path = folder / "before.json"
    if resumed and path.is_file():
        return {name: float(value) for name, value in read_json(path).items()}
    if prepared.eval is None or not settings.eval_on_start:
        return {}
    metrics = _metrics(trainer.evaluate())
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
    """The metrics without the trainer's timings and without its prefix."""
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix("eval_"): float(value) for name, value in raw.items()}
    return {name: value for name, value in named.items() if name not in (*timings, "epoch", "step")}


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar on standard error."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:  # noqa: ARG002
        if hasattr(self, "bar") and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.bar.close()


class LogFile(TrainerCallback):  # type: ignore[misc]
    """`training_log.jsonl`: what the trainer logs, a line each. A resumed run drops the lines it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        lines = self.path.read_text().splitlines() if self.path.is_file() and state.global_step else []
        entries = ((line, json.loads(line)) for line in _whole_lines(lines))
        kept = [line for line, e in entries if e["step"] <= state.global_step and "train_runtime" not in e]
        replace_file(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:  # noqa: ARG002
        entry = {"step": state.global_step, "seconds": round(time.monotonic() - self.started, 3), **logs}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class StopWhenDiverged(TrainerCallback):  # type: ignore[misc]
    """A loss that is no number stays one: every step after it would be for nothing."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:  # noqa: ARG002
        if not math.isfinite(logs.get("loss", 0.0)):
            raise CheckError(
                "train",
                f"the loss is not finite at step {state.global_step}",
                expected="a number",
                fix="Training diverged: lower the learning rate and start again with --overwrite",
            )


class StopEarly(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that a resumed run takes up where it was."""

    COUNTER = "early_stopping_patience_counter"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored:
            self.early_stopping_patience_counter = stored["attributes"][self.COUNTER]


def _whole_lines(lines: list[str]) -> Iterator[str]:
    """A killed run may have left half a line at the end."""
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            return
        yield line


# --- signals


@dataclass
class Interruption:
    """Whether someone asked to stop, and whether a step is running that should end first."""

    requested: bool = False
    is_training: bool = False


class StopWhenAsked(TrainerCallback):  # type: ignore[misc]
    """Saves and stops at the end of the step in which a signal came."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.interruption.requested:
            control.should_save = control.should_training_stop = True
            if not args.load_best_model_at_end:  # else this evaluation is one of those that decide
                control.should_evaluate = False


@contextmanager
def _interruptible() -> Iterator[Interruption]:
    """SIGINT and SIGTERM end the step, save, and stop; a second one, or one outside training, stops at once."""
    interruption = Interruption()

    def handle(number: int, _frame: FrameType | None) -> None:
        if interruption.requested or not interruption.is_training:
            raise InterruptedRunError("train", f"stopped by {signal.Signals(number).name}", fix="Start it again")
        interruption.requested = True
        print("stopping after this step; once more to stop at once", file=sys.stderr)  # noqa: T201

    try:
        earlier = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs it handles signals
        earlier = {}
    try:
        yield interruption
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
