"""Training runs on tiny models: every task, what a run leaves behind, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from exporters.dense import export
from surgery.adapter import Adapter, open_adapter
from surgery.backends.local import training_arguments
from surgery.checkpoint import Checkpoint
from surgery.compat import checkpointing_name
from surgery.delta import ADAPTER_FILE, adapter_names
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    DataError,
    InterruptedRunError,
    RecipeError,
    RequestError,
    UnsupportedError,
)
from surgery.exported import load_merged
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, load
from surgery.recipe import DataSection, TrainSection
from surgery.runs import CHECKPOINTS, LOG_FILE, RUN_FILE, STATE_FILE
from surgery.survey import TASKS, TaskSpec
from surgery.tensorfile import TensorFile
from surgery.train import TrainResult, train
from surgery.trainer import Interruption, Progress, StopWhenAsked
from surgery.verify import verify
from tests.conftest import TinyModel, digest_folder
from tests.examples import ANIMALS, CASES, LABELLED, SCORED, Case, fast, write_rows
from tests.interrupting import LABELS, STEPS, VARIANTS, Setting, make_setting, same_adapter, stop_at


@dataclass(frozen=True)
class Trained:
    """One trained case: its base, its data, its adapter folder, what the run said."""

    case: Case
    base: Path
    data: DataSection
    folder: Path
    result: TrainResult

    def adapter(self) -> Adapter:
        return open_adapter(self.folder)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def trained(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each case, trained once for all tests of this module."""
    case: Case = request.param
    root = tmp_path_factory.mktemp("trained")
    base, data = tiny_model(case.family), case.write(root)
    apply(base, root / "adapter", PacaSpec(rank=4))
    result = train(root / "adapter", data, case.train_section(), task=case.spec())
    return Trained(case, base, data, root / "adapter", result)


@pytest.fixture(scope="module")
def plain(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The plain variant, for what does not depend on how one trains."""
    return make_setting(VARIANTS[0], tiny_model, tmp_path_factory.mktemp("plain"))


# --- every task


def test_the_loss_falls(trained: Trained) -> None:
    """On what it was trained on, after a few steps, for every task, format and shape of rows."""
    assert trained.result.after["loss"] < trained.result.before["loss"] - 0.01
    assert trained.result.steps == 10


def test_the_adapter_folder_holds_what_the_plan_says(trained: Trained) -> None:
    """The adapter file has the plan's tensors and no other; the base's weights are nowhere in the folder."""
    adapter = trained.adapter()
    stored = TensorFile(trained.folder / ADAPTER_FILE).infos
    assert set(stored) == adapter_names(adapter.plan)
    values = sum(torch.Size(i.shape).numel() for n, i in stored.items() if n.endswith((".values", ".whole")))
    assert values == adapter.plan.trained_values == trained.result.trained_values
    weights = {path.name for path in trained.folder.rglob("*.safetensors")}
    assert weights == {ADAPTER_FILE, STATE_FILE}
    has_head = TASKS[trained.case.task].has_head
    assert bool(adapter.plan.whole) == has_head


def test_every_planned_layer_moved(trained: Trained) -> None:
    """Training reached every target, and every head, that the plan names."""
    delta = trained.adapter().delta
    assert delta.moved == len(delta.plan.targets)
    fresh = load(trained.folder, trainable=True)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        *(f"{t.module}.paca_delta" for t in delta.plan.targets),
        *(w.parameter for w in delta.plan.whole),
    }


def test_the_merged_checkpoint_loads_as_what_it_was_trained_to_be(trained: Trained, tmp_path: Path) -> None:
    """`from_pretrained` finds every tensor under the task's own class, and the logits are the trained ones.

    What it does not expect is what the base had for another task: a merge loses no tensor.
    """
    export(trained.adapter(), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    former_head = "cls.predictions." if trained.case.family == "bert" else "lm_head."
    assert all(name.startswith(former_head) for name in info["unexpected_keys"])
    assert type(model).__name__ == trained.adapter().plan.architecture
    checks = verify(tmp_path / "merged")
    assert {check.result for check in checks.checks} == {"passed"}
    assert checks.max_logit_difference == 0


def test_heads_land_in_the_config(trained: Trained, tmp_path: Path) -> None:
    """Class names by id, the problem's type and the architecture; a language model's config stays as it was."""
    export(trained.adapter(), tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    base = json.loads((trained.base / "config.json").read_text())
    task = trained.case.task
    if not TASKS[task].has_head:
        assert merged == base
        return
    labels = {
        "labelled": ("animal", "person"),
        "pairs": ("0", "1"),
        "tagged": ("B", "O"),
        "scored": ("LABEL_0",),
    }[Path(trained.case.file).stem]
    assert merged["id2label"] == {str(n): label for n, label in enumerate(labels)}
    assert merged["label2id"] == {label: n for n, label in enumerate(labels)}
    kind = {"regression": "regression", "sequence-classification": "single_label_classification"}
    assert merged.get("problem_type") == kind.get(task)
    assert merged["architectures"] != base["architectures"]
    assert load_merged(tmp_path / "merged").config.num_labels == len(labels)


def test_the_metrics_are_the_merged_models_own(trained: Trained, tmp_path: Path) -> None:
    """Accuracy, F1, Matthews and Spearman as reported are those of the merged model, computed by hand, row by row."""
    if trained.case.task not in ("sequence-classification", "regression"):
        pytest.skip("rows of this task have no single label")
    export(trained.adapter(), tmp_path / "merged")
    model = load_merged(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = [[row[key] for key in ("text", "sentence1", "sentence2") if key in row] for row in trained.case.rows]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(*text, return_tensors="pt")).logits for text in texts])
    after = trained.result.after
    if trained.case.task == "regression":
        expected = {"spearman": spearmanr(logits[:, 0].numpy(), [row["label"] for row in trained.case.rows])[0]}
    else:
        ids = [model.config.label2id[str(row["label"])] for row in trained.case.rows]
        found = logits.argmax(-1).tolist()
        expected = {"accuracy": accuracy_score(ids, found), "f1": f1_score(ids, found)}
        expected["matthews_correlation"] = matthews_corrcoef(ids, found)
    # one row at a time rounds otherwise than a padded batch: near ties may swap their ranks
    tolerance = 1e-3 if trained.case.task == "regression" else 1e-9
    assert {name: after[name] for name in expected} == pytest.approx(expected, abs=tolerance)


def test_the_log_has_a_line_for_each_logged_step(trained: Trained) -> None:
    """`training_log.jsonl`: losses at 2, 4, .. 10, each line JSON with step, seconds and what was measured."""
    lines = [json.loads(line) for line in (trained.folder / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10]
    assert all({"step", "seconds"} <= set(line) for line in lines)
    assert [line["step"] for line in lines if "eval_loss" in line] == [10], "one evaluation, at the end"
    assert lines[-1]["step"] == 10


def test_checkpoints_hold_no_base(trained: Trained) -> None:
    """Beside optimizer, schedule and generators a checkpoint holds the trained values once, in fp32."""
    folder = trained.folder / CHECKPOINTS
    checkpoints = sorted(folder.glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-10", "checkpoint-9"]
    known = {STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    values_bytes = 4 * trained.result.trained_values
    for path in checkpoints:
        assert {entry.name for entry in path.iterdir()} == known
        header_bytes = 200 * (len(trained.adapter().delta.patches) + 4)
        assert values_bytes < (path / STATE_FILE).stat().st_size < values_bytes + header_bytes
        optimizer_bytes = (path / "optimizer.pt").stat().st_size
        assert 2 * values_bytes < optimizer_bytes < 2 * values_bytes + 2000 * (len(trained.adapter().delta.patches) + 4)
    assert json.loads((folder / RUN_FILE).read_text())["finished"] is True
    assert not list(folder.glob(".*"))


def test_a_finished_run_is_left_alone_with_resume_auto(trained: Trained) -> None:
    """Nothing is written, and the result is the first one's, which says so; the record holds what the run did."""
    before = digest_folder(trained.folder)
    again = train(trained.folder, trained.data, trained.case.train_section(), task=trained.case.spec(), resume="auto")
    assert digest_folder(trained.folder) == before
    assert again == replace(trained.result, was_finished=True)
    assert not trained.result.was_finished
    assert "was_finished" not in trained.adapter().record.manifest.training


# --- labels


def classify(folder: Path, path: Path, *labels: str, **options: Any) -> TrainResult:
    """Train a classifier on a file of rows."""
    task = TaskSpec("sequence-classification", labels)
    return train(folder, DataSection(train=[str(path)], max_length=64), fast(max_steps=3), task=task, **options)


def test_labels_make_a_fresh_adapters_head_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As long as nothing was trained, the task and its classes can still be chosen, in the order given."""
    rows = write_rows(tmp_path / "rows.jsonl", LABELLED)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    classify(tmp_path / "adapter", rows, "person", "animal", "ghost")
    plan = open_adapter(tmp_path / "adapter").plan
    assert plan.config["id2label"] == {"0": "person", "1": "animal", "2": "ghost"}
    assert {w.parameter: w.shape for w in plan.whole}["classifier.weight"][0] == 3


def test_a_trained_adapter_keeps_its_labels(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Other classes, another order or another task are refused; the same ones go on."""
    rows = write_rows(tmp_path / "rows.jsonl", LABELLED)
    folder = tmp_path / "adapter"
    apply(tiny_model("bert"), folder, PacaSpec(rank=4))
    classify(folder, rows)
    before = digest_folder(folder)
    for labels in (("person", "animal"), ("animal", "person", "ghost")):
        with pytest.raises(RequestError, match=r"as trained so far\. Apply again"):
            classify(folder, rows, *labels)
    with pytest.raises(RequestError, match="as trained so far"):
        train(folder, DataSection(train=[str(rows)]), fast(), task=TaskSpec("regression"))
    assert digest_folder(folder) == before
    classify(folder, rows, "animal", "person")
    assert digest_folder(folder) != before


def test_a_label_outside_the_given_ones_is_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    """With file and line."""
    rows = write_rows(tmp_path / "rows.jsonl", LABELLED)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    with pytest.raises(DataError, match=r"rows\.jsonl.*'animal'"):
        classify(tmp_path / "adapter", rows, "person", "ghost")


def test_more_than_ten_classes_keep_their_order(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Class 10 comes after class 9: the second run is asked for the very classes of the first."""
    names = [f"class {n:02}" for n in range(12)]
    rows = [{"text": f"the {animal}", "label": name} for animal, name in zip(ANIMALS * 2, names, strict=True)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    classify(tmp_path / "adapter", path)
    classify(tmp_path / "adapter", path, *names)


def test_a_task_that_the_model_cannot_have_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A T5 has no masked head to tag with in this form; a base model has no task of its own."""
    path = write_rows(tmp_path / "rows.jsonl", [{"source": "a b", "target": "b a"}] * 8)
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    with pytest.raises(UnsupportedError, match="no seq2seq model for llama"):
        train(tmp_path / "adapter", DataSection(train=[str(path)]), fast(), task=TaskSpec("seq2seq"))
    apply(tiny_model("bert"), tmp_path / "bert", PacaSpec(rank=4))
    with pytest.raises(RequestError, match=r"BertForMaskedLM has no task of its own.*sequence-classification"):
        train(tmp_path / "bert", DataSection(train=[str(path)]), fast())


# --- dtypes


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("index", (0, 6, 11))
def test_sixteen_bit_bases_train_and_merge(
    dtype: torch.dtype, index: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Their dtype stays in the merged checkpoint, where every planned layer differs from the base."""
    case = CASES[index]
    base, data = tiny_model(case.family, dtype=dtype), case.write(tmp_path)
    apply(base, tmp_path / "adapter", PacaSpec(rank=4))
    result = train(tmp_path / "adapter", data, case.train_section(), task=case.spec())
    assert result.after["loss"] < result.before["loss"]
    adapter = open_adapter(tmp_path / "adapter")
    assert adapter.delta.moved == len(adapter.plan.targets)
    export(adapter, tmp_path / "merged")
    dtypes = {info.dtype for name, info in Checkpoint.open(tmp_path / "merged").items()}
    assert dtypes == {"BF16" if dtype == torch.bfloat16 else "F16"}
    assert verify(tmp_path / "merged").max_logit_difference == 0


def test_a_base_of_mixed_dtypes_trains_and_merges(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each tensor keeps the dtype that it has in the base."""
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "mixed"))
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    kinds = {"mlp": torch.bfloat16, "q_proj": torch.float16}
    mixed = {n: t.to(next((k for part, k in kinds.items() if part in n), torch.float32)) for n, t in tensors.items()}
    safetensors.torch.save_file(mixed, base / "model.safetensors", {"format": "pt"})
    data = CASES[0].write(tmp_path)
    apply(base, tmp_path / "adapter", PacaSpec(rank=4))
    result = train(tmp_path / "adapter", data, fast())
    assert result.after["loss"] < result.before["loss"]
    export(open_adapter(tmp_path / "adapter"), tmp_path / "merged")
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "merged")
    assert {n: i.dtype for n, i in after.items()} == {n: i.dtype for n, i in before.items()}
    assert verify(tmp_path / "merged", numeric=False)


# --- evaluation and early stopping


def test_early_stopping_keeps_the_best_state(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The run ends early, and what the adapter holds is the evaluation with the smallest loss, not the last."""
    data = LABELS.write(tmp_path)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    settings = fast(max_steps=40, eval_steps=1, early_stopping_patience=2, learning_rate=0.3)
    result = train(tmp_path / "adapter", data, settings, task=LABELS.spec())
    lines = [json.loads(line) for line in (tmp_path / "adapter" / LOG_FILE).read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert result.steps < 40
    best = min(losses.values())
    assert result.after["loss"] == best
    assert losses[result.steps] > best


def test_patience_that_is_spent_stays_spent(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted one evaluation before early stopping ends it, a resumed run ends where the whole one does."""
    early = make_setting(VARIANTS[-1], tiny_model, tmp_path)
    assert early.result.steps < early.variant.settings["max_steps"]
    folder = early.copy(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, early.result.steps - 1, how="SIGTERM")
        with pytest.raises(InterruptedRunError):
            early.run(folder)
    assert early.run(folder, resume="auto").steps == early.result.steps
    assert same_adapter(folder, early.whole)


def test_early_stopping_needs_data_to_evaluate_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The error names the key."""
    data = CASES[0].write(tmp_path).model_copy(update={"eval": []})
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    with pytest.raises(RecipeError, match=r"train\.early_stopping_patience: no evaluation data"):
        train(tmp_path / "adapter", data, fast(early_stopping_patience=2))


def test_a_checkpoint_interval_of_its_own_is_refused_beside_early_stopping(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """It would be ignored: what is kept in the end is a checkpoint of an evaluation. The same interval is none."""
    data = LABELS.write(tmp_path)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    stopping: dict[str, Any] = {"early_stopping_patience": 9, "max_steps": 6, "eval_on_start": False}
    wanted = r"train\.save_steps: 4 with early stopping.*expected 2, as train\.eval_steps\. Leave train\.save_steps out"
    with pytest.raises(RecipeError, match=wanted) as caught:
        train(tmp_path / "adapter", data, fast(**stopping, save_steps=4, eval_steps=2), task=LABELS.spec())
    assert caught.value.exit_code == 2
    assert not (tmp_path / "adapter" / CHECKPOINTS).exists()
    for given in ({"save_steps": 2, "eval_steps": 2}, {"save_steps": 2}, {"eval_steps": 2}):
        train(tmp_path / "adapter", data, fast(**stopping, **given), task=LABELS.spec())
        lines = [json.loads(line) for line in (tmp_path / "adapter" / LOG_FILE).read_text().splitlines()]
        assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6]


def test_a_metric_that_the_task_has_not_is_refused_before_training(tiny_model: TinyModel, tmp_path: Path) -> None:
    """With the nearest one; nothing was trained for it."""
    data = LABELS.write(tmp_path)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    settings = fast(early_stopping_patience=2, metric_for_best="acuracy", eval_on_start=False)
    with pytest.raises(RecipeError, match=r"train\.metric_for_best.*'acuracy'.*'accuracy'"):
        train(tmp_path / "adapter", data, settings, task=LABELS.spec())
    assert not (tmp_path / "adapter" / CHECKPOINTS).exists()


def test_what_is_evaluated_is_the_evaluation_data(tiny_model: TinyModel, tmp_path: Path) -> None:
    """On the same texts with the labels turned over, each guess that was right is wrong."""
    other = {"animal": "person", "person": "animal"}
    rows = write_rows(tmp_path / "rows.jsonl", LABELLED)
    turned = write_rows(tmp_path / "turned.jsonl", [{**row, "label": other[str(row["label"])]} for row in LABELLED])
    found = []
    for held in (rows, turned):
        apply(tiny_model("bert"), tmp_path / held.stem, PacaSpec(rank=4))
        data = DataSection(train=[str(rows)], eval=[str(held)], max_length=64)
        found.append(train(tmp_path / held.stem, data, fast(), task=LABELS.spec()).after["accuracy"])
    assert found[0] > 0.5
    assert sum(found) == pytest.approx(1)


def test_held_out_rows_are_evaluated(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`eval_fraction` takes them from the training rows; without either nothing is evaluated."""
    path = write_rows(tmp_path / "rows.jsonl", LABELLED)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    section = DataSection(train=[str(path)], eval_fraction=0.25)
    task = LABELS.spec()
    result = train(tmp_path / "adapter", section, fast(eval_on_start=False), task=task)
    assert result.before == {}
    assert set(result.after) == {"loss", "accuracy", "f1", "matthews_correlation"}
    assert "eval: 9 rows" in " ".join(result.data)
    second = train(tmp_path / "adapter", DataSection(train=[str(path)]), fast(), task=task)
    assert (second.before, second.after) == ({}, {})


# --- what goes wrong


def test_data_without_loss_tokens_are_an_error(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every answer lies behind the limit of length: nothing is trained, the folder is as it was."""
    rows = [{"prompt": "a question " * 30, "completion": "yes"}] * 4
    path = write_rows(tmp_path / "rows.jsonl", rows)
    apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4))
    before = digest_folder(tmp_path / "adapter")
    with pytest.raises(DataError, match="no token that carries loss"):
        train(tmp_path / "adapter", DataSection(train=[str(path)], max_length=16), fast())
    assert digest_folder(tmp_path / "adapter") == before


@pytest.mark.parametrize("index", (0, 6))
def test_a_run_that_diverges_says_so_and_changes_nothing(index: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    """A loss that is no number ends the run with exit code 3 at the step it shows; the adapter keeps its old state."""
    case = CASES[index]
    data = case.write(tmp_path)
    task = TaskSpec(case.task, ("animal", "person") if index else ())
    apply(tiny_model(case.family), tmp_path / "adapter", PacaSpec(rank=4), task=task)
    before = (tmp_path / "adapter" / ADAPTER_FILE).read_bytes()
    with pytest.raises(CheckError, match=r"(?i)not finite.*learning rate") as caught:
        train(tmp_path / "adapter", data, fast(learning_rate=1e38, max_steps=50), task=case.spec())
    assert caught.value.exit_code == 3
    assert (tmp_path / "adapter" / ADAPTER_FILE).read_bytes() == before
    open_adapter(tmp_path / "adapter")
    result = train(tmp_path / "adapter", data, fast(), task=case.spec(), overwrite=True)
    assert result.after["loss"] < result.before["loss"]


def test_a_changed_base_is_refused(plain: Setting, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Another base of the same shape under the recorded name, or none: exit code 4, nothing written."""
    folder = plain.copy(tmp_path)
    with pytest.raises(BaseMismatchError) as caught:
        plain.run(folder, base=tiny_model("llama", seed=1))
    assert caught.value.exit_code == 4
    assert same_adapter(folder, plain.fresh)
    record = json.loads((folder / "surgery.json").read_text())
    record["manifest"]["base"]["path"] = "nowhere"
    (folder / "surgery.json").write_text(json.dumps(record))
    with pytest.raises(BaseMismatchError, match=r"'nowhere' is not there.*--base"):
        plain.run(folder)
    assert same_adapter(folder, plain.fresh)


def test_a_folder_without_a_tokenizer_is_refused(plain: Setting, tmp_path: Path) -> None:
    """Text cannot be read without one."""
    folder = plain.copy(tmp_path)
    for path in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        path.unlink()
    with pytest.raises(RequestError, match="tokenizer does not load"):
        plain.run(folder)


def test_a_cuda_device_that_is_not_there_is_unsupported(plain: Setting, tmp_path: Path) -> None:
    """Exit code 5, before anything is read."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UnsupportedError, match="--device cuda"):
        train(plain.copy(tmp_path), plain.data, fast(device="cuda"))


@pytest.mark.parametrize("disabled", ("0", "1"))
def test_without_a_terminal_progress_is_a_line_now_and_then(
    disabled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At most one in 30 seconds, with the loss once there is one, and one at the end; none where bars are disabled."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(sys.modules[Progress.__module__], "time", clock)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    state, progress = SimpleNamespace(global_step=0, max_steps=120), Progress()
    progress.on_log(None, state, None, {"eval_loss": 1.0})
    progress.on_train_begin(None, state, None)
    for step in range(1, 101):
        state.global_step, clock.now = step, 1000 + step
        progress.on_step_end(None, state, None)
        if step % 40 == 0:
            progress.on_log(None, state, None, {"loss": step / 1000})
    progress.on_train_end(None, state, None)
    lines = ["step 30/120", "step 60/120, loss 0.0400", "step 90/120, loss 0.0800", "step 100/120, loss 0.0800"]
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.splitlines() == (lines if disabled == "0" else [])


@pytest.mark.parametrize("disabled", ("0", "1"))
def test_on_a_terminal_progress_is_a_bar(
    disabled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no line; nothing at all where bars are disabled."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TQDM_DISABLE", disabled)
    state, progress = SimpleNamespace(global_step=0, max_steps=2), Progress()
    progress.on_train_begin(None, state, None)
    state.global_step = 2
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, {"loss": 0.5})
    progress.on_train_end(None, state, None)
    err = capsys.readouterr().err
    assert ("2/2" in err, "loss=0.5000" in err) == (disabled == "0", disabled == "0")
    assert "step 2/2" not in err


def test_every_setting_reaches_the_trainer(tmp_path: Path) -> None:
    """None of them is left at the trainer's default."""
    same = {
        "learning_rate": 0.5, "warmup_steps": 3, "weight_decay": 0.25, "max_grad_norm": 0.75, "adam_beta1": 0.5,
        "adam_beta2": 0.625, "adam_epsilon": 1e-3, "seed": 5, "logging_steps": 2, "eval_steps": 6, "save_steps": 4,
    }  # fmt: skip
    renamed = {"batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size"}
    renamed |= {"gradient_accumulation": "gradient_accumulation_steps", "lr_scheduler": "lr_scheduler_type"}
    given = {**same, "batch_size": 3, "eval_batch_size": 5, "gradient_accumulation": 4, "lr_scheduler": "constant"}
    section = TrainSection.model_validate({**given, "gradient_checkpointing": True})
    made = training_arguments(section, folder=tmp_path, device="cpu", autocast="fp32", steps=7, has_eval=True)
    assert {key: getattr(made, renamed.get(key, key)) for key in given} == given
    assert (made.max_steps, made.data_seed) == (7, 5)
    assert getattr(made, checkpointing_name(type(made))) is True


def test_who_is_asked_while_the_ranks_agree_stops_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes after this rank's vote, and before the others' is known, is not forgotten."""
    interruption, control = Interruption(), SimpleNamespace(should_save=False, should_training_stop=False)
    stop = StopWhenAsked(interruption)

    def agree(vote: bool) -> bool:
        interruption.requested = True
        return vote

    monkeypatch.setattr("surgery.trainer.any_rank", agree)
    arguments = SimpleNamespace(load_best_model_at_end=True)
    stop.on_step_end(arguments, None, control)
    assert (interruption.requested, control.should_training_stop) == (True, False)
    stop.on_step_end(arguments, None, control)
    assert (control.should_save, control.should_training_stop) == (True, True)


def test_signals_are_given_back(plain: Setting, tmp_path: Path) -> None:
    """After a run, a signal does what it did before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    plain.run(plain.copy(tmp_path))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_same_run_twice_gives_the_same_bytes(plain: Setting, tmp_path: Path) -> None:
    """And another seed gives others."""
    folder = plain.copy(tmp_path)
    plain.run(folder)
    assert same_adapter(folder, plain.whole)
    shutil.rmtree(folder)
    train(plain.copy(tmp_path), plain.data, fast(**STEPS, seed=1))
    assert not same_adapter(folder, plain.whole)


def test_epochs_count_the_last_smaller_batch(tiny_model: TinyModel, tmp_path: Path) -> None:
    """36 rows, 8 a batch, 2 batches a step: 5 batches, 3 steps an epoch."""
    path = write_rows(tmp_path / "rows.csv", SCORED)
    apply(tiny_model("bert"), tmp_path / "adapter", PacaSpec(rank=4))
    settings = fast(max_steps=None, epochs=2, gradient_accumulation=2)
    result = train(tmp_path / "adapter", DataSection(train=[str(path)]), settings, task=TaskSpec("regression"))
    assert result.steps == 6
    lines = [json.loads(line) for line in (tmp_path / "adapter" / LOG_FILE).read_text().splitlines()]
    assert lines[-1]["epoch"] == 2
