"""The most memory that a method takes: the allocator's peak on CUDA, on a CPU the resident set of another process.

    python -m surgery.bench.peak     reads what to run as JSON from standard input, and prints bytes

That process does nothing else. Where the system kills it for its memory, that is an answer, too.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.bench.held import held_layers, saved_by_packing
from surgery.bench.measure import NO_MEMORY, attempt, deployed, forward_of, release
from surgery.bench.results import Row
from surgery.bench.spec import BenchSpec, Entry, held_as, parse_method
from surgery.bench.subject import Batch, Subject, build, enter, open_subject
from surgery.errors import SurgeryError, shorten

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK_STEPS = 3  # the first makes the optimizer's state
INFERENCE, STEP = KINDS = ("inference", "step")


def measure_peaks(
    subject: Subject, entries: Sequence[Entry], batches: Sequence[Batch], base: Any, rows: Mapping[str, Row]
) -> None:
    """Each method's peaks in inference and in training, into its row."""
    if subject.device == "cuda":
        for entry in entries:
            row = rows[entry.name]
            row.inference_bytes = _on_cuda(subject, entry, batches, base, row, INFERENCE)
            row.peak_bytes = _on_cuda(subject, entry, batches, base, row, STEP)
        return
    if not CLEAR.exists():
        for entry in entries:
            rows[entry.name].notes.append("peak memory is not measured: it needs Linux")
        return
    for name, found in _in_children(subject, entries, batches):
        rows[name].inference_bytes, rows[name].peak_bytes = (found.get(kind) for kind in KINDS)
        rows[name].notes += [f"{kind}: {NO_MEMORY}" for kind in KINDS if kind not in found]


def _on_cuda(subject: Subject, entry: Entry, batches: Sequence[Batch], base: Any, row: Row, kind: str) -> int | None:
    """Of all that is on the device, weights included."""
    release()
    torch.cuda.reset_peak_memory_stats()
    if not attempt(lambda: run(subject, entry, batches, base, kind, in_place=False)):
        row.notes.append(f"{kind}: {NO_MEMORY}")
        return None
    return int(torch.cuda.max_memory_allocated())


def run(subject: Subject, entry: Entry, batches: Sequence[Batch], base: Any, kind: str, *, in_place: bool) -> None:
    """A few steps, or a few forwards of the model as it is deployed."""
    if kind == STEP:
        contender = enter(subject, entry, base, in_place=in_place)
        if in_place and held_as(entry, subject.spec):
            release()
            CLEAR.write_text("5")  # packing held dense weights, which is no part of training
        for batch in batches:
            contender.step(batch)
        return
    model = deployed(subject, entry, base, in_place=in_place)
    release()
    if in_place:
        CLEAR.write_text("5")  # what attaching and merging took is no part of inference
    else:
        torch.cuda.reset_peak_memory_stats()
    forward = forward_of(subject, model)
    for batch in batches:
        forward(batch)


# --- in a process that does nothing else


def _in_children(
    subject: Subject, entries: Sequence[Entry], batches: Sequence[Batch]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Bytes by kind, as far as the memory sufficed: a process that is killed says nothing more, and another goes on."""
    left = list(entries)
    while left:
        found = _ask(subject, left, batches)
        for entry in list(left):
            answers = found.get(entry.name, {})
            left.remove(entry)
            yield entry.name, answers
            if len(answers) < len(KINDS):
                break


def _ask(subject: Subject, entries: Sequence[Entry], batches: Sequence[Batch]) -> dict[str, dict[str, int]]:
    """What one process answers before it ends. The data are not read again: it gets batches and labels."""
    spec = subject.spec.model_copy(update={"data": None, "labels": list(subject.labels), "task": subject.seen.task})
    tensors = [{n: (t.tolist(), str(t.dtype).removeprefix("torch.")) for n, t in batch.items()} for batch in batches]
    methods = [(entry.name, dict(entry.settings)) for entry in entries]
    question = json.dumps({"spec": spec.plain(), "methods": methods, "batches": tensors})
    command = [sys.executable, "-m", "surgery.bench.peak"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode > 0 and "MemoryError" not in done.stderr:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SurgeryError("bench, peak memory", shorten(last, 300), expected="a number of bytes")
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        name, kind, number = line.split("\t")
        found.setdefault(name, {})[kind] = max(int(number), 0)
    return found


def resident_bytes(field: str) -> int:
    """VmRSS, the process's resident set now, or VmHWM, its peak since that was reset."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def answer(question: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """How far this process's resident set rises above what it is when the plain model is built: method, kind, bytes."""
    spec = BenchSpec.model_validate(question["spec"])
    if spec.threads:
        torch.set_num_threads(spec.threads)
    subject = open_subject(spec)
    batches = [
        {name: torch.tensor(values, dtype=vars(torch)[kind]) for name, (values, kind) in batch.items()}
        for batch in question["batches"]
    ]
    methods = [replace(parse_method(name), settings=settings) for name, settings in question["methods"]]
    for kind in KINDS:  # what libraries take once is no method's
        run(subject, methods[-1], batches[:1], build(subject), kind, in_place=True)
    for entry in methods:
        for kind in KINDS:
            base = copy.deepcopy(build(subject))  # in memory of its own: of a mapped file pages count when touched
            release()
            bare = resident_bytes("VmRSS") - _packed_away(subject, entry, base)
            CLEAR.write_text("5")
            run(subject, entry, batches, base, kind, in_place=True)
            yield entry.name, kind, resident_bytes("VmHWM") - bare
            del base
            release()


def _packed_away(subject: Subject, entry: Entry, base: Any) -> int:
    """By how much the model is smaller once its base is held as that method has it."""
    kind, shared = held_as(entry, subject.spec), subject.shared()
    if not kind:
        return 0
    names = held_layers(base, shared.layers, shared.stored, kind, task=shared.task, heads=shared.heads)
    return saved_by_packing(base, names, kind)


if __name__ == "__main__":
    for found in answer(json.load(sys.stdin)):
        print(*found, sep="\t", flush=True)  # noqa: T201  what follows may be too much for the machine
