"""Runs that were interrupted go on as if they had not been, or say why they cannot."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from surgery import acceleration
from surgery.adapter import open_adapter, update_adapter
from surgery.errors import DamagedError, InterruptedRunError, RequestError
from surgery.inspection import inspect
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.runs import CHECKPOINTS, RUN_FILE, STATE_FILE
from surgery.train import KEPT_PLAIN, TrainResult, train
from surgery.trainer import Progress
from tests.conftest import TinyModel, digest_folder
from tests.examples import fast
from tests.interrupting import STEPS, VARIANTS, Killed, Setting, log_keys, make_setting, same_adapter, stop_at


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def setting(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Each variant, with its uninterrupted run."""
    return make_setting(request.param, tiny_model, tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The plain variant, for what does not depend on how one trains."""
    return make_setting(VARIANTS[0], tiny_model, tmp_path_factory.mktemp("plain"))


# --- as if it had not been interrupted (property 14)


@pytest.mark.parametrize(("step", "how"), ((2, "SIGTERM"), (4, "SIGINT"), (5, "kill"), (6, "SIGTERM")))
def test_a_resumed_run_equals_an_uninterrupted_one(
    step: int, how: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the adapter file, the number of steps and the metrics; and the log has each line once."""
    folder = setting.copy(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, step, how=how)
        with pytest.raises((InterruptedRunError, Killed)):
            setting.run(folder)
    assert same_adapter(folder, setting.fresh) or setting.variant.case.task != "causal-lm", "the adapter was touched"
    resumed = setting.run(folder, resume="auto")
    assert same_adapter(folder, setting.whole)
    assert resumed.steps == setting.result.steps
    assert (resumed.before, resumed.after) == (setting.result.before, setting.result.after)
    not_waited_for = set() if how == "kill" or setting.variant.name == "early-stopping" else {(step, "eval_loss")}
    assert log_keys(folder) == [line for line in log_keys(setting.whole) if line not in not_waited_for]


def test_a_run_interrupted_twice_and_moved_resumes(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter folder may be moved between; the best checkpoint is found where it went."""
    folder = setting.copy(tmp_path)
    for step, how in ((4, "SIGTERM"), (5, "kill")):
        with monkeypatch.context() as patch:
            stop_at(patch, step, how=how)
            with pytest.raises((InterruptedRunError, Killed)):
                setting.run(folder, resume="auto")
        folder = folder.rename(tmp_path / f"moved-{step}")
    setting.run(folder, resume="auto")
    assert same_adapter(folder, setting.whole)


def test_a_run_that_began_with_plain_blocks_ends_with_them(
    plain: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and it is said; `lean=on` makes the rest lean. A note of old has no word of blocks."""
    monkeypatch.setattr(acceleration, "LEAN_VALUES", 1)

    def run(folder: Path, lean: str, resume: str = "no") -> TrainResult:
        settings = fast(**plain.variant.settings, lean=lean)
        return train(folder, plain.data, settings, task=plain.variant.case.spec(), resume=resume)

    whole, begun = (Path(shutil.copytree(plain.fresh, tmp_path / name)) for name in ("whole", "begun"))
    assert run(whole, "off").lean == ""
    assert same_adapter(whole, plain.whole), "so small a run is plain by itself"
    with monkeypatch.context() as patch:
        stop_at(patch, 4, how="SIGTERM")
        with pytest.raises(InterruptedRunError):
            run(begun, "off")
    note = begun / CHECKPOINTS / RUN_FILE
    document = json.loads(note.read_text())
    assert document.pop("lean") is False
    note.write_text(json.dumps(document))
    other = Path(shutil.copytree(begun, tmp_path / "other"))
    assert run(begun, "auto", "auto").lean == KEPT_PLAIN
    assert same_adapter(begun, whole)
    training = open_adapter(begun).record.manifest.training
    assert (training["settings"]["lean"], training["kernels"]["lean"]) == ("off", "")
    assert run(other, "on", "auto").lean == "5 norms, 2 gated MLPs, the loss"
    assert not same_adapter(other, whole), "lean blocks round as plain ones do here"


def test_a_run_that_began_with_lean_blocks_ends_with_them(
    plain: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `auto` would no longer choose them: of smaller batches, of which more are accumulated."""

    def run(folder: Path, resume: str = "no", **settings: Any) -> TrainResult:
        section = fast(**{**plain.variant.settings, "batch_size": 4, **settings})
        return train(folder, plain.data, section, task=plain.variant.case.spec(), resume=resume)

    folder = plain.copy(tmp_path)
    monkeypatch.setattr(acceleration, "LEAN_VALUES", 1)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, how="SIGTERM")
        with pytest.raises(InterruptedRunError):
            run(folder)
    monkeypatch.setattr(acceleration, "LEAN_VALUES", 1 << 30)
    assert run(folder, "auto", batch_size=2, gradient_accumulation=2).lean == "5 norms, 2 gated MLPs, the loss"


def test_the_trained_runs_differ(setting: Setting) -> None:
    """What the equalities above compare is not the fresh adapter."""
    assert not same_adapter(setting.fresh, setting.whole)


def test_a_signal_in_the_last_step_loses_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run says it was interrupted, its last checkpoint is the end, and resuming finishes without a step."""
    folder = setting.copy(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, setting.result.steps, how="SIGTERM")
        with pytest.raises(InterruptedRunError, match=f"checkpoint-{setting.result.steps} is whole"):
            setting.run(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_begin", _killed)
        resumed = setting.run(folder, resume="auto")
    assert (resumed.steps, resumed.after) == (setting.result.steps, setting.result.after)
    assert resumed.loss > 0
    assert same_adapter(folder, setting.whole)


def _killed(*_: Any, **__: Any) -> None:
    raise Killed


def interrupted(plain: Setting, tmp_path: Path, *, step: int = 4) -> Path:
    """An adapter folder whose run was stopped."""
    folder = plain.copy(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, how="SIGTERM")
        with pytest.raises(InterruptedRunError) as caught:
            plain.run(folder)
    assert caught.value.exit_code == 130
    assert f"checkpoint-{step} is whole" in str(caught.value)
    return folder


def test_an_interrupted_run_asks_for_a_decision(plain: Setting, tmp_path: Path) -> None:
    """Without --resume it is neither continued nor thrown away; --overwrite throws it away."""
    folder = interrupted(plain, tmp_path)
    before = digest_folder(folder)
    with pytest.raises(RequestError, match=r"an interrupted run.*--resume auto.*--overwrite") as caught:
        plain.run(folder)
    assert caught.value.exit_code == 2
    assert "is going on now; its last whole checkpoint is of step 4" in described(folder)
    assert digest_folder(folder) == before
    plain.run(folder, overwrite=True)
    assert same_adapter(folder, plain.whole)
    assert "is going on" not in described(folder)


def described(folder: Path) -> str:
    """What `surgery inspect` says."""
    return "\n".join(inspect(folder).lines())


@pytest.mark.parametrize(
    ("change", "named"),
    (
        ({"learning_rate": 0.5}, "settings.learning_rate"),
        ({"max_steps": 12, "seed": 3}, "settings.max_steps, settings.seed"),
        ({"lr_scheduler": "cosine"}, "settings.lr_scheduler"),
        ({"batch_size": 2}, "settings.examples_per_step"),
        ({"gradient_accumulation": 2}, "settings.examples_per_step"),
        ({"weight_decay": 0.5}, "settings.weight_decay"),
    ),
)
def test_other_settings_are_no_resumption(change: dict[str, Any], named: str, plain: Setting, tmp_path: Path) -> None:
    """The error names each setting that differs, and nothing is lost by it."""
    folder = interrupted(plain, tmp_path)
    before = digest_folder(folder)
    with pytest.raises(RequestError, match=f"other {named}, expected the same"):
        train(folder, plain.data, fast(**{**STEPS, **change}), resume="auto")
    assert digest_folder(folder) == before


def test_settings_that_change_no_result_may_change(plain: Setting, tmp_path: Path) -> None:
    """How often it logs, how many checkpoints it keeps, how many rows it evaluates at once."""
    folder = interrupted(plain, tmp_path)
    free = {"logging_steps": 1, "save_total_limit": 1, "eval_batch_size": 2, "device": "cpu"}
    train(folder, plain.data, fast(**{**STEPS, **free}), resume="auto")
    assert same_adapter(folder, plain.whole)
    assert [path.name for path in (folder / CHECKPOINTS).glob("checkpoint-*")] == ["checkpoint-9"]


def test_other_data_is_no_resumption(plain: Setting, tmp_path: Path) -> None:
    """Another limit of length, another file, or another content of the same file."""
    folder = interrupted(plain, tmp_path)
    source = Path(plain.data.train[0])
    other = tmp_path / "other.txt"
    other.write_text(source.read_text())
    moved = plain.data.model_copy(update={"train": [str(other)]})
    for data, named in ((plain.data.model_copy(update={"max_length": 32}), "data.max_length"), (moved, "data.train")):
        with pytest.raises(RequestError, match=f"other {named}"):
            train(folder, data, fast(**STEPS), resume="auto")
    text = source.read_text()
    source.write_text(text.replace("fox", "cow"))
    try:
        with pytest.raises(RequestError, match=r"other data\.sha256"):
            plain.run(folder, resume="auto")
    finally:
        source.write_text(text)
    plain.run(folder, resume="auto")
    assert same_adapter(folder, plain.whole)


def test_other_evaluation_data_are_no_resumption(plain: Setting, tmp_path: Path) -> None:
    """Their content counts as that of the training data does: `after` would be of other rows than `before`."""
    held = tmp_path / "held.txt"
    held.write_text(Path(plain.data.train[0]).read_text())
    other = replace(plain, data=plain.data.model_copy(update={"eval": [str(held)]}))
    folder = interrupted(other, tmp_path)
    held.write_text(held.read_text().replace("fox", "cow"))
    with pytest.raises(RequestError, match=r"other data\.sha256"):
        other.run(folder, resume="auto")


def test_another_plan_is_no_resumption(plain: Setting, tmp_path: Path) -> None:
    """Checkpoints of one plan are no start for another's adapter."""
    folder = interrupted(plain, tmp_path)
    base = open_adapter(folder).record.manifest.base.path
    apply(base, tmp_path / "second" / "adapter", PacaSpec(rank=2))
    shutil.copytree(folder / CHECKPOINTS, tmp_path / "second" / "adapter" / CHECKPOINTS)
    with pytest.raises(RequestError, match="other plan"):
        plain.run(tmp_path / "second" / "adapter", resume="auto")


@pytest.mark.parametrize("damage", ("no state", "other tensors", "truncated"))
def test_a_damaged_checkpoint_is_refused(damage: str, plain: Setting, tmp_path: Path) -> None:
    """Each is the documented error; the adapter keeps its state."""
    folder = interrupted(plain, tmp_path)
    path = folder / CHECKPOINTS / "checkpoint-4" / STATE_FILE
    if damage == "no state":
        path.unlink()
    elif damage == "other tensors":
        plan = open_adapter(folder).plan.id
        path.write_bytes(safetensors.torch.save({"x": torch.zeros(2)}, {"plan": plan}))
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedError):
        plain.run(folder, resume="auto")
    assert same_adapter(folder, plain.fresh)


def test_resume_auto_without_a_run_starts_one(plain: Setting, tmp_path: Path) -> None:
    """So that a script may always give it."""
    folder = plain.copy(tmp_path)
    plain.run(folder, resume="auto")
    assert same_adapter(folder, plain.whole)


def test_resume_takes_auto_or_no(plain: Setting, tmp_path: Path) -> None:
    """Anything else is a wrong request."""
    with pytest.raises(RequestError, match=r"'yes'.*auto or no"):
        plain.run(plain.copy(tmp_path), resume="yes")


# --- a second training


def test_a_second_training_goes_on_from_the_first(plain: Setting, tmp_path: Path) -> None:
    """It starts where the first ended: its first evaluation equals the first run's last one."""
    folder = plain.copy(tmp_path)
    first = plain.run(folder)
    second = plain.run(folder)
    assert second.before == first.after
    assert second.after["loss"] < first.after["loss"]
    assert not same_adapter(folder, plain.whole)


def test_an_interrupted_second_training_is_not_taken_for_the_first(plain: Setting, tmp_path: Path) -> None:
    """With the very settings of the finished first run, --resume auto finishes the second."""
    folder, reference = plain.copy(tmp_path), tmp_path / "reference"
    plain.run(folder)
    shutil.copytree(folder, reference)
    plain.run(reference)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, how="SIGTERM")
        with pytest.raises(InterruptedRunError):
            plain.run(folder)
    plain.run(folder, resume="auto")
    assert same_adapter(folder, reference)
    before = digest_folder(folder)
    plain.run(folder, resume="auto")
    assert digest_folder(folder) == before


def test_a_run_killed_after_its_last_write_is_finished(
    plain: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is written, the run's own note of it is not: --resume auto does not train again."""
    folder = plain.copy(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[train.__module__], "update_adapter", _then_killed(update_adapter))
        with pytest.raises(Killed):
            plain.run(folder)
    assert same_adapter(folder, plain.whole)
    assert "is going on" not in described(folder)
    before = digest_folder(folder)
    plain.run(folder, resume="auto")
    assert digest_folder(folder) == before


def _then_killed(function: Any) -> Any:
    def call(*args: Any) -> None:
        function(*args)
        raise Killed

    return call
