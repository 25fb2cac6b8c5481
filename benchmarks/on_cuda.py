"""A training step of each method on a Llama of 8 billion values on CUDA: time, peak memory, longest sequence in 80 GB.

    python benchmarks/on_cuda.py --json cuda.json          under nine minutes on an H200; prints a Markdown table
    python benchmarks/on_cuda.py --small                   the script itself, on a CPU: a tiny model, no memory figures

Weights are random and drawn on the device; all computes in bf16 under autocast, as the trainer does, attention sdpa,
AdamW fused. The methods hold equal weights and take turns step by step, but for full tuning, which has the device for
itself. Memory is measured with one method on the device. `lora` has its adapters in bf16, the leanest; `lora-fp32` is
what PEFT gives without being asked; `full` has weights, gradients and moments in bf16. The floor is a frozen forward
with input gradients, and has no optimizer.

It is not called cuda.py: NVIDIA has a package of that name, which torch imports where it finds it.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from step import SHAPES, as_floor, as_full, as_paca, optimizer_of, ratio
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.bench.measure import release, wait
from surgery.compat import keep_inputs_frozen, set_checkpointing

TURNS, ALONE = ("floor", "paca", "lora", "lora-fp32"), ("full",)
T = TypeVar("T")
GRANULE_TOKENS, MAX_TRIES = 512, 6


def as_lora(model: Any, rank: int, *, fp32: bool = False) -> Any:
    """PEFT's LoRA on all linear layers, without dropout. fp32: adapters in fp32, PEFT's default beside 16 bits."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=fp32)


METHODS: Mapping[str, Callable[[Any, int], Any]] = {
    "floor": as_floor,
    "paca": as_paca,
    "lora": as_lora,
    "lora-fp32": lambda model, rank: as_lora(model, rank, fp32=True),
    "full": as_full,
}


@dataclass
class Row:
    """One method with or without gradient checkpointing. None: not measured; `note` says why."""

    method: str
    checkpointing: bool
    trained: int | None = None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    longest_tokens: int | None = None
    note: str = ""


@dataclass
class Setup:
    """A model with its optimizer, and what a step of it needs."""

    model: Any
    optimizer: torch.optim.Optimizer | None
    device: str

    def step(self, batch: int, tokens: int) -> float:
        """One training step on random tokens: its seconds."""
        ids = torch.randint(0, self.model.config.vocab_size, (batch, tokens), device=self.device)
        wait(self.device)
        started = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16) if self.device == "cuda" else nullcontext():
            loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        wait(self.device)
        return time.perf_counter() - started

    def checkpoint(self, *, enable: bool) -> None:
        """Gradient checkpointing on or off, without a gradient of the embeddings that only the reentrant kind needs."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        set_checkpointing(model, on=enable)
        keep_inputs_frozen(model)


def build(arguments: argparse.Namespace, method: str) -> Setup:
    """A method's model, drawn on the device. All have the same weights."""
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(arguments.device):
            config = LlamaConfig(**SHAPES[arguments.shape], attn_implementation="sdpa", use_cache=False)
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model = METHODS[method](base, arguments.rank).train()
    if arguments.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=base)
    if arguments.compile:
        model.compile()
    return Setup(model, optimizer_of(model), arguments.device)


# --- time


def time_in_turns(arguments: argparse.Namespace, names: tuple[str, ...], rows: Mapping[tuple[str, bool], Row]) -> None:
    """Seconds of each method's steps, in an order that changes every round. A method that does not fit is left out."""
    setups: dict[str, Setup] = {}
    for name in names:
        setup = attempt(functools.partial(build, arguments, name))
        if setup is None:
            rows[name, False].note = rows[name, True].note = f"does not fit {arguments.device_name}"
        else:
            setups[name] = setup
    order = random.Random(0)
    for checkpointing in (False, True):
        going = dict(setups)
        for setup in going.values():
            setup.checkpoint(enable=checkpointing)
        for number in range(arguments.warmup + arguments.rounds):
            for name in order.sample(list(going), len(going)):
                row = rows[name, checkpointing]
                seconds = attempt(functools.partial(going[name].step, arguments.batch, arguments.tokens))
                if seconds is None:
                    row.note, row.seconds = f"does not fit {arguments.device_name}", []
                    del going[name]
                elif number >= arguments.warmup:
                    row.seconds.append(seconds)
                row.trained = sum(p.numel() for p in setups[name].model.parameters() if p.requires_grad)
    setups.clear()
    release()


def attempt(run: Callable[[], T]) -> T | None:
    """What it returns, or None where the memory did not suffice; what was taken in vain is given back."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        pass
    release()  # here, where the error no longer holds the frames
    return None


# --- memory


def longest(fits: Callable[[int], bool], guess: int, *, granule: int = GRANULE_TOKENS, tries: int = MAX_TRIES) -> int:
    """The largest multiple of `granule` that fits, or nearly: by steps away from the guess, then halving, in few tries.

    What is returned did fit (0: nothing did).
    """
    low, high, step = 0, 0, max(1, guess // granule // 16)
    probe = max(1, guess // granule)
    for _ in range(tries):
        if fits(probe * granule):
            low = probe
        else:
            high = probe
        if high and high - low <= 1:
            break
        if low and high:
            probe = (low + high) // 2
        else:
            probe = low + step if low else max(1, high - step)
            step *= 2
    return low * granule


def measure_memory(arguments: argparse.Namespace, name: str, rows: Mapping[tuple[str, bool], Row]) -> bool:
    """A method alone on the device: the peak of a step, and the longest sequence within the limit. Returns True."""
    setup = build(arguments, name)
    total = torch.cuda.get_device_properties(0).total_memory
    for checkpointing in (False, True):
        row = rows[name, checkpointing]
        setup.checkpoint(enable=checkpointing)
        peaks = [attempt(functools.partial(peak_of, setup, arguments.batch, arguments.tokens)) for _ in range(2)]
        row.peak_bytes = peaks[1]  # of the second step: the first one made the optimizer's state
        if total <= arguments.fit_bytes or arguments.is_late():
            row.note = row.note or ("the device is no larger" if total <= arguments.fit_bytes else "no time was left")
            continue
        torch.cuda.set_per_process_memory_fraction(arguments.fit_bytes / total)
        row.longest_tokens = longest(functools.partial(fits, setup), guess_tokens(setup, arguments))
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def peak_of(setup: Setup, batch: int, tokens: int) -> int:
    """The allocator's peak in one step."""
    torch.cuda.reset_peak_memory_stats()
    setup.step(batch, tokens)
    return int(torch.cuda.max_memory_allocated())


def fits(setup: Setup, tokens: int) -> bool:
    """Whether a step on one sequence stays within the limit that is set."""
    release()
    seconds = attempt(functools.partial(setup.step, 1, tokens))
    if seconds is None and setup.optimizer:
        setup.optimizer.zero_grad(set_to_none=True)
    release()
    return seconds is not None


def guess_tokens(setup: Setup, arguments: argparse.Namespace) -> int:
    """Where the limit lies if memory grows in proportion to the sequence: from the peaks at two short ones."""
    short, double = arguments.tokens // 2, arguments.tokens
    peaks: list[int] = []
    for tokens in (short, double):
        release()
        peak = attempt(functools.partial(peak_of, setup, 1, tokens))
        if peak is None:
            return short
        peaks.append(peak)
    slope = max((peaks[1] - peaks[0]) / (double - short), 1.0)
    return int(double + (0.97 * arguments.fit_bytes - peaks[1]) / slope)


# --- the report


def report(rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    """A Markdown table of all rows."""
    fit = f"longest in {arguments.fit_bytes / 1e9:.0f} GB, batch 1"
    lines = [
        f"| method | checkpointing | trained | step s (quartiles) | to the floor | peak GB | {fit} | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = next(r for r in rows if r.method == "floor" and r.checkpointing == row.checkpointing).seconds
        in_turns = row.method in TURNS and len(row.seconds) == len(floor) > 1
        alone = f"{statistics.median(row.seconds) / statistics.median(floor):.3f}" if row.seconds and floor else "-"
        lines.append(
            f"| {row.method} | {'yes' if row.checkpointing else 'no'} | {text(row.trained)} | {spread(row.seconds)} "
            f"| {ratio(row.seconds, floor) if in_turns else alone} "
            f"| {'-' if row.peak_bytes is None else f'{row.peak_bytes / 1e9:.1f}'} | {text(row.longest_tokens)} "
            f"| {row.note} |"
        )
    return lines


def text(number: int | None) -> str:
    """With thousands separated, or a dash."""
    return "-" if number is None else f"{number:,}"


def spread(seconds: list[float]) -> str:
    """Median and quartiles."""
    if len(seconds) < 2:
        return "-"
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle:.4f} ({low:.4f} to {high:.4f})"


def heading(arguments: argparse.Namespace) -> str:
    """What was measured, and where."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    extras = "".join(f", {name}" for name in ("compile", "liger") if getattr(arguments, name))
    sizes = f"{arguments.shape}, batch {arguments.batch} x {arguments.tokens} tokens, rank {arguments.rank}{extras}"
    return f"{sizes}; {arguments.device_name}; Python {platform.python_version()}, {packages}"


def run(arguments: argparse.Namespace) -> list[Row]:
    """All rows: times first, then memory, as long as there is time."""
    names = [name for name in (*TURNS, *ALONE) if name in arguments.methods]
    rows = {(name, checkpointing): Row(name, checkpointing) for checkpointing in (False, True) for name in names}
    time_in_turns(arguments, tuple(name for name in names if name in TURNS), rows)
    for name in (name for name in names if name in ALONE):
        time_in_turns(arguments, (name,), rows)
    for name in names if arguments.device == "cuda" else ():
        if arguments.is_late():
            for checkpointing in (False, True):
                rows[name, checkpointing].note = "no time was left for memory"
        elif not attempt(functools.partial(measure_memory, arguments, name, rows)):
            rows[name, False].note = rows[name, True].note = f"does not fit {arguments.device_name}"
        torch.cuda.set_per_process_memory_fraction(1.0)
        release()
    return list(rows.values())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what `--small` and the device decide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU: does the script run?")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--fit-bytes", type=float, default=80e9)
    parser.add_argument("--limit-seconds", type=float, default=450.0, help="start no measurement after so long")
    parser.add_argument("--compile", action="store_true", help="torch.compile every method's model")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels in every method's model")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    arguments = parser.parse_args(words)
    arguments.device = "cpu" if arguments.small else "cuda"
    if arguments.small:
        arguments.shape, arguments.tokens, arguments.rounds, arguments.warmup = "tiny", 32, 3, 1
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, expected one. --small tries the script on a CPU")
    arguments.device_name = platform.machine() if arguments.small else torch.cuda.get_device_name()
    end = time.monotonic() + arguments.limit_seconds
    arguments.is_late = lambda: time.monotonic() > end
    return arguments


def main() -> None:
    """Measure, print, and write the raw figures."""
    arguments = parse()
    title = heading(arguments)
    rows = run(arguments)
    print("\n".join([title, "", *report(rows, arguments)]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"what": title, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
