"""The LoRA adapter: PEFT computes with it what our adapter computes, and its merge is our merge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch import Tensor, nn

from exporters.dense import export as export_dense
from exporters.lora import (
    EXPORTER,
    VLLM_RANKS,
    export,
    find_notes,
    padded_rank,
    path_for_peft,
)
from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import ColumnDelta
from surgery.errors import BaseMismatchError, DamagedError, OutputExistsError, RequestError
from surgery.manifest import Base, read_record
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import load, load_base_model
from surgery.peft_files import saved_modules, task_type
from surgery.plan import Target
from surgery.survey import TaskSpec
from tests.conftest import TinyModel
from tests.tiny import sample_inputs
from tests.trained import make_adapter

# transformers' own, said by its property when PEFT touches it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LABELS = ("no", "yes")
CASES = (
    ("llama", ""),
    ("qwen3", ""),
    ("gpt2", ""),
    ("phi3", ""),
    ("opt", ""),
    ("t5", ""),
    ("vit", ""),
    ("mixtral", ""),
    ("bert", ""),
    ("bert", "sequence-classification"),
    ("bert", "regression"),
    ("roberta", "token-classification"),
    ("gpt2", "sequence-classification"),
    ("bart", "sequence-classification"),
)


def inputs_for(family: str, task: str) -> dict[str, Tensor]:
    """Inputs of one forward; BART's classifier reads the last `</s>` and makes the decoder's input itself."""
    inputs = sample_inputs(family)
    if family == "bart" and task:
        del inputs["decoder_input_ids"]
        inputs["input_ids"][:, -1] = 1
    return inputs


def spec_for_task(task: str) -> TaskSpec | None:
    """A task by name, with two labels where it classifies."""
    return TaskSpec(task, LABELS if task.endswith("-classification") else ()) if task else None


def peft_model(adapter: Adapter, folder: Path, base: Path) -> PeftModel:
    """The base under the plan's class with the exported adapter, as PEFT loads it."""
    return PeftModel.from_pretrained(load_base_model(base, adapter.plan), folder).eval()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """One forward without gradients."""
    output: Tensor = model(**inputs).logits
    return output


@pytest.mark.parametrize(("family", "task"), CASES)
def test_peft_computes_the_same(family: str, task: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT's forward agrees within 1e-5 (it adds in another order); after its merge, to the last bit."""
    base = tiny_model(family)
    adapter = make_adapter(base, tmp_path / "adapter", PacaSpec(rank=4), task=spec_for_task(task))
    export(adapter, tmp_path / "lora")
    inputs = inputs_for(family, task)
    ours = logits(load(tmp_path / "adapter"), inputs)
    peft = peft_model(adapter, tmp_path / "lora", base)
    theirs = logits(peft, inputs)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    with peft.disable_adapter():
        assert (logits(peft, inputs) - ours).abs().max() > 0.01, "the adapter moves nothing, so this proves nothing"
    assert torch.equal(logits(peft.merge_and_unload(), inputs), ours)


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_peft_merges_half_precision_bases_exactly(
    family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """With a 16-bit base, PEFT's merged weights are those of our merged checkpoint, bit for bit."""
    base = tiny_model(family, dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", PacaSpec(rank=4))
    export(adapter, tmp_path / "lora")
    merged = Checkpoint.open(export_dense(adapter, tmp_path / "merged"))
    peft = peft_model(adapter, tmp_path / "lora", base)
    ours, theirs = logits(load(tmp_path / "adapter"), sample_inputs(family)), logits(peft, sample_inputs(family))
    moved = (logits(load_base_model(base, adapter.plan), sample_inputs(family)) - ours).abs().max()
    assert (theirs - ours).abs().max() < 0.1 * moved  # PEFT rounds the base's part to 16 bits before it adds
    plain = peft.merge_and_unload()
    for target in adapter.plan.targets:
        assert torch.equal(plain.get_parameter(f"{target.module}.weight"), merged.read_tensor(target.weight))


def test_peft_merges_a_float32_base_to_the_last_bit_but_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A float32 difference is itself rounded: W + B A is within one unit in the last place of the larger of both."""
    base = tiny_model("llama")
    adapter = make_adapter(base, tmp_path / "adapter", PacaSpec(rank=8))
    export(adapter, tmp_path / "lora")
    plain = peft_model(adapter, tmp_path / "lora", base).merge_and_unload()
    for target in adapter.plan.targets:
        patch = adapter.delta.patches[target.module]
        theirs = plain.get_parameter(f"{target.module}.weight").detach()[:, patch.columns]
        size = torch.maximum(patch.values.abs(), patch.original.abs())
        assert ((theirs - patch.values).abs() <= 2**-23 * size).all()


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The weights and the configuration of a PEFT folder."""
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return weights, json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_selects_and_b_is_the_difference(
    family: str, dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """lora_A is one-hot at the trained columns, lora_B what a merge adds there, and the ranks past them are zero."""
    adapter = make_adapter(tiny_model(family, dtype=dtype), tmp_path / "adapter", PacaSpec(rank=5))
    weights, config = read_adapter(export(adapter, tmp_path / "lora"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (8, 8, 0.0, "none")
    assert config["fan_in_fan_out"] is (family == "gpt2")
    assert config["target_modules"] == [target.module for target in adapter.plan.targets]
    for target in adapter.plan.targets:
        patch = adapter.delta.patches[target.module]
        a, b = (weights.pop(f"base_model.model.{target.module}.lora_{part}.weight") for part in "AB")
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a.nonzero(), torch.stack([torch.arange(5), patch.columns], dim=1))
        assert torch.equal(a.sum(1), torch.tensor([1.0] * 5 + [0.0] * 3))
        assert torch.equal(b[:, :5], patch.stored().float() - patch.original.float())
        assert not b[:, 5:].any()
    assert not weights


def test_layers_of_different_ranks_share_the_padded_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Per-pattern ranks are all padded to the rank that holds the largest, and PEFT still computes the same."""
    base = tiny_model("llama")
    spec = PacaSpec(rank=3, rank_pattern={"mlp.*": 17, "model.layers.0.*": 9})
    adapter = make_adapter(base, tmp_path / "adapter", spec)
    weights, config = read_adapter(export(adapter, tmp_path / "lora"))
    assert (config["r"], config["lora_alpha"]) == (32, 32)
    assert {tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name} == {32}
    ours = logits(load(tmp_path / "adapter"), sample_inputs("llama"))
    theirs = logits(peft_model(adapter, tmp_path / "lora", base), sample_inputs("llama"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_ranks_are_padded_to_what_vllm_admits() -> None:
    """The smallest admitted rank that is large enough; above the largest there is nothing to pad to."""
    assert [padded_rank(rank) for rank in (1, 2, 8, 9, 33, 129, 257, 321, 512)] == [1, 8, 8, 16, 64, 256, 320, 512, 512]
    assert padded_rank(513) == 513
    assert all(padded_rank(rank) == rank for rank in VLLM_RANKS)


def test_what_vllm_refuses_is_said_in_the_record(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A head that trains whole and a rank above 512 are noted; a plain adapter has no notes."""
    plain = make_adapter(tiny_model("llama"), tmp_path / "plain").plan
    assert find_notes(plain, 8) == []
    assert "refuses rank 513" in find_notes(plain, 513)[0]
    task = TaskSpec("sequence-classification", LABELS)
    adapter = make_adapter(tiny_model("bert"), tmp_path / "adapter", task=task)
    export(adapter, tmp_path / "lora")
    record = read_record(tmp_path / "lora", "lora")
    notes = record.manifest.export["notes"]
    assert len(notes) == 2
    assert "modules_to_save (bert.pooler.dense, classifier)" in notes[0]
    assert "BertForSequenceClassification" in notes[1]
    assert '"yes": 1' in notes[1]
    assert record.plan == adapter.plan


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    (
        ("llama", "", "CAUSAL_LM"),
        ("t5", "", "SEQ_2_SEQ_LM"),
        ("bert", "sequence-classification", "SEQ_CLS"),
        ("bert", "regression", "SEQ_CLS"),
        ("bert", "token-classification", "TOKEN_CLS"),
        ("bert", "", None),  # a masked language model: PEFT's class for features would load a model without its head
        ("vit", "", None),
    ),
)
def test_the_task_is_named_as_peft_names_it(
    family: str, task: str, expected: str | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """`task_type` is PEFT's word for the plan's task, and absent where PEFT has none."""
    adapter = make_adapter(tiny_model(family), tmp_path / "adapter", task=spec_for_task(task))
    assert read_adapter(export(adapter, tmp_path / "lora"))[1]["task_type"] == expected
    headless = replace(adapter.plan, task="features", architecture="BertModel")
    assert task_type(headless) == "FEATURE_EXTRACTION"


def test_a_nested_head_is_saved_as_peft_saves_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT takes `classifier` whole by itself: naming its children too would wrap them twice."""
    task = spec_for_task("sequence-classification")
    roberta = make_adapter(tiny_model("roberta"), tmp_path / "roberta", task=task)
    assert saved_modules(roberta.plan) == ["classifier"]
    bart = make_adapter(tiny_model("bart"), tmp_path / "bart", task=task)
    assert saved_modules(bart.plan) == ["classification_head.dense", "classification_head.out_proj"]


@pytest.mark.parametrize(("setting", "value"), (("dtype", "bf16"), ("max_shard_bytes", 1000)))
def test_settings_without_effect_are_refused(
    setting: str, value: object, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """`--dtype` and `--max-shard-size` mean nothing here and say so; nothing is written."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    with pytest.raises(RequestError, match="with --format lora"):
        EXPORTER.export(adapter, tmp_path / "lora", **{setting: value})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The base is checked by digest; a base of the wrong shape is refused as well, and nothing is written."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    for wrong in (tiny_model("llama", seed=1), tiny_model("qwen2", overrides={"hidden_size": 16})):
        with pytest.raises(BaseMismatchError):
            export(adapter, tmp_path / "lora", base=wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_missing_base_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Without its base the adapter would have nothing to name: `--base` is asked for."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    gone = replace(adapter.record, manifest=replace(adapter.record.manifest, base=Base(path="../gone")))
    with pytest.raises(BaseMismatchError, match="--base"):
        export(replace(adapter, record=gone), tmp_path / "lora")


def test_a_hub_id_is_named_and_not_fetched(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base from the hub keeps its id and revision in PEFT's configuration; the export needs no network."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    hub = Base(hub_id="someone/llama", revision="abc123")
    record = replace(adapter.record, manifest=replace(adapter.record.manifest, base=hub))
    config = read_adapter(export(replace(adapter, record=record), tmp_path / "lora"))[1]
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/llama", "abc123")


def test_the_base_s_path_is_one_that_peft_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT resolves paths from the working directory: below it relative, elsewhere absolute."""
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert path_for_peft(Path("model")) == "model"
    assert path_for_peft(Path("../here/model")) == "model"
    (tmp_path / "elsewhere").mkdir()
    assert path_for_peft(tmp_path / "elsewhere") == str((tmp_path / "elsewhere").resolve())


def test_nothing_is_left_of_a_failed_export(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An existing output is refused; values that are not finite stop the export, and no part of it remains."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    export(adapter, tmp_path / "lora")
    with pytest.raises(OutputExistsError):
        export(adapter, tmp_path / "lora")
    assert export(adapter, tmp_path / "lora", overwrite=True) == tmp_path / "lora"

    class Broken(dict):  # type: ignore[type-arg]
        def __getitem__(self, module: str) -> object:
            raise DamagedError(module, "unreadable")

    patches = Broken(adapter.delta.patches)
    broken = replace(adapter, delta=ColumnDelta(adapter.plan, patches, {}))
    with pytest.raises(DamagedError):
        export(broken, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora"]


def test_memory_is_that_of_one_target(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each target is asked for once, in order, while the file is written."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    asked: list[str] = []

    class Watched(dict):  # type: ignore[type-arg]
        def __getitem__(self, module: str) -> object:
            asked.append(module)
            return super().__getitem__(module)

    watched = replace(adapter, delta=ColumnDelta(adapter.plan, Watched(adapter.delta.patches), {}))
    export(watched, tmp_path / "lora")
    assert asked == [target.module for target in adapter.plan.targets]


def test_the_record_says_where_it_came_from(tiny_model: TinyModel, tmp_path: Path) -> None:
    """`surgery.json` of a LoRA folder names the adapter, the base and the rank; both paths hold from the folder."""
    adapter = make_adapter(tiny_model("llama"), tmp_path / "adapter")
    out = export(open_adapter(tmp_path / "adapter"), tmp_path / "lora")
    record = read_record(out, "lora")
    assert record.manifest.export == {"format": "lora", "rank": 8, "notes": []}
    assert (out / record.manifest.adapter["path"]).resolve() == adapter.folder.resolve()
    assert (out / record.manifest.base.path).resolve() == tiny_model("llama").resolve()
    assert isinstance(record.plan.targets[0], Target)
