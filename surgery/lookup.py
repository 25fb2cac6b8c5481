"""The tables of what can be chosen by name, as `module:attribute` strings loaded on demand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from surgery.errors import RequestError, closest

METHODS = {"paca": "surgery.methods.paca:METHOD", "read": "surgery.methods.read:METHOD"}
BACKENDS = {"local": "surgery.backends.local:BACKEND"}
EXPORTERS = {
    "safetensors": "exporters.dense:EXPORTER",
    "lora": "exporters.lora:EXPORTER",
    "remote-code": "exporters.remote_code:EXPORTER",
}
UNDO = "exporters.undo:undo"


def resolve(reference: str) -> Any:
    """What `module:attribute` names."""
    module, attribute = reference.split(":")
    return getattr(importlib.import_module(module), attribute)


def load(table: Mapping[str, str], name: str, kind: str) -> Any:
    """The record called `name`. Raises RequestError, with the nearest name, where the table has none."""
    if name not in table:
        raise RequestError(
            kind, f"unknown name {name!r}", expected=f"one of {', '.join(table)}", fix=closest(name, table)
        )
    record = resolve(table[name])
    if record.name != name:
        raise RuntimeError(f"{table[name]} calls itself {record.name!r}, the table {name!r}")
    return record
