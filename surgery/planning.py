"""What a request means for a checkpoint or a model: the plan, made without reading a weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, Checkpoint, read_json
from surgery.compat import base_prefix, memory_names
from surgery.embedding_rows import number_rows
from surgery.errors import DamagedError, RequestError, UnsupportedError, option_of
from surgery.experts import expert_parts
from surgery.lookup import METHODS
from surgery.lookup import load as lookup
from surgery.manifest import read_document
from surgery.methods import PlanRequest
from surgery.plan import Parts, Quantization, Stored, SurgeryPlan, WholeTarget, without_later
from surgery.quantized import stored_kind
from surgery.quantized_base import packed_names, stored_weight
from surgery.survey import TASKS, TaskSpec, new_parameters, survey
from surgery.tensorfile import FLOAT_DTYPES, TensorInfo


def plan_checkpoint(checkpoint: Checkpoint, spec: Any, task: TaskSpec | None = None) -> SurgeryPlan:
    """The plan for a checkpoint, from its headers and a model on the meta device; no weight is read.

    spec: a method's, such as PacaSpec. Raises: SelectorError, UnsupportedError, NotAModelError, DamagedError.
    """
    require_bare(checkpoint.root)
    spec = number_rows(checkpoint.root, spec)
    seen = survey(checkpoint.root, task or TaskSpec(), takes_4bit=True)
    names = memory_names(seen.model, checkpoint)
    stored = {m.name: _stored(checkpoint[disk]) for disk, m in names.items() if m.is_verbatim}
    packed = set(packed_names(checkpoint))
    stored |= {m.name: stored_weight(checkpoint, disk) for disk, m in names.items() if m.is_verbatim and disk in packed}
    held = _held(checkpoint, {m.name: disk for disk, m in names.items() if m.is_verbatim and disk in packed})
    parts = expert_parts(names, {disk: _stored(info) for disk, info in checkpoint.items()})
    changed = (m.name for m in names.values() if not m.is_verbatim and m.name not in parts)
    converted = dict.fromkeys(changed, "changed by transformers on loading")
    prefix = f"{base_prefix(seen.model)}." if any(m.is_prefixed for m in names.values()) else ""
    task_and_heads: Any = {"task": seen.task, "heads": seen.heads}
    plan = plan_model(seen.model, spec, stored, converted, parts=parts, held=held, **task_and_heads)
    return replace(plan, architecture=seen.architecture, prefix=prefix, config=dict(seen.config_changes))


def require_bare(root: Path) -> None:
    """No side network lies in a model folder: transformers would load it without. Raises: UnsupportedError."""
    config = read_json(root / CONFIG_FILE) if (root / CONFIG_FILE).is_file() else {}
    plan = read_document(root).get("plan") if (root / RECORD_FILE).is_file() else None
    if ("auto_map" in config and "read" in config) or (isinstance(plan, dict) and plan.get("stacks")):
        raise UnsupportedError(
            str(root),
            "a model with a side network, which would be lost",
            expected="a plain or merged checkpoint",
            fix="Train the adapter that it was exported from, or start from that adapter's base",
        )


def _held(checkpoint: Checkpoint, packed: Mapping[str, str]) -> Quantization | None:
    """How the files hold the base's weights. packed: parameter -> its name there."""
    kind = stored_kind(read_json(checkpoint.root / CONFIG_FILE).get("quantization_config"))
    if not kind:
        return None
    return Quantization(
        kind, is_stored=True, layers={name.removesuffix(".weight"): disk for name, disk in sorted(packed.items())}
    )


def _stored(info: TensorInfo) -> Stored:
    return Stored(info.name, info.dtype, info.shape)


def plan_model(
    model: nn.Module,
    spec: Any,
    stored: Mapping[str, Stored],
    converted: Mapping[str, str],
    *,
    task: str,
    heads: tuple[str, ...],
    parts: Parts | None = None,
    held: Quantization | None = None,
) -> SurgeryPlan:
    """The plan for a model, live or on the meta device.

    stored: where each parameter lies, by name; converted: why some cannot be trained; heads: modules of the output;
    parts: where the tensors lie that are put together to parameters of experts; held: how the base is quantized
    already.
    Raises: SelectorError, UnsupportedError, DamagedError.
    """
    parts = parts or {}
    whole = _plan_whole(model, stored, {**converted, **dict.fromkeys(parts, "")}, task=task, heads=heads)
    method = lookup(METHODS, spec.method, "--method")
    planned = method.plan(spec, PlanRequest(model, stored, converted, heads, whole, task, parts, held))
    return SurgeryPlan(spec.method, plain_spec(spec), type(model).__name__, task, whole=whole, **planned)


def plain_spec(spec: Any) -> dict[str, Any]:
    """A spec as a plan holds it, as older plans have it: see `without_later`."""
    return without_later(type(spec), [json.loads(json.dumps(asdict(spec)))])[0]


def make_spec(method: str, settings: Mapping[str, Any], option: str = "--") -> Any:
    """A method's spec from the settings that were given; the rest have their defaults.

    option: what the user's names begin with, for messages. Raises: RequestError for a setting that it has not.
    """
    spec_type = lookup(METHODS, method, f"{option}method").spec_type
    known = [entry.name for entry in fields(spec_type)]
    for name in settings:
        if name not in known:
            shown, *names = (option_of(n) if option else n for n in (name, *known))
            raise RequestError(shown, f"method {method} has no such setting", expected=f"one of {', '.join(names)}")
    return spec_type(**settings)


def trainable_names(plan: SurgeryPlan) -> set[str]:
    """The parameters of an attached model that may train, by name."""
    names: set[str] = lookup(METHODS, plan.method, "--method").trainable_names(plan)
    return names | {target.parameter for target in plan.whole}


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
