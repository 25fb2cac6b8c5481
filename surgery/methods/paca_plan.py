"""PaCA's plan: which layers a request means, how many columns of each, and how the base is held."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.columns import (
    FILE,
    GRADIENTS,
    RANDOM,
    STRATEGIES,
    WEIGHTS,
    budget_values,
    choose_columns,
    even_scores,
    is_file,
    random_columns,
    read_columns_file,
    refuse_stored,
    spread,
)
from surgery.combinations import facts, of_record
from surgery.combinations import require as require_together
from surgery.embedding_rows import find_embedding, require_rows, without_embedding
from surgery.errors import DamagedError, RequestError, UnsupportedError, closest
from surgery.experts import (
    budget_unit,
    expert_group,
    find_experts,
    holders,
    require_one_rank,
    require_same,
    require_whole,
)
from surgery.images import TASK as IMAGES
from surgery.methods import PlanRequest
from surgery.methods.paca_spec import PacaSpec
from surgery.paca_experts import SHARED, require_way
from surgery.paca_kinds import moving_statistics
from surgery.plan import Quantization, Stored, SurgeryPlan, Target
from surgery.quantized import GROUP, quantizable
from surgery.select import (
    ALL,
    ALL_LINEAR,
    CONVOLUTION,
    EMBEDDING,
    EXPERTS,
    LinearSite,
    asked_rank,
    ranks_of,
    resolve,
)
from surgery.sites import find_all_sites
from surgery.survey import find_idle, list_untouched, trace_groups
from surgery.tensorfile import FLOAT_DTYPES

QUANTIZABLE = ("F16", "BF16", "F32")


def plan(spec: PacaSpec, request: PlanRequest) -> dict[str, Any]:
    """The layers whose columns will train, and the matrices that will not.

    A budget is spread evenly here: where scores say otherwise, `surgery.choosing` does.
    Raises: SelectorError, UnsupportedError, DamagedError, RequestError for a budget that cannot be met.
    """
    refuse_stored(spec.select)
    held = request.quantization.kind if request.quantization else ""
    require_together({**of_record("paca", spec), **facts({"stored": held, "held": held or spec.quantize})})
    model, stored = request.model, request.stored
    sites = find_all_sites(model, request.heads)
    experts = find_experts(model, stored, request.parts)
    groups = trace_groups(model, sites, holders(model))
    whole = {target.parameter: target for target in request.whole}
    candidates = [_sized(spec, site) for site in sites if site.name in stored and site.name not in whole]
    candidates = _without_idle(candidates, request)
    embedding = find_embedding(model, candidates, spec.rows)
    candidates = [site for site in candidates if site.kind != EMBEDDING]
    everything = [*candidates, *(site for site, _ in experts)]
    selectors = without_embedding(spec.targets, everything, sites, embedding)
    chosen = resolve(everything, selectors, exclude=spec.exclude) if selectors or not embedding else ()
    _require_layers_to_choose_for(spec, chosen)
    rows = {embedding.module: require_rows(embedding, spec.rows, model)} if embedding else {}
    _settle_experts(spec, chosen, [site for site, _ in experts], groups)
    ranks = _ranks(spec, chosen, groups, rows)
    unpaid = {site.name: "nothing of the budget" for site in chosen if site.module not in ranks}
    chosen = tuple(site for site in chosen if site.module in ranks)
    _require_trainable_experts(request, chosen)
    _require_dense_where_looked_at(spec, request, chosen)
    places = {site.module: stored[site.name] for site in candidates} | {s.module: place for s, place in experts}
    targets = tuple(_target(site, places[site.module], ranks[site.module], groups) for site in chosen)
    if embedding:
        numbers = rows[embedding.module]
        target = _target(embedding, stored[embedding.name], len(numbers), groups)
        targets = tuple(sorted((*targets, replace(target, rows=numbers)), key=lambda target: target.module))
    touched = {target.name: target for target in targets} | whole
    reasons = dict(request.converted) | {site.name: "output head" for site in sites if site.is_head}
    reasons |= {site.name: f"tied with {site.tied_with}" for site in sites if site.tied_with and site.kind != EMBEDDING}
    reasons |= {site.name: why_left(site) for site in candidates if not site.is_head and not site.tied_with}
    reasons |= {site.name: "experts: name them in --targets" for site, _ in experts} | unpaid
    quantization = _quantization(spec, request, [s for s in candidates if not s.is_head and not s.tied_with])
    return {
        "targets": targets,
        "untouched": list_untouched(model, touched, reasons),
        "frozen": moving_statistics(model),
        "quantization": quantization,
    }


def _quantization(spec: PacaSpec, request: PlanRequest, sites: Sequence[LinearSite]) -> Quantization | None:
    """How the base will be held: every linear layer that can be is quantized, trained or not, but for the heads.

    Raises: UnsupportedError where none can be.
    """
    if not spec.quantize:
        return request.quantization
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


def _sized(spec: PacaSpec, site: LinearSite) -> LinearSite:
    """A convolution with fewer channels than the rank asked for it is narrow: all-conv leaves it as it is.

    Where a budget or a file says how many columns there are no rank is asked for, and none is narrow.
    """
    if spec.budget or is_file(spec.select):
        return site
    asked = asked_rank(site, spec.rank, spec.rank_pattern)
    return replace(site, is_narrow=site.kind == CONVOLUTION and asked > site.in_features)


def _without_idle(sites: Sequence[LinearSite], request: PlanRequest) -> list[LinearSite]:
    """The same, and of an image classifier those unfit that none of its logits depend on: they would never move."""
    idle = find_idle(request.model) if request.task == IMAGES else ()
    why = f"layer on which no logit of {type(request.model).__name__} depends"
    return [replace(site, unfit=site.unfit or (why if site.name in idle else "")) for site in sites]


def why_left(site: LinearSite) -> str:
    """Why a layer that could have been meant does not train."""
    if site.is_narrow and not site.unfit:
        return f"convolution of {site.in_features} channels, fewer than the rank"
    return site.unfit or ("not selected" if site.kind in ALL[ALL_LINEAR] else site.kind)


def _require_trainable_experts(request: PlanRequest, chosen: Sequence[LinearSite]) -> None:
    """Experts multiply in a way in which columns train. Raises: UnsupportedError."""
    for holder in {site.holder for site in chosen if site.holder}:
        require_way(request.model.get_submodule(holder))


def _require_dense_where_looked_at(spec: PacaSpec, request: PlanRequest, chosen: Sequence[LinearSite]) -> None:
    """Some strategies look at weights, or at gradients, which packed ones do not have. Raises: UnsupportedError."""
    held = request.quantization
    if held is None or is_file(spec.select) or STRATEGIES[spec.select].looks_at not in (WEIGHTS, GRADIENTS):
        return
    packed = next((site.module for site in chosen if site.module in held.layers), "")
    if packed:
        found = f"weights that are held as {held.kind}, first {packed}"
        fix = "Choose by activation, or start from the checkpoint that it was quantized from"
        raise UnsupportedError(f"--select {spec.select}", found, expected="dense weights to look at", fix=fix)


def _require_layers_to_choose_for(spec: PacaSpec, chosen: Collection[LinearSite]) -> None:
    """Where rows alone train, which are named, nothing is left for these settings to decide. Raises: RequestError."""
    settings = {"--select": spec.select != RANDOM, "--budget": spec.budget, "--resample": spec.resample}
    given = next((name for name, is_given in settings.items() if is_given), "")
    if given and not chosen:
        fix = f"Leave {given} out, or add layers to --targets, such as {ALL_LINEAR}"
        raise RequestError(given, "rows alone train, which --rows names", expected="columns to choose", fix=fix)


def _ranks(
    spec: PacaSpec, chosen: Sequence[LinearSite], groups: Mapping[str, str], rows: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """How many columns of each layer train, by module; a budget may leave some out.

    Raises: RequestError, SelectorError.
    """
    if is_file(spec.select):
        named = named_columns(spec.select, chosen, groups, rows)
        ranks = {module: len(columns) for module, columns in named.items()}
        require_one_rank(chosen, ranks, f"--select {spec.select}", "Name as many columns for each expert")
        return ranks
    if spec.budget:
        return _even_ranks(spec, chosen, groups)
    ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    require_one_rank(chosen, ranks, "--rank-pattern", "Name its experts with a *")
    return ranks


def named_columns(
    select: str,
    sites: Sequence[LinearSite | Target],
    groups: Mapping[str, str],
    rows: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The columns that a file names for each layer, or for the group that it is in. Raises: RequestError.

    rows: those that are named elsewhere, by module; a file may name them too, such as that of an adapter.
    """
    named, result = read_columns_file(Path(select.removeprefix(FILE))), {}
    for module, numbers in rows.items():
        result[module] = torch.tensor(numbers)
        if not torch.equal(named.pop(module, result[module]), result[module]):
            others = f"other rows for {module} than --rows names"
            raise RequestError(f"--select {select}", others, expected="the same, or none", fix="Name them in one place")
    for site in sites:
        found = named.get(site.module, named.get(groups[site.module]))
        if found is None:
            hint = closest(site.module, named) or f"Leave it out with --exclude {site.module}"
            raise RequestError(f"--select {select}", f"no columns for {site.module}", expected="some", fix=hint)
        if int(found[-1]) >= site.in_features:
            expected = f"columns below {site.in_features}, its width"
            raise RequestError(f"--select {select}", f"{site.module}: column {int(found[-1])}", expected=expected)
        result[site.module] = found.clone()  # a group is named once, and a file holds each layer's own
    surplus = sorted(set(named) - {site.module for site in sites} - {groups[site.module] for site in sites})
    if surplus:
        strange, fix = f"columns for {surplus[0]!r}, which does not train", closest(surplus[0], result)
        raise RequestError(f"--select {select}", strange, expected="the layers that --targets means", fix=fix)
    require_same(sites, result, groups, f"--select {select}")
    return result


def _even_ranks(spec: PacaSpec, sites: Sequence[LinearSite], groups: Mapping[str, str]) -> dict[str, int]:
    """Ranks by module that use up a budget, of each group the same part of its columns.

    A layer may get none; where scores will decide, one column stands for that.
    """
    units = {site.module: budget_unit(site, groups[site.module], spec.experts) for site in sites}
    values: dict[str, int] = {}
    widths = {units[site.module]: site.in_features for site in sites}
    for site in sites:
        values[units[site.module]] = values.get(units[site.module], 0) + site.out_features
    scores = [even_scores(unit, width, values[unit], seed=spec.seed) for unit, width in sorted(widths.items())]
    ranks = spread(scores, budget_values(spec.budget, sum(site.out_features * site.in_features for site in sites)))
    if spec.select != RANDOM:
        ranks = dict.fromkeys(widths, 1) | ranks
    return {site.module: ranks[units[site.module]] for site in sites if units[site.module] in ranks}


def _settle_experts(
    spec: PacaSpec,
    chosen: Sequence[LinearSite],
    known: Sequence[LinearSite],
    groups: dict[str, str],
) -> None:
    """Add the groups of the experts that were chosen. Raises: SelectorError, UnsupportedError, RequestError."""
    mine = [site for site in chosen if site.holder]
    if spec.experts != SHARED and not mine:
        fix = f"Add {EXPERTS} to --targets, or leave it out"
        raise RequestError("--experts", f"{spec.experts!r}, and no experts train", expected="experts to train", fix=fix)
    require_whole(mine, known)
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

    Of a plan whose columns are an adapter's own or chosen by looking, any: without them only sizes are asked for.
    """
    if target.rows:
        return torch.tensor(target.rows)
    return random_columns(target.in_features, target.rank, seed=plan.spec["seed"], group=target.group)


def seed_columns(plan: SurgeryPlan, target: Target) -> Tensor:
    """The same where nothing else may decide. Raises: UnsupportedError."""
    spec = plan.spec
    if target.rows:
        return torch.tensor(target.rows)
    return choose_columns(spec["select"], target.in_features, target.rank, seed=spec["seed"], group=target.group)
