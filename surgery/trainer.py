"""What a run adds to a backend's Trainer: checkpoints that appear whole, what is logged, and how a run is stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors.torch
import torch
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from surgery.columns import resample_steps
from surgery.compat import keep_inputs_frozen
from surgery.errors import CheckError, DamagedError, InterruptedRunError, RequestError
from surgery.experts import lane_groups
from surgery.features import ROW, FeatureCache
from surgery.images import mirrored
from surgery.plan import SurgeryPlan
from surgery.planning import trainable_names
from surgery.ranks import any_rank, count, is_main, to_main, wait
from surgery.resampling import PARTS, resample_model, restore_layers, state_of_layers
from surgery.runs import CHECKPOINTS, STATE_FILE, step_of
from surgery.sharding import assign, gather_optimizer, scatter_optimizer, settle, whole
from surgery.tensorfile import read_header
from surgery.writing import fsync_path, replace_file, require_disk, write_file
from surgery.zero import describe_optimizer, describe_scheduler

TRAINER_FILE = "trainer_state.json"
OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE = "optimizer.pt", "scheduler.pt", "rng_state.pth"
LINE_SECONDS = 30.0  # between lines of progress, where there is no terminal for a bar
CHECKPOINT_BYTES = 16  # of each trained value: itself, AdamW's two moments, and as much again for all else


class SurgeryCheckpoints:
    """Mixed into a backend's Trainer: checkpoints hold what trains and not the base, and appear by rename.

    With several processes rank 0 alone writes, whole tensors as one process would have them: a checkpoint does not tell
    how many ranks made it, but for the generators' states, of which each rank finds its own where there is one.
    """

    surgery_plan: SurgeryPlan
    surgery_keep: int
    surgery_staging: str | None = None
    surgery_features: FeatureCache | None = None
    surgery_mirrors: int | None = None
    surgery_is_sharded: bool = False
    surgery_groups: Sequence[Mapping[str, Any]]
    surgery_parameters: Sequence[Any]
    is_in_train: bool
    is_deepspeed_enabled: bool
    model_accepts_loss_kwargs: bool
    accelerator: Any
    args: Any
    optimizer: Any
    lr_scheduler: Any
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
            if is_main():
                self._publish(staging / name, folder)
        except (OSError, RuntimeError):  # the latter is how torch.save says that the disk is full
            require_disk(folder, self.surgery_plan.trained_values * CHECKPOINT_BYTES)
            raise
        finally:
            self.surgery_staging = None
            shutil.rmtree(staging, ignore_errors=True)
        wait()
        self.surgery_keep_checkpoints()

    def _publish(self, staged: Path, folder: Path) -> None:
        self.state.save_to_json(str(staged / TRAINER_FILE))
        for path in staged.iterdir():
            fsync_path(path)
        fsync_path(staged)
        remove_whole(folder / staged.name)
        staged.rename(folder / staged.name)
        fsync_path(folder)

    def surgery_take_sharded(self) -> None:
        """Train the model as `surgery.sharding` left it: accelerate adds autocast now, and nothing later on."""
        self.surgery_is_sharded = True
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.accelerator.prepare_model = lambda model, **_: model

    def surgery_keep_checkpoints(self) -> None:
        """Tell the trainer's state where its best checkpoint lies now, and keep that and the newest.

        Also of what a run that was killed had no time to remove.
        """
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        keeps = self.args.load_best_model_at_end and self.state.best_global_step and best.is_dir()
        self.state.best_model_checkpoint = str(best) if keeps else None
        if is_main():
            self._drop_old(best.parent)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As the trainer's, but how often one evaluates does not change what dropout draws.

        Before training accelerate marks the model as prepared, and would then not wrap it for several processes: each
        would train an adapter of its own.
        """
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        if count() > 1 and not self.is_in_train and not self.surgery_is_sharded:
            self.model._is_accelerate_prepared = False  # noqa: SLF001  accelerate's own mark
        return metrics

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; a training batch runs from the backbone's states where they are kept.

        Images of a training batch are mirrored at random where `surgery_mirrors` gives a seed.
        A loss that is the mean of its batch is weighted by the batch's part of all ranks' labels.
        """
        rows = inputs.pop(ROW, None)
        if self.surgery_mirrors is not None and rows is not None:
            seed, step = self.surgery_mirrors, self.state.global_step
            inputs["pixel_values"] = mirrored(inputs["pixel_values"], rows.tolist(), seed=seed, step=step)
        if self.surgery_features is None or rows is None:
            is_mean = count() > 1 and model.training and not self.model_accepts_loss_kwargs
            part = label_part(inputs["labels"]) if is_mean else None
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
            return loss if part is None else loss * part
        with self.surgery_features.batch(self.model, rows.tolist(), inputs.get("attention_mask")):
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _drop_old(self, folder: Path) -> None:
        kept = sorted(folder.glob("checkpoint-*"), key=step_of)[-self.surgery_keep :]
        for path in folder.glob("checkpoint-*"):
            if path not in kept and str(path) != self.state.best_model_checkpoint:
                remove_whole(path)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        if output_dir:
            write_state(self.model, self.surgery_plan, Path(output_dir))

    def _inner_training_loop(self, batch_size: int | None = None, **rest: Any) -> Any:  # noqa: ARG002
        """As the trainer's, with the batch size that was asked for: 4.55 takes a checkpoint's, of other ranks maybe."""
        return super()._inner_training_loop(batch_size=self.args.train_batch_size, **rest)  # type: ignore[misc]

    def create_optimizer(self, *args: Any) -> Any:
        """As the trainer's, remembered as it is before DeepSpeed cuts it."""
        optimizer = super().create_optimizer(*args)  # type: ignore[misc]
        if self.is_deepspeed_enabled:
            self.surgery_groups = optimizer.state_dict()["param_groups"]
            self.surgery_parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return optimizer

    def _optimizer_state(self) -> dict[str, Any]:
        if self.surgery_is_sharded:
            return gather_optimizer(self.optimizer)
        rate = self.lr_scheduler.get_last_lr()[0]  # one for all groups
        return describe_optimizer(self.surgery_parameters, self.surgery_groups, rate, self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not (self.surgery_is_sharded or self.is_deepspeed_enabled):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        state, schedule = self._optimizer_state(), self.lr_scheduler.state_dict()
        schedule = describe_scheduler(schedule, len(state["param_groups"]))
        if is_main():
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(schedule, Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.surgery_is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        scatter_optimizer(self.optimizer, torch.load(Path(checkpoint) / OPTIMIZER_FILE, weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        """Each rank's generators; rank 0's also under the name that one process reads."""
        if self.args.world_size <= 1:
            super()._save_rng_state(output_dir)  # type: ignore[misc]
            return
        with tempfile.TemporaryDirectory(prefix="surgery-rng-") as own:
            super()._save_rng_state(own)  # type: ignore[misc]
            states = to_main({path.name: path.read_bytes() for path in Path(own).iterdir()})
        for state in states:
            for name, data in state.items():
                (Path(output_dir) / name).write_bytes(data)
        for data in (states[0] if states else {}).values():
            (Path(output_dir) / RANDOM_FILE).write_bytes(data)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        read_state(model or self.model, self.surgery_plan, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        read_state(self.model, self.surgery_plan, Path(self.state.best_model_checkpoint))


def label_part(labels: torch.Tensor) -> torch.Tensor:
    """How many labels a batch has, to what a rank's batch has on average: 1 where all have as many."""
    own = labels.ne(-100).sum()
    total = own.clone()
    torch.distributed.all_reduce(total)
    return own * count() / total


def write_state(model: Any, plan: SurgeryPlan, folder: Path) -> None:
    """Every trainable parameter, exactly as it is; of a sharded model every rank's rows. Rank 0 writes."""
    settle(model)
    tensors = {name: whole(model.get_parameter(name)).contiguous() for name in sorted(trainable_names(plan))}
    if plan.spec.get("resample"):
        tensors |= state_of_layers(model)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / STATE_FILE, safetensors.torch.save(tensors, {"plan": plan.id}))


def read_state(model: Any, plan: SurgeryPlan, folder: Path) -> None:
    """The inverse of `write_state`. Raises: DamagedError, RequestError for a state of another plan."""
    path = folder / STATE_FILE
    if not path.is_file():
        raise DamagedError(str(folder), f"no {STATE_FILE}", expected="a training checkpoint")
    if read_header(path).metadata.get("plan") != plan.id:
        raise RequestError(str(path), "the state of another plan", expected=f"plan {plan.id}")
    tensors = safetensors.torch.load(path.read_bytes())
    names = trainable_names(plan)
    beside = {f"{lane}.{part}" for lane in lane_groups(plan) for part in PARTS} if plan.spec.get("resample") else set()
    if set(tensors) != names | beside:
        raise DamagedError(str(path), "its tensors are not the plan's", expected=f"{len(names | beside)} tensors")
    settle(model)
    if beside:
        restore_layers(model, tensors)
    for name in sorted(names):
        assign(model, name, tensors[name])


def remove_leftovers(folder: Path) -> None:
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


class KeepFrozenInputs(TrainerCallback):  # type: ignore[misc]
    """With gradient checkpointing: what asks for no gradient stays so once the trainer has switched it on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        keep_inputs_frozen(kwargs["model"])


class Progress(TrainerCallback):  # type: ignore[misc]
    """A bar on standard error; where that is no terminal, a line now and then and one at the end.

    TQDM_DISABLE=1, which `surgery -q` sets, leaves out both.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        is_quiet = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        self.says_lines = not is_quiet and not sys.stderr.isatty()
        self.said_seconds = time.monotonic()
        is_off = is_quiet or self.says_lines
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr, disable=is_off)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.bar.update(state.global_step - self.bar.n)
        if self.says_lines and time.monotonic() - self.said_seconds >= LINE_SECONDS:
            self._say(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:  # noqa: ARG002
        if self.bar is not None and "loss" in logs:
            self.loss = f"{float(logs['loss']):.4f}"
            self.bar.set_postfix(loss=self.loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.bar.close()
        if self.says_lines:
            self._say(state)

    def _say(self, state: Any) -> None:
        loss = f", loss {self.loss}" if self.loss else ""
        print(f"step {state.global_step}/{state.max_steps}{loss}", file=sys.stderr, flush=True)  # noqa: T201
        self.said_seconds = time.monotonic()


class LogFile(TrainerCallback):  # type: ignore[misc]
    """`training_log.jsonl`: what the trainer logs, a line each. A resumed run drops the lines it will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        lines = self.path.read_text().splitlines() if self.path.is_file() and state.global_step else []
        entries = ((line, json.loads(line)) for line in whole_lines(lines))
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


class Resample(TrainerCallback):  # type: ignore[misc]
    """Other columns train after so many steps, before the checkpoint of that step is written; not after the last."""

    def __init__(self, plan: SurgeryPlan) -> None:
        self.every, self.seed = resample_steps(plan.spec["resample"]), plan.spec["seed"]
        self.groups = lane_groups(plan)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step < state.max_steps:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            resample_model(
                model, optimizer, groups=self.groups, every=self.every, seed=self.seed, step=state.global_step
            )


class StopEarly(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping that a resumed run takes up where it was."""

    COUNTER = "early_stopping_patience_counter"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        stored = state.stateful_callbacks.get(type(self).__name__)
        if stored:
            self.early_stopping_patience_counter = stored["attributes"][self.COUNTER]


def whole_lines(lines: list[str]) -> Iterator[str]:
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
        if any_rank(self.interruption.requested):  # all stop at the same step; who is asked meanwhile, at the next
            self.interruption.requested = True
            control.should_save = control.should_training_stop = True
            if not args.load_best_model_at_end:  # else this evaluation is one of those that decide
                control.should_evaluate = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """SIGINT and SIGTERM end the step, save, and stop; a second one, or one outside training, stops at once."""
    interruption = Interruption()

    def handle(number: int, _frame: FrameType | None) -> None:
        if interruption.requested or not interruption.is_training:
            raise InterruptedRunError("train", f"stopped by {signal.Signals(number).name}", fix="Start it again")
        interruption.requested = True
        if is_main():
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
