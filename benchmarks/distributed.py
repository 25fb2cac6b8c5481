"""Two processes on the CPU against one, at the same examples per step; and what the refresh of the columns costs.

    python benchmarks/distributed.py                    the figures of docs/performance.md
    python benchmarks/distributed.py --rounds 1 --steps 4 --shape tiny

Every run is `surgery.train` in processes of its own, each with one thread, on a model and a text that are made here. A
step is the time between two lines of the training log; the first two are left out. Memory is a rank's resident set
above that of the imports: its peak, which holds the loading of the whole model, and what is left after the last step.
The refresh is set against a step of one process, both in processor time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.paca_layers import layers
from surgery.recipe import DataSection, TrainSection

TOKENIZER = Path(__file__).resolve().parent.parent / "recipes" / "quickstart" / "model"
SHAPES = {  # (width, intermediate, layers, heads)
    "small": (768, 2048, 4, 12),
    "tiny": (64, 172, 2, 4),
}
VOCABULARY = 8192  # more than the tokenizer's: an embedding and a head of some size
WORDS = ("fox", "dog", "house", "river", "seven", "green", "runs", "and", "the", "answer", "is", "not", "here")
STRATEGIES = ("one", "ddp", "fsdp2")
MB = 1_000_000
LEARNING_RATE = 3e-4


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """A model of random weights, a text, and a fresh adapter."""
    width, intermediate, depth, heads = SHAPES[arguments.shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=intermediate, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / "model")
    draw, count = random.Random(0), arguments.steps * arguments.batch * arguments.tokens
    (folder / "text.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(2 * count)), encoding="utf-8")
    surgery.apply(folder / "model", folder / "adapter", surgery.PacaSpec(rank=arguments.rank))


def be_rank(arguments: argparse.Namespace) -> None:
    """In a process of its own: train, and say what it took."""
    imports_bytes = psutil.Process().memory_info().rss
    data = DataSection(train=["text.txt"], max_length=arguments.tokens)
    strategy = "ddp" if arguments.strategy == "one" else arguments.strategy
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = TrainSection(
        max_steps=arguments.steps, batch_size=arguments.batch // processes, logging_steps=1,
        learning_rate=LEARNING_RATE, save_steps=arguments.steps, device="cpu", strategy=strategy, threads=1,
    )  # fmt: skip
    surgery.train(Path(arguments.adapter), data, settings)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held_bytes = psutil.Process().memory_info().rss
    figures = {"peak_bytes": peak_bytes - imports_bytes, "held_bytes": held_bytes - imports_bytes}
    Path(f"{arguments.adapter}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, strategy: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training: seconds of each step, memory by rank."""
    name = f"{strategy}-{free_port()}"
    shutil.copytree(folder / "adapter", folder / name)
    count = 1 if strategy == "one" else 2
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    sizes = [f"--{key}={getattr(arguments, key)}" for key in ("steps", "batch", "tokens", "rank", "shape")]
    command = [sys.executable, str(Path(__file__).resolve()), *sizes, "--strategy", strategy, "--adapter", name]
    processes = []
    for rank in range(count):
        ranks = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {"OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=folder, env={**os.environ, **ranks}, stderr=subprocess.DEVNULL))
    assert [process.wait() for process in processes] == [0] * count
    lines = [json.loads(line) for line in (folder / name / "training_log.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in lines if "loss" in line][1:]
    figures = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(count)]
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return {"folder": folder / name, "seconds": seconds, "ranks": figures}


def largest_difference(a: Path, b: Path) -> float:
    """Between the trained values of two adapters."""
    one, two = (load_file(folder / "adapter.safetensors") for folder in (a, b))
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


def refresh_seconds(folder: Path, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Processor time, in one thread, of a step and of rewriting the columns of all layers, in turns."""
    torch.set_num_threads(1)
    model = surgery.load(folder / "adapter", trainable=True).train()
    opened = list(layers(model).values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True)
    ids = torch.randint(0, VOCABULARY, (arguments.batch, arguments.tokens))
    steps, refreshes = [], []
    for _ in range(arguments.steps):
        started = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(time.process_time() - started)
        started = time.process_time()
        for layer in opened:
            layer.refresh()
        refreshes.append(time.process_time() - started)
    return steps[1:], refreshes[1:]


def quartiles(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def report(folder: Path, arguments: argparse.Namespace) -> None:
    """Run all, in turns, and print."""
    runs: dict[str, list[dict[str, Any]]] = {strategy: [] for strategy in STRATEGIES}
    for _ in range(arguments.rounds):
        for strategy in STRATEGIES:
            runs[strategy].append(run(folder, strategy, arguments))
    print(f"{'':6} {'seconds a step':>28} {'peak MB by rank':>18} {'held MB by rank':>18} {'off one process':>16}")
    for strategy, done in runs.items():
        seconds = [value for one in done for value in one["seconds"]]
        peak, held = ([f"{r[key] / MB:.0f}" for r in done[-1]["ranks"]] for key in ("peak_bytes", "held_bytes"))
        apart = max(largest_difference(a["folder"], b["folder"]) for a, b in zip(runs["one"], done, strict=True))
        print(f"{strategy:6} {quartiles(seconds):>28} {' '.join(peak):>18} {' '.join(held):>18} {apart:>16.2e}")
    steps, refreshes = refresh_seconds(folder, arguments)
    share = statistics.median(refreshes) / statistics.median(steps)
    print(f"refresh of all layers: {quartiles(refreshes)} s of {quartiles(steps)} s a step: {share:.2%}")


def main() -> None:
    """Be the bench, or one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=4, help="examples a step sees, over all processes")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategy", choices=STRATEGIES, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.adapter:
        be_rank(arguments)
        return
    sizes = f"{arguments.shape}, {arguments.batch} x {arguments.tokens} tokens a step, rank {arguments.rank}"
    print(f"{sizes}, torch {torch.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments)
        report(Path(folder), arguments)


if __name__ == "__main__":
    main()
