"""How a folder came to be: `surgery.json`, written last."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint import RECORD_FILE, path_inside, read_json, require_record
from surgery.errors import DamagedError, NotAModelError, RequestError
from surgery.plan import SurgeryPlan, from_json

SCHEMA = 1
ADAPTER, MERGED, REMOTE_CODE = "adapter", "merged", "remote-code"
ONNX, PATCHED = "onnx", "onnx-patch"
UNDO_FILE = "surgery.undo"  # in a merged folder: all that the merge replaced
_PACKAGES = ("checkpoint-surgery", "torch", "transformers", "safetensors", "accelerate")


@dataclass(frozen=True)
class Base:
    """The model an adapter was made for: a folder, relative to the record's, or a hub id with its revision."""

    path: str = ""
    hub_id: str = ""
    revision: str = ""


@dataclass(frozen=True)
class Check:
    """A check that ran (or did not, and why): `result` is `passed`, `failed`, `measured` or `not run`."""

    name: str
    result: str
    detail: str = ""


@dataclass(frozen=True)
class Manifest:
    """What actually ran.

    `files`: sha256 by file name; `adapter`: the adapter folder a merge came from, and its digest (of an adapter: the
    folder it was read from, where that is another program's); `parents`: the same of each, where there were several.
    """

    base: Base
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    adapter: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    export: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    parents: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Record:
    """The whole of `surgery.json`."""

    kind: str
    plan: SurgeryPlan
    manifest: Manifest

    def to_json(self, previous: Record | None = None) -> str:
        """Readable JSON. `previous`: the record that holds while the new files are not all in place."""
        manifest = asdict(self.manifest)
        if not manifest["parents"]:
            del manifest["parents"]  # younger than the rest: what has one adapter reads as it always did
        document = {"schema": SCHEMA, "kind": self.kind, "plan": self.plan.to_dict(), "manifest": manifest}
        if previous:
            document["previous"] = json.loads(previous.to_json())
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """The versions of Python and of packages: unless others are named, of what matters for reproducing a run."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def parse_record(document: Mapping[str, Any], where: str) -> Record:
    """Raises: RequestError for an unknown schema, DamagedError for a malformed record."""
    if document.get("schema") != SCHEMA:
        raise RequestError(
            where,
            f"schema {document.get('schema')!r}",
            expected=str(SCHEMA),
            fix="Use the version of checkpoint-surgery that wrote it",
        )
    try:
        parts = dict(document["manifest"])
        parts["base"] = from_json(Base, parts["base"])
        parts["checks"] = tuple(from_json(Check, check) for check in parts["checks"])
        parts["parents"] = tuple(_text_values(parent) for parent in parts.get("parents", ()))
        plan = SurgeryPlan.from_dict(document["plan"], where)
        return Record(document["kind"], plan, from_json(Manifest, parts))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DamagedError(where, f"the record is malformed ({error})", expected="a whole record") from error


def _text_values(entry: Mapping[str, Any]) -> dict[str, str]:
    """Raises: TypeError, AttributeError where a value is no text, or it is no object."""
    if wrong := [name for name, value in entry.items() if not isinstance(value, str)]:
        raise TypeError(f"parents: {wrong[0]} is {entry[wrong[0]]!r}")
    return dict(entry)


def read_document(folder: Path) -> dict[str, Any]:
    """`surgery.json` as it stands. Raises NotAModelError where there is none."""
    require_record(folder)
    return read_json(path_inside(folder, RECORD_FILE))


def read_record(folder: Path, *kinds: str) -> Record:
    """The record of a folder of one of those kinds. Raises: NotAModelError, RequestError, DamagedError."""
    record = parse_record(read_document(folder), str(folder / RECORD_FILE))
    if record.kind not in kinds:
        expected = f"one of kind {' or '.join(map(repr, kinds))}"
        raise NotAModelError(str(folder), f"a folder of kind {record.kind!r}", expected=expected)
    return record


def relative_path(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, so that both can move together."""
    return os.path.relpath(path.resolve(), folder.resolve())
