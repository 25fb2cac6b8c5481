"""Undo: a merged folder gives its base back, file by file and byte by byte, or says why it cannot."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from exporters.dense import export
from exporters.undo import undo
from surgery.adapter import Adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.errors import (
    CheckError,
    DamagedError,
    NotAModelError,
    OutputExistsError,
    PathEscapeError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.manifest import UNDO_FILE
from surgery.methods.paca_spec import PacaSpec
from surgery.survey import TaskSpec
from surgery.tensorfile import TensorFile, build_header, tensor_to_bytes
from tests.conftest import TinyModel
from tests.tiny import build_model, build_tokenizer
from tests.trained import make_adapter

CLASSIFY = TaskSpec("sequence-classification", ("a", "b"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(base: Path, folder: Path, spec: PacaSpec | None = None, *, task: TaskSpec | None = None) -> Adapter:
    """An adapter of `base` in `folder/adapter`, merged into `folder/merged`."""
    adapter = make_adapter(base, folder / "adapter", spec, task=task)
    export(adapter, folder / "merged")
    return adapter


@pytest.mark.parametrize("family", ("llama", "gpt2", "t5", "vit", "mixtral"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_a_merge_undone_is_its_base(family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """All dtypes, both weight layouts: the undone folder equals the base's folder in names and bytes."""
    base = tiny_model(family, dtype=dtype)
    merge(base, tmp_path)
    merged = contents(tmp_path / "merged")
    assert merged["model.safetensors"] != (base / "model.safetensors").read_bytes()
    assert undo(tmp_path / "merged", tmp_path / "base") == tmp_path / "base"
    assert contents(tmp_path / "base") == contents(base)
    assert contents(tmp_path / "merged") == merged, "undoing changed the merged folder"


@pytest.mark.parametrize("max_shard_bytes", (None, 15_000, 10**9))
@pytest.mark.parametrize("sharded", (False, True))
def test_shards_come_back_as_they_were(
    *, sharded: bool, max_shard_bytes: int | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """However the merge cut its files, the base's own come back, its index to the letter."""
    base = tiny_model("llama", dtype=torch.bfloat16, max_shard_size="20KB" if sharded else None)
    adapter = make_adapter(base, tmp_path / "adapter")
    export(adapter, tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    undo(tmp_path / "merged", tmp_path / "base")
    assert contents(tmp_path / "base") == contents(base)


def test_an_index_in_its_own_style_comes_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The index and configuration are given back verbatim, spaces, order and unknown keys included."""
    base = tmp_path / "odd"
    base.mkdir()
    for name, data in contents(tiny_model("llama", max_shard_size="20KB")).items():
        (base / name).write_bytes(data)
    for name in ("model.safetensors.index.json", "config.json"):
        document = {"made_by": "hand", **json.loads((base / name).read_text())}
        (base / name).write_text(json.dumps(document, indent=7) + "\n\n")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling":  "mean"}')
    merge(base, tmp_path)
    undo(tmp_path / "merged", tmp_path / "base")
    assert contents(tmp_path / "base") == contents(base)


@pytest.mark.parametrize("max_shard_bytes", (None, 15_000))
def test_a_prefix_and_a_head_are_taken_off(max_shard_bytes: int | None, tmp_path: Path) -> None:
    """A bare BERT made into a classifier: the names lose their prefix, the new head goes, the config is the old one."""
    base = tmp_path / "bert"
    build_model("bert").bert.save_pretrained(base)
    build_tokenizer("pair").save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}, indent=2))
    adapter = make_adapter(base, tmp_path / "adapter", task=CLASSIFY)
    assert adapter.plan.prefix == "bert."
    export(adapter, tmp_path / "merged", max_shard_bytes=max_shard_bytes)
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= set(Checkpoint.open(tmp_path / "merged"))
    undo(tmp_path / "merged", tmp_path / "base")
    assert contents(tmp_path / "base") == contents(base)


def test_a_head_that_the_base_had_comes_back(tmp_path: Path) -> None:
    """A classifier trained on with its own head, and with one of another size: the base's head is given back."""
    base = tmp_path / "bert"
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    transformers.BertForSequenceClassification(config).save_pretrained(base)
    for number, labels in enumerate((("a", "b", "c"), ("a", "b"))):
        here = tmp_path / str(number)
        adapter = make_adapter(base, here / "adapter", task=TaskSpec("sequence-classification", labels))
        export(adapter, here / "merged")
        assert Checkpoint.open(here / "merged")["classifier.weight"].shape == (len(labels), 32)
        undo(here / "merged", here / "base")
        assert contents(here / "base") == contents(base)


def test_infinities_in_the_base_come_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base may hold NaN in columns that training replaced: its bits are given back."""
    base = tmp_path / "nan"
    base.mkdir()
    for name, data in contents(tiny_model("llama")).items():
        (base / name).write_bytes(data)
    adapter = make_adapter(base, tmp_path / "probe", PacaSpec(rank=4))
    target = adapter.plan.targets[0]
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    untrained = next(c for c in range(target.in_features) if c not in adapter.delta.patches[target.module].columns)
    tensors[target.weight][0, untrained] = float("nan")
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge(base, tmp_path)
    undo(tmp_path / "merged", tmp_path / "base")
    assert contents(tmp_path / "base") == contents(base)


def test_a_cast_merge_cannot_be_undone(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Rounding to another dtype lost values: the combination is not supported, and the message names the base."""
    base = tiny_model("llama")
    export(make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", dtype="bf16")
    with pytest.raises(UnsupportedError, match=f"rounding lost .*{base.name}") as caught:
        undo(tmp_path / "merged", tmp_path / "base")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "base").exists()


def test_folders_that_are_no_merge_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A plain model, an adapter and a merge without its undo file: a request that is wrong, exit code 2."""
    merge(tiny_model("llama"), tmp_path)
    for folder in (tiny_model("llama"), tmp_path / "adapter", tmp_path / "nothing"):
        with pytest.raises(NotAModelError):
            undo(folder, tmp_path / "base")
    (tmp_path / "merged" / UNDO_FILE).unlink()
    with pytest.raises(RequestError, match=f"no {UNDO_FILE}"):
        undo(tmp_path / "merged", tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_an_existing_folder_is_never_overwritten(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An output that exists is refused and stays as it was."""
    merge(tiny_model("llama"), tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        undo(tmp_path / "merged", tmp_path / "base")
    assert contents(tmp_path / "base") == {"mine.txt": b"mine"}


def test_a_merge_that_was_edited_is_found_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    """One bit flipped in a target, outside the trained columns: the digest does not hold, exit code 3."""
    merge(tiny_model("llama"), tmp_path)
    checkpoint = Checkpoint.open(tmp_path / "merged")
    adapter_columns = TensorFile(tmp_path / "merged" / UNDO_FILE)
    module = "model.layers.1.mlp.down_proj"
    columns = adapter_columns.read(f"{module}.columns").tolist()
    info = checkpoint[f"{module}.weight"]
    untouched = next(column for column in range(info.shape[1]) if column not in columns)
    data = bytearray((tmp_path / "merged" / info.file).read_bytes())
    data[info.begin + 4 * untouched] ^= 1
    (tmp_path / "merged" / info.file).write_bytes(data)
    with pytest.raises(CheckError, match="sha256") as caught:
        undo(tmp_path / "merged", tmp_path / "base")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "base").exists()


# ----------------------------------------------------------------------------------------------- a hostile surgery.undo

Entries = dict[str, tuple[str, tuple[int, ...], bytes]]


def edit_undo(merged: Path, edit: Callable[[Entries], object]) -> None:
    """Rewrite `surgery.undo` with its entries (name -> dtype, shape, bytes) changed."""
    stored = TensorFile(merged / UNDO_FILE)
    entries: Entries = {n: (i.dtype, i.shape, tensor_to_bytes(stored.read(n))) for n, i in stored.infos.items()}
    edit(entries)
    header = build_header([(name, dtype, shape) for name, (dtype, shape, _) in entries.items()], {})
    (merged / UNDO_FILE).write_bytes(header + b"".join(data for _, _, data in entries.values()))


def put(name: str, data: bytes) -> Callable[[Entries], object]:
    """An edit that adds or replaces a run of bytes."""
    return lambda entries: entries.update({name: ("U8", (len(data),), data)})


def drop(name: str) -> Callable[[Entries], object]:
    """An edit that removes an entry."""
    return lambda entries: entries.pop(name)


def raw_header(text: str) -> bytes:
    """A safetensors header of any text."""
    return struct.pack("<Q", len(text)) + text.encode()


MAIN = "header:model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
TINY_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HUGE_ENTRY = {"dtype": "F32", "shape": [1 << 59], "data_offsets": [0, 1 << 61]}

HOSTILE: dict[str, tuple[Callable[[Entries], object], type[SurgeryError]]] = {
    "a header that climbs out": (put("header:../evil.safetensors", raw_header("{}")), PathEscapeError),
    "an absolute header": (put("header:/evil.safetensors", raw_header("{}")), PathEscapeError),
    "a header in a folder": (put("header:a/evil.safetensors", raw_header("{}")), DamagedError),
    "a header of another kind": (put("header:config.json", raw_header("{}")), DamagedError),
    "a file that climbs out": (put("file:../evil.json", b"{}"), PathEscapeError),
    "an absolute file": (put("file:/evil.json", b"{}"), PathEscapeError),
    "a file deep inside": (put("file:a/b/c.json", b"{}"), DamagedError),
    "a file without a name": (put("file:", b"{}"), DamagedError),
    "a file that is the folder": (put("file:.", b"{}"), DamagedError),
    "a file with a zero byte": (put("file:a\x00b", b"{}"), PathEscapeError),
    "a file below a file": (put("file:config.json/x", b"{}"), DamagedError),
    "a file over the weights": (put("file:model.safetensors", b"{}"), DamagedError),
    "no header": (drop(MAIN), DamagedError),
    "an empty header": (put(MAIN, b""), DamagedError),
    "a header that is no JSON": (put(MAIN, raw_header("{]")), DamagedError),
    "a header that is a list": (put(MAIN, raw_header("[1]")), DamagedError),
    "a header without tensors": (put(MAIN, raw_header("{}")), DamagedError),
    "a header without offsets": (put(MAIN, raw_header('{"x": {}}')), DamagedError),
    "a header of a stranger": (put(MAIN, raw_header(json.dumps({"stranger": TINY_ENTRY}))), DamagedError),
    "a header of a huge tensor": (put(MAIN, raw_header(json.dumps({"x": HUGE_ENTRY}))), DamagedError),
    "a header with a tail": (
        lambda entries: put(MAIN, entries[MAIN][2] + b"tail")(entries),
        DamagedError,
    ),
    "a header with a false length": (
        lambda entries: put(MAIN, struct.pack("<Q", 1 << 50) + entries[MAIN][2][8:])(entries),
        DamagedError,
    ),
    "a header of the wrong type": (
        lambda entries: entries.update({MAIN: ("I8", (2,), b"{}")}),
        DamagedError,
    ),
    "columns missing": (drop(f"{MODULE}.columns"), DamagedError),
    "originals missing": (drop(f"{MODULE}.original"), DamagedError),
    "a surplus tensor": (put("something", b"abc"), DamagedError),
    "columns out of range": (
        lambda entries: entries.update({f"{MODULE}.columns": ("I64", (4,), struct.pack("<4q", 0, 1, 2, 1000))}),
        DamagedError,
    ),
    "columns of another type": (
        lambda entries: entries.update({f"{MODULE}.columns": ("I32", (4,), struct.pack("<4i", 0, 1, 2, 3))}),
        DamagedError,
    ),
    "other columns": (
        lambda entries: entries.update({f"{MODULE}.columns": ("I64", (4,), struct.pack("<4q", 0, 1, 2, 3))}),
        CheckError,
    ),
    "fewer originals": (
        lambda entries: entries.update({f"{MODULE}.original": ("F32", (31, 4), bytes(31 * 16))}),
        DamagedError,
    ),
    "zeroed originals": (
        lambda entries: entries.update({f"{MODULE}.original": ("F32", (32, 4), bytes(32 * 16))}),
        CheckError,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_undo_file_is_refused(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each lie is the documented error; nothing appears, inside the output folder or out of it."""
    edit, error = HOSTILE[case]
    merge(tiny_model("llama"), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    edit_undo(tmp_path / "merged", edit)
    with pytest.raises(error):
        undo(tmp_path / "merged", tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_edited_undo_file_that_says_the_same_still_works(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The editing of the hostile cases is itself harmless."""
    base = tiny_model("llama")
    merge(base, tmp_path)
    edit_undo(tmp_path / "merged", lambda entries: None)
    undo(tmp_path / "merged", tmp_path / "base")
    assert contents(tmp_path / "base") == contents(base)


def test_a_truncated_undo_file_is_damaged(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A short surgery.undo and a merged file that lacks a tensor are damaged folders, not crashes."""
    merge(tiny_model("llama"), tmp_path)
    path = tmp_path / "merged" / UNDO_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DamagedError):
        undo(tmp_path / "merged", tmp_path / "base")
    path.write_bytes(whole)
    tensors = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "merged" / "model.safetensors")
    with pytest.raises(DamagedError, match=r"model\.norm\.weight"):
        undo(tmp_path / "merged", tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_merged_tensor_of_another_kind_is_damage(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An untouched tensor whose bytes fit but whose dtype or shape is not the base's was changed by someone."""
    merge(tiny_model("llama"), tmp_path)
    path = tmp_path / "merged" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    for changed in (embedding.view(torch.int32), embedding.reshape(embedding.shape[::-1])):
        safetensors.torch.save_file({**tensors, "model.embed_tokens.weight": changed}, path)
        with pytest.raises(DamagedError, match="changed after the merge"):
            undo(tmp_path / "merged", tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_plan_without_digests_proves_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A record whose digests were blanked out does not make the check pass."""
    merge(tiny_model("llama"), tmp_path)
    path = tmp_path / "merged" / RECORD_FILE
    record = json.loads(path.read_text())
    record["plan"]["targets"][0]["sha256"] = ""
    path.write_text(json.dumps(record))
    with pytest.raises(CheckError):
        undo(tmp_path / "merged", tmp_path / "base")
