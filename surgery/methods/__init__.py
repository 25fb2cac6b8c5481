"""The methods of surgery, and what the rest of the toolkit knows of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.plan import Parts, Quantization, Stored, WholeTarget


@dataclass(frozen=True)
class PlanRequest:
    """What a method plans for.

    model: live or on the meta device; stored: where each parameter lies, by name; converted: why some cannot be
    trained; heads: modules of the output; whole: what the task trains whole; task: its name; parts: where the tensors
    lie that are put together to parameters of experts, by that parameter's name; quantization: how the base is held
    already, in its files or in a live model.
    """

    model: nn.Module
    stored: Mapping[str, Stored]
    converted: Mapping[str, str]
    heads: tuple[str, ...]
    whole: tuple[WholeTarget, ...]
    task: str
    parts: Parts = field(default_factory=dict)
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Method:
    """A method as a record of functions; what is trained whole, heads, is none of its business.

    plan: (spec, request) -> its fields of a SurgeryPlan; fresh: (checkpoint, plan, whole, and the choice where columns
    have been chosen) -> the delta that changes nothing; attach: (frozen model, plan, delta or None), in place;
    trainable_names: (plan) -> what it trains; collect: (model, plan, whole, the base's columns) -> delta; bind: (delta,
    checkpoint, names on disk, whole) -> the delta tied to files; detach: (model, merge=..), in place.
    """

    name: str
    source: str
    spec_type: type[Any]
    plan: Callable[..., dict[str, Any]]
    fresh: Callable[..., Any]
    attach: Callable[..., None]
    trainable_names: Callable[..., set[str]]
    collect: Callable[..., Any]
    bind: Callable[..., Any]
    detach: Callable[..., None]
