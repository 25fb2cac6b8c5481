"""A checkpoint and its ONNX graphs as one folder: `model.onnx` names the safetensors files as its data.

Merged and untouched checkpoints keep the files that they have; a READ adapter's side network and new heads come in
`read.safetensors`, and its recurrence over the layers is one node of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from exporters import dense
from exporters.dense import KEEP, Exporter, export_record, plan_files, size_bytes, write_weights
from exporters.onnx_folder import SIDE_FILE, OnnxOptions, add_graphs, side_tensors
from surgery.adapter import Adapter, copy_small_files, find_base, find_model
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import ColumnDelta, SideDelta, require_backbone
from surgery.manifest import ONNX, Base, Manifest, Record, relative_path, versions
from surgery.plan import NO_METHOD, SurgeryPlan
from surgery.planning import require_bare
from surgery.survey import own_task, read_config
from surgery.writing import CheckpointWriter, require_apart, require_disk, write_file


def export(
    adapter: Adapter,
    out: Path,
    *,
    base: str | Path | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    check: Callable[[Path], Any] | None = None,
    options: OnnxOptions,
) -> Path:
    """Write an adapter's model with its graphs: merged, or (READ) as backbone and side network.

    check: of a merged folder's bytes; None leaves out every check. Raises: UnsupportedError, BaseMismatchError,
    DamagedError, ResourceError, OutputExistsError, CheckError.
    """

    def finish(folder: Path) -> None:
        if check is not None and isinstance(adapter.delta, ColumnDelta):
            check(folder)
        add_graphs(folder, options, delta=adapter.delta, is_checked=check is not None)

    if isinstance(adapter.delta, ColumnDelta):
        return dense.export(adapter, out, base=base, max_shard_bytes=max_shard_bytes, overwrite=overwrite, check=finish)
    root = find_base(adapter.record, adapter.folder, base)
    checkpoint = Checkpoint.open(root)
    require_apart(out, [root, adapter.folder])
    require_backbone(checkpoint, adapter.plan)
    with CheckpointWriter(out, overwrite=overwrite, check=finish) as writer:
        _copy(checkpoint, writer.path, adapter.plan, max_shard_bytes)
        tensors = side_tensors(adapter.plan, adapter.delta)
        write_file(writer.path / SIDE_FILE, safetensors.torch.save(tensors, {"format": "pt"}))
        settings = {"format": ONNX, "max_shard_bytes": max_shard_bytes}
        record = export_record(ONNX, adapter, root, out, settings, hub=base is None)
        write_file(writer.path / RECORD_FILE, record.to_json())
    return out


def export_checkpoint(
    model: str | Path,
    out: Path,
    *,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    options: OnnxOptions,
) -> Path:
    """Write a checkpoint, as it is, with its graphs. Raises: as `export`."""
    root, origin = find_model(model)
    require_bare(root)
    checkpoint, config = Checkpoint.open(root), read_config(root)
    plan = SurgeryPlan(NO_METHOD, {}, (config.architectures or [""])[0], own_task(config))
    require_apart(out, [root])

    def finish(folder: Path) -> None:
        add_graphs(folder, options, delta=None, is_checked=check)

    with CheckpointWriter(out, overwrite=overwrite, check=finish) as writer:
        _copy(checkpoint, writer.path, plan, max_shard_bytes)
        origin = origin if origin.hub_id else Base(path=relative_path(root, out))
        record = Record(ONNX, plan, Manifest(origin, versions(), export={"format": ONNX}))
        write_file(writer.path / RECORD_FILE, record.to_json())
    return out


def _copy(checkpoint: Checkpoint, folder: Path, plan: SurgeryPlan, max_shard_bytes: int | None) -> None:
    """The checkpoint's own tensors, untouched, and its small files with the plan's entries."""
    bare = SurgeryPlan(NO_METHOD, {}, plan.architecture, plan.task)
    files = plan_files(checkpoint, bare, KEEP, max_shard_bytes)
    require_disk(folder, size_bytes(files))
    copy_small_files(checkpoint, folder, plan)
    write_weights(folder, checkpoint, ColumnDelta(bare, {}, {}), files)


EXPORTER = Exporter(ONNX, (ColumnDelta, SideDelta), export)
