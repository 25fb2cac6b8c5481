"""The command `surgery export`, which `surgery.cli` registers: parse, write and check, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from surgery.checkpoint import require_model, require_record
from surgery.cli_options import BASE, FOLDER, JSON, OUT, OVERWRITE
from surgery.errors import RequestError
from surgery.lookup import EXPORTERS
from surgery.terminal import show


@click.command("export")
@click.argument("adapters", type=FOLDER, nargs=-1, metavar="[ADAPTER]...")
@click.option("--merge", is_flag=True, help="Write the trained columns into a dense checkpoint.")
@OUT
@click.option(
    "--format",
    "format_",
    default="safetensors",
    show_default=True,
    help=f"One of {', '.join(EXPORTERS)}; peft-paca is PEFT's own PaCA.",
)
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    help="keep, fp32, bf16 or fp16: cast after the merge; with --format onnx what the graph computes in.",
)
@click.option("--opset", type=int, help="With --format onnx: the version of ONNX's operators, 20 or newer.")
@click.option("--onnx-data", help="With --format onnx: safetensors (weights are not copied) or copy (model.onnx_data).")
@click.option("--max-shard-size", help="Cut files anew, e.g. 5GB. Default: the base's own files.")
@click.option(
    "--merge-base",
    help="Of a quantized base: write the columns into the original base, or the dequantized one. Default: original.",
)
@click.option("--no-verify", is_flag=True, help="Leave out the check of what was written.")
@click.option("--prompt", "prompts", multiple=True, help="A prompt for the numeric check; repeatable.")
@BASE
@OVERWRITE
@JSON
def export_command(
    adapters: tuple[Path, ...],
    *,
    merge: bool,
    out: Path | None,
    format_: str,
    dtype: str,
    opset: int | None,
    onnx_data: str | None,
    max_shard_size: str | None,
    merge_base: str | None,
    no_verify: bool,
    prompts: tuple[str, ...],
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export ADAPTER: a dense checkpoint (--merge), with ONNX graphs, a LoRA adapter or a model with its side network.

    Without ADAPTER: the folder we are in, or the only adapter in it. The output is `<adapter>-merged` (or with another
    format's name) unless -o says otherwise, and appears only after its check held. --format onnx also takes a model
    as it is: a checkpoint, or a merged folder. Several adapters of one base become one checkpoint where their columns
    do not overlap.

    \b
    surgery export model-paca/ --merge
    surgery export model-paca/ --merge -o out/ --max-shard-size 5GB
    surgery export model-paca/ --merge --merge-base dequantized
    surgery export model-paca/ --merge --format onnx
    surgery export model/ --format onnx
    surgery export model-paca/ --format lora
    surgery export model-paca/ --format peft-paca
    surgery export law-paca/ code-paca/ --merge -o both/
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    adapter = adapters[0] if len(adapters) == 1 else None
    if adapter and format_ == "onnx":
        require_model(str(adapter))
    for folder in () if adapter and format_ == "onnx" else adapters:
        require_record(folder)
    from surgery import show as showing
    from surgery import workflow

    settings: dict[str, Any] = {
        "dtype": dtype, "max_shard_size": max_shard_size, "overwrite": overwrite, "check": not no_verify,
        "opset": opset, "onnx_data": onnx_data,
    }  # fmt: skip
    if adapter and format_ == "onnx" and workflow.is_checkpoint(adapter):
        given = [name for name, value in (("--merge", merge), ("--base", base), ("--prompt", prompts),
                                          ("--merge-base", merge_base)) if value]  # fmt: skip
        if given:
            raise RequestError(str(adapter), f"{given[0]} with a model", expected=f"an adapter, or no {given[0]}")
        result = workflow.export_checkpoint(str(adapter), out, **settings)
    else:
        folders = adapters or (workflow.find_adapter(None),)
        for folder in folders:
            workflow.require_merge(folder, format_, is_asked=merge)
        settings |= {"merge_base": merge_base, "prompts": prompts}
        result = workflow.export(folders, out, format=format_, base=base, **settings)
    show(showing.export_lines(result), result, as_json=as_json)
