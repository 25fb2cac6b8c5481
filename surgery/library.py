"""The recipes that are shipped: those folders of the repository's `recipes/` that `surgery/recipes` has links to.

A recipe's name is its path there without the suffix, such as `papers/paca-mmlu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from surgery.checkpoint import RECIPE_ENDINGS
from surgery.errors import RequestError, closest
from surgery.recipe_variants import VARIANTS
from surgery.strict_yaml import parse_yaml

FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Shipped:
    """A recipe of the library: its name, its file, what its first comment says, and its variants."""

    name: str
    path: Path
    about: str
    variants: tuple[str, ...]


def shipped() -> list[Shipped]:
    """Every recipe of the library, by name."""
    return sorted(_read_all(), key=lambda recipe: recipe.name)


def _read_all() -> Iterator[Shipped]:
    for path in FOLDER.glob("*/*.yaml"):
        text = path.read_text(encoding="utf-8")
        document = parse_yaml(text)
        if isinstance(document, dict) and "model" in document:  # others are for other programs
            about = text.splitlines()[0].removeprefix("#").strip()
            name = path.relative_to(FOLDER).with_suffix("").as_posix()
            yield Shipped(name, path, about, tuple(document.get(VARIANTS, ())))


def find(name: str) -> Shipped:
    """The recipe called so. Raises: RequestError, with the nearest name."""
    known = {recipe.name: recipe for recipe in shipped()}
    if name not in known:
        fix = closest(name, known) or "`surgery recipes list` shows all"
        raise RequestError(name, "no recipe of that name", expected="one of the library's", fix=fix)
    return known[name]


def locate(recipe: str) -> tuple[Path, Path | None]:
    """A recipe's file, and the folder that its outputs are relative to: None for its own, or this one by name.

    Raises: RequestError.
    """
    if Path(recipe).exists() or recipe.endswith(RECIPE_ENDINGS):
        return Path(recipe), None
    return find(recipe).path, Path.cwd()
