"""What a surgery touches and what it leaves alone, as aligned plain text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.plan import Quantization, SurgeryPlan, Target  # which imports torch: tables of numbers need neither

_GAP = "  "
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TargetRow:
    """Targets that differ in their layer number only.

    `pattern`: their common name, see `describe`; `shape`: (out, in), of a convolution in channels, whose `kernel` is
    its height and width; `sharing`: how many targets, itself included, are fed by one tensor and share their columns.
    """

    pattern: str
    count: int
    shape: tuple[int, int]
    dtype: str
    rank: int
    sharing: int
    trained_values: int
    kernel: tuple[int, ...] = ()

    @property
    def size(self) -> str:
        """`768 x 192`, of a convolution `384 x 192 x 2 x 2`."""
        return " x ".join(f"{size}" for size in (*self.shape, *self.kernel))


def fold(name: str) -> str:
    """A dotted name with `*` for the numbers after its dots."""
    return _NUMBER.sub("*", f"{name}.")[:-1]


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def describe(names: Sequence[str], *, is_only: bool) -> str:
    """One name for several that differ in numbers.

    A number they share stands as it is; numbers that differ are `*`, or `{0-3,7}` where `*` would mean others as well.
    """
    numbers = [[int(number) for number in _NUMBER.findall(f"{name}.")] for name in names]
    texts = []
    for column in zip(*numbers, strict=True):
        several = "*" if is_only else f"{{{ranges(column)}}}"
        texts.append(f"{column[0]}" if len(set(column)) == 1 else several)
    parts = iter(texts)
    return _NUMBER.sub(lambda _: next(parts), f"{names[0]}.")[:-1]


def target_rows(targets: Sequence[Target]) -> list[TargetRow]:
    """One row for each kind of target, in the order of the first names."""
    members = Counter(target.group for target in targets)
    kinds: dict[tuple[str, tuple[int, int], str, int, int, tuple[int, ...]], list[Target]] = {}
    for target in targets:
        kernel: tuple[int, ...] = target.sizes[2:] if len(target.sizes) == 4 else ()
        shape = (target.out_features // math.prod(kernel), target.in_features)
        key = (fold(target.module), shape, target.dtype, target.rank, members[target.group], kernel)
        kinds.setdefault(key, []).append(target)
    folded = Counter(key[0] for key in kinds)
    rows = []
    for (pattern, shape, dtype, rank, sharing, kernel), same in kinds.items():
        name = describe([target.module for target in same], is_only=folded[pattern] == 1)
        values = sum(target.trained_values for target in same)
        rows.append(TargetRow(name, len(same), shape, dtype, rank, sharing, values, kernel))
    return rows


def size_text(count_bytes: float) -> str:
    """`1.07 MB`: decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.0f} {unit}" if unit == "bytes" else f"{count_bytes:.2f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.2f} TB"


def align(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of text as columns of equal width, those numbered in `right` flush right, no blanks at the end."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def place(column: int, text: str) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    return [_GAP.join(place(column, text) for column, text in enumerate(row)).rstrip() for row in rows]


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def target_lines(plan: SurgeryPlan) -> list[str]:
    """The table of the layers whose columns train."""
    sharing = (
        "same columns" if any(target.holder for target in plan.targets) else "same input"
    )  # experts' inputs differ
    head = ("layers", "count", "out x in", "dtype", "rank", sharing, "trained values")
    rows = [head]
    for row in target_rows(plan.targets):
        shared = _layers(row.sharing) if row.sharing > 1 else "-"
        rows.append(
            (row.pattern, f"{row.count}", row.size, row.dtype, f"{row.rank}", shared, f"{row.trained_values:,}")
        )
    return align(rows, right=(1, 2, 4, 5, 6))


def stack_lines(plan: SurgeryPlan) -> list[str]:
    """The table of the stacks that a side network reads."""
    rows = []
    for stack in plan.stacks:
        values = sum(t.trained_values for t in plan.side if f".stacks.{stack.name}." in t.parameter)
        read = f"{ranges(stack.read)} of {stack.depth}"
        rows.append((stack.name, stack.layers, read, f"{stack.width}", stack.exit, f"{values:,}"))
    head = ("stack", "layers", "read", "width", "corrected after", "trained values")
    return align([head, *rows], right=(3, 5)) if rows else []


def whole_lines(plan: SurgeryPlan) -> list[str]:
    """The table of what is trained whole."""
    rows = []
    for target in plan.whole:
        size = " x ".join(str(size) for size in target.shape)
        origin = "from the base" if target.sha256 else "new"
        rows.append((target.parameter, size, target.dtype, origin, f"{target.trained_values:,}"))
    return align([("trained whole", "size", "dtype", "origin", "trained values"), *rows], right=(1, 4)) if rows else []


def untouched_lines(plan: SurgeryPlan) -> list[str]:
    """The table of the weights that do not train, and why."""
    rows = [(entry.pattern, f"{entry.count}", entry.reason) for entry in plan.untouched]
    return align([("not touched", "count", "reason"), *rows], right=(1,)) if rows else []


def held_text(held: Quantization) -> str:
    """How a base's weights are held: `nf4, 224 layers, quantized when they are loaded`."""
    how = "as its files have them" if held.is_stored else "quantized when they are loaded"
    return f"{held.kind}, {_layers(len(held.layers))}, {how}"


def plan_lines(plan: SurgeryPlan) -> list[str]:
    """What matched, what trains whole, what is not touched, and the sum."""
    trained = sum(target.trained_values for target in plan.targets) + sum(t.trained_values for t in plan.side)
    weights = sum(target.out_features * target.in_features for target in plan.targets)
    total = f"{trained:,} values train in a side network; the backbone does not"
    if plan.targets:
        layers = _layers(len(plan.targets))
        total = f"{trained:,} values train in {layers}, {trained / weights:.2%} of {weights:,} weights"
        if budget := plan.spec.get("budget"):
            total += f", under a budget of {budget}" + " of all that was meant" * budget.endswith("%")
    if plan.whole:
        total += f"; {plan.trained_values - trained:,} in {len(plan.whole)} whole tensors"
    if plan.quantization:
        total += f"; the base is held as {held_text(plan.quantization)}"
        total += ", experts as its files have them" * any(target.holder for target in plan.targets)
    targets = target_lines(plan) if plan.targets else stack_lines(plan)
    blocks = [targets, whole_lines(plan), untouched_lines(plan), [total]]
    return [line for number, block in enumerate(filter(None, blocks)) for line in ([""] if number else []) + block]
