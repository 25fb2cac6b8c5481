"""The command line in one process and in two, from one warm process that forks them: see `carry_out`.

`python -m tests.forking JOBS OUT`: JOBS is a JSON file with a list of jobs, OUT the file for their outcomes. Importing
torch and transformers costs more than what these runs compute. A forked process finds the environment that torchrun
would give it; what the launcher itself does is tested apart.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.utils import logging

from surgery import acceleration, combinations, trainer
from surgery.adapter import open_adapter
from surgery.cli import main as command_line
from surgery.paca_layers import layers
from surgery.train import train
from surgery.trainer import StopWhenAsked
from tests.conftest import PROJECT

assert open_adapter, train  # imported for the forked processes, which use them by way of the command line


FAILURE = "the disk is on fire"
REMARK = "the disk is warm"
NOTHING_COMPILED = 99  # an exit code


@dataclass(frozen=True)
class Job:
    """One command, in `nproc` processes (0: without a launcher).

    at: {rank: [step, signal, FAILURE or REMARK]}; has_standin: the CPU stands in for the devices that DeepSpeed needs;
    compiles_quickly: torch.compile runs its graphs' operators one by one, and a break in a graph is an error.
    tells: a file's name, to which each rank adds its number, for the columns that it draws anew.
    """

    name: str
    nproc: int
    arguments: list[str]
    at: dict[str, list[Any]] = field(default_factory=dict)
    has_standin: bool = False
    compiles_quickly: bool = False
    tells: str = ""
    limit_seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended, rank by rank: exit codes (negative: a signal's number), what each printed."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float


def carry_out(
    jobs: Sequence[Job], folder: Path, *flags: str, at: Path = PROJECT, **environment: str
) -> dict[str, Outcome]:
    """Run jobs one after another and tell how each ended, by name.

    folder: for lists and outputs; flags: the interpreter's own; at: where the commands run.
    """
    path, out = folder / "jobs.json", folder / "outcomes.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    done = run_python(*flags, "-m", "tests.forking", str(path), str(out), at=at, **environment)
    assert done.returncode == 0, done.stderr
    return {name: Outcome(**entry) for name, entry in json.loads(out.read_text()).items()}


def run_python(*arguments: str, at: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of these tests on this project."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    command, settings = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": path, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, text=True, cwd=at, env=settings, check=False, timeout=900, **pipes)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def happen_at(step: int, what: str) -> None:
    """At the end of a step send ourselves a signal, fail, or remark on something."""
    original = StopWhenAsked.on_step_end

    def on_step_end(self: StopWhenAsked, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and what == FAILURE:
            raise RuntimeError(FAILURE)
        if state.global_step == step and what == REMARK:
            warnings.warn(REMARK, stacklevel=1)
            logging.get_logger("transformers.trainer").warning(REMARK)
        elif state.global_step == step:
            os.kill(os.getpid(), signal.Signals[what])
        original(self, args, state, control, **kwargs)

    StopWhenAsked.on_step_end = on_step_end  # type: ignore[method-assign]


def stand_in() -> None:
    """Let accelerate start DeepSpeed on the CPU, as if it were a device of its own: all else is as it is elsewhere."""

    def choose(*_args: object, **_kwargs: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_XPU

    def place(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = choose, place
    rows = combinations.COMBINATIONS
    combinations.COMBINATIONS = [row for row in rows if row.other != "train.device=cpu"]  # type: ignore[misc]


def compile_quickly() -> None:
    """Compile models as one graph, and without a C++ compiler."""
    real = torch.nn.Module.compile
    torch.nn.Module.compile = partialmethod(real, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
    acceleration.compile_failure = lambda _device: ""


def tell_columns(path: Path) -> None:
    """Write a line for each change of columns: its step, and what trains in each layer from then on."""
    real = trainer.resample_model

    def telling(model: Any, optimizer: Any, **settings: Any) -> bool:
        is_drawn = real(model, optimizer, **settings)
        if is_drawn:
            columns = {name: layer.paca_columns.tolist() for name, layer in layers(model).items()}
            with path.open("a") as file:
                file.write(json.dumps([settings["step"], columns]) + "\n")
        return is_drawn

    trainer.resample_model = telling


def run_rank(job: Job, rank: int, port: int, stem: Path) -> None:
    """In a forked process: be this rank, and end."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{stem}.{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job.nproc:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.nproc, "LOCAL_WORLD_SIZE": job.nproc}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if str(rank) in job.at:
        happen_at(*job.at[str(rank)])
    if job.has_standin:
        stand_in()
    if job.compiles_quickly:
        compile_quickly()
    if job.tells:
        tell_columns(Path(f"{job.tells}.{rank}"))
    code = 0
    try:
        command_line(job.arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        if job.compiles_quickly and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            code = NOTHING_COMPILED
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: Job, folder: Path) -> Outcome:
    """Fork the job's processes and wait for them; one that outlasts the limit is killed, which its code shows."""
    start, port, stem = time.monotonic(), free_port(), folder / job.name
    children = []
    for rank in range(max(1, job.nproc)):
        child = os.fork()
        if child == 0:
            run_rank(job, rank, port, stem)
        children.append(child)
    codes = [wait_for(child, start + job.limit_seconds) for child in children]
    read = [[Path(f"{stem}.{rank}.{kind}").read_text() for rank in range(len(children))] for kind in ("out", "err")]
    return Outcome(codes, read[0], read[1], time.monotonic() - start)


def wait_for(child: int, deadline: float) -> int:
    """The exit code of a forked process."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Read the jobs, run them in order, write the outcomes."""
    jobs, out = (Path(text) for text in sys.argv[1:])
    outcomes = {}
    for entry in json.loads(jobs.read_text()):
        job = Job(**entry)
        outcomes[job.name] = asdict(run(job, out.parent))
    out.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
