"""PaCA: train a few input columns of each frozen weight, in place. The layers themselves are in `paca_layers`.

Source: PaCA, arXiv 2503.01905 (ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.columns import choose_columns, refuse_stored, require_strategy
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target
from surgery.embedding_rows import find_embedding, require_rows, without_embedding
from surgery.errors import BaseMismatchError, DamagedError, RequestError, UnsupportedError
from surgery.methods import LATER, Method, PlanRequest
from surgery.paca_kinds import OPENED, keep_statistics, let_go, moving_statistics, route
from surgery.paca_layers import SharedGather, close_layer, combine, layers, open_layer, read_columns, watch_optimizers
from surgery.plan import Stored, SurgeryPlan, Target
from surgery.select import ALL, ALL_LINEAR, CONVOLUTION, EMBEDDING, LinearSite, asked_rank, ranks_of, resolve
from surgery.sharding import whole as gathered
from surgery.sites import find_all_sites
from surgery.survey import list_untouched, trace_groups
from surgery.tensorfile import FLOAT_DTYPES, torch_dtype


@dataclass(frozen=True)
class PacaSpec:
    """What PaCA is asked to do.

    rank: trained columns of each layer; rank_pattern: {pattern: rank}, the last match decides; targets, exclude: names,
    globs, `re:` patterns or `all-linear`; alpha: the update is multiplied by alpha / rank while training (None: by 1);
    select: how columns are chosen; seed: with the layer's name it decides them; rows: tokens, as numbers or, for a
    folder with a tokenizer, as texts, whose rows of the input embedding train as well.
    """

    method: ClassVar[str] = "paca"

    rank: int = 16
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None
    select: str = "random"
    seed: int = 0
    rows: tuple[int | str, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError("--rank", str(self.rank), expected="at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError("--alpha", str(self.alpha), expected="a positive number")
        require_strategy(self.select)
        for name in ("targets", "exclude", "rows"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, (str, int)) else tuple(given))

    def scale(self, rank: int) -> float:
        """What the stored difference is multiplied by while training."""
        return 1.0 if self.alpha is None else self.alpha / rank


def plan(spec: PacaSpec, request: PlanRequest) -> dict[str, Any]:
    """The layers whose columns will train, and the matrices that will not.

    Raises: SelectorError, UnsupportedError, DamagedError.
    """
    refuse_stored(spec.select)
    model, stored = request.model, request.stored
    sites = find_all_sites(model, request.heads)
    groups = trace_groups(model, sites)
    whole = {target.parameter: target for target in request.whole}
    candidates = [_sized(spec, site) for site in sites if site.name in stored and site.name not in whole]
    embedding = find_embedding(model, candidates, spec.rows)
    candidates = [site for site in candidates if site.kind != EMBEDDING]
    selectors = without_embedding(spec.targets, candidates, sites, embedding)
    chosen = resolve(candidates, selectors, exclude=spec.exclude) if selectors or not embedding else ()
    ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    targets = tuple(_target(site, stored[site.name], ranks[site.module], groups) for site in chosen)
    if embedding:
        rows = require_rows(embedding, spec.rows, model)
        target = _target(embedding, stored[embedding.name], len(rows), groups)
        targets = tuple(sorted((*targets, replace(target, rows=rows)), key=lambda target: target.module))
    touched = {target.name: target for target in targets} | whole
    reasons = dict(request.converted) | {site.name: "output head" for site in sites if site.is_head}
    reasons |= {site.name: f"tied with {site.tied_with}" for site in sites if site.tied_with and site.kind != EMBEDDING}
    reasons |= {site.name: why_left(site) for site in candidates if not site.is_head and not site.tied_with}
    frozen = moving_statistics(model)
    return {"targets": targets, "untouched": list_untouched(model, touched, reasons), "frozen": frozen}


def _sized(spec: PacaSpec, site: LinearSite) -> LinearSite:
    """A convolution with fewer channels than the rank asked for it is narrow: all-conv leaves it as it is."""
    asked = asked_rank(site, spec.rank, spec.rank_pattern)
    return replace(site, is_narrow=site.kind == CONVOLUTION and asked > site.in_features)


def why_left(site: LinearSite) -> str:
    """Why a layer that could have been meant does not train."""
    if site.is_narrow and not site.unfit:
        return f"convolution of {site.in_features} channels, fewer than the rank"
    return site.unfit or ("not selected" if site.kind in ALL[ALL_LINEAR] else site.kind)


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
    )
    if stored.shape != target.shape:
        raise DamagedError(stored.weight, f"shape {stored.shape}", expected=f"{target.shape}, by config.json")
    return target


def planned_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The columns the plan's seed gives a target: (r,) int64, strictly increasing."""
    spec = plan.spec
    if target.rows:
        return torch.tensor(target.rows)
    return choose_columns(spec["select"], target.in_features, target.rank, seed=spec["seed"], group=target.group)


def fresh(checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch]) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged."""
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
    shared: dict[tuple[str, bytes], SharedGather] = {}
    keys = {t.module: (t.group, columns[t.module].numpy().tobytes()) for t in plan.targets}
    for target in plan.targets:
        shared.setdefault(keys[target.module], SharedGather(0)).members += 1
    for target in plan.targets:
        patch = delta.patches[target.module] if delta else None
        module = model.get_submodule(target.module)
        layer = open_layer(
            module,
            columns[target.module],
            input_axis=target.input_axis,
            storage=torch_dtype(target.dtype),
            shared=shared[keys[target.module]],
            scale=spec.scale(target.rank),
            opened=OPENED[type(module)],
        )
        if patch:
            layer.start_from(patch.values)
            layer.refresh()
    route(model)
    keep_statistics(model, plan.frozen)


def _own_columns(model: nn.Module, delta: ColumnDelta) -> dict[str, Tensor]:
    """The adapter's columns by module, in which the model holds what the adapter's base held there."""
    columns = {}
    for module, patch in delta.patches.items():
        columns[module] = patch.columns
        weight = model.get_parameter(patch.target.name)
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
    patches = {module: _bind_patch(patch, checkpoint, disk) for module, patch in delta.patches.items()}
    return ColumnDelta(replace(delta.plan, targets=tuple(patch.target for patch in patches.values())), patches, whole)


def _bind_patch(patch: ColumnPatch, checkpoint: Checkpoint, disk: Mapping[str, str]) -> ColumnPatch:
    weight = disk.get(patch.target.name, "")
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
    for layer in layers(model).values():
        close_layer(layer, merge=merge)
    let_go(model)


METHOD = Method("paca", "arXiv 2503.01905", PacaSpec, plan, fresh, attach, trainable_names, collect, bind, detach)
