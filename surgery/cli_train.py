"""The command `surgery train`, which `surgery.cli` registers: parse, train here or in several processes, print."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from surgery import ranks
from surgery.checkpoint import require_record
from surgery.cli_options import BASE, FOLDER, JSON, LEAN, TASK, split_list
from surgery.errors import RequestError
from surgery.terminal import show


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
            given.append(option if value else parameter.secondary_opts[-1])
        else:
            given += [f"{option}={item}" for item in (value if parameter.multiple else [value])]
    return given


def read_settings(adapter: Path, texts: Sequence[str], config: Path | None, flags: Mapping[str, Any]) -> Any:
    """The recipe that a command line asks for: that of `config` first, then the flags by key, then `key=value` texts.

    Raises: RecipeError.
    """
    from surgery.recipe import Recipe
    from surgery.recipe_file import read_recipe
    from surgery.recipe_keys import apply_override, check
    from surgery.recipe_variants import split_switches

    document: dict[str, Any] = {"model": str(adapter)}
    own = list(texts)
    if config:
        switches, own = split_switches(texts)
        loaded = read_recipe(config, [f"{key}={value}" for key, value in switches.items()])
        document |= loaded.model_dump(include={"data", "train", "task", "labels"})
    for key, value in flags.items():
        if value not in (None, []):
            section, name = key.split(".")
            document.setdefault(section, {})[name] = value
    for text in own:
        apply_override(document, text)
    return check(Recipe, document, "settings")


@click.command("train")
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
@LEAN
@click.option("-c", "--config", type=click.Path(path_type=Path), help="A recipe whose data and train sections hold.")
@click.option("--nproc", type=int, help="Processes on this machine, a device each; torchrun's own options follow `--`.")
@BASE
@click.option("--overwrite", is_flag=True, help="Throw the checkpoints of an interrupted run away.")
@JSON
def train_command(
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
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    require_record(adapter)
    settings, launcher = split_launcher(settings, nproc)
    from surgery import show as showing
    from surgery.adapter import open_adapter
    from surgery.report.curve import draw_curve
    from surgery.survey import TaskSpec
    from surgery.train import launch
    from surgery.train import train as run_training

    flags: dict[str, Any] = {"data.train": list(data), "data.eval": list(eval_data), "train.device": device}
    flags |= {"train.cache_features": cache_features, "train.cache_bytes": cache_bytes, "train.lean": lean}
    recipe = read_settings(adapter, settings, config, flags)
    wanted = TaskSpec(task or recipe.task, split_list([labels]) or tuple(recipe.labels))
    enter_environment(recipe.train)
    if nproc is not None:
        sys.exit(launch([*given_arguments("nproc", "settings"), *settings, *launcher], recipe.train, nproc))
    result = run_training(
        adapter,
        recipe.data,
        recipe.train,
        task=wanted,
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
