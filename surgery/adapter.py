"""Adapter folders: where their base is, what lies in them, and how they change without ever being in between."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, Checkpoint, path_inside, read_json, require_model
from surgery.columns import Choice, generator_seed
from surgery.compat import quiet_loading
from surgery.delta import ADAPTER_FILE, Delta, WholePatch, bytes_sha256, read_delta
from surgery.errors import BaseMismatchError, DamagedError, NotAModelError, shorten
from surgery.lookup import METHODS
from surgery.lookup import load as lookup
from surgery.manifest import ADAPTER, Base, Manifest, Record, parse_record, read_document, versions
from surgery.plan import SurgeryPlan, WholeTarget
from surgery.survey import (
    class_for,
    configured,
    read_config,
)
from surgery.tensorfile import file_sha256
from surgery.writing import replace_file, write_file

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read and checked; or the union of several, its `parents`, which is in memory alone.

    A union's folder is its first parent's: paths in its record are seen from there.
    """

    folder: Path
    record: Record
    delta: Delta
    parents: tuple[Adapter, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder whose values these are."""
        return tuple(parent.folder for parent in self.parents) or (self.folder,)

    @property
    def plan(self) -> SurgeryPlan:
        return self.record.plan


# --- the base


def find_model(model: str | Path, *, revision: str | None = None) -> tuple[Path, Base]:
    """A model folder, or a hub id's snapshot (fetched if need be). Raises: NotAModelError."""
    text = str(model)
    require_model(text)
    if Path(text).is_dir():
        return Path(text), Base(path=text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(text, revision=revision, allow_patterns=_HUB_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotAModelError(
            text,
            f"no such folder, and the hub did not give it ({shorten(first_line, 160)})",
            expected="a model folder or a hub id such as org/name",
        ) from error
    return Path(folder), Base(hub_id=text, revision=Path(folder).name)


def find_base(record: Record, folder: Path, base: str | Path | None = None) -> Path:
    """The base of an adapter or merged folder: the one named, else the one recorded. Raises: BaseMismatchError."""
    if base is not None:
        return find_model(base)[0]
    recorded = record.manifest.base
    if recorded.hub_id:
        return find_model(recorded.hub_id, revision=recorded.revision)[0]
    path = folder / recorded.path
    if not recorded.path or not path.is_dir():
        found = f"its base {recorded.path!r} is not there"
        raise BaseMismatchError(str(folder), found, expected="the base's folder", fix="Name it with --base")
    return path.resolve()


def fresh_delta(checkpoint: Checkpoint, plan: SurgeryPlan, choice: Choice | None = None) -> Delta:
    """The delta that changes nothing, with the base's digests; heads newly drawn from the plan's seed.

    choice: the columns, where the seed does not decide them.
    """
    whole, heads = _fresh_whole(checkpoint, plan)
    chosen = (choice,) if choice else ()
    delta: Delta = lookup(METHODS, plan.method, "--method").fresh(
        checkpoint, replace(plan, whole=heads), whole, *chosen
    )
    return delta


@torch.no_grad()
def draw_heads(model: Any, checkpoint: Checkpoint, plan: SurgeryPlan) -> None:
    """Give a base's model the heads that a fresh adapter of the plan has."""
    for name, patch in _fresh_whole(checkpoint, plan)[0].items():
        model.get_parameter(name).copy_(patch.values)


def _fresh_whole(checkpoint: Checkpoint, plan: SurgeryPlan) -> tuple[dict[str, WholePatch], tuple[WholeTarget, ...]]:
    if not plan.whole:
        return {}, ()
    fresh = draw_parameters(checkpoint.root, plan)
    patches, targets = {}, []
    for target in plan.whole:
        original = checkpoint.read_tensor(target.weight) if target.sha256 else None
        keep = original is not None and tuple(original.shape) == target.shape
        values = cast("Tensor", original) if keep else fresh[target.parameter]
        patches[target.parameter] = WholePatch(values.to(torch.float32, copy=True), original)
        targets.append(replace(target, sha256=checkpoint.sha256(target.weight) if target.sha256 else ""))
    return patches, tuple(targets)


def draw_parameters(root: Path, plan: SurgeryPlan) -> dict[str, Tensor]:
    """New parameters, drawn as the model's class draws them, from (seed, module name)."""
    config = configured(read_config(root, takes_4bit=True), plan.config)
    with torch.device("meta"), quiet_loading():
        model: Any = class_for(config, plan.task)(config)
    owners = sorted({target.parameter.rpartition(".")[0] for target in plan.whole})
    for name in owners:
        module = model.get_submodule(name).to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.fill_(torch.nan)
    # Some classes draw a head's layers when given what holds them, which has the last word then, as in transformers
    # itself. The model as a whole is asked only for what still is not drawn.
    holders = {name.rpartition(".")[0] for name in owners} - set(owners)
    for name in (*owners, *sorted(holders, reverse=True)):
        if not name and all(model.get_parameter(target.parameter).isfinite().all() for target in plan.whole):
            continue
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(generator_seed(plan.spec["seed"], name))
            model._init_weights(model.get_submodule(name))  # noqa: SLF001  the only door to a class's own initialisation
    return {target.parameter: model.get_parameter(target.parameter).detach() for target in plan.whole}


def write_adapter(folder: Path, out: Path, checkpoint: Checkpoint, delta: Delta, manifest: Manifest) -> Adapter:
    """Fill an empty folder: the base's small files, the adapter file, and the record last."""
    copy_small_files(checkpoint, folder, delta.plan)
    data = delta.to_bytes()
    write_file(folder / ADAPTER_FILE, data)
    record = _record(delta, manifest, data)
    write_file(folder / RECORD_FILE, record.to_json())
    return Adapter(out, record, delta)


def _record(delta: Delta, manifest: Manifest, data: bytes) -> Record:
    manifest = replace(manifest, versions=versions(), files={ADAPTER_FILE: bytes_sha256(data)})
    return Record(ADAPTER, delta.plan, manifest)


def copy_small_files(checkpoint: Checkpoint, folder: Path, plan: SurgeryPlan | None) -> None:
    """Configuration, tokenizer and licence files; config.json with the plan's changes, if there are any."""
    for name in checkpoint.small_files():
        data = path_inside(checkpoint.root, name).read_bytes()
        if name == CONFIG_FILE and plan and plan.config:
            data = (json.dumps(read_json(checkpoint.root / name) | dict(plan.config), indent=2) + "\n").encode()
        (folder / name).parent.mkdir(exist_ok=True)
        write_file(folder / name, data)


def update_adapter(adapter: Adapter, delta: Delta, manifest: Manifest) -> Adapter:
    """Put a new state into an adapter folder. At every moment a reader finds the old state or the new one.

    The new record is written first and carries the old one along; which of the two holds is decided by the digest of
    the adapter file, whose rename comes second.
    """
    data = delta.to_bytes()
    record = _record(delta, manifest, data)
    previous = open_adapter(adapter.folder).record  # what holds, also after an update that was cut short
    replace_file(adapter.folder / RECORD_FILE, record.to_json(previous))
    replace_file(adapter.folder / ADAPTER_FILE, data)
    replace_file(adapter.folder / RECORD_FILE, record.to_json())
    return Adapter(adapter.folder, record, delta)


def open_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder and check it. Raises: NotAModelError, DamagedError, RequestError."""
    folder = Path(folder)
    record = _holding_record(folder) or _holding_record(folder)  # an update may come between two reads
    path = folder / ADAPTER_FILE
    if record is None:
        raise DamagedError(
            str(path),
            "its digest is not the one recorded",
            expected="the file that was written",
            fix="Restore it from a copy or a training checkpoint, or run apply again",
        )
    return Adapter(folder, record, read_delta(path, record.plan))


def _holding_record(folder: Path) -> Record | None:
    """The record whose digest the adapter file has: the one that stands there, or the one that it carries along."""
    document = read_document(folder)
    where, path = str(folder / RECORD_FILE), path_inside(folder, ADAPTER_FILE)
    if document.get("kind") != ADAPTER:
        raise NotAModelError(str(folder), f"a folder of kind {document.get('kind')!r}", expected="an adapter folder")
    if not path.is_file():
        raise DamagedError(str(folder), f"no {ADAPTER_FILE}", expected="an adapter folder", fix="Run apply again")
    records = [parse_record(document, where)]
    if isinstance(document.get("previous"), dict):
        records.append(parse_record(document["previous"], where))
    digest = file_sha256(path)
    record = next((r for r in records if r.manifest.files.get(ADAPTER_FILE) == digest), None)
    if record:
        _require_spec(record.plan, where)
    return record


def _require_spec(plan: SurgeryPlan, where: str) -> None:
    """The method is known and takes the plan's settings. Raises: RequestError, DamagedError."""
    try:
        lookup(METHODS, plan.method, where).spec_type(**plan.spec)
    except TypeError as error:
        raise DamagedError(where, f"the plan's spec is malformed ({error})", expected="a whole plan") from error
