"""What a row becomes: the kinds of examples, a row's cells seen through roles, and labels as classes or numbers.

formats.py says which columns mean what; tokens.py makes tokens of examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from surgery.errors import DataError
from surgery.rows import Row


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


@dataclass(frozen=True)
class Pictured:
    """An image and its class. `image`: its encoded bytes; none where `place` is the file that it lies in."""

    place: str
    image: bytes
    label: object


Example: TypeAlias = Document | PromptCompletion | Conversation | Labelled | Tagged | Pictured


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

    def cell(self, role: str) -> Any:
        """The role's value, or None where there is none."""
        return self.row.values.get(self.columns.get(role, ""))

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
