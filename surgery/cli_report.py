"""The command `surgery report`, which `surgery.cli` registers: parse, write the page, say where it is."""

from __future__ import annotations

from pathlib import Path

import click

from surgery.checkpoint import require_folder
from surgery.cli_options import JSON
from surgery.terminal import show


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_OR_BENCH...")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default="report.html", show_default=True, help="The file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@JSON
def report_command(folders: tuple[Path, ...], *, out: Path, overwrite: bool, as_json: bool) -> None:
    """Write one page, which needs nothing else, on training runs and benches; several are compared.

    A run is an adapter folder, or what was exported from one; a bench is a folder that `surgery bench` wrote.

    \b
    surgery report model-paca/
    surgery report model-paca/ model-read/ -o compared.html
    surgery report bench/ -o bench.html --overwrite
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    for folder in folders:
        require_folder(folder)
    from surgery.report.page import report
    from surgery.table import size_text

    page = report(folders, out, overwrite=overwrite)
    size = out.stat().st_size
    document = {"out": str(out), "size_bytes": size, "title": page.title, "sections": [s.title for s in page.sections]}
    show([f"Wrote {out}: {page.title}, {size_text(size)}"], document, as_json=as_json)
