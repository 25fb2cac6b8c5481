"""PaCA: train a few input columns of each frozen weight, in place. The layers themselves are in `paca_layers`.

Source: PaCA, arXiv 2503.01905 (ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.columns import choose_columns, require_strategy
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target
from surgery.errors import BaseMismatchError, DamagedError, RequestError, UnsupportedError
from surgery.methods import Method, PlanRequest
from surgery.paca_layers import SharedGather, close_layer, combine, layers, open_layer, watch_optimizers
from surgery.paca_quantized import QuantizedPacaLinear, close_quantized, open_quantized
from surgery.plan import Quantization, Stored, SurgeryPlan, Target
from surgery.quantized import GROUP, is_quantized, quantizable, require_kind
from surgery.quantized_base import packed_names, seen_weight, stored_sha256, stored_weight
from surgery.select import ALL_LINEAR, LinearSite, find_sites, ranks_of, resolve
from surgery.sharding import whole as gathered
from surgery.survey import list_untouched, trace_groups
from surgery.tensorfile import FLOAT_DTYPES, torch_dtype


@dataclass(frozen=True)
class PacaSpec:
    """What PaCA is asked to do.

    rank: trained columns of each layer; rank_pattern: {pattern: rank}, the last match decides; targets, exclude: names,
    globs, `re:` patterns or `all-linear`; alpha: the update is multiplied by alpha / rank while training (None: by 1);
    select: how columns are chosen; seed: with the layer's name it decides them; quantize: how the base is held while it
    is frozen, a kind of `surgery.quantized.KINDS` or empty for as it is.
    """

    method: ClassVar[str] = "paca"

    rank: int = 16
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None
    select: str = "random"
    seed: int = 0
    quantize: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError("--rank", str(self.rank), expected="at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError("--alpha", str(self.alpha), expected="a positive number")
        require_strategy(self.select)
        if self.quantize:
            require_kind(self.quantize)
        for name in ("targets", "exclude"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))

    def scale(self, rank: int) -> float:
        """What the stored difference is multiplied by while training."""
        return 1.0 if self.alpha is None else self.alpha / rank


def plan(spec: PacaSpec, request: PlanRequest) -> dict[str, Any]:
    """The layers whose columns will train, and the matrices that will not.

    Raises: SelectorError, UnsupportedError, DamagedError.
    """
    model, stored = request.model, request.stored
    sites = find_sites(model, request.heads)
    groups = trace_groups(model, sites)
    whole = {target.parameter: target for target in request.whole}
    candidates = [s for s in sites if f"{s.module}.weight" in stored and f"{s.module}.weight" not in whole]
    chosen = resolve(candidates, spec.targets, exclude=spec.exclude)
    ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    targets = tuple(_target(site, stored[f"{site.module}.weight"], ranks[site.module], groups) for site in chosen)
    touched = {f"{t.module}.weight": t for t in targets} | whole
    reasons = dict(request.converted) | {f"{s.module}.weight": "output head" for s in sites if s.is_head}
    reasons |= {f"{s.module}.weight": f"tied with {s.tied_with}" for s in sites if s.tied_with}
    reasons |= {f"{s.module}.weight": "not selected" for s in candidates if not s.is_head and not s.tied_with}
    quantization = _quantization(spec, request, [s for s in candidates if not s.is_head and not s.tied_with])
    return {
        "targets": targets, "untouched": list_untouched(model, touched, reasons), "quantization": quantization
    }  # fmt: skip


def _quantization(spec: PacaSpec, request: PlanRequest, sites: Sequence[LinearSite]) -> Quantization | None:
    """How the base will be held: every linear layer that can be is quantized, trained or not, but for the heads.

    Raises: UnsupportedError where none can be; RequestError where it is quantized already.
    """
    if not spec.quantize:
        return request.quantization
    if request.quantization:
        found = f"{spec.quantize}, and the base is held as {request.quantization.kind} already"
        raise RequestError("--quantize", found, expected="a base in 16 or 32 bits", fix="Leave it out")
    fitting = [s.module for s in sites if request.stored[f"{s.module}.weight"].dtype in QUANTIZABLE]
    names = quantizable(request.model, fitting)
    if not names:
        found = f"{spec.quantize}, and {type(request.model).__name__} has no layer that could be"
        raise UnsupportedError("--quantize", found, expected="linear layers (nn.Linear) of 16 or 32 bits",
                               fix="Leave it out")  # fmt: skip
    uneven = [s for s in sites if s.module in names and spec.quantize == "torchao-int4" and s.in_features % GROUP]
    if uneven:
        found = f"{spec.quantize}, and {uneven[0].module} has {uneven[0].in_features} inputs"
        raise UnsupportedError("--quantize", found, expected=f"widths that {GROUP} divides", fix="Take nf4 or int8")
    return Quantization(
        spec.quantize, is_stored=False, layers={name: request.stored[f"{name}.weight"].weight for name in names}
    )


def _target(site: LinearSite, stored: Stored, rank: int, groups: Mapping[str, str]) -> Target:
    if stored.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            stored.weight,
            f"dtype {stored.dtype}",
            expected=f"one of {', '.join(FLOAT_DTYPES)}",
            fix=f"Leave it out with --exclude {site.module}",
        )
    sizes = (site.out_features, site.in_features, site.input_axis)
    target = Target(site.module, stored.weight, *sizes, stored.dtype, rank, groups[site.module])
    if stored.shape != target.shape:
        raise DamagedError(stored.weight, f"shape {stored.shape}", expected=f"{target.shape}, by config.json")
    return target


QUANTIZABLE = ("F16", "BF16", "F32")


def planned_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The columns the plan's seed gives a target: (r,) int64, strictly increasing."""
    spec = plan.spec
    return choose_columns(spec["select"], target.in_features, target.rank, seed=spec["seed"], group=target.group)


def fresh(checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch]) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged."""
    patches, targets = {}, []
    for target in plan.targets:
        columns = planned_columns(plan, target)
        digest, original = _read_columns(checkpoint, plan.quantization, target, columns)
        bound = replace(target, sha256=digest)
        master = torch.float64 if original.dtype == torch.float64 else torch.float32
        patches[target.module] = ColumnPatch(bound, columns, original.to(master, copy=True), original)
        targets.append(bound)
    return ColumnDelta(replace(plan, targets=tuple(targets)), patches, whole)


def _read_columns(
    checkpoint: Checkpoint, quantization: Quantization | None, target: Target, columns: Tensor
) -> tuple[str, Tensor]:
    """A target's digest and its columns (out, r) in the base's files: of packed ones what they stand for."""
    if quantization is None or not quantization.is_stored or target.module not in quantization.layers:
        return read_target(checkpoint, target, columns)
    weight = seen_weight(checkpoint, quantization, target.weight)
    return stored_sha256(checkpoint, target.weight), weight.index_select(1, columns)


def attach(model: nn.Module, plan: SurgeryPlan, delta: ColumnDelta | None) -> None:
    """Open the plan's targets in a frozen model, in place. `delta` gives the columns' values."""
    spec = PacaSpec(**plan.spec)
    watch_optimizers()
    shared: dict[tuple[str, int], SharedGather] = {}
    for target in plan.targets:
        shared.setdefault((target.group, target.rank), SharedGather(0)).members += 1
    _require_held(model, plan)
    if delta:
        _require_originals(model, delta)
    for target in plan.targets:
        patch = delta.patches[target.module] if delta else None
        module = model.get_submodule(target.module)
        columns = patch.columns if patch else planned_columns(plan, target)
        storage, gather = torch_dtype(target.dtype), shared[target.group, target.rank]
        scale = spec.scale(target.rank)
        if is_quantized(module):
            original = patch.original if patch else None
            layer = open_quantized(module, columns, original=original, storage=storage, shared=gather, scale=scale)
        else:
            axis = target.input_axis
            layer = open_layer(module, columns, input_axis=axis, storage=storage, shared=gather, scale=scale)
        if patch:
            layer.start_from(patch.values)
            layer.refresh()


def _require_held(model: nn.Module, plan: SurgeryPlan) -> None:
    """The model holds its weights as the plan says. Raises: UnsupportedError."""
    planned = set(plan.quantization.layers) if plan.quantization else set()
    name = next((name for name in planned if not is_quantized(model.get_submodule(name))), None)
    if name and plan.quantization:
        found = f"{name} is dense, and the plan holds the base as {plan.quantization.kind}"
        fix = "Load it with surgery.load, or leave quantize out"
        raise UnsupportedError("attach", found, expected="the model as planned", fix=fix)


def _require_originals(model: nn.Module, delta: ColumnDelta) -> None:
    """The model holds, in the planned columns, what the adapter's base held there."""
    for module, patch in delta.patches.items():
        if is_quantized(model.get_submodule(module)):
            continue  # the 16-bit columns are not in the model: the file's digest says which base it is
        weight = cast("Tensor", model.get_submodule(module).weight)
        here = weight.detach().index_select(patch.target.input_axis, patch.columns.to(weight.device))
        here = here if patch.target.input_axis == 1 else here.t()
        if not torch.equal(here.cpu(), patch.original.to(weight.dtype)):
            raise BaseMismatchError(
                f"adapter, {module}",
                "the model's columns are not its base's",
                expected="the base this adapter was made for",
                fix="Name the right base with --base",
            )


def trainable_names(plan: SurgeryPlan) -> set[str]:
    """The parameters that may train, by name."""
    return {f"{t.module}.paca_delta" for t in plan.targets}


def collect(
    model: nn.Module, plan: SurgeryPlan, whole: Mapping[str, WholePatch], originals: Mapping[str, Tensor]
) -> ColumnDelta:
    """Read back what training changed. `originals`: the base's columns (o, r), by module, where its file is known."""
    opened = layers(model)
    patches = {}
    for target in plan.targets:
        layer = opened[target.module]
        held = gathered(layer.paca_original)
        values = combine(held, gathered(layer.paca_delta), layer.paca_scale)
        original = originals.get(target.module, held.to(layer.paca_storage))
        columns = layer.paca_columns.to("cpu", copy=True)  # a group's layers hold one tensor, a file one for each
        patches[target.module] = ColumnPatch(target, columns, values, original)
    return ColumnDelta(plan, patches, whole)


def bind(
    delta: ColumnDelta, checkpoint: Checkpoint, disk: Mapping[str, str], whole: Mapping[str, WholePatch]
) -> ColumnDelta:
    """The same delta with its targets tied to a checkpoint's files. `disk`: the name there of each parameter."""
    plan = delta.plan
    held = _bind_quantization(plan.quantization, checkpoint, disk)
    layers_of = held.layers if held else {}
    patches = {
        module: _bind_quantized(patch, checkpoint, held) if held and module in layers_of
        else _bind_patch(patch, checkpoint, disk)
        for module, patch in delta.patches.items()
    }  # fmt: skip
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


SAME_BASE = 1e-2  # of the columns' norm: another device, or loader, may round a few values otherwise when it quantizes
_RIGHT_BASE = "Name the right base"


def _bind_patch(patch: ColumnPatch, checkpoint: Checkpoint, disk: Mapping[str, str]) -> ColumnPatch:
    weight = disk.get(f"{patch.target.module}.weight", "")
    if not weight or checkpoint[weight].shape != patch.target.shape:
        raise BaseMismatchError(
            str(checkpoint.root),
            f"no weight for {patch.target.module}",
            expected=f"one of shape {patch.target.shape}",
            fix="Name the right base",
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
    return ColumnPatch(replace(target, sha256=digest), patch.columns, values, original)


def detach(model: nn.Module, *, merge: bool) -> None:
    """Plain layers again, in place: with the trained columns (`merge`) or with the base's."""
    dtype = next(
        (p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".paca_" not in name), None
    )
    for layer in layers(model).values():
        if isinstance(layer, QuantizedPacaLinear):
            close_quantized(layer, merge=merge, dtype=dtype)
        else:
            close_layer(layer, merge=merge)


METHOD = Method("paca", "arXiv 2503.01905", PacaSpec, plan, fresh, attach, trainable_names, collect, bind, detach)
