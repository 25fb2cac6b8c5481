"""`export --merge` of a 2 GB bf16 checkpoint in two shards, beside a plain copy of its files and PEFT's merge.

    python benchmarks/merge.py [--rounds 5] [--folder build/merge] [--ways copy merge ..]

Every round runs each way once, in a process of its own, in an order that changes. Every process first imports all
modules that any of them needs: memory is the peak resident set above that, and the pause between one way's end and the
next one's start is the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

GIGABYTES = 2.0
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 14, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 32000}  # fmt: skip
WAYS = ("copy", "merge", "merge+verify", "peft")
IMPORTS = ("surgery.workflow", "surgery.verify", "exporters.dense", "peft")


def prepare(folder: Path) -> None:
    """A base of random weights, a PaCA adapter that moved, and a LoRA adapter of the same rank."""
    import transformers
    from peft import LoraConfig, get_peft_model

    import surgery

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size="1050MB")
    surgery.attach(model, surgery.PacaSpec(rank=16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("paca_delta"):
                parameter.copy_(torch.randn_like(parameter) * 0.01)
    surgery.save(model, folder / "adapter", base=folder / "base")
    surgery.detach(model, merge=False)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "lora")


def run_one(way: str, folder: Path) -> None:
    """One way, in this process: prints its seconds and peak memory as JSON."""
    for module in IMPORTS:
        __import__(module)
    baseline = peak_kilobytes()
    out = folder / f"out-{way}"
    started = time.perf_counter()
    if way == "copy":
        copy(folder / "base", out)
    elif way == "peft":
        merge_by_peft(folder, out)
    else:
        from surgery.workflow import export

        export(folder / "adapter", out, check=way == "merge+verify")
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "memory_mb": (peak_kilobytes() - baseline) * 1024 / 1e6}))


def peak_kilobytes() -> int:
    """The peak resident set since this program started; getrusage's figure would include the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def copy(base: Path, out: Path) -> None:
    """A plain copy, forced to disk."""
    out.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, out / path.name)
        descriptor = os.open(out / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def merge_by_peft(folder: Path, out: Path) -> None:
    """PEFT's documented way."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    PeftModel.from_pretrained(model, folder / "lora").merge_and_unload().save_pretrained(out)
    os.sync()


def main() -> None:
    """Prepare once, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/merge"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.folder)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / "lora").exists():
        prepare(arguments.folder)
    size = sum(path.stat().st_size for path in (arguments.folder / "base").glob("*.safetensors"))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for way in order.sample(arguments.ways, len(arguments.ways)):
            command = [sys.executable, __file__, "--one", way, "--folder", str(arguments.folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way].append(json.loads(output.splitlines()[-1]))
            shutil.rmtree(arguments.folder / f"out-{way}")
    print(f"{size / 1e9:.2f} GB of weights, {arguments.rounds} rounds")
    print(f"{'way':14} {'median s':>9} {'to the copy':>24} {'memory above imports':>21}")
    copies = [entry["seconds"] for entry in found["copy"]]
    for way, entries in found.items():
        seconds = [entry["seconds"] for entry in entries]
        ratios = sorted(ours / theirs for ours, theirs in zip(seconds, copies, strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        memory = max(entry["memory_mb"] for entry in entries)
        print(f"{way:14} {statistics.median(seconds):>9.2f} {spread:>24} {memory:>18.0f} MB")


if __name__ == "__main__":
    main()
