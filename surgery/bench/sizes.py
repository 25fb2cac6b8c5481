"""How large a method is made: as asked, or such that its trained values come near to those of another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from surgery.bench.methods import VARIANTS, Shared, explained, paca_settings, trained
from surgery.bench.results import FLOOR, Size
from surgery.bench.spec import BenchSpec, Entry, default_size, parse_method, wanted_values
from surgery.bench.subject import Subject
from surgery.errors import RequestError
from surgery.planning import make_spec, plan_model

LARGEST = 1 << 20


def settle(subject: Subject, entries: tuple[Entry, ...]) -> tuple[tuple[Entry, list[str]], ...]:
    """Each method with its size, and what is to be said about it.

    Raises: RequestError where a method cannot be put on this model; UnsupportedError.
    """
    return tuple(_settle(subject, entry) for entry in entries)


def _settle(subject: Subject, entry: Entry) -> tuple[Entry, list[str]]:
    spec, variant = subject.spec, entry.variant
    wanted = wanted_values(entry, spec)
    if not variant.size:
        count_values(subject, entry)  # refused here where the model does not suit it
        is_odd = spec.equal == "values" and variant.name != FLOOR  # the floor trains nothing
        return entry, [f"{variant.name} has no size to choose"] if is_odd else []
    if "budget" in entry.settings:
        entry = _with_budget(subject, entry)
        found = count_values(subject, entry)
        return entry, [f"budget {entry.settings['budget']}: about {found:,} values without heads"]
    if wanted is None:
        size = entry.size or default_size(entry, spec)
        settled = with_size(entry, size)
        count_values(subject, settled)
        return settled, _rank_note(entry, spec, size)
    target = _target(subject, wanted, spec)
    size = nearest(lambda number: count_values(subject, with_size(entry, number)), target)
    found = count_values(subject, with_size(entry, size))
    said = f"as {wanted}" if isinstance(wanted, str) else "as asked"
    return with_size(entry, size), [
        f"{variant.size} {size}: {found:,} values without heads, {found / target - 1:+.1%} to {target:,} {said}"
    ]


def _with_budget(subject: Subject, entry: Entry) -> Entry:
    """A budget that names a method, `budget=paca:r=16`, as that method's values."""
    budget = str(entry.settings["budget"])
    if budget.partition(":")[0] in VARIANTS:
        values = _target(subject, budget, subject.spec)
        return replace(entry, settings={**entry.settings, "budget": values})
    return entry


def _rank_note(entry: Entry, spec: BenchSpec, size: int) -> list[str]:
    is_rank = entry.variant.size == "r" or entry.size is not None
    return [] if is_rank or spec.equal == "values" else [f"{entry.variant.size} {size} is its size, not a rank"]


def with_size(entry: Entry, size: int) -> Entry:
    """The same method, of that size."""
    return replace(entry, settings={**entry.settings, entry.variant.size: size})


def size_of(entry: Entry) -> Size | None:
    """For the results."""
    value = entry.settings.get(entry.variant.size)
    return Size(name=entry.variant.size, value=value) if value is not None else None


def _target(subject: Subject, wanted: str | int, spec: BenchSpec) -> int:
    if isinstance(wanted, int):
        return wanted
    other = parse_method(wanted)
    return count_values(subject, with_size(other, other.size or default_size(other, spec)))


def nearest(count: Callable[[int], int], target: int) -> int:
    """The size whose count comes nearest to the target, where counts grow with sizes. What `count` refuses is none."""
    low, high = 1, 2
    while high < LARGEST and _is_below(count, high, target):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _is_below(count, middle, target) else (low, middle)
    try:
        return high if abs(count(high) - target) < abs(count(low) - target) else low
    except RequestError:
        return low


def _is_below(count: Callable[[int], int], size: int, target: int) -> bool:
    try:
        return count(size) <= target
    except RequestError:
        return False


def count_values(subject: Subject, entry: Entry) -> int:
    """The values that a method trains beside the heads. Raises: RequestError, UnsupportedError."""
    shared = subject.shared()
    if entry.variant.name in _SPECS:
        spec = make_spec(entry.variant.name, _SPECS[entry.variant.name](shared, entry.settings), "")
        plan = plan_model(subject.seen.model, spec, shared.stored, {}, task=shared.task, heads=shared.heads)
        return plan.trained_values - sum(target.trained_values for target in plan.whole)
    if entry.variant.name == "shira":
        return _shira(subject, entry)
    with explained(entry.name):
        model = entry.variant.attach(copy.deepcopy(subject.seen.model), shared, entry.settings)
    return sum(trained(model).values()) - heads_values(subject, entry)


def _shira(subject: Subject, entry: Entry) -> int:
    """PEFT draws the entries from real weights, and says how many: r (in + out) of each layer."""
    rank, total = entry.settings["r"], 0
    for target in subject.plan.targets:
        values = rank * (target.in_features + target.out_features)
        if values > target.in_features * target.out_features:
            found = f"{values} values for {target.module}"
            expected = f"at most its {target.in_features * target.out_features}"
            raise RequestError(f"--methods {entry.name}", found, expected=expected, fix="Lower r")
        total += values
    return total


def heads_values(subject: Subject, entry: Entry) -> int:
    """Of those that train, the values that a task's heads have."""
    return 0 if entry.variant.name == "floor" else sum(target.trained_values for target in subject.plan.whole)


_SPECS: Mapping[str, Callable[[Shared, Mapping[str, Any]], dict[str, Any]]] = {
    "paca": paca_settings,
    "read": lambda _shared, settings: dict(settings),
}
