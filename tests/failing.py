"""Writes that fail half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def failing_at(number: int, real: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """A function that fails on its `number`-th call as a full disk would."""

    def call(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return real(*args)

    return call
