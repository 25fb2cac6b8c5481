"""Metrics with their standard errors, and what an evaluation gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.columns import generator_seed

Array = npt.NDArray[Any]

RESAMPLES = 200


@dataclass(frozen=True)
class Metric:
    """A value and its standard error; None where one row alone says nothing about it."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Part:
    """The metrics of some of the rows: a `kind` of part (subject, category, file) and its name."""

    kind: str
    name: str
    rows: int
    metrics: Mapping[str, Metric]


@dataclass(frozen=True)
class Scores:
    """What a task makes of a model's answers. `asked`: what the model read and what was right, row by row."""

    metrics: Mapping[str, Metric]
    asked: Sequence[tuple[str, str]]
    parts: tuple[Part, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def mean(values: Sequence[bool] | Sequence[float] | Array) -> Metric:
    """A mean over rows, with the sample's standard deviation over the root of their number."""
    x = np.asarray(values, np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return Metric(float(x.mean()), error)


def mean_of_means(metrics: Sequence[Metric]) -> Metric:
    """The mean of independent means, each of which counts the same."""
    errors = [metric.standard_error for metric in metrics]
    known = [error for error in errors if error is not None]
    total = math.sqrt(sum(error**2 for error in known)) / len(metrics) if len(known) == len(errors) else None
    return Metric(sum(metric.value for metric in metrics) / len(metrics), total)


def parts_by(kind: str, names: Sequence[str], measure: Callable[[Array], Mapping[str, Metric]]) -> tuple[Part, ...]:
    """The metrics of the rows of each name, in the order in which names come up; none where there is one name."""
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name, []).append(number)
    if len(numbers) < 2:
        return ()
    return tuple(Part(kind, name, len(own), measure(np.asarray(own))) for name, own in numbers.items())


def resampled(names: Sequence[str], measure: Callable[[Array], Mapping[str, float]], rows: int) -> dict[str, Metric]:
    """Metrics that are no means. measure: of the rows of these numbers. The error is a bootstrap's, seeded by name."""
    whole = measure(np.arange(rows))
    generator = np.random.default_rng(generator_seed(0, "bootstrap"))
    draws = [measure(generator.integers(0, rows, rows)) for _ in range(RESAMPLES if rows > 1 else 0)]
    return {
        name: Metric(float(whole[name]), float(np.std([draw[name] for draw in draws], ddof=1)) if draws else None)
        for name in names
    }
