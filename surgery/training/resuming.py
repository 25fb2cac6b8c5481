"""What a run is, and where it starts: fresh, at the checkpoint of an interrupted one, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from surgery.adapter import Adapter
from surgery.checkpoint import read_json
from surgery.delta import ADAPTER_FILE
from surgery.errors import RequestError
from surgery.images import folder_digest
from surgery.plan import SurgeryPlan
from surgery.ranks import count
from surgery.recipe import DataSection, TrainSection
from surgery.runs import CHECKPOINTS, RUN_FILE, latest_checkpoint, open_run, step_of, this_process
from surgery.tensorfile import file_sha256
from surgery.trainer import TRAINER_FILE, StopEarly
from surgery.writing import replace_file

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
PER_STEP = ("batch_size", "gradient_accumulation")  # these and the number of processes decide what a step sees
FINISHED = "finished"  # in place of a checkpoint: nothing is left to do


@dataclass(frozen=True)
class RunNote:
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
    def describe(cls, adapter: Adapter, plan: SurgeryPlan, data: DataSection, settings: TrainSection) -> RunNote:
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


def when_started(adapter: Adapter, checkpoint: str) -> str:
    """Now, in UTC; of a run that is resumed, as its note has it. A name for folders: no colons."""
    noted = open_run(adapter).get("started", "") if checkpoint else ""
    return noted or datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")


def began_lean(adapter: Adapter, checkpoint: str) -> bool | None:
    """Whether a run that is resumed began with lean blocks; without a word of it, as of old, it did not."""
    return bool(open_run(adapter).get("lean", False)) if checkpoint else None


def where_to_start(adapter: Adapter, run: RunNote, *, resume: str, overwrite: bool) -> str:
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


def is_complete(checkpoint: Path, steps: int, patience: int | None) -> bool:
    """Whether nothing is left to train: the run was stopped between its last step and its end."""
    stored = read_json(checkpoint / TRAINER_FILE).get("stateful_callbacks", {}).get(StopEarly.__name__)
    out_of_patience = bool(patience and stored and stored["attributes"][StopEarly.COUNTER] >= patience)
    return out_of_patience or step_of(checkpoint) >= steps
