"""The sum of a run's memory on each device: what it holds between two steps, what a step keeps, and its peak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from surgery.acceleration import FLASH
from surgery.errors import RequestError
from surgery.images import TASK as IMAGES
from surgery.memory.longest import longest_that_fits
from surgery.memory.prediction import Prediction
from surgery.memory.run import FULL, SHARDINGS, Run, Sharding
from surgery.memory.saved import saved_by_all, temporary
from surgery.memory.step import Step
from surgery.memory.subject import Subject, Tensor

MOMENTS = 2  # of AdamW, in the dtype of what trains
STEP_BYTES = 4  # of AdamW's count of steps, a tensor for each parameter
MASTER_BYTES = 4
FURTHEST = 1 << 22  # tokens; where positions set no limit, no longer sequence is tried
NOT_COUNTED = (
    "counted are tensors, those that live for a moment too; not counted: kernels' workspace, the allocator's gaps, the "
    "device's context"
)


def predict(subject: Subject, run: Run, *, fit_bytes: int | None = None) -> Prediction:
    """Bytes on each device, and with `fit_bytes` whether that is enough and the longest sequence for which it is.

    Raises: RequestError for a sequence beyond the model's positions; UnsupportedError.
    """
    if subject.positions is not None and run.sequence > subject.positions:
        raise RequestError(
            "--sequence", f"{run.sequence} tokens", expected=f"at most {subject.positions}, the model's positions"
        )
    found = _predict(subject, run)
    if fit_bytes is None:
        return found
    if found.is_of_images:
        return replace(found, fit_bytes=fit_bytes, fits=found.total <= fit_bytes)
    longest = longest_that_fits(
        lambda tokens: _predict(subject, replace(run, sequence=tokens)).total,
        start=run.sequence,
        end=subject.positions or FURTHEST,
        fit_bytes=fit_bytes,
    )
    return replace(found, fit_bytes=fit_bytes, fits=found.total <= fit_bytes, longest=longest)


def _predict(subject: Subject, run: Run) -> Prediction:
    step = Step(run.batch, run.sequence, run.target, run.padded, subject.autocast, run.checkpointing, run.device)
    saved = saved_by_all(subject.dry, step)
    parts = _state(subject.tensors, SHARDINGS[run.sharding], run.devices, cpu_offload=run.cpu_offload)
    parts["temporary"] = temporary(subject.dry, step)
    return Prediction(
        subject.architecture, subject.method, subject.trained_values, subject.dtype, subject.autocast, run,
        parts, saved.kinds, _notes(subject, run), positions=subject.positions,
        is_of_images=subject.dry.task == IMAGES, lean=subject.lean,
    )  # fmt: skip


def _state(tensors: Sequence[Tensor], sharding: Sharding, devices: int, *, cpu_offload: bool = False) -> dict[str, int]:
    """What lives on a device between two steps, and the gradients."""

    def count(chosen: Iterable[Tensor], *, is_divided: bool, itemsize: int = 0) -> int:
        return sum(t.values(devices if is_divided else 1) * (itemsize or t.itemsize) for t in chosen)

    trained = [tensor for tensor in tensors if tensor.is_trained]
    gradients = count(trained, is_divided=sharding.gradients)
    optimizer = MOMENTS * count(trained, is_divided=sharding.optimizer) + STEP_BYTES * len(trained)
    if sharding.master:
        optimizer += count(trained, is_divided=True, itemsize=MASTER_BYTES)
    parts = {
        "weights": count((t for t in tensors if not t.is_added), is_divided=sharding.weights),
        "columns": count((t for t in tensors if t.is_added), is_divided=sharding.weights),
        "gradients": gradients,
        "optimizer": optimizer,
    }
    if sharding.buckets:
        parts["gradient buckets"] = gradients
    if sharding.gathers:
        parts["gathered weights"] = _gathered(tensors)
    return parts | (dict.fromkeys(sharding.offloaded, 0) if cpu_offload else {})


def _gathered(tensors: Sequence[Tensor]) -> int:
    """What is put together at once: all that is in no layer, a layer, and the next one, fetched meanwhile."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.layer] = sizes.get(tensor.layer, 0) + tensor.values() * tensor.itemsize
    outside = sizes.pop("", 0)
    return outside + sum(sorted(sizes.values())[-2:])


def _notes(subject: Subject, run: Run) -> tuple[str, ...]:
    """What the figures assume."""
    found = [subject.held] if subject.held else []
    if run.device == "cuda":
        found.append(
            "CUDA: flash attention where there is no mask and values have 16 bits, else the memory-efficient kernel, "
            "which keeps no scores either; masks of dropout have one byte a value"
        )
    if run.device == "cuda" and subject.autocast != "fp32":
        found.append("CUDA: what autocast leaves in fp32 is taken from the CPU's list, which is shorter for norms")
    if run.padded:
        found.append("rows are padded: attention holds a mask")
    if run.padded and run.attention == FLASH:
        found.append(f"{FLASH} takes the padding out, and keeps less than is said here")
    if subject.method == FULL and subject.dtype != "fp32":
        found.append(f"weights of {subject.dtype} train in it, and AdamW's moments have it too")
    if run.sharding not in ("none", "ddp"):
        found.append(f"{run.sharding} by arithmetic: rows are divided, all activations stay on their device")
    if run.cpu_offload:
        found.append(f"not on the device but in the CPU's memory: {', '.join(SHARDINGS[run.sharding].offloaded)}")
    return (*found, NOT_COUNTED)
