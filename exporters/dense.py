"""The merged checkpoint: the base's files with trained columns in place, streamed tensor by tensor.

Memory does not grow with the checkpoint: one buffer of some megabytes and one layer's columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgery.adapter import Adapter, copy_small_files, find_base
from surgery.checkpoint import CONFIG_FILE, INDEX_FILE, RECORD_FILE, WEIGHTS_FILE, Checkpoint, read_json
from surgery.delta import (
    ADAPTER_FILE,
    ColumnDelta,
    Delta,
    SideDelta,
    WholePatch,
    count_not_finite,
    patched_chunks,
    require_base,
    require_columns,
)
from surgery.errors import BaseMismatchError, CheckError, RequestError, UnsupportedError
from surgery.manifest import MERGED, UNDO_FILE, Base, Manifest, Record, relative_path, versions
from surgery.paca_quantized import trained_weight
from surgery.plan import Stored, SurgeryPlan, Target, WholeTarget
from surgery.quantized_base import base_digest, is_beside, is_packed, require_package, seen_weight, stored_weight
from surgery.tensorfile import (
    FLOAT_DTYPES,
    TORCH_NAMES,
    TensorInfo,
    build_header,
    dtype_name,
    tensor_bytes,
    tensor_from_bytes,
    tensor_to_bytes,
    torch_dtype,
)
from surgery.writing import (
    CheckpointWriter,
    StreamWriter,
    require_apart,
    require_disk,
    split_shards,
    write_file,
    write_tensors,
)

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
KEEP = "keep"
ORIGINAL, DEQUANTIZED = "original", "dequantized"  # what the columns of a quantized base are written into


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the output: its name there, its name in the base (empty where it is new), dtype and shape there."""

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OutFile:
    """A file of the output: its header and what follows it, in order."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]


def plan_files(checkpoint: Checkpoint, plan: SurgeryPlan, dtype: str, max_shard_bytes: int | None) -> list[OutFile]:
    """The output's files. Pure.

    The base's own files, headers and all, unless the plan adds tensors, the dtype changes or shards are asked for.
    """
    whole = {target.weight: target for target in plan.whole}
    packed = set(plan.quantization.layers.values()) if plan.quantization and plan.quantization.is_stored else set()
    new = [_whole_tensor(target, dtype) for target in plan.whole if target.weight not in checkpoint]
    side_dtype = "F64" if {info.dtype for info in checkpoint.values()} == {"F64"} else "F32"
    new += [OutTensor(target.parameter, "", side_dtype, target.shape) for target in plan.side]
    files = []
    for file, header in checkpoint.headers.items():
        infos = [info for info in header.tensors if not is_beside(info.name, packed)]
        tensors = [_dense(checkpoint, i, packed, dtype) or _out_tensor(i, plan, whole, dtype) for i in infos]
        files.append((file, header, tensors))
    files[-1][2].extend(new)
    if max_shard_bytes:
        return _sharded([tensor for _, _, tensors in files for tensor in tensors], max_shard_bytes)
    result = []
    for file, header, tensors in files:
        as_it_was = [(info.name, info.dtype, info.shape) for info in header.tensors]
        entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
        raw = header.raw if entries == as_it_was else build_header(entries, header.metadata)
        result.append(OutFile(file, raw, tuple(tensors)))
    return result


def _dense(checkpoint: Checkpoint, info: TensorInfo, packed: set[str], dtype: str) -> OutTensor | None:
    """A packed weight as it will be written; None for any other tensor."""
    if info.name not in packed:
        return None
    stored = stored_weight(checkpoint, info.name)
    return OutTensor(info.name, info.name, stored.dtype if dtype == KEEP else DTYPES[dtype], stored.shape)


def _out_tensor(info: TensorInfo, plan: SurgeryPlan, whole: dict[str, WholeTarget], dtype: str) -> OutTensor:
    shape = whole[info.name].shape if info.name in whole else info.shape
    kind = DTYPES[dtype] if dtype != KEEP and info.dtype in FLOAT_DTYPES else info.dtype
    return OutTensor(plan.merged_name(info.name), info.name, kind, shape)


def _whole_tensor(target: WholeTarget, dtype: str) -> OutTensor:
    return OutTensor(target.weight, "", target.dtype if dtype == KEEP else DTYPES[dtype], target.shape)


def _sharded(tensors: list[OutTensor], max_shard_bytes: int) -> list[OutFile]:
    by_name = {tensor.name: tensor for tensor in tensors}
    sizes = {tensor.name: tensor_bytes(tensor.dtype, tensor.shape) for tensor in tensors}
    shards = split_shards(sizes, max_shard_bytes)
    files = []
    for number, names in enumerate(shards, 1):
        stem = WEIGHTS_FILE.removesuffix(".safetensors")
        file = WEIGHTS_FILE if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        chosen = tuple(by_name[name] for name in names)
        header = build_header([(t.name, t.dtype, t.shape) for t in chosen], {"format": "pt"})
        files.append(OutFile(file, header, chosen))
    return files


def export(
    adapter: Adapter,
    out: Path,
    *,
    base: str | Path | None = None,
    dtype: str = KEEP,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    check: Callable[[Path], Any] | None = None,
    merge_base: str = "",
) -> Path:
    """Write the merged checkpoint. `check` sees the finished folder before it appears under its name.

    merge_base: of a quantized base, what the columns are written into: `original`, which is the default, or
    `dequantized`. Raises: BaseMismatchError, DamagedError, ResourceError, OutputExistsError, CheckError;
    UnsupportedError: original where the base itself is stored in 4 bits.
    """
    merge_base = choose_merge_base(adapter.plan, merge_base)
    if merge_base == DEQUANTIZED and adapter.plan.quantization:
        require_package(adapter.plan.quantization.kind)
    if dtype not in (KEEP, *DTYPES):
        raise RequestError("--dtype", repr(dtype), expected=f"{KEEP}, {', '.join(DTYPES)}")
    delta = require_columns(adapter.delta, "--merge")
    root = find_base(adapter.record, adapter.folder, base)
    checkpoint = Checkpoint.open(root)
    files = plan_files(checkpoint, adapter.plan, dtype, max_shard_bytes)
    require_apart(out, [root, *adapter.folders])
    require_targets(checkpoint, adapter.plan)
    with CheckpointWriter(out, overwrite=overwrite, check=check) as writer:
        require_disk(writer.path, size_bytes(files) + sum((f / ADAPTER_FILE).stat().st_size for f in adapter.folders))
        copy_small_files(checkpoint, writer.path, _with_dtype(checkpoint, adapter.plan, dtype))
        forget_quantization(writer.path / CONFIG_FILE)
        write_weights(writer.path, checkpoint, delta, files, is_seen=merge_base == DEQUANTIZED)
        write_undo(writer.path / UNDO_FILE, checkpoint, delta)
        settings = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "files": [file.name for file in files]}
        settings |= {"merge_base": merge_base, "notes": [merge_note(adapter.plan, merge_base)]} if merge_base else {}
        record = export_record(MERGED, adapter, root, out, settings, hub=base is None)
        write_file(writer.path / RECORD_FILE, record.to_json())
    return out


def choose_merge_base(plan: SurgeryPlan, asked: str) -> str:
    """What the columns of a quantized base are written into; the empty string where the base is not quantized.

    Raises: RequestError, UnsupportedError.
    """
    if asked not in ("", ORIGINAL, DEQUANTIZED):
        raise RequestError("--merge-base", repr(asked), expected=f"{ORIGINAL} or {DEQUANTIZED}")
    held = plan.quantization
    if held is None:
        if asked:
            raise RequestError("--merge-base", f"{asked}, and the base of this adapter is not quantized",
                               expected="no --merge-base", fix="Leave it out")  # fmt: skip
        return ""
    if held.is_stored and asked != DEQUANTIZED:
        raise UnsupportedError(
            "--merge-base", f"{asked or ORIGINAL}, and the base itself is stored as {held.kind}: it has no original",
            expected=DEQUANTIZED, fix=f"Give --merge-base {DEQUANTIZED}, which writes what training saw in 16 bits",
        )  # fmt: skip
    return asked or ORIGINAL


def merge_note(plan: SurgeryPlan, merge_base: str) -> str:
    """What a person who uses a merge of a quantized base must know."""
    kind = plan.quantization.kind if plan.quantization else ""
    if merge_base == DEQUANTIZED:
        return f"the weights are those of the base as {kind}, dequantized: exactly what training saw, not the base's"
    return (
        f"training saw the base as {kind}; this is the base itself with the columns moved as much, so that it computes "
        f"otherwise: the check `merge difference` says by how much. --merge-base {DEQUANTIZED} writes what training saw"
    )


def forget_quantization(path: Path) -> None:
    """What is written is dense: config.json does not say otherwise."""
    document = read_json(path) if path.is_file() else {}
    if document.pop("quantization_config", None) is not None:
        write_file(path, json.dumps(document, indent=2) + "\n")


def _with_dtype(checkpoint: Checkpoint, plan: SurgeryPlan, dtype: str) -> SurgeryPlan:
    """The plan with config.json's dtype changed to the files', without which loaders would cast back."""
    if dtype == KEEP or CONFIG_FILE not in checkpoint.small_files():
        return plan
    present = [key for key in ("dtype", "torch_dtype") if key in read_json(checkpoint.root / CONFIG_FILE)]
    named = dict.fromkeys(present or ["dtype"], TORCH_NAMES[DTYPES[dtype]])
    return replace(plan, config={**plan.config, **named})


def require_targets(checkpoint: Checkpoint, plan: SurgeryPlan) -> None:
    """The base has every target, as planned, and the head that was replaced. Raises BaseMismatchError."""
    for target in plan.targets:
        info: TensorInfo | Stored | None = checkpoint.get(target.weight)
        if info is not None and is_packed(plan, target.module):
            info = stored_weight(checkpoint, target.weight)
        if info is None or info.shape != target.shape or info.dtype != target.dtype:
            found = f"{info.dtype} {info.shape}" if info else "absent"
            raise BaseMismatchError(
                str(checkpoint.root),
                f"{target.weight} is {found}",
                expected=f"{target.dtype} {target.shape}, of the base this adapter was made for",
                fix="Name the right base with --base",
            )
    for head in plan.whole:
        if head.sha256 and (head.weight not in checkpoint or checkpoint.sha256(head.weight) != head.sha256):
            raise BaseMismatchError(
                str(checkpoint.root),
                f"{head.weight} is absent or another",
                expected="the base this adapter was made for",
                fix="Name the right base with --base",
            )


def size_bytes(files: list[OutFile]) -> int:
    """What the weights take on disk."""
    return sum(len(file.header) + sum(tensor_bytes(t.dtype, t.shape) for t in file.tensors) for file in files)


def write_weights(
    folder: Path, checkpoint: Checkpoint, delta: Delta, files: list[OutFile], *, is_seen: bool = False
) -> None:
    """The planned files, streamed from the base's and the delta, and their index. is_seen: as training saw them."""
    with StreamWriter() as stream:
        for file in files:
            stream.write(folder / file.name, file.header, _pieces(checkpoint, delta, file, is_seen=is_seen))
    write_index(folder, files)


def _pieces(
    checkpoint: Checkpoint, delta: Delta, file: OutFile, *, is_seen: bool
) -> Iterator[tuple[int, Iterator[bytes | memoryview]]]:
    """Each tensor of a file: its offset behind the header, and its bytes."""
    held = delta.plan.quantization if is_seen else None
    seen = {weight: module for module, weight in held.layers.items()} if held else {}
    targets = {target.weight: target for target in delta.plan.targets}
    side = delta.state if isinstance(delta, SideDelta) else {}
    whole = {target.weight: target for target in delta.plan.whole}
    offset = 0
    for tensor in file.tensors:
        key = tensor.source or tensor.name
        if key in whole:
            yield offset, _whole(delta.whole[whole[key].parameter], tensor)
        elif key in side:
            yield offset, iter([tensor_to_bytes(side[key].to(torch_dtype(tensor.dtype)))])
        elif key in seen:
            yield offset, _seen(checkpoint, require_columns(delta, "--merge"), seen[key], tensor)
        elif key in targets:
            chunks = _patched(checkpoint, require_columns(delta, "--merge"), targets[key])
            yield offset, _cast(chunks, checkpoint[key], tensor.dtype)
        else:
            yield offset, _cast(checkpoint.chunks(key), checkpoint[key], tensor.dtype)
        offset += tensor_bytes(tensor.dtype, tensor.shape)


def _whole(patch: WholePatch, tensor: OutTensor) -> Iterator[bytes]:
    values = patch.stored(tensor.dtype)
    _require_fits(tensor.name, tensor.dtype, count_not_finite(values))
    yield tensor_to_bytes(values)


def _seen(checkpoint: Checkpoint, delta: ColumnDelta, module: str, tensor: OutTensor) -> Iterator[bytes]:
    """A quantized layer's weight as training saw it; the base's digest is checked where the plan has one."""
    held = delta.plan.quantization
    assert held is not None  # noqa: S101  the caller's question
    patch = delta.patches.get(module)
    if patch is not None:
        require_base(patch.target, base_digest(checkpoint, delta.plan, patch.target), str(checkpoint.root))
    values = trained_weight(seen_weight(checkpoint, held, held.layers[module]), patch).to(torch_dtype(tensor.dtype))
    _require_fits(tensor.name, tensor.dtype, count_not_finite(values))
    yield tensor_to_bytes(values)


def _patched(checkpoint: Checkpoint, delta: ColumnDelta, target: Target) -> Iterator[memoryview]:
    """The merged bytes of one target; the base's digest is checked on the way."""
    patch = delta.patches[target.module]
    digest = hashlib.sha256()
    wanted, new = patch.columns, patch.stored()
    yield from patched_chunks(checkpoint, target.weight, target, wanted, new, digest.update)
    require_base(target, digest.hexdigest(), str(checkpoint.root))


def _cast(chunks: Iterator[memoryview], info: TensorInfo, dtype: str) -> Iterator[bytes | memoryview]:
    if dtype == info.dtype:
        yield from chunks
        return
    for chunk in chunks:
        values = tensor_from_bytes(bytearray(chunk), info.dtype, (-1,))
        cast = values.to(torch_dtype(dtype))
        _require_fits(info.name, dtype, int(torch.isinf(cast).sum() - torch.isinf(values).sum()))
        yield tensor_to_bytes(cast)


def _require_fits(name: str, dtype: str, overflows: int) -> None:
    """Raises CheckError where a cast made values infinite."""
    if overflows:
        raise CheckError(
            name,
            f"{overflows} values too large for {dtype}",
            expected="all values to fit",
            fix="Keep the base's dtype, or choose bf16 or fp32",
        )


def write_index(folder: Path, files: list[OutFile]) -> None:
    """The index, anew, where there is more than one file."""
    if [file.name for file in files] == [WEIGHTS_FILE]:
        return
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor_bytes(tensor.dtype, tensor.shape) for file in files for tensor in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX_FILE, json.dumps(index, indent=2, ensure_ascii=False) + "\n")


def write_undo(path: Path, checkpoint: Checkpoint, delta: ColumnDelta) -> None:
    """All that a merge replaces: columns, heads, headers and small files of the base.

    A safetensors file under another ending, so that loaders that take every *.safetensors pass it by.
    """
    texts = {f"header:{name}": header.raw for name, header in checkpoint.headers.items()}
    names = [*checkpoint.small_files(), *([INDEX_FILE] if checkpoint.is_sharded else [])]
    texts |= {f"file:{name}": (checkpoint.root / name).read_bytes() for name in names}
    heads = {f"{name}.original": w.original for name, w in delta.whole.items() if w.original is not None}
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    widths = delta.widths()
    for target in delta.plan.targets:
        width = widths[target.module]
        entries.append((f"{target.module}.columns", "I64", (width,)))
        entries.append((f"{target.module}.original", target.dtype, (target.out_features, width)))
    entries += [(name, dtype_name(head.dtype), tuple(head.shape)) for name, head in heads.items()]
    entries += [(name, "U8", (len(text),)) for name, text in texts.items()]

    def chunks() -> Iterator[bytes | memoryview]:
        for target in delta.plan.targets:
            patch = delta.patches[target.module]
            yield tensor_to_bytes(patch.columns)
            yield tensor_to_bytes(patch.original)
        yield from map(tensor_to_bytes, heads.values())
        yield from texts.values()

    write_tensors(path, build_header(entries, {}), chunks())


def sourced(adapter: Adapter, out: Path) -> Manifest:
    """The adapter's manifest for what is made of it at `out`: naming it, or of a union every adapter in it."""
    opened = adapter.parents or (adapter,)
    sources = tuple(
        {"path": relative_path(one.folder, out), "sha256": one.record.manifest.files[ADAPTER_FILE]} for one in opened
    )
    named = {"parents": sources, "adapter": {}} if adapter.parents else {"parents": (), "adapter": sources[0]}
    return replace(adapter.record.manifest, **named)


def export_record(kind: str, adapter: Adapter, root: Path, out: Path, settings: dict[str, Any], *, hub: bool) -> Record:
    """The record of an export. `hub`: the base is the recorded one, also where that is on the hub."""
    made = sourced(adapter, out)
    base = made.base if hub and made.base.hub_id else Base(path=relative_path(root, out))
    return Record(kind, adapter.plan, replace(made, base=base, versions=versions(), files={}, export=settings))


@dataclass(frozen=True)
class Exporter:
    """A way out: its name, what it accepts, and the function that writes a folder."""

    name: str
    accepts: tuple[type, ...]
    export: Callable[..., Path]


EXPORTER = Exporter("safetensors", (ColumnDelta,), export)
