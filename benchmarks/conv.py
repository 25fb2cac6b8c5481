"""One training step of PaCA on a convolutional model beside the frozen floor, full tuning and PEFT's LoRA.

    python benchmarks/conv.py                                  the figures of docs/performance.md
    python benchmarks/conv.py --family efficientnet --batch 4 --size 96

LoRA has the same layers and rank. The variants hold the same weights and take turns step by step. The floor is frozen,
with gradients of the images. Batch norms of full tuning and of LoRA are in training mode, as PEFT leaves them; PaCA's
and the floor's stay the base's.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import surgery
from surgery.bench.measure import saved_bytes, take_turns
from surgery.paca_kinds import keep_statistics, moving_statistics

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": (48, 96, 192, 384), "depths": (2, 2, 4, 2), "num_labels": 10},
    ),
    "efficientnet": (
        "EfficientNetConfig",
        "EfficientNetForImageClassification",
        {
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "hidden_dim": 1280,
            "num_labels": 10,
            "drop_connect_rate": 0.0,
        },
    ),
}


def build(family: str, size: int) -> Any:
    """A model of random weights, without dropout."""
    config_name, model_name, fields = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**fields, image_size=size))


def targets_of(family: str) -> tuple[str, ...]:
    """EfficientNet has no linear layer but its head."""
    return ("all-conv", "all-linear") if family == "convnext" else ("all-conv",)


def as_floor(model: Any, _targets: tuple[str, ...], _rank: int) -> Any:
    """Frozen, with the base's statistics."""
    keep_statistics(model, moving_statistics(model))
    return model.requires_grad_(requires_grad=False)


def as_paca(model: Any, targets: tuple[str, ...], rank: int) -> Any:
    """Columns of every convolution wide enough and every linear layer."""
    surgery.attach(model, surgery.PacaSpec(rank=rank, targets=targets))
    return model


def as_lora(model: Any, targets: tuple[str, ...], rank: int) -> Any:
    """PEFT's LoRA on the layers that PaCA opens, without dropout."""
    from peft import LoraConfig, get_peft_model

    opened = copy.deepcopy(model)
    plan = surgery.attach(opened, surgery.PacaSpec(rank=rank, targets=targets))
    names = [target.module for target in plan.targets]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=names))


VARIANTS: dict[str, Callable[[Any, tuple[str, ...], int], Any]] = {
    "floor": as_floor, "paca": as_paca, "lora": as_lora, "full": lambda model, _targets, _rank: model,
}  # fmt: skip


def step(model: nn.Module, optimizer: Any, batch: dict[str, Tensor]) -> None:
    """Forward, backward, optimizer."""
    model(**batch).loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="convnext")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="height and width of the images")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--processor-time", action="store_true", help="count it instead of wall time, on a busy machine"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base, targets = build(given.family, given.size), targets_of(given.family)
    models = {name: make(copy.deepcopy(base), targets, given.rank).train() for name, make in VARIANTS.items()}
    pixels = torch.randn(given.batch, 3, given.size, given.size, requires_grad=True)
    batch = {"pixel_values": pixels, "labels": torch.zeros(given.batch, dtype=torch.long)}
    kept = {name: saved_bytes(model, lambda one=model: one(**batch).loss) for name, model in models.items()}
    steps = {}
    for name, model in models.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        steps[name] = functools.partial(step, model, optimizer)
    clock = time.process_time if given.processor_time else time.perf_counter
    seconds = take_turns(steps, itertools.repeat(batch, given.rounds + 2), warmup=2, clock=clock)
    print(f"{given.family}, {given.batch} x {given.size} x {given.size}, rank {given.rank}, {given.threads} threads")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["floor"], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        trained_values = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        print(
            f"{name:6} {trained_values:>11,} {statistics.median(times):.4f} s  "
            f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})  {kept[name]:>13,} bytes kept"
        )


if __name__ == "__main__":
    main()
