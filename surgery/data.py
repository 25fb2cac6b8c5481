"""Data sets to token batches.

`inspect_labels` reads the class names (the head's size, before there is a model), `prepare` gives the tokenized sets
and the collator. Files are read by rows.py, understood by formats.py, and become token rows in data_tokens.py.

Nothing is cached: an edited file is always read anew. Tokenized sets live as long as they are used (arrow.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgery import arrow
from surgery.data_report import Counts, Report, share_of
from surgery.data_spec import DataSpec
from surgery.data_tokens import Tokenizing
from surgery.errors import DataError, closest, counted, shorten
from surgery.examples import Document, Example, Labelled, Pictured, Tagged, class_name, class_order
from surgery.formats import TEXT, Format, Shape, check_task, recognise
from surgery.images import TASK as IMAGES
from surgery.images import image_collator
from surgery.rows import Row, is_stream, read_rows, read_stream
from surgery.tokens import collator_of, padder_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """Sets and collator for the trainer. `pad_token_id` is the end-of-text token where the tokenizer has no other.

    `pads_left`: rows are padded on the left, as the tokenizer does.
    """

    train: Dataset
    eval: Dataset | None
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    labels: tuple[str, ...]
    pad_token_id: int
    pads_left: bool
    report: Report


def inspect_labels(spec: DataSpec, task: str) -> tuple[str, ...]:
    """The class names of the whole training set in id order, without a tokenizer; empty where a task has no classes.

    Raises: DataError: see `prepare`; a single class.
    """
    source = _Source.of(spec, task)
    return source.class_names() if task in ("sequence-classification", "token-classification", IMAGES) else ()


def is_packed(spec: DataSpec, task: str) -> bool:
    """Whether every row will be `max_length` tokens long, from the first row of the data. Raises: DataError."""
    return _packs(spec, _Source.of(spec, task).format)


def _packs(spec: DataSpec, format: Format) -> bool:
    return spec.pack_examples or (format.name == "text" and spec.packing)


def prepare(spec: DataSpec, *, task: str, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> Prepared:
    """Read, tokenize and (where asked) pack. The tokenizer is not changed. Same input, same output.

    Raises: DataError: anything about the data that cannot be trained on as asked, with file and line.
    """
    source = _Source.of(spec, task)
    names = labels or inspect_labels(spec, task)
    source = replace(source, classes=names)
    padder = padder_of(tokenizer)
    tokenizing = Tokenizing.of(spec, task=task, packed=_packs(spec, source.format), tokenizer=tokenizer, names=names)
    train, held = _train_and_eval(source, tokenizing)
    report = Report(
        source.format.name, tokenizing.packed, tokenizing.max_length, train.counts, held.counts if held else None
    )
    collator = collator_of(
        task,
        padder,
        fixed_length=tokenizing.max_length if spec.static_shapes else None,
        pad_to_multiple_of=spec.pad_to_multiple_of,
    )
    pad_token_id = cast("int", padder.pad_token_id)
    return Prepared(
        train=train.rows,
        eval=held.rows if held else None,
        collator=collator,
        labels=names,
        pad_token_id=pad_token_id,
        pads_left=padder.padding_side == "left",
        report=report,
    )


def prepare_images(spec: DataSpec, *, processor: Any, labels: tuple[str, ...] = ()) -> Prepared:
    """As `prepare`, for images: `processor` makes pixels of them batch by batch. Raises: DataError."""
    _check_for_images(spec)
    names = labels or inspect_labels(spec, IMAGES)
    source = replace(_Source.of(spec, IMAGES), classes=names)
    reading = Tokenizing(IMAGES, None, {name: index for index, name in enumerate(names)}, max_length=0, packed=False)
    train, held = _train_and_eval(source, reading)
    report = Report(source.format.name, False, 0, train.counts, held.counts if held else None)  # noqa: FBT003
    return Prepared(
        train=train.rows,
        eval=held.rows if held else None,
        collator=image_collator(processor),
        labels=names,
        pad_token_id=0,
        pads_left=False,
        report=report,
    )


def _check_for_images(spec: DataSpec) -> None:
    """No setting of texts is given. Raises: DataError."""
    for name in ("max_length", "packing"):
        if getattr(spec, name) != getattr(DataSpec, name):
            raise DataError(f"data.{name}", f"found {getattr(spec, name)} for images", expected="texts with it")


# --- which rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """The request with the format that its first file turned out to have.

    `classes`: those that a training row may be of; empty where there are none, or they are still to be found.
    """

    spec: DataSpec
    task: str
    format: Format
    classes: tuple[str, ...] = ()

    @staticmethod
    def of(spec: DataSpec, task: str) -> _Source:
        check_task(task)
        streams = [reference for reference in (*spec.train, *spec.eval) if is_stream(reference)]
        if streams:
            _check_streams(streams[0], spec=spec, task=task)
            return _Source(spec, task, TEXT)
        if spec.horizontal_flip and task != IMAGES:
            raise DataError("data.horizontal_flip", f"found it for {task}", expected=f"the task {IMAGES}")
        row = next(read_rows(spec.train[0], columns=spec.columns, default_split="train"))
        shape = recognise(row, task=task, format_name=spec.format, columns=spec.columns)
        if spec.pack_examples and task != "causal-lm":
            fix = "Leave it out: only causal language models read packed rows"
            raise DataError("data.pack_examples", f"found it for {task}", expected="the task causal-lm", fix=fix)
        return _Source(spec, task, shape.format)

    def train(self) -> Iterator[Example]:
        examples = self._limited(self._examples(self.spec.train, default_split="train"))
        return map(self._known, examples) if self.classes else examples

    def eval(self) -> Iterator[Example]:
        return self._limited(self._examples(self.spec.eval, default_split=None))

    def class_names(self) -> tuple[str, ...]:
        if self.format.classes:
            return self.format.classes
        names: set[str] = set()
        for example in self._examples(self.spec.train, default_split="train"):
            names.update(_classes_of(example))
        return class_order(names, place=", ".join(self.spec.train))

    def _known(self, example: Example) -> Example:
        """The example itself. Raises DataError where it has a class that was not named."""
        unknown = next((name for name in _classes_of(example) if name not in self.classes), None)
        if unknown is not None:
            fix = closest(unknown, self.classes) or "Give --labels as they stand in the data"
            expected = f"one of {shorten(', '.join(self.classes), 160)}"
            raise DataError(example.place, f"found the class {unknown!r}", expected=expected, fix=fix)
        return example

    def _limited(self, examples: Iterator[Example]) -> Iterator[Example]:
        return examples if self.spec.max_rows is None else islice(examples, self.spec.max_rows)

    def _examples(self, references: Iterable[str], *, default_split: str | None) -> Iterator[Example]:
        for reference in references:
            if is_stream(reference):
                yield from _stream(reference)
                continue
            rows = read_rows(reference, columns=self.spec.columns, default_split=default_split)
            first = next(rows)
            shape = self._shape(first)
            yield from shape.read(chain([first], rows))

    def _shape(self, first: Row) -> Shape:
        """Each file may name its columns differently, but all are of one format."""
        shape = recognise(first, task=self.task, format_name=self.spec.format, columns=self.spec.columns)
        if shape.format != self.format:
            fix = "Train on files of one format, or set data.format"
            raise DataError(first.place, f"found the format {shape.format.name}", expected=self.format.name, fix=fix)
        return shape


def _classes_of(example: Example) -> Sequence[str]:
    """The names of the classes that a row has. Raises DataError where its label names none."""
    if isinstance(example, Tagged):
        return example.tags
    return (class_name(example.label, place=example.place),) if isinstance(example, Labelled | Pictured) else ()


def _check_streams(reference: str, *, spec: DataSpec, task: str) -> None:
    """Plain text is one stream of tokens: it has neither columns nor rows, and can only be packed."""
    wrong = [
        (task != "causal-lm", f"found plain text for the task {task}", "the task causal-lm"),
        (spec.format not in ("auto", "text"), f"found plain text for the format {spec.format}", "the format text"),
        (not spec.packing, "found plain text, which is one stream, without packing", "data.packing"),
        (spec.max_rows is not None, "found plain text, which has no rows, with data.max_rows", "no limit of rows"),
    ]
    for is_wrong, found, expected in wrong:
        if is_wrong:
            raise DataError(reference, found, expected=expected, fix="Or give the texts as rows of JSONL or parquet")


def _stream(reference: str) -> Iterator[Example]:
    for piece in read_stream(reference):
        yield Document(reference, piece.text, begins=piece.first, ends=piece.last)


# --- the two sets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """A set, opened as soon as it is written so that it goes with its last user, and what became of its rows."""

    rows: Dataset
    counts: Counts


def _train_and_eval(source: _Source, tokenizing: Tokenizing) -> tuple[_Stored, _Stored | None]:
    spec = source.spec
    if spec.eval:
        train = _store("data.train", source.train(), tokenizing)
        return train, _store("data.eval", source.eval(), tokenizing)
    if not spec.eval_fraction:
        return _store("data.train", source.train(), tokenizing), None
    if any(is_stream(reference) for reference in spec.train):
        return _split_blocks(source, tokenizing)
    held = _held_rows(sum(1 for _ in source.train()), fraction=spec.eval_fraction, seed=spec.seed)
    kept = (example for index, example in enumerate(source.train()) if index not in held)
    other = (example for index, example in enumerate(source.train()) if index in held)
    return _store("data.train", kept, tokenizing), _store("data.eval_fraction", other, tokenizing)


def _held_rows(rows: int, *, fraction: float, seed: int) -> frozenset[int]:
    """Which rows are held out: a function of the seed and the number of rows."""
    return frozenset(random.Random(f"{seed}/held-out rows").sample(range(rows), _held_count(rows, fraction=fraction)))


def _held_count(rows: int, *, fraction: float) -> int:
    count = max(1, round(rows * fraction))
    if count >= rows:
        found = f"found {rows} rows or blocks to take {fraction} of"
        raise DataError("data.eval_fraction", found, expected="enough to leave one on each side")
    return count


def _store(where: str, examples: Iterator[Example], tokenizing: Tokenizing) -> _Stored:
    counts = Counts()
    file = arrow.write(tokenizing.rows(examples, counts))
    if not counts.loss_tokens:
        arrow.remove(file)
        raise _no_loss(where, counts, tokenizing)
    return _Stored(arrow.open_set(file), counts)


def _split_blocks(source: _Source, tokenizing: Tokenizing) -> tuple[_Stored, _Stored]:
    """The last blocks of a stream are held out: neighbours in a text are too alike to draw at random."""
    whole = _store("data.train", source.train(), tokenizing)
    total = whole.counts
    held = _held_count(total.examples, fraction=source.spec.eval_fraction)
    first, last = arrow.split(Path(whole.rows.cache_files[0]["filename"]), at=total.examples - held)
    return _Stored(first, share_of(total, total.examples - held)), _Stored(last, share_of(total, held))


def _no_loss(where: str, counts: Counts, tokenizing: Tokenizing) -> DataError:
    length = tokenizing.max_length
    if tokenizing.packed and counts.tail_tokens and not counts.dropped_rows:
        found = f"found {counted(counts.tail_tokens, 'token')}, fewer than one block"
        return DataError(where, found, expected=f"{length} or more", fix="Give more text, or lower data.max_length")
    found = f"found no token that carries loss in {counted(counts.rows, 'row')}"
    expected = f"an answer that begins within the first {length} tokens of at least one row"
    fix = "Raise data.max_length if the prompts are longer, and check that the rows have answers (assistant turns)"
    return DataError(where, found, expected=expected, fix=fix)
