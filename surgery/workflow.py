"""The whole way: export with its check, undo, and a recipe from model to verified checkpoint."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.adapter import Adapter, find_model, open_adapter
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.choosing import changed_data
from surgery.combinations import facts
from surgery.combinations import require as require_together
from surgery.delta import ColumnDelta, Delta, SideDelta
from surgery.errors import NotAModelError, OutputExistsError, RequestError, SurgeryError, UnsupportedError
from surgery.lookup import EXPORTERS, ONNX_CHECKPOINT, ONNX_OPTIONS, ONNX_PATCH, UNDO, backend_of, resolve
from surgery.lookup import load as lookup
from surgery.manifest import ADAPTER, MERGED, ONNX, parse_record, read_document
from surgery.operate import apply
from surgery.plan import SurgeryPlan
from surgery.planning import plan_checkpoint
from surgery.ranks import NO_RESULT, environment, is_launched
from surgery.recipe import Recipe, asked_of
from surgery.runs import notes_of
from surgery.survey import TaskSpec
from surgery.tiny import is_tiny, write_tiny
from surgery.train import TrainResult, launch, result_of, train
from surgery.union import unite
from surgery.verify import Verification, verify
from surgery.writing import parse_size

MERGED_FORMATS = ("safetensors", ONNX)
VERIFIED_FORMATS = ("safetensors", "remote-code", ONNX)
EXPORT_DEFAULTS = {"format": "safetensors", "dtype": "keep", "max_shard_bytes": None, "merge_base": "original"}
# What the adapters of each method hold, and the formats for it.
METHOD_EXPORTS: Mapping[str, tuple[type[Delta], str]] = {
    "paca": (ColumnDelta, "safetensors, lora, peft-paca or onnx"),
    "read": (SideDelta, "remote-code or onnx"),
}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    `verification` is None where it was not asked for, or the format has none; `notes`: what its users must know.
    """

    out: Path
    format: str
    seconds: float
    size_bytes: int
    verification: Verification | None
    notes: tuple[str, ...] = ()


def default_adapter_folder(model: str, method: str) -> Path:
    """`model/` -> `model-paca` (the method's name) beside it; a hub id's last part -> here."""
    path = Path(model)
    if not path.is_dir():
        return Path(f"{model.rsplit('/', 1)[-1]}-{method}")
    return _beside(path, method)


def find_adapter(folder: str | Path | None, *, here: Path | None = None) -> Path:
    """The adapter folder named, or the one we are in, or the only one in this folder. Raises: RequestError."""
    if folder is not None:
        return Path(folder)
    here = here or Path.cwd()
    if _is_adapter(here):
        return here
    found = sorted(path for path in here.iterdir() if path.is_dir() and _is_adapter(path))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise RequestError(
            str(here),
            f"{len(found)} adapter folders here ({names})",
            expected="exactly one",
            fix="Name the adapter's folder",
        )
    return found[0]


def is_checkpoint(model: str | Path) -> bool:
    """Whether it is a model as it is: a hub id, a folder that surgery has not made, or one with a model in it."""
    path = Path(model)
    return not (path / RECORD_FILE).is_file() or read_document(path).get("kind") in (MERGED, ONNX)


def _is_adapter(folder: Path) -> bool:
    try:
        return (folder / RECORD_FILE).is_file() and read_document(folder).get("kind") == ADAPTER
    except SurgeryError:
        return False


def default_export_folder(adapter: Path, format_name: str) -> Path:
    """`<adapter>-merged`, or `<adapter>-<format>`, beside the adapter."""
    return _beside(adapter, "merged" if format_name == "safetensors" else format_name)


def _beside(folder: Path, suffix: str) -> Path:
    """`folder-suffix`, beside it; `.` and `..` are called what they are."""
    full = folder.resolve()
    return (folder if folder.name not in ("", "..") else full).with_name(f"{full.name}-{suffix}")


def export(  # noqa: PLR0913  the options of one command, all by keyword
    adapter: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    format: str = "safetensors",
    base: str | Path | None = None,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    prompts: Sequence[str] = (),
    opset: int | None = None,
    onnx_data: str | None = None,
    merge_base: str | None = None,
) -> ExportResult:
    """Write an adapter's checkpoint in a format; the folder appears only after its check held.

    adapter: its folder, or those of several that were trained on one base and whose columns do not overlap.
    dtype: of the files, and with format onnx what its graph computes in; opset and onnx_data: of that format alone;
    merge_base: `original` or `dequantized`, of a quantized base and format safetensors alone.
    Raises: CheckError, BaseMismatchError, DamagedError, ResourceError, OutputExistsError, RequestError.
    """
    started = time.monotonic()
    opened, target = _open(adapter, out, format, base)
    exporter = lookup(EXPORTERS, format, "--format")
    _require_accepted(exporter, type(opened.delta), f"--format {format}", opened.delta.ways_out)
    known = {"held": _held(opened.plan), "export.format": format, "export.merge_base": merge_base}
    require_together(facts(known))
    difference: list[float | None] = []

    def checking(folder: Path) -> None:
        held = verify(folder, adapter=opened.folders, base=base, prompts=prompts)
        difference.append(held.max_logit_difference)

    is_checked = check and format in VERIFIED_FORMATS
    exporter.export(
        opened,
        target,
        base=base,
        max_shard_bytes=_shard_bytes(max_shard_size),
        overwrite=overwrite,
        check=checking if is_checked else None,
        **_format_settings(format, dtype, opset, onnx_data),
        **({"merge_base": merge_base} if merge_base else {}),
    )
    result = _exported(target, format, started, is_checked=is_checked)
    result = replace(result, notes=(*notes_of(opened), *result.notes))
    if result.verification and difference:
        result = replace(result, verification=replace(result.verification, max_logit_difference=difference[0]))
    return result


def _open(
    adapter: str | Path | Sequence[str | Path], out: str | Path | None, format: str, base: str | Path | None
) -> tuple[Adapter, Path]:
    """The adapter or the union of several, and the folder to write. Raises: see `unite`."""
    folders = (adapter,) if isinstance(adapter, (str, Path)) else tuple(adapter)
    opened = [open_adapter(folder) for folder in folders]
    if len(opened) == 1:
        return opened[0], Path(out) if out else default_export_folder(opened[0].folder, format)
    if not opened or out is None:
        found = f"{len(opened)} adapters" + ("" if out else " and no -o")
        raise RequestError("export", found, expected="at least one, and with several the folder to write")
    return unite(opened, base), Path(out)


def _require_accepted(exporter: Any, delta: type[Delta], where: str, fix: str) -> None:
    if not issubclass(delta, exporter.accepts):
        kinds = " or ".join(kind.what for kind in exporter.accepts)
        raise UnsupportedError(where, f"{delta.what} {delta.nature}", expected=kinds, fix=fix)


def _held(plan: SurgeryPlan) -> str:
    """How the frozen base of a plan is held; empty where it is dense."""
    return plan.quantization.kind if plan.quantization else ""


def require_merge(adapter: Path, format: str, *, is_asked: bool) -> None:
    """--merge is said of columns alone, and there with each format that has them in the weights.

    Raises: RequestError, UnsupportedError.
    """
    delta = open_adapter(adapter).delta
    if not isinstance(delta, ColumnDelta):
        if is_asked:
            leave = "Leave out --merge: this format holds the side network"
            fix = delta.ways_out if format == EXPORT_DEFAULTS["format"] else leave
            raise UnsupportedError("--merge", f"{delta.what} {delta.nature}", expected=ColumnDelta.what, fix=fix)
        if format == EXPORT_DEFAULTS["format"]:
            raise RequestError(str(adapter), f"{delta.what} and no --format", expected="--format onnx or remote-code")
    elif format == ONNX and not is_asked:
        raise RequestError(str(adapter), f"{delta.what} and no --merge", expected="--merge with --format onnx")
    elif is_asked != (format in MERGED_FORMATS):
        found = f"--merge with --format {format}" if is_asked else f"--format {format} without --merge"
        raise RequestError("export", found, expected="--merge, or a format such as lora or remote-code without it")


def export_checkpoint(
    model: str | Path,
    out: str | Path | None = None,
    *,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    opset: int | None = None,
    onnx_data: str | None = None,
) -> ExportResult:
    """Write a checkpoint as it is, a folder or a hub id, with its ONNX graphs. Raises: as `export`."""
    started = time.monotonic()
    target = Path(out) if out else Path(default_adapter_folder(str(model), ONNX))
    resolve(ONNX_CHECKPOINT)(
        model,
        target,
        max_shard_bytes=_shard_bytes(max_shard_size),
        overwrite=overwrite,
        check=check,
        **_format_settings(ONNX, dtype, opset, onnx_data),
    )
    return _exported(target, ONNX, started, is_checked=check)


def _format_settings(format: str, dtype: str, opset: int | None, onnx_data: str | None) -> dict[str, Any]:
    given = {"opset": opset, "data": onnx_data}
    given = {name: value for name, value in given.items() if value is not None}
    if format == ONNX:
        return {"options": resolve(ONNX_OPTIONS)(dtype=dtype, **given)}
    if given:
        found = " and ".join("--opset" if name == "opset" else "--onnx-data" for name in given)
        raise RequestError("export", f"{found} with --format {format}", expected="--format onnx")
    return {"dtype": dtype}


def _exported(target: Path, format: str, started: float, *, is_checked: bool) -> ExportResult:
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    manifest = parse_record(read_document(target), str(target / RECORD_FILE)).manifest
    held = Verification(manifest.checks, None) if is_checked else None
    return ExportResult(target, format, time.monotonic() - started, size, held, tuple(manifest.export.get("notes", ())))


def _shard_bytes(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise RequestError("--max-shard-size", str(error), expected="a size such as 5GB") from error


def patch(
    onnx: str | Path, adapter: str | Path, out: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> Any:
    """Bring a PaCA adapter into an ONNX file that exists already. Returns and raises: see exporters.onnx_patch."""
    require_together(facts({"patch": True, "held": _held(open_adapter(adapter).plan)}))
    return resolve(ONNX_PATCH)(onnx, adapter, out, base=base, overwrite=overwrite)


def undo(merged: str | Path, out: str | Path) -> Path:
    """The base of a merged folder, byte for byte. Raises: see exporters.undo."""
    written: Path = resolve(UNDO)(Path(merged), Path(out))
    return written


# --- a recipe


@dataclass(frozen=True)
class RunResult:
    """What a recipe's run did. `skipped` names the steps that were done already."""

    adapter: Path
    merged: Path
    training: TrainResult
    verification: Verification | None
    skipped: tuple[str, ...]


def run(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    nproc: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RunResult:
    """Apply, train, export and verify; a step whose result is there, by digests, is not repeated.

    nproc: train in so many processes on this machine (None: in this one, or where that is spent by it in another).
    Raises: whatever a step raises; OutputExistsError for a folder that another plan made; SystemExit where a launched
    training failed, which has said why.
    """
    skipped = []
    spec = recipe.spec()
    is_launched_then = nproc is not None or is_launched() or backend_of(recipe.train.device).spends_process
    require_together({**asked_of(recipe), **facts({"launched": "yes" if is_launched_then else "no"})})
    _require_export(recipe)
    folder = Path(recipe.adapter) if recipe.adapter else default_adapter_folder(recipe.model, recipe.method)
    if is_tiny(recipe.model):
        made = write_tiny(recipe.model, folder.with_name(recipe.model.replace(":", "-")))
        recipe = recipe.model_copy(update={"model": str(made)})
    if overwrite or not folder.exists():
        say(f"apply: {recipe.model} -> {folder}")
        apply(recipe.model, folder, spec, task=recipe.task_spec(), overwrite=overwrite)
    else:
        _require_same_plan(recipe, spec, folder)
        skipped.append("apply")
    say(f"train: {folder}")
    if nproc is None and backend_of(recipe.train.device).spends_process:
        nproc = 1
    if nproc is None:
        trained = train(folder, recipe.data, recipe.train, task=recipe.task_spec(), resume="auto", overwrite=overwrite)
    else:
        trained = _train_launched(recipe, folder, nproc, overwrite=overwrite)
    if trained.was_finished:
        skipped.append("train")
    out = Path(recipe.export.out) if recipe.export.out else default_export_folder(folder, recipe.export.format)
    if not overwrite and _is_exported(recipe, folder, out):
        skipped += ["export"]
        return RunResult(folder, out, trained, None, tuple(skipped))
    say(f"export: {folder} -> {out}")
    done = export(
        folder,
        out,
        format=recipe.export.format,
        dtype=recipe.export.dtype,
        overwrite=overwrite,
        max_shard_size=recipe.export.max_shard_size,
        check=recipe.export.verify,
        merge_base=recipe.export.merge_base,
    )
    return RunResult(folder, out, trained, done.verification, tuple(skipped))


def _train_launched(recipe: Recipe, folder: Path, nproc: int, *, overwrite: bool) -> TrainResult:
    before = open_adapter(folder).record.manifest.training
    sections = {"data": recipe.data.model_dump(), "train": recipe.train.model_dump()}
    document = {"model": recipe.model, "task": recipe.task, "labels": recipe.labels, **sections}
    with tempfile.TemporaryDirectory(prefix="surgery-run-") as temporary:
        path = Path(temporary) / "recipe.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")
        arguments = [str(folder), f"--config={path}", "--resume=auto", *(["--overwrite"] if overwrite else [])]
        with environment(**{NO_RESULT: "1"}):
            code = launch(arguments, recipe.train, nproc)
    if code:
        raise SystemExit(code)
    adapter = open_adapter(folder)
    return replace(result_of(adapter), was_finished=adapter.record.manifest.training == before)


def _require_export(recipe: Recipe) -> None:
    """The export is one that the method has, before hours of training. Raises: RequestError, UnsupportedError."""
    wanted = recipe.export
    exporter = lookup(EXPORTERS, wanted.format, "export.format")
    delta, formats = METHOD_EXPORTS[recipe.method]
    _require_accepted(exporter, delta, f"export.format: {wanted.format}", f"Set export.format to {formats}")
    if wanted.dtype != EXPORT_DEFAULTS["dtype"] and wanted.format not in MERGED_FORMATS:
        raise RequestError("export.dtype", repr(wanted.dtype), expected=f"keep with export.format {wanted.format}")
    _format_settings(wanted.format, wanted.dtype, None, None)
    _shard_bytes(wanted.max_shard_size)


def _require_same_plan(recipe: Recipe, spec: Any, folder: Path) -> None:
    """The adapter there was planned as the recipe asks. Raises: OutputExistsError."""
    adapter = open_adapter(folder)
    task = recipe.task_spec()
    if adapter.plan.whole and not task.labels:
        task = TaskSpec(task.name, adapter.plan.labels)
    planned = plan_checkpoint(Checkpoint.open(find_model(recipe.model)[0]), spec, task)
    is_same = planned.as_asked() == replace(adapter.plan, calibration={}).as_asked()
    found = "" if is_same or _is_fresh(adapter, planned) else "an adapter that another plan made"
    changed = changed_data(adapter.plan)
    found = f"an adapter whose columns were chosen by {changed[0]}, which has changed since" if changed else found
    if found:
        fix = "Choose another folder, or give --overwrite"
        raise OutputExistsError(str(folder), found, expected="this recipe's", fix=fix)


def _is_fresh(adapter: Adapter, planned: SurgeryPlan) -> bool:
    """Applied but not trained: training will plan the head anew."""
    return not adapter.record.manifest.training and adapter.plan.spec == planned.spec


def _is_exported(recipe: Recipe, folder: Path, out: Path) -> bool:
    """Whether `out` is this adapter's export, as asked for. Raises: OutputExistsError for anything else there."""
    if not out.exists():
        return False
    wanted = recipe.export
    try:
        record = parse_record(read_document(out), str(out))
    except NotAModelError:
        record = None
    adapter = open_adapter(folder).record.manifest
    same = record and record.manifest.adapter.get("sha256") in adapter.files.values()
    settings = record.manifest.export if record else {}
    merge_base = wanted.merge_base or EXPORT_DEFAULTS["merge_base"]
    asked = (wanted.format, wanted.dtype, _shard_bytes(wanted.max_shard_size), merge_base)
    found = {**EXPORT_DEFAULTS, **settings, **({"dtype": settings[ONNX]["asked_dtype"]} if ONNX in settings else {})}
    if not same or asked != tuple(found[name] for name in EXPORT_DEFAULTS):
        raise OutputExistsError(
            str(out),
            "not this adapter's export",
            expected="a new folder",
            fix="Choose another folder, or give --overwrite",
        )
    return True
