"""Runs that are interrupted, and how they end where they are not: settings that are trained in any number of copies."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from surgery.delta import ADAPTER_FILE
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.recipe import DataSection
from surgery.runs import LOG_FILE
from surgery.train import TrainResult, train
from surgery.trainer import Progress
from tests.conftest import TinyModel
from tests.examples import CASES, Case, fast


@dataclass(frozen=True)
class Variant:
    """A way to train whose resumption must not show."""

    name: str
    case: Case
    settings: dict[str, Any]
    overrides: dict[str, object]


TEXT, LABELS = CASES[0], CASES[6]
STEPS: dict[str, Any] = {"save_steps": 3, "batch_size": 3, "max_steps": 9}
VARIANTS = (
    Variant("plain", TEXT, STEPS, {}),
    Variant("accumulation", TEXT, {**STEPS, "gradient_accumulation": 2}, {}),
    Variant("recomputation", TEXT, {**STEPS, "gradient_checkpointing": True}, {"attention_dropout": 0.2}),
    Variant("dropout", LABELS, STEPS, {"hidden_dropout_prob": 0.2}),
    Variant("evaluation", LABELS, {**STEPS, "eval_steps": 2}, {"hidden_dropout_prob": 0.2}),
    Variant(
        "early-stopping",
        LABELS,
        {"batch_size": 3, "eval_steps": 1, "early_stopping_patience": 3, "learning_rate": 0.05, "max_steps": 30},
        {"hidden_dropout_prob": 0.2},
    ),
)


class Killed(BaseException):
    """Stands for a kill: nothing handles it, nothing is saved."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, *, how: str) -> None:
    """End the run at the end of a step: by a real signal, or as abruptly as an exception can."""
    original = Progress.on_step_end

    def on_step_end(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            if how == "kill":
                raise Killed
            os.kill(os.getpid(), signal.Signals[how])

    monkeypatch.setattr(Progress, "on_step_end", on_step_end)


@dataclass(frozen=True)
class Setting:
    """A variant, ready to be trained in any number of copies, and how it ends without interruption."""

    variant: Variant
    fresh: Path
    data: DataSection
    whole: Path
    result: TrainResult

    def run(self, folder: Path, **options: Any) -> TrainResult:
        settings = fast(**self.variant.settings)
        return train(folder, self.data, settings, task=self.variant.case.spec(), **options)

    def copy(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(self.fresh, tmp_path / "adapter"))


def make_setting(variant: Variant, tiny_model: TinyModel, root: Path) -> Setting:
    """Adapters here name their base by an absolute path, so that copies of them find it."""
    base = tiny_model(variant.case.family, overrides=variant.overrides)
    (root / "model").symlink_to(base, target_is_directory=True)
    data = variant.case.write(root)
    apply(root / "model", root / "fresh" / "adapter", PacaSpec(rank=4))
    record = root / "fresh" / "adapter" / "surgery.json"
    document = json.loads(record.read_text())
    document["manifest"]["base"]["path"] = str(base)
    record.write_text(json.dumps(document))
    shutil.copytree(root / "fresh" / "adapter", root / "whole")
    setting = Setting(variant, root / "fresh" / "adapter", data, root / "whole", None)  # type: ignore[arg-type]
    result = setting.run(root / "whole")
    return Setting(variant, root / "fresh" / "adapter", data, root / "whole", result)


def same_adapter(a: Path, b: Path) -> bool:
    """Whether two folders hold the same trained values, bit for bit."""
    return (a / ADAPTER_FILE).read_bytes() == (b / ADAPTER_FILE).read_bytes()


def log_keys(folder: Path) -> list[tuple[int, str]]:
    """(step, what) of every line of the log, timings aside."""
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    kinds = ("loss", "eval_loss", "train_loss")
    return [(line["step"], next(kind for kind in kinds if kind in line)) for line in lines]
