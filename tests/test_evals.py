"""Scores that were worked out by hand, of models whose numbers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.errors import SurgeryError, UnsupportedError
from surgery.evals import glue, gsm8k
from surgery.evals.glue import class_order
from surgery.evals.run import TASKS
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
from tests.evaluated import SUMS
from tests.examples import write_rows

Row = Mapping[str, Any]

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
    """A row of MMLU."""
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
    wanted = (
        "The following are multiple choice questions (with answers) about moral disputes.\n\n"
        "one?\nA. w\nB. x\nC. y\nD. z\nAnswer: C\n\n"
        "two?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "who?\nA. p\nB. q\nC. r\nD. s\nAnswer:"
    )
    assert read == [wanted + " "]  # a fake token each: what the letters have in common, a space, is read first


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


def test_a_prompt_leaves_room_for_an_answer_of_several_tokens(tmp_path: Path) -> None:
    """Of ` A` in two tokens the model reads the first: with it the row has as many tokens as there are positions."""
    read: list[int] = []

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        read.extend(len(row.ids) + max(map(len, answers)) - 1 for row in rows)
        return np.zeros((len(rows), len(answers)))

    pieces = lambda text: [ord(character) for character in text.replace(" B", "\u01b2")]
    scores_of(
        fake_scorer("decoder", score, pieces=pieces, positions=16), tmp_path, "mmlu", [question("anatomy", "fox", "A")]
    )
    assert read == [16]


def test_an_encoder_s_prompt_that_does_not_fit_keeps_its_end_and_its_end_token(tmp_path: Path) -> None:
    """The question stands at the end, and the special tokens around it are not what goes."""
    read: list[tuple[int, ...]] = []

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        read.extend(row.ids for row in rows)
        return np.zeros((len(rows), len(answers)))

    framed = lambda text, pair: Tokens((1, *map(ord, text), 2))
    scorer = fake_scorer("encoder-decoder", score, encode=framed, positions=12)
    found = scores_of(scorer, tmp_path, "mmlu", [question("anatomy", "fox", "A")])
    assert read == [(1, *map(ord, ". z\nAnswer:"[-10:]), 2)]
    assert found.notes == ("1 prompt did not fit even without shots: their beginning was cut off",)


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
        "decoder", lambda rows, answers: np.zeros((1, 1)), positions=80,
        write=lambda prompt, tokens: (asked.append(prompt) or "#### 2", "end"),
    )  # fmt: skip
    rows = [SUMS[0], {"question": "long " * 20, "answer": "#### 2"}]
    found = scores_of(scorer, tmp_path, "gsm8k", rows, SUMS[1:3], shots=2, max_new_tokens=10)
    assert asked == ["Question: 0 and 2?\nAnswer:"]
    assert found.metrics["exact_match"].value == 0.5
    assert found.notes[0].startswith("2 of 2 prompts did not fit")
    assert found.notes[1] == "1 of 2 prompts did not fit the model's positions and count as wrong"


def logits_for(guesses: Sequence[int], classes: int) -> Array:
    """Numbers of which those guessed are the largest."""
    return np.eye(classes)[list(guesses)]


def classifier(logits: Array, classes: Sequence[str]) -> Scorer:
    """A classifier that gives these numbers for texts that begin with their row's number."""

    def score(rows: Sequence[Tokens], answers: Sequence[Sequence[int]]) -> Array:
        return np.stack([logits[int(text_of(row).split()[0])] for row in rows])

    return fake_scorer("classifier", score, classes=tuple(classes))


def glue_rows(task: str, labels: Sequence[float]) -> list[Row]:
    """Rows of a task, each text with its row's number in front."""
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
    data = write_rows(tmp_path / "stsb.jsonl", glue_rows("stsb", [1, 2]))
    items = read_items(TASKS["glue/stsb"], (str(data),), EvalSpec("glue/stsb"), limit=None)
    guesses, _ = glue._guesses(scorer, items.items, 8, GLUE["stsb"])
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
    limited = read_items(task, spec.data, spec, limit=5).files
    assert [Path(name).stem for name in limited] == ["matched"] * 4 + ["mismatched"]
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
