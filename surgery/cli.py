"""The command line: parse, one library call, print.

Results go to standard output, as text or with --json as one document; all else goes to standard error.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click
from click.core import ParameterSource

from surgery import ranks
from surgery.checkpoint import require_folder, require_model, require_record
from surgery.cli_bench import bench_command
from surgery.cli_eval import eval_command
from surgery.cli_generate import generate_command
from surgery.cli_import import import_command
from surgery.cli_plan import plan_command
from surgery.cli_recipes import recipes_command
from surgery.cli_report import report_command
from surgery.errors import InterruptedRunError, RequestError, SurgeryError, shorten
from surgery.terminal import hush_libraries, say, show

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=HELP)
@click.version_option(package_name="checkpoint-surgery", prog_name="surgery")
@click.option("-v", "--verbose", is_flag=True, help="Show a traceback where something fails.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks on standard error.")
@click.pass_context
def cli(context: click.Context, *, verbose: bool, quiet: bool) -> None:
    """Train a few columns of a checkpoint's frozen weights, and merge them exactly.

    \b
    surgery apply model/             plan the surgery: which layers, which columns
    surgery train model-paca/ --data train.jsonl
    surgery export model-paca/ --merge
    surgery verify model-paca-merged/
    """
    context.obj = {"verbose": verbose, "quiet": quiet}
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options under one name, for what commands share."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace a folder that surgery made.")
BASE = click.option("--base", help="The base's folder or hub id, where it is not where it was.")
OUT = click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to write.")
FOLDER = click.Path(path_type=Path)
TASK = options(
    click.option(
        "--task",
        default="",
        help="causal-lm, seq2seq, sequence-classification, token-classification, "
        "regression or image-classification. Default: the checkpoint's own.",
    ),
    click.option("--labels", default="", help="Class names, separated by commas. Default: those of the data."),
)


def enter_environment(section: Any) -> None:
    """Start over where a device needs variables that torch reads when it is imported: by now it has been.

    section: the train section of a recipe. Raises: UnsupportedError.
    """
    from surgery.lookup import backend_of

    missing = backend_of(section.device).environment(section)
    if missing:
        os.environ.update(missing)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  this very command


def split_list(values: Sequence[str]) -> tuple[str, ...]:
    """Repeated options and comma-separated lists as one tuple; a `re:` pattern keeps its commas."""
    parts: list[str] = []
    for value in values:
        parts += [value] if value.startswith("re:") else [part.strip() for part in value.split(",")]
    return tuple(part for part in parts if part)


def parse_rank_pattern(values: Sequence[str]) -> dict[str, int]:
    """`pattern=rank` pairs. Raises: RequestError."""
    pairs = {}
    for value in values:
        pattern, _, rank = value.rpartition("=")
        if not pattern or not rank.isdigit():
            raise RequestError("--rank-pattern", repr(value), expected="PATTERN=RANK, such as 'mlp.*=8'")
        pairs[pattern] = int(rank)
    return pairs


def split_launcher(texts: Sequence[str], nproc: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The settings, and what follows `--`, with it: click leaves that out, but no setting begins with a dash.

    Raises: RequestError for a launcher's arguments without a launcher.
    """
    cut = next((number for number, text in enumerate(texts) if text.startswith("-")), len(texts))
    launcher = ("--", *texts[cut:]) if texts[cut:] else ()
    if launcher and nproc is None:
        found = f"{texts[cut]!r} after `--`, which is a launcher's"
        raise RequestError("train", found, expected="--nproc", fix="Say how many processes to launch")
    return tuple(texts[:cut]), launcher


def given_arguments(*leave_out: str) -> list[str]:
    """The running command's arguments and options as they were given, to give them to another process."""
    context = click.get_current_context()
    flags = {"verbose": "-v", "quiet": "-q"}
    given = [flag for name, flag in flags.items() if context.find_root().obj[name]]
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name in leave_out:
            continue
        value, option = context.params[name], parameter.opts[-1]
        if not isinstance(parameter, click.Option):
            given.append(str(value))
        elif parameter.is_flag:
            given.append(option)
        else:
            given += [f"{option}={item}" for item in (value if parameter.multiple else [value])]
    return given


def _list(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    return split_list(values)


def _ranks(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    return parse_rank_pattern(values)


def _pairs(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in split_list(values)]
    if wrong := next((name for name, equals, column in pairs if not (name and equals and column)), None):
        raise RequestError("--calibration-columns", repr(wrong), expected="ROLE=COLUMN, such as text=0")
    return {name: column for name, _, column in pairs}


# Options of methods have no defaults here: those are the spec's, and what was not given is not passed on.
PACA_OPTIONS = options(
    click.option("-r", "--rank", type=int, help="paca: input columns to train in each layer. Default: 16."),
    click.option(
        "--targets",
        multiple=True,
        callback=_list,
        help="paca: layers, as all-linear (the default), all-conv, experts, names, globs or re:PATTERN; separated by "
        "commas; repeatable.",
    ),
    click.option("--exclude", multiple=True, callback=_list, help="paca: layers to leave out, in the same way."),
    click.option(
        "--rank-pattern",
        multiple=True,
        metavar="PATTERN=RANK",
        callback=_ranks,
        help="paca: another rank for some layers; the last wins.",
    ),
    click.option(
        "--alpha", type=float, help="paca: scale the update by alpha / rank in training. Default: no scaling."
    ),
    click.option(
        "--rows",
        multiple=True,
        callback=_list,
        help="paca: tokens, or numbers as id:7, whose rows of the input embedding train; commas separate; repeatable.",
    ),
    click.option(
        "--select",
        help="paca: random, magnitude, lowrank, activation, gradient, activation-gradient or file:PATH (JSON, or an "
        "adapter). Default: random.",
    ),
    click.option("--budget", help="paca: in place of a rank, so many values or a part of the layers', such as 0.5%."),
    click.option("--resample", help="paca: draw other columns every so many steps of training, as every:500."),
    click.option(
        "--calibration-data", multiple=True, help="paca: data to choose columns by, as for `train`; repeatable."
    ),
    click.option(
        "--calibration-columns",
        multiple=True,
        metavar="ROLE=COLUMN",
        callback=_pairs,
        help="paca: what their columns mean, such as text=0.",
    ),
    click.option("--calibration-rows", type=int, help="paca: how many rows, drawn by the seed. Default: 64."),
    click.option("--calibration-length", type=int, help="paca: tokens of each at most. Default: 512."),
    click.option(
        "--quantize",
        help="paca: hold the frozen base as nf4, nf4-double, fp4, fp4-double, int8, torchao-int8 or torchao-int4.",
    ),
    click.option(
        "--experts", help="paca: columns of a mixture's experts, shared by all or each its own. Default: shared."
    ),
)
READ_OPTIONS = options(
    click.option("--cell", help="read: gru, lstm or rnn. Default: gru."),
    click.option("--hidden", type=int, help="read: width of the side network. Default: 256."),
    click.option("--recurrent-layers", type=int, help="read: recurrent layers on each other. Default: 1."),
    click.option("--bidirectional", is_flag=True, default=None, help="read: run over the layers both ways."),
    click.option("--initial", help="read: first state, zero or (projected) embedding. Default: zero."),
    click.option("--reduce", help="read: last state over the layers, or their mean. Default: last."),
    click.option("--output-norm", is_flag=True, default=None, help="read: RMS norm of the correction."),
    click.option("--scale", type=float, help="read: factor of the correction. Default: 1."),
    click.option("--layers", help="read: all, every:2, last:6 or numbers such as 0,3,5. Default: all."),
    click.option("--stacks", help="read: encoder, decoder or both, of an encoder-decoder. Default: both."),
    click.option("--joiner", help="read: attention, mean or none, from encoder to decoder. Default: attention."),
    click.option("--pooling", help="read: first, mean or last state for a classifier. Default: its class's own."),
)


@cli.command()
@click.argument("model")
@click.option("--method", default="paca", show_default=True, help="The method of surgery: paca or read.")
@OUT
@PACA_OPTIONS
@READ_OPTIONS
@click.option("--seed", type=int, help="With a layer's name it decides what is drawn at random. Default: 0.")
@TASK
@click.option("--plan", "plan_only", is_flag=True, help="Print what would be done, and touch nothing.")
@OVERWRITE
@JSON
def apply(
    model: str,
    *,
    method: str,
    out: Path | None,
    task: str,
    labels: str,
    plan_only: bool,
    overwrite: bool,
    as_json: bool,
    **settings: Any,  # the methods' options: which of them a method has, its spec says
) -> None:
    """Plan a surgery on MODEL (a folder or a hub id) and write a fresh adapter folder.

    \b
    surgery apply model/
    surgery apply model/ -r 32 --targets 'q_proj,v_proj' --rank-pattern 'v_proj=8'
    surgery apply convnext/ --targets 'all-conv,all-linear'
    surgery apply model/ --targets embed_tokens --rows '<think>,</think>'
    surgery apply model/ --select gradient --calibration-data train.jsonl --budget 0.5%
    surgery apply model/ --resample every:500
    surgery apply model/ -r 64 --quantize nf4
    surgery apply model/ --targets all-linear,experts --experts own
    surgery apply model/ --method read --hidden 64 --layers every:2
    surgery apply model/ --plan
    """
    require_model(model)
    from surgery import operate, table, workflow
    from surgery import show as showing
    from surgery.adapter import find_model
    from surgery.checkpoint import Checkpoint
    from surgery.planning import make_spec
    from surgery.survey import TaskSpec

    given = {name: value for name, value in settings.items() if value is not None and value not in ((), {})}
    if {"rank", "budget"} <= set(given):
        raise RequestError("--budget", "given with --rank", expected="one of the two")
    spec = make_spec(method, given)
    wanted = TaskSpec(task, split_list([labels]))
    folder = out or workflow.default_adapter_folder(model, method)
    if plan_only:
        checkpoint = Checkpoint.open(find_model(model)[0])
        plan = operate.plan_in_full(checkpoint, spec, wanted)
        need, step = showing.needs(checkpoint, plan), showing.step_memory(checkpoint, plan)
        lines = [*table.plan_lines(plan), "", *showing.need_lines(checkpoint, plan), *step.lines]
        show(lines, {"plan": plan.to_dict(), "need": need, "step_memory": step.document}, as_json=as_json)
        return
    adapter = operate.apply(model, folder, spec, task=wanted, overwrite=overwrite)
    next_step = f"surgery train {shlex.quote(str(folder))} --data FILE"
    lines = [*table.plan_lines(adapter.plan), "", f"Wrote {folder}. Next: {next_step}"]
    show(lines, {"adapter": str(folder), "plan": adapter.plan.to_dict()}, as_json=as_json)


@cli.command()
@click.argument("adapter", type=FOLDER)
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--data",
    multiple=True,
    help="Training data: JSONL, CSV, TSV, parquet, text, a folder of images or a dataset id; repeatable.",
)
@click.option("--eval-data", multiple=True, help="Data to evaluate on, in the same way.")
@TASK
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "hpu"]), help="Default: auto.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "no"]),
    default="no",
    show_default=True,
    help="auto: go on from the last checkpoint; a finished run is left alone.",
)
@click.option("--cache-features", help="read: a folder for the backbone's states; later epochs read them from there.")
@click.option("--cache-bytes", help="read: what the states may take, for example 20GB.")
@click.option("--lean", is_flag=True, default=None, help="With lean blocks: norms, gates and loss keep the least.")
@click.option("-c", "--config", type=click.Path(path_type=Path), help="A recipe whose data and train sections hold.")
@click.option("--nproc", type=int, help="Processes on this machine, a device each; torchrun's own options follow `--`.")
@BASE
@click.option("--overwrite", is_flag=True, help="Throw the checkpoints of an interrupted run away.")
@JSON
def train(
    adapter: Path,
    settings: tuple[str, ...],
    *,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    task: str,
    labels: str,
    device: str | None,
    resume: str,
    cache_features: str | None,
    cache_bytes: str | None,
    lean: bool | None,
    config: Path | None,
    nproc: int | None,
    base: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train ADAPTER (made by `apply`) in place.

    Settings are the keys of a recipe's data and train sections: `surgery settings` lists them.

    \b
    surgery train model-paca/ --data train.jsonl --eval-data eval.jsonl learning_rate=1e-3 epochs=2
    surgery train model-paca/ --data sst2.tsv --task sequence-classification
    surgery train model-paca/ --data train.jsonl --resume auto
    surgery train model-paca/ --data train.jsonl --nproc 4 strategy=fsdp2
    """
    require_record(adapter)
    settings, launcher = split_launcher(settings, nproc)
    from surgery import recipe as recipes
    from surgery import show as showing
    from surgery.adapter import open_adapter
    from surgery.report.curve import draw_curve
    from surgery.survey import TaskSpec
    from surgery.train import launch
    from surgery.train import train as run_training

    document: dict[str, Any] = {"model": str(adapter)}
    own = list(settings)
    if config:
        switches, own = recipes.split_switches(settings)
        loaded = recipes.read_recipe(config, [f"{key}={value}" for key, value in switches.items()])
        document |= {"data": loaded.data.model_dump(), "train": loaded.train.model_dump()}
        task, labels = task or loaded.task, labels or ",".join(loaded.labels)
    flags = {"data.train": list(data), "data.eval": list(eval_data), "train.device": device}
    flags |= {"train.cache_features": cache_features, "train.cache_bytes": cache_bytes, "train.lean": lean}
    for key, value in flags.items():
        if value not in (None, []):
            section, name = key.split(".")
            document.setdefault(section, {})[name] = value
    for text in own:
        recipes.apply_override(document, text)
    recipe = recipes.check(recipes.Recipe, document, "settings")
    enter_environment(recipe.train)
    if nproc is not None:
        sys.exit(launch([*given_arguments("nproc", "settings"), *settings, *launcher], recipe.train, nproc))
    result = run_training(
        adapter,
        recipe.data,
        recipe.train,
        task=TaskSpec(task, split_list([labels])),
        base=base,
        resume=resume,
        overwrite=overwrite,
    )
    if not ranks.is_main() or ranks.NO_RESULT in os.environ:
        return
    way = "--merge" if open_adapter(adapter).plan.targets else "--format remote-code"
    lines = [
        *showing.result_lines(result),
        draw_curve(adapter),
        "",
        f"Next: surgery export {shlex.quote(str(adapter))} {way}",
    ]
    show(lines, result, as_json=as_json)


@cli.command()
@click.argument("adapters", type=FOLDER, nargs=-1, metavar="[ADAPTER]...")
@click.option("--merge", is_flag=True, help="Write the trained columns into a dense checkpoint.")
@OUT
@click.option(
    "--format",
    "format_",
    default="safetensors",
    show_default=True,
    help="safetensors, onnx, lora, peft-paca (PEFT's own PaCA) or remote-code.",
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
def export(
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
    """
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


@cli.command()
@click.argument("merged", type=FOLDER)
@click.option(
    "--adapter",
    "adapters",
    type=FOLDER,
    multiple=True,
    help="The adapter's folder, where it is not where it was; of several all of them.",
)
@BASE
@click.option("--prompt", "prompts", multiple=True, help="A prompt for the numeric check; repeatable.")
@click.option("--no-numeric", is_flag=True, help="Compare bytes only; do not run the models.")
@JSON
def verify(
    merged: Path,
    *,
    adapters: tuple[Path, ...],
    base: str | None,
    prompts: tuple[str, ...],
    no_numeric: bool,
    as_json: bool,
) -> None:
    """Check that MERGED is its base with the trained columns, and nothing else. Exit code 3 where it is not.

    \b
    surgery verify model-paca-merged/
    """
    require_record(merged)
    from surgery.verify import verify as run_checks

    result = run_checks(merged, adapter=adapters, base=base, prompts=prompts, numeric=not no_numeric)
    show(result.lines(), result, as_json=as_json)


@cli.command()
@click.argument("onnx", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@BASE
@OVERWRITE
@JSON
def patch(onnx: Path, adapter: Path, *, out: Path, base: str | None, overwrite: bool, as_json: bool) -> None:
    """Bring the columns of ADAPTER into ONNX, a file that exists already, whoever exported it.

    Weights are recognised by what they hold: as they are, transposed, packed or renamed. Only what training changed is
    rewritten, in a copy.

    \b
    surgery patch theirs/model.onnx model-paca/ -o patched/
    """
    require_record(adapter)
    from surgery import workflow

    result = workflow.patch(onnx, adapter, out, base=base, overwrite=overwrite)
    count = sum(len(blocks) for blocks in result.blocks.values())
    lines = [f"Wrote {result.onnx}: {count} trained weights in {len(result.blocks)} of its tensors, checked."]
    lines += [f"note: {note}" for note in result.notes]
    show(lines, result, as_json=as_json)


@cli.command()
@click.argument("merged", type=FOLDER)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@JSON
def undo(merged: Path, *, out: Path, as_json: bool) -> None:
    """Give back the base that MERGED was made from, byte for byte.

    \b
    surgery undo model-paca-merged/ -o model-again/
    """
    require_record(merged)
    from surgery import workflow

    folder = workflow.undo(merged, out)
    show([f"Wrote {folder}: the base, byte for byte."], {"out": str(folder)}, as_json=as_json)


@cli.command()
@click.argument("path", type=FOLDER)
@JSON
def inspect(path: Path, *, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, an adapter or a merged folder.

    \b
    surgery inspect model-paca/
    """
    require_folder(path)
    from surgery import inspection

    result = inspection.inspect(path)
    show(result.lines(), result.to_dict(), as_json=as_json)


@cli.command()
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@JSON
def diff(a: Path, b: Path, *, as_json: bool) -> None:
    """Compare two checkpoints: which tensors and which columns differ, and by how much.

    \b
    surgery diff model/ model-paca-merged/
    """
    from surgery import compare

    result = compare.compare(a, b)
    show(result.lines(), result.to_dict(), as_json=as_json)


@cli.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nproc", type=int, help="Train in so many processes on this machine, a device each.")
@OVERWRITE
@JSON
def run(recipe: str, settings: tuple[str, ...], *, nproc: int | None, overwrite: bool, as_json: bool) -> None:
    """Carry out RECIPE, a YAML file: apply, train, export, verify. A finished step is not repeated.

    RECIPE may be the name of one that `surgery recipes list` shows; its outputs then lie below this folder.

    \b
    surgery run recipe.yaml
    surgery run recipe.yaml train.max_steps=50 paca.rank=8
    surgery run recipe.yaml --nproc 8 train.strategy=fsdp2
    surgery run papers/paca-mmlu variant=llama3-8b smoke=true
    """
    from surgery import library, workflow
    from surgery import recipe as recipes
    from surgery import show as showing
    from surgery.report.curve import draw_curve

    path, outputs = library.locate(recipe)
    wanted = recipes.read_recipe(path, settings, outputs=outputs)
    enter_environment(wanted.train)
    result = workflow.run(wanted, overwrite=overwrite, nproc=nproc, say=say)
    show([*showing.run_lines(result), draw_curve(result.adapter)], result, as_json=as_json)


@cli.command()
@JSON
def doctor(*, as_json: bool) -> None:
    """Say what is usable here, what is missing, and why.

    \b
    surgery doctor
    """
    from surgery import doctor as examination

    report = examination.examine()
    show(report.lines(), report.to_dict(), as_json=as_json)


@cli.command()
@JSON
def settings(*, as_json: bool) -> None:
    """List every key of a recipe, with its default.

    \b
    surgery settings
    """
    from surgery import recipe as recipes

    rows = recipes.describe_keys()
    width = max(len(key) for key, _, _ in rows)
    value_width = max(len(default) for _, default, _ in rows)
    lines = [f"{key:{width}}  {default:{value_width}}  {text}".rstrip() for key, default, text in rows]
    show(lines, [{"key": key, "default": default, "help": text} for key, default, text in rows], as_json=as_json)


cli.add_command(bench_command)
cli.add_command(eval_command)
cli.add_command(generate_command)
cli.add_command(import_command)
cli.add_command(plan_command)
cli.add_command(recipes_command)
cli.add_command(report_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: run, turn every error into one line and its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: others may need the core
    hush_libraries()
    verbose = any(flag in arguments[:2] for flag in ("-v", "--verbose"))
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(args=arguments, prog_name="surgery", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _explain_usage(error)
        sys.exit(RequestError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(InterruptedRunError("surgery", "interrupted"), verbose=verbose)
    except _Stopped:
        _fail(InterruptedRunError("surgery", "stopped by SIGTERM"), verbose=verbose)
    except SurgeryError as error:
        _fail(error, verbose=verbose)
    except Exception as error:  # noqa: BLE001  the one place where the unexpected becomes one line
        _fail(_unexpected(error), verbose=verbose)


class _Stopped(BaseException):
    """A scheduler asked to stop. Like Ctrl-C it passes through whatever handles errors."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise _Stopped


def _explain_usage(error: click.ClickException) -> None:
    """One line, with the way to the help; the help itself for a command line that names no command."""
    text = error.format_message()
    if text.startswith("Usage:"):
        click.echo(text, err=True)
        return
    text = " ".join(text.split())
    context = error.ctx if isinstance(error, click.UsageError) else None
    name = context.command_path if context else "surgery"
    click.echo(f"Error: {name}: {text.rstrip('.?')}{'?' if text.endswith('?') else '.'} See `{name} --help`.", err=True)


def _unexpected(error: Exception) -> SurgeryError:
    text = shorten(str(error), 400) or type(error).__name__
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return SurgeryError("surgery", f"{kind}{text}", fix="surgery -v shows where")


def _fail(error: SurgeryError, *, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    if not ranks.hand_over(error):
        click.echo(f"Error: {error}", err=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
