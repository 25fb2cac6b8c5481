"""The command `surgery apply`, which `surgery.cli` registers: parse, plan or carry out, print."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from surgery.checkpoint import require_model
from surgery.cli_options import JSON, OUT, OVERWRITE, TASK, options, parse_columns, parse_rank_pattern, split_list
from surgery.columns import FILE, STRATEGIES
from surgery.errors import RequestError
from surgery.terminal import show


def _list(_context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    found = split_list(values)
    if values and not found:
        raise _names_nothing(option.opts[-1])
    return found


def _names_nothing(option: str) -> RequestError:
    """A shell's variable that is not set would otherwise be as if the option had not been given."""
    return RequestError(option, "an empty text", expected="a value", fix="Leave the option out")


def _ranks(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    return parse_rank_pattern(values)


def _columns(_context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    return parse_columns(option.opts[-1], split_list(values), "text=0")


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
        help=f"paca: {', '.join(STRATEGIES)} or {FILE}PATH (JSON, or an adapter). Default: random.",
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
        callback=_columns,
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


@click.command("apply")
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
def apply_command(
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
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    require_model(model)
    from surgery import combinations, operate, table, workflow
    from surgery import show as showing
    from surgery.adapter import find_model
    from surgery.checkpoint import Checkpoint
    from surgery.planning import make_spec
    from surgery.survey import TaskSpec

    empty = next((name for name, value in settings.items() if value == ""), "")
    if empty:
        raise _names_nothing(f"--{empty.replace('_', '-')}")
    given = {name: value for name, value in settings.items() if value is not None and value not in ((), {})}
    said = {f"{method}.{name}": combinations.Said(value, is_asked=True) for name, value in given.items()}
    combinations.require(said)
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
