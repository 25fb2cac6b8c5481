"""Memory of a training step: what `surgery plan` predicts beside what a real step on this machine keeps and holds.

    python benchmarks/memory.py                     the table of docs/performance.md
    python benchmarks/memory.py --shape llama-8b-layer --dtype bf16 --batch 1 --tokens 2048
    python benchmarks/memory.py --lean              the same in lean blocks
    python benchmarks/memory.py --shape llama-8b --predict-only --device cuda --dtype bf16 --batch 1 --tokens 2048

Measured are a forward and backward of the model in memory: bytes that autograd's hooks see, and the peak of all tensors
that operators make. LoRA is PEFT's. Predicted is the same from a folder that holds config.json alone.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import DTYPES, SHAPES, as_full, as_lora, as_paca
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.bench.measure import saved_bytes
from surgery.compat import keep_inputs_frozen, set_checkpointing
from surgery.lean_pass import rewrite
from surgery.memory.live import LiveBytes
from surgery.memory.predict import predict
from surgery.memory.run import Run
from surgery.memory.subject import open_subject
from surgery.methods.read import ReadSpec
from surgery.survey import TaskSpec

LAYER = {**SHAPES["llama-8b"], "num_hidden_layers": 2, "vocab_size": 256}
LARGE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
ALL_SHAPES = {**SHAPES, "llama-8b-layer": LAYER, "llama-70b": LARGE}


def as_read(model: Any, rank: int) -> Any:
    """READ, whose hidden size is 4 times the rank."""
    surgery.attach(model, ReadSpec(hidden=4 * rank))
    return model


VARIANTS: dict[str, Callable[[Any, int], Any]] = {"paca": as_paca, "read": as_read, "lora": as_lora, "full": as_full}


def config_of(arguments: argparse.Namespace) -> LlamaConfig:
    """The shape as a configuration."""
    return LlamaConfig(**ALL_SHAPES[arguments.shape], max_position_embeddings=1 << 17, use_cache=False)


def measure(arguments: argparse.Namespace, method: str) -> tuple[int, int]:
    """(bytes kept for backward, peak of a step's tensors) of a real model."""
    torch.manual_seed(0)
    config = config_of(arguments)
    model = VARIANTS[method](LlamaForCausalLM(config).to(DTYPES[arguments.dtype]), arguments.rank).train()
    if arguments.lean:
        rewrite(model)
    if arguments.checkpointing:
        set_checkpointing(model, on=True)
        if method in ("paca", "read"):
            keep_inputs_frozen(model)  # as in our runs
    ids = torch.randint(0, config.vocab_size, (arguments.batch, arguments.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    saved = saved_bytes(model, lambda model=model: model(**batch).loss)
    live = LiveBytes(model)
    with live.watching():
        model(**batch).loss.backward()
    peak = live.peak
    del model, live
    gc.collect()
    return saved, peak


def foretell(arguments: argparse.Namespace, method: str) -> tuple[int, int, float, Any]:
    """(bytes kept for backward, peak of a step's tensors, seconds, the whole prediction)."""
    rank = arguments.rank
    spec = {"paca": surgery.PacaSpec(rank=rank), "lora": surgery.PacaSpec(rank=rank), "full": None,
            "read": ReadSpec(hidden=4 * rank)}[method]  # fmt: skip
    run = Run(
        arguments.batch,
        arguments.tokens,
        dtype=arguments.dtype,
        precision="fp32",
        device=arguments.device,
        devices=arguments.devices,
        sharding=arguments.sharding,
        checkpointing=arguments.checkpointing,
        lean="on" if arguments.lean else "off",
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        found = predict(open_subject(Path(folder), method, spec, TaskSpec(), run), run)
    kept = sum(found.activations.values())
    return kept, kept + found.parts["temporary"], time.perf_counter() - started, found


def main() -> None:
    """Predict, measure, and print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=ALL_SHAPES, default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for which is predicted")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--sharding", default="")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lean", action="store_true", help="with lean blocks")
    parser.add_argument("--predict-only", action="store_true", help="do not build the model")
    arguments = parser.parse_args()
    print(f"{arguments.shape}, {arguments.dtype}, {arguments.batch} x {arguments.tokens} tokens, rank {arguments.rank}")
    print("| method | kept, predicted | measured | ratio | peak, predicted | measured | ratio | seconds |")
    for method in arguments.methods:
        kept, peak, seconds, found = foretell(arguments, method)
        if arguments.predict_only:
            print(f"| {method} | {kept:,} | - | - | {peak:,} | - | - | {seconds:.1f} |")
            print("\n".join(found.lines()))
            continue
        saved, real = measure(arguments, method)
        print(
            f"| {method} | {kept:,} | {saved:,} | {kept / saved:.6f} | {peak:,} | {real:,} | {peak / real:.6f} "
            f"| {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
