"""Is the export what was trained, by bytes: against its base, its undo file and its adapter.

It shares no code with the writer: base and merged are read side by side, and it looks at what differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surgery.adapter import Adapter, find_base
from surgery.checkpoint import CONFIG_FILE, Checkpoint, read_json
from surgery.delta import (
    ColumnPatch,
    backbone_sha256,
    bits,
    columns_here,
    require_backbone,
    require_columns,
    require_side,
)
from surgery.errors import BaseMismatchError, CheckError, NotAModelError, counted
from surgery.manifest import Check, Record
from surgery.methods.read import MODELING_FILE, modeling_config, modeling_source
from surgery.plan import NO_METHOD, SurgeryPlan, Target
from surgery.tensorfile import (
    CHUNK_BYTES,
    FLOAT_DTYPES,
    TensorFile,
    TensorInfo,
    dtype_name,
    tensor_from_bytes,
    tensor_to_bytes,
    torch_dtype,
)
from surgery.verify_quantized import DEQUANTIZED, check_seen, dense_infos

EXPORT_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Sides:
    """What is compared: the merged folder, its base, record and undo file and, where it is at hand, its adapter.

    A folder with a side network has no undo file: its base lies in it untouched.
    """

    merged: Checkpoint
    base: Checkpoint
    record: Record
    undo: TensorFile | None
    adapter: Adapter | None
    why_no_adapter: str


def _dtype_of(sides: Sides, info: TensorInfo) -> str:
    return sides.merged[sides.record.plan.merged_name(info.name)].dtype


def check_names(sides: Sides) -> Check:
    """Nothing is lost and nothing is added but new heads."""
    plan = sides.record.plan
    infos = dense_infos(sides.base, plan)
    expected = {plan.merged_name(name) for name in infos} | {w.weight for w in plan.whole if not w.sha256}
    expected |= {t.parameter for t in plan.side}
    difference = sorted(expected ^ set(sides.merged))
    if difference:
        raise CheckError(
            str(sides.merged.root),
            f"{len(difference)} tensors missing or surplus, first {difference[0]!r}",
            expected="the base's tensors, new heads and a side network's",
        )
    heads = {w.weight for w in plan.whole}
    wanted = {n: (shape, _exported_dtype(sides, dtype)) for n, (shape, dtype) in infos.items() if n not in heads}
    wanted |= {w.weight: (w.shape, _exported_dtype(sides, w.dtype)) for w in plan.whole}
    for name, (shape, dtype) in wanted.items():
        info = sides.merged[plan.merged_name(name)]
        if (info.shape, info.dtype) != (shape, dtype):
            raise CheckError(name, f"{info.dtype} {list(info.shape)}", expected=f"{dtype} {list(shape)}")
    return Check("names", "passed", f"all {len(infos)} tensors of the base are there, {len(heads)} trained whole")


def _exported_dtype(sides: Sides, dtype: str) -> str:
    """What the export made of a tensor's dtype."""
    cast = EXPORT_DTYPES.get(sides.record.manifest.export.get("dtype", "keep"), dtype)
    return cast if dtype in FLOAT_DTYPES else dtype


def _chunk_pairs(sides: Sides, name: str) -> Iterator[tuple[int, bytes | memoryview, bytes | memoryview]]:
    """(first row, base, merged) by rows; the base cast to the merged dtype."""
    info, kind = sides.base[name], _dtype_of(sides, sides.base[name])
    merged_name = sides.record.plan.merged_name(name)
    merged = sides.merged.row_chunks(merged_name) if kind == info.dtype else _same_rows(sides, name, merged_name)
    for (first, ours), (_, theirs) in zip(sides.base.row_chunks(name), merged, strict=True):
        if kind != info.dtype:
            cast = tensor_from_bytes(bytearray(ours), info.dtype, (-1,)).to(torch_dtype(kind))
            yield first, tensor_to_bytes(cast), theirs
        else:
            yield first, ours, theirs


def _same_rows(sides: Sides, name: str, merged_name: str) -> Iterator[tuple[int, memoryview]]:
    """The merged tensor cut where the base's chunks are cut: its values have another width."""
    base, merged = sides.base[name], sides.merged[merged_name]
    rows = max(1, base.shape[0]) if base.shape else 1
    row_bytes = merged.size_bytes // rows
    step = max(1, CHUNK_BYTES // max(1, base.size_bytes // rows))
    for number, chunk in enumerate(sides.merged.chunks(merged_name, max(1, step * row_bytes))):
        yield number * step, chunk


def check_untouched(sides: Sides) -> Check:
    """Every tensor that the plan does not name is the base's, byte for byte (or cast, where the export cast)."""
    plan = sides.record.plan
    touched = {t.weight for t in plan.targets} | {w.weight for w in plan.whole}
    if plan.quantization and is_dequantized(sides):
        touched |= set(plan.quantization.layers.values())
    names = [name for name in dense_infos(sides.base, plan) if name not in touched]
    for name in names:
        for _, ours, theirs in _chunk_pairs(sides, name):
            if ours != theirs:
                raise CheckError(
                    name,
                    "it differs from the base",
                    expected="the base's bytes: it was not trained",
                    fix="Export again",
                )
    return Check("untouched tensors", "passed", f"{len(names)} equal the base's byte for byte")


def check_carried(folder: Path, record: Record, base: str | Path | None) -> list[Check]:
    """The tensors beside graphs are the base's, byte for byte: by the base, or by the digest that a plan has of it."""
    checkpoint, plan = Checkpoint.open(folder), record.plan
    if base is None and plan.backbone_sha256:
        if backbone_sha256(checkpoint) != plan.backbone_sha256:
            found = "its tensors are not those of the base that the adapter was made for"
            raise CheckError(str(folder), found, expected="the recorded digest", fix="Export again")
        return [Check("untouched tensors", "passed", "they have the digest of the base that the adapter was made for")]
    try:
        root = find_base(record, folder, base)
    except (BaseMismatchError, NotAModelError) as error:
        if base is not None:
            raise
        return [Check("untouched tensors", "not run", f"{error.where}: {error.found}")]
    bare = replace(record, plan=SurgeryPlan(NO_METHOD, {}, plan.architecture, plan.task))
    origin = Checkpoint.open(root)
    require_backbone(origin, plan)
    sides = Sides(checkpoint, origin, bare, None, None, "")
    return [check_names(sides), check_untouched(sides)]


def is_dequantized(sides: Sides) -> bool:
    """Whether the columns were written into what a quantized base's values are."""
    return sides.record.manifest.export.get("merge_base") == DEQUANTIZED


def check_targets(sides: Sides) -> list[Check]:
    """Of each target only planned columns differ, all of them hold what was trained, and they did move."""
    if is_dequantized(sides):
        return _check_dequantized(sides)
    said = _what_moved(*_compare_targets(sides, sides.record.plan.targets))
    if sides.adapter:
        _check_heads(sides, sides.adapter)
    values = Check("trained columns", "passed", "all values are the adapter's")
    if not sides.adapter:
        values = Check("trained columns", "not run", sides.why_no_adapter)
    return [Check("planned columns", "passed", said), values]


def _compare_targets(sides: Sides, targets: Iterable[Target]) -> tuple[int, list[str]]:
    """How many of them differ from the base in their columns, and which do not. Raises: CheckError."""
    moved, unmoved = 0, []
    assert sides.undo is not None  # noqa: S101  a merged folder has one
    for target in targets:
        columns = sides.undo.read(f"{target.module}.columns")
        written, differs = _compare_target(sides, target, columns)
        if sides.adapter:
            _require_trained(sides, target, columns, written, differs=differs)
        moved += differs
        unmoved += [] if differs else [target.module]
    return moved, unmoved


def _check_dequantized(sides: Sides) -> list[Check]:
    """Every quantized weight is what training saw; a target that is not quantized is the base's but for its columns."""
    adapter, plan = sides.adapter, sides.record.plan
    patches = require_columns(adapter.delta, "verify").patches if adapter else None
    if adapter:
        _check_heads(sides, adapter)
    checks = check_seen(sides.base, sides.merged, plan, patches, sides.why_no_adapter)
    held = plan.quantization.layers if plan.quantization else {}
    dense = [target for target in plan.targets if target.module not in held]
    if dense:
        checks.append(Check("planned columns", "passed", _what_moved(*_compare_targets(sides, dense))))
    return checks


def _require_trained(sides: Sides, target: Target, columns: Tensor, written: Tensor, *, differs: bool) -> None:
    """A target's columns as written (out, r) are what its adapter trained; of a union, each adapter its own."""
    original = _original(sides, target).to(written.dtype)
    moves, left = False, len(columns)
    for patch in _trained_patches(sides, target):
        at = torch.searchsorted(columns, patch.columns).clamp(max=len(columns) - 1)
        stored = bits_of(patch.stored().to(written.dtype))
        if not torch.equal(columns[at], patch.columns) or not torch.equal(stored, bits_of(written[:, at])):
            raise CheckError(
                target.weight,
                "its columns are not what was trained",
                expected="the adapter's values",
                fix="Export again",
            )
        moves, left = moves or not torch.equal(stored, bits_of(original[:, at])), left - len(at)
    if left:
        raise CheckError(
            target.weight, f"{counted(left, 'column')} of no adapter", expected="the trained columns alone"
        )
    if differs != moves:
        raise CheckError(target.weight, "it equals the base", expected="the trained columns")


def _trained_patches(sides: Sides, target: Target) -> list[ColumnPatch]:
    """What each adapter trained of a target, read from its own file."""
    assert sides.adapter is not None  # noqa: S101  asked for where there is one
    deltas = [require_columns(one.delta, "verify") for one in sides.adapter.parents or (sides.adapter,)]
    return [delta.patches[target.module] for delta in deltas if target.module in delta.patches]


def _what_moved(moved: int, unmoved: Sequence[str]) -> str:
    """How many targets differ from the base. A merge in which none does is right, and hardly what was wanted."""
    why = f"{'was' if len(unmoved) == 1 else 'were'} not trained, or rounding to the base's dtype undid it"
    why = f"{'it' if len(unmoved) == 1 else 'they'} {why}"
    if unmoved and not moved:
        return f"no column moved: 0 of {counted(len(unmoved), 'layer')} differ from the base; {why}"
    said = f"{counted(moved, 'layer')} {'differs' if moved == 1 else 'differ'} from the base in planned columns only"
    if unmoved:
        first = f"{'first ' if len(unmoved) > 1 else ''}{unmoved[0]}"
        said += f"; {counted(len(unmoved), 'layer')} did not move ({first}): {why}"
    return said


def check_side(sides: Sides) -> list[Check]:
    """The side network is the adapter's, and what runs it is the project's own module."""
    plan, folder = sides.record.plan, sides.merged.root
    _require_own_code(folder, plan)
    code = Check("modeling file", "passed", "it is the project's own module")
    if not sides.adapter:
        return [code, Check("side network", "not run", sides.why_no_adapter)]
    delta = require_side(sides.adapter.delta, "verify")
    for name, values in delta.state.items():
        if not torch.equal(bits_of(values), bits_of(sides.merged.read_tensor(name).to(values.dtype))):
            raise CheckError(name, "it is not what was trained", expected="the adapter's values", fix="Export again")
    _check_heads(sides, sides.adapter)
    return [code, Check("side network", "passed", f"all {len(delta.state)} tensors are the adapter's")]


def _require_own_code(folder: Path, plan: SurgeryPlan) -> None:
    """The modeling file is what we write, and config.json has transformers run it and nothing else."""
    path, fix = folder / MODELING_FILE, "Export again with this version of checkpoint-surgery"
    if not path.is_file() or path.read_bytes() != modeling_source(plan.architecture).encode():
        raise CheckError(str(path), "it is not what this version writes", expected="it", fix=fix)
    config, wanted = read_json(folder / CONFIG_FILE), json.loads(json.dumps(modeling_config(plan)))
    other = [key for key in wanted if config.get(key) != wanted[key]]
    if other:
        raise CheckError(str(folder / CONFIG_FILE), f"{other[0]} is not what the plan says", expected="it", fix=fix)


def _check_heads(sides: Sides, adapter: Adapter) -> None:
    """What was trained whole is what was trained. Raises: CheckError."""
    for target in sides.record.plan.whole:
        written = sides.merged.read_tensor(sides.record.plan.merged_name(target.weight))
        stored = adapter.delta.whole[target.parameter].stored(dtype_name(written.dtype))
        if not torch.equal(bits_of(stored), bits_of(written)):
            found = "it is not what was trained"
            raise CheckError(target.weight, found, expected="the adapter's values", fix="Export again")


def bits_of(tensor: Tensor) -> Tensor:
    """A tensor's bit pattern, so that -0.0 and NaN compare as bytes do."""
    return torch.from_numpy(bits(tensor).view(f"i{tensor.element_size()}").copy())


def _original(sides: Sides, target: Target) -> Tensor:
    assert sides.undo is not None  # noqa: S101  a merged folder has one
    return sides.undo.read(f"{target.module}.original")


def _compare_target(sides: Sides, target: Target, columns: Tensor) -> tuple[Tensor, bool]:
    """The merged columns (out, r), and whether anything differs. Raises CheckError where another column does."""
    kind = _dtype_of(sides, sides.base[target.weight])
    written = torch.empty((target.out_features, len(columns)), dtype=torch_dtype(kind))
    picked, wanted = bits(written), columns.numpy()
    differs = False
    for first, ours, theirs in _chunk_pairs(sides, target.weight):
        rows = np.frombuffer(theirs, picked.dtype)
        unequal = rows != np.frombuffer(ours, picked.dtype)
        differs = differs or bool(unequal.any())
        here = columns_here(target, wanted, first, rows.size)
        here.read(rows, picked)
        unequal.reshape(here.shape)[:, here.lines] = False
        if unequal.any():
            raise CheckError(
                target.weight,
                "columns outside the plan differ from the base",
                expected=f"only its {len(columns)} planned columns to differ",
                fix="Export again",
            )
    return written, differs
