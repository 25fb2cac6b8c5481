"""A patched ONNX file computes what the merged model computes, and nothing but the trained lines changed in it."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exporters import dense, onnx_patch
from exporters.onnx_patch import Block, PatchResult, digest_lines, find_blocks, patch, read_graph
from surgery import workflow
from surgery.adapter import Adapter, update_adapter
from surgery.checkpoint import INDEX_FILE, Checkpoint
from surgery.delta import ColumnDelta, require_columns
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    DamagedError,
    NotAModelError,
    OutputExistsError,
    PathEscapeError,
    RefusedError,
    RequestError,
    ResourceError,
    SurgeryError,
    UnsupportedError,
)
from surgery.inspection import inspect
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, load
from surgery.survey import TaskSpec
from tests.conftest import TinyModel, digest_folder
from tests.tiny import draw_parameters, sample_inputs
from tests.trained import make_adapter, make_read_adapter

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOLERANCE = 1e-4  # of the logits' largest
QUERIES = PacaSpec(rank=4, targets=("*.q_proj",))
KINDS = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}
QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")
ExportedFile = Callable[[str, str], Path]


# --- files made by others


class Logits(torch.nn.Module):
    """A model as its exporter wants it: ids and mask in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) int64 twice -> (batch, tokens, vocabulary)."""
        cache = {} if self.model.config.model_type == "bert" else {"use_cache": False}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **cache).logits


def torch_export(base: Path, file: Path, *, dynamo: bool, attention: str = "sdpa", **options: Any) -> Any:
    """PyTorch's own exporters, as anyone calls them."""
    model = transformers.AutoModelForCausalLM if "bert" not in base.name else transformers.AutoModelForMaskedLM
    inputs = sample_inputs("bert" if "bert" in base.name else "llama")
    axes: dict[str, Any] = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}
    options["dynamic_shapes" if dynamo else "dynamic_axes"] = axes
    loaded = model.from_pretrained(base, attn_implementation=attention)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            Logits(loaded).eval(), (inputs["input_ids"], inputs["attention_mask"]), None if dynamo else str(file),
            input_names=list(axes), output_names=["logits"], dynamo=dynamo, verbose=False, **options,
        )  # fmt: skip


def optimize_at_load(source: Path, file: Path, level: str) -> None:
    """What onnxruntime writes where it is asked to keep its optimized graph."""
    for path in source.parent.glob("*.data"):
        shutil.copy(path, file.parent)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath, options.log_severity_level = str(file), 3
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def optimize_by_script(base: Path, file: Path) -> None:
    """onnxruntime's transformers optimizer, which packs BERT's queries, keys and values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.transformers import optimizer

        plain = file.with_name("plain.onnx")
        torch_export(base, plain, dynamo=False, attention="eager", opset_version=17)
        kind = "bert" if "bert" in base.name else "gpt2"
        model = optimizer.optimize_model(str(plain), model_type=kind, num_heads=4, hidden_size=32, opt_level=0)
        model.save_model_to_file(str(file))
    plain.unlink()


@pytest.fixture(scope="module")
def exported(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> ExportedFile:
    """`exported("llama", "script")`: the base of a family exported in one of the ways, each made once."""
    made: dict[tuple[str, str], Path] = {}
    root = tmp_path_factory.mktemp("exported")

    def make_dynamo(family: str) -> None:
        files = {way: root / family / way / "model.onnx" for way in ("dynamo", "dynamo-plain")}
        program = torch_export(tiny_model(family), files["dynamo"], dynamo=True, optimize=False)
        for way, file in files.items():
            file.parent.mkdir(parents=True)
            made[family, way] = file
        program.save(files["dynamo-plain"], external_data=False)
        program.optimize()  # what optimize=True does; tracing once saves half of the time
        program.save(files["dynamo"], external_data=True)

    def make(family: str, way: str) -> Path:
        if (family, way) in made:
            return made[family, way]
        if way.startswith("dynamo"):
            make_dynamo(family)
            return made[family, way]
        source, file = ("", ""), root / family / way / "model.onnx"
        source = {"basic": "dynamo", "extended": "script"}.get(way, "")
        path = make(family, source) if source else file
        file.parent.mkdir(parents=True)
        if source:
            optimize_at_load(path, file, way.upper())
        elif way == "script":
            torch_export(tiny_model(family), file, dynamo=False)
        else:
            optimize_by_script(tiny_model(family), file)
        made[family, way] = file
        return file

    return make


# --- files made by hand: every tensor goes to an output of its own


def write_onnx(
    file: Path, tensors: Mapping[str, Tensor], *, data: str = "", typed: bool = False, nodes: Sequence[Any] = ()
) -> Path:
    """An ONNX file of initializers: in one data file, as raw bytes, or (`typed`) in a field of their type."""
    file.parent.mkdir(parents=True, exist_ok=True)
    protos, blob = [], b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        proto = onnx.TensorProto(name=name, data_type=KINDS[tensor.dtype], dims=tensor.shape)
        if data:
            point_to(proto, data, len(blob), len(raw))
            blob += raw + b"gap"
        elif typed:
            width, field = {4: ("<f4", proto.float_data), 2: ("<u2", proto.int32_data)}[tensor.element_size()]
            field.extend(np.frombuffer(raw, width).tolist())
        else:
            proto.raw_data = raw
        protos.append(proto)
    if data:
        (file.parent / data).write_bytes(blob)
    copies = [onnx.helper.make_node("Identity", [name], [f"{name}.out"]) for name in tensors]
    outputs = [onnx.helper.make_tensor_value_info(f"{p.name}.out", p.data_type, p.dims) for p in protos]
    graph = onnx.helper.make_graph([*copies, *nodes], "graph", [], outputs, protos)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    file.write_bytes(model.SerializeToString())
    return file


def point_to(proto: Any, location: str, offset: int, length: int) -> None:
    """Give a tensor external data."""
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        proto.external_data.add(key=key, value=value)


def edit(file: Path, change: Callable[[Any], None]) -> Path:
    """Change an ONNX file in place."""
    model = onnx.load(file, load_external_data=False)
    change(model)
    file.write_bytes(model.SerializeToString())
    return file


def values_of(file: Path) -> dict[str, bytes]:
    """Every initializer's bytes, data files included."""
    return {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in onnx.load(file).graph.initializer}


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, row by row."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def merged(adapter: Adapter, folder: Path) -> dict[str, Tensor]:
    """The tensors of the merged checkpoint."""
    return weights(dense.export(adapter, folder))


def rewritten(base: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a base with other values."""
    shutil.copytree(base, folder)
    tensors = weights(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(file: Path, inputs: Mapping[str, Tensor]) -> np.ndarray[Any, Any]:
    """The first output in onnxruntime, which may optimize as it likes."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})[0]
    return found


def refuse(error: type[SurgeryError], code: int, match: str, file: Path, adapter: Path, **options: Any) -> None:
    """`patch` raises this error with this exit code, and changes nothing on the disk."""
    root = adapter.parent
    before = digest_folder(root)
    with pytest.raises(error, match=match) as caught:
        patch(file, adapter, root / "patched", **options)
    assert caught.value.exit_code == code
    assert digest_folder(root) == before


@pytest.fixture
def llama(tiny_model: TinyModel, tmp_path: Path) -> Adapter:
    """A Llama's adapter in which the first layers' queries have moved."""
    return make_adapter(tiny_model("llama"), tmp_path / "adapter", QUERIES)


@pytest.fixture
def plain_file(llama: Adapter, tiny_model: TinyModel, tmp_path: Path) -> Path:
    """The same Llama's weights in a data file, under other names and transposed."""
    tensors = {f"onnx::MatMul_{i}": t.t() if t.ndim == 2 else t for i, t in enumerate(weights_in_order(tiny_model))}
    return write_onnx(tmp_path / "onnx" / "model.onnx", tensors, data="model.data")


def weights_in_order(tiny_model: TinyModel) -> list[Tensor]:
    """The Llama's tensors by name."""
    return [tensor for _, tensor in sorted(weights(tiny_model("llama")).items())]


# --- what others export


WAYS = ("dynamo", "dynamo-plain", "script", "basic", "extended")
CASES = [(family, way) for family in ("llama", "gpt2", "bert") for way in WAYS]


@pytest.mark.parametrize(("family", "way"), (*CASES, ("gpt2", "optimizer"), ("bert", "optimizer")))
def test_a_patched_file_computes_what_the_merged_model_computes(
    family: str, way: str, exported: ExportedFile, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """However it was exported: logits agree at another shape, and initializers without a target keep their bytes."""
    file = exported(family, way)
    adapter = make_adapter(tiny_model(family), tmp_path / "adapter")
    result = patch(file, tmp_path / "adapter", tmp_path / "patched")
    inputs = sample_inputs(family, batch=3, tokens=13)
    with torch.no_grad():
        expected = load(tmp_path / "adapter").eval()(**inputs).logits.numpy()
    assert np.abs(run(result.onnx, inputs) - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(run(file, inputs) - expected).max() > 0.1 * np.abs(expected).max()  # the base is far from it
    before, after = values_of(file), values_of(result.onnx)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == set(result.blocks)
    assert before.keys() == after.keys()
    assert {b.weight for blocks in result.blocks.values() for b in blocks} == {t.weight for t in adapter.plan.targets}
    assert without_values(file, changed) == without_values(result.onnx, changed)


def without_values(file: Path, names: set[str]) -> bytes:
    """All of an .onnx but what some initializers hold."""
    model = onnx.load(file, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def test_packed_queries_keys_and_values_are_found(
    exported: ExportedFile, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """onnxruntime's optimizer puts BERT's three projections side by side, transposed, in one initializer."""
    make_adapter(tiny_model("bert"), tmp_path / "adapter")
    result = patch(exported("bert", "optimizer"), tmp_path / "adapter", tmp_path / "patched")
    packed = [blocks for blocks in result.blocks.values() if len(blocks) == 3]
    prefix = "bert.encoder.layer.0.attention.self"
    assert len(packed) == 2
    assert packed[0] == tuple(
        Block(0, 32 * i, 32, 32, f"{prefix}.{part}.weight", is_transposed=True)
        for i, part in enumerate(("query", "key", "value"))
    )


# --- layouts


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first layer of a Llama in every layout, under names that lead astray."""
    q, k, v = (tensors[name] for name in (QUERY, KEY, VALUE))
    return {
        KEY: q,  # a name is never believed
        "transposed": k.t(),
        "rows": torch.cat([q, k, v]),
        "columns": torch.cat([v.t(), torch.zeros(32, 3), q.t(), k.t()], dim=1),
        "stacked": torch.stack([k, v]),
        "stacked transposed": torch.stack([v.t(), k.t()]),
        "wide": torch.cat([q, q.t()], dim=1),
        "embedding": tensors["model.embed_tokens.weight"],
        "bias": torch.arange(5.0),
    }


@pytest.mark.parametrize("chunk_bytes", (8 << 20, 300), ids=("one chunk", "many chunks"))
@pytest.mark.parametrize("storage", ("data", "raw", "typed"))
def test_every_layout_is_patched(
    storage: str, chunk_bytes: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is, transposed, packed by rows or columns, stacked, named otherwise: the merged weight in the same layout."""
    for module in ("exporters.onnx_file", "surgery.checkpoint"):
        monkeypatch.setattr(f"{module}.CHUNK_BYTES", chunk_bytes)
    base = tiny_model("llama")
    adapter = make_adapter(base, tmp_path / "adapter", PacaSpec(rank=5, targets=("*.layers.0.self_attn.[qkv]_proj",)))
    options = {"data": "weights.bin"} if storage == "data" else {"typed": storage == "typed"}
    file = write_onnx(tmp_path / "onnx" / "model.onnx", pack(weights(base)), **options)
    result = patch(file, tmp_path / "adapter", tmp_path / "patched")
    expected = {name: raw(tensor) for name, tensor in pack(merged(adapter, tmp_path / "merged")).items()}
    assert values_of(result.onnx) == expected
    assert set(result.blocks) == set(expected) - {"embedding", "bias"}


def test_weights_inside_nodes_are_patched(llama: Adapter, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Constants, and initializers of a branch, count as initializers do."""
    base, new = weights(tiny_model("llama")), merged(llama, tmp_path / "merged")
    second = QUERY.replace("0", "1")

    def nodes(tensors: Mapping[str, Tensor]) -> list[Any]:
        inner, outer = (onnx.numpy_helper.from_array(tensors[n].numpy(), n[:14]) for n in (QUERY, second))
        value = onnx.helper.make_tensor_value_info("inner.out", 1, [32, 32])
        copy = onnx.helper.make_node("Identity", [inner.name], ["inner.out"])
        branch = onnx.helper.make_graph([copy], "branch", [], [value], [inner])
        return [
            onnx.helper.make_node("Constant", [], ["constant"], value=outer),
            onnx.helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch),
        ]

    yes = {"yes": torch.ones(1)}
    file = write_onnx(tmp_path / "onnx" / "model.onnx", yes, nodes=nodes(base))
    edit(file, lambda model: model.graph.initializer[0].CopyFrom(onnx.helper.make_tensor("yes", 9, [1], [True])))
    edit(file, lambda model: model.graph.output.pop())
    edit(file, lambda model: model.graph.node.pop(0))
    edit(file, lambda model: model.graph.output.append(onnx.helper.make_tensor_value_info("chosen", 1, [32, 32])))
    expected = [t.SerializeToString() for node in nodes(new) for t in inner_tensors(node)]
    result = patch(file, tmp_path / "adapter", tmp_path / "patched")
    found = [t.SerializeToString() for node in onnx.load(result.onnx).graph.node for t in inner_tensors(node)]
    assert found == expected


def inner_tensors(node: Any) -> Iterator[Any]:
    """The tensors in a node's attributes."""
    for attribute in node.attribute:
        yield from [attribute.t] if attribute.HasField("t") else attribute.g.initializer


@given(st.data())
def test_a_weight_is_found_wherever_it_lies(data: st.DataObject) -> None:
    """In rows or columns of a larger matrix, both ways round, exactly once; a changed value hides it."""
    rows, columns, before, after = (data.draw(st.integers(2, 9)) for _ in range(4))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    weight = generator.integers(0, 1 << 32, (rows, columns), dtype=np.uint32)
    is_transposed, by_columns = data.draw(st.booleans()), data.draw(st.booleans())
    laid = weight.T if is_transposed else weight
    laid = laid.T if by_columns else laid
    pad = [generator.integers(0, 1 << 32, (n, laid.shape[1]), dtype=np.uint32) for n in (before, after)]
    matrix = np.concatenate([pad[0], laid, pad[1]])
    matrix = np.ascontiguousarray(matrix.T if by_columns else matrix)
    known = {"w": digest_lines(weight.shape, [(0, weight)])}
    step = data.draw(st.integers(1, 5))
    chunks = [(first, matrix[first : first + step]) for first in range(0, len(matrix), step)]
    place = (0, before) if by_columns else (before, 0)
    shape = weight.shape[::-1] if is_transposed else weight.shape
    assert find_blocks(digest_lines(matrix.shape, chunks), known) == [Block(*place, *shape, "w", is_transposed)]
    matrix[place[0] + data.draw(st.integers(0, shape[0] - 1)), place[1] + data.draw(st.integers(0, shape[1] - 1))] ^= 1
    assert find_blocks(digest_lines(matrix.shape, [(0, matrix)]), known) == []


def test_a_vector_is_found_only_as_a_whole() -> None:
    """A head's bias of two values could stand in a longer vector by chance: it is not looked for there."""
    bias, longer = (np.array([[1], [2], *rest], np.uint32) for rest in ([], [[3]]))
    known = {"bias": digest_lines((2, 1), [(0, bias)])}
    assert find_blocks(digest_lines((2, 1), [(0, bias)]), known) == [Block(0, 0, 2, 1, "bias", is_transposed=False)]
    assert find_blocks(digest_lines((3, 1), [(0, longer)]), known) == []


# --- data files


def test_a_zero_copy_folder_stays_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Where the data files are a sharded checkpoint, the result's are the merged checkpoint, index included."""
    base = tiny_model("llama", max_shard_size="40KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    folder = Path(shutil.copytree(base, tmp_path / "onnx"))
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    infos = Checkpoint.open(folder)
    file = write_onnx(folder / "model.onnx", tensors)

    def point(model: Any) -> None:
        for proto in model.graph.initializer:
            info = infos[proto.name]
            proto.ClearField("raw_data")
            point_to(proto, info.file, info.begin, info.size_bytes)

    edit(file, point)
    result = patch(file, tmp_path / "adapter", tmp_path / "patched")
    expected = dense.export(adapter, tmp_path / "merged")
    names = {path.name for path in expected.iterdir()} - {"surgery.json", "surgery.undo"}
    assert {path.name for path in result.out.iterdir()} == {*names, "model.onnx", "surgery.json"}
    assert len(list(result.out.glob("*.safetensors"))) > 1
    assert all((result.out / n).read_bytes() == (expected / n).read_bytes() for n in names - {INDEX_FILE})
    assert (result.out / INDEX_FILE).read_bytes() == (base / INDEX_FILE).read_bytes()
    assert result.onnx.read_bytes() == file.read_bytes()


def test_a_fresh_adapter_changes_nothing(tiny_model: TinyModel, plain_file: Path, tmp_path: Path) -> None:
    """Without a step, every file of the result is the input's, byte for byte; small files come along."""
    (plain_file.parent / "tokenizer.json").write_text("{}")
    (plain_file.parent / "notes.pdf").write_text("not a model's")
    apply(tiny_model("llama"), tmp_path / "fresh", PacaSpec(rank=4))
    result = patch(plain_file, tmp_path / "fresh", tmp_path / "patched")
    assert result.blocks == {}
    assert (
        workflow.patch(plain_file, tmp_path / "fresh", tmp_path / "noted").notes[0].endswith("it has not been trained")
    )
    assert sorted(path.name for path in result.out.iterdir()) == [
        "model.data",
        "model.onnx",
        "surgery.json",
        "tokenizer.json",
    ]
    for name in ("model.data", "model.onnx", "tokenizer.json"):
        assert (result.out / name).read_bytes() == (plain_file.parent / name).read_bytes()


def test_only_the_lines_of_trained_columns_change(
    llama: Adapter, tiny_model: TinyModel, plain_file: Path, tmp_path: Path
) -> None:
    """Of a data file, the rows that hold trained columns differ and nothing else; gaps between tensors stay."""
    result = patch(plain_file, tmp_path / "adapter", tmp_path / "patched")
    before, after = ((f.parent / "model.data").read_bytes() for f in (plain_file, result.onnx))
    allowed = np.zeros(len(before), bool)
    patches = {t.weight: llama.delta.patches[t.module] for t in llama.plan.targets}
    by_name = {initializer.name: initializer for initializer in read_graph(plain_file).initializers}
    for name, (block,) in result.blocks.items():
        for column in patches[block.weight].columns.tolist():
            start = by_name[name].begin + column * 32 * 4
            allowed[start : start + 32 * 4] = True
    differ = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    assert len(before) == len(after)
    assert differ.any()
    assert not (differ & ~allowed).any()
    assert result.onnx.read_bytes() == plain_file.read_bytes()


def test_tied_weights_are_patched_once_and_the_embedding_stays(
    llama: Adapter, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Initializers that share bytes, or hold the same ones twice, all get the new values; others stay."""
    base = weights(tiny_model("llama"))
    embedding, second = base["model.embed_tokens.weight"], base[QUERY.replace("0", "1")]
    tensors = {"one": base[QUERY], "again": base[QUERY].t(), "second": second.t(), "embedding": embedding}
    tensors["head"] = embedding.t()
    file = write_onnx(tmp_path / "onnx" / "model.onnx", tensors, data="model.data")

    def share(model: Any) -> None:
        twin = model.graph.initializer.add()
        twin.CopyFrom(model.graph.initializer[0])
        twin.name = "twin"

    edit(file, share)
    after = values_of(patch(file, tmp_path / "adapter", tmp_path / "patched").onnx)
    new = merged(llama, tmp_path / "merged")
    assert after["one"] == after["twin"] == raw(new[QUERY])
    assert after["again"] == raw(new[QUERY].t())
    assert all(after[name] == raw(tensors[name]) for name in ("embedding", "head"))


def test_memory_does_not_grow_with_the_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 29 MB, 4 MB the largest, pass in chunks of 64 KB; columns are held."""
    for module in ("exporters.onnx_file", "surgery.checkpoint", "surgery.tensorfile"):
        monkeypatch.setattr(f"{module}.CHUNK_BYTES", 1 << 16)
    base = tiny_model("llama", overrides={"hidden_size": 512, "intermediate_size": 2048})
    make_adapter(base, tmp_path / "adapter")
    tensors = {f"t{i}": t.t() if t.ndim == 2 else t for i, t in enumerate(weights(base).values())}
    file = write_onnx(tmp_path / "onnx" / "model.onnx", tensors, data="model.data")
    del tensors
    tracemalloc.start()
    try:
        patch(file, tmp_path / "adapter", tmp_path / "patched")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (file.parent / "model.data").stat().st_size > 28 << 20
    assert peak_bytes < 6 << 20  # 4 of them are the buffer that takes the base's digests, 8 MB at most


# --- dtypes


@pytest.mark.parametrize("stored", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_cast_file_gets_the_merged_weights_cast_alike(
    dtype: torch.dtype, stored: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Where the file holds exactly the base's values in its dtype, it gets the merged values in it."""
    base = tiny_model("llama", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", QUERIES)
    tensors = {f"w{i}": t.to(stored) for i, t in enumerate(weights(base).values())}
    file = write_onnx(tmp_path / "onnx" / "model.onnx", tensors, data="model.data")
    result = patch(file, tmp_path / "adapter", tmp_path / "patched")
    expected = {f"w{i}": raw(t.to(stored)) for i, t in enumerate(merged(adapter, tmp_path / "merged").values())}
    assert values_of(result.onnx) == expected
    assert len(result.blocks) == 2


def test_values_too_large_for_the_file_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A trained value above fp16's largest is no infinity in an fp16 file: exit 3, nothing written."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter", QUERIES)
    delta = require_columns(adapter.delta, "test")
    large = {module: replace(p, values=p.values * 1e6) for module, p in delta.patches.items()}
    update_adapter(adapter, ColumnDelta(delta.plan, large, {}), adapter.record.manifest)
    tensors = {name: tensor.half() for name, tensor in weights(tiny_model("llama")).items()}
    file = write_onnx(tmp_path / "onnx" / "model.onnx", tensors)
    refuse(CheckError, 3, "too large for F16", file, tmp_path / "adapter")


# --- heads


def classifier(tiny_model: TinyModel, folder: Path) -> Path:
    """A BERT that already classifies."""
    config = transformers.AutoConfig.from_pretrained(tiny_model("bert"), num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    draw_parameters(model, seed=0)
    model.save_pretrained(folder)
    for path in tiny_model("bert").glob("token*"):
        shutil.copy(path, folder)
    return folder


def test_a_head_of_the_base_is_replaced_whole(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A classifier that the base has is found by content, weight and bias, and gets its trained values."""
    base = classifier(tiny_model, tmp_path / "base")
    task = TaskSpec("sequence-classification", ("a", "b", "c"))
    adapter = make_adapter(base, tmp_path / "adapter", QUERIES_OF_BERT, task=task)
    assert adapter.plan.whole
    tensors = {f"w{i}": t.t() if t.ndim == 2 else t for i, t in enumerate(weights(base).values())}
    result = patch(write_onnx(tmp_path / "onnx" / "model.onnx", tensors), tmp_path / "adapter", tmp_path / "patched")
    new = merged(adapter, tmp_path / "merged").values()
    assert values_of(result.onnx) == {f"w{i}": raw(t.t() if t.ndim == 2 else t) for i, t in enumerate(new)}
    found = {block.weight for blocks in result.blocks.values() for block in blocks}
    assert {"classifier.weight", "classifier.bias"} <= found


QUERIES_OF_BERT = PacaSpec(rank=4, targets=("*.query",))


def test_a_new_head_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A head that the base does not have is not in the graph either: exit 5, with the way out."""
    task = TaskSpec("sequence-classification", ("no", "yes"))
    make_adapter(tiny_model("bert"), tmp_path / "adapter", QUERIES_OF_BERT, task=task)
    file = write_onnx(tmp_path / "onnx" / "model.onnx", weights(tiny_model("bert")))
    refuse(UnsupportedError, 5, "--format onnx", file, tmp_path / "adapter")


# --- refusals


def copy_query(tensors: dict[str, Tensor]) -> None:
    """The second layer's queries as the first one's."""
    tensors[QUERY.replace("0", "1")] = tensors[QUERY].clone()


def make_symmetric(tensors: dict[str, Tensor]) -> None:
    """Queries that equal their transpose."""
    tensors[QUERY] = tensors[QUERY] + tensors[QUERY].t()


def make_constant(tensors: dict[str, Tensor]) -> None:
    """Queries without values."""
    tensors[QUERY] = torch.zeros_like(tensors[QUERY])


@pytest.mark.parametrize(
    ("change", "targets", "match"),
    (
        (copy_query, "*.q_proj", "equal in the base, differ after training"),
        (copy_query, "*.0.self_attn.q_proj", "equal in the base, differ after training"),  # the other is frozen
        (make_symmetric, "*.q_proj", "equal in the base, differ after training"),
        (make_constant, "*.q_proj", "all equal in the base"),
    ),
)
def test_an_ambiguous_weight_is_refused(
    change: Callable[[dict[str, Tensor]], None], targets: str, match: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Where two weights, or two ways round, are equal in the base and not after training, nothing is guessed."""
    base = rewritten(tiny_model("llama"), tmp_path / "base", change)
    make_adapter(base, tmp_path / "adapter", PacaSpec(rank=4, targets=(targets,)))
    file = write_onnx(tmp_path / "onnx" / "model.onnx", weights(base), data="model.data")
    refuse(RefusedError, 4, match, file, tmp_path / "adapter")


def test_equal_weights_that_change_alike_are_patched(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Two targets with equal values before and after, folded into one initializer, are one."""
    base = rewritten(tiny_model("llama"), tmp_path / "base", copy_query)
    adapter = make_adapter(base, tmp_path / "adapter", replace(QUERIES, rank=32))
    delta = require_columns(adapter.delta, "test")
    first = next(iter(delta.patches.values()))
    same = {module: replace(p, values=first.values.clone()) for module, p in delta.patches.items()}
    adapter = update_adapter(adapter, ColumnDelta(delta.plan, same, {}), adapter.record.manifest)
    file = write_onnx(tmp_path / "onnx" / "model.onnx", {"folded": weights(base)[QUERY].t()})
    result = patch(file, tmp_path / "adapter", tmp_path / "patched")
    assert values_of(result.onnx) == {"folded": raw(merged(adapter, tmp_path / "merged")[QUERY].t())}


def test_a_missing_or_altered_weight_is_refused(llama: Adapter, tiny_model: TinyModel, tmp_path: Path) -> None:
    """A weight that is absent, or differs in one bit, is missing: exit 4, with the first one's name."""
    tensors = weights(tiny_model("llama"))
    altered = tensors[QUERY].clone()
    altered.view(torch.int32)[3, 4] ^= 1
    for number, change in enumerate(({}, {"other": altered}, {"rounded": tensors[QUERY].half().float()})):
        others = {name: tensor for name, tensor in tensors.items() if name != QUERY}
        file = write_onnx(tmp_path / f"onnx{number}" / "model.onnx", others | change)
        refuse(BaseMismatchError, 4, f"1 weight not found by content, first {QUERY}", file, tmp_path / "adapter")


@pytest.mark.parametrize("op", ("DequantizeLinear", "MatMulNBits", "QLinearMatMul"))
def test_a_quantized_weight_is_refused(op: str, llama: Adapter, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Where the weights are not found and the graph computes with integers, the message says so: exit 5."""
    others = {name: tensor for name, tensor in weights(tiny_model("llama")).items() if name != QUERY}
    node = onnx.helper.make_node(op, ["packed", "scale"], ["weight"], domain="com.microsoft")
    file = write_onnx(tmp_path / "onnx" / "model.onnx", others, nodes=[node])
    refuse(UnsupportedError, 5, f"first {QUERY}; it is quantized .{op}.", file, tmp_path / "adapter")


def test_a_weight_that_is_quantized_on_the_way_is_refused(llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """Scales were fitted to the base's values: a float weight that QuantizeLinear reads is refused as well."""
    name = next(iter(patch(plain_file, tmp_path / "adapter", tmp_path / "first").blocks))
    node = onnx.helper.make_node("QuantizeLinear", [name, "scale"], ["quantized"])
    edit(plain_file, lambda model: model.graph.node.append(node))
    refuse(UnsupportedError, 5, "a weight that QuantizeLinear reads", plain_file, tmp_path / "adapter")


def test_data_that_depends_on_the_values_is_refused(llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """A checksum, or onnxruntime's prepacked copy of a weight, would no longer hold."""

    def add_key(model: Any) -> None:
        for tensor in model.graph.initializer:
            tensor.external_data.add(key="prepacked_0", value="MatMul+1|0;64")

    edit(plain_file, add_key)
    refuse(UnsupportedError, 5, "prepacked_0", plain_file, tmp_path / "adapter")


def test_an_adapter_without_columns_is_refused(tiny_model: TinyModel, plain_file: Path, tmp_path: Path) -> None:
    """READ's side network is not in the graph: exit 5."""
    make_read_adapter(tiny_model("llama"), tmp_path / "read")
    refuse(UnsupportedError, 5, "a READ adapter", plain_file, tmp_path / "read")


def test_another_base_is_refused(llama: Adapter, tiny_model: TinyModel, plain_file: Path, tmp_path: Path) -> None:
    """The base is checked by its digests and shapes, not by its name."""
    for wrong in (tiny_model("llama", seed=1), tiny_model("llama", overrides={"hidden_size": 16})):
        refuse(BaseMismatchError, 4, "the base this adapter was made for", plain_file, tmp_path / "adapter", base=wrong)
    assert patch(plain_file, tmp_path / "adapter", tmp_path / "right", base=tiny_model("llama")).blocks


def test_what_describes_the_graph_comes_along(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of a folder that we exported: its graph is as it was, and so is what onnxruntime-genai reads of it."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    folder = workflow.export_checkpoint(tiny_model("llama"), tmp_path / "onnx", check=False).out
    out = patch(folder / "model.onnx", adapter.folder, tmp_path / "patched").out
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    for name in ("genai_config.json", "model.onnx"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_folder_is_no_file(llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """What stands in it is named."""
    file = str(plain_file)
    refuse(NotAModelError, 2, f"a folder, expected an .onnx file. Name a file in it: {file}", plain_file.parent,
           tmp_path / "adapter")  # fmt: skip


def test_a_patched_folder_says_what_it_is(llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """To `surgery inspect`: where it came from, and that it was checked."""
    out = patch(plain_file, tmp_path / "adapter", tmp_path / "patched").out
    found = inspect(out)
    said = "\n".join(found.lines())
    assert found.kind == "onnx-patch"
    assert "an ONNX file with an adapter's columns in it" in said
    assert "../adapter (found)" in said
    assert "patched weights: passed in 2 tensors all are the merged ones" in said


def relocate(location: str) -> Callable[[Any], None]:
    """Move every tensor's data elsewhere."""

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = location

    return change


@pytest.mark.parametrize("location", ("../secret.data", "/etc/passwd", "sub/../../secret.data", "link.data"))
def test_data_outside_the_folder_is_refused(location: str, llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """Parent folders, absolute paths and links that lead out: exit 4, and nothing is read from there."""
    shutil.copy(plain_file.parent / "model.data", tmp_path / "secret.data")
    (plain_file.parent / "link.data").symlink_to("../secret.data")
    edit(plain_file, relocate(location))
    refuse(PathEscapeError, 4, "leads to", plain_file, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("key", "value"),
    (("offset", "-4"), ("offset", "9" * 9), ("offset", "x"), ("length", "8"), ("location", "gone.data"),
     ("location", "model.onnx"), ("location", "surgery.json"), ("location", "")),
)  # fmt: skip
def test_data_that_lies_about_itself_is_refused(
    key: str, value: str, llama: Adapter, plain_file: Path, tmp_path: Path
) -> None:
    """Offsets, lengths and names that cannot be: exit 4."""
    (plain_file.parent / "surgery.json").write_text("{}")

    def change(model: Any) -> None:
        for tensor in model.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == key).value = value

    edit(plain_file, change)
    refuse(DamagedError, 4, "no data file" if key == "location" else "inside it", plain_file, tmp_path / "adapter")


def test_values_that_do_not_fill_their_shape_are_refused(llama: Adapter, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Inside the .onnx as well, raw or typed."""
    for typed in (False, True):
        folder = tmp_path / f"onnx{typed}"
        file = write_onnx(folder / "model.onnx", {"q": weights(tiny_model("llama"))[QUERY]}, typed=typed)
        edit(file, lambda model: model.graph.initializer[0].dims.__setitem__(0, 33))
        refuse(DamagedError, 4, "by its shape|fill its shape", file, tmp_path / "adapter")


def test_overlapping_weights_are_refused(llama: Adapter, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Two changing initializers that share some of their bytes cannot both be right."""
    base = weights(tiny_model("llama"))
    both = torch.cat([base[QUERY], base[QUERY.replace("0", "1")]])
    file = write_onnx(tmp_path / "onnx" / "model.onnx", {"both": both}, data="model.data")

    def overlap(model: Any) -> None:
        point_to(model.graph.initializer.add(name="second", data_type=1, dims=[32, 32]), "model.data", 4096, 4096)

    edit(file, overlap)
    refuse(DamagedError, 4, "begins inside another", file, tmp_path / "adapter")


def test_what_is_no_onnx_file_is_refused(llama: Adapter, tmp_path: Path) -> None:
    """A file that is not there (2), a folder (2), other bytes (4), an empty graph (4)."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "noise.onnx").write_bytes(b"\xff" * 100)
    (folder / "empty.onnx").write_bytes(b"")
    refuse(NotAModelError, 2, "no such file", folder / "absent.onnx", tmp_path / "adapter")
    refuse(NotAModelError, 2, "a folder, expected an .onnx file", folder / ".", tmp_path / "adapter")
    refuse(DamagedError, 4, "does not parse", folder / "noise.onnx", tmp_path / "adapter")
    refuse(DamagedError, 4, "without nodes", folder / "empty.onnx", tmp_path / "adapter")


def test_an_existing_output_is_kept(llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """Refused without --overwrite, and where it is not ours; a patched folder is replaced; inputs never are."""
    first = patch(plain_file, tmp_path / "adapter", tmp_path / "patched")
    refuse(OutputExistsError, 2, "--overwrite", plain_file, tmp_path / "adapter")
    again = patch(plain_file, tmp_path / "adapter", tmp_path / "patched", overwrite=True)
    assert again == first
    (tmp_path / "patched" / "surgery.json").unlink()
    refuse(OutputExistsError, 2, "Remove it yourself", plain_file, tmp_path / "adapter", overwrite=True)
    with pytest.raises(RequestError, match="would be replaced"):
        patch(plain_file, tmp_path / "adapter", plain_file.parent, overwrite=True)


def test_no_room_is_said_before_anything_is_written(
    llama: Adapter, plain_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole output is counted: data files, graph and small files."""
    (plain_file.parent / "tokenizer.json").write_text("{}")
    needed = sum(path.stat().st_size for path in plain_file.parent.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr("surgery.writing.shutil.disk_usage", lambda _: usage)
    refuse(ResourceError, 4, f"{needed:,} bytes", plain_file, tmp_path / "adapter")


@pytest.mark.parametrize("storage", ("data", "raw"))
def test_a_wrong_result_is_never_published(
    storage: str, llama: Adapter, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is read again and compared with the merged weights: exit 3, and nothing remains."""
    file = write_onnx(
        tmp_path / "onnx" / "model.onnx", weights(tiny_model("llama")), data="m.data" * (storage == "data")
    )
    monkeypatch.setattr(onnx_patch, "_put", lambda *_: None)
    refuse(CheckError, 3, "it differs from the merged", file, tmp_path / "adapter")
    monkeypatch.undo()
    monkeypatch.setattr(onnx_patch, "_fault", lambda path: "" if path == file else "a dangling node")
    refuse(CheckError, 3, "a dangling node", file, tmp_path / "adapter")


def test_a_failure_while_writing_leaves_nothing(
    llama: Adapter, plain_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up in the middle of a data file."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_patch, "_put", fail)
    before = digest_folder(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        patch(plain_file, tmp_path / "adapter", tmp_path / "patched")
    assert digest_folder(tmp_path) == before


def test_without_onnx_the_command_says_what_to_install(
    llama: Adapter, plain_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra is named; nothing is written."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    refuse(UnsupportedError, 5, r"pip install 'checkpoint-surgery\[onnx\]'", plain_file, tmp_path / "adapter")


def test_the_record_says_where_it_came_from(llama: Adapter, plain_file: Path, tmp_path: Path) -> None:
    """`surgery.json` names the adapter, the graph and the initializers that changed."""
    result: PatchResult = patch(plain_file, tmp_path / "adapter", tmp_path / "patched")
    record = json.loads((result.out / "surgery.json").read_text())
    assert record["kind"] == "onnx-patch"
    assert record["manifest"]["export"]["initializers"] == sorted(result.blocks)
    assert (result.out / record["manifest"]["adapter"]["path"]).resolve() == llama.folder.resolve()
