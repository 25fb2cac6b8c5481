"""The scripts that measure: that they start; and of that on CUDA its search, its report, and that it runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import PROJECT


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    return importlib.import_module("on_cuda")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(path.name for path in (PROJECT / "benchmarks").glob("*.py")))
def test_every_script_starts(name: str) -> None:
    """What stands beside a script is found before any installed package of that name, by torch too."""
    command = [sys.executable, f"benchmarks/{name}", "--help"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr


@pytest.mark.parametrize("limit", (0, 511, 512, 5000, 9_900, 10_400, 12_000, 1_000_000))
@pytest.mark.parametrize("guess", (10_000, 100))
def test_the_longest_sequence_is_one_that_fits(cuda: Any, limit: int, guess: int) -> None:
    """In at most six tries, never one that did not fit; near a good guess it is the longest multiple of 512."""
    tried: list[int] = []
    found = cuda.longest(lambda tokens: (tried.append(tokens), tokens <= limit)[1], guess)
    assert len(tried) <= cuda.MAX_TRIES
    assert found == max((tokens for tokens in tried if tokens <= limit), default=0)
    if guess == 10_000 and abs(limit - guess) < 500:
        assert found == limit // 512 * 512


def test_memory_that_does_not_suffice_is_a_row_that_says_so(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose step is too large is left out; the others go on."""
    arguments = cuda.parse(["--small", "--methods", "floor", "paca"])
    real = cuda.Setup.step

    def step(self: Any, batch: int, tokens: int) -> float:
        if self.optimizer:
            raise torch.cuda.OutOfMemoryError
        seconds: float = real(self, batch, tokens)
        return seconds

    monkeypatch.setattr(cuda.Setup, "step", step)
    rows = cuda.run(arguments)
    notes = {(row.method, row.checkpointing): (row.note[:12], len(row.seconds)) for row in rows}
    assert notes["paca", False] == notes["paca", True] == ("does not fit", 0)
    assert notes["floor", False] == notes["floor", True] == ("", 3)
    assert "| paca | yes | " in "\n".join(cuda.report(rows, arguments))


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    """`--small` prints a row for each method, with and without checkpointing, and writes the raw figures."""
    command = [sys.executable, "benchmarks/on_cuda.py", "--small", "--json", str(tmp_path / "cuda.json")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "cuda.json").read_text())["rows"]
    assert len(rows) == 2 * 5
    assert all(len(row["seconds"]) == 3 and not row["note"] for row in rows)
    trained = {row["method"]: row["trained"] for row in rows}
    assert trained["floor"] == 0
    assert 0 < trained["paca"] < trained["lora"] == trained["lora-fp32"] < trained["full"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_says_so() -> None:
    """And what to do."""
    done = subprocess.run(
        [sys.executable, "benchmarks/on_cuda.py"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "torch sees no CUDA device, expected one. --small tries the script" in done.stderr
