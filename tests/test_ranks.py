"""Who is who among a run's processes, what they are refused, and which of their errors is said."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from surgery.backends.local import _run_torchrun, training_arguments
from surgery.errors import (
    CheckError,
    InterruptedRunError,
    RecipeError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.paca_layers import PacaConv1D
from surgery.ranks import (
    FOLLOWED,
    KILLED,
    PEER_ENDED,
    RankError,
    adopt_slurm,
    first_node,
    hand_over,
    launching,
    require_own,
    require_places,
    say_why,
)
from surgery.recipe import TrainSection
from surgery.sharding import require_even

# --- who is who


def test_slurm_is_read_only_inside_a_step() -> None:
    """srun's variables become torch's; in a batch script's shell, a single task or under a launcher nothing changes."""
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    step["SLURM_STEP_NODELIST"] = "gpu[007-010,012],login"
    environment = dict(step)
    adopt_slurm(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [environment.get(name) for name in names] == ["3", "4", "1", "gpu007", "20007"]
    for visible, local in (("6", "0"), ("6,7", "1"), ("", "1")):  # with --gpus-per-task srun shows each task its own
        environment = {**step, "CUDA_VISIBLE_DEVICES": visible}
        adopt_slurm(environment)
        assert environment["LOCAL_RANK"] == local
    shell = {name: value for name, value in step.items() if name != "SLURM_STEP_ID"}
    for environment in (shell, {**step, "SLURM_NTASKS": "1"}, {**step, "RANK": "0"}):
        before = dict(environment)
        adopt_slurm(environment)
        assert environment == before


NODES = {
    "n1": "n1",
    "n1,n2": "n1",
    "a[3,5]": "a3",
    "rack1-n[08-11]-ib,x": "rack1-n08-ib",
    "h.example.org": "h.example.org",
}


@pytest.mark.parametrize("nodes", NODES)
def test_the_first_node_of_slurms_notation(nodes: str) -> None:
    """Ranges, lists and suffixes."""
    assert first_node(nodes) == NODES[nodes]


def test_what_is_no_list_of_nodes() -> None:
    """Is an error that says what to set."""
    with pytest.raises(
        RequestError, match=r"SLURM_STEP_NODELIST: '\[1-2\]', expected a list of hosts. Set MASTER_ADDR"
    ):
        first_node("[1-2]")


# --- what is refused


def test_no_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA devices; cards of another kind are counted by their backend."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    require_places("cuda", 4)
    require_places("hpu", 8)
    with pytest.raises(RequestError, match="--nproc: 5, expected at most 4, as this machine has 4 CUDA devices"):
        require_places("cuda", 5)


def test_a_conv1d_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut along its outputs, which come second."""
    layer = PacaConv1D.__new__(PacaConv1D)
    torch.nn.Module.__init__(layer)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 6))
    monkeypatch.setattr("surgery.sharding.count", lambda: 3)
    require_even("h.0.c_attn", layer)
    monkeypatch.setattr("surgery.sharding.count", lambda: 4)
    with pytest.raises(UnsupportedError, match=r"fsdp2 with 4 processes, and h\.0\.c_attn has 6 outputs in a Conv1D"):
        require_even("h.0.c_attn", layer)


@pytest.mark.parametrize(
    "name", [f"ACCELERATE_USE_{kind}" for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")]
)
def test_accelerates_own_strategies_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --use_fsdp` sets would shard the model once more: a strategy is asked for instead."""
    monkeypatch.setenv(name, "true")
    with pytest.raises(RecipeError, match=f"{name}: true, by accelerate's configuration, expected train.strategy="):
        require_own("ddp")
    if name == "ACCELERATE_USE_DEEPSPEED":
        require_own("zero2")
    else:
        with pytest.raises(RecipeError, match=name):
            require_own("zero2")


def test_accelerates_precision_and_compiler_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They would be had beside what the run's record says; where they say the same, nothing is wrong."""

    def arguments(autocast: str) -> Any:
        return training_arguments(
            TrainSection(), folder=tmp_path, device="cpu", autocast=autocast, steps=1, has_eval=False
        )

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        RecipeError, match=r"bf16, by accelerate's configuration, expected train\.precision=bf16 in its"
    ):
        arguments("fp32")
    assert arguments("bf16").bf16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(RecipeError, match=r"inductor, by accelerate's configuration, expected train\.compile=true"):
        arguments("fp32")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not arguments("fp32").bf16


# --- how a run ended


ENDED = RankError(0, 0.0, 1, "as the launcher saw it", FOLLOWED)
LOST, STOPPED = SurgeryError("train", PEER_ENDED), InterruptedRunError("x", "asked to stop")


@pytest.mark.parametrize(
    ("ended", "errors", "code", "text"),
    (
        (None, [RequestError("x", "at the first attempt")], 0, None),
        (ENDED, [], 1, ENDED.text),
        (ENDED, [LOST, RequestError("x", "the first"), RequestError("x", "more")], 2, "x: the first."),
        (ENDED, [STOPPED, CheckError("x", "it")], 3, "x: it."),
        (ENDED, [LOST, STOPPED], 130, "x: asked to stop."),
        (ENDED, [LOST], 1, ENDED.text),
        (replace(ENDED, order=KILLED), [STOPPED, LOST], 1, ENDED.text),
        (replace(ENDED, order=KILLED), [CheckError("x", "it")], 3, "x: it."),
    ),
    ids=str,
)  # fmt: skip
def test_of_several_errors_the_reason_is_said(
    ended: RankError | None, errors: list[SurgeryError], code: int, text: str | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A process's own error before a kill, a kill before a stop, and last what follows from another's end."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the next test's
    with launching(2) as folder:
        monkeypatch.setenv("WORLD_SIZE", "9")
        for number, error in enumerate(errors):
            monkeypatch.setenv("RANK", str(number))
            assert hand_over(error)
        assert say_why(folder, ended) == code
    assert capsys.readouterr().err == (f"Error: {text}\n" if text else "")
    assert not folder.exists()
    assert not hand_over(SurgeryError("x", "nobody collects"))


@pytest.mark.parametrize(
    ("codes", "order", "rank"),
    (
        ({0: -signal.SIGTERM, 1: 130}, FOLLOWED, 1),
        ({0: 1, 1: -signal.SIGTERM}, FOLLOWED, 0),
        ({0: -signal.SIGTERM, 1: -signal.SIGKILL}, KILLED, 1),
        ({0: 1, 1: -signal.SIGSEGV}, KILLED, 1),
    ),
    ids=str,
)
def test_whom_torchrun_stopped_was_not_killed(
    codes: dict[int, int], order: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends SIGTERM to all when one ends, and counts the codes afterwards: that is no reason of its own."""
    failures = {number: ProcessFailure(number, 1, int(code), "") for number, code in codes.items()}

    def run(_options: object) -> None:
        raise ChildFailedError("it", failures)

    monkeypatch.setattr("torch.distributed.run.run", run)
    ended = _run_torchrun(None)
    assert (ended.order, ended.rank) == (order, rank)


def test_who_has_said_why_it_ends_is_not_stopped_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's SIGTERM to all no longer reaches it: its error would be cut short, or another one's."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert not hand_over(LOST)
        assert signal.getsignal(signal.SIGTERM) == handler
        with launching(2):
            monkeypatch.setenv("RANK", "0")
            assert hand_over(LOST)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_what_launched_processes_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cores are divided, and there is time to save; what is set already stays, and nothing is left behind."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = dict(os.environ)
    with launching(3):
        assert os.environ["OMP_NUM_THREADS"] == "2"
        assert int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 60
    assert dict(os.environ) == before
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with launching(16):
        assert os.environ["OMP_NUM_THREADS"] == "5"
