"""The table of what a surgery touches: complete, aligned, and true about which layers a row means."""

from __future__ import annotations

import fnmatch
from dataclasses import replace

import pytest

from surgery.checkpoint import Checkpoint
from surgery.methods.paca_spec import PacaSpec
from surgery.plan import SurgeryPlan, Target, Untouched
from surgery.planning import plan_checkpoint
from surgery.survey import TaskSpec
from surgery.table import align, describe, fold, plan_lines, ranges, target_rows
from tests.conftest import TinyModel

FAMILIES = ("llama", "gpt2", "mixtral", "t5", "vit")


def target(module: str, rank: int = 2, *, sizes: tuple[int, int] = (6, 4), axis: int = 1, group: str = "") -> Target:
    """A target of a plan that no file stands behind."""
    return Target(module, f"{module}.weight", *sizes, axis, "F32", rank, group or module)


def plan_of(*targets: Target) -> SurgeryPlan:
    """A plan over these targets."""
    return SurgeryPlan("paca", {}, "Model", "causal-lm", tuple(sorted(targets, key=lambda t: t.module)))


def test_layers_of_one_kind_are_one_row() -> None:
    """Names that differ in numbers only are counted together, with all their trained values."""
    (row,) = target_rows([target(f"model.layers.{number}.up") for number in range(12)])
    assert (row.pattern, row.count, row.shape, row.rank, row.sharing) == ("model.layers.*.up", 12, (6, 4), 2, 1)
    assert row.trained_values == 12 * 6 * 2


def test_a_transposed_weight_shows_outputs_first() -> None:
    """GPT-2 stores (in, out); the table says (out, in) for every layout."""
    (row,) = target_rows([target("h.0.fc", sizes=(6, 4), axis=0)])
    assert row.shape == (6, 4)


def test_rows_that_differ_in_rank_name_their_layers() -> None:
    """Where `*` would mean another row's layers too, the numbers are written out."""
    ranks = {0: 2, 1: 2, 2: 3, 3: 2, 7: 2, 8: 4}
    rows = target_rows([target(f"layers.{number}.up", rank) for number, rank in ranks.items()])
    assert [(row.pattern, row.rank, row.count) for row in rows] == [
        ("layers.{0-1,3,7}.up", 2, 4),
        ("layers.2.up", 3, 1),
        ("layers.8.up", 4, 1),
    ]


def test_a_number_that_all_share_stays() -> None:
    """T5's `layer.1` is always the same one, as are the numbers of a sequence's parts."""
    names = [f"block.{number}.layer.1.wi" for number in range(3)]
    assert describe(names, is_only=True) == "block.*.layer.1.wi"
    assert describe(["blocks.0.mlp.0", "blocks.1.mlp.0"], is_only=True) == "blocks.*.mlp.0"
    assert describe(["head"], is_only=True) == "head"
    assert fold("a.12.b.3") == "a.*.b.*"
    assert fold("conv2d.layer3.x") == "conv2d.layer3.x"


def test_ranges_are_short_and_exact() -> None:
    """Runs are folded, order and repetition do not matter."""
    assert ranges([3, 1, 2, 2, 9, 7, 6]) == "1-3,6-7,9"
    assert ranges([5]) == "5"
    assert ranges([]) == ""


def test_layers_fed_by_one_tensor_are_counted() -> None:
    """q, k and v share an input: each row says how many layers do, itself included."""
    rows = target_rows([target(f"l.0.{name}", group="l.0.k") for name in "kqv"] + [target("l.0.o")])
    assert [row.sharing for row in rows] == [3, 3, 3, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_is_in_exactly_one_row(family: str, tiny_model: TinyModel) -> None:
    """The rows' counts and values add up to the plan's, and each target matches exactly one row's name."""
    spec = PacaSpec(rank=4, rank_pattern={"*.1.*": 2})
    plan = plan_checkpoint(Checkpoint.open(tiny_model(family)), spec)
    rows = target_rows(plan.targets)
    assert sum(row.count for row in rows) == len(plan.targets)
    assert sum(row.trained_values for row in rows) == sum(t.trained_values for t in plan.targets)
    for entry in plan.targets:
        assert len([row for row in rows if fnmatch.fnmatchcase(entry.module, row.pattern)]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tables_are_aligned_and_complete(family: str, tiny_model: TinyModel) -> None:
    """Every row and every weight left alone is named; the lines of a table are aligned; none ends in blanks."""
    plan = plan_checkpoint(Checkpoint.open(tiny_model(family)), PacaSpec(rank=4))
    lines = plan_lines(plan)
    text = "\n".join(lines)
    assert all(row.pattern in text for row in target_rows(plan.targets))
    assert all(f"{entry.pattern} " in text and entry.reason in text for entry in plan.untouched)
    assert [line for line in lines if line != line.rstrip()] == []
    table = lines[: lines.index("")]
    assert len({len(line) for line in table}) == 1, "the last column is flush right"


def test_experts_are_named_as_not_touched(tiny_model: TinyModel) -> None:
    """Mixtral's experts stand in the table with the reason why they do not train."""
    lines = plan_lines(plan_checkpoint(Checkpoint.open(tiny_model("mixtral")), PacaSpec(rank=4)))
    (line,) = [line for line in lines if "experts.down_proj" in line]
    assert line.split(None, 2) == ["model.layers.*.mlp.experts.down_proj", "2", "experts: name them in --targets"]


def test_heads_are_said_to_be_new(tiny_model: TinyModel) -> None:
    """What trains whole has a table of its own, and its values are in the last line."""
    task = TaskSpec("sequence-classification", ("a", "b"))
    lines = plan_lines(plan_checkpoint(Checkpoint.open(tiny_model("bert")), PacaSpec(rank=4), task))
    (line,) = [line for line in lines if line.startswith("classifier.weight")]
    assert line.split() == ["classifier.weight", "2", "x", "32", "F32", "new", "64"]
    assert lines[-1].endswith("; 1,122 in 4 whole tensors")


def test_the_last_line_is_the_sum() -> None:
    """Values, layers and share, in the singular where there is one."""
    plan = plan_of(target("a.0.x", 1), target("a.1.x", 3))
    assert plan_lines(plan)[-1] == "24 values train in 2 layers, 50.00% of 48 weights"
    assert plan_lines(plan_of(target("a", 1)))[-1] == "6 values train in 1 layer, 25.00% of 24 weights"


def test_a_plan_that_touches_all_has_no_second_table() -> None:
    """Empty tables are left out."""
    plan = plan_of(target("a.0.x"))
    assert "not touched" not in "\n".join(plan_lines(plan))
    left = replace(plan, untouched=(Untouched("emb.weight", 1, "embedding"),))
    assert "emb.weight       1  embedding" in plan_lines(left)


def test_align_pads_and_strips() -> None:
    """Left and right columns, and nothing for no rows."""
    assert align([("a", "1"), ("bcd", "22")], right=(1,)) == ["a     1", "bcd  22"]
    assert align([("a", ""), ("bcd", "x")]) == ["a", "bcd  x"]
    assert align([]) == []
