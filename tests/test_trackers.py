"""TensorBoard and trackio, the real packages: what they are given, when a run is resumed, and that nothing leaves."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surgery import trackers
from surgery.adapter import open_adapter
from surgery.cli import main
from surgery.errors import InterruptedRunError, RecipeError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.recipe import DataSection, Recipe, TrainSection
from surgery.recipe_keys import check
from surgery.report.curves import read_entries
from surgery.runs import CHECKPOINTS, LOG_FILE
from surgery.train import train
from surgery.trainer import StopWhenAsked
from tests.conftest import TinyModel
from tests.examples import CASES, fast

BOTH = ["tensorboard", "trackio"]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def ready(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataSection]:
    """A fresh adapter in `run`, its data, and trackio's database in a folder of the test's own; no network."""
    import trackio.utils

    attempts: list[Any] = []

    def refuse(_self: socket.socket, address: Any) -> None:
        attempts.append(address)
        raise ConnectionRefusedError(address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("TRACKIO_DIR", "MEDIA_DIR"):
        for module in [m for key, m in sys.modules.items() if key.startswith("trackio") and name in vars(m)]:
            monkeypatch.setattr(module, name, tmp_path / "trackio" / ("" if name == "TRACKIO_DIR" else "media"))
    assert tmp_path / "trackio" == trackio.utils.TRACKIO_DIR
    apply(tiny_model(CASES[0].family), tmp_path / "run", PacaSpec(rank=4))
    yield CASES[0].write(tmp_path)
    assert attempts == []
    assert not list(tmp_path.glob("runs"))


def settings(**more: Any) -> TrainSection:
    """Eight steps, logged one by one."""
    return fast(max_steps=8, logging_steps=1, save_steps=2, eval_steps=4, **more)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, of the one run that TensorBoard finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (own,) = folder.iterdir()
    events = EventAccumulator(str(own), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def logged(folder: Path) -> list[dict[str, Any]]:
    """What trackio's database holds, in its order."""
    (database,) = (path for path in folder.glob("*.db") if not path.name.startswith("registry"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, metrics from metrics order by id").fetchall()
    return [{"run": name, **json.loads(metrics)} for name, metrics in rows]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a signal in that step."""

    def stop(self: StopWhenAsked, _args: object, state: Any, control: Any, **_: object) -> None:
        if state.global_step == step:
            self.interruption.requested = control.should_save = control.should_training_stop = True

    monkeypatch.setattr(StopWhenAsked, "on_step_end", stop)


def test_both_get_what_the_log_gets(ready: DataSection, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every loss, learning rate and score of training_log.jsonl, at its step; nothing is printed to standard output."""
    train(tmp_path / "run", ready, settings(report_to=BOTH))
    entries = read_entries(tmp_path / "run" / LOG_FILE)
    found = scalars(tmp_path / "run" / trackers.FOLDER)
    for key, tag in (("loss", "train/loss"), ("learning_rate", "train/learning_rate"), ("eval_loss", "eval/loss")):
        wanted = {entry["step"]: pytest.approx(entry[key], rel=1e-6) for entry in entries if key in entry}
        assert {s: v for s, v in found[tag].items() if s} == wanted, tag
    assert len(found["train/loss"]) == 8
    rows = logged(tmp_path / "trackio")
    losses = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    scores = {row["train/global_step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert {s: v for s, v in scores.items() if s} == {e["step"]: e["eval_loss"] for e in entries if "eval_loss" in e}
    started = open_adapter(tmp_path / "run").record.manifest.training["started"]
    assert {row["run"] for row in rows} == {f"run-{started}"}
    assert [path.name for path in (tmp_path / "run" / trackers.FOLDER).iterdir()] == [started]
    assert capfd.readouterr().out == ""


def test_a_resumed_run_goes_on_where_it_was(ready: DataSection, tmp_path: Path) -> None:
    """Stopped in step 5 and resumed: one run in each tracker, with every step in it once."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(InterruptedRunError):
            train(tmp_path / "run", ready, settings(report_to=BOTH))
    assert sorted(scalars(tmp_path / "run" / trackers.FOLDER)["train/loss"]) == [1, 2, 3, 4, 5]
    train(tmp_path / "run", ready, settings(report_to=BOTH), resume="auto")
    assert sorted(scalars(tmp_path / "run" / trackers.FOLDER)["train/loss"]) == list(range(1, 9))
    rows = logged(tmp_path / "trackio")
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    assert len({row["run"] for row in rows}) == 1


def test_a_killed_run_s_later_steps_are_dropped(ready: DataSection, tmp_path: Path) -> None:
    """What was logged after the checkpoint that a run goes on from is not there twice in TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    run = trackers.Tracked(tmp_path / "run", "began", 0)
    with SummaryWriter(log_dir=str(tmp_path / "run" / trackers.FOLDER / "began")) as writer:
        for step in range(1, 8):
            writer.add_scalar("train/loss", 100.0, step)
    resumed = trackers.TensorBoard(trackers.Tracked(run.adapter, run.name, 5))
    resumed._init_summary_writer(None)
    resumed.tb_writer.add_scalar("train/loss", 1.0, 5)
    resumed.tb_writer.close()
    found = scalars(tmp_path / "run" / trackers.FOLDER)["train/loss"]
    assert found == {1: 100.0, 2: 100.0, 3: 100.0, 4: 100.0, 5: 1.0}


def test_trackers_change_neither_the_result_nor_what_the_run_is(
    ready: DataSection, tmp_path: Path, tiny_model: TinyModel
) -> None:
    """The adapter file is the same byte for byte with them and without, and so is the run's digest."""
    train(tmp_path / "run", ready, settings(report_to=BOTH))
    apply(tiny_model(CASES[0].family), tmp_path / "plain", PacaSpec(rank=4))
    train(tmp_path / "plain", ready, settings())
    tracked, plain = (open_adapter(tmp_path / name).record.manifest for name in ("run", "plain"))
    assert tracked.files == plain.files
    assert tracked.training["run"] == plain.training["run"]
    assert not (tmp_path / "plain" / trackers.FOLDER).exists()


def test_trackio_stays_here_whatever_the_environment_says(
    ready: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Space, a server: neither is heard, and the variables are as they were."""
    elsewhere = {"TRACKIO_SPACE_ID": "someone/space", "TRACKIO_SERVER_URL": "http://127.0.0.1:9/?write_token=x"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    train(tmp_path / "run", ready, settings(report_to=["trackio"]))
    assert len(logged(tmp_path / "trackio")) >= 8
    assert {name: os.environ[name] for name in elsewhere} == elsewhere
    assert "TRACKIO_PROJECT" not in os.environ


@pytest.mark.parametrize(
    ("error", "said"),
    (
        (ModuleNotFoundError("No module named 'trackio'", name="trackio"), "trackio is not installed"),
        (ImportError("cannot import name 'Volume'"), r"trackio does not import \(cannot import name 'Volume'\)"),
    ),
)
def test_a_missing_package_is_said_before_anything_starts(
    ready: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: ImportError, said: str
) -> None:
    """Exit code 5 and the pip line, also for one that is broken; the adapter's folder is as it was."""
    real = importlib.import_module

    def load(name: str, package: str | None = None) -> object:
        if name == "trackio":
            raise error
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(UnsupportedError, match=said + r".*pip install 'checkpoint-surgery\[tracking\]'"):
        train(tmp_path / "run", ready, settings(report_to=BOTH))
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


def test_the_command_takes_one_name_or_a_list(ready: DataSection, tmp_path: Path) -> None:
    """`report_to=tensorboard`, and the rest of the run as ever."""
    main(["train", str(tmp_path / "run"), f"--data={ready.train[0]}", "report_to=tensorboard", "max_steps=2"])
    assert "train/loss" in scalars(tmp_path / "run" / trackers.FOLDER)


@pytest.mark.parametrize("given", (["wandb"], "wandb", 3))
def test_another_tracker_is_an_unknown_value(given: object) -> None:
    """Of those that exist, by name."""
    with pytest.raises(RecipeError, match=r"'tensorboard' or 'trackio'|valid list"):
        check(Recipe, {"model": "m", "train": {"report_to": given}}, "settings")
