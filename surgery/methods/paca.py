"""PaCA: train a few input columns of each frozen weight, in place. The layers themselves are in `paca_layers`.

The rest of it: `paca_spec` (what is asked for), `paca_plan` (what will be done), `paca_files` (the base's files).

Source: PaCA, arXiv 2503.01905 (ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.columns import columns_key
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch
from surgery.errors import BaseMismatchError, UnsupportedError
from surgery.experts import (
    by_parameter,
    columns_of,
    join,
    join_columns,
    layer_of,
    live_weight,
    require_equal,
    require_joined,
    take,
)
from surgery.methods import Method
from surgery.methods.paca_files import bind, fresh
from surgery.methods.paca_plan import plan, planned_columns
from surgery.methods.paca_spec import PacaSpec
from surgery.paca_experts import close_experts, open_experts, opened_experts
from surgery.paca_kinds import OPENED, keep_statistics, let_go, route
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
from surgery.paca_quantized import QuantizedPacaLinear, close_quantized, open_quantized
from surgery.plan import SurgeryPlan, Target
from surgery.quantized import is_quantized
from surgery.resampling import Lane, lanes_of, open_past
from surgery.resampling import held as held_columns
from surgery.sharding import whole as gathered
from surgery.tensorfile import torch_dtype


def attach(model: nn.Module, plan: SurgeryPlan, delta: ColumnDelta | None) -> None:
    """Open the plan's targets in a frozen model, in place. `delta` gives the columns and their values.

    A group's layers share one gathered input where their columns are equal: an adapter may bring other ones for each.
    """
    spec = PacaSpec(**plan.spec)
    watch_optimizers()
    _require_held(model, plan)
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
        module, gather, scale = model.get_submodule(target.module), shared[keys[target.module]], spec.scale(target.rank)
        own, storage = columns[target.module], torch_dtype(target.dtype)
        if is_quantized(module):
            original = patch.original if patch else None
            layer = open_quantized(module, own, original=original, storage=storage, shared=gather, scale=scale)
        else:
            axis, kind = target.input_axis, OPENED[type(module)]
            layer = open_layer(module, own, input_axis=axis, storage=storage, shared=gather, scale=scale, opened=kind)
        if patch:
            _start(layer, patch)
    route(model)
    keep_statistics(model, plan.frozen)


def _active_columns(patch: ColumnPatch) -> Tensor:
    return patch.columns if patch.active is None else patch.active


def _start(layer: PacaLayer, patch: ColumnPatch) -> None:
    """Let a layer hold a patch's values: of the columns that train, and of those that did before."""
    is_active = torch.isin(patch.columns, _active_columns(patch))
    layer.start_from(patch.values[:, is_active])
    layer.refresh()
    layer.paca_scores = patch.scores
    if not bool(is_active.all()):
        open_past(Lane(layer), patch.columns[~is_active], patch.values[:, ~is_active])


def _require_held(model: nn.Module, plan: SurgeryPlan) -> None:
    """The model holds its weights as the plan says. Raises: UnsupportedError."""
    planned = set(plan.quantization.layers) if plan.quantization else set()
    name = next((name for name in planned if not is_quantized(model.get_submodule(name))), None)
    if name and plan.quantization:
        found = f"{name} is dense, and the plan holds the base as {plan.quantization.kind}"
        fix = "Load it with surgery.load, or leave quantize out"
        raise UnsupportedError("attach", found, expected="the model as planned", fix=fix)


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
        _start_experts(part, targets, {t.module: delta.patches[t.module] for t in targets}, count)


def _start_experts(part: PacaLayer, targets: Sequence[Target], patches: Mapping[str, ColumnPatch], count: int) -> None:
    """The same as `_start`, of all targets of a parameter of experts. Raises: DamagedError."""
    is_active = {module: torch.isin(patch.columns, _active_columns(patch)) for module, patch in patches.items()}
    part.start_from(join(targets, {m: patch.values[:, is_active[m]] for m, patch in patches.items()}, count))
    part.refresh()
    lanes = [(lane, _members(lane, targets)) for lane in lanes_of(part)]
    scores = [patches[members[0].module].scores for _, members in lanes]
    known = [score for score in scores if score is not None]
    part.paca_scores = None if not known else known[0] if len(lanes) == 1 else torch.stack(known)
    for lane, members in lanes:
        first = members[0].module
        for target in members:
            require_equal(target, patches[target.module].columns, patches[first].columns)
        if bool(is_active[first].all()):
            continue
        past = {t.module: patches[t.module].values[:, ~is_active[t.module]] for t in members}
        if lane.expert is None:
            values = join(members, past, count).flatten(0, 1)
        else:
            values = torch.cat([past[target.module] for target in members])
        open_past(lane, patches[first].columns[~is_active[first]], values)


def _members(lane: Lane, targets: Sequence[Target]) -> list[Target]:
    """A lane's targets among those of a parameter of experts, in the order in which they lie in memory."""
    mine = [target for target in targets if lane.expert is None or target.place[0] == lane.expert]
    return sorted(mine, key=lambda target: target.place)


def _own_columns(model: nn.Module, delta: ColumnDelta) -> dict[str, Tensor]:
    """The adapter's columns by module, in which the model holds what the adapter's base held there."""
    columns = {}
    for module, patch in delta.patches.items():
        columns[module] = _active_columns(patch)
        if not patch.target.holder and is_quantized(model.get_submodule(module)):
            continue  # the base's own columns are not in the model: its file's digest says which base it is
        weight = live_weight(model, patch.target)
        here = read_columns(weight, patch.columns.to(weight.device), patch.target.input_axis)
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
        if plan.spec.get("resample") and not target.rows:
            patches |= _collect_all(Lane(layer), [target])
            continue
        held = gathered(layer.paca_original)
        values = combine(held, gathered(layer.paca_delta), layer.paca_scale)
        original = originals.get(target.module, held.to(layer.paca_storage))
        columns = layer.paca_columns.to("cpu", copy=True)  # a group's layers hold one tensor, a file one for each
        patches[target.module] = ColumnPatch(target, columns, values, original)
    return ColumnDelta(plan, patches, whole)


def _collect_experts(
    opened: Mapping[str, PacaLayer], plan: SurgeryPlan, originals: Mapping[str, Tensor]
) -> dict[str, ColumnPatch]:
    patches: dict[str, ColumnPatch] = {}
    for targets in by_parameter(plan.targets).values():
        part = opened[layer_of(targets[0])]
        if plan.spec.get("resample"):
            for lane in lanes_of(part):
                patches |= _collect_all(lane, _members(lane, targets))
            continue
        held = gathered(part.paca_original)
        values, stored = combine(held, gathered(part.paca_delta), part.paca_scale), held.to(part.paca_storage)
        for target in targets:
            original = originals.get(target.module, take(stored, target))
            columns = columns_of(part.paca_columns, target)
            patches[target.module] = ColumnPatch(target, columns, take(values, target), original)
    return patches


def _collect_all(lane: Lane, targets: Sequence[Target]) -> dict[str, ColumnPatch]:
    """All columns of a lane that have trained, each once, by module."""
    everything, layer = held_columns(lane), lane.layer
    values = combine(everything.original, everything.delta, layer.paca_scale)
    original = everything.original.to(layer.paca_storage)
    scores = None if layer.paca_scores is None else lane.part(layer.paca_scores)
    patches = {}
    for target in targets:  # a file holds for each what in memory is one
        columns, now = everything.columns.clone(), lane.columns.to("cpu", copy=True)
        own, base = (_of_target(lane, target, tensor) for tensor in (values, original))
        patches[target.module] = ColumnPatch(target, columns, own, base, now, scores)
    return patches


def _of_target(lane: Lane, target: Target, values_ou: Tensor) -> Tensor:
    """A target's rows of what a lane holds."""
    if not target.holder:
        return values_ou
    if lane.expert is None:
        return take(values_ou.reshape(len(lane.layer.paca_delta), -1, values_ou.shape[1]), target)
    return values_ou.chunk(target.place[2])[target.place[1]].clone()


def detach(model: nn.Module, *, merge: bool) -> None:
    """Plain layers again, in place: with the trained columns (`merge`) or with the base's."""
    dtype = next(
        (p.dtype for name, p in model.named_parameters() if p.is_floating_point() and ".paca_" not in name), None
    )
    for experts in opened_experts(model).values():
        close_experts(experts, merge=merge)
    for layer in layers(model).values():
        if isinstance(layer, QuantizedPacaLinear):
            close_quantized(layer, merge=merge, dtype=dtype)
        else:
            close_layer(layer, merge=merge)
    let_go(model)


METHOD = Method("paca", "arXiv 2503.01905", PacaSpec, plan, fresh, attach, trainable_names, collect, bind, detach)
