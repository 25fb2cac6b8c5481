"""Training READ adapters on tiny models: every task, what trains, what is kept, resuming, recipes and the commands."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

import surgery
from surgery import ReadSpec
from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import Checkpoint
from surgery.data import inspect_labels
from surgery.delta import ADAPTER_FILE, require_side
from surgery.errors import InterruptedRunError, OutputExistsError, RecipeError, RequestError, UnsupportedError
from surgery.manifest import REMOTE_CODE
from surgery.methods.read import draw_state
from surgery.recipe import DataSection
from surgery.recipe_file import read_recipe
from surgery.runs import CHECKPOINTS, STATE_FILE
from surgery.side.settings import NAME
from surgery.survey import TASKS, TaskSpec
from surgery.train import TrainResult, train
from surgery.workflow import run
from tests.conftest import TinyModel, digest_folder
from tests.console import Console
from tests.examples import CASES, LABELLED, Case, fast, write_rows
from tests.interrupting import Killed, same_adapter, stop_at
from tests.reading import SPEC, losses_of

_BY_NAME = {case.name: case for case in CASES}
POOLED = replace(SPEC, pooling="mean")


@dataclass(frozen=True)
class Learner:
    """What a side network learns beside which model."""

    case: Case
    spec: ReadSpec = SPEC
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.case.name}-{str(self.dtype).removeprefix('torch.')}"

    def task(self, data: DataSection) -> TaskSpec:
        has_head = TASKS[self.case.task].has_head
        return TaskSpec(self.case.task, inspect_labels(data.spec(), self.case.task) if has_head else ())


LEARNERS = (
    Learner(_BY_NAME["bert-sequence-classification-labelled.tsv"], POOLED),
    Learner(_BY_NAME["bert-sequence-classification-labelled.tsv"], dtype=torch.bfloat16),
    Learner(_BY_NAME["llama-sequence-classification-labelled.jsonl"], replace(SPEC, pooling="last")),
    Learner(_BY_NAME["bert-regression-scored.csv"], POOLED),
    Learner(_BY_NAME["bert-token-classification-tagged.jsonl"]),
    Learner(_BY_NAME["llama-causal-lm-text.txt"]),
    Learner(_BY_NAME["llama-causal-lm-text.txt"], dtype=torch.bfloat16),
    Learner(_BY_NAME["llama-causal-lm-text.txt"], dtype=torch.float16),
    Learner(_BY_NAME["bert-sequence-classification-labelled.tsv"], POOLED, dtype=torch.float16),
    Learner(_BY_NAME["gpt2-causal-lm-prompts.csv"], replace(SPEC, initial="embedding")),
    Learner(_BY_NAME["t5-seq2seq-pairs.jsonl"]),
    Learner(_BY_NAME["bart-seq2seq-prompts.tsv"], replace(SPEC, joiner="mean")),
)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Each run collects garbage: what is there before these tests need not be looked through every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass(frozen=True)
class Trained:
    """One learner, its base, its folder, and what the run said."""

    learner: Learner
    base: Path
    folder: Path
    result: TrainResult

    def adapter(self) -> Adapter:
        return open_adapter(self.folder)


@pytest.fixture(scope="module", params=LEARNERS, ids=lambda learner: learner.name)
def trained(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each learner, trained once for all tests of this module."""
    learner: Learner = request.param
    root = tmp_path_factory.mktemp("trained")
    base, data = tiny_model(learner.case.family, dtype=learner.dtype), learner.case.write(root)
    surgery.apply(base, root / "adapter", learner.spec, task=learner.task(data))
    result = train(root / "adapter", data, fast(learning_rate=3e-2, save_steps=9), task=learner.case.spec())
    return Trained(learner, base, root / "adapter", result)


# --- every task


def test_the_loss_falls(trained: Trained) -> None:
    """On what it was trained on, after a few steps, for every task."""
    assert trained.result.steps == 10
    assert trained.result.after["loss"] < trained.result.before["loss"] - 0.02


def test_what_trained_is_the_plan(trained: Trained) -> None:
    """The adapter holds the plan's tensors, all of them moved; as many values as the plan and the run say."""
    adapter = trained.adapter()
    delta = require_side(adapter.delta, "test")
    stored = safetensors.torch.load_file(trained.folder / ADAPTER_FILE)
    heads = {f"{w.parameter}.whole": w for w in adapter.plan.whole}
    assert set(stored) - {f"{w.parameter}.original" for w in adapter.plan.whole} == set(delta.state) | set(heads)
    count = sum(stored[name].numel() for name in (*delta.state, *heads))
    assert count == adapter.plan.trained_values == trained.result.trained_values
    start = draw_state(adapter.plan)
    assert start.keys() == delta.state.keys()
    assert not [name for name, values in delta.state.items() if torch.equal(values, start[name])]
    assert (delta.moved, delta.movable) == (1, 1)
    assert bool(heads) == TASKS[trained.learner.case.task].has_head
    assert {values.dtype for values in stored.values()} <= {torch.float32, trained.learner.dtype}
    assert {stored[name].dtype for name in delta.state} == {torch.float32}


def test_the_adapter_is_the_last_checkpoint(trained: Trained) -> None:
    """Value by value; reloaded twice and exported, it gives the same logits bit for bit."""
    state = safetensors.torch.load_file(trained.folder / CHECKPOINTS / "checkpoint-10" / STATE_FILE)
    adapter = trained.adapter()
    for name, values in require_side(adapter.delta, "test").state.items():
        assert torch.equal(state[name], values)
    loaded = surgery.load(trained.folder, trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(state)
    exported = surgery.export(trained.folder, trained.folder.parent / "remote", format=REMOTE_CODE)
    assert exported.verification is not None
    assert {check.result for check in exported.verification.checks} == {"passed"}
    assert exported.verification.max_logit_difference == 0
    assert not exported.notes


def test_checkpoints_hold_no_backbone(trained: Trained) -> None:
    """What trains, exactly, and an optimizer of as many values; the base's names are nowhere in the folder."""
    plan = trained.adapter().plan
    backbone = set(Checkpoint.open(trained.base))
    names = {t.parameter for t in plan.side} | {w.parameter for w in plan.whole}
    folders = sorted((trained.folder / CHECKPOINTS).glob("checkpoint-*"))
    assert [path.name for path in folders] == ["checkpoint-10", "checkpoint-9"]
    for path in folders:
        assert {entry.name for entry in path.iterdir()} == {
            STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"
        }  # fmt: skip
        state = safetensors.torch.load_file(path / STATE_FILE)
        assert set(state) == names
        assert not (set(state) - {w.parameter for w in plan.whole}) & backbone
        optimizer = torch.load(path / "optimizer.pt", weights_only=True)["state"]
        moments = sum(entry["exp_avg"].numel() for entry in optimizer.values())
        passed_by = [w for w in plan.whole if ".pooler." in w.parameter and trained.learner.spec.pooling != "own"]
        assert moments == plan.trained_values - sum(torch.Size(w.shape).numel() for w in passed_by)
    weights = {path.name for path in trained.folder.rglob("*.safetensors")}
    assert weights == {ADAPTER_FILE, STATE_FILE}


def test_the_base_did_not_change_in_training(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """After another run, each tensor of the model in memory is the base's."""
    seen: list[Any] = []
    module = sys.modules[train.__module__]
    collect = module.collect

    def watched(model: Any) -> Any:
        seen.append(model)
        return collect(model)

    monkeypatch.setattr(module, "collect", watched)
    folder = Path(shutil.copytree(trained.folder, trained.folder.parent / "again"))
    path = trained.learner.case.file
    data = DataSection(train=[str(trained.folder.parent / path)], **{"max_length": 64, **trained.learner.case.data})
    train(folder, data, fast(max_steps=2), task=trained.learner.case.spec())
    shutil.rmtree(folder)
    fresh = surgery.load(trained.folder)
    side = {name for name in fresh.state_dict() if name.startswith(f"{NAME}.")}
    heads = {w.parameter for w in trained.adapter().plan.whole}
    ours = seen[0].state_dict()
    assert side <= ours.keys()
    for name, values in fresh.state_dict().items():
        if name not in side | heads:
            assert torch.equal(ours[name], values), name


# --- resuming

DROPOUT: Mapping[str, object] = {"hidden_dropout_prob": 0.2, "classifier_dropout": 0.3}
VARIANTS: Mapping[str, tuple[Learner, Mapping[str, object], Mapping[str, Any]]] = {
    "classes": (LEARNERS[0], DROPOUT, {}),
    "text": (LEARNERS[5], {}, {"gradient_accumulation": 2}),
    "recomputed": (LEARNERS[5], {"attention_dropout": 0.2}, {"gradient_checkpointing": True}),
    "pairs": (LEARNERS[10], {}, {}),
    "evaluated": (LEARNERS[0], DROPOUT, {"eval_steps": 2}),
}


@dataclass(frozen=True)
class Setting:
    """A variant, ready to be trained in copies; `whole` is its uninterrupted run."""

    learner: Learner
    data: DataSection
    settings: Mapping[str, Any]
    fresh: Path
    whole: Path

    def run(self, folder: Path, **options: Any) -> TrainResult:
        settings = fast(**{"save_steps": 3, "batch_size": 3, "max_steps": 7, **self.settings})
        return train(folder, self.data, settings, task=self.learner.case.spec(), **options)


@pytest.fixture(scope="module", params=VARIANTS)
def setting(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Each variant with its uninterrupted run."""
    learner, overrides, settings = VARIANTS[request.param]
    root = tmp_path_factory.mktemp("setting")
    base, data = tiny_model(learner.case.family, overrides=overrides), learner.case.write(root)
    surgery.apply(base, root / "fresh", learner.spec, task=learner.task(data))
    document = json.loads((root / "fresh" / "surgery.json").read_text())
    document["manifest"]["base"]["path"] = str(base)  # so that copies find it
    (root / "fresh" / "surgery.json").write_text(json.dumps(document))
    made = Setting(learner, data, settings, root / "fresh", Path(shutil.copytree(root / "fresh", root / "whole")))
    made.run(made.whole)
    return made


@pytest.mark.parametrize(("step", "how"), ((2, "SIGTERM"), (5, "kill")))
def test_a_resumed_run_equals_an_uninterrupted_one(
    step: int, how: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; until it ends, the adapter is the old one."""
    folder = Path(shutil.copytree(setting.fresh, tmp_path / "adapter"))
    with monkeypatch.context() as patch:
        stop_at(patch, step, how=how)
        with pytest.raises((InterruptedRunError, Killed)):
            setting.run(folder)
    assert same_adapter(folder, setting.fresh)
    setting.run(folder, resume="auto")
    assert same_adapter(folder, setting.whole)
    assert not same_adapter(folder, setting.fresh)


@pytest.mark.parametrize(
    ("index", "settings"),
    (
        (5, {"gradient_checkpointing": True}),
        (0, {"gradient_checkpointing": True}),
        (10, {"gradient_checkpointing": True}),
        (5, {"batch_size": 3, "gradient_accumulation": 2}),
        (0, {"batch_size": 3, "gradient_accumulation": 2}),
        (4, {"batch_size": 3, "gradient_accumulation": 2}),
    ),
)
def test_how_memory_is_saved_changes_no_loss(
    index: int, settings: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Recomputed layers, or a batch in two halves: the same losses to rounding."""
    learner = LEARNERS[index]
    base, data = tiny_model(learner.case.family), learner.case.write(tmp_path)
    data = data.model_copy(update={"eval": []})
    losses = {}
    for name, given in (("plain", {}), ("saving", settings)):
        surgery.apply(base, tmp_path / name, learner.spec, task=learner.task(data))
        section = fast(**{"batch_size": 6, "max_steps": 4, "logging_steps": 1, **given})
        train(tmp_path / name, data, section, task=learner.case.spec())
        losses[name] = losses_of(tmp_path / name)
    assert len(losses["plain"]) == 4
    assert losses["saving"] == pytest.approx(losses["plain"], abs=1e-4)


def test_the_same_run_twice_gives_the_same_bytes(setting: Setting, tmp_path: Path) -> None:
    """A run is a function of its settings."""
    folder = Path(shutil.copytree(setting.fresh, tmp_path / "adapter"))
    setting.run(folder)
    assert same_adapter(folder, setting.whole)


# --- a recipe

RECIPE = {
    "model": "model", "method": "read", "task": "sequence-classification",
    "read": {"hidden": 8, "pooling": "mean", "layers": "last:1"},
    "data": {"train": ["rows.jsonl"], "max_length": 64},
    "train": {"learning_rate": 0.02, "max_steps": 4, "batch_size": 4},
    "export": {"format": "remote-code"},
}  # fmt: skip


@pytest.fixture
def recipe(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A recipe beside its model and its data."""
    shutil.copytree(tiny_model("bert"), tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", LABELLED)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "labels": ["animal", "person"]}))
    return tmp_path / "recipe.yaml"


def test_a_recipe_goes_all_the_way(recipe: Path) -> None:
    """Apply, train, export as remote code, verify; a second run repeats nothing and changes no byte."""
    result = run(read_recipe(recipe))
    assert (result.adapter, result.merged) == (recipe.parent / "model-read", recipe.parent / "model-read-remote-code")
    assert result.skipped == ()
    assert result.training.steps == 4
    assert result.verification is not None
    assert result.verification.max_logit_difference == 0
    assert ReadSpec(**open_adapter(result.adapter).plan.spec) == ReadSpec(hidden=8, pooling="mean", layers="last:1")
    before = digest_folder(recipe.parent)
    again = run(read_recipe(recipe))
    assert again.skipped == ("apply", "train", "export")
    assert digest_folder(recipe.parent) == before


def test_a_recipe_of_another_plan_is_refused(recipe: Path) -> None:
    """Its adapter's folder holds what another one made; sections of another method are no part of this one."""
    run(read_recipe(recipe))
    before = digest_folder(recipe.parent)
    with pytest.raises(OutputExistsError, match="an adapter that another plan made"):
        run(read_recipe(recipe, ["read.hidden=9"]))
    with pytest.raises(OutputExistsError, match="not this adapter's export"):
        run(read_recipe(recipe, [f"export.out={recipe.parent / 'model'}"]))
    with pytest.raises(RecipeError, match=r"settings of paca \(rank\), and method read"):
        run(read_recipe(recipe, ["paca.rank=3"]))
    with pytest.raises(RecipeError, match=r"settings of read .*, and method paca"):
        run(read_recipe(recipe, ["method=paca"]))
    with pytest.raises(UnsupportedError, match="no dense equivalent"):
        run(read_recipe(recipe, ["export.format=safetensors", "export.out=dense"]))
    assert digest_folder(recipe.parent) == before


def test_a_recipe_goes_on_after_a_signal(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run takes up the training where it was."""
    with monkeypatch.context() as patch:
        stop_at(patch, 2, how="SIGTERM")
        with pytest.raises(InterruptedRunError):
            run(read_recipe(recipe))
    assert not (recipe.parent / "model-read-remote-code").exists()
    assert run(read_recipe(recipe)).skipped == ("apply",)


# --- the command line


def test_a_plan_is_printed_and_nothing_written(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    """Which stacks are read, how many values train, and what it will need; as JSON the plan itself."""
    monkeypatch.chdir(tmp_path)
    base = tiny_model("t5")
    shown = console("apply", base, "--method", "read", "--hidden", "8", "--plan")
    assert shown.code == 0
    for part in ("encoder.block", "decoder.block", "export --format remote-code writes"):
        assert part in shown.out
    document = json.loads(console("apply", base, "--method", "read", "--hidden", "8", "--plan", "--json").out)
    assert document["plan"]["spec"]["hidden"] == 8
    assert [stack["name"] for stack in document["plan"]["stacks"]] == ["encoder", "decoder"]
    assert [stack["read"] for stack in document["plan"]["stacks"]] == [[0, 1], [0, 1]]
    assert {entry["parameter"].partition(".")[0] for entry in document["plan"]["side"]} == {NAME}
    assert f"{sum(torch.Size(e['shape']).numel() for e in document['plan']['side']):,}" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_the_commands_go_all_the_way(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    """apply, train with a cache, inspect, export, verify, each by its command."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    data = LEARNERS[5].case.write(tmp_path)
    applied = json.loads(console("apply", "model", "--method", "read", "--hidden", "8", "--json").out)
    assert applied["adapter"] == "model-read"
    said = console("inspect", "model-read").out
    for part in ("read, gru 8 wide", "not yet", "0 of 1 target"):
        assert part in said
    ended = console("train", "model-read", "--data", data.train[0], "--cache-features", "cache", "--cache-bytes", "9MB",
                    "max_steps=4", "max_length=64", "learning_rate=0.02", "--json")  # fmt: skip
    assert (ended.code, json.loads(ended.out)["steps"]) == (0, 4)
    assert (tmp_path / "cache" / "states.bin").is_file()
    document = json.loads(console("inspect", "model-read", "--json").out)
    assert (document["kind"], document["adapter"]["moved"], document["adapter"]["targets"]) == ("adapter", 1, 1)
    assert document["plan"]["stacks"][0]["read"] == [0, 1]
    exported = json.loads(console("export", "model-read", "--format", "remote-code", "--json").out)
    assert exported["out"] == "model-read-remote-code"
    assert exported["verification"]["max_logit_difference"] == 0
    assert console("verify", "model-read-remote-code").code == 0
    assert console("train", "model-read", "--data", data.train[0], "max_steps=4", "max_length=64",
                   "learning_rate=0.02", "--resume", "auto").code == 0  # fmt: skip


BAD = (
    (2, "apply model --method read --hidden 0", "--hidden: 0, expected at least 1"),
    (2, "apply model --method read --layers last:9", "expected layers of a stack of 2, 0 to 1"),
    (2, "apply model --method read --pooling mean", "--pooling: 'mean' for causal-lm"),
    (2, "apply model --method read --joiner attention", "--joiner: 'attention' for a model of one stack"),
    (2, "apply model --method read --rank 4", "--rank: method read has no such setting"),
    (2, "train adapter --data text.txt --cache-bytes 1GB", "--cache-bytes: given without --cache-features"),
    (2, "train adapter --data text.txt --cache-features c --cache-bytes some", "'some', expected a size such as 20GB."),
    (2, "train adapter --data text.txt --cache-features text.txt", "--cache-features: text.txt: File exists"),
    (2, "train adapter --data text.txt --cache-features=", "--cache-features: an empty name, expected a folder"),
    (2, "train adapter --data text.txt --cache-bytes=", "--cache-bytes: given without --cache-features"),
    (4, "train adapter --data text.txt --cache-features c --cache-bytes 100", "expected at most 100 bytes"),
    (4, "train adapter --data text.txt --base other", "its tensors have digest"),
    (4, "export adapter --format remote-code --base other -o out", "its tensors have digest"),
    (2, "export adapter --format remote-code --dtype bf16 -o out", "--dtype: 'bf16', expected 'keep'"),
    (2, "export adapter --format remote-coed -o out", "The closest is 'remote-code'"),
    (2, "export adapter -o out", "adapter: a READ adapter and no --format, expected --format onnx or remote-code."),
    (
        5,
        "export adapter --merge -o out",
        "Error: --merge: a READ adapter (a side network runs beside the layers and has",
    ),
    (5, "export adapter --merge --format onnx -o out", "Leave out --merge: this format holds the side network"),
    (2, "diff model adapter", "Export it first: surgery export adapter --format remote-code (or onnx)."),
    (5, "export adapter --format lora -o out", "has no dense equivalent"),
    (5, "export paca --format remote-code -o out", "a PaCA adapter"),
)


@pytest.mark.parametrize(("code", "line", "match"), BAD, ids=[line for _, line, _ in BAD])
def test_what_is_wrong_ends_with_its_code(
    code: int, line: str, match: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    console: Console,
) -> None:  # fmt: skip
    """One line on standard error, nothing on standard output, nothing left behind."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("model", 0), ("other", 1)):
        (tmp_path / name).symlink_to(tiny_model("llama", seed=seed), target_is_directory=True)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    if " adapter" in line:
        surgery.apply("model", "adapter", SPEC)
    if " paca" in line:
        surgery.apply("model", "paca", surgery.PacaSpec(rank=2))
    before = digest_folder(tmp_path)
    ended = console(*line.split(), *(["max_length=32"] if line.startswith("train") else []))
    assert ended.code == code
    assert match in ended.err
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert digest_folder(tmp_path) == before


def test_pooling_asks_for_its_task_first(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`apply` plans for a task: a masked language model has no pooled state, a classifier of it has."""
    with pytest.raises(RequestError, match=r"--pooling: 'mean' for features"):
        surgery.apply(tiny_model("bert"), tmp_path / "adapter", POOLED)
    surgery.apply(tiny_model("bert"), tmp_path / "adapter", POOLED, task=TaskSpec("regression"))
    assert open_adapter(tmp_path / "adapter").plan.task == "regression"
