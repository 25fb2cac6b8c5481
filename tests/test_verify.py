"""Verify: every way in which a merged folder can be wrong is found, and what was not checked is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import safetensors.torch
import torch
from torch import Tensor

from exporters.dense import export
from surgery import checkpoint
from surgery.adapter import Adapter, open_adapter, update_adapter
from surgery.checkpoint import RECORD_FILE, WEIGHTS_FILE, Checkpoint
from surgery.delta import ADAPTER_FILE
from surgery.errors import BaseMismatchError, CheckError, DamagedError, NotAModelError, ResourceError, SurgeryError
from surgery.exported import load_merged
from surgery.manifest import UNDO_FILE
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import load
from surgery.survey import TaskSpec
from surgery.tensorfile import CHUNK_BYTES, TensorFile
from surgery.verify import verify
from tests.conftest import TinyModel, digest_folder
from tests.trained import make_adapter

TARGETS = PacaSpec(rank=4, targets=(r"re:.*(q_proj|k_proj|c_attn|SelfAttention\.q)",))
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def merged(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A merge in which only some layers were trained."""
    return merge(tiny_model("llama"), tmp_path)


def merge(
    base: Path, root: Path, spec: PacaSpec = TARGETS, *, dtype: str = "keep", task: TaskSpec | None = None
) -> Path:
    """`root/adapter` and `root/merged`."""
    adapter: Adapter = make_adapter(base, root / "adapter", spec, task=task)
    return export(adapter, root / "merged", dtype=dtype)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder's one weight file."""
    return safetensors.torch.load_file(folder / WEIGHTS_FILE)


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put a weight file in its place."""
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def flip_bit(folder: Path, name: str, index: tuple[int, ...]) -> None:
    """Turn over the lowest bit of one value, in the file."""
    info = Checkpoint.open(folder)[name]
    position = 0
    for size, at in zip(info.shape, index, strict=True):
        position = position * size + at
    width = info.size_bytes // torch.Size(info.shape).numel()
    data = bytearray((folder / info.file).read_bytes())
    data[info.begin + position * width] ^= 1
    (folder / info.file).write_bytes(data)


def columns_of(folder: Path, module: str) -> list[int]:
    """The columns that a merge replaced."""
    found: list[int] = TensorFile(folder / UNDO_FILE).read(f"{module}.columns").tolist()
    return found


def outside(folder: Path, module: str) -> int:
    """A column that is not planned."""
    return next(n for n in range(32) if n not in columns_of(folder, module))


# --- what holds


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", ("llama", "gpt2", "t5"))
def test_a_merge_is_verified(family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Every check passes, the logits' difference is 0, and the outcome is in the folder's record."""
    folder = merge(tiny_model(family, dtype=dtype), tmp_path)
    result = verify(folder)
    assert {check.name: check.result for check in result.checks} == dict.fromkeys(
        ("names", "untouched tensors", "planned columns", "trained columns", "logits"), "passed"
    )
    assert result.max_logit_difference == 0
    recorded = json.loads((folder / RECORD_FILE).read_text())["manifest"]["checks"]
    assert [(check["name"], check["result"]) for check in recorded] == [(c.name, c.result) for c in result.checks]
    assert all(line.startswith("passed ") for line in result.lines())


def test_verifying_changes_only_the_record(merged: Path) -> None:
    """And twice is once."""
    verify(merged)
    before = digest_folder(merged)
    others = {path.name: path.read_bytes() for path in merged.iterdir() if path.name != RECORD_FILE}
    verify(merged)
    assert digest_folder(merged) == before
    assert {path.name: path.read_bytes() for path in merged.iterdir() if path.name != RECORD_FILE} == others


@pytest.mark.parametrize("dtype", ("bf16", "fp16", "fp32"))
def test_a_cast_merge_is_verified(dtype: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Against the base cast in the same way; the difference of the logits is said, and is that of the cast."""
    folder = merge(tiny_model("llama"), tmp_path, dtype=dtype)
    result = verify(folder)
    assert {check.result for check in result.checks} == {"passed"}
    assert result.max_logit_difference is not None
    assert (result.max_logit_difference > 0) == (dtype != "fp32")
    assert "from the cast asked for" in result.checks[-1].detail
    flip_bit(folder, "model.norm.weight", (3,))
    with pytest.raises(CheckError, match=r"model\.norm\.weight: it differs"):
        verify(folder, numeric=False)


def test_an_unmoved_layer_is_no_fault_but_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A fresh adapter's merge is its base: nobody may take the line for a success of training."""
    from surgery.operate import apply

    export(apply(tiny_model("llama"), tmp_path / "adapter", TARGETS), tmp_path / "merged")
    detail = next(c.detail for c in verify(tmp_path / "merged").checks if c.name == "planned columns")
    assert detail.startswith("no column moved: 0 of 4 layers differ from the base; they were not trained, or")


def test_layers_that_did_not_move_are_counted(merged: Path) -> None:
    """Some moved and some did not: each number with its words."""
    adapter = open_adapter(merged.parent / "adapter")
    patches = dict(adapter.delta.patches)
    still = list(patches)[:3]
    for patch in still:
        patches[patch] = replace(patches[patch], values=patches[patch].original.clone())
    update_adapter(adapter, replace(adapter.delta, patches=patches), adapter.record.manifest)
    export(open_adapter(adapter.folder), merged.parent / "again")
    detail = next(c.detail for c in verify(merged.parent / "again").checks if c.name == "planned columns")
    first = next(target.module for target in adapter.plan.targets if target.module in still)
    assert detail.startswith("1 layer differs from the base in planned columns only; 3 layers did not move (first ")
    assert f"(first {first}): they were not trained" in detail


# --- tampering


def bit_in_untouched(folder: Path) -> None:
    """An embedding is never trained."""
    flip_bit(folder, "model.embed_tokens.weight", (5, 7))


def bit_in_a_norm(folder: Path) -> None:
    """The last value of a vector."""
    flip_bit(folder, "model.layers.1.input_layernorm.weight", (31,))


def bit_outside_columns(folder: Path) -> None:
    """In a touched tensor, beside what the plan names."""
    flip_bit(folder, f"{LAYER}.weight", (31, outside(folder, LAYER)))


def bit_inside_columns(folder: Path) -> None:
    """In what was trained."""
    flip_bit(folder, f"{LAYER}.weight", (0, columns_of(folder, LAYER)[-1]))


def a_column_not_written(folder: Path) -> None:
    """One column is still the base's."""
    tensors = tensors_of(folder)
    column = columns_of(folder, LAYER)[1]
    tensors[f"{LAYER}.weight"][:, column] = TensorFile(folder / UNDO_FILE).read(f"{LAYER}.original")[:, 1]
    write(folder, tensors)


def no_column_written(folder: Path) -> None:
    """The whole layer is still the base's."""
    tensors = tensors_of(folder)
    tensors[f"{LAYER}.weight"][:, columns_of(folder, LAYER)] = TensorFile(folder / UNDO_FILE).read(f"{LAYER}.original")
    write(folder, tensors)


def two_columns_swapped(folder: Path) -> None:
    """Each where the other belongs."""
    tensors = tensors_of(folder)
    first, second, *_ = columns_of(folder, LAYER)
    weight = tensors[f"{LAYER}.weight"]
    weight[:, [first, second]] = weight[:, [second, first]]
    write(folder, tensors)


def a_tensor_lost(folder: Path) -> None:
    """One of the base's is not there."""
    tensors = tensors_of(folder)
    del tensors["model.norm.weight"]
    write(folder, tensors)


def a_tensor_too_many(folder: Path) -> None:
    """One that nobody knows."""
    write(folder, {**tensors_of(folder), "extra.weight": torch.zeros(2)})


def another_shape(folder: Path) -> None:
    """The same bytes, read in another way."""
    tensors = tensors_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].reshape(4, 8)
    write(folder, tensors)


def another_dtype(folder: Path) -> None:
    """The same values, in twice the bytes."""
    tensors = tensors_of(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    write(folder, tensors)


def two_tensors_swapped(folder: Path) -> None:
    """Each under the other's name."""
    tensors = tensors_of(folder)
    a, b = (f"model.layers.{n}.mlp.up_proj.weight" for n in range(2))
    tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()
    write(folder, tensors)


BYTE_FAULTS: tuple[Callable[[Path], None], ...] = (
    bit_in_untouched, bit_in_a_norm, bit_outside_columns, bit_inside_columns, a_column_not_written, no_column_written,
    two_columns_swapped, a_tensor_lost, a_tensor_too_many, another_shape, another_dtype, two_tensors_swapped,
)  # fmt: skip


@pytest.mark.parametrize("tamper", BYTE_FAULTS, ids=lambda function: function.__name__)
def test_tampering_is_found_by_the_bytes_alone(tamper: Callable[[Path], None], merged: Path) -> None:
    """Without running a model: exit code 3, and the record still says what it said before."""
    verify(merged, numeric=False)
    tamper(merged)
    record = (merged / RECORD_FILE).read_bytes()
    with pytest.raises(CheckError) as caught:
        verify(merged, numeric=False)
    assert caught.value.exit_code == 3
    assert (merged / RECORD_FILE).read_bytes() == record


@pytest.mark.parametrize(
    ("family", "chunk_bytes"), (("gpt2", CHUNK_BYTES), ("t5", CHUNK_BYTES), ("llama", 600), ("gpt2", 600))
)
def test_one_bit_anywhere_is_found(
    family: str, chunk_bytes: int, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every tensor of a merged checkpoint, at one end or the other, in both weight layouts, in whatever pieces."""
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    folder = merge(tiny_model(family), tmp_path)
    for number, (name, info) in enumerate(sorted(Checkpoint.open(folder).items())):
        index = tuple(size - 1 if number % 2 else 0 for size in info.shape)
        flip_bit(folder, name, index)
        with pytest.raises(CheckError):
            verify(folder, numeric=False)
        flip_bit(folder, name, index)
    verify(folder, numeric=False)


def test_every_column_outside_the_plan_is_watched(merged: Path) -> None:
    """Also those between planned ones."""
    planned = columns_of(merged, LAYER)
    beside = [n for n in range(32) if n not in planned]
    assert any(planned[0] < n < planned[-1] for n in beside)
    for column in beside:
        flip_bit(merged, f"{LAYER}.weight", (31, column))
        with pytest.raises(CheckError, match="columns outside the plan"):
            verify(merged, numeric=False)
        flip_bit(merged, f"{LAYER}.weight", (31, column))


def test_a_zero_of_the_other_sign_is_found(merged: Path) -> None:
    """Trained values are compared as bits, not as numbers."""
    adapter = open_adapter(merged.parent / "adapter")
    patches = dict(adapter.delta.patches)
    patches[LAYER].values[0, 0] = 0.0
    update_adapter(adapter, replace(adapter.delta, patches=patches), adapter.record.manifest)
    folder = export(open_adapter(adapter.folder), merged.parent / "again")
    verify(folder, numeric=False)
    tensors, at = tensors_of(folder), (0, columns_of(folder, LAYER)[0])
    assert tensors[f"{LAYER}.weight"][at] == 0
    tensors[f"{LAYER}.weight"][at] = -0.0
    write(folder, tensors)
    with pytest.raises(CheckError, match="not what was trained"):
        verify(folder, numeric=False)


@pytest.mark.parametrize("factor", (2, 1e6))
def test_a_config_that_computes_something_else_is_found(factor: float, merged: Path) -> None:
    """The bytes are right, the model is not, be it by ever so little: running both shows it."""
    config = json.loads((merged / "config.json").read_text())
    config["rms_norm_eps"] *= factor
    (merged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckError, match="its logits differ from the trained model's by up to"):
        verify(merged)


def test_a_head_that_was_changed_is_found(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A new head is a tensor trained whole: one bit of it is one bit too many."""
    task = TaskSpec("sequence-classification", ("no", "yes"))
    folder = merge(tiny_model("bert"), tmp_path, PacaSpec(rank=4), task=task)
    verify(folder)
    flip_bit(folder, "classifier.weight", (1, 3))
    with pytest.raises(CheckError, match=r"classifier\.weight"):
        verify(folder, numeric=False)


def test_truncated_and_missing_files_are_found(merged: Path) -> None:
    """Each is the documented error, exit code 2 or 4."""
    data = (merged / WEIGHTS_FILE).read_bytes()
    (merged / WEIGHTS_FILE).write_bytes(data[:-1])
    with pytest.raises(DamagedError, match="truncated"):
        verify(merged)
    (merged / WEIGHTS_FILE).unlink()
    with pytest.raises(NotAModelError):
        verify(merged)
    (merged / WEIGHTS_FILE).write_bytes(data)
    (merged / UNDO_FILE).rename(merged / "elsewhere")
    with pytest.raises(DamagedError, match=f"no {UNDO_FILE}"):
        verify(merged)
    (merged / RECORD_FILE).unlink()
    with pytest.raises(NotAModelError, match=f"no {RECORD_FILE}"):
        verify(merged)


def test_something_that_is_no_merge_is_refused(merged: Path) -> None:
    """An adapter folder, or none."""
    with pytest.raises(NotAModelError, match="kind 'adapter'"):
        verify(merged.parent / "adapter")
    with pytest.raises(NotAModelError):
        verify(merged.parent / "nothing")


# --- adapters and bases


def test_without_the_adapter_the_byte_checks_remain(merged: Path) -> None:
    """What could not be checked is said, with the reason, and not called passed."""
    (merged.parent / "adapter").rename(merged.parent / "gone")
    result = verify(merged)
    results = {check.name: check for check in result.checks}
    for name in ("trained columns", "logits"):
        assert results[name].result == "not run"
        assert "'../adapter' is not there" in results[name].detail
    assert results["planned columns"].result == results["untouched tensors"].result == "passed"
    assert result.max_logit_difference is None
    assert any(line.startswith("not run ") for line in result.lines())
    bit_outside_columns(merged)
    with pytest.raises(CheckError):
        verify(merged)


def test_an_adapter_that_was_trained_on_since_is_not_compared(merged: Path, tiny_model: TinyModel) -> None:
    """Found by itself it is said to have changed; named by the person it is a failed check."""
    adapter = merged.parent / "adapter"
    shutil.rmtree(adapter)
    make_adapter(tiny_model("llama"), adapter, TARGETS, seed=1)
    result = verify(merged)
    assert {c.name: c.detail for c in result.checks}["logits"] == "its adapter has changed since"
    with pytest.raises(CheckError, match="not the adapter that was exported"):
        verify(merged, adapter=adapter)


def test_a_named_adapter_must_be_one(merged: Path, tmp_path: Path) -> None:
    """No quiet `not run` for a request that could not be met."""
    with pytest.raises((SurgeryError, OSError)):
        verify(merged, adapter=tmp_path / "nothing")
    moved = (merged.parent / "adapter").rename(merged.parent / "moved")
    assert {c.result for c in verify(merged, adapter=moved).checks} == {"passed"}
    (moved / ADAPTER_FILE).write_bytes((moved / ADAPTER_FILE).read_bytes()[:-4])
    with pytest.raises(SurgeryError):
        verify(merged, adapter=moved)


def test_another_base_is_found(merged: Path, tiny_model: TinyModel) -> None:
    """The merge is compared with the base that is named."""
    with pytest.raises(CheckError):
        verify(merged, base=tiny_model("llama", seed=1), numeric=False)


def test_a_base_that_is_gone_is_said(merged: Path) -> None:
    """Exit code 4, with the flag that mends it."""
    document = json.loads((merged / RECORD_FILE).read_text())
    document["manifest"]["base"]["path"] = "../gone"
    (merged / RECORD_FILE).write_text(json.dumps(document))
    with pytest.raises(BaseMismatchError, match="--base"):
        verify(merged)


def test_too_little_memory_is_said_with_numbers(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are not run; the byte checks are."""
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    result = verify(merged)
    check = result.checks[-1]
    assert (check.name, check.result) == ("logits", "not run")
    assert "1,000 are free" in check.detail
    assert f"needs {int(Checkpoint.open(merged).size_bytes * 1.6):,} bytes" in check.detail
    assert {c.result for c in result.checks[:-1]} == {"passed"}


def test_prompts_can_be_given(merged: Path) -> None:
    """As many as there are."""
    assert "on 2 prompts" in verify(merged, prompts=("one", "and two")).checks[-1].detail
    assert "on 4 prompts" in verify(merged).checks[-1].detail


def test_without_a_tokenizer_random_tokens_do(merged: Path) -> None:
    """A checkpoint need not have one."""
    for path in merged.glob("tokenizer*"):
        path.unlink()
    assert verify(merged).max_logit_difference == 0


def test_a_merge_that_lacks_a_weight_does_not_load(merged: Path) -> None:
    """`from_pretrained` would draw it at random and go on."""
    a_tensor_lost(merged)
    with pytest.raises(CheckError, match=r"transformers misses 'model\.norm\.weight'"):
        load_merged(merged)


def test_a_model_that_does_not_fit_into_memory_is_refused_before_it_is_loaded(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading says what it needs and what is free, exit code 4."""
    adapter = merged.parent / "adapter"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ResourceError, match="1,000 bytes of memory are free"):
        load(adapter)
