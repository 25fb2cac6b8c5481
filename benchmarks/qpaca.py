"""QPaCA against QLoRA on one base in NF4: steps in turns, bytes kept, memory of weights, and what a merge changes.

    python benchmarks/qpaca.py                         # a random Llama-shaped model: time and bytes
    python benchmarks/qpaca.py --learn MODEL TEXT      # a trained model and a text: losses, and losses after merges

QLoRA is PEFT's LoRA on bitsandbytes' own layers, at the same rank, on the same layers, without dropout. Time and bytes
are `surgery bench --quantize nf4 --methods floor,paca,lora,paca:r=16,quantize=none` on a model of the right shape.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters import dense
from surgery import operate
from surgery.adapter import open_adapter
from surgery.bench import show
from surgery.bench.run import run
from surgery.bench.spec import make_spec
from surgery.checkpoint import Checkpoint
from surgery.compat import load_tokenizer
from surgery.methods.paca_spec import PacaSpec
from surgery.quantized_base import seen_weight

RANK, LAYERS = 16, 4
METHODS = ("floor", "paca", "lora", f"paca:r={RANK},quantize=none")


def make_base(folder: Path) -> None:
    """A random Llama of some 60 million values in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=2048, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(method: str, base: Path, work: Path, *, rank: int, dtype: torch.dtype | None) -> Any:
    """A base with qpaca or qlora on it, ready to train. `dtype`: of the dense base that is quantized."""
    if method == "qlora":
        return _qlora(base, rank, dtype)
    folder = work / f"{method}-{rank}"
    operate.apply(base, folder, PacaSpec(rank=rank, quantize="nf4"))
    return operate.load(folder, trainable=True).train()


def _qlora(base: Path, rank: int, dtype: torch.dtype | None) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype="auto")
    model.requires_grad_(requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def step_of(model: Any, ids: Tensor, rate: float = 1e-3) -> Callable[[], float]:
    """One forward, backward and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

    def step(batch: Tensor = ids) -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure_steps(batch: int, tokens: int, rounds: int) -> None:
    """Step time in turns, bytes kept and the weights' memory, by `surgery bench`."""
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        make_base(base)
        given = {"model": str(base), "methods": list(METHODS), "quantize": "nf4", "rank": RANK, "device": "cpu"}
        spec = make_spec({**given, "batch": batch, "sequence": tokens, "rounds": rounds, "warmup": 1})
        results = run(spec, Path(temporary) / "bench", say=lambda _text: None)
    print("\n".join(show.lines(results)))


# --- a small real task


@torch.no_grad()
def held_out(model: Any, blocks: Tensor) -> float:
    """The mean loss of blocks (n, t). Nothing drops out; in eval mode bitsandbytes repacks its weights on some CPUs."""
    model.train()
    losses = [float(model(input_ids=b, labels=b, use_cache=False).loss) for b in blocks.split(16)]
    return statistics.mean(losses)


def learn(base: Path, text: Path, *, steps: int, seeds: int, rank: int, rates: dict[str, float]) -> None:
    """Train on the first nine tenths of a text, and say the loss on the rest: of what trained, and of its merges."""
    tokenizer = load_tokenizer(base)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:600_000], verbose=False)["input_ids"])
    blocks = ids[: len(ids) // 128 * 128].view(-1, 128)
    cut = len(blocks) * 9 // 10
    train, rest = blocks[:cut], blocks[cut : cut + 64]
    for seed in range(seeds):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        for name in ("qpaca", "qlora"):
            with tempfile.TemporaryDirectory() as temporary:
                work = Path(temporary)
                torch.manual_seed(seed)
                model = load(name, base, work, rank=rank, dtype=torch.float32)
                before, step = held_out(model, rest), step_of(model, train[:8], rates[name])
                model.train()
                for number in range(steps):
                    step(train[order[torch.arange(number * 8, number * 8 + 8) % len(train)]])
                said = f"{name} seed {seed}: {before:.4f} -> {held_out(model, rest):.4f}"
                print(said + (f"; {_merges(model, base, work, rest)}" if name == "qpaca" else ""), flush=True)
                del model, step
                gc.collect()


def _merges(model: Any, base: Path, work: Path, rest: Tensor) -> str:
    """The losses of both merges, as anyone loads them, and how far the weights are."""
    from transformers import AutoModelForCausalLM

    adapter = operate.save(model, work / "trained", base=base)
    found = []
    for merge_base in ("original", "dequantized"):
        out = work / merge_base
        dense.export(open_adapter(work / "trained"), out, merge_base=merge_base)
        found.append(f"{merge_base} {held_out(AutoModelForCausalLM.from_pretrained(out, dtype='auto'), rest):.4f}")
    checkpoint, held = Checkpoint.open(base), adapter.plan.quantization
    assert held is not None
    weights = held.layers.values()
    pairs = [(checkpoint.read_tensor(w).float(), seen_weight(checkpoint, held, w).float()) for w in weights]
    error = (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5
    return f"merged: {', '.join(found)}; weights differ by {float(error):.2%} of their size"


def main() -> None:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learn", nargs=2, metavar=("MODEL", "TEXT"), type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs=2, type=float, default=(1e-2, 3e-3), help="QPaCA's and QLoRA's")
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    if given.learn:
        rates = dict(zip(("qpaca", "qlora"), given.rates, strict=True))
        learn(*given.learn, steps=given.steps, seeds=given.seeds, rank=given.rank, rates=rates)
    else:
        measure_steps(given.batch, given.tokens, given.rounds)


if __name__ == "__main__":
    main()
