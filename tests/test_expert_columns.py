"""Which columns of a mixture's experts train: by score, by file, by budget; drawn anew; beside a quantized base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporters import dense
from exporters.undo import undo
from surgery import columns as strategies
from surgery.adapter import open_adapter
from surgery.calibration import calibrate
from surgery.checkpoint import Checkpoint
from surgery.choosing import _sites, _without_data, calibration_batches, settle
from surgery.columns import STRATEGIES, random_columns
from surgery.delta import require_columns
from surgery.errors import CheckError, RequestError, SelectorError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, attach, attach_plan, collect, detach, load, load_base_model, save
from surgery.paca_experts import OWN, SHARED, WAYS
from surgery.plan import SurgeryPlan, Target
from surgery.planning import plan_checkpoint
from surgery.recipe import DataSection, TrainSection
from surgery.survey import TaskSpec
from surgery.table import plan_lines
from surgery.train import train
from surgery.union import unite
from surgery.verify import verify
from surgery.workflow import export
from tests.conftest import TinyModel
from tests.console import Command
from tests.examples import NEEDS_TORCHAO
from tests.masked import patches_of, require_draws_are_exact, require_merge_equals, run_masked, train_in_turns
from tests.test_experts import build
from tests.test_merge import weights
from tests.test_resampling import stop_after
from tests.tiny import sample_inputs
from tests.trained import make_adapter

ALL = ("all-linear", "experts")
SPEC = PacaSpec(rank=3, targets=ALL)
DATA_STRATEGIES = ("activation", "gradient", "activation-gradient")
FAMILIES = ("mixtral", "qwen2_moe", "gpt_oss")  # a tensor each, a shared expert beside them, one transposed for all


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Drawn tokens with labels, each batch of its own."""
    drawn = [sample_inputs("mixtral", seed=number) for number in range(count)]
    return [{**inputs, "labels": inputs["input_ids"]} for inputs in drawn]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to look at and to train on."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat and the dog lay on the rug. " * 40)
    return path


def planned(model: Any, spec: PacaSpec = SPEC) -> SurgeryPlan:
    """The plan of a model in memory that says what is looked at: of columns that the seed decides."""
    plan = attach(model, spec)
    detach(model, merge=False)
    return plan


def mine(plan: SurgeryPlan) -> list[Target]:
    """The targets that are experts'."""
    return [target for target in plan.targets if target.holder]


def columns_of(folder: Path) -> dict[str, list[int]]:
    """An adapter's columns by module."""
    patches = require_columns(open_adapter(folder).delta, "test").patches
    return {module: patch.columns.tolist() for module, patch in patches.items()}


# --- scores


def part_of(target: Target, whole_eoi: Tensor) -> list[Tensor]:
    """A target's matrices (o, i) of a parameter (e, o, i): one, or one for each expert."""
    if not target.place:
        return list(whole_eoi)
    expert, part, parts = target.place
    return [whole_eoi[expert].chunk(parts)[part]]


def dense_scores(family: str, plan: SurgeryPlan) -> dict[str, dict[str, Tensor]]:
    """By autograd's gradients of whole parameters, and by inputs multiplied out expert by expert; of each batch."""
    model = build(family, dtype=torch.float64, way="eager")
    targets, found = mine(plan), {kind: {} for kind in DATA_STRATEGIES}  # type: ignore[var-annotated]
    inputs: dict[str, Any] = {}
    for holder in {target.holder for target in targets}:
        model.get_submodule(holder).register_forward_pre_hook(lambda _m, args, n=holder: inputs.update({n: args}))
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for target in targets:
            weight, experts = model.get_parameter(target.name), model.get_submodule(target.holder)
            axes = (lambda t: t.detach().transpose(1, 2)) if experts.is_transposed else (lambda t: t.detach())
            pairs = list(zip(*(part_of(target, axes(t)) for t in (weight.grad, weight)), strict=True))
            seen = {
                "gradient": sum(g.square().sum(0) for g, _ in pairs),
                "activation-gradient": sum((g * w).sum(0).square() for g, w in pairs),
                "activation": inputs_of(experts, target, *inputs[target.holder][:2]),
            }
            for kind, score in seen.items():
                found[kind][target.module] = found[kind].get(target.module, 0.0) + score
    return found


@torch.no_grad()
def inputs_of(experts: Any, target: Target, x: Tensor, index: Tensor) -> Tensor:
    """The squares of what a target is multiplied with, for each value of its column."""
    total: Any = 0.0
    for expert in range(experts.num_experts) if not target.place else [target.place[0]]:
        rows = x[(index == expert).any(1)]
        if target.parameter == "down_proj":
            weight = experts.gate_up_proj[expert]
            rows = rows @ weight if experts.is_transposed else rows @ weight.t()
            rows = experts._apply_gate(rows + experts.gate_up_proj_bias[expert] if experts.has_bias else rows)
        outputs = target.out_features if target.place else target.out_features // experts.num_experts
        total = total + rows.square().sum(0) * outputs
    return total


@pytest.fixture(scope="module")
def expected() -> Callable[[str], tuple[SurgeryPlan, dict[str, dict[str, Tensor]]]]:
    """A family's plan and what dense gradients and inputs say of it; made once."""
    made: dict[str, Any] = {}

    def make(family: str) -> tuple[SurgeryPlan, dict[str, dict[str, Tensor]]]:
        if family not in made:
            plan = planned(build(family, dtype=torch.float64))
            made[family] = plan, dense_scores(family, plan)
        result: tuple[SurgeryPlan, dict[str, dict[str, Tensor]]] = made[family]
        return result

    return make


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_the_scores_of_dense_gradients(family: str, way: str, expected: Callable[[str], Any]) -> None:
    """Each expert's own, in batches of any order; the model is left as it was."""
    plan, scores = expected(family)
    model = build(family, dtype=torch.float64, way=way).train()
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    for kind in DATA_STRATEGIES:
        for order in (1, -1) if way == "grouped_mm" else (1,):
            found = calibrate(model, _sites(plan), kind, batches()[::order])
            for target in mine(plan):
                torch.testing.assert_close(found[target.module], scores[kind][target.module], rtol=1e-5, atol=1e-12)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_the_gradient_of_one_expert_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reduced is a matrix of one expert, and no parameter has a gradient by then."""
    model, shapes = build("mixtral"), []
    plan = planned(model, replace(SPEC, targets=("experts",)))

    def watching(gradient_oi: Tensor, weight_oi: Tensor) -> Tensor:
        shapes.append(tuple(gradient_oi.shape))
        assert all(parameter.grad is None for parameter in model.parameters())
        return strategies.score_gradient(gradient_oi, weight_oi)

    table = {**STRATEGIES, "gradient": replace(STRATEGIES["gradient"], score=watching)}
    monkeypatch.setattr("surgery.expert_scores.STRATEGIES", table)
    calibrate(model, _sites(plan), "gradient", batches(1))
    assert set(shapes) == {(48, 32), (32, 48)}


@pytest.mark.parametrize("kind", DATA_STRATEGIES)
def test_experts_that_no_token_reaches_have_the_columns_of_random(kind: str) -> None:
    """Their scores are zero, and equal scores are told apart by seed and name alone."""
    model = build("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # all tokens go to the same two of four
    attach(model, replace(SPEC, experts=OWN, select=kind), calibration=batches(2))
    unreached = 0
    for module, patch in require_columns(collect(model), "test").patches.items():
        drawn = random_columns(patch.target.in_features, 3, seed=0, group=patch.target.group)
        if patch.target.holder and torch.equal(patch.columns, drawn):
            unreached += 1
            assert patch.target.place[0] in (0, 1, 2, 3), module
    assert unreached == 2 * 2 * 3, "of two layers two experts with three tensors each"


# --- from scores to columns


def test_shared_columns_are_those_of_the_sum_over_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    """By the files' own weights; each expert's own are those of its gate and up together."""
    checkpoint = Checkpoint.open(tiny_model("mixtral"))
    for experts in (SHARED, OWN):
        folder = tmp_path / experts
        plan = apply(checkpoint.root, folder, replace(SPEC, select="magnitude", experts=experts)).plan
        chosen = columns_of(folder)
        for group in {target.group for target in mine(plan)}:
            members = [target for target in plan.targets if target.group == group]
            assert (
                len(members)
                == {(SHARED, 0): 8, (SHARED, 1): 4, (OWN, 0): 2, (OWN, 1): 1}[
                    experts, members[0].parameter == "down_proj"
                ]
            )
            total = sum(checkpoint.read_tensor(target.weight).square().sum(0).double() for target in members)
            best = sorted(torch.as_tensor(total).topk(3).indices.tolist())
            assert all(chosen[target.module] == best for target in members)


@pytest.mark.parametrize("experts", (SHARED, OWN))
@pytest.mark.parametrize("select", ("lowrank", "activation-gradient"))
def test_memory_and_files_choose_the_same(
    select: str, experts: str, tiny_model: TinyModel, data: Path, tmp_path: Path
) -> None:
    """`attach` to a model and `apply` to its checkpoint give the same columns; by gradients, of the same rows."""
    root, spec = tiny_model("mixtral"), replace(SPEC, select=select, experts=experts)
    if select != "lowrank":
        spec = replace(spec, calibration_data=(str(data),), calibration_length=8, calibration_rows=16)
    plan = apply(root, tmp_path / "ad", spec, task=TaskSpec("causal-lm")).plan
    model = load_base_model(root, plan)
    attach(model, spec, calibration=calibration_batches(root, plan, spec) if spec.calibration_data else ())
    delta = require_columns(collect(model), "test")
    assert {name: patch.columns.tolist() for name, patch in delta.patches.items()} == columns_of(tmp_path / "ad")
    assert delta.moved == 0
    random = {t.module: random_columns(t.in_features, 3, seed=0, group=t.group).tolist() for t in mine(plan)}
    assert all(columns_of(tmp_path / "ad")[module] != drawn for module, drawn in random.items())


def test_a_tensor_that_holds_all_experts_is_looked_at_expert_by_expert() -> None:
    """Scores of transposed weights in one tensor are sums over the experts' own matrices."""
    model = build("gpt_oss")
    for select in ("magnitude", "lowrank"):
        spec = replace(SPEC, targets=("experts",), select=select)
        plan = attach(build("gpt_oss"), spec)
        found = _without_data(plan, lambda target: model.get_parameter(target.name).detach())
        assert found is not None
        for target in mine(plan):
            total: Any = 0.0
            for expert, weight in enumerate(model.get_parameter(target.name).detach()):
                total = total + STRATEGIES[select].score(weight.t(), seed=0, name=f"{target.module}.{expert}")
            best = sorted(total.topk(3).indices.tolist())
            assert found[1] is not None
            assert found[1].columns[target.module].tolist() == best


def test_a_file_names_columns_of_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    """By group for all of them, by tensor for each; what their kind of sharing does not allow is an error."""
    root, holder = tiny_model("mixtral"), "model.layers.0.mlp.experts"
    path, targets = tmp_path / "columns.json", ("layers.0.*.experts.*",)
    spec = PacaSpec(targets=targets, select=f"file:{path}")
    shared = {holder: [1, 5], f"{holder}.down_proj": [0, 2, 4]}
    path.write_text(json.dumps(shared))
    apply(root, tmp_path / "shared", spec)
    assert columns_of(tmp_path / "shared")[f"{holder}.2.up_proj"] == [1, 5]
    assert columns_of(tmp_path / "shared")[f"{holder}.3.down_proj"] == [0, 2, 4]
    own = {f"{holder}.{n}.gate_up_proj": [n, 9] for n in range(4)} | {f"{holder}.{n}.down_proj": [n] for n in range(4)}
    path.write_text(json.dumps(own))
    apply(root, tmp_path / "own", replace(spec, experts=OWN))
    assert columns_of(tmp_path / "own")[f"{holder}.2.gate_proj"] == [2, 9]
    again = apply(root, tmp_path / "again", replace(spec, experts=OWN, select=f"file:{tmp_path / 'own'}"))
    assert columns_of(again.folder) == columns_of(tmp_path / "own")
    with pytest.raises(RequestError, match=r"other columns for .*they share them.*--experts own"):
        apply(root, tmp_path / "x", replace(spec, select=f"file:{tmp_path / 'own'}"))
    path.write_text(json.dumps({**own, f"{holder}.2.down_proj": [1, 2]}))
    with pytest.raises(SelectorError, match=r"--select file:.*ranks 1, 2"):
        apply(root, tmp_path / "x", replace(spec, experts=OWN))
    assert not (tmp_path / "x").exists()


# --- budgets


@pytest.mark.parametrize("select", ("random", "magnitude"))
@pytest.mark.parametrize("experts", (SHARED, OWN))
def test_a_budget_is_met_within_one_column_of_a_parameter(
    experts: str, select: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """No more than asked for; less is left over than the next column costs in all experts; they have one rank."""
    budget = 9000
    spec = PacaSpec(targets=ALL, select=select, experts=experts, budget=str(budget))
    plan = apply(tiny_model("qwen3_moe"), tmp_path / "ad", spec).plan
    largest = max(sum(t.out_features for t in plan.targets if t.name == name) for name in {t.name for t in mine(plan)})
    assert budget - largest < plan.trained_values <= budget
    for name in {target.name for target in mine(plan)}:
        assert len({target.rank for target in plan.targets if target.name == name}) == 1
    assert collect(attached(tmp_path / "ad")).moved == 0


def attached(folder: Path) -> Any:
    """An adapter's model, ready to go on training."""
    return load(folder, trainable=True)


def test_own_columns_compete_as_the_sum_of_each_expert_s_next_best() -> None:
    """A parameter whose experts' best columns are worth more gets the budget, however they are numbered."""
    plan = planned(build("mixtral"), PacaSpec(rank=1, targets=("experts.*.down_proj",), experts=OWN))
    plan = replace(plan, spec={**plan.spec, "rank": 16, "select": "magnitude", "budget": str(2 * 4 * 32)})
    scores = {target.module: torch.full((48,), 1e-3, dtype=torch.float64) for target in plan.targets}
    for target in plan.targets:  # of layer 0 all experts want the same two columns, of layer 1 each wants others
        first = 2 * target.place[0] if ".1.mlp" in target.module else 0
        wanted = [5.0, 3.0] if ".1.mlp" in target.module else [2.0, 2.0]
        scores[target.module][first : first + 2] = torch.tensor(wanted, dtype=torch.float64)
    settled, choice = settle(plan, scores)
    assert {target.holder for target in settled.targets} == {"model.layers.1.mlp.experts"}
    assert choice is not None
    chosen = [choice.columns[target.module].tolist() for target in settled.targets]
    assert chosen == [[0, 1], [2, 3], [4, 5], [6, 7]]


# --- the whole way


@pytest.mark.parametrize(("family", "experts", "select"), (
    ("mixtral", OWN, "gradient"), ("qwen3_moe", SHARED, "magnitude"), ("qwen3_moe", SHARED, "activation"),
))  # fmt: skip
def test_chosen_columns_train_merge_and_verify(
    family: str, experts: str, select: str, tiny_model: TinyModel, data: Path, tmp_path: Path, command: Command
) -> None:
    """apply, train, export, verify as commands; under a budget, by data where it takes any."""
    arguments = ["--targets", "all-linear,experts", "--experts", experts, "--select", select, "--budget", "3%"]
    if select != "magnitude":
        arguments += ["--calibration-data", data, "--calibration-rows", 16, "--calibration-length", 12]
    folder = tmp_path / "ad"
    assert command("apply", tiny_model(family, dtype=torch.bfloat16), *arguments, "-o", folder)[0] == 0
    chosen = columns_of(folder)
    train(folder, DataSection(train=[str(data)], max_length=16), TrainSection(max_steps=2, batch_size=2))
    export(folder, tmp_path / "merged")
    report = verify(tmp_path / "merged")
    assert {check.result for check in report.checks} == {"passed"}
    assert report.max_logit_difference == 0
    assert columns_of(folder) == chosen
    assert open_adapter(folder).delta.moved > 0


def test_another_task_keeps_the_experts_columns(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Chosen for the language model, they are what the classifier trains, each expert its own."""
    from surgery.operate import replanned

    before = apply(tiny_model("mixtral"), tmp_path / "ad", replace(SPEC, experts=OWN, select="magnitude", rank=2))
    task = TaskSpec("sequence-classification", ("a", "b"))
    after = require_columns(replanned(before, Checkpoint.open(tiny_model("mixtral")), task), "test")
    found = {patch.target.weight: patch.columns.tolist() for patch in after.patches.values()}
    held = require_columns(before.delta, "test").patches.values()
    assert found == {patch.target.weight: patch.columns.tolist() for patch in held}
    model = load_base_model(tiny_model("mixtral"), after.plan)
    attach_plan(model, after.plan, after)
    again = require_columns(collect(model), "test").patches
    assert {module: patch.columns.tolist() for module, patch in again.items()} == {
        module: patch.columns.tolist() for module, patch in after.patches.items()
    }


def test_the_plan_alone_says_what_a_budget_gives(tiny_model: TinyModel, command: Command) -> None:
    """`--plan` under a budget reads weights where scores decide, and data for nothing."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model("mixtral")), PacaSpec(targets=ALL, budget="2%"))
    assert mine(plan)
    arguments = ("apply", tiny_model("mixtral"), "--targets", "experts", "--select", "magnitude")
    assert command(*arguments, "--budget", "3%", "--plan") == (0, "")


# --- drawn anew

DRAWN = PacaSpec(rank=2, targets=ALL, resample="every:2")


def loss_of(model: Any, number: int) -> Tensor:
    """The loss of a batch of its own."""
    loss: Tensor = model(**batches(number + 1)[number]).loss
    return loss


@pytest.mark.parametrize(("family", "experts", "way"), (
    ("mixtral", SHARED, "grouped_mm"), ("mixtral", OWN, "eager"), ("qwen2_moe", SHARED, "batched_mm"),
    ("gpt_oss", SHARED, "grouped_mm"),
))  # fmt: skip
def test_a_merge_equals_a_dense_run_that_applied_the_same_updates(family: str, experts: str, way: str) -> None:
    """Full gradients, masked to the columns of the time, and an Adam that knows nothing after each draw."""
    model = build(family, dtype=torch.float64, way=way)
    attach(model, replace(DRAWN, experts=experts))
    first = patches_of(model)
    train_in_turns(loss_of, model, 5)
    dense = build(family, dtype=torch.float64, way="eager")
    run_masked(dense, first, loss_of, steps=5, every=2)
    require_merge_equals(detach(model, merge=True).state_dict(), dense)


@pytest.mark.parametrize("experts", (SHARED, OWN))
def test_draws_change_no_output_and_are_undone(experts: str) -> None:
    """In bf16: logits before and after; a state put back into a model that has moved on; the base on closing."""
    model = build("mixtral", dtype=torch.bfloat16)
    attach(model, replace(DRAWN, experts=experts))
    assert not require_draws_are_exact(loss_of, model, lambda model: model(**sample_inputs("mixtral")).logits)


@pytest.mark.parametrize(("family", "experts", "select"), (
    ("mixtral", OWN, "magnitude"), ("qwen3_moe", SHARED, "random"), ("granitemoe", SHARED, "magnitude"),
))  # fmt: skip
def test_a_run_that_draws_is_resumed_merged_and_loaded(
    family: str, experts: str, select: str, tiny_model: TinyModel, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stopped after a draw, the file is that of one go; it holds the union; merge, verify, load and undo know of it."""
    base = tiny_model("mixtral") if family in IN_MEMORY else tiny_model(family, dtype=torch.bfloat16)
    if family in IN_MEMORY:  # no family of the tests' files has all experts in one tensor
        base = with_tokenizer(family, base, tmp_path / "base")
    section = DataSection(train=[str(data)], max_length=16)
    settings = TrainSection(max_steps=5, batch_size=2, learning_rate=1e-2, save_steps=1)
    spec = replace(DRAWN, experts=experts, select=select)
    folders = {name: tmp_path / name for name in ("whole", "halves")}
    for folder in folders.values():
        apply(base, folder, spec)
    train(folders["whole"], section, settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(folders["halves"], section, settings)
    train(folders["halves"], section, settings, resume="auto")
    whole, halves = (open_adapter(folders[name]) for name in folders)
    assert whole.delta.to_bytes() == halves.delta.to_bytes()
    delta = require_columns(whole.delta, "test")
    widths = {target.module: delta.widths()[target.module] for target in mine(whole.plan)}
    assert max(widths.values()) > 2
    assert (len(set(widths.values())) > 1) or experts == SHARED, "experts with columns of their own hold unlike many"
    export(whole.folder, tmp_path / "merged")
    report = verify(tmp_path / "merged")
    assert {check.result for check in report.checks} == {"passed"}
    assert report.max_logit_difference == 0
    if experts == OWN:
        other = apply(base, tmp_path / "other", PacaSpec(rank=1, targets=("q_proj",)))
        with pytest.raises(UnsupportedError, match=r"experts of .* with \d to \d columns, which were drawn anew"):
            unite([whole, other])
    again = require_columns(collect(attached(whole.folder)), "test")
    assert again.to_bytes() == delta.to_bytes()
    assert weights(undo(tmp_path / "merged", tmp_path / "undone")) == weights(base)


IN_MEMORY = ("granitemoe",)


def with_tokenizer(family: str, donor: Path, folder: Path) -> Path:
    """A checkpoint of a family that is built in memory alone, with another's tokenizer."""
    build(family, dtype=torch.bfloat16).save_pretrained(folder)
    for path in donor.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat_template")):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


# --- beside a quantized base


@pytest.fixture(scope="module", params=("nf4", pytest.param("torchao-int4", marks=NEEDS_TORCHAO)))
def beside_packed(request: Any, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A moved adapter whose base has its linear layers packed and experts as they are, merged into both bases."""
    folder = tmp_path_factory.mktemp("packed")
    spec = PacaSpec(rank=4, targets=ALL, experts=OWN, quantize=request.param, select="magnitude")
    adapter = make_adapter(tiny_model("mixtral", dtype=torch.bfloat16), folder / "ad", spec)
    for base in ("original", "dequantized"):
        dense.export(adapter, folder / base, merge_base=base)
    return folder


def test_experts_stay_dense_beside_quantized_layers(beside_packed: Path) -> None:
    """Attention alone is packed, the table says so; both merges hold the experts' trained columns and pass verify."""
    adapter = open_adapter(beside_packed / "ad")
    plan, held = adapter.plan, adapter.plan.quantization
    assert held is not None
    assert not any("experts" in name for name in held.layers)
    assert plan_lines(plan)[-1].endswith("8 layers, quantized when they are loaded, experts as its files have them")
    for base, names in (("original", ("merge difference",)), ("dequantized", ("dequantized weights",))):
        checks = {check.name: check for check in verify(beside_packed / base).checks}
        assert checks["logits"].detail.startswith("largest difference to base + adapter 0 on")
        assert set(names) <= set(checks)
        assert checks["planned columns"].result == "passed"
        merged = Checkpoint.open(beside_packed / base)
        for target in mine(plan):
            patch = require_columns(adapter.delta, "test").patches[target.module]
            assert torch.equal(merged.read_tensor(target.weight)[:, patch.columns], patch.stored())


@pytest.mark.parametrize("where", ("trained", "frozen"))
def test_a_wrong_expert_in_a_dequantized_merge_is_noticed(where: str, beside_packed: Path, tmp_path: Path) -> None:
    """By its bytes: tokens of a few prompts may reach none of it."""
    folder = tmp_path / "merged"
    shutil.copytree(beside_packed / "dequantized", folder)
    record = json.loads((folder / "surgery.json").read_text())
    for key, entry in (("base", "path"), ("adapter", "path")):
        place = record["manifest"][key]
        place[entry] = str((beside_packed / "dequantized" / place[entry]).resolve())
    (folder / "surgery.json").write_text(json.dumps(record))
    patches = require_columns(open_adapter(beside_packed / "ad").delta, "test").patches
    patch = next(patch for patch in patches.values() if patch.target.holder)
    column = next(n for n in range(patch.target.in_features) if (n in patch.columns.tolist()) == (where == "trained"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[patch.target.weight][0, column] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckError, match="what was trained" if where == "trained" else "outside the plan"):
        verify(folder, numeric=False)


def test_a_base_stored_in_4_bits_trains_its_experts(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As bitsandbytes writes it: experts in 16 bits in the files; attached live, saved, loaded, merged and verified."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype="auto")
    model.save_pretrained(tmp_path / "stored")
    for path in base.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, tmp_path / "stored")
    spec = PacaSpec(rank=4, targets=ALL)
    adapter = make_adapter(tmp_path / "stored", tmp_path / "ad", spec)
    dense.export(adapter, tmp_path / "merged", merge_base="dequantized")
    assert {check.result for check in verify(tmp_path / "merged").checks} == {"passed"}
    attach(model, replace(spec, experts=OWN, select="gradient", targets=("experts",)), calibration=batches(1))
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**batches(1)[0]).loss.backward()
    step.step()
    inputs = sample_inputs("qwen3_moe")
    expected = model(**inputs).logits.detach()  # in training mode: see `calibration`
    adapter = save(model, tmp_path / "live", base=base)
    assert adapter.delta.moved
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "live")(**inputs).logits, expected, rtol=0.02, atol=0.25)
