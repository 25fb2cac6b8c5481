"""The sections on training runs: one run, or several side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from surgery.delta import ColumnDelta, SideDelta
from surgery.plan import SurgeryPlan
from surgery.report import charts
from surgery.report.charts import EVALUATION, TRAINING
from surgery.report.commands import command_lines
from surgery.report.curves import Curve, curve, score_names, step_points, thin
from surgery.report.movement import Move, column_moves, side_norms
from surgery.report.parts import NOTHING, Figure, Part, Section, Table, Text, number, pairs, seconds, size, text
from surgery.report.reading import FINISHED, UNTRAINED, Run
from surgery.table import ranges

STATES = {
    "finished": "finished after {step:,} steps",
    "running": "running, at step {step:,}",
    "interrupted": "interrupted at step {step:,}",
    "not trained": "not trained: the plan alone",
}


def head_facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """What stands at the head of a page on one run; on several, what they share."""
    rows = [_facts(run) for run in runs]
    return [(name, value) for name, value in rows[0].items() if value and all(row.get(name) == value for row in rows)]


def _facts(run: Run) -> dict[str, str]:
    plan, base = run.plan, run.manifest.base
    revision = f" (revision {base.revision[:12]})" if base.revision else ""
    return {
        "model": f"{plan.architecture}, from {base.hub_id or base.path or 'an unknown folder'}{revision}",
        "method": _method(plan),
        "task": plan.task,
        "trained values": f"{plan.trained_values:,}",
        "device": _device(run),
        "state": STATES[run.state].format(step=run.step),
        "started": _when(run.training.get("started", run.started)),
        "ended": _when(run.training.get("ended", "")),
        "folder": run.folder.resolve().name,
    }


def _when(noted: str) -> str:
    """`20261121-221500` as people write it, in UTC."""
    try:
        return f"{datetime.strptime(noted, '%Y%m%d-%H%M%S').replace(tzinfo=timezone.utc):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return noted


def _method(plan: SurgeryPlan) -> str:
    if plan.stacks:
        return f"READ, {plan.spec.get('cell')} {plan.spec.get('hidden')} wide"
    ranks = ranges({target.rank for target in plan.targets})
    return f"PaCA, rank {ranks}, {len(plan.targets)} layers"


def _device(run: Run) -> str:
    device = str(run.training.get("device", ""))
    return f"{run.processes} x {device}" if device and run.processes > 1 else device


def run_sections(runs: Sequence[Run], predict: Callable[[Run], Table | Figure | Text]) -> list[Section]:
    """All sections on these runs. predict: what is said of a run's memory by part."""
    found = [Section("Results", tuple(_results(runs)))]
    figures = [figure for figure in _figures(runs) if figure]
    if figures:
        found.append(Section("Curves", tuple(figures)))
    if len(runs) > 1:
        found.append(Section("What differs", (_differences(runs),)))
    for run in runs:
        own = list(_own_sections(run, predict))
        of = f"{run.name}: " if len(runs) > 1 else ""
        links = [run.name, *("" for _ in own[1:])] if of else [None for _ in own]
        titles = [f"{of}{section.title}" if of else section.title.capitalize() for section in own]
        found += [Section(t, s.parts, link) for t, s, link in zip(titles, own, links, strict=True)]
    return found


def _own_sections(run: Run, predict: Callable[[Run], Part]) -> Iterable[Section]:
    yield Section("plan", tuple(_plan_parts(run)))
    moved = _movement(run)
    if moved:
        yield Section("movement" if isinstance(run.delta, ColumnDelta) else "side network", tuple(moved))
    if run.state != UNTRAINED:
        yield Section("memory", (predict(run), *_peak(run)))
    yield Section("verification", (_verification(run),))
    yield Section("reproduction", tuple(_reproduction(run)))


# --- results


def _results(runs: Sequence[Run]) -> Iterable[Part]:
    notes = tuple(f"{run.name}: {note}" for run in runs for note in run.notes)
    if notes:
        yield Text(notes)
    facts = [_outcome(run) for run in runs]
    names = list(dict.fromkeys(name for outcome in facts for name in outcome))
    rows = tuple((name, *(outcome.get(name, NOTHING) for outcome in facts)) for name in names)
    yield Table("What came out", ("what", *(run.name for run in runs)), rows, right=tuple(range(1, len(runs) + 1)))


def _outcome(run: Run) -> dict[str, str]:
    found = {"state": STATES[run.state].format(step=run.step), "trained values": f"{run.plan.trained_values:,}"}
    for name in sorted({*run.before, *run.after}, key=lambda name: (name != "loss", name)):
        for when, metrics in (("before", run.before), ("after", run.after)):
            found[f"{name.replace('_', ' ')} {when}"] = number(metrics.get(name))
    times = [elapsed for _, elapsed in step_points(run.entries)]
    found["training loss (mean)"] = number(run.training.get("loss"))
    found["time"] = seconds(run.training.get("seconds"))
    found["step (median)"] = seconds(statistics.median(times) if times else None)
    found["peak memory"] = size(run.training.get("peak_memory_bytes"))
    return found


def _differences(runs: Sequence[Run]) -> Table:
    flat = [dict(_flatten(run)) for run in runs]
    keys = list(dict.fromkeys(key for facts in flat for key in facts))
    differing = [key for key in keys if len({facts.get(key, NOTHING) for facts in flat}) > 1]
    rows = [(key, *(facts.get(key, NOTHING) for facts in flat)) for key in differing]
    same = (("all settings", *("the same" for _ in runs)),)
    return Table("Settings in which these runs differ", ("setting", *(r.name for r in runs)), tuple(rows) or same)


def _flatten(run: Run) -> Iterable[tuple[str, str]]:
    base = run.manifest.base
    yield "model", base.hub_id or base.path
    yield "task", run.plan.task
    yield "method", run.plan.method
    for section, entries in (
        (run.plan.method, run.plan.spec), ("train", run.settings), ("data", run.inputs),
        ("versions", run.manifest.versions), ("kernels", run.training.get("kernels", {})),
    ):  # fmt: skip
        for key, value in entries.items():
            yield f"{section}.{key}", text(value)
    yield "device", _device(run) or NOTHING


# --- curves


def _figures(runs: Sequence[Run]) -> Iterable[Figure | None]:
    yield loss_figure(runs)
    names = list(dict.fromkeys(name for run in runs for name in score_names(run.entries)))
    for name in (name for name in names if name != "loss"):
        label = name.replace("_", " ")
        yield _figure(label[:1].upper() + label[1:], label, _scores(runs, name))
    rates = [(run, TRAINING, curve(run.entries, "learning_rate")) for run in runs]
    yield _figure("Learning rate", "learning rate", rates)
    times = [(run, TRAINING, thin(step_points(run.entries))) for run in runs]
    note = "Between two entries of the log, divided by the steps between them; evaluations are left out."
    yield _figure("Step time", "time of a step", times, note, "seconds")


def loss_figure(runs: Sequence[Run]) -> Figure | None:
    """The loss while training and in evaluations; None where neither was logged."""
    lines = [(run, TRAINING, curve(run.entries, "loss")) for run in runs]
    return _figure("Loss", "loss", [*lines, *_scores(runs, "loss")])


def _scores(runs: Sequence[Run], name: str) -> list[tuple[Run, str, Curve]]:
    """The evaluations of a metric; the one before the first step is not in the log."""
    found = []
    for run in runs:
        first = [{"step": 0, "value": run.before[name]}] if name in run.before else []
        later = [{"step": e["step"], "value": e[f"eval_{name}"]} for e in run.entries if f"eval_{name}" in e]
        found.append((run, EVALUATION, curve([*first, *later] if later else [], "value")))
    return found


def _figure(
    title: str, y: str, lines: Sequence[tuple[Run, str, Curve]], note: str = "", unit: str = ""
) -> Figure | None:
    """One chart of several curves, none where there is nothing to draw."""
    drawn = [
        (run, kind, line) for run, kind, line in lines if len(line.steps) > 1 or (kind == EVALUATION and line.steps)
    ]
    if not drawn:
        return None
    many = len({run.name for run, _, _ in lines}) > 1
    rows, table, said = [], [], []
    say: Callable[[float | None], str] = seconds if unit == "seconds" else number
    for run, kind, line in drawn:
        points = list(zip(line.steps, line.values, line.low, line.high, strict=True))
        keys = ("step", "value", "low", "high")
        rows += [{**dict(zip(keys, point, strict=True)), "run": run.name, "kind": kind} for point in points]
        table += [(run.name, kind, f"{s:,}", number(v, 6), number(a, 6), number(b, 6)) for s, v, a, b in points]
        said.append(
            f"{run.name}, {kind}: {say(line.values[0])} to {say(line.values[-1])}"
            if many
            else f"{kind}: {_in_words(line, say)}"
        )
    summary = f"{title} over steps. {'; '.join(said)}."
    thinned = [line for _, _, line in drawn if line.is_thinned]
    if thinned:
        counts = f"{max(line.logged for line in thinned):,} logged values are drawn as {len(thinned[0].steps):,}"
        band = "each the mean of its neighbours, in a band from the lowest to the highest of them"
        note = f"{note} {counts}, {band}; training_log.jsonl has them all.".strip()
    head = ("run", "of", "step", "value", "lowest", "highest")
    spec = charts.curves(rows, y=y, description=summary, unit=unit)
    return Figure(
        title, summary, spec, Table(f"{title}: the values drawn", head, tuple(table), right=(2, 3, 4, 5)), note
    )


def _in_words(line: Curve, say: Callable[[float | None], str]) -> str:
    first, last = line.values[0], line.values[-1]
    if len(line.values) == 1:
        return f"{say(first)} at step {line.steps[0]:,}"
    how = "falls" if last < first else "rises" if last > first else "stays"
    ends = f"{how} from {say(first)} at step {line.steps[0]:,} to {say(last)} at step {line.steps[-1]:,}"
    return f"{ends} (lowest {say(min(line.values))}, highest {say(max(line.values))})"


# --- the plan, and what moved


def _plan_parts(run: Run) -> Iterable[Part]:
    plan = run.plan
    if plan.targets:
        yield _targets(plan)
    if plan.stacks:
        stacks = tuple((s.name, s.layers, ranges(s.read), f"{s.depth}", f"{s.width:,}", s.exit) for s in plan.stacks)
        head = ("stack", "layers", "read", "of", "width", "corrected after")
        yield Table("Stacks whose layers the side network reads", head, stacks, right=(3, 4))
        side = tuple((t.parameter, _shape(t.shape), f"{t.trained_values:,}") for t in plan.side)
        yield Table(f"{len(side)} tensors of the side network", ("parameter", "size", "values"), side, right=(1, 2))
    if plan.whole:
        whole = tuple((t.parameter, _shape(t.shape), "from the base" if t.sha256 else "new") for t in plan.whole)
        yield Table("Trained whole", ("parameter", "size", "origin"), whole, right=(1,))
    if plan.untouched:
        rest = tuple((u.pattern, f"{u.count}", u.reason) for u in plan.untouched)
        yield Table("Not touched", ("pattern", "count", "reason"), rest, right=(1,))
    spec = [(name.replace("_", " "), value) for name, value in plan.spec.items()]
    yield pairs("Settings of the method", [*spec, ("plan", plan.id)], ("setting", "value"))


def _targets(plan: SurgeryPlan) -> Table:
    head = ("module", "out", "in", "rank", "group", "dtype", "trained values", "sha256 of the base's weight")
    rows = []
    for t in plan.targets:
        sizes = (f"{t.out_features:,}", f"{t.in_features:,}", f"{t.rank}")
        rows.append((t.module, *sizes, t.group, t.dtype, f"{t.trained_values:,}", t.sha256[:12]))
    return Table(f"{len(rows)} layers whose columns train", head, tuple(rows), right=(1, 2, 3, 6))


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(f"{count:,}" for count in sizes)


def _movement(run: Run) -> list[Part]:
    if isinstance(run.delta, ColumnDelta):
        moves = column_moves(run.delta, run.moved)
        return [_heat_map(moves, run)] if any(move.value for move in moves) else []
    if isinstance(run.delta, SideDelta) and run.state == FINISHED:
        return [_norms(run.delta)]
    return []


def _heat_map(moves: Sequence[Move], run: Run) -> Part:
    value = "relative movement"
    places = [m.layer if m.layer >= 0 else NOTHING for m in moves]
    rows = [
        {"layer": place, "projection": m.projection, "value": m.value, "module": m.module}
        for place, m in zip(places, moves, strict=True)
    ]
    most, least = max(moves, key=lambda m: m.value), min(moves, key=lambda m: m.value)
    summary = (
        f"How far the trained columns of {len(moves)} layers moved, relative to their own size: most in "
        f"{most.module} ({most.value:.3g}), least in {least.module} ({least.value:.3g})."
    )
    table = tuple((m.module, f"{p}", m.projection, f"{m.value:.4g}") for p, m in zip(places, moves, strict=True))
    note = "||trained - original|| / ||original|| of each layer's trained columns."
    if run.moved is not None:
        note += " Of the last checkpoint: the run is not finished."
    if any(move.modules > 1 for move in moves):
        note += " Layers that differ in another number (experts) are taken together, as their mean."
    spec = charts.heat(rows, value=value, description=summary)
    data = Table("Movement of each layer", ("module", "layer", "projection", value), table, right=(1, 3))
    return Figure("How far trained columns moved", summary, spec, data, note)


def _norms(delta: SideDelta) -> Part:
    found = side_norms(delta)
    many = len({stack for stack, _, _ in found}) > 1
    rows = [(f"{stack} {tensor}" if many else tensor, value) for stack, tensor, value in found]
    largest, most = max(rows, key=lambda row: row[1])
    summary = (
        f"Root mean square of the side network's {len(rows)} tensors: largest {largest} ({most:.3g}). "
        "The projections back (output) were zero before training."
    )
    drawn = [{"name": name, "value": value, "label": f"{value:.3g}"} for name, value in rows]
    spec = charts.bars(drawn, x="root mean square", description=summary)
    table = Table("Root mean squares", ("tensor", "value"), tuple((n, f"{v:.3g}") for n, v in rows), right=(1,))
    return Figure("What the side network's tensors hold", summary, spec, table)


# --- memory, verification, reproduction


def _peak(run: Run) -> Iterable[Part]:
    peak = run.training.get("peak_memory_bytes")
    if peak is None:
        return
    what = "the whole process, with PyTorch and the data" if run.training.get("device") == "cpu" else "the allocator's"
    yield pairs("Measured", [(f"peak ({what})", size(peak))])


def _verification(run: Run) -> Part:
    if run.exported is None:
        why = "Not exported or verified yet: an export beside this folder would show its checks here."
        return Text((why,))
    if not run.checks:
        return Text((f"{run.exported.name} was exported without its checks (--no-verify).",))
    rows = tuple((check.name, check.result, check.detail or NOTHING) for check in run.checks)
    return Table(f"Checks of {run.exported.resolve().name}", ("check", "result", "detail"), rows)


def _reproduction(run: Run) -> Iterable[Part]:
    base, manifest = run.manifest.base, run.manifest
    digests = [t.sha256 for t in run.plan.targets if t.sha256]
    digest = run.plan.backbone_sha256 or (f"{len(digests)} weights, each in the plan above" if digests else "")
    yield Text(code=tuple(command_lines(run)))
    where = [("base", base.hub_id or base.path), ("revision", base.revision), ("sha256 of the base", digest)]
    files = run.inputs.get("sha256", {})
    yield pairs(
        "Base and data",
        [*where, *((f"sha256 of {name}", value) for name, value in files.items()),
         *(("data", line) for line in run.training.get("data", ())),
         ("adapter", manifest.files.get("adapter.safetensors") or manifest.adapter.get("sha256", ""))],
    )  # fmt: skip
    yield pairs("Versions", list(manifest.versions.items()), ("package", "version"))
    settings: list[tuple[str, Any]] = [(f"train.{key}", value) for key, value in run.settings.items()]
    settings += [(f"data.{key}", value) for key, value in run.inputs.items() if key != "sha256"]
    settings += [(f"used.{key}", value) for key, value in run.training.get("kernels", {}).items()]
    if settings:
        yield pairs("Settings", settings, ("setting", "value"))
