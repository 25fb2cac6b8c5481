"""Merged folders: the base but for the trained columns, whole or absent, and what the attached model computes."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from exporters import dense, lora
from exporters.undo import undo
from surgery import adapter as adapters
from surgery import writing as files
from surgery.adapter import Adapter, open_adapter, update_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import ColumnDelta
from surgery.errors import (
    BaseMismatchError,
    CheckError,
    DamagedError,
    NotAModelError,
    OutputExistsError,
    RequestError,
    ResourceError,
    SurgeryError,
)
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, attach, collect, load, save
from surgery.survey import TaskSpec
from surgery.tensorfile import tensor_to_bytes
from tests.conftest import TinyModel, digest_folder
from tests.failing import failing_at
from tests.tiny import FAMILIES, sample_inputs
from tests.trained import make_adapter

RANK_4 = PacaSpec(rank=4)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def built(folder: Path, family: str) -> Any:
    """A family's model from a folder, as anyone would load it."""
    return getattr(transformers, FAMILIES[family].model).from_pretrained(folder)


def logits_of(model: Any, family: str) -> Tensor:
    """Logits in eval mode."""
    with torch.no_grad():
        inputs = sample_inputs(family)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        return model.eval()(**inputs).logits


def weights(folder: Path) -> dict[str, bytes]:
    """The weight files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, by name."""
    opened = Checkpoint.open(folder)
    return {name: b"".join(bytes(chunk) for chunk in opened.chunks(name)) for name in opened}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of a single-file folder in place."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def mix_dtypes(tensors: dict[str, Tensor]) -> None:
    """Some layers of a bf16 model in fp32 and fp16, as checkpoints from several hands have."""
    for name, value in tensors.items():
        if "layers.0.mlp" in name or "norm" in name:
            tensors[name] = value.float() * 1.001
        elif "layers.1.self_attn" in name:
            tensors[name] = value.half()


@pytest.fixture
def mixed(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A Llama with three dtypes in one file; config.json says bf16."""
    folder = shutil.copytree(tiny_model("llama", dtype=torch.bfloat16), tmp_path / "mixed")
    return rewrite(Path(folder), mix_dtypes)


@pytest.fixture
def llama_adapter(tiny_model: TinyModel, tmp_path: Path) -> Adapter:
    """A tiny Llama's adapter whose every column has moved."""
    return make_adapter(tiny_model("llama"), tmp_path / "adapter")


# --- the bytes


@pytest.mark.parametrize("shards", (None, "20KB"), ids=("one file", "shards"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_fresh_adapter_merges_to_the_base(
    family: str, dtype: str, shards: str | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Without a step every weight file is the base's byte for byte, in every dtype, layout and number of files."""
    base = tiny_model(family, dtype=DTYPES[dtype], max_shard_size=shards)
    merged = dense.export(apply(base, tmp_path / "adapter", RANK_4), tmp_path / "merged")
    assert weights(merged) == weights(base)
    assert (len(weights(merged)) > 1) == bool(shards)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()


def test_mixed_dtypes_merge_to_the_base(mixed: Path, tmp_path: Path) -> None:
    """Also with three dtypes in one file, and after loading and collecting, where the model holds only one of them."""
    adapter = apply(mixed, tmp_path / "adapter", RANK_4)
    assert weights(dense.export(adapter, tmp_path / "merged")) == weights(mixed)
    collected = update_adapter(adapter, collect(load(adapter.folder, trainable=True)), adapter.record.manifest)
    assert weights(dense.export(collected, tmp_path / "again")) == weights(mixed)


@pytest.mark.parametrize("shards", (None, "20KB"), ids=("one file", "shards"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ("llama", "gpt2", "t5"))
def test_only_planned_columns_change(
    family: str, dtype: str, shards: str | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Headers, untouched tensors and columns are the base's bytes; planned columns are the values, cast once."""
    base = tiny_model(family, dtype=DTYPES[dtype], max_shard_size=shards)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = dense.export(adapter, tmp_path / "merged")
    before, after = Checkpoint.open(base), Checkpoint.open(merged)
    assert {file: header.raw for file, header in after.headers.items()} == {
        file: header.raw for file, header in before.headers.items()
    }
    expected = tensors_of(base)
    for target in adapter.plan.targets:
        patch, weight = adapter.delta.patches[target.module], before.read_tensor(target.weight)
        columns = weight if target.input_axis == 1 else weight.t()
        columns[:, patch.columns] = patch.values.to(weight.dtype)
        expected[target.weight] = tensor_to_bytes(weight)
    assert tensors_of(merged) == expected
    assert adapter.delta.moved == len(adapter.plan.targets)


def test_merging_twice_is_merging_once(llama_adapter: Adapter, tmp_path: Path) -> None:
    """Two merges give the same bytes; a merge onto the merged folder is refused: its columns are not the base's."""
    once = dense.export(llama_adapter, tmp_path / "once")
    twice = dense.export(llama_adapter, tmp_path / "twice")
    assert weights(once) == weights(twice)
    assert (once / "surgery.undo").read_bytes() == (twice / "surgery.undo").read_bytes()
    with pytest.raises(BaseMismatchError):
        dense.export(llama_adapter, tmp_path / "thrice", base=once)


def test_undoing_after_training_gives_the_base(mixed: Path, tmp_path: Path) -> None:
    """What is collected from a model in another dtype still knows the base's own columns: undo is the base."""
    adapter = apply(mixed, tmp_path / "adapter", RANK_4)
    model = load(adapter.folder, trainable=True)
    model(**sample_inputs("llama")).logits.float().square().mean().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02).step()
    trained = update_adapter(adapter, collect(model), adapter.record.manifest)
    merged = dense.export(trained, tmp_path / "merged")
    assert torch.equal(logits_of(model, "llama"), logits_of(built(merged, "llama"), "llama"))
    assert weights(merged) != weights(mixed)
    assert digest_folder(undo(merged, tmp_path / "undone")) == digest_folder(mixed)


def test_a_live_model_in_lower_precision_leaves_unmoved_columns_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Saved from bf16 in memory against an fp32 file, columns that did not move are the file's."""
    base = tiny_model("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    attach(model, RANK_4)
    adapter = save(model, tmp_path / "adapter", base=base)
    assert weights(dense.export(adapter, tmp_path / "merged")) == weights(base)


def test_tensors_the_model_does_not_know_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Extra tensors, of types that torch has no name for too, arrive byte for byte under their names."""
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))

    def extend(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.layers.0.weight"] = torch.randn(3, 5)
        tensors["scales"] = torch.randn(4).to(torch.float8_e4m3fn)
        tensors["counts"] = torch.arange(5)
        tensors["empty"] = torch.zeros(0, 3)

    rewrite(base, extend)
    adapter = make_adapter(base, tmp_path / "adapter")
    extras = ("mtp.layers.0.weight", "scales", "counts", "empty")
    before = tensors_of(base)
    for number, settings in enumerate(({}, {"max_shard_bytes": 20_000}, {"max_shard_bytes": 1})):
        after = tensors_of(dense.export(adapter, tmp_path / str(number), **settings))
        assert set(after) == set(before)
        assert all(after[name] == before[name] for name in extras)


@pytest.mark.parametrize("shards", (None, "20KB"), ids=("one file", "shards"))
@pytest.mark.parametrize("limit", (1, 5_000, 20_000, 10**9))
def test_shards_can_be_cut_anew(limit: int, shards: str | None, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Other shards hold the same tensors, none is too large, the index is true, and from_pretrained loads them."""
    adapter = make_adapter(tiny_model("llama", max_shard_size=shards), tmp_path / "adapter")
    whole = dense.export(adapter, tmp_path / "whole")
    cut = dense.export(adapter, tmp_path / "cut", max_shard_bytes=limit)
    assert tensors_of(cut) == tensors_of(whole)
    opened = Checkpoint.open(cut)
    for header in opened.headers.values():
        assert sum(info.size_bytes for info in header.tensors) <= limit or len(header.tensors) == 1
    assert opened.is_sharded == (cut / "model.safetensors.index.json").exists() == (limit < 10**9)
    if opened.is_sharded:
        index = json.loads((cut / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: info.file for name, info in opened.items()}
        assert index["metadata"]["total_size"] == opened.size_bytes
    assert torch.equal(logits_of(built(cut, "llama"), "llama"), logits_of(built(whole, "llama"), "llama"))


@pytest.mark.parametrize("wanted", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("stored", ("fp32", "bf16"))
def test_a_dtype_can_be_asked_for(stored: str, wanted: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Floating-point tensors are cast, integers are not, and config.json says so: loaders do not cast back."""
    base = Path(shutil.copytree(tiny_model("llama", dtype=DTYPES[stored]), tmp_path / "base"))
    rewrite(base, lambda tensors: tensors.update(counts=torch.arange(5)))
    adapter = make_adapter(base, tmp_path / "adapter")
    kept = Checkpoint.open(dense.export(adapter, tmp_path / "kept"))
    cast = Checkpoint.open(dense.export(adapter, tmp_path / "cast", dtype=wanted))
    for name in kept:
        expected = kept.read_tensor(name)
        expected = expected.to(DTYPES[wanted]) if expected.is_floating_point() else expected
        assert torch.equal(cast.read_tensor(name), expected)
        assert cast.read_tensor(name).dtype == expected.dtype
    model = built(cast.root, "llama")
    assert model.dtype == DTYPES[wanted]
    same = transformers.LlamaForCausalLM.from_pretrained(kept.root, dtype=DTYPES[wanted])
    assert torch.equal(logits_of(model, "llama"), logits_of(same, "llama"))


def test_values_that_a_dtype_cannot_hold_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """1e6 has no fp16: exit code 3, nothing written; an infinity that the base has is its own affair."""
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    rewrite(base, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    dense.export(make_adapter(base, tmp_path / "a1"), tmp_path / "merged", dtype="fp16")
    rewrite(base, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckError, match=r"model.norm.weight: 32 values too large for F16") as caught:
        dense.export(make_adapter(base, tmp_path / "a2"), tmp_path / "too-large", dtype="fp16")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "too-large").exists()


def test_a_head_that_a_dtype_cannot_hold_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Tensors trained whole are held to the same rule as all others."""
    task = TaskSpec("sequence-classification", ("no", "yes"))
    adapter = apply(tiny_model("bert"), tmp_path / "adapter", RANK_4, task=task)
    whole = {name: replace(patch, values=patch.values + 1e6) for name, patch in adapter.delta.whole.items()}
    adapter = update_adapter(adapter, replace(adapter.delta, whole=whole), adapter.record.manifest)
    with pytest.raises(CheckError, match="values too large for F16"):
        dense.export(adapter, tmp_path / "merged", dtype="fp16")


# --- what the attached model computes


@pytest.mark.parametrize(
    ("family", "dtype"), (*((f, d) for f in FAMILIES for d in ("fp32", "bf16")), ("t5", "fp16"), ("gpt2", "fp16"))
)
def test_merged_folders_compute_what_the_adapter_computes(
    family: str, dtype: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """In every family from_pretrained takes the folder with nothing amiss, and logits equal the attached model's."""
    base = tiny_model(family, dtype=DTYPES[dtype])
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = dense.export(adapter, tmp_path / "merged")
    model, info = getattr(transformers, FAMILIES[family].model).from_pretrained(merged, output_loading_info=True)
    assert not any(info.values())
    mine = logits_of(load(adapter.folder), family)
    assert torch.equal(mine, logits_of(model, family))
    assert not torch.allclose(mine, logits_of(built(base, family), family))


@pytest.mark.parametrize("kind", ("bare", "masked", "sharded", "with old names", "with a head"))
def test_a_new_head_lands_in_the_merged_folder(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """An encoder without `bert.` before its names, or with it, becomes a classifier that loads with nothing missing."""
    base = encoder_base(kind, tiny_model, tmp_path)
    task = TaskSpec("sequence-classification", ("bad", "fine", "good"))
    adapter = make_adapter(base, tmp_path / "adapter", task=task)
    merged = dense.export(adapter, tmp_path / "merged")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert (info["missing_keys"], info["mismatched_keys"]) == (set(), set())
    assert {name for name in info["unexpected_keys"] if not name.startswith("cls.")} == set()
    assert model.config.id2label == {0: "bad", 1: "fine", 2: "good"}
    assert torch.equal(model.classifier.weight, adapter.delta.whole["classifier.weight"].values)
    kept = {name for name in Checkpoint.open(base) if not name.startswith("classifier.")}
    expected = {f"{adapter.plan.prefix}{name}" for name in kept} | set(adapter.delta.whole)
    assert set(Checkpoint.open(merged)) == expected
    inputs = sample_inputs("bert")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, load(adapter.folder)(**inputs).logits)


def encoder_base(kind: str, tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A BERT as it is found in the wild: its names with or without `bert.`, with LayerNorm's old names, in shards."""
    if kind == "masked":
        return tiny_model("bert")
    encoder: Any = transformers.BertForMaskedLM.from_pretrained(tiny_model("bert")).bert
    encoder.config.architectures = ["BertModel"]
    encoder.save_pretrained(tmp_path / "base", max_shard_size="20KB" if kind == "sharded" else "1GB")
    if kind == "with old names":

        def rename(tensors: dict[str, Tensor]) -> None:
            for name in list(tensors):
                new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[new] = tensors.pop(name)

        rewrite(tmp_path / "base", rename)
    elif kind == "with a head":  # beside a backbone without a prefix, as some converters write it
        head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}
        rewrite(tmp_path / "base", lambda tensors: tensors.update(head))
    return tmp_path / "base"


def test_a_head_of_the_base_is_replaced_where_it_stands(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Another number of classes gives a head of another shape under the same name; undo brings the base's back."""
    base = tiny_model("vit")
    task = TaskSpec("image-classification", ("a", "b", "c", "d", "e"))
    merged = dense.export(make_adapter(base, tmp_path / "adapter", task=task), tmp_path / "merged")
    assert Checkpoint.open(merged)["classifier.weight"].shape == (5, 32)
    assert built(merged, "vit").config.num_labels == 5
    assert digest_folder(undo(merged, tmp_path / "undone")) == digest_folder(base)


def test_hub_snapshots_are_merged_as_folders_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base of links into the hub's blobs gives a merged folder of plain files."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in tiny_model("llama").iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    merged = dense.export(apply(snapshot, tmp_path / "adapter", RANK_4), tmp_path / "merged")
    assert not any(path.is_symlink() for path in merged.rglob("*"))
    assert weights(merged) == weights(tiny_model("llama"))


# --- refusals


def test_another_base_is_refused(tiny_model: TinyModel, llama_adapter: Adapter, tmp_path: Path) -> None:
    """Of the same shape but another seed, dtype or size: exit code 4, for export and load, and nothing is written."""
    for number, other in enumerate((
        tiny_model("llama", seed=1),
        tiny_model("llama", dtype=torch.bfloat16),
        tiny_model("llama", overrides={"hidden_size": 64}),
        tiny_model("gpt2"),
    )):  # fmt: skip
        with pytest.raises(BaseMismatchError, match="this adapter was made for") as caught:
            dense.export(llama_adapter, tmp_path / str(number), base=other)
        assert caught.value.exit_code == 4
        assert not (tmp_path / str(number)).exists()
    with pytest.raises(BaseMismatchError):
        load(llama_adapter.folder, base=tiny_model("llama", seed=1))


@pytest.mark.parametrize("where", ("a trained column", "another column", "the base is gone"))
def test_a_base_changed_after_apply_is_refused(where: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """One changed value in a targeted weight, trained column or not, is seen while streaming; nothing stays behind."""
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter")
    target = adapter.plan.targets[-1]
    trained = adapter.delta.patches[target.module].columns.tolist()
    column = trained[0] if where == "a trained column" else next(n for n in range(99) if n not in trained)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[target.weight][-1, column] += 1.0

    rewrite(base, change)
    if where == "the base is gone":
        shutil.rmtree(base)
    with pytest.raises(BaseMismatchError):
        dense.export(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_with_another_head_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A head that will be replaced is part of the base too: undo must bring back the right one."""
    base = Path(shutil.copytree(tiny_model("vit"), tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter")
    rewrite(base, lambda tensors: tensors["classifier.weight"].add_(1.0))
    with pytest.raises(BaseMismatchError, match=r"classifier\.weight"):
        dense.export(adapter, tmp_path / "merged")


def forge(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change an adapter's tensors and write the digest that fits."""
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    change(tensors)
    data = safetensors.torch.save(tensors)
    (folder / "adapter.safetensors").write_bytes(data)
    document = json.loads((folder / "surgery.json").read_text())
    document["manifest"]["files"]["adapter.safetensors"] = hashlib.sha256(data).hexdigest()
    (folder / "surgery.json").write_text(json.dumps(document))


LAYER = "model.layers.0.mlp.up_proj"
FORGERIES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "NaN": lambda t: t[f"{LAYER}.values"].__setitem__((0, 0), float("nan")),
    "infinity": lambda t: t[f"{LAYER}.values"].__setitem__((0, 0), float("inf")),
    "columns out of order": lambda t: t.update({f"{LAYER}.columns": t[f"{LAYER}.columns"].flip(0)}),
    "a column twice": lambda t: t[f"{LAYER}.columns"].fill_(3),
    "a column past the end": lambda t: t[f"{LAYER}.columns"].__setitem__(-1, 32),
    "a negative column": lambda t: t[f"{LAYER}.columns"].__setitem__(0, -1),
    "columns of another dtype": lambda t: t.update({f"{LAYER}.columns": t[f"{LAYER}.columns"].int()}),
    "fewer columns": lambda t: t.update({f"{LAYER}.columns": t[f"{LAYER}.columns"][:-1].clone()}),
    "values of another shape": lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"].t().contiguous()}),
    "values of an integer dtype": lambda t: t.update({f"{LAYER}.values": t[f"{LAYER}.values"].long()}),
    "original of another dtype": lambda t: t.update({f"{LAYER}.original": t[f"{LAYER}.original"].half()}),
    "a tensor less": lambda t: t.pop(f"{LAYER}.values"),
    "a tensor more": lambda t: t.update(surplus=torch.zeros(1)),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_an_adapter_that_lies_is_damaged(kind: str, llama_adapter: Adapter, tmp_path: Path) -> None:
    """NaN, columns that are none, wrong shapes and types, with a digest that fits: refused with exit code 4."""
    forge(llama_adapter.folder, FORGERIES[kind])
    text = "1 of 192 trained values are not finite" if kind in ("NaN", "infinity") else "adapter"
    with pytest.raises(DamagedError, match=text) as caught:
        dense.export(open_adapter(llama_adapter.folder), tmp_path / "merged")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "merged").exists()
    with pytest.raises(DamagedError):
        load(llama_adapter.folder)


@pytest.mark.parametrize("kind", ("cut", "one bit", "gone", "empty"))
def test_a_damaged_adapter_file_is_refused(kind: str, llama_adapter: Adapter) -> None:
    """Truncated, changed in one bit, missing or empty: the digest in the record says so."""
    path = llama_adapter.folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind != "gone":
        data[len(data) // 2] ^= kind == "one bit"
        path.write_bytes(data[: {"cut": len(data) - 1, "one bit": len(data), "empty": 0}[kind]])
    with pytest.raises(DamagedError, match="no adapter.safetensors" if kind == "gone" else "digest"):
        open_adapter(llama_adapter.folder)


def test_folders_of_another_kind_are_no_adapters(llama_adapter: Adapter, tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base, a merged folder and nothing at all: each with exit code 2."""
    merged = dense.export(llama_adapter, tmp_path / "merged")
    for folder in (tiny_model("llama"), merged, tmp_path / "nowhere"):
        with pytest.raises((NotAModelError, DamagedError)) as caught:
            open_adapter(folder)
        assert caught.value.exit_code in (2, 4)


def test_an_adapter_file_that_is_a_link_out_is_refused(llama_adapter: Adapter, tmp_path: Path) -> None:
    """What an adapter folder holds lies in it."""
    path = llama_adapter.folder / "adapter.safetensors"
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SurgeryError) as caught:
        open_adapter(llama_adapter.folder)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("dtype", ("fp8", "float32", ""))
def test_an_unknown_dtype_is_refused(dtype: str, llama_adapter: Adapter, tmp_path: Path) -> None:
    """The error lists what there is."""
    with pytest.raises(RequestError, match="keep, fp32, bf16, fp16"):
        dense.export(llama_adapter, tmp_path / "merged", dtype=dtype)


# --- whole or absent


def test_an_existing_output_is_refused_and_can_be_replaced(llama_adapter: Adapter, tmp_path: Path) -> None:
    """Without --overwrite it stays as it was; with it the old folder is gone whole."""
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        dense.export(llama_adapter, tmp_path / "merged")
    with pytest.raises(OutputExistsError, match="Remove it yourself"):  # no folder of ours
        dense.export(llama_adapter, tmp_path / "merged", overwrite=True)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]
    (tmp_path / "merged" / RECORD_FILE).write_text("{}")
    dense.export(llama_adapter, tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "mine").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]


def test_what_is_read_is_never_overwritten(tiny_model: TinyModel, tmp_path: Path) -> None:
    """--overwrite onto the base, the adapter or a folder that holds one of them is refused, and nothing is lost."""
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "work" / "base"))
    adapter = make_adapter(base, tmp_path / "work" / "adapter")
    model = load(adapter.folder, trainable=True)
    before = digest_folder(tmp_path / "work")
    (tmp_path / "link").symlink_to(base)
    for out in (base, tmp_path / "work", tmp_path / "link", base / "..", adapter.folder / ".." / "base"):
        for write in (
            lambda out: apply(base, out, RANK_4, overwrite=True),
            lambda out: save(model, out, base=base, overwrite=True),
            lambda out: dense.export(adapter, out, overwrite=True),
            lambda out: lora.export(adapter, out, overwrite=True),
        ):
            with pytest.raises(RequestError, match="would be replaced"):
                write(out)
    for export in (dense.export, lora.export):
        with pytest.raises(RequestError, match="would be replaced"):
            export(adapter, adapter.folder, overwrite=True)
    merged = dense.export(adapter, tmp_path / "merged")
    with pytest.raises(RequestError, match="would be replaced"):
        undo(merged, merged)
    assert digest_folder(tmp_path / "work") == before


@pytest.mark.parametrize("operation", ("fsync", "write_file", "rename"))
def test_a_failure_at_any_write_leaves_nothing(
    operation: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever small file, fsync or rename of apply and export fails: no output, and the inputs are as they were."""
    base = tiny_model("llama", max_shard_size="20KB")
    adapter = make_adapter(base, tmp_path / "adapter")
    before = digest_folder(tmp_path / "adapter"), digest_folder(base)
    places = {
        "fsync": [(files.os, "fsync")],
        "rename": [(Path, "rename")],
        "write_file": [(dense, "write_file"), (adapters, "write_file")],
    }[operation]  # fmt: skip
    failures = 0
    for write in (lambda: apply(base, tmp_path / "out", RANK_4), lambda: dense.export(adapter, tmp_path / "out")):
        for number in range(1, 100):
            calls: list[int] = []
            with monkeypatch.context() as patched:
                for owner, name in places:
                    patched.setattr(owner, name, failing_at(number, getattr(owner, name), calls))
                with suppress(OSError):
                    write()
            if len(calls) < number:
                break
            failures += 1
            assert not any("out" in path.name for path in tmp_path.iterdir()) or operation == "fsync"
            if (tmp_path / "out").exists():  # the parent folder's fsync is the last act: the output is whole by then
                assert (tmp_path / "out" / "surgery.json").exists()
                shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert failures >= 2
    assert (digest_folder(tmp_path / "adapter"), digest_folder(base)) == before


def test_no_room_is_said_before_writing(
    llama_adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The need is known from headers, so that a disk too small is refused before the first byte."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    monkeypatch.setattr(dense, "write_file", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(ResourceError, match="50,000 bytes free"):
        dense.export(llama_adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, to be made smaller."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_nothing(
    small_disk: Path, llama_adapter: Adapter, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the room ends (others take it while we write), the output is absent and the disk is empty again."""
    base = tiny_model("llama")
    before = digest_folder(llama_adapter.folder), digest_folder(base)
    monkeypatch.setattr(dense, "require_disk", lambda *_: None)
    for write in (lambda out: dense.export(llama_adapter, out), lambda out: apply(base, out, PacaSpec(rank=32))):
        for pages in range(1, 100, 4):
            subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(small_disk)], check=True)
            try:
                write(small_disk / "out")
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017  a success ends the loop
                assert list(small_disk.iterdir()) == []
            else:
                break
        assert pages > 20
        assert (small_disk / "out" / "surgery.json").exists()
        shutil.rmtree(small_disk / "out")
    assert (digest_folder(llama_adapter.folder), digest_folder(base)) == before


KILLED_EXPORTS = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from exporters import dense
from surgery.adapter import open_adapter
from tests.conftest import digest_folder

work, rounds = Path(sys.argv[1]), int(sys.argv[2])
adapter, out = open_adapter(work / "adapter"), work / "merged"
start = time.perf_counter()
dense.export(adapter, out)
duration, whole = time.perf_counter() - start, digest_folder(out)
draw, outcomes = random.Random(0), {"absent": 0, "whole": 0}
for round in range(rounds):
    shutil.rmtree(out, ignore_errors=True)
    child = os.fork()
    if child == 0:
        try:
            dense.export(adapter, out)
        finally:
            os._exit(0)
    time.sleep(draw.random() * duration * 1.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if out.exists():
        assert digest_folder(out) == whole, round
    outcomes["whole" if out.exists() else "absent"] += 1
shutil.rmtree(out, ignore_errors=True)
dense.export(adapter, out)
print(outcomes["absent"], outcomes["whole"], sorted(path.name for path in work.iterdir()))
"""


def test_killed_exports_leave_all_or_nothing(tiny_model: TinyModel, tmp_path: Path, project_root: Path) -> None:
    """kill -9 at sixty random moments: the output is absent or whole each time, and the next export clears up."""
    make_adapter(tiny_model("llama", max_shard_size="10KB"), tmp_path / "adapter")
    run = subprocess.run(
        [sys.executable, "-c", KILLED_EXPORTS, str(tmp_path), "60"],
        capture_output=True, text=True, cwd=project_root, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    absent, _whole, left = run.stdout.split(maxsplit=2)
    assert int(absent) > 2  # how many come before the end depends on the machine
    assert left.strip() == "['adapter', 'merged']"


# --- an adapter's state is replaced, never lost


def moved_by(adapter: Adapter, step: float) -> ColumnDelta:
    """The adapter's values, all moved by one number."""
    patches = {m: replace(p, values=p.values + step) for m, p in adapter.delta.patches.items()}
    return ColumnDelta(adapter.plan, patches, adapter.delta.whole)


def cut_short(adapter: Adapter, delta: ColumnDelta, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Update an adapter, and die when `after` of the three replacements are done."""
    calls: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "replace_file", failing_at(after + 1, adapters.replace_file, calls))
        with suppress(OSError):
            update_adapter(adapter, delta, replace(adapter.record.manifest, training={"state": after}))


@pytest.mark.parametrize("second", range(4))
@pytest.mark.parametrize("first", range(4))
def test_an_update_cut_short_leaves_the_old_state_or_the_new(
    first: int, second: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However two updates in a row are interrupted, one state can be read, values and record belonging together."""
    adapter = apply(tiny_model("llama"), tmp_path / "adapter", RANK_4)
    states = [adapter.delta.to_bytes()]
    for number, after in ((1, first), (2, second)):
        delta = moved_by(adapter, float(number))
        cut_short(adapter, delta, after, monkeypatch)
        states.append(delta.to_bytes() if after >= 2 else states[-1])
        found = open_adapter(tmp_path / "adapter")
        assert found.delta.to_bytes() == states[-1]
        digest = found.record.manifest.files["adapter.safetensors"]
        assert digest == hashlib.sha256((tmp_path / "adapter" / "adapter.safetensors").read_bytes()).hexdigest()
    updated = update_adapter(adapter, moved_by(adapter, 3.0), adapter.record.manifest)
    assert "previous" not in json.loads((tmp_path / "adapter" / "surgery.json").read_text())
    assert open_adapter(tmp_path / "adapter").delta.to_bytes() == updated.delta.to_bytes()


def test_a_reader_in_the_middle_of_an_update_finds_a_state(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that happens between reading the record and the adapter file is no damage."""
    adapter = apply(tiny_model("llama"), tmp_path / "adapter", RANK_4)
    delta = moved_by(adapter, 1.0)
    real, calls = adapters.file_sha256, []

    def interfere(path: Path) -> str:
        calls.append(path)
        if len(calls) == 1:
            update_adapter(adapter, delta, adapter.record.manifest)
        return real(path)

    monkeypatch.setattr(adapters, "file_sha256", interfere)
    assert open_adapter(tmp_path / "adapter").delta.to_bytes() == delta.to_bytes()


def test_apply_twice_gives_the_same_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An adapter is a function of the base and the request: new heads too."""
    task = TaskSpec("sequence-classification", ("no", "yes"))
    torch.manual_seed(1)
    first = apply(tiny_model("bert"), tmp_path / "a", RANK_4, task=task)
    torch.manual_seed(2)
    second = apply(tiny_model("bert"), tmp_path / "b", RANK_4, task=task)
    assert first.delta.to_bytes() == second.delta.to_bytes()
    assert first.plan.id == second.plan.id
    other = apply(tiny_model("bert"), tmp_path / "c", PacaSpec(rank=4, seed=1), task=task)
    assert not torch.equal(other.delta.whole["classifier.weight"].values, first.delta.whole["classifier.weight"].values)
