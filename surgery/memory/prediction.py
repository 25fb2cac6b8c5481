"""What was predicted, and how people read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from surgery.errors import counted
from surgery.memory.run import FULL, LORA, Run
from surgery.table import align, size_text

ADDED = {"paca": "columns", "read": "side network", LORA: "adapters", FULL: "added"}


@dataclass(frozen=True)
class Prediction:
    """Bytes on each device. `longest`: the longest sequence that fits `fit_bytes`, 0 where none does (images: None).

    lean: what is lean, in words (empty where nothing is).
    """

    architecture: str
    method: str
    trained_values: int
    dtype: str
    autocast: str
    run: Run
    parts: Mapping[str, int]
    activations: Mapping[str, int]
    notes: tuple[str, ...]
    fit_bytes: int | None = None
    fits: bool | None = None
    longest: int | None = None
    positions: int | None = None
    is_of_images: bool = False
    lean: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + sum(self.activations.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the sum among them."""
        return {**asdict(self), "total": self.total}

    def lines(self) -> list[str]:
        """A table for people, and what follows from it."""
        return _lines(self)


def _lines(found: Prediction) -> list[str]:
    run = found.run
    many = f" on each of {run.devices} devices, {run.sharding}" if run.devices > 1 else ""
    compute = f", autocast {found.autocast}" if found.autocast != "fp32" else ""
    shape = f"{_batch(found)}, weights {found.dtype}{compute}, {run.device}{many}"
    names = {"columns": ADDED[found.method]}
    rows = [(names.get(name, name), size_text(size)) for name, size in found.parts.items() if size]
    kept = [(f"  {kind}", size_text(size)) for kind, size in found.activations.items() if size]
    total = size_text(sum(found.activations.values()))
    table = align([*rows, ("kept for backward", total), *kept, ("sum", size_text(found.total))], right=(1,))
    checkpointing = ", gradient checkpointing" * run.checkpointing + ", lean blocks" * bool(found.lean)
    head = f"{found.architecture}, {found.method}, {found.trained_values:,} trained values"
    notes = [f"note: {note}" for note in found.notes]
    return [head, f"{shape}{checkpointing}", "", *table, *_fit_lines(found), "", *notes]


def _batch(found: Prediction) -> str:
    run = found.run
    return counted(run.batch, "image") if found.is_of_images else f"{run.batch} x {run.sequence} tokens"


def _fit_lines(found: Prediction) -> list[str]:
    if found.fit_bytes is None:
        return []
    left = found.fit_bytes - found.total
    limit = size_text(found.fit_bytes)
    verdict = (
        f"fits {limit}: {size_text(left)} are left" if found.fits else f"does not fit {limit}: {size_text(-left)} lack"
    )
    if found.longest is None:
        return ["", verdict]
    if not found.longest:
        return ["", verdict, "not even one token fits: shard, take a smaller batch or another method"]
    is_all = " (all the model's positions)" if found.longest == found.positions else ""
    return ["", verdict, f"longest sequence that fits: {found.longest:,} tokens{is_all}"]


def brief_line(found: Prediction) -> str:
    """The short form, for `surgery apply --plan`."""
    run, kept = found.run, sum(found.activations.values())
    state = sum(size for name, size in found.parts.items() if name != "temporary")
    device = f"{run.device}, lean blocks," if found.lean else run.device
    return (
        f"a step of {_batch(found)} on {device} holds {size_text(found.total)}: "
        f"{size_text(state)} for weights, what trains, gradients and AdamW, {size_text(kept)} for the backward pass, "
        f"{size_text(found.parts['temporary'])} for a moment "
        "(`surgery plan` says more)"
    )
