"""The adapter as PEFT's own PaCA reads it, to train on there or to serve with PEFT.

PEFT holds what is added, we hold what replaces: the delta is the difference of the two in the master's precision. Where
it is not exact, because the column and the base are more than a factor of two apart, the record says by how much. r and
paca_alpha hold for all layers there, so layers of smaller rank get further columns whose delta is zero.

Source: PEFT 0.22, src/peft/tuners/paca (the files and the sum); see surgery.peft_files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.dense import KEEP, Exporter
from exporters.lora import PeftContents, base_notes, refuse_settings, write_peft
from surgery.adapter import Adapter
from surgery.delta import ColumnDelta, ColumnPatch, require_columns
from surgery.errors import UnsupportedError
from surgery.experts import require_layers
from surgery.paca_layers import combine
from surgery.peft_files import DELTA, INDICES, PACA, PEFT_PACA, PREFIX, saved_modules, task_type
from surgery.plan import SurgeryPlan, Target
from surgery.tensorfile import tensor_to_bytes, torch_dtype


@dataclass
class Rounding:
    """What PEFT's base + scale x delta makes of the trained values.

    values: of so many; differing: how many are not what was trained, in the master's precision; largest: by how much;
    rounded: how many are not the merged checkpoint's once in the base's dtype.
    """

    values: int = 0
    differing: int = 0
    largest: float = 0.0
    rounded: int = 0

    def add(self, patch: ColumnPatch, delta_or: Tensor, scale: float) -> None:
        """Count one layer. delta_or (out, r): what the file holds of the patch's columns."""
        theirs = combine(patch.original, delta_or, scale)
        self.values += theirs.numel()
        self.differing += int((theirs != patch.values).sum())
        self.largest = max(self.largest, float((theirs.double() - patch.values.double()).abs().max()))
        self.rounded += int((theirs.to(patch.original.dtype) != patch.stored()).sum())

    def note(self) -> str:
        """One sentence."""
        if not self.differing:
            return f"exact: base + delta gives all {self.values:,} trained values back bit for bit"
        kept = f"{self.rounded:,} differ" if self.rounded else "none differs"
        return (
            f"{self.differing:,} of {self.values:,} trained values are rounded: base + delta is off by up to"
            f" {self.largest:.3g}; once in the base's dtype {kept} from the merged checkpoint"
        )


def alpha_of(plan: SurgeryPlan, rank: int) -> float:
    """paca_alpha: the plan's own where it scales all layers alike, else r, by which PEFT scales by 1."""
    alpha = plan.spec.get("alpha")
    return alpha if alpha is not None and {target.rank for target in plan.targets} == {rank} else rank


def build_config(plan: SurgeryPlan, rank: int, alpha: float, base_name: str, revision: str) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    return {
        "peft_type": PACA,
        "task_type": task_type(plan),
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "r": rank,
        "paca_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": [target.module for target in plan.targets],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "random_seed": None,
        "init_weights": True,
        "modules_to_save": saved_modules(plan) or None,
        "inference_mode": True,
    }


def _delta_dtype(target: Target) -> str:
    """PEFT's deltas take the base's dtype, but for the 16-bit ones, beside which they are float32."""
    return "F64" if target.dtype == "F64" else "F32"


def weight_entries(plan: SurgeryPlan, rank: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of the adapter, in file order."""
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for target in plan.targets:
        name = f"{PREFIX}{target.module}"
        entries.append((f"{name}{DELTA}", _delta_dtype(target), (target.out_features, rank)))
        entries.append((f"{name}{INDICES}", "I64", (rank,)))
    return entries + [(f"{PREFIX}{w.parameter}", w.dtype, w.shape) for w in plan.whole]


def padded(patch: ColumnPatch, delta_or: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Delta (out, rank) and indices (rank,), strictly increasing; further columns are the first free ones."""
    free = torch.ones(patch.target.in_features, dtype=torch.bool)
    free[patch.columns] = False
    extra = free.nonzero()[: rank - len(patch.columns), 0]
    indices, order = torch.cat([patch.columns, extra]).sort()
    zeros = delta_or.new_zeros((len(delta_or), len(extra)))
    return torch.cat([delta_or, zeros], dim=1)[:, order], indices


def find_chunks(delta: ColumnDelta, rank: int, scale: float, rounding: Rounding) -> Iterator[bytes]:
    """The bytes of every tensor in file order, one target in memory at a time."""
    for target in delta.plan.targets:
        patch = delta.patches[target.module]
        master = torch_dtype(_delta_dtype(target))
        delta_or = (patch.values.to(master) - patch.original.to(master)) / scale
        rounding.add(patch, delta_or, scale)
        their_delta, indices = padded(patch, delta_or, rank)
        yield tensor_to_bytes(their_delta)
        yield tensor_to_bytes(indices)
    for whole in delta.plan.whole:
        yield tensor_to_bytes(delta.whole[whole.parameter].stored(whole.dtype))


def find_notes(plan: SurgeryPlan, widths: Mapping[str, int], alpha: float) -> list[str]:
    """What a person who loads the adapter must know, one sentence each. widths: how many columns, by module."""
    notes, rank = base_notes(plan), max(widths.values())
    smaller = [module for module, width in widths.items() if width < rank]
    if smaller:
        notes.append(
            f"PEFT has one rank for all layers, here {rank}: {len(smaller)} layers get further columns of delta 0,"
            " which change nothing, and train if the training goes on there"
        )
    if plan.spec.get("alpha") not in (None, alpha):
        notes.append(
            f"layers of several ranks have several scales here and one there: alpha {plan.spec['alpha']} is left out,"
            " and training that goes on there moves them by other steps"
        )
    return notes


def require_linear(plan: SurgeryPlan, rank: int) -> None:
    """PEFT trains columns of nn.Linear alone, as many in each. Raises: UnsupportedError."""
    where = f"--format {PEFT_PACA}"
    require_layers(plan, where)
    for target in plan.targets:
        if target.input_axis != 1 or target.sizes or target.parameter != "weight":
            found = (
                f"{target.module}, whose weight is {list(target.shape)} with the inputs along axis {target.input_axis}"
            )
            fix = "Use --merge, or --format lora where PEFT has LoRA for such a layer"
            raise UnsupportedError(where, found, expected="nn.Linear: PEFT's PaCA trains no other", fix=fix)
        if target.in_features < rank:
            found = f"{target.module} has {target.in_features} columns"
            fix = "Use --format lora, or --merge"
            raise UnsupportedError(where, found, expected=f"{rank}: PEFT has one rank for all layers", fix=fix)


def export(
    adapter: Adapter,
    out: Path,
    *,
    base: str | Path | None = None,
    dtype: str = KEEP,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    check: Callable[[Path], Any] | None = None,
) -> Path:
    """Write the adapter as PEFT's PaCA. The base is checked by its digests where it lies on this disk.

    Raises: RequestError for settings that mean nothing here; UnsupportedError for layers that PEFT does not train;
    BaseMismatchError, OutputExistsError, ResourceError.
    """
    refuse_settings(PEFT_PACA, dtype, max_shard_bytes)
    delta = require_columns(adapter.delta, f"--format {PEFT_PACA}")
    plan, widths = adapter.plan, delta.widths()
    rank = max(widths.values())
    require_linear(plan, rank)
    alpha, rounding = alpha_of(plan, rank), Rounding()

    def settings() -> Mapping[str, Any]:
        notes = [*find_notes(plan, widths, alpha), rounding.note()]
        return {"format": PEFT_PACA, "rank": rank, "notes": notes}

    contents = PeftContents(
        PEFT_PACA,
        weight_entries(plan, rank),
        lambda: find_chunks(delta, rank, alpha / rank, rounding),
        lambda name, revision: build_config(plan, rank, alpha, name, revision),
        settings,
    )
    return write_peft(adapter, out, contents, base=base, overwrite=overwrite, check=check)


EXPORTER = Exporter(PEFT_PACA, (ColumnDelta,), export)
