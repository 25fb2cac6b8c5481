"""ONNX folders seen from outside: run, held against transformers row by row, and their bytes read, by code of its own.

The oracle shares nothing with the exporter's own check. Each row of a padded batch is compared with the same tokens
run alone, without padding, mask, positions or cache: a graph that handles any of these wrongly differs. Only what has
no positions as an input is given padding on the left as it is: there learned positions count it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from torch import Tensor

from tests.tiny import FAMILIES, SPECIAL

TOLERANCE = 1e-4  # of the outputs' range, in fp32
ONNX_DTYPES = {
    "F32": onnx.TensorProto.FLOAT,
    "F16": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
    "I64": onnx.TensorProto.INT64,
}
FLOATS = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


class Graph:
    """A graph in onnxruntime, on one core, called with tensors by name; an input that it has not is an error."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}

    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)}

    def no_tokens(self, batch: int, middle: str = "") -> dict[str, Tensor]:
        """A cache that is empty: (batch, heads, 0, width)."""
        caches = {n: v for n, v in self.inputs.items() if n.startswith("past_key_values.") and middle in n}
        return {n: torch.zeros(batch, v.shape[1], 0, v.shape[3], dtype=FLOATS[v.type]) for n, v in caches.items()}


def as_past(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a graph says of its cache, as its next step takes it."""
    return {n.replace("present.", "past_key_values."): x for n, x in outputs.items() if n.startswith("present.")}


@torch.no_grad()
def greedy(graph: Graph, ids: list[int], count: int) -> list[int]:
    """The most likely tokens one after another, with the graph's cache."""
    cache, new = graph.no_tokens(1), torch.tensor([ids])
    seen = list(ids)
    for _ in range(count):
        first = len(seen) - new.shape[1]
        places = torch.arange(first, len(seen))[None]
        out = graph({
            "input_ids": new, "attention_mask": torch.ones(1, len(seen), dtype=torch.int64), "position_ids": places,
            **cache,
        })  # fmt: skip
        cache, new = as_past(out), out["logits"][:, -1].argmax(-1, keepdim=True)
        seen.append(int(new))
    return seen[len(ids) :]


def reference(folder: Path, model_class: str) -> Any:
    """A checkpoint in fp32, with attention in its plainest form."""
    loaded = getattr(transformers, model_class).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a part of the expected values' range; infinite where shapes differ or a NaN is."""
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    span = float(expected.double().max() - expected.double().min()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / span


# --- batches

Differences = dict[str, float]
SHAPES = ((1, 1, "no"), (3, 2, "no"), (1, 33, "no"), (3, 33, "left"), (3, 33, "right"))  # batch, tokens, padding


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the batch that they are padded to: ids and mask (rows, tokens)."""

    rows: tuple[Tensor, ...]
    ids: Tensor
    mask: Tensor

    def real(self, row: int) -> Tensor:
        """Where a row's own tokens are."""
        return self.mask[row] == 1

    def alone(self, row: int) -> tuple[dict[str, Tensor], Tensor]:
        """A row as transformers gets it, and where its own tokens are: padding on the left alone stays."""
        if self.mask[row, 0]:
            return {"input_ids": self.rows[row][None]}, torch.ones(len(self.rows[row]), dtype=torch.bool)
        return {"input_ids": self.ids[row][None], "attention_mask": self.mask[row][None]}, self.real(row)


def make_batch(count: int, tokens: int, padding: str, *, end: int | None = None, seed: int = 0) -> Batch:
    """Rows of `tokens`, `tokens - 4`, ..: none has a special token but an `end`. Padded with token 0."""
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * count + seed)
    lengths = [max(1, tokens - 4 * row) if padding != "no" else tokens for row in range(count)]
    rows = [torch.randint(len(SPECIAL), 128, (length,), generator=generator) for length in lengths]
    if end is not None:
        for row in rows:
            row[-1] = end
    ids, mask = torch.zeros(count, tokens, dtype=torch.int64), torch.zeros(count, tokens, dtype=torch.int64)
    for number, row in enumerate(rows):
        where = slice(tokens - len(row), None) if padding == "left" else slice(0, len(row))
        ids[number, where], mask[number, where] = row, 1
    return Batch(tuple(rows), ids, mask)


def count_positions(mask: Tensor) -> Tensor:
    """The number of each token among its row's own, counted one by one; 0 at padding."""
    result = torch.zeros_like(mask)
    for row, seen in enumerate(mask.tolist()):
        place = 0
        for column, is_token in enumerate(seen):
            result[row, column] = place if is_token else 0
            place += is_token
    return result


# --- one forward: encoders, classifiers, images


@torch.no_grad()
def plain_differences(graph: Graph, model: Any, *, end: int | None = None) -> Differences:
    """Every shape and padding, against each row alone. `end`: the last token of each row."""
    found: Differences = {}
    (name,) = graph.outputs
    for count, tokens, padding in SHAPES:
        batch = make_batch(count, tokens, padding, end=end)
        kinds = (batch.ids % 3 == 0).long() * batch.mask  # of a pair's first or second text
        given = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if "token_type_ids" in graph.inputs:
            given["token_type_ids"] = kinds
        values = graph(given)[name]
        for row in range(count):
            own, real = batch.alone(row)
            if "token_type_ids" in given:
                own["token_type_ids"] = kinds[row, batch.real(row)][None] if len(real) < tokens else kinds[row][None]
            expected, here = model(**own)[0][0], values[row]
            if expected.dim() == 2:
                expected, here = expected[real], here[batch.real(row)]
            found[f"{count} x {tokens}, {padding} padding, row {row}"] = difference(here, expected)
    return found


@torch.no_grad()
def image_differences(graph: Graph, model: Any) -> Differences:
    """One image and three, each against itself alone."""
    found: Differences = {}
    for count in (1, 3):
        pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        (values,) = graph({"pixel_values": pixels.to(FLOATS[graph.inputs["pixel_values"].type])}).values()
        for row in range(count):
            found[f"{count} images, {row}"] = difference(values[row], model(pixel_values=pixels[row : row + 1])[0][0])
    return found


# --- decoders

WINDOW = 16  # of the tiny models that have a sliding window
TOKENS_AFTER = (1, 1, 1, 1, 3)  # what follows a prefill, step by step: the last step is several tokens at once
DECODED = (*SHAPES, (2, WINDOW - 2, "left"), (2, WINDOW + 4, "left"))


@torch.no_grad()
def decoder_differences(graph: Graph, model: Any) -> Differences:
    """Prefill and cached steps, of every shape and padding and past a window, against whole rows without a cache.

    After padding on the right nothing follows: a token's place in the window would not be its position.
    """
    found: Differences = {}
    for count, tokens, padding in DECODED:
        steps = (tokens, *(TOKENS_AFTER if padding != "right" else ()))
        batch = make_batch(count, tokens, padding)
        more = make_batch(count, sum(steps) - tokens, "no", seed=5)
        ids, mask = torch.cat([batch.ids, more.ids], 1), torch.cat([batch.mask, more.mask], 1)
        rows = [torch.cat(parts)[None] for parts in zip(batch.rows, more.rows, strict=True)]
        whole = [model(input_ids=row, use_cache=False).logits[0] for row in rows]
        cache, begin = graph.no_tokens(count), 0
        for step in steps:
            end = begin + step
            places = count_positions(mask[:, :end])[:, begin:]
            given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": places}
            out = graph({**given, **cache})
            for row in range(count):
                real = mask[row, begin:end] == 1
                expected = whole[row][places[row][real]]
                said = f"{count} x {tokens}, {padding} padding, tokens {begin} to {end}, row {row}"
                found[said] = difference(out["logits"][row][real], expected)
            cache, begin = as_past(out), end
    return found


@torch.no_grad()
def cache_differences(graph: Graph, model: Any) -> Differences:
    """Each layer's keys and values, by name, are those that transformers would keep."""
    ids = make_batch(2, 7, "no").ids
    mask = torch.ones_like(ids)
    cache = transformers.DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    out = graph({
        "input_ids": ids, "attention_mask": mask, "position_ids": count_positions(mask), **graph.no_tokens(2)
    })  # fmt: skip
    assert len(out) == 1 + 2 * len(cache.layers)
    found: Differences = {}
    for number, layer in enumerate(cache.layers):
        found[f"key {number}"] = difference(out[f"present.{number}.key"], layer.keys)
        found[f"value {number}"] = difference(out[f"present.{number}.value"], layer.values)
    return found


# --- encoders with decoders


@torch.no_grad()
def crossed_differences(encoder: Graph, model: Any) -> Differences:
    """The keys and values that the decoder's layers make of the encoder's states, by name."""
    ids = make_batch(2, 7, "no").ids
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    model(input_ids=ids, decoder_input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    out = encoder({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    found: Differences = {}
    for number, layer in enumerate(cache.cross_attention_cache.layers):
        found[f"key {number}"] = difference(out[f"present.{number}.encoder.key"], layer.keys)
        found[f"value {number}"] = difference(out[f"present.{number}.encoder.value"], layer.values)
    return found


@torch.no_grad()
def pair_differences(encoder: Graph, decoder: Graph, model: Any) -> Differences:
    """The encoder's states and what the decoder writes, token by token, against each row alone without a cache."""
    found: Differences = {}
    for count, tokens, padding in SHAPES:
        batch, written = make_batch(count, tokens, padding), make_batch(count, 6, "no", seed=7).ids
        written[:, 0] = model.config.decoder_start_token_id
        encoded = encoder({"input_ids": batch.ids, "attention_mask": batch.mask})
        said = f"{count} x {tokens}, {padding} padding"
        wholes = []
        for row in range(count):
            own, real = batch.alone(row)
            out = model(**own, decoder_input_ids=written[row][None], use_cache=False)
            states = encoded["last_hidden_state"][row, batch.real(row)]
            found[f"{said}, encoder, row {row}"] = difference(states, out.encoder_last_hidden_state[0, real])
            wholes.append(out.logits[0])
        fixed = as_past(encoded)
        if "side_states" in encoded:
            fixed["encoder_side_states"] = encoded["side_states"]
        cache, begin = decoder.no_tokens(count, ".decoder."), 0
        for end in (1, 2, 3, 6):
            given = {"input_ids": written[:, begin:end], "encoder_attention_mask": batch.mask}
            out = decoder({**given, **fixed, **cache})
            for row, whole in enumerate(wholes):
                found[f"{said}, tokens {begin} to {end}, row {row}"] = difference(out["logits"][row], whole[begin:end])
            cache, begin = as_past(out), end
    return found


def differences(folder: Path, model: Any, *, end: int | None = None) -> Differences:
    """Those of a folder's graphs, whatever they are."""
    if (folder / "encoder_model.onnx").is_file():
        return pair_differences(Graph(folder / "encoder_model.onnx"), Graph(folder / "decoder_model.onnx"), model)
    graph = Graph(folder / "model.onnx")
    if "pixel_values" in graph.inputs:
        return image_differences(graph, model)
    if "position_ids" in graph.inputs:
        return decoder_differences(graph, model)
    return plain_differences(graph, model, end=end)


def too_large(found: Differences, tolerance: float = TOLERANCE) -> Differences:
    """The differences that are no rounding. There is at least one that was looked at."""
    assert found
    return {name: value for name, value in found.items() if not value <= tolerance}


def class_of(family: str) -> str:
    """The class of a tiny family."""
    return FAMILIES[family].model


# --- bytes


@dataclass(frozen=True)
class Stored:
    """A tensor: the file, its first byte, and how many there are."""

    file: str
    dtype: int
    shape: tuple[int, ...]
    begin: int
    size: int


def tensors_on_disk(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files, by its name, as ONNX would say it."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            assert name not in found or path.name == "read.safetensors"  # which a replaced head is in once more
            found[name] = Stored(
                path.name, ONNX_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin
            )
    return found


def graph_files(folder: Path) -> list[Path]:
    """The graphs of a folder."""
    return sorted(folder.glob("*.onnx"))


def initializers(path: Path) -> Iterator[Any]:
    """A graph's constants and weights, without reading its data."""
    yield from onnx.load(path, load_external_data=False).graph.initializer


def weights_of(path: Path) -> dict[str, Stored]:
    """What a graph says of its weights: those whose bytes lie elsewhere."""
    found: dict[str, Stored] = {}
    for tensor in initializers(path):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            said = {entry.key: entry.value for entry in tensor.external_data}
            assert tensor.name not in found
            found[tensor.name] = Stored(
                said["location"], tensor.data_type, tuple(tensor.dims), int(said["offset"]), int(said["length"])
            )
    return found


def nodes_of(path: Path) -> list[Any]:
    """A graph's nodes."""
    return list(onnx.load(path, load_external_data=False).graph.node)


def inline_values(path: Path) -> int:
    """How many numbers, integers left out, lie in a graph's own file."""
    kinds = set(ONNX_DTYPES.values()) - {onnx.TensorProto.INT64}
    own = [t for t in initializers(path) if t.data_location != onnx.TensorProto.EXTERNAL and t.data_type in kinds]
    return sum(math.prod(tensor.dims) for tensor in own)


def ports_of(path: Path) -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
    """(inputs, outputs): of each, by name, its axes; one that may change is its name."""
    graph = onnx.load(path, load_external_data=False).graph
    inputs, outputs = (
        {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in side}
        for side in (graph.input, graph.output)
    )
    return inputs, outputs


def dtypes_of(path: Path) -> dict[str, int]:
    """The dtype of each input and output."""
    graph = onnx.load(path, load_external_data=False).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
