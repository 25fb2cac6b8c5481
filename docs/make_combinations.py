"""Write docs/combinations.md from the table of combinations; with --check, exit 1 where it is stale."""

from __future__ import annotations

from pathlib import Path

from pages import write_or_check

from surgery.combinations import COMBINATIONS, FACTS, Combination

PAGE = Path(__file__).with_name("combinations.md")
HEAD = """# Settings that cannot stand together

Made by `make docs` from `surgery/combinations.py`; do not edit it by hand.

These are refused by what is asked for alone: when a recipe is read (`surgery run`, `plan`, `train -c`), when an adapter
is applied or planned, and when a run knows its device and its adapter. Nothing is loaded, made or trained before.
Settings are named as in a recipe (`surgery settings` lists them); a setting without a value means any that is not the
default. Exit code 2: one of the two would be ignored, or says another thing; 5: a combination that is not done.

Refused where layers are known, because it depends on the model: rows of an embedding and nothing else with `budget`,
`resample` or a `select` other than `random` (exit code 2, [layers.md](layers.md)), grouped convolutions, rows of an
embedding that is tied, `zero3` or `liger` with experts ([experts.md](experts.md)), `liger` with a head that trains, and
models in which nothing can be lean.
"""
FACTS_HEAD = "What is no key of a recipe:\n"


def cell(text: str) -> str:
    """A text as a table's cell."""
    return text.replace("|", r"\|")


def side(when: str) -> str:
    """One side of a combination, as a recipe says it."""
    name, equals, patterns = when.partition("=")
    values = " or ".join(f"`{pattern}`" for pattern in patterns.split("|"))
    return f"`{name}`: {values}" if equals else f"`{name}`"


def line(row: Combination) -> str:
    """A combination as a table's line."""
    parts = (side(row.one), side(row.other), str(row.error.exit_code), row.expected, row.fix)
    return f"| {' | '.join(map(cell, parts))} |"


def render() -> str:
    """The whole page."""
    head = ("| setting | with | exit code | expected | what to do |", "|---|---|---|---|---|")
    known = [f"- `{name}`: {meaning};" for name, meaning in FACTS.items()]
    known[-1] = known[-1].removesuffix(";") + "."
    return "\n".join([HEAD, *head, *map(line, COMBINATIONS), "", FACTS_HEAD, *known, ""])


if __name__ == "__main__":
    write_or_check(PAGE, render())
