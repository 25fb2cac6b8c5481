"""Several adapters trained on one base, as one: each layer has the columns of all of them, none of them twice.

A union is an `Adapter` in memory, with `parents`; every exporter that takes an adapter's columns takes it. Nothing is
added up: a column has the values of the one adapter that trained it, so the order of the adapters does not matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from surgery.adapter import Adapter, find_base
from surgery.checkpoint import Checkpoint
from surgery.columns import STORED, columns_key
from surgery.delta import ColumnDelta, ColumnPatch, WholePatch, require_base, require_columns
from surgery.errors import BaseMismatchError, RequestError, UnsupportedError, counted
from surgery.experts import by_parameter
from surgery.manifest import Manifest, Record
from surgery.methods.paca_spec import CALIBRATION
from surgery.plan import SurgeryPlan, Target, Untouched, WholeTarget
from surgery.quantized_base import base_digest

LISTED_LAYERS, LISTED_COLUMNS = 12, 8  # of an overlap, in its message

T = TypeVar("T")


def unite(adapters: Sequence[Adapter], base: str | Path | None = None) -> Adapter:
    """The union of two adapters or more. Nothing is written; patches are read as they are asked for.

    base: the folder or hub id where the first adapter's base is not where it was. The smallest target of each adapter
    is compared with it here, the rest by whoever reads the base.
    Raises: UnsupportedError for an overlap (which it lists) and for side networks; RequestError for one adapter given
    twice or for other tasks; BaseMismatchError.
    """
    deltas = [require_columns(adapter.delta, f"--merge, {adapter.folder}") for adapter in adapters]
    first = adapters[0]
    _require_different(adapters)
    for other in adapters[1:]:
        _require_same_model(first, other)
    _require_same_base(adapters, Checkpoint.open(find_base(first.record, first.folder, base)))
    _require_disjoint(adapters, deltas)
    plan = _united_plan(deltas)
    whole: dict[str, WholePatch] = {}
    for delta in deltas:
        whole |= delta.whole
    delta = ColumnDelta(plan, _UnitedPatches(plan, deltas), whole)
    return Adapter(
        first.folder, Record(first.record.kind, plan, Manifest(first.record.manifest.base)), delta, tuple(adapters)
    )


class _UnitedPatches(Mapping[str, ColumnPatch]):
    """Each target's columns from all adapters, in order; one target is in memory at a time."""

    def __init__(self, plan: SurgeryPlan, deltas: Sequence[ColumnDelta]) -> None:
        self._targets = {target.module: target for target in plan.targets}
        self._deltas = deltas

    def __getitem__(self, module: str) -> ColumnPatch:
        parts = [delta.patches[module] for delta in self._deltas if module in delta.patches]
        if not parts:
            raise KeyError(module)
        columns, order = torch.cat([part.columns for part in parts]).sort()
        values = torch.cat([part.values for part in parts], dim=1)[:, order]
        original = torch.cat([part.original for part in parts], dim=1)[:, order]
        return ColumnPatch(self._targets[module], columns, values.contiguous(), original.contiguous())

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def shared_groups(keys: Mapping[str, Hashable]) -> dict[str, str]:
    """Each module's group: the first module with the same key, which says its input and its columns."""
    names: dict[Hashable, str] = {}
    return {module: names.setdefault(keys[module], module) for module in sorted(keys)}


# --- what may be united


def _require_different(adapters: Sequence[Adapter]) -> None:
    times = Counter(adapter.folder.resolve() for adapter in adapters)
    for folder, count in times.items():
        if count > 1:
            raise RequestError("export", f"{folder} stands {count} times", expected="each adapter once")


def _require_same_model(first: Adapter, other: Adapter) -> None:
    """Both were planned for the same class, task and labels. Raises: RequestError."""
    ours, theirs = _model_of(first.plan), _model_of(other.plan)
    for name, value in theirs.items():
        if value != ours[name]:
            expected, fix = f"{ours[name]}, as of {first.folder}", "Merge them one by one into folders of their own"
            raise RequestError(str(other.folder), f"its {name} is {value}", expected=expected, fix=fix)


def _model_of(plan: SurgeryPlan) -> dict[str, object]:
    held = plan.quantization.kind if plan.quantization else "dense"
    facts = {"model": plan.architecture, "task": plan.task, "prefix": plan.prefix, "configuration": dict(plan.config)}
    return {**facts, "way of holding the base": held}


def _require_same_base(adapters: Sequence[Adapter], checkpoint: Checkpoint) -> None:
    """A weight of each is compared with the base, and what two of them know of a weight. Raises: BaseMismatchError."""
    known: dict[str, tuple[str, Adapter]] = {}
    for adapter in adapters:
        for weight, digest in _digests(adapter.plan).items():
            if known.setdefault(weight, (digest, adapter))[0] != digest:
                raise BaseMismatchError(
                    str(adapter.folder),
                    f"{weight} of its base has sha256 {digest[:12]}..",
                    expected=f"{known[weight][0][:12]}.., of the base that {known[weight][1].folder} was made for",
                    fix="Adapters of different bases cannot be merged into one",
                )
        smallest = min(adapter.plan.targets, key=lambda target: target.out_features * target.in_features)
        if smallest.weight not in checkpoint:
            found = f"{checkpoint.root} has no {smallest.weight}"
            raise BaseMismatchError(str(adapter.folder), found, expected="the base this adapter was made for")
        digest = base_digest(checkpoint, adapter.plan, smallest)
        require_base(smallest, digest, f"{checkpoint.root} for {adapter.folder}")


def _digests(plan: SurgeryPlan) -> dict[str, str]:
    entries: list[Target | WholeTarget] = [*plan.targets, *plan.whole]
    return {entry.weight: entry.sha256 for entry in entries if entry.sha256}


def _require_disjoint(adapters: Sequence[Adapter], deltas: Sequence[ColumnDelta]) -> None:
    """No column and no whole tensor is trained by two. Raises: UnsupportedError that lists what is."""
    names = [str(adapter.folder) for adapter in adapters]
    heads = _owners((name, head) for name, delta in zip(names, deltas, strict=True) for head in delta.whole)
    found = [f"{head} whole by {' and '.join(owners)}" for head, owners in heads.items() if len(owners) > 1]
    columns, layers = 0, 0
    for module in sorted({module for delta in deltas for module in delta.patches}):
        shared = _shared_columns(module, names, deltas)
        columns, layers = columns + len(shared), layers + bool(shared)
        if shared and layers <= LISTED_LAYERS:
            who = sorted({name for owners in shared.values() for name in owners})
            found.append(f"{module}, {_numbers(sorted(shared))} by {' and '.join(who)}")
    if layers > LISTED_LAYERS:
        found.append(f"and {layers - LISTED_LAYERS} more layers")
    if found:
        said = f"{counted(columns, 'column')} of {counted(layers, 'layer')} trained more than once ({'; '.join(found)})"
        fix = "Train them with other columns (--seed) or on other layers (--targets)"
        raise UnsupportedError("export", said, expected="adapters that do not overlap", fix=fix)


def _owners(pairs: Iterable[tuple[str, T]]) -> dict[T, list[str]]:
    owners: dict[T, list[str]] = {}
    for name, thing in pairs:
        owners.setdefault(thing, []).append(name)
    return owners


def _shared_columns(module: str, names: Sequence[str], deltas: Sequence[ColumnDelta]) -> dict[int, list[str]]:
    """Columns that more than one adapter has of a layer, and whose they are."""
    opened = [(name, delta) for name, delta in zip(names, deltas, strict=True) if module in delta.patches]
    if len(opened) < 2:
        return {}
    owners = _owners((name, column) for name, delta in opened for column in delta.patches[module].columns.tolist())
    return {column: who for column, who in owners.items() if len(who) > 1}


def _numbers(columns: Sequence[int]) -> str:
    more = f" .. ({len(columns)})" if len(columns) > LISTED_COLUMNS else ""
    return f"{'column' if len(columns) == 1 else 'columns'} {', '.join(map(str, columns[:LISTED_COLUMNS]))}{more}"


# --- the plan


def _united_plan(deltas: Sequence[ColumnDelta]) -> SurgeryPlan:
    """Every target of every plan, with as many columns as it has in all of them together."""
    plans = [delta.plan for delta in deltas]
    ranks: Counter[str] = Counter()
    rows: dict[str, tuple[int, ...]] = {}
    keys: dict[str, tuple[Hashable, ...]] = {}
    targets: dict[str, Target] = {}
    for delta in deltas:
        for target in delta.plan.targets:
            targets.setdefault(target.module, target)
            numbers = delta.patches[target.module].columns
            ranks[target.module] += len(numbers)  # more than its rank where they were drawn anew
            rows[target.module] = tuple(sorted((*rows.get(target.module, ()), *target.rows)))
            columns = columns_key(numbers)
            keys[target.module] = (*keys.get(target.module, ()), target.group, columns)
    _require_one_rank(targets.values(), ranks)
    groups = shared_groups(keys)
    united = tuple(replace(targets[m], rank=ranks[m], group=groups[m], rows=rows[m]) for m in sorted(targets))
    whole = {target.parameter: target for plan in plans for target in plan.whole}
    chosen_by = ("budget", "resample", "rows", *CALIBRATION)  # the columns are there
    spec = {name: value for name, value in plans[0].spec.items() if name not in chosen_by}
    spec = {**spec, "rank": max(ranks.values()), "targets": [target.module for target in united]}
    spec |= {"exclude": [], "rank_pattern": {}, "alpha": None, "select": STORED}
    untouched = _still_untouched(plans[0], united, whole)
    ordered = tuple(whole[name] for name in sorted(whole))
    return replace(plans[0], spec=spec, targets=united, whole=ordered, untouched=untouched, calibration={})


def _require_one_rank(targets: Iterable[Target], ranks: Mapping[str, int]) -> None:
    """In memory a parameter's experts have as many columns each. Raises: UnsupportedError where they have not."""
    for name, members in by_parameter(targets).items():
        found = sorted({ranks[target.module] for target in members})
        if len(found) > 1:
            said = f"experts of {name} with {found[0]} to {found[-1]} columns, which were drawn anew for each"
            fix = "Merge the adapter that drew them by itself, or train it with --experts shared"
            raise UnsupportedError("export", said, expected="as many columns of each", fix=fix)


def _still_untouched(
    plan: SurgeryPlan, targets: Sequence[Target], whole: Mapping[str, WholeTarget]
) -> tuple[Untouched, ...]:
    """What one plan leaves alone, less what the others train of it."""
    own = {target.name for target in plan.targets} | {target.parameter for target in plan.whole}
    names = ({target.name for target in targets} | set(whole)) - own
    gone = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    left = [replace(entry, count=entry.count - gone[entry.pattern]) for entry in plan.untouched]
    return tuple(entry for entry in left if entry.count > 0)
