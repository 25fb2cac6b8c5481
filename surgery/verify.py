"""Is the export what was trained? By bytes against the base and the adapter, and by running both.

The outcome goes into the export's record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.adapter import Adapter, find_base, open_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import ADAPTER_FILE
from surgery.errors import CheckError, DamagedError, RequestError, SurgeryError, counted
from surgery.lookup import ONNX_VERIFY, resolve
from surgery.manifest import MERGED, ONNX, REMOTE_CODE, UNDO_FILE, Check, Record, read_record
from surgery.tensorfile import TensorFile, file_sha256
from surgery.union import unite
from surgery.verify_bytes import Sides, check_carried, check_names, check_side, check_targets, check_untouched
from surgery.verify_logits import check_logits, measure_merge, not_run
from surgery.writing import replace_file

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The surgeon looked at the chart and said:",
    "def add(a, b):\n    return",
    "7, 14, 21, 28,",
)


@dataclass(frozen=True)
class Verification:
    """What was checked. `max_logit_difference` is None where the models were not run."""

    checks: tuple[Check, ...]
    max_logit_difference: float | None

    def lines(self) -> list[str]:
        """One line a check."""
        return [f"{check.result:8} {check.name}: {check.detail}" for check in self.checks]


def verify(
    folder: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    base: str | Path | None = None,
    prompts: Sequence[str] = (),
    numeric: bool = True,
) -> Verification:
    """Check a merged folder, one with a side network or one with ONNX graphs; write the outcome into its record.

    adapter: where it is not where it was; of a folder that was merged from several, all of them, in any order.
    Raises: CheckError where a check does not hold; NotAModelError, DamagedError, BaseMismatchError.
    """
    folder = Path(folder)
    record, checks, difference = read_record(folder, MERGED, REMOTE_CODE, ONNX), [], None
    named = (adapter,) if isinstance(adapter, (str, Path)) else tuple(adapter or ())
    opened, why = _find_adapters(record, folder, tuple(map(Path, named)), base)
    if record.kind == ONNX:
        checks += check_carried(folder, record, base)
    else:
        sides = _open_sides(folder, record, opened, why, base)
        checks += [check_names(sides), check_untouched(sides)]  # first: what follows reads tensors by these names
        checks += check_side(sides) if record.plan.stacks else check_targets(sides)
        texts, skipped = tuple(prompts) or PROMPTS, (not_run("--no-numeric"), None)
        check, difference = check_logits(sides, texts) if numeric else skipped
        checks += [check, *measure_merge(sides, texts, numeric=numeric)]
    if ONNX in record.manifest.export:
        checks += resolve(ONNX_VERIFY)(folder, record, opened, why, numeric=numeric)
    manifest = replace(record.manifest, checks=tuple(checks))
    replace_file(folder / RECORD_FILE, replace(record, manifest=manifest).to_json())
    return Verification(tuple(checks), difference)


def _open_sides(folder: Path, record: Record, adapter: Adapter | None, why: str, base: str | Path | None) -> Sides:
    undo_path = folder / UNDO_FILE
    if record.kind == MERGED and not undo_path.is_file():
        raise DamagedError(str(folder), f"no {UNDO_FILE}", expected="a whole merged folder", fix="Export again")
    root = find_base(record, folder, base)
    undo = TensorFile(undo_path) if record.kind == MERGED else None
    return Sides(Checkpoint.open(folder), Checkpoint.open(root), record, undo, adapter, why)


def _find_adapters(
    record: Record, folder: Path, named: tuple[Path, ...], base: str | Path | None
) -> tuple[Adapter | None, str]:
    """The adapter of an export, the union of its adapters, or why it is not at hand. What was named must be usable."""
    parents = record.manifest.parents
    if not parents:
        if len(named) > 1:
            raise RequestError("--adapter", f"{len(named)} folders for {folder}", expected="the one it was made of")
        return _find_adapter(record.manifest.adapter, folder, *named)
    if named and len(named) != len(parents):
        raise RequestError("--adapter", counted(len(named), "folder"), expected=f"all {len(parents)} it was made of")
    digests = {file_sha256(path / ADAPTER_FILE): path for path in named if (path / ADAPTER_FILE).is_file()}
    opened = []
    for source in parents:
        at = digests.get(source.get("sha256", ""), named[0]) if named else None
        found, why = _find_adapter(source, folder, *([at] if at else []))
        if found is None:
            return None, f"{why} ({source.get('path', '')}, one of {len(parents)})"
        opened.append(found)
    return unite(opened, base if base is not None else find_base(record, folder)), ""


def _find_adapter(source: Mapping[str, str], folder: Path, named: Path | None = None) -> tuple[Adapter | None, str]:
    """An adapter by its recorded path and digest, or why it is not at hand. One that was named must be usable."""
    if not source:
        if named:
            raise RequestError("--adapter", f"{named}, and {folder} was made of none", expected="no --adapter")
        return None, "it was made of none"
    path = named or folder / source.get("path", "")
    if not named and not (path / ADAPTER_FILE).is_file():
        return None, f"its adapter {source.get('path', '')!r} is not there"
    try:
        if file_sha256(path / ADAPTER_FILE) == source.get("sha256"):
            return open_adapter(path), ""
    except (SurgeryError, OSError):
        if named:
            raise
    if named:
        raise CheckError(str(path), "it is not the adapter that was exported", expected="the recorded digest")
    return None, "its adapter has changed since"
