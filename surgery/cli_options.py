"""What commands share: options of one name and meaning, and how their texts are taken apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from surgery.errors import RequestError


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options under one name, for what commands share."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a folder that surgery made.")
BASE = click.option("--base", help="The base's folder or hub id, where it is not where it was.")
OUT = click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to write.")
LEAN = click.option(
    "--lean/--no-lean",
    default=None,
    help="Norms, gates and loss keep the least for backward. Default: where that was measured to cost nothing: "
    "on the CPU, uncompiled, unless a batch is very small.",
)
FOLDER = click.Path(path_type=Path)
TASK = options(
    click.option(
        "--task",
        default="",
        help="causal-lm, seq2seq, sequence-classification, token-classification, "
        "regression or image-classification. Default: the checkpoint's own.",
    ),
    click.option("--labels", default="", help="Class names, separated by commas. Default: those of the data."),
)


def split_list(values: Sequence[str]) -> tuple[str, ...]:
    """Repeated options and comma-separated lists as one tuple; a `re:` pattern keeps its commas."""
    parts: list[str] = []
    for value in values:
        parts += [value] if value.startswith("re:") else [part.strip() for part in value.split(",")]
    return tuple(part for part in parts if part)


def parse_rank_pattern(values: Sequence[str]) -> dict[str, int]:
    """`pattern=rank` pairs. Raises: RequestError."""
    pairs = {}
    for value in values:
        pattern, _, rank = value.rpartition("=")
        if not pattern or not rank.isdigit():
            raise RequestError("--rank-pattern", repr(value), expected="PATTERN=RANK, such as 'mlp.*=8'")
        pairs[pattern] = int(rank)
    return pairs


def parse_columns(option: str, values: Sequence[str], example: str) -> dict[str, str]:
    """`role=column` pairs; `example` is one, for the message. Raises: RequestError."""
    pairs = {}
    for value in values:
        role, equals, column = value.partition("=")
        if not (role and equals and column):
            raise RequestError(option, repr(value), expected=f"ROLE=COLUMN, such as {example}")
        pairs[role] = column
    return pairs
