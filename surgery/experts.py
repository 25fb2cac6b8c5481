"""A mixture's experts as a plan sees them: what they are called, where each lies on disk and in memory.

In memory a parameter holds all experts of a layer, `gate_up_proj` (e, 2 i, h) and `down_proj` (e, h, i). On disk most
families keep a tensor for each expert and projection, others one for all experts. A target is a tensor on disk:
`model.layers.0.mlp.experts.3.up_proj` where each has its own, `model.layers.0.mlp.experts.gate_up_proj` where one
holds all. The first is no module: `holder` and `place` of its target say where in memory it lies.

Shape suffixes: e experts, o outputs, r columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.columns import as_matrix
from surgery.compat import MemoryName, Place, is_experts, usual_parts
from surgery.errors import DamagedError, RequestError, SelectorError, UnsupportedError
from surgery.paca_experts import OWN, first_parameter, part_name
from surgery.plan import Parts, Stored, SurgeryPlan, Target
from surgery.select import LinearSite

Expert = TypeVar("Expert", LinearSite, Target)

_PROJECTIONS = {("gate_up_proj", 2): ("gate_proj", "up_proj")}


def expert_name(name: str, place: Place) -> str:
    """What the tensor of one expert and projection is called: the name of its layer where experts are layers.

    name: of the parameter that holds all experts.
    """
    holder, _, parameter = name.rpartition(".")
    names = _PROJECTIONS.get((parameter, place.parts), (parameter,) * place.parts)
    return f"{holder}.{place.expert}.{names[place.part]}"


def holders(model: nn.Module) -> dict[str, Any]:
    """The modules that hold a layer's experts, by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def find_experts(model: nn.Module, stored: Mapping[str, Stored], parts: Parts) -> list[tuple[LinearSite, Stored]]:
    """Every tensor of experts that could train, and where it lies.

    stored, parts: where whole parameters lie, and the experts of one.
    Raises: DamagedError where a checkpoint lacks some experts of a layer.
    """
    found: list[tuple[LinearSite, Stored]] = []
    for holder, module in holders(model).items():
        for parameter in (first_parameter(module), "down_proj"):
            name = f"{holder}.{parameter}"
            if name in stored:
                found.append((_all_in_one(holder, parameter, module), stored[name]))
            elif name in parts and not module.is_transposed:
                found += _one_by_one(holder, parameter, module, parts[name])
    return found


def _all_in_one(holder: str, parameter: str, module: Any) -> LinearSite:
    shape = tuple(module.get_parameter(parameter).shape)
    axis = 1 if module.is_transposed else 2
    sizes = (shape[0] * shape[3 - axis], shape[axis], axis)
    return LinearSite(f"{holder}.{parameter}", *sizes, parameter=parameter, sizes=shape, holder=holder)


def _one_by_one(
    holder: str, parameter: str, module: Any, parts: Sequence[tuple[Stored, tuple[int, ...]]]
) -> Iterable[tuple[LinearSite, Stored]]:
    experts, outputs, inputs = module.get_parameter(parameter).shape
    count = Place(*parts[0][1]).parts
    wanted = {Place(expert, part, count) for expert in range(experts) for part in range(count)}
    if {place for _, place in parts} != wanted or len(parts) != len(wanted) or outputs % count:
        found = f"{len(parts)} tensors of experts for {holder}.{parameter}"
        raise DamagedError("checkpoint", found, expected=f"{len(wanted)}", fix="Fetch the checkpoint again")
    for stored, place in parts:
        name = expert_name(f"{holder}.{parameter}", Place(*place))
        sizes = (outputs // count, inputs, 1)
        yield LinearSite(name, *sizes, parameter=parameter, holder=holder, place=tuple(place)), stored


def expert_parts(names: Mapping[str, MemoryName], stored: Mapping[str, Stored]) -> Parts:
    """Where the tensors lie that are put together to parameters of experts, by the parameter's name.

    names: what tensors on disk are called in memory; stored: where they lie.
    """
    found: dict[str, list[tuple[Stored, Place]]] = {}
    for disk, memory in names.items():
        if memory.place:
            found.setdefault(memory.name, []).append((stored[disk], memory.place))
    return found


def usual_experts(model: nn.Module, dtype_of: Callable[[Tensor], str]) -> Parts:
    """Where the experts of a model in memory usually lie on disk, for a plan that is made without files.

    The keys are those parameters of experts for which a checkpoint has a tensor for each expert.
    """
    found: dict[str, list[tuple[Stored, Place]]] = {}
    for holder, module in holders(model).items():
        for parameter in (first_parameter(module), "down_proj"):
            name, weight = f"{holder}.{parameter}", module.get_parameter(parameter)
            count = usual_parts(model, name)
            if not count or module.is_transposed:
                continue
            shape = (weight.shape[1] // count, weight.shape[2])
            places = [Place(expert, part, count) for expert in range(weight.shape[0]) for part in range(count)]
            found[name] = [(Stored(f"{expert_name(name, p)}.weight", dtype_of(weight), shape), p) for p in places]
    return found


def require_whole(chosen: Sequence[LinearSite], known: Sequence[LinearSite]) -> None:
    """A parameter's experts train all or none: in memory they are one. Raises: SelectorError."""
    for name, members in by_parameter(chosen).items():
        whole = sum(site.name == name for site in known)
        if len(members) != whole:
            found = f"{len(members)} of the {whole} tensors that make {name}"
            fix = "Name them with a * for the expert, and gate_proj and up_proj together"
            raise SelectorError("--targets", found, expected="all of them: in memory they are one parameter", fix=fix)


def require_one_rank(chosen: Sequence[LinearSite], ranks: Mapping[str, int], where: str, fix: str) -> None:
    """A parameter's experts have one rank. where: what says ranks. Raises: SelectorError."""
    for name, members in by_parameter(chosen).items():
        found = sorted({ranks[site.module] for site in members})
        if len(found) > 1:
            expected = "one rank for all experts of a parameter"
            raise SelectorError(where, f"ranks {', '.join(map(str, found))} in {name}", expected=expected, fix=fix)


def require_same(
    sites: Sequence[LinearSite | Target], columns: Mapping[str, Tensor], groups: Mapping[str, str], where: str
) -> None:
    """Tensors of experts that share their columns were given the same: gate and up always. Raises: RequestError."""
    first: dict[tuple[str, str], str] = {}
    for site in sites:
        other = first.setdefault((site.name, groups[site.module]), site.module) if site.holder else site.module
        if not torch.equal(columns[other], columns[site.module]):
            fix = f"Name {groups[site.module]!r} once for all of them, or give each expert its own (--experts own)"
            found = f"other columns for {site.module} than for {other}"
            raise RequestError(where, found, expected="the same: they share them", fix=fix)


def budget_unit(entry: LinearSite | Target, group: str, experts: str) -> str:
    """What a budget gives columns to: a group, or of experts with columns of their own all of a parameter."""
    return entry.name if entry.holder and experts == OWN else group


def expert_group(site: LinearSite, experts: str, groups: Mapping[str, str]) -> str:
    """The name from which a tensor's columns are drawn; those of one name have the same.

    groups: what feeds each holder, by name. Raises: UnsupportedError.
    """
    if experts != OWN:
        return site.name if site.parameter == "down_proj" else groups[site.holder]
    if not site.place:
        raise UnsupportedError(
            "--experts own",
            f"the checkpoint holds all experts of {site.name} in one tensor",
            expected="one with a tensor for each expert",
            fix="Let the experts share their columns (--experts shared)",
        )
    return f"{site.holder}.{site.place[0]}.{site.parameter}"


def require_layers(plan: SurgeryPlan, where: str) -> None:
    """All targets are linear layers, as PEFT takes them: an expert is none in transformers 5.

    What PEFT calls LoRA of a convolution has another rank for each kernel, and none that is merged by serving programs.
    Raises: UnsupportedError.
    """
    others = [t for t in plan.targets if t.parameter != "weight" or t.sizes or t.rows]
    if others and not any(target.holder for target in others):
        raise UnsupportedError(
            where,
            f"{len(others)} of the targets are no linear layers, first {others[0].name}",
            expected="targets that are",
            fix="Write the merged checkpoint with --merge, or leave them out",
        )
    experts = [target.module for target in plan.targets if target.holder]
    if experts:
        raise UnsupportedError(
            where,
            f"{len(experts)} tensors of experts, first {experts[0]}",
            expected="targets that are layers",
            fix="Leave the experts out",
        )


def by_parameter(targets: Iterable[Expert]) -> dict[str, list[Expert]]:
    """The targets, or sites, that are experts', by the name of the parameter that holds them."""
    found: dict[str, list[Expert]] = {}
    for target in targets:
        if target.holder:
            found.setdefault(target.name, []).append(target)
    return found


def layer_of(target: Target) -> str:
    """The module of an attached model that holds a target's difference."""
    return f"{target.holder}.{part_name(target.parameter)}" if target.holder else target.module


def lane_groups(plan: SurgeryPlan) -> dict[str, str]:
    """The groups of what changes its columns together, by its name in an attached model: see `resampling.lanes`.

    Rows are named, and none are drawn.
    """
    own = {name for name, targets in by_parameter(plan.targets).items() if has_own_columns(targets)}
    drawn = [target for target in plan.targets if not target.rows]
    return {f"{layer_of(t)}.{t.place[0]}" if t.name in own else layer_of(t): t.group for t in drawn}


def has_own_columns(targets: Sequence[Target]) -> bool:
    """Whether the experts of a parameter, all of whose targets these are, have columns of their own."""
    return len({target.group for target in targets}) > 1


def live_weight(model: nn.Module, target: Target) -> Tensor:
    """A target's weight in a model, as its shape says: of an expert's tensor a view of its part."""
    weight = model.get_parameter(target.name).detach()
    if target.place:
        expert, part, parts = target.place
        weight = weight[expert].chunk(parts)[part]
    return weight


def matrices(target: Target, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A target's weight as matrices (o, i), each with a name for what is drawn for it: one for each expert in it."""
    if target.holder and target.sizes:
        for expert, own in enumerate(weight):
            yield f"{target.module}.{expert}", own if target.input_axis == 2 else own.t()
        return
    name = f"{target.module}.weight" if target.holder else target.weight  # the same in memory and in a file
    yield name, as_matrix(weight, target.input_axis)


def take(values_eor: Tensor, target: Target) -> Tensor:
    """A target's part of values of all experts: (e, o, r) -> (out, r), copied."""
    if not target.place:
        return values_eor.reshape(-1, values_eor.shape[-1]).clone()
    expert, part, parts = target.place
    return values_eor[expert].chunk(parts)[part].clone()


def join(targets: Sequence[Target], values: Mapping[str, Tensor], experts: int) -> Tensor:
    """The inverse: of all targets of a parameter, by module, (out, r) -> (e, o, r)."""
    first = targets[0]
    held = values[first.module]
    if not first.place:
        return held.reshape(experts, -1, held.shape[1])
    result = held.new_empty((experts, first.out_features * first.place[2], held.shape[1]))
    for target in targets:
        expert, part, parts = target.place
        result[expert].chunk(parts)[part].copy_(values[target.module])
    return result


def join_columns(targets: Sequence[Target], columns: Mapping[str, Tensor], experts: int) -> Tensor:
    """The columns of all targets of a parameter: (r,) where all have the same, else (e, r)."""
    if not has_own_columns(targets):
        return columns[targets[0].module]
    result = torch.zeros((experts, targets[0].rank), dtype=torch.int64)
    for target in targets:
        result[target.place[0]] = columns[target.module]
    return result


def require_joined(targets: Sequence[Target], columns: Mapping[str, Tensor], joined: Tensor) -> None:
    """All parts of an expert have the same columns. Raises: DamagedError."""
    for target in targets:
        require_equal(target, columns[target.module], columns_of(joined, target))


def require_equal(target: Target, columns: Tensor, others: Tensor) -> None:
    """A target's columns are those of the rest of its expert, or of all. Raises: DamagedError."""
    if not torch.equal(columns, others):
        found = f"columns that are not those of the rest of {target.name}"
        raise DamagedError(f"adapter, {target.module}", found, expected="the same: in memory they are one")


def columns_of(columns: Tensor, target: Target) -> Tensor:
    """A target's columns among those of a parameter: (r,), copied to the CPU."""
    own = columns if columns.dim() == 1 else columns[target.place[0]]
    return own.to("cpu", copy=True)
