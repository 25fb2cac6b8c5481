"""The command `surgery plan`, which `surgery.cli` registers: parse, predict, print."""

from __future__ import annotations

from typing import Any

import click

from surgery.checkpoint import RECIPE_ENDINGS, require_model
from surgery.cli_options import JSON, LEAN
from surgery.errors import RequestError
from surgery.terminal import show

KEYS = {  # of a recipe, by option
    "batch": "train.batch_size",
    "sequence": "data.max_length",
    "precision": "train.precision",
    "task": "task",
    "rank": "paca.rank",
    "checkpointing": "train.gradient_checkpointing",
    "lean": "train.lean",
}


@click.command("plan")
@click.argument("path")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--method", default="", help="paca, read, lora (PEFT's, on paca's layers and rank) or full. Default: paca."
)
@click.option("-r", "--rank", type=int, help="paca and lora: the rank. Default: 16.")
@click.option("--batch", type=int, help="Sequences of one forward on each device. Default: 8.")
@click.option("--sequence", type=int, help="Tokens of a sequence. Default: 1024, or the model's positions.")
@click.option(
    "--target-sequence", "target", type=int, default=0, help="Tokens of an encoder-decoder's output. Default: the same."
)
@click.option(
    "--padded/--packed",
    default=None,
    help="Rows differ in length, so that attention gets a mask, or do not. Default: as the data or the task has it.",
)
@click.option("--dtype", default="", help="Weights in fp32, bf16 or fp16. Default: the checkpoint's.")
@click.option("--precision", help="auto, fp32, bf16 or fp16, as in a recipe. Default: auto.")
@click.option("--checkpointing", is_flag=True, default=None, help="With gradient checkpointing.")
@LEAN
@click.option("--device", default="", help="cpu or cuda, which need not be here. Default: what is here.")
@click.option("--devices", type=int, default=1, show_default=True, help="How many of them.")
@click.option(
    "--sharding", default="", help="ddp, fsdp2 (full shard), zero2 or zero3. Default: ddp, of one device none."
)
@click.option("--fit", help="What a device has, e.g. 80GB: whether the run fits, and the longest sequence that does.")
@click.option("--task", help="As in `surgery apply`. Default: the checkpoint's own.")
@JSON
def plan_command(path: str, *, settings: tuple[str, ...], fit: str | None, as_json: bool, **options: Any) -> None:
    """Predict the memory that training takes on each device, without weights: config.json is enough.

    PATH is a model (a folder or a hub id, of which config.json alone is fetched), an adapter or a recipe. Settings are
    a recipe's keys: `surgery settings` lists them.

    \b
    surgery plan model/ --device cuda --batch 2 --sequence 2048 --fit 80GB
    surgery plan model/ --method lora -r 8 --checkpointing
    surgery plan model/ --method read read.hidden=64 --devices 8 --sharding fsdp2
    surgery plan recipe.yaml --fit 24GB --json
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    if not path.endswith(RECIPE_ENDINGS):
        require_model(path)
    from surgery.forecast import Question, forecast, overrides
    from surgery.writing import parse_size

    try:
        fit_bytes = parse_size(fit) if fit is not None else None
    except ValueError as error:
        raise RequestError("--fit", str(error), expected="a size such as 80GB") from error
    given = overrides({key: options.pop(name) for name, key in KEYS.items()})
    question = Question(fit_bytes=fit_bytes, **options)
    found = forecast(path, question, (*settings, *given))
    show(found.lines(), found.to_dict(), as_json=as_json)
