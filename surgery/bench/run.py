"""A whole bench: part by part, its results written as soon as a part is done, so that a bench can be resumed."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from surgery.bench import longest, measure, peak, scores
from surgery.bench.energy import Meter, open_meter
from surgery.bench.results import FLOOR, RESULTS_FILE, Results, Row, Where, read_results
from surgery.bench.sizes import settle, size_of
from surgery.bench.spec import BenchSpec, Entry, learning_rate, parse_methods
from surgery.bench.subject import Feed, Subject, build, open_feed, open_subject, tokens_of
from surgery.errors import OutputExistsError, RequestError, require_known
from surgery.manifest import versions
from surgery.metrics import metric_names

STEP, PEAK, LONGEST, INFERENCE, TUNE, SEED = PARTS = ("step", "peak", "longest", "inference", "tune", "seed")
PACKAGES = ("torch", "transformers", "peft", "checkpoint-surgery")
COUNTED_BATCHES = 8  # of which the tokens of a step are the mean
CPUINFO = Path("/proc/cpuinfo")
Say = Callable[[str], object]


@dataclass(frozen=True)
class _Bench:
    """Everything that the parts need. base: the plain model, on the CPU; rows are those of `results`.

    elsewhere: how this machine differs from the one that the results name, empty where it does not.
    """

    subject: Subject
    entries: tuple[Entry, ...]
    feed: Feed
    base: Any
    results: Results
    out: Path
    say: Say
    elsewhere: str = ""

    def rows(self) -> dict[str, Row]:
        return {row.method: row for row in self.results.rows}

    def finish(self, part: str, names: Sequence[str]) -> None:
        """Mark a part of some methods as done, and write."""
        rows = self.rows()
        for name in names:
            rows[name].done.append(part)
            if self.elsewhere and self.elsewhere not in rows[name].notes:
                rows[name].notes.append(self.elsewhere)
        self.results.write(self.out)

    def left(self, part: str) -> list[Entry]:
        """The methods of which a part is still to be done."""
        rows = self.rows()
        return [entry for entry in self.entries if part not in rows[entry.name].done]


def run(
    spec: BenchSpec, out: Path, *, resume: bool = False, overwrite: bool = False, command: str = "", say: Say = print
) -> Results:
    """Measure what the specification asks for, into a folder. Returns what stands there then.

    resume: go on with what lies there; overwrite: begin anew over it. say: is told of progress.
    Raises: RequestError, OutputExistsError, UnsupportedError, NotAModelError, DataError, DamagedError.
    """
    if spec.threads:
        torch.set_num_threads(spec.threads)
    entries = parse_methods(spec.methods)
    earlier = _earlier(spec, out, resume=resume, overwrite=overwrite)
    subject = open_subject(spec)
    _require_trainable(spec, subject, entries)
    settled = settle(subject, entries)
    feed = open_feed(subject)
    elsewhere = _elsewhere(earlier.where, where(subject, command), out) if earlier else ""
    out.mkdir(parents=True, exist_ok=True)
    meter = open_meter(subject.device)
    results = earlier or _fresh(subject, settled, feed, meter, command)
    results.write(out)
    chosen = tuple(entry for entry, _ in settled)
    bench = _Bench(subject, chosen, feed, build(subject), results, out, say, elsewhere)
    _measure(bench, meter if isinstance(meter, Meter) else None)
    _train(bench)
    return results


def _earlier(spec: BenchSpec, out: Path, *, resume: bool, overwrite: bool) -> Results | None:
    """What an interrupted bench left, or None for a fresh start."""
    if resume and overwrite:
        raise RequestError("--resume", "given with --overwrite", expected="one of the two")
    if not out.exists():
        return None
    if resume:
        found = read_results(out)
        differ = sorted(n for n in {*found.spec, *spec.plain()} if found.spec.get(n) != spec.plain().get(n))
        if differ:
            raise RequestError(
                str(out / RESULTS_FILE),
                f"a bench with other {', '.join(differ)}",
                expected="the same settings",
                fix="Give those it was started with, or begin anew with --overwrite",
            )
        return found
    is_ours = out.is_dir() and ((out / RESULTS_FILE).is_file() or not any(out.iterdir()))
    if not overwrite or not is_ours:
        fix = "Go on with --resume auto, choose another with --out, or give --overwrite"
        expected = "a new folder" if is_ours else f"a new folder, or one that holds {RESULTS_FILE}"
        raise OutputExistsError(str(out), "it exists", expected=expected, fix=fix)
    return None


def _elsewhere(then: Where, now: Where, out: Path) -> str:
    """What is to be said of what is measured now, if not as the parts before were. Raises: RequestError."""
    if now.device != then.device:
        raise RequestError(
            str(out / RESULTS_FILE),
            f"a bench on {then.device}, and this would go on on {now.device}",
            expected="the same device",
            fix="Go on where it began, or begin anew with --overwrite",
        )
    was, found = (
        {"machine": w.device_name, "threads": w.threads, "commit": w.commit, **w.versions} for w in (then, now)
    )
    differ = [f"{key} {found[key]} (before: {was.get(key)})" for key in found if found[key] != was.get(key)]
    return f"resumed with {', '.join(differ)}" if differ else ""


def _require_trainable(spec: BenchSpec, subject: Subject, entries: Sequence[Entry]) -> None:
    """What scores need is there, and is not given where there are none. Raises: RequestError."""
    names = ("loss", *metric_names(subject.seen.task))
    if spec.metric:
        require_known("--metric", spec.metric, names)
    if spec.data is None:
        return
    has_eval = bool(spec.data.eval) or spec.data.eval_fraction > 0
    asks = {"--tune": spec.tune, "--lr": spec.learning_rates, "--steps": spec.steps, "--metric": spec.metric}
    given = [name for name, value in asks.items() if value]
    if given and not has_eval:
        raise RequestError(given[0], "given without data to evaluate on", expected="--eval-data with it")
    if has_eval and not spec.tune and not spec.learning_rates:
        fix = "Give --lr METHOD=RATE for each, --lr RATE for all, or --tune 1e-4,3e-4,1e-3"
        raise RequestError("--eval-data", "given without learning rates", expected="--lr or --tune", fix=fix)
    for entry in _learning(entries) if spec.learning_rates else ():
        learning_rate(entry, spec)
    if spec.tune and not spec.data.eval:
        found = "given with data.eval_fraction"
        raise RequestError("--tune", found, expected="--eval-data", fix="The rows to tune on come off the training set")


def _fresh(
    subject: Subject, settled: Sequence[tuple[Entry, list[str]]], feed: Feed, meter: Meter | str, command: str
) -> Results:
    rows = [Row(method=entry.name, size=size_of(entry), notes=list(notes)) for entry, notes in settled]
    counts = [tokens_of(batch) for batch in feed.batches(0, COUNTED_BATCHES)]
    found = Results(
        spec=subject.spec.plain(),
        where=where(subject, command),
        task=subject.seen.task,
        metric=scores.metric_of(subject.spec, subject.seen.task),
        tokens_per_step=round(sum(counts) / len(counts)),
        energy_by=meter.name if isinstance(meter, Meter) else "",
        rows=rows,
    )
    if isinstance(meter, str):
        for row in found.rows:
            row.notes.append(f"energy is not measured: {meter}")
    if not subject.has_weights:
        for row in found.rows:
            row.notes.append("the folder has no weights: they were drawn")
    return found


def where(subject: Subject, command: str) -> Where:
    """The machine, and what runs on it."""
    return Where(
        device=subject.device,
        device_name=torch.cuda.get_device_name() if subject.device == "cuda" else _processor(),
        threads=torch.get_num_threads(),
        versions=versions(PACKAGES),
        command=command,
        commit=_commit(),
        started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _commit() -> str:
    """The commit of the sources that run, where they are a git checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# --- the parts


def _measure(bench: _Bench, meter: Meter | None) -> None:
    """What a step and a forward cost. Methods are timed together, or all of them anew."""
    rows, spec = bench.rows(), bench.subject.spec
    names = [entry.name for entry in bench.entries]
    if bench.left(STEP):
        bench.say(f"timing {spec.rounds} steps of {', '.join(names)}")
        measure.measure_steps(bench.subject, bench.entries, bench.feed, bench.base, rows, meter)
        bench.finish(STEP, names)
    if left := bench.left(PEAK):
        bench.say("peak memory")
        batches = list(bench.feed.batches(0, peak.PEAK_STEPS))
        peak.measure_peaks(bench.subject, left, batches, bench.base, rows)
        bench.finish(PEAK, [entry.name for entry in left])
    for entry in bench.left(LONGEST) if spec.fit_bytes else ():
        bench.say(f"{entry.name}: longest sequence")
        longest.measure_longest(bench.subject, entry, bench.base, rows[entry.name])
        bench.finish(LONGEST, [entry.name])
    if bench.left(INFERENCE):
        bench.say("timing inference")
        measure.measure_inference(bench.subject, bench.entries, bench.feed, bench.base, rows)
        bench.finish(INFERENCE, names)


def _train(bench: _Bench) -> None:
    """What methods learn: all are tuned, then all are trained with the first seed, then with the next."""
    spec, rows = bench.subject.spec, bench.rows()
    if spec.data is None or not (spec.data.eval or spec.data.eval_fraction):
        return
    trained = _learning(bench.entries)
    if spec.tune:
        _tune(bench, trained)
    else:
        for entry in trained:
            rows[entry.name].learning_rate = learning_rate(entry, spec)
    for seed in range(spec.seeds):
        part = f"{SEED} {seed}"
        left = [entry for entry in bench.left(part) if entry in trained]
        base = build(bench.subject, seed) if left else None
        for entry in left:
            bench.say(f"{entry.name}: training, seed {seed}")
            row = rows[entry.name]
            attempted = measure.attempt(
                lambda e=entry, r=row, b=base, s=seed: scores.measure_seed(bench.subject, e, bench.feed, b, r, s)  # type: ignore[misc]
            )
            if not attempted:
                row.notes.append(f"training: {measure.NO_MEMORY}")
            bench.finish(part, [entry.name])


def _learning(entries: Sequence[Entry]) -> list[Entry]:
    """The methods that train something."""
    return [entry for entry in entries if entry.variant.name != FLOOR]


def _tune(bench: _Bench, trained: Sequence[Entry]) -> None:
    spec, rows = bench.subject.spec, bench.rows()
    left = [entry for entry in bench.left(TUNE) if entry in trained]
    if not left or spec.data is None:
        return
    feed = open_feed(bench.subject, data=spec.data.model_copy(update={"eval": [], "eval_fraction": spec.tune_fraction}))
    for entry in left:
        bench.say(f"{entry.name}: trying learning rates {', '.join(f'{rate:g}' for rate in spec.tune)}")
        scores.tune(bench.subject, entry, feed, bench.base, rows[entry.name])
        bench.finish(TUNE, [entry.name])
