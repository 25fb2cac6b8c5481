"""Inspecting a folder: what it says is what is there, and an unknown folder gets a useful answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporters import dense, lora, onnx_export
from exporters.onnx_folder import OnnxOptions
from surgery.adapter import Adapter, update_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.errors import DamagedError, NotAModelError, SurgeryError
from surgery.inspection import Inspection, inspect
from surgery.manifest import UNDO_FILE, Base
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.survey import TaskSpec
from surgery.table import plan_lines
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.trained import make_adapter, make_read_adapter


def fact(inspection: Inspection, label: str) -> str:
    """The text beside a label; all of them, a line each, where there are several."""
    found = [line[len(label) :].strip() for line in inspection.lines() if line.startswith(f"{label} ")]
    assert found, f"no line {label!r}"
    return "\n".join(found)


def edit_json(path: Path, **entries: object) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def copy_of(folder: Path, to: Path) -> Path:
    """A copy that a test may write in."""
    shutil.copytree(folder, to)
    return to


def test_a_checkpoint_is_described(tiny_model: TinyModel) -> None:
    """Architecture, values by dtype, size, shards, tied weights, tokenizer."""
    folder = tiny_model("llama", dtype=torch.bfloat16, max_shard_size="20KB")
    checkpoint, result = Checkpoint.open(folder), inspect(folder)
    assert result.kind == "model"
    assert result.model is not None
    assert (result.model.architecture, result.model.model_type) == ("LlamaForCausalLM", "llama")
    assert result.model.values == {"BF16": checkpoint.size_bytes // 2}
    assert (result.model.tensors, result.model.files) == (len(checkpoint), len(list(folder.glob("*.safetensors"))))
    assert result.model.size_bytes == checkpoint.size_bytes
    assert (result.model.is_tied, result.model.quantization, result.model.tokenizer) == (False, "", "tokenizer.json")
    assert fact(result, "kind") == "a checkpoint"
    assert fact(result, "values") == f"{checkpoint.size_bytes // 2:,}: {checkpoint.size_bytes // 2:,} BF16"
    assert fact(result, "weights").endswith(f"{len(checkpoint)} tensors in {result.model.files} files")


@pytest.mark.parametrize(
    ("entries", "tied"),
    (
        ({"tie_word_embeddings": True}, "yes, by config.json"),
        ({"tie_word_embeddings": False}, "no, by config.json"),
        ({"tie_word_embeddings": None}, "config.json does not say"),
        ({"tie_word_embeddings": None, "text_config": {"tie_word_embeddings": True}}, "yes, by config.json"),
    ),
)
def test_tied_weights_are_what_the_configuration_says(
    entries: dict[str, object], tied: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """At the top, or in the part for text; and silence is called silence."""
    folder = copy_of(tiny_model("gpt2"), tmp_path / "model")
    edit_json(folder / "config.json", **entries)
    assert fact(inspect(folder), "tied embeddings") == tied


def test_odd_checkpoints_are_described_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Quantized, without configuration, without tokenizer: each is said, none is an error."""
    folder = copy_of(tiny_model("llama"), tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"}, architectures=None)
    assert fact(inspect(folder), "quantized") == "gptq"
    assert fact(inspect(folder), "architecture") == "unknown (llama)"
    for name in ("config.json", "tokenizer.json"):
        (folder / name).unlink()
    assert fact(inspect(folder), "architecture") == "unknown (no model type)"
    assert fact(inspect(folder), "tokenizer") == "none"


def test_a_fresh_adapter_has_moved_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Right after apply: no training, no target moved, the base found, the plan's table below."""
    adapter = apply(tiny_model("llama"), tmp_path / "adapter", PacaSpec(rank=4, rank_pattern={"mlp.*": 2}))
    result = inspect(tmp_path / "adapter")
    assert result.kind == "adapter"
    assert fact(result, "trained") == "not yet"
    assert fact(result, "moved") == "0 of 14 targets"
    assert fact(result, "base").endswith(" (found)")
    assert fact(result, "method") == "paca, rank 2, 4"
    assert fact(result, "task") == "causal-lm, loaded as LlamaForCausalLM"
    assert result.lines()[-len(plan_lines(adapter.plan)) :] == plan_lines(adapter.plan)


def with_training(adapter: Adapter, training: dict[str, object]) -> Adapter:
    """The same adapter with a summary of training in its record."""
    manifest = replace(adapter.record.manifest, training=training)
    return update_adapter(adapter, adapter.delta, manifest)


def test_a_trained_adapter_says_what_training_did(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The summary of the run and the evaluation's figures, and how many targets moved."""
    adapter = make_adapter(tiny_model("gpt2"), tmp_path / "adapter")
    summary = {"steps": 7, "loss": 1.23456, "device": "cpu", "before": {"eval_loss": 2.5}, "after": {}, "run": "x"}
    with_training(adapter, summary)
    result = inspect(tmp_path / "adapter")
    assert fact(result, "trained") == "steps 7, device cpu, loss 1.235"
    assert fact(result, "held-out before") == "eval_loss 2.5"
    assert "held-out after" not in "\n".join(result.lines())
    assert fact(result, "moved") == "8 of 8 targets"


@pytest.mark.parametrize(
    ("checkpoints", "step", "said"),
    ((("checkpoint-4", "checkpoint-12"), 12, "last whole checkpoint is of step 12"), ((), 0, "no whole checkpoint")),
)
def test_a_run_that_is_not_finished_is_said(
    checkpoints: tuple[str, ...], step: int, said: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With its last whole checkpoint and the way on; a finished run, or none, is not mentioned."""
    adapter = apply(tiny_model("gpt2"), tmp_path / "adapter", PacaSpec(rank=4))
    assert "interrupted" not in "\n".join(inspect(adapter.folder).lines())
    folder = adapter.folder / "checkpoints"
    for name in (*checkpoints, ".checkpoint-20.1.partial"):
        (folder / name).mkdir(parents=True)
    note = {"digest": "x", "finished": False, "start": adapter.record.manifest.files["adapter.safetensors"]}
    (folder / "run.json").write_text(json.dumps(note))
    result = inspect(adapter.folder)
    assert said in fact(result, "run")
    assert "`surgery train --resume auto`" in fact(result, "run")
    assert result.to_dict()["adapter"]["open_run_step"] == step
    edit_json(folder / "run.json", finished=True)
    assert "interrupted" not in "\n".join(inspect(adapter.folder).lines())
    assert inspect(adapter.folder).to_dict()["adapter"]["open_run_step"] is None


def test_one_target_that_moved_is_counted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`moved` counts targets whose values differ once in the base's dtype."""
    adapter = apply(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "adapter")
    patches = dict(adapter.delta.patches)
    first, second = sorted(patches)[:2]
    patches[first] = replace(patches[first], values=patches[first].values + 1)
    patches[second] = replace(patches[second], values=patches[second].values + 1e-9)  # lost in bfloat16
    update_adapter(adapter, replace(adapter.delta, patches=patches), adapter.record.manifest)
    assert fact(inspect(tmp_path / "adapter"), "moved") == "1 of 14 targets"


def test_a_missing_base_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base that moved away, and a hub id that is not in the cache, are `not found`; no network is asked."""
    base = copy_of(tiny_model("llama"), tmp_path / "model")
    adapter = make_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    assert fact(inspect(tmp_path / "adapter"), "base") == "../model (not found)"
    hub = Base(hub_id="someone/llama", revision="abc")
    update_adapter(adapter, adapter.delta, replace(adapter.record.manifest, base=hub))
    assert fact(inspect(tmp_path / "adapter"), "base") == "someone/llama (revision abc) (not found)"


def test_a_merged_folder_says_where_it_came_from(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its checks, its adapter and base, whether undo is possible; and it is still a checkpoint."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    merged = dense.export(adapter, tmp_path / "merged")
    assert fact(inspect(merged), "check") == "none ran"
    verify(merged, adapter=tmp_path / "adapter")
    result = inspect(merged)
    assert result.kind == "merged"
    assert fact(result, "architecture") == "LlamaForCausalLM (llama)"
    assert fact(result, "from the adapter") == "../adapter (found)"
    assert fact(result, "undo") == "possible"
    assert fact(result, "export") == "dtype keep"
    assert all(": passed " in line for line in fact(result, "check").splitlines())
    shutil.rmtree(tmp_path / "adapter")
    assert fact(inspect(merged), "from the adapter") == "../adapter (not found)"
    (merged / UNDO_FILE).unlink()
    assert fact(inspect(merged), "undo") == f"not possible: {UNDO_FILE} is missing"


def test_a_cast_merge_cannot_be_undone(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`inspect` says it before `undo` refuses."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    dense.export(adapter, tmp_path / "merged", dtype="bf16")
    assert "--dtype bf16 rounded" in fact(inspect(tmp_path / "merged"), "undo")


def test_a_lora_folder_shows_its_notes(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What vLLM refuses is read out of the record."""
    task = TaskSpec("sequence-classification", ("a", "b"))
    lora.export(make_adapter(tiny_model("bert"), tmp_path / "adapter", task=task), tmp_path / "lora")
    result = inspect(tmp_path / "lora")
    assert result.kind == "lora"
    assert fact(result, "export") == "format lora, rank 8"
    assert "vLLM refuses modules_to_save" in fact(result, "note")


@pytest.mark.parametrize("kind", ("model", "merged", "read"))
def test_graphs_are_shown(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """With what they compute in and where their data lie: of a checkpoint as it is, a merge and a side network."""
    base, out, options = tiny_model("llama"), tmp_path / "out", OnnxOptions(dtype="fp16", data="copy")
    if kind == "model":
        onnx_export.export_checkpoint(base, out, check=False, options=options)
    else:
        make = make_adapter if kind == "merged" else make_read_adapter
        onnx_export.export(make(base, tmp_path / "adapter"), out, options=options)
    result = inspect(out)
    assert result.kind == ("merged" if kind == "merged" else "onnx")
    assert fact(result, "graphs") == "model.onnx: operators 20, computing in fp16, data in copy"
    assert "dtype" not in fact(result, "export"), "of the files, beside what the graph computes in"
    assert fact(result, "architecture") == "LlamaForCausalLM (llama)"
    assert fact(result, "base").endswith(" (found)")
    assert "onnx: not run" in fact(result, "check")
    assert fact(result, "undo").startswith("possible" if kind == "merged" else "nothing to undo")
    lines = "\n".join(result.lines())
    assert ("read, gru 7 wide" in lines, "paca, rank" in lines) == (kind == "read", kind == "merged")
    assert ("../adapter (found)" in lines) == (kind != "model")
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["merged"]["settings"]["onnx"]["opset"] == 20
    assert ("plan" in document) == (kind != "model")


@pytest.mark.parametrize("kind", ("model", "adapter", "merged", "lora"))
def test_the_json_document_says_the_same(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every kind is plain JSON; what does not apply is left out; the targets are grouped."""
    adapter = make_adapter(tiny_model("t5"), tmp_path / "adapter")
    dense.export(adapter, tmp_path / "merged")
    lora.export(adapter, tmp_path / "lora")
    folder = tiny_model("t5") if kind == "model" else tmp_path / kind
    document = json.loads(json.dumps(inspect(folder).to_dict(), allow_nan=False))
    assert (document["kind"], document["path"]) == (kind, str(folder))
    assert ("model" in document, "plan" in document) == (kind in ("model", "merged"), kind != "model")
    if kind != "model":
        assert sum(row["count"] for row in document["plan"]["targets"]) == len(adapter.plan.targets)
        assert document["plan"]["id"] == adapter.plan.id


def test_unknown_folders_get_a_useful_answer(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A missing path, a file, an empty folder, pickles, a foreign PEFT adapter, a folder of models: each its own."""
    (tmp_path / "empty").mkdir()
    for name, file in (("pickle", "pytorch_model.bin"), ("peft", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    copy_of(tiny_model("llama"), tmp_path / "models" / "mine")
    answers = {
        "nothing": "no such folder",
        "empty": "no model.safetensors",
        "pickle": "pickle files",
        "peft": "a PEFT adapter",
        "models": "Folders in it that could be meant: mine",
        "pickle/pytorch_model.bin": "a file",
    }
    for name, answer in answers.items():
        with pytest.raises(NotAModelError, match=answer):
            inspect(tmp_path / name)


def test_damaged_records_are_documented_errors(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A record that does not parse, of an unknown kind or schema, or whose adapter was changed."""
    make_adapter(tiny_model("llama"), tmp_path / "adapter")
    record = tmp_path / "adapter" / RECORD_FILE
    whole = record.read_text()
    for text, error in (
        ("{", DamagedError),
        ("{}", SurgeryError),
        (whole.replace('"kind": "adapter"', '"kind": "sculpture"'), NotAModelError),
        (whole.replace('"schema": 1', '"schema": 99'), SurgeryError),
    ):
        record.write_text(text)
        with pytest.raises(error):
            inspect(tmp_path / "adapter")
    record.write_text(whole)
    with (tmp_path / "adapter" / "adapter.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(DamagedError, match="digest"):
        inspect(tmp_path / "adapter")
