"""Every combination of the table is refused, with its code and its message, and what its fix says is accepted.

Most of it through `surgery run`, which reads a recipe and refuses it before anything is made. What no recipe says (how
a base's files are quantized, how many processes there are) is asked of the table itself here; the commands that come to
know it are tested where they are.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from surgery.combinations import COMBINATIONS, FACTS, Combination, facts, holds, require
from surgery.errors import SurgeryError, UnsupportedError
from surgery.methods.paca_spec import PacaSpec
from surgery.quantized import KINDS
from surgery.recipe import Recipe, TrainSection, asked_of
from surgery.recipe_file import read_recipe
from surgery.recipe_keys import known_keys
from surgery.training.checks import asked_of_run, known_of
from tests.console import Command

ASKED = {  # a value of each setting that stands in the table without one
    "paca.budget": "1%",
    "paca.calibration_columns": "{text: '0'}",
    "paca.calibration_data": "[rows.txt]",
    "paca.calibration_length": "64",
    "paca.calibration_rows": "8",
    "paca.quantize": "nf4",
    "paca.rank": "16",  # the default's
    "paca.rank_pattern": "{mlp.*: 4}",
    "paca.resample": "every:5",
    "held": "nf4",
    "stored": "nf4",
    "processes": "2",
    "patch": "true",
    "train.cache_bytes": "1GB",
    "train.cache_features": "states",
    "train.compile": "true",
    "train.cpu_offload": "true",
    "train.hpu_mode": "eager",
    "train.hpu_warmup_steps": "5",
    "train.liger": "true",
    "train.warmup_ratio": "0.1",
    "train.warmup_steps": "3",
    "export.merge_base": "original",
}
BESIDE = {  # what must be so for one row alone to hold
    ("train.cpu_offload", "train.device=cpu"): ["train.strategy=fsdp2"],
    ("train.compile", "train.cache_features"): ["method=read"],
    ("train.cache_features", "task=image-classification"): ["method=read"],
}
IN_RECIPES = {"held": "paca.quantize=nf4", "launched": ""}  # how a recipe comes to say a fact
UNSAID = sorted(set(FACTS) - set(IN_RECIPES))


def example(when: str) -> tuple[str, str]:
    """A setting, and a value of it for which a side of a combination holds."""
    name, equals, patterns = when.partition("=")
    return name, patterns.split("|")[0].replace("*", "columns.json") if equals else ASKED[name]


def overrides(row: Combination) -> list[str]:
    """A row as a recipe's overrides."""
    pairs = [example(side) for side in (row.one, row.other)]
    said = [IN_RECIPES.get(name, f"{name}={'null' if value == 'None' else value}") for name, value in pairs]
    return [text for text in (*said, *BESIDE.get((row.one, row.other), ())) if text]


def is_said(row: Combination) -> bool:
    """Whether a recipe can ask for both."""
    return not any(side.partition("=")[0] in UNSAID for side in (row.one, row.other))


def name_of(row: Combination) -> str:
    """A row as a test is called."""
    return f"{row.one} with {row.other}"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe without settings, for a model that is not there: nothing of it is read."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "absent", "data": {"train": ["rows.txt"]}}))
    return path


def message(row: Combination) -> str:
    """What is said, for the examples."""
    values = {side: example(when)[1] for side, when in (("one", row.one), ("other", row.other))}
    return f"{row.where}: {row.found}, expected ".format_map(values) + row.expected


@pytest.mark.parametrize("row", [row for row in COMBINATIONS if is_said(row)], ids=name_of)
def test_a_recipe_with_both_is_refused_and_its_fix_is_accepted(
    row: Combination, recipe: Path, command: Command
) -> None:
    """In one line with the documented exit code, before the model is looked for; then with what the fix says."""
    before = sorted(recipe.parent.rglob("*"))
    asked = overrides(row)
    code, said = command("run", recipe, *asked)
    assert (code, message(row) in said, said.count("\n")) == (row.error.exit_code, True, 1), said
    assert row.fix
    assert row.fix.format(one=example(row.one)[1], other=example(row.other)[1]) in said
    assert sorted(recipe.parent.rglob("*")) == before
    name, equals, _ = row.mend.partition("=")
    mended = [text for text in asked if text.partition("=")[0] != name] + [row.mend] * bool(equals)
    launched = "no" if "launched=no" in (row.one, row.other) else "yes"
    require({**asked_of(read_recipe(recipe, mended)), **facts({"launched": launched})})


@pytest.mark.parametrize("row", [row for row in COMBINATIONS if not is_said(row)], ids=name_of)
def test_what_no_recipe_says_is_refused_too(row: Combination) -> None:
    """A base that is quantized in its files, several processes: once they are known."""
    asked = dict(map(example, (row.one, row.other)))
    with pytest.raises(row.error) as caught:
        require(facts(asked))
    assert str(caught.value).startswith(message(row))
    name, equals, value = row.mend.partition("=")
    asked.pop(name)
    require(facts(asked | ({name: value} if equals else {})))


@pytest.mark.parametrize("row", COMBINATIONS, ids=name_of)
def test_each_row_names_what_there_is(row: Combination) -> None:
    """Keys of a recipe or facts, a mend of one of its own sides, and no two rows for one pair."""
    known = {*known_keys(Recipe), *FACTS}
    sides = [side.partition("=")[0] for side in (row.one, row.other)]
    assert set(sides) <= known
    assert row.mend.partition("=")[0] in (*sides, *(["paca.quantize"] if "held" in sides else []))
    assert sum((row.one, row.other) == (other.one, other.other) for other in COMBINATIONS) == 1


def test_a_run_knows_its_processes_and_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks would write one file of states; how the base is held is the plan's to say."""
    monkeypatch.setitem(known_of.__globals__, "count", lambda: 2)
    plan: Any = SimpleNamespace(quantization=None, spec={}, method="read", task="causal-lm")
    asked = asked_of_run(TrainSection(cache_features="states"), "cpu", has_launcher=True)
    with pytest.raises(UnsupportedError, match="--cache-features: with 2 processes, expected one process"):
        require({**asked, **known_of(plan)})
    plan.quantization = SimpleNamespace(kind="int8")
    with pytest.raises(UnsupportedError, match="compile: true with a base held as int8"):
        require({**asked_of_run(TrainSection(compile=True), "cpu", has_launcher=True), **known_of(plan)})


def test_a_default_is_not_asked_for(recipe: Path) -> None:
    """A recipe that says what is so anyway, and one that says nothing, ask for nothing of the table."""
    plain = asked_of(read_recipe(recipe, ["train.strategy=ddp", "train.tf32=auto", "paca.select=random"]))
    for row in COMBINATIONS:
        assert not (holds(row.one, plain) and holds(row.other, plain))


@pytest.mark.parametrize(
    "settings",
    (
        {"budget": "1%", "rank": 4},
        {"select": "file:columns.json", "rank_pattern": {"mlp.*": 4}},
        {"quantize": "nf4", "resample": "every:5"},
        {"calibration_rows": 8},
    ),
    ids=str,
)
def test_a_spec_is_refused_when_it_is_made(settings: dict[str, object]) -> None:
    """From Python as from a recipe, by the same table."""
    with pytest.raises(SurgeryError) as caught:
        PacaSpec(**settings)  # type: ignore[arg-type]
    assert any(isinstance(caught.value, row.error) and row.where == caught.value.where for row in COMBINATIONS)


def test_the_page_is_the_tables(project_root: Path) -> None:
    """docs/combinations.md is made from the rows."""
    done = subprocess.run(
        [sys.executable, "docs/make_combinations.py", "--check"], cwd=project_root, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_the_command_line_lists_by_hand_is_the_table(project_root: Path) -> None:
    """Kinds of quantization, whose module loads torch, stand in the help in the table's order."""
    page = " ".join((project_root / "docs" / "cli.md").read_text(encoding="utf-8").split())
    *kinds, last = KINDS
    assert f"hold the frozen base as {', '.join(kinds)} or {last}." in page
