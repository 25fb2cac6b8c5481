"""Predicted memory beside what real training steps keep; sharding, fit, and what cannot be predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.memory import Run, open_planned, open_subject, predict
from surgery.adapter import open_adapter
from surgery.methods.paca import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from tests.conftest import TinyModel
from tests.examples import LABELLED, QUESTIONS, fast, write_rows
from tests.measured import Measured, measure_ours, measure_theirs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
TOLERANCE = 0.01
SPECS = {"paca": PacaSpec(rank=4), "read": ReadSpec(hidden=8), "lora": PacaSpec(rank=4), "full": None}
FAMILIES = {
    "llama": "causal-lm",
    "qwen3": "causal-lm",
    "gemma3": "causal-lm",
    "bert": "sequence-classification",
    "t5": "seq2seq",
}


def data_of(folder: Path, task: str, *, padded: bool) -> DataSection:
    """A file of rows of equal length, or of different lengths, for a task."""
    if task == "sequence-classification":
        rows = LABELLED if padded else [row for row in LABELLED[:1]] * 8 + [{**LABELLED[1], "text": LABELLED[0]["text"]}] * 8
        return DataSection(train=[str(write_rows(folder / "rows.jsonl", rows))], max_length=64)
    pairs = QUESTIONS if padded else [QUESTIONS[0]] * 8
    if task == "seq2seq":
        rows = tuple({"source": f"{q} {q}"[: 30 + n % 3], "target": f"{a} {a}"[: 28 + n % 3]} for n, (q, a) in enumerate(pairs))
        return DataSection(train=[str(write_rows(folder / "rows.jsonl", rows))], max_length=64)
    if padded:
        rows = tuple({"prompt": q, "completion": a} for q, a in pairs)
        return DataSection(train=[str(write_rows(folder / "rows.jsonl", rows))], max_length=64)
    path = folder / "text.txt"
    path.write_text("\n".join(f"{q} {a}" for q, a in QUESTIONS) * 4, encoding="utf-8")
    return DataSection(train=[str(path)], max_length=40)


def measure(method: str, base: Path, folder: Path, monkeypatch: Any, *, task: str, padded: bool, **settings: Any) -> Measured:
    data = data_of(folder, task, padded=padded)
    section = fast(max_steps=1, batch_size=4, **settings)
    if method in ("paca", "read"):
        apply(base, folder / "adapter", SPECS[method])
        return measure_ours(monkeypatch, folder / "adapter", data, section, TaskSpec(task))
    return measure_theirs(base, folder / "out", data, section.model_copy(update={"precision": "fp32"} if section.precision=="auto" else {}), task=task, lora_rank=4 if method == "lora" else 0)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_saved(family: str, method: str, padded: bool, tiny_model: TinyModel, tmp_path: Path, monkeypatch: Any) -> None:
    task = FAMILIES[family]
    base = tiny_model(family)
    found = measure(method, base, tmp_path, monkeypatch, task=task, padded=padded)
    run = Run(batch=found.batch, sequence=found.sequence, target=found.target, padded=found.padded)
    labels = ("animal", "person") if task == "sequence-classification" else ()
    subject = open_subject(base, method, SPECS[method], TaskSpec(task, labels), run)
    predicted = predict(subject, run)
    print("RATIO", family, method, padded, found.padded, found.batch, found.sequence, sum(predicted.activations.values()), found.saved, sum(predicted.activations.values()) / found.saved, predicted.parts["optimizer"], found.optimizer_bytes(), predicted.parts["weights"]+predicted.parts["columns"], found.weight_bytes(), {k:v for k,v in predicted.activations.items() if v})


@pytest.mark.parametrize("case", ["checkpointing", "bf16", "autocast", "bf16head"])
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_more(family: str, method: str, case: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: Any) -> None:
    task = FAMILIES[family]
    base = tiny_model(family, dtype=torch.bfloat16 if case.startswith("bf16") else None)
    settings = {"checkpointing": {"gradient_checkpointing": True}, "bf16": {}, "autocast": {"precision": "bf16"}, "bf16head": {"precision": "bf16"}}[case]
    found = measure(method, base, tmp_path, monkeypatch, task=task, padded=False, **settings)
    run = Run(batch=found.batch, sequence=found.sequence, target=found.target, padded=found.padded, checkpointing=case == "checkpointing", precision=settings.get("precision", "auto"))
    labels = ("animal", "person") if task == "sequence-classification" else ()
    subject = open_subject(base, method, SPECS[method], TaskSpec(task, labels), run)
    predicted = predict(subject, run)
    print("RATIO", family, method, case, found.padded, found.batch, found.sequence, sum(predicted.activations.values()), found.saved, sum(predicted.activations.values()) / found.saved, predicted.parts["optimizer"], found.optimizer_bytes(), predicted.parts["weights"]+predicted.parts["columns"], found.weight_bytes(), {k:v for k,v in predicted.activations.items() if v})
