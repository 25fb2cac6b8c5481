from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import DataError, RequestError
from surgery.examples import (
    Conversation,
    Document,
    Example,
    Labelled,
    PromptCompletion,
    Tagged,
    class_name,
    class_order,
    target_number,
)
from surgery.formats import FORMATS, TASKS, check_task, recognise
from surgery.rows import Row

HERE = "a.jsonl, line 1"
LABELS = ("sequence-classification", "regression")


def example_of(values: Mapping[str, Any], task: str, *, format_name: str = "auto", **columns: str) -> Example:
    """A row, recognised and read."""
    row = Row(HERE, values)
    return next(recognise(row, task=task, format_name=format_name, columns=columns).read([row]))


def message_of(values: Mapping[str, Any], task: str, *, format_name: str = "auto", **columns: str) -> str:
    """What a row that does not fit is answered with."""
    with pytest.raises(DataError) as caught:
        example_of(values, task, format_name=format_name, **columns)
    return str(caught.value)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = {"index": "0", "sentence1": "a", "sentence2": "b", "label": "x"}


@pytest.mark.parametrize(
    ("values", "task", "wanted"),
    (
        ({"messages": CHAT, "source": "web"}, "causal-lm", Conversation(HERE, tuple(CHAT))),
        ({"conversations": SHAREGPT}, "causal-lm", Conversation(HERE, tuple(CHAT))),
        ({"prompt": "p", "completion": "c"}, "causal-lm", PromptCompletion(HERE, "p", "c")),
        ({"prompt": "p", "completion": "c"}, "seq2seq", PromptCompletion(HERE, "p", "c")),
        ({"source": "p", "target": "c"}, "seq2seq", PromptCompletion(HERE, "p", "c")),
        ({"text": "t"}, "causal-lm", Document(HERE, "t")),
        ({"sentence": "t", "label": 1}, "sequence-classification", Labelled(HERE, "t", None, 1)),
        ({"text": "t", "label": 0.5}, "regression", Labelled(HERE, "t", None, 0.5)),
        (PAIR, "sequence-classification", Labelled(HERE, "a", "b", "x")),
        ({"tokens": ["a", "b"], "ner_tags": [0, 3]}, "token-classification", Tagged(HERE, ("a", "b"), ("0", "3"))),
    ),
)
def test_a_row_is_recognised_by_its_columns(values: Mapping[str, Any], task: str, wanted: Example) -> None:
    """Each shape is recognised from its columns and the task; columns of no role are ignored."""
    assert example_of(values, task) == wanted


def test_alpaca_shows_the_material_only_where_there_is_some() -> None:
    """An absent, empty or null input gives the short prompt; the answer follows the prompt's last line."""
    base = {"instruction": "Add {x}.", "output": "3"}
    short = [example_of({**base, **extra}, "causal-lm") for extra in ({}, {"input": ""}, {"input": None})]
    assert short[0] == short[1] == short[2]
    full = example_of({**base, "input": "1 2"}, "causal-lm")
    assert isinstance(short[0], PromptCompletion)
    assert isinstance(full, PromptCompletion)
    assert "1 2" in full.prompt
    assert "Material" not in short[0].prompt
    assert all("Add {x}." in item.prompt and item.prompt.endswith("### Answer:\n") for item in (short[0], full))
    assert full.completion == "3"


def test_alpaca_reads_an_input_that_the_first_row_lacks() -> None:
    """The optional column may begin to appear below the first row."""
    shape = recognise(Row(HERE, {"instruction": "i", "output": "o"}), task="causal-lm", format_name="auto", columns={})
    later = next(shape.read([Row("a.jsonl, line 2", {"instruction": "i", "input": "material", "output": "o"})]))
    assert isinstance(later, PromptCompletion)
    assert "material" in later.prompt


def test_columns_of_other_names_are_given_by_role() -> None:
    """Question and answer become prompt and completion, by name or by number."""
    values = {"question": "q", "answer": "a"}
    wanted = PromptCompletion(HERE, "q", "a")
    assert example_of(values, "causal-lm", prompt="question", completion="answer") == wanted
    assert example_of({"0": "q", "1": "a"}, "causal-lm", prompt="0", completion="1") == wanted
    assert example_of({"chat": CHAT}, "causal-lm", messages="chat") == Conversation(HERE, tuple(CHAT))


def test_message_content_may_be_a_list_of_text_parts() -> None:
    """Text parts are joined, null keys (parquet's absent ones) are dropped, tool calls need no content."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    got = example_of({"messages": [{"role": "user", "content": parts, "name": None}, call]}, "causal-lm")
    assert isinstance(got, Conversation)
    assert got.messages == ({"role": "user", "content": "ab"}, {**call, "content": ""})


@pytest.mark.parametrize(
    ("values", "task", "columns", "wanted"),
    (
        ({"sentence": "t", "label": 1}, LABELS[0], {"text": "sentnce"}, "no column 'sentnce', expected the columns"),
        ({"sentence": "t", "label": 1}, LABELS[0], {"text": "sentnce"}, "The closest is 'sentence'"),
        ({"sentence": "t", "label": 1}, LABELS[0], {"txt": "sentence"}, "the role 'txt', expected one of"),
        ({"sentence": "t", "label": 1}, LABELS[0], {"txt": "sentence"}, "The closest is 'text'"),
        ({"question": "q", "answer": "a"}, "causal-lm", {}, "prompt-completion (prompt, completion)"),
        ({"text": "t", "category": "x"}, LABELS[0], {}, "data.columns = {text: ..., label: ...}"),
        ({"foo": "t", "bar": "x"}, "causal-lm", {}, "data.columns = {text: ...}"),
        ({"foo": "t", "bar": "x"}, LABELS[0], {}, "data.columns = {text: ..., label: ...}"),
        ({"text": "a", "sentence": "b", "label": 1}, LABELS[0], {}, "found both text and sentence for text"),
        ({"text": "t", "prompt": "p", "completion": "c"}, "causal-lm", {}, "several formats (prompt-completion, text)"),
        ({"0": "sentence", "1": "label"}, LABELS[0], {"text": "0", "label": "1"}, "which reads like a header"),
        ({"text": 3, "label": 1}, LABELS[0], {}, "found 3 in the column 'text', expected text"),
        ({"text": None, "label": 1}, LABELS[0], {}, "found nothing in the column 'text'"),
        ({"text": "t", "label": None}, LABELS[0], {}, "found nothing in the column 'label'"),
        ({"messages": "hello"}, "causal-lm", {}, "expected a list"),
        ({"messages": []}, "causal-lm", {}, "an empty list"),
        ({"messages": [{"role": "user"}]}, "causal-lm", {}, "expected text"),
        ({"messages": [{"content": "x"}]}, "causal-lm", {}, "an object with role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "causal-lm", {}, "expected text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "causal-lm", {}, "a turn from 'alien'"),
        ({"conversations": CHAT}, "causal-lm", {}, "are the format messages"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "token-classification", {}, "2 tags for 1 tokens"),
        ({"tokens": [], "tags": []}, "token-classification", {}, "expected a list of texts"),
    ),
)
def test_a_row_that_does_not_fit_is_answered_with_what_would(
    values: Mapping[str, Any], task: str, columns: dict[str, str], wanted: str
) -> None:
    """Every refusal says what was found and what was expected, and names the nearest column or role."""
    assert wanted in message_of(values, task, **columns)


def test_a_format_is_chosen_by_name_among_those_of_the_task() -> None:
    """A named format settles an ambiguous row; one that serves another task is refused with the list."""
    values = {"text": "t", "prompt": "p", "completion": "c"}
    assert example_of(values, "causal-lm", format_name="text") == Document(HERE, "t")
    assert "expected auto or one of classification, pair" in message_of(values, LABELS[0], format_name="text")
    assert "The closest is 'messages'" in message_of(values, "causal-lm", format_name="mesages")


def test_a_later_row_of_another_shape_is_named() -> None:
    """Mixed shapes are an error at the row that differs."""
    shape = recognise(Row(HERE, {"prompt": "p", "completion": "c"}), task="causal-lm", format_name="auto", columns={})
    with pytest.raises(DataError, match=r"line 9: found a row without 'prompt'.*one shape, prompt-completion"):
        next(shape.read([Row("a.jsonl, line 9", {"messages": CHAT})]))


def test_every_task_has_a_format_and_every_format_a_known_task() -> None:
    """The table of formats covers the tasks, and an unknown task is a request error with the nearest one."""
    assert {task for item in FORMATS for task in item.tasks} == set(TASKS)
    with pytest.raises(RequestError, match="The closest is 'causal-lm'"):
        check_task("causal_lm")


@pytest.mark.parametrize(("label", "name"), ((1, "1"), (1.0, "1"), ("1", "1"), (True, "true"), ("pos", "pos")))
def test_one_class_has_one_name(label: object, name: str) -> None:
    """Integers, integral floats and their texts are the same class."""
    assert class_name(label, place=HERE) == name


@pytest.mark.parametrize("label", (math.nan, 0.5, None, "", " ", [1]))
def test_what_is_no_class_is_refused(label: object) -> None:
    """NaN, decimals, nothing and lists are no classes."""
    with pytest.raises(DataError, match="line 1: found the label"):
        class_name(label, place=HERE)


@pytest.mark.parametrize("label", (math.nan, math.inf, "nan", "x", True, None))
def test_what_is_no_finite_number_is_refused(label: object) -> None:
    """Regression takes finite numbers, also as text, and nothing else."""
    with pytest.raises(DataError, match="a finite number"):
        target_number(label, place=HERE)
    assert target_number("3.5", place=HERE) == 3.5


def test_classes_are_ordered_by_number_else_by_name() -> None:
    """The number 10 comes after 9; a single class and decimals are refused."""
    assert class_order(["10", "9", "0", "9"], place=HERE) == ("0", "9", "10")
    assert class_order(["pos", "neg", "10"], place=HERE) == ("10", "neg", "pos")
    with pytest.raises(DataError, match=r"one class only \(x\)"):
        class_order(["x", "x"], place=HERE)
    with pytest.raises(DataError, match="Use the task regression"):
        class_order(["1.5", "2"], place=HERE)


@given(st.lists(st.integers(0, 999), min_size=2, unique=True), st.randoms())
def test_the_order_of_classes_does_not_depend_on_the_order_of_rows(numbers: list[int], source: Any) -> None:
    """Ids are a function of the set of names."""
    names = [str(number) for number in numbers]
    shuffled = source.sample(names, len(names))
    assert class_order(names, place=HERE) == class_order(shuffled, place=HERE) == tuple(map(str, sorted(numbers)))
