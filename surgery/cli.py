"""The command line: parse, one library call, print.

Results go to standard output, as text or with --json as one document; all else goes to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from surgery import ranks
from surgery.checkpoint import require_folder, require_record
from surgery.cli_apply import apply_command
from surgery.cli_bench import bench_command
from surgery.cli_eval import eval_command
from surgery.cli_export import export_command
from surgery.cli_generate import generate_command
from surgery.cli_import import import_command
from surgery.cli_options import BASE, FOLDER, JSON, OVERWRITE
from surgery.cli_plan import plan_command
from surgery.cli_recipes import recipes_command
from surgery.cli_report import report_command
from surgery.cli_train import enter_environment, train_command
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
    from surgery import show as showing
    from surgery.recipe_file import read_recipe
    from surgery.report.curve import draw_curve

    path, outputs = library.locate(recipe)
    wanted = read_recipe(path, settings, outputs=outputs)
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
    from surgery.recipe_keys import describe_keys

    rows = describe_keys()
    width = max(len(key) for key, _, _ in rows)
    value_width = max(len(default) for _, default, _ in rows)
    lines = [f"{key:{width}}  {default:{value_width}}  {text}".rstrip() for key, default, text in rows]
    show(lines, [{"key": key, "default": default, "help": text} for key, default, text in rows], as_json=as_json)


cli.add_command(apply_command)
cli.add_command(bench_command)
cli.add_command(eval_command)
cli.add_command(export_command)
cli.add_command(generate_command)
cli.add_command(import_command)
cli.add_command(plan_command)
cli.add_command(recipes_command)
cli.add_command(report_command)
cli.add_command(train_command)


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
    text = shorten(str(error), 400).rstrip(".") or type(error).__name__
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
