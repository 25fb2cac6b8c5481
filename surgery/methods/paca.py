"""PaCA: train a few input columns of each frozen weight, in place. The layers themselves are in `paca_layers`.

Source: PaCA, arXiv 2503.01905 (ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.columns import (
    FILE,
    RANDOM,
    STRATEGIES,
    Choice,
    budget_values,
    choose_columns,
    even_scores,
    is_file,
    read_columns_file,
    require_strategy,
    resample_steps,
    spread,
    takes_data,
)
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target
from surgery.errors import BaseMismatchError, DamagedError, RequestError, UnsupportedError, closest
from surgery.methods import LATER, Method, PlanRequest
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
from surgery.resampling import held as held_columns
from surgery.resampling import open_past
from surgery.select import ALL_LINEAR, LinearSite, find_sites, ranks_of, resolve
from surgery.sharding import whole as gathered
from surgery.survey import list_untouched, trace_groups
from surgery.tensorfile import FLOAT_DTYPES, torch_dtype


@dataclass(frozen=True)
class PacaSpec:
    """What PaCA is asked to do.

    rank: trained columns of each layer; rank_pattern: {pattern: rank}, the last match decides; targets, exclude: names,
    globs, `re:` patterns or `all-linear`; alpha: the update is multiplied by alpha / rank while training (None: by 1);
    select: how columns are chosen; seed: with the layer's name it decides them where nothing else does.

    budget: so many values, or such a part of the targets' (`0.5%`), in place of a rank: spread over the layers by the
    columns' scores. resample: `every:500` draws other columns every so many optimizer steps. What looks at inputs or
    gradients takes calibration_data: files or ids, of which calibration_rows are drawn by the seed and cut to
    calibration_length tokens; calibration_columns: role -> column, as of any data.
    """

    method: ClassVar[str] = "paca"

    rank: int = 16
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None
    select: str = "random"
    seed: int = 0
    budget: str = field(default="", metadata=LATER)
    resample: str = field(default="", metadata=LATER)
    calibration_data: tuple[str, ...] = field(default=(), metadata=LATER)
    calibration_columns: Mapping[str, str] = field(default_factory=dict, metadata=LATER)
    calibration_rows: int = field(default=64, metadata=LATER)
    calibration_length: int = field(default=512, metadata=LATER)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError("--rank", str(self.rank), expected="at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError("--alpha", str(self.alpha), expected="a positive number")
        require_strategy(self.select)
        for name in ("targets", "exclude", "calibration_data"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        object.__setattr__(self, "budget", str(self.budget))
        self._require_columns()

    def _require_columns(self) -> None:
        """What says which columns fits together, and nothing of it would be ignored.

        Raises: RequestError, UnsupportedError.
        """
        sizes = {"--rank": self.rank != type(self).rank, "--rank-pattern": bool(self.rank_pattern)}
        given = next((name for name, is_given in sizes.items() if is_given), "")
        if self.budget:
            budget_values(self.budget, 1 << 62)
            if given:
                raise RequestError("--budget", f"given with {given}", expected="one of the two")
        if is_file(self.select) and (given or self.budget):
            found = f"given with --select {self.select}, which says how many there are"
            raise RequestError(given or "--budget", found, expected="the file alone")
        if resample_steps(self.resample) and is_file(self.select):
            found = f"--select {self.select}, which names one set of columns"
            raise UnsupportedError("--resample", found, expected="a strategy to draw others by", fix="Leave it out")
        if not (takes_data(self.select)):
            self._require_no_data()
        if self.calibration_rows < 1 or self.calibration_length < 2:
            found = f"{self.calibration_rows} rows of {self.calibration_length} tokens"
            raise RequestError("--calibration-rows", found, expected="1 row of 2 tokens, or more")

    def _require_no_data(self) -> None:
        for entry in fields(self):
            default = {} if entry.name == "calibration_columns" else entry.default
            if entry.name.startswith("calibration_") and getattr(self, entry.name) != default:
                option = f"--{entry.name.replace('_', '-')}"
                wanted = " or ".join(name for name in STRATEGIES if takes_data(name))
                raise RequestError(option, f"given with --select {self.select}", expected=f"{wanted} with it")

    def scale(self, rank: int) -> float:
        """What the stored difference is multiplied by while training."""
        return 1.0 if self.alpha is None else self.alpha / rank


def plan(spec: PacaSpec, request: PlanRequest) -> dict[str, Any]:
    """The layers whose columns will train, and the matrices that will not.

    A budget is spread evenly here: where scores say otherwise, `surgery.choosing` does.
    Raises: SelectorError, UnsupportedError, DamagedError, RequestError for a budget that cannot be met.
    """
    model, stored = request.model, request.stored
    sites = find_sites(model, request.heads)
    groups = trace_groups(model, sites)
    whole = {target.parameter: target for target in request.whole}
    candidates = [s for s in sites if f"{s.module}.weight" in stored and f"{s.module}.weight" not in whole]
    chosen = resolve(candidates, spec.targets, exclude=spec.exclude)
    if is_file(spec.select):
        named = named_columns(spec.select, chosen, groups)
        ranks, groups = {name: len(columns) for name, columns in named.items()}, _split_groups(named, groups)
    elif spec.budget:
        ranks = _even_ranks(spec, chosen, groups)
    else:
        ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    chosen = tuple(site for site in chosen if site.module in ranks)
    targets = tuple(_target(site, stored[f"{site.module}.weight"], ranks[site.module], groups) for site in chosen)
    touched = {f"{t.module}.weight": t for t in targets} | whole
    reasons = dict(request.converted) | {f"{s.module}.weight": "output head" for s in sites if s.is_head}
    reasons |= {f"{s.module}.weight": f"tied with {s.tied_with}" for s in sites if s.tied_with}
    reasons |= {f"{s.module}.weight": "not selected" for s in candidates if not s.is_head and not s.tied_with}
    return {"targets": targets, "untouched": list_untouched(model, touched, reasons)}


def named_columns(select: str, sites: Sequence[LinearSite | Target], groups: Mapping[str, str]) -> dict[str, Tensor]:
    """The columns that a file names for each layer, or for the group that it is in. Raises: RequestError."""
    named, result = read_columns_file(Path(select.removeprefix(FILE))), {}
    for site in sites:
        found = named.get(site.module, named.get(groups[site.module]))
        if found is None:
            hint = closest(site.module, named) or "Name the layers with --targets"
            raise RequestError(f"--select {select}", f"no columns for {site.module}", expected="some", fix=hint)
        if int(found[-1]) >= site.in_features:
            expected = f"columns below {site.in_features}, its width"
            raise RequestError(f"--select {select}", f"{site.module}: column {int(found[-1])}", expected=expected)
        result[site.module] = found
    surplus = sorted(set(named) - {site.module for site in sites} - {groups[site.module] for site in sites})
    if surplus:
        strange, fix = f"columns for {surplus[0]!r}, which does not train", closest(surplus[0], result)
        raise RequestError(f"--select {select}", strange, expected="the layers that --targets means", fix=fix)
    return result


def _split_groups(named: Mapping[str, Tensor], groups: Mapping[str, str]) -> dict[str, str]:
    """Groups by module, such that all layers of one have the same columns."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    return {m: first.setdefault((groups[m], tuple(columns.tolist())), m) for m, columns in sorted(named.items())}


def _even_ranks(spec: PacaSpec, sites: Sequence[LinearSite], groups: Mapping[str, str]) -> dict[str, int]:
    """Ranks by module that use up a budget, of each group the same part of its columns.

    A layer may get none; where scores will decide, one column stands for that.
    """
    values: dict[str, int] = {}
    widths = {groups[site.module]: site.in_features for site in sites}
    for site in sites:
        values[groups[site.module]] = values.get(groups[site.module], 0) + site.out_features
    scores = [even_scores(group, width, values[group], seed=spec.seed) for group, width in sorted(widths.items())]
    ranks = spread(scores, budget_values(spec.budget, sum(site.out_features * site.in_features for site in sites)))
    if spec.select != RANDOM:
        ranks = dict.fromkeys(widths, 1) | ranks
    return {site.module: ranks[groups[site.module]] for site in sites if groups[site.module] in ranks}


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


def planned_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The columns the plan's seed gives a target: (r,) int64, strictly increasing."""
    spec = plan.spec
    return choose_columns(spec["select"], target.in_features, target.rank, seed=spec["seed"], group=target.group)


def fresh(
    checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch], choice: Choice | None = None
) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged."""
    patches, targets = {}, []
    for target in plan.targets:
        columns = choice.columns[target.module] if choice else planned_columns(plan, target)
        digest, original = read_target(checkpoint, target, columns)
        bound = replace(target, sha256=digest)
        patches[target.module] = _unmoved(plan, bound, columns, original, choice)
        targets.append(bound)
    return ColumnDelta(replace(plan, targets=tuple(targets)), patches, whole)


def fresh_live(model: nn.Module, plan: SurgeryPlan, whole: Mapping[str, WholePatch], choice: Choice) -> ColumnDelta:
    """The same of a model in memory, for columns that were chosen by looking at it."""
    patches = {}
    for target in plan.targets:
        columns, weight = choice.columns[target.module], cast("Tensor", model.get_submodule(target.module).weight)
        original = read_columns(weight, columns.to(weight.device), target.input_axis).cpu()
        patches[target.module] = _unmoved(plan, target, columns, original, choice)
    return ColumnDelta(plan, patches, whole)


def _unmoved(
    plan: SurgeryPlan, target: Target, columns: Tensor, original: Tensor, choice: Choice | None
) -> ColumnPatch:
    master = torch.float64 if original.dtype == torch.float64 else torch.float32
    active = columns if plan.spec.get("resample") else None
    scores = choice.scores.get(target.module) if choice else None
    return ColumnPatch(target, columns, original.to(master, copy=True), original, active, scores)


def attach(model: nn.Module, plan: SurgeryPlan, delta: ColumnDelta | None) -> None:
    """Open the plan's targets in a frozen model, in place. `delta` gives the columns' values."""
    spec = PacaSpec(**plan.spec)
    watch_optimizers()
    shared: dict[tuple[str, int], SharedGather] = {}
    for target in plan.targets:
        shared.setdefault((target.group, target.rank), SharedGather(0)).members += 1
    if delta:
        _require_originals(model, delta)
    for target in plan.targets:
        patch = delta.patches[target.module] if delta else None
        layer = open_layer(
            model.get_submodule(target.module),
            _active_columns(patch) if patch else planned_columns(plan, target),
            input_axis=target.input_axis,
            storage=torch_dtype(target.dtype),
            shared=shared[target.group, target.rank],
            scale=spec.scale(target.rank),
        )
        if patch:
            _start(layer, patch)


def _active_columns(patch: ColumnPatch) -> Tensor:
    return patch.columns if patch.active is None else patch.active


def _start(layer: PacaLayer, patch: ColumnPatch) -> None:
    """Let a layer hold a patch's values: of the columns that train, and of those that did before."""
    is_active = torch.isin(patch.columns, _active_columns(patch))
    layer.start_from(patch.values[:, is_active])
    layer.refresh()
    layer.paca_scores = patch.scores
    if not bool(is_active.all()):
        open_past(layer, patch.columns[~is_active], patch.values[:, ~is_active])


def _require_originals(model: nn.Module, delta: ColumnDelta) -> None:
    """The model holds, in the planned columns, what the adapter's base held there."""
    for module, patch in delta.patches.items():
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
        if plan.spec.get("resample"):
            patches[target.module] = _collect_all(layer, target)
            continue
        held = gathered(layer.paca_original)
        values = combine(held, gathered(layer.paca_delta), layer.paca_scale)
        original = originals.get(target.module, held.to(layer.paca_storage))
        columns = layer.paca_columns.to("cpu", copy=True)  # a group's layers hold one tensor, a file one for each
        patches[target.module] = ColumnPatch(target, columns, values, original)
    return ColumnDelta(plan, patches, whole)


def _collect_all(layer: PacaLayer, target: Target) -> ColumnPatch:
    """All columns that have trained, each once."""
    everything, now = held_columns(layer), layer.paca_columns.to("cpu", copy=True)
    values = combine(everything.original, everything.delta, layer.paca_scale)
    original = everything.original.to(layer.paca_storage)
    return ColumnPatch(target, everything.columns, values, original, now, layer.paca_scores)


def bind(
    delta: ColumnDelta, checkpoint: Checkpoint, disk: Mapping[str, str], whole: Mapping[str, WholePatch]
) -> ColumnDelta:
    """The same delta with its targets tied to a checkpoint's files. `disk`: the name there of each parameter."""
    patches = {module: _bind_patch(patch, checkpoint, disk) for module, patch in delta.patches.items()}
    return ColumnDelta(replace(delta.plan, targets=tuple(patch.target for patch in patches.values())), patches, whole)


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
    return replace(patch, target=replace(target, sha256=digest), values=values, original=original)


def detach(model: nn.Module, *, merge: bool) -> None:
    """Plain layers again, in place: with the trained columns (`merge`) or with the base's."""
    for layer in layers(model).values():
        close_layer(layer, merge=merge)


METHOD = Method("paca", "arXiv 2503.01905", PacaSpec, plan, fresh, attach, trainable_names, collect, bind, detach)
