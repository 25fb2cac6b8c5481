"""What commands print: results to standard output, as text or as one JSON document; remarks to standard error."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click


def say(text: str) -> None:
    """A remark for the person at the terminal."""
    settings = click.get_current_context().find_root().obj or {}
    if not settings.get("quiet"):
        click.echo(text, err=True)


def show(lines: Sequence[str], document: Any, *, as_json: bool) -> None:
    """The result: lines for people, or one JSON document."""
    click.echo(json.dumps(plain(document), indent=2) if as_json else "\n".join(lines))


def plain(value: Any) -> Any:
    """Records, paths and tuples as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def hush_libraries() -> None:
    """bitsandbytes and torchao speak of kernels for other devices wherever they are installed and imported."""
    for package in ("bitsandbytes", "torchao"):
        logging.getLogger(package).setLevel(logging.ERROR)
