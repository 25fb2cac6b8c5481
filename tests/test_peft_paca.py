"""Interchange with PEFT's PaCA: what PEFT saved is read as PEFT computes it, and what is written PEFT loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from exporters.dense import export as export_dense
from exporters.peft_paca import Rounding, export, padded
from surgery.adapter import Adapter, open_adapter, update_adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import ColumnDelta, ColumnPatch, require_columns
from surgery.errors import (
    BaseMismatchError,
    DamagedError,
    NotAModelError,
    OutputExistsError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.manifest import read_record
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, load, load_base_model
from surgery.paca_layers import layers
from surgery.peft_paca import Imported, import_peft
from surgery.plan import Target
from surgery.survey import TaskSpec
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.console import Console
from tests.peft_standin import save_with_peft
from tests.tiny import sample_inputs
from tests.trained import make_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LAYER = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{LAYER}"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SETTINGS: dict[str, Any] = {"r": 4, "paca_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def plain(base: Path) -> Any:
    """The base as PEFT's users load it."""
    return AutoModelForCausalLM.from_pretrained(base)


def logits(model: Any, family: str = "llama") -> Tensor:
    """One forward without gradients."""
    with torch.no_grad():
        output: Tensor = model(**sample_inputs(family)).logits
    return output


def peft_folder(base: Path, out: Path, **settings: Any) -> Any:
    """A trained adapter that PEFT saved, at `out`; returns PEFT's model."""
    return save_with_peft(plain(base), out, **{**SETTINGS, **settings})


@pytest.fixture
def theirs(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """PEFT's adapter of a tiny Llama, to be spoilt."""
    peft_folder(tiny_model("llama"), tmp_path / "theirs")
    return tmp_path / "theirs"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a PEFT folder in place."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **changes: Any) -> None:
    """Change the configuration of a PEFT folder in place."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


# --- read


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_peft_trained_is_read_merged_and_verified(
    dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Every weight of the merge is the one that PEFT computes with, to the last bit, and verify agrees."""
    base = tiny_model("llama", dtype=dtype)
    theirs = peft_folder(base, tmp_path / "theirs")
    imported = import_peft(tmp_path / "theirs", tmp_path / "ours", base=base)
    assert imported.adapter.plan.spec["alpha"] == 8.0
    merged = Checkpoint.open(export_dense(open_adapter(tmp_path / "ours"), tmp_path / "merged"))
    moved = 0
    for target in imported.adapter.plan.targets:
        expected = theirs.get_submodule(f"base_model.model.{target.module}").weight().detach()
        assert torch.equal(merged.read_tensor(target.weight), expected)
        moved += int((merged.read_tensor(target.weight) != Checkpoint.open(base).read_tensor(target.weight)).sum())
    assert moved > 1000
    assert {check.result for check in verify(tmp_path / "merged").checks} == {"passed"}


def test_layers_of_one_input_keep_their_own_columns(tiny_model: TinyModel, tmp_path: Path) -> None:
    """q, k and v draw different columns under PEFT: each layer trains its own here, and none shares a gather."""
    base = tiny_model("llama")
    theirs = peft_folder(base, tmp_path / "theirs")
    imported = import_peft(tmp_path / "theirs", tmp_path / "ours", base=base).adapter
    assert {target.group for target in imported.plan.targets} == {target.module for target in imported.plan.targets}
    model = load(tmp_path / "ours", trainable=True).train()
    opened = layers(model)
    for name, layer in opened.items():
        assert torch.equal(layer.paca_columns, theirs.get_submodule(f"base_model.model.{name}").paca_indices["default"])
        assert layer.paca_gather.members == 1
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    inputs = sample_inputs("llama")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    theirs.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, layer in opened.items():
        expected = theirs.get_submodule(f"base_model.model.{name}").paca_delta["default"].grad
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_group_whose_members_have_other_columns_is_never_gathered_as_one(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A file may say one group and hold columns of each layer's own: the columns decide, and gradients hold."""
    base = tiny_model("llama")
    ours = apply(base, tmp_path / "ours", PacaSpec(rank=4, targets=("q_proj", "k_proj", "v_proj")))
    delta = require_columns(ours.delta, "")
    patches: dict[str, ColumnPatch] = dict(delta.patches)
    module, weights = LAYER.replace("q_proj", "k_proj"), Checkpoint.open(base)
    other = torch.tensor([c for c in range(32) if c not in patches[module].columns][:4])
    original = weights.read_tensor(f"{module}.weight")[:, other].contiguous()
    patches[module] = replace(patches[module], columns=other, values=original.clone(), original=original)
    update_adapter(ours, ColumnDelta(delta.plan, patches, {}), ours.record.manifest)
    model = load(tmp_path / "ours", trainable=True).train()
    opened = layers(model)
    assert torch.equal(opened[module].paca_columns, other)
    assert [opened[f"model.layers.0.self_attn.{n}_proj"].paca_gather.members for n in "qkv"] == [2, 1, 2]
    inputs, dense = sample_inputs("llama"), plain(base).train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    dense(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, layer in opened.items():
        expected = dense.get_submodule(name).weight.grad[:, patches[name].columns]
        torch.testing.assert_close(layer.paca_delta.grad, expected, rtol=1e-4, atol=1e-7)


def test_a_classifier_s_head_comes_along(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What PEFT trained whole is the head of ours; labels are numbered, which is said, or named by hand."""
    base = tiny_model("llama")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    settings = {**SETTINGS, "task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"]}
    theirs = save_with_peft(model, tmp_path / "theirs", **settings)
    imported = import_peft(tmp_path / "theirs", tmp_path / "ours", base=base)
    assert any("labels are numbered" in note for note in imported.notes)
    ours = load(tmp_path / "ours")
    assert torch.equal(ours.score.weight, theirs.base_model.model.score.modules_to_save["default"].weight)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    task = TaskSpec(labels=("a", "b", "c"))
    named = import_peft(tmp_path / "theirs", tmp_path / "named", base=base, task=task)
    assert named.adapter.plan.config["id2label"] == {"0": "a", "1": "b", "2": "c"}


def test_the_base_that_its_config_names_is_the_default(tiny_model: TinyModel, tmp_path: Path, console: Console) -> None:
    """`surgery import` finds the base by the configuration, says what it believes, and what comes next works."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    peft_folder(base, tmp_path / "theirs")
    done = console("import", tmp_path / "theirs", "-o", tmp_path / "ours")
    assert done.code == 0, done.err
    assert "PEFT's files hold no digest of the base" in done.out
    assert f"Next: surgery export {tmp_path / 'ours'} --merge" in done.out
    assert console("export", tmp_path / "ours", "--merge").code == 0
    assert console("inspect", tmp_path / "ours").code == 0
    assert console("plan", tmp_path / "ours", "--sequence", 16, "--batch", 1).code == 0
    configure(tmp_path / "theirs", base_model_name_or_path=None)
    code, _, error = console("import", tmp_path / "theirs", "-o", tmp_path / "none")
    assert (code, "Name it with --base" in error) == (2, True)


def test_a_base_on_the_hub_is_asked_for_at_its_revision(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration's revision is that of the base which was trained, not the newest."""
    asked: list[tuple[object, object]] = []

    def find(model: object, *, revision: object = None) -> object:
        asked.append((model, revision))
        raise NotAModelError(str(model), "not here")

    monkeypatch.setattr("surgery.peft_paca.find_model", find)
    configure(theirs, base_model_name_or_path="someone/llama", revision="abc123")
    for base in (None, "someone/other"):
        with pytest.raises(NotAModelError):
            import_peft(theirs, theirs.parent / "ours", base=base)
    assert asked == [("someone/llama", "abc123"), ("someone/other", None)]


# --- written


@pytest.mark.parametrize("alpha", (None, 8.0, 5.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_peft_loads_and_merges_what_is_written(
    dtype: torch.dtype, alpha: float | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """PEFT's own loader takes every key, and its weights are ours: exact but for what the record counts."""
    base = tiny_model("llama", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "ours", PacaSpec(rank=4, alpha=alpha))
    export(adapter, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["paca_alpha"]) == ("PACA", 4, alpha or 4)
    model = load_base_model(base, adapter.plan)
    theirs = PeftModel.from_pretrained(model, tmp_path / "theirs").eval()
    merged = Checkpoint.open(export_dense(adapter, tmp_path / "merged"))
    wrong = 0
    for target in adapter.plan.targets:
        found = theirs.get_submodule(f"base_model.model.{target.module}").weight().detach()
        expected = merged.read_tensor(target.weight)
        wrong += int((found != expected).sum())
        torch.testing.assert_close(found, expected, rtol=0, atol=2**-7 if dtype == torch.bfloat16 else 1e-6)
    note = read_record(tmp_path / "theirs", "peft-paca").manifest.export["notes"][-1]
    counted = int(note.split("dtype ")[1].split()[0].replace(",", "")) if "dtype" in note and "none" not in note else 0
    assert counted == wrong, note
    if dtype == torch.bfloat16 and alpha in (None, 8.0):
        assert wrong == 0


def test_a_round_trip_gives_the_same_values(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Ours, PEFT's, ours: columns equal, and values but for the rounding that the first step reported."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "ours", PacaSpec(rank=4))
    export(adapter, tmp_path / "theirs")
    again = import_peft(tmp_path / "theirs", tmp_path / "again", base=base)
    ours, back = require_columns(adapter.delta, ""), require_columns(again.adapter.delta, "")
    largest, differing = 0.0, 0
    for module, patch in ours.patches.items():
        assert torch.equal(back.patches[module].columns, patch.columns)
        assert torch.equal(back.patches[module].stored(), patch.stored())
        differing += int((back.patches[module].values != patch.values).sum())
        largest = max(largest, float((back.patches[module].values - patch.values).abs().max()))
    note = read_record(tmp_path / "theirs", "peft-paca").manifest.export["notes"][-1]
    assert note.startswith(f"{differing:,} of ") if differing else note.startswith("exact")
    assert not differing or f"off by up to {largest:.3g}" in note
    assert not any("no digest of the base" in said for said in again.notes)  # the record there has them


def test_layers_of_smaller_rank_get_columns_that_change_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT has one rank: the missing columns have delta zero, which is said, and the merge is the same."""
    base = tiny_model("llama", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "ours", PacaSpec(rank=6, rank_pattern={"mlp.*": 3}))
    export(adapter, tmp_path / "theirs")
    assert "14 layers" not in (note := read_record(tmp_path / "theirs", "peft-paca").manifest.export["notes"][0])
    assert "6 layers get further columns of delta 0" in note
    again = import_peft(tmp_path / "theirs", tmp_path / "again", base=base).adapter
    ours = Checkpoint.open(export_dense(adapter, tmp_path / "merged"))
    theirs = Checkpoint.open(export_dense(again, tmp_path / "merged-again"))
    assert all(torch.equal(ours.read_tensor(name), theirs.read_tensor(name)) for name in ours)


def test_padding_keeps_columns_sorted_and_their_deltas_with_them() -> None:
    """The first free columns come in between; each delta stays with its column."""
    adapter = SimplePatch([1, 3, 9])
    delta, indices = padded(adapter, torch.tensor([[1.0, 3.0, 9.0]]), 6)  # type: ignore[arg-type]
    assert indices.tolist() == [0, 1, 2, 3, 4, 9]
    assert delta.tolist() == [[0.0, 1.0, 0.0, 3.0, 0.0, 9.0]]


class SimplePatch:
    """As much of a patch as padding looks at."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = torch.tensor(columns)
        self.target = type("T", (), {"in_features": 10, "rank": len(columns)})


def test_rounding_is_counted_where_the_column_is_far_from_its_base() -> None:
    """A value much smaller than the base's loses its last bits as a difference: how many, and by how much."""
    target = Target("a", "a.weight", 1, 2, 1, "F32", 2, "a")
    original, values = torch.tensor([[1.0, 1.0]]), torch.tensor([[1e-9, 1.5]])
    rounding = Rounding()
    rounding.add(ColumnPatch(target, torch.tensor([0, 1]), values, original), values - original, 1.0)
    assert (rounding.values, rounding.differing, rounding.rounded) == (2, 1, 1)
    assert rounding.largest == pytest.approx(1e-9, rel=0.2)


def test_layers_that_peft_does_not_train_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """GPT-2's Conv1D, and a rank that not every layer has; and settings that mean nothing."""
    gpt2 = make_adapter(tiny_model("gpt2"), tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match=r"expected nn\.Linear"):
        export(gpt2, tmp_path / "out")
    experts = make_adapter(tiny_model("mixtral"), tmp_path / "experts", PacaSpec(rank=4, targets=("experts",)))
    with pytest.raises(UnsupportedError, match="expected targets that are layers"):
        export(experts, tmp_path / "out")
    wide = make_adapter(tiny_model("llama"), tmp_path / "wide", PacaSpec(rank=40, targets=("down_proj", "q_proj"),
                                                                       rank_pattern={"q_proj": 4}))  # fmt: skip
    with pytest.raises(UnsupportedError, match="has 32 columns, expected 40"):
        export(wide, tmp_path / "out")
    with pytest.raises(RequestError, match="--format peft-paca"):
        export(wide, tmp_path / "out", dtype="bf16")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_it(tiny_model: TinyModel, tmp_path: Path, console: Console) -> None:
    """`--format peft-paca` without --merge; inspect knows the folder; with --merge it is refused."""
    make_adapter(tiny_model("llama"), tmp_path / "ours")
    done = console("export", tmp_path / "ours", "--format", "peft-paca")
    assert done.code == 0, done.err
    assert "note:" in done.out
    assert "an adapter of PEFT's PaCA" in console("inspect", tmp_path / "ours-peft-paca").out
    assert console("export", tmp_path / "ours", "--merge", "--format", "peft-paca", "-o", tmp_path / "x").code == 2


# --- hostile


def _drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def _put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, value)


def _drop_layer(tensors: dict[str, Tensor]) -> None:
    for part in ("paca_delta", "paca_indices"):
        del tensors[f"{KEY}.{part}"]


HOSTILE: dict[str, tuple[Callable[[dict[str, Tensor]], object], type[SurgeryError], str]] = {
    "no indices": (_drop(f"{KEY}.paca_indices"), DamagedError, "only one of"),
    "no delta": (_drop(f"{KEY}.paca_delta"), DamagedError, "only one of"),
    "a layer missing": (_drop_layer, DamagedError, "1 layer of target_modules missing, first"),
    "twice": (_put(f"{KEY}.paca_indices", torch.tensor([5, 1, 5, 2])), DamagedError, "column 5 stands twice"),
    "past the end": (_put(f"{KEY}.paca_indices", torch.tensor([1, 2, 3, 32])), DamagedError, "columns from 1 to 32"),
    "negative": (_put(f"{KEY}.paca_indices", torch.tensor([-1, 2, 3, 4])), DamagedError, "columns from -1"),
    "floats": (_put(f"{KEY}.paca_indices", torch.tensor([1.0, 2, 3, 4])), DamagedError, r"I64 \[4\]"),
    "other rank": (_put(f"{KEY}.paca_indices", torch.tensor([1, 2, 3])), DamagedError, r"I64 \[4\]"),
    "a vector": (_put(f"{KEY}.paca_delta", torch.ones(4)), DamagedError, r"floats \[out, 4\]"),
    "integers": (_put(f"{KEY}.paca_delta", torch.ones(32, 4, dtype=torch.int64)), DamagedError, "floats"),
    "rows": (_put(f"{KEY}.paca_delta", torch.ones(31, 4)), BaseMismatchError, "4 columns of 31 values"),
    "nan": (_put(f"{KEY}.paca_delta", torch.full((32, 4), torch.nan)), DamagedError, "not finite"),
    "no prefix": (_put("x.paca_delta", torch.ones(32, 4)), DamagedError, "without PEFT's prefix"),
    "a bias": (_put(f"{KEY}.bias", torch.ones(32)), UnsupportedError, "trained whole beside the columns"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_tensors_are_refused(fault: str, theirs: Path, tiny_model: TinyModel) -> None:
    """Each fault by its own message; nothing is written."""
    change, kind, said = HOSTILE[fault]
    rewrite(theirs, change)
    with pytest.raises(kind, match=said):
        import_peft(theirs, theirs.parent / "ours", base=tiny_model("llama"))
    assert not (theirs.parent / "ours").exists()


def test_columns_out_of_order_are_sorted_with_their_deltas(theirs: Path, tiny_model: TinyModel) -> None:
    """Another writer's order means nothing: the same adapter comes out."""
    base = tiny_model("llama")
    first = import_peft(theirs, theirs.parent / "first", base=base).adapter

    def shuffle(tensors: dict[str, Tensor]) -> None:
        order = torch.tensor([2, 0, 3, 1])
        for module in {name.rpartition(".")[0] for name in tensors}:
            tensors[f"{module}.paca_indices"] = tensors[f"{module}.paca_indices"][order]
            tensors[f"{module}.paca_delta"] = tensors[f"{module}.paca_delta"][:, order].contiguous()

    rewrite(theirs, shuffle)
    second = import_peft(theirs, theirs.parent / "second", base=base).adapter
    assert second.delta.to_bytes() == first.delta.to_bytes()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    (
        ({"peft_type": "LORA"}, UnsupportedError, "type 'LORA', expected PACA"),
        ({"r": 0}, DamagedError, "r is 0"),
        ({"r": "4"}, DamagedError, "r is '4'"),
        ({"paca_alpha": -1}, DamagedError, "paca_alpha is -1"),
        ({"paca_alpha": float("inf")}, DamagedError, "paca_alpha is inf"),
        ({"use_dora": True}, UnsupportedError, "the field 'use_dora' is True"),
        ({"task_type": "QUESTION_ANS"}, UnsupportedError, "task_type 'QUESTION_ANS'"),
    ),
)
def test_a_configuration_that_means_something_else_is_refused(
    change: dict[str, Any], kind: type[SurgeryError], said: str, theirs: Path, tiny_model: TinyModel
) -> None:
    """A field that would be ignored is an error, too; one that is off is none."""
    configure(theirs, use_rslora=False, **change)
    with pytest.raises(kind, match=said):
        import_peft(theirs, theirs.parent / "ours", base=tiny_model("llama"))


def test_another_base_is_refused(theirs: Path, tiny_model: TinyModel) -> None:
    """By its layers and sizes; by its digests where the folder is an export of ours. No base at all is said."""
    for wrong in (tiny_model("bert"), tiny_model("llama", overrides={"hidden_size": 16})):
        with pytest.raises(BaseMismatchError):
            import_peft(theirs, theirs.parent / "ours", base=wrong)
    export(make_adapter(tiny_model("llama"), theirs.parent / "mine"), theirs.parent / "export")
    with pytest.raises(BaseMismatchError, match="has sha256"):
        import_peft(theirs.parent / "export", theirs.parent / "ours", base=tiny_model("llama", seed=1))
    assert not (theirs.parent / "ours").exists()


def test_pickle_and_folders_of_other_things_are_refused(theirs: Path, tiny_model: TinyModel) -> None:
    """Pickle is never opened; a model's folder is no adapter; an output that exists is left alone."""
    base = tiny_model("llama")
    with pytest.raises(NotAModelError, match=f"no {CONFIG}"):
        import_peft(base, theirs.parent / "ours", base=base)
    (theirs.parent / "there").mkdir()
    with pytest.raises(OutputExistsError):
        import_peft(theirs, theirs.parent / "there", base=base)
    (theirs / WEIGHTS).rename(theirs / "adapter_model.bin")
    with pytest.raises(NotAModelError, match="can run code when loaded, expected safetensors"):
        import_peft(theirs, theirs.parent / "ours", base=base)


def test_imported_columns_are_never_drawn_anew(theirs: Path, tiny_model: TinyModel, console: Console) -> None:
    """Training for another head would plan afresh, and lose them: refused; so is asking `apply` for stored ones."""
    base = tiny_model("llama")
    import_peft(theirs, theirs.parent / "ours", base=base)
    before = (theirs.parent / "ours" / "adapter.safetensors").read_bytes()
    rows = theirs.parent / "rows.jsonl"
    rows.write_text('{"text": "a b", "label": "x"}\n{"text": "c d", "label": "y"}\n')
    code, _, error = console("train", theirs.parent / "ours", "--data", rows, "--task", "sequence-classification")
    assert (code, "'stored'" in error) == (2, True), error
    assert (theirs.parent / "ours" / "adapter.safetensors").read_bytes() == before
    assert console("apply", base, "--select", "stored", "-o", theirs.parent / "drawn").code == 2


def test_an_imported_adapter_trains_on(theirs: Path, tiny_model: TinyModel, console: Console) -> None:
    """Two steps on text move the imported columns and no other, and the merge is verified."""
    base = shutil.copytree(tiny_model("llama"), theirs.parent / "base")
    before: Imported = import_peft(theirs, theirs.parent / "ours", base=base)
    text = theirs.parent / "text.txt"
    text.write_text("once upon a time there was a little girl who had a dog\n" * 20)
    done = console("train", theirs.parent / "ours", "--data", text, "max_steps=2", "batch_size=2", "max_length=16")
    assert done.code == 0, done.err
    after: Adapter = open_adapter(theirs.parent / "ours")
    old, new = require_columns(before.adapter.delta, ""), require_columns(after.delta, "")
    assert after.plan == before.adapter.plan
    assert all(torch.equal(old.patches[m].columns, p.columns) for m, p in new.patches.items())
    assert not torch.equal(old.patches[LAYER].values, new.patches[LAYER].values)
    assert console("export", theirs.parent / "ours", "--merge").code == 0
