"""The command `surgery bench`, which `surgery.cli` registers: parse, measure, print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from surgery.checkpoint import RECIPE_ENDINGS, require_model
from surgery.cli_options import JSON
from surgery.terminal import say, show


@click.command("bench")
@click.argument("model")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--methods",
    multiple=True,
    help="paca, read, lora, dora, miss, shira, prompt, bitfit, adapter, full, floor; with settings: paca:r=4, "
    "read:cell=lstm,hidden=64, lora:values=paca:r=16. Default: floor,paca,read,lora,full.",
)
@click.option("--data", multiple=True, help="Batches from these files, as in `surgery train`. Default: drawn tokens.")
@click.option("--eval-data", multiple=True, help="Train every method, and evaluate it on these.")
@click.option("--task", help="As in `surgery train`. Default: the checkpoint's own.")
@click.option("--labels", help="Class names, separated by commas. Default: those of the data.")
@click.option("--targets", multiple=True, help="Layers for every method, as in `surgery apply`. Default: all-linear.")
@click.option("--exclude", multiple=True, help="Layers to leave out.")
@click.option("--equal", help="rank: every method at -r; values: as many trained values as PaCA at -r. Default: rank.")
@click.option("-r", "--rank", type=int, help="The rank (bottleneck, number of prompt tokens). Default: 16.")
@click.option("--hidden", type=int, help="read: the width of its side network. Default: 64.")
@click.option("--batch", type=int, help="Sequences of a step. Default: 8.")
@click.option("--sequence", type=int, help="Tokens of a sequence; of data, at most. Default: 128.")
@click.option("--rounds", type=int, help="Measured steps of each method. Default: 15.")
@click.option("--warmup", type=int, help="Steps before them that do not count. Default: 3.")
@click.option("--fit", help="A memory, e.g. 80GB: the longest sequence that fits it, one at a time.")
@click.option("--checkpointing", is_flag=True, default=None, help="With gradient checkpointing.")
@click.option(
    "--lean",
    is_flag=True,
    default=None,
    help="Lean blocks under every method. Default: plain ones, whatever a training run would take.",
)
@click.option(
    "--quantize",
    help="Every method's base is held so while it is frozen, as in `surgery apply`; of one method: paca:quantize=nf4, "
    "full:quantize=none.",
)
@click.option("--dropout", type=float, help="For every method and the model. Default: 0.")
@click.option("--dtype", help="Weights in fp32, bf16 or fp16. Default: the checkpoint's.")
@click.option("--precision", help="auto, fp32 or bf16, as in a recipe. Default: auto.")
@click.option("--device", help="auto, cpu or cuda. Default: auto.")
@click.option("--threads", type=int, help="torch's threads on the CPU.")
@click.option("--seeds", type=int, help="Training runs of each method. Default: 3.")
@click.option("--steps", type=int, help="Steps of a training run. Default: one epoch.")
@click.option("--epochs", type=float, help="Instead of steps.")
@click.option("--lr", "rates", multiple=True, help="METHOD=RATE, or one RATE for all; repeatable.")
@click.option("--tune", help="Learning rates to try, separated by commas, on rows held out of the training set.")
@click.option("--tune-steps", type=int, help="Steps of each try. Default: as many as of a training run.")
@click.option("--metric", help="What rates are chosen by and the table shows. Default: the task's first, text's loss.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder for bench.json. Default: MODEL-bench.")
@click.option(
    "--resume", type=click.Choice(["auto", "no"]), default="no", show_default=True, help="auto: go on with --out."
)
@click.option("--overwrite", is_flag=True, help="Begin anew over an earlier bench.")
@JSON
def bench_command(
    model: str,
    *,
    settings: tuple[str, ...],
    out: Path | None,
    resume: str,
    overwrite: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure methods of fine-tuning side by side on MODEL: step time, memory, energy and, with data, what they learn.

    MODEL is a folder (config.json alone is enough for costs), a hub id, or a YAML file with a bench's keys. Settings
    are keys of a recipe's data section. All methods train the same layers, take turns step by step in one process,
    and see the same batches.

    \b
    surgery bench model/ --methods floor,paca,lora,full --batch 2 --sequence 512 --fit 80GB
    surgery bench model/ --methods paca:r=4,paca:r=16,lora:values=paca:r=16,read:cell=lstm,hidden=64
    surgery bench model/ --data train.jsonl --eval-data eval.jsonl --tune 1e-4,1e-3,1e-2 --steps 200
    surgery bench model/ --equal values --out run/ --resume auto
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    if not model.endswith(RECIPE_ENDINGS):
        require_model(model)
    from surgery.bench import run as running
    from surgery.bench.show import lines
    from surgery.bench.spec import read_spec

    options = {name: value for name, value in given.items() if value not in (None, ())}
    spec = read_spec(model, options, settings)
    stem = Path(model).with_suffix("") if model.endswith(RECIPE_ENDINGS) else model.rstrip("/")
    folder = out or Path(f"{stem}-bench")
    results = running.run(
        spec,
        folder,
        resume=resume == "auto",
        overwrite=overwrite,
        command=shlex.join(["surgery", *sys.argv[1:]]),
        say=say,
    )
    show([*lines(results), "", f"Wrote {folder}."], results.model_dump(), as_json=as_json)
