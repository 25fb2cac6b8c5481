"""Recipes: strict, overridable, relative to themselves; and `run`, which repeats nothing that is done."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from surgery.checkpoint import RECORD_FILE
from surgery.delta import ADAPTER_FILE
from surgery.errors import (
    BaseMismatchError,
    DataError,
    OutputExistsError,
    RecipeError,
    RequestError,
    SurgeryError,
    UnsupportedError,
)
from surgery.lookup import METHODS
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.recipe import Recipe
from surgery.recipe_file import read_recipe
from surgery.recipe_keys import check, describe_keys, known_keys
from surgery.strict_yaml import parse_yaml
from surgery.workflow import METHOD_EXPORTS, RunResult, run
from tests.conftest import TinyModel, digest_folder
from tests.examples import LABELLED, TEXTS, write_rows

Read = Callable[..., Recipe]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a recipe from text, with overrides."""

    def call(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return read_recipe(path, overrides)

    return call


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("model: m\ntrian: {}", r"unknown key 'trian', expected one of model, .*\. The closest is 'train'"),
        ("model: m\ntrain: {learing_rate: 1}", r"unknown key 'train\.learing_rate'.*The closest is 'learning_rate'"),
        ("model: m\npaca: {rang: 4}", r"unknown key 'paca\.rang', expected one of rank, .*The closest is 'rank'"),
        ("model: m\ntrain: {max_steps: ten}", r"train\.max_steps: 'ten', expected a valid integer\."),
        ("model: m\ntrain: {max_steps: 1.5}", r"train\.max_steps: 1\.5, expected a valid integer"),
        ("model: m\ntrain: {max_steps: 0}", r"train\.max_steps: 0, expected a number greater than or equal to 1"),
        ("model: m\ntrain: {batch_size: true}", r"train\.batch_size: True, expected a valid integer"),
        ("model: m\ntrain: {learning_rate: '1'}", r"train\.learning_rate: '1', expected a valid number"),
        ("model: m\ntrain: {learning_rate: .inf}", r"train\.learning_rate: inf, expected a finite number"),
        ("model: m\ntrain: {lr_scheduler: cosin}", r"'cosin', expected 'linear', 'cosine', "),
        ("model: m\ndata: {train: a.jsonl}", r"data\.train: 'a\.jsonl', expected a valid list"),
        ("model: m\ndata: {columns: {text: 0}}", r"data\.columns\.text: 0, expected a valid string"),
        ("model: m\nexport: {dtype: fp8}", r"export\.dtype: 'fp8', expected 'keep', "),
        ("model: m\ndata:", r"data: None, expected a section"),
        ("model: m\ntrain: 3", r"train: 3, expected a section"),
        ("train: {}", r"model is missing"),
        ("model: m\nmodel: n", r"the key 'model' stands twice"),
        ("model: m\ntrain: {seed: 1, seed: 2}", r"the key 'seed' stands twice"),
        ("- model", r"no mapping, expected keys such as model"),
        ("", r"no mapping"),
        ("a: [", r"it cannot be read .* expected a YAML file"),
        ("model: !!python/object:os.system m", r"it cannot be read"),
    ),
)
def test_a_wrong_recipe_is_refused(text: str, message: str, read: Read, tmp_path: Path) -> None:
    """Unknown keys with the nearest, wrong types with the value, what is missing: exit code 2, the file first."""
    with pytest.raises(RecipeError, match=message) as caught:
        read(text)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(str(tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    """Or is no text."""
    with pytest.raises(RecipeError, match=r"none\.yaml: it cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml: it cannot be read"):
        read_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    (("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.e2", 100.0), (".5e-3", 5e-4), ("3", 3), ("1e", "1e")),
)
def test_scientific_notation_is_a_number(text: str, value: object) -> None:
    """YAML 1.1 would read `1e-3` as text."""
    assert parse_yaml(f"x: {text}") == {"x": value}


@given(st.floats(1e-300, 1e300))
def test_any_float_as_python_prints_it_is_read_back(value: float) -> None:
    """What a person copies from a log is the number."""
    assert parse_yaml(f"x: {value!r}")["x"] == value


# --- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    (
        ("train.max_steps=7", 7),
        ("max_steps=7", 7),
        ("max_steps=null", None),
        (" max_steps = 7".replace(" ", ""), 7),
    ),
)
def test_overrides_hold(override: str, expected: object, read: Read) -> None:
    """With or without the section's name, over what the file says."""
    assert read("model: m\ntrain: {max_steps: 3}", override).train.max_steps == expected


def test_overrides_take_any_yaml_and_the_last_holds(read: Read) -> None:
    """Lists, mappings, numbers, truth values; sections that the file lacks appear."""
    recipe = read(
        "model: m",
        "paca.targets=[q_proj, v_proj]", "data.columns={text: '0'}", "data.columns.label='1'", "learning_rate=1e-3",
        "packing=false", "model=other", "rank=4", "rank=8",
    )  # fmt: skip
    assert recipe.paca.targets == ["q_proj", "v_proj"]
    assert recipe.data.columns == {"text": "0", "label": "1"}
    assert (recipe.train.learning_rate, recipe.data.packing) == (1e-3, False)
    assert (recipe.model, recipe.paca.rank) == ("other", 8)


@pytest.mark.parametrize(
    ("override", "message"),
    (
        ("seed=1", r"'seed' could be paca\.seed or read\.seed or data\.seed or train\.seed"),
        ("learnin_rate=1", r"unknown key 'learnin_rate'.*The closest is 'learning_rate'"),
        ("train.learnin_rate=1", r"unknown key 'train\.learnin_rate'.*The closest is 'learning_rate'"),
        ("nonsense.key=1", r"unknown key 'nonsense\.key'"),
        ("train=1", r"train: 1, expected a section"),
        ("train.max_steps.x=1", r"train\.max_steps: \{'x': 1\}, expected a valid integer"),
        ("learning_rate", r"'learning_rate', expected key=value, such as"),
        ("=3", r"'=3', expected key=value"),
        ("max_steps=[", r"'max_steps=\[' does not parse"),
        ("max_steps=x", r"train\.max_steps: 'x', expected a valid integer"),
    ),
)
def test_a_wrong_override_is_refused(override: str, message: str, read: Read) -> None:
    """Ambiguous, unknown, malformed or of the wrong type: the same checks as the file's."""
    with pytest.raises(RecipeError, match=message):
        read("model: m", override)


def test_an_override_below_something_that_is_no_section(read: Read) -> None:
    """The message says which part is none."""
    with pytest.raises(RecipeError, match="train is no section"):
        read("model: m\ntrain: 3", "train.max_steps=4")


# --- keys


def test_every_key_is_described(read: Read) -> None:
    """`surgery settings` lists each key once; its default, put into a recipe, changes nothing."""
    rows = describe_keys()
    assert [key for key, _, _ in rows] == list(known_keys(Recipe))
    assert len({key for key, _, _ in rows}) == len(rows)
    assert [key for key, default, _ in rows if default == "required"] == ["model"]
    given = [f"{key}={default}" for key, default, _ in rows if key not in ("model", "variants", "smoke")]
    assert read("model: m", *given) == read("model: m")
    lines = {key: text for key, _, text in rows}
    assert lines["data.max_length"] == "tokens"


def test_the_sections_take_what_the_libraries_take() -> None:
    """A section's defaults are those of the record that it becomes."""
    recipe = check(Recipe, {"model": "m", "data": {"train": ["x"]}}, "test")
    assert recipe.spec() == PacaSpec()
    assert check(Recipe, {"model": "m", "method": "read"}, "test").spec() == ReadSpec()
    assert recipe.data.spec().train == ("x",)
    with pytest.raises(DataError, match=r"data\.train: found no file"):
        check(Recipe, {"model": "m"}, "test").data.spec()
    with pytest.raises(RequestError, match=r"unknown task 'clasification'.*classification"):
        check(Recipe, {"model": "m", "task": "clasification"}, "test").task_spec()


SAID = {
    "paca": {
        "rank": 2, "targets": ["a"], "exclude": ["b"], "rank_pattern": {"c": 1}, "alpha": 2.0, "seed": 3,
        "experts": "own", "quantize": "nf4", "rows": ["d", 7],
    },
    "paca, by data": {
        "select": "gradient", "budget": "5%", "resample": "every:3", "calibration_data": ["z"],
        "calibration_columns": {"text": "t"}, "calibration_rows": 3, "calibration_length": 8,
    },
    "read": {
        "cell": "lstm", "hidden": 8, "recurrent_layers": 2, "bidirectional": True, "initial": "embedding",
        "reduce": "mean", "output_norm": True, "scale": 0.5, "layers": "last:1", "stacks": "encoder", "joiner": "mean",
        "pooling": "first", "seed": 3,
    },
    "data": {
        "train": ["x"], "eval": ["y"], "format": "text", "columns": {"text": "t"}, "max_length": 9, "packing": False,
        "pack_examples": True, "max_rows": 5, "seed": 4, "horizontal_flip": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_a_section_says_arrives_in_its_record(name: str) -> None:
    """Every key is set to other than its default (one has no other value here), and none is lost on the way."""
    said, name = SAID[name], name.partition(",")[0]
    document = {"model": "m", name: said, **({} if name == "data" else {"method": name})}
    recipe = check(Recipe, document, "test")
    section, default = getattr(recipe, name).model_dump(), getattr(check(Recipe, {"model": "m"}, "test"), name)
    ever_said = {key for key_of, entry in SAID.items() if key_of.partition(",")[0] == name for key in entry}
    assert set(section) - ever_said <= {"eval_fraction"}
    assert not {key for key, value in said.items() if value == getattr(default, key)}
    spec = recipe.data.spec() if name == "data" else recipe.spec()
    assert {k: getattr(spec, k) for k in said} == {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}


@pytest.mark.parametrize(
    ("given", "text"), (("3", "3"), ("[0, 3]", "0,3"), ("'0,3'", "0,3"), ("last:2", "last:2"), ("[2]", "2"))
)
def test_layers_may_be_numbers(given: str, text: str, read: Read) -> None:
    """A number and a list of them are what YAML makes of what the help shows."""
    recipe = read(f"model: m\nmethod: read\nread: {{layers: {given}}}")
    assert recipe.read.layers == text
    assert recipe.spec() == ReadSpec(layers=text)
    assert read("model: m\nmethod: read", f"read.layers={given}") == recipe


@pytest.mark.parametrize("given", ("true", "1.5", "[0, true]", "[0, x]", "[]", "{a: 1}", "null"))
def test_layers_are_nothing_else(given: str, read: Read) -> None:
    """Neither truth values nor parts of a layer."""
    with pytest.raises(RecipeError, match=r"read\.layers: .*expected a valid string"):
        read(f"model: m\nmethod: read\nread: {{layers: {given}}}")


def test_the_settings_of_another_method_are_refused() -> None:
    """A setting that would be ignored is an error that says which method has it."""
    recipe = check(Recipe, {"model": "m", "paca": {"rank": 4}, "method": "read"}, "test")
    with pytest.raises(RecipeError, match=r"settings of paca \(rank\), and method read.*Set method: paca"):
        recipe.spec()


# --- paths


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that exist there, outputs always; hub ids and absolute paths stay as they are."""
    folder = tmp_path / "recipes"
    (folder / "model").mkdir(parents=True)
    for name in ("rows.jsonl", "held.jsonl"):
        (folder / name).write_text("")
    document = {
        "model": "model", "adapter": "out/adapter", "export": {"out": "out/merged"},
        "data": {"train": ["rows.jsonl", "org/set"], "eval": ["held.jsonl", str(tmp_path / "absolute.csv")]},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(Path("recipes") / "recipe.yaml")
    assert recipe.model == "recipes/model"
    assert (recipe.adapter, recipe.export.out) == ("recipes/out/adapter", "recipes/out/merged")
    assert recipe.data.train == ["recipes/rows.jsonl", "org/set"]
    assert recipe.data.eval == ["recipes/held.jsonl", str(tmp_path / "absolute.csv")]


# --- run


@pytest.fixture
def project(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A folder with a model, data and a recipe that trains a language model in a second."""
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    document = {
        "model": "model", "paca": {"rank": 4}, "data": {"train": ["text.txt"], "max_length": 32},
        "train": {"max_steps": 4, "learning_rate": 0.02, "batch_size": 4},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    return tmp_path


def run_recipe(project: Path, *overrides: str, overwrite: bool = False) -> RunResult:
    """Carry the recipe out."""
    return run(read_recipe(project / "recipe.yaml", overrides), overwrite=overwrite)


def test_a_run_goes_all_the_way(project: Path) -> None:
    """Apply, train, export, verify; folders are named after the model; it says what it does."""
    said: list[str] = []
    result = run(read_recipe(project / "recipe.yaml"), say=said.append)
    assert (result.adapter, result.merged) == (project / "model-paca", project / "model-paca-merged")
    assert result.skipped == ()
    assert result.verification is not None
    assert result.verification.max_logit_difference == 0
    assert [line.split(":")[0] for line in said] == ["apply", "train", "export"]
    assert result.training.steps == 4


def test_a_run_verifies_unless_told_otherwise(project: Path) -> None:
    """`export.verify: false` leaves the check out."""
    assert run_recipe(project, "export.verify=false").verification is None


def test_a_second_run_repeats_nothing(project: Path) -> None:
    """Every step is recognised; no file is written."""
    first = run_recipe(project)
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    second = run_recipe(project)
    assert second.skipped == ("apply", "train", "export")
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before
    assert second.training == replace(first.training, was_finished=True)


def test_only_what_is_missing_is_done_again(project: Path) -> None:
    """Without the merged folder: the export. Without the adapter: training, whose export no longer fits."""
    run_recipe(project)
    merged, adapter = digest_folder(project / "model-paca-merged"), digest_folder(project / "model-paca")
    shutil.rmtree(project / "model-paca-merged")
    result = run_recipe(project)
    assert result.skipped == ("apply", "train")
    assert digest_folder(project / "model-paca-merged") == merged
    assert digest_folder(project / "model-paca") == adapter


def test_another_plan_is_no_repetition(project: Path) -> None:
    """With another rank, seed or target the adapter there is refused, untouched; --overwrite makes it anew."""
    run_recipe(project)
    before = digest_folder(project)
    for override in ("paca.rank=8", "paca.seed=1", "paca.targets=[q_proj]", "task=sequence-classification"):
        with pytest.raises(OutputExistsError, match=r"another plan made.*--overwrite"):
            run_recipe(project, override)
        assert digest_folder(project) == before
    result = run_recipe(project, "paca.rank=8", overwrite=True)
    assert result.skipped == ()
    assert result.training.trained_values > 0
    assert json.loads((project / "model-paca" / RECORD_FILE).read_text())["plan"]["spec"]["rank"] == 8


def test_a_changed_base_is_no_repetition(project: Path, tiny_model: TinyModel) -> None:
    """A model of other weights in the same folder: refused before anything is written."""
    run_recipe(project)
    shutil.copy(tiny_model("llama", seed=1) / "model.safetensors", project / "model" / "model.safetensors")
    shutil.rmtree(project / "model-paca-merged")
    before = digest_folder(project)
    with pytest.raises(BaseMismatchError, match="of the base this adapter was made for"):
        run_recipe(project)
    assert digest_folder(project) == before


def test_other_settings_train_on_from_there(project: Path) -> None:
    """Another training of the same plan is a new run; the export of the first is then refused, not replaced."""
    run_recipe(project)
    old = (project / "model-paca" / ADAPTER_FILE).read_bytes()
    with pytest.raises(OutputExistsError, match="not this adapter's export"):
        run_recipe(project, "train.max_steps=6")
    assert (project / "model-paca" / ADAPTER_FILE).read_bytes() != old
    assert run_recipe(project, "train.max_steps=6", "export.out=second").skipped == ("apply", "train")
    assert (project / "second" / "model.safetensors").is_file()


def test_an_export_in_another_dtype_is_another_export(project: Path) -> None:
    """What lies there is neither taken for it nor replaced."""
    run_recipe(project)
    before = digest_folder(project)
    with pytest.raises(OutputExistsError, match="not this adapter's export"):
        run_recipe(project, "export.dtype=bf16")
    assert digest_folder(project) == before


def test_an_export_in_other_shards_is_another_export(project: Path) -> None:
    """The same shards are recognised; others are asked for in vain while a folder is in their place."""
    assert run_recipe(project, "export.max_shard_size=20KB").skipped == ()
    assert run_recipe(project, "export.max_shard_size=20KB").skipped == ("apply", "train", "export")
    with pytest.raises(OutputExistsError, match="not this adapter's export"):
        run_recipe(project)


def test_a_lora_export_is_recognised(project: Path) -> None:
    """A second run repeats nothing in this format either, and a dense export is not taken for it."""
    assert run_recipe(project, "export.format=lora").skipped == ()
    assert run_recipe(project, "export.format=lora").skipped == ("apply", "train", "export")
    with pytest.raises(OutputExistsError, match="not this adapter's export"):
        run_recipe(project, "export.out=model-paca-lora")


WRONG_EXPORTS: tuple[tuple[str, type[SurgeryError], str], ...] = (
    ("export.format=onxx", RequestError, r"export\.format: unknown name 'onxx'"),
    ("export.max_shard_size=huge", RequestError, r"--max-shard-size: 'huge' .*expected a size such as 5GB\.$"),
    ("export.format=remote-code", UnsupportedError, r"export\.format: remote-code: a PaCA adapter .*expected a READ"),
    ("export.format=remote-code", UnsupportedError, r"Set export\.format to safetensors, lora, peft-paca or onnx\.$"),
    ("method=read", UnsupportedError, r"export\.format: safetensors: a READ adapter .*expected a PaCA adapter"),
    ("method=read", UnsupportedError, r"Set export\.format to remote-code or onnx\.$"),
    ("method=read export.format=lora", UnsupportedError, r"export\.format: lora: a READ adapter"),
    ("method=read export.format=remote-code export.dtype=bf16", RequestError, r"export\.dtype: 'bf16', expected keep"),
    (
        "export.format=lora export.dtype=fp16",
        RequestError,
        r"export\.dtype: 'fp16', expected keep with export.format l",
    ),
)


@pytest.mark.parametrize(("overrides", "kind", "match"), WRONG_EXPORTS)
def test_a_wrong_export_is_refused_before_anything_is_done(
    overrides: str, kind: type[SurgeryError], match: str, project: Path
) -> None:
    """Not after hours of training; with what can be written instead."""
    path = project / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "paca"}))
    before = digest_folder(project)
    with pytest.raises(kind, match=match):
        run_recipe(project, *overrides.split())
    assert digest_folder(project) == before


def test_onnx_is_asked_for_before_training(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its extra nothing is begun; each method says what it can be written as."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnx", "onnx_ir") or "exporters.onnx" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    before = digest_folder(project)
    with pytest.raises(UnsupportedError, match=r"not installed.*checkpoint-surgery\[onnx\]"):
        run_recipe(project, "export.format=onnx")
    assert digest_folder(project) == before
    assert set(METHOD_EXPORTS) == set(METHODS)


def test_a_classifier_runs_twice_too(project: Path) -> None:
    """Its head is planned when the labels are read: the second run knows the first one's plan."""
    write_rows(project / "rows.csv", LABELLED)
    overrides = ("task=sequence-classification", "data.train=[rows.csv]")
    assert run_recipe(project, *overrides).skipped == ()
    assert run_recipe(project, *overrides).skipped == ("apply", "train", "export")
    with pytest.raises(OutputExistsError, match="another plan"):
        run_recipe(project, *overrides, "labels=[person, animal]")


def test_an_unknown_method_is_refused(project: Path) -> None:
    """Before anything is written."""
    with pytest.raises(RequestError, match=r"unknown name 'pacca'.*The closest is 'paca'"):
        run_recipe(project, "method=pacca")
    assert not (project / "model-paca").exists()
