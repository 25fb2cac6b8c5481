"""Which process of a run this is, and what the processes of one run tell each other.

A launcher says in the environment which process is which: torchrun, accelerate and SageMaker by RANK, WORLD_SIZE and
LOCAL_RANK, SLURM's srun by variables of its own. Rank 0 decides, writes and speaks; the others compute.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import InterruptedRunError, RecipeError, RequestError, SurgeryError

ERRORS = "SURGERY_RANK_ERRORS"  # the folder in which `surgery train --nproc` waits for its processes' errors
NO_RESULT = "SURGERY_NO_RESULT"  # set where another process says what came of the run
COLLECTIVES = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "hpu": "hccl"}
SHUTDOWN_SECONDS = "120"  # what processes that are asked to stop have to end their step and save
TIMEOUT = timedelta(minutes=30)  # rank 0 may be reading or writing while the others wait
OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "fsdp2",
    "ACCELERATE_USE_DEEPSPEED": "zero3",
    "ACCELERATE_USE_MEGATRON_LM": "fsdp2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "fsdp2",
}
PEER_ENDED = "another process of the run has ended"
LOST = ("by peer", "NCCL")  # in the errors of gloo and NCCL when a process that they talk to is gone
# In which order errors are the reason of a run's end: a process failed, was killed from outside, was asked to stop (as
# the launcher asks of all when one ends), or ended because of another.
FAILED, KILLED, STOPPED, FOLLOWED = range(4)
T = TypeVar("T")


# --- who this is


def rank() -> int:
    """The number of this process among all of the run, from 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count() -> int:
    """How many processes the run has."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_main() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return rank() == 0


def is_launched() -> bool:
    """Whether a launcher started this process, be it alone."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Say in torch's variables what srun says in its own; where a launcher has spoken already, leave it so.

    A batch script's own shell has SLURM's variables too, but no step: nothing is taken from it.
    Source: srun's manual, output environment variables.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or int(environment.get("SLURM_NTASKS", "1")) < 2:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    has_one = visible and "," not in visible  # srun may show each task its own device alone
    environment["LOCAL_RANK"] = "0" if has_one else environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


def first_node(nodes: str) -> str:
    """The first host of SLURM's notation: `gpu[007-010,012],login` is gpu007."""
    form = re.match(r"(?P<head>[^\[,]+)(?:\[(?P<first>\d+)[^\]]*\](?P<tail>[^,]*))?", nodes)
    if form is None:
        raise RequestError("SLURM_STEP_NODELIST", repr(nodes), expected="a list of hosts", fix="Set MASTER_ADDR")
    return form["head"] + (form["first"] or "") + (form["tail"] or "")


def require_places(device: str, nproc: int) -> None:
    """So many processes of one machine have a device each; on the CPU: a core each. Raises: RequestError."""
    import torch

    places = {"cpu": (os.cpu_count() or 1, "cores"), "cuda": (torch.cuda.device_count(), "CUDA devices")}
    if nproc < 1:
        raise RequestError("--nproc", str(nproc), expected="at least 1")
    if device in places and nproc > places[device][0]:
        number, what = places[device]
        raise RequestError("--nproc", str(nproc), expected=f"at most {number}, as this machine has {number} {what}")


def require_own(strategy: str) -> None:
    """Accelerate's configuration shards nothing beside the run's own strategy. Raises: RecipeError."""
    for name, ours in OF_ACCELERATE.items():
        is_ours = name == "ACCELERATE_USE_DEEPSPEED" and strategy.startswith("zero")  # the trainer sets it, too
        if os.environ.get(name, "false").lower() == "true" and not is_ours:
            expected = f"train.strategy={ours} in its place"
            raise RecipeError(name, "true, by accelerate's configuration", expected=expected)


# --- what they tell each other


@contextmanager
def joined(device: str) -> Iterator[None]:
    """In the group of the run's processes, where a launcher started several or one.

    After an error the group is left as it is: the others are in the middle of something and must not be waited for.
    """
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    owns = not torch.distributed.is_initialized()
    if owns:
        torch.distributed.init_process_group(COLLECTIVES[device], timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if count() < 2 or not any(sign in str(error) for sign in LOST):
            raise
        fix = "Its error says why; --resume auto goes on"
        raise SurgeryError("train", PEER_ENDED, expected="all to go on", fix=fix) from error
    if owns:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _is_joined() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized() and count() > 1


def wait() -> None:
    """Until every process is here."""
    if _is_joined():
        import torch.distributed

        torch.distributed.barrier()


def from_main(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank. Where it fails, it alone says why; the others end with exit code 1."""
    if not _is_joined():
        return decide()
    import torch.distributed

    answer: list[Any] = [False, None]
    if not is_main():
        torch.distributed.broadcast_object_list(answer, 0)
        if not answer[0]:
            raise SystemExit(SurgeryError.exit_code)
        return answer[1]  # type: ignore[no-any-return]
    try:
        answer = [True, decide()]
    finally:
        torch.distributed.broadcast_object_list(answer, 0)
    return answer[1]  # type: ignore[no-any-return]


def to_main(value: T) -> list[T]:
    """Every rank's value in order, on rank 0; an empty list on the others."""
    if not _is_joined():
        return [value]
    import torch.distributed

    values: list[Any] = [None] * count()
    torch.distributed.gather_object(value, values if is_main() else None, 0)
    return values if is_main() else []


def any_rank(flag: bool) -> bool:  # noqa: FBT001  a question, not an option
    """Whether it holds on any rank."""
    if not _is_joined():
        return flag
    import torch
    import torch.distributed

    votes = torch.tensor([int(flag)], device="hpu" if torch.distributed.get_backend() == "hccl" else "cpu")
    torch.distributed.all_reduce(votes)
    return bool(votes.item())


# --- errors on their way to the launcher


@dataclass(frozen=True)
class RankError:
    """How one process ended. order: which of several errors is the reason, the lowest: see FAILED and the following."""

    rank: int
    seconds: float
    exit_code: int
    text: str
    order: int


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    """Variables for processes that are started meanwhile; those that are set already stay as they are."""
    new = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def hand_over(error: SurgeryError) -> bool:
    """Leave an error to the launcher that collects them, if there is one: the first says why a run ended.

    The launcher asks all to stop when one has ended; a process that gets here is about to, and no longer listens.
    """
    folder = os.environ.get(ERRORS)
    if not folder:
        return False
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    is_stop = isinstance(error, InterruptedRunError)
    order = FOLLOWED if error.found == PEER_ENDED else STOPPED if is_stop else FAILED
    said = RankError(rank(), time.time(), error.exit_code, str(error), order)
    (Path(folder) / f"{rank()}.json").write_text(json.dumps(asdict(said)), encoding="utf-8")
    return True


@contextmanager
def launching(processes: int) -> Iterator[Path]:
    """The folder in which processes that are started meanwhile leave their errors, and the variables that they get."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    variables = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": SHUTDOWN_SECONDS}
    with tempfile.TemporaryDirectory(prefix="surgery-ranks-") as folder, environment(**variables, **{ERRORS: folder}):
        yield Path(folder)


def say_why(folder: Path, ended: RankError | None) -> int:
    """Say once why a launched run ended, and return its exit code: 0 where `ended`, as the launcher saw it, is None.

    Otherwise the first of the errors that were handed over says it, or the launcher where none of them is the reason.
    """
    if ended is None:
        return 0
    said = [RankError(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    first = min((ended, *said), key=lambda error: (error.order, error.seconds))
    print(f"Error: {first.text}", file=sys.stderr)  # noqa: T201  the processes have left it to us
    return first.exit_code
