"""The command `surgery eval`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surgery.cli_eval import eval_command
from surgery.errors import RequestError
from surgery.evals.harness import metrics_of
from surgery.evals.run import evaluate
from surgery.evals.scores import Metric, Part
from surgery.evals.task import EvalSpec
from surgery.tensorfile import file_sha256
from surgery.workflow import export_checkpoint
from tests.console import Console
from tests.evaluated import BIG, spec_of, write_data
from tests.examples import write_rows
from tests.tiny import FAMILIES, build_model, build_tokenizer, draw_parameters

# --- the command


@pytest.fixture
def run(console: Console) -> Console:
    """`surgery eval`."""
    return partial(console, "eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as files."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and a classifier with a head for three classes."""
    folder = tmp_path_factory.mktemp("models")
    named = {
        "llama": build_model("llama", overrides=BIG["llama"]),
        "three": with_head("BertForSequenceClassification", num_labels=3),
        "two": with_head("BertForSequenceClassification", num_labels=2),
        "number": with_head("BertForSequenceClassification", num_labels=1),
        "features": build_model("bert"),
    }
    for name, model in named.items():
        model.save_pretrained(folder / name)
        build_tokenizer("decoder" if name == "llama" else "pair").save_pretrained(folder / name)
    return folder


def with_head(class_name: str, **fields: Any) -> Any:
    """A tiny BERT under another class."""
    config = transformers.BertConfig(**{**FAMILIES["bert"].fields, **fields, "pad_token_id": 0})
    model = getattr(transformers, class_name)(config)
    draw_parameters(model, seed=0)
    return model.eval()


def test_the_command_shows_a_table_and_writes_the_whole(run: Console, models: Path, data: Path, tmp_path: Path) -> None:
    """A table for people; as JSON everything that it takes to get the score again."""
    given = [models / "two", "--task", "glue/mrpc", "--data", data / "mrpc.jsonl", "--limit", 9, "--batch", 2]
    code, shown, said = run(*given, "-o", tmp_path / "found.json")
    assert (code, said) == (0, "")
    document = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    value, error = (document["metrics"]["accuracy"][name] for name in ("value", "standard_error"))
    assert f"{value:.4f} +- {error:.4f}" in shown
    assert "glue/mrpc: " in shown
    assert "9 rows" in shown
    assert document["rows"] == 9
    assert document["settings"] == {"answers": "the head's classes", "batch": 2, "limit": 9}
    assert document["data"] == {str(data / "mrpc.jsonl"): file_sha256(data / "mrpc.jsonl")}
    assert document["model_sha256"] == file_sha256(models / "two" / "config.json")
    assert document["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    again = run(*given, "--json")
    assert {**json.loads(again[1]), "seconds": 0} == {**document, "seconds": 0}
    assert run(*given, "-o", tmp_path / "found.json")[0] == 2
    assert run(*given, "-o", tmp_path / "found.json", "--overwrite")[0] == 0


def test_what_was_asked_has_a_digest(models: Path, data: Path) -> None:
    """Another row, another shot or another right answer is another digest; another model is not."""
    plain = spec_of("mmlu", data, shots=None, shots_data=())
    digests = [
        evaluate(str(models / "llama"), spec).asked_sha256
        for spec in (plain, replace(plain, limit=23), replace(plain, shots=1, shots_data=(str(data / "mmlu.jsonl"),)))
    ]
    assert len({*digests}) == 3
    assert evaluate(str(models / "llama"), plain).asked_sha256 == digests[0]


def test_every_option_reaches_its_place(run: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification holds what was said on the command line, under the same names."""
    seen: list[tuple[str, EvalSpec]] = []

    def seeing(model: str, spec: EvalSpec) -> None:
        seen.append((model, spec))
        raise RequestError("x", "seen")

    monkeypatch.setattr("surgery.evals.run.evaluate", seeing)
    line = (
        "--task mmlu --data a --data b --shots-data c --shots 3 --limit 4 --column question=q --column answer=1"
        " --batch 5 --max-new-tokens 6 --device cpu --base d --tasks-folder e --overwrite --json"
    )
    assert run(tmp_path, *line.split(), "-o", tmp_path / "f")[0] == 2
    columns = {"question": "q", "answer": "1"}
    wanted = EvalSpec("mmlu", ("a", "b"), ("c",), 3, 4, 5, 6, columns, "cpu", "d", Path("e"))
    assert seen == [(str(tmp_path), wanted)]
    known = {option for parameter in eval_command.params for option in parameter.opts if option.startswith("--")}
    assert known - {"--out"} == {word for word in line.split() if word.startswith("--")}


ERRORS: tuple[tuple[Sequence[str], int, str], ...] = (
    (("llama", "--task", "mmul", "--data", "mmlu.jsonl"), 2, "unknown name 'mmul', expected one of mmlu, gsm8k"),
    (("llama", "--task", "mmul", "--data", "mmlu.jsonl"), 2, "The closest is 'mmlu'"),
    (("llama", "--task", "glue/sst-2", "--data", "sst2.jsonl"), 2, "The closest is 'glue/sst2'"),
    (("llama", "--task", "mmlu"), 2, "--data: nothing, expected the rows of mmlu"),
    (("llama", "--task", "mmlu", "--data", "mlu.jsonl"), 2, "The closest is 'mmlu.jsonl'"),
    (("llama", "--task", "mmlu", "--data", "gsm8k.jsonl"), 2, "expected columns for causal-lm: mmlu (quest"),
    (("llama", "--task", "mmlu", "--data", "empty.jsonl"), 2, "found no rows"),
    (("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--shots", "5"), 2, "expected --shots-data with rows"),
    (
        ("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--shots", "9", "--shots-data", "mmlu.jsonl"),
        2, "8 rows of the subject 'anatomy', expected 9 or more in --shots-data",
    ),
    (
        ("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--shots", "0", "--shots-data", "mmlu.jsonl"),
        2, "given with --shots 0",
    ),
    (
        ("llama", "--task", "gsm8k", "--data", "gsm8k.jsonl", "--shots", "9", "--shots-data", "gsm8k.jsonl"),
        2, "6 rows in --shots-data, expected 9 or more",
    ),
    (("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--shots", "-1"), 2, "--shots: -1, expected 0 or more"),
    (("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--limit", "0"), 2, "--limit: 0, expected 1 or more"),
    (("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--batch", "0"), 2, "--batch: 0, expected 1 or more"),
    (("llama", "--task", "mmlu", "--data", "mmlu.jsonl", "--max-new-tokens", "9"), 2, "given for mmlu, which has none"),
    (("llama", "--task", "gsm8k", "--data", "gsm8k.jsonl", "--batch", "9"), 2, "given for gsm8k, which has none"),
    (("two", "--task", "glue/sst2", "--data", "sst2.jsonl", "--shots", "1"), 2, "given for glue/sst2, which has none"),
    (("two", "--task", "glue/sst2", "--data", "sst2.jsonl", "--tasks-folder", "x"), 2, "--task lm-eval:NAME with it"),
    (("two", "--task", "glue/sst2", "--data", "sst2.jsonl", "--column", "x"), 2, "expected ROLE=COLUMN"),
    (("two", "--task", "glue/sst2", "--data", "sst2.jsonl", "--column", "sentnce=a"), 2, "The closest is 'sentence'"),
    (("two", "--task", "glue/sst2", "--data", "unlabelled.jsonl"), 2, "GLUE's test sets have no labels"),
    (("two", "--task", "glue/sst2", "--data", "sst2.jsonl", "--base", "x"), 2, "given for a folder that is no adapter"),
    (("two", "--task", "glue/sst2", "--data", "sst2.jsonl", "--device", "tpu"), 2, "expected one of auto, cpu, cuda"),
    (("nothing", "--task", "mmlu", "--data", "mmlu.jsonl"), 2, "no such folder"),
    (("two", "--task", "mmlu", "--data", "mmlu.jsonl"), 5, "a classifier, expected a decoder or encoder-decoder"),
    (("llama", "--task", "glue/sst2", "--data", "sst2.jsonl"), 5, "lm-eval:NAME hands decoders to lm-eval"),
    (("features", "--task", "glue/sst2", "--data", "sst2.jsonl"), 5, "fills masks"),
    (("three", "--task", "glue/sst2", "--data", "sst2.jsonl"), 5, "a head for LABEL_0, LABEL_1, LABEL_2, expected one"),
    (("number", "--task", "glue/sst2", "--data", "sst2.jsonl"), 5, "a head for a number, expected one for negative"),
    (("two", "--task", "glue/stsb", "--data", "stsb.jsonl"), 5, "expected one for a number (regression)"),
    (("two", "--task", "lm-eval:x", "--data", "sst2.jsonl"), 2, "--data: given for a task of lm-eval's"),
)  # fmt: skip


@pytest.mark.parametrize(("given", "code", "wanted"), ERRORS)
def test_what_cannot_be_scored_is_refused(
    given: Sequence[str], code: int, wanted: str, run: Console, models: Path, data: Path, tmp_path: Path
) -> None:
    """One line with what was found and expected, and the documented code; nothing is written."""
    (data / "empty.jsonl").write_text("\n", encoding="utf-8")
    write_rows(data / "unlabelled.jsonl", [{"sentence": "a", "label": -1}])
    files = [str(data / word) if word.endswith(".jsonl") else word for word in given[1:]]
    found, shown, said = run(models / given[0], *files, "-o", tmp_path / "out.json")
    assert (found, shown) == (code, "")
    assert wanted in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_a_graph_of_another_task_is_refused(run: Console, models: Path, data: Path, tmp_path: Path) -> None:
    """A classifier's graph says no letters; a graph takes no device and no base; lm-eval runs none."""
    export_checkpoint(str(models / "two"), tmp_path / "graph")
    folder, rows = tmp_path / "graph", ("--data", data / "mmlu.jsonl")
    code, _, said = run(folder, "--task", "mmlu", *rows)
    assert (code, "a classifier, expected a decoder or encoder-decoder" in said) == (5, True)
    for option, value in (("--device", "cuda"), ("--base", "x")):
        code, _, said = run(folder, "--task", "glue/sst2", "--data", data / "sst2.jsonl", option, value)
        assert (code, f"{option}: given for an ONNX folder" in said) == (2, True)


def test_lm_eval_is_an_extra(run: Console, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the message says what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, said = run(models / "llama", "--task", "lm-eval:arc_easy")
    assert code == 5
    assert "lm_eval is not installed, expected the extra eval. pip install 'checkpoint-surgery[eval]'." in said


def test_lm_eval_s_results_are_read() -> None:
    """A task's metrics with their errors, and those of the tasks of a group."""
    found = {
        "results": {
            "all": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "all"},
            "one": {"acc,none": 0.25, "acc_stderr,none": "N/A", "exact_match,strict": 1, "sample_len": 4},
        },
        "n-samples": {"one": {"original": 10, "effective": 4}, "two": {"original": 10, "effective": 6}},
    }
    metrics, parts, rows = metrics_of(found)
    assert metrics == {"acc": Metric(0.5, 0.1)}
    assert parts == (Part("task", "one", 4, {"acc": Metric(0.25, None), "exact_match (strict)": Metric(1.0, None)}),)
    assert rows == 4
