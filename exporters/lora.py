"""A PEFT LoRA adapter that computes what the trained columns compute.

PaCA's columns are a LoRA whose A is fixed: row j of `lora_A` (r, in) is one-hot at the j-th trained column, column j of
`lora_B` (out, r) is what training added to it, so that W + B A is the merged weight. With alpha = r PEFT scales by 1.
Ranks are padded with zeros to one that vLLM admits. One target is in memory at a time.

Source: PaCA, arXiv 2503.01905, section 3; the files are PEFT's (checked with 0.21.2).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from exporters.dense import KEEP, Exporter, require_targets, sourced
from surgery.adapter import Adapter, find_base, find_model
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import ColumnDelta, ColumnPatch, require_base, require_columns
from surgery.errors import RequestError
from surgery.experts import require_layers
from surgery.manifest import Base, Record, relative_path, versions
from surgery.peft_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, saved_modules, task_type
from surgery.plan import SurgeryPlan
from surgery.quantized_base import base_digest
from surgery.tensorfile import build_header, file_sha256, tensor_bytes, tensor_to_bytes
from surgery.writing import CheckpointWriter, require_apart, require_disk, write_file, write_tensors

LORA = "lora"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def padded_rank(rank: int) -> int:
    """The smallest rank that vLLM admits and that holds `rank` columns; above its largest, `rank` itself."""
    return next((admitted for admitted in VLLM_RANKS if admitted >= rank), rank)


def build_config(plan: SurgeryPlan, rank: int, base_name: str, revision: str) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": task_type(plan),
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(target.input_axis == 0 for target in plan.targets),
        "target_modules": [target.module for target in plan.targets],
        "modules_to_save": saved_modules(plan) or None,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def find_notes(plan: SurgeryPlan, rank: int) -> list[str]:
    """What a person who loads the adapter must know, one sentence each."""
    notes = []
    if rank > VLLM_RANKS[-1]:
        notes.append(f"vLLM refuses rank {rank}: its largest is {VLLM_RANKS[-1]}. PEFT takes it")
    if plan.whole:
        heads = ", ".join(saved_modules(plan))
        notes.append(f"vLLM refuses modules_to_save ({heads}): export with --format safetensors for it")
    notes += base_notes(plan)
    if any(target.dtype == "F64" for target in plan.targets):
        notes.append("the base is float64 and lora_B float32: the sum is rounded to about 7 digits")
    return notes


def base_notes(plan: SurgeryPlan) -> list[str]:
    """How the base must be loaded, where it is not loaded as it is."""
    notes = []
    if plan.config:
        notes.append(f"the base must be loaded as {plan.architecture} with {json.dumps(dict(plan.config))}")
    if plan.quantization:
        kind = plan.quantization.kind
        notes.append(f"training saw the base as {kind}: load it so to compute what was trained")
    return notes


def weight_entries(plan: SurgeryPlan, rank: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of the adapter, in file order."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for target in plan.targets:
        entries.append((f"{PREFIX}{target.module}.lora_A.weight", "F32", (rank, target.in_features)))
        entries.append((f"{PREFIX}{target.module}.lora_B.weight", "F32", (target.out_features, rank)))
    return entries + [(f"{PREFIX}{w.parameter}", w.dtype, w.shape) for w in plan.whole]


def selector(patch: ColumnPatch, rank: int) -> torch.Tensor:
    """lora_A: (rank, in) float32, row j one-hot at the j-th trained column, rows past the last one zero."""
    rows_ri = torch.zeros((rank, patch.target.in_features))
    rows_ri[torch.arange(len(patch.columns)), patch.columns] = 1.0
    return rows_ri


def difference(patch: ColumnPatch, rank: int) -> torch.Tensor:
    """lora_B: (out, rank) float32, what a merge adds to each trained column, columns past the last one zero.

    The values are taken as a merge stores them, in the base's dtype: the adapter and the merged checkpoint agree.
    """
    added_or = torch.zeros((patch.target.out_features, rank))
    added_or[:, : len(patch.columns)] = patch.stored().double() - patch.original.double()
    return added_or


def _chunks(delta: ColumnDelta, rank: int) -> Iterator[bytes]:
    for target in delta.plan.targets:
        patch = delta.patches[target.module]
        yield tensor_to_bytes(selector(patch, rank))
        yield tensor_to_bytes(difference(patch, rank))
    for whole in delta.plan.whole:
        yield tensor_to_bytes(delta.whole[whole.parameter].stored(whole.dtype))


@dataclass(frozen=True)
class PeftContents:
    """A PEFT folder in a format of ours, written in this order.

    entries: name, dtype and shape of each tensor; chunks: their bytes; config: (the base's name, its revision) ->
    adapter_config.json; settings: () -> what the record says of the export, asked once all bytes are made.
    """

    format: str
    entries: Sequence[tuple[str, str, tuple[int, ...]]]
    chunks: Callable[[], Iterator[bytes]]
    config: Callable[[str, str], dict[str, Any]]
    settings: Callable[[], Mapping[str, Any]]


def export(
    adapter: Adapter,
    out: Path,
    *,
    base: str | Path | None = None,
    dtype: str = KEEP,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    check: Callable[[Path], Any] | None = None,
) -> Path:
    """Write the adapter as PEFT's. The base is checked by its digests where it lies on this disk.

    Raises: RequestError for settings that mean nothing here; BaseMismatchError, OutputExistsError, ResourceError.
    """
    refuse_settings(LORA, dtype, max_shard_bytes)
    delta = require_columns(adapter.delta, "--format lora")
    plan, rank = adapter.plan, padded_rank(max(delta.widths().values()))
    contents = PeftContents(
        LORA,
        weight_entries(plan, rank),
        lambda: _chunks(delta, rank),
        lambda name, revision: build_config(plan, rank, name, revision),
        lambda: {"format": LORA, "rank": rank, "notes": find_notes(plan, rank)},
    )
    return write_peft(adapter, out, contents, base=base, overwrite=overwrite, check=check)


def write_peft(
    adapter: Adapter,
    out: Path,
    contents: PeftContents,
    *,
    base: str | Path | None,
    overwrite: bool,
    check: Callable[[Path], Any] | None,
) -> Path:
    """Write a PEFT folder with our record. Raises: BaseMismatchError, OutputExistsError, ResourceError.

    UnsupportedError for a mixture's experts.
    """
    require_layers(adapter.plan, f"--format {contents.format}")
    require_apart(out, adapter.folders)
    recorded, name = _locate(adapter, out, base)
    header = build_header(contents.entries, {"format": "pt"})
    with CheckpointWriter(out, overwrite=overwrite, check=check) as writer:
        require_disk(writer.path, len(header) + sum(tensor_bytes(kind, shape) for _, kind, shape in contents.entries))
        write_tensors(writer.path / WEIGHTS_FILE, header, contents.chunks())
        config = contents.config(name, recorded.revision)
        write_file(writer.path / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        files = {WEIGHTS_FILE: file_sha256(writer.path / WEIGHTS_FILE)}
        write_file(writer.path / RECORD_FILE, _record(adapter, out, recorded, files, contents).to_json())
    return out


def refuse_settings(format: str, dtype: str, max_shard_bytes: int | None) -> None:
    """Raises: RequestError for settings without a meaning for a PEFT folder."""
    if dtype != KEEP:
        raise RequestError("--dtype", repr(dtype), expected=f"{KEEP!r} with --format {format}",
                           fix="The difference is stored in fp32, which loses nothing")  # fmt: skip
    if max_shard_bytes is not None:
        raise RequestError("--max-shard-size", f"{max_shard_bytes} bytes", expected=f"no limit with --format {format}",
                           fix="PEFT reads its weights from one file; leave it out")  # fmt: skip


def _locate(adapter: Adapter, out: Path, base: str | Path | None) -> tuple[Base, str]:
    """The base as the record names it, and as PEFT does. A recorded hub id is not fetched."""
    recorded = adapter.record.manifest.base
    if base is None and recorded.hub_id:
        return recorded, recorded.hub_id
    root, found = find_model(base if base is not None else find_base(adapter.record, adapter.folder))
    require_apart(out, [root])
    _require_base(Checkpoint.open(root), adapter.plan)
    if found.hub_id:
        return found, found.hub_id
    return Base(path=relative_path(root, out)), path_for_peft(root)


def path_for_peft(root: Path) -> str:
    """PEFT looks from the working directory: relative to it where the base lies below it, else absolute."""
    real, here = root.resolve(), Path.cwd().resolve()
    return os.path.relpath(real, here) if real.is_relative_to(here) else str(real)


def _require_base(checkpoint: Checkpoint, plan: SurgeryPlan) -> None:
    require_targets(checkpoint, plan)
    for target in plan.targets:
        require_base(target, base_digest(checkpoint, plan, target), str(checkpoint.root))


def _record(adapter: Adapter, out: Path, base: Base, files: Mapping[str, str], contents: PeftContents) -> Record:
    made = sourced(adapter, out)
    return Record(
        contents.format,
        adapter.plan,
        replace(made, base=base, versions=versions(), files=files, export=contents.settings()),
    )


EXPORTER = Exporter(LORA, (ColumnDelta,), export)
