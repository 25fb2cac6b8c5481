"""The sections on a bench: what methods cost and gain, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery.bench.results import FLOOR, Curve, Results, Row, quartiles, step_ratio
from surgery.errors import counted
from surgery.report import charts
from surgery.report.curves import thin
from surgery.report.parts import NOTHING, Figure, Part, Section, Table, Text, number, pairs, seconds, size


def bench_facts(benches: Sequence[Results]) -> list[tuple[str, str]]:
    """What stands at the head of a page on one bench; on several, what they share."""
    first, *rest = [_facts(results) for results in benches]
    return [fact for fact in first if fact[1] and all(fact in others for others in rest)]


def _facts(results: Results) -> list[tuple[str, str]]:
    where = results.where
    return [
        ("model", str(results.spec.get("model", ""))),
        ("task", results.task),
        ("methods", ", ".join(row.method for row in results.rows)),
        ("device", f"{where.device_name or where.device}, {counted(where.threads, 'thread')}"),
        ("tokens a step", f"{results.tokens_per_step:,}"),
        ("started", where.started.replace("T", " ").replace("+00:00", " UTC")),
        ("commit", where.commit[:12]),
    ]


def bench_sections(results: Results, prefix: str = "") -> list[Section]:
    """All sections on one bench. prefix: what stands before their titles."""
    parts: dict[str, list[Part]] = {
        "Results": list(_table(results)),
        "Costs": [figure for figure in _costs(results) if figure],
        "Scores": [figure for figure in _gains(results) if figure],
        "Reproduction": list(_reproduction(results)),
    }
    return [Section(f"{prefix}{title}", tuple(held)) for title, held in parts.items() if held]


# --- the table


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def score_names(results: Results) -> list[str]:
    """The scores of any method, the loss last."""
    names = {name for row in results.rows for curve in row.curves for name in curve.scores}
    return sorted(names, key=lambda name: (name == "loss", name))


def _scores(row: Row, name: str) -> list[float]:
    return [curve.scores[name] for curve in row.curves if name in curve.scores]


def _score_text(values: Sequence[float]) -> str:
    if not values:
        return NOTHING
    spread = f" ± {number(statistics.stdev(values), 2)}" if len(values) > 1 else ""
    return f"{number(statistics.fmean(values))}{spread}"


def _table(results: Results) -> Iterable[Part]:
    """The tables that `surgery bench` prints, with the same words written out."""
    scores = score_names(results)
    step = ("method", "size", "trained values", "step (median)", "to floor", "to LoRA", "tokens/s", "energy a step")
    rows = tuple(_step_row(results, row) for row in results.rows)
    yield Table("What a training step costs", step, rows, right=tuple(range(2, len(step))))
    memory = (
        "method",
        "weights",
        "saved for backward",
        "peak",
        "longest",
        "forward (median)",
        "forward peak",
        "merged",
    )
    rows = tuple(_memory_row(row) for row in results.rows)
    yield Table("Memory, and what inference costs", memory, rows, right=tuple(range(1, len(memory) - 1)))
    if any(row.curves for row in results.rows):
        gain = ("method", "learning rate", *scores, "seeds")
        rows = tuple(_score_row(row, scores) for row in results.rows)
        yield Table("Scores after training", gain, rows, right=tuple(range(1, len(gain))))
    if remarks := results.remarks():
        yield Text(tuple(remarks))


def _step_row(results: Results, row: Row) -> tuple[str, ...]:
    step = _middle(row.seconds)
    ratio = [step_ratio(row, other) for other in (results.row(FLOOR), results.lora())]
    energy = "not measured" if row.energy_joules is None else f"{number(row.energy_joules, 3)} J"
    return (
        row.method, f"{row.size.name} {row.size.value:,}" if row.size else NOTHING, number(row.trained_values),
        seconds(step), *(f"{found[0]:.3f}" if found else NOTHING for found in ratio),
        number(round(results.tokens_per_step / step)) if step else NOTHING, energy,
    )  # fmt: skip


def _memory_row(row: Row) -> tuple[str, ...]:
    longest = f"{row.longest_tokens:,} tokens ({row.longest_by})" if row.longest_tokens is not None else NOTHING
    merged = {True: "yes", False: "no", None: NOTHING}[row.merged]
    return (
        row.method, size(row.weight_bytes), size(row.saved_bytes), size(row.peak_bytes), longest,
        seconds(_middle(row.inference_seconds)), size(row.inference_bytes), merged,
    )  # fmt: skip


def _score_row(row: Row, scores: Sequence[str]) -> tuple[str, ...]:
    rate = NOTHING if row.learning_rate is None else f"{row.learning_rate:g}"
    seeds = sum(bool(curve.scores) for curve in row.curves)
    return (row.method, rate, *(_score_text(_scores(row, name)) for name in scores), f"{seeds}")


# --- charts


def _bars(title: str, x: str, rows: Sequence[dict[str, Any]], note: str = "", unit: str = "") -> Figure | None:
    """rows: name, value, label, low, high."""
    if not rows:
        return None
    least, most = min(rows, key=lambda row: row["value"]), max(rows, key=lambda row: row["value"])
    summary = (
        f"{title} of {len(rows)} methods: least {least['name']} ({least['label']}), "
        f"most {most['name']} ({most['label']})."
    )
    spec = charts.bars(rows, x=x, description=summary, unit=unit)
    data = tuple(
        (r["name"], r["label"], number(r["value"], 6), number(r["low"], 6), number(r["high"], 6)) for r in rows
    )
    head = ("method", title.lower(), x, "low", "high")
    return Figure(title, summary, spec, Table(f"{title}: the data", head, data, right=(1, 2, 3, 4)), note)


def _bar(name: str, value: float, label: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {
        "name": name, "value": value, "label": label,
        "low": value if low is None else low, "high": value if high is None else high,
    }  # fmt: skip


def _costs(results: Results) -> Iterable[Figure | None]:
    timed = [(row.method, quartiles(row.seconds)) for row in results.rows if len(row.seconds) > 1]
    note = "Bars are medians over the measured steps, lines reach from the lower to the upper quartile."
    yield _bars("Step time", "seconds", [_bar(n, m, seconds(m), lo, hi) for n, (m, lo, hi) in timed], note, "seconds")
    floor = results.row(FLOOR)
    found = [(row.method, step_ratio(row, floor)) for row in results.rows if row.method != FLOOR]
    rows = [_bar(name, r[0], f"{r[0]:.3f}", r[1], r[2]) for name, r in found if r]
    yield _bars("Ratio to the floor", "ratio", rows, "Of each round's step times; the floor is 1. Lines are quartiles.")
    saved = [_bar(r.method, r.saved_bytes, size(r.saved_bytes)) for r in results.rows if r.saved_bytes is not None]
    yield _bars("Saved for backward", "bytes", saved, unit="bytes")
    peaks = [_bar(r.method, r.peak_bytes, size(r.peak_bytes)) for r in results.rows if r.peak_bytes is not None]
    yield _bars("Peak memory", "bytes", peaks, unit="bytes")
    energy = [(r.method, r.energy_joules) for r in results.rows if r.energy_joules is not None]
    yield _bars(
        "Energy", "joules a step", [_bar(n, e, f"{number(e, 3)} J") for n, e in energy], f"By {results.energy_by}."
    )


def _gains(results: Results) -> Iterable[Figure | None]:
    scored = [row for row in results.rows if row.curves]
    peaks = {row.method: row.peak_bytes for row in scored if row.peak_bytes is not None}
    saved = {row.method: row.saved_bytes for row in scored if row.saved_bytes is not None}
    times = {row.method: statistics.median(row.seconds) for row in scored if row.seconds}
    memory = ("peak memory", peaks) if len(peaks) >= len(saved) else ("saved for backward", saved)
    for name in score_names(results):
        yield _scatter(scored, name, "memory", memory[0], memory[1], "bytes")
        yield _scatter(scored, name, "time", "time of a step", times, "seconds")
    yield _training_curves(results)


def _scatter(
    scored: Sequence[Row], name: str, against: str, x: str, across: Mapping[str, float], unit: str
) -> Figure | None:
    rows: list[dict[str, Any]] = []
    for row in scored:
        values = _scores(row, name)
        if values and row.method in across:
            place = across[row.method]
            at = {"x": place, "label": size(place) if unit == "bytes" else seconds(place)}
            spread = {"low": min(values), "high": max(values)}
            rows.append({"name": row.method, "y": statistics.fmean(values), **at, **spread})
    if not rows:
        return None
    best = (min if name == "loss" else max)(rows, key=lambda row: row["y"])
    said = name.replace("_", " ")
    title = f"{said[:1].upper()}{said[1:]} against {against}"
    summary = f"{title} of {len(rows)} methods; best {best['name']} ({number(best['y'])}, {x} {best['label']})."
    spec = charts.scatter(rows, x=x, y=said, description=summary, unit=unit)
    data = tuple((r["name"], r["label"], *(number(r[key], 6) for key in ("x", "y", "low", "high"))) for r in rows)
    table = Table(f"{title}: the data", ("method", x, unit, said, "lowest", "highest"), data, right=(1, 2, 3, 4, 5))
    note = "Points are means over the seeds, lines reach from the lowest to the highest."
    return Figure(title, summary, spec, table, note)


def _training_curves(results: Results) -> Figure | None:
    rows: list[dict[str, Any]] = []
    for row in results.rows:
        rows += [{**point, "run": row.method, "kind": "training"} for point in _mean_curve(row.curves)]
    if not rows:
        return None
    ends = {row["run"]: row for row in rows}
    said = "; ".join(f"{name} ends at {number(row['value'])}" for name, row in ends.items())
    summary = f"Training loss over steps, by method: {said}."
    spec = charts.curves(rows, y="loss", description=summary)
    data = tuple(
        (r["run"], f"{r['step']:,}", number(r["value"], 6), number(r["low"], 6), number(r["high"], 6)) for r in rows
    )
    head = ("method", "step", "loss", "lowest", "highest")
    table = Table("Training loss: the values drawn", head, data, right=(1, 2, 3, 4))
    return Figure(
        "Training loss", summary, spec, table, "Means over the seeds, in a band from the lowest to the highest."
    )


def _mean_curve(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Over the seeds, at the steps that all of them have."""
    if not curves:
        return []
    losses = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*(set(one) for one in losses)))
    middle, low, high = (
        thin([(step, of([one[step] for one in losses])) for step in shared]) for of in (statistics.fmean, min, max)
    )
    points = zip(middle.steps, middle.values, low.values, high.values, strict=True)
    return [{"step": s, "value": v, "low": a, "high": b} for s, v, a, b in points]


# --- reproduction


def _reproduction(results: Results) -> Iterable[Part]:
    where = results.where
    if where.command:
        yield Text(code=(where.command,))
    facts = {"device": where.device, "device name": where.device_name, "threads": where.threads}
    facts |= {"commit": where.commit, "started": where.started, "energy by": results.energy_by or "not measured"}
    yield pairs("Where it ran", [*facts.items(), *where.versions.items()])
    yield pairs("What was asked for", list(results.spec.items()), ("setting", "value"))
