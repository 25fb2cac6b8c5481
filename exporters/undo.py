"""A merge taken back: the base again, byte for byte, from the merged folder alone.

The merged files hold every value that was not replaced, `surgery.undo` the rest: each target's columns, the base's
heads, the raw headers of its weight files and its small files verbatim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint import Checkpoint, path_inside
from surgery.delta import ColumnPatch, patched_chunks
from surgery.errors import CheckError, DamagedError, RequestError, UnsupportedError
from surgery.manifest import MERGED, UNDO_FILE, Base, Record, read_record
from surgery.plan import SurgeryPlan, Target, WholeTarget
from surgery.tensorfile import Header, TensorFile, TensorInfo, read_header, read_range
from surgery.writing import CheckpointWriter, require_apart, require_disk, write_file, write_tensors

_HEADER, _FILE = "header:", "file:"
_KEEP = "keep"


def undo(merged: Path, out: Path) -> Path:
    """Write the base of a merged folder into `out`, which appears whole or not at all.

    Raises: NotAModelError, RequestError: not a merged folder, or one that cannot be undone; UnsupportedError: the merge
    changed the dtype; DamagedError, PathEscapeError: a file that lies; CheckError: the result is not the base.
    """
    record = read_record(merged, MERGED)
    require_apart(out, [merged])
    _require_kept_dtype(merged, record)
    stored = _open_undo(merged, record.plan)
    checkpoint = Checkpoint.open(merged)
    with CheckpointWriter(out) as writer:
        limit_bytes = checkpoint.size_bytes + stored.path.stat().st_size  # a head of the base may be the larger one
        require_disk(writer.path, limit_bytes)
        for file in _names(stored, _HEADER):
            header = _place_header(stored, file, writer.path, limit_bytes)
            chunks = _file_chunks(header, checkpoint, stored, record.plan)
            write_tensors(writer.path / file, header.raw, chunks)
        for file in _names(stored, _FILE):
            _write_small(writer.path, file, _text(stored, _FILE + file))
        _require_all(Checkpoint.open(writer.path), record.plan)
    return out


def _require_kept_dtype(merged: Path, record: Record) -> None:
    if record.manifest.export.get("merge_base") == "dequantized":
        raise UnsupportedError(str(merged), "a merge with --merge-base dequantized, which has not the base's values",
                               expected="one with --merge-base original",
                               fix=f"The base itself is {_describe(record.manifest.base)}")  # fmt: skip
    dtype = record.manifest.export.get("dtype")
    if dtype != _KEEP:
        raise UnsupportedError(str(merged), f"a merge with --dtype {dtype}, whose rounding lost the base's values",
                               expected="one with --dtype keep",
                               fix=f"The base itself is {_describe(record.manifest.base)}")  # fmt: skip


def _describe(base: Base) -> str:
    return f"{base.hub_id} (revision {base.revision})" if base.hub_id else f"{base.path}, seen from the merged folder"


def _open_undo(merged: Path, plan: SurgeryPlan) -> TensorFile:
    """`surgery.undo`, once it holds what the plan needs. Raises: RequestError where there is none, DamagedError."""
    path = path_inside(merged, UNDO_FILE)
    if not path.is_file():
        raise RequestError(str(merged), f"no {UNDO_FILE}", expected="the file that the merge left there",
                           fix="Without it the replaced columns are gone; take the base itself")  # fmt: skip
    stored = TensorFile(path)
    needed = {f"{t.module}.{part}" for t in plan.targets for part in ("columns", "original")}
    needed |= {f"{w.parameter}.original" for w in plan.whole if w.sha256}
    texts = {name for name in stored.infos if name.startswith((_HEADER, _FILE))}
    difference = sorted(needed ^ (set(stored.infos) - texts))
    if difference:
        found = f"{len(difference)} tensors missing or surplus, first {difference[0]!r}"
        raise DamagedError(str(path), found, expected="what this merge replaced, and nothing else")
    if not any(name.startswith(_HEADER) for name in texts):
        raise DamagedError(str(path), "no header of a weight file", expected="those of the base")
    return stored


def _names(stored: TensorFile, kind: str) -> list[str]:
    return [name.removeprefix(kind) for name in stored.infos if name.startswith(kind)]


def _text(stored: TensorFile, name: str) -> bytes:
    info = stored.infos[name]
    if info.dtype != "U8" or len(info.shape) != 1:
        raise DamagedError(f"{stored.path}: {name!r}", f"{info.dtype} {info.shape}", expected="a list of bytes")
    return b"".join(bytes(chunk) for chunk in read_range(stored.path, info.begin, info.end))


def _free_path(folder: Path, file: str, where: Path) -> Path:
    """Where a file of the base goes. Raises: PathEscapeError; DamagedError for a name that is taken, or no file's."""
    path = path_inside(folder, file)
    if len(Path(file).parts) not in (1, 2) or path.exists() or path.parent.is_file():
        raise DamagedError(str(where), f"it names a file {file!r}", expected="each file of the base once")
    return path


def _place_header(stored: TensorFile, file: str, folder: Path, limit_bytes: int) -> Header:
    """A file of the base as recorded: its header, checked as any file's is, before its data is written.

    The file is made at its full length without data, so that the header can be held against it.
    """
    path = _free_path(folder, file, stored.path)
    if path.parent != folder or path.suffix != ".safetensors":
        raise DamagedError(str(stored.path), f"it names a weight file {file!r}", expected="a *.safetensors")
    raw = _text(stored, _HEADER + file)
    data_bytes = _data_bytes(raw, str(stored.path))
    if not 0 <= data_bytes <= limit_bytes:
        found = f"the header of {file} describes {data_bytes:,} bytes"
        raise DamagedError(str(stored.path), found, expected=f"at most the {limit_bytes:,} there are")
    with path.open("wb") as handle:
        handle.write(raw)
        handle.truncate(len(raw) + data_bytes)
    header = read_header(path)
    if header.raw != raw:
        raise DamagedError(str(stored.path), f"the header of {file} has bytes after its end", expected="a header")
    return header


def _data_bytes(raw: bytes, where: str) -> int:
    """How much data a raw header describes, taken at its word."""
    try:
        entries: dict[str, Any] = json.loads(raw[8:])
        return max(
            (int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"), default=0
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(where, f"a header is unreadable ({error})", expected="a safetensors header") from error


def _file_chunks(
    header: Header, checkpoint: Checkpoint, stored: TensorFile, plan: SurgeryPlan
) -> Iterator[bytes | memoryview]:
    """The data of one file of the base, tensor by tensor."""
    targets: Mapping[str, Target] = {target.weight: target for target in plan.targets}
    whole: Mapping[str, WholeTarget] = {target.weight: target for target in plan.whole}
    for info in header.tensors:
        if info.name in whole:
            yield from _whole_chunks(info, whole[info.name], stored)
            continue
        source = _source(info, checkpoint, plan.merged_name(info.name))
        if info.name in targets:
            yield from _target_chunks(source, targets[info.name], checkpoint, stored)
        else:
            yield from checkpoint.chunks(source.name)


def _source(info: TensorInfo, checkpoint: Checkpoint, name: str) -> TensorInfo:
    """The merged tensor that holds a tensor of the base. Raises: DamagedError."""
    source = checkpoint.get(name)
    if source is None or (source.dtype, source.shape) != (info.dtype, info.shape):
        found = f"{source.dtype} {list(source.shape)}" if source else "nothing"
        raise DamagedError(f"{checkpoint.root}, {name}", found, expected=f"{info.dtype} {list(info.shape)}",
                           fix="The folder was changed after the merge; export again")  # fmt: skip
    return source


def _target_chunks(
    source: TensorInfo, target: Target, checkpoint: Checkpoint, stored: TensorFile
) -> Iterator[memoryview]:
    """A target's bytes with the base's columns back in place; the digest decides whether they are the base's."""
    if (source.dtype, source.shape) != (target.dtype, target.shape):
        expected = f"{target.dtype} {list(target.shape)}, by the plan"
        raise DamagedError(
            f"{checkpoint.root}, {source.name}", f"{source.dtype} {list(source.shape)}", expected=expected
        )
    original = stored.read(f"{target.module}.original")
    unmoved = torch.zeros(original.shape)  # a patch checks its columns and shapes when it is made
    columns = stored.read(f"{target.module}.columns")  # more than the rank where they were drawn anew
    held = replace(target, rank=max(target.rank, columns.numel()))
    patch = ColumnPatch(held, columns, unmoved, original)
    digest = hashlib.sha256()
    for chunk in patched_chunks(checkpoint, source.name, target, patch.columns, patch.original):
        digest.update(chunk)
        yield chunk
    _require_digest(digest.hexdigest(), target.sha256, f"{checkpoint.root}, {target.weight}")


def _whole_chunks(info: TensorInfo, target: WholeTarget, stored: TensorFile) -> Iterator[memoryview]:
    """A head as the base had it."""
    name = f"{target.parameter}.original"
    kept = stored.infos.get(name)
    if kept is None or (kept.dtype, kept.shape) != (info.dtype, info.shape):
        raise DamagedError(
            str(stored.path), f"no {name!r} of {info.dtype} {list(info.shape)}", expected="the base's head"
        )
    digest = hashlib.sha256()
    for chunk in read_range(stored.path, kept.begin, kept.end):
        digest.update(chunk)
        yield chunk
    _require_digest(digest.hexdigest(), target.sha256, f"{stored.path}, {target.parameter}")


def _require_digest(digest: str, expected: str, where: str) -> None:
    if digest != expected:
        raise CheckError(where, f"restored, it has sha256 {digest[:12]}..", expected=f"the base's {expected[:12]}..",
                         fix="The merged folder was changed after the merge; take the base itself")  # fmt: skip


def _write_small(folder: Path, file: str, data: bytes) -> None:
    path = _free_path(folder, file, folder)
    path.parent.mkdir(exist_ok=True)
    write_file(path, data)


def _require_all(base: Checkpoint, plan: SurgeryPlan) -> None:
    """Every target was in one of the headers, so its digest was checked. Raises: DamagedError."""
    named = [target.weight for target in plan.targets] + [target.weight for target in plan.whole if target.sha256]
    missing = [name for name in named if name not in base]
    if missing:
        found = f"the recorded headers lack {len(missing)} trained tensors, first {missing[0]!r}"
        raise DamagedError(UNDO_FILE, found, expected="every target of the plan")
