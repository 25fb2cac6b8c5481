"""Variants and smoke runs of a recipe: laid over it key by key, always checked, written apart; tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surgery import library
from surgery.backends import shared_arguments
from surgery.checkpoint import Checkpoint
from surgery.cli import main
from surgery.errors import RecipeError, RequestError, SurgeryError
from surgery.forecast import Question, forecast
from surgery.memory.run import Run
from surgery.memory.subject import open_subject
from surgery.methods.paca_spec import PacaSpec
from surgery.operate import apply
from surgery.recipe import Recipe, TrainSection
from surgery.recipe_file import read_recipe
from surgery.survey import TaskSpec
from surgery.tiny import FAMILIES, write_tiny
from surgery.workflow import run
from tests.conftest import digest_folder
from tests.examples import write_rows

Read = Callable[..., Recipe]
TEXT = """
model: org/large
adapter: ../out/adapter
paca: {rank: 16, rank_pattern: {q_proj: 8}}
data: {train: [real.jsonl], max_length: 512}
train: {epochs: 3, seed: 1}
export: {out: ../out/merged}
variants:
  small: {model: org/small, paca: {rank: 4, rank_pattern: {v_proj: 2}}, smoke: {data: {train: [small.jsonl]}}}
  plain: {}
smoke: {model: tiny:llama, data: {train: [few.jsonl]}, train: {max_steps: 2}}
"""
SIMPLE = "model: m\ndata: {train: [a]}\n"


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a recipe from text, with overrides."""

    def call(text: str, *overrides: str, outputs: Path | None = None) -> Recipe:
        path = tmp_path / "recipes" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return read_recipe(path, overrides, outputs=outputs)

    return call


def test_a_variant_changes_the_keys_that_it_names(read: Read) -> None:
    """Sections key by key; a key's value as a whole, mappings of patterns too; the rest stays."""
    recipe = read(TEXT, "variant=small")
    assert (recipe.model, recipe.paca.rank, recipe.paca.rank_pattern) == ("org/small", 4, {"v_proj": 2})
    assert (recipe.data.train, recipe.data.max_length, recipe.train.epochs) == (["real.jsonl"], 512, 3)
    plain = read(TEXT, "variant=plain")
    assert (plain.model, plain.paca.rank, plain.paca.rank_pattern) == ("org/large", 16, {"q_proj": 8})


def test_smoke_lies_over_the_variant_and_overrides_over_both(read: Read) -> None:
    """What a variant says of the smoke run holds for it."""
    recipe = read(TEXT, "smoke=true", "variant=small", "max_steps=5")
    assert (recipe.model, recipe.paca.rank, recipe.data.train) == ("tiny:llama", 4, ["small.jsonl"])
    assert (recipe.train.max_steps, recipe.train.seed) == (5, 1)
    assert read(TEXT, "variant=plain", "smoke=true").data.train == ["few.jsonl"]
    assert read(TEXT, "variant=plain", "smoke=false") == read(TEXT, "variant=plain")


def test_each_writes_into_a_folder_of_its_own(read: Read, tmp_path: Path) -> None:
    """Beside one another, so that a smoke run never touches a real one's; by name, below the folder given."""
    here = tmp_path / "recipes" / "../out"
    cases = {
        ("variant=small",): here / "small",
        ("variant=plain",): here / "plain",
        ("variant=plain", "smoke=true"): here / "plain" / "smoke",
    }
    for overrides, folder in cases.items():
        recipe = read(TEXT, *overrides)
        assert (recipe.adapter, recipe.export.out) == (str(folder / "adapter"), str(folder / "merged"))
    elsewhere = read(TEXT, "variant=plain", "smoke=true", outputs=tmp_path / "x")
    assert elsewhere.adapter == str(tmp_path / "x" / "out" / "plain" / "smoke" / "adapter")
    assert read(TEXT, "variant=plain", "adapter=here").adapter == str(tmp_path / "recipes" / "here")


def test_what_names_no_folder_gets_one_by_the_recipe_s_name(read: Read, tmp_path: Path) -> None:
    """Only where it is a variant or a smoke run: else the model's name decides, as ever."""
    text = SIMPLE + "smoke: {model: tiny:llama}"
    assert read(text).adapter is None
    assert read(text, "smoke=true").adapter == str(tmp_path / "recipes" / "smoke" / "mine-paca")


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    (
        (TEXT, (), r"mine\.yaml: no variant chosen, expected variant=NAME, one of small, plain"),
        (TEXT, ("variant=smal",), r"variant: unknown name 'smal', expected one of small, plain\. The closest is"),
        (SIMPLE, ("variant=x",), r"variant: unknown name 'x'"),
        (SIMPLE, ("smoke=true",), r"smoke=true, and no section smoke, expected one that says what it changes"),
        (TEXT, ("variant=plain", "smoke=perhaps"), r"smoke=perhaps, expected smoke=true or smoke=false"),
        (TEXT, ("variant=plain", "smoke.model=x"), r"'smoke\.model=x', expected the key that it changes"),
        (TEXT, ("variant=plain", "variants={}"), r"'variants=\{\}', expected the key that it changes"),
        (SIMPLE + "smoke: {modl: x}", (), r"mine\.yaml, smoke: unknown key 'modl'.*The closest is 'model'"),
        (SIMPLE + "smoke: {train: {max_step: 1}}", (), r", smoke: unknown key 'train\.max_step'.*'max_steps'"),
        (SIMPLE + "smoke: {train: {max_steps: x}}", (), r", smoke: train\.max_steps: 'x', expected a valid integer"),
        (SIMPLE + "smoke: {smoke: {model: x}}", (), r", smoke: unknown key 'smoke'"),
        (SIMPLE + "smoke: 3", (), r"smoke: 3, expected a mapping of changes"),
        (SIMPLE + "variants: {a: {modl: x}, b: {}}", ("variant=b",), r"mine\.yaml, a: unknown key 'modl'"),
        (SIMPLE + "variants: {a: {variants: {}}}", ("variant=a",), r", a: unknown key 'variants'"),
        (SIMPLE + "variants: {a: {smoke: {modl: x}}}", ("variant=a",), r", a, smoke: unknown key 'modl'"),
        (SIMPLE + "variants: {smoke: {}}", (), r"variants: .*, expected a mapping of names to changes"),
        (SIMPLE + "variants: {10: {}}", (), r"variants: \{10: .*, expected a mapping of names to changes"),
        (SIMPLE + "variants: [a]", (), r"variants: \['a'\], expected a mapping of names to changes"),
    ),
)
def test_what_does_not_hold_is_refused_when_the_recipe_is_read(
    text: str, overrides: tuple[str, ...], message: str, read: Read
) -> None:
    """Also of a variant that was not asked for, and of a smoke run that is not run."""
    with pytest.raises((RecipeError, RequestError), match=message) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "steps", "expected"), (({"warmup_ratio": 0.03}, 101, 4), ({"warmup_steps": 7}, 101, 7), ({}, 9, 0))
)
def test_the_warm_up_may_be_a_part_of_the_steps(given: dict[str, float], steps: int, expected: int) -> None:
    """Rounded up, as transformers does it; the two ways exclude each other (see test_images)."""
    arguments = shared_arguments(TrainSection(**given), folder=Path("x"), steps=steps, has_eval=False)
    assert arguments["warmup_steps"] == expected


# --- tiny models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_the_same_whenever_it_is_made(family: str, tmp_path: Path) -> None:
    """Byte for byte, whatever the generator's state; one that is there is left alone."""
    first = write_tiny(f"tiny:{family}", tmp_path / "first")
    torch.rand(3)
    assert digest_folder(write_tiny(f"tiny:{family}", tmp_path / "second")) == digest_folder(first)
    assert Checkpoint.open(first).size_bytes < 1_000_000
    (first / "mine").write_text("x")
    assert (write_tiny(f"tiny:{family}", first) / "mine").is_file()


def test_a_family_that_is_not_made_is_named(read: Read, tmp_path: Path) -> None:
    """Before anything is written."""
    recipe = read("model: tiny:lama\nadapter: a\ndata: {train: [a.jsonl]}")
    with pytest.raises(RequestError, match=r"model: unknown name 'lama', expected one of llama, t5, vit\. The closest"):
        run(recipe)
    assert [path.name for path in (tmp_path / "recipes").iterdir()] == ["mine.yaml"]


def test_train_and_plan_take_variants_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`surgery train -c` their data and settings, `surgery plan` the whole; a setting of one's own lies on top."""
    model = write_tiny("tiny:llama", tmp_path / "model")
    apply(model, tmp_path / "adapter", PacaSpec(rank=2))
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    text = (
        f"model: {model}\ntrain: {{batch_size: 2, max_steps: 9}}\n"
        "variants: {quick: {train: {max_steps: 2}, data: {train: [rows.jsonl]}, paca: {rank: 5}}}\n"
        "smoke: {train: {max_steps: 3}}\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    steps = {("variant=quick",): 2, ("variant=quick", "smoke=true"): 3, ("variant=quick", "max_steps=4"): 4}
    for settings, expected in steps.items():
        main(["train", str(tmp_path / "adapter"), "-c", str(recipe), *settings, "--json"])
        assert json.loads(capfd.readouterr().out)["steps"] == expected
    wanted = open_subject(model, "paca", PacaSpec(rank=5), TaskSpec(), Run())
    assert forecast(str(recipe), Question(), ["variant=quick"]).trained_values == wanted.trained_values
    with pytest.raises(RecipeError, match="no variant chosen"):
        forecast(str(recipe), Question())


# --- the library


def test_every_recipe_of_the_library_can_be_read() -> None:
    """With each of its variants; its name and its first line say what it is."""
    shipped = library.shipped()
    assert {"distributed/fsdp2", "distributed/zero3", "sentiment/read"} < {recipe.name for recipe in shipped}
    for recipe in shipped:
        assert recipe.about.endswith("."), recipe.name
        for variant in recipe.variants or ("",):
            read_recipe(recipe.path, [f"variant={variant}"] if variant else [])


def test_a_file_is_taken_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there, or ends as a recipe does, is a path; its outputs are its own folder's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text(SIMPLE)
    assert library.locate("mine") == (Path("mine"), None)
    assert library.locate("gone.yaml") == (Path("gone.yaml"), None)
    assert library.locate("papers/read-glue") == (library.FOLDER / "papers" / "read-glue.yaml", tmp_path)
    with pytest.raises(SurgeryError, match="no recipe of that name"):
        library.locate("papers")
