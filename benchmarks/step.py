"""One training step of PaCA beside the frozen floor and PEFT's LoRA, and what each keeps for backward.

    python benchmarks/step.py                       the figures of docs/performance.md
    python benchmarks/step.py --device cuda --shape llama-8b --dtype bf16 --batch 2 --tokens 2048
    python benchmarks/step.py --shape small --write small-llama     a folder for `surgery bench`: config.json alone
    python benchmarks/step.py --shape t5 --variants floor paca lean --processor-time     another family, lean and plain

The variants hold the same weights and take turns step by step, in an order that changes every round, so that a noisy
machine hurts all alike. The floor is a frozen forward with input gradients: what any method on a frozen model must do.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import surgery
from surgery.bench import methods
from surgery.bench.measure import saved_bytes, take_turns
from surgery.compat import set_checkpointing
from surgery.lean_pass import rewrite

BLOCK: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
}
SHAPES = {  # of Llamas
    "small": {**BLOCK, "num_key_value_heads": 12, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 256},
    "narrow": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
               "num_key_value_heads": 4, "vocab_size": 4096},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
FAMILIES = {
    "qwen3": {**BLOCK, "model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000},
    "mistral": {**BLOCK, "model_type": "mistral", "num_key_value_heads": 4, "vocab_size": 32000},
    "gemma2": {**BLOCK, "model_type": "gemma2", "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000},
    "mixtral": {**BLOCK, "model_type": "mixtral", "num_key_value_heads": 4, "intermediate_size": 1024,
                "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 32000},
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 4, "vocab_size": 32000},
    "bert": {**BLOCK, "model_type": "bert", "vocab_size": 32000},
    "t5": {"model_type": "t5", "d_model": 768, "d_ff": 2048, "d_kv": 64, "num_heads": 12, "num_layers": 3,
           "feed_forward_proj": "gated-gelu", "vocab_size": 32000, "decoder_start_token_id": 0},
}  # fmt: skip
CLASSES = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}  # others: a causal language model
NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout_rate", "hidden_dropout_prob",
              "attention_probs_dropout_prob")  # fmt: skip
HEADINGS = f"{'variant':8} {'trained':>12} {'median s':>9} {'to the floor':>24} {'saved bytes':>14} {'to floor':>9}"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def config_of(shape: str) -> Any:
    """A shape's configuration: a Llama's, where it names no other family."""
    sizes = {"model_type": "llama", **{**SHAPES, **FAMILIES}[shape]}
    config = AutoConfig.for_model(**sizes)
    for name in NO_DROPOUT:
        if name in config.to_dict():
            setattr(config, name, 0.0)
    return config


def build(shape: str, dtype: torch.dtype, device: str) -> Any:
    """A model of random weights, without dropout."""
    torch.manual_seed(0)
    config = config_of(shape)
    config.use_cache = False
    with torch.device(device):
        model = CLASSES.get(shape, AutoModelForCausalLM).from_config(config)
    return model.to(dtype)


def as_floor(model: Any, rank: int) -> Any:  # noqa: ARG001  every variant is made the same way
    """Frozen; the embeddings' output asks for a gradient, which then flows through every layer."""
    return methods.as_floor(model)


def as_paca(model: Any, rank: int) -> Any:
    """PaCA on all linear layers."""
    surgery.attach(model, surgery.PacaSpec(rank=rank))
    return model


def as_lora(model: Any, rank: int) -> Any:
    """PEFT's LoRA on the same layers, without dropout."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config)


def as_lean(model: Any, rank: int) -> Any:
    """PaCA, in lean blocks."""
    as_paca(model, rank)
    rewrite(model)
    return model


def as_lean_lora(model: Any, rank: int) -> Any:
    """PEFT's LoRA, in lean blocks."""
    wrapped = as_lora(model, rank)
    rewrite(wrapped)
    return wrapped


def as_full(model: Any, rank: int) -> Any:  # noqa: ARG001
    """All weights train."""
    return model


VARIANTS: dict[str, Callable[[Any, int], Any]] = {
    "floor": as_floor, "paca": as_paca, "lora": as_lora, "full": as_full, "lean": as_lean, "lean-lora": as_lean_lora,
}  # fmt: skip


def optimizer_of(model: Any) -> torch.optim.Optimizer | None:
    """Fused AdamW over what trains; none for the floor."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-4, fused=True) if trainable else None


def step(model: Any, optimizer: torch.optim.Optimizer | None, batch: Mapping[str, Tensor]) -> None:
    """Forward, backward, optimizer."""
    model(**batch).loss.backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(arguments: argparse.Namespace, *, checkpointing: bool) -> dict[str, Any]:
    """Seconds a step by variant, taking turns."""
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    base = build(arguments.shape, dtype, device)
    ids = torch.randint(0, base.config.vocab_size, (arguments.batch, arguments.tokens), device=device)
    batch = {"input_ids": ids, "labels": ids}
    models = {name: VARIANTS[name](copy.deepcopy(base), arguments.rank).train() for name in arguments.variants}
    del base
    kept = {name: saved_bytes(model, lambda one=model: one(**batch).loss) for name, model in models.items()}
    result: dict[str, Any] = {"saved_bytes": kept}
    for model in models.values():
        if checkpointing:
            set_checkpointing(model, on=True)
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    steps = {name: functools.partial(step, model, optimizers[name]) for name, model in models.items()}
    batches = itertools.repeat(batch, arguments.warmup + arguments.rounds)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    seconds = take_turns(steps, batches, warmup=arguments.warmup, device=device, clock=clock)
    result["seconds"] = seconds
    result["trained"] = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    return result


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Median and quartiles of the ratios round by round."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"


def report(result: dict[str, Any], title: str) -> list[str]:
    """The table of one measurement."""
    seconds = result["seconds"]
    lines = [title, HEADINGS]
    for name, times in seconds.items():
        saved = result["saved_bytes"][name]
        lines.append(
            f"{name:8} {result['trained'][name]:>12,} {statistics.median(times):>9.4f} "
            f"{ratio(times, seconds['floor']):>24} {saved:>14,} {saved / result['saved_bytes']['floor']:>9.3f}"
        )
    pairs = (("paca", "lora"), ("lean", "paca"), ("lean-lora", "lora"))
    for one, other in (pair for pair in pairs if set(pair) <= set(seconds)):
        lines.append(f"{one} to {other}: {ratio(seconds[one], seconds[other])}")
    return lines


def main() -> None:
    """Measure with and without gradient checkpointing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, *FAMILIES], default="small")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["floor", "paca", "lora"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--processor-time", action="store_true", help="CPU: seconds of this process, not of the clock")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    parser.add_argument("--write", type=Path, help="only write the shape's config.json to that folder")
    arguments = parser.parse_args()
    if arguments.write:
        config = config_of(arguments.shape)
        config.architectures = [type(build(arguments.shape, torch.float32, "meta")).__name__]
        config.save_pretrained(arguments.write)
        return
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    sizes = (
        f"{arguments.shape}, {arguments.dtype}, {arguments.batch} x {arguments.tokens} tokens, rank {arguments.rank}"
    )
    print(f"{sizes}, torch {torch.__version__}, {device}")
    raw = {}
    wanted = {"both": (False, True), "yes": (True,), "no": (False,)}[arguments.checkpointing]
    for checkpointing in wanted:
        raw[f"checkpointing={checkpointing}"] = result = measure(arguments, checkpointing=checkpointing)
        title = "with gradient checkpointing" if checkpointing else "without gradient checkpointing"
        print("\n".join(report(result, f"\n{title} (saved bytes are those without it)")))
    if arguments.json:
        arguments.json.write_text(json.dumps(raw, indent=2))


if __name__ == "__main__":
    main()
