"""One training step of PaCA on a mixture of experts: attention alone, experts with shared and with own columns, all.

    python benchmarks/experts.py                        the figures of docs/performance.md
    python benchmarks/experts.py --ways grouped_mm eager --rounds 9

The variants hold the same weights and take turns step by step, as in benchmarks/step.py, whose floor is here, too. What
is counted is the process's own time, on one thread, which other programs disturb less than the clock.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import step as steps
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import surgery
from surgery.bench.measure import saved_bytes

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 8192}  # fmt: skip


def with_experts(model: Any, rank: int, *, columns: str) -> Any:
    """PaCA on all linear layers and the experts."""
    surgery.attach(model, surgery.PacaSpec(rank=rank, targets=("all-linear", "experts"), experts=columns))
    return model


VARIANTS: dict[str, Callable[[Any, int], Any]] = {
    "floor": steps.as_floor,
    "attention": steps.as_paca,
    "shared": functools.partial(with_experts, columns="shared"),
    "own": functools.partial(with_experts, columns="own"),
    "full": steps.as_full,
}


def build(way: str) -> Any:
    """A Mixtral of random weights whose experts multiply in that way."""
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(MixtralConfig(**SHAPE, attn_implementation="sdpa", use_cache=False))
    model.set_experts_implementation(way)
    return model


def measure(arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    """Seconds a step, trained values and bytes kept by variant."""
    base = build(way)
    ids = torch.randint(0, base.config.vocab_size, (arguments.batch, arguments.tokens))
    batch = {"input_ids": ids, "labels": ids}
    models = {name: VARIANTS[name](copy.deepcopy(base), arguments.rank).train() for name in arguments.variants}
    kept = {name: saved_bytes(model, lambda one=model: one(**batch).loss) for name, model in models.items()}
    optimizers = {name: steps.optimizer_of(model) for name, model in models.items()}
    turns = {n: functools.partial(steps.step, model, optimizers[n], batch) for n, model in models.items()}
    seconds = processor_seconds(turns, arguments.rounds, warmup=arguments.warmup)
    trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    return {"saved_bytes": kept, "seconds": seconds, "trained": trained}


def processor_seconds(turns: dict[str, Callable[[], None]], rounds: int, *, warmup: int) -> dict[str, list[float]]:
    """Processor time of each variant's steps; whoever begins a round ends the next."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(warmup + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.process_time()
            turns[name]()
            seconds[name].append(time.process_time() - begin)
    return {name: times[warmup:] for name, times in seconds.items()}


def report(result: dict[str, Any], way: str) -> list[str]:
    """The table of one way."""
    seconds, kept = result["seconds"], result["saved_bytes"]
    head = "| variant | trained values | median processor s | step / floor | bytes saved | saved / floor |"
    lines = [f"\n{way}", head, "|---|---|---|---|---|---|"]
    for name, times in seconds.items():
        to_floor = steps.ratio(times, seconds["floor"])
        saved = (f"{kept[name]:,}", f"{kept[name] / kept['floor']:.3f}")
        cells = (name, f"{result['trained'][name]:,}", f"{statistics.median(times):.3f}", to_floor, *saved)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure each way and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=["grouped_mm"], help="transformers' experts implementations")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = f"{arguments.batch} x {arguments.tokens} tokens, rank {arguments.rank}, {arguments.threads} thread(s)"
    print(f"Mixtral {SHAPE}, {sizes}, torch {torch.__version__}, {platform.processor() or platform.machine()}")
    raw = {}
    for way in arguments.ways:
        raw[way] = measure(arguments, way)
        print("\n".join(report(raw[way], way)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(raw, indent=2))


if __name__ == "__main__":
    main()
