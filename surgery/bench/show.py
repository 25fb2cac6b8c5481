"""A bench's results as tables that fit a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from surgery.bench.results import FLOOR, Results, Row, Size, quartiles, step_ratio
from surgery.errors import counted
from surgery.table import align, size_text

NONE = "-"


def lines(results: Results) -> list[str]:
    """What people read."""
    where = results.where
    machine = f"{where.device_name}, {counted(where.threads, 'thread')}"
    head = f"{results.spec['model']}, {results.tokens_per_step:,} tokens a step, {machine}"
    blocks = [[head], _cost(results), _memory(results)]
    if any(row.curves for row in results.rows):
        blocks.append(_scores(results))
    blocks.append([f"note: {remark}" for remark in results.remarks()])
    return [line for number, block in enumerate(filter(None, blocks)) for line in ([""] if number else []) + block]


def _cost(results: Results) -> list[str]:
    head = ("method", "size", "trained", "step s", "quartiles", "to floor", "to LoRA", "tokens/s", "J a step")
    floor, lora = results.row(FLOOR), results.lora()
    rows = [
        (
            row.method,
            _size_name(row.size),
            _number(row.trained_values),
            _median(row.seconds),
            _quartiles(row.seconds),
            _ratio(row, floor),
            _ratio(row, lora),
            f"{results.tokens_per_step / statistics.median(row.seconds):,.0f}" if row.seconds else NONE,
            NONE if row.energy_joules is None else f"{row.energy_joules:.3g}",
        )
        for row in results.rows
    ]
    return align([head, *rows], right=range(1, len(head)))


def _memory(results: Results) -> list[str]:
    found_by = {row.longest_by for row in results.rows if row.longest_by}
    longest = f"longest ({found_by.pop()})" if len(found_by) == 1 else "longest"
    head = ("method", "weights", "saved", "peak", longest, "forward s", "quartiles", "forward peak", "merged")
    rows = [
        (
            row.method,
            _size(row.weight_bytes),
            _size(row.saved_bytes),
            _size(row.peak_bytes),
            _number(row.longest_tokens),
            _median(row.inference_seconds),
            _quartiles(row.inference_seconds),
            _size(row.inference_bytes),
            {True: "yes", False: "no", None: NONE}[row.merged],
        )
        for row in results.rows
    ]
    lines: list[tuple[str, ...]] = [head, *rows]
    if all(row.longest_tokens is None for row in results.rows):  # not sought, or not found, which notes say
        lines = [(*line[:4], *line[5:]) for line in lines]
    return align(lines, right=range(1, len(lines[0])))


def _scores(results: Results) -> list[str]:
    metric = results.metric
    head = ("method", "learning rate", metric, "spread", "seeds", "last loss", "training s")
    rows = []
    for row in results.rows:
        found = [curve.scores[metric] for curve in row.curves if metric in curve.scores]
        last = [curve.losses[-1] for curve in row.curves if curve.losses]
        rows.append(
            (
                row.method,
                NONE if row.learning_rate is None else f"{row.learning_rate:g}",
                f"{statistics.mean(found):.4f}" if found else NONE,
                f"{statistics.stdev(found):.4f}" if len(found) > 1 else NONE,
                f"{len(found)}",
                f"{statistics.mean(last):.4f}" if last else NONE,
                f"{statistics.mean(curve.seconds for curve in row.curves):.1f}" if row.curves else NONE,
            )
        )
    return align([head, *rows], right=range(1, len(head)))


def _number(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _size_name(size: Size | None) -> str:
    return f"{size.name} {size.value:,}" if size else NONE


def _size(value: int | None) -> str:
    return NONE if value is None else size_text(value)


def _median(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3g}" if seconds else NONE


def _quartiles(seconds: Sequence[float]) -> str:
    if len(seconds) < 2:
        return NONE
    _, low, high = quartiles(seconds)
    return f"{low:.3g}-{high:.3g}"


def _ratio(row: Row, other: Row | None) -> str:
    found = step_ratio(row, other)
    return f"{found[0]:.3f}" if found else NONE
