"""Several processes: they give the adapter that one gives, and checkpoints, errors and files are one run's."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.dense import export
from surgery.adapter import find_base, open_adapter
from surgery.cli import cli
from surgery.delta import ADAPTER_FILE, ColumnDelta, ColumnPatch
from surgery.errors import RequestError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.operate import apply
from surgery.recipe import DataSection, TrainSection
from surgery.recipe_file import read_recipe
from surgery.recipe_keys import qualified
from surgery.runs import CHECKPOINTS, RUN_FILE, STATE_FILE
from surgery.strict_yaml import parse_yaml
from surgery.survey import TaskSpec
from surgery.tensorfile import TensorFile
from surgery.train import train
from surgery.training.checks import require_zero
from surgery.verify import verify
from surgery.zero import require_deepspeed
from tests.conftest import PROJECT, TinyModel, digest_folder
from tests.console import Console
from tests.examples import LABELLED, QUESTIONS, mostly_long, write_rows
from tests.forking import FAILURE, REMARK, Job, Outcome, carry_out, run_python

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
STRATEGIES = ("ddp", "fsdp2")
PACA = PacaSpec(rank=4)
STEPS = 8
USUAL = {"learning_rate": 1e-3, "max_steps": STEPS, "max_length": 64, "max_rows": 32, "logging_steps": 1}
SAVE_STEPS = 4


@dataclass(frozen=True)
class Variant:
    """A model, a method and settings. The global batch is 4, or 8 with accumulation."""

    name: str
    family: str = "llama"
    spec: Any = PACA
    task: str = ""
    data: str = "prompts.jsonl"
    dtype: torch.dtype | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, object] = field(default_factory=dict)
    strategies: tuple[str, ...] = STRATEGIES


_DRY: dict[str, dict[str, object]] = {  # ranks draw their own dropout
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}
VARIANTS = (
    Variant("plain"),
    Variant("resample", spec=PacaSpec(rank=4, resample="every:3"), strategies=("ddp",)),
    Variant("accumulation", settings={"gradient_accumulation": 2}),
    Variant("checkpointing", settings={"gradient_checkpointing": True}),
    Variant("evaluated", settings={"eval_steps": 4}, strategies=("ddp",)),
    Variant("conv1d", "gpt2", strategies=("fsdp2",)),
    Variant("bf16", dtype=torch.bfloat16),
    Variant(
        "experts",
        "mixtral",
        PacaSpec(rank=4, targets=("all-linear", "experts"), experts="own"),
        overrides={"num_local_experts": 3},
    ),
    Variant("head", "bert", task="sequence-classification", data="labelled.jsonl"),
    Variant("seq2seq", "t5", data="pairs.jsonl", strategies=("ddp",)),
    Variant("read", "bert", ReadSpec(hidden=8), task="sequence-classification", data="labelled.jsonl"),
)
BF16 = next(variant for variant in VARIANTS if variant.dtype == torch.bfloat16)
CASES = [(variant, strategy) for variant in VARIANTS if variant != BF16 for strategy in variant.strategies]


DROPOUT = Variant("dropout", overrides={"attention_dropout": 0.2})


@dataclass
class Bench:
    """Where runs are set up, and how they ended."""

    root: Path
    jobs: list[Job] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def add(self, variant: Variant, name: str, nproc: int, *, fresh: bool = True, **job: Any) -> None:
        """A run of a variant with its global batch, in a fresh copy of the variant's adapter or in the one there."""
        folder = self.root / name.partition("/")[0]
        if fresh:
            shutil.copytree(self.root / f"fresh-{variant.name}", folder)
        settings = {**USUAL, "save_steps": SAVE_STEPS, "batch_size": 4 // max(1, nproc), **variant.settings}
        settings |= job.pop("settings", {})
        data = str(self.root / variant.data)
        more = [f"--task={variant.task}"] if variant.task else []
        more += [f"--eval-data={data}"] if "eval_steps" in settings else []
        pairs = [f"{key}={value}" for key, value in settings.items()]
        arguments = ["train", str(folder), "--device=cpu", f"--data={data}", *more, *job.pop("more", []), *pairs]
        self.jobs.append(Job(name.replace("/", "-"), nproc, arguments, **job))

    def run(self, **environment: str) -> None:
        """Carry all of them out, in one warm process."""
        self.outcomes = carry_out(self.jobs, self.root, **environment)

    def folder(self, name: str) -> Path:
        return self.root / name

    def codes(self, name: str) -> list[int]:
        return self.outcomes[name.replace("/", "-")].codes


def prepare(root: Path, tiny_model: TinyModel, variants: Sequence[Variant]) -> Bench:
    """Data, and a fresh adapter of each variant."""
    # Answers of different lengths: a rank's batch has more labels than the other's.
    pairs = [(question, answer + " indeed" * (number % 4)) for number, (question, answer) in enumerate(QUESTIONS)]
    write_rows(root / "prompts.jsonl", [{"prompt": question, "completion": answer} for question, answer in pairs])
    write_rows(root / "pairs.jsonl", [{"source": question, "target": answer} for question, answer in pairs])
    write_rows(root / "labelled.jsonl", LABELLED)
    for variant in variants:
        base = tiny_model(
            variant.family, dtype=variant.dtype, overrides={**_DRY.get(variant.family, {}), **variant.overrides}
        )
        labels = ("animal", "person") if variant.task else ()
        apply(base, root / f"fresh-{variant.name}", variant.spec, task=TaskSpec(variant.task, labels))
    return Bench(root)


def largest_difference(a: Path, b: Path) -> float:
    """Between the trained values of two adapters; infinite where one holds more columns."""
    first, second = (TensorFile(folder / "adapter.safetensors") for folder in (a, b))
    assert set(first.infos) == set(second.infos)
    pairs = [(first.read(name).double(), second.read(name).double()) for name in first.infos]
    return max(float((one - two).abs().max()) if one.shape == two.shape else math.inf for one, two in pairs)


def patches(folder: Path) -> Mapping[str, ColumnPatch]:
    """An adapter's columns, by target."""
    delta = open_adapter(folder).delta
    assert isinstance(delta, ColumnDelta)
    return delta.patches


def moved_rows(folder: Path) -> dict[str, torch.Tensor]:
    """By target: which rows (outputs) have a column that training moved."""
    return {m: (p.values != p.original.to(p.values.dtype)).any(1) for m, p in patches(folder).items()}


def logged_losses(folder: Path) -> dict[int, float]:
    """Loss by step, each of which has one line."""
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(losses) == len(dict(losses))
    return dict(losses)


def adapter_bytes(bench: Bench, name: str) -> bytes:
    """The trained values as they are in the file."""
    return (bench.folder(name) / ADAPTER_FILE).read_bytes()


@pytest.fixture(scope="module")
def bench(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Bench:
    """Variants in one process and in two, and the runs that are stopped, killed and resumed: all run once.

    What long tests alone look at is run where one of them is.
    """
    here = [item for item in request.session.items if item.path == request.path]
    is_long = any(item.get_closest_marker("long") for item in here)
    variants = VARIANTS if is_long else VARIANTS[:2]
    made = prepare(tmp_path_factory.mktemp("distributed"), tiny_model, (*variants, DROPOUT) if is_long else variants)
    for variant in variants:
        made.add(variant, f"{variant.name}-one", 0, **telling(made, variant, "one"))
        for strategy in variant.strategies:
            remarks = {str(rank): [2, REMARK] for rank in range(2)} if variant == VARIANTS[0] else {}
            told = telling(made, variant, strategy)
            made.add(variant, f"{variant.name}-{strategy}", 2, settings={"strategy": strategy}, at=remarks, **told)
    made.add(VARIANTS[0], "compiled-ddp", 2, settings={"compile": True}, compiles_quickly=True)
    for strategy in STRATEGIES:
        if is_long or strategy == "fsdp2":
            add_stopped(made, strategy)
        if is_long or strategy == "ddp":
            add_broken(made, strategy)
    if is_long:
        made.add(DROPOUT, "dropout-ddp", 2)
        made.add(DROPOUT, "again-dropout/1", 2, at={"0": [3, "SIGTERM"]})
        made.add(DROPOUT, "again-dropout/2", 2, fresh=False, more=ONWARDS)
    made.add(VARIANTS[0], "other-batch/1", 2, at={"0": [3, "SIGTERM"]})
    made.add(VARIANTS[0], "other-batch/undecided", 2, fresh=False)
    made.add(VARIANTS[0], "other-batch/2", 0, fresh=False, more=ONWARDS, settings={"batch_size": 2})
    made.run()
    return made


def telling(made: Bench, variant: Variant, name: str) -> dict[str, str]:
    """Where ranks tell which columns they draw anew, of a variant that does."""
    is_drawing = isinstance(variant.spec, PacaSpec) and variant.spec.resample
    return {"tells": str(made.root / f"columns-{name}")} if is_drawing else {}


ONWARDS = ["--resume=auto"]


def add_stopped(made: Bench, strategy: str) -> None:
    """Runs of the plain variant that are stopped and gone on with, by as many ranks or others."""
    plain, two = VARIANTS[0], {"settings": {"strategy": strategy}}
    made.add(plain, f"again-{strategy}/1", 2, at={"0": [3, "SIGTERM"], "1": [3, "SIGTERM"]}, **two)
    made.add(plain, f"again-{strategy}/2", 2, fresh=False, more=ONWARDS, **two)
    made.add(plain, f"changing-{strategy}/1", 2, at={"1": [3, "SIGTERM"]}, **two)
    made.add(plain, f"changing-{strategy}/2", 0, fresh=False, more=ONWARDS, at={"0": [6, "SIGTERM"]})
    made.add(plain, f"changing-{strategy}/3", 2, fresh=False, more=ONWARDS, **two)


def add_broken(made: Bench, strategy: str) -> None:
    """Runs of the plain variant of which a rank is killed, or fails."""
    plain, two = VARIANTS[0], {"settings": {"strategy": strategy}}
    made.add(plain, f"killed-{strategy}/1", 2, at={"1": [6, "SIGKILL"]}, **two)
    made.add(plain, f"killed-{strategy}/2", 2, fresh=False, more=ONWARDS, **two)
    made.add(plain, f"failing-{strategy}", 2, at={"1": [2, FAILURE]}, **two)


# --- one process and two (property 15)


@pytest.mark.parametrize(
    ("variant", "strategy"),
    mostly_long(CASES, *((VARIANTS[0], strategy) for strategy in STRATEGIES), (VARIANTS[1], "ddp")),
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_two_processes_train_the_adapter_that_one_trains(variant: Variant, strategy: str, bench: Bench) -> None:
    """At the same global batch, within 1e-6; both moved away from the base, and every step was taken."""
    assert bench.codes(f"{variant.name}-one") == [0], bench.outcomes[f"{variant.name}-one"].errors
    assert bench.codes(f"{variant.name}-{strategy}") == [0, 0], bench.outcomes[f"{variant.name}-{strategy}"].errors
    one, two = bench.folder(f"{variant.name}-one"), bench.folder(f"{variant.name}-{strategy}")
    assert largest_difference(one, two) <= TOLERANCE
    assert largest_difference(bench.folder(f"fresh-{variant.name}"), two) > 1e-3


def test_ranks_draw_the_same_columns_anew(bench: Bench) -> None:
    """At steps 3 and 6, what one process draws; the adapter holds the union, each column once."""
    one, *two = (
        [json.loads(line) for line in (bench.root / name).read_text().splitlines()]
        for name in ("columns-one.0", "columns-ddp.0", "columns-ddp.1")
    )
    assert [step for step, _ in one] == [3, 6]
    assert one[0][1] != one[1][1]
    assert two == [one, one]
    held, alone = patches(bench.folder("resample-ddp")), patches(bench.folder("resample-one"))
    assert any(len(patch.columns) > 4 for patch in held.values())
    assert all(torch.equal(patch.columns, alone[module].columns) for module, patch in held.items())


def test_compiled_models_train_as_others_do(bench: Bench) -> None:
    """DDP around a compiled model: one graph, and the adapter of one process that compiles nothing."""
    assert bench.codes("compiled-ddp") == [0, 0], bench.outcomes["compiled-ddp"].errors
    assert open_adapter(bench.folder("compiled-ddp")).record.manifest.training["kernels"]["compile"] is True
    assert largest_difference(bench.folder("plain-one"), bench.folder("compiled-ddp")) <= TOLERANCE


@pytest.mark.long
def test_a_bf16_base_with_fp32_columns_trains_the_same_sharded_and_not(bench: Bench) -> None:
    """Two ranks of either strategy multiply the same bf16 numbers: the columns in fp32 agree within 1e-6."""
    assert bench.codes("bf16-fsdp2") == [0, 0], bench.outcomes["bf16-fsdp2"].errors
    assert largest_difference(bench.folder("bf16-ddp"), bench.folder("bf16-fsdp2")) <= TOLERANCE
    assert largest_difference(bench.folder("fresh-bf16"), bench.folder("bf16-fsdp2")) > 1e-3
    assert {patch.original.dtype for patch in patches(bench.folder("bf16-fsdp2")).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name",
    mostly_long(("plain-ddp", "plain-fsdp2", "conv1d-fsdp2", "bf16-fsdp2", "head-fsdp2"), "plain-ddp", "plain-fsdp2"),
)
def test_every_ranks_rows_are_in_the_file(name: str, bench: Bench) -> None:
    """Each output's row of each target moved: those that the first rank holds, and those of the second."""
    for module, moved in moved_rows(bench.folder(name)).items():
        half = (len(moved) + 1) // 2
        assert (moved[:half].float().mean(), moved[half:].float().mean()) > (0.9, 0.9), module


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_of_two_processes_merges_to_what_was_trained(strategy: str, bench: Bench, tmp_path: Path) -> None:
    """Export checks the merged model's logits against the attached one's."""
    export(open_adapter(bench.folder(f"plain-{strategy}")), tmp_path / "merged")
    assert verify(tmp_path / "merged").max_logit_difference == 0


def test_rank_0_alone_speaks(bench: Bench) -> None:
    """The other ranks print nothing at all, whatever the model, method, task, strategy and remark."""
    ran = [name for name in (f"{variant.name}-{strategy}" for variant, strategy in CASES) if name in bench.outcomes]
    assert len(ran) >= len(STRATEGIES)
    for done in (bench.outcomes[name] for name in ran):
        assert "steps on cpu" in done.outputs[0]
        assert (done.outputs[1], done.errors[1]) == ("", "")
    assert all(bench.outcomes[f"plain-{strategy}"].errors[0].count(REMARK) == 2 for strategy in STRATEGIES)


def test_the_log_has_each_step_once(bench: Bench) -> None:
    """Of both strategies, and the losses are those of one process: the mean over all ranks."""
    one = logged_losses(bench.folder("plain-one"))
    assert list(one) == list(range(1, STEPS + 1))
    for strategy in STRATEGIES:
        assert logged_losses(bench.folder(f"plain-{strategy}")) == pytest.approx(one, abs=1e-5)


# --- checkpoints


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_do_not_tell_how_many_ranks_made_them(strategy: str, bench: Bench) -> None:
    """The same files but for the generators' states, tensors of the same shapes, and the optimizer's state as well."""
    one, two = (bench.folder(f"plain-{name}") / "checkpoints" / "checkpoint-8" for name in ("one", strategy))
    extra = {f"rng_state_{rank}.pth" for rank in range(2)}
    assert {path.name for path in two.iterdir()} - extra == {path.name for path in one.iterdir()}
    shapes = [{n: (i.shape, i.dtype) for n, i in TensorFile(path / STATE_FILE).infos.items()} for path in (one, two)]
    assert shapes[0] == shapes[1]
    states = [torch.load(path / "optimizer.pt", weights_only=True) for path in (one, two)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, entry in states[0]["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(states[1]["state"][index][name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", mostly_long(STRATEGIES, "fsdp2"))
def test_a_resumed_run_of_two_processes_equals_an_uninterrupted_one(strategy: str, bench: Bench) -> None:
    """Bit for bit, after SIGTERM to both: each ended its step, and rank 0 saved."""
    assert bench.codes(f"again-{strategy}/1") == [130, 130]
    assert bench.codes(f"again-{strategy}/2") == [0, 0]
    assert adapter_bytes(bench, f"again-{strategy}") == adapter_bytes(bench, f"plain-{strategy}")


@pytest.mark.long
def test_each_rank_finds_its_own_generators_again(bench: Bench) -> None:
    """A resumed run with dropout, of which each rank draws its own, is the uninterrupted one bit for bit."""
    assert [bench.codes(f"again-dropout/{number}") for number in (1, 2)] == [[130, 130], [0, 0]]
    assert adapter_bytes(bench, "again-dropout") == adapter_bytes(bench, "dropout-ddp")


@pytest.mark.parametrize("strategy", mostly_long(STRATEGIES, "fsdp2"))
def test_the_number_of_ranks_may_change_between_checkpoints(strategy: str, bench: Bench) -> None:
    """2, then 1, then 2 ranks, at the same examples per step: the adapter of an uninterrupted run, within 1e-6.

    The first signal reached one rank only: both stopped at the same step.
    """
    assert bench.codes(f"changing-{strategy}/1") == [130, 130]
    assert bench.codes(f"changing-{strategy}/2") == [130]
    assert bench.codes(f"changing-{strategy}/3") == [0, 0]
    assert largest_difference(bench.folder("plain-one"), bench.folder(f"changing-{strategy}")) <= TOLERANCE
    assert list(logged_losses(bench.folder(f"changing-{strategy}"))) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("strategy", mostly_long(STRATEGIES, "ddp"))
def test_a_killed_rank_ends_the_run_and_the_run_goes_on_from_its_checkpoint(strategy: str, bench: Bench) -> None:
    """The other rank does not wait for the dead one; resumed from step 4, the adapter is the uninterrupted run's."""
    killed = bench.outcomes[f"killed-{strategy}-1"]
    assert killed.codes == [1, -9]
    assert killed.seconds < 30
    assert killed.errors[0].splitlines()[-1] == (
        "Error: train: another process of the run has ended, expected all to go on. "
        "Its error says why; --resume auto goes on."
    )
    assert bench.codes(f"killed-{strategy}/2") == [0, 0]
    assert adapter_bytes(bench, f"killed-{strategy}") == adapter_bytes(bench, f"plain-{strategy}")


@pytest.mark.parametrize("strategy", mostly_long(STRATEGIES, "ddp"))
def test_a_rank_that_fails_ends_the_run_with_its_error(strategy: str, bench: Bench) -> None:
    """One line that says why, a non-zero exit code on every rank, and no waiting."""
    failed = bench.outcomes[f"failing-{strategy}"]
    assert failed.codes == [1, 1]
    assert failed.seconds < 30
    assert failed.errors[1] == f"Error: surgery: RuntimeError: {FAILURE}. surgery -v shows where.\n"
    assert adapter_bytes(bench, f"failing-{strategy}") == adapter_bytes(bench, "fresh-plain")


def test_another_number_of_examples_per_step_is_another_run(bench: Bench) -> None:
    """Two ranks with 2 examples each are not one process with 2: resuming says so, and exits with 2."""
    assert bench.codes("other-batch/1") == [130, 130]
    assert bench.codes("other-batch/2") == [2]
    assert "an interrupted run with other settings.examples_per_step" in bench.outcomes["other-batch-2"].errors[0]


def test_what_rank_0_refuses_it_alone_says(bench: Bench) -> None:
    """Where only it looks, here at checkpoints that are there, and nobody said what is to become of them."""
    refused = bench.outcomes["other-batch-undecided"]
    assert refused.codes == [2, 1]
    line = refused.errors[0].splitlines()[-1]
    assert line.startswith("Error: ")
    assert "an interrupted run, expected a decision. Go on with --resume auto, or drop" in line
    assert (refused.outputs[1], refused.errors[1]) == ("", "")


# --- DeepSpeed

_ZERO: dict[str, Any] = {"has_standin": True, "limit_seconds": 240.0}


@pytest.fixture(scope="module")
def zero(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The plain variant under ZeRO 2 and 3, and a run that is stopped and gone on with by DDP."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (accelerate would import it in every run): make test-deepspeed has it")
    made = prepare(tmp_path_factory.mktemp("zero"), tiny_model, VARIANTS[:3])
    for variant in VARIANTS[:3]:
        made.add(variant, f"{variant.name}-one", 0)
        stages = ("zero2", "zero3") if variant == VARIANTS[0] else ("zero3",)
        for stage in stages:
            made.add(variant, f"{variant.name}-{stage}", 2, settings={"strategy": stage}, **_ZERO)
    stopped = {"settings": {"strategy": "zero3"}, "at": {"1": [3, "SIGTERM"]}, **_ZERO}
    made.add(VARIANTS[0], "stopped/1", 2, **stopped)
    made.add(VARIANTS[0], "stopped/2", 2, fresh=False, more=["--resume=auto"], settings={"strategy": "zero3"}, **_ZERO)
    made.add(VARIANTS[0], "stopped/3", 2, fresh=False, more=["--resume=auto"])
    made.run(DS_ACCELERATOR="cpu", PYTHONWARNINGS="ignore")
    return made


@pytest.mark.parametrize("name", ("plain-zero2", "plain-zero3", "accumulation-zero3", "checkpointing-zero3"))
def test_deepspeed_trains_the_adapter_that_one_process_trains(name: str, zero: Bench) -> None:
    """Within 1e-6; DeepSpeed itself and the trainer's way to it, with the CPU in the place of the devices."""
    assert zero.codes(name) == [0, 0], zero.outcomes[name].errors
    assert largest_difference(zero.folder(f"{name.partition('-')[0]}-one"), zero.folder(name)) <= TOLERANCE
    assert all(moved.all() for moved in moved_rows(zero.folder(name)).values())


def test_a_run_of_deepspeed_is_gone_on_with_by_another_strategy(zero: Bench) -> None:
    """Its checkpoints are one process's; DeepSpeed itself reads its own ones only, and is refused."""
    assert [zero.codes(f"stopped/{number}") for number in (1, 2, 3)] == [[130, 130], [5, 5], [0, 0]]
    refusal = "Error: train.strategy: zero3 on the way from checkpoint-3, expected a strategy that resumes"
    assert zero.outcomes["stopped-2"].errors[0].splitlines()[-1].startswith(refusal)
    assert largest_difference(zero.folder("plain-one"), zero.folder("stopped")) <= TOLERANCE


def test_without_deepspeed_its_strategies_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="deepspeed is not installed, expected the package"):
        require_deepspeed()


def test_deepspeed_resumes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it did not save, it cannot read; a fresh run is not refused."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    require_zero("", "zero2")
    with pytest.raises(UnsupportedError, match=r"zero2 on the way from checkpoint-3, expected a strategy that resumes"):
        require_zero("a/checkpoint-3", "zero2")


# --- launchers


@dataclass(frozen=True)
class Launched:
    """How a launcher's run ended, and where its adapter is."""

    folder: Path
    code: int
    output: str
    error: str


def launched(bench: Bench, name: str, *before: str, after: Sequence[str] = (), **environment: str) -> Launched:
    """The plain variant's run of two processes under a launcher, in a fresh folder."""
    folder = Path(shutil.copytree(bench.folder("fresh-plain"), bench.folder(name)))
    pairs = [f"{key}={value}" for key, value in {**USUAL, "batch_size": 2}.items()]
    data = f"--data={bench.root / 'prompts.jsonl'}"
    done = run_python(*before, str(folder), data, "--device=cpu", *pairs, *after, **environment)
    return Launched(folder, done.returncode, done.stdout, done.stderr)


def test_nproc_starts_torchrun(bench: Bench) -> None:
    """`--nproc 2` trains what one process trains; standard output is one result; torchrun's arguments follow `--`."""
    own = ("--json", "--nproc=2", "strategy=fsdp2", "--", "--standalone", "--max-restarts", "0")
    done = launched(bench, "by-nproc", "-m", "surgery.cli", "train", after=own)
    assert done.code == 0, done.error
    assert json.loads(done.output)["steps"] == STEPS
    assert done.error == f"step {STEPS}/{STEPS}, loss {logged_losses(done.folder)[STEPS]:.4f}\n"
    assert largest_difference(bench.folder("plain-one"), done.folder) <= TOLERANCE


TORCHRUN = "torch.distributed.run --standalone --nproc-per-node=2"
ACCELERATE = (  # its --cpu starts one process, unless there is an MPI
    "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
)


@pytest.mark.long
@pytest.mark.parametrize("launcher", (TORCHRUN, ACCELERATE), ids=("torchrun", "accelerate"))
def test_launchers_work_as_they_are(launcher: str, bench: Bench) -> None:
    """`torchrun -m surgery.train` and `accelerate launch -m surgery.train` train what one process trains."""
    name = launcher.partition(".")[0]
    done = launched(bench, f"by-{name}", "-m", *launcher.split(), "-m", "surgery.train")
    assert done.code == 0, done.error
    assert done.output.count("steps on cpu") == 1
    assert largest_difference(bench.folder("plain-one"), done.folder) <= TOLERANCE


@pytest.mark.long
def test_srun_works_as_it_is(bench: Bench) -> None:
    """Two processes that know of each other by SLURM's variables alone train what one process trains."""
    folder = Path(shutil.copytree(bench.folder("fresh-plain"), bench.folder("by-srun")))
    pairs = [f"{key}={value}" for key, value in {**USUAL, "batch_size": 2}.items()]
    own = [str(folder), f"--data={bench.root / 'prompts.jsonl'}", "--device=cpu", *pairs]
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_JOB_ID": str(os.getpid()), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "surgery.train", *own]
    ranks = []
    for number in ("0", "1"):
        environment = {**os.environ, **step, "SLURM_PROCID": number, "SLURM_LOCALID": number}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert [text.count("steps on cpu") for text in outputs] == [1, 0]
    assert largest_difference(bench.folder("plain-one"), folder) <= TOLERANCE


ENDS = {
    FAILURE: (1, f"Error: surgery: RuntimeError: {FAILURE}. surgery -v shows where."),
    "SIGKILL": (1, "Error: train: rank 1 ended with SIGKILL. Go on with --resume auto."),
    "SIGTERM": (130, "Error: train: stopped at step 2, checkpoint-2 is whole. Go on with --resume auto."),
}


@pytest.mark.long
@pytest.mark.parametrize("how", ENDS)
def test_the_launcher_says_once_how_a_rank_ended(how: str, bench: Bench, tmp_path: Path) -> None:
    """It failed, was killed or was asked to stop: one line, the exit code that belongs to it, and no traceback."""
    hushed = "import surgery.terminal; surgery.terminal.hush_libraries()"  # as the command line does
    ending = f"{hushed}; import tests.forking; tests.forking.happen_at(2, {how!r})"
    (tmp_path / "sitecustomize.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n    {ending}\n")
    path = os.pathsep.join([str(tmp_path), str(PROJECT)])
    settings = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore::RuntimeWarning"}  # runpy: the module is there already
    done = launched(bench, f"by-{how[:7]}", "-m", "surgery.cli", "train", after=["--nproc=2"], **settings)
    code, line = ENDS[how]
    assert (done.code, done.output) == (code, "")
    *before, last = done.error.splitlines()
    assert last == line
    assert all(text.startswith("step 2/8") for text in before)  # rank 0's, which may be stopped before it says so


@pytest.mark.long
def test_a_launcher_that_is_asked_to_stop_lets_all_save(bench: Bench) -> None:
    """SIGTERM to `surgery train --nproc` itself: the step ends, rank 0 saves, and one line says so."""
    folder = Path(shutil.copytree(bench.folder("fresh-plain"), bench.folder("by-asking")))
    data = f"--data={bench.root / 'prompts.jsonl'}"
    own = ["--device=cpu", "--nproc=2", "max_steps=4000", "logging_steps=1", "save_steps=4000", "max_length=64"]
    command = [sys.executable, "-m", "surgery.cli", "train", str(folder), data, *own]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        wait_for_lines(folder / "training_log.jsonl", 3)
        process.terminate()
        error = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    stopped = re.fullmatch(r"Error: train: stopped at step (\d+), checkpoint-\1 is whole.*", error.splitlines()[-1])
    assert stopped
    assert (folder / CHECKPOINTS / f"checkpoint-{stopped[1]}" / STATE_FILE).is_file()
    assert error.count("Error") == 1


def wait_for_lines(path: Path, number: int) -> None:
    """Until a file has so many."""
    deadline = time.monotonic() + 100
    while not path.is_file() or path.read_text().count("\n") < number:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    (
        (["strategy=fsdp"], 2, "settings: train.strategy: 'fsdp', expected 'ddp', 'fsdp2', 'zero2' or 'zero3'"),
        (["strategy=zero3", "--nproc=1"], 5, "train.strategy: zero3 on the CPU, where accelerate does not start"),
        (["strategy=fsdp2"], 2, "train.strategy: fsdp2 without a launcher, expected"),
        (["cpu_offload=true"], 2, "train.cpu_offload: true with strategy ddp, expected"),
        (["--nproc", "0"], 2, "--nproc: 0, expected at least 1"),
        (["--nproc", "9999"], 2, f"--nproc: 9999, expected at most {os.cpu_count()}, as this machine has"),
        (["--", "--nnodes=2"], 2, "train: '--nnodes=2' after `--`, which is a launcher's, expected --nproc"),
        (["--nproc", "1", "--", "--no-such"], 2, "torchrun: unrecognized arguments: --no-such, expected"),
    ),
)
def test_what_is_asked_wrongly_is_refused(
    arguments: list[str],
    code: int,
    message: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    console: Console,
) -> None:
    """The documented error and exit code, and the adapter is untouched."""
    apply(tiny_model("llama"), tmp_path / "adapter", PACA)
    before = digest_folder(tmp_path / "adapter")
    ended = console("train", tmp_path / "adapter", "--data=nope", "--device=cpu", *arguments)
    assert ended.code == code
    assert f"Error: {message}" in ended.err
    assert digest_folder(tmp_path / "adapter") == before


def test_a_run_of_another_plan_is_not_gone_on_with(bench: Bench, tmp_path: Path) -> None:
    """With the checkpoints of an adapter that trains other columns: the documented error."""
    base = find_base(open_adapter(bench.folder("fresh-plain")).record, bench.folder("fresh-plain"))
    apply(base, tmp_path / "other", PacaSpec(rank=2))
    shutil.copytree(bench.folder("plain-ddp") / CHECKPOINTS, tmp_path / "other" / CHECKPOINTS)
    path = tmp_path / "other" / CHECKPOINTS / RUN_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": False}))
    settings = TrainSection(learning_rate=1e-3, max_steps=STEPS, logging_steps=1, save_steps=SAVE_STEPS, batch_size=4)
    data = DataSection(train=[str(bench.root / "prompts.jsonl")], max_length=64, max_rows=32)
    with pytest.raises(RequestError, match="an interrupted run with other plan, expected the same settings"):
        train(tmp_path / "other", data, settings, resume="auto")


# --- recipes and templates


DISTRIBUTED = PROJECT / "recipes" / "distributed"
# The fields that SkyPilot 0.14.1 takes, but for its own, which begin with an underscore: get_task_schema,
# get_resources_schema and get_storage_schema in its sky/utils/schemas.py; StorageMode in its sky/data/storage.py.
SKYPILOT = {
    "": {"name", "workdir", "event_callback", "num_nodes", "resources", "file_mounts", "service", "pool", "setup",
         "run", "envs", "secrets", "managed_secrets", "inputs", "outputs", "file_mounts_mapping", "config", "volumes",
         "volume_mounts", "api_server_access"},
    "resources": {"cloud", "region", "zone", "infra", "cpus", "memory", "accelerators", "instance_type", "use_spot",
                  "job_recovery", "volumes", "disk_size", "ephemeral_storage", "disk_tier", "network_tier",
                  "local_disk", "max_hourly_cost", "ports", "labels", "accelerator_args", "image_id", "autostop",
                  "priority", "priority_class", "any_of", "ordered"},
    "mount": {"name", "source", "store", "persistent", "mode", "type", "config"},
    "mode": {"MOUNT", "COPY", "MOUNT_CACHED"},
}  # fmt: skip


@pytest.mark.parametrize("name", ("fsdp2.yaml", "zero3.yaml"))
def test_the_recipes_are_read_and_ask_for_what_their_name_says(name: str) -> None:
    """Each parses through the schema, with the override that its comment shows; every file of the folder is tested."""
    recipe = read_recipe(DISTRIBUTED / name, ["data.train=[mine.jsonl]"])
    assert (recipe.train.strategy, recipe.data.train) == (name.removesuffix(".yaml"), ["mine.jsonl"])
    assert recipe.spec().rank == 64
    assert {path.name for path in DISTRIBUTED.iterdir()} == {"fsdp2.yaml", "zero3.yaml", "slurm.sh", "skypilot.yaml"}


def scripts() -> dict[str, str]:
    """The shell texts of the templates, by file."""
    task = parse_yaml((DISTRIBUTED / "skypilot.yaml").read_text())
    return {"slurm.sh": (DISTRIBUTED / "slurm.sh").read_text(), "skypilot.yaml": task["setup"] + task["run"]}


@pytest.mark.parametrize("name", ("slurm.sh", "skypilot.yaml"))
def test_the_templates_commands_exist(name: str) -> None:
    """bash parses them; each `surgery` command is one, with options that it has and settings that the recipe has."""
    text = scripts()[name]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    lines = text.replace("\\\n", " ")
    used = [shlex.split(found) for found in re.findall(r"\bsurgery ((?:apply|train|export|verify) .*)", lines)]
    assert {command for command, *_ in used} >= {"apply", "train", "export"}
    for command, *arguments in used:
        options = {option for parameter in cli.commands[command].params for option in parameter.opts}
        assert {text for text in arguments if text.startswith("-")} <= options
        keys = [text.partition("=")[0] for text in arguments if "=" in text]
        assert all(qualified(key) for key in keys)
        assert bool(keys) == (command == "train")


def test_the_slurm_script_asks_for_a_task_a_device() -> None:
    """As many tasks as devices on each node, a signal before the end; srun ends all with the first that fails."""
    text = (DISTRIBUTED / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("TERM@")
    assert "srun --kill-on-bad-exit=1 surgery train" in text


STUB = '#!/bin/bash\necho "$(basename "$0") $*" >> "$SAID"\n'
ACTS = {"surgery": '[ "$1" != apply ] || mkdir -p "$4"\n', "srun": 'shift; exec "$@"\n'}  # apply MODEL -o OUT


@pytest.mark.parametrize("name", ("slurm.sh", "skypilot.yaml"))
def test_the_templates_go_on_where_they_were(name: str, tmp_path: Path) -> None:
    """Run by bash with stand-ins for their commands: the second time nothing is applied, and training is resumed."""
    for command, act in ACTS.items():
        path = tmp_path / command
        path.write_text(STUB + act)
        path.chmod(0o755)
    run = scripts()[name].replace("pip install .\n", "").replace("/adapters", str(tmp_path))
    given = {
        "MODEL": "org/name",
        "DATA": "rows.jsonl",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SAID": str(tmp_path / "said"),
    }
    environment = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-euc", run, "job", "org/name", "rows.jsonl"]
    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    said = [line.split() for line in (tmp_path / "said").read_text().splitlines() if line.startswith("surgery")]
    verify_too = ["verify"] if name == "slurm.sh" else []
    again = ["train", "export", *verify_too]
    assert [words[1] for words in said] == ["apply", *again, *again]
    assert said[0][2] == "org/name"
    for words in (words for words in said if words[1] == "train"):
        assert words[words.index("--data") + 1] == "rows.jsonl"
        assert words[words.index("--resume") + 1] == "auto"
        assert name == "slurm.sh" or words[words.index("--nproc") + 1] == "8"
    (adapter,) = {words[2] for words in said if words[1] in ("train", "export")} | {said[0][4]}
    assert Path(tmp_path / adapter).is_dir()
    with_srun = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("srun")]
    assert len(with_srun) == (2 if name == "slurm.sh" else 0)


def test_the_skypilot_task_has_the_published_fields_only() -> None:
    """At its top, in its resources and in each mount, and its environment is what its commands use."""
    task = parse_yaml((DISTRIBUTED / "skypilot.yaml").read_text())
    assert set(task) <= SKYPILOT[""]
    assert set(task["resources"]) <= SKYPILOT["resources"]
    for mount in task["file_mounts"].values():
        assert set(mount) <= SKYPILOT["mount"]
        assert mount["mode"] in SKYPILOT["mode"]
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["run"]))
    assert used == {*task["envs"], "SKYPILOT_NUM_GPUS_PER_NODE"}


@pytest.mark.long
def test_a_recipe_trains_in_two_processes(bench: Bench) -> None:
    """`surgery run --nproc 2` applies, trains what one process trains, and exports; the second time nothing."""
    settings: dict[str, Any] = {**USUAL, "batch_size": 2, "strategy": "fsdp2", "device": "cpu"}
    own = {key: settings.pop(key) for key in ("max_length", "max_rows")}
    base = find_base(open_adapter(bench.folder("fresh-plain")).record, bench.folder("fresh-plain"))
    data = {"train": [str(bench.root / "prompts.jsonl")], **own}
    document = {"model": str(base), "adapter": "by-recipe", "paca": {"rank": 4}, "data": data, "train": settings}
    document["export"] = {"out": "by-recipe-merged", "verify": False}
    (bench.root / "recipe.yaml").write_text(json.dumps(document))
    command = ("-m", "surgery.cli", "run", str(bench.root / "recipe.yaml"), "--nproc=2", "--json")
    first, second = run_python(*command), run_python(*command)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert largest_difference(bench.folder("plain-one"), bench.folder("by-recipe")) <= TOLERANCE
    skipped = [json.loads(done.stdout)["skipped"] for done in (first, second)]
    assert skipped == [[], ["apply", "train", "export"]]
