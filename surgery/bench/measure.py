"""What a step costs: methods side by side in one process, in turns, in an order that changes every round.

A noisy machine then hurts all alike, and rows are compared round by round. Everything but the step itself, batches and
our own bookkeeping included, is outside the timed region; the device has finished before either clock reading.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from surgery.bench.energy import Meter
from surgery.bench.held import HOLDERS, OWN, evaluated, model_bytes
from surgery.bench.methods import trained
from surgery.bench.results import FLOOR, Row
from surgery.bench.spec import Entry, held_as
from surgery.bench.subject import Batch, Feed, Subject, enter, put_on

ENERGY_SECONDS = 3.0  # counters tick some ten times a second
NO_MEMORY = "out of memory"
STATE_COPIES = 4  # what full tuning holds of each value: weight, gradient and AdamW's two moments
MEMORY_SHARE = 0.8


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Give back what nobody holds any more, so that one method's memory does not stand in another's way."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def attempt(run: Callable[[], Any]) -> bool:
    """Whether it ran; False where the memory did not suffice, and what was taken in vain is given back."""
    try:
        run()
    except (torch.cuda.OutOfMemoryError, MemoryError):
        pass
    else:
        return True
    release()  # here, where the error no longer holds the frames
    return False


def take_turns(
    functions: Mapping[str, Callable[[Batch], object]],
    batches: Iterable[Batch],
    *,
    warmup: int,
    device: str = "cpu",
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call by name: all on the same batch, then on the next, in an order drawn anew every round.

    The first `warmup` rounds are not counted. clock: what seconds are read from.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(seed)
    for number, batch in enumerate(batches):
        for name in order.sample(list(functions), len(functions)):
            wait(device)
            started = clock()
            functions[name](batch)
            wait(device)
            elapsed = clock() - started
            if number >= warmup:
                seconds[name].append(elapsed)
    return seconds


def saved_bytes(model: Any, forward: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that a forward keeps for backward and that are neither parameters nor buffers.

    forward: gives the loss.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):  # noqa: SLF001  SHiRA
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(part)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(kept.values())
    alive.clear()
    del loss
    release()  # hooks and graph hold each other
    return total


# --- a training step


def measure_steps(
    subject: Subject, entries: Sequence[Entry], feed: Feed, base: Any, rows: Mapping[str, Row], meter: Meter | None
) -> None:
    """Values, saved bytes, seconds and joules of a step of each method, into its row."""
    groups = [list(entries)] if _fit_together(subject, entries, base) else []
    if not groups or not attempt(lambda: _measure_together(subject, groups[0], feed, base, rows, meter)):
        for entry in entries:
            row = rows[entry.name]
            row.notes.append("timed alone: the models do not fit into memory together")
            if not attempt(lambda one=entry: _measure_together(subject, [one], feed, base, rows, meter)):  # type: ignore[misc]
                row.notes.append(NO_MEMORY)
                row.seconds, row.saved_bytes = [], None


def _fit_together(subject: Subject, entries: Sequence[Entry], base: Any) -> bool:
    """Whether the copies of the model and full tuning's state leave room on a CPU, which kills before it complains."""
    if subject.device != "cpu":
        return True
    size = sum(parameter.nbytes for parameter in base.parameters())
    full = sum(entry.variant.name == "full" for entry in entries)
    needed = size * (len(entries) + (STATE_COPIES - 1) * full)
    return bool(needed < MEMORY_SHARE * psutil.virtual_memory().available)


def _measure_together(
    subject: Subject, entries: Sequence[Entry], feed: Feed, base: Any, rows: Mapping[str, Row], meter: Meter | None
) -> None:
    spec = subject.spec
    contenders = {entry.name: enter(subject, entry, base) for entry in entries}
    first = next(feed.batches(0, 1))
    for name, contender in contenders.items():
        counts = trained(contender.model)
        rows[name].trained_values, rows[name].trained_names = sum(counts.values()), len(counts)
        rows[name].weight_bytes = model_bytes(contender.model)
        rows[name].saved_bytes = saved_bytes(contender.model, lambda one=contender: one.loss(first))  # type: ignore[misc]
    steps = {name: contender.step for name, contender in contenders.items()}
    batches = feed.batches(0, spec.warmup + spec.rounds)
    seconds = take_turns(steps, batches, warmup=spec.warmup, device=subject.device)
    for name, contender in contenders.items():
        rows[name].seconds = seconds[name]
        if meter:
            rows[name].energy_joules = joules(contender.step, first, meter, device=subject.device)
    contenders.clear()
    steps.clear()
    release()


def joules(step: Callable[[Batch], object], batch: Batch, meter: Meter, *, device: str) -> float:
    """Energy of one step, from the counter's readings around as many as take some seconds."""
    wait(device)
    count, started, before = 0, time.perf_counter(), meter.read()
    while time.perf_counter() - started < ENERGY_SECONDS:
        step(batch)
        wait(device)
        count += 1
    return meter.used(before, meter.read()) / count


# --- inference


def measure_inference(
    subject: Subject, entries: Sequence[Entry], feed: Feed, base: Any, rows: Mapping[str, Row]
) -> None:
    """Seconds of a forward in eval mode, as deployed: merged where the method can be, else as it was trained.

    The values are those before training, which change nothing of the time.
    """
    spec = subject.spec
    models = {entry.name: deployed(subject, entry, base) for entry in entries}
    forwards = {name: forward_of(subject, model) for name, model in models.items()}
    batches: Iterator[Batch] = feed.batches(1, spec.warmup + spec.rounds)
    seconds = take_turns(forwards, batches, warmup=spec.warmup, device=subject.device, seed=1)
    for entry in entries:
        row = rows[entry.name]
        row.inference_seconds = seconds[entry.name]
        row.merged = None if entry.variant.name == FLOOR else merge_of(subject, entry) is not None


def deployed(subject: Subject, entry: Entry, base: Any, *, in_place: bool = False) -> Any:
    """A method's model as it would be deployed, in eval mode; of the floor, the plain model."""
    if entry.variant.name == FLOOR and not held_as(entry, subject.spec):
        return (base if in_place else copy.deepcopy(base)).to(subject.device).eval()
    model = put_on(subject, entry, base, in_place=in_place)
    if merge := merge_of(subject, entry):
        model = merge(model)
    return evaluated(model, is_final=True)


def merge_of(subject: Subject, entry: Entry) -> Callable[[Any], Any] | None:
    """How a method is merged, None where it is not: PEFT would quantize a merge anew, which is not what was trained."""
    is_held_by_others = bool(held_as(entry, subject.spec)) and HOLDERS[entry.variant.name] != OWN
    return None if is_held_by_others else entry.variant.merge


def forward_of(subject: Subject, model: Any) -> Callable[[Batch], object]:
    """A forward pass without gradients; an encoder-decoder's is one over its target."""

    def run(batch: Batch) -> object:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if model.config.is_encoder_decoder:
            inputs["labels"] = batch["labels"]
        with torch.inference_mode(), subject.computing():
            return model(**inputs)

    return run
