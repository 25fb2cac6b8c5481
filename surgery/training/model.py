"""The model as it trains: with its adapter in it, in the dtype and under the autocast that device and heads ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from surgery import acceleration
from surgery.adapter import Adapter
from surgery.checkpoint import Checkpoint
from surgery.compat import keep_no_cache
from surgery.operate import attach_plan, load_base_model
from surgery.plan import SurgeryPlan
from surgery.recipe import TrainSection


def load_for_training(adapter: Adapter, root: Path, settings: TrainSection, device: str) -> tuple[Any, str]:
    """The attached model on the CPU and the autocast it trains under (fp32: none).

    Weights keep the checkpoint's dtype, but fp16 on a CPU computes in fp32 (what is trained still rounds to fp16).
    Heads train in fp32, which beside 16-bit weights needs autocast.
    """
    dtype = torch.float32 if device == "cpu" and _is_half(adapter.plan, root) else None
    model = load_base_model(root, adapter.plan, dtype=dtype)
    attach_plan(model, adapter.plan, adapter.delta)
    keep_no_cache(model)
    autocast = acceleration.choose_autocast(settings.precision, device)
    if adapter.plan.whole and model.dtype != torch.float32:
        acceleration.set_heads(model, {name: patch.values.float() for name, patch in adapter.delta.whole.items()})
        has_bf16 = device != "cuda" or acceleration.has_bf16()
        autocast = "bf16" if model.dtype == torch.bfloat16 and has_bf16 else "fp16"
    return model, autocast


def _is_half(plan: SurgeryPlan, root: Path) -> bool:
    """Whether what trains, or the backbone that a side network reads, has fp16 weights."""
    weights = plan.targets or Checkpoint.open(root).values()
    return any(weight.dtype == "F16" for weight in weights)
