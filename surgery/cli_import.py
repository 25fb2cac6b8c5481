"""`surgery import`: another program's adapter as one of ours."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from surgery.checkpoint import require_folder
from surgery.cli_options import JSON, OVERWRITE, split_list
from surgery.terminal import show


@click.command("import")
@click.argument("peft", type=click.Path(path_type=Path))
@click.option("--base", help="The model it was trained on, a folder or hub id. Default: the one its config names.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="The folder to write. Default: PEFT-paca, beside it."
)
@click.option("--task", default="", help="The task, where neither its config nor the base's says it.")
@click.option("--labels", default="", help="Class names, separated by commas: PEFT's files do not hold them.")
@OVERWRITE
@JSON
def import_command(
    peft: Path, *, base: str | None, out: Path | None, task: str, labels: str, overwrite: bool, as_json: bool
) -> None:
    """Make an adapter folder of PEFT, the folder of an adapter that PEFT's own PaCA trained.

    It can be trained on, merged and verified as any other. Each layer keeps the columns that it has there.
    `surgery export ADAPTER --format peft-paca` is the way back.

    \b
    surgery import their-adapter/ --base model/
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    require_folder(peft)
    from surgery import table
    from surgery.peft_paca import import_peft
    from surgery.survey import TaskSpec
    from surgery.workflow import default_adapter_folder

    wanted = TaskSpec(task, split_list([labels]))
    folder = out or default_adapter_folder(str(peft), "paca")
    result = import_peft(peft, folder, base=base, task=wanted, overwrite=overwrite)
    lines = [*table.plan_lines(result.adapter.plan), "", f"Wrote {folder}.", *(f"note: {n}" for n in result.notes)]
    lines.append(f"Next: surgery export {shlex.quote(str(folder))} --merge")
    document = {"adapter": str(folder), "plan": result.adapter.plan.to_dict(), "notes": result.notes}
    show(lines, document, as_json=as_json)
