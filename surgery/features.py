"""The states of a frozen backbone, kept in a file: computed in the first epoch, read from it in those that follow.

A cache folder holds `features.json` (what it is of, and its layout), `states.bin` (for each training row the states of
each read layer and the last hidden state, (states, tokens, width), in the backbone's dtype) and `done.bin` (a byte a
row: 1 once its states are on disk). A batch whose rows are all there runs without the backbone's layers: each returns
what it returned before. Embeddings, masks, the side network and what comes after the exit run as ever.

A row's states must not depend on how far it is padded: where they do, padding on the left is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from surgery.checkpoint import read_json
from surgery.delta import bits
from surgery.errors import BaseMismatchError, DamagedError, RecipeError, RequestError, ResourceError
from surgery.plan import SurgeryPlan
from surgery.side.settings import Stack
from surgery.stacks import DECODER, output_lengths
from surgery.survey import TASKS
from surgery.table import size_text
from surgery.writing import parse_size, replace_file, require_disk

if TYPE_CHECKING:
    from datasets import Dataset

ROW = "surgery_row"  # the column that numbers the rows of a training set
_RECORD, _STATES, _DONE = "features.json", "states.bin", "done.bin"
_SCHEMA = 2
_FLUSH_ROWS = 2048  # rows whose states are forced to disk together
_PROBE_TOKENS = 8  # of a row that is run alone, and padded by as many
_NOT_OF_STATES = ("_name_or_path", "transformers_version", "use_cache")  # entries of a configuration
_KEPT = {
    "schema": "by another version of this tool",
    "model": "of another model",
    "config": "of a model configured otherwise",
    "data": "of other data",
    "settings": "with other settings",
}


@dataclass(frozen=True)
class Layout:
    """Where each row's states lie. Offsets and sizes in values of `dtype`.

    tokens: of each stack, each row's; columns: of each stack, the column that it reads (`row_columns`).
    """

    stacks: tuple[Stack, ...]
    tokens: tuple[tuple[int, ...], ...]
    columns: tuple[str, ...]
    dtype: torch.dtype

    def kept(self, stack: Stack) -> list[str]:
        """The modules whose outputs are kept, in the order in which a forward meets them.

        Those of the layers that are read, and the exit's (which is the last layer's own where no norm follows).
        """
        modules = [f"{stack.layers}.{number}" for number in stack.read]
        return modules if stack.exit in modules else [*modules, stack.exit]

    @cached_property
    def offsets(self) -> list[list[int]]:
        """Of each stack, where each row begins: stacks one after the other."""
        result, position = [], 0
        for stack, tokens in zip(self.stacks, self.tokens, strict=True):
            each = len(self.kept(stack)) * stack.width
            starts = np.concatenate([[0], np.cumsum(np.asarray(tokens, dtype=np.int64) * each)])
            result.append([int(start) + position for start in starts])
            position = result[-1][-1]
        return result

    @property
    def size_bytes(self) -> int:
        return self.offsets[-1][-1] * self.dtype.itemsize


def row_columns(plan: SurgeryPlan) -> tuple[str, ...]:
    """Of each stack, the column whose rows are as long as its states.

    A decoder beside an encoder reads its labels; in a classifier, the input once more.
    """
    read = "input_ids" if TASKS[plan.task].has_head else "labels"
    return tuple(read if stack.name == DECODER else "input_ids" for stack in plan.stacks)


def row_tokens(rows: Any, plan: SurgeryPlan) -> tuple[tuple[int, ...], ...]:
    """Of each stack, the tokens of each row."""
    return tuple(tuple(len(row) for row in rows[column]) for column in row_columns(plan))


def describe(plan: SurgeryPlan, config: PretrainedConfig, rows: Dataset, precision: str) -> dict[str, str]:
    """What a cache is of: digests of the model, its configuration and the rows, and what is read in which precision.

    Of the rows: all that the model is given, and labels where a decoder reads them.
    """
    tokens = hashlib.sha256()
    for name in sorted({*rows.column_names, *row_columns(plan)}):
        if name != "labels" or name in row_columns(plan):
            tokens.update(f"{name}\n".encode())
            for row in rows[name]:
                tokens.update(np.asarray([len(row), *row], dtype=np.int64).tobytes())
    entries = json.loads(config.to_json_string(use_diff=False))
    kept = {name: value for name, value in entries.items() if name not in _NOT_OF_STATES}
    return {
        "model": plan.backbone_sha256,
        "config": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
        "data": tokens.hexdigest(),
        "settings": json.dumps([[asdict(stack) for stack in plan.stacks], precision]),
    }


class FeatureCache:
    """The states of a training set's rows, in a folder: one run's while it fills, everyone's once it is complete."""

    def __init__(self, folder: Path, key: Mapping[str, str], layout: Layout, *, max_bytes: int | None) -> None:
        """Open a cache, or begin one. Raises: ResourceError, BaseMismatchError, DamagedError, RequestError."""
        self.folder, self.layout = folder, layout
        try:
            _require_room(folder, layout, max_bytes)
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / _RECORD).open("a+")
        except OSError as error:
            raise RequestError(
                "--cache-features", f"{folder}: {error.strerror}", expected="a folder to write in", fix="Name another"
            ) from error
        try:
            self._take_lock()
            self._begin(key)
            dtype = {2: np.uint16, 4: np.uint32, 8: np.uint64}[layout.dtype.itemsize]
            self._states = np.memmap(folder / _STATES, dtype, mode="r+")
            self._done = np.fromfile(folder / _DONE, np.uint8)
            self._share()
        except BaseException:
            self._lock.close()  # and gives the lock back: whoever handles the error may keep this object alive
            raise
        self._offsets = layout.offsets
        self._unflushed: list[int] = []
        self._lengths: dict[str, int] = {}

    def _take_lock(self) -> None:
        record, done = self.folder / _RECORD, self.folder / _DONE
        is_finished = record.stat().st_size > 0 and done.is_file() and all(done.read_bytes())  # and will stay so
        try:
            fcntl.flock(self._lock, (fcntl.LOCK_SH if is_finished else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            found = "another run is writing it"
            raise RequestError(str(self.folder), found, expected="a cache of its own", fix="Name another") from error

    def _share(self) -> None:
        """Nothing is left to write: others may read."""
        if self.is_complete:
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _begin(self, key: Mapping[str, str]) -> None:
        size, record = self.layout.size_bytes, {"schema": _SCHEMA, **key, "bytes": self.layout.size_bytes}
        if (self.folder / _RECORD).stat().st_size:
            _require_same(self.folder, read_json(self.folder / _RECORD), record)
            _require_size(self.folder / _STATES, size)
            _require_size(self.folder / _DONE, len(self.layout.tokens[0]))
        else:
            with (self.folder / _STATES).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
            (self.folder / _DONE).write_bytes(bytes(len(self.layout.tokens[0])))
            self._lock.write(json.dumps(record, indent=2) + "\n")
            self._lock.flush()

    @property
    def is_complete(self) -> bool:
        """Whether every row is there."""
        return bool(self._done.all())

    @contextmanager
    def batch(self, model: nn.Module, rows: list[int], mask_bt: Tensor | None) -> Iterator[None]:
        """Around one forward of those rows: without the backbone where all are kept, else to keep them.

        mask_bt: the attention mask of the inputs, where rows are padded to one length.
        """
        with ExitStack() as stack:
            for number, description in enumerate(self.layout.stacks):
                mask = mask_bt if self.layout.columns[number] == "input_ids" else None
                if self._done[rows].all():
                    stack.enter_context(self._replaying(model, number, description, rows, mask))
                else:
                    stack.enter_context(self._keeping(model, number, description, rows, mask))
            yield
        if not self._done[rows].all():
            self._done[rows] = 1
            self._unflushed += rows
            if len(self._unflushed) >= _FLUSH_ROWS or self.is_complete:
                self.flush()

    def flush(self) -> None:
        """Force states to disk, and only then say that they are there."""
        if self._unflushed:
            self._states.flush()
            replace_file(self.folder / _DONE, self._done.tobytes())
            self._unflushed.clear()
            self._share()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._lock.close()

    @contextmanager
    def _keeping(
        self, model: nn.Module, number: int, stack: Stack, rows: Sequence[int], mask: Tensor | None
    ) -> Iterator[None]:
        handles = []
        for place, module in enumerate(self.layout.kept(stack)):
            keep = self._keeper(number, stack, place, rows, mask)
            handles.append(model.get_submodule(module).register_forward_hook(keep, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keeper(
        self, number: int, stack: Stack, place: int, rows: Sequence[int], mask: Tensor | None
    ) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            state_btd = (output if isinstance(output, Tensor) else output[0]).detach().to(self.layout.dtype).cpu()
            for line, row in enumerate(rows):
                count = self.layout.tokens[number][row]
                values = state_btd[line][_positions(mask, line, count, state_btd.shape[1])]
                start = self._offsets[number][row] + place * count * stack.width
                self._states[start : start + count * stack.width] = bits(values).reshape(-1)

        return keep

    @contextmanager
    def _replaying(
        self, model: nn.Module, number: int, stack: Stack, rows: Sequence[int], mask: Tensor | None
    ) -> Iterator[None]:
        kept = self.layout.kept(stack)
        tokens = mask.shape[1] if mask is not None else max(self.layout.tokens[number][row] for row in rows)
        states = self._read(number, stack, rows, mask, tokens).to(next(model.parameters()).device)
        by_module = dict(zip(kept, states, strict=True))
        replaced = []
        self._lengths = self._lengths or output_lengths(model, self.layout.stacks)
        layers = [f"{stack.layers}.{number}" for number in range(stack.depth)]
        for path in dict.fromkeys([*layers, stack.exit]):
            module = model.get_submodule(path)
            replaced.append(module)
            length = self._lengths[stack.name] if path in layers else 0
            module.forward = _returning(by_module.get(path), length)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward

    def _read(self, number: int, stack: Stack, rows: Sequence[int], mask: Tensor | None, length: int) -> Tensor:
        """(states, b, t, d), zero where there is padding."""
        count_states = len(self.layout.kept(stack))
        result = torch.zeros((count_states, len(rows), length, stack.width), dtype=self.layout.dtype)
        for line, row in enumerate(rows):
            count, start = self.layout.tokens[number][row], self._offsets[number][row]
            values = torch.from_numpy(self._states[start : self._offsets[number][row + 1]])
            values = values.view(self.layout.dtype).view(count_states, count, stack.width)
            result[:, line, _positions(mask, line, count, length)] = values
        return result


def open_cache(
    plan: SurgeryPlan,
    rows: Dataset,
    model: Any,
    folder: str,
    *,
    limit: str | None,
    precision: str,
    left_pad: int | None = None,
) -> FeatureCache:
    """The cache of a model's states on a training set, in `folder`.

    rows: a data set with columns of token numbers; limit: such as 20GB; precision: what the backbone computes in;
    left_pad: the token with which rows are padded on the left, None where padding is on the right.
    Raises: RecipeError where the backbone changes, or a row's states with its padding; ResourceError,
    BaseMismatchError, DamagedError, RequestError.
    """
    if not folder:
        raise RecipeError("--cache-features", "an empty name", expected="a folder", fix="Or leave it out")
    try:
        max_bytes = None if limit is None else parse_size(limit)
    except ValueError as error:
        raise RecipeError("--cache-bytes", repr(limit), expected="a size such as 20GB") from error
    dtype = next(model.parameters()).dtype
    layout = Layout(plan.stacks, row_tokens(rows, plan), row_columns(plan), dtype)
    if left_pad is not None and any(len(set(tokens)) > 1 for tokens in layout.tokens):
        _require_own_states(model, layout, max(rows["input_ids"], key=len), left_pad)
    key = describe(plan, model.config, rows, f"{dtype} {precision}")
    return FeatureCache(Path(folder), key, layout, max_bytes=max_bytes)


def _require_own_states(model: nn.Module, layout: Layout, row: Sequence[int], pad: int) -> None:
    """A row's states are the same where it is padded on the left. Raises: RecipeError.

    Two short forwards say so: rounding, as of rotations, stays far below half of the dtype's digits, and positions that
    count the padding far above. A decoder's mask has no place for padding before the first token.
    """
    ids = torch.tensor([row[:_PROBE_TOKENS]])
    padded = torch.cat([torch.full_like(ids, pad), ids], dim=1)
    if all(stack.name != DECODER for stack in layout.stacks):
        alone = _states(model, layout, ids, torch.ones_like(ids))
        beside = _states(model, layout, padded, (torch.arange(padded.shape[1]) >= ids.shape[1]).long()[None])
        gap = torch.stack([(b[:, -a.shape[1] :] - a).norm() / a.norm() for a, b in zip(alone, beside, strict=True)])
        if float(gap.max()) < torch.finfo(layout.dtype).eps ** 0.5:
            return
    found = f"rows are padded on the left, which changes their states in {type(model).__name__}"
    fix = "Set padding_side to right in the adapter's tokenizer_config.json, or leave out --cache-features"
    raise RecipeError("--cache-features", found, expected="states that are a row's own", fix=fix)


@torch.no_grad()
def _states(model: nn.Module, layout: Layout, ids_bt: Tensor, mask_bt: Tensor) -> list[Tensor]:
    """What a cache would keep of one forward."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).double())

    paths = [path for stack in layout.stacks for path in layout.kept(stack)]
    handles = [model.get_submodule(path).register_forward_hook(keep, prepend=True) for path in paths]
    try:
        model(input_ids=ids_bt, attention_mask=mask_bt)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _positions(mask: Tensor | None, line: int, count: int, length: int) -> slice:
    """Where a row's tokens stand in a padded batch: at its beginning, or at its end where padding is on the left."""
    is_left = mask is not None and count < length and not bool(mask[line, 0])
    return slice(length - count, length) if is_left else slice(0, count)


def _returning(state: Tensor | None, length: int) -> Callable[..., Any]:
    """A forward that computes nothing: what was kept, or, of a layer that is not read, its input."""

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        result = hidden_states if state is None else state
        return (result, *[None] * (length - 1)) if length else result

    return forward


def _require_room(folder: Path, layout: Layout, max_bytes: int | None) -> None:
    size = layout.size_bytes
    fix = "Raise --cache-bytes, read fewer layers (surgery apply --layers), or train without --cache-features"
    if max_bytes is not None and size > max_bytes:
        found = f"the states of {sum(map(sum, layout.tokens)):,} tokens take {size_text(size)}"
        raise ResourceError("--cache-bytes", found, expected=f"at most {size_text(max_bytes)}", fix=fix)
    there = folder / _STATES
    if not there.is_file():
        nearest = next(path for path in (folder, *folder.resolve().parents) if path.is_dir())
        require_disk(nearest, size, fix="Free some space or name another folder with --cache-features")


def _require_size(path: Path, size: int) -> None:
    """Raises DamagedError where a file is absent or was cut."""
    found = f"{path.stat().st_size:,} bytes" if path.is_file() else "it is not there"
    if found != f"{size:,} bytes":
        raise DamagedError(str(path), found, expected=f"{size:,} bytes", fix="Remove the cache's folder")


def _require_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    other = [text for name, text in _KEPT.items() if found.get(name) != wanted[name]]
    if other:
        raise BaseMismatchError(
            str(folder),
            f"the states there were kept {' and '.join(other)}",
            expected="a cache of this model, this data and these settings",
            fix="Name another folder with --cache-features, or remove this one",
        )


def numbered(collator: Callable[..., Any]) -> Callable[..., Any]:
    """A collator whose batches say which rows they are of."""

    def collate(features: list[dict[str, Any]]) -> Any:
        rows = [feature.pop(ROW) for feature in features if ROW in feature]
        batch = collator(features)
        if rows:
            batch[ROW] = torch.tensor(rows)
        return batch

    return collate
