"""Columns of a mixture's experts: exact in every way to multiply, small to keep, and in the right tensors on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters import dense
from exporters.undo import undo
from surgery import acceleration, paca_experts, tiny
from surgery.adapter import open_adapter
from surgery.checkpoint import Checkpoint
from surgery.compat import set_checkpointing
from surgery.errors import BaseMismatchError, DamagedError, RequestError, SelectorError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, attach, collect, detach, load, save
from surgery.paca_experts import OWN, SHARED, WAYS, ExpertColumns, read_experts
from surgery.paca_layers import PacaLayer, combine, layers
from surgery.plan import SurgeryPlan, Target
from surgery.planning import plan_checkpoint
from surgery.survey import list_untouched
from surgery.table import plan_lines
from surgery.tiny import Family
from surgery.train import train
from surgery.verify import verify
from tests.conftest import TinyModel
from tests.console import Command
from tests.examples import CASES, fast
from tests.interrupting import Killed, stop_at
from tests.test_merge import tensors_of, weights
from tests.test_paca import (
    OPTIMIZERS,
    bits,
    built,
    counting_saved_bytes,
    logits_of,
    loss_of,
    merged_model,
    train_steps,
    trainable,
)
from tests.tiny import EXPERTS, build_model, sample_inputs
from tests.trained import make_adapter

ALL = ("all-linear", "experts")
RANK_4 = PacaSpec(rank=4, targets=ALL)
COLUMNS = (SHARED, OWN)

# Families that differ in what lies on disk, in the order of axes, in biases and in what runs beside the experts.
OTHERS = {
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    ),
    "granitemoe": Family("GraniteMoeConfig", "GraniteMoeForCausalLM", {**EXPERTS, "num_local_experts": 4}),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**EXPERTS, "num_local_experts": 4, "head_dim": 8, "intermediate_size": 24, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0}},
    ),
}  # fmt: skip
IN_ONE_TENSOR = ("granitemoe", "gpt_oss")


def build(family: str, *, dtype: torch.dtype = torch.float32, way: str = "grouped_mm") -> Any:
    """A model in memory whose experts multiply in that way."""
    model: Any = (
        tiny.build_model(OTHERS[family], dtype=dtype, seed=0) if family in OTHERS else build_model(family, dtype=dtype)
    )
    model.set_experts_implementation(way)
    return model


def parts(model: nn.Module) -> dict[str, ExpertColumns]:
    """The trained columns of the experts, by name."""
    return {name: layer for name, layer in layers(model).items() if isinstance(layer, ExpertColumns)}


def gradients_of(model: Any, family: str) -> Tensor:
    """Backward of a loss; returns the gradient of the embeddings' output."""
    ids = sample_inputs("mixtral")["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad is not None, family
    return embedded.grad


# --- the gradients are the dense ones


@pytest.fixture(scope="module")
def dense_gradients() -> Callable[[str], tuple[Any, Tensor]]:
    """A dense model of a family in double precision after a backward, and the gradient of its input; made once."""
    made: dict[str, tuple[Any, Tensor]] = {}

    def make(family: str) -> tuple[Any, Tensor]:
        if family not in made:
            model = build(family, dtype=torch.float64, way="eager")
            made[family] = model, gradients_of(model, family)
        return made[family]

    return make


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ("mixtral", "qwen3_moe", *OTHERS))
def test_every_way_gives_the_dense_gradients(
    family: str, way: str, columns: str, dense_gradients: Callable[[str], tuple[Any, Tensor]]
) -> None:
    """In double precision: the columns' gradient is the dense one at those columns, the input's is the same."""
    if columns == OWN and family in IN_ONE_TENSOR:
        pytest.skip("all experts lie in one tensor: see test_own_columns_need_a_tensor_for_each_expert")
    ours, (theirs, expected) = build(family, dtype=torch.float64, way=way), dense_gradients(family)
    attach(ours, replace(RANK_4, experts=columns, alpha=6.0))
    torch.testing.assert_close(gradients_of(ours, family), expected, rtol=1e-9, atol=1e-14)
    assert len(parts(ours)) == 4
    for part in parts(ours).values():
        weight = part.weight
        dense_one = next(w for n, w in theirs.named_parameters() if w.shape == weight.shape and torch.equal(w, weight))
        wanted = 1.5 * read_experts(dense_one.grad, part.paca_columns, part.input_axis)
        torch.testing.assert_close(part.paca_delta.grad, wanted, rtol=1e-9, atol=1e-14)
        assert weight.grad is None


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("way", WAYS)
def test_numerical_differentiation_agrees(way: str, columns: str) -> None:
    """torch.autograd.gradcheck over input, routing weights and both differences, one expert without a token."""
    small = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_hidden_layers": 1}
    model: Any = build_model("mixtral", dtype=torch.float64, overrides=small)
    model.set_experts_implementation(way)
    attach(model, PacaSpec(rank=2, targets=("experts",), experts=columns, alpha=3.0))
    experts = model.model.layers[0].mlp.experts
    opened = list(parts(model).values())
    index = torch.tensor([[0, 1], [1, 3], [0, 3], [3, 1], [1, 0]])

    def compute(x: Tensor, routing: Tensor, *deltas: Tensor) -> Tensor:
        for part, delta in zip(opened, deltas, strict=True):
            part.paca_delta.data.copy_(delta.detach())
        with torch.no_grad():
            for part in opened:
                part.refresh()
        handed = dict(zip(opened, deltas, strict=True))
        for part in opened:
            del part._parameters["paca_delta"]
            part.paca_delta = handed[part]  # type: ignore[assignment]  # so that autograd sees what gradcheck moves
        try:
            return experts(x, index, routing)
        finally:
            for part in opened:
                delta = handed[part].detach().clone()
                del part.paca_delta
                part.paca_delta = nn.Parameter(delta)

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    given = [draw(5, 8), draw(5, 2), *(draw(*part.paca_delta.shape) for part in opened)]
    assert torch.autograd.gradcheck(compute, given)


@pytest.mark.parametrize("columns", COLUMNS)
def test_the_ways_agree_under_autocast(columns: str) -> None:
    """In bf16 autocast over fp32 weights all ways train, and their gradients differ by rounding."""
    found = {}
    for way in WAYS:
        model = build("qwen3_moe", way=way)
        attach(model, replace(RANK_4, experts=columns))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**sample_inputs("qwen3_moe")).logits.float().square().mean()
        loss.backward()
        found[way] = {name: part.paca_delta.grad for name, part in parts(model).items()}
    for way in ("eager", "batched_mm"):
        for name, gradient in found[way].items():
            assert gradient.dtype == torch.float32
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradient, found["grouped_mm"][name], rtol=0.1, atol=0.05 * scale)


# --- what backward keeps


def saved_bytes(hidden: int, spec: PacaSpec | None, way: str) -> int:
    """Bytes kept by one forward of a Mixtral of that width with frozen attention; spec None: all of it frozen."""
    model: Any = build_model("mixtral", overrides={"hidden_size": hidden})
    model.set_experts_implementation(way)
    model.requires_grad_(requires_grad=False)
    if spec:
        attach(model, spec)
    embeddings = torch.randn(2, 9, hidden, requires_grad=True)
    with counting_saved_bytes(model) as count:
        model(inputs_embeds=embeddings).logits.sum().backward()
        return count()


@pytest.mark.parametrize("rank", (1, 6))
@pytest.mark.parametrize("columns", COLUMNS)
def test_backward_keeps_the_floor_and_r_channels(columns: str, rank: int) -> None:
    """Shared columns: r channels of each token; own ones: of each pair of token and expert, as of down_proj's input.

    Nothing beside them, whatever the width: where each token goes is kept for the frozen experts, too.
    """
    spec = PacaSpec(rank=rank, targets=("experts",), experts=columns)
    extra = {h: saved_bytes(h, spec, "grouped_mm") - saved_bytes(h, None, "grouped_mm") for h in (32, 64)}
    tokens, pairs = 2 * 9, 2 * 9 * 2
    kept = rank * ((tokens if columns == SHARED else pairs) + pairs)
    assert extra == {32: 2 * 4 * kept, 64: 2 * 4 * kept}


@pytest.mark.parametrize("way", ("eager", "batched_mm"))
def test_other_ways_keep_no_input_either(way: str) -> None:
    """Twice the rank costs twice the channels, and batched_mm keeps no copies of weights, which the floor does."""
    kept = {rank: saved_bytes(64, PacaSpec(rank=rank, targets=("experts",)), way) for rank in (2, 4, 6)}
    assert kept[6] - kept[4] == kept[4] - kept[2]
    floor = saved_bytes(64, None, way)
    assert kept[2] < floor if way == "batched_mm" else kept[2] - floor < 2 * 4 * 1000


def test_shared_experts_gather_with_the_layers_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts and a shared expert fed by one tensor gather once: of nine distinct inputs a layer of Qwen2-MoE has six.

    Attention has two, the experts' input and the shared expert's are one, and each has a down_proj.
    """
    model, calls = build("qwen2_moe"), []
    attach(model, RANK_4)
    real = paca_experts.gather
    for module in (paca_experts, __import__("surgery.paca_layers", fromlist=["gather"])):
        monkeypatch.setattr(module, "gather", lambda x, *rest: (calls.append(x.shape), real(x, *rest))[1])
    loss_of(model, sample_inputs("mixtral"))
    assert len(calls) == 2 * 5


# --- never stale


@pytest.mark.parametrize("train", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize(("way", "columns", "name"), (
    ("grouped_mm", SHARED, "AdamW fused"), ("grouped_mm", OWN, "writes .data"), ("eager", OWN, "SGD foreach"),
    ("batched_mm", SHARED, "no Optimizer"),
))  # fmt: skip
def test_after_a_step_the_model_is_the_merged_one(
    way: str, columns: str, name: str, train: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Logits right after a step are those of the merged checkpoint bit for bit, and have moved."""
    folder, inputs = tiny_model("mixtral"), sample_inputs("mixtral")
    model = built(folder, "mixtral")
    model.set_experts_implementation(way)
    attach(model, replace(RANK_4, experts=columns))
    before = logits_of(model, inputs, train=train)
    train_steps(model, OPTIMIZERS[name](trainable(model)), family="mixtral", micro_batches=2)
    after = logits_of(model, inputs, train=train)
    merged = merged_model(model, folder, tmp_path, "mixtral")
    merged.set_experts_implementation(way)
    assert torch.equal(after, logits_of(merged, inputs, train=train))
    assert not torch.allclose(after, before)


def test_columns_are_written_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter of experts once for each optimizer step, whatever was accumulated; evaluation writes nothing."""
    model = build("mixtral")
    attach(model, RANK_4)
    writes: list[PacaLayer] = []
    real = ExpertColumns.refresh
    monkeypatch.setattr(ExpertColumns, "refresh", lambda part: (writes.append(part), real(part))[1])
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, fused=True)
    for step in range(1, 3):
        train_steps(model, optimizer, steps=1, micro_batches=1, family="mixtral")
        loss_of(model, sample_inputs("mixtral"))
        assert len(writes) == 4 * step
    logits_of(model, sample_inputs("mixtral"))
    written = len(writes)
    logits_of(model, sample_inputs("mixtral"))
    assert len(writes) == written


@pytest.mark.parametrize("way", ("grouped_mm", "eager"))
def test_gradient_checkpointing_changes_nothing(way: str) -> None:
    """Logits and columns after three steps are those without it."""
    results = []
    for checkpointing in (False, True):
        model = build("mixtral", way=way)
        attach(model, replace(RANK_4, experts=OWN))
        if checkpointing:
            set_checkpointing(model, on=True)
            model.config.use_cache = False
        train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), steps=3, family="mixtral")
        columns = [combine(p.paca_original, p.paca_delta, 1.0) for p in parts(model).values()]
        results.append([logits_of(model, sample_inputs("mixtral")), *columns])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_copy_lives_on_its_own() -> None:
    """A deep copy writes its own weights, trains without moving the original, and can be detached."""
    model, inputs = build("mixtral"), sample_inputs("mixtral")
    attach(model, RANK_4)
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), family="mixtral")
    before = logits_of(model, inputs)
    twin = copy.deepcopy(model)
    train_steps(twin, torch.optim.AdamW(trainable(twin), lr=0.02), family="mixtral")
    assert torch.equal(logits_of(model, inputs), before)
    after = logits_of(twin, inputs)
    assert not torch.equal(after, before)
    assert torch.equal(logits_of(detach(twin, merge=True), inputs), after)


# --- opening and closing


@pytest.mark.parametrize("columns", COLUMNS)
def test_exactly_the_plan_trains(columns: str, tiny_model: TinyModel) -> None:
    """Trainable are the planned columns and nothing else; a live model is planned as its checkpoint is."""
    model = built(tiny_model("qwen3_moe"), "qwen3_moe")
    live = attach(model, replace(RANK_4, experts=columns))
    stored = plan_checkpoint(Checkpoint.open(tiny_model("qwen3_moe")), replace(RANK_4, experts=columns))
    assert live.targets == stored.targets
    assert sum(parameter.numel() for parameter in trainable(model)) == stored.trained_values
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in names if "experts" in name} == {
        f"model.layers.{n}.mlp.experts.paca_{p}.paca_delta" for n in (0, 1) for p in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("family", ("mixtral", "gpt_oss"))
def test_detaching_gives_the_base_back(family: str) -> None:
    """merge=False after training: the base bit for bit, plain classes, no attribute left."""
    model = build(family, dtype=torch.bfloat16)
    before, fields = bits(model), [sorted(vars(module)) for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    attach(model, RANK_4)
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), family="mixtral")
    logits_of(model, sample_inputs("mixtral"))
    assert bits(model) != before
    detach(model, merge=False)
    assert bits(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert [sorted(vars(module)) for module in model.modules()] == fields


@pytest.mark.parametrize("columns", COLUMNS)
def test_loading_gives_the_state_that_was_saved(columns: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """An adapter computes what the saved model computed, and saves again to the same bytes."""
    folder = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model = built(folder, "qwen3_moe")
    attach(model, replace(RANK_4, experts=columns))
    train_steps(model, torch.optim.AdamW(trainable(model), lr=0.02), family="qwen3_moe")
    saved = save(model, tmp_path / "adapter", base=folder)
    again = load(tmp_path / "adapter", trainable=True)
    assert torch.equal(logits_of(again, sample_inputs("qwen3_moe")), logits_of(model, sample_inputs("qwen3_moe")))
    assert save(again, tmp_path / "again", base=folder).delta.to_bytes() == saved.delta.to_bytes()
    assert json.loads(saved.plan.to_json())["spec"].get("experts", SHARED) == columns
    assert SurgeryPlan.from_dict(saved.plan.to_dict()) == saved.plan


def test_the_wrong_base_is_noticed(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Saving over, and loading onto, another model than the one that was trained."""
    model = built(tiny_model("mixtral"), "mixtral")
    attach(model, RANK_4)
    with pytest.raises(BaseMismatchError, match="not what the model started from"):
        save(model, tmp_path / "adapter", base=tiny_model("mixtral", seed=1))
    save(model, tmp_path / "adapter", base=tiny_model("mixtral"))
    with pytest.raises(BaseMismatchError, match="the model's columns are not its base's"):
        load(tmp_path / "adapter", base=tiny_model("mixtral", seed=1))


# --- files


@pytest.mark.parametrize("shards", (None, "20KB"), ids=("one file", "shards"))
@pytest.mark.parametrize(("family", "columns"), (("mixtral", OWN), ("qwen3_moe", SHARED)))
def test_a_fresh_adapter_merges_to_the_base(
    family: str, columns: str, shards: str | None, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Without a step every weight file is the base's byte for byte."""
    base = tiny_model(family, dtype=torch.bfloat16, max_shard_size=shards)
    merged = dense.export(apply(base, tmp_path / "adapter", replace(RANK_4, experts=columns)), tmp_path / "merged")
    assert weights(merged) == weights(base)


def write_family(family: str, folder: Path) -> Path:
    """A checkpoint of one of the other families, without a tokenizer."""
    build(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "columns"), (("mixtral", SHARED), ("qwen3_moe", OWN), ("granitemoe", SHARED),
                                                 ("gpt_oss", SHARED)))  # fmt: skip
def test_a_merge_changes_the_planned_columns_and_can_be_undone(
    family: str, columns: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Each tensor of experts differs from the base in its columns, which hold the trained values, and nowhere else."""
    base = write_family(family, tmp_path / "base") if family in OTHERS else tiny_model(family)
    adapter = make_adapter(base, tmp_path / "adapter", replace(RANK_4, experts=columns))
    merged = dense.export(adapter, tmp_path / "merged")
    before, after = Checkpoint.open(base), Checkpoint.open(merged)
    for target in adapter.plan.targets:
        patch = adapter.delta.patches[target.module]
        values = after.read_tensor(target.weight).movedim(target.input_axis, -1).reshape(-1, target.in_features)
        assert torch.equal(values[:, patch.columns], patch.stored())
        others = [n for n in range(target.in_features) if n not in patch.columns.tolist()]
        held = before.read_tensor(target.weight).movedim(target.input_axis, -1).reshape(-1, target.in_features)
        assert torch.equal(values[:, others], held[:, others])
    touched = {target.weight for target in adapter.plan.targets}
    assert all(data == tensors_of(base)[name] for name, data in tensors_of(merged).items() if name not in touched)
    verify(merged, numeric=family not in OTHERS)
    assert weights(undo(merged, tmp_path / "again")) == weights(base)


def test_an_expert_in_another_s_place_is_noticed(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Verify runs base and adapter beside the merged folder: swapped experts would show."""
    adapter = make_adapter(tiny_model("mixtral"), tmp_path / "adapter", RANK_4)
    first, second = (adapter.plan.targets[n] for n in (0, 3))
    assert (first.place, second.place) == ((0, 0, 1), (1, 0, 1))
    with pytest.raises(DamagedError, match="two targets in one weight"):
        replace(adapter.plan, targets=(replace(first, weight=second.weight), *adapter.plan.targets[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_run_is_resumed_exported_and_verified(
    columns: str, tiny_model: TinyModel, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in one go or killed half way and resumed: the same adapter; its merged folder passes every check."""
    case, folders = CASES[0], {}
    for name in ("whole", "halves"):
        folders[name] = tmp_path / name
        apply(tiny_model("mixtral"), folders[name], replace(RANK_4, experts=columns))
    data, settings = case.write(tmp_path), fast(max_steps=6, save_steps=3, eval_on_start=False)
    train(folders["whole"], data, settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 4, how="kill")
        with pytest.raises(Killed):
            train(folders["halves"], data, settings)
    train(folders["halves"], data, settings, resume="auto")
    deltas = {name: open_adapter(folder).delta for name, folder in folders.items()}
    assert deltas["whole"].to_bytes() == deltas["halves"].to_bytes()
    assert deltas["whole"].moved == 32
    code, error = command("export", folders["whole"], "--merge", "-o", tmp_path / "merged")
    assert code == 0, error


# --- what is asked for


def groups(plan: SurgeryPlan) -> dict[str, list[Target]]:
    """The targets that are experts', by group."""
    found: dict[str, list[Target]] = {}
    for target in plan.targets:
        if target.holder:
            found.setdefault(target.group, []).append(target)
    return found


def test_the_plan_says_what_trains(tiny_model: TinyModel) -> None:
    """all-linear leaves the experts out and says how to have them; asked for, they stand in the table."""
    checkpoint = Checkpoint.open(tiny_model("mixtral"))
    without = plan_checkpoint(checkpoint, PacaSpec(rank=4))
    assert not any(target.holder for target in without.targets)
    assert {e.reason for e in without.untouched if "experts" in e.pattern} == {"experts: name them in --targets"}
    lines = plan_lines(plan_checkpoint(checkpoint, RANK_4))
    row = next(line for line in lines if "experts.*.gate_proj" in line)
    assert row.split() == [
        "model.layers.*.mlp.experts.*.gate_proj",
        "8",
        "48",
        "x",
        "32",
        "F32",
        "4",
        "8",
        "layers",
        "1,536",
    ]
    assert "same columns" in lines[0]


@pytest.mark.parametrize(("spec", "count"), (
    ({"targets": ("experts",)}, 24), ({"targets": ("experts.*.down_proj",)}, 8),
    ({"targets": ("layers.1.*.experts.*",)}, 12), ({"targets": ALL, "exclude": ("experts.*.down_proj",)}, 16),
    ({"targets": ("experts",), "rank_pattern": {"experts.*.down_proj": 7}}, 24),
))  # fmt: skip
def test_patterns_mean_experts(spec: dict[str, Any], count: int, tiny_model: TinyModel) -> None:
    """By the word, by projection, by layer; shared columns are one set for gate and up, and one for down."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model("mixtral")), PacaSpec(**{"rank": 4, **spec}))
    mine = [target for target in plan.targets if target.holder]
    assert len(mine) == count
    assert len(groups(plan)) == {24: 4, 8: 2, 12: 2, 16: 2}[count]
    if "rank_pattern" in spec:
        assert {target.rank for target in mine if target.parameter == "down_proj"} == {7}
    own = plan_checkpoint(Checkpoint.open(tiny_model("mixtral")), PacaSpec(**{"rank": 4, **spec}, experts=OWN))
    assert {len(targets) for targets in groups(own).values()} <= {1, 2}


@pytest.mark.parametrize(("spec", "error", "text"), (
    ({"targets": ("experts.3.*",)}, SelectorError, "1 of the 4 tensors that make"),
    ({"targets": ("experts.*.gate_proj",)}, SelectorError, "gate_proj and up_proj together"),
    ({"targets": ("experts",), "rank_pattern": {"experts.0.*": 2}}, SelectorError, "ranks 2, 4 in"),
    ({"targets": ("q_proj",), "experts": OWN}, RequestError, "no experts train"),
    ({"targets": ("expert.*",)}, SelectorError, "matches no linear layer"),
))  # fmt: skip
def test_requests_that_cannot_be_met(
    spec: dict[str, Any], error: type[Exception], text: str, tiny_model: TinyModel
) -> None:
    """Some experts of a parameter, parts of one, other ranks, a setting without experts: exit code 2 and the reason."""
    with pytest.raises(error, match=text) as caught:
        plan_checkpoint(Checkpoint.open(tiny_model("mixtral")), PacaSpec(**{"rank": 4, **spec}))
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_unknown_ways_to_choose_are_refused(tiny_model: TinyModel) -> None:
    """`experts` is shared or own; a dense model has none."""
    with pytest.raises(RequestError, match="shared, own"):
        PacaSpec(experts="each")
    with pytest.raises(SelectorError, match=r"'experts' matches no linear layer.*no experts in one parameter"):
        plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rank=4, targets=ALL))


def test_own_columns_need_a_tensor_for_each_expert() -> None:
    """Where one tensor on disk holds all experts their columns are shared, or it is refused with the reason."""
    with pytest.raises(UnsupportedError, match=r"holds all experts of .* in one tensor"):
        attach(build("granitemoe"), replace(RANK_4, experts=OWN))


def test_ways_in_which_nothing_trains_are_refused(tiny_model: TinyModel, tmp_path: Path, command: Command) -> None:
    """Another implementation, experts on several devices, a LoRA of experts: exit code 5 and what to do."""
    model = build("mixtral")
    attach(model, RANK_4)
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(UnsupportedError, match=r"train\.liger: columns of experts train"):
        acceleration._apply_liger(model)
    with pytest.raises(UnsupportedError, match=r"'deepgemm'.*set_experts_implementation"):
        loss_of(model, sample_inputs("mixtral"))
    other = build("mixtral")
    other.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(UnsupportedError, match="divided among devices"):
        attach(other, RANK_4)
    apply(tiny_model("mixtral"), tmp_path / "adapter", RANK_4)
    code, error = command("export", tmp_path / "adapter", "--format", "lora", "-o", tmp_path / "lora")
    assert (code, "24 tensors of experts" in error, (tmp_path / "lora").exists()) == (5, True, False)


def test_what_experts_are_is_told_by_their_kind_and_not_by_a_name() -> None:
    """A tensor of three axes is fused experts where a module is a layer's experts, whatever it is called."""

    class ExpertScales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert_scales = nn.Parameter(torch.zeros(2, 3, 4))

    left = {entry.pattern: entry.reason for entry in list_untouched(build("mixtral"), {}, {})}
    assert left["model.layers.*.mlp.experts.down_proj"] == "fused experts"
    (other,) = list_untouched(nn.Sequential(ExpertScales()), {}, {})
    assert other.reason == "in ExpertScales"


def test_a_checkpoint_that_lacks_an_expert_is_damaged(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Experts are counted: one that is missing, or there twice, is said with where it belongs."""
    from surgery.experts import find_experts, usual_experts

    model = build("mixtral")
    known = usual_experts(model, lambda _weight: "F32")
    name = "model.layers.0.mlp.experts.down_proj"
    for wrong in (known[name][1:], [*known[name], known[name][0]]):
        with pytest.raises(DamagedError, match=f"tensors of experts for {name}"):
            find_experts(model, {}, {**known, name: wrong})


def test_parts_of_an_expert_have_the_same_columns(tiny_model: TinyModel, tmp_path: Path) -> None:
    """An adapter whose gate and up differ in their columns cannot be put into one parameter."""
    adapter = make_adapter(tiny_model("mixtral"), tmp_path / "adapter", replace(RANK_4, experts=OWN))
    patches: Any = dict(adapter.delta.patches)
    name = "model.layers.0.mlp.experts.0.up_proj"
    patches[name] = replace(patches[name], columns=torch.tensor([0, 1, 2, 3]))
    from surgery.operate import attach_plan

    model = built(tiny_model("mixtral"), "mixtral")
    with pytest.raises((DamagedError, BaseMismatchError)):
        attach_plan(model, adapter.plan, replace(adapter.delta, patches=patches))


def test_collecting_gives_every_tensor_its_part(tiny_model: TinyModel) -> None:
    """What is collected for an expert is its own slice of the parameter, in the plan's columns."""
    model = built(tiny_model("mixtral"), "mixtral")
    attach(model, replace(RANK_4, experts=OWN))
    with torch.no_grad():
        for part in parts(model).values():
            part.paca_delta.copy_(torch.arange(part.paca_delta.numel()).reshape(part.paca_delta.shape) * 1e-3)
    patches: Any = collect(model).patches
    for module, patch in patches.items():
        target = patch.target
        if not target.holder:
            continue
        part = parts(model)[f"{target.holder}.paca_{target.parameter}"]
        expert, piece, of = target.place
        rows = slice(piece * target.out_features, (piece + 1) * target.out_features)
        expected = combine(part.paca_original, part.paca_delta, 1.0)[expert, rows]
        assert torch.equal(patch.values, expected), module
        assert torch.equal(patch.columns, part.paca_columns[expert])
        assert of == (2 if target.parameter == "gate_up_proj" else 1)
