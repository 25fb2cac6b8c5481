"""The longest sequence whose step fits, found from few predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

GUESSES_FROM, GUESSES_TO = 3, 12  # so many lengths are tried before a parabola is believed, and so long


def longest_that_fits(total: Callable[[int], int], *, start: int, end: int, fit_bytes: int) -> int:
    """The longest sequence, `end` at most, whose total of bytes fits; 0 where a single token does not.

    The next to be tried is where a parabola through the last three says that the bytes are used up, as bytes are one of
    the length but for alignment; else twice the length, and halves between one that fits and one that does not.
    """
    low, high = 0, min(start, end)
    tried = [(high, total(high))]
    while tried[-1][1] <= fit_bytes:
        if high == end:
            return end
        further = _crossing(tried[-GUESSES_FROM:], fit_bytes) + 1 if _may_guess(tried) else 2 * high
        low, high = high, min(max(further, high + 1), end)
        tried.append((high, total(high)))
    while high - low > 1:
        middle = _crossing(tried[-GUESSES_FROM:], fit_bytes) if _may_guess(tried) else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        tried.append((middle, total(middle)))
        low, high = (middle, high) if tried[-1][1] <= fit_bytes else (low, middle)
    return low


def _may_guess(tried: Sequence[tuple[int, int]]) -> bool:
    return GUESSES_FROM <= len(tried) < GUESSES_TO


def _crossing(points: Sequence[tuple[int, int]], wanted: int) -> int:
    """The last length at which a parabola through three points is at most `wanted`."""
    (t0, y0), (t1, y1), (t2, y2) = points
    slope = (y1 - y0) / (t1 - t0)
    bend = ((y2 - y1) / (t2 - t1) - slope) / (t2 - t0)
    linear, offset = slope - bend * (t0 + t1), y0 - slope * t0 + bend * t0 * t1 - wanted
    root = linear * linear - 4 * bend * offset
    if root <= 0 or linear + math.sqrt(root) == 0:
        return (min(t0, t1, t2) + max(t0, t1, t2)) // 2
    return math.floor(-2 * offset / (linear + math.sqrt(root)))
