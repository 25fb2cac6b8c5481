"""READ on disk: plans and adapters as values that are the same each time, and what is refused with nothing written."""

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
import transformers
from torch import Tensor, nn

import surgery
from surgery import PacaSpec, ReadSpec, TaskSpec, stacks
from surgery.adapter import Adapter, open_adapter, update_adapter
from surgery.checkpoint import Checkpoint
from surgery.delta import ADAPTER_FILE, SideDelta, adapter_names
from surgery.errors import (
    BaseMismatchError,
    DamagedError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.exported import own_class
from surgery.manifest import REMOTE_CODE, read_record
from surgery.methods.read import choose_layers, draw_state, modeling_source, side_of
from surgery.operate import state_of
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from surgery.side.settings import NAME
from surgery.tensorfile import file_sha256
from tests.conftest import TinyModel
from tests.console import Console
from tests.reading import SPEC, WIDTH, depth_of, keeping, logits_of, move, side_gradients
from tests.tiny import FAMILIES, build_model, sample_inputs

FULL = ReadSpec(cell="lstm", hidden=WIDTH, recurrent_layers=2, bidirectional=True, initial="embedding", reduce="mean",
                output_norm=True, scale=0.5, layers="last:1", joiner="mean", seed=3)  # fmt: skip
SPECS = {"llama": SPEC, "bert": replace(FULL, joiner="auto"), "t5": FULL, "bart": SPEC}


def built(folder: Path, family: str, *, dtype: torch.dtype | None = None) -> Any:
    """A family's model from a folder, in eval mode."""
    return getattr(transformers, FAMILIES[family].model).from_pretrained(folder, dtype=dtype or "auto")


def side_state(model: nn.Module) -> dict[str, Tensor]:
    """A side network's tensors, by name in the model."""
    return {f"{NAME}.{name}": values.clone() for name, values in side_of(model).state_dict().items()}


def require_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names and bits."""
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(values, theirs[name]) for name, values in mine.items())


# --- there and back again


@pytest.mark.parametrize("family", SPECS)
def test_an_adapter_from_files_is_the_one_attached_in_memory(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """apply and load give the tensors of attach with the same spec: they are functions of the seed and their names."""
    folder, inputs = tiny_model(family), sample_inputs(family)
    adapter = surgery.apply(folder, tmp_path / "adapter", SPECS[family])
    loaded = surgery.load(tmp_path / "adapter", trainable=True)
    model = built(folder, family)
    plan = surgery.attach(model, SPECS[family])
    require_same(side_state(loaded), side_state(model))
    require_same(dict(adapter.delta.state), side_state(model))  # type: ignore[union-attr]
    assert plan == replace(adapter.plan, backbone_sha256="")
    assert torch.equal(logits_of(loaded.eval(), inputs), logits_of(built(folder, family), inputs))
    assert not any(p.requires_grad for p in surgery.load(tmp_path / "adapter").parameters())


@pytest.mark.parametrize("family", SPECS)
def test_a_saved_model_is_the_loaded_one(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """After a step: save and load keep each tensor and each logit bit for bit; saving again gives the same bytes."""
    folder, inputs = tiny_model(family), sample_inputs(family)
    model = built(folder, family).train()
    surgery.attach(model, SPECS[family])
    move(model)
    model(**inputs).logits.square().mean().backward()
    assert len(side_gradients(model)) == len(state_of(model).plan.side)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    adapter = surgery.save(model, tmp_path / "adapter", base=folder)
    loaded = surgery.load(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, inputs), logits_of(model.eval(), inputs))
    require_same(side_state(loaded), side_state(model))
    again = surgery.save(loaded, tmp_path / "again", base=folder)
    assert again.plan == adapter.plan
    assert (tmp_path / "again" / ADAPTER_FILE).read_bytes() == (tmp_path / "adapter" / ADAPTER_FILE).read_bytes()


def test_a_classifier_goes_to_disk_and_back(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A head that is new is trained whole and stored beside the side network; the plan names both."""
    folder, inputs = tiny_model("bert"), sample_inputs("bert")
    task = TaskSpec("sequence-classification", ("a", "b", "c"))
    surgery.apply(folder, tmp_path / "adapter", replace(SPEC, pooling="mean"), task=task)
    model = surgery.load(tmp_path / "adapter", trainable=True)
    plan = state_of(model).plan
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {t.parameter for t in plan.side} | {t.parameter for t in plan.whole}
    assert {"classifier.weight", "classifier.bias"} <= trainable
    assert plan.frozen == ("bert",)
    before = model.classifier.weight.detach().clone()
    move(model)
    with torch.no_grad():
        model.classifier.weight.mul_(2.0)
    surgery.save(model, tmp_path / "moved", base=folder)
    assert torch.equal(logits_of(surgery.load(tmp_path / "moved"), inputs), logits_of(model.eval(), inputs))
    surgery.detach(model, merge=False)
    assert not hasattr(model, NAME)
    assert before.shape == (3, 32)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_a_side_network_is_never_16_bit(dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path) -> None:
    """fp32 beside a base of 16 bits, fp64 beside one of 64: in the file and in the model."""
    folder, wanted = tiny_model("llama", dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    surgery.apply(folder, tmp_path / "adapter", SPEC)
    stored = safetensors.torch.load_file(tmp_path / "adapter" / ADAPTER_FILE)
    loaded = surgery.load(tmp_path / "adapter")
    live = built(folder, "llama")
    surgery.attach(live, SPEC)
    for state in (stored, side_state(loaded), side_state(live)):
        assert {values.dtype for values in state.values()} == {wanted}
    assert next(loaded.model.parameters()).dtype == dtype
    assert loaded(**sample_inputs("llama")).logits.dtype == dtype


def test_collect_gives_values_of_its_own(tiny_model: TinyModel) -> None:
    """What collect returned does not move when the model does."""
    model = built(tiny_model("llama"), "llama")
    surgery.attach(model, SPEC)
    delta = surgery.collect(model)
    assert isinstance(delta, SideDelta)
    assert (delta.moved, delta.movable) == (0, 1)
    before = {name: values.clone() for name, values in delta.state.items()}
    move(model)
    require_same(dict(delta.state), before)
    assert surgery.collect(model).moved == 1


# --- what a side network starts from


def test_the_start_is_a_function_of_seed_and_name(tiny_model: TinyModel) -> None:
    """Tensors of one name and size are the same at any depth and among any others; another seed draws others."""
    plans = {}
    for depth in (2, 6):
        folder = tiny_model("t5", overrides=depth_of("t5", depth))
        plans[depth] = plan_checkpoint(Checkpoint.open(folder), replace(SPEC, recurrent_layers=2))
    deep, shallow, thin = (draw_state(plan) for plan in (plans[6], plans[2], replace(plans[2], side=plans[2].side[5:])))
    require_same(deep, shallow)
    require_same(thin, {name: shallow[name] for name in thin})
    other = draw_state(replace(plans[2], spec={**plans[2].spec, "seed": 1}))
    drawn = [name for name in shallow if not torch.equal(shallow[name], other[name])]
    assert {name.rpartition(".")[2] for name in drawn} == {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "query",
                                                           "key", "mix"}  # fmt: skip
    assert len({values.flatten()[0].item() for name, values in shallow.items() if name in drawn}) == len(drawn)


def test_the_start_is_torch_s(tiny_model: TinyModel) -> None:
    """Uniform within 1 / sqrt(hidden), norms of one, a projection back of zero, its bias too."""
    spec = replace(FULL, hidden=64, joiner="auto", recurrent_layers=1)
    state = draw_state(plan_checkpoint(Checkpoint.open(tiny_model("llama")), spec))
    for name, values in state.items():
        if name.endswith("norm"):
            assert torch.equal(values, torch.ones(32))
        elif ".output." in name:
            assert not values.any()
        else:
            assert float(values.abs().max()) <= 1 / 8
            if values.numel() > 2000:
                assert float(values.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
                assert abs(float(values.mean())) < 0.01


# --- plans


def test_a_plan_is_its_json(tiny_model: TinyModel) -> None:
    """A READ plan survives JSON with its id; a PaCA plan has none of a READ plan's fields."""
    for family, spec in SPECS.items():
        plan = plan_checkpoint(Checkpoint.open(tiny_model(family)), spec)
        again = SurgeryPlan.from_dict(json.loads(plan.to_json()))
        assert (again, again.id, again.to_json()) == (plan, plan.id, plan.to_json())
        assert ReadSpec(**again.spec) == spec
        assert not plan.targets
        assert plan.frozen == {"llama": ("model",), "bert": ("bert", "cls"), "t5": ("shared", "encoder", "decoder"),
                               "bart": ("model",)}[family]  # fmt: skip
    paca = plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rank=2)).to_dict()
    assert not {"stacks", "side", "frozen", "backbone_sha256"} & set(paca)


@pytest.mark.parametrize("family", ("llama", "gpt2", "bert", "opt"))
def test_values_do_not_grow_with_depth(family: str, tiny_model: TinyModel) -> None:
    """3h(d + h) + 6h + hd + 2d of them train, with 2 layers as with 6, in the plan and in the model."""
    for depth in (2, 6):
        folder = tiny_model(family, overrides=depth_of(family, depth))
        plan = plan_checkpoint(Checkpoint.open(folder), SPEC)
        assert plan.stacks[0].depth == len(plan.stacks[0].read) == depth
        assert plan.trained_values == 3 * WIDTH * (32 + WIDTH) + 6 * WIDTH + WIDTH * 32 + 2 * 32
        model = built(folder, family)
        assert surgery.attach(model, SPEC).side == plan.side
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.trained_values


@pytest.mark.parametrize("change", (
    {"stacks": []}, {"side": []}, {"stacks": [{"name": "backbone"}]}, {"frozen": 3}, {"side": [{"parameter": "x"}]},
    {"targets": [{"module": "a", "weight": "a.weight", "out_features": 2, "in_features": 2, "input_axis": 1,
                  "dtype": "F32", "rank": 1, "group": "a"}]},
), ids=lambda change: next(iter(change)))  # fmt: skip
def test_a_malformed_plan_is_refused(change: dict[str, object], tiny_model: TinyModel) -> None:
    """Neither targets nor stacks, both, or fields that are missing: a damaged plan."""
    document = plan_checkpoint(Checkpoint.open(tiny_model("llama")), SPEC).to_dict()
    with pytest.raises(DamagedError, match="plan"):
        SurgeryPlan.from_dict({**document, **change})


# --- requests that are wrong


@pytest.mark.parametrize(("settings", "match"), (
    ({"cell": "gur"}, r"--cell: 'gur', expected one of gru, lstm, rnn\. The closest is 'gru'"),
    ({"joiner": "atention"}, r"--joiner: 'atention'.*The closest is 'attention'"),
    ({"pooling": "men"}, r"--pooling: 'men'.*The closest is 'mean'"),
    ({"stacks": "encoders"}, r"--stacks: 'encoders'.*The closest is 'encoder'"),
    ({"initial": "zeros"}, r"--initial: 'zeros'.*The closest is 'zero'"),
    ({"reduce": "lst"}, r"--reduce: 'lst'.*The closest is 'last'"),
    ({"hidden": 0}, r"--hidden: 0, expected at least 1"),
    ({"recurrent_layers": 0}, r"--recurrent-layers: 0, expected at least 1"),
    ({"scale": 0.0}, r"--scale: 0\.0, expected a positive number"),
    ({"scale": float("nan")}, r"--scale: nan"),
    ({"scale": float("inf")}, r"--scale: inf"),
    *(({"layers": text}, r"--layers: .*expected all, every:2, last:6 or numbers")
      for text in ("", "every", "last:0", "every:-1", "0,,1", "1.5", "-1", "all,1", "first:2")),
    ({"hidden": "64"}, r"--hidden: '64', expected a whole number"),
    ({"hidden": 1.5}, r"--hidden: 1\.5, expected a whole number"),
    ({"hidden": True}, r"--hidden: True, expected a whole number"),
    ({"recurrent_layers": None}, r"--recurrent-layers: None, expected a whole number"),
    ({"seed": "0"}, r"--seed: '0', expected a whole number"),
    ({"scale": "1"}, r"--scale: '1', expected a number"),
    ({"scale": True}, r"--scale: True, expected a number"),
    ({"bidirectional": "yes"}, r"--bidirectional: 'yes', expected True or False"),
    ({"output_norm": 1}, r"--output-norm: 1, expected True or False"),
    ({"cell": ["gru"]}, r"--cell: \['gru'\], expected one of gru, lstm, rnn"),
    *(({"layers": value}, r"--layers: .*expected text: all, every:2, last:6 or numbers from 0 such as 0,3,5")
      for value in ([0, 1], (0,), 1, None)),
), ids=str)  # fmt: skip
def test_a_wrong_setting_is_named(settings: dict[str, Any], match: str) -> None:
    """With what would be right, and the nearest name."""
    with pytest.raises(RequestError, match=match):
        ReadSpec(**settings)


@pytest.mark.parametrize("text", ("2", "0,2", "last:3", "every:3", "99"))
def test_layers_that_are_not_there_are_refused(text: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """The message says of which stack, and how many it has; nothing is written."""
    with pytest.raises(RequestError, match=rf"--layers: '{text}' for the backbone, expected .* of 2, 0 to 1"):
        surgery.apply(tiny_model("llama"), tmp_path / "out", replace(SPEC, layers=text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ("2", "last:3", "every:3"))
@pytest.mark.parametrize(("deep", "shallow"), (("encoder", "decoder"), ("decoder", "encoder")))
def test_layers_are_those_of_the_stacks_that_are_read(deep: str, shallow: str, text: str) -> None:
    """Of a stack of three and one of two the third layer is there where the deeper one alone is read."""
    overrides = {f"{deep}_layers": 3, f"{shallow}_layers": 2}
    for stacks_read in (deep, shallow, "both"):
        model, spec = build_model("bart", overrides=overrides), replace(SPEC, stacks=stacks_read, layers=text)
        if stacks_read == deep:
            surgery.attach(model, spec)
            assert side_of(model).descriptions[0].read[-1] == 2
            continue
        with pytest.raises(RequestError, match=rf"--layers: '{text}' for the {shallow}, expected .* of 2, 0 to 1"):
            surgery.attach(model, spec)


def test_layers_are_those_meant() -> None:
    """Counted from the end where a step is asked for: the last layer is always among them."""
    assert choose_layers("every:2", 4) == (1, 3)
    assert choose_layers("every:4", 4) == (3,)
    assert choose_layers("last:4", 4) == (0, 1, 2, 3)
    assert choose_layers(" 2, 0 ", 4) == (0, 2)


@pytest.mark.parametrize(("family", "settings", "match"), (
    ("llama", {"stacks": "encoder"}, r"--stacks: 'encoder' for a model of one stack"),
    ("llama", {"stacks": "decoder"}, r"--stacks: 'decoder' for a model of one stack"),
    ("bert", {"joiner": "attention"}, r"'attention' for a model of one stack, expected an encoder-decoder\. Leave "),
    ("vit", {"joiner": "none"}, r"--joiner: 'none' for a model of one stack"),
    ("t5", {"joiner": "none"}, r"--joiner: 'none' with --stacks both"),
    ("t5", {"joiner": "none", "stacks": "encoder"}, r"--joiner: 'none' with --stacks encoder"),
    ("bart", {"joiner": "mean", "stacks": "decoder"}, r"--joiner: 'mean' with --stacks decoder"),
    ("bart", {"pooling": "mean"}, r"--pooling: 'mean' for seq2seq"),
    ("llama", {"pooling": "last"}, r"--pooling: 'last' for causal-lm"),
), ids=str)  # fmt: skip
def test_settings_that_would_be_ignored_are_refused(
    family: str, settings: dict[str, Any], match: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """A setting that a model has no use for, or that contradicts another; nothing is written."""
    with pytest.raises(RequestError, match=match):
        surgery.apply(tiny_model(family), tmp_path / "out", replace(SPEC, **settings))
    assert not (tmp_path / "out").exists()


def test_pooling_is_refused_for_tags(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A tagger looks at every token."""
    task = TaskSpec("token-classification", ("a", "b"))
    with pytest.raises(RequestError, match=r"--pooling: 'mean' for token-classification"):
        surgery.apply(tiny_model("bert"), tmp_path / "out", replace(SPEC, pooling="mean"), task=task)
    assert not (tmp_path / "out").exists()


def odd_models() -> dict[str, Callable[[], nn.Module]]:
    """Models whose layers are not one chain of equal states."""
    t = transformers
    albert = t.AlbertConfig(vocab_size=128, embedding_size=8, hidden_size=32, num_attention_heads=4,
                            intermediate_size=48, num_hidden_layers=3)  # fmt: skip
    swin = t.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2)
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return {
        "albert": lambda: t.AlbertForMaskedLM(albert),
        "swin": lambda: t.SwinForImageClassification(swin),
        "resnet": lambda: t.ResNetForImageClassification(resnet),
        "plain": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
    }


@pytest.mark.parametrize("name", odd_models())
def test_a_model_without_a_stack_is_unsupported(name: str, tmp_path: Path) -> None:
    """It is said what was looked for; the model stays trainable and plain, and nothing is written."""
    model: Any = odd_models()[name]()
    with pytest.raises(UnsupportedError, match=r"--method read: .*expected "):
        surgery.attach(model, SPEC)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, NAME)
    if name == "plain":
        with pytest.raises(UnsupportedError, match="Sequential is no transformers model"):
            surgery.attach(model, SPEC)
    else:
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(UnsupportedError, match=r"--method read: .*expected "):
            surgery.apply(tmp_path / "model", tmp_path / "out", SPEC)
        assert not (tmp_path / "out").exists()


class Toy(nn.Module):
    """Three layers of one width, called in order, in ways of which one is a chain."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layers = way, nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        one = first(x)
        two = second({"parallel": x, "residual": x + one}.get(self.way, one))
        return third({"parallel": x, "partly": x, "residual": x + two}.get(self.way, two)) * 2.0  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ("chain", "parallel", "residual", "partly", "twice"))
def test_only_a_chain_is_a_stack(way: str) -> None:
    """What one layer returns is what the next is given: the same tensor, each once."""
    model, trace = Toy(way), stacks._Trace()
    trace.watch(model)
    x = torch.zeros(1, 2, 4)
    model(model(x) if way == "twice" else x)
    assert [path for _, path, _ in stacks._candidates(model, trace)] == (["layers"] if way == "chain" else [])


# --- adapters that are wrong


@pytest.fixture
def adapter(tiny_model: TinyModel, tmp_path: Path) -> Adapter:
    """A fresh READ adapter of a tiny Llama."""
    return surgery.apply(tiny_model("llama"), tmp_path / "adapter", SPEC)


def test_another_base_is_refused(adapter: Adapter, tiny_model: TinyModel) -> None:
    """The whole base is known by its digest: one of the same shapes from another seed is another."""
    with pytest.raises(BaseMismatchError, match=r"its tensors have digest .*Name the right base with --base"):
        surgery.load(adapter.folder, base=tiny_model("llama", seed=1))
    assert surgery.load(adapter.folder, base=tiny_model("llama", max_shard_size="20KB")) is not None


def test_the_same_base_in_other_files_is_the_same(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Shards do not count, bytes do: one value in one tensor makes another base."""
    plans = [surgery.apply(tiny_model("llama", max_shard_size=size), tmp_path / f"adapter-{size}", SPEC).plan
             for size in (None, "20KB")]  # fmt: skip
    assert plans[0] == plans[1]
    other = Path(shutil.copytree(tiny_model("llama"), tmp_path / "other"))
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="digest"):
        surgery.load(tmp_path / "adapter-None", base=other)


def test_saving_to_another_model_s_base_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A base without such layers cannot be the one the model was loaded from."""
    model = build_model("llama", overrides=depth_of("llama", 3))
    surgery.attach(model, SPEC)
    with pytest.raises(BaseMismatchError):
        surgery.save(model, tmp_path / "out", base=tiny_model("llama"))
    assert not (tmp_path / "out").exists()


def rewrite(adapter: Adapter, change: Callable[[dict[str, Tensor]], None]) -> None:
    """An adapter file with other tensors, and its digest in the record as if it had been written so."""
    path = adapter.folder / ADAPTER_FILE
    tensors, old = safetensors.torch.load_file(path), file_sha256(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    record = adapter.folder / "surgery.json"
    record.write_text(record.read_text().replace(old, file_sha256(path)))


BIAS, NORM = f"{NAME}.stacks.backbone.output.bias", f"{NAME}.stacks.backbone.norm"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "not a number": (lambda t: t[BIAS].fill_(float("nan")), r"32 of 32 trained values are not finite"),
    "infinite": (lambda t: t[NORM][:1].fill_(float("inf")), r"1 of 32 trained values are not finite"),
    "missing": (lambda t: t.pop(NORM), r"1 tensors missing or surplus, first 'side_network\.stacks\.backbone\.norm'"),
    "surplus": (lambda t: t.update({"more": torch.zeros(1)}), r"1 tensors missing or surplus, first 'more'"),
    "shape": (lambda t: t.update({NORM: torch.ones(31)}), r"torch\.float32 \(31,\), expected .*\(32,\)"),
    "dtype": (lambda t: t.update({NORM: torch.ones(32).bfloat16()}), r"torch\.bfloat16 \(32,\), expected float32"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_adapter_is_refused(kind: str, adapter: Adapter) -> None:
    """By name of the tensor, before a model is loaded."""
    change, match = DAMAGE[kind]
    rewrite(adapter, change)
    for call in (open_adapter, surgery.load):
        with pytest.raises(DamagedError, match=match):
            call(adapter.folder)


def test_values_that_diverged_are_not_saved(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A NaN in the side network is found before anything is written."""
    folder = tiny_model("llama")
    model = built(folder, "llama")
    surgery.attach(model, SPEC)
    with torch.no_grad():
        model.get_parameter(BIAS)[3] = float("nan")
    with pytest.raises(DamagedError, match=r"output\.bias: 1 of 32 trained values are not finite.*Training diverged"):
        surgery.save(model, tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()


def test_an_adapter_file_holds_the_side_network_alone(adapter: Adapter) -> None:
    """Its names are the plan's, none of them a tensor of the base; an update keeps them."""
    stored = set(safetensors.torch.load_file(adapter.folder / ADAPTER_FILE))
    assert stored == adapter_names(adapter.plan) == {t.parameter for t in adapter.plan.side}
    assert all(name.startswith(f"{NAME}.stacks.backbone.") for name in stored)
    assert isinstance(adapter.delta, SideDelta)
    state = {name: values + 0.5 for name, values in adapter.delta.state.items()}
    update_adapter(adapter, SideDelta(adapter.plan, state, {}), adapter.record.manifest)
    require_same(side_state(surgery.load(adapter.folder)), state)


# --- as a model with code of its own


def test_the_modeling_file_says_whose_it_is() -> None:
    """Its first lines give licence and version, and nothing in it points at a module that is not there."""
    source = modeling_source("LlamaForCausalLM")
    assert source.splitlines()[:2] == ["# SPDX-License-Identifier: Apache-2.0",
                                       f"# checkpoint-surgery {surgery.__version__}"]  # fmt: skip
    assert "surgery." not in source.replace("`surgery", "")


@pytest.mark.parametrize("family", ("llama", "distilbert", "t5", "bart"))
def test_a_model_with_its_own_code_trains_as_ours_does(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """As it is loaded, what READ trains is trainable and no more, and backward keeps as much as with surgery.load."""
    task = TaskSpec("sequence-classification", ("a", "b", "c")) if family == "distilbert" else None
    surgery.apply(tiny_model(family), tmp_path / "adapter", SPEC, task=task)
    folder = surgery.export(tmp_path / "adapter", tmp_path / "out", format="remote-code").out
    theirs: Any = own_class(folder, read_record(folder, REMOTE_CODE)).from_pretrained(folder)
    sizes, names = [], []
    for model in (surgery.load(tmp_path / "adapter", trainable=True), theirs):
        with keeping() as kept:
            logits = model.train()(**sample_inputs(family)).logits
        assert logits.requires_grad
        sizes.append(kept.bytes_besides(model))
        names.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert names[0] == names[1]
    assert sizes[0] == sizes[1] > 0


# --- the command line


@pytest.mark.parametrize(("arguments", "match"), (
    (["--method", "read", "--rank", "3"], "--rank: method read has no such setting"),
    (["--method", "read", "--targets", "q_proj"], "--targets: method read has no such setting"),
    (["--method", "paca", "--hidden", "4"], "--hidden: method paca has no such setting"),
    (["--bidirectional"], "--bidirectional: method paca has no such setting"),
    (["--method", "read", "--cell", "gur"], "The closest is 'gru'"),
    (["--method", "read", "--layers", "7"], "layers of a stack of 2, 0 to 1"),
    (["--method", "raed"], "The closest is 'read'"),
), ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_the_command_refuses_what_the_method_has_not(
    arguments: list[str], match: str, tiny_model: TinyModel, tmp_path: Path, console: Console,
) -> None:  # fmt: skip
    """Exit code 2, one line on standard error, nothing written."""
    shown = console("apply", tiny_model("llama"), "-o", tmp_path / "out", *arguments)
    assert (shown.code, shown.out) == (2, "")
    assert match in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_applies_read(tiny_model: TinyModel, tmp_path: Path, console: Console) -> None:
    """Every option of the method reaches the spec."""
    given = ["--cell", "lstm", "--hidden", str(WIDTH), "--recurrent-layers", "2", "--bidirectional", "--initial",
             "embedding", "--reduce", "mean", "--output-norm", "--scale", "0.5", "--layers", "last:1", "--joiner",
             "mean", "--seed", "3"]  # fmt: skip
    assert console("apply", tiny_model("t5"), "--method", "read", "-o", tmp_path / "out", *given).code == 0
    assert ReadSpec(**open_adapter(tmp_path / "out").plan.spec) == FULL


def test_a_plain_model_is_no_read_model(tiny_model: TinyModel) -> None:
    """Detaching and collecting ask for an attached model; attaching twice is refused."""
    model = built(tiny_model("llama"), "llama")
    for call in (lambda: surgery.detach(model, merge=False), lambda: surgery.collect(model)):
        with pytest.raises(SurgeryError, match="not attached"):
            call()
    surgery.attach(model, SPEC)
    with pytest.raises(RequestError, match="attached already"):
        surgery.attach(model, PacaSpec(rank=2))
