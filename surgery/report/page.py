"""One self-contained page: read what was asked for, put it together, write it whole.

The page fetches nothing, and its policy (Content-Security-Policy) forbids that it could: its script and its style sheet
are named by their digests, and charts are data. Names of models, files and metrics are text wherever they stand.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from surgery.bench.results import RESULTS_FILE, Results, read_results
from surgery.checkpoint import require_folder
from surgery.lookup import resolve
from surgery.manifest import versions
from surgery.report.bench_sections import bench_facts, bench_sections
from surgery.report.parts import Figure, Page, Section, Table, Text
from surgery.report.predicted import predicted_memory
from surgery.report.reading import Run, read_run
from surgery.report.run_sections import head_facts, run_sections
from surgery.writing import replace_file, require_new_file

BUNDLE = "surgery.report.drawing:bundle"


def report(folders: Sequence[Path], out: Path, *, overwrite: bool = False) -> Page:
    """Write the page on these runs and benches; the file is whole or absent.

    Raises: OutputExistsError; NotAModelError, DamagedError, RequestError for a folder that is none of either;
    UnsupportedError where the extra `report` is missing.
    """
    require_new_file(out, overwrite=overwrite)
    script = resolve(BUNDLE)()
    page = build_page(folders)
    html = render(page, script)
    replace_file(out, html)
    return page


def build_page(folders: Sequence[Path]) -> Page:
    """What the page says. Raises: as `report`."""
    runs: list[Run] = []
    benches: list[tuple[str, Results]] = []
    for folder in folders:
        require_folder(folder)
        if (folder / RESULTS_FILE).is_file():
            benches.append((folder.resolve().name, read_results(folder)))
        else:
            runs.append(read_run(folder))
    runs = _unique(runs)
    sections: list[Section] = run_sections(runs, predicted_memory) if runs else []
    for name, results in benches:
        sections += bench_sections(results, f"{name}: " if len(folders) > 1 else "")
    names = [*(run.name for run in runs), *(name for name, _ in benches)]
    facts = [] if runs and benches else head_facts(runs) if runs else bench_facts([found for _, found in benches])
    what = "Report on" if len(names) == 1 else "Comparison of"
    return Page(f"{what} {_listed(names)}", tuple(facts), tuple(sections))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Runs whose folders are called alike get the folders' parents before their names, or a number."""
    counts = Counter(run.name for run in runs)
    longer = [f"{r.folder.resolve().parent.name}/{r.name}" if counts[r.name] > 1 else r.name for r in runs]
    counts = Counter(longer)
    named = (f"{name} ({place})" if counts[name] > 1 else name for place, name in enumerate(longer, start=1))
    return [replace(run, name=name) for run, name in zip(runs, named, strict=True)]


# --- HTML


def render(page: Page, script: str) -> str:
    """The page as HTML. script: what sets `vegaEmbed`; it is left out of a page without charts."""
    figures = [part for section in page.sections for part in section.parts if isinstance(part, Figure)]
    scripts = [_inline(script), _inline(_read("page.js"))] if figures else []
    style = _inline(_read("page.css"))
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(_digest(text) for text in scripts) or "'none'",
        "style-src": _digest(style),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.tests |= {"table": _is(Table), "figure": _is(Figure), "text": _is(Text)}
    return environment.from_string(_read("page.html.jinja")).render(
        page=page,
        scripts=scripts,
        style=style,
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        version=versions()["checkpoint-surgery"],
    )


def _is(kind: type) -> Any:
    return lambda part: isinstance(part, kind)


def _read(name: str) -> str:
    return importlib.resources.files("surgery.report").joinpath(name).read_text(encoding="utf-8")


def _inline(text: str) -> str:
    """A text that can stand in an element: nothing in it ends the element."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
