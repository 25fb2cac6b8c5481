"""Kills, signals, full and read-only disks: outputs are whole or absent, inputs untouched, the next run works."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from surgery.adapter import open_adapter
from surgery.delta import ADAPTER_FILE
from surgery.errors import OutputExistsError, ResourceError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.recipe import DataSection
from surgery.runs import CHECKPOINTS, LOG_FILE, STATE_FILE
from surgery.train import train
from surgery.workflow import export
from tests.conftest import TinyModel, digest_folder
from tests.examples import TEXTS, fast
from tests.trained import make_adapter


def kill(what: str, work: Path, rounds: int, project: Path) -> dict[str, Any]:
    """What `tests.killing` counted."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.killing", what, str(work), str(rounds), "0"],
        capture_output=True, text=True, cwd=project, check=False, env={**os.environ, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    counts: dict[str, Any] = json.loads(run.stdout)
    return counts


@pytest.mark.slow
def test_killed_exports(tiny_model: TinyModel, tmp_path: Path, project_root: Path) -> None:
    """kill -9 at 50 moments of `export` with its check: absent or whole, inputs byte for byte, the next one works."""
    make_adapter(tiny_model("llama", max_shard_size="10KB"), tmp_path / "adapter")
    counts = kill("export", tmp_path, 50, project_root)
    assert counts["absent"] >= 10, "the kills came too late to show anything"
    assert counts["left"] == ["adapter", "merged"], "what killed exports left behind was cleared"


@pytest.mark.slow
def test_killed_trainings(tiny_model: TinyModel, tmp_path: Path, project_root: Path) -> None:
    """kill -9 at 50 moments of `train`, many of them of resumed runs: the adapter is readable, old or new, each time.

    Whoever is resumed to the end gives the adapter file of an uninterrupted run and leaves no file that one does not.
    """
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    counts = kill("train", tmp_path, 50, project_root)
    assert counts["resumed"] >= 5, "the kills came too early to show anything"
    assert counts["old"] >= 10, "the kills came too late to show anything"
    assert counts["finished"] == 6


# --- signals to a real process


def start(arguments: Sequence[object], project: Path) -> subprocess.Popen[str]:
    """The command, as a shell starts it."""
    command = [sys.executable, "-m", "surgery.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project)


def wait_for(path: Path, process: subprocess.Popen[str], *, seconds: float = 60) -> None:
    """Until the file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_saves_and_stops(
    number: signal.Signals, tiny_model: TinyModel, tmp_path: Path, project_root: Path
) -> None:
    """Exit code 130, one line on standard error, a whole checkpoint; --resume auto ends with the same bytes."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    data = DataSection(train=[str(tmp_path / "text.txt")], max_length=32)
    settings = fast(max_steps=120, save_steps=10, logging_steps=10)
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    shutil.copytree(tmp_path / "adapter", tmp_path / "whole")
    train(tmp_path / "whole", data, settings)
    given = {**settings.model_dump(exclude_defaults=True), "max_length": 32}
    pairs = [f"{key}={value}" for key, value in given.items()]
    command = ["-q", "train", tmp_path / "adapter", "--data", data.train[0], *pairs]
    process = start(command, project_root)
    wait_for(tmp_path / "adapter" / CHECKPOINTS / "checkpoint-20", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    lines = [line for line in err.splitlines() if not line.startswith("stopping after this step")]
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: train: stopped at step ")
    step = int(lines[0].split("step ")[1].split(",")[0])
    assert (tmp_path / "adapter" / CHECKPOINTS / f"checkpoint-{step}" / STATE_FILE).is_file()
    assert not list((tmp_path / "adapter").rglob(".*"))
    again = start([*command, "--resume", "auto"], project_root)
    out, err = again.communicate(timeout=120)
    assert (again.returncode, err) == (0, "")
    assert "120 steps" in out
    found, expected = ((tmp_path / name / ADAPTER_FILE).read_bytes() for name in ("adapter", "whole"))
    assert found == expected
    steps = [json.loads(line)["step"] for line in (tmp_path / "adapter" / LOG_FILE).read_text().splitlines()]
    assert steps == [*range(10, 121, 10), 120]


@pytest.mark.slow
def test_a_signal_before_the_first_step_stops_at_once(
    tiny_model: TinyModel, tmp_path: Path, project_root: Path
) -> None:
    """While data are read there is nothing to save: exit code 130, one line, nothing left in the temporary folder."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * 5000)
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    before = digest_folder(tmp_path / "adapter")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "surgery.cli", "train", str(tmp_path / "adapter"), "--data", str(path)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project_root, env=environment
    )
    end = time.monotonic() + 60
    while not list(scratch.glob("surgery-data-*")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "Error: train: stopped by SIGTERM. Start it again.\n"
    assert digest_folder(tmp_path / "adapter") == before
    assert not list(scratch.glob("surgery-data-*"))


# --- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, leave_bytes: int) -> Path:
    """Take the room of a file system, but for some."""
    path = folder / "ballast"
    free = shutil.disk_usage(folder).free
    path.write_bytes(b"x" * max(0, free - leave_bytes))
    return path


def test_an_export_to_a_full_disk_is_refused(disk: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """With both numbers, before a byte is written."""
    make_adapter(tiny_model("llama"), tmp_path / "adapter")
    fill(disk, leave_bytes=8192)
    with pytest.raises(ResourceError, match=r"bytes free on its disk, expected [\d,]+ bytes") as caught:
        export(tmp_path / "adapter", disk / "merged")
    assert caught.value.exit_code == 4
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_disk_that_is_full_when_training_saves(disk: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """The run stops with the documented error, the adapter keeps its state, and with room again it is resumed."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    data = DataSection(train=[str(tmp_path / "text.txt")], max_length=32)
    settings = fast(max_steps=4, save_steps=1)
    apply(tiny_model("llama"), tmp_path / "whole", PacaSpec(rank=4))
    apply(tiny_model("llama"), disk / "adapter", PacaSpec(rank=4))
    train(tmp_path / "whole", data, settings)
    before = (disk / "adapter" / ADAPTER_FILE).read_bytes()
    for leave_bytes in (12288, 40960, 98304):
        ballast = fill(disk, leave_bytes=leave_bytes)
        with pytest.raises(ResourceError, match="bytes free on its disk") as caught:
            train(disk / "adapter", data, settings, resume="auto")
        assert caught.value.exit_code == 4
        assert (disk / "adapter" / ADAPTER_FILE).read_bytes() == before
        open_adapter(disk / "adapter")
        assert not list((disk / "adapter").rglob(".*")), "nothing half-written"
        ballast.unlink()
    train(disk / "adapter", data, settings, resume="auto")
    assert (disk / "adapter" / ADAPTER_FILE).read_bytes() == (tmp_path / "whole" / ADAPTER_FILE).read_bytes()


def test_a_read_only_place_for_the_output(
    disk: Path, tiny_model: TinyModel, tmp_path: Path, project_root: Path
) -> None:
    """Exit code 1 and one line that names the place; the adapter is untouched."""
    make_adapter(tiny_model("llama"), tmp_path / "adapter")
    before = digest_folder(tmp_path / "adapter")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    process = start(["export", tmp_path / "adapter", "--merge", "-o", disk / "merged"], project_root)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert "Read-only file system" in err
    assert str(disk) in err
    assert list(disk.iterdir()) == []
    assert digest_folder(tmp_path / "adapter") == before


# --- two at once


def test_two_exports_into_one_folder_at_once(tiny_model: TinyModel, tmp_path: Path, project_root: Path) -> None:
    """Several times over: one wins and is whole, the other gets the documented error; nothing is left behind."""
    make_adapter(tiny_model("llama"), tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "alone" / "merged", check=False)
    run = subprocess.run(
        [sys.executable, "-m", "tests.racing", str(tmp_path), "6"],
        capture_output=True, text=True, cwd=project_root, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rounds = json.loads(run.stdout)
    whole = digest_folder(tmp_path / "alone" / "merged")
    assert rounds == [{"codes": [0, OutputExistsError.exit_code], "digest": whole, "left": []}] * 6
