"""READ in ONNX graphs: one node a recurrent layer, the trained model's numbers, and the base's files untouched."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx

import surgery
from exporters import onnx_side
from surgery import ReadSpec, TaskSpec
from surgery.adapter import Adapter
from surgery.errors import BaseMismatchError, CheckError
from surgery.manifest import ONNX, read_record
from surgery.tensorfile import read_header
from tests import graphs
from tests.conftest import TinyModel, digest_folder
from tests.graphs import too_large
from tests.reading import SPEC, WIDTH
from tests.trained import make_read_adapter

SIDE_FILE = "read.safetensors"
RECURRENT = ("GRU", "LSTM", "RNN")
CLASSES = TaskSpec("sequence-classification", ("a", "b", "c"))


@dataclass(frozen=True)
class Kind:
    """What is exported, and the recurrent nodes of each of its graphs."""

    name: str
    family: str
    spec: ReadSpec
    nodes: Mapping[str, Counter[str]]
    task: TaskSpec | None = None
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    is_slow: bool = True


def alone(name: str, count: int = 1) -> dict[str, Counter[str]]:
    """One graph with so many nodes."""
    return {"model.onnx": Counter({name: count})}


def pair(name: str, encoder: int, decoder: int) -> dict[str, Counter[str]]:
    """An encoder's graph and its decoder's; a counter of nothing is empty."""
    found = {"encoder_model.onnx": Counter({name: encoder}), "decoder_model.onnx": Counter({name: decoder})}
    return {file: +nodes for file, nodes in found.items()}


def rich(cell: str) -> ReadSpec:
    """Everything at once."""
    return ReadSpec(cell=cell, hidden=6, recurrent_layers=2, bidirectional=True, initial="embedding", reduce="mean",
                    output_norm=True, scale=0.5)  # fmt: skip


KINDS = (
    Kind("bert-classes", "bert", replace(rich("lstm"), pooling="mean"), alone("LSTM", 2), CLASSES, is_slow=False),
    Kind("vit-rnn", "vit", replace(SPEC, cell="rnn"), alone("RNN"), is_slow=False),
    Kind("llama", "llama", replace(SPEC, bidirectional=True), alone("GRU"), is_slow=False),
    Kind("vit-gru", "vit", replace(SPEC, bidirectional=True), alone("GRU")),
    Kind("vit-rich-gru", "vit", rich("gru"), alone("GRU", 2)),
    Kind("vit-rich-rnn", "vit", rich("rnn"), alone("RNN", 2)),
    Kind("vit-lstm", "vit", replace(SPEC, cell="lstm"), alone("LSTM")),
    Kind("vit-last", "vit", replace(SPEC, layers="last:1"), alone("GRU")),
    Kind("vit-norm", "vit", replace(SPEC, output_norm=True, scale=2.0), alone("GRU")),
    Kind("vit-first-state", "vit", replace(SPEC, initial="embedding", recurrent_layers=2), alone("GRU", 2)),
    Kind("bert", "bert", replace(SPEC, cell="rnn", bidirectional=True, reduce="mean"), alone("RNN")),
    Kind("llama-rich", "llama", rich("lstm"), alone("LSTM", 2)),
    Kind("llama-classes", "llama", replace(SPEC, pooling="mean"), alone("GRU"), CLASSES),
    Kind("llama-own", "llama", SPEC, alone("GRU"), CLASSES),
    Kind("llama-bf16", "llama", SPEC, alone("GRU"), dtype=torch.bfloat16),
    Kind("gpt2-copy", "gpt2", SPEC, alone("GRU"), options={"onnx_data": "copy"}),
    Kind("t5-rich", "t5", replace(rich("gru"), joiner="attention"), pair("GRU", 2, 2)),
    Kind("t5-encoder", "t5", replace(SPEC, stacks="encoder"), pair("GRU", 1, 1)),
    Kind("t5-decoder", "t5", replace(SPEC, stacks="decoder"), pair("GRU", 0, 1)),
    Kind("bart", "bart", replace(SPEC, joiner="mean", cell="lstm"), pair("LSTM", 1, 1)),
)  # fmt: skip
FAST = tuple(kind for kind in KINDS if not kind.is_slow)
SLOW = tuple(pytest.param(kind, marks=pytest.mark.long, id=kind.name) for kind in KINDS if kind.is_slow)
ALL = (*(pytest.param(kind, id=kind.name) for kind in FAST), *SLOW)


@dataclass(frozen=True)
class Exported:
    """A base, an adapter that has moved, and the folder that was made of both."""

    kind: Kind
    base: Path
    adapter: Adapter
    folder: Path
    result: Any


Made = Callable[[Kind], Exported]


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Each kind, exported once, with its check."""
    done: dict[str, Exported] = {}

    def export(kind: Kind) -> Exported:
        if kind.name not in done:
            root, base = tmp_path_factory.mktemp(kind.name), tiny_model(kind.family, dtype=kind.dtype)
            adapter = make_read_adapter(base, root / "adapter", kind.spec, task=kind.task)
            result = surgery.export(adapter.folder, root / "out", format="onnx", **kind.options)
            done[kind.name] = Exported(kind, base, adapter, root / "out", result)
        return done[kind.name]

    return export


@pytest.mark.parametrize("kind", ALL)
def test_the_graph_computes_the_trained_model(kind: Kind, made: Made) -> None:
    """In every form of the side network: surgery.load's numbers, padded, cached and step by step; not the base's."""
    exported = made(kind)
    model = surgery.load(exported.adapter.folder).float()
    assert too_large(graphs.differences(exported.folder, model)) == {}
    surgery.detach(model, merge=False)
    assert too_large(graphs.differences(exported.folder, model)), "the side network changes nothing"
    assert [(check.name, check.result) for check in exported.result.verification.checks] == [("onnx", "passed")]


POOLED = (
    Kind("vit-first", "vit", replace(SPEC, pooling="first"), alone("GRU")),
    Kind("bert-first", "bert", replace(SPEC, pooling="first"), alone("GRU"), CLASSES),
    Kind("llama-last", "llama", replace(SPEC, pooling="last"), alone("GRU"), CLASSES),
)


@pytest.mark.long
@pytest.mark.parametrize("kind", POOLED, ids=lambda kind: kind.name)
def test_one_token_stands_for_all(kind: Kind, made: Made) -> None:
    """The first or the last that is no padding, in each row of a batch."""
    exported = made(kind)
    assert too_large(graphs.differences(exported.folder, surgery.load(exported.adapter.folder))) == {}


@pytest.mark.parametrize("kind", ALL)
def test_a_recurrent_layer_is_one_node(kind: Kind, made: Made) -> None:
    """However many layers the backbone has, and in both directions: one in each stack's graph."""
    exported = made(kind)
    found = {}
    for path in graphs.graph_files(exported.folder):
        nodes = [node for node in graphs.nodes_of(path) if node.op_type in RECURRENT]
        found[path.name] = Counter(node.op_type for node in nodes)
        for node in nodes:
            said = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            assert said["hidden_size"] == kind.spec.hidden
            assert said["direction"] == (b"bidirectional" if kind.spec.bidirectional else b"forward")
        others = {node.op_type for node in graphs.nodes_of(path)}
        assert not others & {"Loop", "Scan", "If"}
    assert found == dict(kind.nodes)


@pytest.mark.parametrize("kind", ALL)
def test_the_side_network_lies_beside_the_base(kind: Kind, made: Made) -> None:
    """read.safetensors holds what was trained and nothing else; the base's files are the base's, byte for byte."""
    exported = made(kind)
    names = {path.name for path in exported.base.glob("*.safetensors")}
    assert {path.name for path in exported.folder.glob("*.safetensors")} == {*names, SIDE_FILE}
    assert all((exported.folder / name).read_bytes() == (exported.base / name).read_bytes() for name in names)
    tensors = safetensors.torch.load_file(exported.folder / SIDE_FILE)
    plan, delta = exported.adapter.plan, exported.adapter.delta
    assert set(tensors) == {target.parameter for target in plan.side} | {target.weight for target in plan.whole}
    for target in plan.side:
        assert torch.equal(tensors[target.parameter], delta.state[target.parameter])
    for target in plan.whole:
        assert torch.equal(tensors[target.weight].float(), delta.whole[target.parameter].values.to(kind.dtype).float())


@pytest.mark.parametrize("kind", ALL)
def test_every_weight_is_read_in_place(kind: Kind, made: Made) -> None:
    """The backbone's from the base's file, the side network's from its own, under their names; heads from the new."""
    exported = made(kind)
    disk, used = graphs.tensors_on_disk(exported.folder), {}
    for path in graphs.graph_files(exported.folder):
        weights = graphs.weights_of(path)
        if kind.options:
            assert {stored.file for stored in weights.values()} == {"model.onnx_data"}
        else:
            assert {name: disk.get(name) for name in weights} == weights
        assert graphs.inline_values(path) <= 200
        used |= weights
    plan = exported.adapter.plan
    expected = {target.parameter for target in plan.side} | {target.weight for target in plan.whole}
    unseen = {name for name in expected if ".pooler." in name and kind.spec.pooling != "own"}  # nothing runs it then
    assert expected - unseen <= set(used)
    replaced = {target.weight for target in plan.whole if target.sha256}
    assert {disk[name].file for name in replaced} <= {SIDE_FILE}


@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in FAST[:2]])
def test_it_is_verified_later(kind: Kind, made: Made) -> None:
    """Graphs, where they look for weights, and what they compute with the side network."""
    exported = made(kind)
    found = [(check.name, check.result) for check in surgery.verify(exported.folder).checks]
    assert found == [(n, "passed") for n in ("untouched tensors", "graphs", "side network", "onnx")]
    record = read_record(exported.folder, ONNX)
    assert record.manifest.adapter["sha256"] == exported.adapter.record.manifest.files["adapter.safetensors"]


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    """A decoder's folder that may be spoiled."""
    return Path(shutil.copytree(made(FAST[0]).folder, tmp_path / "out"))


@pytest.mark.parametrize("name", ("model.safetensors", SIDE_FILE))
def test_a_changed_header_is_noticed(name: str, copied: Path) -> None:
    """Also of the side network's file, whose tensors are what they were. Exit code 3."""
    tensors = safetensors.torch.load_file(copied / name)
    safetensors.torch.save_file(tensors, copied / name, metadata={"format": "pt", "touched": "yes"})
    with pytest.raises(CheckError, match=rf"{name}: its header has changed") as caught:
        surgery.verify(copied, numeric=False)
    assert caught.value.exit_code == 3


def test_a_lost_side_network_is_noticed(copied: Path) -> None:
    """The graph has nothing to read then."""
    (copied / SIDE_FILE).unlink()
    with pytest.raises(CheckError, match=rf"{SIDE_FILE}: "):
        surgery.verify(copied, numeric=False)


def flip(path: Path, name: str) -> None:
    """Another value of one tensor, behind the same header."""
    stored = next(info for info in read_header(path).tensors if info.name == name)
    data = bytearray(path.read_bytes())
    data[stored.begin] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("has_base", (True, False))
def test_a_changed_backbone_is_noticed(has_base: bool, made: Made, copied: Path, tmp_path: Path) -> None:
    """By the base, and where that is gone by the digest that the plan has of it. Exit code 3."""
    given = {"base": made(FAST[0]).base} if has_base else {}
    sound = surgery.verify(copied, numeric=False, **given).checks
    assert ("untouched tensors", "passed") in [(check.name, check.result) for check in sound]
    name = read_header(copied / "model.safetensors").tensors[0].name
    flip(copied / "model.safetensors", name)
    with pytest.raises(CheckError) as caught:
        surgery.verify(copied, numeric=False, **given)
    assert (name in str(caught.value)) == has_base


def test_a_changed_side_network_is_noticed(made: Made, copied: Path) -> None:
    """By the adapter, where one is at hand; else the check says that it is not."""
    exported, name = made(FAST[0]), "side_network.stacks.backbone.directions.0.weight_hh"
    given = {"adapter": exported.adapter.folder, "numeric": False}
    checks = {check.name: check for check in surgery.verify(copied, **given).checks}
    assert checks["side network"].result == "passed"
    flip(copied / SIDE_FILE, name)
    with pytest.raises(CheckError, match=f"{name}: it is not what was trained"):
        surgery.verify(copied, **given)
    checks = {check.name: check for check in surgery.verify(copied, numeric=False).checks}
    assert checks["side network"].result == "not run"
    assert "is not there" in checks["side network"].detail


def test_a_base_that_is_another_is_not_compared_with(
    made: Made, copied: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The wrong base, or the wrong adapter, is refused by name."""
    family = made(FAST[0]).kind.family
    with pytest.raises(BaseMismatchError, match="--base"):
        surgery.verify(copied, base=tiny_model(family, seed=1), numeric=False)
    other = make_read_adapter(tiny_model(family, seed=1), tmp_path / "other", SPEC)
    with pytest.raises(CheckError, match="it is not the adapter that was exported"):
        surgery.verify(copied, adapter=other.folder, numeric=False)


def swapped_gates(weight: torch.Tensor, order: Any) -> torch.Tensor:
    """torch's gates, in torch's order."""
    return weight


def test_gates_in_the_wrong_order_are_not_let_out(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export's own check runs the side network too: exit code 3 and no output."""
    adapter = make_read_adapter(tiny_model("vit"), tmp_path / "adapter", SPEC)
    monkeypatch.setattr(onnx_side, "_ordered", swapped_gates)
    with pytest.raises(CheckError, match="onnxruntime differs from torch by") as caught:
        surgery.export(adapter.folder, tmp_path / "out", format="onnx")
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A side network fits one backbone: exit code 4 and no output."""
    adapter = make_read_adapter(tiny_model("vit"), tmp_path / "adapter", SPEC)
    with pytest.raises(BaseMismatchError) as caught:
        surgery.export(adapter.folder, tmp_path / "out", format="onnx", base=tiny_model("vit", seed=1))
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_with_a_side_network_is_written_alike(made: Made, tmp_path: Path) -> None:
    """Again, under another name: the same bytes but for the record's paths."""
    exported = made(FAST[1])
    again = surgery.export(exported.adapter.folder, tmp_path / "again", format="onnx", check=False).out
    for path in exported.folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes() or path.name == "surgery.json", path.name
    said = [json.loads((folder / "surgery.json").read_text())["manifest"]["export"]["onnx"]
            for folder in (exported.folder, again)]  # fmt: skip
    assert said[0]["graphs"] == said[1]["graphs"]
    assert said[1]["differences"] == {}


def test_a_replaced_head_is_the_trained_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Whatever the base's files are called: its head lies in one of them still."""
    base = Path(shutil.copytree(tiny_model("vit"), tmp_path / "base"))
    (base / "model.safetensors").rename(base / "weights.safetensors")
    names = safetensors.torch.load_file(base / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = make_read_adapter(base, tmp_path / "adapter", SPEC)
    out = surgery.export(adapter.folder, tmp_path / "out", format="onnx").out
    assert graphs.weights_of(out / "model.onnx")["classifier.weight"].file == SIDE_FILE
    assert too_large(graphs.differences(out, surgery.load(adapter.folder))) == {}


def test_shards_are_cut_for_a_side_network(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The backbone's files anew, the side network's one file, and a graph that knows them."""
    base = tiny_model("vit")
    before = digest_folder(base)
    adapter = make_read_adapter(base, tmp_path / "adapter", SPEC)
    out = surgery.export(adapter.folder, tmp_path / "out", format="onnx", max_shard_size="20KB").out
    weights = graphs.weights_of(out / "model.onnx")
    disk = graphs.tensors_on_disk(out)
    assert {name: disk[name] for name in weights} == weights
    assert len({stored.file for stored in weights.values()}) > 2
    assert disk["side_network.stacks.backbone.directions.0.weight_hh"].shape == (3 * WIDTH, WIDTH)
    assert too_large(graphs.differences(out, surgery.load(adapter.folder))) == {}
    assert digest_folder(base) == before
