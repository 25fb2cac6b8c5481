"""What a training run leaves in an adapter folder: its log, and while it is not finished its note and checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.adapter import Adapter
from surgery.checkpoint import read_json
from surgery.delta import ADAPTER_FILE, ColumnDelta, ColumnPatch

CHECKPOINTS, RUN_FILE, BEFORE_FILE = "checkpoints", "run.json", "before.json"
LOG_FILE, STATE_FILE = "training_log.jsonl", "state.safetensors"


def open_run(adapter: Adapter) -> dict[str, Any]:
    """The note of a run that was stopped before its end, or is still going on; empty where there is none."""
    path = adapter.folder / CHECKPOINTS / RUN_FILE
    run = read_json(path) if path.is_file() else {}
    manifest = adapter.record.manifest
    # A run that was stopped between writing the adapter and saying so left another adapter than it began with.
    is_done = run.get("digest", "") == manifest.training.get("run") and run.get("start") != manifest.files[ADAPTER_FILE]
    return {} if is_done or run.get("finished") else run


def notes_of(adapter: Adapter) -> tuple[str, ...]:
    """What an export must say of an adapter: where nothing moved it is right, and hardly what was wanted."""
    if isinstance(adapter.delta, ColumnDelta) and adapter.delta.moved:
        named = [adapter.delta.patches[target.module] for target in adapter.delta.plan.targets if target.rows]
        return tuple(_still(patch) for patch in named if patch.unmoved)
    if adapter.delta.moved or adapter.delta.whole:
        return ()
    why = "it has not been trained"
    if adapter.record.manifest.training:
        why = "training did not move any, or rounding to the base's dtype undid it"
    elif latest_checkpoint(adapter.folder / CHECKPOINTS):
        why = "its run was interrupted; `surgery train --resume auto` ends it"
    return (f"nothing that {adapter.folder} trains differs from the base: {why}",)


def _still(patch: ColumnPatch) -> str:
    """Rows are named one by one, and a token that no batch had leaves its row as it was."""
    rows, module = patch.unmoved, patch.target.module
    which = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} of {len(patch.columns)} rows, first {rows[0]},"
    return f"{which} of {module} did not move: not in what was trained on, or rounding to the base's dtype undid it"


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return max(found, key=step_of, default=None)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.split("-")[1])


def this_process() -> str:
    """Who trains: the host, and the process there."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_alive(run: Mapping[str, Any]) -> bool:
    """Whether the process that a note names is still there; that of another host is taken for gone."""
    host, _, pid = str(run.get("process", "")).rpartition(":")
    return host == socket.gethostname() and pid.isdigit() and Path(f"/proc/{pid}").exists()
