"""Rows to examples: which columns mean what, for which task.

| format | roles (and the columns recognised for them) | tasks |
|---|---|---|
| messages | messages: a list of {role, content} | causal-lm |
| sharegpt | conversations: a list of {from, value} | causal-lm |
| alpaca | instruction, input (may be absent or empty), output | causal-lm, seq2seq |
| prompt-completion | prompt, completion | causal-lm, seq2seq |
| text | text | causal-lm |
| seq2seq | source, target | seq2seq |
| classification | text (text, sentence), label | sequence-classification, regression |
| pair | sentence1, sentence2, label | sequence-classification, regression |
| tokens | tokens, tags (tags, ner_tags) | token-classification |
| image | image (image, img), label (label, fine_label) | image-classification |
| mmlu | question, choices, answer, subject (may be absent) | causal-lm, seq2seq |
| gsm8k | question, answer | causal-lm, seq2seq |
| oasst, oasst/all | tree (message_tree_id), and what oasst.py says | causal-lm |
| glue | those of any of GLUE's tasks (glue.py), label | sequence-classification, regression |
| glue/cola, glue/sst2, .. | those of the task, label | sequence-classification or regression, seq2seq |

`auto` takes the one format of the task whose columns the first row has; none or several is an error, but a format whose
columns are a part of another's gives way to it. gsm8k, oasst/all and glue are taken where they are named only. A name
without its part behind the stroke (glue for seq2seq) means all that begin with it. Columns of other names are given as
role -> column, e.g. {"prompt": "question", "completion": "answer"}. Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from surgery.errors import DataError, RequestError, closest
from surgery.examples import Cells, Conversation, Document, Example, Labelled, PromptCompletion, Tagged, class_name
from surgery.glue import GLUE, SHAPES, GlueTask, read_as_it_stands, read_labelled, read_words
from surgery.images import TASK as IMAGES
from surgery.images import read_pictured
from surgery.oasst import all_conversations, best_conversations
from surgery.questions import read_gsm8k, read_mmlu
from surgery.rows import Row

TASKS = (
    "causal-lm",
    "sequence-classification",
    "regression",
    "token-classification",
    "seq2seq",
    "image-classification",
)

SHAREGPT_ROLES: Mapping[str, str] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
ALPACA_PROMPT = "Below is a task. Write an answer that fulfils it.\n\n### Task:\n{instruction}\n\n### Answer:\n"
ALPACA_PROMPT_WITH_INPUT = (
    "Below is a task and the material it is about. Write an answer that fulfils it.\n\n"
    "### Task:\n{instruction}\n\n### Material:\n{input}\n\n### Answer:\n"
)


def _messages(cells: Cells) -> Example:
    messages = tuple(_message(item, cells) for item in cells.items("messages"))
    if not messages:
        raise cells.wrong("messages", "an empty list", expected="at least one message")
    return Conversation(cells.row.place, messages)


def _message(item: object, cells: Cells) -> Mapping[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise cells.wrong("messages", f"{item!r:.60}", expected="an object with role and content")
    present = {key: value for key, value in item.items() if value is not None}  # parquet fills absent keys with null
    content = present.get("content", "" if "tool_calls" in present else None)
    return {**present, "content": _content(content, cells)}


def _content(content: object, cells: Cells) -> str:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    if len(strings) != len(parts):
        raise cells.wrong("messages", f"the content {content!r:.60}", expected="text")
    return "".join(strings)


def _sharegpt(cells: Cells) -> Example:
    turns = cells.items("conversations")
    if not turns:
        raise cells.wrong("conversations", "an empty list", expected="at least one turn")
    return Conversation(cells.row.place, tuple(_turn(turn, cells) for turn in turns))


def _turn(turn: object, cells: Cells) -> Mapping[str, Any]:
    if not isinstance(turn, dict) or "from" not in turn or not isinstance(turn.get("value"), str):
        expected = "an object with from and value (turns with role and content are the format messages)"
        raise cells.wrong("conversations", f"{turn!r:.60}", expected=expected)
    if turn["from"] not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise cells.wrong("conversations", f"a turn from {turn['from']!r}", expected=f"one of {known}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _alpaca(cells: Cells) -> Example:
    # The one role that may be empty or null within a file: a task that needs no material.
    material = cells.row.values.get(cells.columns.get("input", ""))
    if material is not None and not isinstance(material, str):
        raise cells.wrong("input", f"{material!r:.60}", expected="text")
    template = ALPACA_PROMPT_WITH_INPUT if material else ALPACA_PROMPT
    prompt = template.format(instruction=cells.text("instruction"), input=material)
    return PromptCompletion(cells.row.place, prompt, cells.text("output"))


def _prompt_completion(cells: Cells) -> Example:
    return PromptCompletion(cells.row.place, cells.text("prompt"), cells.text("completion"))


def _text(cells: Cells) -> Example:
    return Document(cells.row.place, cells.text("text"))


def _seq2seq(cells: Cells) -> Example:
    return PromptCompletion(cells.row.place, cells.text("source"), cells.text("target"))


def _classification(cells: Cells) -> Example:
    return Labelled(cells.row.place, cells.text("text"), None, cells.value("label"))


def _pair(cells: Cells) -> Example:
    return Labelled(cells.row.place, cells.text("sentence1"), cells.text("sentence2"), cells.value("label"))


def _tokens(cells: Cells) -> Example:
    words, tags = cells.items("tokens"), cells.items("tags")
    if len(words) != len(tags):
        raise cells.wrong("tags", f"{len(tags)} tags for {len(words)} tokens", expected="as many")
    if not words or not all(isinstance(word, str) for word in words):
        raise cells.wrong("tokens", f"{words!r:.60}", expected="a list of texts")
    return Tagged(cells.row.place, tuple(words), tuple(class_name(tag, place=cells.row.place) for tag in tags))


Reader = Callable[[Iterable[Cells]], Iterator[Example]]


@dataclass(frozen=True)
class Format:
    """One shape of rows: the columns recognised for each role, the tasks it serves, and how to read it.

    `by_name`: taken only where it is asked for. `classes`: the names of its classes in id order, where it has its own.
    """

    name: str
    roles: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...]
    read: Reader
    optional: tuple[str, ...] = field(default=())
    by_name: bool = False
    classes: tuple[str, ...] = ()


def _each(read: Callable[[Cells], Example]) -> Reader:
    """A reader of formats in which every row is one example."""
    return partial(map, read)


def _same(*names: str) -> Mapping[str, tuple[str, ...]]:
    """Roles that are called as their columns are."""
    return {name: (name,) for name in names}


def _glue_formats(task: GlueTask) -> tuple[Format, Format]:
    """For a classifier (STS-B: a regression), and as T5 reads and writes it."""
    roles, name = _same(*task.columns, "label"), f"glue/{task.name}"
    head = ("sequence-classification",) if task.classes else ("regression",)
    labelled, words = _each(partial(read_labelled, task=task)), _each(partial(read_words, task=task))
    return (
        Format(name, roles, head, labelled, by_name=True, classes=task.classes),
        Format(name, roles, ("seq2seq",), words, by_name=True),
    )


def _any_glue(columns: tuple[str, ...]) -> Format:
    read = _each(partial(read_as_it_stands, columns=columns))
    return Format("glue", _same(*columns, "label"), _CLASSES, read, by_name=True)


_CAUSAL, _CLASSES = ("causal-lm",), ("sequence-classification", "regression")
_BOTH_LM = ("causal-lm", "seq2seq")
_TEXT_LABEL = {"text": ("text", "sentence"), "label": ("label",)}
_TOKENS = {"tokens": ("tokens",), "tags": ("tags", "ner_tags")}
_IMAGE = {"image": ("image", "img"), "label": ("label", "fine_label")}
_TREE = {"tree": ("message_tree_id",)}

TEXT = Format("text", _same("text"), _CAUSAL, _each(_text))
FORMATS: tuple[Format, ...] = (
    Format("messages", _same("messages"), _CAUSAL, _each(_messages)),
    Format("sharegpt", _same("conversations"), _CAUSAL, _each(_sharegpt)),
    Format("alpaca", _same("instruction", "input", "output"), _BOTH_LM, _each(_alpaca), optional=("input",)),
    Format("prompt-completion", _same("prompt", "completion"), _BOTH_LM, _each(_prompt_completion)),
    TEXT,
    Format("seq2seq", _same("source", "target"), ("seq2seq",), _each(_seq2seq)),
    Format("classification", _TEXT_LABEL, _CLASSES, _each(_classification)),
    Format("pair", _same("sentence1", "sentence2", "label"), _CLASSES, _each(_pair)),
    Format("tokens", _TOKENS, ("token-classification",), _each(_tokens)),
    Format("image", _IMAGE, (IMAGES,), _each(read_pictured)),
    Format(
        "mmlu", _same("question", "choices", "answer", "subject"), _BOTH_LM, _each(read_mmlu), optional=("subject",)
    ),
    Format("gsm8k", _same("question", "answer"), _BOTH_LM, _each(read_gsm8k), by_name=True),
    Format("oasst", _TREE, _CAUSAL, best_conversations),
    Format("oasst/all", _TREE, _CAUSAL, all_conversations, by_name=True),
    *map(_any_glue, SHAPES),
    *(item for task in GLUE.values() for item in _glue_formats(task)),
)
KNOWN_COLUMNS = frozenset(name for item in FORMATS for names in item.roles.values() for name in names)


@dataclass(frozen=True)
class Shape:
    """A format with the columns it has been found under."""

    format: Format
    columns: Mapping[str, str]

    def read(self, rows: Iterable[Row]) -> Iterator[Example]:
        """The rows' examples: one a row, or as the format has it.

        Raises: DataError: a column is missing or holds the wrong kind of value; `place` is in the message.
        """
        return self.format.read(map(self.cells, rows))

    def cells(self, row: Row) -> Cells:
        """A row seen through the roles. Raises: DataError: a column is missing."""
        for role, column in self.columns.items():
            if column not in row.values and role not in self.format.optional:
                found = f"found a row without {column!r} ({_listed(row.values)})"
                raise DataError(row.place, found, expected=f"rows of one shape, {self.format.name}")
        return Cells(row, self.columns)


def check_task(task: str) -> None:
    """Raises: RequestError."""
    if task not in TASKS:
        raise RequestError("task", f"found {task!r}", expected=f"one of {', '.join(TASKS)}", fix=closest(task, TASKS))


def recognise(row: Row, *, task: str, format_name: str, columns: Mapping[str, str]) -> Shape:
    """The shape of a data set, from its first row.

    Raises: DataError: unknown format, role or column; no format or several fit.
    """
    formats = _formats_of(task, format_name)
    _check_roles(columns, formats)
    _check_columns(row, columns)
    if columns and all(column.isdecimal() for column in columns.values()):
        _check_no_header(row, columns)
    fitting = [Shape(item, found) for item in formats if (found := _columns_of(item, row, columns)) is not None]
    used = [_used(shape, row) for shape in fitting]
    shapes = [shape for shape in fitting if not any(_used(shape, row) < other for other in used)]
    if len(shapes) == 1:
        return shapes[0]
    if shapes:
        names = ", ".join(shape.format.name for shape in shapes)
        fix = "Set data.format to the one you mean"
        raise DataError(row.place, f"found columns that fit several formats ({names})", expected="one", fix=fix)
    raise _unrecognised(row, task=task, formats=formats)


def _used(shape: Shape, row: Row) -> frozenset[str]:
    """The row's columns that a format takes."""
    return frozenset(shape.columns.values()) & frozenset(row.values)


def _formats_of(task: str, format_name: str) -> list[Format]:
    fitting = [item for item in FORMATS if task in item.tasks]
    if format_name == "auto":
        return [item for item in fitting if not item.by_name]
    chosen = [item for item in fitting if item.name == format_name]
    chosen = chosen or [item for item in fitting if item.name.startswith(f"{format_name}/")]
    if not chosen:
        names = list(dict.fromkeys(item.name for item in fitting))
        expected = f"auto or one of {', '.join(names)} for the task {task}"
        raise DataError("data.format", f"found {format_name!r}", expected=expected, fix=closest(format_name, names))
    return chosen


def _check_roles(columns: Mapping[str, str], formats: Iterable[Format]) -> None:
    roles = sorted({role for item in formats for role in item.roles})
    for role in columns:
        if role not in roles:
            fix = closest(role, roles) or "The left side is what a column means, the right side its name in the file"
            raise DataError("data.columns", f"found the role {role!r}", expected=f"one of {', '.join(roles)}", fix=fix)


def _check_columns(row: Row, columns: Mapping[str, str]) -> None:
    for column in columns.values():
        if column not in row.values:
            fix = closest(column, row.values) or "A CSV or TSV file without a header needs numbers from 0 for columns"
            raise DataError(row.place, f"found no column {column!r}", expected=_listed(row.values), fix=fix)


def _check_no_header(row: Row, columns: Mapping[str, str]) -> None:
    """Columns were given as numbers, so the first line is data: refuse one that reads like a header."""
    for column in columns.values():
        if row.values[column] in KNOWN_COLUMNS:
            found = f"found {row.values[column]!r} in column {column}, which reads like a header"
            raise DataError(row.place, found, expected="data, as columns were given by number", fix="Name the columns")


def _columns_of(item: Format, row: Row, columns: Mapping[str, str]) -> dict[str, str] | None:
    """Role -> column when the row has them all, None when it does not."""
    if not set(columns) <= set(item.roles):
        return None
    found: dict[str, str] = {}
    for role, names in item.roles.items():
        present = [columns[role]] if role in columns else [name for name in names if name in row.values]
        if len(present) > 1:
            fix = f"Say which with data.columns = {{{role}: {present[0]}}}"
            raise DataError(row.place, f"found both {' and '.join(present)} for {role}", expected="one", fix=fix)
        if present:
            found[role] = present[0]
        elif role not in item.optional:
            return None
        else:
            found[role] = names[0]  # rows below may have what the first one lacks
    return found


def _unrecognised(row: Row, *, task: str, formats: Sequence[Format]) -> DataError:
    shapes = "; ".join(f"{item.name} ({', '.join(item.roles)})" for item in formats)
    near = next((item for item in formats if any(role in row.values for role in item.roles)), None)
    roles = (near or (TEXT if TEXT in formats else formats[0])).roles
    example = ", ".join(f"{role}: ..." for role in roles)
    fix = f"Name the columns with data.columns = {{{example}}}, by number from 0 where a CSV or TSV has no header"
    return DataError(row.place, f"found {_listed(row.values)}", expected=f"columns for {task}: {shapes}", fix=fix)


def _listed(columns: Iterable[str]) -> str:
    names = [f"{str(name)[:40]!r}" for name in columns]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"the columns {shown}" if names else "no columns"
