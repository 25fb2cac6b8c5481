"""A READ model as one folder that transformers loads: the backbone's files, the side network, and its modeling file.

`AutoModelFor...from_pretrained(folder, trust_remote_code=True)` runs `modeling_read.py`, which is the project's own
module with a class of the backbone's at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporters.dense import (
    KEEP,
    Exporter,
    export_record,
    plan_files,
    require_targets,
    size_bytes,
    write_weights,
)
from surgery.adapter import Adapter, copy_small_files, find_base
from surgery.checkpoint import RECORD_FILE, Checkpoint
from surgery.delta import SideDelta, require_backbone
from surgery.errors import RequestError
from surgery.manifest import REMOTE_CODE
from surgery.methods.read import MODELING_FILE, modeling_config, modeling_source
from surgery.writing import CheckpointWriter, require_apart, require_disk, write_file


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
    """Write backbone and side network as one folder. `check` sees it before it appears under its name.

    Raises: BaseMismatchError, DamagedError, ResourceError, OutputExistsError, CheckError.
    """
    if dtype != KEEP:
        raise RequestError("--dtype", repr(dtype), expected=f"{KEEP!r} with --format {REMOTE_CODE}")
    root = find_base(adapter.record, adapter.folder, base)
    checkpoint = Checkpoint.open(root)
    files = plan_files(checkpoint, adapter.plan, dtype, max_shard_bytes)
    require_apart(out, [root, adapter.folder])
    require_targets(checkpoint, adapter.plan)
    require_backbone(checkpoint, adapter.plan)
    plan = replace(adapter.plan, config={**adapter.plan.config, **modeling_config(adapter.plan)})
    with CheckpointWriter(out, overwrite=overwrite, check=check) as writer:
        require_disk(writer.path, size_bytes(files))
        copy_small_files(checkpoint, writer.path, plan)
        write_weights(writer.path, checkpoint, adapter.delta, files)
        write_file(writer.path / MODELING_FILE, modeling_source(adapter.plan.architecture))
        settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "files": [file.name for file in files]}
        record = export_record(REMOTE_CODE, adapter, root, out, {"format": REMOTE_CODE, **settings}, hub=base is None)
        write_file(writer.path / RECORD_FILE, record.to_json())
    return out


EXPORTER = Exporter(REMOTE_CODE, (SideDelta,), export)
