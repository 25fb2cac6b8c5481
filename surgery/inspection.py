"""What a folder is: a checkpoint, an adapter, or an export of one in any format, and what stands in it.

Reads headers, records and configuration; of an adapter also its values, one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.adapter import Adapter, open_adapter
from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, Checkpoint, path_inside, read_json, require_folder
from surgery.columns import STORED
from surgery.delta import ColumnDelta
from surgery.errors import NotAModelError, counted
from surgery.manifest import (
    ADAPTER,
    MERGED,
    ONNX,
    PATCHED,
    REMOTE_CODE,
    UNDO_FILE,
    Base,
    Check,
    Record,
    parse_record,
    read_document,
)
from surgery.peft_files import PEFT_PACA
from surgery.plan import NO_METHOD, SurgeryPlan
from surgery.runs import CHECKPOINTS, latest_checkpoint, open_run, step_of
from surgery.table import align, held_text, plan_lines, size_text, target_rows

MODEL, LORA = "model", "lora"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
                    "vocab.json", "tekken.json")  # fmt: skip
_TIED = {True: "yes, by config.json", False: "no, by config.json", None: "config.json does not say"}
_TRAINING_KEYS = ("steps", "seconds", "device", "loss")
_Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class ModelFacts:
    """A checkpoint. `values`: how many of each dtype; `is_tied`: what config.json says, None where it says nothing."""

    architecture: str
    model_type: str
    values: Mapping[str, int]
    tensors: int
    files: int
    size_bytes: int
    is_tied: bool | None
    quantization: str
    tokenizer: str

    def pairs(self) -> _Pairs:
        """Labels and texts."""
        kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in self.values.items())
        return [
            ("architecture", f"{self.architecture or 'unknown'} ({self.model_type or 'no model type'})"),
            ("values", f"{sum(self.values.values()):,}: {kinds}"),
            ("weights", f"{size_text(self.size_bytes)}, {self.tensors} tensors in {counted(self.files, 'file')}"),
            ("tied embeddings", _TIED[self.is_tied]),
            ("quantized", self.quantization or "no"),
            ("tokenizer", self.tokenizer or "none"),
        ]


@dataclass(frozen=True)
class Origin:
    """Where a folder came from. A path is as seen from the folder; `found`: it is there (a hub id: in the cache)."""

    base: str
    base_found: bool
    adapter: str = ""
    adapter_found: bool = False

    def pairs(self) -> _Pairs:
        """Labels and texts."""
        adapter = [("from the adapter", _whether(self.adapter, is_there=self.adapter_found))] if self.adapter else []
        return [("base", _whether(self.base, is_there=self.base_found)), *adapter]


@dataclass(frozen=True)
class AdapterFacts:
    """What training did: `moved` of `targets` (layers, or corrections) changed; `training` is the record's summary.

    open_run_step: of a run that is not finished, the step of its last whole checkpoint (0: none); None without one.
    held_values: of columns that were drawn anew, the values of all that have ever trained; else 0.
    """

    moved: int
    targets: int
    training: Mapping[str, Any]
    open_run_step: int | None = None
    held_values: int = 0

    def pairs(self) -> _Pairs:
        """Labels and texts."""
        known = [f"{key} {_number(self.training[key])}" for key in _TRAINING_KEYS if key in self.training]
        state = [("trained", ", ".join(known) or "not yet")]
        for moment in ("before", "after"):
            metrics = self.training.get(moment)
            if isinstance(metrics, Mapping) and metrics:
                text = ", ".join(f"{name} {_number(value)}" for name, value in metrics.items())
                state.append((f"held-out {moment}", text))
        if self.open_run_step is not None:
            state.append(("run", _open_run(self.open_run_step)))
        if self.held_values:
            state.append(("held", f"{self.held_values:,} values, in all columns that have ever trained"))
        return [*state, ("moved", f"{self.moved} of {counted(self.targets, 'target')}")]


@dataclass(frozen=True)
class MergedFacts:
    """What an export did. `undo`: empty where the base can be restored from the folder, else why it cannot.

    Of a folder with ONNX graphs, `settings` has them under `onnx`.
    """

    settings: Mapping[str, Any]
    checks: tuple[Check, ...]
    undo: str = ""

    def pairs(self) -> _Pairs:
        """Labels and texts."""
        checks = [("check", f"{check.name}: {check.result} {check.detail}".rstrip()) for check in self.checks]
        notes = [("note", f"{note}") for note in self.settings.get("notes", ())]
        hidden = "dtype" if ONNX in self.settings else ""  # of the files, beside that of the graphs
        settings = [f"{k} {v}" for k, v in self.settings.items() if isinstance(v, (str, int)) and k != hidden]
        facts = [
            ("export", ", ".join(settings)),
            *_graph_pairs(self.settings.get(ONNX)),
            ("undo", self.undo or "possible"),
        ]
        return [*facts, *notes, *(checks or [("check", "none ran")])]


@dataclass(frozen=True)
class Inspection:
    """A folder of `kind` model, or of one of the records' kinds, and what applies to such a one."""

    path: str
    kind: str
    model: ModelFacts | None = None
    origin: Origin | None = None
    adapter: AdapterFacts | None = None
    merged: MergedFacts | None = None
    plan: SurgeryPlan | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: what does not apply is left out; the plan with its targets grouped."""
        parts = {"model": self.model, "origin": self.origin, "adapter": self.adapter, "merged": self.merged}
        document: dict[str, Any] = {"path": self.path, "kind": self.kind}
        document |= {name: asdict(part) for name, part in parts.items() if part is not None}
        return document | ({"plan": _plan_summary(self.plan)} if self.plan else {})

    def lines(self) -> list[str]:
        """A list of labels, then the table of targets."""
        pairs: _Pairs = [("path", self.path), ("kind", _KINDS[self.kind])]
        for part in (self.model, self.origin, self.adapter, self.merged):
            pairs += part.pairs() if part else []
        pairs += _plan_pairs(self.plan) if self.plan else []
        return align(pairs) + (["", *plan_lines(self.plan)] if self.plan else [])


_KINDS = {
    MODEL: "a checkpoint",
    ADAPTER: "an adapter",
    MERGED: "a merged checkpoint",
    LORA: "a LoRA adapter for PEFT",
    PEFT_PACA: "an adapter of PEFT's PaCA",
    REMOTE_CODE: "a model with a side network, which transformers loads with trust_remote_code",
    ONNX: "a model with ONNX graphs",
    PATCHED: "an ONNX file with an adapter's columns in it",
}


def inspect(path: Path) -> Inspection:
    """Find out what a folder is. Raises: NotAModelError: none of ours; DamagedError, RequestError."""
    require_folder(path)
    if not (path / RECORD_FILE).is_file():
        return Inspection(str(path), MODEL, model=_model_facts(_open(path)))
    record = parse_record(read_document(path), str(path / RECORD_FILE))
    if record.kind not in _INSPECT:
        raise NotAModelError(str(path), f"a folder of kind {record.kind!r}", expected=f"one of {', '.join(_INSPECT)}",
                             fix="Use the version of checkpoint-surgery that wrote it")  # fmt: skip
    return _INSPECT[record.kind](path, record)


def _open(path: Path) -> Checkpoint:
    """A checkpoint; where there is none, the message names folders inside that are something."""
    try:
        return Checkpoint.open(path)
    except NotAModelError as error:
        inside = [p.name for p in sorted(path.iterdir()) if (p / CONFIG_FILE).is_file() or (p / RECORD_FILE).is_file()]
        if error.fix or not inside:
            raise
        fix = f"Folders in it that could be meant: {', '.join(inside[:5])}"
        raise NotAModelError(error.where, error.found, expected=error.expected, fix=fix) from None


def _inspect_adapter(path: Path, _record: Record) -> Inspection:
    adapter = open_adapter(path)  # decides which of two records holds, after a kill in between
    last = latest_checkpoint(path / CHECKPOINTS)
    step = (step_of(last) if last else 0) if open_run(adapter) else None
    facts = AdapterFacts(
        adapter.delta.moved, adapter.delta.movable, adapter.record.manifest.training, step, _held_values(adapter)
    )
    return Inspection(str(path), ADAPTER, origin=_origin(path, adapter.record), adapter=facts, plan=adapter.plan)


def _held_values(adapter: Adapter) -> int:
    if not isinstance(adapter.delta, ColumnDelta) or not adapter.plan.spec.get("resample"):
        return 0
    widths = adapter.delta.widths()
    return sum(target.out_features * widths[target.module] for target in adapter.plan.targets)


def _inspect_merged(path: Path, record: Record) -> Inspection:
    manifest, model = record.manifest, _model_facts(Checkpoint.open(path))
    merged = MergedFacts(manifest.export, manifest.checks, _why_no_undo(path, record))
    return Inspection(str(path), MERGED, model=model, origin=_origin(path, record), merged=merged, plan=record.plan)


def _inspect_untouched(path: Path, record: Record) -> Inspection:
    """A folder that holds the base's tensors as they were, and something beside them."""
    manifest, model = record.manifest, _model_facts(Checkpoint.open(path))
    merged = MergedFacts(manifest.export, manifest.checks, "nothing to undo: the base's tensors are untouched")
    plan = None if record.plan.method == NO_METHOD else record.plan
    return Inspection(str(path), record.kind, model=model, origin=_origin(path, record), merged=merged, plan=plan)


def _inspect_lora(path: Path, record: Record) -> Inspection:
    merged = MergedFacts(record.manifest.export, record.manifest.checks, "nothing to undo: the base is not in it")
    return Inspection(str(path), record.kind, origin=_origin(path, record), merged=merged, plan=record.plan)


def _inspect_patch(path: Path, record: Record) -> Inspection:
    merged = MergedFacts(record.manifest.export, record.manifest.checks, "nothing to undo: it is a patched copy")
    return Inspection(str(path), PATCHED, origin=_origin(path, record), merged=merged, plan=record.plan)


_INSPECT = {
    ADAPTER: _inspect_adapter,
    MERGED: _inspect_merged,
    LORA: _inspect_lora,
    PEFT_PACA: _inspect_lora,
    REMOTE_CODE: _inspect_untouched,
    ONNX: _inspect_untouched,
    PATCHED: _inspect_patch,
}


def _model_facts(checkpoint: Checkpoint) -> ModelFacts:
    config = read_json(checkpoint.root / CONFIG_FILE) if (checkpoint.root / CONFIG_FILE).is_file() else {}
    values: dict[str, int] = {}
    for info in checkpoint.values():
        values[info.dtype] = values.get(info.dtype, 0) + math.prod(info.shape)
    architectures, quantized = config.get("architectures") or [""], config.get("quantization_config")
    return ModelFacts(
        str(architectures[0]) if isinstance(architectures, list) else "",
        str(config.get("model_type", "")),
        dict(sorted(values.items(), key=lambda entry: -entry[1])),
        len(checkpoint),
        len(checkpoint.headers),
        checkpoint.size_bytes,
        _tied(config),
        str(quantized.get("quant_method", "yes")) if isinstance(quantized, dict) else "",
        next((name for name in _TOKENIZER_FILES if (checkpoint.root / name).is_file()), ""),
    )


def _tied(config: Mapping[str, Any]) -> bool | None:
    """What the configuration, or its part for text, says about the output head."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _origin(folder: Path, record: Record) -> Origin:
    base, sources = record.manifest.base, record.manifest.parents or (record.manifest.adapter,)
    paths = [str(source["path"]) for source in sources if source.get("path")]
    name = f"{base.hub_id} (revision {base.revision})" if base.hub_id else base.path
    is_there = bool(paths) and all((folder / path).is_dir() for path in paths)
    return Origin(name, _is_found(folder, base), ", ".join(paths), is_there)


def _is_found(folder: Path, base: Base) -> bool:
    if not base.hub_id:
        return bool(base.path) and (folder / base.path).is_dir()
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(base.hub_id, CONFIG_FILE, revision=base.revision or None), str)


def _why_no_undo(folder: Path, record: Record) -> str:
    dtype = record.manifest.export.get("dtype")
    if record.manifest.export.get("merge_base") == "dequantized":
        return "not possible: with --merge-base dequantized the base's values are not in it"
    if dtype != "keep":
        return f"not possible: --dtype {dtype} rounded the base's values"
    return "" if path_inside(folder, UNDO_FILE).is_file() else f"not possible: {UNDO_FILE} is missing"


def _graph_pairs(described: object) -> _Pairs:
    """The ONNX graphs of a record, if it has any."""
    if not isinstance(described, Mapping):
        return []
    names = ", ".join(described.get("graphs", ()))
    facts = {"operators": "opset", "computing in": "dtype", "data in": "data"}
    said = ", ".join(f"{label} {described[key]}" for label, key in facts.items() if key in described)
    return [("graphs", f"{names}: {said}")]


def _plan_pairs(plan: SurgeryPlan) -> _Pairs:
    ranks = ", ".join(map(str, sorted({target.rank for target in plan.targets})))
    method = (
        f"{plan.method}, {plan.spec['cell']} {plan.spec['hidden']} wide"
        if plan.stacks
        else f"{plan.method}, rank {ranks}{_chosen_by(plan.spec)}"
    )
    return [
        ("method", method),
        ("task", f"{plan.task}, loaded as {plan.architecture}"),
        *([("base held as", held_text(plan.quantization))] if plan.quantization else []),
        ("plan", plan.id),
    ]


def _chosen_by(spec: Mapping[str, Any]) -> str:
    """How columns were chosen, where not at random once and for all."""
    select = spec.get("select", "random")
    how = "" if select == "random" else ", columns as they came" if select == STORED else f", columns by {select}"
    budget = f", of a budget of {spec['budget']}" if spec.get("budget") else ""
    return how + budget + (f", drawn anew {spec['resample'].replace(':', ' ')} steps" if spec.get("resample") else "")


def _plan_summary(plan: SurgeryPlan) -> dict[str, Any]:
    return {
        "id": plan.id,
        "method": plan.method,
        "task": plan.task,
        "architecture": plan.architecture,
        "spec": dict(plan.spec),
        "trained_values": plan.trained_values,
        "targets": [asdict(row) for row in target_rows(plan.targets)],
        "stacks": [asdict(stack) for stack in plan.stacks],
        "whole": [asdict(target) for target in plan.whole],
        "untouched": [asdict(entry) for entry in plan.untouched],
    } | ({"quantization": asdict(plan.quantization)} if plan.quantization else {})


def _open_run(step: int) -> str:
    last = f"its last whole checkpoint is of step {step}" if step else "it has no whole checkpoint"
    return f"interrupted, unless it is going on now; {last}; `surgery train --resume auto` goes on from there"


def _whether(name: str, *, is_there: bool) -> str:
    return f"{name or 'not recorded'} ({'found' if is_there else 'not found'})"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
