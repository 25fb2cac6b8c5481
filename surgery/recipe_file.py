"""A recipe read from its file, with overrides, a variant and the smoke run laid over it, and checked.

Overrides (`train.max_steps=50`, or `max_steps=50` where only one section has such a key) go through the same checks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from surgery.columns import FILE, is_file
from surgery.combinations import require as require_together
from surgery.errors import RecipeError, shorten
from surgery.recipe import PacaSection, Recipe, asked_of
from surgery.recipe_keys import apply_override, check
from surgery.recipe_variants import (
    SMOKE,
    VARIANTS,
    Layers,
    chosen_layers,
    combinations,
    overlay,
    set_apart,
    split_switches,
)
from surgery.strict_yaml import parse_yaml


def read_recipe(path: Path, overrides: Sequence[str] = (), *, outputs: Path | None = None) -> Recipe:
    """A recipe from YAML, with `key=value` overrides, `variant=NAME` and `smoke=true` among them.

    outputs: the folder that outputs are relative to (`..` left out), where it is not the recipe's.
    Raises: RecipeError, RequestError for an unknown variant.
    """
    document = _read_document(path)
    switches, given = split_switches(overrides)
    inner = next((text for text in given if text.startswith((f"{SMOKE}.", f"{VARIANTS}.", f"{VARIANTS}="))), None)
    if inner:
        raise RecipeError(
            "override", repr(inner), expected="the key that it changes", fix="Leave out what is before it"
        )
    for layers in combinations(document, str(path)):
        _settled(document, layers, given, path)
    recipe = _settled(document, chosen_layers(document, switches, str(path)), given, path)
    require_together(asked_of(recipe))
    return _rooted(recipe, path.parent, outputs)


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            str(path), f"it cannot be read ({shorten(str(error), 200)})", expected="a YAML file"
        ) from error
    if not isinstance(document, dict):
        raise RecipeError(str(path), "no mapping", expected="keys such as model, data and train")
    return document


def _settled(document: dict[str, Any], layers: Layers, overrides: Sequence[str], path: Path) -> Recipe:
    """The recipe with its layers and then the overrides laid over it. Raises: RecipeError."""
    where = ", ".join([str(path), *layers])
    document = copy.deepcopy(document)
    for name in layers:
        changes = document.pop(SMOKE) if name == SMOKE else document[VARIANTS][name]
        wrong = next((key for key in (VARIANTS, SMOKE) if key in changes and (name == SMOKE or key == VARIANTS)), None)
        if wrong:
            raise RecipeError(where, f"unknown key {wrong!r}", expected="keys that can be changed")
        document = overlay(document, changes)
    set_apart(document, layers, path.stem)
    for text in overrides:
        apply_override(document, text)
    recipe: Recipe = check(Recipe, document, where)
    return recipe


def _rooted(recipe: Recipe, folder: Path, outputs: Path | None) -> Recipe:
    """Relative paths that exist beside the recipe become paths to there; outputs always do, or to below `outputs`."""

    def source(text: str) -> str:
        return str(folder / text) if (folder / text).exists() else text

    def output(text: str | None) -> str | None:
        if text and outputs is not None and not Path(text).is_absolute():
            return str(outputs.joinpath(*(part for part in Path(text).parts if part != "..")))
        return str(folder / text) if text else None

    train, evals = [source(t) for t in recipe.data.train], [source(t) for t in recipe.data.eval]
    changes: dict[str, Any] = {
        "model": source(recipe.model),
        "adapter": output(recipe.adapter),
        "data": recipe.data.model_copy(update={"train": train, "eval": evals}),
        "export": recipe.export.model_copy(update={"out": output(recipe.export.out)}),
    }
    if "paca" in recipe.model_fields_set:
        changes["paca"] = _rooted_columns(recipe.paca, source)
    return recipe.model_copy(update=changes)


def _rooted_columns(section: PacaSection, source: Callable[[str], str]) -> PacaSection:
    """What columns are chosen by: files beside the recipe."""
    changes: dict[str, Any] = {}
    if is_file(section.select):
        changes["select"] = FILE + source(section.select.removeprefix(FILE))
    if section.calibration_data:
        changes["calibration_data"] = [source(name) for name in section.calibration_data]
    return section.model_copy(update=changes)
