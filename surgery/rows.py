"""Files and dataset ids to rows.

A row is what one line or record holds: column name -> value, with the place it came from for messages. Nothing here
knows what a row means (formats.py), and nothing touches the network when the reference is an existing file.

| suffix | read as |
|---|---|
| .jsonl .ndjson | one JSON object a line; blank lines are skipped |
| .json | a JSON array of objects, or lines as above when the file does not begin with `[` |
| .csv | commas, double quotes (RFC 4180) |
| .tsv | tabs, no quoting: a quote is a character like any other |
| .parquet | one row a record |
| a folder | of folders of images: one row an image, its label the name of the folder that it is in |
| .txt | one stream of text, cut at line ends into pieces of a few million characters |

CSV and TSV: when every column of the request is a number, the file has no header and columns are counted from 0;
otherwise the first line is the header. Numbers and names are never mixed.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from surgery.errors import DataError, closest, counted

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
STREAM_PIECE_CHARACTERS = 4_000_000
HUB_ID = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?")


class Row(NamedTuple):
    """One record and the place to name when it is wrong, such as `train.jsonl, line 17`."""

    place: str
    values: Mapping[str, Any]


class StreamPiece(NamedTuple):
    """A part of a plain text file; only the last one ends the document."""

    text: str
    first: bool
    last: bool


Reader = Callable[[Path, Sequence[str]], Iterator[Row]]


def is_stream(reference: str) -> bool:
    """Whether it is plain text, which has no rows."""
    return Path(reference).suffix.lower() == ".txt"


def read_rows(reference: str, *, columns: Mapping[str, str], default_split: str | None) -> Iterator[Row]:
    """Every row of one file or hub data set, in its order.

    `columns` (role -> column) only decides whether a CSV or TSV file has a header. `default_split` is the split of a
    hub id that names none; None makes naming it a must.
    Raises: DataError: missing, empty or damaged file, unknown kind of file, a hub data set out of reach.
    """
    rows = _open_rows(reference, columns=columns, default_split=default_split)
    first = next(rows, None)
    if first is None:
        raise DataError(reference, "found no rows", expected="at least one", fix="Give a data set with rows")
    return chain([first], rows)


def read_stream(reference: str) -> Iterator[StreamPiece]:
    """A .txt file in pieces that join to its text, so that memory does not grow with the file.

    Raises: DataError: missing, empty or not UTF-8.
    """
    pieces = _stream_pieces(_checked_file(reference))
    held, first = next(pieces, ""), True
    if not held:
        raise DataError(reference, "found no text", expected="a file with text in it")
    for piece in pieces:
        yield StreamPiece(held, first=first, last=False)
        held, first = piece, False
    yield StreamPiece(held, first=first, last=True)


def _open_rows(reference: str, *, columns: Mapping[str, str], default_split: str | None) -> Iterator[Row]:
    hub = HUB_ID.fullmatch(reference)
    if not Path(reference).exists() and hub and Path(reference).suffix.lower() not in READERS:
        return _hub_rows(reference, hub, default_split=default_split)
    if image_files(Path(reference)):
        return _image_rows(Path(reference))
    path = _checked_file(reference)
    return READERS[path.suffix.lower()](path, list(columns.values()))


def image_files(folder: Path) -> list[Path]:
    """The images in a folder's folders, in order; none where it is no such folder."""
    files = folder.glob("*/*") if folder.is_dir() else ()
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.parent.name[0] != ".")


def _image_rows(folder: Path) -> Iterator[Row]:
    for path in image_files(folder):
        yield Row(str(path), {"image": str(path), "label": path.parent.name})


def _checked_file(reference: str) -> Path:
    path = Path(reference)
    if not path.exists():
        raise _missing_file(path)
    if not path.is_file():
        expected = "a file, or a folder with a folder of images for each class"
        raise DataError(reference, "found a folder", expected=expected, fix="Name the files in it")
    if path.suffix.lower() not in READERS:
        known = ", ".join(sorted(READERS))
        raise DataError(reference, f"found the suffix {path.suffix!r}", expected=f"one of {known}")
    return path


def _missing_file(path: Path) -> DataError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    fix = closest(path.name, siblings) or "Check the path; a dataset id of the hub reads 'org/name'"
    return DataError(str(path), "found nothing there", expected="a data file", fix=fix)


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, line ends kept, a byte order mark removed."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(str(path), f"found a file that cannot be read ({error.strerror})") from error
    with file:
        for number, raw in enumerate(file, start=1):
            yield number, _decode(raw, place=f"{path}, line {number}").removeprefix("\ufeff" if number == 1 else "")


def _decode(raw: bytes, *, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"found the byte 0x{raw[error.start]:02x} at position {error.start}, which is not UTF-8"
        raise DataError(place, found, expected="UTF-8 text", fix="Convert the file to UTF-8") from error


def _stream_pieces(path: Path) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for _, line in _decoded_lines(path):
        held.append(line)
        size += len(line)
        if size >= STREAM_PIECE_CHARACTERS:
            yield "".join(held)
            held, size = [], 0
    if size:
        yield "".join(held)


def _text_rows(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    fix = "Use JSONL, CSV, TSV or parquet, or the task causal-lm"
    raise DataError(str(path), "found a plain text file, which has no columns", expected="rows with columns", fix=fix)


def _jsonl_rows(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    for number, line in _decoded_lines(path):
        if line.strip():
            place = f"{path}, line {number}"
            yield _json_row(_parsed_json(line, path=path, place=place), place=place)


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    opening = next((line.lstrip()[0] for _, line in _decoded_lines(path) if line.strip()), "")
    if opening != "[":
        yield from _jsonl_rows(path, columns)
        return
    text = "".join(line for _, line in _decoded_lines(path))
    for number, record in enumerate(_parsed_json(text, path=path, place=str(path)), start=1):
        yield _json_row(record, place=f"{path}, item {number}")


def _parsed_json(text: str, *, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = place if place != str(path) else f"{path}, line {error.lineno}"
        raise DataError(where, f"found malformed JSON at column {error.colno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(place, f"found JSON that cannot be read ({error})") from error


def _json_row(record: object, *, place: str) -> Row:
    if not isinstance(record, dict):
        raise DataError(place, f"found a JSON {type(record).__name__}", expected="an object with one key a column")
    return Row(place, record)


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    return _table_rows(path, _csv_cells(path), columns=columns)


def _tsv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    cells = ((number, line.rstrip("\r\n").split("\t")) for number, line in _decoded_lines(path) if line.strip("\r\n"))
    return _table_rows(path, cells, columns=columns)


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in _decoded_lines(path)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = "Close the quotes and double those inside; texts above 131,072 characters need JSONL"
            raise DataError(f"{path}, line {number}", f"found malformed CSV ({error})", fix=fix) from error
        if cells is None:
            return
        if cells:
            yield number, cells


def _table_rows(path: Path, lines: Iterator[tuple[int, list[str]]], *, columns: Sequence[str]) -> Iterator[Row]:
    number, cells = next(lines, (0, []))
    if not number:
        return
    if _without_header(path, columns):
        header = _numbered_columns(path, cells, columns)
        lines = chain([(number, cells)], lines)
    else:
        header = _named_columns(path, cells)
    for number, cells in lines:
        if len(cells) != len(header):
            found = f"found {counted(len(cells), 'column')}"
            raise DataError(f"{path}, line {number}", found, expected=f"{len(header)} as in the first line")
        yield Row(f"{path}, line {number}", dict(zip(header, cells, strict=True)))


def _without_header(path: Path, columns: Sequence[str]) -> bool:
    numbers = [column.isdecimal() for column in columns]
    if any(numbers) and not all(numbers):
        found = f"found both names and numbers for columns ({', '.join(columns)})"
        fix = "Name all columns when the file has a header, number all from 0 when it has none"
        raise DataError(str(path), found, expected="one or the other", fix=fix)
    return bool(numbers) and all(numbers)


def _numbered_columns(path: Path, cells: Sequence[str], columns: Sequence[str]) -> list[str]:
    last = max(int(column) for column in columns)
    if last >= len(cells):
        found = f"found {counted(len(cells), 'column')}"
        raise DataError(f"{path}, line 1", found, expected=f"one numbered {last} (counted from 0)")
    if all(cells[int(column)] == column for column in columns):
        found = f"found the numbers {', '.join(columns)} in those very columns, so it is a header or a row"
        raise DataError(f"{path}, line 1", found, fix="Rename the columns in the header, or remove that line")
    return [str(index) for index in range(len(cells))]


def _named_columns(path: Path, cells: Sequence[str]) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        fix = "A file without a header is read with numbers: data.columns = {text: '0', label: '1'}"
        raise DataError(f"{path}, line 1", f"found the column {twice[0]!r} twice", expected="distinct names", fix=fix)
    return list(cells)


def _parquet_rows(path: Path, _columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = _class_names(_hub_features(file.schema_arrow.metadata or {}))
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", _with_names(record, names))
    except (pa.ArrowException, OSError) as error:
        raise DataError(str(path), f"found a parquet file that cannot be read ({error})") from error


def _hub_rows(reference: str, hub: re.Match[str], *, default_split: str | None) -> Iterator[Row]:
    split = hub["split"] or default_split
    if split is None:
        fix = f"Write {reference}:validation, or whichever split it is"
        raise DataError(reference, "found no split", expected="an evaluation set that names its split", fix=fix)
    dataset = _load_hub(reference, hub["path"], config=hub["config"], split=split)
    names = _class_names(dataset.features.to_dict())
    for number, record in enumerate(dataset, start=1):
        yield Row(f"{reference}, row {number}", _with_names(record, names))


def _load_hub(reference: str, path: str, *, config: str | None, split: str) -> Any:
    import datasets

    try:
        return _encoded(datasets.load_dataset(path, config, split=split))
    except Exception as error:
        found = f"found no file of that name, and the hub gave no such data set ({type(error).__name__}: {error})"
        fix = "Check the spelling and the network, or download the data and name its files"
        raise DataError(reference, found.rstrip("."), expected="a file or a data set", fix=fix) from error


def _encoded(dataset: Any) -> Any:
    """With its images as bytes: decoding them is for later, and needs Pillow."""
    import datasets

    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _hub_features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """What the hub's parquet files say of their columns."""
    try:
        features: Mapping[str, Any] = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features


def _class_names(features: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Columns whose integers stand for names, and the names: `{"label": ["negative", "positive"]}`."""
    found: dict[str, Sequence[str]] = {}
    for column, feature in features.items():
        inner = feature[0] if isinstance(feature, list) else feature
        inner = inner.get("feature", inner)
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[column] = inner["names"]
    return found


def _with_names(record: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    return {key: _named(value, names.get(key)) for key, value in record.items()}


def _named(value: Any, names: Sequence[str] | None) -> Any:
    """The class's name; None where the data set says -1, its mark for "not labelled"."""
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if value >= 0 else None


READERS: Mapping[str, Reader] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}


def read_all(references: Iterable[str], *, columns: Mapping[str, str], default_split: str | None) -> Iterator[Row]:
    """The rows of several references, one after the other."""
    for reference in references:
        yield from read_rows(reference, columns=columns, default_split=default_split)
