"""Where an ONNX graph's weights lie: in the safetensors files beside it, or in a file of their own.

A safetensors file is a header and the tensors' bytes one after the other, which is all that ONNX asks of external
data: an initializer that names the file, an offset and a length needs no copy of the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from exporters.onnx_graph import without_values
from surgery.compat import memory_names
from surgery.tensorfile import TensorInfo, dtype_name, read_range, tensor_bytes, tensor_to_bytes
from surgery.writing import StreamWriter, require_disk

DATA_FILE = "model.onnx_data"
_KINDS = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F64": ir.DataType.DOUBLE,
    "I64": ir.DataType.INT64, "I32": ir.DataType.INT32, "BOOL": ir.DataType.BOOL,
}  # fmt: skip


def find_sources(model: nn.Module, infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """What a file holds of each parameter, as it is in memory; a tied parameter has it under each of its names."""
    by_disk = {info.name: info for info in infos}
    known = {n.name: by_disk[disk] for disk, n in memory_names(model, by_disk).items() if n.is_verbatim}
    tied: dict[int, TensorInfo] = {}
    parameters = model.state_dict(keep_vars=True)
    for name, parameter in parameters.items():
        if name in known and tuple(parameter.shape) == known[name].shape:
            tied.setdefault(id(parameter), known[name])
    return {name: tied[id(parameter)] for name, parameter in parameters.items() if id(parameter) in tied}


def attach(graph: ir.Model, sources: Mapping[str, TensorInfo], folder: Path) -> None:
    """Name where each weight lies. Where a file's dtype is not the one that is computed in, a Cast follows.

    An initializer gets the name that its tensor has on disk. folder: where the files are, for what reads them next.
    """
    for name, value in without_values(graph).items():
        info = sources[name]
        kind, wanted = _KINDS[info.dtype], value.dtype
        assert wanted is not None  # noqa: S101  the exporter types its initializers
        del graph.graph.initializers[f"model.{name}"]
        stored = ir.Value(name=info.name, shape=ir.Shape(info.shape), type=ir.TensorType(kind))
        stored.const_value = ir.ExternalTensor(
            info.file, info.begin, info.size_bytes, kind, shape=ir.Shape(info.shape), name=info.name, base_dir=folder
        )
        if info.name not in graph.graph.initializers:
            graph.graph.register_initializer(stored)
        stored = graph.graph.initializers[info.name]
        if kind == wanted:
            _replace(value, stored)
            continue
        cast = ir.node("Cast", [stored], {"to": wanted}, name=f"cast_{info.name}")
        cast.outputs[0].name = f"{info.name}.{wanted.name.lower()}"
        graph.graph.insert_before(graph.graph[0], cast)
        _replace(value, cast.outputs[0])
        _multiply_as_it_lies(graph, cast.outputs[0])


def _multiply_as_it_lies(graph: ir.Model, weight: ir.Value) -> None:
    """onnxruntime's FusedMatMul in place of products with a transposed weight.

    Of a weight that is cast, onnxruntime would keep what was cast and what was transposed: twice the memory, and time.
    """
    for transpose, _ in tuple(weight.uses()):
        products = tuple(transpose.outputs[0].uses())
        if transpose.op_type != "Transpose" or any(n.op_type != "MatMul" or place != 1 for n, place in products):
            continue
        for product, _ in products:
            product.op_type, product.domain = "FusedMatMul", "com.microsoft"
            product.attributes["transB"] = ir.AttrInt64("transB", 1)
            product.replace_input_with(1, weight)
        graph.graph.remove(transpose)
        graph.graph.opset_imports["com.microsoft"] = 1


def _replace(old: ir.Value, new: ir.Value) -> None:
    for user, index in tuple(old.uses()):
        user.replace_input_with(index, new)


def write_data(folder: Path, infos: Mapping[str, TensorInfo], missing: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Write `DATA_FILE` into a folder, tensor by tensor. Returns where each parameter lies in it.

    infos: of each parameter, what a safetensors file of the folder holds of it; missing: the values of those that no
    file holds as they are in memory.
    """
    placed: dict[Any, TensorInfo] = {}
    result: dict[str, TensorInfo] = {}
    pieces: list[tuple[int, Iterator[Any]]] = []
    position = 0
    for name in sorted({*infos, *missing}):
        info = infos.get(name) or _own(name, missing[name])
        key = (info.file, info.begin) if name in infos else name
        if key not in placed:
            end = position + info.size_bytes
            placed[key] = replace(info, file=DATA_FILE, begin=position, end=end)
            chunks = read_range(folder / info.file, info.begin, info.end) if name in infos else _bytes(missing[name])
            pieces.append((position, chunks))
            position = end
        result[name] = placed[key]
    require_disk(folder, position)
    with StreamWriter() as stream:
        stream.write(folder / DATA_FILE, b"", pieces)
    return result


def _own(name: str, values: Tensor) -> TensorInfo:
    dtype, shape = dtype_name(values.dtype), tuple(values.shape)
    return TensorInfo(name, dtype, shape, DATA_FILE, 0, tensor_bytes(dtype, shape))


def _bytes(values: Tensor) -> Iterator[Any]:
    yield tensor_to_bytes(values)
