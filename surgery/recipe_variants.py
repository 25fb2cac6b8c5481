"""Named changes to a recipe: its variants, of which `variant=NAME` makes one, and the smoke run of `smoke=true`.

All are checked whenever the recipe is read, and what they write lies in folders of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError, require_known
from surgery.recipe import Recipe
from surgery.recipe_keys import known_keys
from surgery.strict_yaml import parse_yaml

SMOKE, VARIANTS = "smoke", "variants"
Layers = tuple[str, ...]  # what is laid over a recipe: a variant's name or none, and `smoke` or not


def split_switches(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`variant=NAME` and `smoke=true` by their names, and all other overrides."""
    pairs = [(text, *text.partition("=")) for text in overrides]
    switches = {key: value for _, key, equals, value in pairs if equals and key in ("variant", SMOKE)}
    return switches, [text for text, key, _, _ in pairs if key not in switches]


def combinations(document: dict[str, Any], where: str) -> Iterator[Layers]:
    """Every variant, with the smoke run and without. Raises: RecipeError for layers that are no mappings."""
    named, smoke = document.get(VARIANTS, {}), document.get(SMOKE, {})
    is_mapping = isinstance(named, dict) and all(isinstance(changes, dict) for changes in named.values())
    if not is_mapping or not all(isinstance(name, str) and name != SMOKE for name in named):
        raise RecipeError(where, f"{VARIANTS}: {named!r:.60}", expected="a mapping of names to changes")
    if not isinstance(smoke, dict):
        raise RecipeError(where, f"{SMOKE}: {smoke!r:.60}", expected="a mapping of changes")
    for name in named:
        yield (name,)
        if smoke or SMOKE in named[name]:
            yield (name, SMOKE)
    if smoke and not named:
        yield (SMOKE,)


def chosen_layers(document: dict[str, Any], switches: Mapping[str, str], where: str) -> Layers:
    """The layers that the switches ask for. Raises: RecipeError, RequestError."""
    names, variant = list(document.get(VARIANTS, {})), switches.get("variant")
    if variant is None and names:
        raise RecipeError(where, "no variant chosen", expected=f"variant=NAME, one of {', '.join(names)}")
    if variant is not None:
        require_known("variant", variant, names)
    asked = parse_yaml(switches.get(SMOKE, "false"))
    if not isinstance(asked, bool):
        raise RecipeError("override", f"{SMOKE}={switches[SMOKE]}", expected=f"{SMOKE}=true or {SMOKE}=false")
    layers = (() if variant is None else (variant,)) + ((SMOKE,) if asked else ())
    if asked and layers not in list(combinations(document, where)):
        raise RecipeError(where, f"{SMOKE}=true, and no section {SMOKE}", expected="one that says what it changes")
    return layers


def overlay(document: Mapping[str, Any], changes: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Changes laid over a recipe: sections key by key, and each key's value as a whole."""
    whole = set(known_keys(Recipe)) - {SMOKE}
    result = dict(document)
    for key, value in changes.items():
        before, full = document.get(key), f"{at}{key}"
        if isinstance(before, dict) and isinstance(value, dict) and full.removeprefix(f"{SMOKE}.") not in whole:
            result[key] = overlay(before, value, f"{full}.")
        else:
            result[key] = value
    return result


def set_apart(document: dict[str, Any], layers: Layers, stem: str) -> None:
    """What a variant or a smoke run writes lies in a folder of its own."""

    def own(text: object) -> object:
        return str(Path(text).parent.joinpath(*layers, Path(text).name)) if isinstance(text, str) else text

    if layers:
        document["adapter"] = own(document.get("adapter") or f"{stem}-{document.get('method', 'paca')}")
    export = document.get("export")
    if isinstance(export, dict) and "out" in export:
        document["export"] = {**export, "out": own(export["out"])}
