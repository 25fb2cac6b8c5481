"""What a request means for a checkpoint or a model: the plan, made without reading a weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.compat import base_prefix, memory_names
from surgery.errors import DamagedError, UnsupportedError
from surgery.methods.paca import PacaSpec
from surgery.plan import SurgeryPlan, Target, WholeTarget
from surgery.select import LinearSite, find_sites, ranks_of, resolve
from surgery.survey import (
    TASKS,
    TaskSpec,
    list_untouched,
    new_parameters,
    survey,
    trace_groups,
)
from surgery.tensorfile import FLOAT_DTYPES, TensorInfo


@dataclass(frozen=True)
class Stored:
    """Where a model's parameter lies in a file (or, without a file, in the live model): key, dtype, shape."""

    weight: str
    dtype: str
    shape: tuple[int, ...]


def plan_checkpoint(checkpoint: Checkpoint, spec: PacaSpec, task: TaskSpec | None = None) -> SurgeryPlan:
    """The plan for a checkpoint, from its headers and a model on the meta device; no weight is read.

    Raises: SelectorError, UnsupportedError, NotAModelError, DamagedError.
    """
    seen = survey(checkpoint.root, task or TaskSpec())
    names = memory_names(seen.model, checkpoint)
    stored = {m.name: _stored(checkpoint[disk]) for disk, m in names.items() if m.is_verbatim}
    converted = {m.name: "changed by transformers on loading" for m in names.values() if not m.is_verbatim}
    prefix = f"{base_prefix(seen.model)}." if any(m.is_prefixed for m in names.values()) else ""
    plan = plan_model(seen.model, spec, stored, converted, task=seen.task, heads=seen.heads)
    return replace(plan, architecture=seen.architecture, prefix=prefix, config=dict(seen.config_changes))


def _stored(info: TensorInfo) -> Stored:
    return Stored(info.name, info.dtype, info.shape)


def plan_model(
    model: nn.Module,
    spec: PacaSpec,
    stored: Mapping[str, Stored],
    converted: Mapping[str, str],
    *,
    task: str,
    heads: tuple[str, ...],
) -> SurgeryPlan:
    """The plan for a model, live or on the meta device.

    stored: where each parameter lies, by name; converted: why some cannot be trained; heads: modules of the output.
    Raises: SelectorError, UnsupportedError, DamagedError.
    """
    sites = find_sites(model, heads)
    groups = trace_groups(model, sites)
    whole = _plan_whole(model, stored, converted, task=task, heads=heads)
    whole_names = {target.parameter for target in whole}
    candidates = [s for s in sites if f"{s.module}.weight" in stored and f"{s.module}.weight" not in whole_names]
    chosen = resolve(candidates, spec.targets, exclude=spec.exclude)
    ranks = ranks_of(chosen, spec.rank, spec.rank_pattern)
    targets = tuple(_target(site, stored[f"{site.module}.weight"], ranks[site.module], groups) for site in chosen)
    touched = {f"{t.module}.weight": t for t in targets} | {w.parameter: w for w in whole}
    reasons = dict(converted) | {f"{s.module}.weight": "output head" for s in sites if s.is_head}
    reasons |= {f"{s.module}.weight": f"tied with {s.tied_with}" for s in sites if s.tied_with}
    reasons |= {f"{s.module}.weight": "not selected" for s in candidates if not s.is_head and not s.tied_with}
    untouched = list_untouched(model, touched, reasons)
    architecture = type(model).__name__
    return SurgeryPlan("paca", json.loads(json.dumps(asdict(spec))), architecture, task, targets, whole, untouched)


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
    )
    if stored.shape != target.shape:
        raise DamagedError(stored.weight, f"shape {stored.shape}", expected=f"{target.shape}, by config.json")
    return target


def _plan_whole(
    model: nn.Module,
    stored: Mapping[str, Stored],
    converted: Mapping[str, str],
    *,
    task: str,
    heads: tuple[str, ...],
) -> tuple[WholeTarget, ...]:
    """The head of a task that has one, and whatever such a model has that the checkpoint has not."""
    new = dict(new_parameters(model, set(stored) | set(converted)))
    if not TASKS[task].has_head:
        if new:
            found = f"it lacks {len(new)} tensors of {type(model).__name__}, first {next(iter(new))}"
            raise DamagedError("checkpoint", found, expected="a whole checkpoint", fix="Fetch it again, or name --task")
        return ()
    in_head = {n: p for n, p in model.named_parameters() if any(n.startswith(f"{head}.") for head in heads)}
    kinds = Counter(found.dtype for found in stored.values() if found.dtype in FLOAT_DTYPES)
    dtype = kinds.most_common(1)[0][0] if kinds else "F32"
    result = []
    for name, parameter in sorted((new | in_head).items()):
        found_at = stored.get(name)
        weight, kind = (found_at.weight, found_at.dtype) if found_at else (name, dtype)
        digest = "unread" if found_at else ""
        result.append(WholeTarget(name, weight, tuple(parameter.shape), kind, digest))
    return tuple(result)
