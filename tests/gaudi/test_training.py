"""Training on `hpu:0` with the real optimum-habana: as on the CPU, whole, resumable, with upstream's names."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from habana_frameworks.torch import core, hpu
from habana_frameworks.torch.device import OPERATORS

from exporters.dense import export
from surgery.backends import gaudi
from surgery.checkpoint import Checkpoint
from surgery.delta import ADAPTER_FILE
from surgery.errors import DataError, InterruptedRunError, UnsupportedError
from surgery.paca_layers import SharedGather, open_layer
from surgery.recipe import DataSection, TrainSection
from surgery.runs import LOG_FILE
from surgery.survey import TaskSpec
from surgery.train import train
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.examples import QUESTIONS
from tests.gaudi.runs import NO_DROPOUT, Run, case_of, gaudi_base, largest_difference, rows_of, run_on, settings_of
from tests.interrupting import stop_at

TEXT = ("causal-lm", "text.txt")
ANSWERS = ("causal-lm", "prompts.csv")
LABELS = ("sequence-classification", "labelled.tsv")
TARGETS = ("seq2seq", "pairs.jsonl")
# Families of which optimum-habana replaces classes (Llama, Qwen, Gemma, GPT-2), patches some (BERT, T5), or none.
RUNS = (
    ("llama", "paca", TEXT), ("llama", "read", TEXT), ("qwen2", "read", TEXT), ("qwen3", "paca", TEXT),
    ("qwen3", "read", TEXT), ("gemma2", "paca", TEXT), ("gemma3", "read", TEXT), ("gpt2", "paca", ANSWERS),
    ("mistral", "paca", TEXT), ("opt", "paca", ANSWERS), ("bert", "paca", LABELS), ("bert", "read", LABELS),
    ("llama", "paca", LABELS), ("t5", "paca", TARGETS), ("t5", "read", TARGETS),
)  # fmt: skip


def short(value: Any) -> str:
    """A name for a parameter: an example's is its file's."""
    return value if isinstance(value, str) else value[1]


def pair(
    upstream: ProcessPoolExecutor, base: Path, root: Path, method: str, example: tuple[str, str], **changes: Any
) -> list[Run]:
    """The same run on the CPU, in a process of upstream's classes, and on hpu, on rows that make whole batches."""
    case = case_of(*example)
    data = rows_of(case, root, 36)
    settings = {"method": method, "data": data, **({"batch_size": 7} if example == TEXT else {}), **changes}
    cpu = upstream.submit(run_on, "cpu", base, root / "cpu", case, **settings).result()
    return [cpu, run_on("hpu", base, root / "hpu", case, **settings)]


@pytest.mark.parametrize(("family", "method", "example"), RUNS, ids=short)
def test_a_run_equals_the_cpu_s(
    family: str,
    method: str,
    example: tuple[str, str],
    upstream: ProcessPoolExecutor,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    """Each step's loss within 1e-6, what was trained within 1e-4, the metrics too; the model was on the device."""
    base = tiny_model(family, overrides=NO_DROPOUT.get(family))
    cpu, device = pair(upstream, base, tmp_path, method, example)
    assert cpu.devices == {"cpu"}
    assert device.devices == {"hpu:0"}
    assert device.result.device == "hpu"
    assert len(device.losses) == len(cpu.losses) == 5
    assert device.losses == pytest.approx(cpu.losses, rel=1e-6, abs=1e-6)
    assert largest_difference(device.trained(), cpu.trained()) < 1e-4
    assert device.result.after.keys() == cpu.result.after.keys()
    assert dict(device.result.before) == pytest.approx(dict(cpu.result.before), rel=1e-5)
    assert device.losses[-1] != device.losses[0]


@pytest.mark.parametrize(
    ("family", "method", "example"), (("llama", "paca", ANSWERS), ("gpt2", "paca", ANSWERS), ("bert", "paca", LABELS),
                                      ("llama", "read", ANSWERS)), ids=short
)  # fmt: skip
def test_accumulation_changes_nothing(
    family: str, method: str, example: tuple[str, str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Three parts of four rows, whose numbers of labels differ, give the step of twelve rows, and report its loss."""
    case = case_of(*example)
    base = tiny_model(family, overrides=NO_DROPOUT.get(family))
    data = rows_of(case, tmp_path, 36)
    small = {"batch_size": 4, "gradient_accumulation": 3, "max_steps": 3}
    whole = run_on("hpu", base, tmp_path / "w", case, method=method, data=data, batch_size=12, max_steps=3)
    parts = run_on("hpu", base, tmp_path / "p", case, method=method, data=data, **small)
    sums = [sum(parts.losses[start : start + 3]) for start in (0, 3, 6)]
    assert sums == pytest.approx(whole.losses, rel=1e-5)
    assert largest_difference(parts.trained(), whole.trained()) < 1e-4
    assert parts.result.loss == pytest.approx(whole.result.loss, rel=1e-5)


@pytest.mark.parametrize("method", ("paca", "read"))
def test_a_resumed_run_equals_an_uninterrupted_one(method: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Bit for bit, the adapter file: optimizer, schedule and generators came back onto the device."""
    case, base = case_of(*ANSWERS), tiny_model("llama")
    data = rows_of(case, tmp_path, 36)
    settings = {"max_steps": 8, "save_steps": 2}
    whole = run_on("hpu", base, tmp_path, case, method=method, data=data, **settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, how="SIGTERM")
        with pytest.raises(InterruptedRunError, match=r"checkpoint-4 is whole"):
            run_on("hpu", base, tmp_path / "stopped", case, method=method, data=data, **settings)
    (folder,) = (tmp_path / "stopped").iterdir()
    resumed = train(folder, data, settings_of(case, "hpu", settings), task=TaskSpec(case.task), resume="auto")
    assert resumed.steps == 8
    assert (folder / ADAPTER_FILE).read_bytes() == (whole.folder / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize("family", ("mistral", "gemma2", "gemma3"))
def test_rows_beyond_a_sliding_window_are_refused(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """optimum-habana's models pass over it: what was trained would not be what is deployed. Exit code 5."""
    with pytest.raises(UnsupportedError, match=r"rows of 64 tokens.*window of 16.*data\.max_length=16") as caught:
        run_on("hpu", tiny_model(family), tmp_path, case_of(*TEXT), batch_size=7)
    assert caught.value.exit_code == 5


# Of optimum-habana's own settings those that are on by default, and not set: generation's, and the profiler's.
LEFT_ON = {"ignore_eos", "profiling_record_shapes"}


def test_every_default_that_differs_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What optimum-habana's arguments have otherwise than transformers'; of what it has alone, the rest is off."""
    import optimum.habana as vendor

    given: dict[str, Any] = {}
    build = vendor.GaudiTrainingArguments

    def record(**settings: Any) -> Any:
        given.update(settings)
        return build(**settings)

    monkeypatch.setattr(vendor, "GaudiTrainingArguments", record)
    section = TrainSection(device="hpu")
    gaudi.training_arguments(section, folder=tmp_path, device="hpu", autocast="fp32", steps=1, has_eval=False)
    upstream, theirs = (
        {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(kind) if has_default(f)}
        for kind in (transformers.TrainingArguments, build)
    )
    changed = {name for name, value in theirs.items() if name in upstream and value != upstream[name]}
    assert len(changed) > 5
    assert changed - given.keys() == set()
    own = {name: value for name, value in theirs.items() if name not in upstream and name not in given}
    assert {name for name, value in own.items() if value is True or value not in (False, None, 1)} == LEFT_ON


def has_default(field: Any) -> bool:
    """Or what makes one."""
    return field.default is not MISSING or field.default_factory is not MISSING


# --- what is written


def test_the_exported_checkpoint_has_upstream_s_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Tensors and config.json are the base's, and the checks of a merge hold."""
    base = tiny_model("llama")
    run = run_on("hpu", base, tmp_path, case_of(*TEXT), batch_size=7)
    merged = tmp_path / "merged"
    export(run.adapter(), merged)
    assert {n: (i.dtype, i.shape) for n, i in Checkpoint.open(merged).items()} == {
        n: (i.dtype, i.shape) for n, i in Checkpoint.open(base).items()
    }
    for folder in (run.folder, merged):
        assert (folder / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert run.adapter().plan.architecture == "LlamaForCausalLM"
    verify(merged, numeric=False)  # raises where it does not hold


def test_the_log_has_memory_and_a_throughput_without_the_first_steps(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each line has the device's peak; the first steps, which compile, count as warm-up; metrics have neither."""
    run = run_on("hpu", tiny_model("llama"), tmp_path, case_of(*TEXT), batch_size=7, max_steps=6)
    lines = [json.loads(line) for line in (run.folder / LOG_FILE).read_text().splitlines()]
    assert all(line["max_memory_allocated (GB)"] == hpu.PEAK / hpu.GIB for line in lines)
    assert run.result.peak_memory_bytes == hpu.PEAK
    (trainer,) = run.trainers
    assert trainer.args.throughput_warmup_steps == 3
    assert set(run.result.after) == {"loss", "token_accuracy"}
    short = run_on("hpu", tiny_model("llama"), tmp_path, case_of(*TEXT), batch_size=7, max_steps=2)
    assert short.trainers[0].args.throughput_warmup_steps == 1
    assert all(value > 0 for line in lines for name, value in line.items() if name.endswith("per_second"))


# --- shapes


def steps_of(run_operators: list[tuple[str, Any]]) -> list[list[tuple[str, Any]]]:
    """The operators of each training step: what ran between two of the optimizer's ends."""
    steps: list[list[tuple[str, Any]]] = [[]]
    for entry in run_operators:
        if entry[0] == "end of step":
            steps.append([])
        else:
            steps[-1].append(entry)
    return steps[:-1]


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the record of operators show where each training step begins and ends."""
    trainer = gaudi_base()
    step, zero = trainer.training_step, trainer._zero_model_grad

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        OPERATORS.append(("begin", ()))
        return step(self, *args, **kwargs)

    def zero_model_grad(self: Any, *args: Any) -> None:
        zero(self, *args)
        OPERATORS.append(("end of step", ()))

    monkeypatch.setattr(trainer, "training_step", training_step)
    monkeypatch.setattr(trainer, "_zero_model_grad", zero_model_grad)


DYNAMIC = (
    "nonzero", "masked_select", "unique", "repeat_interleave.Tensor", "_local_scalar_dense", "bincount", "argwhere",
    "boolean mask",
)  # fmt: skip


STATIC = (
    ("llama", "paca", TEXT), ("llama", "paca", ANSWERS), ("llama", "read", ANSWERS), ("bert", "read", LABELS),
)  # fmt: skip


@pytest.mark.parametrize("settings", ({}, {"gradient_accumulation": 2}), ids=("plain", "accumulating"))
@pytest.mark.parametrize(("family", "method", "example"), STATIC, ids=short)
def test_every_step_runs_the_same_operators_with_the_same_shapes(
    family: str, method: str, example: tuple[str, str], settings: dict[str, int], marked: None, tiny_model: TinyModel,
    tmp_path: Path,
) -> None:  # fmt: skip
    """From the second step on (the first makes the optimizer's state) nothing compiles anew, nothing asks for values.

    Rows of unlike lengths, in a number that leaves a smaller batch over, over more than one epoch.
    """
    case = case_of(*example)
    base = tiny_model(family, overrides=NO_DROPOUT.get(family))
    data = rows_of(case, tmp_path, 33)
    OPERATORS.clear()
    run_on("hpu", base, tmp_path, case, method=method, data=data, max_steps=7, logging_steps=100, save_steps=100,
           eval_on_start=False, watch=False, **({"batch_size": 3 if example == TEXT else 4} | settings))  # fmt: skip
    begun = [step[step.index(("begin", ())) :] for step in steps_of(list(OPERATORS)) if ("begin", ()) in step]
    assert len(begun) == 7
    assert all(len(step) > 100 for step in begun)
    for number, step in enumerate(begun[2:]):
        assert step == begun[1], f"step {number + 3} differs"
    found = {name for step in begun for name, _ in step if any(word in name for word in DYNAMIC)}
    assert found == set()


def test_lazy_mode_marks_steps_and_eager_does_not(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The boundary of lazy mode's graphs is set by GaudiTrainer, in each step."""
    case = case_of(*TEXT)
    data = DataSection(train=case.write(tmp_path).train, max_length=64)
    marks = {}
    for mode, value in (("lazy", "1"), ("eager", "0")):
        core.CALLS.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PT_HPU_LAZY_MODE", value)
            run_on("hpu", tiny_model("llama"), tmp_path, case, data=data, batch_size=7, max_steps=2, hpu_mode=mode)
        marks[mode] = len(core.CALLS)
    assert marks["lazy"] - marks["eager"] >= 4  # the models set some of their own in either mode


def test_the_last_smaller_batch_is_evaluated(
    upstream: ProcessPoolExecutor, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Training leaves it out, and evaluation must not: accuracy is that of all rows, as on the CPU."""
    case = case_of(*ANSWERS)
    data = rows_of(case, tmp_path, 10)
    settings = {"data": data, "max_steps": 1, "batch_size": 5, "eval_batch_size": 8}
    base = tiny_model("llama")
    cpu = upstream.submit(run_on, "cpu", base, tmp_path / "cpu", case, **settings).result().result.before
    device = run_on("hpu", base, tmp_path / "hpu", case, **settings).result.before
    assert device["token_accuracy"] == pytest.approx(cpu["token_accuracy"], rel=1e-6)
    assert device["loss"] == pytest.approx(cpu["loss"], rel=1e-5)


def test_epochs_count_whole_batches(tiny_model: TinyModel, tmp_path: Path) -> None:
    """33 rows are 8 batches of 4: no step of one row; a set that is no whole batch is an error."""
    case = case_of(*ANSWERS)
    data = rows_of(case, tmp_path, 33)
    run = run_on("hpu", tiny_model("llama"), tmp_path, case, data=data, batch_size=4, max_steps=None, epochs=2.0)
    assert run.result.steps == 16
    assert len(run.trainers[0].get_train_dataloader()) == 8  # GaudiTrainer itself would fill a ninth with old rows
    with pytest.raises(DataError, match=r"33 examples, fewer than one batch.*expected 40 or more"):
        run_on("hpu", tiny_model("llama"), tmp_path, case, data=data, batch_size=40)


# --- dtypes


def test_a_bf16_base_trains_in_fp32_columns_as_on_the_cpu(
    upstream: ProcessPoolExecutor, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Fused clipping and AdamW, which would give every gradient and parameter the first one's dtype, are off."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    cpu, device = pair(upstream, base, tmp_path, "paca", TEXT, max_grad_norm=0.1)
    assert device.losses == pytest.approx(cpu.losses, rel=1e-3)
    (trainer,) = device.trainers
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16, torch.float32}
    assert not trainer.gaudi_config.use_fused_adam
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert trainer.FusedNorm is None


def test_autocast_trains_in_bf16_as_on_the_cpu(
    upstream: ProcessPoolExecutor, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """`precision=bf16` reaches the device's own autocast, and is what `auto` means on a Gaudi."""
    base = tiny_model("llama")
    plain, lower, auto = (
        run_on("hpu", base, tmp_path, case_of(*TEXT), batch_size=7, precision=p) for p in ("fp32", "bf16", "auto")
    )
    cpu, _ = pair(upstream, base, tmp_path, "paca", TEXT, precision="bf16")
    assert lower.losses != pytest.approx(plain.losses, rel=1e-7)
    assert lower.losses == pytest.approx(cpu.losses, rel=2e-3)
    assert auto.losses == lower.losses
    assert lower.trainers[0].use_hpu_amp
    assert not plain.trainers[0].use_hpu_amp


@pytest.mark.parametrize("device", ("cpu", "hpu"))
def test_a_backward_under_autocast_is_the_backward_without(device: str) -> None:
    """Lazy mode's checkpointing, or a loop of one's own, may run it there: the layer's gradients are the same bits."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(12, 8)
    attach_linear(layer, rank=4)
    layer.to(device)
    x = torch.randn(6, 12).to(device).requires_grad_()
    gradients = []
    for enabled in (False, True):
        out = layer(x)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(out, (layer.paca_delta, x), torch.ones_like(out) * 1.001))
    for plain, under in zip(*gradients, strict=True):
        assert torch.equal(plain.cpu(), under.cpu())
        assert plain.abs().max() > 0


def attach_linear(layer: torch.nn.Linear, *, rank: int) -> None:
    """Open one layer by hand."""
    open_layer(layer, torch.arange(rank) * 3, input_axis=1, storage=torch.float32, shared=SharedGather(1), scale=1.0)


def test_rows_of_unlike_lengths_come_in_one_shape(tiny_model: TinyModel, tmp_path: Path) -> None:
    """That of data.max_length, batch after batch."""
    case = case_of(*ANSWERS)
    data = rows_of(case, tmp_path, 36)
    seen: set[tuple[int, ...]] = set()
    trainer = gaudi_base()
    original = trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.add(tuple(inputs["input_ids"].shape))
        return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "compute_loss", compute_loss)
        run_on("hpu", tiny_model("llama"), tmp_path, case, data=data)
    assert seen == {(6, 64)}
    assert len({len(question + answer) for question, answer in QUESTIONS}) > 1
