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
TRAINING, EVALUATION = "training", "evaluation"  # kinds of curves
Rows = Sequence[Mapping[str, Any]]
FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
NAMES_AXIS: Spec = {"title": None, "labelLimit": 130, "grid": False, "ticks": False}
UNITS = {"bytes": "B", "seconds": "s"}
STEP_AXIS: Spec = {"title": "step", "grid": False, "format": ",d", "tickMinStep": 1}
CONFIG: Spec = {
    "font": FONT,
    "background": None,
    "view": {"stroke": None},
    "range": {"category": list(PALETTE)},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "gridOpacity": 0.5},
    "legend": {
        "orient": "bottom", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "symbolStrokeWidth": 2, "labelLimit": 140, "columns": 2, "symbolOpacity": 1,
    },
    "header": {"labelFontSize": 12, "titleFontSize": 12},
    "text": {"fontSize": 12},
}  # fmt: skip


def _chart(description: str, rows: Rows, body: Spec, height: int = HEIGHT) -> Spec:
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


def _amount(title: str, unit: str) -> Spec:
    """An axis of bytes, seconds (`50 ms`) or plain numbers."""
    axis: Spec = {"title": title, "tickCount": 5}
    if unit in UNITS:
        return {**axis, "labelExpr": f"replace(format(datum.value, '~s'), /([^0-9.]*)$/, ' $1{UNITS[unit]}')"}
    return {**axis, "format": "~g"}


def _dashes(names: Sequence[str]) -> list[list[int]]:
    """The first eight names are told apart by colour, the next eight by colour and dashes."""
    return [DASHES[place // len(PALETTE) % len(DASHES)] for place in range(len(names))]


def curves(rows: Rows, *, y: str, description: str, colour: str = "run", unit: str = "") -> Spec:
    """Lines over steps, with points where kind is `evaluation`.

    rows: step, value, low, high, kind, and under `colour` the curve's name.
    """
    names = list(dict.fromkeys(row[colour] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    axis = _amount(y, unit)
    legend = {"title": None, "symbolType": "stroke"}
    encoding: Spec = {
        "x": {"field": "step", "type": "quantitative", "axis": STEP_AXIS},
        "y": {"field": "value", "type": "quantitative", "scale": {"zero": False}, "axis": axis},
        "color": {
            "field": colour, "type": "nominal", "scale": {"domain": names},
            "legend": legend if len(names) > 1 else None,
        },
        "tooltip": [
            {"field": colour, "type": "nominal"},
            {"field": "kind", "type": "nominal"},
            {"field": "step", "type": "quantitative", "format": ",d"},
            {"field": "value", "type": "quantitative", "title": y, "format": ".5~g"},
        ],
    }  # fmt: skip
    line = {**encoding}
    if len(kinds) > 1:
        dashes = {"domain": kinds, "range": list(DASHES[: len(kinds)])}
        line["strokeDash"] = {
            "field": "kind",
            "type": "nominal",
            "scale": dashes,
            "legend": {**legend, "orient": "top"},
        }
    elif len(names) > len(PALETTE):
        line["strokeDash"] = {"field": colour, "type": "nominal", "scale": {"domain": names, "range": _dashes(names)}}
    places = {key: encoding[key] for key in ("x", "y", "color")}
    layers: list[Spec] = []
    if any(row["low"] < row["high"] for row in rows):
        band = {**places, "y": {**encoding["y"], "field": "low"}, "y2": {"field": "high"}}
        layers.append({"mark": {"type": "area", "opacity": 0.2, "aria": False}, "encoding": band})
    layers.append({"mark": {"type": "line", "strokeWidth": 1.8, "aria": False}, "encoding": line})
    seen = {"condition": {"test": f"datum.kind == '{EVALUATION}'", "value": 1}, "value": 0}
    points = {**places, "tooltip": encoding["tooltip"], "opacity": seen}
    layers.append({"mark": {"type": "point", "filled": True, "size": 45, "aria": False}, "encoding": points})
    return _chart(description, rows, {"layer": layers})


def heat(rows: Rows, *, value: str, description: str) -> Spec:
    """A map of layers by projections, coloured by value. rows: layer (a number or text), projection, value, module."""
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: (isinstance(layer, str), layer))
    projections = list(dict.fromkeys(row["projection"] for row in rows))
    body = {
        "mark": {"type": "rect", "aria": False},
        "encoding": {
            "x": {
                "field": "layer", "type": "ordinal", "sort": layers,
                "axis": {"title": "layer", "labelAngle": 0, "labelOverlap": True, "grid": False},
            },
            "y": {"field": "projection", "type": "ordinal", "sort": projections, "axis": NAMES_AXIS},
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
    return _chart(description, rows, body, 22 * len(projections))


def bars(rows: Rows, *, x: str, description: str, unit: str = "") -> Spec:
    """Horizontal bars in the rows' order.

    rows: name, value, label; low and high where there is a spread; group where bars are of several kinds.
    """
    names, groups = [row["name"] for row in rows], list(dict.fromkeys(row.get("group", "") for row in rows))
    has_spread = any(row.get("low", row["value"]) < row.get("high", row["value"]) for row in rows)
    end = "high" if has_spread else "value"
    top = max(row[end] for row in rows) or 1
    y = {"field": "name", "type": "nominal", "sort": names, "axis": NAMES_AXIS}
    scale = {"zero": True, "domainMax": top * 1.32, "nice": False}  # room for the last label
    quantity = {"field": "value", "type": "quantitative", "scale": scale, "axis": _amount(x, unit)}
    tooltip = [{"field": "name", "type": "nominal"}, {"field": "label", "type": "nominal", "title": x}]
    colour: Spec = {"value": PALETTE[0]}
    if len(groups) > 1:
        colour = {"field": "group", "type": "nominal", "scale": {"domain": groups}, "legend": {"title": None}}
    bar = {"x": quantity, "y": y, "color": colour, "tooltip": tooltip}
    layers: list[Spec] = [{"mark": {"type": "bar", "height": {"band": 0.62}, "aria": False}, "encoding": bar}]
    if has_spread:
        spread = {"x": {**quantity, "field": "low"}, "x2": {"field": "high"}, "y": y, "tooltip": tooltip}
        layers.append({"mark": {"type": "rule", "strokeWidth": 2, "aria": False}, "encoding": spread})
    text = {"x": {**quantity, "field": end}, "y": y, "text": {"field": "label", "type": "nominal"}, "tooltip": tooltip}
    layers.append({"mark": {"type": "text", "align": "left", "dx": 5, "aria": False}, "encoding": text})
    return _chart(description, rows, {"layer": layers}, 30 * len(rows))


def scatter(rows: Rows, *, x: str, y: str, description: str, unit: str = "") -> Spec:
    """Points with their names, on the left and the right by turns. rows: name, x, y, label (of x), low, high (of y)."""
    sides = {row["name"]: place % 2 for place, row in enumerate(sorted(rows, key=lambda row: row["x"]))}
    rows = [{**row, "side": sides[row["name"]]} for row in rows]
    wide = {"zero": False, "padding": 56}
    across = {"field": "x", "type": "quantitative", "axis": _amount(x, unit), "scale": wide}
    up = {"field": "y", "type": "quantitative", "title": y, "scale": {"zero": False, "padding": 16}}
    colour = {"field": "name", "type": "nominal", "scale": {"domain": [row["name"] for row in rows]}, "legend": None}
    tooltip = [
        {"field": "name", "type": "nominal"},
        {"field": "label", "type": "nominal", "title": x},
        {"field": "y", "type": "quantitative", "title": y, "format": ".4~g"},
    ]
    spread = {"x": across, "y": {**up, "field": "low"}, "y2": {"field": "high"}, "color": colour}
    point = {"x": across, "y": up, "color": colour, "tooltip": tooltip}
    name = {"x": across, "y": up, "text": {"field": "name", "type": "nominal"}}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "aria": False, "opacity": 0.7}, "encoding": spread},
        {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1, "aria": False}, "encoding": point},
    ]
    for side, (align, away) in enumerate((("right", -9), ("left", 9))):
        mark = {"type": "text", "align": align, "baseline": "middle", "dx": away, "aria": False}
        layers.append({"transform": [{"filter": f"datum.side == {side}"}], "mark": mark, "encoding": name})
    return _chart(description, rows, {"layer": layers}, 300)
