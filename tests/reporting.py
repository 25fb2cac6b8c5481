"""What reports are tested on: runs put together without training, a bench made up in code, a page in a browser."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surgery.adapter import update_adapter
from surgery.bench.results import Curve, Results, Row, Size, Where
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.runs import LOG_FILE
from surgery.survey import TaskSpec
from tests.trained import make_adapter, make_read_adapter

METRICS = ("loss", "accuracy")
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


def log_entries(
    steps: int, every: int = 1, *, evals: int = 5, start: float = 4.0, rate: float = 1e-3
) -> list[dict[str, Any]]:
    """A training log: a loss that falls with a ripple, a learning rate that falls, evaluations in between."""
    entries: list[dict[str, Any]] = []
    elapsed = 20.0
    for step in range(every, steps + 1, every):
        elapsed += every * (0.05 + 0.01 * math.sin(step))
        loss = start / (1 + 6 * step / steps) + 0.08 * math.sin(step * 1.7)
        entries.append({
            "step": step, "seconds": round(elapsed, 4), "loss": round(loss, 5), "grad_norm": 1.0 + 0.2 * math.cos(step),
            "learning_rate": rate * (1 - step / steps), "epoch": step / steps,
        })  # fmt: skip
        if step % max(every, steps // evals) == 0:
            elapsed += 3.0
            score = {"eval_loss": round(loss + 0.1, 5), "eval_accuracy": round(0.5 + 0.4 * step / steps, 4)}
            entries.append(
                {"step": step, "seconds": round(elapsed, 4), **score, "eval_runtime": 3.0, "epoch": step / steps}
            )
    entries.append(
        {"step": steps, "seconds": elapsed, "train_runtime": elapsed - 20.0, "train_loss": 1.0, "epoch": 1.0}
    )
    return entries


def write_log(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Into an adapter folder."""
    (folder / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def training_record(entries: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
    """What a finished run's record says of such a log."""
    evals = [entry for entry in entries if "eval_loss" in entry]
    used = {"learning_rate": 1e-3, "batch_size": 4, "gradient_accumulation": 1, "device": "cpu", "precision": "auto"}
    return {
        "steps": entries[-1]["step"], "seconds": entries[-1]["seconds"], "peak_memory_bytes": 709_000_000,
        "device": "cpu", "loss": 1.5, "trained_values": 1, "data": ["format text, packed to 64 tokens"],
        "before": {"loss": 4.2, "accuracy": 0.5}, "after": {name: evals[-1][f"eval_{name}"] for name in METRICS},
        "settings": {**used, **settings}, "kernels": {"attention": "sdpa"}, "run": "0123456789abcdef", "processes": 1,
        "inputs": {"train": ["train.jsonl"], "eval": [], "max_length": 64, "sha256": {"train.jsonl": "ab" * 32}},
        "started": "20261121-201500", "ended": "20261121-202000",
    }  # fmt: skip


def make_run(
    model: Path, out: Path, *, steps: int = 100, every: int = 1, seed: int = 0, rank: int = 4, **settings: Any
) -> Path:
    """A PaCA run that is finished, as its folder would be."""
    entries = log_entries(steps, every, start=4.0 - seed / 2)
    adapter = make_adapter(model, out, PacaSpec(rank=rank), seed=seed)
    manifest = replace(adapter.record.manifest, training=training_record(entries, **settings))
    update_adapter(adapter, adapter.delta, manifest)
    write_log(out, entries)
    return out


def make_read_run(model: Path, out: Path, *, steps: int = 60, task: TaskSpec | None = None) -> Path:
    """The same for READ."""
    entries = log_entries(steps)
    adapter = make_read_adapter(model, out, ReadSpec(hidden=7), task=task)
    manifest = replace(adapter.record.manifest, training=training_record(entries))
    update_adapter(adapter, adapter.delta, manifest)
    write_log(out, entries)
    return out


METHODS: Mapping[str, tuple[float, int, float]] = {  # seconds of a step, bytes saved for backward, accuracy
    "floor": (0.100, 94_000_000, 0.0), "paca": (0.103, 97_800_000, 0.86), "read": (0.051, 30_000_000, 0.82),
    "lora": (0.118, 127_100_000, 0.865), "dora": (0.160, 190_000_000, 0.866), "miss": (0.112, 120_000_000, 0.85),
    "shira": (0.125, 148_000_000, 0.84), "bitfit": (0.104, 100_000_000, 0.81), "adapter": (0.121, 118_000_000, 0.85),
    "prompt": (0.130, 125_000_000, 0.70), "full": (0.150, 148_200_000, 0.87),
}  # fmt: skip


def make_results(*, rounds: int = 9, seeds: int = 3) -> Results:
    """A bench of all methods; the floor has no score, `prompt` ran out of memory."""
    rows = []
    for place, (method, (seconds, saved, score)) in enumerate(METHODS.items()):
        if method == "prompt":
            rows.append(Row(method=method, notes=["out of memory at batch 32 x 2048"]))
            continue
        wobble = [seconds * (1 + 0.02 * math.sin(3 * place + turn)) for turn in range(rounds)]
        curves = [
            Curve(
                seed=seed, steps=list(range(5, 101, 5)), seconds=9.5, scores={"accuracy": score + 0.004 * seed},
                losses=[2.5 / (1 + place / 20 + step / 40) + 0.03 * seed for step in range(5, 101, 5)],
            )
            for seed in range(seeds)
        ] if score else []  # fmt: skip
        rows.append(Row(
            method=method, size=Size(name="rank", value=16), trained_values=65_536 + place, trained_names=14 + place,
            seconds=wobble, saved_bytes=saved, peak_bytes=saved * 3, longest_tokens=8192 - 100 * place,
            longest_by="predicted", curves=curves, learning_rate=1e-3, inference_seconds=[0.02, 0.021, 0.0205],
            inference_bytes=5_000_000, merged=method == "paca", done=["step"],
        ))  # fmt: skip
    where = Where(device="cpu", device_name="a processor", threads=2, versions={"torch": "2.13.0"}, commit="0123456789",
                  command="surgery bench model/ --out bench", started="2026-11-21T20:00:00+00:00")  # fmt: skip
    return Results(spec={"model": "model/", "equal": "rank"}, where=where, tokens_per_step=4096, rows=rows)


# --- a browser


def chromium() -> str:
    """The browser's path; skips the test, with the reason, where there is none."""
    named = os.environ.get("CHROMIUM")
    found = named or next((path for path in CHROMIUM if Path(path).exists()), None) or shutil.which("chromium")
    if not found or not Path(found).exists():
        pytest.skip(f"needs a Chromium: none of {', '.join(CHROMIUM)} ($CHROMIUM names another)")
    return found


@contextmanager
def browsing() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    path = chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
