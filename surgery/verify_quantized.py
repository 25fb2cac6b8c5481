"""Checks of what was merged from a quantized base: are the weights those that training saw, and what does it change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from surgery.checkpoint import Checkpoint
from surgery.delta import ColumnPatch, bits
from surgery.errors import CheckError
from surgery.manifest import Check
from surgery.paca_quantized import trained_weight
from surgery.plan import SurgeryPlan
from surgery.quantized_base import is_beside, seen_weight, stored_weight

DEQUANTIZED = "dequantized"
MERGE_DIFFERENCE = "merge difference"


def dense_infos(base: Checkpoint, plan: SurgeryPlan) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of a base, packed ones as what they stand for."""
    held = plan.quantization
    packed = set(held.layers.values()) if held and held.is_stored else set()
    found = {}
    for name, info in base.items():
        if name in packed:
            stored = stored_weight(base, name)
            found[name] = (stored.shape, stored.dtype)
        elif not is_beside(name, packed):
            found[name] = (info.shape, info.dtype)
    return found


def check_seen(
    base: Checkpoint, merged: Checkpoint, plan: SurgeryPlan, patches: Mapping[str, ColumnPatch] | None, why_none: str
) -> list[Check]:
    """Every quantized weight of the base is there dequantized, with the adapter's columns in it.

    patches: None where the adapter is not at hand, for the reason given: then the columns that train are left out.
    Raises: CheckError.
    """
    held = plan.quantization
    assert held is not None  # noqa: S101  the caller's question
    columns = {target.module for target in plan.targets}
    for module, weight in held.layers.items():
        if module in columns and patches is None:
            continue
        written = merged.read_tensor(plan.merged_name(weight))
        expected = trained_weight(seen_weight(base, held, weight), (patches or {}).get(module)).to(written.dtype)
        if expected.shape != written.shape or (bits(expected) != bits(written)).any():
            found = f"it is not what training saw of the base as {held.kind}"
            raise CheckError(
                weight, found, expected="the dequantized weight with the trained columns", fix="Export again"
            )
    if patches is None:
        said = f"{len(set(held.layers) - columns)} layers that do not train are those of this base, dequantized"
        return [Check("dequantized weights", "passed", said), Check("trained columns", "not run", why_none)]
    said = f"{len(held.layers)} layers are those of this base, dequantized, with the trained columns, bit for bit"
    return [Check("dequantized weights", "passed", said), Check("trained columns", "passed", "all are the adapter's")]


def measure(seen: Sequence[Tensor], merged: Sequence[Tensor], kind: str) -> Check:
    """What a merge into the original base changes of what training saw: outputs of both, one tensor a prompt."""
    pairs = [(a.double(), b.double()) for a, b in zip(seen, merged, strict=True)]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    total = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(a.square().sum()) for a, _ in pairs)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs]).double().mean()
    detail = (
        f"to what training saw (the base as {kind}): outputs differ by at most {largest:.3g}, "
        f"by {(total / max(size, 1e-300)) ** 0.5:.2%} of their size; the largest is the same in {float(same):.1%} of "
        "places"
    )
    return Check(MERGE_DIFFERENCE, "measured", detail)
