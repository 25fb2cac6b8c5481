"""PaCA's columns in a checkpoint's files: read as they are, and tied to them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.columns import Choice, refuse_stored
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target
from surgery.errors import BaseMismatchError
from surgery.experts import live_weight
from surgery.methods.paca_plan import seed_columns
from surgery.paca_layers import read_columns
from surgery.plan import Quantization, SurgeryPlan, Target
from surgery.quantized import dequantize, is_quantized
from surgery.quantized_base import packed_names, seen_weight, stored_sha256, stored_weight
from surgery.tensorfile import torch_dtype

SAME_BASE = 1e-2  # of the columns' norm: another device, or loader, may round a few values otherwise when it quantizes
_RIGHT_BASE = "Name the right base"


def fresh(
    checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch], choice: Choice | None = None
) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged. Raises: RequestError for stored columns."""
    refuse_stored(plan.spec["select"])
    patches, targets = {}, []
    for target in plan.targets:
        columns = choice.columns[target.module] if choice else seed_columns(plan, target)
        digest, original = _read_columns(checkpoint, plan.quantization, target, columns)
        bound = replace(target, sha256=digest)
        patches[target.module] = _unmoved(plan, bound, columns, original, choice)
        targets.append(bound)
    return ColumnDelta(replace(plan, targets=tuple(targets)), patches, whole)


def fresh_live(model: nn.Module, plan: SurgeryPlan, whole: Mapping[str, WholePatch], choice: Choice) -> ColumnDelta:
    """The same of a model in memory, for columns that were chosen by looking at it."""
    patches = {}
    for target in plan.targets:
        columns, module = choice.columns[target.module], model.get_submodule(target.holder or target.module)
        is_packed = not target.holder and is_quantized(module)
        weight = dequantize(module, torch_dtype(target.dtype)) if is_packed else live_weight(model, target)
        original = read_columns(weight, columns.to(weight.device), target.input_axis).cpu()
        patches[target.module] = _unmoved(plan, target, columns, original, choice)
    return ColumnDelta(plan, patches, whole)


def _unmoved(
    plan: SurgeryPlan, target: Target, columns: Tensor, original: Tensor, choice: Choice | None
) -> ColumnPatch:
    master = torch.float64 if original.dtype == torch.float64 else torch.float32
    active = columns if plan.spec.get("resample") and not target.rows else None
    scores = choice.scores.get(target.module) if choice else None
    return ColumnPatch(target, columns, original.to(master, copy=True), original, active, scores)


def _read_columns(
    checkpoint: Checkpoint, quantization: Quantization | None, target: Target, columns: Tensor
) -> tuple[str, Tensor]:
    """A target's digest and its columns (out, r) in the base's files: of packed ones what they stand for."""
    if quantization is None or not quantization.is_stored or target.module not in quantization.layers:
        return read_target(checkpoint, target, columns)
    weight = seen_weight(checkpoint, quantization, target.weight)
    return stored_sha256(checkpoint, target.weight), weight.index_select(1, columns)


def bind(
    delta: ColumnDelta, checkpoint: Checkpoint, disk: Mapping[str, str], whole: Mapping[str, WholePatch]
) -> ColumnDelta:
    """The same delta with its targets tied to a checkpoint's files. `disk`: the name there of each parameter."""
    plan = delta.plan
    held = _bind_quantization(plan.quantization, checkpoint, disk)
    layers_of = held.layers if held else {}
    bound = {
        module: _bind_quantized(patch, checkpoint, held) if held and module in layers_of
        else _bind_patch(patch, checkpoint, disk)
        for module, patch in delta.patches.items()
    }  # fmt: skip
    patches = {target.module: bound[target.module] for target in plan.targets}
    targets = tuple(patch.target for patch in patches.values())
    return ColumnDelta(replace(plan, targets=targets, quantization=held), patches, whole)


def _bind_quantization(
    held: Quantization | None, checkpoint: Checkpoint, disk: Mapping[str, str]
) -> Quantization | None:
    """How a base's files hold what a live model holds quantized."""
    if held is None:
        return None
    missing = next((name for name in held.layers if f"{name}.weight" not in disk), None)
    if missing:
        raise BaseMismatchError(str(checkpoint.root), f"no weight for {missing}", expected="one", fix=_RIGHT_BASE)
    layers_of = {name: disk[f"{name}.weight"] for name in held.layers}
    packed = set(packed_names(checkpoint))
    return Quantization(held.kind, next(iter(layers_of.values())) in packed, layers_of)


def _bind_quantized(patch: ColumnPatch, checkpoint: Checkpoint, held: Quantization) -> ColumnPatch:
    """A patch on dequantized columns as one on the base's own: moved by as much."""
    weight = held.layers[patch.target.module]
    stored = stored_weight(checkpoint, weight) if held.is_stored else checkpoint[weight]
    target = replace(patch.target, weight=weight, dtype=stored.dtype)
    if stored.shape == target.shape:
        digest, original = _read_columns(checkpoint, held, target, patch.columns)
        if torch.equal(original, patch.original):  # it was loaded with its adapter, which knows the base's own
            return ColumnPatch(replace(target, sha256=digest), patch.columns, patch.values, original)
    seen = (
        seen_weight(checkpoint, held, weight).index_select(1, patch.columns) if stored.shape == target.shape else None
    )
    if seen is None or (seen.float() - patch.original.float()).norm() > SAME_BASE * patch.original.float().norm():
        raise BaseMismatchError(str(checkpoint.root), f"{weight} is not what the model started from",
                                expected=f"the checkpoint that it was quantized from as {held.kind}",
                                fix=_RIGHT_BASE)  # fmt: skip
    digest, original = _read_columns(checkpoint, held, target, patch.columns)
    values = original.float() + (patch.values - patch.original.float())
    return ColumnPatch(replace(target, sha256=digest), patch.columns, values, original)


def _bind_patch(patch: ColumnPatch, checkpoint: Checkpoint, disk: Mapping[str, str]) -> ColumnPatch:
    weight = disk.get(patch.target.module if patch.target.place else patch.target.name, "")
    if not weight or checkpoint[weight].shape != patch.target.shape:
        raise BaseMismatchError(
            str(checkpoint.root),
            f"no weight for {patch.target.module}",
            expected=f"one of shape {patch.target.shape}",
            fix=_RIGHT_BASE,
        )
    target = replace(patch.target, weight=weight, dtype=checkpoint[weight].dtype)
    digest, original = read_target(checkpoint, target, patch.columns)
    if not torch.equal(original.to(patch.original.dtype), patch.original):
        raise BaseMismatchError(
            str(checkpoint.root),
            f"{weight} is not what the model started from",
            expected="the checkpoint the model was loaded from",
        )
    is_same = patch.values == patch.original.to(patch.values.dtype)  # unmoved: the file may say it more exactly
    values = torch.where(is_same, original.to(patch.values.dtype), patch.values)
    return replace(patch, target=replace(target, sha256=digest), values=values, original=original)
