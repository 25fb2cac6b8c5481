"""An ONNX file that someone else made: its weights as matrices, wherever their bytes lie, without reading them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from surgery.checkpoint import RECORD_FILE, path_inside
from surgery.errors import DamagedError, NotAModelError
from surgery.tensorfile import CHUNK_BYTES, read_range, tensor_bytes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

DTYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}  # onnx.TensorProto.DataType: the types a weight may have here
EXTERNAL = 1  # onnx.TensorProto.DataLocation
QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul",
    "QLinearConv", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM", "QGemm", "QAttention", "QEmbedLayerNormalization", "QOrderedMatMul", "QMoE",
    "GatherBlockQuantized",
})  # fmt: skip
Bits: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph, seen as a matrix. `path`: its external data (None: in the .onnx), from byte `begin`."""

    name: str
    proto: TensorProto
    dtype: str
    shape: tuple[int, int]
    path: Path | None
    begin: int

    @property
    def end(self) -> int:
        return self.begin + tensor_bytes(self.dtype, self.shape)

    def row_chunks(self) -> Iterator[tuple[int, Bits]]:
        """(first row, some rows as integers): writable, valid until the next one."""
        if self.path is None:
            return iter([(0, self.mapped())])
        row_bytes = tensor_bytes(self.dtype, self.shape[1:])
        views = read_range(self.path, self.begin, self.end, max(1, CHUNK_BYTES // row_bytes) * row_bytes)
        return numbered(np.frombuffer(view, unsigned(self.dtype)).reshape(-1, self.shape[1]) for view in views)

    def mapped(self) -> Bits:
        """All of it as integers; what lies in a file is read as it is looked at."""
        if self.path is None:
            return np.frombuffer(_inline_bytes(self.proto), unsigned(self.dtype)).reshape(self.shape)
        return np.memmap(self.path, unsigned(self.dtype), "r", self.begin, self.shape)


@dataclass(frozen=True)
class Graph:
    """An ONNX file without its external data: its tensors that may be weights, and its data files by location."""

    path: Path
    model: ModelProto
    initializers: tuple[Initializer, ...]
    files: Mapping[str, Path]
    quantized: tuple[NodeProto, ...]


def read_graph(path: Path) -> Graph:
    """Parse an ONNX file and look for its external data, which is not read.

    Raises: NotAModelError, DamagedError, PathEscapeError.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        inside = ", ".join(str(file) for file in sorted(path.glob("*.onnx")))
        found, fix = (
            ("a folder", f"Name a file in it: {inside}" if inside else "") if path.is_dir() else ("no such file", "")
        )
        raise NotAModelError(str(path), found, expected="an .onnx file", fix=fix)
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise DamagedError(str(path), f"it does not parse ({error})", expected="an ONNX model") from error
    if not model.graph.node:
        raise DamagedError(str(path), "a graph without nodes", expected="an ONNX model")
    nodes = list(_nodes([*model.graph.node, *(node for function in model.functions for node in function.node)]))
    named = [(tensor.name, tensor) for tensor in model.graph.initializer]
    named += [pair for node in nodes for pair in _inner_tensors(node)]
    locations = {_location(tensor) for _, tensor in named if tensor.data_location == EXTERNAL}
    files = {location: _data_file(path, location) for location in sorted(locations)}
    weights = [(name, t) for name, t in named if t.data_type in DTYPES and all(size > 0 for size in t.dims)]
    initializers = tuple(_initializer(name, tensor, files) for name, tensor in weights)
    return Graph(path, model, initializers, files, tuple(node for node in nodes if node.op_type in QUANTIZED))


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _inner_tensors(node: NodeProto) -> Iterator[tuple[str, TensorProto]]:
    """Constants in a node's attributes and initializers of the graphs in them."""
    for attribute in node.attribute:
        for tensor in (attribute.t, *attribute.tensors):
            yield next(iter(node.output), node.name), tensor
        for graph in (attribute.g, *attribute.graphs):
            yield from ((tensor.name, tensor) for tensor in graph.initializer)


def external_entries(tensor: TensorProto) -> dict[str, str]:
    """What a tensor says of its external data: location, offset, length."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: TensorProto) -> str:
    return external_entries(tensor).get("location", "")


def _data_file(path: Path, location: str) -> Path:
    """Raises: PathEscapeError: outside the folder; DamagedError: absent, or a name that has another use."""
    found = path_inside(path.parent, location)
    if not found.is_file() or found in (path, path.parent / RECORD_FILE):
        raise DamagedError(str(path), f"external data in {location[:80]!r}, which is no data file",
                           expected="a file beside it", fix="Copy all of its files into one folder")  # fmt: skip
    return found


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: its last axis against all others; a vector is one column."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def _initializer(name: str, tensor: TensorProto, files: Mapping[str, Path]) -> Initializer:
    dtype, shape = DTYPES[tensor.data_type], matrix_shape(tensor.dims)
    size, entries = tensor_bytes(dtype, shape), external_entries(tensor)
    if tensor.data_location != EXTERNAL:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != size:
            raise DamagedError(name, f"{len(tensor.raw_data)} bytes", expected=f"{size}, by its shape")
        return Initializer(name, tensor, dtype, shape, None, 0)
    path = files[_location(tensor)]
    offset, length = entries.get("offset", "0"), entries.get("length", str(size))
    are_numbers = all(text.isdecimal() and len(text) < 20 for text in (offset, length))
    if not are_numbers or int(length) != size or int(offset) + size > path.stat().st_size:
        found = f"offset {offset}, length {length} in {path.name} of {path.stat().st_size} bytes"
        raise DamagedError(name, found, expected=f"{size} bytes inside it", fix="Copy the data file again")
    return Initializer(name, tensor, dtype, shape, path, int(offset))


def _inline_bytes(tensor: TensorProto) -> bytearray:
    from onnx.numpy_helper import to_array

    try:
        return bytearray(tensor.raw_data or to_array(tensor).tobytes())  # else in one of the typed fields
    except ValueError as error:
        raise DamagedError(tensor.name, f"its values do not fill its shape ({error})", expected="as many") from error


def unsigned(dtype: str) -> str:
    """numpy's unsigned integers of a dtype's width."""
    return f"u{tensor_bytes(dtype, ())}"


def numbered(pieces: Iterable[Bits]) -> Iterator[tuple[int, Bits]]:
    """Pieces of a matrix with the number of their first row."""
    first = 0
    for piece in pieces:
        yield first, piece
        first += len(piece)
