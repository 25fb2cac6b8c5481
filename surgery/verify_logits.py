"""Is the export what was trained, by running it and base with adapter; what a merge of a quantized base changes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from surgery.errors import CheckError
from surgery.exported import load_merged, model_inputs, own_class, run_model
from surgery.manifest import Check
from surgery.operate import attach_plan, load_base_model
from surgery.plan import SurgeryPlan
from surgery.verify_bytes import Sides, is_dequantized
from surgery.verify_quantized import MERGE_DIFFERENCE, measure

LOGITS_BYTES_FACTOR = 1.6  # loading needs the weights and, while they move, one more shard of them


def not_run(why: str) -> Check:
    """The check of logits, and why it was left out."""
    return Check("logits", "not run", why)


def check_logits(sides: Sides, prompts: Sequence[str]) -> tuple[Check, float | None]:
    """Base with adapter against the merged folder loaded afresh, one after the other."""
    if not sides.adapter:
        return not_run(sides.why_no_adapter), None
    needed = int(sides.merged.size_bytes * LOGITS_BYTES_FACTOR)
    free = psutil.virtual_memory().available
    if needed > free:
        return not_run(f"needs {needed:,} bytes of memory, {free:,} are free; the byte checks above are complete"), None
    inputs = model_inputs(sides.merged.root, prompts)
    plan = sides.record.plan if is_dequantized(sides) else replace(sides.record.plan, quantization=None)
    expected = _run_trained(sides, plan, inputs)
    found = run_model(load_merged(sides.merged.root, own_class(sides.merged.root, sides.record)), inputs)
    difference = max(float((a.double() - b.double()).abs().max()) for a, b in zip(expected, found, strict=True))
    is_cast = sides.record.manifest.export.get("dtype", "keep") != "keep"
    if not is_cast and any(not torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
        raise CheckError(
            str(sides.merged.root),
            f"its logits differ from the trained model's by up to {difference:.3g}",
            expected="no difference",
            fix="Please report this with `surgery doctor --json`",
        )
    said = f"largest difference to base + adapter {difference:.3g} on {len(inputs)} prompts"
    return Check("logits", "passed", said + (", from the cast asked for" if is_cast else "")), difference


def _run_trained(sides: Sides, plan: SurgeryPlan, inputs: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The outputs of base and adapter, which are gone from memory then."""
    assert sides.adapter is not None  # noqa: S101  the caller's question
    trained = load_base_model(sides.base.root, plan)
    attach_plan(trained, plan, sides.adapter.delta)
    outputs = run_model(trained, inputs)
    del trained
    gc.collect()
    return outputs


def measure_merge(sides: Sides, prompts: Sequence[str], *, numeric: bool) -> list[Check]:
    """Of a quantized base merged into the original: what that changes. Nothing for any other merge."""
    held = sides.record.plan.quantization
    if held is None or is_dequantized(sides):
        return []
    why = "" if sides.adapter else sides.why_no_adapter
    needed = int(sides.merged.size_bytes * LOGITS_BYTES_FACTOR)
    if not numeric or why or needed > psutil.virtual_memory().available:
        return [
            Check(MERGE_DIFFERENCE, "not run", why or ("--no-numeric" if not numeric else f"needs {needed:,} bytes"))
        ]
    inputs = model_inputs(sides.merged.root, prompts)
    seen = _run_trained(sides, sides.record.plan, inputs)
    merged = run_model(load_merged(sides.merged.root), inputs)
    return [measure(seen, merged, held.kind)]
