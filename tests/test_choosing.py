"""Columns that are chosen by looking: at weights, inputs, gradients or a file; and budgets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery import columns as strategies
from surgery.adapter import open_adapter
from surgery.calibration import Site, calibrate
from surgery.checkpoint import Checkpoint
from surgery.choosing import settle
from surgery.columns import GroupScores, even_scores, score_lowrank, spread, top_columns
from surgery.delta import require_columns
from surgery.errors import CheckError, RequestError, UnsupportedError
from surgery.methods.paca_plan import planned_columns
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply, attach, collect, detach, load_base_model
from surgery.paca_layers import layers
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from surgery.recipe import DataSection, TrainSection
from surgery.recipe_file import read_recipe
from surgery.survey import TaskSpec
from surgery.table import plan_lines
from surgery.train import train
from surgery.workflow import run
from tests.conftest import TinyModel
from tests.console import Command
from tests.tiny import build_model, sample_inputs

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
DATA_STRATEGIES = ("activation", "gradient", "activation-gradient")


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """Drawn tokens with labels, each batch of its own."""
    drawn = [sample_inputs("llama", seed=number) for number in range(count)]
    return [{**inputs, "labels": inputs["input_ids"]} for inputs in drawn]


def sites_of(plan: SurgeryPlan) -> list[Site]:
    """What `calibrate` looks at."""
    return [Site(t.module, t.out_features, t.in_features, t.input_axis) for t in plan.targets]


@pytest.fixture(scope="module")
def plan(tiny_model: TinyModel) -> SurgeryPlan:
    """Rank 3 on a tiny Llama."""
    return plan_checkpoint(Checkpoint.open(tiny_model("llama")), PacaSpec(rank=3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of text with classes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = ["the cat sat", "a dog ran far", "people talk", "an ant works on"]
    rows = [{"text": f"{texts[n % 4]} {n}", "label": "person" if n % 4 == 2 else "animal"} for n in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- scores


def test_scores_are_what_autograd_says(plan: SurgeryPlan) -> None:
    """By dense gradients, kept for the whole model: gradients by columns, and x dx by input channel; of each batch."""
    model = build_model("llama", dtype=torch.float64)
    weights = {target.module: model.get_submodule(target.module).weight for target in plan.targets}
    expected = {kind: dict.fromkeys(weights, 0.0) for kind in DATA_STRATEGIES}
    seen: dict[str, Tensor] = {}
    for module in weights:
        model.get_submodule(module).register_forward_pre_hook(lambda _m, args, n=module: seen.update({n: args[0]}))
    model.requires_grad_()
    for batch in batches():
        model.zero_grad()
        model(**batch).loss.backward()
        for module, weight in weights.items():
            gradient, x = weight.grad, seen[module].detach()
            expected["gradient"][module] = expected["gradient"][module] + gradient.square().sum(0)
            taylor = (gradient * weight.detach()).sum(0).square()
            expected["activation-gradient"][module] = expected["activation-gradient"][module] + taylor
            inputs = x.reshape(-1, x.shape[-1]).square().sum(0) * len(weight)
            expected["activation"][module] = expected["activation"][module] + inputs
    plain = build_model("llama", dtype=torch.float64)
    for kind in DATA_STRATEGIES:
        found = calibrate(plain, sites_of(plan), kind, batches())
        for module, scores in found.items():
            assert torch.allclose(scores, expected[kind][module], rtol=1e-4), (kind, module)


@pytest.mark.parametrize("kind", DATA_STRATEGIES)
def test_the_order_of_batches_does_not_matter_and_nothing_is_left_behind(kind: str, plan: SurgeryPlan) -> None:
    """Scores agree to 1e-9; the same batches give the same bits; modes, gradients and hooks are as they were."""
    model = build_model("llama").train()
    first = calibrate(model, sites_of(plan), kind, batches())
    assert all(torch.equal(first[n], s) for n, s in calibrate(model, sites_of(plan), kind, batches()).items())
    other = calibrate(model, sites_of(plan), kind, batches()[::-1])
    assert all(torch.allclose(first[n], scores, rtol=1e-9) for n, scores in other.items())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_dense_gradient_is_there_at_a_time(plan: SurgeryPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer's gradient is reduced no other weight has one."""
    model, alive = build_model("llama"), []
    score = strategies.score_gradient

    def counting(gradient_oi: Tensor, weight_oi: Tensor) -> Tensor:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return score(gradient_oi, weight_oi)

    table = {**strategies.STRATEGIES, "gradient": replace(strategies.STRATEGIES["gradient"], score=counting)}
    monkeypatch.setattr("surgery.calibration.STRATEGIES", table)
    calibrate(model, sites_of(plan), "gradient", batches(2))
    assert alive == [0] * (2 * len(plan.targets)), "its own has been taken away by then"


def test_a_loss_that_overflows_and_a_model_without_loss_are_errors(plan: SurgeryPlan) -> None:
    """Scores are finite or an error; without labels there is no gradient; without batches no scores."""
    model = build_model("llama")
    with pytest.raises(UnsupportedError, match="no loss"):
        calibrate(model, sites_of(plan), "gradient", [sample_inputs("llama")])
    with pytest.raises(RequestError, match="no batch"):
        calibrate(model, sites_of(plan), "activation", [])
    model.get_submodule(plan.targets[0].module).weight.data.fill_(float("inf"))
    with pytest.raises(CheckError, match="not finite"):
        calibrate(model, sites_of(plan), "activation", batches(1))


def test_low_rank_scores_are_those_of_the_svd() -> None:
    """Of a matrix whose singular values fall, to 1e-3 of the largest score; not those of the plain magnitude."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator)).Q for n in (60, 40))
    weight = (left * (0.8 ** torch.arange(40.0))) @ right.t()
    _, sizes, vectors = torch.linalg.svd(weight)
    expected = (sizes[:10, None] * vectors[:10]).square().sum(0).double()
    found = score_lowrank(weight, seed=0, name="w")
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.max()))
    assert torch.equal(found, score_lowrank(weight, seed=0, name="w"))


# --- from scores to columns


@PROPERTY
@given(width=st.integers(1, 60), picks=st.data())
def test_the_best_columns_are_nested_and_ties_are_drawn(width: int, picks: st.DataObject) -> None:
    """Strictly increasing, in range; no column outside scores more than one inside."""
    scores = torch.tensor(picks.draw(st.lists(st.integers(0, 4), min_size=width, max_size=width)), dtype=torch.float64)
    rank = picks.draw(st.integers(1, width))
    best = top_columns(scores, rank, seed=3, group="g")
    assert bool((best[1:] > best[:-1]).all())
    rest = torch.ones(width, dtype=torch.bool)
    rest[best] = False
    assert not rest.any() or scores[rest].max() <= scores[best].min()
    smaller = top_columns(scores, picks.draw(st.integers(1, rank)), seed=3, group="g")
    assert set(smaller.tolist()) <= set(best.tolist())


@PROPERTY
@given(picks=st.data())
def test_a_budget_is_met_within_one_column(picks: st.DataObject) -> None:
    """No more than asked for, and less than a column of what would come next is left over."""
    sizes = picks.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 50)), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(picks.draw(st.integers(0, 99)))
    groups = [
        GroupScores(f"g{number}", torch.rand(width, generator=generator, dtype=torch.float64), each)
        for number, (width, each) in enumerate(sizes)
    ]
    largest, total = max(each for _, each in sizes), sum(width * each for width, each in sizes)
    budget = picks.draw(st.integers(largest, max(largest, total)))
    if budget > total:
        return
    ranks = spread(groups, budget)
    spent = sum(ranks.get(group.group, 0) * group.values_each for group in groups)
    assert budget - largest < spent <= budget
    assert all(1 <= ranks[group.group] <= len(group.scores) for group in groups if group.group in ranks)


def test_without_scores_a_budget_is_spread_evenly() -> None:
    """Each group gets the same part of its columns, whatever its width and its values."""
    groups = [even_scores("a", 100, 7, seed=0), even_scores("b", 400, 3, seed=0)]
    assert spread(groups, (25 * 7 + 100 * 3)) == {"a": 25, "b": 100}


@pytest.mark.parametrize(
    ("budget", "said"),
    (("5", "first column"), ("99999999", "at most"), ("0%", "^--budget: 0%, which is not one value, expected more")),
)
def test_a_budget_that_cannot_be_met_says_so(budget: str, said: str, plan: SurgeryPlan) -> None:
    """Too small for one column, more than there is, nothing."""
    asked = replace(plan, spec={**plan.spec, "rank": 16, "select": "magnitude", "budget": budget})
    scores = {target.module: torch.ones(target.in_features, dtype=torch.float64) for target in plan.targets}
    with pytest.raises(RequestError, match=said):
        settle(asked, scores)


@pytest.mark.parametrize(
    ("spec", "said"),
    (
        ({"budget": "1 %"}, "0.5%"),
        ({"budget": "10", "rank": 4}, "--rank"),
        ({"budget": "10", "rank_pattern": {"q_proj": 2}}, "--rank-pattern"),
        ({"select": "file:x.json", "budget": "10"}, "the file alone"),
        ({"select": "file:x.json", "rank": 4}, "the file alone"),
        ({"select": "file:"}, "unknown strategy"),
        ({"select": "gradients"}, "The closest is 'gradient'"),
        ({"calibration_data": "a.jsonl"}, "--calibration-data"),
        ({"select": "magnitude", "calibration_rows": 5}, "--calibration-rows"),
        ({"select": "gradient", "calibration_rows": 0}, "1 row"),
    ),
)
def test_what_would_be_ignored_or_cannot_be_is_an_error(spec: dict[str, Any], said: str) -> None:
    """Settings that do not go together are named, before anything is read."""
    with pytest.raises(RequestError, match=said):
        PacaSpec(**spec)


# --- a checkpoint


def test_a_group_shares_the_columns_of_its_summed_scores(tiny_model: TinyModel, tmp_path: Path) -> None:
    """By the files' own weights: q, k and v have the columns of the largest sum of squares over all three."""
    root = tiny_model("llama")
    adapter = apply(root, tmp_path / "ad", PacaSpec(rank=3, select="magnitude"))
    patches = require_columns(open_adapter(tmp_path / "ad").delta, "test").patches
    checkpoint = Checkpoint.open(root)
    for name in {target.group for target in adapter.plan.targets}:
        members = [target for target in adapter.plan.targets if target.group == name]
        summed = sum(checkpoint.read_tensor(target.weight).square().sum(0).double() for target in members)
        best = set(torch.as_tensor(summed).topk(3).indices.tolist())
        assert all(set(patches[target.module].columns.tolist()) == best for target in members)


@pytest.mark.parametrize("family", ("llama", "gpt2"))
@pytest.mark.parametrize("select", ("lowrank", "gradient"))
def test_memory_and_files_choose_the_same(family: str, select: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """`attach` to a model and `apply` to its checkpoint give the same columns; by gradients, of the same rows."""
    root = tiny_model(family)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    spec = PacaSpec(rank=3, select=select)
    if select == "gradient":
        spec = replace(spec, calibration_data=(str(text),), calibration_length=8, calibration_rows=16)
    apply(root, tmp_path / "ad", spec, task=TaskSpec("causal-lm"))
    stored = require_columns(open_adapter(tmp_path / "ad").delta, "test")
    model = load_base_model(root, stored.plan)
    from surgery.choosing import calibration_batches

    looked = calibration_batches(root, stored.plan, spec) if select == "gradient" else ()
    attach(model, spec, calibration=looked)
    assert {n: layer.paca_columns.tolist() for n, layer in layers(model).items()} == {
        n: patch.columns.tolist() for n, patch in stored.patches.items()
    }
    assert collect(model).moved == 0
    random = {t.module: planned_columns(stored.plan, t).tolist() for t in stored.plan.targets}
    assert random != {n: patch.columns.tolist() for n, patch in stored.patches.items()}
    before = {n: p.clone() for n, p in load_base_model(root, stored.plan).named_parameters()}
    assert all(torch.equal(before[n], p) for n, p in detach(model, merge=True).named_parameters())


def test_a_task_that_comes_later_keeps_the_columns(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    """Chosen by the language model's gradients, under a budget, they are what the classifier trains: by weight."""
    spec = PacaSpec(select="gradient", budget="2%", calibration_data=(str(data),), calibration_rows=8)
    base = tiny_model("bert")
    task = TaskSpec("sequence-classification", ("animal", "person"))
    before = apply(base, tmp_path / "ad", spec, task=task)
    assert before.plan.calibration[str(data)]
    held = {p.target.weight: p.columns.tolist() for p in require_columns(before.delta, "test").patches.values()}
    section = DataSection(train=[str(data)], max_length=12)
    train(tmp_path / "ad", section, TrainSection(max_steps=1), task=TaskSpec(task.name, ("person", "animal")))
    after = open_adapter(tmp_path / "ad")
    patches = require_columns(after.delta, "test").patches.values()
    assert {p.target.weight: p.columns.tolist() for p in patches} == held
    assert after.plan.spec == before.plan.spec
    assert after.plan.config["id2label"]["0"] == "person"


def test_a_new_head_that_is_given_no_classes_has_those_of_the_data(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of three: to look at gradients takes a head for all of them. Training on the same data goes on with it."""
    table = tmp_path / "rows.jsonl"
    rows = [{"text": f"the cat sat {n}", "label": ("sea", "land", "air")[n % 3]} for n in range(9)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = PacaSpec(select="gradient", calibration_data=(str(table),))
    before = apply(tiny_model("bert"), tmp_path / "ad", spec, task=TaskSpec("sequence-classification")).plan
    assert before.labels == ("air", "land", "sea")
    train(tmp_path / "ad", DataSection(train=[str(table)], max_length=12), TrainSection(max_steps=1))
    assert open_adapter(tmp_path / "ad").plan == before


def test_data_decide_and_are_recorded(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    """The same data give the same bytes; a recipe looks at its training data, and sees that they are others."""
    recipe = tmp_path / "recipe.yaml"
    copy = tmp_path / "rows.jsonl"
    copy.write_text(data.read_text())
    recipe.write_text(
        f"model: {tiny_model('bert')}\nadapter: ad\ntask: sequence-classification\nlabels: [animal, person]\n"
        "paca: {select: gradient, budget: 2%, calibration_rows: 8}\n"
        "data: {train: [rows.jsonl], max_length: 12}\ntrain: {max_steps: 1}\nexport: {verify: false}\n"
    )
    first = run(read_recipe(recipe))
    assert open_adapter(first.adapter).plan.spec["calibration_data"] == [str(copy)]
    assert run(read_recipe(recipe)).skipped == ("apply", "train", "export")
    copy.write_text(data.read_text() * 2)
    with pytest.raises(RequestError, match=r"rows\.jsonl, which has changed since"):
        run(read_recipe(recipe))


def test_a_file_names_columns(tiny_model: TinyModel, tmp_path: Path) -> None:
    """By layer or by group; an adapter's folder will do; layers that are missing, surplus or too narrow are errors."""
    root = tiny_model("llama")
    apply(root, tmp_path / "first", PacaSpec(rank=2, select="magnitude", targets=("q_proj", "k_proj", "v_proj")))
    named = PacaSpec(select=f"file:{tmp_path / 'first'}", targets=("q_proj", "k_proj", "v_proj"))
    second = apply(root, tmp_path / "second", named)
    assert {target.rank for target in second.plan.targets} == {2}
    assert require_columns(second.delta, "test").patches.keys() == {t.module for t in second.plan.targets}
    theirs = require_columns(open_adapter(tmp_path / "first").delta, "test").patches
    for module, patch in require_columns(second.delta, "test").patches.items():
        assert torch.equal(patch.columns, theirs[module].columns)
    with pytest.raises(RequestError, match="no columns for"):
        apply(root, tmp_path / "third", replace(named, targets=("all-linear",)))
    for text, said in (("[1]", "by module"), ('{"x": [1, 1]}', "distinct"), ("{", "cannot be read")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RequestError, match=said):
            apply(root, tmp_path / "third", PacaSpec(select=f"file:{tmp_path / 'bad.json'}"))
    group = next(t.group for t in second.plan.targets if t.module.endswith("0.self_attn.v_proj"))
    (tmp_path / "group.json").write_text(json.dumps({group: [7, 3]}))
    spec = PacaSpec(select=f"file:{tmp_path / 'group.json'}", targets=("layers.0.*.[qkv]_proj",))
    found = require_columns(apply(root, tmp_path / "group", spec).delta, "test").patches.values()
    assert [patch.columns.tolist() for patch in found] == [[3, 7]] * 3
    first = "model.layers.0.self_attn.q_proj"
    (tmp_path / "bad.json").write_text(json.dumps({first: [0, 32]}))
    with pytest.raises(RequestError, match="below 32"):
        apply(root, tmp_path / "third", PacaSpec(select=f"file:{tmp_path / 'bad.json'}", targets=(first,)))
    assert not (tmp_path / "third").exists()


def test_the_command_says_what_is_missing(tiny_model: TinyModel, data: Path, tmp_path: Path, command: Command) -> None:
    """Exit code 2 without data; --plan shows a budget's ranks."""
    root = tiny_model("llama")
    code, said = command("apply", root, "--select", "gradient", "-o", tmp_path / "x")
    assert (code, "--calibration-data FILE" in said) == (2, True)
    code, said = command("apply", tiny_model("bert"), "--select", "random", "--calibration-data", data, "--plan")
    assert code == 2
    assert command("apply", root, "--select", "lowrank", "--budget", "1%", "--plan") == (0, "")
    for select in ("random", "magnitude"):
        said = "\n".join(plan_lines(apply(root, tmp_path / select, PacaSpec(select=select, budget="1%")).plan))
        assert "nothing of the budget" in said
        assert "not selected" not in said
        assert said.endswith("under a budget of 1% of all that was meant"), "beside the part of the layers that train"
    code, said = command("apply", root, "-r", "16", "--budget", "1%", "-o", tmp_path / "x")
    assert (code, "given with --rank" in said) == (2, True), "also where it is the default's rank"
    table = tmp_path / "rows.tsv"
    table.write_text("the cat sat\t1\na dog ran\t0\n")
    looked = ("--select", "activation", "--calibration-data", table, "--task", "sequence-classification")
    code, said = command("apply", root, *looked, "--labels", "a,b", "-o", tmp_path / "x")
    assert (code, "(of apply: --calibration-columns text=...,label=...)" in said) == (2, True), said
    assert not (tmp_path / "x").exists()


def test_plans_without_these_settings_read_as_they_always_did(plan: SurgeryPlan) -> None:
    """No new key in a plan's JSON, and what has them comes back the same."""
    assert set(plan.to_dict()["spec"]) == {"rank", "targets", "exclude", "rank_pattern", "alpha", "select", "seed"}
    assert "calibration" not in plan.to_dict()
    spec = PacaSpec(select="gradient", budget="1%", resample="every:5", calibration_data=("a",))
    again = PacaSpec(
        **json.loads(json.dumps({"rank": 16, "select": "gradient", "budget": "1%", "resample": "every:5"}))
    )
    assert replace(spec, calibration_data=()) == again
