"""The model that the repository ships, its task, and the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.checkpoint import Checkpoint
from surgery.recipe_file import read_recipe

MAX_MODEL_BYTES = 3_000_000


@pytest.fixture(scope="module")
def quickstart(project_root: Path) -> Path:
    """The recipe's folder."""
    return project_root / "recipes" / "quickstart"


def test_the_shipped_model_is_small_and_whole(quickstart: Path) -> None:
    """At most 3 MB, tokenizer included, every tensor where its header says."""
    files = [path for path in (quickstart / "model").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_MODEL_BYTES
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in files}
    assert len(Checkpoint.open(quickstart / "model")) > 30


def test_the_recipe_says_what_the_demo_does(quickstart: Path) -> None:
    """The recipe passes the strict reader, and its model is the folder beside it."""
    recipe = read_recipe(quickstart / "recipe.yaml")
    assert Path(recipe.model).resolve() == (quickstart / "model").resolve()
    assert recipe.paca.targets == ["all-linear"]


def test_the_task_is_drawn_from_its_seed_and_held_out(quickstart: Path, tmp_path: Path) -> None:
    """Two drawings are the same bytes; no evaluation row is a training row, nor has it a name of one."""
    for name in ("one", "two"):
        command = [sys.executable, "task.py", str(tmp_path / name)]
        subprocess.run(command, cwd=quickstart, check=True, capture_output=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    train, held = (set((tmp_path / "one" / f"{n}.jsonl").read_text().splitlines()) for n in ("train", "eval"))
    assert held
    assert not train & held
    records = [[json.loads(json.loads(row)["completion"]) for row in rows] for rows in (train, held)]
    known, new = ({record[key] for record in part for key in ("from", "to")} for part in records)
    assert not known & new


@pytest.mark.slow
def test_the_demo_lifts_the_score_from_near_zero_to_above_nine_tenths(quickstart: Path, tmp_path: Path) -> None:
    """The table of `make demo`: the jump, and no difference between trained and merged logits."""
    command = [sys.executable, "-W", "error", "demo.py", "--out", str(tmp_path / "out"), "train.threads=1"]
    done = subprocess.run(command, cwd=quickstart, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    scores = {name: float(value) for name, value in re.findall(r"exact match, (\w+)\s+([\d.]+)", done.stdout)}
    assert scores["base"] < 0.05
    assert scores["merged"] > 0.9
    assert re.search(r"largest difference\s+0 between trained and merged logits", done.stdout)
