"""The curve that `surgery train` draws in the adapter folder: `training_curve.png`."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError
from surgery.lookup import resolve
from surgery.report.reading import read_run
from surgery.report.run_sections import loss_figure
from surgery.writing import replace_file

CURVE_FILE = "training_curve.png"
PNG = "surgery.report.drawing:png"


def draw_curve(adapter: Path) -> str:
    """Draw the run's loss, and say in a line where it is or why there is none: a run does not fail for its picture."""
    path = adapter / CURVE_FILE
    try:
        draw = resolve(PNG)
        figure = loss_figure([read_run(adapter)])
        if figure is None:
            return "curve not drawn: the log has fewer than two losses"
        replace_file(path, draw({**figure.spec, "title": f"Loss of {adapter.resolve().name}"}))
    except (SurgeryError, OSError, ValueError) as error:  # the last is what the drawing raises
        return f"curve not drawn: {error}"
    return f"curve {path}"
