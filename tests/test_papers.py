"""The recipes of the papers: each runs end to end on a tiny model, and asks for what the papers did."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from surgery import library
from surgery.manifest import read_document
from surgery.recipe import Recipe
from surgery.recipe_file import read_recipe
from surgery.rows import read_rows
from surgery.strict_yaml import parse_yaml
from surgery.workflow import run
from tests.console import Console

PAPERS = Path(__file__).resolve().parent.parent / "recipes" / "papers"
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax")
# Every recipe with its variants; none where it has none.
RECIPES: dict[str, tuple[str, ...]] = {
    "paca-cifar": ("cifar10", "cifar100"),
    "paca-gaudi2": (),
    "paca-mmlu": ("llama2-7b", "llama2-13b", "llama3-8b"),
    "paca-oasst1": (),
    "paca-oasst1-70b": (),
    "read-glue": GLUE,
}
RUNS = [(name, variant) for name, variants in RECIPES.items() for variant in variants or ("",)]

# What the authors' scripts say of each run (FACTS: the table in section 1; the scripts themselves), as dotted keys.
SCRIPTS: dict[str, dict[str, object]] = {
    "paca-mmlu": {
        "method": "paca", "paca.rank": 16, "paca.alpha": 64, "train.learning_rate": 1e-4, "train.batch_size": 2,
        "train.gradient_accumulation": 4, "data.max_length": 512, "train.epochs": 1, "train.precision": "bf16",
        "train.seed": 42,
    },
    "paca-oasst1": {
        "model": "meta-llama/Meta-Llama-3-8B", "paca.rank": 64, "paca.targets": ["all-linear"],
        "train.learning_rate": 5e-3, "train.batch_size": 4, "train.gradient_accumulation": 4,
        "train.lr_scheduler": "cosine", "train.epochs": 1, "train.seed": 42, "data.train": ["OpenAssistant/oasst1"],
    },
    "paca-oasst1-70b": {
        "paca.rank": 64, "paca.targets": ["all-linear"], "paca.quantize": "nf4", "train.learning_rate": 5e-3,
        "train.batch_size": 8, "train.gradient_accumulation": 2, "train.lr_scheduler": "cosine", "train.epochs": 1,
        "train.seed": 526, "data.train": ["OpenAssistant/oasst1"],
    },
    "paca-gaudi2": {
        "model": "meta-llama/Meta-Llama-3-8B", "paca.rank": 8, "train.learning_rate": 1.8e-3, "train.epochs": 2,
        "data.max_length": 512, "train.warmup_ratio": 0.03, "train.lr_scheduler": "cosine", "data.packing": True,
        "train.device": "hpu", "train.precision": "bf16", "data.train": ["timdettmers/openassistant-guanaco"],
    },
    "paca-cifar": {"method": "paca", "task": "image-classification"},
    "read-glue": {"method": "read", "read.cell": "gru", "read.hidden": 256},
}  # fmt: skip
MODELS = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
}
PUBLISHED = {
    "paca-mmlu": ("22 %", "16 %"),
    "paca-oasst1": ("22 %", "16 %"),
    "paca-oasst1-70b": (),
    "paca-gaudi2": ("16 %", "23 %"),
    "paca-cifar": (),
    "read-glue": ("-56 %", "-84 %", "54.1", "93.9", "87.7", "89.3", "88.6", "87.3", "93.7"),
}


def read(name: str, variant: str, *overrides: str, outputs: Path | None = None) -> Recipe:
    """One of the recipes."""
    chosen = [f"variant={variant}"] if variant else []
    return read_recipe(PAPERS / f"{name}.yaml", [*chosen, *overrides], outputs=outputs)


def value(recipe: Recipe, key: str) -> object:
    """What a recipe says under a dotted key."""
    found: object = recipe.model_dump()
    for part in key.split("."):
        assert isinstance(found, dict)
        found = found[part]
    return found


def flat(recipe: Recipe) -> dict[str, object]:
    """Every key of a recipe that can be changed, dotted."""
    result = {}
    for name, found in recipe.model_dump(exclude={"smoke", "variants"}).items():
        result |= {f"{name}.{key}": inner for key, inner in found.items()} if isinstance(found, dict) else {name: found}
    return result


def test_the_list_is_the_folder_s_whole_content() -> None:
    """A recipe, or a variant of one, that is not in the list above would not be run below."""
    found = {path.stem: parse_yaml(path.read_text("utf-8")) for path in PAPERS.iterdir() if path.suffix == ".yaml"}
    assert {name: tuple(document.get("variants", ())) for name, document in found.items()} == RECIPES
    assert {path.name for path in PAPERS.iterdir()} == {*(f"{name}.yaml" for name in RECIPES), "README.md", "smoke"}
    assert SCRIPTS.keys() == PUBLISHED.keys() == RECIPES.keys()


def test_the_library_lists_them() -> None:
    """By the names that `surgery run` takes, with the first line of each."""
    listed = {recipe.name: recipe for recipe in library.shipped()}
    for name, variants in RECIPES.items():
        assert listed[f"papers/{name}"].variants == variants
        assert (PAPERS / f"{name}.yaml").read_text("utf-8").startswith(f"# {listed[f'papers/{name}'].about}\n")


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_a_recipe_says_what_the_authors_scripts_say(name: str, variant: str) -> None:
    """Learning rate, rank, alpha, batch, epochs, schedule, seed; its method and export fit."""
    recipe = read(name, variant)
    assert {key: value(recipe, key) for key in SCRIPTS[name]} == SCRIPTS[name]
    assert recipe.model == MODELS.get(variant, recipe.model)
    assert not recipe.model.startswith("tiny:")
    recipe.spec()
    recipe.task_spec()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_the_published_figures_and_says_what_is_ours(name: str) -> None:
    """As comments, with the paper's address; each setting is marked with where it comes from."""
    text = (PAPERS / f"{name}.yaml").read_text("utf-8")
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert all(figure in comments for figure in PUBLISHED[name])
    assert ("2305.15348" if name == "read-glue" else "2503.01905") in comments
    lines, sections = text.splitlines(), {key.value: node for key, node in yaml.compose(text).value}
    for section in {"paca", "read", "train"} & sections.keys():
        for key, _ in sections[section].value:
            line = lines[key.start_mark.line]
            assert any(mark in line for mark in ("# script", "# code", "# ours")) or key.value == "device", line


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_smoke_changes_the_model_the_data_and_the_length_of_the_run(name: str, variant: str) -> None:
    """What a paper's run is about stays: method, rank, learning rate, schedule, format; outputs lie apart."""
    real, smoke = flat(read(name, variant)), flat(read(name, variant, "smoke=true"))
    changed = {key for key in real if real[key] != smoke[key]}
    assert changed <= {
        "model", "adapter", "export.out", "data.train", "data.eval", "data.max_length", "train.max_steps",
        "train.precision", "train.device", "train.batch_size",
    }  # fmt: skip
    assert {"model", "adapter", "export.out", "data.train", "train.max_steps"} <= changed
    assert str(smoke["adapter"]).endswith("smoke/adapter")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_a_recipe_s_smoke_runs_from_model_to_verified_export(name: str, variant: str, tmp_path: Path) -> None:
    """Apply, train, export and verify; a second run repeats nothing; nothing is written beside the smoke folder."""
    recipe = read(name, variant, "smoke=true", outputs=tmp_path)
    done = run(recipe)
    assert done.training.steps == 2
    assert done.verification is not None
    results = {check.result for check in done.verification.checks}
    assert results == ({"passed", "measured"} if recipe.paca.quantize else {"passed"})
    assert done.verification.max_logit_difference is not None
    assert set(read_document(done.adapter)["plan"]["spec"]) >= ({"rank"} if recipe.method == "paca" else {"cell"})
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "smoke" not in path.parts] == []
    assert run(recipe).skipped == ("apply", "train", "export")


@pytest.mark.slow
def test_a_recipe_runs_by_name_and_on_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    """`surgery run papers/..` writes below the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    settings = ("variant=llama3-8b", "smoke=true", "batch_size=1")
    result = json.loads(console("run", "papers/paca-mmlu", *settings, "--nproc", 2, "--json").out)
    assert result["adapter"] == str(tmp_path / "build/papers/paca-mmlu/llama3-8b/smoke/adapter")
    assert {check["result"] for check in result["verification"]["checks"]} == {"passed"}
    assert (tmp_path / "build/papers/paca-mmlu/llama3-8b/smoke/merged/model.safetensors").is_file()


def test_the_rows_of_the_smoke_runs_have_the_columns_of_the_real_files() -> None:
    """Those of the hub's tables and of Open Assistant's trees."""
    smoke, pair = PAPERS / "smoke", {"sentence1", "sentence2", "label", "idx"}
    columns = {
        "mmlu.jsonl": {"question", "subject", "choices", "answer"},
        "oasst.jsonl": {"message_tree_id", "tree_state", "prompt"},
        "guanaco.jsonl": {"text"},
        "cifar10.parquet": {"img", "label"},
        "cifar100.parquet": {"img", "fine_label", "coarse_label"},
        **{f"glue/{task}.jsonl": {"sentence", "label", "idx"} for task in ("cola", "sst2")},
        **{f"glue/{task}.jsonl": pair for task in ("mrpc", "stsb", "rte", "wnli")},
        **{f"glue/{task}.jsonl": {"premise", "hypothesis", "label", "idx"} for task in ("mnli", "ax")},
        "glue/qqp.jsonl": {"question1", "question2", "label", "idx"},
        "glue/qnli.jsonl": {"question", "sentence", "label", "idx"},
    }
    found = {str(path.relative_to(smoke)): path for path in smoke.rglob("*") if path.is_file()}
    assert found.keys() == columns.keys()
    for name, path in found.items():
        rows = list(read_rows(str(path), columns={}, default_split=None))
        assert len(rows) >= 4
        assert all(set(row.values) == columns[name] for row in rows), name


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (["recipes", "show", "papers/paca-mmul"], "no recipe of that name.*The closest is 'papers/paca-mmlu'"),
        (["recipes", "show"], "expected a name"),
        (["recipes", "list", "papers/paca-mmlu"], "expected no name"),
        (["run", "papers/paca-mmul"], "no recipe of that name"),
    ),
)
def test_a_recipe_that_is_not_there_is_named(words: list[str], message: str, console: Console) -> None:
    """Exit code 2, with the nearest name."""
    ended = console(*words)
    assert ended.code == 2
    assert re.search(message, ended.err), ended.err


def test_the_list_says_what_each_recipe_is_and_which_variants_it_has(console: Console) -> None:
    """A line for each, and one for its variants where it has some."""
    lines = console("recipes", "list").out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("papers/paca-mmlu "))
    assert lines[at].split(maxsplit=1)[1].startswith("PaCA on MMLU")
    assert lines[at + 1].split() == ["variant=llama2-7b,", "llama2-13b,", "llama3-8b"]
    assert lines[at + 2].startswith("papers/paca-oasst1 ")
    assert lines[at + 3].startswith("papers/paca-oasst1-70b ")
    assert lines[at + 4].startswith("papers/read-glue ")


def test_show_prints_the_file_as_it_stands(console: Console) -> None:
    """So that it can be written to a file and changed."""
    assert console("recipes", "show", "papers/read-glue").out == (PAPERS / "read-glue.yaml").read_text("utf-8")
