"""What a page is made of: sections of text, tables and figures; and how numbers are written there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import shorten
from surgery.table import size_text

Spec = dict[str, Any]  # of Vega-Lite
LONG_ROWS = 24  # a table with more is folded away
NOTHING = "-"  # where a value would stand
LONG_TEXT = 300  # characters of one cell


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; `right`: columns of numbers; the first column names its row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()
    is_pairs: bool = False

    @property
    def is_long(self) -> bool:
        return len(self.rows) > LONG_ROWS


@dataclass(frozen=True)
class Figure:
    """A chart, what it says in words, and its data as a table. `note`: what one must know to read it."""

    title: str
    summary: str
    spec: Spec
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Text:
    """Paragraphs; `code`: lines to be typed."""

    paragraphs: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


Part = Table | Figure | Text


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it. `link`: among the page's links, None for the title, empty for none."""

    title: str
    parts: tuple[Part, ...]
    link: str | None = None


@dataclass(frozen=True)
class Page:
    """A whole page. `facts`: what stands at its head, as labels and texts."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


def pairs(caption: str, entries: Sequence[tuple[str, object]], head: tuple[str, str] = ("what", "value")) -> Table:
    """A table of two columns."""
    return Table(caption, head, tuple((name, text(value)) for name, value in entries), is_pairs=True)


def number(value: float | None, digits: int = 4) -> str:
    """A number as people write it; a dash for one that is not there."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def seconds(value: float | None) -> str:
    """`1.23 ms`, `4.5 s`, `2 h 5 min`."""
    if value is None:
        return NOTHING
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(value: float | None) -> str:
    """`1.07 MB`; a dash for one that is not there."""
    return NOTHING if value is None else size_text(value)


def text(value: object) -> str:
    """A setting as text, in one line."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, Mapping):
        return shorten(", ".join(f"{key}: {text(item)}" for key, item in value.items()) or NOTHING, LONG_TEXT)
    if isinstance(value, (list, tuple)):
        return shorten(", ".join(text(item) for item in value) or NOTHING, LONG_TEXT)
    return shorten(str(value), LONG_TEXT)
