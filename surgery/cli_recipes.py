"""The command `surgery recipes`, which `surgery.cli` registers."""

from __future__ import annotations

import click

from surgery.cli_options import JSON
from surgery.errors import RequestError
from surgery.terminal import show


@click.command("recipes")
@click.argument("action", type=click.Choice(["list", "show"]))
@click.argument("name", required=False)
@JSON
def recipes_command(action: str, name: str | None, *, as_json: bool) -> None:
    """List the recipes that are shipped, with a line for each, or show the recipe NAME as it stands.

    \b
    surgery recipes list
    surgery recipes show papers/paca-mmlu
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    if (action == "show") != bool(name):
        fix = "`surgery recipes list` shows all names" if action == "show" else "Leave it out"
        raise RequestError(f"recipes {action}", repr(name or ""), expected=f"{'a' if not name else 'no'} name", fix=fix)
    from surgery import library

    if name:
        recipe = library.find(name)
        text = recipe.path.read_text(encoding="utf-8")
        show([text.removesuffix("\n")], {"name": name, "text": text}, as_json=as_json)
        return
    found = library.shipped()
    width = max(len(recipe.name) for recipe in found)
    lines = []
    for recipe in found:
        lines.append(f"{recipe.name:{width}}  {recipe.about}")
        if recipe.variants:
            lines.append(f"{'':{width}}  variant={', '.join(recipe.variants)}")
    document = [{"name": r.name, "about": r.about, "variants": list(r.variants), "path": str(r.path)} for r in found]
    show(lines, document, as_json=as_json)
