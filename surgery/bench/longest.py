"""The longest sequence whose training step fits a given memory, one sequence at a time.

On CUDA steps are run under a limit of the allocator; on a CPU they are predicted, as `surgery plan` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from surgery.bench.measure import attempt, release
from surgery.bench.methods import explained
from surgery.bench.results import Row
from surgery.bench.spec import Entry, held_as
from surgery.bench.subject import DTYPES, Subject, draw, enter, set_dropout
from surgery.compat import config_dtype
from surgery.errors import SurgeryError, UnsupportedError, shorten
from surgery.generate import max_positions
from surgery.memory.predict import predict
from surgery.memory.run import Run
from surgery.memory.subject import open_attached, open_subject
from surgery.methods.paca_spec import PacaSpec
from surgery.planning import make_spec
from surgery.survey import TaskSpec, survey

GRANULE_TOKENS = 64  # on CUDA
START_TOKENS = 1024
FURTHEST_TOKENS = 1 << 22


def measure_longest(subject: Subject, entry: Entry, base: Any, row: Row) -> None:
    """The longest sequence, into the method's row, or why there is none."""
    fit_bytes = subject.spec.fit_bytes
    assert fit_bytes is not None  # noqa: S101
    if subject.device == "cuda":
        _by_running(subject, entry, base, row, fit_bytes)
    else:
        try:
            row.longest_tokens, row.longest_by = predicted(subject, entry, fit_bytes), "predicted"
        except SurgeryError as error:
            row.notes.append(f"the longest sequence is not predicted: {shorten(error.found, 120)}")
    end, granule = _end(subject, entry), GRANULE_TOKENS if subject.device == "cuda" else 1
    if row.longest_tokens is not None and row.longest_tokens == end // granule * granule < FURTHEST_TOKENS:
        row.notes.append("the longest sequence is what the model has positions for: the memory would hold more")


def _end(subject: Subject, entry: Entry) -> int:
    """Where the model's positions end for a sequence."""
    return (max_positions(subject.seen.config.to_dict()) or FURTHEST_TOKENS) - own_tokens(entry)


def own_tokens(entry: Entry) -> int:
    """Positions that the method takes itself."""
    return int(entry.settings["tokens"]) if entry.variant.name == "prompt" else 0


def bisect(fits: Callable[[int], bool], *, start: int, end: int, granule: int = 1) -> int:
    """The largest multiple of `granule` up to `end` that fits, where what is shorter fits, too; 0 where none does."""
    low, high = 0, max(start // granule, 1)
    last = end // granule
    while high <= last and fits(high * granule):
        low, high = high, min(2 * high, last) if high < last else last + 1
    while high - low > 1 and low < last:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * granule) else (low, middle)
    return low * granule


# --- by running


def _by_running(subject: Subject, entry: Entry, base: Any, row: Row, fit_bytes: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    if total < fit_bytes:
        row.notes.append(f"the longest sequence is not measured: the device has {total / 1e9:.0f} GB")
        return
    end = _end(subject, entry)
    release()
    torch.cuda.set_per_process_memory_fraction(fit_bytes / total)
    try:
        found: list[int] = []
        attempt(lambda: found.append(_search(subject, entry, base, end)))
        row.longest_tokens, row.longest_by = (found or [0])[0], "measured"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()


def _search(subject: Subject, entry: Entry, base: Any, end: int) -> int:
    contender = enter(subject, entry, base)

    def fits(tokens: int) -> bool:
        spec = subject.spec.model_copy(update={"batch": 1, "sequence": tokens})
        batch = draw(replace(subject, spec=spec), 0)
        release()
        is_enough = attempt(lambda: contender.step(batch))
        if contender.optimizer:
            contender.optimizer.zero_grad(set_to_none=True)
        return is_enough

    return bisect(fits, start=min(START_TOKENS, end), end=end, granule=GRANULE_TOKENS)


# --- by prediction


def predicted(subject: Subject, entry: Entry, fit_bytes: int) -> int:
    """Without weights, in seconds. Raises: UnsupportedError where the method cannot be run without values."""
    run = prediction_run(subject)
    dry = _memory_subject(subject, entry, run)
    if dry.positions is not None:
        dry = replace(dry, positions=dry.positions - own_tokens(entry))
        run = replace(run, sequence=min(run.sequence, dry.positions))
    found = predict(dry, run, fit_bytes=fit_bytes).longest
    assert found is not None  # noqa: S101  it was asked for
    return found


def prediction_run(subject: Subject) -> Run:
    """One sequence on the bench's device, in its precision."""
    spec = subject.spec
    return Run(
        batch=1,
        sequence=START_TOKENS,
        dtype=spec.dtype,
        precision=subject.autocast,
        device=subject.device,
        checkpointing=spec.checkpointing,
        lean="on" if spec.lean else "off",
    )


def _memory_subject(subject: Subject, entry: Entry, run: Run) -> Any:
    """`surgery plan`'s own way for what it knows; others are put on a model on the meta device."""
    name, shared = entry.variant.name, subject.shared(quantize=held_as(entry, subject.spec))
    if shared.quantize and name not in ("paca", "lora"):
        raise UnsupportedError("bench", f"{name} over a quantized base", expected="paca or lora")
    task = TaskSpec(subject.seen.task, subject.labels)
    if name in ("paca", "lora", "full", "read"):
        spec = _spec_of(entry, shared.layers, shared.quantize)
        found = open_subject(subject.root, name, spec, task, run)
        set_dropout(found.dry.model, subject.spec.dropout)
        return found
    if name == "shira":
        raise UnsupportedError("bench", "shira draws its entries from real weights", expected="a method without values")
    seen = survey(subject.root, task)
    dtype = DTYPES[subject.spec.dtype] if subject.spec.dtype else config_dtype(seen.config) or torch.float32
    set_dropout(seen.model, subject.spec.dropout)
    with explained(entry.name):
        model = entry.variant.attach(seen.model, shared, entry.settings)
    return open_attached(model, seen, name, dtype, run)


def _spec_of(entry: Entry, layers: tuple[str, ...], quantize: str) -> Any:
    if entry.variant.name == "full":
        return None
    if entry.variant.name == "read":
        return make_spec("read", dict(entry.settings), "")
    rest = {key: value for key, value in entry.settings.items() if key not in ("r", "alpha")}
    return PacaSpec(
        rank=entry.settings["r"], targets=layers, quantize=quantize, **(rest if entry.variant.name == "paca" else {})
    )
