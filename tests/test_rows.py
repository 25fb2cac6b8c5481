from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import rows as rows_module
from surgery.errors import DataError
from surgery.rows import Row, read_rows, read_stream

NAMED: Mapping[str, str] = {}


def put(folder: Path, name: str, content: str | bytes) -> str:
    """A file with this content, and its path."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(reference: str, columns: Mapping[str, str] = NAMED, *, split: str | None = "train") -> list[Row]:
    """All rows of a file."""
    return list(read_rows(reference, columns=columns, default_split=split))


def message_of(reference: str, columns: Mapping[str, str] = NAMED, *, split: str | None = "train") -> str:
    """What a file that cannot be read is answered with."""
    with pytest.raises(DataError) as caught:
        read(reference, columns, split=split)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    (
        ("a.jsonl", '{"text": "x", "label": 1}\n\n{"text": "y", "label": 0}'),
        ("a.json", '[{"text": "x", "label": 1},\n {"text": "y", "label": 0}]'),
        ("a.json", '{"text": "x", "label": 1}\r\n{"text": "y", "label": 0}\r\n'),
        ("a.JSONL", '\ufeff{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n'),
    ),
)
def test_json_lines_and_arrays_give_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    """JSONL, a JSON array, JSONL called .json, a byte order mark, Windows line ends and blank lines all read alike."""
    assert [row.values for row in read(put(tmp_path, name, content))] == [
        {"text": "x", "label": 1},
        {"text": "y", "label": 0},
    ]


def test_a_csv_row_may_span_lines_and_is_placed_at_its_first(tmp_path: Path) -> None:
    """Quoted commas, doubled quotes and line ends stay in the text; places count lines, not rows."""
    rows = read(put(tmp_path, "a.csv", 'text,label\n"a, ""b""\nc",x\nd,y\n'))
    assert [dict(row.values) for row in rows] == [{"text": 'a, "b"\nc', "label": "x"}, {"text": "d", "label": "y"}]
    assert [row.place.rpartition(", ")[2] for row in rows] == ["line 2", "line 4"]


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    """A quote in a TSV is a character like any other, also where it never closes."""
    rows = read(put(tmp_path, "a.tsv", 'text\tlabel\n"open\tx\nsay ""hi""\ty'))
    assert [row.values["text"] for row in rows] == ['"open', 'say ""hi""']


CELL = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=("Cs",)))


@given(st.lists(st.tuples(CELL, CELL), min_size=1))
def test_any_cells_without_tabs_come_back_from_a_tsv(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    """Reading a TSV inverts writing one, whatever the characters."""
    path = put(tmp_path_factory.mktemp("tsv"), "a.tsv", "".join(f"{a}\t{b}\n" for a, b in [("p", "q"), *table]))
    assert [(row.values["p"], row.values["q"]) for row in read(path)] == table


def test_parquet_rows_carry_their_number(tmp_path: Path) -> None:
    """Parquet gives its records with lists as lists."""
    pq.write_table(pa.table({"tokens": [["a", "b"], ["c"]], "tags": [[0, 1], [1]]}), tmp_path / "a.parquet")
    rows = read(str(tmp_path / "a.parquet"))
    assert [row.values["tokens"] for row in rows] == [["a", "b"], ["c"]]
    assert rows[1].place.endswith("a.parquet, row 2")


def test_numbers_for_columns_mean_that_there_is_no_header(tmp_path: Path) -> None:
    """With columns given by number the first line is data; with names it is the header."""
    path = put(tmp_path, "a.tsv", "good\t1\nbad\t0\n")
    rows = read(path, {"text": "0", "label": "1"})
    assert [(row.values["0"], row.values["1"]) for row in rows] == [("good", "1"), ("bad", "0")]
    assert [dict(row.values) for row in read(path)] == [{"good": "bad", "1": "0"}]


@pytest.mark.parametrize(
    ("name", "content", "columns", "wanted"),
    (
        ("a.jsonl", "", {}, "found no rows"),
        ("a.csv", "text,label\n", {}, "found no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', {}, "line 2: found malformed JSON at column"),
        ("a.json", '[{"text": "x"},\n{"text" 1}]', {}, "line 2: found malformed JSON at column 9"),
        ("a.jsonl", "[1]\n", {}, "line 1: found a JSON list, expected an object"),
        ("a.jsonl", '{"a": ' + "[" * 100_000 + "\n", {}, "line 1: found"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', {}, "line 2: found the byte 0xe9 at position 10"),
        ("a.csv", 'text,label\na,b\n"a",b,c\n', {}, "line 3: found 3 columns, expected 2"),
        ("a.csv", 'text,label\na,b\n"open,b\nc,d\n', {}, "line 3: found malformed CSV"),
        ("a.csv", "text,text\na,b\n", {}, "line 1: found the column 'text' twice"),
        ("a.tsv", "a\tb\nc\n", {}, "line 2: found 1 column, expected 2"),
        ("a.tsv", "a\tb\n", {"text": "2"}, "found 2 columns, expected one numbered 2 (counted from 0)"),
        ("a.tsv", "a\tb\n", {"text": "0", "label": "b"}, "found both names and numbers"),
        ("a.csv", "0,1\nx,y\n", {"text": "0", "label": "1"}, "a header or a row"),
        ("a.parquet", "no parquet", {}, "cannot be read"),
        ("a.xlsx", "x", {}, "found the suffix '.xlsx', expected one of .csv"),
        ("a.txt", "x", {}, "found a plain text file, which has no columns"),
    ),
)
def test_a_damaged_file_is_named_with_the_line(
    tmp_path: Path, name: str, content: str | bytes, columns: dict[str, str], wanted: str
) -> None:
    """Whatever is wrong with a file, the message begins with the file and says the line and what was found."""
    path = put(tmp_path, name, content)
    message = message_of(path, columns)
    assert message.startswith(path)
    assert wanted in message


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    """A misspelt path is answered with the file that is there; a folder is not a file."""
    put(tmp_path, "train.jsonl", "{}")
    assert "The closest is 'train.jsonl'" in message_of(str(tmp_path / "trian.jsonl"))
    assert "found a folder" in message_of(str(tmp_path))


def test_a_stream_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces of a plain text file join to the file; only the first begins it and only the last ends it."""
    text = "".join(f"line {number}\r\n" for number in range(50)) + "no line end"
    path = put(tmp_path, "a.txt", text)
    assert [(piece.first, piece.last) for piece in read_stream(path)] == [(True, True)]
    monkeypatch.setattr(rows_module, "STREAM_PIECE_CHARACTERS", 100)
    pieces = list(read_stream(path))
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert [piece.first for piece in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert [piece.last for piece in pieces] == [*[False] * (len(pieces) - 1), True]


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    """A plain text file must hold text."""
    with pytest.raises(DataError, match="found no text"):
        list(read_stream(put(tmp_path, "a.txt", "")))


def test_local_files_never_touch_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of two parts that exists is read from disk although it could be an id of the hub."""
    (tmp_path / "org").mkdir()
    put(tmp_path / "org", "name.jsonl", '{"text": "x"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("went to the network"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert len(read("org/name.jsonl")) == 1
    assert "found nothing there" in message_of("org/other.jsonl")
    put(tmp_path / "org", "name", "x")
    assert "found the suffix ''" in message_of("org/name")


def test_a_hub_id_out_of_reach_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network an id is a clear error, with the client's reason and what to do instead."""

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = message_of("org/name:train")
    assert message.startswith("org/name:train: found no file of that name, and the hub gave no such data set")
    assert "no route to the hub" in message
    assert "download the data" in message


def test_hub_ids_name_configuration_and_split_and_integers_become_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`org/name/config:split` is passed on; ClassLabel columns give names, and -1 (not labelled) gives nothing."""
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"t": datasets.Value("string"), "y": label, "z": datasets.Sequence(label)})
    table = {"t": ["a", "b"], "y": [1, -1], "z": [[0, 1], [1]]}
    asked: list[tuple[str, str | None, str]] = []

    def load(path: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_dict(table, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read("org/name/config:validation[:10%]")
    assert [dict(row.values) for row in rows] == [
        {"t": "a", "y": "pos", "z": ["neg", "pos"]},
        {"t": "b", "y": None, "z": ["pos"]},
    ]
    read("org/name")
    assert asked == [("org/name", "config", "validation[:10%]"), ("org/name", None, "train")]
    assert "an evaluation set that names its split" in message_of("org/name", split=None)


def test_places_name_file_and_line(tmp_path: Path) -> None:
    """Blank lines count as lines."""
    path = put(tmp_path, "a.jsonl", json.dumps({"a": 1}) + "\n\n" + json.dumps({"a": 2}) + "\n")
    assert [row.place for row in read(path)] == [f"{path}, line 1", f"{path}, line 3"]
