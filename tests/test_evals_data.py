"""Benchmarks as training data: MMLU, GSM8K, Open Assistant's trees and GLUE, in the shapes that they come in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from surgery.data import inspect_labels, prepare
from surgery.data_spec import DataSpec
from surgery.errors import DataError
from surgery.examples import Conversation, Example, Labelled, PromptCompletion
from surgery.formats import recognise
from surgery.glue import GLUE
from surgery.rows import Row, read_rows
from tests.examples import write_rows
from tests.tiny import build_tokenizer

HERE = "a.jsonl, line 1"
CLASSES, NUMBERS = "sequence-classification", "regression"


def examples_of(
    values: Sequence[Mapping[str, Any]], task: str, format_name: str = "auto", **columns: str
) -> list[Example]:
    """Rows, recognised by the first of them and read."""
    rows = [Row(f"a.jsonl, line {number}", row) for number, row in enumerate(values, start=1)]
    return list(recognise(rows[0], task=task, format_name=format_name, columns=columns).read(rows))


def read_file(path: Path, task: str, format_name: str = "auto", **columns: str) -> Iterator[Example]:
    """A file's examples. Skips where the file is not there."""
    if not path.is_file():
        pytest.skip(f"needs {path}")
    rows = read_rows(str(path), columns=columns, default_split="train")
    first = next(rows)
    return recognise(first, task=task, format_name=format_name, columns=columns).read(chain([first], rows))


def refusal(values: Mapping[str, Any], task: str, format_name: str) -> str:
    """What a row is refused with."""
    with pytest.raises(DataError) as caught:
        examples_of([values], task, format_name)
    return str(caught.value)


# --- MMLU

SUM = {
    "question": " What is 2 + 3? ",
    "choices": ["4", "5", "6", "7"],
    "answer": 1,
    "subject": "elementary_mathematics",
}
SUM_PROMPT = (
    "The following are multiple choice questions (with answers) about elementary mathematics.\n"
    "\n"
    "What is 2 + 3?\n"
    "A. 4\n"
    "B. 5\n"
    "C. 6\n"
    "D. 7\n"
    "Answer:"
)


@pytest.mark.parametrize("answer", (1, "B", " B"))
@pytest.mark.parametrize("task", ("causal-lm", "seq2seq"))
def test_an_mmlu_row_is_a_question_with_lettered_choices(answer: object, task: str) -> None:
    """The answer may be a number from 0, as on the hub, or a letter; the row is recognised by its columns."""
    assert examples_of([{**SUM, "answer": answer}], task) == [PromptCompletion(HERE, SUM_PROMPT, " B")]


@pytest.mark.parametrize("subject", ({"subject": ""}, {"subject": None}, {}))
def test_a_question_without_a_subject_names_none(subject: Mapping[str, Any]) -> None:
    """The hub's auxiliary training set has empty subjects."""
    (example,) = examples_of([{"question": "q", "choices": ["x", "y"], "answer": "A", **subject}], "causal-lm")
    wanted = "The following are multiple choice questions (with answers).\n\nq\nA. x\nB. y\nAnswer:"
    assert example == PromptCompletion(HERE, wanted, " A")


@pytest.mark.parametrize(
    ("changed", "wanted"),
    (
        ({"answer": 4}, "found 4 in the column 'answer', expected a letter from A to D or a number from 0 to 3"),
        ({"answer": "E"}, "found 'E' in the column 'answer'"),
        ({"answer": True}, "found True in the column 'answer'"),
        ({"answer": "AB"}, "found 'AB' in the column 'answer'"),
        ({"answer": ""}, "found '' in the column 'answer'"),
        ({"choices": ["x"]}, "found 1 choice, ('x',) in the column 'choices', expected 2 to 26 texts"),
        ({"choices": [1, 2]}, "expected 2 to 26 texts"),
        ({"choices": "x, y"}, "CSV and TSV cannot hold one"),
        ({"subject": 3}, "found 3 in the column 'subject', expected text"),
    ),
)
def test_an_mmlu_row_that_is_none_is_refused(changed: Mapping[str, Any], wanted: str) -> None:
    """An answer that is no choice, choices that are no texts."""
    assert wanted in refusal({**SUM, **changed}, "causal-lm", "mmlu")


def test_the_real_mmlu_is_read(shared_data: Path) -> None:
    """Every row of dev and val; the first is the one that a person sees in the file."""
    dev = list(read_file(shared_data / "instruct/mmlu/dev.jsonl", "causal-lm"))
    val = list(read_file(shared_data / "instruct/mmlu/val.jsonl", "causal-lm"))
    assert (len(dev), len(val)) == (285, 1529)
    first = dev[0]
    assert isinstance(first, PromptCompletion)
    assert first.prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    )
    assert first.completion == " B"


# --- GSM8K


def test_a_gsm8k_row_is_a_question_with_its_worked_solution() -> None:
    """The solution is kept as it stands, its calculations and the final number among it."""
    row = {"question": "How many? ", "answer": "It is <<1+1=2>>2.\n#### 2"}
    wanted = PromptCompletion(HERE, "Question: How many?\nAnswer:", " It is <<1+1=2>>2.\n#### 2")
    assert examples_of([row], "causal-lm", "gsm8k") == examples_of([row], "seq2seq", "gsm8k") == [wanted]


@pytest.mark.parametrize("answer", ("It is 2.", "It is 2. ####", "It is 2.\n#### "))
def test_a_solution_without_a_final_number_is_refused(answer: str) -> None:
    """What has no number to be compared with is no row of GSM8K."""
    assert "expected #### and a number at its end" in refusal({"question": "q", "answer": answer}, "causal-lm", "gsm8k")


def test_the_real_gsm8k_is_read(shared_data: Path) -> None:
    """Every row, by name; `auto` leaves question and answer to whoever names their columns."""
    path = shared_data / "instruct/gsm8k/test.jsonl"
    examples = list(read_file(path, "causal-lm", "gsm8k"))
    assert len(examples) == 1319
    assert isinstance(examples[0], PromptCompletion)
    assert examples[0].completion.endswith("\n#### 18")
    with pytest.raises(DataError, match=r"prompt-completion \(prompt, completion\)"):
        next(read_file(path, "causal-lm"))


# --- Open Assistant


def message(name: str, *replies: Any, role: str = "assistant", **values: Any) -> dict[str, Any]:
    """A message of a tree; its text is its name."""
    known = {"message_id": name, "text": name, "role": role, "deleted": False, "review_result": True}
    return {**known, **values, "replies": list(replies)}


def asked(name: str, *replies: Any, **values: Any) -> dict[str, Any]:
    """A message of a user."""
    return message(name, *replies, role="prompter", **values)


TREE = asked(
    "q",
    message("second", asked("no", message("never")), rank=1),
    message("first", asked("more", message("unranked"), message("ranked", asked("unanswered"), rank=3)), rank=0),
    message("deleted", rank=-1, deleted=True),
    message("refused", rank=-2, review_result=False),
    message("unreviewed", rank=-3, review_result=None),
)
ROW = {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": TREE}


def turns(example: Example) -> list[str]:
    """A conversation's texts; roles take turns, a user first and an assistant last."""
    assert isinstance(example, Conversation)
    roles = [str(turn["role"]) for turn in example.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    return [str(turn["content"]) for turn in example.messages]


def flat(node: Mapping[str, Any], tree: str, parent: str | None = None) -> list[dict[str, Any]]:
    """A tree as the hub's table of messages has it."""
    own = {name: value for name, value in node.items() if name != "replies"}
    below = [row for reply in node["replies"] for row in flat(reply, tree, str(node["message_id"]))]
    return [{"rank": None, **own, "parent_id": parent, "message_tree_id": tree}, *below]


def test_a_tree_gives_its_best_conversation() -> None:
    """At each level the lowest rank; without one last; deleted and unaccepted messages and unanswered ends are gone."""
    (found,) = examples_of([ROW], "causal-lm")
    assert turns(found) == ["q", "first", "more", "ranked"]


def test_all_conversations_of_a_tree_are_to_be_had() -> None:
    """Every way down once, though one of them is cut before a message that nobody answered."""
    found = [turns(example) for example in examples_of([ROW], "causal-lm", "oasst/all")]
    assert found == [
        ["q", "second", "no", "never"],
        ["q", "first", "more", "unranked"],
        ["q", "first", "more", "ranked"],
    ]


def test_ways_that_differ_only_in_what_is_cut_are_one() -> None:
    """Two questions that nobody answered leave the conversation before them once."""
    row = {**ROW, "prompt": asked("q", message("a", asked("x"), asked("y")))}
    assert [turns(example) for example in examples_of([row], "causal-lm", "oasst/all")] == [["q", "a"]]


@pytest.mark.parametrize("root", (asked("q"), {**TREE, "deleted": True}, {**TREE, "review_result": False}))
@pytest.mark.parametrize("name", ("oasst", "oasst/all"))
def test_a_tree_that_nobody_answered_gives_nothing(root: Mapping[str, Any], name: str) -> None:
    """Nor does one whose first message is gone; the trees around it do."""
    other = {**ROW, "prompt": asked("p", message("a"))}
    found = examples_of([{**ROW, "prompt": root}, other, {**ROW, "prompt": root}], "causal-lm", name)
    assert [turns(example) for example in found] == [["p", "a"]]


@pytest.mark.parametrize("name", ("oasst", "oasst/all"))
def test_the_hub_s_table_of_messages_gives_the_same(name: str) -> None:
    """Messages of one tree stand together, in any order; each tree gives what it gives as a tree."""
    other = asked("p", message("a", rank=0))
    trees = examples_of([ROW, {"message_tree_id": "u", "prompt": other}], "causal-lm", name)
    table = examples_of([*flat(TREE, "t"), *reversed(flat(other, "u"))], "causal-lm", name)
    assert [turns(example) for example in table] == [turns(example) for example in trees]
    assert len(trees) == (2 if name == "oasst" else 4)


def test_a_shuffled_table_of_messages_is_refused() -> None:
    """A tree that goes on further down would lose its messages."""
    rows = [*flat(TREE, "t"), *flat(asked("p", message("a")), "u"), *flat(TREE, "t")]
    with pytest.raises(DataError, match=r"messages of the tree 't' in two places.*Sort the rows by message_tree_id"):
        examples_of(rows, "causal-lm", "oasst")


@pytest.mark.parametrize(
    ("row", "wanted"),
    (
        ({**ROW, "prompt": "hello"}, "expected an object with a list of replies"),
        ({**ROW, "prompt": {**TREE, "role": "system"}}, "a role, one of prompter, assistant"),
        ({**ROW, "prompt": {**TREE, "text": None}}, "expected a text and a role"),
        ({"message_tree_id": "t", "text": "x", "role": "prompter"}, "neither prompt nor message_id"),
    ),
)
def test_what_is_no_tree_is_refused(row: Mapping[str, Any], wanted: str) -> None:
    """The message says which shapes there are."""
    assert wanted in refusal(row, "causal-lm", "oasst")


def test_the_real_trees_give_a_conversation_each(shared_data: Path, tmp_path: Path) -> None:
    """100 trees of 1,167 messages: each gives its best way, which is among all ways, and so does the table."""
    path = shared_data / "instruct/oasst/en_100_tree.jsonl"
    best = list(read_file(path, "causal-lm"))
    every = [turns(example) for example in read_file(path, "causal-lm", "oasst/all")]
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    table = [row for line in lines for row in flat(line["prompt"], line["message_tree_id"])]
    assert len(best) == len({example.place for example in best}) == 100
    assert len(table) == 1167
    assert all(turns(example) in every for example in best)
    assert len(every) > 300
    written = write_rows(tmp_path / "flat.parquet", [{**row, "emojis": None} for row in table])
    assert [turns(e) for e in read_file(written, "causal-lm", "oasst")] == [turns(e) for e in best]
    for example, line in zip(best, lines, strict=True):
        node, said = line["prompt"], turns(example)
        for text in said[1:]:
            node = next(reply for reply in node["replies"] if reply["text"] == text)
            assert node.get("rank") in (0, None)


def test_trees_are_trained_on_as_conversations(shared_data: Path) -> None:
    """Through the chat template, with loss on the assistant's turns."""
    path = shared_data / "instruct/oasst/en_100_tree.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    spec = DataSpec(train=(str(path),), max_length=128)
    report = prepare(spec, task="causal-lm", tokenizer=build_tokenizer()).report
    assert (report.format, report.packed, report.train.rows) == ("oasst", False, 100)
    assert 0 < report.train.loss_tokens < report.train.tokens


# --- GLUE

GLUE_ROWS: Mapping[str, tuple[Mapping[str, Any], str, str]] = {  # a row of the hub's, and T5's two texts
    "cola": ({"sentence": "Say it.", "label": 1}, "cola sentence: Say it.", "acceptable"),
    "sst2": ({"sentence": "so dull ", "label": 0}, "sst2 sentence: so dull ", "negative"),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1}, "mrpc sentence1: a sentence2: b", "equivalent"),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.25}, "stsb sentence1: a sentence2: b", "3.2"),
    "qqp": ({"question1": "a", "question2": "b", "label": 0}, "qqp question1: a question2: b", "not_duplicate"),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 1}, "mnli hypothesis: b premise: a", "neutral"),
    "qnli": ({"question": "a", "sentence": "b", "label": 0}, "qnli question: a sentence: b", "entailment"),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 1}, "rte sentence1: a sentence2: b", "not_entailment"),
    "wnli": ({"sentence1": "a", "sentence2": "b", "label": 1}, "wnli sentence1: a sentence2: b", "entailment"),
    "ax": ({"premise": "a", "hypothesis": "b", "label": 2}, "mnli hypothesis: b premise: a", "contradiction"),
}


@pytest.mark.parametrize("name", GLUE_ROWS)
def test_a_glue_row_is_written_as_t5_writes_it(name: str) -> None:
    """The task's name, each column in alphabetical order with its text, and the class as a word."""
    row, prompt, word = GLUE_ROWS[name]
    wanted = [PromptCompletion(HERE, prompt, word)]
    assert examples_of([{**row, "idx": 0}], "seq2seq", f"glue/{name}") == wanted
    assert len(GLUE_ROWS) == len(GLUE) == 10


@pytest.mark.parametrize("name", GLUE_ROWS)
def test_a_glue_row_is_classified_by_its_columns(name: str) -> None:
    """`glue` takes the label as it stands, `glue/<task>` gives the class its name; the two texts keep their order."""
    row, _, word = GLUE_ROWS[name]
    task = CLASSES if GLUE[name].classes else NUMBERS
    texts = [str(row[column]) for column in GLUE[name].columns]
    plain, named = examples_of([row], task, "glue"), examples_of([row], task, f"glue/{name}")
    pair = texts[1] if len(texts) == 2 else None
    assert plain == [Labelled(HERE, texts[0], pair, row["label"])]
    assert named == [Labelled(HERE, texts[0], pair, word if GLUE[name].classes else row["label"])]


@pytest.mark.parametrize("label", (1, 1.0, "1", "not_entailment"))
def test_a_class_is_given_by_number_or_name(label: object) -> None:
    """The hub's numbers, their texts in a TSV file, and the names are the same class."""
    row = {"sentence1": "a", "sentence2": "b", "label": label}
    (example,) = examples_of([row], CLASSES, "glue/rte")
    assert isinstance(example, Labelled)
    assert example.label == "not_entailment"


@pytest.mark.parametrize("label", (-1, -1.0, "-1"))
@pytest.mark.parametrize(("name", "task"), (("glue", CLASSES), ("glue/rte", CLASSES), ("glue/rte", "seq2seq")))
def test_a_split_without_labels_is_refused(label: object, name: str, task: str) -> None:
    """GLUE writes -1 where it keeps the labels to itself."""
    row = {"sentence1": "a", "sentence2": "b", "label": label}
    assert "Use the validation split: GLUE's test sets have no labels" in refusal(row, task, name)
    number = {**row, "label": -1.0}
    assert "no labels" in refusal(number, NUMBERS, "glue/stsb")
    assert "no labels" in refusal({**row, "label": None}, task, "glue/rte")


@pytest.mark.parametrize(
    ("label", "wanted"),
    (
        (2, "found the label 2, expected one of entailment, not_entailment or 0 to 1"),
        (True, "found the label True"),
        ("entailmnt", "The closest is 'entailment'"),
    ),
)
def test_a_class_that_the_task_does_not_have_is_refused(label: object, wanted: str) -> None:
    """With those that it has."""
    assert wanted in refusal({"sentence1": "a", "sentence2": "b", "label": label}, CLASSES, "glue/rte")


def test_glue_for_t5_needs_the_task_where_columns_are_shared() -> None:
    """Of qnli's columns there is one task; of one sentence there are two, and they read differently."""
    assert examples_of([GLUE_ROWS["qnli"][0]], "seq2seq", "glue") == examples_of(
        [GLUE_ROWS["qnli"][0]], "seq2seq", "glue/qnli"
    )
    assert "several formats (glue/cola, glue/sst2)" in refusal(GLUE_ROWS["cola"][0], "seq2seq", "glue")
    assert "The closest is 'glue/sst2'" in refusal(GLUE_ROWS["sst2"][0], "seq2seq", "glue/sst-2")


@pytest.mark.parametrize(
    ("label", "word"), ((0, "0.0"), (5.0, "5.0"), ("2.75", "2.8"), (2.5, "2.4"), (0.5, "0.4"), (4.91, "5.0"))
)
def test_similarity_is_rounded_to_a_fifth(label: object, word: str) -> None:
    """Halves go to the even fifth, as tensorflow's round sends them."""
    assert GLUE["stsb"].word(label, place=HERE) == word


def test_classes_have_glue_s_order(tmp_path: Path) -> None:
    """Not that of the alphabet: F1 is of the class that GLUE means."""
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (1, 0, 1)]
    path = write_rows(tmp_path / "mrpc.parquet", rows)
    assert inspect_labels(DataSpec((str(path),), format="glue/mrpc"), CLASSES) == ("not_equivalent", "equivalent")
    assert inspect_labels(DataSpec((str(path),), format="glue"), CLASSES) == ("0", "1")


def test_the_real_tsv_files_are_read(shared_data: Path) -> None:
    """CoLA and SST-2 without header by number, RTE by its header, each by columns alone and as its task."""
    folder = shared_data / "classification"
    columns = {"sentence": "3", "label": "1"}
    cola = list(read_file(folder / "cola/in_domain_dev.tsv", CLASSES, "glue/cola", **columns))
    by_columns = list(read_file(folder / "cola/in_domain_dev.tsv", CLASSES, text="3", label="1"))
    sst2 = list(read_file(folder / "sst2/dev.tsv", CLASSES, "glue", sentence="0", label="1"))
    rte = list(read_file(folder / "rte/dev.tsv", "seq2seq", "glue/rte"))
    assert (len(cola), len(by_columns), len(sst2), len(rte)) == (527, 527, 872, 277)
    assert isinstance(cola[0], Labelled)
    assert (cola[0].text, cola[0].label) == ("The sailors rode the breeze clear of the rocks.", "acceptable")
    assert isinstance(by_columns[0], Labelled)
    assert (by_columns[0].text, by_columns[0].label) == (cola[0].text, "1")
    assert isinstance(rte[1], PromptCompletion)
    assert rte[1].prompt.startswith("rte sentence1: Yet, we now are discovering that antibiotics")
    assert rte[1].prompt.endswith(" sentence2: Bacteria is winning the war against antibiotics.")
    assert rte[1].completion == "entailment"


# --- guanaco


def test_guanaco_s_text_is_plain_text(tmp_path: Path) -> None:
    """`### Human: ..` in a column called text: packed by default, each row ended; apart when asked."""
    rows = [{"text": f"### Human: {n} ### Assistant: the answer is {n}"} for n in range(40)]
    path = write_rows(tmp_path / "guanaco.jsonl", rows)
    tokenizer = build_tokenizer()
    packed = prepare(DataSpec((str(path),), max_length=32), task="causal-lm", tokenizer=tokenizer)
    apart = prepare(DataSpec((str(path),), max_length=128, packing=False), task="causal-lm", tokenizer=tokenizer)
    assert packed.report.packed
    assert {len(row["input_ids"]) for row in packed.train} == {32}
    assert sum(list(row["input_ids"]).count(tokenizer.eos_token_id) for row in packed.train) in (38, 39, 40)
    assert len(apart.train) == 40
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in apart.train)
