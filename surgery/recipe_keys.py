"""The keys of a recipe: which there are, values checked and set by key, and errors that name the nearest one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from surgery.errors import RecipeError, closest
from surgery.recipe import Recipe
from surgery.strict_yaml import parse_yaml


def apply_override(document: dict[str, Any], text: str) -> None:
    """Set `section.key=value`, the value read as YAML. Raises: RecipeError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError("override", repr(text), expected="key=value, such as train.max_steps=50")
    *parents, last = qualified(key).split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise RecipeError("override", f"{key!r}: {parent} is no section", expected="section.key=value")
    try:
        document[last] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError("override", f"{text!r} does not parse", expected="a YAML value") from error


def qualified(key: str) -> str:
    """`max_steps` as `train.max_steps`. Raises: RecipeError for an unknown key, or one that several sections have."""
    known = list(known_keys(Recipe))
    first = key.split(".", maxsplit=1)[0]
    if key in known or (first in Recipe.model_fields and "." in key) or first in Recipe.model_fields:
        return key
    homes = [full for full in known if full.split(".")[-1] == key]
    if len(homes) > 1:
        raise RecipeError("override", f"{key!r} could be {' or '.join(homes)}", expected="section.key=value")
    if not homes:
        tails = {full.split(".")[-1]: full for full in known}
        raise RecipeError(
            "override", f"unknown key {key!r}", expected="a key of the recipe", fix=closest(key, [*known, *tails])
        )
    return homes[0]


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a recipe, dotted."""
    for name, entry in model.model_fields.items():
        kind = entry.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def describe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, dotted."""
    rows: list[tuple[str, str, str]] = []
    for name, entry in model.model_fields.items():
        kind = entry.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows += describe_keys(kind, f"{prefix}{name}.")
        else:
            default = "required" if entry.is_required() else json.dumps(entry.default)
            rows.append((f"{prefix}{name}", default, entry.description or ""))
    return rows


def check(model: type[Any], document: dict[str, Any], where: str) -> Any:
    """A section from plain data. Raises: RecipeError that names the first wrong key, and the nearest right one."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            siblings = _fields_at(model, first["loc"][:-1])
            raise RecipeError(
                where,
                f"unknown key {key!r}",
                expected=f"one of {', '.join(siblings)}",
                fix=closest(str(first["loc"][-1]), siblings),
            ) from error
        if first["type"] == "missing":
            raise RecipeError(where, f"{key} is missing", expected="it to be given") from error
        raise RecipeError(where, f"{key}: {first['input']!r}", expected=_plain(first)) from error


def _plain(entry: Mapping[str, Any]) -> str:
    """What pydantic expected, as the end of a sentence that begins with `expected`."""
    if entry["type"] == "model_type":
        return "a section with keys of its own"
    message = str(entry["msg"]).removeprefix("Input should be ").removesuffix(".")
    return f"a number {message}" if message.startswith(("greater", "less")) else message[:1].lower() + message[1:]


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        kind = model.model_fields[str(part)].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)
