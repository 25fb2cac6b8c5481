"""Charts, as specifications of Vega-Lite: plain data, which `surgery.report.drawing` draws and a page carries.

A chart has one set of colours, which can be told from a white page and from a dark one; its text, axes and grid get
theirs from the page's style sheet, so that a switch between light and dark draws nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.report.parts import Spec

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VEGALITE = "6.4"
PALETTE = ("#2f7ed8", "#d1551c", "#20906b", "#b0559c", "#94790f", "#6f6ad1", "#7c8085", "#c34455")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
HEIGHT = 260
Rows = Sequence[Mapping[str, Any]]
FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
NAMES_AXIS: Spec = {"title": None, "labelLimit": 150, "grid": False, "ticks": False}
STEP_AXIS: Spec = {"title": "step", "grid": False, "format": ",d", "tickMinStep": 1}
CONFIG: Spec = {
    "font": FONT,
    "background": None,
    "view": {"stroke": None},
    "range": {"category": list(PALETTE)},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "gridOpacity": 0.5},
    "legend": {
        "orient": "bottom", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "symbolStrokeWidth": 2, "labelLimit": 260, "columns": 2,
    },
    "header": {"labelFontSize": 12, "titleFontSize": 12},
    "text": {"fontSize": 12},
}  # fmt: skip


def _chart(description: str, rows: Rows, body: Spec, height: Any = HEIGHT) -> Spec:
    return {
        "$schema": SCHEMA,
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG,
        "data": {"name": "rows", "values": [dict(row) for row in rows]},
        **body,
    }


def curves(rows: Rows, *, y: str, description: str, colour: str = "run", scale: str = "linear") -> Spec:
    """Lines over steps, with points where kind is `evaluation`.

    rows: step, value, low, high, kind, and under `colour` the curve's name.
    """
    names = list(dict.fromkeys(row[colour] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    encoding: Spec = {
        "x": {"field": "step", "type": "quantitative", "axis": STEP_AXIS},
        "y": {"field": "value", "type": "quantitative", "title": y, "scale": {"zero": False, "type": scale}},
        "color": {
            "field": colour, "type": "nominal", "scale": {"domain": names},
            "legend": {"title": None} if len(names) > 1 else None,
        },
        "tooltip": [
            {"field": colour, "type": "nominal"},
            {"field": "kind", "type": "nominal"},
            {"field": "step", "type": "quantitative", "format": ",d"},
            {"field": "value", "type": "quantitative", "title": y, "format": ".5~g"},
        ],
    }  # fmt: skip
    if len(kinds) > 1:
        dashes = {"domain": kinds, "range": list(DASHES[: len(kinds)])}
        encoding["strokeDash"] = {"field": "kind", "type": "nominal", "scale": dashes, "legend": {"title": None}}
    layers: list[Spec] = []
    if any(row["low"] < row["high"] for row in rows):
        y_low = {**encoding["y"], "field": "low"}
        band = {"x": encoding["x"], "y": y_low, "y2": {"field": "high"}, "color": encoding["color"]}
        layers.append({"mark": {"type": "area", "opacity": 0.2, "aria": False}, "encoding": band})
    layers.append({"mark": {"type": "line", "strokeWidth": 1.8, "aria": False}, "encoding": {**encoding}})
    points = {key: encoding[key] for key in ("x", "y", "color", "tooltip")}
    seen = {"condition": {"test": "datum.kind == 'evaluation'", "value": 1}, "value": 0}
    mark = {"type": "point", "filled": True, "size": 45, "aria": False}
    layers.append({"mark": mark, "encoding": {**points, "opacity": seen}})
    return _chart(description, rows, {"layer": layers})


def heat(rows: Rows, *, value: str, description: str) -> Spec:
    """A map of layers (`layer`, in order) by projections (`projection`, in order), coloured by `value`."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    projections = list(dict.fromkeys(row["projection"] for row in rows))
    body = {
        "mark": {"type": "rect", "aria": False, "stroke": "transparent", "strokeWidth": 1},
        "encoding": {
            "x": {
                "field": "layer", "type": "ordinal", "sort": sorted(layers),
                "axis": {"title": "layer", "labelAngle": 0, "labelOverlap": True, "grid": False, "orient": "bottom"},
            },
            "y": {
                "field": "projection", "type": "ordinal", "sort": projections,
                "axis": {"title": None, "grid": False, "labelLimit": 150},
            },
            "color": {
                "field": "value", "type": "quantitative", "scale": {"scheme": "viridis", "domainMin": 0},
                "legend": {"title": value, "orient": "top", "gradientLength": 200, "format": ".2~g", "tickCount": 3},
            },
            "tooltip": [
                {"field": "module", "type": "nominal"},
                {"field": "value", "type": "quantitative", "title": value, "format": ".3~g"},
            ],
        },
    }  # fmt: skip
    return _chart(description, rows, body, {"step": 22})


def bars(rows: Rows, *, x: str, description: str, percent: bool = False) -> Spec:
    """Horizontal bars in the rows' order. rows: name, value, label, and low and high where there is a spread."""
    names = [row["name"] for row in rows]
    has_spread = any(row.get("low", row["value"]) < row.get("high", row["value"]) for row in rows)
    top = max([row.get("high", row["value"]) for row in rows], default=0)
    y = {"field": "name", "type": "nominal", "sort": names, "axis": NAMES_AXIS}  # fmt: skip
    quantity = {
        "field": "value", "type": "quantitative", "scale": {"zero": True, "domainMax": top * 1.18 or 1, "nice": False},
        "axis": {"title": x, "tickCount": 5, "format": ".0%" if percent else "~s"},
    }  # fmt: skip
    tooltip = [{"field": "name", "type": "nominal"}, {"field": "label", "type": "nominal", "title": x}]
    colour = {"value": PALETTE[0]}
    layers: list[Spec] = [
        {
            "mark": {"type": "bar", "height": {"band": 0.62}, "aria": False},
            "encoding": {"x": quantity, "y": y, "color": colour, "tooltip": tooltip},
        }
    ]
    if has_spread:
        spread = {"x": {**quantity, "field": "low"}, "x2": {"field": "high"}, "y": y, "tooltip": tooltip}
        layers.append({"mark": {"type": "rule", "strokeWidth": 2, "aria": False}, "encoding": spread})
    label_at = {**quantity, "field": "high" if has_spread else "value"}
    mark = {"type": "text", "align": "left", "dx": 5, "aria": False}
    text = {"field": "label", "type": "nominal"}
    layers.append({"mark": mark, "encoding": {"x": label_at, "y": y, "text": text, "tooltip": tooltip}})
    return _chart(description, rows, {"layer": layers}, {"step": 30})


def stacks(rows: Rows, *, x: str, description: str) -> Spec:
    """Horizontal stacks. rows: name (of a stack), part, value, label, order (of the part)."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    body = {
        "mark": {"type": "bar", "height": {"band": 0.62}, "aria": False},
        "encoding": {
            "x": {"field": "value", "type": "quantitative", "aggregate": "sum", "axis": {"title": x, "format": "~s"}},
            "y": {"field": "name", "type": "nominal", "sort": names, "axis": NAMES_AXIS},
            "color": {"field": "part", "type": "nominal", "scale": {"domain": parts}, "legend": {"title": None}},
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [
                {"field": "name", "type": "nominal"},
                {"field": "part", "type": "nominal"},
                {"field": "label", "type": "nominal", "title": x},
            ],
        },
    }  # fmt: skip
    return _chart(description, rows, body, {"step": 34})


def scatter(rows: Rows, *, x: str, y: str, description: str) -> Spec:
    """Points with names. rows: name, x, y, low and high (of y)."""
    across = {
        "field": "x", "type": "quantitative", "axis": {"title": x, "format": "~s", "tickCount": 5},
        "scale": {"zero": False, "padding": 30},
    }  # fmt: skip
    up = {"field": "y", "type": "quantitative", "title": y, "scale": {"zero": False, "padding": 16}}
    colour = {"field": "name", "type": "nominal", "scale": {"domain": [row["name"] for row in rows]}, "legend": None}
    tooltip = [
        {"field": "name", "type": "nominal"},
        {"field": "x", "type": "quantitative", "title": x, "format": ".4~s"},
        {"field": "y", "type": "quantitative", "title": y, "format": ".4~g"},
    ]
    spread = {"x": across, "y": {**up, "field": "low"}, "y2": {"field": "high"}, "color": colour}
    point = {"x": across, "y": up, "color": colour, "tooltip": tooltip}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "aria": False, "opacity": 0.7}, "encoding": spread},
        {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "aria": False}, "encoding": point},
        {
            "mark": {"type": "text", "dy": -12, "aria": False},
            "encoding": {"x": across, "y": up, "text": {"field": "name", "type": "nominal"}},
        },
    ]
    return _chart(description, rows, {"layer": layers}, 300)
