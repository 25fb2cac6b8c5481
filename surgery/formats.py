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

`auto` takes the one format of the task whose columns the first row has; none or several is an error. Columns of other
names are given as role -> column, e.g. {"prompt": "question", "completion": "answer"}. Other columns are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from surgery.errors import DataError, RequestError, closest
from surgery.rows import Row

TASKS = ("causal-lm", "sequence-classification", "regression", "token-classification", "seq2seq")

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


@dataclass(frozen=True)
class Document:
    """Text that carries loss throughout. A file read in pieces begins and ends once."""

    place: str
    text: str
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class PromptCompletion:
    place: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them: dicts of role, content and whatever else the template knows."""

    place: str
    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Labelled:
    """One text or a pair of them, and the raw label: a class's name or a number, by task."""

    place: str
    text: str
    pair: str | None
    label: object


@dataclass(frozen=True)
class Tagged:
    place: str
    words: tuple[str, ...]
    tags: tuple[str, ...]


Example: TypeAlias = Document | PromptCompletion | Conversation | Labelled | Tagged


@dataclass(frozen=True)
class Cells:
    """A row seen through roles."""

    row: Row
    columns: Mapping[str, str]

    def value(self, role: str) -> Any:
        """The role's value; None is an error, a role left out of `columns` (an optional one) is None."""
        if role not in self.columns:
            return None
        value = self.row.values.get(self.columns[role])
        if value is None:
            raise self.wrong(role, "nothing", expected=f"a value for {role}")
        return value

    def text(self, role: str) -> str:
        value = self.value(role)
        if not isinstance(value, str):
            raise self.wrong(role, f"{value!r:.60}", expected="text")
        return value

    def items(self, role: str) -> Sequence[Any]:
        value = self.value(role)
        if not isinstance(value, list):
            raise self.wrong(
                role, f"{value!r:.60}", expected="a list (CSV and TSV cannot hold one; use JSONL or parquet)"
            )
        return value

    def wrong(self, role: str, found: str, *, expected: str) -> DataError:
        return DataError(self.row.place, f"found {found} in the column {self.columns[role]!r}", expected=expected)


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


@dataclass(frozen=True)
class Format:
    """One shape of a row: the columns recognised for each role, the tasks it serves, and how to read it."""

    name: str
    roles: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...]
    read: Callable[[Cells], Example]
    optional: tuple[str, ...] = field(default=())


_CAUSAL, _CLASSES = ("causal-lm",), ("sequence-classification", "regression")
_BOTH_LM = ("causal-lm", "seq2seq")
_ALPACA_ROLES = {"instruction": ("instruction",), "input": ("input",), "output": ("output",)}
_PAIR_ROLES = {"sentence1": ("sentence1",), "sentence2": ("sentence2",), "label": ("label",)}

FORMATS: Mapping[str, Format] = {
    item.name: item
    for item in (
        Format("messages", {"messages": ("messages",)}, _CAUSAL, _messages),
        Format("sharegpt", {"conversations": ("conversations",)}, _CAUSAL, _sharegpt),
        Format("alpaca", _ALPACA_ROLES, _BOTH_LM, _alpaca, optional=("input",)),
        Format(
            "prompt-completion", {"prompt": ("prompt",), "completion": ("completion",)}, _BOTH_LM, _prompt_completion
        ),
        Format("text", {"text": ("text",)}, _CAUSAL, _text),
        Format("seq2seq", {"source": ("source",), "target": ("target",)}, ("seq2seq",), _seq2seq),
        Format("classification", {"text": ("text", "sentence"), "label": ("label",)}, _CLASSES, _classification),
        Format("pair", _PAIR_ROLES, _CLASSES, _pair),
        Format("tokens", {"tokens": ("tokens",), "tags": ("tags", "ner_tags")}, ("token-classification",), _tokens),
    )
}
KNOWN_COLUMNS = frozenset(name for item in FORMATS.values() for names in item.roles.values() for name in names)


@dataclass(frozen=True)
class Shape:
    """A format with the columns it has been found under."""

    format: Format
    columns: Mapping[str, str]

    def read(self, row: Row) -> Example:
        """Raises: DataError: a column is missing or holds the wrong kind of value; `place` is in the message."""
        for role, column in self.columns.items():
            if column not in row.values and role not in self.format.optional:
                found = f"found a row without {column!r} ({_listed(row.values)})"
                raise DataError(row.place, found, expected=f"rows of one shape, {self.format.name}")
        return self.format.read(Cells(row, self.columns))


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
    shapes = [Shape(item, found) for item in formats if (found := _columns_of(item, row, columns)) is not None]
    if len(shapes) == 1:
        return shapes[0]
    if shapes:
        names = ", ".join(shape.format.name for shape in shapes)
        fix = "Set data.format to the one you mean"
        raise DataError(row.place, f"found columns that fit several formats ({names})", expected="one", fix=fix)
    raise _unrecognised(row, task=task, formats=formats)


def _formats_of(task: str, format_name: str) -> list[Format]:
    fitting = [item for item in FORMATS.values() if task in item.tasks]
    if format_name == "auto":
        return fitting
    chosen = [item for item in fitting if item.name == format_name]
    if not chosen:
        names = [item.name for item in fitting]
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
    roles = next((item.roles for item in formats if any(role in row.values for role in item.roles)), formats[-1].roles)
    example = ", ".join(f"{role}: ..." for role in roles)
    fix = f"Name the columns with data.columns = {{{example}}}, by number from 0 where a CSV or TSV has no header"
    return DataError(row.place, f"found {_listed(row.values)}", expected=f"columns for {task}: {shapes}", fix=fix)


def _listed(columns: Iterable[str]) -> str:
    names = [f"{str(name)[:40]!r}" for name in columns]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"the columns {shown}" if names else "no columns"


def class_name(label: object, *, place: str) -> str:
    """A label as the name of its class: 1, 1.0 and "1" are one class, and so are True and "true".

    Raises: DataError: nothing, NaN, or a number with decimals.
    """
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return str(label)
    fix = "For numbers to predict use the task regression; rows without a label must go"
    raise DataError(place, f"found the label {label!r:.60}", expected="a class, as a name or an integer", fix=fix)


def target_number(label: object, *, place: str) -> float:
    """A label as a finite number. Raises: DataError."""
    try:
        number = float(label) if isinstance(label, (str, int, float)) and not isinstance(label, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(place, f"found the label {label!r:.60}", expected="a finite number for regression")
    return number


def class_order(names: Iterable[str], *, place: str) -> tuple[str, ...]:
    """Distinct names in id order: by value when all are numbers, else by code point.

    Raises: DataError: a single class, or numbers with decimals.
    """
    distinct = sorted(set(names))
    numbers = {name: number for name in distinct if (number := _number(name)) is not None}
    if len(numbers) == len(distinct):
        if not all(number.is_integer() for number in numbers.values()):
            fix = "Use the task regression for numbers"
            raise DataError(place, "found labels with decimals", expected="classes", fix=fix)
        distinct.sort(key=lambda name: (numbers[name], name))
    if len(distinct) < 2:
        raise DataError(place, f"found one class only ({', '.join(distinct)})", expected="two or more")
    return tuple(distinct)


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
