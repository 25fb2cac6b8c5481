"""Vega, which draws the charts: what a page needs to draw them itself, and PNG without a browser.

Needs the extra `report`: vl-convert-python, one wheel with Vega, Vega-Lite and Vega-Embed in it. Nothing is fetched.
"""

from __future__ import annotations

import vl_convert

from surgery.report.charts import VEGALITE
from surgery.report.parts import Spec

PNG_WIDTH, PNG_SCALE = 760, 2


def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which sets `vegaEmbed`."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGALITE)
    return script


def png(spec: Spec, width: int = PNG_WIDTH) -> bytes:
    """A chart on white. `width`: in pixels, of which the file has PNG_SCALE each way for one."""
    fixed = {**spec, "width": width, "background": "white", "padding": 16}
    data: bytes = vl_convert.vegalite_to_png(fixed, vl_version=VEGALITE, scale=PNG_SCALE)
    return data
