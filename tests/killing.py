"""Kill exports and training runs at random moments, many times, from one warm process. Run by test_faults.

`python -m tests.killing export|train WORK ROUNDS SEED`, with `WORK/adapter` a fresh adapter folder and, for train,
`WORK/text.txt`. Children are forked once everything is imported, because importing costs more than what is killed. The
parent itself neither computes nor reads rows: threads would not survive the fork. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surgery.adapter import find_base, open_adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import ADAPTER_FILE
from surgery.recipe import DataSection
from surgery.runs import CHECKPOINTS, STATE_FILE
from surgery.train import train
from surgery.workflow import export
from tests.conftest import digest_folder
from tests.examples import fast

DONE = 0


def in_child(work: Callable[[], object], *, kill_after_seconds: float | None = None) -> bool:
    """Fork, run, and kill it unless it ends before. Whether it came to its end, which must then be a good one."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            work()
        except BaseException as error:  # noqa: BLE001  a child must not run on into its parent's code
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(DONE)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != DONE:
        raise SystemExit("a child failed")
    return True


def timed(work: Callable[[], object]) -> float:
    """How long it takes in a child, in seconds."""
    start = time.perf_counter()
    in_child(work)
    return time.perf_counter() - start


def visible(folder: Path) -> list[str]:
    """Everything below a folder, but what a training run legitimately keeps."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kill_exports(work: Path, rounds: int, draw: random.Random) -> dict[str, Any]:
    """Export with its check, killed: the output is absent or whole; adapter and base keep every byte."""
    adapter, out = work / "adapter", work / "merged"
    base = find_base(open_adapter(adapter).record, adapter)
    inputs = digest_folder(adapter), digest_folder(base)

    def work_it() -> None:
        export(adapter, out)

    seconds = timed(work_it)
    whole, outcomes = digest_folder(out), {"absent": 0, "whole": 0}
    for number in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        in_child(work_it, kill_after_seconds=draw.random() * seconds * 1.2)
        if out.exists() and digest_folder(out) != whole:
            raise SystemExit(f"round {number}: half an output")
        if (digest_folder(adapter), digest_folder(base)) != inputs:
            raise SystemExit(f"round {number}: an input has changed")
        outcomes["whole" if out.exists() else "absent"] += 1
    shutil.rmtree(out, ignore_errors=True)
    in_child(work_it)
    if digest_folder(out) != whole:
        raise SystemExit("the last export differs from the first")
    return {**outcomes, "left": sorted(path.name for path in work.iterdir())}


def kill_trainings(work: Path, rounds: int, draw: random.Random) -> dict[str, Any]:
    """Train, killed, resumed, killed again, until it ends: the adapter file is the old or the new one each time."""
    fresh, folder = work / "adapter", work / "trained"
    base = find_base(open_adapter(fresh).record, fresh)
    base_before = digest_folder(base)
    data = DataSection(train=[str(work / "text.txt")], max_length=32)
    settings = fast(max_steps=8, save_steps=1, batch_size=2, logging_steps=1)

    def work_it() -> None:
        train(folder, data, settings, resume="auto")

    shutil.copytree(fresh, folder)
    seconds = timed(work_it)
    old, new = (fresh / ADAPTER_FILE).read_bytes(), (folder / ADAPTER_FILE).read_bytes()
    files, outcomes = visible(folder), {"old": 0, "new": 0, "resumed": 0, "finished": 0}
    ended = True
    for number in range(rounds):
        if ended:
            shutil.rmtree(folder)
            shutil.copytree(fresh, folder)
        outcomes["resumed"] += any((folder / CHECKPOINTS).glob("checkpoint-*"))
        ended = in_child(work_it, kill_after_seconds=draw.random() * seconds * 1.1)
        check_training(folder, base, old, new, number)
        outcomes["new" if (folder / ADAPTER_FILE).read_bytes() == new else "old"] += 1
        if number % 8 == 7:
            ended = ended or in_child(work_it)
            if (folder / ADAPTER_FILE).read_bytes() != new:
                raise SystemExit(f"round {number}: the resumed run ended elsewhere")
            if visible(folder) != files:
                raise SystemExit(f"round {number}: {sorted({*visible(folder)} ^ {*files})} is left or missing")
            outcomes["finished"] += 1
    if digest_folder(base) != base_before:
        raise SystemExit("the base has changed")
    return outcomes


def check_training(folder: Path, base: Path, old: bytes, new: bytes, number: int) -> None:
    """The adapter opens, in its old or its new state; checkpoints are whole; the base's headers are."""
    open_adapter(folder)
    if (folder / ADAPTER_FILE).read_bytes() not in (old, new):
        raise SystemExit(f"round {number}: an adapter that is neither the old nor the new one")
    for checkpoint in (folder / CHECKPOINTS).glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()}
        if not {STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names:
            raise SystemExit(f"round {number}: half a checkpoint, {names}")
    Checkpoint.open(base)


def main() -> None:
    """Parse, kill, print."""
    what, work, rounds, seed = sys.argv[1:]
    kill = {"export": kill_exports, "train": kill_trainings}[what]
    sys.stdout.write(json.dumps(kill(Path(work), int(rounds), random.Random(int(seed)))))


if __name__ == "__main__":
    main()
