"""Convolutions and rows of an embedding in two processes: they give the adapter that one gives."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.images import PROCESSOR_FILE, TASK
from surgery.methods.paca_spec import PacaSpec
from surgery.survey import TaskSpec
from surgery.tiny import image_settings
from tests.conftest import TinyModel
from tests.examples import QUESTIONS, write_rows
from tests.forking import Job, carry_out
from tests.test_distributed import TOLERANCE, largest_difference
from tests.test_images import COLOURS, write_folder
from tests.tiny import OTHERS

pytestmark = pytest.mark.slow
IMAGES = PacaSpec(rank=4, targets=("all-conv", "all-linear"))
ROWS = PacaSpec(rank=4, targets=("embed_tokens", "*.q_proj"), rows=tuple(range(30, 60)))
KINDS = {  # a model, what trains, and how in two processes
    "images": ("convnext", IMAGES, "fsdp2"),
    "rows": ("llama", ROWS, "fsdp2"),
    "drawn images": ("convnext", replace(IMAGES, resample="every:2"), "ddp"),
    "drawn beside rows": ("llama", replace(ROWS, resample="every:2"), "ddp"),
}


def prepare(root: Path, tiny_model: TinyModel) -> dict[str, Path]:
    """A fresh adapter of each kind; each model's data."""
    base = root / "convnext"
    shutil.copytree(tiny_model("convnext"), base)
    (base / PROCESSOR_FILE).write_text(json.dumps(image_settings(OTHERS["convnext"])))
    bases = {"convnext": (base, TaskSpec(TASK, tuple(sorted(COLOURS)))), "llama": (tiny_model("llama"), TaskSpec())}
    for kind, (family, spec, _) in KINDS.items():
        model, task = bases[family]
        surgery.apply(model, root / f"fresh-{kind}", spec, task=task)
    pairs = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS]
    return {"convnext": write_folder(root / "photos"), "llama": write_rows(root / "prompts.jsonl", pairs)}


def job(root: Path, kind: str, data: Path, strategy: str) -> Job:
    """A run of four steps of four rows."""
    name, many = f"{kind}-{strategy or 'one'}", 2 if strategy else 1
    shutil.copytree(root / f"fresh-{kind}", root / name)
    settings: dict[str, Any] = {"max_steps": 4, "batch_size": 4 // many, "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"strategy": strategy} if strategy else {}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return Job(name, many if strategy else 0, ["train", str(root / name), "--device=cpu", f"--data={data}", *pairs])


def test_two_processes_train_what_one_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    """In FSDP2, whose ranks hold some outputs of each kernel and some of each row's values; in DDP with draws."""
    data = prepare(tmp_path, tiny_model)
    jobs = [
        job(tmp_path, kind, data[family], strategy)
        for kind, (family, _, parallel) in KINDS.items()
        for strategy in ("", parallel)
    ]
    outcomes = carry_out(jobs, tmp_path)
    for one in jobs:
        assert set(outcomes[one.name].codes) == {0}, outcomes[one.name].errors
        alone = tmp_path / f"{one.name.partition('-')[0]}-one"
        assert surgery.adapter.open_adapter(alone).delta.moved > 0
        assert largest_difference(alone, tmp_path / one.name) < TOLERANCE
