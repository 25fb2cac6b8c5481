"""PaCA: train a few input columns of each frozen weight, in place. The layers themselves are in `paca_layers`.

Source: PaCA, arXiv 2503.01905 (ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.columns import STORED, choose_columns, columns_key, random_columns, refuse_stored, require_strategy
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target
from surgery.errors import BaseMismatchError, DamagedError, RequestError, UnsupportedError, require_known
from surgery.experts import (
    by_parameter,
    columns_of,
    expert_group,
    find_experts,
    holders,
    join,
    join_columns,
    require_joined,
    require_whole,
    take,
)
from surgery.methods import Method, PlanRequest
from surgery.paca_experts import OWN, SHARED, close_experts, open_experts, opened_experts, part_name, require_way
from surgery.paca_layers import (
    PacaLayer,
    SharedGather,
    close_layer,
    combine,
    layers,
    open_layer,
    read_columns,
    watch_optimizers,
)
from surgery.plan import Stored, SurgeryPlan, Target
from surgery.select import ALL_LINEAR, EXPERTS, LinearSite, find_sites, ranks_of, resolve
from surgery.sharding import whole as gathered
from surgery.survey import list_untouched, trace_groups
from surgery.tensorfile import FLOAT_DTYPES, torch_dtype


@dataclass(frozen=True)
class PacaSpec:
    """What PaCA is asked to do.

    rank: trained columns of each layer; rank_pattern: {pattern: rank}, the last match decides; targets, exclude: names,
    globs, `re:` patterns or `all-linear`; alpha: the update is multiplied by alpha / rank while training (None: by 1);
    select: how columns are chosen; seed: with the layer's name it decides them; experts: whether a mixture's experts
    have `shared` columns or each its `own`, where `targets` name them.
    """

    method: ClassVar[str] = "paca"
    later: ClassVar[tuple[str, ...]] = ("experts",)

    rank: int = 16
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None
    select: str = "random"
    seed: int = 0
    experts: str = SHARED

    def __post_init__(self) -> None:
        require_known("--experts", self.experts, (SHARED, OWN))
        if self.rank < 1:
            raise RequestError("--rank", str(self.rank), expected="at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError("--alpha", str(self.alpha), expected="a positive number")
        require_strategy(self.select)
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
    refuse_stored(spec.select)
    model, stored = request.model, request.stored
    sites = find_sites(model, request.heads)
    experts = find_experts(model, stored, request.parts)
    groups = trace_groups(model, sites, holders(model))
    whole = {target.parameter: target for target in request.whole}
    candidates = [site for site in sites if site.name in stored and site.name not in whole]
    chosen = resolve([*candidates, *(site for site, _ in experts)], spec.targets, exclude=spec.exclude)
    ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    _settle_experts(spec, chosen, [site for site, _ in experts], ranks, groups)
    for holder in {site.holder for site in chosen if site.holder}:
        require_way(model.get_submodule(holder))
    places = {site.module: stored[site.name] for site in candidates} | {s.module: place for s, place in experts}
    targets = tuple(_target(site, places[site.module], ranks[site.module], groups) for site in chosen)
    touched = {target.name: target for target in targets} | whole
    reasons = dict(request.converted) | {site.name: "output head" for site in sites if site.is_head}
    reasons |= {site.name: f"tied with {site.tied_with}" for site in sites if site.tied_with}
    reasons |= {site.name: "not selected" for site in candidates if not site.is_head and not site.tied_with}
    reasons |= {site.name: "experts: name them in --targets" for site, _ in experts}
    return {"targets": targets, "untouched": list_untouched(model, touched, reasons)}


def _settle_experts(
    spec: PacaSpec,
    chosen: Sequence[LinearSite],
    known: Sequence[LinearSite],
    ranks: Mapping[str, int],
    groups: dict[str, str],
) -> None:
    """Add the groups of the experts that were chosen. Raises: SelectorError, UnsupportedError, RequestError."""
    mine = [site for site in chosen if site.holder]
    if spec.experts != SHARED and not mine:
        fix = f"Add {EXPERTS} to --targets, or leave it out"
        raise RequestError("--experts", f"{spec.experts!r}, and no experts train", expected="experts to train", fix=fix)
    require_whole(mine, known, ranks)
    groups |= {site.module: expert_group(site, spec.experts, groups) for site in mine}


def _target(site: LinearSite, stored: Stored, rank: int, groups: Mapping[str, str]) -> Target:
    if stored.dtype not in FLOAT_DTYPES:
        raise UnsupportedError(
            stored.weight,
            f"dtype {stored.dtype}",
            expected=f"one of {', '.join(FLOAT_DTYPES)}",
            fix=f"Leave it out with --exclude {site.module}",
        )
    target = Target(
        site.module,
        stored.weight,
        site.out_features,
        site.in_features,
        site.input_axis,
        stored.dtype,
        rank,
        groups[site.module],
        parameter=site.parameter,
        sizes=site.sizes,
        holder=site.holder,
        place=site.place,
    )
    if stored.shape != target.shape:
        raise DamagedError(stored.weight, f"shape {stored.shape}", expected=f"{target.shape}, by config.json")
    return target


def planned_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The columns the plan's seed gives a target: (r,) int64, strictly increasing.

    Of a plan whose columns are an adapter's own, any: without the adapter only sizes are asked for.
    """
    spec = plan.spec
    if spec["select"] == STORED:
        return random_columns(target.in_features, target.rank, seed=spec["seed"], group=target.group)
    return choose_columns(spec["select"], target.in_features, target.rank, seed=spec["seed"], group=target.group)


def fresh(checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch]) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged. Raises: RequestError for stored columns."""
    refuse_stored(plan.spec["select"])
    patches, targets = {}, []
    for target in plan.targets:
        columns = planned_columns(plan, target)
        digest, original = read_target(checkpoint, target, columns)
        bound = replace(target, sha256=digest)
        master = torch.float64 if original.dtype == torch.float64 else torch.float32
        patches[target.module] = ColumnPatch(bound, columns, original.to(master, copy=True), original)
        targets.append(bound)
    return ColumnDelta(replace(plan, targets=tuple(targets)), patches, whole)


def attach(model: nn.Module, plan: SurgeryPlan, delta: ColumnDelta | None) -> None:
    """Open the plan's targets in a frozen model, in place. `delta` gives the columns and their values.

    A group's layers share one gathered input where their columns are equal: an adapter may bring other ones for each.
    """
    spec = PacaSpec(**plan.spec)
    watch_optimizers()
    columns = _own_columns(model, delta) if delta else {t.module: planned_columns(plan, t) for t in plan.targets}
    shared: dict[tuple[str, object], SharedGather] = {}
    # what is planned needs no look at the columns, which have no values where a run is only predicted
    keys = {t.module: (t.group, columns_key(columns[t.module]) if delta else t.rank) for t in plan.targets}
    for name in _gathering(plan, keys):
        shared.setdefault(keys[name], SharedGather(0)).members += 1
    for targets in by_parameter(plan.targets).values():
        _attach_experts(model, spec, targets, columns, delta, shared[keys[targets[0].module]])
    for target in plan.targets:
        if target.holder:
            continue
        patch = delta.patches[target.module] if delta else None
        layer = open_layer(
            model.get_submodule(target.module),
            columns[target.module],
            input_axis=target.input_axis,
            storage=torch_dtype(target.dtype),
            shared=shared[keys[target.module]],
            scale=spec.scale(target.rank),
        )
        if patch:
            layer.start_from(patch.values)
            layer.refresh()


def _gathering(plan: SurgeryPlan, keys: Mapping[str, object]) -> list[str]:
    """The targets that gather an input: of experts that share their columns one for each parameter."""
    found = {(keys[t.module], t.name if t.holder else t.module): t.module for t in reversed(plan.targets)}
    return list(found.values())


def _attach_experts(
    model: nn.Module,
    spec: PacaSpec,
    targets: Sequence[Target],
    columns: Mapping[str, Tensor],
    delta: ColumnDelta | None,
    shared: SharedGather,
) -> None:
    """Open one parameter of experts: all its targets together."""
    first, holder = targets[0], model.get_submodule(targets[0].holder)
    if len({target.dtype for target in targets}) > 1:
        raise UnsupportedError(first.name, "experts of several dtypes", expected="one dtype for all")
    count = len(model.get_parameter(first.name))
    joined = join_columns(targets, columns, count)
    if delta:
        require_joined(targets, columns, joined)
    part = open_experts(
        holder,
        first.parameter,
        joined,
        storage=torch_dtype(first.dtype),
        shared=shared if joined.dim() == 1 else SharedGather(1),
        scale=spec.scale(first.rank),
    )
    if delta:
        part.start_from(join(targets, {t.module: delta.patches[t.module].values for t in targets}, count))
        part.refresh()


def _read_patch_columns(model: nn.Module, target: Target, columns: Tensor) -> Tensor:
    """What a model holds in a target's columns: (o, r)."""
    weight = model.get_parameter(target.name).detach()
    if target.place:
        expert, part, parts = target.place
        weight = weight[expert].chunk(parts)[part]
    return read_columns(weight, columns.to(weight.device), target.input_axis)


def _own_columns(model: nn.Module, delta: ColumnDelta) -> dict[str, Tensor]:
    """The adapter's columns by module, in which the model holds what the adapter's base held there."""
    columns = {}
    for module, patch in delta.patches.items():
        columns[module] = patch.columns
        weight = model.get_parameter(patch.target.name)
        here = _read_patch_columns(model, patch.target, patch.columns)
        if not torch.equal(here.cpu(), patch.original.to(weight.dtype)):
            raise BaseMismatchError(
                f"adapter, {module}",
                "the model's columns are not its base's",
                expected="the base this adapter was made for",
                fix="Name the right base with --base",
            )
    return columns


def trainable_names(plan: SurgeryPlan) -> set[str]:
    """The parameters that may train, by name."""
    return {f"{layer_of(target)}.paca_delta" for target in plan.targets}


def layer_of(target: Target) -> str:
    """The module of an attached model that holds a target's difference."""
    return f"{target.holder}.{part_name(target.parameter)}" if target.holder else target.module


def collect(
    model: nn.Module, plan: SurgeryPlan, whole: Mapping[str, WholePatch], originals: Mapping[str, Tensor]
) -> ColumnDelta:
    """Read back what training changed. `originals`: the base's columns (o, r), by module, where its file is known."""
    opened = layers(model)
    patches = _collect_experts(opened, plan, originals)
    for target in plan.targets:
        if target.holder:
            continue
        layer = opened[target.module]
        held = gathered(layer.paca_original)
        values = combine(held, gathered(layer.paca_delta), layer.paca_scale)
        original = originals.get(target.module, held.to(layer.paca_storage))
        columns = layer.paca_columns.to("cpu", copy=True)  # a group's layers hold one tensor, a file one for each
        patches[target.module] = ColumnPatch(target, columns, values, original)
    return ColumnDelta(plan, patches, whole)


def _collect_experts(
    opened: Mapping[str, PacaLayer], plan: SurgeryPlan, originals: Mapping[str, Tensor]
) -> dict[str, ColumnPatch]:
    patches = {}
    for targets in by_parameter(plan.targets).values():
        part = opened[layer_of(targets[0])]
        held = gathered(part.paca_original)
        values, stored = combine(held, gathered(part.paca_delta), part.paca_scale), held.to(part.paca_storage)
        for target in targets:
            original = originals.get(target.module, take(stored, target))
            columns = columns_of(part.paca_columns, target)
            patches[target.module] = ColumnPatch(target, columns, take(values, target), original)
    return patches


def bind(
    delta: ColumnDelta, checkpoint: Checkpoint, disk: Mapping[str, str], whole: Mapping[str, WholePatch]
) -> ColumnDelta:
    """The same delta with its targets tied to a checkpoint's files. `disk`: the name there of each parameter."""
    bound = {module: _bind_patch(patch, checkpoint, disk) for module, patch in delta.patches.items()}
    patches = {target.module: bound[target.module] for target in delta.plan.targets}
    return ColumnDelta(replace(delta.plan, targets=tuple(patch.target for patch in patches.values())), patches, whole)


def _bind_patch(patch: ColumnPatch, checkpoint: Checkpoint, disk: Mapping[str, str]) -> ColumnPatch:
    weight = disk.get(patch.target.module if patch.target.place else patch.target.name, "")
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
    for experts in opened_experts(model).values():
        close_experts(experts, merge=merge)
    for layer in layers(model).values():
        close_layer(layer, merge=merge)


METHOD = Method("paca", "arXiv 2503.01905", PacaSpec, plan, fresh, attach, trainable_names, collect, bind, detach)
