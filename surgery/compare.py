"""What differs between two checkpoints, tensor by tensor and column by column, in constant memory.

Values are the same when their bits are: 0.0 and -0.0 differ (by 0), a NaN equals itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.checkpoint import Checkpoint
from surgery.delta import ADAPTER_FILE
from surgery.errors import RequestError
from surgery.manifest import ADAPTER, read_record
from surgery.table import align, ranges
from surgery.tensorfile import DTYPE_BITS, TORCH_NAMES, TensorInfo, read_range, tensor_from_bytes

IDENTICAL, VALUES, DTYPE, SHAPE, ONLY_A, ONLY_B = "identical", "values", "dtype", "shape", "only in A", "only in B"
_SHOWN_CHARACTERS = 60
BLOCK_VALUES = 1 << 18
_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Lines:
    """The columns (axis 1) or rows (axis 0) that hold every difference, whichever are the smaller part, out of `total`.

    A column of a convolution's kernel (o, i, h, w) is an input channel.
    `numbers` is left empty where all of them differ.
    """

    axis: int
    count: int
    total: int
    numbers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return ("row", "column")[self.axis]


@dataclass(frozen=True)
class TensorComparison:
    """One tensor of either checkpoint.

    `status`: one of the words above. `changed`: values whose bits (between two dtypes, whose numbers) differ, out of
    `values`. `largest`, `mean`: absolute difference, the mean over the changed values. `not_finite`: how many changed
    values have a difference that is no finite number; they are in neither.
    """

    name: str
    status: str
    in_a: str = ""
    in_b: str = ""
    values: int = 0
    changed: int = 0
    lines: Lines | None = None
    largest: float | None = None
    mean: float | None = None
    not_finite: int = 0


@dataclass(frozen=True)
class Comparison:
    """All tensors of both checkpoints, by name. prefix_a, prefix_b: what stands before that one's names alone."""

    a: str
    b: str
    tensors: tuple[TensorComparison, ...]
    prefix_a: str = ""
    prefix_b: str = ""

    @property
    def is_identical(self) -> bool:
        has_own_names = not self.prefix_a and not self.prefix_b
        return has_own_names and all(tensor.status == IDENTICAL for tensor in self.tensors)

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each status; those that none has are left out."""
        statuses = [tensor.status for tensor in self.tensors]
        return {s: statuses.count(s) for s in (IDENTICAL, VALUES, DTYPE, SHAPE, ONLY_A, ONLY_B) if s in statuses}

    @property
    def different(self) -> tuple[TensorComparison, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.status != IDENTICAL)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: the counts and every tensor that differs."""
        facts = {"a": self.a, "b": self.b, "identical": self.is_identical, "counts": self.counts}
        facts |= {"prefix_a": self.prefix_a, "prefix_b": self.prefix_b}
        return {**facts, "tensors": [asdict(tensor) for tensor in self.different]}

    def lines(self) -> list[str]:
        """A table of the tensors that differ, and the counts."""
        head = ("tensor", "differs in", "which", "changed values", "largest", "mean")
        rows = [_row(tensor) for tensor in self.different]
        total = ", ".join(f"{count} {_SAYS[status]}" for status, count in self.counts.items()) or "no tensors"
        table = [*align([head, *rows], right=(3, 4, 5)), ""] if rows else []
        sides = [
            f"{side}: {folder}" + (f" (where names begin with {prefix}, left out here)" if prefix else "")
            for side, folder, prefix in (("A", self.a, self.prefix_a), ("B", self.b, self.prefix_b))
        ]
        return [*sides, "", *table, f"{len(self.tensors)} tensors: {total}"]


_SAYS = {
    IDENTICAL: "identical",
    VALUES: "with other values",
    DTYPE: "of another dtype",
    SHAPE: "of another shape",
    ONLY_A: "only in A",
    ONLY_B: "only in B",
}


def _row(tensor: TensorComparison) -> tuple[str, ...]:
    kinds = f"{tensor.in_a} -> {tensor.in_b}" if tensor.status in (DTYPE, SHAPE) else tensor.status
    if not tensor.changed:
        return (tensor.name, kinds, "", "", "", "")
    numbers = ("" if number is None else f"{number:.3g}" for number in (tensor.largest, tensor.mean))
    return (tensor.name, kinds, _which(tensor.lines), f"{tensor.changed:,} of {tensor.values:,}", *numbers)


def _which(lines: Lines | None) -> str:
    if lines is None:
        return ""
    if lines.count == lines.total:
        return f"all {lines.total} {lines.name}s"
    text = ranges(lines.numbers)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS].rpartition(',')[0]},.."
    return f"{lines.count} of {lines.total} {lines.name}s: {text}"


def compare(a: Path, b: Path) -> Comparison:
    """Compare two model folders. Raises: NotAModelError, DamagedError; RequestError for an adapter folder."""
    first, second = _open(a), _open(b)
    prefix_a, prefix_b = _prefix(first, second), _prefix(second, first)
    mine, theirs = _by_name(first, second, prefix_a), _by_name(second, first, prefix_b)
    tensors = (
        _compare_tensor(name, first, mine.get(name, ""), second, theirs.get(name, ""))
        for name in sorted({*mine, *theirs})
    )
    return Comparison(str(a), str(b), tuple(tensors), prefix_a, prefix_b)


def _prefix(one: Checkpoint, other: Checkpoint) -> str:
    """What a task's class puts before the other's names (`bert.`), empty where it puts nothing there."""
    parts = (name.partition(".") for name in one if name not in other)
    counts = Counter(f"{first}." for first, _, rest in parts if rest in other and rest not in one)
    return max(counts, key=lambda prefix: counts[prefix], default="")


def _by_name(one: Checkpoint, other: Checkpoint, prefix: str) -> dict[str, str]:
    """The checkpoint's own name of each tensor, by the name without the prefix that the other does not have."""
    short = {name: name.removeprefix(prefix) for name in one}
    return {short[name] if short[name] in other and short[name] not in one else name: name for name in one}


def _open(folder: Path) -> Checkpoint:
    if (folder / ADAPTER_FILE).is_file():
        way = "--format remote-code (or onnx)" if read_record(folder, ADAPTER).plan.stacks else "--merge"
        raise RequestError(str(folder), "an adapter folder", expected="a whole model",
                           fix=f"Export it first: surgery export {folder} {way}")  # fmt: skip
    return Checkpoint.open(folder)


def _compare_tensor(name: str, a: Checkpoint, in_a: str, b: Checkpoint, in_b: str) -> TensorComparison:
    """in_a, in_b: what the tensor is called there, empty where it is not."""
    one, other = a.get(in_a), b.get(in_b)
    if one is None or other is None:
        return TensorComparison(name, ONLY_B if one is None else ONLY_A, _kind(one), _kind(other))
    if one.shape != other.shape:
        return TensorComparison(name, SHAPE, _kind(one), _kind(other))
    if one.dtype != other.dtype and not {one.dtype, other.dtype} <= set(TORCH_NAMES):
        return TensorComparison(name, DTYPE, _kind(one), _kind(other))
    return replace(_Tally(one, other).run(a.path_of(in_a), b.path_of(in_b)), name=name)


def _kind(info: TensorInfo | None) -> str:
    return f"{info.dtype} {list(info.shape)}" if info else ""


class _Tally:
    """The running sums over one tensor: a bit for each row and column, never a list of values."""

    def __init__(self, one: TensorInfo, other: TensorInfo) -> None:
        self.one, self.other = one, other
        self.is_same_type = one.dtype == other.dtype
        shape = (
            one.shape if DTYPE_BITS[one.dtype] >= 8 else ()
        )  # below a byte neither rows nor columns can be told apart
        self.width = math.prod(shape[1:])
        self.rows = np.zeros(shape[0] if shape else 0, dtype=bool)
        has_columns = len(shape) in (2, 4)  # axis 1 of other tensors, a mixture's experts among them, is no input
        self.columns = np.zeros(shape[1] if has_columns else 0, dtype=bool)
        self.behind = math.prod(shape[2:])
        self.changed = self.finite = 0
        self.largest = self.total = 0.0

    def run(self, a: Path, b: Path) -> TensorComparison:
        """Go through both tensors' bytes side by side."""
        first = 0
        for mine, theirs in _blocks(self.one, self.other, a, b):
            if not self.is_same_type or not np.array_equal(_bits(self.one, mine), _bits(self.other, theirs)):
                self._add(first, mine, theirs)
            first += len(mine) // _width_bytes(self.one)
        return self._result()

    def _add(self, first: int, mine: memoryview, theirs: memoryview) -> None:
        """One block of values, the first of which is value number `first`."""
        x, y = _numbers(self.one, mine), _numbers(self.other, theirs)
        if self.is_same_type:
            differs = _bits(self.one, mine) != _bits(self.other, theirs)
        else:
            differs = (x != y) & ~(np.isnan(x) & np.isnan(y))
        self.changed += int(differs.sum())
        where = np.flatnonzero(differs) + first
        if self.rows.size:
            self.rows[where // self.width] = True
        if self.columns.size:
            self.columns[where % self.width // self.behind] = True
        if x.size:
            self._add_gaps(x[differs], y[differs])

    def _add_gaps(self, x: _Numbers, y: _Numbers) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.abs(x - y)
        gaps = gaps[np.isfinite(gaps)]
        self.finite += len(gaps)
        self.largest = max(self.largest, float(gaps.max(initial=0.0)))
        self.total += float(gaps.sum())

    def _result(self) -> TensorComparison:
        status = DTYPE if not self.is_same_type else VALUES if self.changed else IDENTICAL
        values = self.one.size_bytes // _width_bytes(self.one)
        facts = TensorComparison(self.one.name, status, _kind(self.one), _kind(self.other), values, self.changed)
        if not self.changed:
            return facts
        facts = replace(facts, lines=self._lines())
        if self.one.dtype not in TORCH_NAMES:
            return facts
        mean = self.total / self.finite if self.finite else None
        largest = self.largest if self.finite else None
        return replace(facts, largest=largest, mean=mean, not_finite=self.changed - self.finite)

    def _lines(self) -> Lines | None:
        masks = {axis: mask for axis, mask in ((1, self.columns), (0, self.rows)) if mask.size}
        if not masks:
            return None
        axis = min(masks, key=lambda number: (float(masks[number].mean()), int(masks[number].sum())))
        numbers = np.flatnonzero(masks[axis]).tolist()
        total = len(masks[axis])
        return Lines(axis, len(numbers), total, tuple(numbers) if len(numbers) < total else ())


def _width_bytes(info: TensorInfo) -> int:
    """Bytes of one value; of a type below a byte, one byte counts as one value."""
    return max(1, DTYPE_BITS[info.dtype] // 8)


def _blocks(one: TensorInfo, other: TensorInfo, a: Path, b: Path) -> Iterator[tuple[memoryview, memoryview]]:
    """The bytes of the same values of both tensors. Each pair is valid until the next one."""
    mine = read_range(a, one.begin, one.end, BLOCK_VALUES * _width_bytes(one))
    theirs = read_range(b, other.begin, other.end, BLOCK_VALUES * _width_bytes(other))
    return zip(mine, theirs, strict=True)


def _bits(info: TensorInfo, block: memoryview) -> npt.NDArray[np.unsignedinteger[Any]]:
    return np.frombuffer(block, f"u{_width_bytes(info)}")


def _numbers(info: TensorInfo, block: memoryview) -> _Numbers:
    """The values of a block in float64; none where torch has no such type."""
    if info.dtype not in TORCH_NAMES:
        return np.empty(0)
    numbers: _Numbers = tensor_from_bytes(bytearray(block), info.dtype, (-1,)).double().numpy()
    return numbers
