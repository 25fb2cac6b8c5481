"""Which columns a plan's strategy means, where it has to look: at weights, at inputs or at gradients, or into a file.

What is chosen is stored (the adapter file holds the columns), so that nothing is looked at again when it is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.adapter import draw_heads
from surgery.calibration import Batch, Site, calibrate
from surgery.checkpoint import Checkpoint
from surgery.columns import (
    INPUTS,
    RANDOM,
    STRATEGIES,
    WEIGHTS,
    Choice,
    GroupScores,
    budget_values,
    generator_seed,
    is_file,
    spread,
    takes_data,
    top_columns,
)
from surgery.data import Prepared, inspect_labels, prepare, prepare_images
from surgery.data_spec import DataSpec
from surgery.delta import ColumnDelta
from surgery.errors import DataError, RequestError, UnsupportedError
from surgery.expert_scores import ExpertSite
from surgery.experts import budget_unit, live_weight, matrices
from surgery.images import TASK as IMAGES
from surgery.images import read_processor
from surgery.methods.paca_plan import named_columns
from surgery.methods.paca_spec import PacaSpec
from surgery.plan import SurgeryPlan, Target, Untouched
from surgery.table import fold
from surgery.tensorfile import file_sha256
from surgery.tokens import read_tokenizer

BATCH_ROWS = 8  # of a gradient; inputs are looked at row by row, without padding
Chosen = tuple[SurgeryPlan, Choice | None]


def looks(plan: SurgeryPlan) -> bool:
    """Whether a plan's columns are not decided by its seed."""
    return bool(plan.targets) and plan.spec.get("select", RANDOM) != RANDOM


def choose(checkpoint: Checkpoint, plan: SurgeryPlan, load: Callable[..., Any]) -> Chosen:
    """The plan with what its columns' scores decide, and the columns; None where the seed decides them all.

    load: (root, plan, dtype=..) -> the base as a model, for what looks at inputs or gradients.
    Raises: RequestError, DataError, UnsupportedError, CheckError, ResourceError.
    """
    found = _without_data(plan, lambda target: checkpoint.read_tensor(target.weight))
    if found:
        return found
    spec = PacaSpec(**plan.spec)
    require_data(spec)
    batches = calibration_batches(checkpoint.root, plan, spec)
    is_half = any(target.dtype == "F16" for target in plan.targets)
    held = plan.quantization
    dense = plan if held is None or held.is_stored else replace(plan, quantization=None)  # looked at before
    model = load(checkpoint.root, dense, dtype=torch.float32 if is_half else None)
    draw_heads(model, checkpoint, plan)
    model.config.use_cache = False
    settled, choice = settle(plan, calibrate(model, _sites(plan), spec.select, batches))
    return replace(settled, calibration=_digests(spec)), choice


def choose_live(model: Any, plan: SurgeryPlan, batches: Iterable[Batch]) -> Chosen:
    """The same for a model in memory. `batches`: what it is called with, labels included. Raises: as `choose`."""
    found = _without_data(plan, lambda target: live_weight(model, target))
    if found:
        return found
    spec = PacaSpec(**plan.spec)
    return settle(plan, calibrate(model, _sites(plan), spec.select, batches))


def _without_data(plan: SurgeryPlan, weight_of: Callable[[Target], Tensor]) -> Chosen | None:
    """What needs neither inputs nor gradients: the seed, a file, or the weights; None for the rest."""
    if not looks(plan):
        return plan, None
    spec = PacaSpec(**plan.spec)
    if is_file(spec.select):
        return plan, _named(plan, spec)
    if STRATEGIES[spec.select].looks_at == WEIGHTS:
        return settle(plan, _weight_scores(spec, ((target, weight_of(target)) for target in to_choose(plan))))
    return None


def carried(adapter: ColumnDelta, planned: SurgeryPlan) -> Chosen:
    """A plan of one column on all wanted layers, for another task, with what an adapter has on the same weights."""
    patches = {patch.target.weight: patch for patch in adapter.patches.values()}
    first: dict[str, str] = {}
    targets = []
    for target in planned.targets:
        if target.weight in patches:
            before = patches[target.weight].target
            group = first.setdefault(before.group, target.module)
            targets.append(replace(target, rank=before.rank, group=group))
    dropped = _count_dropped([t for t in planned.targets if t.weight not in patches], "no columns were chosen for it")
    plan = replace(
        planned,
        spec=adapter.plan.spec,
        targets=tuple(targets),
        untouched=(*planned.untouched, *dropped),
        calibration=adapter.plan.calibration,
    )
    columns = {target.module: patches[target.weight].columns for target in targets}
    scores = {target.module: patches[target.weight].scores for target in targets}
    return plan, Choice(columns, {module: score for module, score in scores.items() if score is not None})


def _named(plan: SurgeryPlan, spec: PacaSpec) -> Choice:
    groups, chosen = {target.module: target.group for target in plan.targets}, to_choose(plan)
    return Choice(named_columns(spec.select, chosen, groups, _rows(plan)))


def to_choose(plan: SurgeryPlan) -> list[Target]:
    """The targets whose columns are chosen; of an embedding the rows are named."""
    return [target for target in plan.targets if not target.rows]


def _rows(plan: SurgeryPlan) -> dict[str, Sequence[int]]:
    return {target.module: target.rows for target in plan.targets if target.rows}


def _sites(plan: SurgeryPlan) -> list[Site | ExpertSite]:
    return [
        ExpertSite(t.module, t.in_features, t.holder, t.parameter, t.place)
        if t.holder
        else Site(t.module, t.out_features, t.in_features, t.input_axis, t.parameter)
        for t in to_choose(plan)
    ]


def _weight_scores(spec: PacaSpec, weights: Iterable[tuple[Target, Tensor]]) -> dict[str, Tensor]:
    """Scores by module; one weight is in memory at a time. Of a tensor that holds all experts theirs are summed."""
    score, found = STRATEGIES[spec.select].score, {}
    for target, weight in weights:
        parts = (score(part, seed=spec.seed, name=name).cpu() for name, part in matrices(target, weight))
        found[target.module] = functools.reduce(torch.add, parts)
    return found


# --- from scores to a plan


def settle(plan: SurgeryPlan, scores: Mapping[str, Tensor]) -> Chosen:
    """The plan and its columns by scores (i,) of its targets, by module; rows, which are named, have none.

    Of a group the layers' scores are summed. Raises: RequestError for a budget that cannot be met.
    """
    spec = PacaSpec(**plan.spec)
    summed: dict[str, Tensor] = {}
    for target in to_choose(plan):
        before = summed.get(target.group)
        summed[target.group] = scores[target.module] if before is None else before + scores[target.module]
    if spec.budget:
        total = sum(target.out_features * target.in_features for target in to_choose(plan))
        plan = _with_ranks(plan, spread(_budget_scores(spec, plan, summed), budget_values(spec.budget, total)))
    chosen = to_choose(plan)
    columns = {t.module: top_columns(summed[t.group], t.rank, seed=spec.seed, group=t.group) for t in chosen}
    kept = {t.module: summed[t.group] for t in chosen} if spec.resample else {}
    return plan, Choice(columns | {module: torch.tensor(rows) for module, rows in _rows(plan).items()}, kept)


def _budget_scores(spec: PacaSpec, plan: SurgeryPlan, summed: Mapping[str, Tensor]) -> list[GroupScores]:
    """What a budget is spread over, by name. summed: each group's scores.

    Experts with columns of their own have as many each: what the n-th costs and brings is that of all their n-th best.
    """
    values: dict[str, int] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for target in to_choose(plan):
        unit = budget_unit(target, target.group, spec.experts)
        values[unit] = values.get(unit, 0) + target.out_features
        groups.setdefault(unit, {})[target.group] = summed[target.group]
    result = []
    for unit, parts in sorted(groups.items()):
        ranked = [part.sort(descending=True).values for part in parts.values()]
        scores = next(iter(parts.values())) if len(parts) == 1 else functools.reduce(torch.add, ranked)
        result.append(GroupScores(unit, scores, values[unit]))
    return result


def _with_ranks(plan: SurgeryPlan, ranks: Mapping[str, int]) -> SurgeryPlan:
    """Ranks by what a budget is spread over; layers of what has none are not touched, and rows stay."""
    experts, chosen = plan.spec.get("experts", ""), to_choose(plan)
    given = {target.module: ranks.get(budget_unit(target, target.group, experts), 0) for target in chosen}
    given |= {module: len(rows) for module, rows in _rows(plan).items()}
    targets = tuple(replace(target, rank=given[target.module]) for target in plan.targets if given[target.module])
    dropped = _count_dropped([target for target in chosen if not given[target.module]], "nothing of the budget")
    return replace(plan, targets=targets, untouched=(*plan.untouched, *dropped))


def _count_dropped(targets: Iterable[Target], reason: str) -> tuple[Untouched, ...]:
    counts = Counter(fold(target.name if not target.holder else f"{target.module}.weight") for target in targets)
    return tuple(Untouched(name, count, reason) for name, count in counts.items())


# --- the data


def require_data(spec: PacaSpec) -> None:
    """Data are named where a strategy takes them. Raises: RequestError."""
    if takes_data(spec.select) and not spec.calibration_data:
        expected = "data to look at"
        raise RequestError(f"--select {spec.select}", "no data", expected=expected, fix="Give --calibration-data FILE")


def _digests(spec: PacaSpec) -> dict[str, str]:
    return {name: _digest(Path(name)) for name in spec.calibration_data if Path(name).exists()}


def _digest(data: Path) -> str:
    """Of a file its bytes'; of a folder, which may be large, that of its files' names and sizes."""
    if data.is_file():
        return file_sha256(data)
    files = sorted((str(path.relative_to(data)), path.stat().st_size) for path in data.rglob("*") if path.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def changed_data(plan: SurgeryPlan) -> tuple[str, ...]:
    """Which of the data that a plan's columns were chosen by are others now; what is gone has not changed."""
    if not plan.calibration:
        return ()
    found = _digests(PacaSpec(**plan.spec))
    return tuple(name for name, digest in found.items() if digest != plan.calibration.get(name, digest))


def calibration_batches(root: Path, plan: SurgeryPlan, spec: PacaSpec) -> list[Batch]:
    """Rows drawn by the seed, as the model is called with them: a function of the data, the seed and the tokenizer.

    Raises: DataError; RequestError; UnsupportedError for a model without a task.
    """
    if plan.task == "features":
        fix = "Name the task with --task"
        found = f"a {plan.architecture} has no task, and rows mean nothing to it"
        raise UnsupportedError(f"--select {spec.select}", found, expected="a model with one", fix=fix)
    with _in_words_of_apply():
        prepared = _prepare(root, plan, spec)
    return draw_batches(prepared, rows=spec.calibration_rows, select=spec.select, seed=spec.seed)


def classes_in_data(plan: SurgeryPlan) -> tuple[str, ...]:
    """The classes of the data to look at, as training has them; empty where no head trains. Raises: DataError."""
    if not (plan.whole and takes_data(plan.spec.get("select", RANDOM)) and plan.spec.get("calibration_data")):
        return ()
    with _in_words_of_apply():
        return inspect_labels(_data(PacaSpec(**plan.spec)), plan.task)


@contextmanager
def _in_words_of_apply() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(error.where, error.found, expected=error.expected, fix=_as_option(error.fix)) from error


def _as_option(fix: str) -> str:
    """What to do about columns, in the words of `apply` too: `train` and recipes say `data.columns`."""
    fix = fix.replace("data.max_length", "data.max_length (of apply: --calibration-length)")
    named = re.search(r"data\.columns = \{(.*?)\}", fix)
    if not named:
        return fix
    option = named[1].replace(": ", "=").replace(", ", ",").replace("'", "")
    return f"{fix[: named.end()]} (of apply: --calibration-columns {option}){fix[named.end() :]}"


def _data(spec: PacaSpec) -> DataSpec:
    return DataSpec(train=spec.calibration_data, columns=spec.calibration_columns)


def _prepare(root: Path, plan: SurgeryPlan, spec: PacaSpec) -> Prepared:
    if plan.task == IMAGES:
        return prepare_images(_data(spec), processor=read_processor(root), labels=plan.labels)
    data = replace(_data(spec), max_length=spec.calibration_length)
    return prepare(data, task=plan.task, tokenizer=read_tokenizer(root), labels=plan.labels)


def draw_batches(prepared: Prepared, *, rows: int, select: str, seed: int) -> list[Batch]:
    """At most so many rows of a training set, in batches for a strategy, as a function of the seed and the set."""
    size = 1 if STRATEGIES[select].looks_at == INPUTS else BATCH_ROWS
    generator = torch.Generator().manual_seed(generator_seed(seed, "calibration"))
    order = torch.randperm(len(prepared.train), generator=generator)[:rows].tolist()
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [prepared.collator([prepared.train[number] for number in part]) for part in parts]
