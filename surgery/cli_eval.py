"""The command `surgery eval`, which `surgery.cli` registers: parse, score, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from surgery.checkpoint import require_model
from surgery.cli_options import BASE, JSON, parse_columns
from surgery.terminal import show


def _columns(_context: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    return parse_columns(option.opts[0], values, "sentence=3")


@click.command("eval")
@click.argument("model")
@click.option(
    "--task", required=True, help="mmlu, gsm8k, glue/NAME (cola, sst2, mrpc, ..), or lm-eval:NAME, by lm-eval."
)
@click.option("--data", multiple=True, help="The rows: JSONL, CSV, TSV, parquet or a dataset id; repeatable.")
@click.option("--shots-data", multiple=True, help="mmlu, gsm8k: rows of which solved examples are taken.")
@click.option("--shots", type=int, help="Solved examples before each question. Default: 5 with --shots-data, else 0.")
@click.option("--limit", type=int, help="Only so many rows, the first.")
@click.option("--column", "columns", multiple=True, metavar="ROLE=COLUMN", callback=_columns,
              help="A column of another name, or by number from 0 in a file without a header; repeatable.")  # fmt: skip
@click.option("--batch", type=int, help="Rows at once. Default: 8. Scores do not depend on it.")
@click.option("--max-new-tokens", type=int, help="gsm8k: how long an answer may be. Default: 256.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@BASE
@click.option(
    "--tasks-folder", type=click.Path(path_type=Path), help="lm-eval: a folder with YAML files of tasks of your own."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the result into this file, as JSON.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@JSON
def eval_command(model: str, *, out: Path | None, overwrite: bool, as_json: bool, **settings: Any) -> None:
    """Score MODEL on a benchmark: a checkpoint, an adapter, a merged folder, an ONNX folder or a hub id.

    \b
    surgery eval model/ --task mmlu --data val.jsonl --shots-data dev.jsonl
    surgery eval model-paca/ --task gsm8k --data test.jsonl --limit 100 -o gsm8k.json
    surgery eval classifier-onnx/ --task glue/sst2 --data nyu-mll/glue/sst2:validation
    surgery eval model-paca/ --task lm-eval:arc_easy --shots 5
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    require_model(model)
    from surgery.evals.run import evaluate
    from surgery.evals.task import EvalSpec
    from surgery.writing import replace_file, require_new_file

    if out is not None:
        require_new_file(out, overwrite=overwrite)
    result = evaluate(model, EvalSpec(**settings))
    if out is not None:
        replace_file(out, json.dumps(result.to_dict(), indent=2) + "\n")
    show([*result.lines(), *([f"Wrote {out}"] if out else [])], result.to_dict(), as_json=as_json)
