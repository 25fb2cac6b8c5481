"""Columns that are drawn anew during training: what is kept, what starts fresh, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.adapter import open_adapter
from surgery.columns import drawn_columns
from surgery.delta import require_columns
from surgery.errors import DamagedError, RequestError, UnsupportedError
from surgery.inspection import inspect
from surgery.methods.paca_plan import planned_columns
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, attach, collect, detach, load, resample
from surgery.paca_layers import layers
from surgery.recipe import DataSection, TrainSection
from surgery.resampling import Lane, held, restore_layers, state_of_layers
from surgery.train import train
from surgery.verify import verify
from surgery.workflow import export
from tests.conftest import TinyModel
from tests.console import Command
from tests.masked import patches_of, require_merge_equals, run_masked, train_in_turns
from tests.tiny import build_model, sample_inputs

SPEC = PacaSpec(rank=2, resample="every:2")


def loss_of(model: Any, number: int) -> Tensor:
    """The loss of a batch of its own."""
    inputs = sample_inputs("llama", seed=number)
    loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
    return loss


train_for = partial(train_in_turns, loss_of)


def attached(dtype: torch.dtype = torch.float64, spec: PacaSpec = SPEC) -> tuple[Any, Any]:
    """A tiny Llama with columns open, and its plan."""
    model = build_model("llama", dtype=dtype)
    return model, attach(model, spec)


def test_a_merge_equals_a_dense_run_that_applied_the_same_updates() -> None:
    """Full gradients, masked to the columns of the time, and an Adam that knows nothing after each draw."""
    model, plan = attached()
    first = patches_of(model)
    assert all(torch.equal(first[t.module].columns, planned_columns(plan, t)) for t in plan.targets)
    train_for(model, 7)
    dense = build_model("llama", dtype=torch.float64)
    run_masked(dense, first, loss_of, steps=7, every=2)
    require_merge_equals(detach(model, merge=True).state_dict(), dense)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_draw_changes_no_output(dtype: torch.dtype) -> None:
    """Logits before a draw and after it are equal bit for bit, whatever the columns hold by then."""
    model, _ = attached(dtype)
    optimizer = train_for(model, 1)
    for number in range(1, 6):
        loss_of(model, number).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        before = model(**sample_inputs("llama")).logits
        drawn = resample(model, optimizer, step=number + 1)
        assert drawn == (number % 2 == 1)
        assert torch.equal(model(**sample_inputs("llama")).logits, before)


def test_what_is_held_is_the_union_and_what_trains_is_one_set() -> None:
    """Each column once, in order; the optimizer, the differences and the base's columns stay those of one set."""
    model, plan = attached()
    optimizer = train_for(model, 6)
    delta = require_columns(collect(model), "test")
    sizes = []
    for target in plan.targets:
        patch, layer = delta.patches[target.module], layers(model)[target.module]
        groups = [drawn_columns(target.in_features, 2, seed=0, group=target.group, draw=n) for n in (1, 2, 3)]
        first = set(planned_columns(plan, target).tolist())
        assert set(patch.columns.tolist()) == first.union(*(set(g.tolist()) for g in groups))
        assert patch.active is not None
        assert patch.active.tolist() == groups[-1].tolist() == layer.paca_columns.tolist()
        assert layer.paca_delta.shape == layer.paca_original.shape == (target.out_features, 2)
        assert layer.paca_delta not in optimizer.state, "drawn after the last step: it knows nothing"
        sizes.append(len(patch.columns))
    assert max(sizes) > 4
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{t.module}.paca_delta" for t in plan.targets
    }


def test_a_column_that_returns_goes_on_where_it_was() -> None:
    """Full width: every draw is every column, whose values never jump, while the optimizer forgets."""
    model, _ = attached(spec=PacaSpec(rank=32, targets=("q_proj",), resample="every:2"))
    train_for(model, 2)
    before = {name: layer.paca_delta.detach().clone() for name, layer in layers(model).items()}
    assert all(bool(delta.any()) for delta in before.values())
    optimizer = torch.optim.Adam([layer.paca_delta for layer in layers(model).values()])
    resample(model, optimizer, step=4)
    for name, layer in layers(model).items():
        assert torch.equal(layer.paca_delta, before[name])
        assert len(held(Lane(layer)).columns) == 32


def test_detach_without_merging_gives_the_base_back() -> None:
    """Of all columns that have ever trained."""
    model, _ = attached(torch.bfloat16)
    train_for(model, 6)
    base = build_model("llama", dtype=torch.bfloat16).state_dict()
    found = detach(model, merge=False).state_dict()
    assert set(found) == set(base)
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_a_state_is_put_back_into_a_model_that_has_moved_on() -> None:
    """As the best checkpoint is: columns that began to train after it are the base's again."""
    model, _ = attached(torch.bfloat16)
    optimizer = train_for(model, 2)
    state = {name: tensor.clone() for name, tensor in state_of_layers(model).items()}
    deltas = {name: layer.paca_delta.detach().clone() for name, layer in layers(model).items()}
    expected = model(**sample_inputs("llama")).logits
    train_for(model, 4, first=2, optimizer=optimizer)
    assert not torch.equal(model(**sample_inputs("llama")).logits, expected)
    restore_layers(model, state)
    for name, layer in layers(model).items():
        layer.paca_delta.data.copy_(deltas[name])
    assert torch.equal(model(**sample_inputs("llama")).logits, expected)
    assert all(torch.equal(state_of_layers(model)[name], tensor) for name, tensor in state.items())


def test_draws_follow_the_scores() -> None:
    """What has no score is drawn last; the more, the likelier; the same arguments give the same columns."""
    weights = torch.tensor([0.0, 1.0, 1.0, 8.0, 0.0, 1.0], dtype=torch.float64)
    drawn = [drawn_columns(6, 1, seed=0, group="g", draw=n, weights_i=weights).item() for n in range(400)]
    assert set(drawn) == {1, 2, 3, 5}
    assert 240 < drawn.count(3) < 340  # of 400: 8 of 11
    every = drawn_columns(6, 6, seed=0, group="g", draw=1, weights_i=weights)
    assert every.tolist() == list(range(6))
    again = drawn_columns(6, 3, seed=0, group="g", draw=7, weights_i=weights)
    assert torch.equal(again, drawn_columns(6, 3, seed=0, group="g", draw=7, weights_i=weights))


# --- with files


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to train on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog lay on the rug. " * 40)
    return path


@pytest.fixture(scope="module")
def trained(tiny_model: TinyModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose columns were drawn by magnitude and changed twice, in bf16."""
    folder = tmp_path_factory.mktemp("trained") / "ad"
    spec = PacaSpec(rank=2, select="magnitude", resample="every:2")
    apply(tiny_model("llama", dtype=torch.bfloat16), folder, spec)
    train(folder, DataSection(train=[str(data)], max_length=16), settings())
    return folder


def settings(**changes: Any) -> TrainSection:
    """Six steps, a checkpoint after each second one."""
    return TrainSection(**{"max_steps": 6, "batch_size": 2, "learning_rate": 1e-2, "save_steps": 1, **changes})


def test_the_file_holds_the_union_and_the_merge_is_verified(trained: Path, tmp_path: Path) -> None:
    """Merge, verify, load and undo know of columns that no longer train; LoRA has a row for each of them."""
    adapter = open_adapter(trained)
    widths = require_columns(adapter.delta, "test").widths()
    assert max(widths.values()) > 2
    said = "\n".join(inspect(trained).lines())
    held_values = sum(target.out_features * widths[target.module] for target in adapter.plan.targets)
    assert f"{held_values:,} values, in all columns that have ever trained" in said
    assert "drawn anew every 2 steps" in said
    export(trained, tmp_path / "merged")
    checks = verify(tmp_path / "merged")
    assert {check.result for check in checks.checks} == {"passed"}
    assert checks.max_logit_difference == 0
    again = load(trained, trainable=True)
    assert {name: len(held(Lane(layer)).columns) for name, layer in layers(again).items()} == widths
    assert require_columns(collect(again), "test").to_bytes() == adapter.delta.to_bytes()
    surgery.undo(tmp_path / "merged", tmp_path / "base")
    base = trained / adapter.record.manifest.base.path / "model.safetensors"
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == base.read_bytes()
    assert export(trained, tmp_path / "lora", format="lora").size_bytes


def test_a_resumed_run_equals_one_that_was_never_stopped(
    trained: Path, tiny_model: TinyModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right after a draw and in between, the adapter's bytes are those of the run in one go."""
    for stop in (2, 3):
        folder = tmp_path / f"ad{stop}"
        apply(
            tiny_model("llama", dtype=torch.bfloat16), folder, PacaSpec(rank=2, select="magnitude", resample="every:2")
        )
        stop_after(monkeypatch, stop)
        section = DataSection(train=[str(data)], max_length=16)
        with pytest.raises(KeyboardInterrupt):
            train(folder, section, settings())
        monkeypatch.undo()
        train(folder, section, settings(), resume="auto")
        assert (folder / "adapter.safetensors").read_bytes() == (trained / "adapter.safetensors").read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Break a run off as soon as the checkpoint of a step is whole."""
    from surgery.trainer import SurgeryCheckpoints

    publish = SurgeryCheckpoints._publish

    def broken(self: Any, staged: Path, folder: Path) -> None:
        publish(self, staged, folder)
        if staged.name == f"checkpoint-{step}":
            raise KeyboardInterrupt

    monkeypatch.setattr(SurgeryCheckpoints, "_publish", broken)


def test_a_file_with_more_columns_than_a_plan_says_is_damaged(trained: Path, tmp_path: Path) -> None:
    """Only plans that draw columns anew have more than the rank; what trains now is among them."""
    adapter = open_adapter(trained)
    patch = next(p for p in require_columns(adapter.delta, "test").patches.values() if len(p.columns) > 2)
    with pytest.raises(DamagedError, match="columns"):
        replace(patch, active=None)
    outside = torch.tensor([c for c in range(patch.target.in_features) if c not in patch.columns.tolist()][:2])
    with pytest.raises(DamagedError, match="active"):
        replace(patch, active=outside)
    assert patch.scores is not None
    with pytest.raises(DamagedError, match="scores"):
        replace(patch, scores=-patch.scores)


@pytest.mark.parametrize("strategy", ("fsdp2", "zero2"))
def test_what_cuts_the_columns_is_refused(trained: Path, data: Path, strategy: str, command: Command) -> None:
    """Exit code 5 or 2 before anything is trained, with the way out."""
    code, said = command("train", trained, "--data", data, f"strategy={strategy}", "--overwrite")
    assert code in (2, 5)
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ("500", "every:0", "every:-1", "every", "steps:5"))
def test_a_period_is_steps(text: str) -> None:
    """Anything but every:STEPS is an error that shows one."""
    with pytest.raises(RequestError, match="every:500"):
        PacaSpec(resample=text)


def test_without_a_period_there_is_nothing_to_draw() -> None:
    """`resample` on a plan that never draws says so, and so does a file that names one set."""
    model, _ = attached(spec=PacaSpec(rank=2))
    with pytest.raises(RequestError, match="draws no columns anew"):
        resample(model, torch.optim.SGD([next(model.parameters())]), step=1)
    with pytest.raises(UnsupportedError, match="one set of columns"):
        PacaSpec(select="file:columns.json", resample="every:5")
