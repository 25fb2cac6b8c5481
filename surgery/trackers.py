"""Where else a run's log goes when it is asked for: TensorBoard and trackio, through transformers' own callbacks.

Both stay on this machine: TensorBoard's files lie in the adapter folder, trackio's in its own folder ($TRACKIO_DIR, or
huggingface's cache). The variables that would send trackio's logs to a server are not heard.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

from surgery.errors import UnsupportedError, shorten

FOLDER = "tensorboard"  # in the adapter folder, with a folder for each run
PROJECT = "checkpoint-surgery"  # of trackio
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL")


@dataclass(frozen=True)
class Tracked:
    """A run as trackers see it. name: the same for a run that is resumed; step: from which it logs now."""

    adapter: Path
    name: str
    step: int


def require(names: Sequence[str]) -> None:
    """Every tracker's package is installed, and can be imported. Raises: UnsupportedError."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == name
            found = f"{name} {'is not installed' if is_missing else f'does not import ({shorten(str(error), 160)})'}"
            fix = "pip install 'checkpoint-surgery[tracking]', or leave it out"
            raise UnsupportedError("train.report_to", found, expected=name, fix=fix) from error


def callbacks(names: Sequence[str], run: Tracked, arguments: Any) -> list[TrainerCallback]:
    """A callback for each tracker. arguments: the trainer's, which get the run's name."""
    arguments.run_name, arguments.project = f"{run.adapter.resolve().name}-{run.name}", PROJECT
    return [_TRACKERS[name](run) for name in names]


class TensorBoard(TensorBoardCallback):  # type: ignore[misc]
    """Writes to the run's own folder; a resumed run drops what was logged after its checkpoint."""

    def __init__(self, run: Tracked) -> None:
        super().__init__()
        self.folder = run.adapter / FOLDER / run.name
        self.purge_step: int | None = run.step or None

    def _init_summary_writer(self, args: Any, log_dir: Any = None) -> None:  # noqa: ARG002  as the callback calls it
        self.tb_writer = self._SummaryWriter(log_dir=str(self.folder), purge_step=self.purge_step)
        self.purge_step = None


class Trackio(TrackioCallback):  # type: ignore[misc]
    """Logs on this machine only, and leaves standard output to the command's result."""

    def __init__(self, _run: Tracked) -> None:
        with _local():
            super().__init__()

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        with _local():
            super().setup(args, state, model, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with _local():
            super().on_train_end(args, state, control, **kwargs)
        self._initialized = False  # an evaluation may follow


@contextlib.contextmanager
def _local() -> Iterator[None]:
    """No variable sends logs elsewhere, and what is printed goes to standard error."""
    given = {name: os.environ.pop(name) for name in ELSEWHERE if name in os.environ}
    before = os.environ.get("TRACKIO_PROJECT")
    os.environ["TRACKIO_PROJECT"] = PROJECT  # where transformers 4.55 looks
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.environ.update(given)
        if before is None:
            del os.environ["TRACKIO_PROJECT"]
        else:
            os.environ["TRACKIO_PROJECT"] = before


_TRACKERS: dict[str, Callable[[Tracked], TrainerCallback]] = {"tensorboard": TensorBoard, "trackio": Trackio}
