"""Results as lines for a person at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.forecast import forecast_plan
from surgery.memory.prediction import brief_line
from surgery.plan import SurgeryPlan
from surgery.quantized import KINDS
from surgery.table import size_text
from surgery.tensorfile import tensor_bytes
from surgery.train import TrainResult
from surgery.workflow import ExportResult, RunResult

MASTER_BYTES = 4  # float32, like the gradient and AdamW's two moments
OPTIMIZER_COPIES = 4


def needs(checkpoint: Checkpoint, plan: SurgeryPlan) -> dict[str, int]:
    """Bytes that each step reads, writes and holds. Activations come on top of training's memory."""
    originals = sum(tensor_bytes(t.dtype, (t.trained_values,)) for t in plan.targets)
    adapter = plan.trained_values * MASTER_BYTES + originals + 8 * sum(t.rank for t in plan.targets)
    read = sum(checkpoint[target.weight].size_bytes for target in plan.targets)
    weights = checkpoint.size_bytes
    if plan.quantization and not plan.quantization.is_stored:
        kind = KINDS[plan.quantization.kind]
        packed = [checkpoint[weight] for weight in plan.quantization.layers.values()]
        weights -= sum(info.size_bytes - kind.size_bytes(*info.shape) for info in packed)
    return {
        "apply_reads": checkpoint.size_bytes if plan.stacks else read,
        "adapter": adapter,
        "training_memory": weights + plan.trained_values * MASTER_BYTES * OPTIMIZER_COPIES + originals,
        "checkpoint": 3 * plan.trained_values * MASTER_BYTES,
        "merged": checkpoint.size_bytes + (adapter if plan.stacks else originals),
    }


def need_lines(checkpoint: Checkpoint, plan: SurgeryPlan) -> list[str]:
    """What `needs` says, in words."""
    need = {name: size_text(count) for name, count in needs(checkpoint, plan).items()}
    return [
        f"apply reads {need['apply_reads']} and writes {need['adapter']}",
        f"train holds {need['training_memory']} (weights, what trains, gradients, AdamW) plus activations",
        f"each training checkpoint takes {need['checkpoint']}",
        f"export {'--format remote-code' if plan.stacks else '--merge'} writes {need['merged']}, in a few tens of MB",
    ]


@dataclass(frozen=True)
class StepMemory:
    """The short form of `surgery plan`; without a document where a step cannot be run without values."""

    lines: tuple[str, ...]
    document: dict[str, Any] | None


def step_memory(checkpoint: Checkpoint, plan: SurgeryPlan) -> StepMemory:
    """What a training step of a plan holds, as far as it can be predicted."""
    try:
        found = forecast_plan(checkpoint.root, plan)
    except UnsupportedError as error:
        return StepMemory((f"a step's memory is not predicted: {error}",), None)
    return StepMemory((brief_line(found),), found.to_dict())


def _metric_lines(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    lines = []
    for name in sorted({*before, *after}):
        values = [f"{m[name]:.4f}" if name in m else "not measured" for m in (before, after)]
        lines.append(f"{name:24} {values[0]:>14} {values[1]:>14}")
    return [f"{'held-out':24} {'before':>14} {'after':>14}", *lines] if lines else []


def result_lines(result: TrainResult) -> list[str]:
    """A training run."""
    finished = ["This run had been finished before: nothing was done now."] if result.was_finished else []
    return [*finished, *_figures(result)]


def _figures(result: TrainResult) -> list[str]:
    return [
        *(f"data: {line}" for line in result.data),
        *([f"lean: {result.lean}"] if result.lean else []),
        *_metric_lines(result.before, result.after),
        f"{result.steps} steps on {result.device} in {result.seconds:.1f} s, mean loss {result.loss:.4f}",
        f"{result.trained_values:,} trained values, peak memory {size_text(result.peak_memory_bytes)}",
    ]


def export_lines(result: ExportResult) -> list[str]:
    """An export."""
    checks = result.verification.lines() if result.verification else []
    notes = [f"note: {note}" for note in result.notes]
    return [f"Wrote {result.out}: {size_text(result.size_bytes)} in {result.seconds:.1f} s", *checks, *notes]


def run_lines(result: RunResult) -> list[str]:
    """A recipe's run."""
    skipped = [f"done before and not repeated: {', '.join(result.skipped)}"] if result.skipped else []
    checks = result.verification.lines() if result.verification else []
    return [*skipped, *_figures(result.training), *checks, f"adapter {result.adapter}", f"merged  {result.merged}"]
