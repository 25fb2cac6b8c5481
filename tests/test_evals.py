"""`surgery eval`: scores that were worked out by hand, and one score whichever way a model is run."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from surgery.errors import DataError, RequestError, SurgeryError, UnsupportedError
from surgery.evals import gsm8k, mmlu
from surgery.evals.glue import class_order
from surgery.evals.run import TASKS, EvalResult, evaluate
from surgery.evals.scorer import (
    Array,
    Scorer,
    Tokens,
    answers_after,
    log_likelihood,
    next_token_likelihoods,
    score_rows,
)
from surgery.evals.scores import mean, mean_of_means, parts_by, resampled
from surgery.evals.task import EvalSpec, read_items
from surgery.glue import GLUE
from surgery.methods.paca import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.survey import TaskSpec
from surgery.workflow import export, export_checkpoint
from tests.conftest import TinyModel
from tests.examples import mostly_long, write_rows
from tests.tiny import build_model, build_tokenizer
from tests.trained import make_adapter, make_read_adapter

Row = Mapping[str, Any]

ANIMALS = ("fox", "dog", "hen", "cow")
QUESTIONS = tuple(
    {
        "question": f"Which is {'the' if n % 3 else 'a quick brown'} {ANIMALS[n % 4]}?",
        "choices": list(ANIMALS),
        "answer": n % 4,
        "subject": ("anatomy", "virology", "astronomy")[n % 3],
    }
    for n in range(24)
)
SUMS = tuple({"question": f"{n} and 2?", "answer": f"It is {n} + 2.\n#### {n + 2}"} for n in range(6))
SENTENCES = tuple(
    {"sentence": f"{'a user' if n % 2 else 'the quick fox'} {'so ' * n}asks", "label": n % 2} for n in range(17)
)
PAIRS = tuple({"sentence1": "the fox " * (1 + n % 4), "sentence2": ANIMALS[n % 4], "label": n % 2} for n in range(17))
SIMILAR = tuple({**row, "label": (n % 6) - 0.25 * (n % 6 == 5)} for n, row in enumerate(PAIRS))


# --- numbers worked out by hand


def fake_scorer(kind: str, score: Callable[..., Array], **changed: Any) -> Scorer:
    """A model whose numbers are known: characters are tokens, <bos> is 1 in front."""
    known: dict[str, Any] = {
        "kind": kind,
        "runtime": "fake",
        "classes": (),
        "positions": None,
        "encode": lambda text, pair: Tokens((1, *map(ord, text + (pair or "")))),
        "pieces": lambda text: [ord(character) for character in text],
        "answer": lambda text: [ord(character) for character in text],
        "score": score,
        "write": lambda prompt, tokens: ("", "end"),
    }
    return Scorer(**{**known, **changed})


def text_of(tokens: Tokens) -> str:
    """What a fake model reads, without its <bos>."""
    assert tokens.ids[0] == 1
    return "".join(map(chr, tokens.ids[1:]))


def answering(letters: Mapping[str, str], read: list[str]) -> Scorer:
    """A decoder that says, for a question with a certain word, a certain letter; what it reads is kept in `read`."""

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        said = ["".join(map(chr, answer)) for answer in answers]
        found = []
        for row in rows:
            text = text_of(row)
            read.append(text)
            last = text.rsplit("\n\n", 1)[-1]
            letter = next(letter for word, letter in letters.items() if word in last)
            found.append([1.0 if option == letter else 0.0 for option in said])
        return np.asarray(found)

    return fake_scorer("decoder", score)


def question(subject: str, word: str, answer: str, choices: Sequence[str] = ("w", "x", "y", "z")) -> Row:
    return {"subject": subject, "question": word, "choices": list(choices), "answer": answer}


def scores_of(
    scorer: Scorer, folder: Path, task: str, rows: Sequence[Row], solved: Sequence[Row] = (), **spec: Any
) -> Any:
    """What a task makes of a model on these rows."""
    data = write_rows(folder / "data.jsonl", rows)
    shots = (str(write_rows(folder / "shots.jsonl", solved)),) if solved else ()
    asked = EvalSpec(task, (str(data),), shots, **spec)
    known = TASKS[task]
    read = read_items(known, asked.data, asked, limit=asked.limit)
    return known.score(scorer, read, read_items(known, shots, asked, limit=None), asked)


def test_mmlu_asks_as_the_paper_does(tmp_path: Path) -> None:
    """A header with the subject, solved questions of that subject in the file's order, the question; then a letter."""
    read: list[str] = []
    solved = [
        question("moral_disputes", "one?", "C"),
        question("virology", "not this", "A"),
        question("moral_disputes", "two?", "B"),
        question("moral_disputes", "three?", "A"),
    ]
    rows = [question("moral_disputes", " who? ", "D", ("p", "q", "r", "s"))]
    scores_of(answering({"who": "D"}, read), tmp_path, "mmlu", rows, solved, shots=2)
    assert read == [
        "The following are multiple choice questions (with answers) about moral disputes.\n\n"
        "one?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n"
        "two?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "who?\nA. p\nB. q\nC. r\nD. s\nAnswer:"
        " "  # the fake tokenizer has no token for " A": what the letters have in common is read first
    ]


def test_mmlu_counts_right_letters(tmp_path: Path) -> None:
    """Accuracy over all rows, over subjects and by subject and category, with the errors that a book gives."""
    rows = [
        *(question("anatomy", "fox", "A") for _ in range(3)),
        question("anatomy", "dog", "A"),
        question("virology", "dog", "B"),
        question("astronomy", "fox", "B"),
        question("astronomy", "fox", "A"),
    ]
    found = scores_of(answering({"fox": "A", "dog": "B"}, []), tmp_path, "mmlu", rows)
    assert found.metrics["accuracy"].value == 5 / 7
    assert found.metrics["accuracy"].standard_error == pytest.approx(math.sqrt(5 / 7 * 2 / 7 / 6))
    assert found.metrics["macro_accuracy"].value == pytest.approx((0.75 + 1 + 0.5) / 3)
    shown = {(part.kind, part.name): (part.rows, part.metrics["accuracy"].value) for part in found.parts}
    assert shown == {
        ("category", "other"): (5, 0.8),
        ("category", "STEM"): (2, 0.5),
        ("subject", "anatomy"): (4, 0.75),
        ("subject", "virology"): (1, 1.0),
        ("subject", "astronomy"): (2, 0.5),
    }


def test_a_letter_that_a_question_does_not_have_is_not_chosen(tmp_path: Path) -> None:
    """Of two choices the model can say A or B only, though other questions have more."""

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        return np.asarray([np.arange(len(answers), dtype=float)] * len(rows))  # the later the letter, the likelier

    rows = [question("anatomy", "q", "B", ("x", "y")), question("anatomy", "q", "D")]
    found = scores_of(fake_scorer("decoder", score), tmp_path, "mmlu", rows)
    assert found.metrics["accuracy"].value == 1.0


def test_prompts_that_do_not_fit_lose_shots_from_the_front(tmp_path: Path) -> None:
    """One at a time, counted and said; without shots the beginning goes, since the question stands at the end."""
    read: list[str] = []
    scorer = answering({"fox": "A"}, read)
    solved = [question("anatomy", f"solved {n}", "A") for n in range(3)]
    whole = scores_of(scorer, tmp_path, "mmlu", [question("anatomy", "fox", "A")], solved, shots=3)
    (text,) = read
    small = Scorer(**{**vars(scorer), "positions": len(text)})  # one token, <bos>, too few
    read.clear()
    cut = scores_of(small, tmp_path, "mmlu", [question("anatomy", "fox", "A")], solved, shots=3)
    assert whole.notes == ()
    assert cut.notes == ("1 of 1 prompt did not fit the model's positions and lost shots, 1 in all",)
    assert "solved 0" not in read[0]
    assert "solved 1" in read[0]
    tiny = Scorer(**{**vars(answering({"Answer:": "A"}, read)), "positions": 16})
    read.clear()
    left = scores_of(tiny, tmp_path, "mmlu", [question("anatomy", "fox", "A")], solved, shots=3)
    assert read == ["y\nD. z\nAnswer: "]
    assert left.notes[0].endswith("lost shots, 3 in all")
    assert left.notes[1] == "1 prompt did not fit even without shots: their beginning was cut off"


@pytest.mark.parametrize(
    ("text", "number"),
    (
        ("It is 3 + 4 = <<3+4=7>>7.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $1,234.50", Decimal("1234.5")),
        ("#### -3\n", -3),
        ("so 12 then 15.", 15),
        ("#### 7\n\nQuestion: and 9?\nAnswer: #### 11", 7),
        ("It is 7\n\nQuestion: and 9?", 7),
        ("#### 5 of 6", 5),
        ("#### none, but 3 before", 3),
        ("3 ####", None),
        ("no number", None),
        ("", None),
        ("18.00", 18),
        (".5", Decimal("0.5")),
    ),
)
def test_the_number_that_a_solution_ends_in(text: str, number: object) -> None:
    """After #### or the last one; commas, signs and decimals; what follows as another question does not count."""
    assert gsm8k.final_number(text) == number


def test_gsm8k_counts_right_numbers(tmp_path: Path) -> None:
    """Solved examples before the question, the answer compared as a number; what is missing is said."""
    read: list[str] = []
    said = {"0 and": "2.0", "1 and": "it is 4\n#### 3", "2 and": "none", "3 and": "#### 6"}

    def write(prompt: str, tokens: int) -> tuple[str, str]:
        read.append(prompt)
        return next(text for word, text in said.items() if word in prompt.rsplit("\n\n", 1)[-1]), "max-new-tokens"

    scorer = fake_scorer("decoder", lambda rows, answers: np.zeros((1, 1)), write=write)
    found = scores_of(scorer, tmp_path, "gsm8k", SUMS[:4], SUMS[4:], shots=1)
    assert found.metrics["exact_match"].value == 0.5
    assert found.metrics["exact_match"].standard_error == pytest.approx(math.sqrt(0.25 / 3))
    assert read[0] == "Question: 4 and 2?\nAnswer: It is 4 + 2.\n#### 6\n\nQuestion: 0 and 2?\nAnswer:"
    assert found.notes == ("1 answer without a number", "4 answers not ended by the model")


def test_gsm8k_leaves_room_for_the_answer(tmp_path: Path) -> None:
    """Shots go where they would take it; a question that does not fit by itself counts as wrong, and is not asked."""
    asked: list[str] = []
    scorer = fake_scorer(
        "decoder", lambda rows, answers: np.zeros((1, 1)), positions=60,
        write=lambda prompt, tokens: (asked.append(prompt) or "#### 2", "end"),
    )  # fmt: skip
    rows = [SUMS[0], {"question": "long " * 20, "answer": "#### 2"}]
    found = scores_of(scorer, tmp_path, "gsm8k", rows, SUMS[1:3], shots=2, max_new_tokens=10)
    assert asked == ["Question: 0 and 2?\nAnswer:"]
    assert found.metrics["exact_match"].value == 0.5
    assert found.notes[0].startswith("2 of 2 prompts did not fit")
    assert found.notes[1] == "1 of 2 prompts did not fit the model's positions and count as wrong"


def logits_for(guesses: Sequence[int], classes: int) -> Array:
    return np.eye(classes)[list(guesses)]


def classifier(logits: Array, classes: Sequence[str]) -> Scorer:
    """A classifier that gives these numbers for texts that begin with their row's number."""

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        return np.stack([logits[int(text_of(row).split()[0])] for row in rows])

    return fake_scorer("classifier", score, classes=tuple(classes))


def glue_rows(task: str, labels: Sequence[float]) -> list[Row]:
    columns = GLUE[task].columns
    return [{**{column: f"{n} {column}" for column in columns}, "label": label} for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("task", "wanted"),
    (
        # guesses 1 1 0 0 1 0 of labels 1 0 0 1 1 0: 2 true and 1 false positives, 2 true and 1 false negatives
        ("cola", {"matthews_correlation": 1 / 3}),
        ("sst2", {"accuracy": 4 / 6}),
        ("mrpc", {"accuracy": 4 / 6, "f1": 2 / 3}),
        ("qqp", {"accuracy": 4 / 6, "f1": 2 / 3}),
        ("qnli", {"accuracy": 4 / 6}),
        ("rte", {"accuracy": 4 / 6}),
        ("wnli", {"accuracy": 4 / 6}),
    ),
)
def test_glue_s_metrics_of_two_classes(task: str, wanted: Mapping[str, float], tmp_path: Path) -> None:
    """Each task's own, worked out by hand."""
    scorer = classifier(logits_for([1, 1, 0, 0, 1, 0], 2), GLUE[task].classes)
    found = scores_of(scorer, tmp_path, f"glue/{task}", glue_rows(task, [1, 0, 0, 1, 1, 0]))
    assert {name: metric.value for name, metric in found.metrics.items()} == pytest.approx(wanted)
    assert tuple(found.metrics) == TASKS[f"glue/{task}"].metrics
    assert all(metric.standard_error for metric in found.metrics.values())


@pytest.mark.parametrize(("task", "wanted"), (("mnli", {"accuracy": 0.75}), ("ax", {"matthews_correlation": 0.7})))
def test_glue_s_metrics_of_three_classes(task: str, wanted: Mapping[str, float], tmp_path: Path) -> None:
    """Accuracy for MNLI, and Matthews' correlation for its diagnostic set: (3 x 4 - 5) / sqrt(10 x 10)."""
    scorer = classifier(logits_for([0, 1, 2, 2], 3), GLUE[task].classes)
    found = scores_of(scorer, tmp_path, f"glue/{task}", glue_rows(task, [0, 1, 2, 1]))
    assert {name: metric.value for name, metric in found.metrics.items()} == pytest.approx(wanted)


def test_stsb_is_measured_by_its_correlations(tmp_path: Path) -> None:
    """Pearson's of 1 2 4 and 1 2 3 is 3 / sqrt(14 / 3 x 2); the order is the same."""
    scorer = classifier(np.asarray([[1.0], [2.0], [4.0]]), ("LABEL_0",))
    found = scores_of(scorer, tmp_path, "glue/stsb", glue_rows("stsb", [1, 2, 3]))
    assert found.metrics["pearson"].value == pytest.approx(3 / math.sqrt(14 / 3 * 2))
    assert found.metrics["spearman"].value == pytest.approx(1)


def test_classes_are_matched_by_name_else_by_number() -> None:
    """A head that was trained on names has the alphabet's order; one that was trained on numbers has GLUE's."""
    rte = GLUE["rte"]
    assert class_order(("not_entailment", "entailment"), rte) == [1, 0]
    assert class_order(("LABEL_0", "LABEL_1"), rte) == class_order(("0", "1"), rte) == [0, 1]
    assert class_order(("LABEL_0",), GLUE["stsb"]) == [0]
    for classes, task in (
        (("a", "b"), rte), (("0", "1", "2"), rte), (("x",), rte), (("0", "1"), GLUE["stsb"]), (("1", "0"), rte)
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="Train a head for this task first"):
            class_order(classes, task)


def test_a_head_of_names_in_the_alphabet_s_order_scores_the_same(tmp_path: Path) -> None:
    """Reordered to GLUE's order before anything is measured."""
    logits, rows = logits_for([1, 1, 0, 0, 1, 0], 2), glue_rows("mrpc", [1, 0, 0, 1, 1, 0])
    plain = scores_of(classifier(logits, ("0", "1")), tmp_path, "glue/mrpc", rows)
    named = scores_of(classifier(logits[:, ::-1], ("equivalent", "not_equivalent")), tmp_path, "glue/mrpc", rows)
    assert named.metrics == plain.metrics


def test_t5_answers_with_the_likeliest_word(tmp_path: Path) -> None:
    """Among the task's words; for STS-B among the 26 fifths."""
    asked: list[str] = []

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        asked.extend(text_of(row) for row in rows)
        said = ["".join(map(chr, answer)) for answer in answers]
        return np.asarray([[-1.0 if word in ("neutral", "3.4") else -2.0 for word in said] for _ in rows])

    scorer = fake_scorer("encoder-decoder", score)
    found = scores_of(scorer, tmp_path, "glue/mnli", glue_rows("mnli", [1, 0]))
    assert found.metrics["accuracy"].value == 0.5
    assert sorted(asked) == [f"mnli hypothesis: {n} hypothesis premise: {n} premise" for n in range(2)]
    items = read_items(TASKS["glue/stsb"], (str(write_rows(tmp_path / "s.jsonl", glue_rows("stsb", [1, 2]))),), EvalSpec("glue/stsb"), limit=None)  # fmt: skip
    from surgery.evals.glue import _guesses

    guesses, _ = _guesses(scorer, items.items, 8, GLUE["stsb"])
    assert guesses.tolist() == [3.4, 3.4]


def test_several_files_are_scored_together_and_apart(tmp_path: Path) -> None:
    """MNLI's matched and mismatched sets in one run."""
    scorer = classifier(logits_for([0, 1, 2, 2], 3), GLUE["mnli"].classes)
    matched = write_rows(tmp_path / "matched.jsonl", glue_rows("mnli", [0, 1, 2, 2]))
    other = write_rows(tmp_path / "mismatched.jsonl", glue_rows("mnli", [0, 0]))
    spec = EvalSpec("glue/mnli", (str(matched), str(other)))
    task = TASKS["glue/mnli"]
    found = task.score(
        scorer, read_items(task, spec.data, spec, limit=None), read_items(task, (), spec, limit=None), spec
    )
    assert found.metrics["accuracy"].value == pytest.approx(5 / 6)
    assert [(p.kind, Path(p.name).stem, p.rows, p.metrics["accuracy"].value) for p in found.parts] == [
        ("file", "matched", 4, 1.0),
        ("file", "mismatched", 2, 0.5),
    ]


def test_means_and_their_errors() -> None:
    """The sample's deviation over the root of the number; of one row nothing is known."""
    assert mean([True, False]).standard_error == pytest.approx(0.5)
    assert mean([True]).standard_error is None
    both = mean_of_means([mean([True, False]), mean([True, True])])
    assert (both.value, both.standard_error) == (0.75, pytest.approx(0.25))
    assert mean_of_means([mean([True]), mean([True, False])]).standard_error is None
    assert parts_by("x", ["a", "a"], lambda numbers: {"n": mean([1.0])}) == ()


def test_a_bootstrap_s_error_is_about_the_textbook_s_and_always_the_same() -> None:
    """For a mean, where both are known."""
    values = np.arange(400) % 2

    def measure(numbers: Array) -> dict[str, float]:
        return {"mean": float(values[numbers].mean())}

    first, again = (resampled(["mean"], measure, len(values))["mean"] for _ in range(2))
    assert first == again
    assert first.value == 0.5
    assert first.standard_error == pytest.approx(0.5 / math.sqrt(400), rel=0.2)
    assert resampled(["mean"], measure, 1)["mean"].standard_error is None


# --- likelihoods of answers


def test_an_answer_of_several_tokens_is_the_product_of_its_tokens() -> None:
    """One forward for each beginning; the logits of a token depend on what was said before it."""
    read: list[list[tuple[int, ...]]] = []

    def next_logits(rows: Sequence[Tokens]) -> Array:
        read.append([row.ids for row in rows])
        return np.log(np.asarray([[0.5, 0.25, 0.25] if row.ids[-1] != 0 else [0.1, 0.1, 0.8] for row in rows]))

    found = next_token_likelihoods(next_logits, [Tokens((7,)), Tokens((8, 9))], [[0, 2], [1]])
    assert np.exp(found) == pytest.approx(np.asarray([[0.5 * 0.8, 0.25]] * 2))
    assert read == [[(7,), (8, 9)], [(7, 0), (8, 9, 0)]]


def test_the_likelihood_of_an_answer_sums_over_its_tokens() -> None:
    """Normalised over the vocabulary at each token."""
    logits = np.log(np.asarray([[[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]]])) + 5
    assert math.exp(log_likelihood(logits, [0, 1])[0]) == pytest.approx(0.4)


def test_answers_are_tokenized_as_they_stand_in_the_text() -> None:
    """What all begin with is set apart; where the prompt's end changes, each is tokenized by itself."""
    plain = fake_scorer("decoder", lambda rows, answers: np.zeros((1, 1)))
    lead, rests = answers_after(plain, "Answer:", [" A", " B"], where="x")
    assert (lead, rests) == ((ord(" "),), [[ord("A")], [ord("B")]])
    joining = Scorer(**{**vars(plain), "pieces": lambda text: [9] if text == ": A" else [ord(c) for c in text]})
    assert answers_after(joining, ":", [" A", " B"], where="x") == (lead, rests)
    blind = Scorer(**{**vars(plain), "pieces": lambda text: [5] * len(text)})
    with pytest.raises(UnsupportedError, match="writes two of ' A', ' B' alike"):
        answers_after(blind, "Answer:", [" A", " B"], where="x")


def test_rows_come_back_in_their_order_and_numbers_are_finite() -> None:
    """Though the longest are scored first; one at a time where a model cannot take several."""
    sizes: list[int] = []

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        sizes.append(len(rows))
        return np.asarray([[float(len(row.ids))] for row in rows])

    rows = [Tokens((0,) * size) for size in (2, 5, 1, 4, 3)]
    scorer = fake_scorer("classifier", score)
    assert score_rows(scorer, rows, (), batch=2, where="x")[:, 0].tolist() == [2, 5, 1, 4, 3]
    score_rows(Scorer(**{**vars(scorer), "pads": False}), rows, (), batch=2, where="x")
    assert sizes == [2, 2, 1, 1, 1, 1, 1, 1]
    broken = fake_scorer("classifier", lambda rows, answers: np.asarray([[math.nan]] * len(rows)))
    with pytest.raises(SurgeryError, match="not finite"):
        score_rows(broken, rows, (), batch=8, where="x")


# --- one score, whichever way a model is run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as files."""
    folder = tmp_path_factory.mktemp("data")
    named = {"mmlu": QUESTIONS, "gsm8k": SUMS, "sst2": SENTENCES, "mrpc": PAIRS, "stsb": SIMILAR}
    for name, rows in named.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def spec_of(task: str, data: Path, **changed: Any) -> EvalSpec:
    shots = (str(data / "mmlu.jsonl"),) if task == "mmlu" else ()
    known: dict[str, Any] = {"shots_data": shots, "shots": 1 if shots else None}
    return EvalSpec(task, (str(data / f"{task.rpartition('/')[2]}.jsonl"),), **{**known, **changed})


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
BIG = {"llama": {"max_position_embeddings": 512}, "gpt2": {"n_positions": 512}}
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
    from surgery.evals import onnx_scorer, torch_scorer
    from surgery.onnx_runtime import is_onnx

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
