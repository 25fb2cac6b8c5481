"""What a report reads of a run: an adapter folder, or an export of one with its adapter where that is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import RECORD_FILE, read_json, require_folder
from surgery.delta import ADAPTER_FILE, ColumnDelta, Delta
from surgery.errors import DamagedError, NotAModelError
from surgery.experts import layer_of, take
from surgery.manifest import ADAPTER, MERGED, ONNX, REMOTE_CODE, Check, Manifest, Record, parse_record, read_document
from surgery.plan import SurgeryPlan
from surgery.report.curves import Entry, read_entries
from surgery.runs import (
    BEFORE_FILE,
    CHECKPOINTS,
    LOG_FILE,
    RUN_FILE,
    STATE_FILE,
    is_alive,
    latest_checkpoint,
    open_run,
    step_of,
)
from surgery.tensorfile import TensorFile

EXPORTED = (MERGED, REMOTE_CODE, ONNX)
SUFFIXES = ("merged", "onnx", "remote-code")  # of the folders that `export` writes beside an adapter
FINISHED, RUNNING, INTERRUPTED, UNTRAINED = "finished", "running", "interrupted", "not trained"


@dataclass(frozen=True)
class Run:
    """A training run, as far as its folder tells of it.

    name: the folder's, made unique on the page. state: one of the words above, of which `step` says how far. training:
    the record's figures, empty where the run is not finished; settings, inputs: how, and on which data. delta: what the
    adapter holds, None where there is only an export; moved: by module the columns of the last checkpoint, where the
    run is not finished. exported: the folder whose checks these are; adapter: the adapter, None where it is not found.
    """

    name: str
    folder: Path
    plan: SurgeryPlan
    manifest: Manifest
    state: str
    step: int
    training: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    started: str = ""
    entries: tuple[Entry, ...] = ()
    delta: Delta | None = None
    moved: Mapping[str, Tensor] | None = None
    checks: tuple[Check, ...] = ()
    exported: Path | None = None
    adapter: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        """How many processes trained: what a step saw, to what one of them did."""
        if "processes" in self.training:
            return int(self.training["processes"])
        per_step = self.settings.get("batch_size", 0) * self.settings.get("gradient_accumulation", 0)
        return max(1, self.settings.get("examples_per_step", 0) // per_step) if per_step else 1

    @property
    def after(self) -> Mapping[str, float]:
        """The metrics of what is kept; of a run that is not finished, those of the last evaluation."""
        if self.training:
            return dict(self.training.get("after", {}))
        last = next((entry for entry in reversed(self.entries) if "eval_loss" in entry), {})
        names = [name for name in last if name.startswith("eval_")]
        return {name.removeprefix("eval_"): float(last[name]) for name in names}


def read_run(folder: Path) -> Run:
    """Raises: NotAModelError where there is no run, DamagedError, RequestError."""
    require_folder(folder)
    if not (folder / RECORD_FILE).is_file():
        expected = "a run (an adapter folder, or what was exported from one) or a bench"
        raise NotAModelError(str(folder), f"neither {RECORD_FILE} nor bench.json", expected=expected)
    document = read_document(folder)
    if document.get("kind") == ADAPTER:
        return _of_adapter(open_adapter(folder))
    record = parse_record(document, str(folder / RECORD_FILE))
    if record.kind not in EXPORTED or not record.manifest.adapter:
        expected = f"a run: an adapter folder, or one of kind {', '.join(EXPORTED)} that was exported from one"
        raise NotAModelError(str(folder), f"a folder of kind {record.kind!r} without a run", expected=expected)
    return _of_export(folder, record)


def _of_export(folder: Path, record: Record) -> Run:
    """With its adapter's log and values, where that is still the one it was made from."""
    source = record.manifest.adapter
    found = folder / str(source.get("path", ""))
    if (found / RECORD_FILE).is_file() and (found / ADAPTER_FILE).is_file():
        run = _of_adapter(open_adapter(found))
        if run.manifest.files.get(ADAPTER_FILE) == source.get("sha256"):
            name = folder.resolve().name
            return replace(run, name=name, folder=folder, checks=record.manifest.checks, exported=folder)
        why = "its adapter has been trained since: curves and movement are not this export's, and are left out"
    else:
        why = f"its adapter {source.get('path', '')} is not there: neither curves nor movement are known"
    training = record.manifest.training
    return Run(
        folder.resolve().name, folder, record.plan, record.manifest,
        FINISHED if training else UNTRAINED, int(training.get("steps", 0)), training,
        training.get("settings", {}), training.get("inputs", {}), training.get("before", {}),
        checks=record.manifest.checks, exported=folder, notes=(why,),
    )  # fmt: skip


def _of_adapter(adapter: Adapter) -> Run:
    folder, manifest = adapter.folder, adapter.record.manifest
    entries = tuple(read_entries(folder / LOG_FILE))
    run = open_run(adapter)
    common: dict[str, Any] = {"name": folder.resolve().name, "folder": folder, "plan": adapter.plan}
    common |= {"manifest": manifest, "entries": entries, "delta": adapter.delta, "adapter": folder}
    if run:
        return _unfinished(adapter, run, common)
    training = manifest.training
    notes = () if entries or not training else (f"there is no {LOG_FILE}: curves are not known",)
    exported, checks = _checks(adapter)
    noted = _note_of(folder)
    inputs = training.get("inputs") or (noted.get("data", {}) if noted.get("digest") == training.get("run") else {})
    return Run(
        **common, state=FINISHED if training else UNTRAINED, step=int(training.get("steps", 0)), training=training,
        settings=training.get("settings", {}), inputs=inputs, before=training.get("before", {}),
        checks=checks, exported=exported, notes=notes,
    )  # fmt: skip


def _note_of(folder: Path) -> dict[str, Any]:
    path = folder / CHECKPOINTS / RUN_FILE
    return read_json(path) if path.is_file() else {}


def _unfinished(adapter: Adapter, run: Mapping[str, Any], common: Mapping[str, Any]) -> Run:
    """What its note, its log and its last checkpoint say. What the record says of an earlier run does not count."""
    folder = adapter.folder / CHECKPOINTS
    last = latest_checkpoint(folder)
    entries = common["entries"]
    logged = max((int(entry["step"]) for entry in entries), default=0)
    before = read_json(folder / BEFORE_FILE) if (folder / BEFORE_FILE).is_file() else {}
    where = f"its last whole checkpoint is of step {step_of(last)}" if last else "it has no whole checkpoint"
    state = RUNNING if is_alive(run) else INTERRUPTED
    fix = "" if state == RUNNING else "; `surgery train --resume auto` goes on from there"
    return Run(
        **common, state=state, step=max(logged, step_of(last) if last else 0),
        settings=run.get("settings", {}), inputs=run.get("data", {}), before=before, started=run.get("started", ""),
        moved=_checkpoint_columns(adapter, last) if last else None, notes=(f"{where}{fix}",),
    )  # fmt: skip


def _checkpoint_columns(adapter: Adapter, checkpoint: Path) -> dict[str, Tensor] | None:
    """The columns that a training checkpoint holds, by module; None for another method's."""
    if not isinstance(adapter.delta, ColumnDelta) or not (checkpoint / STATE_FILE).is_file():
        return None
    tensors, spec = TensorFile(checkpoint / STATE_FILE), adapter.plan.spec
    if spec.get("resample"):
        return None  # other columns than the adapter's train by now
    found = {}
    for target in adapter.plan.targets:
        name = f"{layer_of(target)}.paca_delta"
        if name not in tensors.infos:
            raise DamagedError(str(checkpoint / STATE_FILE), f"no {name}", expected="the state of this plan")
        scale = spec["alpha"] / target.rank if spec.get("alpha") else 1.0
        original = adapter.delta.patches[target.module].original
        held = tensors.read(name)  # of experts' tensors that of all
        difference = take(held, target) if target.holder else held
        found[target.module] = original.double() + scale * difference.double()
    return found


def _checks(adapter: Adapter) -> tuple[Path | None, tuple[Check, ...]]:
    """The checks of the export beside an adapter that was made from it as it is now, if there is one."""
    folder = adapter.folder.resolve()
    for suffix in SUFFIXES:
        beside = folder.with_name(f"{folder.name}-{suffix}")
        if not (beside / RECORD_FILE).is_file():
            continue
        record = parse_record(read_document(beside), str(beside / RECORD_FILE))
        if record.manifest.adapter.get("sha256") == adapter.record.manifest.files.get(ADAPTER_FILE):
            return beside, record.manifest.checks
    return None, ()
