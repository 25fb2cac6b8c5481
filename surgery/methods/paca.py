"""PaCA: train a few input columns of each frozen weight, in place. The layers themselves are in `paca_layers`.

Source: PaCA, arXiv 2503.01905 (ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint
from surgery.columns import (
    FILE,
    RANDOM,
    STRATEGIES,
    WEIGHTS,
    Choice,
    budget_values,
    choose_columns,
    columns_key,
    even_scores,
    is_file,
    random_columns,
    read_columns_file,
    refuse_stored,
    require_strategy,
    resample_steps,
    spread,
    takes_data,
)
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, read_target
from surgery.embedding_rows import find_embedding, require_rows, without_embedding
from surgery.errors import BaseMismatchError, DamagedError, RequestError, UnsupportedError, closest, require_known
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
from surgery.paca_kinds import OPENED, keep_statistics, let_go, moving_statistics, route
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
from surgery.plan import Quantization, Stored, SurgeryPlan, Target
from surgery.quantized import GROUP, dequantize, is_quantized, quantizable, require_kind
from surgery.quantized_base import packed_names, seen_weight, stored_sha256, stored_weight
from surgery.resampling import held as held_columns
from surgery.resampling import open_past
from surgery.select import (
    ALL,
    ALL_LINEAR,
    CONVOLUTION,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    LinearSite,
    asked_rank,
    ranks_of,
    resolve,
)
from surgery.sharding import whole as gathered
from surgery.sites import find_all_sites
from surgery.survey import list_untouched, trace_groups
from surgery.tensorfile import FLOAT_DTYPES, torch_dtype

CALIBRATION = ("calibration_data", "calibration_columns", "calibration_rows", "calibration_length")


@dataclass(frozen=True)
class PacaSpec:
    """What PaCA is asked to do.

    rank: trained columns of each layer; rank_pattern: {pattern: rank}, the last match decides; targets, exclude: names,
    globs, `re:` patterns or `all-linear`; alpha: the update is multiplied by alpha / rank while training (None: by 1);
    select: how columns are chosen; seed: with the layer's name it decides them; experts: whether a mixture's experts
    have `shared` columns or each its `own`, where `targets` name them; quantize: how the base is held while it is
    frozen, a kind of `surgery.quantized.KINDS` or empty for as it is.

    budget: so many values, or such a part of the targets' (`0.5%`), in place of a rank: spread over the layers by the
    columns' scores. resample: `every:500` draws other columns every so many optimizer steps. What looks at inputs or
    gradients takes calibration_data: files or ids, of which calibration_rows are drawn by the seed and cut to
    calibration_length tokens; calibration_columns: role -> column, as of any data.

    rows: tokens, as numbers or, for a folder with a tokenizer, as texts, whose rows of the input embedding train too.
    """

    method: ClassVar[str] = "paca"
    later: ClassVar[tuple[str, ...]] = ("experts", "quantize", "budget", "resample", *CALIBRATION, "rows")

    rank: int = 16
    targets: tuple[str, ...] = (ALL_LINEAR,)
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha: float | None = None
    select: str = "random"
    seed: int = 0
    experts: str = SHARED
    quantize: str = ""
    budget: str = ""
    resample: str = ""
    calibration_data: tuple[str, ...] = ()
    calibration_columns: Mapping[str, str] = field(default_factory=dict)
    calibration_rows: int = 64
    calibration_length: int = 512
    rows: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        require_known("--experts", self.experts, (SHARED, OWN))
        if self.rank < 1:
            raise RequestError("--rank", str(self.rank), expected="at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError("--alpha", str(self.alpha), expected="a positive number")
        require_strategy(self.select)
        if self.quantize:
            require_kind(self.quantize)
        for name in ("targets", "exclude", "calibration_data", "rows"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, (str, int)) else tuple(given))
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
    refuse_stored(spec.select)
    model, stored = request.model, request.stored
    sites = find_all_sites(model, request.heads)
    experts = find_experts(model, stored, request.parts)
    groups = trace_groups(model, sites, holders(model))
    whole = {target.parameter: target for target in request.whole}
    candidates = [_sized(spec, site) for site in sites if site.name in stored and site.name not in whole]
    embedding = find_embedding(model, candidates, spec.rows)
    candidates = [site for site in candidates if site.kind != EMBEDDING]
    everything = [*candidates, *(site for site, _ in experts)]
    selectors = without_embedding(spec.targets, everything, sites, embedding)
    chosen = resolve(everything, selectors, exclude=spec.exclude) if selectors or not embedding else ()
    _require_layers_alone(spec, [*chosen, *([embedding] if embedding else [])])
    ranks = _ranks(spec, chosen, groups)
    chosen = tuple(site for site in chosen if site.module in ranks)
    _settle_experts(spec, chosen, [site for site, _ in experts], ranks, groups)
    for holder in {site.holder for site in chosen if site.holder}:
        require_way(model.get_submodule(holder))
    places = {site.module: stored[site.name] for site in candidates} | {s.module: place for s, place in experts}
    targets = tuple(_target(site, places[site.module], ranks[site.module], groups) for site in chosen)
    if embedding:
        rows = require_rows(embedding, spec.rows, model)
        target = _target(embedding, stored[embedding.name], len(rows), groups)
        targets = tuple(sorted((*targets, replace(target, rows=rows)), key=lambda target: target.module))
    touched = {target.name: target for target in targets} | whole
    reasons = dict(request.converted) | {site.name: "output head" for site in sites if site.is_head}
    reasons |= {site.name: f"tied with {site.tied_with}" for site in sites if site.tied_with and site.kind != EMBEDDING}
    reasons |= {site.name: why_left(site) for site in candidates if not site.is_head and not site.tied_with}
    reasons |= {site.name: "experts: name them in --targets" for site, _ in experts}
    quantization = _quantization(spec, request, [s for s in candidates if not s.is_head and not s.tied_with])
    _require_dense_where_needed(spec, quantization, request)
    return {
        "targets": targets,
        "untouched": list_untouched(model, touched, reasons),
        "frozen": moving_statistics(model),
        "quantization": quantization,
    }


def _quantization(spec: PacaSpec, request: PlanRequest, sites: Sequence[LinearSite]) -> Quantization | None:
    """How the base will be held: every linear layer that can be is quantized, trained or not, but for the heads.

    Raises: UnsupportedError where none can be; RequestError where it is quantized already.
    """
    if not spec.quantize:
        return request.quantization
    if request.quantization:
        found = f"{spec.quantize}, and the base is held as {request.quantization.kind} already"
        raise RequestError("--quantize", found, expected="a base in 16 or 32 bits", fix="Leave it out")
    fitting = [s.module for s in sites if request.stored[s.name].dtype in QUANTIZABLE]
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


def _require_dense_where_needed(spec: PacaSpec, quantization: Quantization | None, request: PlanRequest) -> None:
    """Columns that go out are written into the weight, and some strategies read it. Raises: UnsupportedError."""
    if quantization and spec.resample:
        found = f"a base held as {quantization.kind}, into which no column can be written"
        raise UnsupportedError("--resample", found, expected="a dense base", fix="Leave out one of them")
    if request.quantization and not is_file(spec.select) and STRATEGIES[spec.select].looks_at == WEIGHTS:
        found = f"weights that are held as {request.quantization.kind}"
        fix = "Choose by activation or gradient, or start from the checkpoint that it was quantized from"
        raise UnsupportedError(f"--select {spec.select}", found, expected="dense weights to look at", fix=fix)


def _sized(spec: PacaSpec, site: LinearSite) -> LinearSite:
    """A convolution with fewer channels than the rank asked for it is narrow: all-conv leaves it as it is."""
    asked = asked_rank(site, spec.rank, spec.rank_pattern)
    return replace(site, is_narrow=site.kind == CONVOLUTION and asked > site.in_features)


def why_left(site: LinearSite) -> str:
    """Why a layer that could have been meant does not train."""
    if site.is_narrow and not site.unfit:
        return f"convolution of {site.in_features} channels, fewer than the rank"
    return site.unfit or ("not selected" if site.kind in ALL[ALL_LINEAR] else site.kind)


def _require_layers_alone(spec: PacaSpec, chosen: Sequence[LinearSite]) -> None:
    """Layers that are no linear ones have columns that the seed decides, or rows that are named, once and for all.

    Raises: UnsupportedError.
    """
    expert = next((site for site in chosen if site.holder or site.kind != LINEAR), None)
    settings = {"--select": spec.select != RANDOM, "--budget": spec.budget, "--resample": spec.resample}
    given = next((name for name, is_given in settings.items() if is_given), "")
    if expert and given:
        kind, name = ("experts", EXPERTS) if expert.holder else (f"{expert.kind} layers", expert.module)
        fix = f"Leave out {given}, or {name} among the --targets"
        raise UnsupportedError(given, f"{kind} train ({expert.module})", expected="linear layers alone", fix=fix)


def _ranks(spec: PacaSpec, chosen: Sequence[LinearSite], groups: Mapping[str, str]) -> dict[str, int]:
    """How many columns of each layer train, by module; a budget may leave some out."""
    if is_file(spec.select):
        return {module: len(columns) for module, columns in named_columns(spec.select, chosen, groups).items()}
    return _even_ranks(spec, chosen, groups) if spec.budget else ranks_of(chosen, spec.rank, spec.rank_pattern)


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


QUANTIZABLE = ("F16", "BF16", "F32")


def planned_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The columns the plan's seed gives a target: (r,) int64, strictly increasing.

    Of a plan whose columns are an adapter's own or chosen by looking, any: without them only sizes are asked for.
    """
    if target.rows:
        return torch.tensor(target.rows)
    return random_columns(target.in_features, target.rank, seed=plan.spec["seed"], group=target.group)


def _seed_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The same where nothing else may decide. Raises: UnsupportedError."""
    spec = plan.spec
    if target.rows:
        return torch.tensor(target.rows)
    return choose_columns(spec["select"], target.in_features, target.rank, seed=spec["seed"], group=target.group)


def fresh(
    checkpoint: Checkpoint, plan: SurgeryPlan, whole: Mapping[str, WholePatch], choice: Choice | None = None
) -> ColumnDelta:
    """Read every target once: its digest and its columns, unchanged. Raises: RequestError for stored columns."""
    refuse_stored(plan.spec["select"])
    patches, targets = {}, []
    for target in plan.targets:
        columns = choice.columns[target.module] if choice else _seed_columns(plan, target)
        digest, original = _read_columns(checkpoint, plan.quantization, target, columns)
        bound = replace(target, sha256=digest)
        patches[target.module] = _unmoved(plan, bound, columns, original, choice)
        targets.append(bound)
    return ColumnDelta(replace(plan, targets=tuple(targets)), patches, whole)


def fresh_live(model: nn.Module, plan: SurgeryPlan, whole: Mapping[str, WholePatch], choice: Choice) -> ColumnDelta:
    """The same of a model in memory, for columns that were chosen by looking at it."""
    patches = {}
    for target in plan.targets:
        columns, module = choice.columns[target.module], model.get_submodule(target.module)
        is_packed = is_quantized(module)
        weight = dequantize(module, torch_dtype(target.dtype)) if is_packed else model.get_parameter(target.name)
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


def _read_columns(
    checkpoint: Checkpoint, quantization: Quantization | None, target: Target, columns: Tensor
) -> tuple[str, Tensor]:
    """A target's digest and its columns (out, r) in the base's files: of packed ones what they stand for."""
    if quantization is None or not quantization.is_stored or target.module not in quantization.layers:
        return read_target(checkpoint, target, columns)
    weight = seen_weight(checkpoint, quantization, target.weight)
    return stored_sha256(checkpoint, target.weight), weight.index_select(1, columns)


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
        open_past(layer, patch.columns[~is_active], patch.values[:, ~is_active])


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
        columns[module] = _active_columns(patch)
        if not patch.target.holder and is_quantized(model.get_submodule(module)):
            continue  # the base's own columns are not in the model: its file's digest says which base it is
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
        if plan.spec.get("resample"):
            patches[target.module] = _collect_all(layer, target)
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


SAME_BASE = 1e-2  # of the columns' norm: another device, or loader, may round a few values otherwise when it quantizes
_RIGHT_BASE = "Name the right base"


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
    return replace(patch, target=replace(target, sha256=digest), values=values, original=original)


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
