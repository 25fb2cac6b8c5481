"""Bring a PaCA adapter into an ONNX file that exists already, whoever exported it and whatever its weights are called.

Weights are recognised by content. Every line (a row or a column) of a base weight has a digest; where the digests of
successive lines of an initializer are those of a base weight, the weight lies there: as it is, transposed, or packed
beside others. Digests only find: what was written is compared with the merged weight byte for byte in the end.

Only lines that training changed are rewritten. External data is streamed; one tensor's new values are in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from exporters.dense import export_record, require_targets
from exporters.onnx_file import (
    Bits,
    Graph,
    Initializer,
    external_entries,
    matrix_shape,
    numbered,
    read_graph,
    unsigned,
)
from surgery.adapter import copy_small_files, find_base, open_adapter
from surgery.checkpoint import INDEX_FILE, RECORD_FILE, Checkpoint, path_inside, read_json
from surgery.delta import (
    ColumnDelta,
    ColumnPatch,
    bits,
    count_not_finite,
    patched_chunks,
    require_base,
    require_columns,
)
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    DamagedError,
    RefusedError,
    UnsupportedError,
    counted,
    shorten,
)
from surgery.lookup import require_extra
from surgery.manifest import PATCHED, Check
from surgery.plan import SurgeryPlan, Target
from surgery.runs import notes_of
from surgery.tensorfile import (
    FLOAT_DTYPES,
    read_range,
    tensor_from_bytes,
    tensor_to_bytes,
    torch_dtype,
)
from surgery.writing import CheckpointWriter, StreamWriter, require_apart, require_disk, write_file

_EXPORT_ANEW = "Merge it with --merge --format onnx, which writes a new graph"

_Piece: TypeAlias = tuple[int, Iterator[memoryview]]
Digests: TypeAlias = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]  # of the rows, of the columns


@dataclass(frozen=True, order=True)
class Block:
    """Where a base weight lies in an initializer: first row and column, how many of each, whether transposed."""

    row: int
    column: int
    rows: int
    columns: int
    weight: str
    is_transposed: bool

    def overlaps(self, other: Block) -> bool:
        """Whether some values are of both."""
        rows = max(self.row, other.row) < min(self.row + self.rows, other.row + other.rows)
        return rows and max(self.column, other.column) < min(self.column + self.columns, other.column + other.columns)


@dataclass(frozen=True)
class Match:
    """An initializer that changes, and the base weights in it."""

    initializer: Initializer
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class PatchResult:
    """The folder written, the .onnx in it, and per changed initializer which base weights lie where in it.

    notes: what its users must know.
    """

    out: Path
    onnx: Path
    blocks: Mapping[str, tuple[Block, ...]]
    notes: tuple[str, ...] = ()


def patch(
    onnx: str | Path, adapter: str | Path, out: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> PatchResult:
    """Write the folder `out`: the ONNX file with the adapter's columns in it, its data and the small files beside it.

    base: the adapter's base, where it is not the one recorded.
    Raises: UnsupportedError: READ, a new head, a quantized weight, no package onnx; BaseMismatchError: another base, a
    weight that is not in the file; RefusedError: a weight that cannot be told from another; PathEscapeError,
    DamagedError: external data; CheckError: values too large for the file's dtype, or a wrong result;
    NotAModelError, OutputExistsError, ResourceError.
    """
    path, opened, out = Path(onnx), open_adapter(adapter), Path(out)
    delta = require_columns(opened.delta, "surgery patch")
    require_extra("surgery patch", "onnx")
    root = find_base(opened.record, opened.folder, base)
    checkpoint = Checkpoint.open(root)
    require_targets(checkpoint, opened.plan)
    _require_old_heads(checkpoint, delta)
    graph = read_graph(path)
    require_apart(out, [path.parent, opened.folder, root])
    matches = find_matches(graph, checkpoint, delta)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        _write(writer.path, graph, delta, matches)
        check_result(writer.path / path.name, graph, checkpoint, delta, matches)
        blocks = {match.initializer.name: match.blocks for match in matches}
        settings = {"format": PATCHED, "onnx": path.name, "initializers": sorted(blocks)}
        record = export_record(PATCHED, opened, root, out, settings, hub=base is None)
        held = Check("patched weights", "passed", f"in {counted(len(blocks), 'tensor')} all are the merged ones")
        record = replace(record, manifest=replace(record.manifest, checks=(held,)))
        write_file(writer.path / RECORD_FILE, record.to_json())
    return PatchResult(out, out / path.name, blocks, notes_of(opened))


def _require_old_heads(checkpoint: Checkpoint, delta: ColumnDelta) -> None:
    """Raises UnsupportedError for a head that the base, and so the ONNX file, does not have in this shape."""
    for target in delta.plan.whole:
        if not target.sha256 or checkpoint[target.weight].shape != target.shape:
            raise UnsupportedError(target.parameter, "a head that the base does not have in this shape",
                                   expected="one that can be replaced in the graph", fix=_EXPORT_ANEW)  # fmt: skip


# --- digests of lines


def _cast_rows(views: Iterable[memoryview], dtype: str, wanted: str, width: int) -> Iterator[tuple[int, Bits]]:
    """A base weight's bytes as rows of `width` values, as an ONNX file holds them in the dtype `wanted`."""
    for first, rows in numbered(np.frombuffer(view, unsigned(dtype)).reshape(-1, width) for view in views):
        values = tensor_from_bytes(bytearray(rows), dtype, rows.shape) if dtype != wanted else None
        yield first, rows if values is None else bits(values.to(torch_dtype(wanted)))


def _factors(count: int) -> npt.NDArray[np.uint64]:
    """Odd pseudo-random numbers, the same ones in every run."""
    factors: npt.NDArray[np.uint64] = 2 * np.random.default_rng(0).integers(0, 1 << 63, count, dtype=np.uint64) + 1
    return factors


def digest_lines(shape: tuple[int, int], chunks: Iterable[tuple[int, Bits]]) -> Digests:
    """Digests of all rows and of all columns in one pass; equal lines have equal ones, whichever way they run.

    Shapes: chunks (first row, (n, columns)); returns (rows,) and (columns,) uint64.
    A digest is the sum of a line's bits, value by value, times odd factors, modulo 2**64: sums over chunks give both.
    Source: multilinear hashing, Lemire and Kaser, arXiv 1202.4961.
    """
    rows, columns = np.empty(shape[0], np.uint64), np.zeros(shape[1], np.uint64)
    down, across = _factors(shape[0]), _factors(shape[1])
    for first, chunk in chunks:
        last = first + len(chunk)
        rows[first:last] = np.einsum("ij,j->i", chunk, across)
        columns += np.einsum("i,ij->j", down[first:last], chunk)
    return rows, columns


def _digest_base(
    checkpoint: Checkpoint, plan: SurgeryPlan, shapes: set[tuple[int, int]], dtypes: Iterable[str]
) -> dict[tuple[str, str], Digests]:
    """Digests by (weight, dtype) of what changes and of what could be taken for it. Raises: BaseMismatchError."""
    targets = {target.weight: target for target in plan.targets}
    digests = {}
    for name, info in checkpoint.items():
        shape = matrix_shape(info.shape)
        if info.dtype in FLOAT_DTYPES and shape in shapes:
            for dtype in dtypes:
                views = (view for _, view in checkpoint.row_chunks(name))
                digests[name, dtype] = digest_lines(shape, _cast_rows(views, info.dtype, dtype, shape[1]))
        if name in targets:
            require_base(targets[name], checkpoint.sha256(name), str(checkpoint.root))
    return digests


# --- what changes


@dataclass(frozen=True)
class Change:
    """New lines of a base weight: columns for axis 1, rows for axis 0.

    Shapes: lines (n,); values and original (length of a line, n), in the base's dtype.
    """

    axis: int
    lines: Tensor
    values: Tensor
    original: Tensor

    def outcome(self) -> str:
        """A digest of what becomes of the weight; empty where nothing moved."""
        new = bits(self.values)
        moved = np.flatnonzero((new != bits(self.original)).any(axis=0))
        text = f"{self.axis} {self.lines.numpy()[moved].tolist()}".encode() + new[:, moved].tobytes()
        return hashlib.sha256(text).hexdigest() if len(moved) else ""


def _read_change(delta: ColumnDelta, weight: str) -> Change:
    """A weight's columns, or all of a head's."""
    for target in delta.plan.targets:
        if target.weight == weight:
            columns = delta.patches[target.module]
            if len(target.sizes) == 4:
                return _read_channels(target, columns)
            return Change(target.input_axis, columns.columns, columns.stored(), columns.original)
    head = next(head for head in delta.plan.whole if head.weight == weight)
    whole, shape = delta.whole[head.parameter], matrix_shape(head.shape)
    original = cast("Tensor", whole.original).reshape(shape)
    return Change(1, torch.arange(shape[1]), whole.values.to(original.dtype).reshape(shape), original)


def _read_channels(target: Target, columns: ColumnPatch) -> Change:
    """A convolution's columns as rows of its kernel (o, i, h, w), which as a matrix is (o * i * h, w)."""
    outputs, channels, height, width = target.sizes
    first = torch.arange(outputs)[:, None, None] * channels + columns.columns[:, None]
    lines = (first * height + torch.arange(height)).flatten()  # (o, r, h)

    def as_rows(values: Tensor) -> Tensor:
        kernel = values.reshape(outputs, height, width, len(columns.columns))
        return kernel.permute(2, 0, 3, 1).reshape(width, -1)

    return Change(0, lines, as_rows(columns.stored()), as_rows(columns.original))


# --- which base weight lies where


def _could_hold(shape: tuple[int, int], weight: tuple[int, int]) -> bool:
    pairs = (weight, weight[::-1])
    return any(shape[a] == pair[a] and shape[1 - a] >= pair[1 - a] for pair in pairs for a in (0, 1))


def find_blocks(digests: Digests, known: Mapping[str, Digests]) -> list[Block]:
    """Every place of a matrix where successive lines are those of a known one, sorted."""
    found = set()
    for (name, lines), axis, other in ((k, a, b) for k in known.items() for a in (0, 1) for b in (0, 1)):
        ours, theirs = digests[axis], lines[other]
        is_vector = len(lines[1]) == 1  # parts of a vector would be found by chance
        fits = len(theirs) == len(ours) if is_vector else len(theirs) <= len(ours)
        if not fits or len(digests[1 - axis]) != len(lines[1 - other]):
            continue
        for start in np.flatnonzero(ours[: len(ours) - len(theirs) + 1] == theirs[0]).tolist():
            if np.array_equal(ours[start : start + len(theirs)], theirs):
                row, column = (start, 0) if axis == 0 else (0, start)
                rows, columns = len(lines[axis ^ other]), len(lines[1 ^ axis ^ other])
                found.add(Block(row, column, rows, columns, name, axis != other))
    return sorted(found)


def find_matches(graph: Graph, checkpoint: Checkpoint, delta: ColumnDelta) -> list[Match]:
    """The initializers that change. Every weight of the plan must lie in one at least.

    Raises: BaseMismatchError, UnsupportedError: a weight that is missing, or quantized; RefusedError: ambiguous.
    """
    weights = [target.weight for target in delta.plan.targets] + [head.weight for head in delta.plan.whole]
    outcomes = {weight: _read_change(delta, weight).outcome() for weight in weights}
    shapes = {matrix_shape(checkpoint[weight].shape) for weight in outcomes}
    candidates = [i for i in graph.initializers if any(_could_hold(i.shape, shape) for shape in shapes)]
    dtypes = sorted({initializer.dtype for initializer in candidates})
    base = _digest_base(checkpoint, delta.plan, shapes | {shape[::-1] for shape in shapes}, dtypes)
    _require_distinct(graph, base, outcomes)
    matches: list[Match] = []
    seen: set[str] = set()
    for initializer in candidates:
        known = {name: digests for (name, dtype), digests in base.items() if dtype == initializer.dtype}
        blocks = find_blocks(digest_lines(initializer.shape, initializer.row_chunks()), known)
        seen.update(block.weight for block in blocks)
        changing = tuple(block for block in blocks if outcomes.get(block.weight))
        if changing:
            _require_plain(graph, initializer)
            _require_one_meaning(initializer, blocks, outcomes)
            matches.append(Match(initializer, changing))
    missing = [weight for weight in outcomes if weight not in seen]
    if missing:
        raise _explain_missing(graph, missing, dtypes)
    return matches


def _require_distinct(graph: Graph, base: Mapping[tuple[str, str], Digests], outcomes: Mapping[str, str]) -> None:
    """Raises RefusedError for a weight that any constant of the graph could be taken for."""
    for (weight, _), digests in base.items():
        if outcomes.get(weight) and all((lines == lines[0]).all() for lines in digests):
            raise RefusedError(f"{graph.path}: {weight}", "its values are all equal in the base",
                               expected="values that can be recognised", fix=_EXPORT_ANEW)  # fmt: skip


def _require_plain(graph: Graph, initializer: Initializer) -> None:
    """Raises UnsupportedError where something else depends on an initializer's values."""
    surplus = sorted(set(external_entries(initializer.proto)) - {"location", "offset", "length"})
    if surplus:
        raise UnsupportedError(initializer.name, f"external data with {surplus[0]!r}", expected="plain data",
                               fix="Save it without checksums and prepacked weights")  # fmt: skip
    for node in graph.quantized:
        if initializer.name in node.input:
            raise UnsupportedError(initializer.name, f"a weight that {node.op_type} reads", expected="a plain weight",
                                   fix="Patch the model before it is quantized")  # fmt: skip


def _require_one_meaning(initializer: Initializer, blocks: Sequence[Block], outcomes: Mapping[str, str]) -> None:
    """Raises RefusedError where the same values are those of two weights that differ after training."""
    for one, two in combinations(blocks, 2):
        outcome, other = outcomes.get(one.weight, ""), outcomes.get(two.weight, "")
        same = replace(one, weight=two.weight) == two  # in the same place, and the same way
        if one.overlaps(two) and (outcome or other) and not (same and outcome == other):
            names = one.weight if one.weight == two.weight else f"{one.weight} and {two.weight}"
            raise RefusedError(initializer.name, f"{names}, equal in the base, differ after training",
                               expected="values with one meaning", fix=_EXPORT_ANEW)  # fmt: skip


def _explain_missing(graph: Graph, missing: Sequence[str], dtypes: Sequence[str]) -> RefusedError | UnsupportedError:
    where, found = str(graph.path), f"{counted(len(missing), 'weight')} not found by content, first {missing[0]}"
    if graph.quantized:
        kinds = ", ".join(sorted({node.op_type for node in graph.quantized}))
        return UnsupportedError(where, f"{found}; it is quantized ({kinds})", expected="weights in floating point",
                                fix="Patch the model before it is quantized")  # fmt: skip
    expected = f"exactly the base's values in {' or '.join(dtypes) or 'floating point'}"
    return BaseMismatchError(where, found, expected=expected, fix="Name the base it was exported from with --base")


# --- writing and checking


def _write(folder: Path, graph: Graph, delta: ColumnDelta, matches: Sequence[Match]) -> None:
    _copy_beside(folder, graph)
    with StreamWriter() as stream:
        for location, path in graph.files.items():
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            inside = {m.initializer.begin: m for m in matches if m.initializer.path == path}  # shared bytes: once
            stream.write(folder / location, b"", _pieces(path, inside, delta))
    inline = [match for match in matches if match.initializer.path is None]
    for match in inline:
        proto, data = match.initializer.proto, b"".join(_patched(match, delta))
        for field in ("float_data", "double_data", "int32_data"):
            proto.ClearField(field)
        proto.raw_data = data
    write_file(folder / graph.path.name, graph.model.SerializeToString() if inline else graph.path.read_bytes())


def _copy_beside(folder: Path, graph: Graph) -> None:
    """Small files that stand beside the graph, once there is room for all of it. Raises: ResourceError."""
    beside = Checkpoint(graph.path.parent, {}, None)
    small = [path_inside(beside.root, name) for name in beside.small_files()]
    require_disk(folder, sum(path.stat().st_size for path in (graph.path, *graph.files.values(), *small)))
    copy_small_files(beside, folder, None)
    index = path_inside(beside.root, INDEX_FILE)
    if index.is_file() and set(read_json(index).get("weight_map", {"": ""}).values()) <= set(graph.files):
        write_file(folder / INDEX_FILE, index.read_bytes())


def _pieces(path: Path, inside: Mapping[int, Match], delta: ColumnDelta) -> Iterator[_Piece]:
    """A data file with changed initializers, by their first byte, in place. Raises: DamagedError: they overlap."""
    position = 0
    for begin, match in sorted(inside.items()):
        if begin < position:
            raise DamagedError(match.initializer.name, f"it begins inside another, at byte {begin} of {path.name}",
                               expected=f"byte {position} or later")  # fmt: skip
        yield position, read_range(path, position, begin)
        yield begin, _patched(match, delta)
        position = match.initializer.end
    yield position, read_range(path, position, path.stat().st_size)


def _patched(match: Match, delta: ColumnDelta) -> Iterator[memoryview]:
    """The bytes of an initializer with its new lines. Raises: CheckError."""
    dtype = match.initializer.dtype
    changes = [(block, _read_change(delta, block.weight)) for block in match.blocks]
    new = [_fitting(block.weight, change.values, dtype) for block, change in changes]
    for first, rows in match.initializer.row_chunks():
        for (block, change), values in zip(changes, new, strict=True):
            _put(rows, first, block, change, values)
        yield rows.data.cast("B")


def _fitting(weight: str, values: Tensor, dtype: str) -> Bits:
    stored = values.to(torch_dtype(dtype))
    if overflows := count_not_finite(stored):
        raise CheckError(weight, f"{overflows} values too large for {dtype}", expected="all values to fit",
                         fix="Export the base to ONNX in bf16 or fp32")  # fmt: skip
    return bits(stored)


def _put(rows_nc: Bits, first: int, block: Block, change: Change, values: Bits) -> None:
    """Replace a block's lines where they cross rows [first, first + n) of its initializer."""
    begin, end = max(first, block.row), min(first + len(rows_nc), block.row + block.rows)
    if begin >= end:
        return
    part = rows_nc[begin - first : end - first, block.column : block.column + block.columns]
    lines, begin, end = change.lines.numpy(), begin - block.row, end - block.row
    if change.axis ^ block.is_transposed:
        part[:, lines] = values[begin:end]
    else:
        here = np.flatnonzero((lines >= begin) & (lines < end))
        part[lines[here] - begin] = values[:, here].T


def _fault(path: Path) -> str:
    """What onnx.checker says against a file; empty for a valid one."""
    from onnx import checker

    try:
        checker.check_model(str(path))
    except checker.ValidationError as error:
        return str(error)
    return ""


def check_result(
    path: Path, graph: Graph, checkpoint: Checkpoint, delta: ColumnDelta, matches: Sequence[Match]
) -> None:
    """The file is as valid as it was, and each weight in it is the merged one, byte for byte in its layout.

    Raises: CheckError.
    """
    fault = _fault(path)
    if fault and fault != _fault(graph.path):  # onnxruntime saves some models that the checker never accepts
        raise CheckError(path.name, shorten(fault, 200), expected="a model that onnx.checker accepts")
    written = {initializer.name: initializer for initializer in read_graph(path).initializers}
    for match in matches:
        values = written[match.initializer.name].mapped()
        for block in match.blocks:
            part = values[block.row : block.row + block.rows, block.column : block.column + block.columns]
            part = part.T if block.is_transposed else part
            for first, rows in _merged_rows(checkpoint, delta, block.weight, match.initializer.dtype):
                if not np.array_equal(part[first : first + len(rows)], rows):
                    raise CheckError(match.initializer.name, f"it differs from the merged {block.weight}",
                                     expected="the same bytes")  # fmt: skip


def _merged_rows(checkpoint: Checkpoint, delta: ColumnDelta, weight: str, dtype: str) -> Iterator[tuple[int, Bits]]:
    """A merged weight, computed from the base and not from the ONNX file, in rows of the dtype asked for."""
    change, info = _read_change(delta, weight), checkpoint[weight]
    target = next((target for target in delta.plan.targets if target.weight == weight), None)
    views: Iterable[memoryview]
    if target:
        columns = delta.patches[target.module]
        views = patched_chunks(checkpoint, weight, target, columns.columns, columns.stored())
    else:
        views = [memoryview(tensor_to_bytes(change.values))]
    return _cast_rows(views, info.dtype, dtype, matrix_shape(info.shape)[1])
